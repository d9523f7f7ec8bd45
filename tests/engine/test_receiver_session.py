# SPDX-License-Identifier: Apache-2.0
"""The receiver's session: every message in every state, and every way it can end."""

from __future__ import annotations

import asyncio
import errno

import pytest

from pveplug.dr.receiver import CYCLE as UNFINISHED
from pveplug.dr.receiver import (
    NEXT,
    At,
    Receiver,
    RefusedError,
    Session,
    follow,
    refusal,
)
from pveplug.errors import (
    CommandError,
    ConfigError,
    IntegrityError,
    PveError,
    RemoteProtocolError,
    TransportError,
)
from pveplug.proto import dr_frames as f
from pveplug.proto.pve_refusal import PveRefusalError, Reason
from tests.support.dr_fakes import (
    CYCLE,
    DESCRIBE,
    EVERY,
    OPEN,
    FakePeer,
    FakeReplica,
    FakeServices,
)

LEGAL = {
    At.OPENING: "Open Bye",
    At.OPENED: "Describe Command Bye",
    At.READY: "AskDigests Disk Commit Bye",
    At.DISK: "Block Zero AskDigests DiskEnd Bye",
    At.APPLIED: "AskDigests AskSamples Block Finish Bye",
    At.DONE: "Command Bye",
    At.BACK: "SendBack Command Bye",
    At.WINDOWS: "Digests SendBack Command Bye",
    At.ENDED: "",
}
"""Written down once more, by hand: the table is the product's."""
LEADING = {
    At.OPENING: (),
    At.OPENED: (OPEN,),
    At.READY: (OPEN, DESCRIBE),
    At.DISK: (OPEN, DESCRIBE, f.Disk(0, "scsi0", 1 << 20)),
    At.APPLIED: CYCLE[:-2],
    At.DONE: CYCLE[:-1],
    At.BACK: (OPEN, f.Command("failback")),
    At.WINDOWS: (OPEN, f.Command("failback"), f.SendBack(0, "scsi0", 1 << 20)),
}
"""What is said to get there."""


@pytest.mark.parametrize("at", At, ids=lambda at: at.value)
@pytest.mark.parametrize("kind", EVERY, ids=lambda kind: kind.__name__)
def test_every_message_in_every_state_is_legal_or_refused(at, kind):
    message = EVERY[kind]
    if kind.__name__ in LEGAL[at].split():
        to = follow(at, message)
        assert to is NEXT[at, kind]
    else:
        with pytest.raises(RemoteProtocolError, match=f"said {kind.__name__} while"):
            follow(at, message)


def test_a_granted_failback_has_a_state_of_its_own():
    assert follow(At.OPENED, f.Command("failback")) is At.BACK
    assert follow(At.WINDOWS, f.Command("failback-commit")) is At.OPENED


async def led(*said, services=None, **how) -> tuple[FakePeer, FakeServices]:
    peer, services = FakePeer(*said, **how), services or FakeServices()
    await Session(peer, services).run()
    assert services.opened == services.closed
    return peer, services


async def test_a_cycle_is_taken_in_the_order_of_its_frames():
    peer, services = await led(*CYCLE)
    assert peer.kinds() == ["State", "Ready", "Applied", "Done"]
    assert services.replica.calls == [
        *("begin", "disk", "take", "take", "disk_end", "commit", "finish"),
    ]


async def test_verification_and_repair_come_between_applied_and_done():
    ask = (f.AskSamples("scsi0", (0,)), f.AskDigests("scsi0", 0, 65536))
    peer, services = await led(
        *CYCLE[:-2], *ask, f.Block(0, 0, b"r" * 65536), f.Finish(True, 65536), f.Bye()
    )
    assert peer.kinds()[2:] == ["Applied", "Samples", "Digests", "Done"]
    assert services.replica.calls[-4:] == ["samples", "digests", "repair", "finish"]


async def test_what_is_durable_is_told_as_it_becomes_so():
    services = FakeServices()
    services.replica.durable = [f.Durable(0, 4096)]
    peer, _ = await led(*CYCLE, services=services)
    assert peer.kinds() == ["State", "Ready", *["Durable"] * 3, "Applied", "Done"]


async def test_lines_said_come_before_the_answer_they_explain():
    services = FakeServices()
    services.replica.lines = ["the VM is made", "scsi0 is allocated"]
    peer, _ = await led(*CYCLE, services=services)
    assert peer.kinds()[:4] == ["State", "Say", "Say", "Ready"]


