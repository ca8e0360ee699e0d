"""Fetch or recompute, by measured speeds. Policy only: no torch, no asyncio, no clock.

Fetching n blocks takes `latency + n * bytes / bandwidth`; computing them takes longer a block the later the block is,
because attention grows. The difference has its best value at an end of [0, n]: nothing between "none" and "all that
the time allows" is ever better, as long as the speeds hold. When they do not hold, the rest is decided anew with each
record, and a record that does not come is waited for in proportion to what computing the rest would take.
"""

from __future__ import annotations

from kvferry.prefill.fetch_policy import FetchCounters, FetchEstimates, FetchQuestion
from kvferry.prefill.speed import LinkSpeed

PROBE_SHARE = 0.02
"""Of the time spent on computing what was not fetched or not looked up: what trying the store again may cost."""
PROBE_BLOCKS = 2
LATE_FACTOR = 4.0
"""A record is late after so many times its expected time ..."""
PATIENCE_SHARE = 0.25
"""... or after this share of what computing the rest takes, whichever is more ..."""
UNSURE_SHARE = 1.0
"""... (this share while the path has hardly been measured) ..."""
LONGEST_WAIT = 2.0
"""... but not after more than this many times computing the rest."""
LEAST_WAIT_S = 0.002
"""Below this a timer measures the machine, not the store."""
SLOWER = 1.1
"""A running fetch is left when the rest of it takes so many times what computing takes: what is begun is half paid."""
RARELY_FOUND = 0.02
"""Of the wanted blocks, found: the estimate never falls below it, so a look-up in vain costs this share of a prompt."""
HIT_SMOOTHING = 0.1
LEAST_LATENCY = 0.02
"""Of the first record's time: with noise its bytes alone may seem to have taken longer."""
RECENT = 0.75
"""How much of what is known of a running fetch counts beside each new record."""
PRIOR_BLOCKS = 2
"""Earlier fetches count as so many records of a running one."""


class MeasuredChooser:
    """Fetches when that is faster by what was measured, and tries a slow path again now and then."""

    def __init__(self) -> None:
        self.counters = FetchCounters()
        self.link = LinkSpeed()
        self.hit_share = 0.5
        self.credit_s = 0.0
        """What probes may cost now; negative after one that cost more."""

    def begin(self, question: FetchQuestion) -> MeasuredChoice:
        return MeasuredChoice(self, question)

    def estimates(self) -> FetchEstimates:
        link = self.link
        return FetchEstimates(1 / link.seconds_per_byte, link.latency_s, link.lookup_s)

    def earn(self, compute_s: float) -> None:
        """A request computes, for `compute_s`, what it might have fetched."""
        self.credit_s = min(self.credit_s + PROBE_SHARE * compute_s, max(compute_s, 4 * self.link.lookup_s))


