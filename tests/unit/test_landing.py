# SPDX-License-Identifier: Apache-2.0
"""A landing's files: what is refused, what is taken back, who excludes whom."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import shutil

import pytest

from pveplug.errors import IntegrityError, LocalProtocolError
from pveplug.ir import landing as landing_module
from pveplug.ir.bell import Listener, Ringer
from pveplug.ir.device import LandingDevice
from pveplug.ir.landing import TAG, Landing, LandingError
from pveplug.ir.locks import Locks, Place
from pveplug.ir.presence import HEAD, Mark
from pveplug.ir.sink import SLOT, LandingSink
from pveplug.proto.nbd_wire import STATE_HOLE, STATE_ZERO
from tests.support.landings import BITS, UNIT, check, content, read

SIZE = 9 * UNIT + 100
KEY = "scsi0"


@pytest.fixture
def places(tmp_path):
    return tmp_path / "data", tmp_path / "live", KEY


@pytest.fixture
def landing(places):
    with Landing.create(*places, SIZE, cluster_bits=BITS) as made:
        yield made


@pytest.fixture
def disk():
    return bytes(content(SIZE, 3))


def marks(landing):
    return list(landing.marks[HEAD:])


def reopened(places):
    return Landing.open(*places)


# -- the files ------------------------------------------------------------------------


def test_what_was_written_is_marked_and_found_again(landing, places, disk):
    assert landing.write(0, disk[: 2 * UNIT]) == 2 * UNIT
    assert landing.zero(4 * UNIT, 2 * UNIT) == 2 * UNIT
    assert landing.write(9 * UNIT, disk[9 * UNIT :]) == 100
    with reopened(places) as again:
        assert marks(again) == marks(landing)
        assert again.owed_bytes == SIZE - 4 * UNIT - 100
        assert asyncio.run(check(again, disk[: 4 * UNIT].ljust(SIZE - 100, b"\0")
                                 + disk[9 * UNIT :])) == again.owed_bytes  # fmt: skip


def test_what_is_there_already_is_final(landing, disk):
    landing.write(UNIT, b"a" * UNIT)
    landing.zero(3 * UNIT, UNIT)
    assert landing.write(0, b"b" * 5 * UNIT) == 3 * UNIT
    assert landing.zero(0, 6 * UNIT) == UNIT
    landing.put(0, b"c" * SIZE)
    landing.put_zeroes(0, SIZE)
    runs = [(at // UNIT, kind) for at, _, kind in landing.kinds(0, 7 * UNIT)]
    assert runs == [
        *((0, Mark.DATA), (3, Mark.ZERO), (4, Mark.DATA), (5, Mark.ZERO)),
        (6, Mark.OWED),
    ]
    with LandingDevice(landing) as device:
        data = asyncio.run(read(device, 0, 6 * UNIT))
    parts = [(b"b", 1), (b"a", 1), (b"b", 1), (b"\0", 1), (b"b", 1), (b"\0", 1)]
    assert data == b"".join(byte * UNIT * n for byte, n in parts)


def test_a_cluster_that_is_all_zero_is_not_written(landing):
    landing.write(0, bytes(3 * UNIT) + bytes(UNIT - 1) + b"\1")
    assert marks(landing)[:4] == [Mark.ZERO, Mark.ZERO, Mark.ZERO, Mark.DATA]
    assert os.lseek(landing.fd, 0, os.SEEK_DATA) == 3 * UNIT


@pytest.mark.parametrize(
    ("offset", "length"), [(1, UNIT), (0, UNIT + 1), (9 * UNIT, 99), (8 * UNIT, 9000)]
)
def test_only_whole_clusters_can_be_marked(landing, offset, length):
    for act in (landing.zero, lambda at, count: landing.write(at, bytes(count))):
        with pytest.raises(LocalProtocolError):
            act(offset, length)
    assert landing.owed_bytes == SIZE


def test_a_landing_that_exists_is_not_made_again(landing, places):
    with pytest.raises(IntegrityError, match=r"exists\. Remedy"):
        Landing.create(*places, SIZE)
    assert Landing.exists(places[0], KEY)


def test_what_a_killed_create_left_is_no_landing(places):
    places[0].mkdir()
    (places[0] / f"{KEY}.data").write_bytes(b"old" * 1000)
    assert not Landing.exists(places[0], KEY)
    with Landing.create(*places, SIZE, cluster_bits=BITS) as landing:
        assert os.pread(landing.fd, SIZE, 0) == bytes(SIZE)


def test_nothing_is_left_of_a_removed_landing(landing, places):
    landing.remove()
    assert [*places[0].iterdir(), *places[1].iterdir()] == []
    with pytest.raises(IntegrityError, match="no landing of scsi0"):
        reopened(places)


def test_a_name_that_leads_elsewhere_is_refused(tmp_path):
    for key in ("", "../x", ".hidden", "a/b"):
        with pytest.raises(LocalProtocolError, match="can't name a landing"):
            Landing.create(tmp_path, tmp_path, key, SIZE)


def refused(places, *words):
    with pytest.raises(IntegrityError) as caught:
        reopened(places)
    text = str(caught.value)
    for word in (*words, "Remedy: "):
        assert word in text, text
    assert "\n" not in text


def test_a_durable_map_that_differs_in_any_byte_is_refused(landing, places, disk):
    landing.write(0, disk)
    landing.checkpoint()
    path = landing.files.map
    good = path.read_bytes()
    rng = random.Random(1)
    for at in range(len(good)):
        bad = bytearray(good)
        bad[at] ^= 1 << rng.randrange(8)
        path.write_bytes(bad)
        refused(places, str(path))
    for length in range(len(good)):
        path.write_bytes(good[:length])
        refused(places, str(path))
    path.write_bytes(good + b"\0")
    refused(places, str(path))
    path.write_bytes(good)
    reopened(places).close()


def test_a_live_map_that_makes_no_sense_is_refused(landing, places, disk):
    landing.write(0, disk)
    path = landing.files.live
    good = path.read_bytes()
    for bad in (
        *(b"", good[:-1], good + b"\1", good[:HEAD], b"x" + good[1:]),
        good[:8] + b"\2" + good[9:],
        good[:-3] + b"\3" + good[-2:],
    ):
        path.write_bytes(bad)
        refused(places, str(path), "damaged or not ours")
    path.unlink()
    with reopened(places) as again:
        assert again.owed_bytes == SIZE  # nothing of it was durable


@pytest.mark.parametrize("part", ["boot", "instance"])
def test_a_live_map_of_another_boot_or_landing_counts_for_nothing(
    landing, places, disk, part
):
    landing.write(0, disk[: 2 * UNIT])
    landing.checkpoint()
    landing.write(2 * UNIT, disk[2 * UNIT :])
    path = landing.files.live
    bad = bytearray(path.read_bytes())
    bad[{"instance": 24, "boot": 40}[part]] ^= 1
    path.write_bytes(bad)
    with reopened(places) as again:
        assert again.owed_bytes == SIZE - 2 * UNIT


def test_another_data_file_is_refused(landing, places):
    data = landing.files.data
    kept = data.with_suffix(".kept")
    data.rename(kept)
    refused(places, str(data), "is gone")
    data.write_bytes(bytes(SIZE))
    refused(places, str(data), TAG)
    data.write_bytes(bytes(SIZE - 1))
    refused(places, str(data), f"instead of {SIZE}")
    data.unlink()
    shutil.copy2(kept, data)  # with its attributes: a copy is as good
    reopened(places).close()


def test_something_else_in_the_place_of_the_bell_is_refused(landing, places):
    landing.files.bell.unlink()
    landing.files.bell.write_bytes(b"")
    refused(places, str(landing.files.bell), "not a FIFO")


def test_a_mark_that_is_none_is_never_data(landing):
    landing.marks[HEAD + 2] = 7
    with pytest.raises(IntegrityError, match="marks that are none"):
        list(landing.kinds(0, SIZE))
    with pytest.raises(IntegrityError, match="marks that are none"):
        landing.checkpoint()
    with LandingDevice(landing) as device:
        with pytest.raises(IntegrityError, match="marks that are none"):
            device.read(2 * UNIT, UNIT)
        assert list(device.block_status(2 * UNIT, UNIT)) == [(UNIT, 0)]


def test_what_is_new_is_counted_to_the_byte(landing):
    landing.zero(8 * UNIT, UNIT)
    assert landing.zero_all([(0, UNIT), (7 * UNIT, SIZE - 7 * UNIT)]) == 2 * UNIT + 100
    assert landing.owed_bytes == 6 * UNIT
    assert landing.zero(0, SIZE) == 6 * UNIT
    assert landing.complete


# -- what goes wrong ------------------------------------------------------------------


def failing(number, monkeypatch, name):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, name, fail)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_what_could_not_be_written_is_not_marked(landing, disk, monkeypatch, number):
    with monkeypatch.context() as patch:
        failing(number, patch, "pwrite")
        with pytest.raises(LandingError, match=r"Remedy: ") as caught:
            landing.write(0, disk)
    full = number != errno.EIO
    assert caught.value.errno == (errno.ENOSPC if full else errno.EIO)
    assert ("no space left" in str(caught.value)) is full
    assert str(landing.files.data) in str(caught.value)
    assert landing.owed_bytes == SIZE
    landing.write(0, disk)
    assert landing.complete


def test_marks_go_when_the_disk_has_lost_their_bytes(
    landing, places, disk, monkeypatch
):
    """A failed sync leaves pages clean whose bytes may be on no disk."""
    landing.write(0, disk[: 2 * UNIT])
    assert landing.checkpoint()
    assert not landing.checkpoint()
    landing.write(2 * UNIT, disk[2 * UNIT :])
    with reopened(places) as keeper, LandingDevice(keeper) as device:

        async def work():
            assert device.ready(0, SIZE) is None  # and before it is read, it goes
            with monkeypatch.context() as patch:
                failing(errno.EIO, patch, "fdatasync")
                with pytest.raises(LandingError):
                    landing.checkpoint()
            assert landing.owed_bytes == keeper.owed_bytes == SIZE - 2 * UNIT
            late = asyncio.ensure_future(device.read(UNIT, 3 * UNIT))
            await asyncio.sleep(0)
            assert device.waiting == 1
            landing.write(0, disk)
            assert b"".join(map(bytes, await late)) == disk[UNIT : 4 * UNIT]

        asyncio.run(work(), debug=True)
    assert landing.checkpoint()


def test_a_map_that_could_not_be_replaced_stays_as_it_was(landing, disk, monkeypatch):
    landing.write(0, disk[:UNIT])
    landing.checkpoint()
    good = landing.files.map.read_bytes()
    landing.write(UNIT, disk[UNIT:])
    with monkeypatch.context() as patch:
        failing(errno.ENOSPC, patch, "fsync")
        with pytest.raises(LandingError, match="no space left"):
            landing.checkpoint()
    assert landing.files.map.read_bytes() == good
    assert sorted(p.name for p in landing.files.folder.iterdir()) == [
        *(f"{KEY}.data", f"{KEY}.map")
    ]
    assert landing.checkpoint()


def test_who_writes_to_a_map_that_was_removed_is_told(landing, places, disk):
    landing.files.live.unlink()
    with pytest.raises(LandingError, match="removed or replaced") as caught:
        landing.write(0, disk)
    assert caught.value.errno == errno.ESTALE
    with reopened(places) as again:
        again.write(0, disk)
        with pytest.raises(LandingError, match="removed or replaced"):
            landing.zero(0, SIZE)


def test_holes_are_made_by_writing_where_they_cannot_be_punched(
    landing, disk, monkeypatch
):
    def refuse(*_):
        landing_module.ctypes.set_errno(errno.EOPNOTSUPP)
        return -1

    monkeypatch.setattr(landing_module, "_fallocate", refuse)
    landing.put(0, b"x" * SIZE)
    landing.clear_owed()
    assert os.pread(landing.fd, SIZE, 0) == bytes(SIZE)


def test_what_an_earlier_replay_left_is_zeroed_by_the_next(landing):
    async def work():
        async def die():
            async with LandingSink(landing, final=False) as sink:
                await sink.write(0, b"x" * SIZE)
                while os.pread(landing.fd, SIZE, 0) != b"x" * SIZE:
                    await asyncio.sleep(0.001)
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await die()
        assert landing.owed_bytes == SIZE
        async with LandingSink(landing, final=False) as sink:
            await sink.write(UNIT, b"y" * 10)
            await sink.finish()
        expected = bytes(UNIT) + b"y" * 10
        assert await check(landing, expected.ljust(SIZE, b"\0")) == 0
        assert marks(landing).count(Mark.DATA) == 1

    asyncio.run(work(), debug=True)


# -- who excludes whom ----------------------------------------------------------------


def test_a_replay_is_alone_and_others_share(landing, places):
    with reopened(places) as other:
        landing.begin_feeding(alone=False)
        other.begin_feeding(alone=False)
        other.end_feeding()
        with pytest.raises(LandingError, match="another job writes") as caught:
            other.begin_feeding(alone=True)
        assert caught.value.errno == errno.EBUSY
        landing.end_feeding()
        other.begin_feeding(alone=True)
        with pytest.raises(LandingError, match="another job writes"):
            landing.begin_feeding(alone=False)
    landing.begin_feeding(alone=True)  # closing lets go


def test_locks_belong_to_the_open_file_and_not_to_the_process(tmp_path):
    one, two = Locks(tmp_path / "lock"), Locks(tmp_path / "lock")
    with one.held(Place.MARKS):
        assert not two.take(Place.MARKS, alone=True)
        assert two.take(Place.DURABLE, alone=True)
        Locks(tmp_path / "lock").close()
        assert not two.take(Place.MARKS, alone=False)
    assert two.take(Place.MARKS, alone=True)
    one.close()
    two.close()


def test_a_reset_forgets_all_but_not_while_somebody_serves(landing, places, disk):
    landing.write(0, disk)
    landing.checkpoint()
    with LandingDevice(landing):
        with pytest.raises(LocalProtocolError, match="being served"):
            landing.reset()
    assert landing.complete
    landing.reset()
    assert landing.owed_bytes == SIZE
    assert os.pread(landing.fd, SIZE, 0) == bytes(SIZE)
    landing.files.live.unlink()
    with reopened(places) as again:
        assert again.owed_bytes == SIZE


# -- the doorbell ---------------------------------------------------------------------


def test_a_bell_rings_without_anybody_and_never_waits(landing):
    path = landing.files.bell
    ringer = Ringer(path)
    assert not ringer.ring()
    listener = Listener(path)
    assert all(ringer.ring() for _ in range(100_000))  # more than a FIFO holds
    listener.answer()
    with pytest.raises(BlockingIOError):
        os.read(listener.fd, 1)
    assert ringer.ring()
    listener.close()
    assert not ringer.ring()
    listener = Listener(path)  # another keeper
    assert ringer.ring()
    assert os.read(listener.fd, 9) == b"!"
    ringer.close()
    listener.close()


def test_a_bell_that_was_removed_is_silent(landing, disk):
    landing.files.bell.unlink()
    assert landing.write(0, disk) == SIZE
    assert not landing._ringer.heard()


# -- the sink -------------------------------------------------------------------------


def test_the_first_failure_is_raised_by_every_later_call(landing, disk, monkeypatch):
    async def work():
        sink = LandingSink(landing)

        async def feed():
            async with sink:
                await sink.write(0, disk)
                while sink._error is None:
                    await asyncio.sleep(0.001)
                calls = (sink.write(0, disk), sink.zero(0, 1), sink.finish())
                for call in (*calls, sink.finish()):
                    with pytest.raises(LandingError) as caught:
                        await call
                    assert caught.value is sink._error

        with monkeypatch.context() as patch:
            failing(errno.ENOSPC, patch, "pwrite")
            with pytest.raises(LandingError) as left:
                await feed()
        assert left.value is sink._error
        assert landing.owed_bytes == SIZE

    asyncio.run(work(), debug=True)


def test_a_failed_checkpoint_fails_the_sink(landing, disk, monkeypatch):
    async def work():
        async def feed():
            async with LandingSink(landing) as sink:
                await sink.write(0, disk)
                await sink.finish()

        with monkeypatch.context() as patch:
            failing(errno.EIO, patch, "fdatasync")
            with pytest.raises(LandingError):
                await feed()
        assert landing.owed_bytes == SIZE

    asyncio.run(work(), debug=True)


def test_a_sink_is_not_left_without_finish(landing):
    async def work():
        with pytest.raises(LocalProtocolError, match="without finish"):
            async with LandingSink(landing) as sink:
                await sink.write(0, b"x")
        with pytest.raises(LocalProtocolError, match="outside"):
            async with LandingSink(landing) as sink:
                await sink.write(SIZE, b"x")
        async with LandingSink(landing) as sink:
            await sink.finish()

    asyncio.run(work(), debug=True)


def test_whole_clusters_are_there_at_once_and_not_when_a_buffer_is_full(landing, disk):
    async def work():
        async with LandingSink(landing) as sink:
            await sink.write(0, disk[: 2 * UNIT + 10])
            while landing.owed_bytes != SIZE - 2 * UNIT:
                await asyncio.sleep(0.001)
            await sink.write(2 * UNIT + 10, disk[2 * UNIT + 10 : 3 * UNIT])
            while landing.owed_bytes != SIZE - 3 * UNIT:
                await asyncio.sleep(0.001)
            await sink.zero(3 * UNIT, UNIT)
            while landing.owed_bytes != SIZE - 4 * UNIT:
                await asyncio.sleep(0.001)
            await sink.finish()
        assert sink.landed == 4 * UNIT

    asyncio.run(work(), debug=True)


def test_a_cluster_of_data_and_zeroes_is_marked_when_it_is_whole(landing):
    async def work():
        async with LandingSink(landing) as sink:
            await sink.zero(UNIT - 50, 100)  # the tails of two
            await sink.write(UNIT - 100, b"x" * 50)
            await sink.finish()
            assert landing.owed_bytes == SIZE
            await sink.write(0, b"x" * (UNIT - 100))
            await sink.zero(UNIT + 50, UNIT - 50)
            await sink.finish()
        return b"x" * (UNIT - 50) + bytes(UNIT + 50)

    expected = asyncio.run(work(), debug=True)
    assert marks(landing)[:3] == [Mark.DATA, Mark.ZERO, Mark.OWED]
    assert asyncio.run(check(landing, expected.ljust(SIZE))) == SIZE - 2 * UNIT


def test_a_sink_holds_no_more_than_its_bound(places):
    size = 40 * SLOT
    gate = []

    async def work():
        with Landing.create(*places, size) as landing:
            genuine = landing.write
            landing.write = lambda *args: (
                [None for _ in iter(lambda: bool(gate), True)],
                genuine(*args),
            )[1]
            async with LandingSink(landing, in_flight_bytes=4 * SLOT) as sink:
                writing = asyncio.create_task(sink.write(0, b"x" * size))
                for _ in range(50):
                    await asyncio.sleep(0)
                assert not writing.done()
                assert sink._slots == 4
                gate.append(1)
                await writing
                await sink.finish()
            assert landing.complete

    asyncio.run(work())


def test_checkpoints_come_by_time_and_by_bytes(landing, monkeypatch):
    made = []
    genuine = landing.checkpoint
    monkeypatch.setattr(landing, "checkpoint", lambda: (made.append(1), genuine())[1])
    now = [0.0]

    async def step(sink, number):
        before = landing.owed_bytes
        await sink.write(number * UNIT, b"x" * UNIT)
        while landing.owed_bytes == before or sink._jobs or sink._checkpoint:
            await asyncio.sleep(0.001)

    async def work():
        options = {"clock": lambda: now[0], "checkpoint_bytes": 3 * UNIT}
        async with LandingSink(landing, **options) as sink:
            await step(sink, 0)
            assert len(made) == 0
            now[0] = 5.0
            await step(sink, 1)
            assert len(made) == 1
            for number in range(2, 5):
                assert len(made) == 1
                await step(sink, number)
            assert len(made) == 2
            await sink.finish()
            assert len(made) == 3

    asyncio.run(work(), debug=True)


def test_cancelled_in_mid_write_nothing_goes_on_behind_our_back(landing, disk):
    async def work():
        async def feed():
            async with LandingSink(landing, in_flight_bytes=1) as sink:
                while True:
                    await sink.write(0, disk)
                    await asyncio.sleep(0)

        task = asyncio.create_task(feed())
        while not landing.complete:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        landing.begin_feeding(alone=True)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(work(), debug=True)


# -- the device -----------------------------------------------------------------------


def test_what_is_owed_is_never_told_as_zeroes(landing, disk):
    landing.write(0, b"x" * UNIT)
    landing.zero(UNIT, 2 * UNIT)
    landing.zero(5 * UNIT, UNIT)
    hole = STATE_HOLE | STATE_ZERO
    with LandingDevice(landing) as device:
        assert list(device.block_status(0, SIZE)) == [
            *((UNIT, 0), (2 * UNIT, hole), (2 * UNIT, 0), (UNIT, hole)),
            (SIZE - 6 * UNIT, 0),
        ]
        assert list(device.block_status(UNIT + 1, UNIT)) == [(UNIT, hole)]


def test_a_closed_device_has_cancelled_those_who_wait(landing):
    async def work():
        with LandingDevice(landing) as device:
            waiting = device.ready(0, SIZE)
        assert waiting.cancelled()
        await asyncio.sleep(0)
        assert device.waiting == 0

    asyncio.run(work(), debug=True)
