# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: PT012  # what a context manager raises at its end is the subject here
"""A running QEMU's own export, its dirty bitmap, and qemu-nbd as we run it."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import signal
import subprocess
import sys

import pytest

from pveplug.errors import CommandError, ConfigError, NbdError, TransportError
from pveplug.extents import Extent, Kind, clipped, coalesced, tiles
from pveplug.nbd import source
from pveplug.nbd.client import UnixAddress, connect
from pveplug.nbd.qemu_nbd import qemu_nbd
from pveplug.nbd.sink import NbdSink
from pveplug.nbd.source import OrderedReader, extents
from pveplug.node import Node
from tests.support.bare_qemu import BareQemu, make_image

pytestmark = pytest.mark.integration

KiB, MiB = 1024, 1024 * 1024
SIZE = 64 * MiB
ALLOCATION = "base:allocation"
DIRTY = "qemu:dirty-bitmap:ph-t"
NODE = Node(
    qemu_nbd=os.environ.get("QEMU_NBD") or shutil.which("qemu-nbd") or "qemu-nbd"
)


def nbdinfo(path, export, context):
    argv = ["nbdinfo", f"--map={context}", "--json"]
    uri = f"nbd+unix:///{export}?socket={path}"
    told = subprocess.run([*argv, uri], check=True, capture_output=True, timeout=60)
    return json.loads(told.stdout)


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
async def test_a_dirty_bitmap_of_a_running_qemu_becomes_clean_data_and_zero(
    tmp_path, fmt, monkeypatch
):
    disk = make_image(tmp_path / "disk", fmt, SIZE)
    with BareQemu(tmp_path, "blockdev", {"scsi0": disk}) as vm:
        vm.io("scsi0", "write -P 1 0 2M")
        nodes = vm.command("query-named-block-nodes", flat=True)
        name = next(n["node-name"] for n in nodes if n["drv"] == fmt)
        vm.command("block-dirty-bitmap-add", node=name, name="ph-t")
        vm.io("scsi0", "write -P 2 1M 64k")
        vm.io("scsi0", "write -P 3 10M 192k")
        vm.io("scsi0", "write -z -u 1536k 128k")
        vm.io("scsi0", "write -P 4 63M 1M")
        vm.command("block-dirty-bitmap-disable", node=name, name="ph-t")
        path = str(tmp_path / "nbd.sock")
        address = {"type": "unix", "data": {"path": path}}
        vm.command("nbd-server-start", addr=address)
        vm.command(
            "block-export-add",
            **{"id": "x", "type": "nbd", "node-name": name, "name": "scsi0"},
            bitmaps=["ph-t"],
        )
        contexts = [ALLOCATION, DIRTY]
        async with await connect(
            UnixAddress(path), "scsi0", contexts=contexts
        ) as client:
            assert set(client.contexts) == set(contexts)
            assert client.structured
            whole = [e async for e in extents(client)]
            told = [e async for e in extents(client, dirty="ph-t", window=7 * MiB)]
            assert tiles(whole, SIZE)
            assert tiles(told, SIZE)
            # The allocation of a dirty run by itself, or that of all it lies in.
            version = vm.command("query-version")["qemu"]
            newer = (version["major"], version["minor"]) >= (8, 2)
            assert client.can_choose_context == newer
            monkeypatch.setattr(source, "SPARSE", 0)
            assert [e async for e in extents(client, dirty="ph-t")] == told
            assert told == list(
                coalesced(
                    e
                    for run in bitmap_runs(nbdinfo(path, "scsi0", DIRTY))
                    for e in (
                        [run]
                        if run.kind is Kind.CLEAN
                        else clipped(whole, run.offset, run.end)
                    )
                )
            )
            data = [(e.offset, e.length) for e in told if e.kind is Kind.DATA]
            assert (10 * MiB, 192 * KiB) in data
            seen = {}
            async for slot in OrderedReader(client).read(data):
                seen[slot.offset] = bytes(slot.view[:1])
            assert seen == {
                MiB: b"\2",
                10 * MiB: b"\3",
                63 * MiB: b"\4",
                63 * MiB + 512 * KiB: b"\4",
            }
            with pytest.raises(NbdError, match="no context"):
                async for _ in extents(client, dirty="ph-other"):
                    pass


def bitmap_runs(entries):
    for entry in entries:
        kind = Kind.DATA if entry["type"] & 1 else Kind.CLEAN
        yield Extent(entry["offset"], entry["length"], kind)


@pytest.fixture
def raw(tmp_path):
    path = tmp_path / "with, comma.raw"
    with path.open("wb") as file:
        file.truncate(SIZE)
    return path


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def served_by(socket_dir):
    """Pids of the qemu-nbd processes whose socket lies in ``socket_dir``."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/cmdline", "rb") as file:
                    if str(socket_dir).encode() in file.read():
                        found.append(int(entry))
            except OSError:
                continue
    return found


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
async def test_a_sparse_restore_stays_sparse(tmp_path, fmt):
    image = tmp_path / f"disk.{fmt}"
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", fmt, str(image), str(SIZE)], check=True
    )
    data = random.Random(1).randbytes(MiB)
    run = tmp_path / "run"
    async with qemu_nbd(
        NODE, str(image), fmt, socket_dir=str(run), read_only=False, export="d"
    ) as address:
        assert run.stat().st_mode & 0o777 == 0o700
        async with await connect(address, "d") as client, NbdSink(client) as sink:
            await sink.write(8 * MiB, data)
            await sink.zero(0, 8 * MiB)
            await sink.write(16 * MiB, bytes(8 * MiB))
            await sink.finish()
        (pid,) = served_by(run)
    assert not alive(pid)
    assert list(run.iterdir()) == []
    assert image.stat().st_blocks * 512 < 2 * MiB
    out = tmp_path / "flat"
    convert = ["qemu-img", "convert", "-f", fmt, "-O", "raw", str(image), str(out)]
    subprocess.run(convert, check=True)
    expected = bytearray(SIZE)
    expected[8 * MiB : 9 * MiB] = data
    assert out.read_bytes() == expected


