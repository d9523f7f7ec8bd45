# SPDX-License-Identifier: Apache-2.0
"""What is said to Bacula's console, and what its answers mean: text in, values out.

bconsole has no machine interface that both 9.6 and 15.0 take for all that is needed
here; ``llist``, ``list files``, the ``.bvfs`` and ``.status`` words and the dialogue of
``restore`` read the same on both. Its traps, each met in the lab:

- A name that Bacula doesn't know is **not refused**: it says so in passing and takes
  another one ("Restore Client "x" not found. Automatically selected Client: y"), or
  asks. So a restore is first previewed, and every line of the preview compared.
- A question that nobody expected eats the lines that follow. So each call is a console
  of its own, whose input ends after its lines: the end of input answers any question
  with "no", and nothing waits for ever.
- ``file=`` and ``directory=`` are taken once per command; with ``file=`` the restore
  objects of the other jobs do not arrive. Marking files in the tree takes many, and the
  objects of all JobIds come.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from pveplug.errors import ConfigError, PveplugError, RequestError, TransportError

SUCCESS: Final = frozenset("TW")
"""Job statuses: ended well, ended well with warnings."""
ENDED: Final = frozenset("TWEefADI")
"""Statuses that don't change any more."""
STATUSES: Final = {
    "A": "cancelled",
    "C": "created, waiting to run",
    "D": "ended with differences",
    "E": "ended with errors",
    "F": "waiting for the file daemon",
    "I": "incomplete",
    "M": "waiting for a volume to be mounted",
    "R": "running",
    "S": "waiting for the storage daemon",
    "T": "ended well",
    "W": "ended well, with warnings",
    "c": "waiting for the client",
    "d": "waiting for the maximum of jobs",
    "e": "ended with errors",
    "f": "failed",
    "j": "waiting for the storage",
    "m": "waiting for a new volume",
    "p": "waiting for jobs of a higher priority",
    "s": "waiting for the storage",
    "t": "waiting for its start time",
}

_NAME_MAX: Final = 127
_TREE_WORD: Final = re.compile(r"[A-Za-z0-9_.:@+-]+")
_RECORD_LINE: Final = re.compile(r" *(\w+): ?(.*)")
_FILE_LINE: Final = re.compile(r"\| (/.*?) *\|")
_QUESTION: Final = re.compile(r"[^\n]*(?:\([^()\n]*\)|[Ee]nter [^\n]*|\?): ?\Z")
_OUTCOME: Final = re.compile(r"Job queued\. JobId=(\d+)")


