"""How many ranks each worker of a deployment has, and what each of them gets of the machine."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import AutoConfig

from kvferry.deploy.models import find_model
from kvferry.deploy.ranks.shard_model import check_group_size
from kvferry.deploy.settings import Settings


@dataclass(frozen=True, kw_only=True)
class RankCounts:
    """`tensor_parallel` of the two kinds of workers."""

    prefill: int
    decode: int
    total: int
    """Of all workers."""

    @classmethod
    def of(cls, settings: Settings) -> RankCounts:
        """Raises ValueError when the model's heads cannot be shared so, or UnsupportedModel."""
        prefill, decode = settings.prefill.tensor_parallel, settings.decode.tensor_parallel
        if settings.prefill.count == 0 and prefill > 1:
            raise ValueError("prefill.tensor_parallel: no prefill worker is started (prefill.count is 0); set decode's")
        config = AutoConfig.from_pretrained(find_model(settings.model).path)
        for size in (prefill, decode):
            check_group_size(config, size)
        total = settings.prefill.count * prefill + settings.decode.count * decode
        return cls(prefill=prefill, decode=decode, total=total)

    def gpus(self, size: int, *, available: float) -> float:
        """Of a worker of `size` ranks: one a rank; workers of one rank share what there is.

        Raises ValueError when there are fewer than ranks.
        """
        if size > 1 and 0 < available < self.total:
            raise ValueError(
                f"tensor_parallel: the workers have {self.total} ranks, and there are {available:.0f} GPUs"
            )
        return size * min(1.0, available / self.total)


def threads_of_rank(settings: Settings, size: int, *, num_cores: int) -> int:
    """Of one of a worker's `size` ranks, where the settings name none: they share the cores."""
    return settings.threads or max(num_cores // size, 1)
