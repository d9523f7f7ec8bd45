# SPDX-License-Identifier: Apache-2.0
"""A watch ends with the right verdict, whatever the VM's sockets do."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from pveplug.errors import PveplugError
from pveplug.ir.proof import watch, write_report
from pveplug.ir.serialwatch import Matcher, PatternError
from pveplug.proving.console import FIRST, LAST, MAX_LINE
from pveplug.proving.picture import MAX_FILE
from pveplug.proving.report import ChainMember, Subject
from pveplug.proving.verdict import Evidence, Outcome, Verdict, Wanted
from tests.support.screens import as_ppm, drawn, recorded, registers
from tests.support.watched_vm import VMID, WatchedVm

AGENT, SERIAL, SCREEN = Evidence.AGENT, Evidence.SERIAL, Evidence.SCREEN
FAST = 0.05
PATIENT = 60.0


@pytest.fixture
async def vm(
    short_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[WatchedVm]:
    monkeypatch.setattr("pveplug.ir.proof.PING_S", 0.3)
    async with WatchedVm(short_tmp) as made:
        yield made
    left = [t for t in asyncio.all_tasks() if t.get_name().startswith("prove")]
    assert not left


async def judged(
    vm: WatchedVm,
    *kinds: Evidence,
    serial: str = "login:",
    timeout_s: float = PATIENT,
    every: bool = True,
) -> Verdict:
    wanted = Wanted(frozenset(kinds), every, serial, timeout_s, stable_s=0.3)
    return await watch(vm.node, VMID, wanted, look_every_s=FAST)


async def after_firmware(vm: WatchedVm) -> None:
    """Show the firmware to a few looks, then what the VM shows otherwise."""
    registers_then, picture_then = vm.registers, vm.picture
    vm.registers = registers("seabios")
    vm.picture = as_ppm(drawn("SeaBIOS (version 1.16.3)\n\nBooting from Hard Disk..."))
    await vm.looked("screendump", 2)
    vm.registers = registers_then
    await vm.looked("screendump", 2)
    vm.picture = picture_then


# --- evidence -------------------------------------------------------------------------


async def test_an_agent_that_answers_passes(vm: WatchedVm) -> None:
    vm.agent = True
    verdict = await judged(vm, AGENT)
    assert verdict.passed
    assert [one.kind for one in verdict.found] == [AGENT]
    assert verdict.screenshot, "the report has a picture whatever the evidence was"


async def test_a_line_of_the_console_passes(vm: WatchedVm) -> None:
    vm.serial = b"Linux version 6.1\r\n\x1b[1mweb login: ready\r\nmore\r\n"
    verdict = await judged(vm, SERIAL, serial="^web login: ready$")
    assert verdict.passed
    assert "web login: ready" in verdict.reason
    assert verdict.first_lines[0] == "Linux version 6.1"


async def test_a_prompt_without_an_end_of_line_passes(vm: WatchedVm) -> None:
    vm.serial = b"Debian GNU/Linux 12\r\n\r\nweb login: "
    verdict = await judged(vm, SERIAL, serial="login: $")
    assert verdict.passed
    assert verdict.last_lines[-1] == "web login: "


async def test_a_screen_that_stays_passes(vm: WatchedVm) -> None:
    watching = asyncio.create_task(judged(vm, SCREEN))
    await after_firmware(vm)
    verdict = await watching
    assert verdict.passed, verdict
    shot = verdict.screenshot
    assert shot
    data = Path(shot.path).read_bytes()
    assert hashlib.sha256(data).hexdigest() == shot.sha256
    assert stat.S_IMODE(os.stat(Path(shot.path).parent).st_mode) == 0o700
    assert shot.text == ("login:" * 9,)


async def test_a_frozen_vm_is_continued_when_its_console_is_read(
    vm: WatchedVm,
) -> None:
    vm.status, vm.serial = "prelaunch", b"the very first line\n"
    verdict = await judged(vm, SERIAL, serial="first line")
    assert verdict.passed
    vm.agent = True
    assert (await judged(vm, AGENT)).passed
    assert vm.commands.count("cont") <= 1


async def test_a_frozen_vm_without_a_console_is_continued_too(
    vm: WatchedVm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pveplug.ir.proof.CONSOLE_S", 0.2)
    await vm.vanish("serial0")
    vm.status = "prelaunch"
    watching = asyncio.create_task(judged(vm, AGENT))
    await vm.looked("cont")
    vm.agent = True
    verdict = await watching
    assert verdict.passed
    assert "the VM has no serial console to read" in verdict.notes


# --- nothing to see -------------------------------------------------------------------


async def test_a_vm_that_says_nothing_is_not_proven(vm: WatchedVm) -> None:
    verdict = await judged(vm, AGENT, SERIAL, timeout_s=1.5)
    assert verdict.outcome is Outcome.NOT_PROVEN
    assert "agent did not answer" in verdict.reason
    assert "did not show prove_serial" in verdict.reason


async def test_a_vm_that_never_runs_is_not_proven(short_tmp: Path) -> None:
    vm = WatchedVm(short_tmp)
    verdict = await judged(vm, AGENT, SERIAL, timeout_s=0.5)
    assert verdict.outcome is Outcome.NOT_PROVEN
    assert verdict.reason == "VM 100 did not run within 0.5 s"
    assert verdict.screenshot is None
    assert not any((short_tmp / "run").iterdir()), "nothing is left of a watch"


async def test_a_vm_that_starts_later_is_waited_for(short_tmp: Path) -> None:
    vm = WatchedVm(short_tmp)
    vm.agent = True
    watching = asyncio.create_task(judged(vm, AGENT))
    await asyncio.sleep(0.3)
    async with vm:
        assert (await watching).passed


async def test_a_vm_without_vga_is_not_proven_by_its_screen(vm: WatchedVm) -> None:
    vm.picture = None
    verdict = await judged(vm, SCREEN, timeout_s=1.0)
    assert verdict.outcome is Outcome.NOT_PROVEN
    assert "no VGA to dump" in verdict.reason


# --- it ends --------------------------------------------------------------------------


async def test_a_vm_that_vanishes_fails(vm: WatchedVm) -> None:
    watching = asyncio.create_task(judged(vm, AGENT))
    await vm.looked("screendump")
    await vm.vanish()
    verdict = await watching
    assert verdict.outcome is Outcome.FAILED
    assert verdict.reason == "the VM ended before its guest was up"
    assert verdict.screenshot, "its last picture is kept"


async def test_last_words_before_the_end_still_count(vm: WatchedVm) -> None:
    vm.serial, vm.serial_ends = b"checks passed, login: none\n", True
    vm.status = "shutdown"
    assert (await judged(vm, SERIAL)).passed


@pytest.mark.parametrize("status", ["guest-panicked", "internal-error", "shutdown"])
async def test_a_run_state_that_is_an_end_fails_at_once(
    vm: WatchedVm, status: str
) -> None:
    vm.status = status
    assert (await judged(vm, AGENT)).outcome is Outcome.FAILED


async def test_a_firmware_screen_of_failure_fails_at_once(vm: WatchedVm) -> None:
    vm.registers = registers("seabios")
    vm.picture = as_ppm(recorded("seabios-no-bootable-device"))
    verdict = await judged(vm, AGENT)
    assert verdict.outcome is Outcome.FAILED
    assert "No bootable device" in verdict.reason
    assert verdict.screenshot
    assert any("No bootable" in line for line in verdict.screenshot.text)


async def test_a_panic_on_the_console_fails_at_once(vm: WatchedVm) -> None:
    vm.serial = b"[ 1.0] Kernel panic - not syncing: no init found\r\n"
    verdict = await judged(vm, AGENT)
    assert verdict.outcome is Outcome.FAILED
    assert "the kernel panics" in verdict.reason


# --- hostile peers --------------------------------------------------------------------


async def test_a_console_that_floods_costs_bounded_memory(vm: WatchedVm) -> None:
    vm.flood = b"\x1b[31m" + b"A" * 5000
    watching = asyncio.create_task(judged(vm, AGENT, serial=""))
    await vm.looked("screendump", 5)
    vm.agent = True
    verdict = await watching
    vm.flood = b""
    assert verdict.passed
    assert len(verdict.first_lines) <= FIRST
    assert len(verdict.last_lines) <= LAST
    assert max(map(len, verdict.last_lines)) <= MAX_LINE


async def test_a_pattern_that_takes_for_ever_ends_as_not_proven(
    vm: WatchedVm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pveplug.ir.serialwatch.MATCH_S", 0.5)
    vm.serial = b"a" * 60 + b"!\n"
    verdict = await judged(vm, SERIAL, serial="(a+)+$")
    assert verdict.outcome is Outcome.NOT_PROVEN
    assert "nested repetitions" in verdict.reason


async def test_a_matcher_that_is_killed_says_so() -> None:
    async with Matcher("x+") as matcher:
        assert await matcher.first(["a", "bx", "x"]) == 1
        assert await matcher.first(["a"]) is None
        assert matcher._process
        matcher._process.kill()
        await matcher._process.wait()
        with pytest.raises(PatternError, match="died"):
            await matcher.first(["x"])


def _too_large(path: Path) -> None:
    with path.open("wb") as file:
        file.write(b"P6\n9000 9000\n255\n")
        file.truncate(MAX_FILE + 100)


def _symlink(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/etc/passwd")


def _fifo(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


@pytest.mark.parametrize(
    "picture",
    [
        b"",
        b"P6\n100 100\n255\nshort",
        b"\x89PNG\r\n",
        _too_large,
        _symlink,
        _fifo,
        lambda _: None,
    ],
    ids=["empty", "cut", "png", "large", "symlink", "fifo", "none"],
)
async def test_a_picture_that_is_none_proves_nothing(
    vm: WatchedVm, picture: bytes
) -> None:
    vm.picture = picture
    verdict = await judged(vm, SCREEN, timeout_s=0.7)
    assert verdict.outcome is Outcome.NOT_PROVEN
    assert "no picture of the screen" in verdict.reason
    assert verdict.screenshot is None


@pytest.mark.parametrize(
    "status",
    [b"garbage\r\n", b'{"return": 7}\r\n', b"\xff" * 5000 + b"\r\n"],
    ids=["text", "number", "bytes"],
)
async def test_a_monitor_that_talks_nonsense_delays_and_proves_nothing(
    vm: WatchedVm, status: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pveplug.ir.proof.LOOK_LIMIT_S", 0.3)
    vm.status = status
    watching = asyncio.create_task(judged(vm, AGENT))
    await vm.looked("query-status", 2)
    vm.status, vm.agent = "running", True
    verdict = await watching
    assert verdict.passed
    assert any("look at the VM's monitor" in note for note in verdict.notes)


async def test_an_agent_that_talks_nonsense_proves_nothing(vm: WatchedVm) -> None:
    vm.agent = b'\xff{"return": 3}\n'
    verdict = await judged(vm, AGENT, timeout_s=1.0)
    assert verdict.outcome is Outcome.NOT_PROVEN


async def test_a_cancelled_watch_leaves_nothing_running(vm: WatchedVm) -> None:
    watching = asyncio.create_task(judged(vm, AGENT, SERIAL, SCREEN))
    await vm.looked("screendump", 2)
    watching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await watching
    assert vm.status == "running"
    assert not any((vm.folder / "run").iterdir())


# --- reports --------------------------------------------------------------------------


def subject() -> Subject:
    return Subject(
        55,
        "web",
        "web-backup",
        (ChainMember(41, "F", "web.1"),),
        "2026-03-14T03:15:00+00:00",
        "2026-03-14T03:16:00+00:00",
        VMID,
    )


async def test_the_report_is_three_files_and_the_picture_moves(
    vm: WatchedVm, tmp_path: Path
) -> None:
    vm.agent = True
    verdict = await judged(vm, AGENT)
    assert verdict.screenshot
    path = await write_report(tmp_path / "reports", subject(), verdict)
    names = sorted(file.name for file in path.parent.iterdir())
    assert names == [f"55-20260314T031500Z.{end}" for end in ("json", "png", "txt")]
    assert all(stat.S_IMODE(f.stat().st_mode) == 0o600 for f in path.parent.iterdir())
    value = json.loads(path.read_text())
    picture = (path.parent / value["screenshot"]["file"]).read_bytes()
    assert hashlib.sha256(picture).hexdigest() == value["screenshot"]["sha256"]
    assert not Path(verdict.screenshot.path).parent.exists()


async def test_a_report_that_cannot_be_written_says_where(tmp_path: Path) -> None:
    place = tmp_path / "file"
    place.write_text("")
    verdict = Verdict(Outcome.FAILED, "x", Wanted(frozenset({AGENT})))
    with pytest.raises(PveplugError, match=f"cannot be written to {place}"):
        await write_report(place, subject(), verdict)
