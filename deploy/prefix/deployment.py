"""What a running deployment says it is, through one of its workers."""

from __future__ import annotations

from dataclasses import dataclass

import grpc

from kvferry.kvstore.errors import InvalidRequest, StoreUnavailable
from kvferry.kvstore.identity import namespace_of
from kvferry.kvstore.key import Namespace
from kvferry.proto import worker_pb2, worker_pb2_grpc
from kvferry.proto.grpc_options import channel_options
from kvferry.proto.peer_security import PeerSecurity

TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Deployment:
    """The identity that the deployment's workers share, for one tenant."""

    model_name: str
    model_path: str
    namespace: Namespace
    bf16_bytes_per_token: int


def describe(worker_address: str, tenant: str, security: PeerSecurity | None = None) -> Deployment:
    """Asks a worker. Raises StoreUnavailable when it does not answer, InvalidRequest when it is none."""
    try:
        with (security or PeerSecurity()).blocking_channel(worker_address, channel_options()) as channel:
            info = worker_pb2_grpc.WorkerStub(channel).Describe(worker_pb2.DescribeRequest(), timeout=TIMEOUT_S)
    except grpc.RpcError as error:
        code = error.code()
        if code == grpc.StatusCode.UNIMPLEMENTED:
            raise InvalidRequest(f"{worker_address} is no worker: name a prefill worker with --worker") from error
        if code == grpc.StatusCode.UNAUTHENTICATED:
            raise StoreUnavailable(
                f"the worker at {worker_address} asks for the deployment's credentials: name the file whose security "
                "section has them, `kvferry prefix --config FILE ...`"
            ) from error
        raise StoreUnavailable(
            f"no worker answers at {worker_address} ({code.name}): start the deployment, or name one of its prefill "
            "workers with --worker"
        ) from error
    try:
        namespace = namespace_of(info.identity, tenant=tenant, block_size=info.block_size)
    except ValueError as error:
        raise InvalidRequest(f"the worker at {worker_address} says an impossible identity: {error}") from error
    return Deployment(info.model_name, info.model_path, namespace, info.kv_bytes_per_token_bf16)