@dataclass(frozen=True, slots=True)
class BaculaJob:
    """One job as the catalogue has it.

    Attributes:
        name: of the Job resource, ``nightly``.
        unique: of this run, ``nightly.2026-11-30_14.00.25_08``.
        type: ``B`` backup, ``R`` restore …; ``level``: ``F``, ``I``, ``D``.
        status: one letter, see STATUSES.
        started: as Bacula shows it, ``2026-11-30 14:00:27``: comparable.
        files: how many; ``bytes``: of data; both 0 while a restore runs.
        purged: its files are no longer in the catalogue.
    """

    job_id: int
    name: str
    unique: str
    type: str
    level: str
    status: str
    client: str
    fileset: str
    started: str
    files: int = 0
    bytes: int = 0
    purged: bool = False

    @property
    def good(self) -> bool:
        """Whether it ended well."""
        return self.status in SUCCESS

    @property
    def ended(self) -> bool:
        """Whether its status is its last."""
        return self.status in ENDED

    @property
    def state(self) -> str:
        """The status in words."""
        return STATUSES.get(self.status, f"in status {self.status}")


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a running job is; bytes of data, None: not known yet."""

    job_id: int
    status: str
    files: int | None = None
    bytes: int | None = None
    expected_files: int | None = None

    @property
    def state(self) -> str:
        """The status in words."""
        return STATUSES.get(self.status, f"in status {self.status}")


@dataclass(frozen=True, slots=True)
class RestoreOrder:
    """One restore job: which files, of which jobs, where to.

    Attributes:
        job_ids: all that are selected: the restore objects of each arrive, whatever
            files are marked.
        marks: absolute directory -> the names in it to restore.
        where: Bacula's ``where=``.
        client: whose backup it is; ``restore_client``: who restores.
        restore_job: name of the Job resource of type Restore.
    """

    job_ids: tuple[int, ...]
    marks: tuple[tuple[str, tuple[str, ...]], ...]
    where: str
    client: str
    restore_client: str
    restore_job: str

    @property
    def files(self) -> int:
        """How many files it selects."""
        return sum(len(names) for _, names in self.marks)


# --- what is said ---------------------------------------------------------------------


def quoted(value: str) -> str:
    """Return a value as the console takes it after ``keyword=``.

    Raises:
        ConfigError: it can't be said: a quote, a backslash, a control character, or
            longer than a name of Bacula's.
    """
    if not value:
        raise ConfigError("a name in Bacula is not empty")
    if any(char in '"\\' or not char.isprintable() for char in value):
        raise ConfigError(
            f"{value!a} can't be said to bconsole: names in Bacula have letters, "
            "digits, blanks and .:-_"
        )
    if len(value.encode("utf-8", "surrogatepass")) > _NAME_MAX:
        raise ConfigError(f"{value[:40]!r}… is longer than a name in Bacula can be")
    return f'"{value}"'


def quoted_where(where: str) -> str:
    """Return ``where=`` of a restore; it may be long, and has no blank.

    Raises:
        ConfigError: it has characters that only quoting of the value can carry.
    """
    if not re.fullmatch(r"/[A-Za-z0-9._:;+@/%,=-]*", where):
        raise ConfigError(f"where={where!a}: write what isn't plain as %XX")
    return f'where="{where}"'


def restore_lines(order: RestoreOrder, *, run: bool) -> tuple[str, ...]:
    """Return what is said for a restore; without ``run`` it stops at the question.

    Raises:
        ConfigError: a name that can't be said.
        RequestError: nothing is selected.
    """
    if not order.job_ids or not order.files:
        raise RequestError("a restore without files: nothing was submitted")
    words = [
        "restore",
        f"client={quoted(order.client)}",
        f"restoreclient={quoted(order.restore_client)}",
        f"restorejob={quoted(order.restore_job)}",
        quoted_where(order.where),
        "replace=always",
        f"jobid={','.join(map(str, order.job_ids))}",
    ]
    lines = [" ".join([*words, "yes"] if run else words)]
    for directory, names in order.marks:
        parts = directory.strip("/").split("/")
        for part in (*parts, *names):
            if not _TREE_WORD.fullmatch(part):
                raise ConfigError(
                    f"{part!a} of {directory} can't be selected in bconsole"
                )
        lines.append(f"cd /{'/'.join(parts)}/")
        # Never a "mark *": after a cd that failed it would be everything there is.
        lines += [f"mark {name}" for name in names]
    return (*lines, "done")


def jobs_line(*, name: str | None = None, client: str | None = None, limit: int) -> str:
    """Return the question for backup jobs, newest first."""
    which = (
        f"job={quoted(name)}"
        if name is not None
        else f"jobs client={quoted(client)}"
        if client is not None
        else "jobs"
    )
    return f"llist {which} jobtype=B order=desc limit={limit}"


# --- what is answered -----------------------------------------------------------------


def answer(said: str) -> str:
    """Return what came after the console's greeting.

    Raises:
        ConfigError: the console's configuration, its password or its TLS.
        TransportError: no Director answers.
    """
    text = said.replace("\r\n", "\n")
    greeting = re.search(r"^1000 OK: .*\n(?:Enter a period.*\n)?", text, re.M)
    if greeting:
        return text[greeting.end() :]
    last = _one_line(text)
    if found := re.search(r'Cannot open config file "([^"]*)": ([^\n]*)', text):
        raise ConfigError(
            f"bconsole can't read {found[1]} ({found[2]}): run this as a user who may, "
            "or name its configuration with --console-config"
        )
    if found := re.search(r"Config error: (.*(?:\n +: .*)?)", text):
        raise ConfigError(f"bconsole's configuration is wrong: {_one_line(found[1])}")
    if re.search(r"authorization problem|passwords do not agree|TLS negotiation", text):
        raise ConfigError(
            "the Director refuses this console: compare Name and Password (and TLS) in "
            "bconsole's configuration with the Director's"
        )
    to = re.search(r"Connecting to Director (\S+)", text)
    where = f"the Director at {to[1]}" if to else "a Director"
    reason = re.search(r"ERR=([^\n]*)", text)
    said_of_it = f": {reason[1]}" if reason else "" if to else f": {last}"
    raise TransportError(
        f"bconsole can't reach {where}{said_of_it}; is bacula-dir running, and is its "
        "address in bconsole's configuration right?"
    )


def refusal(text: str, lines: Sequence[str]) -> PveplugError | None:
    """Return what an answer says is wrong, whatever was asked; None if nothing."""
    word = lines[0].split()[0]
    if re.search(rf"^{re.escape(word)}: is an invalid command", text, re.M):
        return RequestError(
            f"this console may not say {word!r}: its CommandACL in the Director's "
            "configuration lacks it; needed are llist, list, restore and .jobs, better "
            "also .bvfs_get_jobids, .status and cancel, and WhereACL = *all*"
        )
    if found := re.search(
        r"^(.*\bnot authorized\b.*|No authorization .*|Not authorized .*)$", text, re.M
    ):
        return RequestError(
            f"Bacula refuses: {found[1].strip()}: extend the ACLs of this console in "
            "the Director's configuration, or use one without"
        )
    if found := re.search(r'Could not find Client "([^"]*)"', text):
        return RequestError(
            f"Bacula's catalogue knows no client {found[1]!r}: `list clients` in "
            "bconsole shows their names"
        )
    if found := re.search(r"No Job found for JobId (\d+)", text):
        return RequestError(
            f"Bacula's catalogue has no job {found[1]}: it is pruned, or never was"
        )
    return None


def question(text: str) -> str | None:
    """Return the question at the end of an answer that nobody was there to answer."""
    found = _QUESTION.search(text)
    return _one_line(found[0]) if found else None


def jobs(text: str) -> list[BaculaJob]:
    """Return the jobs of an ``llist``, in its order; unknown keys are skipped.

    Raises:
        RequestError: a record lacks what every release writes.
    """
    return [_job(record) for record in _records(text)]


def _job(record: dict[str, str]) -> BaculaJob:
    try:
        return BaculaJob(
            job_id=_number(record["JobId"]),
            name=record["Name"],
            unique=record["Job"],
            type=record["Type"],
            level=record["Level"],
            status=record["JobStatus"],
            client=record.get("ClientName", ""),
            fileset=record.get("FileSet", ""),
            started=record.get("StartTime", ""),
            files=_number(record.get("JobFiles", "0")),
            bytes=_number(record.get("JobBytes", "0")),
            purged=record.get("PurgedFiles", "0") not in ("0", ""),
        )
    except (KeyError, ValueError) as error:
        raise RequestError(
            f"bconsole lists a job that can't be read ({error}): is this another "
            "release than 9.6 to 15.0?"
        ) from None


def _records(text: str) -> Iterator[dict[str, str]]:
    record: dict[str, str] = {}
    for line in text.split("\n"):
        found = _RECORD_LINE.fullmatch(line.rstrip())
        if found and found[1] == "JobId" and line.startswith(" "):
            if record:
                yield record
            record = {"JobId": found[2]}
        elif found and record:
            record.setdefault(found[1], found[2].strip())
    if record:
        yield record


def without_other_files(lines: bytes, below: str) -> bytes:
    """Drop the lines of a list of files that haven't ``below`` in their path."""
    wanted = below.encode()
    return b"".join(
        line
        for line in lines.splitlines(keepends=True)
        if wanted in line or not line.startswith(b"| /")
    )


