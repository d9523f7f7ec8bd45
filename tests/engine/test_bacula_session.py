# SPDX-License-Identifier: Apache-2.0
"""Sessions over real pipes with a scripted plugin on the other end."""

from __future__ import annotations

import asyncio
import os
import random
import threading
from collections.abc import Awaitable, Callable

import pytest

from pveplug import log
from pveplug.bacula import BaculaSession, FileInfo, open_session
from pveplug.errors import LocalProtocolError, RemoteProtocolError, TransportError
from tests.support.scripted_shim import (
    BackupResult,
    RestoreResult,
    ShimJob,
    ShimPeer,
)

Engine = Callable[[BaculaSession], Awaitable[None]]
PLUGIN = "podheitor-proxmox: mode=backup vmid=100"
NAME = "/@proxmox/vm100/8-F/scsi0.qcow2"


class Pipes:
    """Two pipes: our ends go to the session, which closes them."""

    def __init__(self) -> None:
        self.fd_in, self.to_backend = os.pipe()
        self.from_backend, self.fd_out = os.pipe()

    def peer(self, **options) -> ShimPeer:
        return ShimPeer(self.to_backend, self.from_backend, **options)


async def led_by(engine: Engine, peer: ShimPeer, pipes: Pipes, run: str, *args):
    """Run an engine against a script; returns (result, the engine's error)."""

    async def backend() -> Exception | None:
        try:
            async with await open_session(pipes.fd_in, pipes.fd_out) as session:
                await engine(session)
        except (TransportError, RemoteProtocolError, LocalProtocolError) as error:
            return error
        return None

    script = asyncio.to_thread(getattr(peer, run), *args)
    async with asyncio.timeout(60):
        result, error = await asyncio.gather(script, backend())
    # One way to end: no task, no thread, no descriptor is left behind.
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert not [t for t in threading.enumerate() if t.name == "ptcomm-writer"]
    for fd in (pipes.fd_in, pipes.fd_out):
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
    return result, error


async def backup(engine: Engine, job=None, status="T", **options):
    pipes = Pipes()
    peer = pipes.peer(**options)
    result, error = await led_by(
        engine, peer, pipes, "run_backup", job or ShimJob(), PLUGIN, status
    )
    assert isinstance(result, BackupResult)
    return result, error, peer


async def restore(engine: Engine, objects=(), files=(), job=None, **options):
    pipes = Pipes()
    peer = pipes.peer(**options)
    job = job or ShimJob(type="R", level="", where="/tmp/x")
    result, error = await led_by(
        engine, peer, pipes, "run_restore", job, PLUGIN, objects, files
    )
    assert isinstance(result, RestoreResult)
    return result, error, peer


async def small_backup(session: BaculaSession) -> None:
    await session.accept_params()
    await session.restore_object("manifest", b"m" * 3000)
    await session.plugin_config("options", 'OptPrompt="x"\nvmid=@PINT32@\n')
    info = FileInfo(NAME, 1 << 20, mtime=1795380140)
    async with session.file(info, offsets=session.offsets) as out:
        await out.write(0, b"head")
        session.info("half way")
        await out.write(4, bytearray(b"x" * 300_000), memoryview(b"tail"))
        await out.write((1 << 20) - 1, b"\x01")
    async with session.file(FileInfo("/@proxmox/empty", 0), offsets=False):
        pass
    await session.no_more_files()
    status = await session.job_status()
    session.info(f"status {status}")
    await session.confirm_status()
    if status == "T":
        await session.end()


async def small_restore(session: BaculaSession) -> None:
    await session.accept_params()
    async for found in session.restore_objects():
        session.info(f"object {found.name} {found.job_id} {found.type}")
    await session.objects_done()
    async for file in session.files():
        await file.accept()
        total = 0
        async for _, view in file.data():
            total += len(view)
        session.info(f"got {total}")
        await file.done()
    await session.finish_done()


# --- backup --------------------------------------------------------------------------


