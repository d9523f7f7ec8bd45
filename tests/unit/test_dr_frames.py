# SPDX-License-Identifier: Apache-2.0
"""Messages of replication: what is encoded is decoded, and nothing else is."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pveplug.errors import RemoteProtocolError
from pveplug.proto.dr_digest import LEAF, RunDigest, fnv1a_64, leaf_digests
from pveplug.proto.dr_frames import (
    MAX_BLOCK,
    Block,
    Command,
    Describe,
    Digests,
    DiskInfo,
    Done,
    Message,
    Open,
    Point,
    State,
    Zero,
    decode,
    expect,
)

POINT = Point("ph-rp1", "dr-a.2026-01-01_00.00.00_01", 5, 4, "crash-consistent", 9)
STATE = State(
    "ab12", "standby", 3, acked="x", seeded={"scsi0": 5}, points=(POINT,), welcome=True
)


def carried(message: Message) -> Message:
    kind, payload, _ = message.encode()
    return decode(kind, b"".join(payload))


@pytest.mark.parametrize(
    "message",
    [
        Open("seed", "u", 100, "web", "c/n", "job", None),
        STATE,
        Describe("c", 1, 2, "cores: 1\n", "", (DiskInfo("scsi0", 1 << 40),), "fw"),
        Done("c", 1, POINT, (POINT, POINT)),
        Command("failover-exec", {"dr_unplanned": "yes"}),
        Zero(3, 1 << 61, 1 << 20),
    ],
)
def test_a_message_arrives_as_it_was_sent(message: Message) -> None:
    assert carried(message) == message


@given(st.binary(min_size=1, max_size=5000), st.integers(0, 1 << 40))
def test_blocks_arrive_as_they_were_sent(data: bytes, offset: int) -> None:
    block = carried(Block(7, offset, data))
    assert isinstance(block, Block)
    assert (block.number, block.offset, bytes(block.data)) == (7, offset, data)


@given(st.integers(0, 255), st.binary(max_size=200))
def test_garbage_is_a_message_or_a_protocol_error(kind: int, payload: bytes) -> None:
    try:
        decode(kind, payload)
    except RemoteProtocolError:
        pass


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"epoch": "3"}, r"State.epoch is '3'"),
        ({"epoch": -1}, r"State.epoch is -1"),
        ({"link": None}, r"State.link is None"),
        ({"points": [5]}, r"State.points is not an object"),
        ({"seeded": {"scsi0": "x"}}, r"State.seeded.scsi0 is 'x'"),
        ({"welcome": 1}, r"State.welcome is 1"),
    ],
)
def test_an_ill_typed_value_is_refused(changes: dict[str, Any], text: str) -> None:
    kind, payload, _ = STATE.encode()
    values = json.loads(b"".join(payload)) | changes
    with pytest.raises(RemoteProtocolError, match=text):
        decode(kind, json.dumps(values).encode())


def test_a_later_version_may_add_keys_and_none_may_be_missing() -> None:
    kind, payload, _ = STATE.encode()
    values = json.loads(b"".join(payload))
    assert decode(kind, json.dumps(values | {"new": []}).encode()) == STATE
    del values["role"]
    with pytest.raises(RemoteProtocolError, match="State has no role"):
        decode(kind, json.dumps(values).encode())


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (Block(0, 0, bytes(MAX_BLOCK + 1)), "a block of"),
        (Block(0, 0, b""), "a run of 0 bytes"),
        (Zero(0, 0, 0), "a run of 0 bytes"),
        (Zero(0, 1 << 62, 1), "a run of 1 bytes"),
        (Digests(0, 0, b"short"), "5 bytes of digests"),
    ],
)
def test_a_run_out_of_bounds_is_refused(message: Message, text: str) -> None:
    with pytest.raises(RemoteProtocolError, match=text):
        carried(message)


def test_what_is_not_expected_is_named() -> None:
    with pytest.raises(RemoteProtocolError, match="expected Done, got State"):
        expect(STATE, Done)
    with pytest.raises(RemoteProtocolError, match="expected Done, got the end"):
        expect(None, Done)


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b"", 0xCBF29CE484222325),
        (b"a", 0xAF63DC4C8601EC8C),
        (b"foobar", 0x85944171F73967E8),
    ],
)
def test_fnv_has_the_values_of_its_authors(data: bytes, value: int) -> None:
    assert fnv1a_64(data) == value


def test_zeroes_need_no_loop_for_their_fnv() -> None:
    value = 0xCBF29CE484222325
    for _ in range(1000):
        value = value * 0x100000001B3 % (1 << 64)
    assert fnv1a_64(bytes(1000)) == value


def test_a_run_digest_knows_order_place_and_kind() -> None:
    seen = set()
    for frames in (
        [Block(0, 0, b"ab")],
        [Block(0, 1, b"ab")],
        [Block(0, 0, b"a"), Block(0, 1, b"b")],
        [Block(0, 1, b"b"), Block(0, 0, b"a")],
        [Zero(0, 0, 2)],
        [Block(0, 0, bytes(2))],
    ):
        digest = RunDigest()
        for frame in frames:
            digest.add(frame)
        seen.add(digest.hexdigest())
    assert len(seen) == 6


def test_leaves_are_digested_one_by_one() -> None:
    data = b"x" * LEAF + b"y" * 10
    assert leaf_digests(data) == leaf_digests(b"x" * LEAF) + leaf_digests(b"y" * 10)
