"""The `kvferry` command. Every subcommand explains itself with --help."""

from __future__ import annotations

import importlib
import json
import logging
import signal
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from kvferry.deploy.bench_router.command import bench_router_command
from kvferry.deploy.bench_serve.command import bench_serve_command
from kvferry.deploy.cli_access import CaOption, TokenFileOption, client_access
from kvferry.deploy.cli_bench import bench_decode_command, bench_memory_command
from kvferry.deploy.cli_bench_store import bench_store_command
from kvferry.deploy.cli_bench_transfer import bench_transfer_command
from kvferry.deploy.cli_chooser import bench_chooser_command
from kvferry.deploy.cli_config import config as config_commands
from kvferry.deploy.cli_doctor import doctor_command
from kvferry.deploy.cli_failure import fail
from kvferry.deploy.cli_fidelity import calibrate_command, eval_command
from kvferry.deploy.cli_prefetch import prefetch_prompt
from kvferry.deploy.cli_prefill import bench_prefill_command
from kvferry.deploy.cli_processes import register as register_processes
from kvferry.deploy.cli_token import token as token_commands
from kvferry.deploy.client import Client, ClientError, GenerateOptions
from kvferry.deploy.cluster.commands import add_cluster_commands
from kvferry.deploy.prefix.commands import prefix
from kvferry.deploy.settings import Settings
from kvferry.deploy.spec_file import resolve_spec
from kvferry.deploy.store_settings import disk_options
from kvferry.kvstore.process_logs import configure_logs

