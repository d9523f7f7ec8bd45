# SPDX-License-Identifier: Apache-2.0
"""Whatever comes: a description or the documented error; a finding or none."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pveplug.describe import sidecar
from pveplug.describe.guest import (
    Bus,
    Family,
    Firmware,
    GuestCdrom,
    GuestDescription,
    GuestDisk,
    GuestNic,
)
from pveplug.describe.reading import read_description
from tests.support import description_edits as edits

SOME = settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow]
)
line = st.text(
    st.characters(categories=["L", "N", "P", "S"]) | st.just(" "), max_size=9
)
edit = st.tuples(
    st.integers(0, 3), st.binary(min_size=2, max_size=2), st.binary(max_size=30)
).map(lambda e: bytes([e[0]]) + e[1] + bytes([len(e[2])]) + e[2])


def inputs(good):
    several = st.lists(edit, min_size=1, max_size=6).map(b"".join)
    return st.integers(1, len(good)).flatmap(
        lambda number: several.map(lambda rest: bytes([number]) + rest)
    )


@SOME
@given(inputs(edits.descriptions()))
def test_a_damaged_description_is_read_or_refused_by_name(data):
    edits.describe(edits.edited(data, edits.descriptions()))


@SOME
@given(
    st.binary(max_size=300)
    | st.tuples(
        st.sampled_from(
            [
                b"<Envelope xmlns='x'><References/>",
                b"<configuration><properties/>",
                b'{"schema": "pveplug-guest/1",',
                b'memsize = "1"\nguestos = "x"\n',
                b"\xff\xfe<\0?\0",
                b"<Objs xmlns='http://schemas.microsoft.com/powershell/2004/04'>",
            ]
        ),
        st.binary(max_size=200),
    ).map(b"".join)
)
def test_any_bytes_are_read_or_refused_by_name(data):
    edits.describe(data)


@SOME
@given(inputs(edits.disks()))
def test_a_damaged_disk_gives_a_finding_within_the_bounds(data):
    edits.look(edits.edited(data, edits.disks()))


def test_the_good_ones_are_good():
    assert all(edits.describe(data) for data in edits.descriptions())
    for data in edits.disks():
        found = edits.inspect(lambda at, n, data=data: data[at : at + n], len(data))
        assert found.uefi
        edits.look(data)


@st.composite
def guests(draw):
    places = draw(
        st.lists(
            st.tuples(st.sampled_from(Bus), st.integers(0, 255), st.integers(0, 65535)),
            unique=True,
            max_size=6,
        )
    )
    cut = draw(st.integers(0, len(places)))
    some = st.none() | st.integers(1, 4096)
    maybe = st.none() | st.booleans()
    mac = st.none() | st.binary(min_size=5, max_size=5).map(
        lambda raw: "02:" + raw.hex(":")
    )
    return GuestDescription(
        source=draw(line) or "x",
        name=draw(line),
        firmware=draw(st.sampled_from(Firmware)),
        secure_boot=draw(maybe),
        tpm=draw(maybe),
        sockets=draw(some),
        cores=draw(some),
        threads=draw(st.integers(1, 64)),
        memory_mib=draw(some),
        memory_min_mib=draw(some),
        disks=tuple(
            GuestDisk(
                order,
                *place,
                model=draw(line),
                file=draw(line) or None,
                capacity=draw(some),
                boot=draw(st.booleans()),
            )
            for order, place in enumerate(places[:cut])
        ),
        cdroms=tuple(
            GuestCdrom(*place, file=draw(line) or None) for place in places[cut:]
        ),
        nics=tuple(
            draw(
                st.lists(
                    st.builds(
                        GuestNic,
                        line,
                        mac,
                        line,
                        st.booleans(),
                        st.none() | st.integers(1, 4094),
                    ),
                    max_size=4,
                )
            )
        ),
        os_id=draw(line),
        family=draw(st.sampled_from(Family)),
        uuid=draw(st.none() | st.uuids().map(str)),
        machine=tuple(draw(st.lists(line, max_size=3))),
        localtime=draw(maybe),
        agent=draw(maybe),
        text=draw(st.lists(line, max_size=3).map("\n".join)),
        dropped=tuple(draw(st.lists(st.tuples(line, line), max_size=3))),
        notes=tuple(draw(st.lists(line, max_size=3))),
    )


@settings(SOME, max_examples=60)
@given(guests())
def test_a_description_survives_being_written_as_a_sidecar(guest):
    assert read_description({"x": sidecar.render(guest)}) == guest
