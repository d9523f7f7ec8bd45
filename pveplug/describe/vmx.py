# SPDX-License-Identifier: Apache-2.0
"""VMware's VMX file: lines of ``key = "value"``, keys in any case.

::

    .encoding = "windows-1252"          which bytes the rest is in; UTF-8 without it
    displayName = "say |22hi|22"        |XX is a byte: quotes, bars, line breaks
    scsi0.virtualDev = "pvscsi"
    scsi0:0.fileName = "web.vmdk"       <bus><controller>:<unit>.<property>
    ethernet0.generatedAddress = "00:0c:29:…"
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator
from typing import Final

from pveplug.describe.guest import (
    MAX_CPUS,
    MAX_MEMORY_MIB,
    MAX_NICS,
    Bus,
    Firmware,
    GuestCdrom,
    GuestDescription,
    GuestDisk,
    GuestNic,
    bounded,
    lines,
    mac_address,
    one_line,
    plain,
    reported,
)
from pveplug.describe.systems import family_of
from pveplug.errors import DescriptionError
from pveplug.texts import known_encoding
from pveplug.units import MiB

MAX_BYTES: Final = 4 * MiB
MAX_LINES: Final = 50_000
_BUSES: Final = {bus.value: bus for bus in (Bus.IDE, Bus.SATA, Bus.SCSI, Bus.NVME)}
_LINE: Final = re.compile(r'([\w.:\-]{1,200})\s*=\s*(?:"([^"]*)"|([^"\s]*))\s*(?:#.*)?')
_ENCODING: Final = re.compile(
    rb'^[ \t]*\.?encoding[ \t]*=[ \t]*"?([\w.-]{1,40})', re.MULTILINE | re.IGNORECASE
)
_UNIT: Final = re.compile(r"(ide|sata|scsi|nvme)(\d{1,2}):(\d{1,3})")
_ESCAPE: Final = re.compile(r"\|([0-9A-Fa-f]{2})")
_DEVICE: Final = re.compile(
    r"((?:ethernet|usb(?:_xhci)?|ehci|sound|serial|parallel|floppy|pcipassthru|sharedfolder"
    r"|vmci|svga|mks|hpet|usb:|vusb|pcibridge)\d*)\.(.+)"
)
_ROUTINE: Final = re.compile(
    r"pcibridge.*|vmci.*|hpet.*|svga.*|mks.*|vmotion.*|monitor\..*|sched\..*|tools\..*"
    r"|ehci.*|usb_xhci.*|usb"
)
"""Devices every PVE VM has its own of, or that mean nothing elsewhere."""
_CDROMS: Final = frozenset("cdrom-image atapi-cdrom cdrom-raw".split())
_ROOM: Final = {Bus.IDE: 2, Bus.SATA: 30, Bus.SCSI: 65, Bus.NVME: 64}


def is_vmx(text: str) -> bool:
    """Whether it looks like one: VMware always writes these keys."""
    keys = (
        r"(config\.version|virtualhw\.version|displayname|guestos|memsize"
        r"|encryption\.data)"
    )
    found = re.findall(rf"^[ \t]*{keys}[ \t]*=", text, re.MULTILINE | re.IGNORECASE)
    return len({key.lower() for key in found}) >= 2


def decoded(data: bytes) -> str:
    """Decode by what the file says, else as UTF-8, else as Windows does."""
    for encoding in (encoding_of(data), "utf-8"):
        try:
            return data.decode(encoding).removeprefix("\ufeff")
        except ValueError:
            continue
    return data.decode("cp1252", "replace")


def encoding_of(data: bytes) -> str:
    """Return the encoding a file says it is in, if that is one; else UTF-8."""
    named = _ENCODING.search(data[: 64 << 10])
    name = named[1].decode("ascii", "replace") if named else ""
    return known_encoding(name) or "utf-8"


def read(data: bytes, file: str) -> GuestDescription:
    """Read a VMX file.

    Raises:
        DescriptionError: a line that is none of VMware's, or a number that is absurd.
    """
    if len(data) > MAX_BYTES:
        raise DescriptionError(
            f"{len(data)} bytes; no VMX is longer than {MAX_BYTES}", file=file
        )
    return _Vmx(data, file).run()


class _Vmx:
    def __init__(self, data: bytes, file: str) -> None:
        self.file = file
        self.keys: dict[str, str] = {}
        self.lines: dict[str, int] = {}
        self.dropped: list[tuple[str, str]] = []
        self.notes: list[str] = []
        self.encoding = encoding_of(data)
        for number, line in enumerate(_lines(decoded(data)), 1):
            if number > MAX_LINES:
                raise self.wrong(f"more than {MAX_LINES} lines", number)
            self.line(line, number)

    def line(self, text: str, number: int) -> None:
        text = text.strip().strip("\0")
        if not text or text.startswith("#"):
            return
        found = _LINE.fullmatch(text)
        if not found:
            raise self.wrong(
                f'not a line of key = "value": {one_line(text, 60)}', number
            )
        key = found[1].lower()
        # The last one counts, as for VMware.
        self.keys[key] = self.unescaped(found[2] if found[2] is not None else found[3])
        self.lines[key] = number

    def unescaped(self, value: str) -> str:
        if "|" not in value:
            return value
        # |XX are bytes of the file's encoding: several may make one character.
        try:
            raw = value.encode(self.encoding)
            marked = re.sub(
                rb"\|([0-9A-Fa-f]{2})", lambda m: bytes([int(m[1], 16)]), raw
            )
            return marked.decode(self.encoding)
        except ValueError:
            return _ESCAPE.sub(lambda m: chr(int(m[1], 16)), value)

    def wrong(self, why: str, line: int | None) -> DescriptionError:
        return DescriptionError(why, file=self.file, line=line)

    def get(self, key: str) -> str:
        return self.keys.get(key, "").strip()

    def flag(self, key: str) -> bool | None:
        value = self.get(key).lower()
        if value in ("true", "yes", "1", "on"):
            return True
        return False if value in ("false", "no", "0", "off") else None

    def number(self, key: str, most: int) -> int | None:
        value = self.get(key)
        if not value:
            return None
        if not re.fullmatch(r"\d{1,12}", value) or not 0 < int(value) <= most:
            raise self.wrong(
                f"{key} = {one_line(value, 40)!r} is no number from 1 to {most}",
                self.lines[key],
            )
        return int(value)

    def run(self) -> GuestDescription:
        if "encryption.data" in self.keys:
            raise self.wrong(
                "the VM is encrypted, its settings and its disks: decrypt it in VMware "
                "and export it again",
                self.lines["encryption.data"],
            )
        disks, cdroms = self.drives()
        sockets, cores = self.processors()
        os_id = one_line(self.get("guestos"), 100)
        firmware = {"efi": Firmware.UEFI, "bios": Firmware.BIOS, "": Firmware.BIOS}
        said = self.get("firmware").lower()
        if said not in firmware:
            self.notes.append(f"firmware = {one_line(said, 40)!r} isn't known")
        hardware = self.number("virtualhw.version", 1000)
        nics = tuple(self.nics())
        self.other_devices()
        secure = self.flag("uefi.secureboot.enabled")
        return GuestDescription(
            source=f"VMX {self.file}",
            name=one_line(self.get("displayname")),
            firmware=firmware.get(said, Firmware.UNKNOWN),
            secure_boot=secure if said == "efi" else None,
            tpm=self.flag("vtpm.present"),
            sockets=sockets,
            cores=cores,
            memory_mib=self.number("memsize", MAX_MEMORY_MIB),
            disks=disks,
            cdroms=cdroms,
            nics=nics,
            os_id=os_id,
            family=family_of(os_id),
            uuid=self.smbios(),
            machine=(f"vmx-{hardware}",) if hardware else (),
            localtime=self.clock(),
            text=lines(self.get("annotation")),
            dropped=reported(self.dropped),
            notes=bounded(self.notes),
        )

    def processors(self) -> tuple[int | None, int | None]:
        total = self.number("numvcpus", MAX_CPUS) or 1
        per = self.number("cpuid.corespersocket", MAX_CPUS) or 1
        if total % per:
            self.notes.append(
                f"{total} processors in sockets of {per}: sockets of one core instead"
            )
            per = 1
        return total // per, per

    def clock(self) -> bool | None:
        """``rtc.diffFromUTC`` is in seconds; without it VMware goes by the system."""
        return False if self.get("rtc.difffromutc") == "0" else None

    def smbios(self) -> str | None:
        """What the guest sees as its UUID.

        ``uuid.bios`` is the 16 bytes of the SMBIOS table in their order; QEMU is given
        a text of which it turns the first three fields into little-endian ones.
        """
        digits = re.sub(r"[\s-]", "", self.get("uuid.bios"))
        if not digits:
            return None
        if not re.fullmatch(r"[0-9A-Fa-f]{32}", digits):
            self.dropped.append(("uuid.bios", f"no UUID: {self.get('uuid.bios')}"))
            return None
        return str(uuid.UUID(bytes_le=bytes.fromhex(digits)))

    def drives(self) -> tuple[tuple[GuestDisk, ...], tuple[GuestCdrom, ...]]:
        places: dict[tuple[str, int, int], str] = {}
        for key in self.keys:
            if found := _UNIT.match(key):
                place = (found[1], int(found[2]), int(found[3]))
                places.setdefault(place, found[0])
        order = {"nvme": 3, "scsi": 0, "sata": 1, "ide": 2}
        disks: list[GuestDisk] = []
        cdroms: list[GuestCdrom] = []
        first = re.sub(r"\s", "", self.get("bios.hddorder").lower()).split(",")[0]
        for place in sorted(places, key=lambda p: (order[p[0]], *p[1:])):
            at, (name, controller, unit) = places[place], place
            if self.flag(f"{at}.present") is False:
                continue
            file = self.get(f"{at}.filename")
            if not file and self.flag(f"{at}.present") is None:
                continue
            kind = self.get(f"{at}.devicetype").lower() or "disk"
            bus = _BUSES[name]
            if self.flag(f"{name}{controller}.present") is False or (
                unit >= _ROOM[bus]
            ):
                self.dropped.append((at, f"on a controller that isn't there: {file}"))
            elif kind in _CDROMS or "cdrom" in kind:
                medium = plain(file) if kind == "cdrom-image" else ""
                cdroms.append(GuestCdrom(bus, controller, unit, medium or None))
            elif "disk" not in kind or kind.startswith(("scsi-passthru",)):
                self.dropped.append((at, f"{kind} isn't a disk image: {file}"))
            else:
                if not file or file.lower() == "emptybackingstring":
                    self.dropped.append((at, "a disk without a file"))
                    continue
                if self.get(f"{at}.mode").startswith("independent"):
                    self.notes.append(
                        f"{at} was {self.get(f'{at}.mode')}: snapshots left it out"
                    )
                disks.append(
                    GuestDisk(
                        len(disks),
                        bus,
                        controller,
                        unit,
                        model=one_line(
                            self.get(f"{name}{controller}.virtualdev").lower(), 40
                        ),
                        file=plain(file),
                        boot=first == at,
                    )
                )
        return tuple(disks), tuple(cdroms)

    def nics(self) -> Iterator[GuestNic]:
        numbers = {
            int(m[1])
            for key in self.keys
            if (m := re.match(r"ethernet(\d{1,3})\.", key))
        }
        for count, number in enumerate(sorted(numbers)):
            at = f"ethernet{number}"
            if self.flag(f"{at}.present") is not True:
                continue
            if count >= MAX_NICS:
                self.dropped.append((at, f"more than {MAX_NICS} network cards"))
                continue
            network = self.get(f"{at}.networkname") or self.get(f"{at}.dvs.portgroupid")
            if not network:
                network = self.get(f"{at}.connectiontype") or self.get(f"{at}.vnet")
            mac = self.get(f"{at}.address") or self.get(f"{at}.generatedaddress")
            if mac and mac_address(mac) is None:
                self.dropped.append((f"{at} MAC address", one_line(mac, 40)))
            yield GuestNic(
                model=one_line(self.get(f"{at}.virtualdev").lower(), 40) or "default",
                mac=mac_address(mac),
                network=one_line(network),
                connected=self.flag(f"{at}.startconnected") is not False,
            )

    def other_devices(self) -> None:
        """Name what was there and has no counterpart."""
        for key in self.keys:
            found = _DEVICE.fullmatch(key)
            if not found or found[1].startswith("ethernet"):
                continue
            if (
                found[2] == "present"
                and self.flag(key)
                and not _ROUTINE.match(found[1])
            ):
                what = self.get(f"{found[1]}.filename") or self.get(
                    f"{found[1]}.virtualdev"
                )
                self.dropped.append((found[1], what or "a device of the old machine"))
        told = {
            "vhv.enable": "nested virtualisation: set cpu to host for it",
            "encryption.keysafe": "the key of its TPM, or of encrypted disks",
            "sched.cpu.min": "a reservation of processor time",
            "sched.mem.min": "a reservation of memory",
            "numa.nodeaffinity": "bound to the old host",
            "sched.cpu.affinity": "bound to the old host",
            "bios.bootorder": "",
        }
        for key, why in told.items():
            value = self.get(key)
            if value and value.lower() not in ("false", "0", "all", "") and why:
                self.dropped.append((key, f"{one_line(value, 60)}: {why}"))


def _lines(text: str) -> Iterator[str]:
    """Cut at line feeds only: str.splitlines() also cuts inside of values."""
    return iter(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"))
