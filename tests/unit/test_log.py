# SPDX-License-Identifier: Apache-2.0
"""Who owns the standard descriptors, and what a log line looks like."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import warnings

import pytest

from pveplug import log


@pytest.fixture(autouse=True)
def logging_as_before():
    root, package = logging.getLogger(), logging.getLogger("pveplug")
    before = root.handlers[:], root.level, package.level, logging.raiseExceptions
    hooks = sys.excepthook, __import__("threading").excepthook
    shown = warnings.showwarning
    yield
    for handler in root.handlers:
        if handler not in before[0]:
            handler.close()
    root.handlers[:], logging.raiseExceptions = before[0], before[3]
    root.setLevel(before[1])
    package.setLevel(before[2])
    logging.captureWarnings(False)
    warnings.showwarning = shown
    sys.excepthook, __import__("threading").excepthook = hooks


def run(code: str, **options) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, timeout=60, **options
    )


def test_only_the_protocol_reaches_standard_output():
    done = run(
        """
from pveplug import log
fd_in, fd_out = log.own_stdio()
import os, subprocess, sys, warnings, asyncio
assert log.setup_backend() is None
print("forgotten print")
print("to stderr", file=sys.stderr)
subprocess.run(["sh", "-c", "echo child; echo child >&2; cat"])
warnings.warn("a warning")
assert sys.stdin.read() == ""
os.write(fd_out, b"packet " + os.read(fd_in, 5))
assert not os.get_inheritable(fd_in) and not os.get_inheritable(fd_out)
raise RuntimeError("nobody catches this")
""",
        input=b"Hello",
    )
    assert done.stdout == b"packet Hello"
    assert done.stderr == b""
    assert done.returncode == 1


def test_a_crash_is_in_the_log_file(tmp_path):
    path = tmp_path / "backend.log"
    done = run(
        f"""
from pveplug import log
fd_in, fd_out = log.own_stdio()
assert log.setup_backend({str(path)!r}) is None
import os, sys, threading
os.system("echo from a child >&2")
thread = threading.Thread(target=lambda: 1 / 0, name="worker")
thread.start()
thread.join()
raise RuntimeError("password=abc was wrong")
"""
    )
    assert (done.stdout, done.stderr) == (b"", b"")
    text = path.read_text()
    assert "from a child" in text
    assert "CRITICAL pveplug uncaught thread=worker | Traceback" in text
    assert "RuntimeError: password=*** was wrong" in text
    assert path.stat().st_mode & 0o777 == 0o600


def test_closed_standard_descriptors_are_an_error_or_survived():
    code = "from pveplug import log; log.own_stdio(); import os; os.fstat(2)"
    shell = f"exec {sys.executable} -c '{code}'"
    assert subprocess.run(["sh", "-c", f"{shell} 2>&-"], timeout=60).returncode == 0
    closed = subprocess.run(
        ["sh", "-c", f"{shell} <&-"], timeout=60, stderr=subprocess.PIPE
    )
    assert closed.returncode == 1
    assert b"Bad file descriptor" in closed.stderr


def test_importing_it_loads_nothing_heavy():
    done = run(
        """
