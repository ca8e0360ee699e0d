"""Stores of several processes for tests: a Redis Cluster, Sentinels, a TLS front; and a writer to be killed."""

from __future__ import annotations

import asyncio
import hashlib
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import redis

from kvferry.kvstore.codec import encode_record
from kvferry.kvstore.disk_backend import DiskBackend
from kvferry.kvstore.errors import StoreFull
from support.processes import RedisProcess, free_port, redis_binary

NUM_SLOTS = 16384
NAMESPACE = hashlib.sha256(b"namespace").digest()


def key_of(number: int) -> bytes:
    return hashlib.sha256(b"key %d" % number).digest()


def record_of(number: int, num_bytes: int = 1000) -> bytes:
    """A genuine record; its payload depends on the number."""
    payload = hashlib.shake_128(b"%d" % number).digest(min(num_bytes, 4096))
    payload = (payload * (num_bytes // max(1, len(payload)) + 1))[:num_bytes]
    return encode_record(key=key_of(number), namespace=NAMESPACE, block_index=number, num_tokens=32, payload=[payload])


class RedisCluster:
    """Three masters on loopback, a third of the slots each."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.nodes: list[RedisProcess] = []
        self.bus_ports: list[str] = []
        for number in range(3):
            place = folder / f"cluster-{number}"
            place.mkdir()
            settings = {
                "--cluster-enabled": "yes",
                "--cluster-port": str(free_port()),  # the default, 10,000 over the port, may not exist
                "--cluster-node-timeout": "2000",
                "--cluster-require-full-coverage": "no",
            }
            arguments = [part for setting in settings.items() for part in setting]
            self.nodes.append(RedisProcess(place, *arguments, *options))
            self.bus_ports.append(settings["--cluster-port"])
        share = NUM_SLOTS // 3 + 1
        for number, node in enumerate(self.nodes):
            with redis.Redis(port=node.port) as admin:
                last = min((number + 1) * share, NUM_SLOTS) - 1
                admin.execute_command("CLUSTER", "ADDSLOTSRANGE", number * share, last)
                if number:
                    admin.execute_command("CLUSTER", "MEET", "127.0.0.1", self.nodes[0].port, self.bus_ports[0])
        deadline = time.monotonic() + 30
        while not all(self._is_ready(node) for node in self.nodes):
            assert time.monotonic() < deadline, "the cluster did not come up"
            time.sleep(0.05)

    @property
    def addresses(self) -> tuple[str, ...]:
        return tuple(f"127.0.0.1:{node.port}" for node in self.nodes)

    def kill(self) -> None:
        for node in self.nodes:
            node.kill()

    @staticmethod
    def _is_ready(node: RedisProcess) -> bool:
        with redis.Redis(port=node.port) as admin:
            info: Any = admin.execute_command("CLUSTER", "INFO")
        lines = set(bytes(info).split())
        return {b"cluster_state:ok", b"cluster_slots_ok:%d" % NUM_SLOTS, b"cluster_known_nodes:3"} <= lines


class Sentinel(RedisProcess):
    """One Sentinel that watches one master and needs no other to agree."""

    def __init__(self, folder: Path, master: RedisProcess, service: str) -> None:
        config = folder / f"sentinel-{time.monotonic_ns()}.conf"
        config.write_text(
            f"sentinel monitor {service} 127.0.0.1 {master.port} 1\n"
            f"sentinel down-after-milliseconds {service} 500\n"
            f"sentinel failover-timeout {service} 2000\n"
        )
        super().__init__(folder, command=[redis_binary(), str(config), "--sentinel"], ready="+monitor")


@asynccontextmanager
async def tls_front(folder: Path, port: int, *, need_client: bool = False) -> AsyncIterator[int]:
    """A port that speaks TLS and passes the bytes on to `port`; certificates lie in `folder` as ca, server, client."""
    make_certificates(folder)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=folder / "ca.pem")
    context.load_cert_chain(folder / "server.pem", folder / "server.key")
    context.verify_mode = ssl.CERT_REQUIRED if need_client else ssl.CERT_NONE

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        except OSError:
            pass  # the other side has gone
        finally:
            writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_reader, to_writer = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(copy(reader, to_writer), copy(to_reader, writer))

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    async with server:
        yield server.sockets[0].getsockname()[1]


def make_certificates(folder: Path) -> None:
    """An authority, a server certificate for 127.0.0.1 and a client certificate."""

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True, timeout=60)

    new = ("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    ca_extensions = ("-addext", "keyUsage=critical,keyCertSign,cRLSign")
    openssl(*new, "-x509", "-days", "2", "-subj", "/CN=ca", *ca_extensions, "-keyout", "ca.key", "-out", "ca.pem")
    for name in ("server", "client"):
        (folder / "extensions").write_text("subjectAltName=IP:127.0.0.1\nauthorityKeyIdentifier=keyid\n")
        openssl(*new, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr")
        openssl("x509", "-req", "-days", "2", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key",
                "-CAcreateserial", "-extfile", "extensions", "-out", f"{name}.pem")  # fmt: skip


async def _write_for_ever(folder: Path, start: int) -> None:
    """Puts records of changing sizes into a disk backend, and says after each that it is stored."""
    backend = DiskBackend(folder, capacity_bytes=64 << 20, num_threads=4)
    print("open", flush=True)

    async def put(number: int, record: bytes) -> None:
        try:
            await backend.put(key_of(number), record)
        except StoreFull:
            return
        print("stored", number, flush=True)

    for first in range(start, start + 100_000, 8):
        records = [
            (number, record_of(number, 200_000 + number * 7919 % 3_000_000)) for number in range(first, first + 8)
        ]
        await asyncio.gather(*(put(number, record) for number, record in records))


if __name__ == "__main__":
    asyncio.run(_write_for_ever(Path(sys.argv[1]), int(sys.argv[2])))
