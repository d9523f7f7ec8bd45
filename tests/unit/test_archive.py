# SPDX-License-Identifier: Apache-2.0
"""OVAs: files in a tar archive, in one pass, damaged and hostile ones too."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence

import pytest

from pveplug.archive import is_archive, members
from pveplug.errors import IntegrityError


def made(files: Sequence[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(data), 1_700_000_000
            tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


def read(data: bytes, step: int = 1000) -> dict[str, bytes]:
    found = {}
    for member in members(io.BytesIO(data), "a.ova"):
        parts = []
        while part := member.content.read(step):
            parts.append(part)
        found[member.name] = b"".join(parts)
        assert len(found[member.name]) == member.size
        assert member.mtime == 1_700_000_000
    return found


@pytest.mark.parametrize(
    "form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
)
def test_files_come_in_their_order_with_their_bytes(form: int) -> None:
    files = [("x.ovf", b"<Envelope/>"), ("d/disk1.vmdk", b"\1\2" * 5000), ("e", b"")]
    files.append(("l" * 90 + "/" + "n" * 90, b"long name"))
    data = made(files, form)
    assert is_archive(data[:512])
    assert read(data) == {f"a.ova/{name}": content for name, content in files}


def test_what_is_not_read_is_passed_by_and_only_files_count() -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, kind in (("d", tarfile.DIRTYPE), ("s", tarfile.SYMTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
        for name in ("one", "two"):
            member = tarfile.TarInfo(name)
            member.size = 700
            tar.addfile(member, io.BytesIO(b"x" * 700))
    found = members(io.BytesIO(out.getvalue()), "a.ova")
    assert [one.name for one in found] == ["a.ova/one", "a.ova/two"]


def test_an_archive_that_is_cut_is_told() -> None:
    data = made([("x.ovf", b"<Envelope/>"), ("disk1.vmdk", bytes(9000))])
    with pytest.raises(IntegrityError, match=r"a\.ova/disk1\.vmdk: .*truncated"):
        read(data[:6000])
    with pytest.raises(IntegrityError, match=r"a\.ova: a damaged tar archive"):
        read(data[:1024] + b"garbage!" * 64 + data[1536:])
    with pytest.raises(IntegrityError, match="without its end mark"):
        read(data[:1024])  # between two files


def test_a_header_can_t_ask_for_memory_without_bound() -> None:
    member = tarfile.TarInfo("x")
    member.type, member.size = tarfile.XHDTYPE, 1 << 32
    data = member.tobuf(tarfile.GNU_FORMAT) + bytes(1024)
    with pytest.raises(IntegrityError, match="extended header of 4294967296 bytes"):
        read(data)
    tail = made([("x.ovf", b"<Envelope/>")])[:1024]
    with pytest.raises(IntegrityError, match="extended header of 4294967296 bytes"):
        read(tail + data)
    assert read(tail + bytes(1024)) == {"a.ova/x.ovf": b"<Envelope/>"}


def with_extended(**words: str) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("one", "two"):
            member = tarfile.TarInfo(name)
            member.size, member.mtime = 700, 1_700_000_000
            if name == "two":
                member.pax_headers = words
            tar.addfile(member, io.BytesIO(b"x" * 700))
    return out.getvalue()


def test_nothing_is_left_out_in_silence() -> None:
    whole = with_extended(comment="abc")
    assert len(read(whole)) == 2
    with pytest.raises(IntegrityError, match="stored with holes"):
        read(with_extended(**{"GNU.sparse.size": "9000", "GNU.sparse.map": "0,700"}))
    for bad in (b"0 comment=abc", b"xx comment=abc"):
        damaged = whole.replace(b"15 comment=abc", bad.ljust(14, b"\0"))
        assert damaged != whole
        with pytest.raises(IntegrityError, match="damaged tar archive"):
            read(damaged)
    with pytest.raises(IntegrityError, match="no length"):
        read(with_extended(size="-5"))


def test_a_time_that_is_none_does_no_harm() -> None:
    data = with_extended(mtime="inf")
    assert [one.mtime for one in members(io.BytesIO(data), "a")] == [1_700_000_000, 0]