app = typer.Typer(
    name="kvferry",
    help="LLM serving with one packed 2-bit KV cache from prefill to decode.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

bench = typer.Typer(
    help="Measure: parts against a baseline in the same run, or a whole deployment.", no_args_is_help=True
)
app.add_typer(bench, name="bench")
bench.command("serve")(bench_serve_command)
bench.command("prefill")(bench_prefill_command)
bench.command("store")(bench_store_command)
bench.command("decode")(bench_decode_command)
bench.command("memory")(bench_memory_command)
bench.command("chooser")(bench_chooser_command)
bench.command("transfer")(bench_transfer_command)
bench.command("router")(bench_router_command)
app.command("eval")(eval_command)
app.command("calibrate")(calibrate_command)
app.command("doctor")(doctor_command)
app.add_typer(prefix, name="prefix")
app.add_typer(config_commands, name="config")
app.add_typer(token_commands, name="token")
add_cluster_commands(app)
register_processes(app)

STATIC_TARGETS = ("sm_80", "sm_90")

ConfigOption = Annotated[Path | None, typer.Option("--config", help="YAML or TOML file; see docs/configuration.md.")]
PresetOption = Annotated[
    str | None, typer.Option("--preset", help="How K and V are quantized: kv2, kv3, kv4, kv16 or a .json file.")
]
ModelOption = Annotated[str | None, typer.Option("--model", help='Hugging Face folder, .gguf file, hub id, or "demo".')]


@app.command()
def serve(
    model: Annotated[str | None, typer.Argument(help='Hugging Face folder, .gguf file, hub id, or "demo".')] = None,
    config: ConfigOption = None,
    host: Annotated[str | None, typer.Option(help="Address that the gateway binds.")] = None,
    port: Annotated[int | None, typer.Option(help="Port of the gateway.")] = None,
    kv_memory: Annotated[
        str | None, typer.Option(help="Block pool of each decode worker: 2GiB, or 80% of what is free.")
    ] = None,
    store_memory: Annotated[str | None, typer.Option(help="Memory of the KV store node, e.g. 4GiB.")] = None,
    store_disk: Annotated[Path | None, typer.Option(help="Keep blocks under this folder, too.")] = None,
    store_disk_bytes: Annotated[str | None, typer.Option(help="How many bytes, e.g. 20GiB.")] = None,
    redis: Annotated[str | None, typer.Option(help="Keep blocks in this Redis, too: redis://host:port/db.")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Tokens of prompt and answer together.")] = None,
    preset: PresetOption = None,
    weights: Annotated[str | None, typer.Option(help="none, or int8: linear layers at half of bf16's memory.")] = None,
    threads: Annotated[int | None, typer.Option(min=0, help="Threads of each CPU worker; 0: one a core.")] = None,
    both_roles: Annotated[
        bool, typer.Option("--both-roles", help="Decode workers prefill by themselves: one copy of the model.")
    ] = False,
) -> None:
    """Start store, prefill worker, decode worker and gateway on this machine; Ctrl-C stops them."""
    from kvferry.deploy.app import Deployment

    settings = _settings(
        config,
        model=model,
        max_model_len=max_model_len,
        preset=preset,
        weight_quantization=weights,
        threads=threads,
        gateway={"host": host, "port": port},
        prefill={"count": 0 if both_roles else None},
        decode={"kv_memory": kv_memory},
        store={"memory": store_memory, "disk": disk_options(store_disk, store_disk_bytes), "redis": redis},
    )
    configure_logs(settings.log.config(), process="serve")
    stopping = threading.Event()
    try:
        with Deployment(settings) as deployment:
            for number in (signal.SIGTERM, signal.SIGINT):  # after Ray has started: it sets handlers of its own
                signal.signal(number, lambda *_: stopping.set())
            print(f"kvferry serves on {deployment.address}", flush=True)
            while not stopping.wait(1.0):
                pass
    except (OSError, RuntimeError, ValueError) as error:
        fail(str(error))


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Argument(help="The prompt; or use --prompt-file.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="Read the prompt from this file; - is standard input.")
    ] = None,
    question: Annotated[str | None, typer.Option(help="Ask this about the text of the prompt.")] = None,
    address: Annotated[
        str, typer.Option(help="host:port of the gateway, or of several: a:7600,b:7600.")
    ] = "127.0.0.1:7600",
    token_file: TokenFileOption = None,
    ca: CaOption = None,
    raw: Annotated[bool, typer.Option("--raw", help="Do not apply the chat template.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of streaming text.")] = False,
    max_tokens: Annotated[int, typer.Option(min=1)] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    top_k: Annotated[int, typer.Option(min=0)] = 0,
    seed: Annotated[int | None, typer.Option(min=0)] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop before this string; may be repeated.")] = None,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds.")] = 600.0,
    prefetch: Annotated[
        bool, typer.Option("--prefetch", help="No answer: only have the prompt's blocks computed and stored ahead.")
    ] = False,
) -> None:
    """Send one prompt to a running gateway and stream the answer."""
    text = _prompt_text(prompt, prompt_file)
    if question:
        text = f"{text}\n\n{question}"
    access = client_access(token_file, ca)
    if prefetch:
        prefetch_prompt(address, text, access=access, raw=raw, as_json=as_json, timeout=timeout)
        return
    options: GenerateOptions = {
        "timeout": timeout,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p or 1.0,
        "top_k": top_k,
        "stop": stop or [],
    }
    if seed is not None:
        options["seed"] = seed
    if not raw:
        options["messages"] = [{"role": "user", "content": text}]
    pieces: list[str] = []
    ids: list[int] = []
    reason, usage = "", None
    try:
        with Client(address, access=access) as client:
            for chunk in client.stream(text if raw else None, **options):
                pieces.append(chunk.text)
                ids.extend(chunk.token_ids)
                if not as_json:
                    print(chunk.text, end="", flush=True)
                if chunk.usage is not None:
                    reason, usage = chunk.finish_reason, chunk.usage
    except (ClientError, ValueError) as error:
        fail(str(error))
    assert usage is not None
    if as_json:
        print(
            json.dumps(
                {"text": "".join(pieces), "token_ids": ids, "finish_reason": reason, "usage": asdict(usage)},
                ensure_ascii=False,
            )
        )
    else:
        print()


@app.command()
def demo(
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write the results to this file.")] = None,
    document: Annotated[Path | None, typer.Option(help="Ask about this text instead of kvferry's handbook.")] = None,
    model: ModelOption = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 32,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show the logs of all processes.")] = False,
) -> None:
    """Show the whole product on real input; ends non-zero if a cache hit changed an answer."""
    from kvferry.deploy.demo import run_demo

    logging.basicConfig(level=logging.INFO if verbose else logging.ERROR, format="%(asctime)s %(name)s: %(message)s")
    settings = _settings(
        None,
        model=model,
        gateway={"port": 0},
        store={"port": 0},
        prefill={"port": 0},
        decode={"port": 0, "prefix_caching": False},  # so that every request's blocks really cross
    )
    try:
        identical = run_demo(settings, document=document, json_path=json_path, max_tokens=max_tokens)
    except (OSError, RuntimeError, ValueError, ClientError) as error:
        fail(str(error))
    if not identical:
        fail("a repeated request did not give the tokens of the first one")