async def test_a_size_limit_serves_the_beginning_of_a_larger_volume(tmp_path, raw):
    run = str(tmp_path / "run")
    async with qemu_nbd(
        NODE, str(raw), "raw", socket_dir=run, read_only=False, size=540672
    ) as address:
        async with await connect(address) as client:
            assert client.size == 540672
            await client.write(540672 - 512, b"e" * 512)
            await client.flush()
    assert raw.stat().st_size == SIZE
    with raw.open("rb") as file:
        file.seek(540672 - 512)
        assert file.read(1024) == b"e" * 512 + bytes(512)
    with pytest.raises(ConfigError, match="not for qcow2"):
        async with qemu_nbd(
            NODE, str(raw), "qcow2", socket_dir=run, read_only=True, size=512
        ):
            pass


async def test_a_bad_image_fails_with_qemu_nbds_own_words(tmp_path, raw):
    with pytest.raises(CommandError, match="not in qcow2 format"):
        async with qemu_nbd(
            NODE, str(raw), "qcow2", socket_dir=str(tmp_path / "run"), read_only=True
        ):
            pass
    with pytest.raises(CommandError, match="No such file"):
        async with qemu_nbd(
            NODE,
            str(tmp_path / "none"),
            "raw",
            socket_dir=str(tmp_path / "run"),
            read_only=True,
        ):
            pass
    assert served_by(tmp_path / "run") == []


async def test_a_program_that_isnt_there_is_a_configuration_error(tmp_path, raw):
    with pytest.raises(ConfigError, match="install qemu-utils"):
        async with qemu_nbd(
            Node(qemu_nbd="/nowhere/qemu-nbd"),
            str(raw),
            "raw",
            socket_dir=str(tmp_path / "run"),
            read_only=True,
        ):
            pass


