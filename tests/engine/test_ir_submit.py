# SPDX-License-Identifier: Apache-2.0
"""A chain's restore jobs: their order, and what an end that isn't good leaves."""

from __future__ import annotations

import argparse
import asyncio
import shlex
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from pveplug import command_ir
from pveplug.bconsole import Head, Part
from pveplug.cli import command_parser
from pveplug.errors import ConfigError, JobError, RequestError
from pveplug.ir.submit import Plan, make_plan, submit
from pveplug.pluginstring import where_words
from pveplug.proto.bconsole import BaculaJob, Progress, RestoreOrder

pytestmark = pytest.mark.asyncio

VM = "/@proxmox/100-1a2b3c4d"
SMALL = ("layout.json", "vm.conf", "firewall.fw", "manifest.json")
WHERE = "/@pve/mode=instant"


def job(job_id: int, level: str = "I", status: str = "T") -> BaculaJob:
    return BaculaJob(job_id, "n", unique(job_id), "B", level, status, "fd", "fs", "")


def unique(number: int) -> str:
    return f"n.2026-11-30_14.00.{number:02}_{number:02}"


def part(
    job_id: int, *disks: str, number: int = 0, vm: str = VM, edges: bool = False
) -> Part:
    images = [f"{key}.{end}" for key in disks for end in ("qcow2", "digests")]
    ends = ("edges.bin",) if edges else ()
    return Part(job_id, f"{vm}/{unique(number or job_id)}", (*SMALL, *ends, *images))


class FakeConsole:
    """A Director with one chain; restore jobs end as ``ends`` says, else well."""

    def __init__(
        self, parts: Sequence[Part], *, names: Sequence[str] = ("back",), ends: str = ""
    ) -> None:
        self.found = parts
        self.names = list(names)
        self.ends = ends
        self.orders: list[RestoreOrder] = []
        self.previews: list[RestoreOrder] = []
        self.hold: asyncio.Event | None = None
        self.submitting = asyncio.Event()

    def ids(self) -> list[int]:
        return sorted({part.job_id for part in self.found})

    async def head(
        self, vmid: int, *, job: int | str | None = None, client: str | None = None
    ) -> Head:
        newest = max(self.found, key=lambda part: part.job)
        return Head(_job(newest.job_id), newest, skipped=("job 9: pruned",))

    async def chain(self, head: BaculaJob) -> list[BaculaJob]:
        return [_job(number) for number in self.ids()]

    async def parts(self, job: BaculaJob, vmid: int) -> list[Part]:
        return [part for part in self.found if part.job_id == job.job_id]

    async def restore_jobs(self) -> list[str]:
        return self.names

    async def preview(self, order: RestoreOrder) -> None:
        self.previews.append(order)

    async def restore(self, order: RestoreOrder) -> int:
        self.submitting.set()
        if self.hold:
            await self.hold.wait()
        self.orders.append(order)
        return 100 + len(self.orders)

    async def wait(
        self,
        job_id: int,
        report: Callable[[Progress], None],
        on_log: Callable[[str], None],
    ) -> BaculaJob:
        number = job_id - 101
        status = self.ends[number] if number < len(self.ends) else "T"
        report(Progress(job_id, "M"))
        on_log(f"dir JobId {job_id}: Start Restore Job")
        on_log(f"fd JobId {job_id}: Connected to Storage at sd:9103 with TLS")
        on_log(f"fd JobId {job_id}: VM 200 runs")
        if status == "f":
            on_log(f"fd JobId {job_id}: Fatal error: the landing store is full")
        return BaculaJob(job_id, "back", "back.1", "R", "F", status, "fd", "", "")


def _job(number: int) -> BaculaJob:
    return job(number, "F" if number == 1 else "I")


async def plan_of(console: FakeConsole, **options: Any) -> Plan:
    return await make_plan(console, 100, WHERE, **options)


async def test_each_job_is_restored_alone_newest_first_with_the_whole_chain_s_ids() -> (
    None
):
    console = FakeConsole([part(n, "scsi0") for n in (1, 2, 3)])
    plan = await plan_of(console, one_by_one=True)
    said: list[str] = []
    assert await submit(console, plan, said.append, again="x") == [101, 102, 103]
    assert [o.marks[0][0] for o in console.orders] == [
        f"{VM}/{unique(n)}" for n in (3, 2, 1)
    ]
    for order in console.orders:
        assert order.job_ids == (1, 2, 3)
        assert order.files == len(SMALL) + 2
        assert (order.where, order.client, order.restore_client) == (WHERE, "fd", "fd")
    assert "restore job 102 (2 of 3): VM 200 runs" in said
    assert not [line for line in said if "Start Rest" in line or "Connected" in line]


