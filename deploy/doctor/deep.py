"""`kvferry doctor --deep`: loads the model and tries it, as a worker does at its start."""

from __future__ import annotations

import time
from collections.abc import Iterator

from kvferry.deploy.doctor.finding import Finding, gib, problem, warning
from kvferry.deploy.settings import Settings


def deep_findings(settings: Settings) -> Iterator[Finding]:
    from kvferry.deploy.assembly import model_config
    from kvferry.deploy.worker_server import ModelRuntime

    started = time.monotonic()
    try:
        runtime = ModelRuntime(model_config(settings))
    except (OSError, RuntimeError, ValueError) as error:
        yield problem("loading the model", type(error).__name__, str(error))
        return
    try:
        seconds = time.monotonic() - started
        yield Finding("loading the model", f"{seconds:.1f} s, {gib(runtime.loaded.weight_bytes)} of weights")
        kernels = runtime.selection
        if kernels.kernels.name == "reference":
            yield warning("the model's kernels", kernels.kernels.name, kernels.reason)
        else:
            yield Finding("the model's kernels", kernels.kernels.name, kernels.reason)
        if runtime.rows_invariant:
            yield Finding("the model's rows", "keep their bits")
        else:
            reason = "every decode step runs max_num_seqs rows: set decode.max_num_seqs as small as your load allows"
            yield warning("the model's rows", "depend on their number", reason)
    finally:
        runtime.close()
