"""The Redis behind the store: reachable, open to us, and set up as a cache."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from typing import Any

from kvferry.deploy.doctor.finding import Finding, gib, problem, warning
from kvferry.deploy.settings import Settings
from kvferry.kvstore.redis_place import RedisPlace

TIMEOUT_S = 2.0
OLDEST = 6
"""ACL users came with Redis 6."""


def redis_findings(settings: Settings) -> Iterator[Finding]:
    """Nothing without store.redis."""
    if settings.store.redis is None or settings.store.nodes:
        return
    try:
        place = settings.store.redis.place()
    except OSError as error:
        yield problem("Redis", "the password file cannot be read", f"check store.redis.password_file: {error.strerror}")
        return
    places = [place.node(host, port) for host, port in place.nodes()] if place.cluster else [place]
    for one in places:
        yield from asyncio.run(_examine(one))


async def _examine(place: RedisPlace) -> list[Finding]:
    import redis.exceptions as failed

    topic = f"Redis {place.text}"
    client = place.connect(max_connections=1, connect_timeout_s=TIMEOUT_S, op_timeout_s=TIMEOUT_S)
    try:
        async with asyncio.timeout(3 * TIMEOUT_S):
            info: Mapping[str, Any] = await client.info()
    # The messages of redis-py are not told: they may quote what was sent.
    except failed.AuthenticationError:
        return [problem(topic, "refuses the user or the password", "check store.redis.user and store.redis.password")]
    except failed.NoPermissionError:
        return [
            warning(topic, "the user may not run INFO", "nothing more is known: allow +info to let the doctor look")
        ]
    except failed.ResponseError:
        return [problem(topic, "refuses INFO", "check that it is a Redis, and whether it needs a password")]
    except (failed.RedisError, OSError, TimeoutError) as error:
        reason = (
            "start it, or correct store.redis; until then blocks are kept in the other tiers, and are lost with them"
        )
        return [problem(topic, f"not reachable ({type(error).__name__})", reason)]
    finally:
        await client.aclose()
    return [*check_info(topic, info)]


def check_info(topic: str, info: Mapping[str, Any]) -> Iterator[Finding]:
    """`info`: what the server answers to INFO."""
    version = str(info.get("valkey_version") or info.get("redis_version") or "unknown")
    name = str(info.get("server_name") or "redis")
    major = version.split(".")[0]
    if major.isdecimal() and int(major) < OLDEST:
        yield warning(topic, f"{name} {version}", f"older than {OLDEST}: not tested, upgrade it")
    else:
        yield Finding(topic, f"{name} {version}")
    if str(info.get("role")) in ("slave", "replica"):
        yield problem(topic, "a replica", "it takes no writes: name its master in store.redis, or use Sentinels")
    limit, policy = int(info.get("maxmemory", 0)), str(info.get("maxmemory_policy", "unknown"))
    if not limit:
        yield warning(topic, "no maxmemory", "it grows until the machine has no memory: CONFIG SET maxmemory 8gb")
    elif policy.startswith("allkeys-"):
        yield Finding(topic, f"maxmemory {gib(limit)}, {policy}")
    else:
        reason = "once full it refuses new blocks, because ours have no expiry: CONFIG SET maxmemory-policy allkeys-lru"
        yield warning(topic, f"maxmemory {gib(limit)}, {policy}", reason)
    if str(info.get("rdb_last_bgsave_status", "ok")) != "ok":
        reason = (
            "it may refuse writes until it can save: give its disk room, or CONFIG SET stop-writes-on-bgsave-error no"
        )
        yield warning(topic, "the last save failed", reason)