def files(lines: Iterable[str], prefix: str) -> list[str]:
    """Return the paths below ``prefix`` of a ``list files``."""
    return [
        found[1]
        for line in lines
        if prefix in line
        and (found := _FILE_LINE.fullmatch(line.rstrip()))
        and found[1].startswith(prefix)
    ]


def job_ids(text: str) -> tuple[int, ...]:
    """Return what ``.bvfs_get_jobids`` found; empty: nothing it may show."""
    for line in text.split("\n"):
        if re.fullmatch(r"\d+(,\d+)*", line.strip()):
            return tuple(map(int, line.strip().split(",")))
    return ()


def computed_chain(listed: Iterable[BaculaJob], head: BaculaJob) -> list[BaculaJob]:
    """Return the chain that ends in ``head``, oldest first, as Bacula chooses it.

    The newest Full before it, the newest Differential since, the Incrementals after.

    Raises:
        RequestError: there is no Full.
    """
    same = sorted(
        {
            job.job_id: job
            for job in [*listed, head]
            if (job.name, job.client, job.fileset, job.type)
            == (head.name, head.client, head.fileset, "B")
            and job.good
            and (job.started, job.job_id) <= (head.started, head.job_id)
        }.values(),
        key=lambda job: (job.started, job.job_id),
    )
    full = max((at for at, job in enumerate(same) if job.level == "F"), default=None)
    if full is None:
        raise RequestError(
            f"no Full of {head.name} is left before job {head.job_id}: it can't be "
            "restored"
        )
    chain, rest = [same[full]], same[full + 1 :]
    if head.level == "F":
        return [head]
    newest = max((at for at, job in enumerate(rest) if job.level == "D"), default=None)
    if newest is not None:
        chain, rest = [*chain, rest[newest]], rest[newest + 1 :]
    return chain + [job for job in rest if job.level == "I"]