async def test_a_cancelled_job_leaves_no_qemu_nbd(tmp_path, raw):
    run = tmp_path / "run"
    served = asyncio.Event()

    async def job():
        async with qemu_nbd(NODE, str(raw), "raw", socket_dir=str(run), read_only=True):
            served.set()
            await asyncio.sleep(60)

    task = asyncio.create_task(job())
    await served.wait()
    (pid,) = served_by(run)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not alive(pid)
    starting = asyncio.create_task(job())
    await asyncio.sleep(0.005)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert served_by(run) == []


async def test_a_killed_qemu_nbd_is_told_apart_from_a_lost_connection(tmp_path, raw):
    run = tmp_path / "run"
    with pytest.raises(CommandError, match="status -9") as caught:
        async with qemu_nbd(
            NODE, str(raw), "raw", socket_dir=str(run), read_only=True
        ) as address:
            async with await connect(address) as client:
                (pid,) = served_by(run)
                os.kill(pid, signal.SIGKILL)
                while True:
                    await client.read(0, MiB)
    assert isinstance(caught.value.__cause__, TransportError)


async def test_qemu_nbd_does_not_begin_when_its_parent_is_dead_already(tmp_path, raw):
    """The parent dies before PR_SET_PDEATHSIG is in force: nobody would be told."""
    began = tmp_path / "began"
    server = tmp_path / "qemu-nbd"
    server.write_text(f"#!/bin/sh\necho $$ >{began}.new\nmv {began}.new {began}\n")
    late = tmp_path / "bin" / "setpriv"
    late.parent.mkdir()
    late.write_text(
        f"#!/bin/sh\necho $$ >{tmp_path / 'pid'}\nkill -9 $PPID\nsleep 0.3\n"
        f'exec {shutil.which("setpriv")} "$@"\n'
    )
    server.chmod(0o755)
    late.chmod(0o755)
    code = (
        "import asyncio, sys\n"
        "from pveplug.nbd.qemu_nbd import qemu_nbd\n"
        "from pveplug.node import Node\n"
        "async def main():\n"
        "    async with qemu_nbd(Node(qemu_nbd=sys.argv[2]), sys.argv[1], 'raw',\n"
        "                        socket_dir=sys.argv[3], read_only=False):\n"
        "        pass\n"
        "asyncio.run(main())\n"
    )
    child = subprocess.run(
        [sys.executable, "-c", code, raw, server, tmp_path / "run"],
        env={**os.environ, "PATH": f"{late.parent}:{os.environ['PATH']}"},
        timeout=60,
        check=False,
    )
    assert child.returncode == -signal.SIGKILL
    async with asyncio.timeout(30):
        while alive(int((tmp_path / "pid").read_text())):
            await asyncio.sleep(0.05)
    assert not began.exists(), "it would serve the image for ever"


async def test_qemu_nbd_dies_with_a_killed_parent(tmp_path, raw):
    run = tmp_path / "run"
    code = f"""
import asyncio, sys
from pveplug.nbd.qemu_nbd import qemu_nbd
from pveplug.node import Node
async def main():
    async with qemu_nbd(Node(qemu_nbd={NODE.qemu_nbd!r}), {str(raw)!r}, "raw",
                        socket_dir={str(run)!r}, read_only=True):
        sys.stdout.write("up\\n"); sys.stdout.flush()
        await asyncio.sleep(60)
asyncio.run(main())
"""
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE
    )
    assert await child.stdout.readline() == b"up\n"
    pids = [pid for pid in served_by(run) if pid != child.pid]
    assert len(pids) == 1
    child.kill()
    await child.wait()
    async with asyncio.timeout(5):
        while alive(pids[0]):
            with open(f"/proc/{pids[0]}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    break  # ended; whoever adopted it hasn't looked yet
            await asyncio.sleep(0.02)
