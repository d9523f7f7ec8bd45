# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import urllib.request

import pytest

from pveplug.dr.metrics import Metrics
from pveplug.dr.store import ReplicaStore
from pveplug.errors import TransportError
from tests.unit.test_command_replicas import UUID, record


def scraped(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
        return page.read().decode()


def test_a_scrape_tells_of_replicas_and_of_what_happened(tmp_path):
    store = ReplicaStore(str(tmp_path))
    store.write(record(1))
    store.write(record(2, role="active", epoch=3))
    metrics = Metrics(store)
    metrics.session(+1)
    metrics.refused("epoch")
    metrics.received(UUID.format(1), 4096)
    metrics.mismatched(UUID.format(1), 1)
    with metrics.serving(0) as port:
        text = scraped(port)
    name = "podheitor_proxmox_receiver"
    labels = f'{{source="web1",uuid="{UUID.format(1)}",vmid="901"}}'
    assert f"{name}_sessions 1.0" in text
    assert f'{name}_refusals_total{{code="epoch"}} 1.0' in text
    assert f'{name}_received_bytes_total{{uuid="{UUID.format(1)}"}} 4096.0' in text
    assert f"{name}_verification_mismatches_total{{" in text
    assert f'{name}_replicas{{role="standby"}} 1.0' in text
    assert f'{name}_replicas{{role="active"}} 1.0' in text
    assert f"{name}_replica_restore_points{labels} 2.0" in text
    assert f"{name}_replica_epoch{labels} 1.0" in text
    assert f"{name}_replica_lag_seconds{labels} 1" in text
    assert f"{name}_replica_last_restore_point_seconds{labels} 1" in text
    assert f"{name}_replica_healthy{labels} 1.0" in text


def test_a_taken_port_is_said(tmp_path):
    metrics = Metrics(ReplicaStore(str(tmp_path)))
    with (
        metrics.serving(0) as port,
        pytest.raises(TransportError, match=r"metrics\.port"),
        metrics.serving(port),
    ):
        pass
