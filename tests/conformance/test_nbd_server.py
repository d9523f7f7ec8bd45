# SPDX-License-Identifier: Apache-2.0
"""Strangers' clients on our NBD server: libnbd's, QEMU's of two ages, nbdkit's."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import struct
import subprocess
from pathlib import Path

import pytest
import uvloop

from pveplug.nbd.client import TcpAddress, UnixAddress
from pveplug.nbd.file_device import FileDevice
from pveplug.nbd.server import serve
from pveplug.proto import nbd_wire as wire
from pveplug.proto.nbd_wire import Command, CommandFlag, Option
from tests.support.nbd_devices import UNIT, KiB, MemoryDevice, MiB, pattern, until
from tests.support.nbd_servers import free_port
from tests.support.nbd_tls import Pki
from tests.support.requires import QEMU_7, program, requires, requires_file

pytestmark = [
    pytest.mark.integration,
    requires("nbdinfo", "nbdcopy", "qemu-img", "qemu-io", "qemu-nbd", "nbdkit"),
]
SIZE = 32 * MiB
OLD = QEMU_7 / "bin"


@pytest.fixture(params=["10", pytest.param("7.2", marks=requires_file(OLD))])
def qemu(request):
    """Where the QEMU tools of a release are: a function from name to path."""
    if request.param == "10":
        return lambda name: program(name) or name
    return lambda name: str(OLD / name)


@pytest.fixture
def run():
    return uvloop.run


@pytest.fixture
def address(tmp_path):
    return UnixAddress(str(tmp_path / "s"))


@pytest.fixture(scope="module")
def pki(tmp_path_factory):
    return Pki(tmp_path_factory.mktemp("pki"))


def uri(address, export="disk", scheme="nbd"):
    if isinstance(address, UnixAddress):
        return f"{scheme}+unix:///{export}?socket={address.path}"
    return f"{scheme}://{address.host}:{address.port}/{export}"


async def tool(*argv, status=0, stdin=None):
    """Run a program beside the server; return what it wrote."""
    process = await asyncio.create_subprocess_exec(
        *map(str, argv),
        stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(90):
            out, _ = await process.communicate(stdin)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == status, out.decode(errors="replace")
    return out


def expected_map(device):
    """The device's runs: [(offset, length, is it zero)]."""
    runs, at = [], 0
    for length, flags in device.block_status(0, device.size):
        runs.append((at, length, bool(flags)))
        at += length
    return runs


# -- libnbd -------------------------------------------------------------------


def test_nbdinfo_shows_the_export_and_its_map(run, address):
    async def body():
        device = MemoryDevice(pattern(SIZE + 512))
        async with serve({"disk": device, "other": device}, address):
            told = json.loads(await tool("nbdinfo", "--json", uri(address)))
            (export,) = told["exports"]
            assert told["protocol"] == "newstyle-fixed"
            assert told["structured"] is True
            assert export["export-size"] == device.size
            assert export["is_read_only"] is True
            assert export["can_multi_conn"] is True
            assert export["can_df"] is True
            assert export["contexts"] == ["base:allocation"]
            assert export["block_size_maximum"] == 32 * MiB
            listed = json.loads(await tool("nbdinfo", "--list", "--json", uri(address)))
            assert [e["export-name"] for e in listed["exports"]] == ["disk", "other"]
            mapped = json.loads(await tool("nbdinfo", "--map", "--json", uri(address)))
            found = [(e["offset"], e["length"], e["type"] == 3) for e in mapped]
            assert found == expected_map(device)

    run(body())


@pytest.mark.parametrize("connections", [1, 4])
def test_nbdcopy_copies_the_disk(run, address, tmp_path, connections):
    async def body():
        device = MemoryDevice(pattern(SIZE))
        async with serve({"disk": device}, address) as server:
            copy = tmp_path / "copy"
            argv = ["nbdcopy", "--connections", connections, "--requests=128"]
            await tool(*argv, uri(address), copy)
            assert copy.read_bytes() == device.disk
            await until(lambda: server.clients == 0)

    run(body())


