"""`kvferry prefix`: a computed prefix as a file, and from node to node. See docs/bundle.md."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from kvferry.deploy.cli_failure import fail
from kvferry.deploy.client import Client
from kvferry.deploy.prefix import options as opt
from kvferry.deploy.prefix.access import access, read_access
from kvferry.deploy.prefix.deployment import describe
from kvferry.deploy.prefix.failing import failing
from kvferry.deploy.prefix.naming import PromptName, chain_of_prompt, named_chain
from kvferry.deploy.prefix.node_commands import list_nodes, pin, unpin
from kvferry.deploy.prefix.progress import block_progress
from kvferry.deploy.prefix.report import describe_bundle, shown, size_words
from kvferry.deploy.prefix.stores import Nodes
from kvferry.deploy.prefix.trust import default_trust_file, trusted_signers
from kvferry.kvstore.bundle_chain import Chain, require_same_deployment
from kvferry.kvstore.bundle_reader import BundleReader
from kvferry.kvstore.bundle_signature import Signer, require_trusted, write_key_pair
from kvferry.kvstore.bundle_transfer import (
    Transferred,
    copy_chain,
    export_chain,
    import_bundle,
    wait_until_stored,
)
from kvferry.kvstore.bundle_writer import BundleWriter
from kvferry.kvstore.errors import InvalidRequest, KVStoreError

PUBLISH_TIMEOUT_S = 15.0
"""A prefill worker publishes for at most 10 s after an answer's first token."""

prefix = typer.Typer(help="Computed prefixes as files, and from store node to store node.", no_args_is_help=True)
prefix.callback()(read_access)
prefix.command()(pin)
prefix.command()(unpin)


@prefix.command()
def build(
    prompt_file: Annotated[Path, typer.Option("--prompt-file", help="The prompt; - is standard input.")],
    question: opt.Question = None,
    raw: opt.Raw = False,
    address: opt.Gateway = opt.GATEWAY,
    worker: opt.Worker = opt.WORKER,
    store: opt.Store = opt.STORE,
    replication: opt.Replication = 1,
    tenant: opt.Tenant = opt.TENANT,
    model: opt.Model = None,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds for the prompt's computation.")] = 600.0,
) -> None:
    """Have a running deployment compute a prompt's blocks and keep them in its store.

    Asks the gateway for one token, so that the prompt takes the way of every other request.
    """
    with failing():
        name = PromptName(path=prompt_file, question=question, raw=raw)
        text = name.text()
        chain = chain_of_prompt(name, text, worker=worker, tenant=tenant, model=model, security=access().peers)
        with Client(address, access=access().client) as client:
            if raw:
                answer = client.generate(text, max_tokens=1, timeout=timeout)
            else:
                answer = client.generate(messages=[{"role": "user", "content": text}], max_tokens=1, timeout=timeout)
        found = asyncio.run(_wait(Nodes(store, replication, access().peers), chain))
        usage = answer.usage
        if found < len(chain.keys):
            fail(
                f"the store at {Nodes(store)} holds {found} of the prompt's {len(chain.keys)} blocks: is it the "
                f"deployment's store, and its tenant {tenant!r}? Else it has too little memory"
            )
    print(
        f"{len(chain.keys)} blocks, {chain.num_tokens:,} tokens, are in the store; {usage.cached_tokens:,} tokens were "
        f"there before. First token after {usage.ttft_seconds:.2f} s."
    )
    print(f"last block key: {chain.keys[-1].hex()}")


