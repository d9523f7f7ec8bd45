# SPDX-License-Identifier: Apache-2.0
"""The product's side of each comparison: ``python -m bench.sides NAME …``.

It is the feature path (scan, zero test, frames), not a special one for benchmarks.
"""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import socket
import ssl
import subprocess
import sys
import time
from contextlib import aclosing
from pathlib import Path

import uvloop

from bench import paths
from bench.paths import Disk
from pveplug.diskstream import RateLimit, scan
from pveplug.dr.channel import Channel, ClientAuth, ServerAuth, serve
from pveplug.dr.channel import connect as connect_channel
from pveplug.extents import Kind
from pveplug.images.chain import Chain, decode_objects
from pveplug.nbd.client import UnixAddress, connect
from pveplug.nbd.source import OrderedReader, extents, is_zero
from pveplug.proto.dr_digest import RunDigest
from pveplug.proto.dr_frames import Block, Bye, DiskEnd, decode
from pveplug.restore_disk import DiskWriter
from pveplug.units import CLUSTER


async def read(socket: str, *dirty: str) -> None:
    """Read what a Full, or a job with a bitmap, would, zero test included."""
    address = UnixAddress(socket)
    contexts = ["base:allocation", *dirty]
    async with await connect(address, contexts=contexts) as client:
        if dirty:
            clusters = await scan(client, context=dirty[0], known=client.size)
            runs = ((run.offset, run.length) for run in clusters.data_runs())
        else:
            runs = iter(
                [
                    (extent.offset, extent.length)
                    async for extent in extents(client)
                    if extent.kind is Kind.DATA
                ]
            )
        async with aclosing(OrderedReader(client).read(runs)) as slots:  # type: ignore[type-var]
            async for slot in slots:
                for at in range(0, slot.length, CLUSTER):
                    is_zero(slot.buffer, at, min(CLUSTER, slot.length - at))


async def backup(*disks: str) -> None:
    """Back disks up into standard output; a disk is SOCKET or SOCKET,CONTEXT."""
    await paths.backup([_disk(number, text) for number, text in enumerate(disks)])


def _disk(number: int, text: str) -> Disk:
    at, _, context = text.partition(",")
    parent = "bench.2026-01-01_00.00.00_00" if context else None
    return Disk(at, f"scsi{number}", context or None, parent)


async def memory(*disks: str) -> None:
    """Do as ``backup`` does, then tell on stderr the most memory it took, in MiB."""
    await backup(*disks)
    status = Path("/proc/self/status").read_text()
    line = next(text for text in status.splitlines() if text.startswith("VmHWM:"))
    sys.stderr.write(f"{int(line.split()[1]) / 1024:.1f}\n")


async def disks(how: str, *sockets: str) -> None:
    """Read disks with all that a backup does to them, ``parallel`` or ``serial``."""
    found = [_disk(number, text) for number, text in enumerate(sockets)]
    async with paths.opened(found) as streams:
        if how == "serial":
            for one in streams:
                await paths.send(one, paths.Discard())
        else:
            async with asyncio.TaskGroup() as tasks:
                for one in streams:
                    tasks.create_task(paths.send(one, paths.Discard()))


async def scans(socket: str, context: str, times: str) -> None:
    """Scan a disk some times; print the seconds of each and how many extents it has."""
    address = UnixAddress(socket)
    async with await connect(address, contexts=["base:allocation", context]) as client:
        seconds = []
        for _ in range(int(times)):
            began = time.perf_counter()
            await scan(client, context=context, known=client.size)
            seconds.append(time.perf_counter() - began)
        count = 0
        async for _extent in extents(client, dirty=context):
            count += 1
    sys.stdout.write(json.dumps({"seconds": seconds, "extents": count}))


async def restore(objects: str, socket: str) -> None:
    """Write what comes on standard input, the images of a chain, to a volume."""
    records, problems = decode_objects(pickle.loads(Path(objects).read_bytes()))
    assert not problems
    chain = Chain(records)
    writer = DiskWriter("scsi0", chain=chain, zeroed=True, limit=RateLimit(0))
    await writer.open(UnixAddress(socket))
    bacula = paths.Delivery()
    for job in chain.jobs:
        entry = chain.disk(job, "scsi0")
        assert entry is not None
        size = paths.image_size(chain.record(job), entry)
        file = await bacula.image(f"{job}/scsi0.qcow2", size)
        await writer.receive(job, file, entry.digest_root, entry=entry)
        await file.done()
    await writer.finish()
    bacula.close()


async def dr_channel(image: str, cert: str, key: str) -> None:
    """Send a file as blocks to a receiver that checks and digests them."""
    server = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bench.sides", "dr-sink", cert, key),
        stdout=subprocess.PIPE,
    )
    assert server.stdout is not None
    port = int(await server.stdout.readline())
    auth = ClientAuth(token=b"t" * 64)
    async with await connect_channel("127.0.0.1", port, auth=auth) as channel:
        digest = RunDigest()
        with open(image, "rb") as file:  # noqa: ASYNC230 - from the page cache
            offset = 0
            while data := file.read(1 << 20):
                block = Block(0, offset, data)
                digest.add(block)
                await channel.send(block)
                offset += len(data)
        await channel.send(DiskEnd(0, digest.frames, digest.bytes, digest.hexdigest()))
        await channel.receive()
    await server.wait()


async def dr_sink(cert: str, key: str) -> None:
    """Take one session of :func:`dr_channel`."""
    over = asyncio.Event()

    async def take(channel: Channel) -> None:
        digest = RunDigest()
        while (raw := await channel.receive()) is not None:
            message = decode(raw.type, raw.payload)
            if isinstance(message, Block):
                digest.add(message)
            elif isinstance(message, DiskEnd):
                assert digest.hexdigest() == message.digest
                await channel.send(Bye())
                break
        over.set()

    auth = ServerAuth(cert_file=cert, key_file=key, token=b"t" * 64, ca_file=None)
    async with await serve("127.0.0.1", 0, auth=auth, handler=take) as server:
        sys.stdout.write(f"{server.address[1]}\n")
        sys.stdout.flush()
        await over.wait()


def tls_plain(image: str, cert: str, key: str) -> None:
    """The yardstick: a file over TLS 1.3 by blocking sockets, to whoever reads."""
    listener = socket.create_server(("127.0.0.1", 0))
    if os.fork() == 0:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_cert_chain(cert, key)
        taken, _ = listener.accept()
        with context.wrap_socket(taken, server_side=True) as stream:
            buffer = bytearray(1 << 20)
            while stream.recv_into(buffer):
                pass
        os._exit(0)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    plain = socket.create_connection(listener.getsockname())
    with context.wrap_socket(plain) as stream, open(image, "rb") as file:
        while data := file.read(1 << 20):
            stream.sendall(data)
    os.wait()


SIDES = {
    "read": read,
    "backup": backup,
    "memory": memory,
    "disks": disks,
    "scans": scans,
    "restore": restore,
    "dr-channel": dr_channel,
    "dr-sink": dr_sink,
}


def main() -> None:
    name, *arguments = sys.argv[1:]
    if name == "tls-plain":
        tls_plain(*arguments)
        return
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(SIDES[name](*arguments))


if __name__ == "__main__":
    main()
