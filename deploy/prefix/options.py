"""Options that several `kvferry prefix` commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

GATEWAY = "127.0.0.1:7600"
WORKER = "127.0.0.1:7610"
STORE = ["127.0.0.1:7700"]
TENANT = "default"

BundlePath = Annotated[Path, typer.Argument(metavar="FILE", help="A bundle.")]
PromptFile = Annotated[
    Path | None, typer.Option("--prompt-file", help="Take the prefix of this prompt; - is standard input.")
]
Question = Annotated[str | None, typer.Option(help="As in kvferry generate: ask this about the prompt's text.")]
Raw = Annotated[bool, typer.Option("--raw", help="Do not apply the chat template.")]
ChainOf = Annotated[Path | None, typer.Option("--chain-of", help="Take the prefix that this bundle holds.")]
Until = Annotated[str | None, typer.Option(help="End with the block that has this key (64 hex digits).")]
Model = Annotated[
    str | None, typer.Option(help="Where the tokenizer is; else where the worker says that it loaded the model.")
]
Gateway = Annotated[str, typer.Option("--address", help="host:port of the gateway.")]
Worker = Annotated[str, typer.Option(help="host:port of a prefill worker of the deployment: tells its identity.")]
Store = Annotated[
    list[str],
    typer.Option("--store", help="host:port of the deployment's KV store node; repeat it to name several nodes."),
]
Replication = Annotated[int, typer.Option(min=1, help="The deployment's store.replication, with several nodes.")]
Tenant = Annotated[str, typer.Option(help="The deployment's gateway.tenant.")]
TrustFile = Annotated[
    Path | None,
    typer.Option(help="Public keys of trusted signers; default: kvferry/trusted-signers in the configuration folder."),
]
TrustThisSigner = Annotated[
    list[str] | None, typer.Option(metavar="KEY", help="Trust this public key, this time; may be repeated.")
]
AcceptUnsigned = Annotated[
    bool,
    typer.Option(
        "--insecure-accept-unsigned",
        help="Import an unsigned bundle: whoever could write the file decides what the model sees.",
    ),
]
