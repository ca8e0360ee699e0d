"""The CPU kernels: C with AVX2 intrinsics, compiled at installation and loaded by ctypes."""

from kvferry.kernels.cpu.native import NativeKernels, NativeUnavailable, load

__all__ = ["NativeKernels", "NativeUnavailable", "load"]