async def test_all_that_is_newer_than_the_full_goes_together() -> None:
    """Each restore job costs seconds, and the owners make their order indifferent."""
    console = FakeConsole([part(n, "scsi0", edges=True) for n in (1, 2, 3, 4)])
    plan = await plan_of(console)
    assert len(plan.steps) == 2
    first, last = (step.order for step in plan.steps)
    *newer, older = first.marks
    assert [mark[0] for mark in newer] == [f"{VM}/{unique(n)}" for n in (4, 3, 2)]
    assert all("scsi0.qcow2" in mark[1] for mark in newer)
    assert older == (f"{VM}/{unique(1)}", ("layout.json", "edges.bin"))
    assert [mark[0] for mark in last.marks] == [f"{VM}/{unique(1)}"]
    assert first.job_ids == last.job_ids == (1, 2, 3, 4)


async def test_firmware_of_the_whole_chain_comes_with_the_newest_job() -> None:
    console = FakeConsole([part(n, "scsi0", "efidisk0", "tpmstate0") for n in (1, 2)])
    plan = await plan_of(console)
    assert len(plan.steps) == 2
    firmware = (
        "efidisk0.qcow2", "efidisk0.digests", "tpmstate0.qcow2", "tpmstate0.digests",
    )  # fmt: skip
    newest, older = plan.steps[0].order.marks
    assert newest[0] == f"{VM}/{unique(2)}"
    assert set(newest[1]) > {"scsi0.qcow2", *firmware}
    assert older == (f"{VM}/{unique(1)}", ("layout.json", *firmware))
    assert plan.steps[0].order.job_ids == (1, 2)
    assert [o[0] for o in plan.steps[1].order.marks] == [f"{VM}/{unique(1)}"]


async def test_the_ends_of_all_disks_of_the_chain_come_with_the_newest_job() -> None:
    """Of those jobs that have them: the first may be of an older pveplug."""
    console = FakeConsole(
        [part(1, "scsi0"), *(part(n, "scsi0", edges=True) for n in (2, 3))]
    )
    plan = await plan_of(console, one_by_one=True)
    assert [step.title for step in plan.steps] == [
        f"ends of the disks of the whole chain, and {unique(3)} (JobId 3)",
        *(f"{unique(n)} (JobId {n})" for n in (2, 1)),
    ]
    newest, *older = plan.steps[0].order.marks
    assert newest[0] == f"{VM}/{unique(3)}"
    assert {"edges.bin", "scsi0.qcow2"} < set(newest[1])
    assert older == [
        (f"{VM}/{unique(2)}", ("layout.json", "edges.bin")),
        (f"{VM}/{unique(1)}", ("layout.json",)),
    ]


async def test_a_full_s_tpm_state_comes_before_its_disks_in_a_job_of_its_own() -> None:
    console = FakeConsole([part(1, "scsi0", "tpmstate0", edges=True)])
    plan = await plan_of(console)
    assert plan.steps[0].title == "firmware state and ends of the disks"
    assert plan.steps[0].order.marks == (
        (
            f"{VM}/{unique(1)}",
            (*SMALL, "edges.bin", "tpmstate0.qcow2", "tpmstate0.digests"),
        ),
    )
    assert len(plan.steps) == 2


async def test_a_full_without_one_is_one_job_for_its_stream_begins_with_all_that() -> (
    None
):
    console = FakeConsole([part(1, "scsi0", "efidisk0", edges=True)])
    assert len((await plan_of(console)).steps) == 1


async def test_firmware_that_the_head_no_longer_has_isn_t_asked_for() -> None:
    console = FakeConsole([part(1, "scsi0", "efidisk0"), part(2, "scsi0")])
    assert len((await plan_of(console)).steps) == 2


async def test_a_virtual_full_is_a_restore_job_for_each_directory_in_it() -> None:
    console = FakeConsole(
        [*(part(1, "scsi0", number=n) for n in (2, 4, 3)), part(5, "scsi0", number=6)]
    )
    plan = await plan_of(console, one_by_one=True)
    assert [step.order.marks[0][0] for step in plan.steps] == [
        f"{VM}/{unique(n)}" for n in (6, 4, 3, 2)
    ]
    assert {step.order.job_ids for step in plan.steps} == {(1, 5)}


async def test_another_vm_with_the_same_id_is_named_and_left_out() -> None:
    other = "/@proxmox/100-ffff0000"
    console = FakeConsole([part(1, "scsi0", vm=other), part(2, "scsi0")])
    plan = await plan_of(console)
    assert [step.order.marks[0][0] for step in plan.steps] == [f"{VM}/{unique(2)}"]
    assert plan.remarks[0] == "passed over job 9: pruned"
    assert "100-ffff0000, another VM with this id" in plan.remarks[1]


async def test_the_first_job_that_fails_is_the_last_and_says_how_to_go_on() -> None:
    console = FakeConsole([part(n, "scsi0") for n in (1, 2, 3)], ends="Tf")
    plan = await plan_of(console, one_by_one=True)
    with pytest.raises(JobError) as raised:
        await submit(console, plan, lambda _: None, again="pveplug ir start --job 3")
    text = str(raised.value)
    assert "restore job 102 (2 of 3)" in text
    assert "failed: Fatal error: the landing store is full" in text
    assert text.endswith("when the cause is gone: pveplug ir start --job 3")
    assert "\n" not in text
    assert len(console.orders) == 2