@bench.command("kernels")
def bench_kernels_command(
    rounds: Annotated[int, typer.Option(min=1, help="Calls of each contender.")] = 30,
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write the results to this file.")] = None,
    plot_path: Annotated[
        Path | None, typer.Option("--plot", help="Also draw the ratios (.png, .svg); needs matplotlib.")
    ] = None,
    static: Annotated[
        bool, typer.Option("--static", help="Compile the Triton kernels and read their machine code instead; no GPU.")
    ] = False,
    preset: Annotated[
        str | None, typer.Option(help="Quantize as this preset does; else 2 bits in groups of 32, fp16 scales.")
    ] = None,
    target: Annotated[
        list[str] | None, typer.Option(help="With --static: compile for this, e.g. sm_90; may be repeated.")
    ] = None,
) -> None:
    """The kernels against torch's attention on unquantized K and V, on this machine, in one run: Triton's on a GPU."""
    if static and plot_path is not None:
        fail("--plot draws measured times: leave --static out")
    if static:
        report = _static_kernels(target or list(STATIC_TARGETS))
    else:
        report = _gpu_kernels(rounds, preset) or _measured_kernels(rounds, plot_path, preset)
    if json_path is not None:
        try:
            json_path.write_text(json.dumps(report, indent=2) + "\n")
        except OSError as error:
            fail(str(error))


def _gpu_kernels(rounds: int, preset: str | None) -> dict[str, Any] | None:
    """None without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    from kvferry.deploy.bench_kernels import PLAIN
    from kvferry.deploy.bench_kernels_gpu import CudaTimer, bench_gpu_kernels, print_gpu_times
    from kvferry.kernels.dispatch import select_kernels

    device = torch.device("cuda")
    try:
        results = bench_gpu_kernels(
            select_kernels(device, head_dim=128, impl="triton").kernels,
            device,
            CudaTimer(),
            rounds=rounds,
            spec=PLAIN if preset is None else resolve_spec(preset),
            progress=lambda line: print(line, file=sys.stderr, flush=True),
        )
    except (OSError, RuntimeError, ValueError) as error:
        fail(str(error))
    print_gpu_times(results)
    return asdict(results)


def _measured_kernels(rounds: int, plot_path: Path | None, preset: str | None) -> dict[str, Any]:
    from kvferry.deploy.bench_kernels import (
        PLAIN,
        bench_kernels,
        plot_kernel_times,
        print_kernel_times,
    )
    from kvferry.deploy.plotting import require_matplotlib

    try:
        if plot_path is not None:
            require_matplotlib()  # before minutes of measuring, not after them
        spec = PLAIN if preset is None else resolve_spec(preset)
        results = bench_kernels(
            rounds=rounds, spec=spec, progress=lambda line: print(line, file=sys.stderr, flush=True)
        )
        print_kernel_times(results)
        if plot_path is not None:
            plot_kernel_times(results, plot_path)
    except (OSError, RuntimeError, ValueError) as error:
        fail(str(error))
    return asdict(results)


def _static_kernels(targets: list[str]) -> dict[str, Any]:
    try:
        module = importlib.import_module("kvferry.deploy.bench_kernels_static")
    except ImportError as error:
        fail(f"--static needs Triton: pip install 'kvferry[gpu]' ({error})")
    try:
        kernels = module.static_kernels(targets)
    except (OSError, RuntimeError, ValueError) as error:
        fail(str(error))
    module.print_static_kernels(kernels)
    return {"kernels": [asdict(kernel) for kernel in kernels]}


def main() -> None:
    """Entry point of the console script."""
    app()


def _settings(path: Path | None, **options: object) -> Settings:
    """The settings of a file, the environment and the command line; None, also inside a section: not given."""
    given = {
        key: {inner: x for inner, x in value.items() if x is not None} or None if isinstance(value, dict) else value
        for key, value in options.items()
    }
    try:
        return Settings.load(path, **given)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        fail("the configuration is not valid:\n  " + "\n  ".join(lines))
    except (OSError, ValueError) as error:
        fail(str(error))


def _prompt_text(prompt: str | None, prompt_file: Path | None) -> str:
    if (prompt is None) == (prompt_file is None):
        fail("give either a prompt or --prompt-file")
    if prompt is not None:
        return prompt
    assert prompt_file is not None
    try:
        return sys.stdin.read() if str(prompt_file) == "-" else prompt_file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        fail(f"cannot read {prompt_file}: {error}")


if __name__ == "__main__":
    main()
