"""Who is sent away, and when it may come again."""

from __future__ import annotations

import pytest

from kvferry.prefill.admission import MAX_RETRY_MS, MIN_RETRY_MS, Held, check_room
from kvferry.prefill.config import PrefillConfig
from kvferry.prefill.errors import QueueFull

CONFIG = PrefillConfig(max_requests=8, max_prompt_tokens_in_flight=1000)


def held(tenant: str = "a", tokens: int = 10, *, warm: bool = False) -> Held:
    return Held(tenant=tenant, warm=warm, num_tokens=tokens)


def refusal(running: list[Held], new: Held, seconds_left: float = 10.0) -> QueueFull:
    with pytest.raises(QueueFull) as caught:
        check_room(running, new, CONFIG, seconds_left)
    return caught.value


def test_bounds_of_the_worker() -> None:
    running = [held(str(i)) for i in range(7)]
    check_room(running, held("new"), CONFIG, 0.0)
    assert "is full (8 requests)" in str(refusal([*running, held("7")], held("new")))
    check_room([held(tokens=600)], held("b", 400), CONFIG, 0.0)
    refusal([held(tokens=600)], held("b", 401))


def test_a_tenant_leaves_room_for_another() -> None:
    running = [held() for _ in range(6)]
    assert "of this tenant" in str(refusal(running, held()))
    check_room(running, held("b"), CONFIG, 0.0)
    assert "of this tenant" in str(refusal([held(tokens=700)], held(tokens=51)))
    check_room([held(tokens=700)], held(tokens=50), CONFIG, 0.0)
    check_room([], held(tokens=1000), CONFIG, 0.0)  # alone it may be as long as the worker can hold


def test_warming_leaves_room_for_requests() -> None:
    running = [held(str(i), warm=True) for i in range(4)]
    assert "that warm the store" in str(refusal(running, held("new", warm=True)))
    check_room(running, held("new"), CONFIG, 0.0)


def test_the_hint_is_the_time_until_there_is_room() -> None:
    running = [held(str(i), 100) for i in range(8)]
    assert refusal(running, held("new", 200), 8.0).retry_after_ms == 2000  # 200 of the 800 tokens of 8 s
    assert refusal(running, held("new", 1), 8.0).retry_after_ms == 1000  # one of the 8 requests
    assert refusal(running, held("new", 1000), 8.0).retry_after_ms == 8000
    assert refusal(running, held("new"), 0.0).retry_after_ms == MIN_RETRY_MS
    assert refusal(running, held("new"), 1e9).retry_after_ms == MAX_RETRY_MS


def test_small_bounds_are_not_rounded_to_nothing() -> None:
    one = PrefillConfig(max_requests=1)
    check_room([], held(), one, 0.0)
    with pytest.raises(QueueFull):
        check_room([held("b")], held(), one, 0.0)
    check_room([held()], held(), PrefillConfig(max_requests=2), 0.0)
