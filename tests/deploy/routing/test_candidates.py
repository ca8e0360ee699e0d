"""Which workers may serve together: what a decode worker can read, and whose blocks have the same keys."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from kvferry.deploy.routing.candidates import Candidates
from kvferry.proto import worker_pb2


def worker(name: str, *, weights: bytes = b"w", numerics: bytes = b"one rank") -> Any:
    identity = worker_pb2.ModelIdentity(weights_digest=weights, layout_version=1, numerics_class=numerics)
    return SimpleNamespace(address=name, info=worker_pb2.WorkerInfo(identity=identity, max_model_len=100))


def pairs(candidates: Candidates[Any]) -> set[tuple[str, str]]:
    return {(d.address, p.address) for g in candidates.groups for d in g.decodes for p in g.prefills}


DECODES = [worker("d1"), worker("d2", numerics=b"two ranks"), worker("dx", weights=b"other")]
PREFILLS = [worker("p1"), worker("p2", numerics=b"two ranks"), worker("q2", numerics=b"two ranks")]


def test_any_numerics_class_is_read_and_nothing_else_that_differs() -> None:
    candidates = Candidates.of(DECODES, PREFILLS, has_prefills=True)
    assert pairs(candidates) == {(d, p) for d in ("d1", "d2") for p in ("p1", "p2", "q2")}
    assert candidates.num_pairs == 6


def test_prefill_workers_of_a_group_make_blocks_of_one_class() -> None:
    groups = Candidates.of(DECODES, PREFILLS, has_prefills=True).groups
    assert sorted([p.address for p in group.prefills] for group in groups) == [["p1"], ["p2", "q2"]]


def test_a_request_that_goes_on_elsewhere_prefers_the_classes_of_its_first_workers() -> None:
    candidates = Candidates.of(DECODES, PREFILLS, has_prefills=True)
    assert pairs(candidates.of_classes(b"one rank", b"two ranks")) == {("d1", "p2"), ("d1", "q2")}
    left = candidates.without([DECODES[0]])
    assert pairs(left.of_classes(b"one rank", b"two ranks")) == pairs(left)  # there are no others
