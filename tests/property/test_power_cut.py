# SPDX-License-Identifier: Apache-2.0
"""The journal when the power goes, at any byte, on a disk that promises the least.

What a journal does to the file system is recorded as it happens. Then, for every moment
in between, the disk is made as it may be found: of what happened to the names in a
directory since its last fsync any part may be missing, and a file that was not synced
may end at any byte, or hold garbage.
"""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pveplug.journal import (
    Entry,
    Journal,
    forget,
    open_journal,
    proven,
    read_entry,
    write_entry,
)


@dataclass(frozen=True)
class Op:
    """One thing that happened: to a name in a directory, or to a file's bytes."""

    kind: str
    path: str
    inode: int = 0
    data: bytes = b""
    old: str = ""


@dataclass
class Recorder:
    """Writes down what happens to the names and files below ``root``."""

    root: Path
    ops: list[Op] = field(default_factory=list)
    files: dict[str, tuple[int, bytes]] = field(default_factory=dict)
    _inodes: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def observe(self) -> None:
        """Notice what was created or written since the last time."""
        for path in sorted(p for p in self.root.rglob("*") if p.is_file()):
            name, data = str(path), path.read_bytes()
            inode, before = self.files.get(name, (0, None))
            if not inode:
                inode = next(self._inodes)
                self.ops.append(Op("create", name, inode))
            if data != before:
                self.ops.append(Op("write", name, inode, data))
            self.files[name] = (inode, data)

    def install(self, patch: pytest.MonkeyPatch) -> None:
        fsync, replace, unlink, mkdir = os.fsync, os.replace, os.unlink, os.mkdir

        def recorded_fsync(fd: int) -> None:
            self.observe()
            fsync(fd)
            name = os.readlink(f"/proc/self/fd/{fd}")
            inode = self.files.get(name, (0, b""))[0]
            self.ops.append(Op("fsync", name, inode))

        def recorded_replace(old: Any, new: Any) -> None:
            self.observe()
            replace(old, new)
            self.files[str(new)] = self.files.pop(str(old))
            inode = self.files[str(new)][0]
            self.ops.append(Op("rename", str(new), inode, old=str(old)))

        def recorded_unlink(path: Any, *rest: Any, **more: Any) -> None:
            self.observe()
            unlink(path, *rest, **more)
            if self.files.pop(str(path), None):
                self.ops.append(Op("unlink", str(path)))

        def recorded_mkdir(path: Any, *rest: Any, **more: Any) -> None:
            mkdir(path, *rest, **more)
            self.ops.append(Op("mkdir", str(path)))

        patch.setattr(os, "fsync", recorded_fsync)
        patch.setattr(os, "replace", recorded_replace)
        patch.setattr(os, "unlink", recorded_unlink)
        patch.setattr(os, "mkdir", recorded_mkdir)


@dataclass
class Disk:
    """What is on the disk for certain, and what may be."""

    root: Path
    pending: list[Op] = field(default_factory=list)
    names: dict[str, int] = field(default_factory=dict)
    directories: set[str] = field(default_factory=set)
    bytes_of: dict[int, tuple[bytes, bool]] = field(default_factory=dict)
    """inode -> content, and whether it is synced."""

    def happen(self, op: Op) -> None:
        match op.kind:
            case "write":
                self.bytes_of[op.inode] = (op.data, False)
            case "fsync" if op.inode:
                self.bytes_of[op.inode] = (self.bytes_of[op.inode][0], True)
            case "fsync":
                sure = [p for p in self.pending if os.path.dirname(p.path) == op.path]
                self.pending = [p for p in self.pending if p not in sure]
                _apply(sure, self.names, self.directories)
            case _:
                self.pending.append(op)

    def found(self, broken: st.DataObject | None) -> Iterator[dict[str, bytes]]:
        """Yield what may be found after a cut now: path -> content."""
        for count in range(len(self.pending) + 1):
            for kept in itertools.combinations(self.pending, count):
                names, directories = dict(self.names), set(self.directories)
                _apply(kept, names, directories)
                yield {
                    path: self._content(inode, broken)
                    for path, inode in names.items()
                    if all(
                        str(above) in directories
                        for above in Path(path).parents
                        if above.is_relative_to(self.root)
                    )
                }

    def _content(self, inode: int, broken: st.DataObject | None) -> bytes:
        data, synced = self.bytes_of.get(inode, (b"", False))
        if synced or broken is None:
            return data if synced else b""
        cut = len(data) * broken.draw(st.integers(0, 999)) // 999
        garbage = broken.draw(st.sampled_from(("nothing", "zeros", "other")))
        tail = {"zeros": b"\0" * (len(data) - cut), "other": b"\xff{"}
        return data[:cut] + tail.get(garbage, b"")


