# SPDX-License-Identifier: Apache-2.0
"""Guest systems by the names others give them, and the drivers each surely has.

The names are those of VMX (``windows2019srv-64``), of VMware's OVF
(``windows2019srv_64Guest``), of VirtualBox (``Windows2022_64``), of the CIM (numbers),
and what people read ("Microsoft Windows Server 2022 (64-bit)"). A name is brought into
one form and the first row that fits counts.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from typing import Final

from pveplug.describe.guest import Family


class Storage(enum.Enum):
    """How a guest's disks are attached so that its first start finds them."""

    VIRTIO = "virtio"  # its start-up image has VirtIO whatever it was installed on
    AHCI = "ahci"  # a driver of its own for SATA that starts at boot
    IDE = "ide"  # only PIIX IDE is there for sure
    KEPT = "kept"  # a start-up image with drivers of the old machine only (dracut)


@dataclass(frozen=True, slots=True)
class System:
    """What is known of a guest system.

    Attributes:
        ostype: Proxmox VE's.
        nic: the network card it has a driver for.
        label: for people.
    """

    family: Family
    ostype: str
    storage: Storage
    nic: str
    label: str


_WIN: Final = Family.WINDOWS
_LIN: Final = Family.LINUX
UNKNOWN: Final = System(Family.UNKNOWN, "other", Storage.AHCI, "e1000", "unknown")
_LINUX: Final = System(_LIN, "l26", Storage.KEPT, "e1000", "a Linux")
_WINDOWS: Final = System(_WIN, "win10", Storage.AHCI, "e1000e", "a Windows")
OF_FAMILY: Final = {
    Family.WINDOWS: _WINDOWS,
    Family.LINUX: _LINUX,
    Family.OTHER: System(Family.OTHER, "other", Storage.AHCI, "e1000", "another"),
    Family.UNKNOWN: UNKNOWN,
}
"""For a family of which no member is known."""


def _windows(ostype: str, label: str) -> System:
    if ostype in ("win8", "win10", "win11"):
        return System(_WIN, ostype, Storage.AHCI, "e1000e", label)
    # Windows 7 and older start AHCI's driver only if they were installed on it; the
    # first versions have no driver for Intel's cards.
    nic = "rtl8139" if ostype in ("w2k", "wxp", "w2k3") else "e1000"
    return System(_WIN, ostype, Storage.IDE, nic, label)


def _linux(storage: Storage, label: str) -> System:
    return System(_LIN, "l26", storage, "virtio", label)


