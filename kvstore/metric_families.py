"""Counters and gauges of one moment, as Prometheus wants them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from kvferry.kvstore.metrics_endpoint import PREFIX


class Described(NamedTuple):
    """A metric's name without prefix, and what it says."""

    name: str
    help: str


Labelled = tuple[Mapping[str, str], float]
"""Labels and value."""


def counter(metric: Described, samples: Iterable[Labelled]) -> Metric:
    """A count since the process started; `_total` is added to its name. All samples have the same label names."""
    return _filled(CounterMetricFamily, metric, samples)


def gauge(metric: Described, samples: Iterable[Labelled]) -> Metric:
    """A value now. All samples have the same label names."""
    return _filled(GaugeMetricFamily, metric, samples)


def counters(of: object, fields: Mapping[str, Described], labels: Mapping[str, str]) -> Iterator[Metric]:
    """A counter for each field of `of` that `fields` names."""
    for field, metric in fields.items():
        yield counter(metric, [(labels, getattr(of, field))])


def gauges(of: object, fields: Mapping[str, Described], labels: Mapping[str, str]) -> Iterator[Metric]:
    """A gauge for each field of `of` that `fields` names."""
    for field, metric in fields.items():
        yield gauge(metric, [(labels, getattr(of, field))])


def _filled(
    kind: type[CounterMetricFamily] | type[GaugeMetricFamily], metric: Described, samples: Iterable[Labelled]
) -> Metric:
    rows = list(samples)
    names = list(rows[0][0]) if rows else []
    family = kind(PREFIX + metric.name, metric.help, labels=names)
    for labels, value in rows:
        family.add_metric([labels[name] for name in names], value)
    return family
