# SPDX-License-Identifier: Apache-2.0
"""Our NBD client on strangers' servers, and strangers' clients on the same exports."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import json
import random
import subprocess
import time

import pytest
import uvloop

from pveplug.errors import NbdError, RemoteProtocolError
from pveplug.extents import Extent, Kind, coalesced, tiles
from pveplug.nbd.client import TcpAddress, UnixAddress, connect
from pveplug.nbd.sink import NbdSink
from pveplug.nbd.source import WINDOW, OrderedReader, extents
from tests.support.nbd_servers import (
    NBDKIT,
    free_port,
    nbdkit,
    qemu_nbd_server,
    running,
    storage_daemon,
)

pytestmark = pytest.mark.integration

KiB, MiB = 1024, 1024 * 1024
SIZE = 24 * MiB
ALLOCATION = "base:allocation"


@pytest.fixture(scope="module")
def content():
    """A disk with data, holes and zero-filled places, 64 KiB and smaller."""
    rng = random.Random(11)
    disk = bytearray(SIZE)
    for at in (0, 3 * MiB, 9 * MiB + 64 * KiB, SIZE - 64 * KiB):
        disk[at : at + 64 * KiB] = rng.randbytes(64 * KiB)
    disk[12 * MiB : 15 * MiB] = rng.randbytes(3 * MiB)
    disk[20 * MiB : 20 * MiB + 4096] = rng.randbytes(4096)
    return bytes(disk)


@pytest.fixture
def image(tmp_path, content):
    """fmt -> an image file with that content."""

    def make(fmt):
        raw = tmp_path / "disk.raw"
        with raw.open("wb") as file:
            file.truncate(SIZE)
            for at in range(0, SIZE, 4096):
                if any(content[at : at + 4096]):
                    file.seek(at)
                    file.write(content[at : at + 4096])
        if fmt == "raw":
            return raw
        other = tmp_path / f"disk.{fmt}"
        convert = ["qemu-img", "convert", "-q", "-f", "raw", "-O", fmt]
        subprocess.run([*convert, str(raw), str(other)], check=True)
        return other

    return make


@contextlib.contextmanager
def served(kind, tmp_path, image):
    """Name of a server -> (socket, export)."""
    with contextlib.ExitStack() as stack:
        match kind.split():
            case ["qemu-nbd", fmt]:
                server = qemu_nbd_server(tmp_path, image(fmt), fmt)
                yield stack.enter_context(server), ""
            case ["qemu-storage-daemon", fmt]:
                server = storage_daemon(tmp_path, image(fmt), fmt)
                yield stack.enter_context(server), "disk"
            case ["nbdkit", *options]:
                flags = [option for option in options if option.startswith("-")]
                settings = [option for option in options if option not in flags]
                plugin = ["file", str(image("raw")), *settings]
                yield stack.enter_context(nbdkit(tmp_path, *flags, *plugin)), ""


SERVERS = [
    "qemu-nbd raw",
    "qemu-nbd qcow2",
    "qemu-storage-daemon raw",
    "qemu-storage-daemon qcow2",
    "nbdkit",
    "nbdkit --no-sr",
    "nbdkit --mask-handshake=0",
    "nbdkit --filter=noextents",
    "nbdkit --filter=blocksize-policy blocksize-minimum=4096 blocksize-maximum=256K "
    "blocksize-preferred=4096 blocksize-error-policy=error",
]


def uri(path, export):
    return f"nbd+unix:///{export}?socket={path}"


def output(*argv):
    return subprocess.run(argv, check=True, capture_output=True, timeout=60).stdout


def read_whole(path, export, loop=asyncio, readers=1):
    """Extents and the disk's bytes, as our client sees them."""

    async def read():
        disk = bytearray(SIZE)
        address = UnixAddress(path)
        async with await connect(
            address, export, contexts=[ALLOCATION], readers=readers
        ) as client:
            assert client.size == SIZE
            assert client.connections == readers
            told = [extent async for extent in extents(client, window=5 * MiB)]
            runs = [(e.offset, e.length) for e in told if e.kind is Kind.DATA]
            async for slot in OrderedReader(client).read(runs):
                disk[slot.offset : slot.offset + slot.length] = slot.view
            return told, disk, client.structured

    return loop.run(read())


@pytest.mark.parametrize("readers", [2, 5])
@pytest.mark.parametrize("loop", [asyncio, uvloop])
@pytest.mark.parametrize("kind", [k for k in SERVERS if "mask" not in k])
def test_bytes_are_the_same_on_several_connections(
    kind, tmp_path, image, content, loop, readers
):
    with served(kind, tmp_path, image) as (path, export):
        assert read_whole(path, export, loop, readers)[1] == content


