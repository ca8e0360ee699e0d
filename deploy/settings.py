"""Every setting of a deployment: a YAML or TOML file, then environment variables, then command-line options.

Environment variables are KVFERRY_<KEY>, with __ between levels: KVFERRY_STORE__MEMORY=4GiB.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, ValidationInfo, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from kvferry.deploy.cluster.settings import ClusterSettings
from kvferry.deploy.memory_size import KVMemory
from kvferry.deploy.operations_settings import LogSettings, MetricsSettings
from kvferry.deploy.routing.policies import Policy
from kvferry.deploy.routing.prefix import DEFAULT_INDEX_BYTES
from kvferry.deploy.security_settings import SecuritySettings
from kvferry.deploy.store_settings import Bytes, Port, Section, StoreSettings
from kvferry.deploy.weight_quantization_names import WeightQuantization
from kvferry.kernels.presets import DEFAULT_PRESET

Gpus = Annotated[float | None, Field(ge=0, le=64)]


class GatewaySettings(Section):
    host: str = "127.0.0.1"
    port: Port = 7600
    max_prompt_bytes: Bytes = 4 * 2**20
    max_new_tokens: int = Field(4096, gt=0)
    max_concurrent: int = Field(64, gt=0)
    max_queued: int = Field(256, ge=0)
    default_timeout_s: float = Field(600.0, gt=0)
    tenant: str = "default"
    count: int = Field(1, ge=0, le=64)
    """In a cluster: gateways, one on each machine, all on this port; 0: they run elsewhere (`kvferry gateway`)."""
    router: Policy = "prefix"
    """Which workers a request goes to; see docs/routing.md."""
    router_memory: Bytes = DEFAULT_INDEX_BYTES
    """What the policy `prefix` may use to remember where blocks are."""


class Ranks(Section):
    """How a worker is spread over processes, and over GPUs where there are some."""

    tensor_parallel: int = Field(1, ge=1, le=64)
    """Ranks of each worker: a divisor of the model's KV heads, or a multiple."""
    pipeline_parallel: int = Field(1, ge=1)

    @field_validator("pipeline_parallel")
    @classmethod
    def _no_pipeline(cls, value: int) -> int:
        if value > 1:
            raise ValueError("layers cannot be spread over workers: leave pipeline_parallel at 1, set tensor_parallel")
        return value

    @property
    def num_ranks(self) -> int:
        """Processes of each worker."""
        return self.tensor_parallel


class PrefillSettings(Ranks):
    host: str = "127.0.0.1"
    port: Port = 7610
    """The first worker's; the next ones count up. 0: any free ports."""
    count: int = Field(1, ge=0, le=64)
    """0: the decode workers prefill by themselves, in the same process."""
    max_requests: int = Field(64, gt=0)
    fetch: Literal["measured", "always", "never"] = "measured"
    """Whether cached blocks are fetched: where that is faster than computing them, or always, or never."""
    gpus: Gpus = None
    """Of each worker. None: on one machine its GPUs, shared evenly; in a cluster 1 where a machine has some."""
    resource: str | None = None
    """In a cluster: only on machines that have this Ray resource."""


class DecodeSettings(Ranks):
    host: str = "127.0.0.1"
    port: Port = 7650
    """The first worker's; the next ones count up. 0: any free ports."""
    count: int = Field(1, ge=1, le=64)
    kv_memory: KVMemory = 512 * 2**20
    """Bytes, or a share of what is free once the model is loaded: 80%."""
    context_parallel: int = Field(1, ge=1, le=64)
    """Ranks of each worker that divide every context between them; not together with `tensor_parallel`."""
    max_num_seqs: int = Field(16, gt=0, le=1024)
    prefix_caching: bool = True
    """Keep the blocks of finished prompts in the pool while there is room."""
    publish_answers: bool = True
    """After an answer, compute and publish its blocks when prefill is idle, for the conversation's next turn."""
    gpus: Gpus = None
    """Of each worker. None: on one machine its GPUs, shared evenly; in a cluster 1 where a machine has some."""
    resource: str | None = None
    """In a cluster: only on machines that have this Ray resource."""

    @property
    def num_ranks(self) -> int:
        return self.tensor_parallel * self.context_parallel

    @model_validator(mode="after")
    def _one_kind_of_ranks(self) -> Self:
        if self.tensor_parallel > 1 and self.context_parallel > 1:
            raise ValueError("tensor_parallel and context_parallel do not go together yet: set one of them to 1")
        return self


