# SPDX-License-Identifier: Apache-2.0
"""What Prometheus may ask: gauges read from the records at each scrape, and counters.

prometheus_client serves them from a thread of its own, on a loopback port.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Final

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    start_http_server,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from pveplug.dr.overview import HEALTHY, Overview, overviews
from pveplug.dr.store import ROLES, ReplicaStore
from pveplug.errors import TransportError

PREFIX: Final = "podheitor_proxmox_receiver"
LOOPBACK: Final = "127.0.0.1"
_LABELS: Final = ("uuid", "source", "vmid")


class Metrics:
    """The counters of one receiver, and what its records say."""

    def __init__(self, store: ReplicaStore, *, stage_dir: str = "") -> None:
        self.registry = CollectorRegistry()
        self._sessions = Gauge(
            f"{PREFIX}_sessions", "Senders being served.", registry=self.registry
        )
        self._refusals = Counter(
            f"{PREFIX}_refusals", "Sessions refused.", ["code"], registry=self.registry
        )
        self._bytes = Counter(
            f"{PREFIX}_received_bytes",
            "Bytes of disks received, after decompression.",
            ["uuid"],
            registry=self.registry,
        )
        self._mismatches = Counter(
            f"{PREFIX}_verification_mismatches",
            "Blocks that differed from the source and were sent again.",
            ["uuid"],
            registry=self.registry,
        )
        self.registry.register(_Records(store, stage_dir))

    def session(self, change: int) -> None:
        self._sessions.inc(change)

    def refused(self, code: str) -> None:
        self._refusals.labels(code).inc()

    def received(self, uuid: str, count: int) -> None:
        self._bytes.labels(uuid).inc(count)

    def mismatched(self, uuid: str, count: int) -> None:
        self._mismatches.labels(uuid).inc(count)

    @contextlib.contextmanager
    def serving(self, port: int) -> Iterator[int]:
        """Answer on a port of the loopback address as long as the context lasts.

        Raises:
            TransportError: the port is taken.
        """
        try:
            server, thread = start_http_server(port, LOOPBACK, self.registry)
        except OSError as error:
            raise TransportError(
                f"metrics can't be served on {LOOPBACK}:{port}: "
                f"{error.strerror or error}. Choose another metrics.port"
            ) from error
        try:
            yield server.server_port
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


class _Records(Collector):
    """Reads the records when it is asked: they are the truth, and few."""

    def __init__(self, store: ReplicaStore, stage_dir: str) -> None:
        self._store = store
        self._stage_dir = stage_dir

    def describe(self) -> list[Metric]:
        return []  # registering reads nothing

    def collect(self) -> Iterator[Metric]:
        found = overviews(self._store, stage_dir=self._stage_dir)
        yield _roles(found)
        for name, about, value in _GAUGES:
            family = GaugeMetricFamily(f"{PREFIX}_{name}", about, labels=_LABELS)
            for one in found:
                number = value(one)
                if number is not None:
                    family.add_metric(_labels(one), number)
            yield family


def _labels(one: Overview) -> list[str]:
    return [one.uuid, one.source_name, str(one.vmid)]


def _roles(found: list[Overview]) -> Metric:
    family = GaugeMetricFamily(
        f"{PREFIX}_replicas", "Replicas, by what they are.", labels=["role"]
    )
    for role in ROLES:
        family.add_metric([role], sum(one.role == role for one in found))
    return family


_GAUGES: Final = (
    (
        "replica_last_restore_point_seconds",
        "When the newest restore point was taken, seconds since 1970.",
        lambda one: one.last_taken or None,
    ),
    (
        "replica_last_instant_seconds",
        "The instant of the source that is held, seconds since 1970.",
        lambda one: one.last_instant or None,
    ),
    (
        "replica_lag_seconds",
        "Age of the instant that is held.",
        lambda one: one.lag_s,
    ),
    ("replica_epoch", "Raised by each failover.", lambda one: one.epoch),
    ("replica_restore_points", "Restore points.", lambda one: len(one.points)),
    (
        "replica_staged_bytes",
        "Bytes of increments that wait to be applied.",
        lambda one: one.stage_bytes,
    ),
    (
        "replica_healthy",
        "0: look at `pveplug replicas`.",
        lambda one: int(one.health in HEALTHY),
    ),
)