@pytest.mark.parametrize("at", LEADING, ids=lambda at: at.value)
@pytest.mark.parametrize("how", ["cut", "eof", "bye", "nonsense", "cancel"])
async def test_any_end_in_any_state_abandons_what_is_unfinished(at, how):
    said = [*LEADING[at]]
    if how == "bye":
        said.append(f.Bye())
    if how == "nonsense":
        said.append(f.Refusal("busy", "it isn't the sender's word"))
    services = FakeServices()
    peer = FakePeer(*said, cut=how == "cut", wait=how == "cancel")
    if how == "cancel":
        task = asyncio.create_task(Session(peer, services).run())
        await peer.taken.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    else:
        await Session(peer, services).run()
    assert services.opened == services.closed == (at is not At.OPENING)
    abandoned = services.replica.calls.count("abandon")
    assert abandoned == (1 if at in UNFINISHED else 0)
    rejected = "reject" in services.replica.calls
    assert rejected == (how == "bye" and at is At.APPLIED), "only the sender can tell"
    refused = "Refusal" in peer.kinds()
    assert refused == (how == "nonsense")
    if at in (At.BACK, At.WINDOWS):
        assert services.back_.closed


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("begin", CYCLE),
        ("disk", CYCLE),
        ("take", CYCLE),
        ("disk_end", CYCLE),
        ("commit", CYCLE),
        ("finish", CYCLE),
        ("samples", (*CYCLE[:-2], f.AskSamples("scsi0", (0,)))),
        ("digests", (*CYCLE[:-2], f.AskDigests("scsi0", 0, 65536))),
        ("repair", (*CYCLE[:-2], f.Block(0, 0, b"r" * 512))),
    ],
)
async def test_a_failure_of_the_replica_is_told_and_abandons(method, said):
    services = FakeServices()
    services.replica.fails[method] = RefusedError("space", "no room; make some")
    peer, _ = await led(*said, services=services)
    assert peer.refusal == f.Refusal("space", "no room; make some")
    assert services.replica.calls[-2:] == [method, "abandon"]


async def test_a_failing_abandon_hides_nothing():
    services = FakeServices()
    services.replica.fails = {
        "take": IntegrityError("scsi0: a gap at 4096"),
        "abandon": OSError(errno.EIO, "Input/output error"),
    }
    peer, _ = await led(*CYCLE, services=services)
    assert peer.refusal.code == "integrity"


async def test_a_lost_done_is_no_reason_to_abandon():
    services = FakeServices()
    peer = FakePeer(*CYCLE[:-1])
    finish = services.replica.finish

    async def deafening(message):
        peer.deaf = True
        return await finish(message)

    services.replica.finish = deafening  # type: ignore[method-assign]
    await Session(peer, services).run()
    assert services.replica.calls[-1] == "finish"


async def test_a_cancellation_lets_the_acknowledgement_become_whole():
    services, peer = FakeServices(), FakePeer(*CYCLE[:-1], wait=True)
    begun, go_on = asyncio.Event(), asyncio.Event()
    finish = services.replica.finish

    async def slow(message):
        begun.set()
        await go_on.wait()
        return await finish(message)

    services.replica.finish = slow  # type: ignore[method-assign]
    task = asyncio.create_task(Session(peer, services).run())
    await begun.wait()
    task.cancel()
    await asyncio.sleep(0)
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert "finish" in services.replica.calls


async def test_a_replica_that_cannot_be_opened_is_refused_with_its_code():
    services = FakeServices()
    services.refuses = RefusedError(
        "epoch", "this source was failed over; run failback"
    )
    peer, _ = await led(*CYCLE, services=services)
    assert peer.told == [
        f.Refusal("epoch", "this source was failed over; run failback")
    ]


async def test_a_command_says_what_it_does_and_ends_with_its_result():
    peer, services = await led(OPEN, f.Command("failover-test"), f.Bye())
    assert peer.kinds() == ["State", "Say", "Result"]
    assert services.acted == [f.Command("failover-test")]


async def test_a_cycle_may_be_followed_by_a_command_in_one_session():
    peer, services = await led(*CYCLE[:-1], f.Command("failover-exec"), f.Bye())
    assert peer.kinds()[-3:] == ["Done", "Say", "Result"]
    assert services.opened == 1


async def test_a_command_that_fails_ends_the_session():
    services = FakeServices()
    services.fails = RefusedError("role", "the replica is active; run failback")
    peer, _ = await led(OPEN, f.Command("failover-exec"), DESCRIBE, services=services)
    assert peer.refusal.code == "role"
    assert "begin" not in services.replica.calls


@pytest.mark.parametrize(
    ("uuid", "mode"), [("", "status"), ("6b1f", "status"), ("6b1f", "failover-test")]
)
async def test_status_and_a_test_hold_no_replica(uuid, mode):
    opening = f.Open(mode, uuid, 0, "", "", "")
    peer, services = await led(opening, f.Command(mode), f.Bye())
    assert peer.kinds() == ["State", "Say", "Result"]
    assert services.opened == 0
    assert services.held == [False]


async def test_a_cycle_needs_a_session_that_holds_the_replica():
    peer, _ = await led(f.Open("status", "", 0, "", "", ""), DESCRIBE)
    assert peer.refusal.code == "protocol"


