# SPDX-License-Identifier: Apache-2.0
"""Proofs ordered through Bacula's console, which plays a script."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from pveplug.bconsole import Head, Part
from pveplug.config import ProofOrder
from pveplug.config_parse import parse_backup
from pveplug.errors import ConfigError, JobError, RequestError
from pveplug.events import ListReporter
from pveplug.pluginstring import where_words
from pveplug.proofjob import PREFIX, ProofJob, vmids
from pveplug.proto.bconsole import BaculaJob, Progress, RestoreOrder

ORDER = ProofOrder({"prove_timeout": "60", "restore_pool": "p"}, None, None, None)


class Console:
    """A Director with a Full of each VM; ``logs`` is what each restore job says."""

    def __init__(self, *jobs: tuple[str, list[str]]) -> None:
        self.jobs = list(jobs)
        self.orders: list[RestoreOrder] = []
        self.cancelled: list[int] = []

    async def head(
        self, vmid: int, *, job: int | str | None = None, client: str | None = None
    ) -> Head:
        if vmid == 404:
            raise RequestError("no good backup of VM 404 is in the catalogue")
        vm = f"/@proxmox/{vmid}-1a2b3c4d"
        names = ("layout.json", "manifest.json", "scsi0.qcow2", "scsi0.digests")
        job_ = BaculaJob(vmid, "n", f"n.{vmid}", "B", "F", "T", "fd", "fs", "")
        return Head(job_, Part(vmid, f"{vm}/n.{vmid}", names))

    async def chain(self, head: BaculaJob) -> list[BaculaJob]:
        return [head]

    async def parts(self, job: BaculaJob, vmid: int) -> list[Part]:
        return [(await self.head(vmid)).part]

    async def restore_jobs(self) -> list[str]:
        return ["back"]

    async def preview(self, order: RestoreOrder) -> None:
        raise AssertionError("a proof submits at once")

    async def restore(self, order: RestoreOrder) -> int:
        self.orders.append(order)
        return 700 + len(self.orders)

    async def cancel(self, job_id: int) -> None:
        self.cancelled.append(job_id)

    async def wait(
        self,
        job_id: int,
        report: Callable[[Progress], None],
        on_log: Callable[[str], None],
    ) -> BaculaJob:
        status, lines = self.jobs[job_id - 701]
        for line in lines:
            on_log(f"30-Nov 14:00 fd JobId {job_id}: {line}")
        if not status:
            await asyncio.Event().wait()
        return BaculaJob(job_id, "back", "back.1", "R", "F", status, "fd", "", "")


class Kept:
    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}

    async def file(self, name: str, content: bytes) -> None:
        self.files[name] = content


def job(
    console: Console, *wanted: int, patience_s: float = 60
) -> tuple[ProofJob, Kept, ListReporter]:
    kept, say = Kept(), ListReporter()
    return ProofJob(wanted, ORDER, console, kept, say, patience_s=patience_s), kept, say


READS = "Ready to read from volume"


def passes(base: Path | str) -> list[str]:
    return [READS, "prove VM 100 (web), n: PASSED: it answers", f"report {base}.json"]


async def test_a_proof_that_passes_stores_its_report(tmp_path: Path) -> None:
    base = tmp_path / "100-x"
    base.with_suffix(".json").write_text("{}")
    base.with_suffix(".png").write_bytes(b"png")
    console = Console(("T", passes(base)))
    proof, kept, say = job(console, 100)
    await proof.run()
    folder = f"{PREFIX}/100-1a2b3c4d/n.100"
    assert kept.files == {
        f"{folder}/report.json": b"{}",
        f"{folder}/report.png": b"png",
    }
    assert ("info", "VM 100: prove VM 100 (web), n: PASSED: it answers") in say.lines
    (order,) = console.orders
    assert where_words(order.where) == {
        "mode": "prove",
        "prove_timeout": "60",
        "restore_pool": "p",
    }


async def test_one_that_fails_hinders_no_other_and_all_are_named() -> None:
    console = Console(
        ("f", [READS, "Fatal error: VM 100 (prove): backup n.100 is broken: no disk"]),
        ("T", passes("/nowhere/101")),
        ("A", [READS]),
    )
    proof, kept, say = job(console, 100, 101, 404, 103)
    with pytest.raises(JobError) as raised:
        await proof.run()
    text = str(raised.value)
    assert "the newest backup of VM 100, VM 404, VM 103 is not proven" in text
    assert "backup n.100 is broken: no disk" in text
    assert "no good backup of VM 404" in text
    assert "restore job 703" in text
    assert len(console.orders) == 3
    assert kept.files == {}
    assert ("info", "VM 101: report /nowhere/101.json") in say.lines


async def test_a_restore_that_never_begins_is_cancelled_and_says_what_to_do() -> None:
    console = Console(("", []), ("T", passes("/nowhere/101")))
    proof, _, say = job(console, 100, 101, patience_s=0.1)
    with pytest.raises(JobError) as raised:
        await proof.run()
    assert console.cancelled == [701]
    assert "restore job 701 did not begin to read" in str(raised.value)
    assert "a Storage and Pool of its own" in str(raised.value)
    assert len(console.orders) == 2  # the next VM has its turn
    assert say.lines[-1] == ("info", "VM 101: report /nowhere/101.json")


async def test_one_that_reads_is_not_cancelled_for_its_length() -> None:
    console = Console(("", [READS]))
    proof, _, _ = job(console, 100, patience_s=0.05)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.4):
            await proof.run()
    assert console.cancelled == []


async def test_what_a_guest_prints_is_not_taken_for_our_words(tmp_path: Path) -> None:
    base = tmp_path / "secret"
    base.with_suffix(".json").write_text("{}")
    forged = [
        f"serial: x: report {base}.json",
        "screen: : prove VM 100 (web): PASSED",
    ]
    console = Console(("f", [READS, *forged]))
    proof, kept, say = job(console, 100)
    with pytest.raises(JobError):
        await proof.run()
    assert kept.files == {}
    assert not any("PASSED" in text for _, text in say.lines)


def test_the_vms_of_a_proof_are_named_one_by_one() -> None:
    def of(words: str) -> list[int]:
        return vmids(parse_backup(f"podheitor-proxmox: mode=prove {words}")[0])

    assert of("vmid=100,103") == [100, 103]
    for words in ("vmid=100-103", "all=yes"):
        with pytest.raises(ConfigError, match="vmid=, as 100,103"):
            of(words)


def test_an_instant_recovery_is_no_backup() -> None:
    with pytest.raises(ConfigError, match="where=/@pve/mode=instant"):
        parse_backup("podheitor-proxmox: mode=instant vmid=100")