@prefix.command("export")
def export_command(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The bundle to write.")],
    prompt_file: opt.PromptFile = None,
    question: opt.Question = None,
    raw: opt.Raw = False,
    chain_of: opt.ChainOf = None,
    until: opt.Until = None,
    sign: Annotated[Path | None, typer.Option(metavar="KEYFILE", help="Sign with this private key.")] = None,
    no_tokens: Annotated[
        bool, typer.Option("--no-tokens", help="Keep the token ids back; importers cannot change the tenant then.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    worker: opt.Worker = opt.WORKER,
    store: opt.Store = opt.STORE,
    replication: opt.Replication = 1,
    tenant: opt.Tenant = opt.TENANT,
    model: opt.Model = None,
) -> None:
    """Write a computed prefix as one file. Repeat an interrupted export to go on with it."""
    with failing():
        signer = Signer.load(sign) if sign is not None else None
        chain = named_chain(
            prompt_file=prompt_file,
            question=question,
            raw=raw,
            chain_of_bundle=chain_of,
            until=until,
            worker=worker,
            tenant=tenant,
            model=model,
            security=access().peers,
        )
        if no_tokens:
            chain = chain.without_tokens()
        with BundleWriter(output, chain, replace=force) as writer:
            if writer.num_done:
                print(f"going on after {writer.num_done} blocks that {output}.part holds")
            asyncio.run(_export(Nodes(store, replication, access().peers), writer, chain))
            writer.finish(signer)
        with BundleReader(output) as bundle:
            header = bundle.header
    print(
        f"{output}: {header.chain.num_tokens:,} tokens in {len(header.rows)} blocks, {size_words(header.file_bytes)}; "
        f"{size_words(header.bf16_bytes)} in bf16"
    )
    if bundle.signer is None:
        print("unsigned: an import will refuse it without --insecure-accept-unsigned")
    else:
        print(f"signed with the key {bundle.signer.hex()}")


@prefix.command("import")
def import_command(
    file: opt.BundlePath,
    worker: opt.Worker = opt.WORKER,
    store: opt.Store = opt.STORE,
    replication: opt.Replication = 1,
    tenant: Annotated[
        str | None, typer.Option(help="Import for this tenant instead of the bundle's; needs its token ids.")
    ] = None,
    trust_file: opt.TrustFile = None,
    trust_this_signer: opt.TrustThisSigner = None,
    insecure_accept_unsigned: opt.AcceptUnsigned = False,
) -> None:
    """Put a bundle's blocks into a store node. Blocks that are there are skipped, so an import can be repeated."""
    with failing(), BundleReader(file) as bundle:
        trusted = trusted_signers(trust_file, trust_this_signer or ())
        require_trusted(bundle.signer, trusted, accept_unsigned=insecure_accept_unsigned)
        chain = bundle.header.chain
        target = chain if tenant is None else chain.under_tenant(tenant)
        deployment = describe(worker, target.namespace.tenant, access().peers)
        require_same_deployment(chain, model_name=deployment.model_name, namespace=deployment.namespace)
        done = asyncio.run(_import(Nodes(store, replication, access().peers), bundle, target))
    _print_transferred(done, target)


@prefix.command()
def push(
    to: Annotated[list[str], typer.Argument(metavar="HOST:PORT...", help="The store's nodes that get the blocks.")],
    prompt_file: opt.PromptFile = None,
    question: opt.Question = None,
    raw: opt.Raw = False,
    chain_of: opt.ChainOf = None,
    until: opt.Until = None,
    to_worker: Annotated[
        str | None, typer.Option(help="host:port of a worker there: refuse where its identity differs.")
    ] = None,
    worker: opt.Worker = opt.WORKER,
    store: opt.Store = opt.STORE,
    replication: opt.Replication = 1,
    tenant: opt.Tenant = opt.TENANT,
    model: opt.Model = None,
) -> None:
    """Copy a computed prefix from the deployment's store straight to another node. Repeat it to go on."""
    with failing():
        chain = named_chain(
            prompt_file=prompt_file,
            question=question,
            raw=raw,
            chain_of_bundle=chain_of,
            until=until,
            worker=worker,
            tenant=tenant,
            model=model,
            security=access().peers,
        )
        if to_worker is not None:
            other = describe(to_worker, chain.namespace.tenant, access().peers)
            require_same_deployment(chain, model_name=other.model_name, namespace=other.namespace)
        done = asyncio.run(
            _copy(Nodes(store, replication, access().peers), Nodes(to, security=access().peers), chain, "push")
        )
    _print_transferred(done, chain)


@prefix.command()
def pull(
    source: Annotated[
        list[str], typer.Argument(metavar="HOST:PORT...", help="The store's nodes that have the blocks.")
    ],
    trust_node: Annotated[
        bool,
        typer.Option("--trust-node", help="Records of a node bear no signature: say that you trust who runs it."),
    ] = False,
    prompt_file: opt.PromptFile = None,
    question: opt.Question = None,
    raw: opt.Raw = False,
    chain_of: opt.ChainOf = None,
    until: opt.Until = None,
    worker: opt.Worker = opt.WORKER,
    store: opt.Store = opt.STORE,
    replication: opt.Replication = 1,
    tenant: opt.Tenant = opt.TENANT,
    model: opt.Model = None,
) -> None:
    """Copy a computed prefix from another node straight into the deployment's store. Repeat it to go on."""
    with failing():
        if not trust_node:
            raise InvalidRequest(
                "records that come from a node bear no signature: whoever runs it decides what the model sees. Say "
                "--trust-node if you trust them, or import a signed bundle"
            )
        chain = named_chain(
            prompt_file=prompt_file,
            question=question,
            raw=raw,
            chain_of_bundle=chain_of,
            until=until,
            worker=worker,
            tenant=tenant,
            model=model,
            security=access().peers,
        )
        own = describe(worker, chain.namespace.tenant, access().peers)
        require_same_deployment(chain, model_name=own.model_name, namespace=own.namespace)
        done = asyncio.run(
            _copy(Nodes(source, security=access().peers), Nodes(store, replication, access().peers), chain, "pull")
        )
    _print_transferred(done, chain)


@prefix.command()
def verify(file: opt.BundlePath, trust_file: opt.TrustFile = None) -> None:
    """Check every byte of a bundle and say what it holds. Ends non-zero when it is damaged; asks no deployment."""
    with failing(), BundleReader(file) as bundle:
        trusted = trusted_signers(trust_file)
        with block_progress("verify", len(bundle.header.rows)) as progress:
            for index, _ in enumerate(bundle.records(), start=1):
                progress(index)
        for name, value in describe_bundle(bundle, trusted):
            print(f"{name:15} {value}")
    print("every byte is as the bundle's digest says")


@prefix.command("list")
def list_command(
    files: Annotated[list[Path] | None, typer.Argument(metavar="[FILE...]", help="Bundles.")] = None,
    trust_file: opt.TrustFile = None,
    store: opt.Store = opt.STORE,
    limit: Annotated[int, typer.Option(min=0, help="Records of each node; 0: all.")] = 100,
) -> None:
    """One line a bundle, read from its head alone; without files, what the store's nodes hold.

    Ends non-zero when a bundle is damaged or a node does not answer.
    """
    if not files:
        list_nodes(store, limit, access().peers)
        return
    with failing():
        trusted = trusted_signers(trust_file)
    num_bad = 0
    for file in files:
        try:
            with BundleReader(file) as bundle:
                header, signer = bundle.header, bundle.signer
        except (KVStoreError, OSError) as error:
            num_bad += 1
            print(f"{file}: {error}")
            continue
        signed = "unsigned" if signer is None else "trusted" if signer in trusted else "unknown signer"
        print(
            f"{file}: {shown(header.chain.model_name)}, tenant {shown(header.chain.namespace.tenant)}, "
            f"{header.chain.num_tokens:,} tokens, {size_words(header.file_bytes)}, {signed}, {header.digest.hex()[:12]}"
        )
    if num_bad:
        fail(f"{num_bad} of {len(files)} files are no bundles that can be read")


@prefix.command("rm")
def remove(
    prompt_file: opt.PromptFile = None,
    question: opt.Question = None,
    raw: opt.Raw = False,
    chain_of: opt.ChainOf = None,
    until: opt.Until = None,
    worker: opt.Worker = opt.WORKER,
    store: opt.Store = opt.STORE,
    replication: opt.Replication = 1,
    tenant: opt.Tenant = opt.TENANT,
    model: opt.Model = None,
) -> None:
    """Remove a prefix's blocks from the store. Prompts that begin alike share blocks and will be computed again."""
    with failing():
        chain = named_chain(
            prompt_file=prompt_file,
            question=question,
            raw=raw,
            chain_of_bundle=chain_of,
            until=until,
            worker=worker,
            tenant=tenant,
            model=model,
            security=access().peers,
        )
        deleted = asyncio.run(_delete(Nodes(store, replication, access().peers), chain))
    if len(store) == 1:
        print(f"{deleted} of {len(chain.keys)} blocks were in the store and are removed")
    else:
        print(
            f"{deleted} records of {len(chain.keys)} blocks, copies counted, were on {len(store)} nodes and are removed"
        )


@prefix.command()
def keygen(
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="The private key; FILE.pub beside it.")
    ],
) -> None:
    """Make a key pair to sign bundles with."""
    with failing():
        public_key = write_key_pair(output)
    print(f"{output}: the private key, readable by you alone; {output}.pub: its line for trust files")
    print(f"who imports your bundles adds this line to {default_trust_file()}:")
    print(f"ed25519 {public_key.hex()} {output.name}")