def test_nbdcopy_copies_a_sparse_file_as_it_is(run, address, tmp_path):
    image, copy = tmp_path / "image", tmp_path / "copy"
    with image.open("wb") as file:
        file.truncate(SIZE)
        for at in (0, 5 * MiB, SIZE - MiB):
            file.seek(at)
            file.write(random.Random(at).randbytes(MiB))

    async def body():
        with FileDevice(str(image)) as device:
            async with serve({"disk": device}, address):
                await tool("nbdcopy", uri(address), copy)

    run(body())
    assert copy.read_bytes() == image.read_bytes()
    assert os.stat(copy).st_blocks <= os.stat(image).st_blocks


def test_nbdkits_nbd_plugin_passes_our_disk_on(run, address, tmp_path):
    async def body():
        device = MemoryDevice(pattern(SIZE))
        async with serve({"disk": device}, address):
            argv = ["nbdkit", "-U", "-", "--exit-with-parent", "nbd"]
            argv += [f"socket={address.path}", "export=disk", "shared=true"]
            copy = tmp_path / "copy"
            await tool(*argv, "--run", f"nbdcopy $uri {copy} && nbdinfo --map $uri")
            assert copy.read_bytes() == device.disk

    run(body())


# -- QEMU ---------------------------------------------------------------------


def test_qemu_img_maps_converts_and_compares(run, address, tmp_path, qemu):
    async def body():
        device = MemoryDevice(pattern(SIZE))
        raw = tmp_path / "raw"
        raw.write_bytes(device.disk)
        async with serve({"disk": device}, address):
            img = qemu("qemu-img")
            argv = [img, "map", "--output=json", "-f", "raw", uri(address)]
            found = json.loads(await tool(*argv))
            assert [
                (e["start"], e["length"], e["zero"]) for e in found
            ] == expected_map(device)
            copy = tmp_path / "copy.qcow2"
            argv = [img, "convert", "-m16", "-W", "-f", "raw", "-O", "qcow2"]
            await tool(*argv, uri(address), copy)
            argv = [img, "compare", "-f", "raw", "-F", "qcow2", uri(address), copy]
            assert b"identical" in await tool(*argv)
            with raw.open("r+b") as file:
                file.seek(next(i for i, zero in enumerate(device.zero) if zero) * UNIT)
                file.write(b"!")
            await tool(img, "compare", "-f", "raw", uri(address), raw, status=1)

    run(body())


def test_qemu_io_reads_any_range_and_may_not_write(run, address, qemu):
    async def body():
        disk = bytearray(SIZE)
        disk[MiB : 2 * MiB] = b"\x77" * MiB
        device = MemoryDevice(disk)
        commands = ["read -P 0 0 1M", "read -P 0x77 1M 1M", "read -P 0x77 1048577 511"]
        commands += ["read -P 0 2M 30M", f"read -P 0 {SIZE - 512} 512"]
        commands += ["aio_read -P 0x77 1M 64k"] * 20 + ["aio_flush"]
        argv = [qemu("qemu-io"), "-r", "-f", "raw"]
        for command in commands:
            argv += ["-c", command]
        async with serve({"disk": device}, address):
            said = await tool(*argv, uri(address))
            assert b"verification failed" not in said
            assert said.count(b"ops;") == 25
            argv = [qemu("qemu-io"), "-f", "raw", "-c", "write 0 512", uri(address)]
            assert b"Permission denied" in await tool(*argv, status=1)

    run(body())


def monitor(qemu, options, *commands):
    """The arguments of a QEMU without guest, and what its monitor is told."""
    argv = [qemu("qemu-system-x86_64"), "-machine", "none", "-nodefaults", "-S"]
    argv += ["-display", "none", "-monitor", "stdio"]
    argv += ["-blockdev", f"driver=nbd,node-name=disk,read-only=on,{options}"]
    return argv, "".join(f"{command}\n" for command in (*commands, "quit")).encode()


