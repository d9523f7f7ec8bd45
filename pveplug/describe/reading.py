# SPDX-License-Identifier: Apache-2.0
"""Which of a backup's files describes the VM, by content, and what it says."""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from pveplug.describe import hyperv, ovf, safexml, sidecar, vmx
from pveplug.describe.guest import GuestDescription, one_line
from pveplug.errors import DescriptionError

MAX_FILE: Final = safexml.MAX_BYTES
"""Bytes; a longer file is refused: as much of one is enough to know that."""
_VMCX: Final = b"\x14\x20\x28\x01"
_BLOCK: Final = 512
_CHECKPOINT: Final = re.compile(r"(^|[/\\])snapshots[/\\]", re.IGNORECASE)
_REMEDY: Final = (
    "give its JSON sidecar instead (docs/descriptions.md), or the file that "
    "Get-VM -Name … | Export-Clixml writes on the Hyper-V host"
)


class Kind(enum.Enum):
    """What a file is; a better description comes before a poorer one."""

    SIDECAR = "JSON sidecar"
    VMX = "VMX"
    OVF = "OVF"
    HYPERV_XML = "Hyper-V XML"
    POWERSHELL = "PowerShell export"
    VMCX = "Hyper-V's binary configuration (.vmcx)"


def detect(data: bytes) -> Kind | None:
    """Say what a file is by its content; None where it describes no VM.

    A cheap look that never raises: what it names may still be damaged.
    """
    if data.startswith(_VMCX):
        return Kind.VMCX
    if _is_tar(data):
        return Kind.OVF if _first_of_tar(data) is not None else None
    head = _head(data)
    if head.startswith("<"):
        return _xml_kind(head)
    if head.startswith(("{", "[")):
        return _json_kind(data)
    return Kind.VMX if vmx.is_vmx(head) else None


def read_description(files: Mapping[str, bytes]) -> GuestDescription:
    """Read the VM's description out of a backup's small files.

    Args:
        files: name -> content, in any order. What describes nothing (logs, NVRAM, a
            VMDK's descriptor) is passed over; an OVA may be given by its beginning.

    Returns: the best one: sidecar before VMX before OVF before Hyper-V's XML before
        what PowerShell wrote. What was passed over for it is in ``notes``.

    Raises:
        DescriptionError: none describes a VM; two of a kind do; it is damaged.
    """
    kinds = {name: kind for name, data in files.items() if (kind := detect(data))}
    if not kinds:
        names = ", ".join(one_line(name, 80) for name in sorted(files)[:8])
        raise DescriptionError(
            "describes no VM: OVF, VMX, Hyper-V XML, a PowerShell export or a JSON "
            "sidecar is needed (docs/descriptions.md)",
            file=names or "no file",
        )
    best = next(kind for kind in Kind if kind in kinds.values())
    of_best = sorted(name for name, kind in kinds.items() if kind is best)
    if best is Kind.HYPERV_XML:  # an export has its checkpoints beside it
        now = [name for name in of_best if not _CHECKPOINT.search(name)]
        of_best = now or of_best
    if len({files[name] for name in of_best}) > 1 and best is not Kind.VMCX:
        raise DescriptionError(
            f"{len(of_best)} files describe a VM, each a {best.value}: "
            f"{', '.join(one_line(name, 60) for name in of_best[:8])}; give one",
            file=of_best[0],
        )
    name = of_best[0]
    found = read_one(name, files[name])
    others = sorted(other for other in kinds if other not in of_best)
    if others:
        note = f"{found.source} was read; passed over for it: {', '.join(others)}"
        found = replace(found, notes=(*found.notes, one_line(note)))
    return found


