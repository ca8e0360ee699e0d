"""Linear layers whose weights lie in memory as oneDNN's matmul reads them.

Unpacked, the library re-orders the weights at every call: with the few rows of a decode step that takes as long as the
matmul itself (docs/benchmarks.md). In bf16 the results are bit for bit those of `nn.Linear`; in fp32, where `nn.Linear`
is MKL's, they are not. A row keeps its bits at every row count that is used; it is tried on the machine.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

ROWS_HINT = 4
"""Row count for which the library chooses the layout: a decode step of one to four sequences."""


class PrepackedLinear(nn.Module):
    """`nn.Linear` for inference on a CPU. Holds a re-ordered copy of `linear`'s weight, and its bias."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.dtype = linear.weight.dtype
        self.num_bytes = linear.weight.nbytes + (0 if linear.bias is None else linear.bias.nbytes)
        self.bias: Tensor | None
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())
        # Opaque to torch: neither a buffer nor in the state dict.
        self._packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS_HINT)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features]."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")
        return out


def can_prepack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies this type natively on this CPU."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    capabilities = torch.cpu.get_capabilities()
    native_bf16 = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return dtype == torch.float32 or (dtype == torch.bfloat16 and bool(native_bf16))


def replace_linears(model: nn.Module) -> None:
    """Puts a `PrepackedLinear` in the place of every `nn.Linear`. A weight that is the embedding, too, stays there."""
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, PrepackedLinear(module))
