"""What can go wrong with a group of ranks."""

from __future__ import annotations


class RanksLost(RuntimeError):
    """A rank ended, hangs or could not start: the group computes nothing any more, and its worker must end."""


class RankFailed(ValueError):
    """Another rank could not do its part of one request; the group goes on."""
