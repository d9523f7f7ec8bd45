# SPDX-License-Identifier: Apache-2.0
"""Parameters of the calls the lab answers, verified with PVE's texts.

A test compares this table with the schema of the real releases where that is at hand.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from .errors import ApiError
from .vmconfig import BUSES, LOCKS, parse_props

VMID = (100, 999_999_999)


@dataclass(frozen=True, slots=True)
class P:
    """One parameter."""

    type: str = "string"
    required: bool = False
    low: float | None = None
    high: float | None = None
    enum: tuple[str, ...] = ()
    pattern: str = ""
    longest: int | None = None
    props: frozenset[str] | None = None
    default_key: str | None = None


def _p(text: str) -> P:
    """Short form: ``int``, ``bool``, ``str<=40``, ``a|b``, ``/regex/``; ``!``: must."""
    required = text.endswith("!")
    text = text.removesuffix("!")
    if text == "vmid":
        return P("integer", required, *VMID)
    if text.startswith("/"):
        return P("string", required, pattern=text.strip("/"))
    if match := re.fullmatch(r"(int|num)(?:\((-?\d*),(-?\d*)\))?", text):
        low, high = match[2], match[3]
        return P(
            "integer" if match[1] == "int" else "number",
            required,
            float(low) if low else None,
            float(high) if high else None,
        )
    if match := re.fullmatch(r"str(?:<=(\d+))?", text):
        return P("string", required, longest=int(match[1]) if match[1] else None)
    if text == "bool":
        return P("boolean", required)
    if text == "array":
        return P("array", required)
    return P("string", required, enum=tuple(text.split("|")))


def table(text: str, release: str = "9.2") -> dict[str, P]:
    """Read ``name=kind`` words; ``9:name=kind`` is unknown to 8.4, ``8:…`` to 9."""
    found = {}
    other = "8:" if release.startswith("9") else "9:"
    for item in text.split():
        if not item.startswith(other):
            name, kind = re.sub(r"^[89]:", "", item).split("=", 1)
            found[name] = _p(kind)
    return found


CONFIG = table(
    r"""acpi=bool affinity=str agent=str allow-ksm=bool amd-sev=str
    arch=x86_64|aarch64 args=str audio0=str autostart=bool balloon=int(0,)
    bios=seabios|ovmf boot=str bootdisk=/(ide|sata|scsi|virtio)\d+/ cdrom=str
    cicustom=str cipassword=str citype=configdrive2|nocloud|opennebula ciupgrade=bool
    ciuser=str cores=int(1,) cpu=str cpulimit=num(0,128) cpuunits=int(1,262144)
    description=str<=8192 freeze=bool hookscript=str hotplug=str hugepages=any|2|1024
    intel-tdx=str ivshmem=str keephugepages=bool keyboard=str kvm=bool localtime=bool
    machine=str memory=str migrate_downtime=num(0,) migrate_speed=int(0,)
    name=/[a-zA-Z0-9]([a-zA-Z0-9-]*[a-zA-Z0-9])?(\.[a-zA-Z0-9]([a-zA-Z0-9-]*[a-zA-Z0-9])?)*/
    nameserver=str numa=bool onboot=bool
    ostype=other|wxp|w2k|w2k3|w2k8|wvista|win7|win8|win10|win11|l24|l26|solaris
    protection=bool reboot=bool rng0=str
    scsihw=lsi|lsi53c810|virtio-scsi-pci|virtio-scsi-single|megasas|pvscsi
    searchdomain=str shares=int(0,50000) smbios1=str<=512 smp=int(1,) sockets=int(1,)
    spice_enhancements=str sshkeys=str
    startdate=/(now|\d{4}-\d{1,2}-\d{1,2}(T\d{1,2}:\d{1,2}:\d{1,2})?)/ startup=str
    tablet=bool tags=str tdf=bool template=bool tpmstate0=str efidisk0=str vcpus=int(1,)
    vga=str vmgenid=/(?:[a-fA-F0-9]{8}(?:-[a-fA-F0-9]{4}){3}-[a-fA-F0-9]{12}|[01])/
    vmstatestorage=str watchdog=str"""
)
CONFIG["lock"] = P(enum=LOCKS)
_DRIVE = frozenset(
    """aio backup bps bps_max_length bps_rd bps_rd_length bps_rd_max_length bps_wr
    bps_wr_length bps_wr_max_length cache detect_zeroes discard file format import-from
    iops iops_max iops_max_length iops_rd iops_rd_length iops_rd_max iops_rd_max_length
    iops_wr iops_wr_length iops_wr_max iops_wr_max_length mbps mbps_max mbps_rd
    mbps_rd_max mbps_wr mbps_wr_max media replicate rerror serial shared size snapshot
    volume werror""".split()
)
_SCSI = _DRIVE | {
    "iothread",
    "product",
    "queues",
    "ro",
    "scsiblock",
    "ssd",
    "vendor",
    "wwn",
}
DRIVES = {
    "ide": _DRIVE | {"model", "ssd", "wwn"},
    "sata": _DRIVE | {"ssd", "wwn"},
    "scsi": _SCSI,
    "virtio": _DRIVE | {"iothread", "ro"},
}
_NET = frozenset(
    """bridge e1000 e1000-82540em e1000-82544gc e1000-82545em e1000e firewall
    host-tunnel i82551 i82557b i82559er link_down macaddr model mtu ne2k_isa ne2k_pci
    pcnet queues rate rtl8139 tag trunks virtio vmxnet3""".split()
)
_EFI = frozenset(
    "efitype file format import-from ms-cert pre-enrolled-keys size volume".split()
)
_TPM = frozenset("file format import-from size version volume".split())
_AGENT = frozenset("enabled freeze-fs-on-backup fstrim_cloned_disks type".split())
INDEXED = {
    "hostpci": (15, P()),
    "ipconfig": (31, P()),
    "net": (31, P(props=_NET, default_key="model")),
    "numa": (7, P()),
    "parallel": (2, P(pattern=r"/dev/parport\d+|/dev/usb/lp\d+")),
    "serial": (3, P(pattern=r"(/dev/[^,]+|socket)")),
    "unused": (255, P(props=frozenset({"file", "volume"}), default_key="file")),
    "usb": (13, P()),
    "virtiofs": (9, P()),
    **{
        bus: (count - 1, P(props=DRIVES[bus], default_key="file"))
        for bus, count in BUSES.items()
    },
}
GEOMETRY = {"cyls", "heads", "secs", "trans"}
ONLY_9 = {"allow-ksm", "intel-tdx"}


def config_type(key: str, release: str = "9.2") -> P | None:
    """How a configuration key is verified; None when there is no such key."""
    nine = release.startswith("9")
    if key == "efidisk0":
        return P(props=_EFI, default_key="file")
    if key == "tpmstate0":
        return P(props=_TPM - (set() if nine else {"format"}), default_key="file")
    if key == "agent":
        more = {"freeze-fs", "guest-fsfreeze"} if nine else set()
        return P(props=_AGENT | more, default_key="enabled")
    if key in CONFIG and (nine or key not in ONLY_9):
        return CONFIG[key]
    match = re.fullmatch(r"([a-z]+)(0|[1-9]\d*)", key)
    if match and match[1] in INDEXED:
        highest, kind = INDEXED[match[1]]
        if match[1] in BUSES and not nine:
            assert kind.props
            kind = replace(kind, props=kind.props | GEOMETRY)
        if match[1] == "net" and not nine:
            assert kind.props
            kind = replace(kind, props=kind.props - {"host-tunnel"})
        return kind if int(match[2]) <= highest else None
    return None


def verify(
    given: dict[str, Any],
    known: dict[str, P],
    *,
    config: bool = False,
    release: str = "9.2",
) -> dict[str, Any]:
    """Check and convert parameters.

    Raises:
        ApiError: 400 ``Parameter verification failed.`` with a text per parameter.
    """
    errors: dict[str, str] = {}
    result: dict[str, Any] = {}
    for key, value in given.items():
        kind = known.get(key) or (config_type(key, release) if config else None)
        if kind is None:
            errors[key] = (
                "property is not defined in schema and the schema does not allow "
                "additional properties"
            )
            continue
        try:
            result[key] = _convert(key, value, kind)
        except ValueError as error:
            errors[key] = str(error)
    for key, kind in known.items():
        if kind.required and key not in given:
            errors[key] = "property is missing and it is not optional"
    if errors:
        raise ApiError(400, "Parameter verification failed.", errors)
    return result


def _convert(key: str, value: Any, kind: P) -> Any:
    if kind.type == "array":
        items = value if isinstance(value, list) else [value]
        return [str(item) for item in items]
    if isinstance(value, list):
        if key in ("delete", "revert", "idlist"):
            return ",".join(map(str, value))
        raise ValueError(f"type check ('{kind.type}') failed - got ARRAY")
    if isinstance(value, bool):
        value = int(value)
    text = str(value)
    match kind.type:
        case "boolean":
            low = text.lower()
            if low in ("1", "on", "yes", "true"):
                return 1
            if low in ("0", "off", "no", "false", ""):
                return 0
            raise ValueError(f"type check ('boolean') failed - got '{text}'")
        case "integer" | "number":
            pattern = r"[+-]?\d+" if kind.type == "integer" else r"[+-]?\d+(\.\d+)?"
            if not re.fullmatch(pattern, text):
                raise ValueError(f"type check ('{kind.type}') failed - got '{text}'")
            number = float(text)
            if kind.low is not None and number < kind.low:
                raise ValueError(f"value must have a minimum value of {kind.low:g}")
            if kind.high is not None and number > kind.high:
                raise ValueError(f"value must have a maximum value of {kind.high:.0f}")
            return int(text) if kind.type == "integer" else number
    if kind.enum and text not in kind.enum:
        raise ValueError(
            f"value '{text}' does not have a value in the enumeration "
            f"'{', '.join(kind.enum)}'"
        )
    if kind.pattern and not re.fullmatch(kind.pattern, text):
        raise ValueError("value does not match the regex pattern")
    if kind.longest and len(text) > kind.longest:
        raise ValueError(f"value may only be {kind.longest} characters long")
    if kind.props is not None:
        for name in parse_props(text, kind.default_key):
            if name not in kind.props:
                raise ValueError(
                    f"invalid format - format error\n{key}.{name}: property is not "
                    "defined in schema and the schema does not allow additional "
                    "properties\n"
                )
    return text
