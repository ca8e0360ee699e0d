"""What a calibration has measured so far, so that it can be taken up again."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

from kvferry.deploy.calibration.budget import Place
from kvferry.kernels.spec import TensorSpec


class ProgressFile:
    """Measurements under a fingerprint of everything that decides them; those of another fingerprint are dropped."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        self._path = path
        self._fingerprint = fingerprint
        self._measured: dict[str, float] = {}
        try:
            content = json.loads(path.read_text())
            if content["fingerprint"] == fingerprint:
                self._measured = {str(key): float(value) for key, value in content["measured"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass  # none, or not ours: everything is measured again

    def get(self, place: Place, tensor: TensorSpec) -> float | None:
        return self._measured.get(_name(place, tensor))

    def put(self, place: Place, tensor: TensorSpec, kl: float) -> None:
        """Raises OSError."""
        self._measured[_name(place, tensor)] = kl
        fresh = self._path.with_name(self._path.name + ".new")
        fresh.write_text(json.dumps({"fingerprint": self._fingerprint, "measured": self._measured}, indent=1))
        os.replace(fresh, self._path)

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)


def _name(place: Place, tensor: TensorSpec) -> str:
    return json.dumps([place.layer, place.side, asdict(tensor)], sort_keys=True)
