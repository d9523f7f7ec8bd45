# SPDX-License-Identifier: Apache-2.0
"""The shim in real Bacula daemons, 15.0.3 and 9.6.7, against a scripted backend.

9.6.7 comes from packages unpacked below ``.build/prefix/bacula-9.6.7`` (``./dev`` does
that) or below ``$BACULA_96_PREFIX``.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.lab.bacula import BaculaLab

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240)]

ROOT = Path(__file__).parents[2]
BACKEND = ROOT / "tests/support/ptcomm_backend.py"
DISK = "/@proxmox/100-abc/{job}/scsi0.qcow2"
TEMPLATE = (
    'OptPrompt="Target VM"\nrestore_vmid=@INT32@\n\nOptPrompt="Start"\nstart=@BOOL@\n'
)
ENTRIES: list[dict[str, Any]] = [
    {"object": "chain", "size": 999},
    {"object": "large", "text": "extent map " * 100_000},
    {"config": "options", "text": TEMPLATE},
    {
        "file": DISK,
        "size": 5_000_000,
        "runs": [
            [0, 131072],
            [131072, 70000],
            [1000000, 1500000],
            [900000, 512],
            [4999999, 1],
        ],
        "offsets": True,
        "frame": 100_000,
    },
    {"file": "/@proxmox/100-abc/{job}/vm.conf", "size": 3000, "runs": [[0, 3000]]},
    {"file": "/@proxmox/100-abc/{job}/empty", "size": 0},
]


def bacula_96() -> Path | None:
    for path in (
        os.environ.get("BACULA_96_PREFIX"),
        ROOT / ".build/prefix/bacula-9.6.7",
    ):
        if path and (Path(path) / "usr/sbin/bacula-fd").exists():
            return Path(path)
    return None


@dataclass
class Site:
    bacula: BaculaLab
    base: Path
    version: str

    def scenario(self, name: str, **values: Any) -> str:
        path = self.base / f"{name}.json"
        record = self.base / f"record-{name}"
        values = {"record": str(record), "entries": ENTRIES, **values}
        path.write_text(json.dumps(values))
        return f"podheitor-proxmox: scenario={path}"

    def job(
        self, name: str, *, accurate: bool = False, options: str = "", **values: Any
    ) -> None:
        plugin = self.scenario(name, **values)
        self.bacula.add_job(
            name, plugin, accurate=accurate, options=options or "signature = MD5"
        )

    def log(self, name: str, event: str) -> list[dict[str, Any]]:
        path = self.base / f"record-{name}/log.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in map(json.loads, lines) if line["event"] == event]

    def wait_log(self, name: str, event: str) -> list[dict[str, Any]]:
        until = time.monotonic() + 60  # a restore begins late on a busy machine
        while not (found := self.log(name, event)):
            assert time.monotonic() < until, f"no {event!r} of {name}"
            time.sleep(0.05)
        return found

    def compare(self, name: str, where: str, *others: str) -> int:
        """Restored files equal the sent ones, byte by byte; returns how many.

        Args:
            name: who received them.
            others: who else had sent some of them.
        """
        sent = [self.base / f"record-{n}/sent" for n in (name, *others)]
        received = self.base / f"record-{name}/received" / where.strip("/")
        count = 0
        for path in (
            p for p in received.rglob("*") if p.is_file() and p.stat().st_size
        ):
            (same,) = [
                found
                for folder in sent
                if (found := folder / path.relative_to(received)).exists()
            ]
            assert path.read_bytes() == same.read_bytes(), path
            count += 1
        return count

    def cleaned(self, job: str) -> bool:
        """Was ``--cleanup`` started for this job, detached from bacula-fd?"""
        path = self.base / "cleanups"
        until = time.monotonic() + 15
        while time.monotonic() < until:
            for line in path.read_text().splitlines() if path.exists() else []:
                name, session, _pid = line.split()
                if name == job:
                    assert session != f"session={os.getsid(self.bacula.pid('fd'))}"
                    return True
            time.sleep(0.1)
        return False

    def children(self) -> list[int]:
        """What bacula-fd has as children, zombies too."""
        pid = self.bacula.pid("fd")
        found: list[int] = []
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (task / "children").read_text().split())
        return found


@pytest.fixture(scope="module", params=["15.0.3", "9.6.7"])
def site(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    prefix = None
    if request.param == "9.6.7":
        prefix = bacula_96()
        if prefix is None:
            pytest.skip("Bacula 9.6.7 is not unpacked: ./dev test does that")
    elif not Path("/usr/sbin/bacula-fd").exists():
        pytest.skip("bacula-fd is not installed")
    base = tmp_path_factory.mktemp(f"bacula-{request.param}")
    plugins = base / "plugins"
    plugins.mkdir()
    subprocess.run(
        ["make", "-s", "-C", ROOT / "bacula_shim", f"BUILD={base}/build"], check=True
    )
    shutil.copy(base / "build/podheitor-proxmox-fd.so", plugins)
    env = {
        "PODHEITOR_PROXMOX_BACKEND": str(BACKEND),
        "PTCOMM_BACKEND_CLEANUPS": str(base / "cleanups"),
    }
    with BaculaLab(base / "lab", prefix=prefix, plugin_dir=plugins, env=env) as bacula:
        yield Site(bacula, base, request.param)


@pytest.fixture(autouse=True)
def file_daemon_survives(site: Site) -> Iterator[None]:
    before = site.bacula.pid("fd")
    yield
    assert site.bacula.alive("fd")
    assert site.bacula.pid("fd") == before
    # A console's estimate answers before the daemon has let its plugins go.
    until = time.monotonic() + 15
    while (left := site.children()) and time.monotonic() < until:
        time.sleep(0.1)
    for pid in left:  # so that the next test isn't blamed
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert left == []


def test_daemon_lists_the_plugin(site: Site) -> None:
    said = site.bacula.console("status client=lab-fd")
    assert site.version in said
    assert "podheitor-proxmox" in said


def test_full_and_incremental_come_back(site: Site) -> None:
    site.job("chain")
    full = site.bacula.run_job("chain")
    assert full.ok, full.text
    assert full.files == len(ENTRIES)
    incremental = site.bacula.run_job("chain", "Incremental")
    assert (incremental.ok, incremental.level) == (True, "I"), incremental.text
    jobs = [e["values"] for e in site.log("chain", "job")]
    assert jobs[1]["PrevJobName"] == full.name
    assert [j["Level"] for j in jobs] == ["F", "I"]
    assert "Since" not in jobs[0]
    assert abs(int(jobs[1]["Since"]) - time.time()) < 300
    assert len(site.log("chain", "goodbye")) == 2

    restored = site.bacula.restore(where="/back", job="chain")
    assert restored.ok, restored.text
    assert site.compare("chain", "/back") == 4
    objects = [
        (e["name"], e["job_id"], e["sha"]) for e in site.log("chain", "restore object")
    ]
    sent = [(e["name"], e["sha"]) for e in site.log("chain", "object")]
    # They come by their index within a job first, then by job.
    job_ids = [full.job_id] * 2 + [incremental.job_id] * 2
    assert sorted(objects) == sorted(
        (name, job_id, sha) for (name, sha), job_id in zip(sent, job_ids, strict=True)
    )
    assert len(site.log("chain", "finished")) == 1
    values = site.log("chain", "job")[2]["values"]
    assert (values["Type"], values["Where"], values["Replace"]) == ("R", "/back", "a")


def test_one_job_of_a_chain_comes_back(site: Site) -> None:
    site.job("single")
    site.bacula.run_job("single")
    second = site.bacula.run_job("single", "Incremental")
    restored = site.bacula.restore(where="/back", job_ids=[second.job_id])
    assert restored.ok, restored.text
    assert {e["job_id"] for e in site.log("single", "restore object")} == {
        second.job_id
    }
    assert site.compare("single", "/back") == 2


@pytest.mark.parametrize(
    "options", ["signature = SHA1\ncompression = GZIP6", "compression = LZO"]
)
def test_compressed_files_come_back(site: Site, options: str) -> None:
    name = options.split()[-1]
    site.job(name, options=options)
    assert site.bacula.run_job(name).ok
    assert site.bacula.restore(where="/back", job=name).ok
    assert site.compare(name, "/back") == 2


def test_accurate_mode_keeps_the_chain(site: Site) -> None:
    site.job("accurate", accurate=True)
    assert site.bacula.run_job("accurate").ok
    assert site.bacula.run_job("accurate", "Incremental").ok
    assert site.bacula.run_job("accurate", "Incremental").ok
    assert [e["values"]["Accurate"] for e in site.log("accurate", "job")] == [
        "0",
        "1",
        "1",
    ]
    restored = site.bacula.restore(where="/back", job="accurate")
    assert restored.ok, restored.text
    assert site.compare("accurate", "/back") == 6


def test_estimate_lists_files(site: Site) -> None:
    site.job("estimate")
    said = site.bacula.estimate("estimate")
    assert "/scsi0.qcow2" in said
    assert "files=3 bytes=5,003,000" in said
    assert site.log("estimate", "job")[0]["values"]["Type"] == "E"
    assert len(site.wait_log("estimate", "goodbye")) == 1


def test_console_options_reach_the_backend(site: Site) -> None:
    site.job("options")
    assert site.bacula.run_job("options").ok
    restored = site.bacula.restore(
        where="/back",
        job="options",
        plugin_options={"restore_vmid": "1200", "start": "yes"},
    )
    assert restored.ok, restored.text
    (options,) = (e for e in site.log("options", "restore object") if e["type"] == 28)
    assert options["name"] == "RestoreOptions"
    assert "restore_vmid=1200\n" in options["text"]
    assert "start=yes\n" in options["text"]


@pytest.mark.parametrize(
    ("name", "faults", "text"),
    [
        ("crash", {"run2": "kill"}, "killed by signal 9"),
        ("early", {"params": "exit:1"}, "exit status 1"),
        ("abort", {"run2": "die:Acannot read scsi0"}, "cannot read scsi0"),
        ("garbage", {"run2": "raw:rubbish everywhere"}, "not a packet header"),
        ("refuse", {"status": "say:Athe segment is lost"}, "the segment is lost"),
        ("vanish", {"end": "exit:0"}, "without a goodbye"),
        ("unsure", {"status": "kill"}, "closing its books"),
    ],
)
def test_failing_backend_fails_the_job(
    site: Site, name: str, faults: dict[str, str], text: str
) -> None:
    site.job(name, faults=faults)
    result = site.bacula.run_job(name)
    assert result.status == "f", result.text
    assert text in result.text
    assert site.cleaned(result.name)


def test_error_that_is_not_fatal_is_a_warning_at_the_end(site: Site) -> None:
    site.job("shaky", faults={"run2": "say:Qone tick was late, 100%s"})
    result = site.bacula.run_job("shaky")
    assert result.status == "T"
    assert "warnings" in result.termination
    assert "one tick was late, 100%s" in result.text


@pytest.mark.parametrize(
    ("name", "faults"),
    [
        ("rcrash", {"received": "kill"}),
        ("rabort", {"file end": "die:Astorage is full"}),
        ("rfinish", {"finish": "die:Acannot create the VM"}),
        ("robjects", {"objects": "die:Amember X is missing"}),
    ],
)
def test_failing_backend_fails_the_restore(
    site: Site, name: str, faults: dict[str, str], tmp_path: Path
) -> None:
    site.job(name, faults=faults)
    assert site.bacula.run_job(name).ok
    restored = site.bacula.restore(where=str(tmp_path), job=name)
    assert not restored.ok, restored.text
    assert restored.status in "fE"
    assert list(tmp_path.iterdir()) == []  # nothing written by the core instead
    assert site.log(name, "finished") == []
    assert site.cleaned(restored.name)


def test_cancel_ends_a_hanging_backup(site: Site) -> None:
    site.job("stuck", faults={"run2": "hang"})
    job_id = site.bacula.start_job("stuck")
    site.wait_log("stuck", "fault")
    began = time.monotonic()
    site.bacula.cancel(job_id)
    result = site.bacula.wait(job_id, 30)
    assert result.status == "A", result.text
    assert time.monotonic() - began < 15
    assert [e["name"] for e in site.log("stuck", "signal")] == ["SIGUSR1"]
    assert site.cleaned(result.name)


def test_cancel_ends_a_hanging_restore(site: Site) -> None:
    site.job("rstuck", faults={"file": "hang"})
    assert site.bacula.run_job("rstuck").ok
    job_id = site.bacula.start_restore(where="/back", job="rstuck")
    site.wait_log("rstuck", "fault")
    site.bacula.cancel(job_id)
    assert site.bacula.wait(job_id, 30).status == "A"
    assert site.log("rstuck", "finished") == []


def test_jobs_run_in_parallel(site: Site) -> None:
    slow = {"run2": "sleep:6"}
    site.job("left", faults=slow)
    site.job("right", faults=slow)
    ids = [site.bacula.start_job(name) for name in ("left", "right")]
    site.wait_log("left", "fault")
    site.wait_log("right", "fault")
    assert [site.bacula.status(job_id) for job_id in ids] == ["R", "R"]
    assert all(site.bacula.wait(job_id).ok for job_id in ids)
    for name in ("left", "right"):
        for process in site.log(name, "process"):
            assert process["descriptors"] == [0, 1, 2, 3]
    ids = [
        site.bacula.start_restore(where="/b", job=name) for name in ("left", "right")
    ]
    assert all(site.bacula.wait(job_id).ok for job_id in ids)
    assert site.compare("left", "/b") == site.compare("right", "/b") == 2


def test_two_commands_in_one_job(site: Site) -> None:
    other = [
        {**entry, "file": f"{entry['file']}.2"} for entry in ENTRIES if "file" in entry
    ]
    plugins = [site.scenario("first"), site.scenario("second", entries=other)]
    site.bacula.add_job("both", plugins)
    assert site.bacula.run_job("both").ok
    restored = site.bacula.restore(where="/back", job="both")
    assert restored.ok, restored.text
    # Both have sent; one session takes everything back.
    back = [site.compare("first", "/back", "second")]
    back.append(site.compare("second", "/back", "first"))
    assert sorted(back) == [0, 4]
    site.bacula.add_job("twice", [plugins[0], plugins[0]])
    result = site.bacula.run_job("twice")
    assert result.status == "f"
    assert "stands twice" in result.text


def test_core_writes_files_and_skips_others(site: Site, tmp_path: Path) -> None:
    site.job("files", answers={"scsi0": "CORE", "vm.conf": "CORE", "empty": "SKIP"})
    backup = site.bacula.run_job("files")
    restored = site.bacula.restore(where=str(tmp_path), job="files")
    assert restored.status == "T", restored.text
    sent = site.base / "record-files/sent"
    for path in (p for p in sent.rglob("*") if p.is_file()):
        written = tmp_path / path.relative_to(sent)
        assert written.read_bytes() == path.read_bytes()
        assert written.stat().st_mode & 0o777 == 0o640
        assert written.stat().st_mtime == 1_700_000_001
    assert not (tmp_path / f"@proxmox/100-abc/{backup.name}/empty").exists()
    assert site.log("files", "data") == []


def test_storage_daemon_dying_fails_the_job(site: Site) -> None:
    site.job("nosd", faults={"run1": "sleep:3"})
    job_id = site.bacula.start_job("nosd")
    site.wait_log("nosd", "fault")
    site.bacula.kill("sd")
    assert site.cleaned(site.bacula.result(job_id).name)
    site.bacula.start_daemon("sd")
    # The director would wait for its storage daemon for minutes.
    site.bacula.cancel(job_id)
    assert site.bacula.wait(job_id, 60).status in "AfE"
    assert site.log("nosd", "goodbye") == []