def read_one(name: str, data: bytes) -> GuestDescription:
    """Read one file that describes a VM.

    Raises:
        DescriptionError: it doesn't, or is damaged.
    """
    file = one_line(name, 200)
    kind = detect(data)
    if kind is Kind.VMCX:
        raise DescriptionError(f"{kind.value}, which isn't read; {_REMEDY}", file=file)
    if kind is Kind.VMX:
        return vmx.read(data, file)
    head = _head(data)
    if head.startswith(("{", "[")):
        value = sidecar.load_json(data, file)
        if sidecar.is_sidecar(value):
            return sidecar.read(value, file)
        if hyperv.is_powershell_vm(value):
            return hyperv.read_powershell(value, file)
    elif head.startswith("<") or _is_tar(data):
        inner = _first_of_tar(data) if _is_tar(data) else data
        if inner is None:
            raise DescriptionError("its first file is no whole .ovf", file=file)
        root = safexml.parse(inner, file)
        if ovf.is_ovf(root):
            return ovf.read(root, file)
        if hyperv.is_configuration(root):
            return hyperv.read_configuration(root, file)
        if hyperv.is_clixml(root):
            return hyperv.read_powershell(hyperv.clixml_vm(root, file), file)
        if any(e.name == "DECLARATIONS" for e in (root, *root.children)):
            raise DescriptionError(
                f"an export of Windows Server 2008 (.exp), which isn't read; {_REMEDY}",
                file=file,
            )
        raise DescriptionError(
            f"XML with {one_line(root.name, 60)} at its root describes no VM",
            file=file,
            line=root.line,
        )
    raise DescriptionError(
        "describes no VM: neither OVF, VMX, Hyper-V XML, a PowerShell export nor a "
        "JSON sidecar (docs/descriptions.md)",
        file=file,
    )


def _head(data: bytes) -> str:
    """The first characters, whichever Unicode they are in."""
    first = data[:16384]
    if first.startswith((b"\xff\xfe", b"<\0", b"{\0", b"[\0")):
        text = first.decode("utf-16-le", "replace")
    elif first.startswith((b"\xfe\xff", b"\0<", b"\0{", b"\0[")):
        text = first.decode("utf-16-be", "replace")
    else:
        text = first.decode("utf-8", "replace")
    return text.lstrip("\ufeff \t\r\n")


def _xml_kind(head: str) -> Kind | None:
    plain = re.sub(r"<\?.*?\?>|<!--.*?-->", "", head, flags=re.DOTALL)
    found = re.search(r"<(?:[\w.-]{1,60}:)?([\w.-]{1,60})", plain)
    name = found[1] if found else ""
    if name == "Envelope":
        return Kind.OVF
    if name.lower() == "configuration" or name in ("DECLARATIONS", "CIM"):
        return Kind.HYPERV_XML
    if name == "Objs":
        return Kind.POWERSHELL
    if "<!DOCTYPE" in head and re.search(r"<(\w+:)?(Envelope|configuration)", head):
        return Kind.OVF  # so that it is refused by name, not passed over
    return None


def _json_kind(data: bytes) -> Kind | None:
    try:
        value = sidecar.load_json(data, "")
    except DescriptionError:
        wanted = re.search(rb'"schema"\s*:\s*"pveplug-guest/', data[:65536])
        return Kind.SIDECAR if wanted else None
    if sidecar.is_sidecar(value):
        return Kind.SIDECAR
    return Kind.POWERSHELL if hyperv.is_powershell_vm(value) else None


def _is_tar(data: bytes) -> bool:
    return data[257:262] == b"ustar" and len(data) > _BLOCK


def _first_of_tar(data: bytes) -> bytes | None:
    """Return an OVA's descriptor, its first file by DSP0243; None where it isn't."""
    name = data[:100].split(b"\0", 1)[0].lower()
    digits = data[124:136].strip(b" \0")
    if not name.endswith(b".ovf") or not re.fullmatch(rb"[0-7]{1,11}", digits):
        return None
    size = int(digits, 8)
    inner = data[_BLOCK : _BLOCK + size]
    return inner if 0 < len(inner) == size else None