async def test_a_failback_answers_each_window_and_closes_its_disks():
    peer, services = await led(
        *LEADING[At.WINDOWS],
        f.Digests(0, 0, bytes(32)),
        f.SendBack(1, "scsi1", 1 << 20),
        f.Digests(1, 65536, bytes(16)),
        f.Command("failback-commit"),
        f.Bye(),
    )
    assert [k for k in peer.kinds() if k != "Say"] == [
        *("State", "Result", "Block", "Zero", "WindowEnd"),
        *("Block", "Zero", "WindowEnd", "Result"),
    ]
    assert f.WindowEnd(1, 2) in peer.told
    assert services.back_.closed
    assert [disk.key for disk in services.back_.disks] == ["scsi0", "scsi1"]


async def test_digests_of_another_disk_are_refused():
    peer, _ = await led(*LEADING[At.WINDOWS], f.Digests(1, 0, bytes(16)))
    assert peer.refusal.code == "protocol"


async def test_one_block_is_in_memory_while_the_disk_is_slow():
    services = FakeServices()
    services.replica.slow = asyncio.Event()
    blocks = [f.Block(0, at * 512, b"b" * 512) for at in range(50)]
    peer = FakePeer(*LEADING[At.DISK], *blocks)
    task = asyncio.create_task(Session(peer, services).run())
    for _ in range(100):
        await asyncio.sleep(0)
    assert len(peer.said) == 49
    services.replica.slow.set()
    await task
    assert services.replica.calls.count("take") == 50


# --- refusals


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (RefusedError("busy", "another session"), "busy", "another session"),
        (RefusedError("nonsense", "x"), "internal", "x"),
        (PveError("500 no"), "pve", "500 no"),
        (PveRefusalError("full", reason=Reason.NO_SPACE), "space", "full"),
        (TransportError("PVE does not answer"), "pve", "does not answer"),
        (CommandError(["qemu-nbd"], 1, "x"), "storage", "qemu-nbd ended"),
        (IntegrityError("scsi0: 3 frames of 4"), "integrity", "next cycle"),
        (ConfigError("no storage"), "configuration", "no storage"),
        (RemoteProtocolError("unknown frame"), "protocol", "same version"),
        (OSError(errno.ENOSPC, "No space left", "/s"), "space", "limits.stage_dir"),
        (OSError(errno.EIO, "I/O error", "/s"), "storage", "/s: I/O error"),
        (ValueError("x\ny"), "internal", "Please report it"),
    ],
)
def test_each_error_has_a_code_and_one_line(error, code, said):
    told = refusal(error)
    assert told.code == code
    assert said in told.text
    assert "\n" not in told.text


# --- many at once


async def test_one_sender_too_many_is_told_the_limit():
    services = FakeServices()
    receiver = Receiver(services, 2)
    peers = [FakePeer(OPEN, wait=True) for _ in range(2)]
    tasks = [asyncio.create_task(receiver.serve(peer)) for peer in peers]
    for peer in peers:
        await peer.taken.wait()
    assert receiver.sessions == 2
    late = FakePeer(OPEN)
    await receiver.serve(late)
    assert late.refusal.code == "busy"
    assert "limits.sessions" in late.refusal.text
    for peer in peers:
        peer.hang_up()
    await asyncio.gather(*tasks)
    assert receiver.sessions == 0


async def test_draining_ends_who_is_idle_and_waits_for_the_others():
    receiver = Receiver(FakeServices(), 4)
    idle, quick, slow = (
        FakePeer(*said, wait=True) for said in ((OPEN,), CYCLE[:4], CYCLE[:4])
    )
    tasks = [asyncio.create_task(receiver.serve(peer)) for peer in (idle, quick, slow)]
    for peer in (idle, quick, slow):
        await peer.taken.wait()
    asyncio.get_running_loop().call_later(0.01, quick.hang_up)
    assert await receiver.drain(0.2) == 1
    assert [task.done() for task in tasks] == [True, True, False]
    late = FakePeer(OPEN)
    await receiver.serve(late)
    assert "being stopped" in late.refusal.text
    await receiver.cancel()
    assert receiver.sessions == 0
    await asyncio.gather(*tasks, return_exceptions=True)


class CountingMeter:
    def __init__(self):
        self.got = []

    def session(self, change):
        self.got.append(("session", change))

    def refused(self, code):
        self.got.append(("refused", code))

    def received(self, uuid, count):
        self.got.append(("received", uuid, count))

    def mismatched(self, uuid, count):
        self.got.append(("mismatched", uuid, count))


async def test_what_happens_is_counted():
    meter = CountingMeter()
    replica = FakeReplica()
    replica.fails["finish"] = RefusedError("pve", "snapshot failed")
    said = (*CYCLE[:-2], f.Block(0, 0, b"r" * 512), f.Finish())
    await Session(FakePeer(*said), FakeServices(replica), meter).run()
    assert meter.got == [
        *(("session", 1), ("received", "6b1f", 4096), ("mismatched", "6b1f", 1)),
        *(("refused", "pve"), ("session", -1)),
    ]