async def test_a_server_for_one_client_is_asked_for_one_connection(
    tmp_path, image, content
):
    server = qemu_nbd_server(tmp_path, image("raw"), "raw", "-e", "1")
    with server as path:
        for _ in range(3):  # each leaves room for the next
            async with await connect(UnixAddress(path), readers=2) as client:
                assert client.connections == 1
                assert await client.read(12 * MiB, MiB) == content[12 * MiB : 13 * MiB]


@pytest.mark.parametrize("kind", [k for k in SERVERS if "mask" not in k])
def test_extents_and_bytes_agree_with_nbdinfo_qemu_img_and_nbdcopy(
    kind, tmp_path, image, content
):
    with served(kind, tmp_path, image) as (path, export):
        told, disk, structured = read_whole(path, export)
        assert structured is ("--no-sr" not in kind)
        assert tiles(told, SIZE)
        assert disk == content
        theirs = output("nbdcopy", uri(path, export), "-")
        assert hashlib.sha256(theirs).digest() == hashlib.sha256(disk).digest()
        if structured:
            raw = json.loads(output("nbdinfo", "--map", "--json", uri(path, export)))
            mapped = (
                Extent(m["offset"], m["length"], kind_of(bool(m["type"] & 2)))
                for m in raw
            )
            assert list(coalesced(mapped)) == told
        options = f"driver=nbd,server.type=unix,server.path={path},export={export}"
        if "minimum" in kind:
            return  # qemu's client rounds its own way where a server cuts blocks
        raw = json.loads(
            output("qemu-img", "map", "--output=json", "--image-opts", options)
        )
        mapped = (Extent(m["start"], m["length"], kind_of(m["zero"])) for m in raw)
        assert list(coalesced(mapped)) == told


def kind_of(zero):
    return Kind.ZERO if zero else Kind.DATA


def test_uvloop_reads_the_same(tmp_path, image, content):
    with served("qemu-nbd qcow2", tmp_path, image) as (path, export):
        assert read_whole(path, export, uvloop)[1] == content


def test_a_server_without_the_fixed_newstyle_is_refused_by_name(tmp_path, image):
    with (
        served("nbdkit --mask-handshake=0", tmp_path, image) as (path, export),
        pytest.raises(RemoteProtocolError, match="fixed newstyle"),
    ):
        read_whole(path, export)


@pytest.mark.parametrize("loop", [asyncio, uvloop])
@pytest.mark.parametrize(
    "kind",
    [
        "qemu-nbd raw",
        "qemu-nbd qcow2",
        "qemu-storage-daemon qcow2",
        "nbdkit",
        "nbdkit --no-sr",
        "nbdkit --filter=nozero",
        "nbdkit --filter=fua fuamode=emulate",
        "nbdkit --filter=blocksize-policy blocksize-minimum=4096 "
        "blocksize-maximum=256K blocksize-preferred=4096 blocksize-error-policy=error",
    ],
)
def test_what_the_sink_writes_is_what_strangers_read(
    kind, loop, tmp_path, image, content
):
    rng = random.Random(5)
    expected = bytearray(content)

    async def write(address, export):
        async with await connect(address, export) as client, NbdSink(client) as sink:
            for _ in range(80):
                offset = rng.randrange(0, SIZE, 4096)
                length = min(rng.choice([4096, 65536, 1 << 20]), SIZE - offset)
                shape = rng.random()
                if shape < 0.3:
                    await sink.zero(offset, length)
                    expected[offset : offset + length] = bytes(length)
                else:
                    data = bytes(length) if shape < 0.5 else rng.randbytes(length)
                    await sink.write(offset, data)
                    expected[offset : offset + length] = data
            await sink.finish()

    with served(kind, tmp_path, image) as (path, export):
        loop.run(write(UnixAddress(path), export))
        assert output("nbdcopy", uri(path, export), "-") == bytes(expected)


async def test_an_unknown_export_is_named_with_the_servers_reason(tmp_path, image):
    with (
        served("qemu-storage-daemon raw", tmp_path, image) as (path, _),
        pytest.raises(NbdError, match="'nothing' refused: ERR_UNKNOWN"),
    ):
        await connect(UnixAddress(path), "nothing")


