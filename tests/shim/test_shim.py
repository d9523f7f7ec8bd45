# SPDX-License-Identifier: Apache-2.0
"""The shim under ASan and UBSan in a fake bacula-fd, against a scripted backend."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
SHIM = HERE.parent.parent / "bacula_shim"
BACKEND = HERE.parent / "support/ptcomm_backend.py"
INTERFACES = [14, 21, 23]
NAME = "/@proxmox/100-abc/{job}/scsi0.qcow2"
ENTRIES: list[dict[str, Any]] = [
    {"object": "chain", "size": 70000},
    {"config": "options", "text": 'OptPrompt="VM"\nrestore_vmid=@INT32@\n'},
    {
        "file": NAME,
        "size": 3_000_001,
        "runs": [
            [0, 65536],
            [65536, 300000],
            [1000000, 97],
            [2000000, 500000],
            [500000, 4096],
            [3000000, 1],
        ],
        "offsets": True,
        "frame": 50_000,
    },
    {"file": "/@proxmox/100-abc/{job}/vm.conf", "size": 70_000, "runs": [[0, 70_000]]},
    {"file": "/@proxmox/100-abc/{job}/empty", "size": 0},
]


def in_turn(
    *cases: tuple[dict[str, str], str],
) -> list[tuple[int, dict[str, str], str]]:
    """Each case with one interface: what differs between them has its own tests."""
    return [(INTERFACES[n % 3], *case) for n, case in enumerate(cases)]


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("shim")
    done = subprocess.run(
        ["make", "-C", SHIM, "asan", f"BUILD={directory}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return directory / "asan"


@dataclass
class Host:
    build: Path
    base: Path

    def scenario(self, name: str = "s", **values: Any) -> str:
        path = self.base / f"{name}.json"
        values = {"record": str(self.base / "record"), "entries": ENTRIES, **values}
        path.write_text(json.dumps(values))
        return f"podheitor-proxmox: scenario={path}"

    def run(
        self,
        interface: int,
        stages: str,
        *commands: str,
        jobs: int = 1,
        backend: Path = BACKEND,
        **env: str,
    ) -> str:
        done = subprocess.run(
            [
                self.build / "fake_host",
                self.build / "podheitor-proxmox-fd.so",
                str(interface),
                stages,
                str(jobs),
                *commands,
            ],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=60,
            check=False,
            env={
                **os.environ,
                "ASAN_OPTIONS": "detect_leaks=1:abort_on_error=0:exitcode=99",
                "UBSAN_OPTIONS": "print_stacktrace=1",
                "PODHEITOR_PROXMOX_BACKEND": str(backend),
                "PTCOMM_BACKEND_CLEANUPS": str(self.base / "cleanups"),
                **env,
            },
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stderr == "", done.stderr
        assert "left files=0 children=0" in done.stdout
        for word in ("BAD", "UNKNOWN", "RAW", "LEFT"):
            assert word not in done.stdout, done.stdout
        return done.stdout

    def log(self, event: str) -> list[dict[str, Any]]:
        path = self.base / "record/log.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in map(json.loads, lines) if line["event"] == event]

    def cleanups(self, expected: int) -> list[str]:
        """Names of the jobs cleaned up after; the processes are detached."""
        path = self.base / "cleanups"
        until = time.monotonic() + (10 if expected else 0.3)
        lines: list[str] = []
        while time.monotonic() < until and (len(lines) < expected or not expected):
            lines = path.read_text().splitlines() if path.exists() else []
            time.sleep(0.05)
        return [line.split()[0] for line in lines]

    def compare(self) -> int:
        """Restored files equal the sent ones, byte by byte; returns how many."""
        sent = self.base / "record/sent"
        count = 0
        for path in (p for p in sent.rglob("*") if p.is_file()):
            other = self.base / "record/received/where" / path.relative_to(sent)
            assert path.read_bytes() == other.read_bytes(), path
            count += 1
        return count


@pytest.fixture
def host(build: Path, tmp_path: Path) -> Host:
    return Host(build, tmp_path)


@pytest.mark.parametrize("interface", INTERFACES)
def test_what_was_backed_up_comes_back(host: Host, interface: int) -> None:
    said = host.run(interface, "console,backup,restore,estimate", host.scenario())
    assert f"interface={interface} license=AGPLv3" in said
    assert "info size=56" in said
    assert said.count("end status=T") == 2
    assert "FATAL" not in said
    assert "check_file ours=5 other=0" in said
    assert "needless=0" in said
    assert f"flags={1 << 30:x} no_read=0" in said
    assert "empty size=0 flags=0 no_read=1" in said
    assert host.compare() == 2
    (sent,) = (e for e in host.log("object") if e["job"].startswith("fakeb"))
    (received,) = host.log("restore object")
    assert (received["sha"], received["job_id"]) == (sent["sha"], 42)
    values = [line["values"] for line in host.log("job")]
    assert [v["Type"] for v in values] == ["B", "R", "E"]
    assert values[0]["Since"] == "5000000000"
    assert values[0]["PrevJobName"] == "before.2026-01-01_00.00.00_01"
    assert (values[0]["Level"], values[0]["BaculaVersion"]) == ("I", str(interface))
    assert (values[1]["Where"], values[1]["Replace"]) == ("/where", "a")
    assert [e["status"] for e in host.log("status")] == ["T"]
    assert len(host.log("goodbye")) == 3
    assert host.cleanups(0) == []


@pytest.mark.parametrize("interface", [0, 13, 15, 20, 22, 24])
def test_unknown_interfaces_are_refused(build: Path, interface: int) -> None:
    done = subprocess.run(
        [
            build / "fake_host",
            build / "podheitor-proxmox-fd.so",
            str(interface),
            "backup",
            "1",
            "x",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "load rc=2\n"


def test_backend_gets_a_process_of_its_own(host: Host) -> None:
    # Python ignores SIGPIPE itself: look before it starts.
    wrapper = host.base / "backend"
    ignored = host.base / "ignored"
    wrapper.write_text(
        f"#!/bin/sh\ngrep Sig /proc/self/status > {ignored}\nexec {BACKEND}\n"
    )
    wrapper.chmod(0o755)
    host.run(23, "backup", host.scenario(), backend=wrapper)
    (process,) = host.log("process")
    assert process["group"] == process["pid"]
    # 3 is the directory being listed; nothing of the daemon's is there
    assert process["descriptors"] == [0, 1, 2, 3]
    signals = dict(line.split() for line in ignored.read_text().splitlines())
    assert int(signals["SigIgn:"], 16) == 0
    assert int(signals["SigBlk:"], 16) == 0


@pytest.mark.parametrize(
    ("interface", "faults", "text"),
    in_turn(
        ({"params": "exit:3"}, "ended without a goodbye (exit status 3)"),
        ({"params": "die:AVM 100 is not on this node"}, "VM 100 is not on this node"),
        ({"start": "kill"}, "(killed by signal 9)"),
        ({"entries": "raw:Hello, world"}, "not a packet header"),
        ({"entries": "raw:Z000001\\nx"}, "unknown packet letter Z"),
        ({"entries": "raw:C999999\\n"}, "command of 999999 bytes"),
        ({"entries": "raw:F000001\\nx"}, "F packet with 1 bytes"),
        ({"entries": "raw:D000001\\nx"}, "data without a file"),
        ({"entries": "raw:T000000\\n"}, "hung up"),
        ({"entries": "raw:C000004\\nabc\\n"}, 'unknown command "abc"'),
        ({"entries": "raw:C000004\\na\\0c\\n"}, "NUL byte"),
        ({"entries": "raw:C000008\\nFNAME:x\\n"}, "is not absolute"),
        ({"entries": "raw:C000008\\nFNAME:/\\nF000000\\n"}, "no STAT"),
        ({"run1": "exit:1"}, "sending a file's data"),
        ({"run1": "kill"}, "killed by signal 9"),
        ({"run1": "die:Acannot read scsi0"}, "cannot read scsi0"),
        ({"run1": "die:Ecannot read scsi0"}, "gave up after the error above"),
        ({"run1": "raw:C000010\\nOFFSET:-1\\n"}, "expected data of"),
        ({"run1": "raw:C000028\\nOFFSET:9999999999999999999\\n"}, "expected data of"),
        ({"end": "exit:0"}, "ended without a goodbye (exit status 0)"),
        ({"status": "say:Athe segment is lost"}, "the segment is lost"),
        ({"status": "kill"}, "closing its books"),
    ),
)
def test_failure_is_fatal_and_cleaned_up_after(
    host: Host, interface: int, faults: dict[str, str], text: str
) -> None:
    said = host.run(interface, "backup", host.scenario(faults=faults))
    assert "end status=f" in said
    assert re.search(rf"message FATAL .*{re.escape(text)}", said), said
    assert host.log("goodbye") == []
    assert host.cleanups(1) == ["fakeb.2026-11-23_00.00.00_01"]


@pytest.mark.parametrize(
    ("interface", "faults", "text"),
    in_turn(
        ({"objects": "die:Achain has no member X"}, "chain has no member X"),
        ({"objects": "kill"}, "killed by signal 9"),
        ({"file": "kill"}, "killed by signal 9"),
        ({"file": "die:Edisk full"}, "gave up after the error above"),
        ({"file": "raw:C000006\\nMAYBE\\n"}, "expected OK, SKIP or CORE"),
        ({"received": "kill"}, "killed by signal 9"),
        ({"received": "die:Astorage is full"}, "storage is full"),
        ({"received": "raw:C000003\\nOK\\n"}, "protocol error"),
        ({"file end": "die:Awrite failed"}, "write failed"),
        ({"finish": "die:Acannot create the VM"}, "cannot create the VM"),
    ),
)
def test_failed_restore_is_fatal(
    host: Host, interface: int, faults: dict[str, str], text: str
) -> None:
    # The faults' points are those of a restore: the backup before it is undisturbed.
    said = host.run(interface, "backup,restore", host.scenario(faults=faults))
    assert said.count("end status=T") == 1
    assert re.search(rf"stage=r message FATAL .*{re.escape(text)}", said), said
    assert host.log("finished") == []
    assert host.cleanups(1) == ["faker.2026-11-23_00.00.00_01"]


@pytest.mark.parametrize("interface", [14, 23])
@pytest.mark.parametrize("point", ["params", "start", "entries", "run0", "run3", "end"])
def test_cancel_wakes_a_hanging_backup(host: Host, interface: int, point: str) -> None:
    began = time.monotonic()
    command = host.scenario(faults={point: "hang"})
    said = host.run(interface, "backup", command, FAKE_CANCEL_MS="600")
    assert "end status=A" in said
    assert "FATAL" not in said
    assert time.monotonic() - began < 8
    assert host.cleanups(1) == ["fakeb.2026-11-23_00.00.00_01"]


def test_a_deaf_backend_is_killed(host: Host) -> None:
    command = host.scenario(faults={"run0": "deaf"})
    said = host.run(23, "backup", command, FAKE_CANCEL_MS="600")
    assert "end status=A" in said
    assert host.cleanups(1) == ["fakeb.2026-11-23_00.00.00_01"]


@pytest.mark.parametrize("point", ["objects", "file", "received", "file end"])
def test_cancel_wakes_a_hanging_restore(host: Host, point: str) -> None:
    entries = [{"file": NAME, "size": 1 << 23, "runs": [[0, 1 << 23]]}]
    command = host.scenario(entries=entries, faults={point: "hang"})
    began = time.monotonic()
    # Time enough for the backup before it, on a busy machine and with its sanitizers.
    said = host.run(23, "backup,restore", command, FAKE_CANCEL_MS="3000")
    assert "stage=r end status=A" in said
    assert time.monotonic() - began < 8
    assert host.cleanups(1) == ["faker.2026-11-23_00.00.00_01"]


def test_silence_is_bounded(host: Host) -> None:
    command = host.scenario(faults={"run1": "hang"})
    said = host.run(23, "backup", command, PODHEITOR_PROXMOX_TIMEOUT="1")
    assert "silent for too long (1 s)" in said
    assert "end status=f" in said


def test_the_answer_to_the_status_is_bounded(host: Host) -> None:
    command = host.scenario(faults={"status": "hang"})
    said = host.run(23, "backup", command, PODHEITOR_PROXMOX_STATUS_TIMEOUT="1")
    assert "silent for too long (1 s) while closing its books" in said
    assert "end status=f" in said


@pytest.mark.parametrize("status", ["f", "E", "A"])
def test_backend_hears_of_a_failed_job(host: Host, status: str) -> None:
    said = host.run(23, "backup", host.scenario(), FAKE_STATUS=status)
    assert f"end status={status}" in said
    assert [e["status"] for e in host.log("status")] == [status]
    assert host.log("goodbye") == []
    assert host.cleanups(1) == ["fakeb.2026-11-23_00.00.00_01"]


def test_messages_come_through_whole_and_unformatted(host: Host) -> None:
    faults = {
        "start": "say:Wwith 100%s and %n",
        "run0": "flood:2000",
        "run1": "long:5000",
        "status": "say:Qnot so bad",
        "goodbye": "say:Ibye",
    }
    said = host.run(23, "backup", host.scenario(faults=faults))
    assert "end status=T" in said
    assert re.search(r"message WARNING .*with 100%s and %n", said)
    assert "message 1999 of a flood, 100%s %n" in said
    assert "message ERROR" in said
    lengths = [int(n) for n in re.findall(r"WARNING length=(\d+) (?:long )?ä", said)]
    assert len(lengths) == 3
    assert sum(lengths) == 5005 + 3
    assert "message INFO length=4 bye" in said


def test_a_backend_that_speaks_while_it_should_listen_is_heard(host: Host) -> None:
    # More than a pipe holds, while 8 MB wait: a shim that only writes locks up.
    entries = [{"file": NAME, "size": 1 << 23, "runs": [[0, 1 << 23]]}]
    command = host.scenario(entries=entries, faults={"received": "flood:200"})
    said = host.run(23, "backup,restore", command)
    assert said.count("end status=T") == 2
    assert said.count("message INFO") >= 200 * 128
    assert host.compare() == 1


@pytest.mark.parametrize("interface", INTERFACES)
def test_parallel_jobs_do_not_meet(host: Host, interface: int) -> None:
    said = host.run(
        interface, "console,backup,console,restore", host.scenario(), jobs=4
    )
    assert said.count("end status=T") == 8
    assert host.compare() == 8
    for process in host.log("process"):
        assert process["descriptors"] == [0, 1, 2, 3]
    if interface != 23:
        # one after the other: each "file" of a restore is between the same job's "job"s
        order = [e["job"] for e in host.log("file")]
        assert len({a for a, b in itertools.pairwise(order) if a != b}) == 3


def test_each_command_has_its_backend_and_all_one_restore(host: Host) -> None:
    other = [
        {"object": "o", "size": 10},
        {"file": "/@proxmox/2/x", "size": 9, "runs": [[0, 9]]},
    ]
    commands = [host.scenario("a"), host.scenario("b", entries=other)]
    said = host.run(23, "backup,restore", *commands, FAKE_OPTIONS="vmid=120\n")
    assert said.count("end status=T") == 2
    # A chain is one chain, also when the command was edited between its jobs.
    assert len({e["pid"] for e in host.log("job")}) == 3
    assert len(host.log("goodbye")) == 3
    objects = host.log("restore object")
    assert sorted(e["name"] for e in objects) == ["RestoreOptions", "chain", "o"]
    assert len({e["command"] for e in objects}) == 1
    assert host.compare() == 3


def test_refusal_of_one_command_fails_all(host: Host) -> None:
    commands = [host.scenario("a", faults={"params": "die:Ano"}), host.scenario("b")]
    said = host.run(23, "backup", *commands)
    assert "end status=f" in said
    assert len(host.log("job")) == 1  # the second was never started


def test_same_command_twice_is_fatal(host: Host) -> None:
    command = host.scenario()
    said = host.run(23, "backup", command, command)
    assert "the same Plugin line stands twice" in said
    assert "end status=f" in said
    assert host.log("job") == []


@pytest.mark.parametrize("stage", ["backup", "estimate"])
def test_under_a_sisters_name_nothing_is_backed_up(host: Host, stage: str) -> None:
    command = host.scenario().replace("podheitor-proxmox:", "podheitor-vsphere:")
    said = host.run(23, stage, command)
    assert 'no plug-in that backs up "podheitor-vsphere"' in said
    assert "FATAL" in said
    assert host.log("job") == []
    assert host.cleanups(0) == []


def test_copies_are_installed_only_where_no_sister_plugin_is(tmp_path: Path) -> None:
    place = tmp_path / "usr/lib/bacula"
    vsphere, hyperv = (
        place / f"podheitor-{name}-fd.so" for name in ("vsphere", "hyperv")
    )
    place.mkdir(parents=True)
    hyperv.write_bytes(b"\x7fELF of somebody else")

    def install() -> None:
        subprocess.run(
            [
                *("make", "-s", "-C", SHIM, "install", "install-sisters"),
                *(f"BUILD={tmp_path / 'build'}", f"DESTDIR={tmp_path}"),
            ],
            check=True,
        )

    install()
    ours = (place / "podheitor-proxmox-fd.so").read_bytes()
    assert vsphere.read_bytes() == ours
    assert hyperv.read_bytes() == b"\x7fELF of somebody else"
    # A copy of an older version of ours is ours to replace.
    vsphere.write_bytes(ours + b"older")
    install()
    assert vsphere.read_bytes() == ours


def test_skipped_and_core_files_get_no_data(host: Host) -> None:
    said = host.run(
        23, "backup,restore", host.scenario(answers={"scsi0": "CORE", "vm": "SKIP"})
    )
    assert "scsi0.qcow2 rc=0 status=5" in said
    assert "vm.conf rc=0 status=1" in said
    assert "empty rc=0 status=3" in said
    assert [e["name"][-5:] for e in host.log("data")] == ["empty"]
    assert said.count("end status=T") == 2


def test_offsets_need_to_be_announced(host: Host) -> None:
    entries = [{"file": NAME, "size": 100, "runs": [[0, 10], [50, 10]]}]
    faults = {"run0": "raw:C000010\\nOFFSET:50\\n"}
    said = host.run(23, "backup", host.scenario(entries=entries, faults=faults))
    assert "was not announced with offsets" in said


@pytest.mark.parametrize("packet", ["save", "io", "object", "restore"])
@pytest.mark.parametrize("interface", INTERFACES)
def test_unexpected_layout_is_fatal(host: Host, packet: str, interface: int) -> None:
    said = host.run(
        interface, "backup,restore", host.scenario(), FAKE_BAD_PACKET=packet
    )
    assert re.search(r"message FATAL .*unexpected layout of an? \w+", said)
    assert "end status=f" in said


def test_missing_backend_says_where_it_should_be(host: Host) -> None:
    said = host.run(23, "backup", host.scenario(), backend=Path("/nonexistent/backend"))
    assert "cannot start the backend /nonexistent/backend: No such file" in said
    assert "end status=f" in said
    assert "WARNING" not in said  # nothing ran, so nothing is cleaned up after


def test_nothing_to_back_up_is_a_warning(host: Host) -> None:
    said = host.run(23, "backup", host.scenario(entries=[]))
    assert "message WARNING" in said
    assert "had nothing to back up" in said
    assert "end status=T" in said


def test_options_lost_by_the_catalogue_are_refused(host: Host) -> None:
    # An environment variable cannot hold a NUL: the fake host stands for it with \x01.
    said = host.run(14, "backup,restore", host.scenario(), FAKE_OPTIONS="\x01broken")
    assert "came back unreadable" in said
    assert "stage=r end status=f" in said