async def test_a_backup_arrives_with_offsets_and_messages_in_their_place():
    seen = []

    async def engine(session: BaculaSession) -> None:
        assert session.plugin == PLUGIN
        assert session.command == "BackupStart"
        seen.append(session.job)
        await small_backup(session)

    job = ShimJob(level="I", since=1795380000, prev_job="before", accurate=1)
    result, error, peer = await backup(engine, job)
    assert error is None
    assert seen[0].prev_job == "before"
    assert seen[0].accurate
    assert seen[0].interface == 23
    assert result.objects == [("manifest", b"m" * 3000)]
    assert result.plugin_configs[0][0] == "options"
    file = result.files[NAME]
    content = b"head" + b"x" * 300_000 + b"tail"
    assert file.content() == content.ljust((1 << 20) - 1, b"\0") + b"\x01"
    assert file.data_bytes == len(content) + 1
    assert file.attrs["TSTAMP"] == "1795380140 1795380140 1795380140"
    assert result.files["/@proxmox/empty"].complete
    assert result.messages == [("I", "half way"), ("I", "status T")]
    assert result.status_confirmed
    assert result.ended
    at = peer.log.index("< I half way")
    assert peer.log[at - 1 : at + 2] == ["< D 4", "< I half way", "< D 262144"]
    assert [line for line in peer.log if "OFFSET" in line] == [
        f"< C OFFSET:{(1 << 20) - 1}"
    ]
    assert peer.largest_data <= 256 * 1024


async def test_a_stock_plugin_gets_dense_data_and_no_status_is_awaited():
    async def engine(session: BaculaSession) -> None:
        assert session.plugin == 'podheitor-proxmox: vmid=100 name="a b"'
        with pytest.raises(LocalProtocolError, match="OFFSET"):
            async with session.file(FileInfo(NAME, 1)):
                pass
        await small_backup(session)

    job = ShimJob(params=("vmid=100", "name=a b"))
    result, error, peer = await backup(engine, job, words="")
    assert error is None
    assert result.ended
    assert result.files[NAME].data_bytes == 1 << 20
    assert result.files[NAME].content()[-1] == 1
    assert not any("OFFSET" in line or "JobStatus" in line for line in peer.log)


async def test_an_estimate_carries_no_data():
    async def engine(session: BaculaSession) -> None:
        assert await session.accept_params() == "EstimateStart"
        async with session.file(FileInfo(NAME, 5 << 30)):
            pass
        await session.no_more_files()
        await session.end()

    pipes = Pipes()
    result, error = await led_by(
        engine, pipes.peer(), pipes, "run_estimate", ShimJob(type="E"), PLUGIN
    )
    assert error is None
    assert result.ended
    assert result.files[NAME].size == 5 << 30


async def test_random_writes_come_back_whatever_their_sizes():
    rng = random.Random(7)
    size = 3 << 20
    truth = bytearray(size)

    async def engine(session: BaculaSession) -> None:
        await session.accept_params()
        slot = bytearray(600_000)
        async with session.file(FileInfo(NAME, size)) as out:
            at = 0
            while at < size:
                at += rng.choice((0, 0, 1, 512, 65536))
                length = min(rng.choice((1, 511, 65536, 65537, 400_000)), size - at)
                if length <= 0:
                    break
                # The slot is overwritten as soon as write() returns.
                slot[:length] = rng.randbytes(length)
                truth[at : at + length] = slot[:length]
                cut = rng.randrange(length + 1)
                view = memoryview(slot)
                await out.write(at, view[:cut], view[cut:length])
                at += length
        await session.no_more_files()
        await session.job_status()
        await session.confirm_status()
        await session.end()

    result, error, _ = await backup(engine)
    assert error is None
    assert result.files[NAME].content() == truth


async def test_an_abort_is_heard_and_everything_else_refused():
    async def engine(session: BaculaSession) -> None:
        await session.accept_params()
        async with session.file(FileInfo(NAME, 100)) as out:
            await out.write(0, b"x")
            await session.abort("cannot read\nthe disk")
            session.info("not heard any more")
            await session.abort("nor this")
            await out.write(1, b"x")

    result, error, _ = await backup(engine)
    assert result.aborted == "cannot read the disk"
    assert [letter for letter, _ in result.messages] == ["A"]
    assert not result.files[NAME].complete
    assert str(error) == "the session was aborted"


async def test_an_abort_without_a_word_still_aborts():
    async def engine(session: BaculaSession) -> None:
        await session.abort("\x1b\n\x00")

    result, _, _ = await backup(engine)
    assert result.aborted == "the backend gave no reason"


async def test_a_failure_at_the_commit_point_still_fails_the_job():
    async def engine(session: BaculaSession) -> None:
        await session.accept_params()
        await session.no_more_files()
        assert await session.job_status() == "T"
        await session.abort("the segment is lost")

    result, error, _ = await backup(engine)
    assert error is None
    assert result.aborted == "the segment is lost"
    assert not result.ended


