# SPDX-License-Identifier: Apache-2.0
"""The console adapter against a program that plays bconsole."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable
from pathlib import Path

import pytest

from pveplug.bconsole import Console
from pveplug.errors import ConfigError, RequestError, TransportError
from pveplug.proto.bconsole import BaculaJob, Progress, RestoreOrder
from tests.support.scripted_bconsole import pids, program, said

pytestmark = pytest.mark.asyncio

VM = "/@proxmox/100-1a2b3c4d"
ORDER = RestoreOrder(
    (1, 2), ((f"{VM}/n.1", ("vm.conf",)),), "/@pve/mode=instant", "fd", "node", "back"
)
SELECTED = (
    "You have selected the following JobIds: 1,2\n\n"
    "cwd is: /\n"
    f"$ cd {VM}/n.1/\ncwd is: {VM}/n.1/\n"
    "$ mark vm.conf\n1 file marked.\n$ done\n"
    "1 file selected to be restored.\n"
)
PREVIEW = (
    SELECTED + "Run Restore job\nJobName:         back\n"
    "Where:           /@pve/mode=instant\nRestore Client:  node\n"
    "OK to run? (Yes/mod/no): "
)
QUEUED = SELECTED + "Job queued. JobId=7\n"


def record(job_id: int, level: str = "I", **changes: str) -> str:
    values = {
        "JobId": str(job_id),
        "Job": f"n.2026-11-30_14.00.0{job_id}_0{job_id}",
        "Name": "n",
        "Type": "B",
        "Level": level,
        "ClientName": "fd",
        "JobStatus": "T",
        "StartTime": f"2026-11-30 14:00:0{job_id}",
        "FileSet": "fs",
        **changes,
    }
    return "".join(f"{key:>16}: {value}\n" for key, value in values.items()) + "\n"


def listing(*paths: str) -> str:
    rows = "".join(f"| {path:<100} |\n" for path in paths)
    return f"+---+\n| Filename  |\n+---+\n{rows}+---+\n"


def console(folder: Path, *answers: tuple[str, str | list[str]]) -> Console:
    script = [
        (pattern, [answer] if isinstance(answer, str) else answer)
        for pattern, answer in answers
    ]
    return Console(program(folder, script), Path("/etc/bconsole.conf"), timeout_s=20)


def submissions(folder: Path) -> list[str]:
    return [lines[0] for lines in said(folder) if lines[0].endswith(" yes")]


def gone(numbers: Iterable[int]) -> bool:
    return not [number for number in numbers if os.path.exists(f"/proc/{number}")]


# --- the child ------------------------------------------------------------------------


async def test_a_missing_program_is_named_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="install bacula-console"):
        await Console(str(tmp_path / "none")).ask("version")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="can't be run: Permission denied"):
        await Console(str(tmp_path / "file")).ask("version")


async def test_a_director_that_does_not_answer_is_waited_for_a_bounded_time(
    tmp_path: Path,
) -> None:
    hanging = console(tmp_path, (".*", "hang"))
    with pytest.raises(TransportError, match="no answer to 'llist' within 2 s"):
        await hanging.ask("llist jobs", timeout_s=2)
    assert gone(pids(tmp_path))


async def test_a_cancelled_question_ends_its_console(tmp_path: Path) -> None:
    hanging = console(tmp_path, (".*", "hang"))
    task = asyncio.create_task(hanging.ask("llist jobs"))
    while not (tmp_path / "said").exists() or not said(tmp_path):
        await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert gone(pids(tmp_path))


async def test_a_director_that_is_away_is_a_transport_error(tmp_path: Path) -> None:
    with pytest.raises(TransportError, match="the Director at dir:9101"):
        await console(tmp_path, (".*", "silent")).ask("llist jobs")


async def test_a_line_that_would_be_two_is_never_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't be said"):
        await console(tmp_path, (".*", "")).ask("list jobs\ndelete volume=x yes")
    assert said(tmp_path) == []


async def test_the_files_of_others_are_not_kept(tmp_path: Path) -> None:
    many = [f"/home/{number:090}" for number in range(150_000)]
    own = f"{VM}/n.1/vm.conf"
    asked = console(tmp_path, ("list files", listing(*many, own, *many)))
    (part,) = await asked.parts(job(1), 100)
    assert (part.directory, part.names) == (f"{VM}/n.1", ("vm.conf",))


async def test_an_answer_without_an_end_is_given_up(tmp_path: Path) -> None:
    asked = console(tmp_path, ("list files", listing(*[f"{VM}/{'x' * 90}"] * 170_000)))
    with pytest.raises(RequestError, match="has no end"):
        await asked.parts(job(1), 100)


# --- the catalogue --------------------------------------------------------------------


def job(job_id: int, level: str = "I", status: str = "T") -> BaculaJob:
    return BaculaJob(
        job_id,
        "n",
        f"n.2026-11-30_14.00.0{job_id}_0{job_id}",
        "B",
        level,
        status,
        "fd",
        "fs",
        f"2026-11-30 14:00:0{job_id}",
    )


async def test_the_newest_job_that_has_the_vm_whole_is_taken(tmp_path: Path) -> None:
    asked = console(
        tmp_path,
        ("llist jobs", "".join(record(n, "F") for n in (5, 4, 3, 2))),
        ("list files jobid=5", listing("/@proxmox/1001-x/j/manifest.json")),
        ("list files jobid=4", listing(f"{VM}/j4/scsi0.qcow2")),
        (
            "list files jobid=3",
            listing(
                "/@proxmox/100-ffff0000/n.2026-11-30_14.00.02_02/manifest.json",
                f"{VM}/n.2026-11-30_14.00.03_03/manifest.json",
                f"{VM}/n.2026-11-30_14.00.03_03/scsi0.qcow2",
            ),
        ),
    )
    head = await asked.head(100)
    assert head.job.job_id == 3
    assert head.part.directory == f"{VM}/n.2026-11-30_14.00.03_03"
    assert head.others == ("100-ffff0000",)
    (skipped,) = head.skipped
    assert "job 4" in skipped
    assert "did not end well" in skipped


async def test_a_vm_that_is_nowhere_is_said_to_be_nowhere(tmp_path: Path) -> None:
    asked = console(
        tmp_path, ("llist", record(5, "F")), ("list files", "No results to list.\n")
    )
    with pytest.raises(RequestError, match="VM 100 is not in the newest 1 good"):
        await asked.head(100)
    with pytest.raises(RequestError, match="VM 100 is not in job 5: name another"):
        await asked.head(100, job=5)
    with pytest.raises(RequestError, match="no good backup of a job named 'm'"):
        await asked.head(100, job="m")


async def test_a_job_that_is_no_good_backup_is_refused(tmp_path: Path) -> None:
    failed = record(5, JobStatus="f")
    with pytest.raises(RequestError, match=r"no backup that ended well.*failed"):
        await console(tmp_path, ("llist", failed)).head(100, job=5)
    with pytest.raises(RequestError, match="shows no job 6"):
        await console(tmp_path, ("llist", failed)).head(100, job=6)


async def test_a_chain_is_computed_where_bacula_may_not_be_asked(
    tmp_path: Path,
) -> None:
    jobs = record(4) + record(3) + record(2, JobStatus="E") + record(1, "F")
    asked = console(tmp_path, ("llist job=", jobs))
    assert [j.job_id for j in await asked.chain(job(4))] == [1, 3, 4]
    assert said(tmp_path)[0] == [".bvfs_get_jobids jobid=4"]


@pytest.mark.parametrize(
    ("chain", "purged", "why"),
    [
        ("2,4", "0", "its chain in Bacula's catalogue is 2,4"),
        ("1,2", "0", "its chain in Bacula's catalogue is 1,2"),
        ("1,2,4", "1", "the files of job 1 .* are pruned"),
    ],
)
async def test_a_chain_that_cannot_be_restored_is_refused(
    tmp_path: Path, chain: str, purged: str, why: str
) -> None:
    asked = console(
        tmp_path,
        (r"\.bvfs", f"{chain}\n"),
        ("llist jobid=1", record(1, "F", PurgedFiles=purged)),
        ("llist jobid=2", record(2)),
    )
    with pytest.raises(RequestError, match=why):
        await asked.chain(job(4))


# --- jobs -----------------------------------------------------------------------------


async def test_a_restore_is_previewed_then_submitted(tmp_path: Path) -> None:
    asked = console(tmp_path, (r"restore .* yes$", QUEUED), ("restore", PREVIEW))
    assert await asked.restore(ORDER) == 7
    preview, submitted = said(tmp_path)
    assert submitted == [f"{preview[0]} yes", *preview[1:]]
    assert preview[1:] == [f"cd {VM}/n.1/", "mark vm.conf", "done"]


@pytest.mark.parametrize(
    ("preview", "why"),
    [
        (PREVIEW.replace("node", "fd"), "no client to restore to 'node'"),
        (PREVIEW.replace("back", "other"), "would take 'other'"),
        (
            SELECTED + "Defined Clients:\n 1: a\n 2: b\nSelect the Client (1-2): ",
            r"Bacula asks: Select the Client \(1-2\):",
        ),
        (SELECTED.replace("1 file marked", "No files marked"), "not in Bacula's cat"),
        ("You have selected the following JobIds: 1,2\nNo file", "ended early: .*No f"),
        ("", "the console said nothing"),
    ],
)
async def test_a_preview_of_another_job_submits_nothing(
    tmp_path: Path, preview: str, why: str
) -> None:
    asked = console(tmp_path, ("restore", preview))
    with pytest.raises(RequestError, match=f"not submitted: .*{why}"):
        await asked.restore(ORDER)
    assert submissions(tmp_path) == []


async def test_a_job_that_became_another_one_is_cancelled(tmp_path: Path) -> None:
    asked = console(
        tmp_path,
        (r"restore .* yes$", QUEUED.replace("1 file marked", "No files marked")),
        ("restore", PREVIEW),
        ("cancel", "JobId 7, Job x marked to be canceled.\n"),
    )
    with pytest.raises(RequestError, match="restore job 7 was cancelled again"):
        await asked.restore(ORDER)
    assert said(tmp_path)[-1] == ["cancel jobid=7 yes"]


async def test_a_question_in_the_place_of_a_job_is_reported(tmp_path: Path) -> None:
    asked = console(
        tmp_path,
        (r"restore .* yes$", SELECTED + "Select Storage (1-2): "),
        ("restore", PREVIEW),
    )
    with pytest.raises(RequestError, match=r"Bacula asks: Select Storage"):
        await asked.restore(ORDER)


async def test_waiting_tells_each_line_of_the_log_once_and_the_end(
    tmp_path: Path,
) -> None:
    def log(*lines: str) -> str:
        rows = "".join(f"| {line}\n\\   |\n" for line in lines)
        return f"+---+\n| LogText    |\n+---+\n{rows}+---+\n| JobId | Name |\n"

    lines = ["fd JobId 7: one", "fd JobId 7: two", "  Termination:  Restore OK"]
    running = record(7, Type="R", JobStatus="R")
    asked = console(
        tmp_path,
        ("llist", [running, "silent", running, record(7, Type="R", JobFiles="3")]),
        (r"\.status", "JobId=7\nJobFiles=2\nJobBytes=1,000\nExpected Files=3\n"),
        ("list joblog", [log(lines[0]), log(*lines[:2]), log(*lines)]),
    )
    seen: list[Progress] = []
    told: list[str] = []
    ended = await asked.wait(7, seen.append, told.append, every_s=0)
    assert ended.good
    assert told == lines
    assert [progress.status for progress in seen] == ["R", "R", "T"]
    assert (seen[0].files, seen[0].bytes, seen[0].expected_files) == (2, 1000, 3)


async def test_a_file_daemon_that_says_nothing_is_no_failure(tmp_path: Path) -> None:
    running = record(7, Type="R", JobStatus="R")
    asked = console(tmp_path, ("llist", running), (r"\.status", "silent"))
    assert await asked.progress(7) == Progress(7, "R")


async def test_the_restore_jobs_are_listed(tmp_path: Path) -> None:
    asked = console(tmp_path, (r"\.jobs", ".jobs type=R\nlab-restore\nother one\n"))
    assert await asked.restore_jobs() == ["lab-restore", "other one"]
