"""What a client counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class ClientCounters:
    """What this client did since it was made."""

    bytes_read: int = 0  # of verified records
    bytes_written: int = 0  # of stored records
    failures: int = 0  # calls that the store did not answer
    refused: int = 0  # calls that the open breaker refused
    not_found: int = 0
    corrupt: int = 0
    bulk_gets: int = 0  # gets over the node's bulk port
    bulk_fallbacks: int = 0  # gets over gRPC, because the node offers no bulk port or it could not be used
    bulk_puts: int = 0  # requests of puts over the node's bulk port