class MeasuredChoice:
    """One request's decisions."""

    def __init__(self, chooser: MeasuredChooser, question: FetchQuestion) -> None:
        self.reason = ""
        self._chooser = chooser
        self._link = chooser.link
        self._question = question
        self._num_wanted = 0
        self._num_arrived = 0
        self._spent_s = 0.0
        self._probe_limit_s: float | None = None
        self._first: tuple[int, float] | None = None
        self._recent_bytes = self._recent_s = 0.0

    def wants_lookup(self) -> bool:
        """Whether what a look-up may find is worth more than the look-up."""
        question, chooser = self._question, self._chooser
        compute_s = question.compute_s(0, question.num_blocks)
        gain_s = compute_s - self._fetch_s(question.num_blocks)
        if chooser.hit_share * gain_s > self._link.lookup_s:
            return True
        slow = gain_s <= self._link.lookup_s
        price = self._link.lookup_s + (self._probe_price(question.num_blocks) if slow else 0.0)
        if chooser.credit_s >= price:
            chooser.credit_s -= self._link.lookup_s
            return True
        chooser.earn(compute_s)
        self.reason = "compute: the store is slower" if slow else "compute: too seldom found to be looked up"
        return False

    def found(self, num_blocks: int, seconds: float) -> int:
        question, chooser = self._question, self._chooser
        chooser.link.measure_lookup(seconds)
        share = num_blocks / question.num_blocks
        chooser.hit_share = max(chooser.hit_share + HIT_SMOOTHING * (share - chooser.hit_share), RARELY_FOUND)
        if num_blocks == 0:
            self.reason = "compute: not in the store"
            return 0
        fits = (question.limit_s - self._link.latency_s) / (self._link.seconds_per_byte * question.block_bytes)
        num_wanted = min(num_blocks, max(int(fits), 1))
        compute_s, fetch_s = question.compute_s(0, num_wanted), self._fetch_s(num_wanted)
        figures = f"{num_wanted} blocks in {fetch_s:.4f} s, computed in {compute_s:.4f} s"
        if fetch_s <= compute_s:
            self.reason = f"fetch: {figures}"
        elif chooser.credit_s >= (price := self._probe_price(num_blocks)):
            num_wanted = min(num_blocks, PROBE_BLOCKS)
            self._probe_limit_s = price
            self.reason = f"probe: {figures}"
            chooser.counters.num_probes += 1
        else:
            chooser.earn(question.compute_s(0, num_blocks))
            self.reason = f"compute: {figures}"
            return 0
        self._num_wanted = num_wanted
        return num_wanted

    def patience_s(self) -> float:
        if self._probe_limit_s is not None:
            return max(self._probe_limit_s - self._spent_s, LEAST_WAIT_S)
        rest_s = self._question.compute_s(self._num_arrived, self._num_wanted)
        expected_s = self._question.block_bytes * self._seconds_per_byte
        if self._num_arrived == 0:
            expected_s += self._link.latency_s
        share = PATIENCE_SHARE if self._link.is_known else UNSURE_SHARE
        return max(min(max(LATE_FACTOR * expected_s, share * rest_s), LONGEST_WAIT * rest_s), LEAST_WAIT_S)

    def arrived(self, num_bytes: int, seconds: float) -> bool:
        self._spent_s += seconds
        self._num_arrived += 1
        if self._num_arrived == 1:
            self._first = num_bytes, seconds
        else:
            self._recent(num_bytes, seconds)
        num_left = self._num_wanted - self._num_arrived
        if num_left == 0 or self._probe_limit_s is not None:
            return True
        rest_s = num_left * self._question.block_bytes * self._seconds_per_byte
        compute_s = self._question.compute_s(self._num_arrived, self._num_wanted)
        if rest_s <= SLOWER * compute_s:
            return True
        self.reason += f"; left after {self._num_arrived}: {rest_s:.4f} s to go, computed in {compute_s:.4f} s"
        return False

    def gave_up(self, seconds: float) -> None:
        """What is known then is that a record takes at least so long."""
        self._spent_s += seconds
        size = self._question.block_bytes
        if self._num_arrived == 0:
            if seconds > self._fetch_s(1):
                self._first = size, seconds
        elif seconds > size * self._seconds_per_byte:
            self._recent(size, seconds)
        self.reason += f"; left after {self._num_arrived}: nothing came for {seconds:.4f} s"

    def finish(self) -> None:
        chooser, link = self._chooser, self._link
        probing = self._probe_limit_s is not None
        weight = 1.0 if probing else None
        if self._recent_bytes:
            link.measure_rest(self._recent_bytes, self._recent_s, weight=weight)
        if self._first is not None:
            self._measure_first(*self._first, weight=weight)
        if probing:
            chooser.credit_s -= max(self._spent_s - self._question.compute_s(0, self._num_arrived), 0.0)

    def _measure_first(self, num_bytes: int, seconds: float, *, weight: float | None) -> None:
        """The records after it tell how much of the first one's time were its bytes: the rest is latency."""
        if not self._recent_bytes:
            self._link.measure_first(num_bytes, seconds, weight=weight)
            return
        bytes_s = num_bytes * self._recent_s / self._recent_bytes
        self._link.measure_latency(max(seconds - bytes_s, LEAST_LATENCY * seconds), weight=weight)

    @property
    def _seconds_per_byte(self) -> float:
        """Of this fetch, from what was known before it and what has come since."""
        known = PRIOR_BLOCKS * self._question.block_bytes * RECENT**self._num_arrived
        return (known * self._link.seconds_per_byte + self._recent_s) / (known + self._recent_bytes)

    def _recent(self, num_bytes: int, seconds: float) -> None:
        self._recent_bytes = RECENT * self._recent_bytes + num_bytes
        self._recent_s = RECENT * self._recent_s + seconds

    def _fetch_s(self, num_blocks: int) -> float:
        return self._link.seconds(num_blocks * self._question.block_bytes)

    def _probe_price(self, num_blocks: int) -> float:
        """The longest a probe may take: what it is expected to take, but not a large share of the prompt."""
        compute_s = self._question.compute_s(0, num_blocks)
        return min(self._fetch_s(min(num_blocks, PROBE_BLOCKS)), compute_s / 4)