def test_a_qemu_has_our_disk_as_its_node_under_an_overlay(run, address, tmp_path, qemu):
    async def body():
        disk = bytearray(SIZE)
        disk[MiB : 2 * MiB] = b"\x77" * MiB
        overlay = tmp_path / "overlay.qcow2"
        server = f"server.type=unix,server.path={address.path},export=disk"
        async with serve({"disk": MemoryDevice(disk)}, address):
            argv = [qemu("qemu-img"), "create", "-q", "-f", "qcow2"]
            await tool(*argv, "-F", "raw", "-b", uri(address), overlay)
            argv, said = monitor(
                qemu,
                f"{server},reconnect-delay=60",
                'qemu-io over "write -P 0x11 1M 4k"',
                'qemu-io over "read -P 0x11 1M 4k"',
                'qemu-io over "read -P 0x77 1028k 1020k"',
                'qemu-io over "read -P 0 2M 30M"',
            )
            argv += ["-blockdev", f"driver=file,node-name=f,filename={overlay}"]
            argv += ["-blockdev", "driver=qcow2,node-name=over,file=f,backing=disk"]
            out = await tool(*argv, stdin=said)
            assert b"verification failed" not in out
            assert out.count(b"ops;") == 4, out

    run(body())


def test_a_guests_read_waits_for_its_data_while_others_are_answered(run, address, qemu):
    async def body():
        disk = bytes(MiB) + b"\x77" * (SIZE - MiB)
        device = MemoryDevice(disk, held=range(16, 32))  # the second MiB is owed
        argv = [qemu("qemu-io"), "-r", "-f", "raw"]
        for n in range(8):
            argv += ["-c", f"aio_read -P 0x77 {MiB + n * 128 * KiB} 128k"]
        for n in range(2, 32):
            argv += ["-c", f"aio_read -P 0x77 {n}M 64k"]
        argv += ["-c", "aio_flush"]
        async with serve({"disk": device}, address):
            work = asyncio.create_task(tool(*argv, uri(address)))
            # 16 requests are all that QEMU has open; eight of them wait.
            await until(lambda: device.waiting == 8 and device.reads == 30)
            assert not work.done()
            device.release()
            said = await work
            assert b"verification failed" not in said
            assert said.count(b"ops;") == 38

    run(body())