async def test_a_failed_job_is_told_by_its_status():
    result, error, _ = await backup(small_backup, status="f")
    assert error is None
    assert result.messages[-1] == ("I", "status f")
    assert result.status_confirmed
    assert not result.ended


async def test_a_file_left_by_an_exception_is_never_finished():
    async def engine(session: BaculaSession) -> None:
        await session.accept_params()
        with pytest.raises(ZeroDivisionError):  # noqa: PT012  the block is the point
            async with session.file(FileInfo(NAME, 100)) as out:
                await out.write(0, b"x")
                raise ZeroDivisionError
        with pytest.raises(LocalProtocolError, match=r"only abort\(\) is possible"):
            await session.no_more_files()
        await session.abort("gave up")

    result, error, _ = await backup(engine)
    assert error is None
    assert result.aborted == "gave up"
    assert not result.files[NAME].complete


async def test_misuse_is_refused():
    async def engine(session: BaculaSession) -> None:
        with pytest.raises(LocalProtocolError, match="'params'"):
            await session.no_more_files()
        await session.accept_params()
        async with session.file(FileInfo(NAME, 100), offsets=False) as out:
            with pytest.raises(LocalProtocolError, match="beyond its end"):
                await out.write(99, b"xy")
            await out.write(10, b"x")
            with pytest.raises(LocalProtocolError, match="cannot go back"):
                await out.write(0, b"x")
            with pytest.raises(LocalProtocolError, match="a file is open"):
                await session.restore_object("x", b"")
            with pytest.raises(LocalProtocolError, match="belongs to"):
                await session.job_status()
        await session.no_more_files()
        await session.job_status()
        await session.confirm_status()
        await session.end()
        await session.end()

    result, error, _ = await backup(engine)
    assert error is None
    assert result.ended
    assert result.files[NAME].content() == bytes(10) + b"x" + bytes(89)


async def test_no_secret_reaches_the_job_log():
    async def engine(session: BaculaSession) -> None:
        log.register_secret("s3kr1t-value")
        session.error("token s3kr1t-value refused, password=abc")
        await session.abort("PVEAPIToken=a@pve!b=1234-5678 bad")

    result, _, _ = await backup(engine)
    assert result.said("Q") == ["token *** refused, password=***"]
    assert result.aborted == "PVEAPIToken=a@pve!b=*** bad"


async def test_messages_are_bounded_when_nobody_reads():
    pipes = Pipes()
    session_task = asyncio.create_task(open_session(pipes.fd_in, pipes.fd_out))
    peer = pipes.peer()

    def greet() -> None:
        peer.send("C", "Hello podheitor-proxmox 3")
        peer.send("C", "Job")
        for line in ShimJob().lines():
            peer.send("C", line)
        peer.send("F")
        peer.send("C", "Params")
        peer.send("F")

    await asyncio.to_thread(greet)
    session = await session_task
    for number in range(20_000):
        session.warning(f"{number} " + "x" * 1000)
    assert session._message_bytes <= 256 * 1024
    assert session._dropped > 0

    reading = asyncio.to_thread(_hear_until_abort, peer)
    heard, _ = await asyncio.gather(reading, session.abort("enough"))
    assert heard[-1] == ("A", "enough")
    assert heard[-2][1].endswith("messages were left out: bacula-fd did not read")
    await session.aclose()
    peer.close()


def _hear_until_abort(peer: ShimPeer) -> list[tuple[str, str]]:
    heard = []
    while not heard or heard[-1][0] != "A":
        letter, payload = peer._next()
        if letter not in "CF":
            heard.append((letter, payload.decode().rstrip("\n")))
    return heard


# --- the peer goes away --------------------------------------------------------------


@pytest.mark.parametrize("kind", ["backup", "restore"])
async def test_end_of_file_at_every_packet_boundary_leaves_nothing(kind):
    objects = [("manifest", 8, b"m" * 100)]
    files = [("/tmp/x" + NAME, 1 << 20, [(0, b"a" * 70_000), (1 << 19, b"b")])]

    async def run(**options):
        if kind == "backup":
            return await backup(small_backup, **options)
        return await restore(small_restore, objects, files, **options)

    whole, error, peer = await run()
    assert error is None
    assert whole.ended
    steps = len(peer.log)
    for stop in range(1, steps):
        count = iter(range(1, steps + 1))
        result, error, peer = await run(
            close_when=lambda _, count=count, stop=stop: next(count) == stop
        )
        assert result.closed, stop
        if peer.log[-2:] == ["> C END", "< F"]:
            assert error is None  # all was said, only the goodbye is missing
        elif peer.log[-1] != "> C END" or error is not None:
            # (Gone right after END, it may have our F in its pipe, or not.)
            assert isinstance(error, TransportError), (stop, peer.log[-1])
            assert str(error) == "bacula-fd closed the pipe"