async def test_nbdkit_pattern_reads_at_64_bit_offsets(tmp_path):
    with nbdkit(tmp_path, "pattern", str(1 << 60)) as path:
        async with await connect(UnixAddress(path)) as client:
            assert client.size == 1 << 60
            at = (1 << 59) + 4096
            expected = b"".join(
                (at + i).to_bytes(8, "big") for i in range(0, 1 << 20, 8)
            )
            assert await client.read(at, 1 << 20) == expected
            assert client.read_only
            assert await client.read(at + 8 * 37, 8) == (at + 8 * 37).to_bytes(8, "big")


async def test_nbdkit_data_reads_what_it_was_told(tmp_path):
    with nbdkit(tmp_path, "data", "0x1 0x2 @65536 ( 0xff 0x00 )*8") as path:
        async with await connect(UnixAddress(path), contexts=[ALLOCATION]) as client:
            assert client.size == 65536 + 16
            assert await client.read(0, 3) == b"\1\2\0"
            assert await client.read(65536, 16) == b"\xff\0" * 8
            told = [e async for e in extents(client)]
            assert tiles(told, client.size)


async def test_a_disk_of_8_tib_is_scanned_in_windows(tmp_path, monkeypatch):
    size = 8 << 40
    with nbdkit(tmp_path, "memory", str(size)) as path:
        async with await connect(UnixAddress(path), contexts=[ALLOCATION]) as client:
            await client.write(5 << 40, b"x" * 4096)
            asked, ask = [], client.start_status
            monkeypatch.setattr(
                client, "start_status", lambda *what: asked.append(what) or ask(*what)
            )
            told = [e async for e in extents(client)]
            assert len(asked) <= size // WINDOW + 2  # nbdkit tells a window at a time
            assert tiles(told, size)
            (data,) = [e for e in told if e.kind is Kind.DATA]
            assert data.offset == 5 << 40


async def test_read_errors_surface_with_the_range(tmp_path):
    options = ["--filter=error", "memory", "8M", "error-pread=EIO"]
    with nbdkit(tmp_path, *options, "error-pread-rate=100%") as path:
        async with await connect(UnixAddress(path)) as client:
            with pytest.raises(NbdError, match="READ of 524288 bytes at 0: EIO"):
                async for _ in OrderedReader(client).read([(0, 8 * MiB)]):
                    pass
            assert client.size == 8 * MiB
            with pytest.raises(NbdError, match="EIO"):
                await client.read(4096, 4096)


@pytest.mark.parametrize("what", ["pwrite", "zero"])
async def test_write_errors_of_a_real_server_never_commit(tmp_path, what):
    options = ["--filter=error", "memory", "8M", f"error-{what}=ENOSPC"]
    with nbdkit(tmp_path, *options, f"error-{what}-rate=100%") as path:
        async with await connect(UnixAddress(path)) as client:
            sink = NbdSink(client)
            with pytest.raises(NbdError) as caught:  # noqa: PT012
                await sink.write(0, b"x" * 65536)
                await sink.zero(1 << 20, 1 << 20)
                await sink.finish()
            assert caught.value.errno == errno.ENOSPC
            with pytest.raises(NbdError):
                await sink.finish()


@pytest.mark.alone
async def test_slow_requests_overtake_each_other_and_still_come_in_order(tmp_path):
    options = ["--filter=delay", "pattern", "8M", "delay-read=30ms"]
    with nbdkit(tmp_path, *options) as path:
        async with await connect(UnixAddress(path)) as client:
            began = time.monotonic()
            offsets = [
                slot.offset
                async for slot in OrderedReader(client).read([(0, client.size)])
            ]
            assert offsets == list(range(0, 8 * MiB, 512 * KiB))
            # Sixteen requests one after the other would take 480 ms.
            assert time.monotonic() - began < 0.4


async def test_trim_flush_and_fua_reach_the_server(tmp_path):
    with nbdkit(tmp_path, "memory", "1M") as path:
        async with await connect(UnixAddress(path), contexts=[ALLOCATION]) as client:
            await client.write(0, b"x" * 65536, fua=True)
            await client.trim(0, 65536)
            await client.flush()
            status = await client.block_status(0, 65536)
            assert status[ALLOCATION][0][1] == 3
            await client.write_zeroes(0, 65536, may_punch=False)
            assert await client.read(
                0,
                16,
            ) == bytes(16)


async def test_tcp_works_like_unix(tmp_path):
    port = free_port()
    argv = [NBDKIT, "-f", "-i", "127.0.0.1", "-p", str(port), "pattern", "1M"]
    with running(argv, port):
        async with await connect(TcpAddress("127.0.0.1", port)) as client:
            assert await client.read(8, 8) == (8).to_bytes(8, "big")