class Settings(BaseSettings):
    """A deployment: on one machine, or on the machines of a Ray cluster."""

    model_config = SettingsConfigDict(
        env_prefix="KVFERRY_",
        env_nested_delimiter="__",
        extra="forbid",
        env_ignore_empty=True,
        hide_input_in_errors=True,  # it may be a password
    )

    model: str = "demo"
    """A Hugging Face folder, a .gguf file, a hub id, or "demo"."""
    served_model_name: str | None = None
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    weight_quantization: WeightQuantization = "none"
    """"int8": linear layers at half the memory of bf16; CPU only."""
    kernels: Literal["reference", "cpu", "cpu-int8", "triton"] | None = None
    threads: int = Field(0, ge=0)
    """Threads of each CPU worker; 0: one a core."""
    max_model_len: int = Field(0, ge=0)
    """0: the model's window."""
    preset: str = DEFAULT_PRESET
    """How K and V are quantized: a preset (kv2, kv3, kv4, kv16), or a .json file that `kvferry calibrate` wrote."""
    block_size: int | None = None
    """Tokens a block, the preset's where not given."""
    sink_tokens: int | None = None
    """First tokens kept in fp16, the preset's where not given."""
    gateway: GatewaySettings = GatewaySettings()
    store: StoreSettings = StoreSettings()
    prefill: PrefillSettings = PrefillSettings()
    decode: DecodeSettings = DecodeSettings()
    cluster: ClusterSettings = ClusterSettings()
    security: SecuritySettings = Field(SecuritySettings(), validate_default=True)
    metrics: MetricsSettings = MetricsSettings()
    log: LogSettings = LogSettings()

    @field_validator("cluster")
    @classmethod
    def _scalable(cls, cluster: ClusterSettings, info: ValidationInfo) -> ClusterSettings:
        prefill = info.data.get("prefill")  # None: it is wrong itself
        if cluster.autoscale.prefill is not None and prefill is not None and prefill.count == 0:
            raise ValueError(
                "autoscale.prefill has nothing to scale where prefill.count is 0, since decode workers prefill then: "
                "set prefill.count to 1 or more, or leave autoscale.prefill out"
            )
        return cluster

    @field_validator("security")
    @classmethod
    def _closed_on_machines(cls, security: SecuritySettings, info: ValidationInfo) -> SecuritySettings:
        cluster = info.data.get("cluster")  # None: it is wrong itself
        return security.on_machines() if cluster is not None and cluster.bind == "machine" else security

    @classmethod
    def load(cls, path: Path | None = None, **overrides: Any) -> Settings:
        """Reads the file, the environment and `overrides` (None means: not given).

        Raises ValueError or pydantic's ValidationError, which names the key; OSError when the file cannot be read.
        """
        from_file = {} if path is None else _read_mapping(path)

        class FromFile(cls):  # type: ignore[valid-type, misc]
            @classmethod
            def settings_customise_sources(
                cls,
                settings_cls: type[BaseSettings],
                init_settings: PydanticBaseSettingsSource,
                env_settings: PydanticBaseSettingsSource,
                dotenv_settings: PydanticBaseSettingsSource,
                file_secret_settings: PydanticBaseSettingsSource,
            ) -> tuple[PydanticBaseSettingsSource, ...]:
                return init_settings, env_settings, InitSettingsSource(settings_cls, init_kwargs=from_file)

        given = {key: value for key, value in overrides.items() if value is not None}
        loaded = FromFile(**given)
        return Settings.model_construct(**{name: getattr(loaded, name) for name in cls.model_fields})


def _read_mapping(path: Path) -> dict[str, Any]:
    """The keys of a YAML or TOML file. Raises ValueError naming the file, or OSError."""
    if path.suffix not in (".yaml", ".yml", ".toml"):
        raise ValueError(f"{path}: a configuration file ends in .yaml, .yml or .toml")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        text = path.read_text()
        content = tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text)
    except (tomllib.TOMLDecodeError, yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} cannot be read: {reason}") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"{path} is not a mapping of settings: write key: value lines; see docs/configuration.md")
    return content