async def test_a_vanished_peer_is_noticed_while_the_engine_is_busy():
    async def engine(session: BaculaSession) -> None:
        await session.accept_params()
        async with session.file(FileInfo(NAME, 100)) as out:
            await out.write(0, b"x")
            async with asyncio.timeout(10):
                await session.closed.wait()
            with pytest.raises(TransportError, match="bacula-fd closed the pipe"):
                await out.write(1, b"x")
            with pytest.raises(TransportError, match="bacula-fd closed the pipe"):
                await session.drain()
            session.info("to nobody")
            await session.abort("to nobody")

    result, error, _ = await backup(engine, close_when=lambda what: what == "< D 1")
    assert result.closed
    assert isinstance(error, LocalProtocolError | TransportError)


async def test_a_broken_output_pipe_is_a_transport_error():
    async def engine(session: BaculaSession) -> None:
        await session.accept_params()
        await session.accept_start()
        await opening
        os.close(pipes.from_backend)
        peer._from = -1
        async with session.file(FileInfo(NAME, 1 << 40)) as out:
            slot = bytearray(1 << 20)
            for number in range(10):
                await out.write(number << 20, slot)

    pipes = Pipes()
    # The other pipe stays open: only the write itself can tell.
    peer = pipes.peer()

    def script() -> None:
        peer._opening(ShimJob(), PLUGIN, "BackupStart")

    async def backend() -> None:
        async with await open_session(pipes.fd_in, pipes.fd_out) as session:
            try:
                await engine(session)
            finally:
                assert session.closed.is_set()

    opening = asyncio.create_task(asyncio.to_thread(script))
    with pytest.raises(TransportError, match="bacula-fd closed the pipe"):
        await backend()
    peer.close()


async def test_a_write_that_nobody_reads_can_be_cancelled_and_closed():
    pipes = Pipes()
    peer = pipes.peer()

    def script() -> None:
        peer._opening(ShimJob(), PLUGIN, "BackupStart")

    opening = asyncio.create_task(asyncio.to_thread(script))
    session = await open_session(pipes.fd_in, pipes.fd_out)
    await session.accept_params()
    with pytest.raises(TimeoutError):  # noqa: PT012  the block is the point
        async with asyncio.timeout(0.3), session.file(FileInfo(NAME, 1 << 40)) as out:
            for number in range(8):
                await out.write(number << 20, bytearray(1 << 20))
    await opening
    peer.close()
    async with asyncio.timeout(5):
        await session.aclose()
    assert not [t for t in threading.enumerate() if t.name == "ptcomm-writer"]


async def test_what_is_no_pipe_is_explained(tmp_path):
    (tmp_path / "file").touch()
    fd_in = os.open(tmp_path / "file", os.O_RDONLY)
    fd_out = os.open(tmp_path / "file", os.O_WRONLY)
    with pytest.raises(TransportError, match="started by bacula-fd's plugin"):
        await open_session(fd_in, fd_out)


async def test_a_stranger_is_a_protocol_error():
    pipes = Pipes()
    os.write(pipes.to_backend, b"GET / HTTP/1.1\r\n")
    with pytest.raises(RemoteProtocolError, match="one of CDEFT, got 'GET / HTTP"):
        await open_session(pipes.fd_in, pipes.fd_out)
    os.close(pipes.to_backend)
    os.close(pipes.from_backend)


# --- restore -------------------------------------------------------------------------


