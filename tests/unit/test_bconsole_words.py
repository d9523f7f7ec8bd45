# SPDX-License-Identifier: Apache-2.0
"""What bconsole says and hears: transcripts of 9.6.7 and 15.0.3, and quoting."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pveplug.errors import ConfigError, RequestError, TransportError
from pveplug.proto import bconsole as words
from pveplug.proto.bconsole import BaculaJob, RestoreOrder

SAID = Path(__file__).parent / "bconsole"
VERSIONS = ("9.6.7", "15.0.3")
VM = "/@proxmox/100-1a2b3c4d"


class Transcripts:
    """What one release said; directories are named as its jobs were."""

    def __init__(self, version: str) -> None:
        self.version = version
        self.second = re.search(r" Job: (\S+)", self.raw("llist-one"))
        found = re.search(r"/@proxmox/100-1a2b3c4d/([^/]+)/", self.raw("files"))
        assert found
        self.job = found[1]

    def raw(self, name: str) -> str:
        return (SAID / self.version / f"{name}.txt").read_text()

    def answer(self, name: str) -> str:
        return words.answer(self.raw(name))

    def order(self, **changes: object) -> RestoreOrder:
        values = {
            "job_ids": (1, 2, 3),
            "marks": ((f"{VM}/{self.job}", ("scsi0.qcow2", "vm.conf")),),
            "where": "/@pve/mode=instant,restore_vmid=100:200",
            "client": "lab-fd",
            "restore_client": "lab-fd",
            "restore_job": "lab-restore",
            **changes,
        }
        return RestoreOrder(**values)


@pytest.fixture(params=VERSIONS)
def said(request: pytest.FixtureRequest) -> Transcripts:
    return Transcripts(request.param)


def job(job_id: int, level: str = "I", **changes: object) -> BaculaJob:
    values = {
        "name": "nightly",
        "unique": f"nightly.2026-11-30_14.00.00_{job_id:02}",
        "type": "B",
        "level": level,
        "status": "T",
        "client": "lab-fd",
        "fileset": "fs",
        "started": f"2026-11-30 14:00:{job_id:02}",
        **changes,
    }
    return BaculaJob(job_id, **values)


# --- answers --------------------------------------------------------------------------


def test_jobs_are_read_with_names_that_have_blanks_and_colons(
    said: Transcripts,
) -> None:
    jobs = words.jobs(said.answer("llist"))
    assert [found.job_id for found in jobs] == [6, 5, 4, 3, 2, 1]
    assert [found.level for found in jobs] == ["F", "I", "D", "I", "I", "F"]
    assert jobs[0].name == "odd job.1:x"
    assert jobs[0].unique.startswith("odd_job.1:x.2026-")
    assert (jobs[0].good, jobs[0].ended, jobs[0].state) == (False, True, "failed")
    second = jobs[4]
    assert second.unique == said.job
    assert second.good
    assert (second.type, second.client, second.fileset) == ("B", "lab-fd", "fs-nightly")
    assert (second.files, second.bytes, second.purged) == (14, 1942200, False)


def test_numbers_with_commas_are_numbers() -> None:
    record = (
        "           JobId: 1,234\n             Job: a.b\n            Name: a\n"
        "            Type: B\n           Level: F\n       JobStatus: T\n"
        "        JobFiles: 1,000,000\n     PurgedFiles: 1\n"
    )
    (found,) = words.jobs(record)
    assert (found.job_id, found.files, found.purged) == (1234, 1_000_000, True)


def test_a_record_of_another_make_is_refused_and_not_guessed() -> None:
    with pytest.raises(RequestError, match="another release"):
        words.jobs("   JobId: 5\n   Name: a\n")


def test_no_jobs_are_no_jobs(said: Transcripts) -> None:
    assert words.jobs(said.answer("llist-none")) == []


def test_files_of_one_vm_are_read_from_a_list_of_all(said: Transcripts) -> None:
    text = said.answer("files")
    found = words.files(text.split("\n"), "/@proxmox/100-")
    assert len(found) == 6
    assert f"{VM}/{said.job}/efidisk0.qcow2" in found
    kept = words.without_other_files(text.encode(), "/@proxmox/100-").decode()
    assert "101-aabbccdd" not in kept
    assert words.files(kept.split("\n"), "/@proxmox/100-") == found


def test_the_chain_is_full_differential_incremental(said: Transcripts) -> None:
    assert words.job_ids(said.answer("chain")) == (1, 4, 5)


def test_the_computed_chain_is_bacula_s_own(said: Transcripts) -> None:
    listed = words.jobs(said.answer("llist"))
    for head, chain in (
        (1, [1]),
        (2, [1, 2]),
        (3, [1, 2, 3]),
        (4, [1, 4]),
        (5, [1, 4, 5]),
    ):
        (wanted,) = [found for found in listed if found.job_id == head]
        assert [j.job_id for j in words.computed_chain(listed, wanted)] == chain


def test_a_computed_chain_has_no_failed_foreign_or_later_job() -> None:
    listed = [
        job(1, "F"),
        job(2, status="f"),
        job(3, client="other"),
        job(4, fileset="other"),
        job(5, status="W"),
        job(6, type="C"),
        job(7),
        job(8, "F"),
    ]
    assert [j.job_id for j in words.computed_chain(listed, job(7))] == [1, 5, 7]
    with pytest.raises(RequestError, match="no Full of nightly"):
        words.computed_chain(listed[1:7], job(7))


def test_a_queued_job_has_its_id_and_no_problem(said: Transcripts) -> None:
    text = said.answer("queued")
    assert words.queued(text) == 15
    assert words.selection_problem(text, said.order()) is None


def test_a_preview_that_is_what_was_ordered_passes(said: Transcripts) -> None:
    assert words.preview_problem(said.answer("preview"), said.order()) is None
    assert words.queued(said.answer("preview")) is None
    assert words.question(said.answer("preview")).startswith("OK to run?")


@pytest.mark.parametrize(
    ("name", "changes", "why"),
    [
        ("preview", {"where": "/@pve/x=1"}, "no where '/@pve/x=1'"),
        ("preview", {"restore_job": "other"}, "it would take 'lab-restore'"),
        ("preview", {"job_ids": (1, 2)}, "selected the jobs 1,2,3"),
        (
            "preview-unknown-restore-client",
            {"restore_client": "nope"},
            "no client to restore to 'nope'",
        ),
        (
            "preview-unknown-restore-job",
            {"restore_job": "nope"},
            "no restore job 'nope'; it would take 'lab-restore'",
        ),
        ("preview-unknown-client", {"client": "nope"}, "no client 'nope'"),
    ],
)
def test_a_preview_of_something_else_is_seen(
    said: Transcripts, name: str, changes: dict[str, object], why: str
) -> None:
    problem = words.preview_problem(said.answer(name), said.order(**changes))
    assert problem is not None
    assert why in problem


def test_files_that_are_not_in_the_catalogue_are_named(said: Transcripts) -> None:
    nowhere = said.order(marks=((f"{VM}/nope", ("scsi0.qcow2", "vm.conf")),))
    problem = words.preview_problem(said.answer("preview-no-directory"), nowhere)
    assert problem == f"{VM}/nope/ is not in Bacula's catalogue"
    marks = ((f"{VM}/{said.job}", ("nope", "vm.conf")),)
    problem = words.preview_problem(
        said.answer("preview-no-file"), said.order(marks=marks)
    )
    assert problem == f"{VM}/{said.job}/nope is not in Bacula's catalogue"


def test_the_log_is_read_line_by_line(said: Transcripts) -> None:
    lines = words.log_lines(said.answer("joblog"))
    assert lines[0].startswith("lab-dir JobId 15: Start Restore Job lab-restore.")
    assert lines[-1].split() == ["Termination:", "Restore", "OK"]
    assert not [line for line in lines if line.endswith(("|", "\\"))]


def test_the_log_of_a_failed_job_has_the_client_s_words(said: Transcripts) -> None:
    lines = words.log_lines(said.answer("joblog-failed"))
    assert "lab-fd JobId 16: Fatal error: the landing store is full" in lines
    (failed,) = words.jobs(said.answer("llist-failed"))
    assert (failed.good, failed.ended, failed.type) == (False, True, "R")


def test_a_running_job_s_progress_is_its_file_daemon_s(said: Transcripts) -> None:
    text = said.answer("running")
    found = words.running(text, 15)
    assert found is not None
    assert (found.status, found.expected_files) == ("R", 2)
    assert found.files is not None
    assert words.running(text, 14) is None
    assert words.with_status(job(15, status="R"), None).state == "running"


# --- refusals -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "error", "why"),
    [
        ("wrong-password", ConfigError, "compare Name and Password"),
        ("no-director", TransportError, r"can't reach the Director at 127.0.0.1:1\b"),
        ("no-config", ConfigError, "--console-config"),
        ("broken-config", ConfigError, "expected resource name, got: garbage"),
    ],
)
def test_a_console_without_a_director_says_why_in_one_line(
    said: Transcripts, name: str, error: type[Exception], why: str
) -> None:
    with pytest.raises(error, match=why) as raised:
        said.answer(name)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "line", "why"),
    [
        ("not-allowed", "restore client=x", "CommandACL"),
        ("where-not-allowed", "restore client=x", '"where" specification not'),
        ("preview-no-job", "restore client=x", "no job 999"),
        ("no-such-job", ".bvfs_get_jobids jobid=999", "no job 999"),
        ("unknown-client", "llist jobs", "no client 'nope'"),
    ],
)
def test_a_refusal_is_one_line_with_a_remedy(
    said: Transcripts, name: str, line: str, why: str
) -> None:
    problem = words.refusal(said.answer(name), [line])
    assert isinstance(problem, RequestError)
    assert why in str(problem)
    assert "\n" not in str(problem)


@pytest.mark.parametrize(
    "name", ["llist", "files", "chain", "preview", "queued", "joblog", "joblog-failed"]
)
def test_an_answer_is_no_refusal(said: Transcripts, name: str) -> None:
    line = said.answer(name).split("\n")[0]
    assert words.refusal(said.answer(name), [line]) is None


def test_silence_is_no_director() -> None:
    with pytest.raises(TransportError, match="can't reach a Director"):
        words.answer("")


# --- what is said ---------------------------------------------------------------------


def test_a_restore_marks_names_and_never_everything(said: Transcripts) -> None:
    lines = words.restore_lines(said.order(), run=True)
    assert lines[0] == (
        'restore client="lab-fd" restoreclient="lab-fd" restorejob="lab-restore" '
        'where="/@pve/mode=instant,restore_vmid=100:200" replace=always jobid=1,2,3 yes'
    )
    assert lines[1:] == (
        f"cd {VM}/{said.job}/",
        "mark scsi0.qcow2",
        "mark vm.conf",
        "done",
    )
    preview = words.restore_lines(said.order(), run=False)
    assert preview[0] == lines[0].removesuffix(" yes")
    assert preview[1:] == lines[1:]


@pytest.mark.parametrize("name", ["*", "a b", "a?", "[x]", "", "a=b", "a\nb", "a,b"])
def test_a_name_that_the_tree_would_take_for_another_is_refused(
    said: Transcripts, name: str
) -> None:
    order = said.order(marks=((f"{VM}/{said.job}", (name,)),))
    with pytest.raises(ConfigError, match="can't be selected"):
        words.restore_lines(order, run=False)


def test_a_restore_of_nothing_is_refused(said: Transcripts) -> None:
    for changes in ({"marks": ()}, {"job_ids": ()}):
        with pytest.raises(RequestError, match="without files"):
            words.restore_lines(said.order(**changes), run=True)
