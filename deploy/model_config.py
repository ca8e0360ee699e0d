"""What every worker of a deployment loads, and on what."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from kvferry.deploy.spec_file import spec_from_json, spec_to_json
from kvferry.kernels.spec import KVQuantSpec


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What to load and how to run it; the same for every worker of a deployment, but for `tensor_parallel`."""

    model: str
    served_name: str | None = None
    """What clients call the model; None: the name of where it was loaded from."""
    spec: KVQuantSpec = field(default_factory=KVQuantSpec)
    device: str = "auto"
    dtype: str = "auto"
    weight_quantization: str = "none"
    """"none" or "int8"."""
    kernels: str | None = None
    """"reference", "cpu", "cpu-int8" or "triton"; None chooses."""
    max_model_len: int = 0
    """0: the model's own window."""
    tensor_parallel: int = 1
    """Ranks that share the model, each a process."""

    def __post_init__(self) -> None:
        if self.tensor_parallel > 1 and self.weight_quantization != "none":
            raise ValueError(
                f"weight_quantization {self.weight_quantization} and tensor_parallel {self.tensor_parallel} do not go "
                "together: set one of them to none or 1"
            )

    def to_message(self) -> dict[str, Any]:
        """For another process: strings, numbers and None."""
        return asdict(self) | {"spec": spec_to_json(self.spec)}

    @classmethod
    def from_message(cls, message: dict[str, Any]) -> ModelConfig:
        """Raises ValueError or TypeError for what `to_message` did not make."""
        return cls(**message | {"spec": spec_from_json(message["spec"])})


def resolve_device(name: str) -> torch.device:
    """ "auto" is a GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """ "auto" is bf16 where the processor multiplies it natively, else fp32."""
    if name == "auto":
        capabilities = torch.cpu.get_capabilities()
        native = device.type != "cpu" or capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
        return torch.bfloat16 if native else torch.float32
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}.get(name)
    if dtype is None:
        raise ValueError(f"dtype {name!r} is not one of auto, float32, bfloat16, float16")
    return dtype