def log_lines(text: str) -> list[str]:
    """Return the lines of a ``list joblog``, without its frame."""
    found: list[str] = []
    inside = False
    for raw in text.split("\n"):
        line = raw.rstrip()
        if re.fullmatch(r"\| LogText +\|", line):
            inside = True
            continue
        if not inside or line.startswith("+-"):
            continue
        if re.match(r"\| JobId +\|", line):
            break  # the table of the job itself
        # Each message begins with "| " and ends with an escaped end of line: "\  |".
        line = re.sub(r"^\\? +\|$|^\\ \|$", "", line).removeprefix("| ")
        if line and line != "\\":
            found.append(line)
    return found


def running(text: str, job_id: int) -> Progress | None:
    """Return what ``.status client=… running`` says of a job; None: not there."""
    found: dict[str, str] | None = None
    for raw in text.split("\n"):
        key, equals, value = raw.strip().partition("=")
        if not equals:
            continue
        if key == "JobId":
            if found is not None:
                break
            found = {} if value == str(job_id) else None
        elif found is not None:
            found.setdefault(key, value)
    if found is None:
        return None
    try:
        return Progress(
            job_id,
            found.get("Status", "R"),
            files=_number(found["JobFiles"]),
            bytes=_number(found["JobBytes"]),
            expected_files=_number(found.get("Expected Files", "0")) or None,
        )
    except (KeyError, ValueError):
        return Progress(job_id, found.get("Status", "R"))


def queued(text: str) -> int | None:
    """Return the JobId of the job that was queued, None if none was."""
    found = _OUTCOME.search(text)
    return int(found[1]) if found else None


def selection_problem(text: str, order: RestoreOrder) -> str | None:
    """Return how the tree's answers differ from what was to be marked."""
    listed = re.search(r"following JobIds?: ([\d,]+)", text)
    if not listed:
        return _one_line(text) or "the console said nothing"
    if sorted(map(int, listed[1].strip(",").split(","))) != sorted(order.job_ids):
        return f"Bacula selected the jobs {listed[1]}"
    # Whether input is echoed depends on the release: so the answers alone are read.
    answers = re.findall(
        r"^(?:\$ )?(?:[^\n]*\$ )?(cwd is: /.+|Invalid path given\.|No files marked\.|"
        r"[\d,]+ files? marked\.)$",
        text,
        re.M,
    )
    expected: list[tuple[str, str]] = []
    for directory, names in order.marks:
        path = f"/{directory.strip('/')}/"
        expected.append((f"cwd is: {path}", f"{path} is not in Bacula's catalogue"))
        expected += [
            ("1 file marked.", f"{path}{name} is not in Bacula's catalogue")
            for name in names
        ]
    for got, (wanted, problem) in zip(answers, expected, strict=False):
        if got != wanted:
            return problem
    if len(answers) != len(expected):
        return "the selection ended early: " + (question(text) or _one_line(text))
    selected = re.search(r"^([\d,]+) files? selected to be restored", text, re.M)
    if not selected or _number(selected[1]) != order.files:
        return f"Bacula selected {selected[1] if selected else 'no'} files"
    return None


def preview_problem(text: str, order: RestoreOrder) -> str | None:
    """Return why a previewed restore isn't the one that was ordered; None: it is."""
    if problem := selection_problem(text, order):
        return problem
    begin = text.rfind("Run Restore job\n")
    if begin < 0:
        for what, name in (
            ("client", order.client),
            ("client to restore to", order.restore_client),
        ):
            if re.search(rf'Client "{re.escape(name)}" not found', text):
                return f"the Director has no {what} {name!r}"
        asked = question(text)
        return f"Bacula asks: {asked}" if asked else _one_line(text)
    shown = {
        found[1]: found[2]
        for line in text[begin:].split("\n")
        if (found := re.fullmatch(r"([A-Za-z ]+): +(.*)", line.rstrip()))
    }
    for key, wanted, what in (
        ("JobName", order.restore_job, "restore job"),
        ("Restore Client", order.restore_client, "client to restore to"),
        ("Where", order.where, "where"),
    ):
        if shown.get(key) != wanted:
            return (
                f"the Director has no {what} {wanted!r}; it would take "
                f"{shown.get(key, 'another')!r}"
            )
    if f'Client "{order.client}" not found' in text:
        return f"the Director has no client {order.client!r}"
    return None


def with_status(job: BaculaJob, progress: Progress | None) -> Progress:
    """Return a job's progress, from its file daemon if that said something."""
    if progress is None:
        return Progress(job.job_id, job.status)
    return replace(progress, status=job.status)


def _number(text: str) -> int:
    return int(text.replace(",", ""))


def _one_line(text: str) -> str:
    """Return the last words of an answer, on one line."""
    said = [line.strip() for line in text.split("\n") if line.strip()]
    return " ".join(said[-3:])[-300:]