import sys
before = set(sys.modules)
import pveplug.log
pveplug.log.own_stdio()
loaded = set(sys.modules) - before
assert loaded <= {"pveplug", "pveplug.log", "fcntl", "__future__"}, loaded
"""
    )
    assert done.returncode == 0, done.stderr


def test_last_words_are_one_abort_packet():
    fd_read, fd_write = os.pipe()
    log.last_words(fd_write, "cannot import\nx: password=abc " + "y" * 3000)
    got = os.read(fd_read, 10_000)
    os.close(fd_read)
    assert got[:1] == b"A"
    assert int(got[1:7]) == len(got) - 8
    assert got[8:].startswith(b"cannot import x: password=*** yyy")
    assert got.endswith(b"\n")
    log.last_words(fd_write, "nobody reads this")
    os.close(fd_write)


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        (
            "Authorization: PVEAPIToken=a@pve!b=0123-4567 x",
            "Authorization: PVEAPIToken=a@pve!b=*** x",
        ),
        ("password=abc vmid=100", "password=*** vmid=100"),
        ("pve_password='a b' x", "pve_password=*** x"),
        ('token_secret="a\\"b" x', "token_secret=*** x"),
        ('{"password": "abc", "n": 1}', '{"password": ***, "n": 1}'),
        ("Cookie: PVEAuthCookie=PVE:r@pam:65AB::sig==;", "Cookie: PVEAuthCookie=***;"),
        ("CSRFPreventionToken: 65AB12CD:xyz", "CSRFPreventionToken: ***"),
        ("got PVE:root@pam:65AB12CD::AbC+/=", "got PVE:root@pam:***"),
        ("secret_file=/etc/x is unreadable", "secret_file=/etc/x is unreadable"),
        ("psk=abc&x=1", "psk=***&x=1"),
    ],
)
def test_what_looks_like_a_secret_is_hidden(text, clean):
    assert log.redact(text) == clean


def test_registered_secrets_are_hidden_everywhere_also_quoted_for_urls():
    log.register_secret("hunter2/+ä")
    log.register_secret("x")  # too short to look for
    assert log.redact("a hunter2/+ä b hunter2%2F%2B%C3%A4 x") == "a *** b *** x"


def test_lines_carry_their_context(tmp_path):
    path = tmp_path / "log"
    handler = logging.FileHandler(path)
    log._install(handler, verbose=True, one_line=True)
    with log.context(vm=100, job="a b"), log.context(disk="scsi0"):
        logging.getLogger("pveplug.x").debug("opened export=%s", "e")
    logging.getLogger("pveplug.x").info("wrong %d", "args")
    try:
        raise ValueError("token=abc")
    except ValueError:
        logging.getLogger("pveplug.x").exception("failed")
    lines = path.read_text().splitlines()
    assert lines[0] == "DEBUG pveplug.x opened export=e vm=100 job='a b' disk=scsi0"
    assert lines[1] == "INFO pveplug.x wrong %d ('args',)"
    assert lines[2].startswith("ERROR pveplug.x failed | Traceback")
    assert lines[2].endswith("ValueError: token=***")
    assert len(lines) == 3


def test_the_command_line_logs_to_standard_error(capsys):
    log.setup_cli()
    logging.getLogger("pveplug.x").info("not shown")
    logging.getLogger("pveplug.x").warning("shown")
    assert capsys.readouterr() == ("", "WARNING pveplug.x shown\n")


def test_a_log_file_that_cannot_be_written_is_a_warning():
    code = """
from pveplug import log
fd_in, fd_out = log.own_stdio()
import os
os.write(fd_out, (log.setup_backend("/nonexistent/x.log") or "").encode())
"""
    out = run(code).stdout
    assert b"cannot write the log file /nonexistent/x.log: No such file" in out
    assert b"Remedy" in out


def test_a_service_says_each_line_with_its_priority_to_the_journal(tmp_path):
    script = (
        "import os, logging\n"
        "from pveplug import log\n"
        "status = os.fstat(2)\n"
        "os.environ['JOURNAL_STREAM'] = f'{status.st_dev}:{status.st_ino}'\n"
        "log.register_secret('hunter22')\n"
        "log.setup_service()\n"
        "with log.context(uuid='ab'):\n"
        "    logging.getLogger('x').warning('a\\nb token=%s', 'hunter22')\n"
        "del os.environ['JOURNAL_STREAM']\n"
        "log.setup_service()\n"
        "logging.getLogger('x').info('later')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    first, second = done.stderr.splitlines()
    assert first == "<4>WARNING x a | b token=*** uuid=ab"
    assert re.fullmatch(r"\d{4}-\d\d-\S+Z \[\d+\] INFO x later", second)
