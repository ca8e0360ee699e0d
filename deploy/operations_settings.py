"""The `metrics` and `log` sections."""

from __future__ import annotations

from pydantic import Field

from kvferry.deploy.store_settings import Section
from kvferry.kvstore.metrics_endpoint import MetricsPlace
from kvferry.kvstore.process_logs import LogConfig, LogFormat, LogLevel


class MetricsSettings(Section):
    enabled: bool = True
    host: str = "127.0.0.1"
    port_offset: int = Field(1000, ge=-65535, le=65535)
    """A process with gRPC on port 7610 has its metrics on 8610; one on any free port has them on any free port."""

    def place(self, grpc_port: int) -> MetricsPlace | None:
        """Where the process with this gRPC port tells its metrics; None when they are off. Raises ValueError when there
        is no such port."""
        if not self.enabled:
            return None
        return MetricsPlace(host=self.host, port=grpc_port and grpc_port + self.port_offset)


class LogSettings(Section):
    format: LogFormat = "text"
    level: LogLevel = "info"

    def config(self) -> LogConfig:
        return LogConfig(format=self.format, level=self.level)
