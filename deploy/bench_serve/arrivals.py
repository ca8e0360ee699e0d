"""When requests arrive in an open loop."""

from __future__ import annotations

import math

import numpy as np

from kvferry.deploy.bench_serve.workload import Stream


def arrival_times(count: int, *, rate: float, burstiness: float = 1.0, seed: int = 0) -> list[float]:
    """Seconds from the start, ascending. Gaps are gamma distributed with the shape `burstiness` and the mean 1 / rate.

    1 is a Poisson process, below 1 is burstier, above 1 more regular; a rate of inf sends all at once. The times are
    stretched so that the last is count / rate exactly: else two seeds would offer loads some per cent apart. Both as in
    `get_request` of vllm/benchmarks/serve.py.
    """
    if not rate > 0 or not 0 < burstiness < math.inf:
        raise ValueError("--request-rate and --burstiness must be positive numbers")
    if math.isinf(rate):
        return [0.0] * count
    times = np.cumsum(np.random.default_rng((seed, Stream.ARRIVALS)).gamma(burstiness, size=count))
    if times[-1] <= 0:
        raise ValueError(f"--burstiness {burstiness:g} is too small: all gaps between requests are 0")
    return [float(x) for x in times * (count / rate / times[-1])]