_ROWS: Final[tuple[tuple[str, System], ...]] = (
    # VMware names a release by the one before it until it has a name.
    (r"windows2022srvnext|win\w* ?(server )?2025", _windows("win11", "Server 2025")),
    (r"windows2019srvnext|win\w* ?(server )?2022", _windows("win11", "Server 2022")),
    (r"windows2019srv|win\w* ?(server )?2019", _windows("win10", "Server 2019")),
    (r"windows9(srv|server)|win\w* ?(server )?2016", _windows("win10", "Server 2016")),
    (r"windows8(srv|server)|win\w* ?(server )?2012", _windows("win8", "Server 2012")),
    (
        r"windows7(srv|server)|win\w* ?(server )?2008 ?\(?r2",
        _windows("win7", "Server 2008 R2"),
    ),
    (
        r"longhorn|winlonghorn|win\w* ?(server )?2008",
        _windows("w2k8", "Server 2008"),
    ),
    (
        r"winnet(standard|enterprise|datacenter|web|business)"
        r"|win\w* ?(server )?2003",
        _windows("w2k3", "Server 2003"),
    ),
    (r"(win|windows) ?(11|12)\b|windows1[12]-", _windows("win11", "Windows 11")),
    (r"windows9\b|windows9-|(win|windows) ?10", _windows("win10", "Windows 10")),
    (r"windows8|(win|windows) ?8", _windows("win8", "Windows 8")),
    (r"windows7|(win|windows) ?7", _windows("win7", "Windows 7")),
    (r"winvista|(win|windows) ?vista", _windows("wvista", "Windows Vista")),
    (r"winxp|(win|windows) ?xp", _windows("wxp", "Windows XP")),
    (r"(win|windows) ?2000|win2000", _windows("w2k", "Windows 2000")),
    (
        r"win(31|95|98|me|nt)\b|(win|windows) ?(3\.1|95|98|me|nt)\b|msdos|\bdos\b",
        System(_WIN, "other", Storage.IDE, "pcnet", "a Windows before 2000"),
    ),
    (r"windows ?hyper-?v|windowshyperv", _windows("win10", "Hyper-V Server")),
    (r"windows|microsoft|\b(win|windows)\b", _WINDOWS),
    # initramfs-tools puts all usual drivers in (MODULES=most), mkinitfs and
    # Photon's and Flatcar's images have VirtIO built for the cloud.
    (
        r"debian ?[45]\b|debian[45]-",
        System(_LIN, "l26", Storage.IDE, "e1000", "Debian"),
    ),
    (r"debian", _linux(Storage.VIRTIO, "Debian")),
    (r"ubuntu|linux ?mint|kali|proxmox", _linux(Storage.VIRTIO, "Ubuntu or like it")),
    (r"alpine", _linux(Storage.VIRTIO, "Alpine")),
    (r"vmware-?photon|photon", _linux(Storage.VIRTIO, "Photon OS")),
    (r"coreos|flatcar", _linux(Storage.VIRTIO, "CoreOS")),
    # dracut and mkinitrd take in what the machine has (host-only).
    (
        r"rhel ?[2345]\b|rhel[2345]-|red ?hat enterprise linux ?[2345]\b"
        r"|centos ?[2345]\b|oracle(linux)? ?[45]\b|sles ?(9|10)\b|sles-",
        System(_LIN, "l26", Storage.IDE, "e1000", "an old enterprise Linux"),
    ),
    (
        r"rhel|red ?hat|centos|rocky|alma|oracle|fedora|amazonlinux|asianux"
        r"|sles|suse|crxsys|miracle|mandriva|mandrake|turbolinux|gentoo|arch ?linux",
        _linux(Storage.KEPT, "a Linux with dracut or like it"),
    ),
    (
        r"other ?2?4x?-?linux|linux ?2\.?[24]\b|other24",
        System(_LIN, "l24", Storage.IDE, "pcnet", "a Linux 2.4"),
    ),
    (r"other26x|linux ?2\.?6", System(_LIN, "l26", Storage.IDE, "e1000", "Linux 2.6")),
    (r"linux|gnu", _LINUX),
    (
        r"solaris|opensolaris|oraclesolaris",
        System(Family.OTHER, "solaris", Storage.AHCI, "e1000", "Solaris"),
    ),
    (
        r"(free|net|open)bsd",
        System(Family.OTHER, "other", Storage.AHCI, "e1000", "a BSD"),
    ),
    (
        r"darwin|mac ?os|vmkernel|netware|os/?2|ecomstation|unixware|openserver"
        r"|beos|haiku",
        OF_FAMILY[Family.OTHER],
    ),
)
_CIM: Final = {
    **{36: "linux", 58: "windows 2000", 67: "windows xp", 69: "windows 2003"},
    **{70: "windows 2003", 71: "windows xp", 72: "windows xp", 73: "windows vista"},
    **{74: "windows vista", 76: "windows 2008", 77: "windows 2008", 42: "freebsd"},
    **{78: "freebsd", 79: "rhel", 80: "rhel", 29: "solaris", 81: "solaris", 82: "suse"},
    **{83: "suse", 84: "sles 11", 85: "sles 11", 93: "ubuntu", 94: "ubuntu"},
    **{95: "debian", 96: "debian", 97: "linux 2.4", 98: "linux 2.4", 99: "linux 2.6"},
    **{100: "linux 2.6", 101: "linux", 103: "windows 2008 r2", 105: "windows 7"},
    **{106: "centos", 107: "centos", 108: "oracle", 109: "oracle", 112: "windows 2012"},
    **{113: "windows 8", 114: "windows 8", 115: "windows 2012", 116: "windows 2016"},
    **{117: "windows 8", 118: "windows 8", 119: "windows 10", 120: "windows 10"},
}
"""CIM_OperatingSystem.OSType; what is missing says too little."""


def of_cim(number: int) -> str:
    """Return a name for a number of the CIM; empty where it says nothing."""
    return _CIM.get(number, "")


def system_of(os_id: str, family: Family = Family.UNKNOWN) -> System:
    """Return what is known of a system.

    Args:
        os_id: its name in anybody's words.
        family: what else is known, where the name says nothing.
    """
    name = re.sub(r"[_\s]+", " ", os_id.lower().replace("(r)", "").replace("®", ""))
    name = (
        re.sub(r"guest$", "", name.strip()).replace(" 64", "-64").replace("(64", "-64(")
    )
    for pattern, system in _ROWS:
        if name and re.search(pattern, name):
            return system
    return OF_FAMILY[family]


def family_of(os_id: str) -> Family:
    """Return the family a system belongs to."""
    return system_of(os_id).family
