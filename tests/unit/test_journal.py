# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pveplug.errors import JobError
from pveplug.journal import (
    entries_of,
    forget,
    open_journal,
    own_vm,
    proven,
    read_entry,
)


def file_of(state: Path) -> Path:
    return state / "vms/100.json"


def test_every_change_is_on_disk_at_once(tmp_path: Path) -> None:
    journal = open_journal(str(tmp_path), 100, "job", "backup")
    journal.note(touched=True, nbd_socket="/s")
    journal.add("files", "/a")
    journal.add("files", "/b")
    journal.drop("files", "/a")
    journal.drop("files", "/never")
    found = read_entry(str(tmp_path), 100)
    assert found is not None
    assert (found.touched, found.nbd_socket, found.files) == (True, "/s", ["/b"])
    assert found.pid == os.getpid()
    assert time.time() - found.changed < 60
    assert file_of(tmp_path).parent.stat().st_mode & 0o777 == 0o700
    journal.close()
    assert read_entry(str(tmp_path), 100) is None


def test_a_new_journal_has_no_proof_of_an_old_lock(tmp_path: Path) -> None:
    journal = open_journal(str(tmp_path), 100, "job", "backup")
    journal.proof.touch()
    assert proven(str(tmp_path), 100)
    open_journal(str(tmp_path), 100, "next", "backup")
    assert not proven(str(tmp_path), 100)


def test_forgetting_takes_the_proof_along(tmp_path: Path) -> None:
    journal = open_journal(str(tmp_path), 100, "job", "backup")
    journal.proof.touch()
    forget(str(tmp_path), 100)
    assert not list((tmp_path / "vms").iterdir())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"job": "j"}',
        '{"vmid": 100, "job": "j", "kind": "backup", "files": 5}',
        '{"vmid": 100, "job": "j", "kind": "backup", "files": [5]}',
        '{"vmid": 7, "job": "j", "kind": "backup"}',
        "\xff",
    ],
)
def test_a_broken_journal_still_has_the_vm_looked_at(tmp_path: Path, text: str) -> None:
    open_journal(str(tmp_path), 100, "job", "backup")
    file_of(tmp_path).write_bytes(text.encode("latin-1"))
    found = read_entry(str(tmp_path), 100)
    assert found is not None
    assert (found.vmid, found.touched, found.files) == (100, True, [])


def test_a_newer_versions_journal_is_understood(tmp_path: Path) -> None:
    open_journal(str(tmp_path), 100, "job", "backup").note(locked=True)
    values = json.loads(file_of(tmp_path).read_text())
    values["unheard_of"] = {"a": 1}
    file_of(tmp_path).write_text(json.dumps(values))
    found = read_entry(str(tmp_path), 100)
    assert found is not None
    assert found.locked
    assert found.job == "job"


def test_entries_are_found_by_their_job(tmp_path: Path) -> None:
    for vmid, job in ((100, "a"), (101, "b"), (102, "a")):
        open_journal(str(tmp_path), vmid, job, "backup")
    (tmp_path / "vms/note.json").write_text("{}")
    assert [e.vmid for e in entries_of(str(tmp_path), "a")] == [100, 102]
    assert not list(entries_of(str(tmp_path), "c"))


class Full:
    """A state directory that can't be written to any more."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(fd: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", fail)


def test_what_cannot_be_written_down_is_not_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = open_journal(str(tmp_path), 100, "job", "backup")
    Full(monkeypatch)
    with pytest.raises(JobError, match=r"No space left.*Remedy"):
        journal.note(frozen=True)
    with pytest.raises(JobError, match="VM 100"):
        journal.add("files", "/a")


def test_a_full_disk_does_not_hinder_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = open_journal(str(tmp_path), 100, "job", "backup")
    journal.add("files", "/a")
    journal.note(locked=True)
    Full(monkeypatch)
    journal.undone(locked=False)
    journal.drop("files", "/a")
    assert not journal.entry.locked
    journal.close()
    assert read_entry(str(tmp_path), 100) is None


async def test_a_state_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(JobError, match="state_dir"):
        async with own_vm(str(tmp_path / "file/state"), 100, 0):
            pass


async def test_the_second_job_waits_and_then_names_the_owner(tmp_path: Path) -> None:
    state = str(tmp_path)
    async with own_vm(state, 100, 0):
        open_journal(state, 100, "first.2026", "backup")
        began = time.monotonic()
        with pytest.raises(JobError, match=r"job first.2026 \(pid \d+\)"):
            async with own_vm(state, 100, 0.5):
                pass
        assert time.monotonic() - began >= 0.5
        async with own_vm(state, 101, 0):
            pass  # another VM is free


async def test_a_waiting_job_gets_the_vm_when_the_first_has_ended(
    tmp_path: Path,
) -> None:
    state = str(tmp_path)
    got = asyncio.Event()

    async def second() -> None:
        async with own_vm(state, 100, 10):
            got.set()

    async with own_vm(state, 100, 0):
        task = asyncio.create_task(second())
        await asyncio.sleep(0.3)
        assert not got.is_set()
    await task
    assert got.is_set()


async def test_a_cancelled_wait_leaves_no_lock(tmp_path: Path) -> None:
    state = str(tmp_path)

    async def second() -> None:
        async with own_vm(state, 100, 10):
            pass

    async with own_vm(state, 100, 0):
        task = asyncio.create_task(second())
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    async with own_vm(state, 100, 0):
        pass


async def test_a_program_that_inherits_the_lock_keeps_it(tmp_path: Path) -> None:
    state = str(tmp_path)
    async with own_vm(state, 100, 0) as fd:
        code = "import sys; print('up', flush=True); sys.stdin.read()"
        child = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=(fd,),
        )
        assert child.stdout is not None
        assert child.stdout.readline() == b"up\n"
    with pytest.raises(JobError, match="working on this VM"):
        async with own_vm(state, 100, 0):
            pass
    child.communicate()
    async with own_vm(state, 100, 0):
        pass


async def test_other_children_do_not_inherit_it(tmp_path: Path) -> None:
    async with own_vm(str(tmp_path), 100, 0):
        child = subprocess.Popen(
            [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False
        )
    # The kernel lets us go on a moment before the child's exec has closed its files.
    async with own_vm(str(tmp_path), 100, 5):
        assert child.poll() is None
    child.communicate(b"\n")
