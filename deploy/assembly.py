"""From settings to the parts that a process is made of. Imports neither Ray nor the command line."""

from __future__ import annotations

import asyncio

from kvferry.decode.config import DecodeConfig
from kvferry.deploy.config import GatewayConfig, ModelLimits, RequestLimits
from kvferry.deploy.gateway_server import GatewayServer
from kvferry.deploy.membership import Membership
from kvferry.deploy.models import end_token_ids, find_model, load_tokenizer, tokenizer_digest
from kvferry.deploy.routing.router import Router
from kvferry.deploy.security import edge_security, peer_security
from kvferry.deploy.settings import Settings
from kvferry.deploy.spec_file import resolve_spec
from kvferry.deploy.worker_server import ModelConfig
from kvferry.prefill.config import PrefillConfig


def model_config(settings: Settings) -> ModelConfig:
    return ModelConfig(
        model=settings.model,
        served_name=settings.served_model_name,
        spec=resolve_spec(settings.preset, block_size=settings.block_size, sink_tokens=settings.sink_tokens),
        device=settings.device,
        dtype=settings.dtype,
        weight_quantization=settings.weight_quantization,
        kernels=settings.kernels,
        max_model_len=settings.max_model_len,
    )


def prefill_config(settings: Settings, *, host: str = "127.0.0.1", port: int = 0) -> PrefillConfig:
    return PrefillConfig(
        host=host,
        port=port,
        metrics=settings.metrics.place(port),
        max_requests=settings.prefill.max_requests,
        fetch=settings.prefill.fetch,
        lookup_timeout_s=settings.store.lookup_timeout,
    )


def decode_config(settings: Settings, *, host: str, port: int) -> DecodeConfig:
    return DecodeConfig(
        host=host,
        port=port,
        metrics=settings.metrics.place(port),
        kv_memory=settings.decode.kv_memory,
        max_num_seqs=settings.decode.max_num_seqs,
        prefix_caching=settings.decode.prefix_caching,
        publish_answers=settings.decode.publish_answers,
    )


async def make_gateway(
    settings: Settings,
    *,
    prefill: list[str] | tuple[str, ...] = (),
    decode: list[str] | tuple[str, ...] = (),
    membership: Membership | None = None,
    router: Router | None = None,
) -> GatewayServer:
    """A gateway for these workers, or for those of `membership`, not started. Reads the model's tokenizer and
    configuration, not its weights. `router`: None: as the settings say."""
    from transformers import AutoConfig

    source = await asyncio.to_thread(find_model, settings.model)
    tokenizer = await asyncio.to_thread(load_tokenizer, source)
    config = AutoConfig.from_pretrained(source.path)
    window = config.max_position_embeddings
    gateway = settings.gateway
    security = await asyncio.to_thread(peer_security, settings.security)
    edge = await asyncio.to_thread(edge_security, settings.security)
    return GatewayServer(
        GatewayConfig(
            model_name=settings.served_model_name or source.name,
            decode_workers=tuple(decode),
            prefill_workers=tuple(prefill),
            host=gateway.host,
            port=gateway.port,
            metrics=settings.metrics.place(gateway.port),
            tenant=gateway.tenant,
            security=security,
            edge=edge,
            router=gateway.router,
            router_memory=gateway.router_memory,
            eos_token_ids=tuple(end_token_ids(source, tokenizer)),
            tokenizer_digest=tokenizer_digest(tokenizer),
            limits=RequestLimits(
                max_prompt_bytes=gateway.max_prompt_bytes,
                max_new_tokens=gateway.max_new_tokens,
                max_concurrent=gateway.max_concurrent,
                max_queued=gateway.max_queued,
                default_timeout_s=gateway.default_timeout_s,
            ),
        ),
        tokenizer=tokenizer,
        model=ModelLimits(max_model_len=min(settings.max_model_len or window, window), vocab_size=config.vocab_size),
        membership=membership,
        router=router,
    )
