# SPDX-License-Identifier: Apache-2.0
"""A VM as any hypervisor would describe it: the value all readers give.

What a description says and this value has no place for isn't lost silently: a reader
names it in ``dropped``, and what it had to assume in ``notes``.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

MAX_DISKS: Final = 256
MAX_NICS: Final = 32
MAX_CAPACITY: Final = 1 << 60
MAX_MEMORY_MIB: Final = 64 << 20
MAX_CPUS: Final = 8192
MAX_NAME: Final = 1024
MAX_TEXT: Final = 64 << 10
MAX_REPORTED: Final = 200
"""Lines of ``dropped``; of more only the number is told."""
_MAC: Final = re.compile(r"[0-9a-f]{12}")


class Firmware(enum.Enum):
    """What starts the guest."""

    BIOS = "bios"
    UEFI = "uefi"
    UNKNOWN = "unknown"


class Bus(enum.Enum):
    """What a drive hangs on."""

    IDE = "ide"
    SATA = "sata"
    SCSI = "scsi"
    NVME = "nvme"
    VIRTIO = "virtio"
    UNKNOWN = "unknown"


class Family(enum.Enum):
    """What a guest's drivers are chosen by."""

    WINDOWS = "windows"
    LINUX = "linux"
    OTHER = "other"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class GuestDisk:
    """A disk.

    Attributes:
        order: its place among the disks, from 0: as the old machine told them apart.
        bus, controller, unit: where it hung; ``controller`` counts those of one bus.
        model: of the controller, in the words of the source: pvscsi, lsilogic, ….
        file: the name of its image as it is written there, with folders; None where
            it isn't a file (a passed-through disk).
        capacity: bytes; None when not told.
        boot: whether the description itself says that this one is started from.
    """

    order: int
    bus: Bus
    controller: int
    unit: int
    model: str = ""
    file: str | None = None
    capacity: int | None = None
    boot: bool = False

    @property
    def key(self) -> str:
        """``scsi0:1``, unique in a description: the ``source_key`` of its DiskPlan."""
        return f"{self.bus.value}{self.controller}:{self.unit}"

    @property
    def basename(self) -> str:
        """The last part of ``file``, whichever way its slashes lean; may be empty."""
        return basename(self.file or "")


@dataclass(frozen=True, slots=True)
class GuestCdrom:
    """A CD drive; ``file`` is the medium that was in it."""

    bus: Bus
    controller: int
    unit: int
    file: str | None = None


@dataclass(frozen=True, slots=True)
class GuestNic:
    """A network card.

    Attributes:
        model: in the words of the source: e1000, vmxnet3, synthetic, legacy, ….
        mac: ``00:50:56:aa:bb:cc`` in lower case; None where none is fixed.
        network: the name of what it was connected to.
        connected: whether its cable was in.
        vlan: tag, from 1 to 4094, or None.
    """

    model: str = ""
    mac: str | None = None
    network: str = ""
    connected: bool = True
    vlan: int | None = None


@dataclass(frozen=True, slots=True)
class GuestDescription:
    """A VM.

    Attributes:
        source: format and file, for people: ``VMX web.vmx``.
        secure_boot, tpm: None where nothing is said.
        sockets, cores: sockets, and cores of one; None where nothing is said.
        threads: of a core.
        memory_mib: MiB; None where nothing is said.
        memory_min_mib: the least it may be given (ballooning), else None.
        disks: by ``order``.
        os_id: the guest's system in the words of the source: ``windows2019srv-64``.
        uuid: SMBIOS UUID as QEMU writes it, in lower case.
        machine: hints about the old machine: ``vmx-19``, ``hyper-v generation 2``.
        agent: whether QEMU's guest agent is installed; None where nothing is said.
        localtime: whether its clock runs in local time; None where nothing is said.
        text: the operator's notes on the VM.
        dropped: ``(what, why)`` of what has no place here.
        notes: what was assumed.
    """

    source: str
    name: str = ""
    firmware: Firmware = Firmware.UNKNOWN
    secure_boot: bool | None = None
    tpm: bool | None = None
    sockets: int | None = None
    cores: int | None = None
    threads: int = 1
    memory_mib: int | None = None
    memory_min_mib: int | None = None
    disks: tuple[GuestDisk, ...] = ()
    cdroms: tuple[GuestCdrom, ...] = ()
    nics: tuple[GuestNic, ...] = ()
    os_id: str = ""
    family: Family = Family.UNKNOWN
    uuid: str | None = None
    machine: tuple[str, ...] = ()
    localtime: bool | None = None
    text: str = ""
    dropped: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    agent: bool | None = None

    def disk(self, key: str) -> GuestDisk:
        """Return the disk of a key.

        Raises:
            KeyError: there is none.
        """
        for disk in self.disks:
            if disk.key == key:
                return disk
        raise KeyError(key)

    @property
    def boot_disk(self) -> GuestDisk | None:
        """The one marked for it, or the first."""
        marked = [disk for disk in self.disks if disk.boot]
        return next(iter(marked or self.disks), None)


def basename(path: str) -> str:
    """Return what follows the last slash of either kind."""
    return re.split(r"[/\\]", path)[-1]


def mac_address(text: str) -> str | None:
    """Return ``aa:bb:cc:dd:ee:ff``; None for none: nonsense, all zero, multicast."""
    digits = re.sub("[-:. ]", "", text.strip()).lower()
    if not _MAC.fullmatch(digits) or set(digits) == {"0"} or int(digits[1], 16) & 1:
        return None
    return ":".join(digits[i : i + 2] for i in range(0, 12, 2))


def one_line(text: str, limit: int = MAX_NAME) -> str:
    """Return text fit for a line: no control characters, of bounded length."""
    plain = "".join(c if c.isprintable() else " " for c in text[: 4 * limit])
    return " ".join(plain.split())[:limit]


def plain(text: str, limit: int = MAX_NAME) -> str:
    """Return text without control characters, each shown as one that can't be."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text[:limit])


def lines(text: str, limit: int = MAX_TEXT) -> str:
    """Return an operator's text: lines and tabs are kept, else as :func:`plain`."""
    text = text[:limit].replace("\r\n", "\n").replace("\r", "\n")
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def bounded(notes: Iterable[str]) -> tuple[str, ...]:
    """Bound a list of notes, each once and a line."""
    whole = list(dict.fromkeys(one_line(note, 400) for note in notes))
    more = len(whole) - MAX_REPORTED
    return (*whole[:MAX_REPORTED], *([f"{more} notes more"] if more > 0 else []))


def reported(found: Iterable[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """Bound a list of what was dropped, each once."""
    whole = list(dict.fromkeys((one_line(a, 200), one_line(b, 300)) for a, b in found))
    more = len(whole) - MAX_REPORTED
    if more <= 0:
        return tuple(whole)
    return (*whole[:MAX_REPORTED], (f"{more} more", "too many to be named"))
