"""Two clocks: the one on the wall, and the processor time of all threads of this process.

On a busy machine a step waits for a processor, and the wall clock measures the company. With one thread, processor time
hardly changes with it; with several, threads that wait for each other spin, and it counts that too.
"""

from __future__ import annotations

import time
from typing import NamedTuple


class StepTime(NamedTuple):
    """Seconds of a step, or a moment on both clocks."""

    wall: float
    cpu: float

    def since(self, before: StepTime) -> StepTime:
        return StepTime(self.wall - before.wall, self.cpu - before.cpu)


def now() -> StepTime:
    return StepTime(time.perf_counter(), time.process_time())
