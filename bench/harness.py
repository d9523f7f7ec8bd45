# SPDX-License-Identifier: Apache-2.0
"""Measuring two programs side by side, fairly enough to believe the ratio.

Both are whole processes, run alternately in one run after a round that only warms up;
what is compared is the median. Of each side's whole process tree the CPU time and the
peak of resident memory are taken, and the spread is shown: where it is wide, the
machine was busy and the number says little.

What feeds a side's standard input or drains its standard output is the same ``cat``
for both and not counted as part of either; its time is: the pipe is what is measured.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Row:
    """One answer, as it stands in the JSON."""

    row: str
    name: str
    ratio: float
    at_least: float | None
    at_most: float | None
    ok: bool
    mb_s: float | None
    yardstick_mb_s: float | None
    cpu_s_per_gib: float | None
    rss_mib: float | None
    points: list[tuple[float, float]] | None = None
    """Of a growth row: what was varied, and the seconds (or MB/s) it gave."""


@dataclass
class Side:
    """What the rounds of one program gave."""

    seconds: list[float]
    cpu: list[float]
    rss_mib: float = 0.0

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> str:
        return f"{min(self.seconds):.2f}-{max(self.seconds):.2f} s"


Start = Callable[[], Sequence[str]]
"""Returns the command of one round."""


@dataclass(frozen=True)
class Plumbing:
    """What is at the ends of a command.

    Attributes:
        feed: files that ``cat`` sends into its standard input, in order.
        drain: its standard output is a pipe that ``cat`` reads and throws away.
    """

    feed: Sequence[Path] = ()
    drain: bool = False


NOTHING = Plumbing()


def compare(
    ours: Start,
    yardstick: Start,
    *,
    rounds: int = 5,
    between: Callable[[], None] = lambda: None,
    watch: Callable[[], Sequence[int]] = lambda: (),
    plumbing: tuple[Plumbing, Plumbing] = (NOTHING, NOTHING),
    fresh: int = 0,
) -> tuple[Side, Side]:
    """Run both alternately; return what they took, the warm-up left out.

    Args:
        between: called before each command, to put things back.
        watch: further processes (servers) whose CPU and memory belong to our side.
        plumbing: of ours and of the yardstick.
        fresh: bytes of files in memory that a command makes.
    """
    sides = Side([], []), Side([], [])
    for number in range(rounds + 1):
        for side, start, more, ends in zip(
            sides, (ours, yardstick), (watch, lambda: ()), plumbing, strict=True
        ):
            between()
            touch(fresh)
            seconds, cpu, rss = run(start(), more(), ends)
            if number:
                side.seconds.append(seconds)
                side.cpu.append(cpu)
                side.rss_mib = max(side.rss_mib, rss)
    return sides


def run(
    argv: Sequence[str], more: Sequence[int] = (), ends: Plumbing = NOTHING
) -> tuple[float, float, float]:
    """Run a command; return seconds, CPU seconds and peak MiB of its process tree."""
    before = sum(cpu_of(pid) for pid in more)
    began = time.perf_counter()
    source: Any = subprocess.DEVNULL
    target: Any = subprocess.DEVNULL
    helpers = []
    if ends.feed:
        feeder = subprocess.Popen(["cat", *map(str, ends.feed)], stdout=subprocess.PIPE)
        helpers.append(feeder)
        source = feeder.stdout
    if ends.drain:
        drain = subprocess.Popen(
            ["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
        )
        helpers.append(drain)
        target = drain.stdin
    process = subprocess.Popen(argv, stdin=source, stdout=target)
    for end in (source, target):
        if not isinstance(end, int):
            end.close()  # else a pipe never ends
    peak = Peak([process.pid, *more])
    try:
        _, status, usage = os.wait4(process.pid, 0)
        for helper in helpers:
            helper.wait()
        seconds = time.perf_counter() - began
    finally:
        peak.stop()
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(argv)} ended with {process.returncode}")
    cpu = usage.ru_utime + usage.ru_stime
    return seconds, cpu + sum(cpu_of(pid) for pid in more) - before, peak.mib


def touch(size: int) -> None:
    """Use so much memory on each processor, and give it back.

    A virtual machine may have given its free memory to its host, which takes three
    times the time of a write to get back: whoever runs next would pay that, or not.
    Each processor has free pages of its own, a gigabyte of them.
    """
    if not size:
        return
    hold, let_go = os.pipe()
    used, said = os.pipe()
    children = []
    for processor in os.sched_getaffinity(0):
        if not (child := os.fork()):
            os.close(let_go)
            os.sched_setaffinity(0, {processor})
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
            memory = mmap.mmap(-1, size, flags=flags)
            os.write(said, b"x")
            os.read(hold, 1)  # until all have theirs
            memory.close()
            os._exit(0)
        children.append(child)
    for _ in children:
        os.read(used, 1)
    os.close(let_go)
    for child in children:
        os.waitpid(child, 0)
    for end in (hold, used, said):
        os.close(end)


def told(argv: Sequence[str]) -> Any:
    """Run a command that measures itself; return the JSON it printed."""
    done = subprocess.run(argv, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


class Resident:
    """The peak memory of single processes, without those below them, in a block."""

    def __init__(self, pids: Callable[[], Iterable[int]]) -> None:
        self.mib: dict[int, float] = {}
        self._pids = pids
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Resident:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(0.02):
            for pid in self._pids():
                mib = _resident(pid) * os.sysconf("SC_PAGE_SIZE") / 2**20
                self.mib[pid] = max(self.mib.get(pid, 0.0), mib)


class Peak:
    """Looks every 20 ms at the memory of processes and all below them, until stopped.

    Args:
        below: only what is below them.
    """

    def __init__(self, roots: list[int], *, below: bool = False) -> None:
        self.mib = 0.0
        self._roots = roots
        self._left_out = set(roots) if below else set[int]()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._over.wait(0.02):
            pids = {pid for root in self._roots for pid in _tree(root)}
            pages = sum(map(_resident, pids - self._left_out))
            self.mib = max(self.mib, pages * os.sysconf("SC_PAGE_SIZE") / 2**20)

    def stop(self) -> None:
        self._over.set()
        self._thread.join()


def _tree(root: int) -> Iterator[int]:
    yield root
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{root}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield from _tree(int(child))


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0


def cpu_of(pid: int) -> float:
    """Return the CPU seconds of a process and of those it has waited for."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:15])) / TICKS


