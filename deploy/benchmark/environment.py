"""Where a measurement was made, for its JSON file."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import transformers

from kvferry.deploy.bench_kernels import cpu_name


@dataclass(frozen=True, kw_only=True)
class Environment:
    cpu: str
    cores: int
    threads: int
    torch: str
    transformers: str
    model: str
    preset: str
    load_before: float
    """Load average of one minute."""
    load_after: float

    @classmethod
    def now(cls, *, model: str, preset: str, threads: int, load_before: float) -> Environment:
        return cls(
            cpu=cpu_name(),
            cores=len(os.sched_getaffinity(0)),
            threads=threads,
            torch=torch.__version__,
            transformers=transformers.__version__,
            model=model,
            preset=preset,
            load_before=load_before,
            load_after=os.getloadavg()[0],
        )

    @property
    def sentence(self) -> str:
        return (
            f"{self.cpu}, {self.threads} threads on {self.cores} cores, torch {self.torch}, transformers "
            f"{self.transformers}; load average {self.load_before:.1f} before, {self.load_after:.1f} after"
        )

    @property
    def is_busy(self) -> bool:
        return max(self.load_before, self.load_after) > self.cores + self.threads / 2


def short_dtype(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, str(dtype))