def _apply(ops: Any, names: dict[str, int], directories: set[str]) -> None:
    for op in ops:
        match op.kind:
            case "mkdir":
                directories.add(op.path)
            case "unlink":
                names.pop(op.path, None)
            case "rename":
                names.pop(op.old, None)
                names[op.path] = op.inode
            case "create":
                names[op.path] = op.inode


class Story:
    """A sequence of what jobs do to one VM's journal, recorded."""

    def __init__(self, base: Path, patch: pytest.MonkeyPatch) -> None:
        self.base = base
        self.state = str(base / "lib")
        self.recorder = Recorder(base)
        self.recorder.install(patch)
        self.journal: Journal | None = None
        self.locked = False
        self.ends: list[tuple[int, Entry | None, bool]] = [(0, None, False)]
        """After each: how many operations, what the journal says, whether locked."""

    def do(self, action: str) -> None:
        if action == "open" or self.journal is None:
            job = f"job{len(self.ends)}"
            self.journal = open_journal(self.state, 100, job, "backup")
            self.locked = False
        else:
            getattr(self, f"_{action}")(self.journal)
        self.recorder.observe()
        entry = read_entry(self.state, 100)
        self.ends.append((len(self.recorder.ops), entry, self.locked))

    def _note(self, journal: Journal) -> None:
        journal.note(touched=True, nbd_socket="/run/100.nbd" + "x" * len(self.ends))

    def _undone(self, journal: Journal) -> None:
        journal.undone(touched=False)

    def _add(self, journal: Journal) -> None:
        journal.add("files", f"/scratch/ph-100-scsi{len(self.ends)}.qcow2")

    def _drop(self, journal: Journal) -> None:
        for path in journal.entry.files[:1]:
            journal.drop("files", path)

    def _ask(self, journal: Journal) -> None:
        journal.note(asking=True)

    def _lock(self, journal: Journal) -> None:
        """``qm set --lock`` went through: the proof is made, and not synced."""
        if journal.entry.asking:
            self.locked = True
            journal.proof.touch()

    def _know(self, journal: Journal) -> None:
        journal.entry.locked = self.locked
        journal.undone(asking=False)

    def _freeze(self, journal: Journal) -> None:
        journal.note(frozen=True)

    def _unlock(self, journal: Journal) -> None:
        self.locked = False
        journal.undone(locked=False)

    def _close(self, journal: Journal) -> None:
        journal.close()
        self.journal = None

    def _forget(self, journal: Journal) -> None:
        self.locked = False
        forget(self.state, 100)
        self.journal = None

    def _left(self, journal: Journal) -> None:
        write_entry(self.state, Entry(100, "left", "backup", frozen=True))


ACTIONS = sorted(name[1:] for name in vars(Story) if name[0] == "_" and name[1] != "_")


def told(story: Story, broken: st.DataObject | None) -> int:
    """Assert what holds after a cut at any moment; return how many were looked at."""
    disk = Disk(story.base, directories={str(story.base)})
    looked, seen = 0, set()
    ends = iter(story.ends)
    _, before, locked_before = next(ends)
    end, after, locked = next(ends)
    for done in range(len(story.recorder.ops) + 1):
        if done:
            disk.happen(story.recorder.ops[done - 1])
        while done > end:
            before, locked_before = after, locked
            end, after, locked = next(ends)
        if done == end:
            allowed = [after]  # what has returned is on the disk
        else:
            allowed = [before, after]
        for files in disk.found(broken):
            looked += 1
            state_of_disk = (*sorted(files.items()), end, done == end)
            if state_of_disk in seen:
                continue
            seen.add(state_of_disk)
            with tempfile.TemporaryDirectory() as empty:
                for path, data in files.items():
                    there = Path(empty) / Path(path).relative_to(story.base)
                    there.parent.mkdir(parents=True, exist_ok=True)
                    there.write_bytes(data)
                state = f"{empty}/lib"
                entry = read_entry(state, 100)
                assert entry in allowed, (done, story.recorder.ops[:done], entry)
                if entry and (entry.locked or (entry.asking and proven(state, 100))):
                    assert locked or locked_before, "a lock that isn't ours is claimed"
    return looked


@pytest.fixture
def base() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp())
    yield path
    shutil.rmtree(path)


A_BACKUP = ["open", "ask", "lock", "know", "note", "add", "add", "freeze", "undone"]
A_BACKUP += ["drop", "unlock", "close", "open", "note", "forget", "open", "left"]


def test_after_any_cut_the_journal_is_the_old_or_the_new_one(base: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        story = Story(base, patch)
        for action in A_BACKUP:
            story.do(action)
    assert told(story, None) > 200


@settings(deadline=None, max_examples=20)
@given(st.lists(st.sampled_from(ACTIONS), max_size=10), st.data())
def test_whatever_jobs_did_before_it(actions: list[str], data: st.DataObject) -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        story = Story(Path(folder), patch)
        for action in ["open", *actions]:
            story.do(action)
        patch.undo()
        told(story, data)
