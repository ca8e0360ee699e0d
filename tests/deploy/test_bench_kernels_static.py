from __future__ import annotations

import io

import pytest
from rich.console import Console

from kvferry.deploy import bench_kernels_static
from kvferry.deploy.bench_kernels_static import StaticKernel, print_static_kernels, static_kernels
from kvferry.kernels.machine_code import MachineCode


def test_kernels_are_what_was_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    code = MachineCode(
        name="packed-d128",
        target="sm_90",
        registers=160,
        spills=0,
        loop=640,
        instructions_per_token_head=20.0,
        static_bound=0.98,
        unpack_asm=16,
        opcodes={"HMMA.16816.F32": 34},
    )
    monkeypatch.setattr(bench_kernels_static, "compile_kernels", lambda targets: [code])
    (kernel,) = static_kernels(["sm_90"])
    assert kernel == StaticKernel(
        name="packed-d128",
        target="sm_90",
        registers=160,
        spills=0,
        instructions_per_token_head=20.0,
        static_bound=0.98,
    )


def test_the_table_says_that_it_is_an_estimate_and_what_it_assumes() -> None:
    out = io.StringIO()
    kernels = [
        StaticKernel(
            name=name,
            target=target,
            registers=160,
            spills=0,
            instructions_per_token_head=length,
            static_bound=bound,
        )
        for name, target, length, bound in (
            ("packed-d128", "sm_90", 20.04, 0.98),
            ("merge-d128", "gfx942", None, None),
        )
    ]
    print_static_kernels(kernels, console=Console(file=out, width=100))
    text = " ".join(out.getvalue().split())
    for said in (
        "ESTIMATE",
        "Assumed, not measured: 92%",
        "H100 SXM",
        "20.0",
        "0.98",
        "gfx942: registers and spills only",
    ):
        assert said in text
