"""`kvferry eval` and `kvferry calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvferry.deploy.cli_failure import fail

DEFAULT_PRESETS = ("kv2", "kv3", "kv4")
BASELINES = ("kivi2", "kivi4")


def eval_command(
    model: Annotated[str, typer.Argument(help='Hugging Face folder, .gguf file, hub id, or "demo".')],
    preset: Annotated[
        list[str] | None,
        typer.Option(help="kv2, kv3, kv4, kv16 or a .json file of a spec; may be repeated. Default: kv2, kv3, kv4."),
    ] = None,
    text: Annotated[Path | None, typer.Option(help="A text of your own; else Python's language reference.")] = None,
    context: Annotated[
        list[int] | None, typer.Option(help="Tokens of context; may be repeated. Default: 1536.")
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows, spread over the text.")] = 8,
    predict: Annotated[int, typer.Option(min=1, help="Tokens predicted in each window.")] = 256,
    generate: Annotated[
        int, typer.Option(min=0, help="Tokens to write after each window, compared with 16 bits; 0: none.")
    ] = 128,
    needle: Annotated[
        list[int] | None, typer.Option(help="Hide a pass key in prompts of so many tokens; may be repeated.")
    ] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write the results to this file.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Also draw PNG plots into this folder; needs matplotlib.")] = None,
    kernels: Annotated[str | None, typer.Option(help="reference, cpu or triton; else what serve would run.")] = None,
) -> None:
    """What a smaller cache costs in answers, against the unquantized cache and other quantizers, in one run.

    Presets run through the product: prefill, store, decode. Perplexity, KL divergence and top-1 agreement are of the
    tokens after each window's context.
    """
    from kvferry.deploy.evaluation.command import EvalPlan, run_plan
    from kvferry.deploy.plotting import require_matplotlib

    try:
        if plots is not None:
            require_matplotlib()
            plots.mkdir(parents=True, exist_ok=True)
        run_plan(
            EvalPlan(
                model=model,
                presets=tuple(preset or DEFAULT_PRESETS),
                baselines=BASELINES,
                text=text,
                contexts=tuple(context or (1536,)),
                windows=windows,
                predict=predict,
                generate=generate,
                needle_lengths=tuple(needle or ()),
                kernels=kernels,
            ),
            json_path=json_path,
            plots=plots,
        )
    except (OSError, RuntimeError, ValueError) as error:
        fail(str(error))


def calibrate_command(
    model: Annotated[str, typer.Argument(help='Hugging Face folder, .gguf file, hub id, or "demo".')],
    out: Annotated[Path, typer.Option(help="The spec file to write, *.json.")] = Path("kvferry-spec.json"),
    bits: Annotated[float, typer.Option(help="Effective bits at 4,096 tokens, everything counted.")] = 3.0,
    text: Annotated[Path | None, typer.Option(help="A text of your own; else Python's language reference.")] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows, spread over the text.")] = 2,
    window_blocks: Annotated[int, typer.Option(min=2, help="Blocks of 128 tokens in a window.")] = 5,
    plot: Annotated[Path | None, typer.Option(help="Also draw the error by layer (.png); needs matplotlib.")] = None,
    kernels: Annotated[str | None, typer.Option(help="reference, cpu or triton; else what serve would run.")] = None,
) -> None:
    """Find the layers that suffer from few bits, and write a spec that spends a budget of bits on them.

    Deterministic. What is measured is kept beside the spec file, so that an interrupted run goes on where it stopped.
    """
    from kvferry.deploy.calibration.command import CalibrationPlan, run_calibration
    from kvferry.deploy.plotting import require_matplotlib

    try:
        if out.suffix != ".json":
            raise ValueError(f"--out {out}: a spec file ends in .json")
        if plot is not None:
            require_matplotlib()  # before minutes of measuring, not after them
        run_calibration(
            CalibrationPlan(
                model=model, bits=bits, text=text, windows=windows, window_blocks=window_blocks, kernels=kernels
            ),
            out,
            plot=plot,
        )
    except (OSError, RuntimeError, ValueError) as error:
        fail(str(error))
