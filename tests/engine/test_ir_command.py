# SPDX-License-Identifier: Apache-2.0
"""``pveplug ir start`` as a process, against a program that plays bconsole."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pveplug.cli import main
from tests.support.scripted_bconsole import program, said

JOB = "n.2026-11-30_14.00.01_01"
HEAD = (
    f"           JobId: 1\n             Job: {JOB}\n            Name: n\n"
    "            Type: B\n           Level: F\n      ClientName: fd\n"
    "       JobStatus: T\n       StartTime: 2026-11-30 14:00:01\n"
)
FILES = "".join(
    f"| /@proxmox/100-1a2b3c4d/{JOB}/{name} |\n"
    for name in ("scsi0.qcow2", "manifest.json")
)
SELECTED = (
    "You have selected the following JobId: 1\n\n"
    f"cwd is: /\n$ cwd is: /@proxmox/100-1a2b3c4d/{JOB}/\n"
    "$ 1 file marked.\n$ 1 file marked.\n$ \n2 files selected to be restored.\n"
)
PREVIEW = (
    SELECTED + "Run Restore job\nJobName:         back\n"
    "Where:           /@pve/mode=instant,restore_vmid=100:next\n"
    "Restore Client:  fd\nOK to run? (Yes/mod/no): "
)
RUNNING = (
    "           JobId: 7\n             Job: back.1\n            Name: back\n"
    "            Type: R\n           Level: F\n      ClientName: fd\n"
    "       JobStatus: R\n"
)
CHAIN = [
    ("llist jobs", [HEAD]),
    ("llist jobid=1$", [HEAD]),
    (r"\.bvfs", ["1\n"]),
    ("list files", [FILES]),
    (r"\.jobs", ["back\n"]),
]


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start the command with a bconsole of these answers; it ends with the test."""
    with contextlib.ExitStack() as stack:

        def begin(*answers: tuple[str, list[str]], more: str = "") -> Any:
            argv = [sys.executable, "-m", "pveplug", "ir", "start", "--vmid", "100"]
            argv += ["--console", program(tmp_path, [*answers, *CHAIN]), *more.split()]
            process = subprocess.Popen(
                argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield begin


def test_a_dry_run_submits_nothing_and_shows_each_job(
    tmp_path: Path, start: Start
) -> None:
    out, err = start(("restore", [PREVIEW]), more="--dry-run").communicate()
    assert err == ""
    assert "JobId 1) of fd" in out
    assert f"  1. {JOB} (JobId 1): 2 files" in out
    assert out.endswith("nothing was submitted\n")
    assert not [lines for lines in said(tmp_path) if lines[0].endswith(" yes")]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_cancels_nothing_and_says_what_goes_on(
    tmp_path: Path, start: Start, number: signal.Signals
) -> None:
    process = start(
        (r"restore .* yes$", [SELECTED + "Job queued. JobId=7\n"]),
        ("restore", [PREVIEW]),
        ("llist jobid=7", [RUNNING]),
        (r"\.status", [""]),
        ("list joblog", ["No results to list.\n"]),
    )
    until = time.monotonic() + 60
    while not any(lines[0] == "llist jobid=7" for lines in said(tmp_path)):
        assert time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == (
        "pveplug: interrupted: restore job 7 goes on in Bacula (`cancel jobid=7` in "
        "bconsole would end it), no other was submitted; when it has ended, run the "
        "same command again\n"
    )
    assert not [lines for lines in said(tmp_path) if lines[0].startswith("cancel")]


@pytest.mark.parametrize(
    ("answers", "more", "status", "why"),
    [
        ([], "--option mode=x", 78, "mode is set by this command"),
        ([], "--console /nonexistent", 78, "install bacula-console"),
        ([("llist", ["silent"])], "", 69, "bconsole can't reach the Director"),
        ([("list files", [""])], "", 69, "VM 100 is not in the newest 1"),
        ([("restore", [SELECTED])], "", 69, "the restore was not submitted"),
        ([("list files", [FILES + FILES.replace("_01/", "_02/")])], "--no-wait", 78,
         "--no-wait: this recovery takes 2 restore jobs"),
    ],
)  # fmt: skip
def test_what_fails_says_why_and_exits_as_the_manual_says(
    start: Start,
    answers: list[tuple[str, list[str]]],
    more: str,
    status: int,
    why: str,
) -> None:
    process = start(*answers, more=more)
    _, err = process.communicate(timeout=60)
    assert why in err
    assert process.returncode == status
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("option", "why"),
    [
        ("mode=instant", "mode is set by this command"),
        ("prove_memory", "not key=value"),
    ],
)
def test_a_proof_can_t_be_turned_into_something_else(
    option: str, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would leave a VM running that its administrator takes for removed."""
    assert main(["ir", "prove", "--vmid", "100", "--option", option]) == 78
    assert why in capsys.readouterr().err