def better(pairs: Sequence[tuple[Side, Side]]) -> tuple[Side, Side]:
    """Choose of several comparisons the one whose yardstick is the fastest."""
    return min(pairs, key=lambda pair: pair[1].median)


def throughput(
    row: str,
    name: str,
    size: int,
    sides: tuple[Side, Side],
    *,
    at_least: float,
) -> Row:
    """Make and say a row where more is better; ``size`` in bytes."""
    ours, theirs = sides
    ratio = theirs.median / ours.median
    speeds = [size / 1e6 / side.median for side in sides]
    cpu, his_cpu = (statistics.median(side.cpu) * 2**30 / size for side in sides)
    say(
        f"{row:>12} {name}: {ratio:.2f} (at least {at_least}); ours "
        f"{speeds[0]:.0f} MB/s ({ours.spread}), {cpu:.2f} s CPU/GiB, "
        f"{ours.rss_mib:.0f} MiB; yardstick {speeds[1]:.0f} MB/s ({theirs.spread}), "
        f"{his_cpu:.2f} s CPU/GiB, {theirs.rss_mib:.0f} MiB"
    )
    return Row(
        *(row, name, round(ratio, 3), at_least, None, ratio >= at_least),
        *(round(speeds[0], 1), round(speeds[1], 1), round(cpu, 3)),
        round(ours.rss_mib, 1),
    )


