# SPDX-License-Identifier: Apache-2.0
"""Pictures and processors: what a screen shows, and who drew it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pveplug.errors import RemoteProtocolError
from pveplug.proving.boottext import failure_in, is_left_over
from pveplug.proving.picture import MAX_PIXELS, Picture, as_png, parse_ppm
from pveplug.proving.processors import Activity, activity, parse_processors
from pveplug.proving.screentext import UNKNOWN, columns_of, joined, read_text
from tests.support.screens import as_ppm, drawn, from_png, recorded, registers

SCREENS = {
    "seabios-no-bootable-device": "No bootable device.  Retrying in 1 seconds.",
    "grub-prompt": "Minimal BASH-like line editing is supported",
    "linux-panic": "Kernel panic - not syncing: VFS: Unable to mount root fs",
    "linux-console": "TG:READY 6.48",
    "qemu-no-display": "Display output is not active.",
}


@pytest.mark.parametrize(("name", "text"), SCREENS.items())
def test_the_text_of_a_recorded_screen_is_read(name: str, text: str) -> None:
    picture = recorded(name)
    lines = read_text(picture)
    assert text in joined(lines, columns_of(picture))
    assert not picture.is_blank()


@pytest.mark.parametrize(
    ("name", "fails"),
    [
        ("seabios-no-bootable-device", True),
        ("grub-prompt", True),
        ("linux-panic", True),
        ("linux-console", False),
        ("qemu-no-display", False),
        ("uefi-shell", False),  # its font isn't VGA's: the processors tell
    ],
)
def test_screens_of_failed_boots_are_known(name: str, fails: bool) -> None:
    picture = recorded(name)
    text = joined(read_text(picture), columns_of(picture))
    assert any(failure_in(line) for line in text.split("\n")) is fails


@pytest.mark.parametrize(
    ("name", "expected", "count"),
    [
        ("seabios", Activity.FIRMWARE, 1),
        ("uefi-shell", Activity.FIRMWARE, 1),
        ("linux-idle", Activity.ALIVE, 2),
        ("linux-panic", Activity.KERNEL, 2),
    ],
)
def test_registers_tell_who_has_the_machine(
    name: str, expected: Activity, count: int
) -> None:
    processors = parse_processors(registers(name))
    assert len(processors) == count
    assert activity(processors) is expected


def test_a_program_in_a_32_bit_guest_is_an_operating_system() -> None:
    text = registers("seabios").replace("CR0=00000010", "CR0=80050033")
    text = text.replace("CPL=0", "CPL=3").replace("HLT=1", "HLT=0")
    idt = next(line for line in text.split("\r\n") if line.startswith("IDT"))
    text = text.replace(idt, "IDT=     fffba000 000007ff")
    assert activity(parse_processors(text)) is Activity.ALIVE


def test_a_processor_in_management_mode_says_nothing() -> None:
    text = registers("linux-idle").replace("SMM=0", "SMM=1")
    assert activity(parse_processors(text)) is Activity.FIRMWARE


@pytest.mark.parametrize("text", ["", "PC 00008000 X00=0", "CPU#0\r\nRIP=zz", "CPU#0"])
def test_what_is_no_x86_is_not_judged(text: str) -> None:
    assert activity(parse_processors(text)) is None


@given(st.text(max_size=300))
@settings(deadline=None)
def test_any_monitor_text_is_parsed_without_an_error(text: str) -> None:
    assert isinstance(parse_processors(text), tuple)


def test_a_picture_survives_png() -> None:
    picture = recorded("grub-prompt")
    assert from_png(as_png(picture)) == picture
    assert parse_ppm(as_ppm(picture)) == picture


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"P6",
        b"P5\n2 2\n255\n" + bytes(4),
        b"P6\n2 2\n65535\n" + bytes(24),
        b"P6\n2 2\n255\n" + bytes(11),
        b"P6\n2 2\n255\n" + bytes(13),
        b"P6\n0 2\n255\n",
        b"P6\n99999 99999\n255\n",
        b"P6\n%d 2\n255\n" % MAX_PIXELS,
        b"P6 " * 100,
    ],
)
def test_what_is_no_picture_is_refused(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        parse_ppm(data)


@given(st.binary(max_size=200), st.integers(0, 20))
@settings(deadline=None)
def test_any_bytes_are_a_picture_or_refused(data: bytes, cut: int) -> None:
    for given_data in (data, b"P6\n3 2\n255\n"[:cut] + data):
        try:
            picture = parse_ppm(given_data)
        except RemoteProtocolError:
            continue
        assert len(picture.pixels) == 3 * picture.width * picture.height


def test_a_screen_of_one_colour_with_a_cursor_is_blank() -> None:
    assert Picture(64, 64, bytes(3 * 64 * 64)).is_blank()
    assert Picture(64, 64, b"\0\x78\xd7" * (64 * 64)).is_blank()
    assert drawn("_").is_blank()
    assert not drawn("debian login: " * 5).is_blank()


def test_a_blinking_cursor_is_no_change_but_a_line_of_text_is() -> None:
    off, on = drawn("login: "), drawn("login: _")
    assert off.is_like(on)
    assert on.is_like(off)
    assert not off.is_like(drawn("login: \n" + "Last login: Monday" * 4))
    assert not off.is_like(Picture(640, 200, off.pixels[: 3 * 640 * 200]))


@given(
    st.sets(st.integers(0, 64 * 64 - 1), min_size=1, max_size=60),
    st.sampled_from([0, 990, 1024, 1100, 2000]),
    st.integers(0, 2),
)
@settings(deadline=None)
def test_pictures_are_alike_up_to_a_thousandth_of_their_pixels(
    places: set[int], more: int, colour: int
) -> None:
    changed = places | set(range(more))
    pixels = bytearray(3 * 64 * 64)
    for at in changed:
        pixels[3 * at + (colour + at) % 3] = 9
    picture, black = Picture(64, 64, bytes(pixels)), Picture(64, 64, bytes(3 * 64 * 64))
    assert black.is_like(picture) is (len(changed) <= 1024)
    assert picture.is_like(black) is (len(changed) <= 1024)


@given(
    st.lists(
        st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=60),
        max_size=20,
    )
)
@settings(deadline=None)
def test_what_is_drawn_is_read(lines: list[str]) -> None:
    while lines and not lines[-1]:
        lines.pop()
    assert list(read_text(drawn("\n".join(lines)))) == lines


def test_inverse_text_is_read_and_pictures_are_not() -> None:
    page = drawn("Debian GNU/Linux", ink=b"\0\0\0", paper=b"\xff\xff\xff")
    assert read_text(page)[0].startswith("Debian GNU/Linux")
    noise = Picture(64, 32, bytes(range(256)) * 24)
    assert set("".join(read_text(noise))) <= {UNKNOWN, " "}


def test_a_line_that_fills_the_screen_goes_on_in_the_next() -> None:
    assert joined(("ab", "c", "d"), 2) == "abc\nd\n"


@pytest.mark.parametrize(
    "line",
    [
        "Booting from Hard Disk...",
        "Loading initial ramdisk ...",
        "Physical KASLR disabled: no suitable memory region!",
        "Begin: Waiting for root file system ...",
        "Guest has not initialized the display (yet).",
    ],
)
def test_what_firmware_leaves_on_a_screen_is_known(line: str) -> None:
    assert is_left_over(["something", line, "", UNKNOWN])
    assert not is_left_over([line, "debian login: "])


@pytest.mark.parametrize(
    "line",
    [
        "No bootable device.",
        "grub rescue> ",
        "grub> ",
        "Shell> ",
        "(initramfs) ",
        "BdsDxe: No bootable option or device was found.",
        "ALERT!  UUID=1 does not exist.  Dropping to a shell!",
        "You are in emergency mode. After logging in, type",
        "BOOTMGR is missing",
        "Kernel panic - not syncing: Attempted to kill init!",
    ],
)
def test_last_words_of_a_boot_are_failures(line: str) -> None:
    assert failure_in(line)


@pytest.mark.parametrize(
    "line",
    [
        'BdsDxe: failed to load Boot0001 "UEFI QEMU DVD-ROM": Not Found',
        "Boot failed: not a bootable disk",
        "Booting from Hard Disk...",
        "root@web:~# ",
        "C:\\>",
        "error: no such device: 1234.",
        "[    3.1] systemd[1]: Reached target Rescue Mode Off",
    ],
)
def test_words_after_which_a_boot_goes_on_are_none(line: str) -> None:
    assert failure_in(line) is None