async def test_a_restore_gets_objects_files_and_offsets():
    got: dict[str, bytearray] = {}
    found = []

    async def engine(session: BaculaSession) -> None:
        assert await session.accept_params() == "RestoreStart"
        assert session.job.where == "/tmp/x"
        async for item in session.restore_objects():
            found.append((item.name, item.job_id, item.type, item.data))
        session.info("all objects are here")
        await session.objects_done()
        async for file in session.files():
            if file.name.endswith("skip"):
                await file.accept("SKIP")
                continue
            if file.name.endswith("core"):
                await file.accept("CORE")
                continue
            await file.accept()
            content = got.setdefault(file.name, bytearray(file.size))
            async for offset, view in file.data():
                content[offset : offset + len(view)] = view
            await file.done()
        session.info("finished")
        await session.finish_done()
        await session.end()

    objects = [("a", 5, b"x" * 200_000), ("b", 6, b""), ("RestoreOptions", 9, b"k", 28)]
    rng = random.Random(1)
    data = rng.randbytes(2_500_000)
    files = [
        ("/tmp/x/one", 4 << 20, [(100, data), (4_194_303, b"z")]),
        ("/tmp/x/skip", 10, []),
        ("/tmp/x/core", 10, []),
        ("/tmp/x/empty", 0, []),
    ]
    result, error, peer = await restore(engine, objects, files)
    assert error is None
    assert found == [
        ("a", 5, 25, b"x" * 200_000),
        ("b", 6, 25, b""),
        ("RestoreOptions", 9, 28, b"k"),
    ]
    expected = bytearray(4 << 20)
    expected[100 : 100 + len(data)] = data
    expected[4_194_303:] = b"z"
    assert got == {"/tmp/x/one": expected, "/tmp/x/empty": bytearray()}
    assert result.answers == {
        "/tmp/x/one": "OK",
        "/tmp/x/skip": "SKIP",
        "/tmp/x/core": "CORE",
        "/tmp/x/empty": "OK",
    }
    assert result.objects_accepted == 3
    assert result.finished
    assert result.ended
    assert peer.log.index("< I all objects are here") > peer.log.index("> C OBJECTSEND")


async def test_a_file_can_be_refused_while_its_data_still_comes():
    async def engine(session: BaculaSession) -> None:
        await session.accept_params()
        await session.objects_done()
        async for file in session.files():
            await file.accept()
            if file.name == "/bad":
                async for _, _ in file.data():
                    await file.fail("disk full")
                    break
                continue
            async for _, _ in file.data():
                pass
            await file.done()
        await session.finish_done()

    files = [("/bad", 8 << 20, [(0, bytes(8 << 20))]), ("/good", 3, [(0, b"abc")])]
    result, error, _ = await restore(engine, [("x", 1, b"y")], files)
    assert error is None
    assert result.answers == {"/bad": "E", "/good": "OK"}
    assert result.messages == [("E", "disk full")]
    assert result.finished


async def test_a_backend_that_stops_reading_but_speaks_is_heard():
    async def engine(session: BaculaSession) -> None:
        await session.accept_params()
        await session.objects_done()
        async for file in session.files():
            await file.accept()
            async for _, _ in file.data():
                for number in range(3000):  # 3 MB, more than the pipe holds
                    session.info(f"{number} " + "x" * 60)
                await session.drain()
                break
            await session.abort("no more")
            return

    files = [("/big", 8 << 20, [(0, bytes(8 << 20))])]
    result, error, _ = await restore(engine, (), files)
    assert result.aborted == "no more"
    assert error is None


async def test_slow_restore_memory_is_bounded():
    peak = 0

    async def engine(session: BaculaSession) -> None:
        nonlocal peak
        await session.accept_params()
        await session.objects_done()
        async for file in session.files():
            await file.accept()
            total = 0
            async for offset, view in file.data():
                assert offset == total
                total += len(view)
                buffer = session._pipe._connection._buffer
                peak = max(peak, buffer.capacity)
                await asyncio.sleep(0)
            assert total == 32 << 20
            await file.done()
        await session.finish_done()

    block = bytes(1 << 20)
    files = [("/big", 32 << 20, [(n << 20, block) for n in range(32)])]
    result, error, _ = await restore(engine, (), files)
    assert error is None
    assert result.ended
    assert peak <= 1088 << 10


async def test_slow_reading_bounds_what_waits():
    peak = 0

    async def engine(session: BaculaSession) -> None:
        nonlocal peak
        await session.accept_params()
        writer = session._pipe.writer
        async with session.file(FileInfo(NAME, 1 << 40)) as out:
            for number in range(400):
                await out.write(number * 200_000, bytes(60_000))
                peak = max(peak, writer._queued - writer._written)
        await session.no_more_files()
        await session.job_status()
        await session.confirm_status()
        await session.end()

    result, error, _ = await backup(engine, read_delay_s=0.001, keep_data=False)
    assert error is None
    assert result.files[NAME].data_bytes == 400 * 60_000
    assert peak <= (2 << 20) + (64 << 10)