async def _wait(nodes: Nodes, chain: Chain) -> int:
    async with nodes.open() as client:
        return await wait_until_stored(client, chain, timeout_s=PUBLISH_TIMEOUT_S)


async def _export(nodes: Nodes, writer: BundleWriter, chain: Chain) -> None:
    async with nodes.open() as client:
        with block_progress("export", len(chain.keys)) as progress:
            await export_chain(client, writer, chain, progress)


async def _import(nodes: Nodes, bundle: BundleReader, target: Chain) -> Transferred:
    async with nodes.open() as client:
        with block_progress("import", len(target.keys)) as progress:
            return await import_bundle(bundle, client, progress, target=target)


async def _copy(source: Nodes, target: Nodes, chain: Chain, what: str) -> Transferred:
    async with source.open() as from_node, target.open() as to_node:
        with block_progress(what, len(chain.keys)) as progress:
            return await copy_chain(from_node, to_node, chain, progress)


async def _delete(nodes: Nodes, chain: Chain) -> int:
    async with nodes.open() as client:
        return await client.delete(chain.keys)


def _print_transferred(done: Transferred, chain: Chain) -> None:
    print(
        f"{done.num_sent} blocks stored ({size_words(done.bytes_sent)}), {done.num_present} were there; the prefix of "
        f"{chain.num_tokens:,} tokens is complete"
    )