def bounded(
    row: str,
    name: str,
    value: float,
    at_most: float,
    *,
    mb_s: float | None = None,
    yardstick_mb_s: float | None = None,
    cpu_s_per_gib: float | None = None,
    rss_mib: float | None = None,
    unit: str = "",
    points: list[tuple[float, float]] | None = None,
) -> Row:
    """Make and say a row where less is better."""
    say(f"{row:>12} {name}: {value:.3g}{unit} (at most {at_most}{unit})")
    return Row(
        *(row, name, round(value, 3), None, at_most, value <= at_most),
        *(_rounded(mb_s, 1), _rounded(yardstick_mb_s, 1)),
        *(_rounded(cpu_s_per_gib, 3), _rounded(rss_mib, 1), points),
    )


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def cpu_row(row: str, name: str, size: int, side: Side, at_most: float) -> Row:
    """Make and say the row of our own CPU seconds per GiB."""
    cpu = statistics.median(side.cpu) * 2**30 / size
    return bounded(row, name, cpu, at_most, cpu_s_per_gib=cpu, unit=" s/GiB")


_said: list[str] = []


def say(text: str) -> None:
    """Print a line, and keep it for what accompanies the JSON."""
    _said.append(text)
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def say_machine() -> None:
    """Print what the numbers were measured on."""
    say(f"$ ./dev bench {' '.join(sys.argv[1:])}")
    release = platform.release().partition("-")[0]
    say(
        f"{platform.system()} {release} {platform.machine()}, {os.cpu_count()} CPUs, "
        f"Python {platform.python_version()}"
    )
    for program in ("qemu-nbd", "nbdcopy", "nbdkit"):
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            said = subprocess.run(
                [program, "--version"], capture_output=True, text=True, check=True
            )
            say(said.stdout.splitlines()[0])
    load = os.getloadavg()[0]
    if load > 0.5:
        say(f"load {load:.1f}: this machine is busy, and the numbers say little")


def write_json(path: Path, rows: Sequence[Row]) -> None:
    """Write the rows as a list of objects; of the bounds each has its own.

    What was said, the machine and the spreads among it, goes beside it as text.
    """
    values: list[dict[str, Any]] = [
        {
            key: value
            for key, value in asdict(row).items()
            if value is not None or key not in ("at_least", "at_most", "points")
        }
        for row in rows
    ]
    path.write_text(json.dumps(values, indent=1) + "\n")
    path.with_suffix(".txt").write_text("\n".join(_said) + "\n")


@contextlib.contextmanager
def serving(argv: Sequence[str], path: Path) -> Iterator[int]:
    """Run an NBD server until the block ends; yields its pid."""
    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL)
    try:
        while not _listens(path):
            if process.poll() is not None:
                raise SystemExit(f"{argv[0]} did not start")
            time.sleep(0.01)
        yield process.pid
    finally:
        process.terminate()
        process.wait()
        path.unlink(missing_ok=True)


def _listens(path: Path) -> bool:
    """Whether somebody does; the file alone is there a moment earlier."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        # Whoever leaves without a word is complained of by some servers.
        client.sendall(b"\0\0\0\3IHAVEOPT\0\0\0\2\0\0\0\0")
        return client.recv(38, socket.MSG_WAITALL) != b""
    return False


@contextlib.contextmanager
def workspace(need: int) -> Iterator[Path]:
    """Make a directory for ``need`` bytes of images: in memory, else on a disk.

    A disk's page cache is as fast as long as it isn't written back meanwhile, which
    nobody promises; so it says where it is.
    """
    place = Path("/dev/shm")
    if shutil.disk_usage(place).free < need or _available() < need * 1.2:
        place = Path("/var/tmp")
        say(f"images in {place}: no memory for {need >> 20} MiB of them")
    with tempfile.TemporaryDirectory(prefix="bench-", dir=place) as directory:
        yield Path(directory)


def _available() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    line = next(text for text in lines if text.startswith("MemAvailable:"))
    return int(line.split()[1]) * 1024


def full_image(path: Path, size: int, *, compressible: bool = False) -> None:
    """Write a raw image without a hole."""
    piece = (b"pveplug!" * 8192 if compressible else os.urandom(1 << 16)) * 16
    with path.open("wb") as file:
        for number in range(size >> 20):
            file.write(number.to_bytes(8, "big") + piece[8:])