def test_a_waiting_guest_survives_the_server(run, address, qemu):
    """QEMU asks the next server again: closing tells it nothing it could pass on."""

    async def body():
        disk = b"\x77" * SIZE
        owing = MemoryDevice(disk, held=range(SIZE // UNIT))
        options = f"driver=nbd,server.type=unix,server.path={address.path}"
        options += ",export=disk,reconnect-delay=60"
        argv = [qemu("qemu-io"), "-r", "--image-opts", options]
        argv += ["-c", "read -P 0x77 3M 1M", "-c", "read -P 0x77 9M 1M"]
        async with serve({"disk": owing}, address):
            work = asyncio.create_task(tool(*argv))
            await until(lambda: owing.waiting == 1)
        await asyncio.sleep(0.2)
        assert not work.done()
        async with serve({"disk": MemoryDevice(disk)}, address):
            said = await work
        assert b"verification failed" not in said
        assert said.count(b"ops;") == 2

    run(body())


def test_qemu_nbd_passes_our_disk_on(run, address, tmp_path, qemu):
    async def body():
        device = MemoryDevice(pattern(SIZE))
        there = UnixAddress(str(tmp_path / "q"))
        async with serve({"disk": device}, address):
            argv = [qemu("qemu-nbd"), "-r", "-f", "raw", "-k", there.path, "-e", "4"]
            process = await asyncio.create_subprocess_exec(*argv, uri(address))
            await until(lambda: Path(there.path).exists())
            copy = tmp_path / "copy"
            await tool("nbdcopy", "--connections=4", uri(there, ""), copy)
            with contextlib.suppress(
                ProcessLookupError
            ):  # it ends with its last client
                process.terminate()
            await process.wait()
            assert copy.read_bytes() == device.disk

    run(body())


def test_everybody_at_once_under_load(run, address, tmp_path, qemu):
    """All clients together while a third of the disk arrives bit by bit."""

    async def body():
        disk = pattern(SIZE)
        device = MemoryDevice(disk, held=range(0, SIZE // UNIT, 3))
        raw = tmp_path / "raw"
        raw.write_bytes(disk)

        async def arrive():
            for unit in random.Random(3).sample(range(SIZE // UNIT), SIZE // UNIT):
                device.release([unit])
                await asyncio.sleep(0.001)

        img = qemu("qemu-img")
        async with serve({"disk": device}, address) as server:
            async with asyncio.TaskGroup() as work:
                for n in range(3):
                    argv = ["nbdcopy", f"--connections={n + 1}", uri(address)]
                    work.create_task(tool(*argv, tmp_path / f"copy{n}"))
                argv = [img, "convert", "-W", "-f", "raw", "-O", "raw", uri(address)]
                work.create_task(tool(*argv, tmp_path / "copy3"))
                work.create_task(tool(img, "compare", "-f", "raw", raw, uri(address)))
                work.create_task(tool("nbdinfo", "--map", uri(address)))
                work.create_task(arrive())
            await until(lambda: server.clients == 0)
        for n in range(4):
            assert (tmp_path / f"copy{n}").read_bytes() == disk

    run(body())


# -- the kernel's client, which can't run here --------------------------------


class Kernel:
    """Speaks as nbd-client and Linux's nbd.ko do, on one connection.

    nbd-client negotiates (no extended headers, no contexts); the kernel asks with a
    cookie of its own making, up to 128 at a time, and closes with DISC.
    """

    def __init__(self, structured):
        self.structured = structured

    async def negotiate(self, address):
        self.reader, self.writer = await asyncio.open_unix_connection(address.path)
        assert (await self.reader.readexactly(18))[:8] == b"NBDMAGIC"
        self.writer.write(wire.CLIENT_FLAGS.pack(3))
        if self.structured:
            self.writer.write(wire.option(Option.STRUCTURED_REPLY))
            await self.reader.readexactly(20)
        self.writer.write(wire.option(Option.GO, wire.named("disk") + b"\0\0"))
        flags = None
        while True:
            head = wire.OPTION_REPLY.unpack(await self.reader.readexactly(20))
            data = await self.reader.readexactly(head[3])
            if data[:2] == b"\0\0":
                _, self.size, flags = wire.INFO_EXPORT.unpack(data)
            if head[2] == wire.Reply.ACK:
                break
        assert flags & 0x103 == 0x103  # HAS_FLAGS, READ_ONLY, CAN_MULTI_CONN

    async def read_all(self, disk, places):
        asked, places = {}, list(places)
        tag = 0
        while asked or places:
            while places and len(asked) < 128:
                offset, length = places.pop()
                tag += 1
                cookie = tag << 32 | len(asked)
                asked[cookie] = offset, length
                head = (wire.REQUEST_MAGIC, 0, Command.READ, cookie, offset, length)
                self.writer.write(wire.REQUEST.pack(*head))
            cookie, got, done = await self.reply(asked)
            offset, length = asked[cookie]
            assert disk[offset : offset + len(got)] == got
            if done:
                del asked[cookie]
            else:
                asked[cookie] = offset + len(got), length - len(got)

    async def reply(self, asked):
        if not self.structured:
            magic, error, cookie = wire.SIMPLE_REPLY.unpack(
                await self.reader.readexactly(16)
            )
            assert (magic, error) == (wire.SIMPLE_REPLY_MAGIC, 0)
            return cookie, await self.reader.readexactly(asked[cookie][1]), True
        head = await self.reader.readexactly(20)
        magic, flags, kind, cookie, length = wire.STRUCTURED_REPLY.unpack(head)
        assert magic == wire.STRUCTURED_REPLY_MAGIC
        data = await self.reader.readexactly(length)
        if kind == wire.Chunk.OFFSET_HOLE:
            offset, length = wire.CHUNK_HOLE.unpack(data)
            data = bytes(length)
        else:
            assert kind == wire.Chunk.OFFSET_DATA
            (offset,), data = struct.unpack(">Q", data[:8]), data[8:]
        assert offset == asked[cookie][0]
        return cookie, data, bool(flags & 1)

    async def close(self):
        head = (wire.REQUEST_MAGIC, 0, Command.DISC, 0, 0, 0)
        self.writer.write(wire.REQUEST.pack(*head))
        assert await self.reader.read() == b""
        self.writer.close()


@pytest.mark.parametrize("structured", [False, True])
def test_the_kernels_requests_are_answered_on_four_connections(
    run, address, structured
):
    async def body():
        device = MemoryDevice(pattern(SIZE), held=range(0, 100, 7))
        rng = random.Random(7)
        async with serve({"disk": device}, address) as server:
            connections = [Kernel(structured) for _ in range(4)]
            async with asyncio.TaskGroup() as work:
                for kernel in connections:
                    await kernel.negotiate(address)
                    places = [
                        (
                            rng.randrange(SIZE // 4096 - 32) * 4096,
                            4096 << rng.randrange(6),
                        )
                        for _ in range(500)
                    ]
                    work.create_task(kernel.read_all(device.disk, places))
                # With 128 open per connection, some are always free to be answered.
                await asyncio.sleep(0.2)
                device.release()
            for kernel in connections:
                await kernel.close()
            await until(lambda: server.clients == 0)

    run(body())


def test_a_kernels_write_is_refused_and_reads_go_on(run, address):
    async def body():
        device = MemoryDevice(pattern(SIZE))
        async with serve({"disk": device}, address):
            kernel = Kernel(structured=False)
            await kernel.negotiate(address)
            fua = int(CommandFlag.FUA)
            head = (wire.REQUEST_MAGIC, fua, Command.WRITE, 5, 0, 4096)
            kernel.writer.write(wire.REQUEST.pack(*head) + bytes(4096))
            reply = wire.SIMPLE_REPLY.unpack(await kernel.reader.readexactly(16))
            assert reply == (wire.SIMPLE_REPLY_MAGIC, 1, 5)
            await kernel.read_all(device.disk, [(0, 4096)])
            await kernel.close()

    run(body())


# -- TLS ----------------------------------------------------------------------


def test_nbdcopy_and_nbdinfo_over_tls(run, pki, tmp_path):
    async def body():
        device = MemoryDevice(pattern(SIZE))
        address = TcpAddress("127.0.0.1", free_port())
        async with serve({"disk": device}, address, tls=pki.server()):
            url = uri(address, scheme="nbds")
            url += f"?tls-certificates={pki.folder}&tls-verify-peer=true"
            copy = tmp_path / "copy"
            await tool("nbdcopy", "--connections=2", url, copy)
            assert copy.read_bytes() == device.disk
            told = json.loads(await tool("nbdinfo", "--json", url))
            assert told["TLS"] is True
            await tool("nbdinfo", uri(address), status=1)

    run(body())


def test_qemu_img_over_tls(run, pki, tmp_path, qemu):
    async def body():
        device = MemoryDevice(pattern(SIZE))
        address = TcpAddress("127.0.0.1", free_port())
        raw = tmp_path / "raw"
        raw.write_bytes(device.disk)
        async with serve({"disk": device}, address, tls=pki.server()):
            server = f"server.type=inet,server.host={address.host}"
            server += f",server.port={address.port},export=disk"
            secret = f"tls-creds-x509,id=t,endpoint=client,dir={pki.folder}"
            argv = [qemu("qemu-img"), "compare", "--object", secret, "--image-opts"]
            argv += [f"driver=nbd,{server},tls-creds=t", f"driver=file,filename={raw}"]
            assert b"identical" in await tool(*argv)
            argv = [qemu("qemu-img"), "info", "--image-opts", f"driver=nbd,{server}"]
            assert b"TLS" in await tool(*argv, status=1)

    run(body())