async def test_a_cancelled_job_ends_the_sequence_too() -> None:
    console = FakeConsole([part(1, "scsi0"), part(2, "scsi0")], ends="A")
    with pytest.raises(JobError, match="cancelled"):
        await submit(console, await plan_of(console), lambda _: None, again="x")
    assert len(console.orders) == 1


async def test_an_interruption_knows_the_job_that_was_just_being_submitted() -> None:
    console = FakeConsole([part(1, "scsi0"), part(2, "scsi0")])
    console.hold = asyncio.Event()
    plan = await plan_of(console)
    told: list[int | None] = []
    task = asyncio.create_task(
        submit(console, plan, lambda _: None, again="x", started=told.append)
    )
    await console.submitting.wait()
    task.cancel()
    await asyncio.sleep(0)
    console.hold.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert told == [101]
    assert len(console.orders) == 1


async def test_the_only_restore_job_is_taken_and_of_several_one_must_be_named() -> None:
    parts = [part(1, "scsi0")]
    assert (await plan_of(FakeConsole(parts))).steps[0].order.restore_job == "back"
    with pytest.raises(RequestError, match=r"a, b.*--restore-job"):
        await plan_of(FakeConsole(parts, names=("a", "b")))
    with pytest.raises(RequestError, match="no Job of Type = Restore"):
        await plan_of(FakeConsole(parts, names=()))
    named = await plan_of(
        FakeConsole(parts, names=("a", "b")), restore_job="b", restore_client="node2"
    )
    order = named.steps[0].order
    assert (order.restore_job, order.restore_client) == ("b", "node2")


async def test_a_catalogue_that_changed_under_the_plan_is_seen() -> None:
    console = FakeConsole([part(1, "scsi0"), part(2, "scsi0")])
    head = await console.head(100)
    console.found = [part(1, "scsi0"), part(2, "scsi0", "scsi1")]

    async def old(*_: object, **__: object) -> Head:
        return head

    console.head = old
    with pytest.raises(RequestError, match="changed meanwhile"):
        await plan_of(console)


# --- the command ----------------------------------------------------------------------


def parsed(*words: str) -> argparse.Namespace:
    return command_parser("ir").parse_args(["ir", "start", "--vmid", "100", *words])


async def test_the_arguments_become_one_where() -> None:
    where = command_ir.where_of(
        parsed(
            *("--new-vmid", "200", "--name", "shop copy", "--overlay-storage", "fast"),
            *("--target-storage", "ceph", "--no-auto-migrate", "--timeout", "600"),
            *("--map-bridge", "vmbr0:vmbr1", "--map-bridge", "vmbr2:vmbr3"),
            *("--option", "mac=new", "--option", "restore_pool=a b"),
        )
    )
    assert where_words(where) == {
        "mode": "instant",
        "restore_vmid": "100:200",
        "restore_name": "shop copy",
        "ir_overlay_storage": "fast",
        "ir_target_storage": "ceph",
        "ir_timeout": "600",
        "ir_auto_migrate": "no",
        "bridge_map": "vmbr0:vmbr1;vmbr2:vmbr3",
        "mac": "new",
        "restore_pool": "a b",
    }
    assert where_words(command_ir.where_of(parsed())) == {
        "mode": "instant",
        "restore_vmid": "100:next",
    }


@pytest.mark.parametrize(
    ("option", "why"),
    [
        ("mac", "is not key=value"),
        ("MAC=new", "is not key=value"),
        ("mode=restore", "mode is set by this command already"),
        ("restore_vmid=3", "restore_vmid is set by this command already"),
        (f"restore_pool={'x' * 900}", "at most 900 are allowed"),
    ],
)
async def test_an_option_that_can_t_be_is_refused(option: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        command_ir.where_of(parsed("--option", option))


async def test_the_command_to_go_on_means_the_same_backup_and_the_same_vm() -> None:
    words = (
        *("--client", "fd", "--new-vmid", "200", "--name", "a b", "--no-auto-migrate"),
        *("--option", "mac=new", "--option", "uuid=new", "--map-bridge", "a:b"),
        *("--console", "/opt/bconsole", "--console-config", "/etc/b c.conf"),
    )
    arguments = parsed(*words)
    plan = await plan_of(FakeConsole([part(1, "scsi0"), part(7, "scsi0")]))
    again = shlex.split(command_ir.again_command(arguments, plan))
    assert again[0] == "pveplug"
    second = command_parser("ir").parse_args(again[1:])
    assert second.job == "7"
    assert command_ir.where_of(second) == command_ir.where_of(arguments)
    assert (second.console, second.console_config) == (
        arguments.console,
        arguments.console_config,
    )


@pytest.mark.parametrize("vmid", ["0", "99", "x", "-5", "1e3", "9999999999"])
async def test_an_id_that_no_vm_has_is_a_wrong_argument(
    vmid: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        command_parser("ir").parse_args(["ir", "start", "--vmid", vmid])
    assert raised.value.code == 2
    assert "--vmid" in capsys.readouterr().err
