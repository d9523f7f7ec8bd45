# SPDX-License-Identifier: Apache-2.0
"""Our own neutral description of a VM, as JSON: ``{"schema": "pveplug-guest/1", …}``.

What a program writes that can ask the hypervisor itself; docs/descriptions.md has every
field. An unknown field is an error that suggests the nearest one, so that nothing is
lost by a slip of the pen; ``x-…`` is anybody's and is left alone.
"""

from __future__ import annotations

import difflib
import enum
import json
import re
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

from pveplug.describe.guest import (
    MAX_CAPACITY,
    MAX_CPUS,
    MAX_DISKS,
    MAX_MEMORY_MIB,
    MAX_NAME,
    MAX_NICS,
    MAX_TEXT,
    Bus,
    Family,
    Firmware,
    GuestCdrom,
    GuestDescription,
    GuestDisk,
    GuestNic,
    mac_address,
    one_line,
)
from pveplug.describe.systems import family_of
from pveplug.errors import DescriptionError
from pveplug.units import MiB

SCHEMA: Final = "pveplug-guest"
VERSION: Final = 1
MAX_BYTES: Final = 4 * MiB
_LIST: Final = 10_000
_E = TypeVar("_E", bound=enum.Enum)
_FIELDS: Final = {
    "": "schema name firmware secure_boot tpm sockets cores threads memory_mib "
    "memory_min_mib disks cdroms nics os_id family uuid machine localtime text dropped "
    "notes source agent",
    "disks": "bus controller unit model file capacity boot",
    "cdroms": "bus controller unit file",
    "nics": "model mac network connected vlan",
}


def is_sidecar(value: object) -> bool:
    """Whether JSON says that it is one, of whatever version."""
    named = value.get("schema") if isinstance(value, dict) else None
    return isinstance(named, str) and named.startswith(f"{SCHEMA}/")


def load_json(data: bytes, file: str) -> Any:
    """Read JSON, with its size bounded and every key once.

    Raises:
        DescriptionError: it is none.
    """
    if len(data) > MAX_BYTES:
        raise DescriptionError(
            f"{len(data)} bytes of JSON; more than {MAX_BYTES} aren't read", file=file
        )

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise DescriptionError(f"{one_line(twice, 60)!r} is there twice", file=file)
        return found

    def constant(text: str) -> Any:
        raise DescriptionError(f"{text} is no JSON", file=file)

    def integer(text: str) -> int:
        if len(text) > 20:
            raise DescriptionError(f"a number of {len(text)} digits", file=file)
        return int(text)

    try:
        encoding = json.detect_encoding(data)
        text = data.decode(encoding)
        return json.loads(
            text,
            object_pairs_hook=once,
            parse_constant=constant,
            parse_int=integer,
        )
    except json.JSONDecodeError as error:
        raise DescriptionError(
            f"not JSON: {error.msg} (column {error.colno})",
            file=file,
            line=error.lineno,
        ) from None
    except UnicodeDecodeError as error:
        raise DescriptionError(f"not JSON: {error.reason}", file=file) from None
    except RecursionError:
        raise DescriptionError("JSON nested too deep", file=file) from None


def read(value: Mapping[str, Any], file: str) -> GuestDescription:
    """Read a sidecar.

    Raises:
        DescriptionError: a field is unknown, or its value is none of those allowed.
    """
    return _Sidecar(file).run(value)


def render(vm: GuestDescription) -> bytes:
    """Write a description as a sidecar: read again it is equal to this one."""
    value: dict[str, Any] = {
        "schema": f"{SCHEMA}/{VERSION}",
        "source": vm.source,
        "name": vm.name,
        "firmware": vm.firmware.value,
        "secure_boot": vm.secure_boot,
        "tpm": vm.tpm,
        "sockets": vm.sockets,
        "cores": vm.cores,
        "threads": vm.threads,
        "memory_mib": vm.memory_mib,
        "memory_min_mib": vm.memory_min_mib,
        "disks": [
            {
                "bus": disk.bus.value,
                "controller": disk.controller,
                "unit": disk.unit,
                "model": disk.model,
                "file": disk.file,
                "capacity": disk.capacity,
                "boot": disk.boot,
            }
            for disk in vm.disks
        ],
        "cdroms": [
            {
                "bus": cdrom.bus.value,
                "controller": cdrom.controller,
                "unit": cdrom.unit,
                "file": cdrom.file,
            }
            for cdrom in vm.cdroms
        ],
        "nics": [
            {
                "model": nic.model,
                "mac": nic.mac,
                "network": nic.network,
                "connected": nic.connected,
                "vlan": nic.vlan,
            }
            for nic in vm.nics
        ],
        "os_id": vm.os_id,
        "family": vm.family.value,
        "uuid": vm.uuid,
        "machine": list(vm.machine),
        "localtime": vm.localtime,
        "agent": vm.agent,
        "text": vm.text,
        "dropped": [list(pair) for pair in vm.dropped],
        "notes": list(vm.notes),
    }
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


class _Sidecar:
    def __init__(self, file: str) -> None:
        self.file = file

    def wrong(self, where: str, why: str) -> DescriptionError:
        return DescriptionError(f"{where}: {why}", file=self.file)

    def run(self, value: Mapping[str, Any]) -> GuestDescription:
        version = value["schema"].partition("/")[2]
        if version != str(VERSION):
            raise self.wrong(
                "schema",
                f"version {one_line(version, 20)} isn't known, only {VERSION}; "
                "a newer pveplug may know it",
            )
        self.known(value, "")
        disks = self.several(value, "disks", MAX_DISKS, self.disk)
        cdroms = self.several(value, "cdroms", MAX_DISKS, self.cdrom)
        taken: set[tuple[Bus, int, int]] = set()
        for place in (
            *((disk.bus, disk.controller, disk.unit) for disk in disks),
            *((cdrom.bus, cdrom.controller, cdrom.unit) for cdrom in cdroms),
        ):
            if place in taken:
                raise self.wrong(
                    "disks", f"two drives at {place[0].value}{place[1]}:{place[2]}"
                )
            taken.add(place)
        os_id = self.text(value, "os_id", 200)
        family = self.choice(value, "family", Family, Family.UNKNOWN)
        if "family" not in value:
            family = family_of(os_id)
        sockets = self.number(value, "sockets", 1, MAX_CPUS)
        return GuestDescription(
            source=self.text(value, "source", MAX_NAME) or f"sidecar {self.file}",
            name=self.text(value, "name", MAX_NAME),
            firmware=self.choice(value, "firmware", Firmware, Firmware.UNKNOWN),
            secure_boot=self.flag(value, "secure_boot"),
            tpm=self.flag(value, "tpm"),
            sockets=sockets,
            cores=self.number(value, "cores", 1, MAX_CPUS),
            threads=self.number(value, "threads", 1, 64) or 1,
            memory_mib=self.number(value, "memory_mib", 1, MAX_MEMORY_MIB),
            memory_min_mib=self.number(value, "memory_min_mib", 1, MAX_MEMORY_MIB),
            disks=disks,
            cdroms=cdroms,
            nics=self.several(value, "nics", MAX_NICS, self.nic),
            os_id=os_id,
            family=family,
            uuid=self.uuid(value),
            machine=self.several(value, "machine", 100, self.line),
            localtime=self.flag(value, "localtime"),
            agent=self.flag(value, "agent"),
            text=self.text(value, "text", MAX_TEXT, lines=True),
            dropped=self.several(value, "dropped", _LIST, self.pair),
            notes=self.several(value, "notes", _LIST, self.line),
        )

    def known(self, value: Mapping[str, Any], where: str) -> None:
        names = _FIELDS[where].split()
        for key in value:
            if key not in names and not key.startswith("x-"):
                near = difflib.get_close_matches(key[:40], names, 1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise self.wrong(
                    where or "the VM", f"{one_line(key, 60)!r} isn't known{hint}"
                )

    _T = TypeVar("_T")

    def several(
        self,
        value: Mapping[str, Any],
        key: str,
        most: int,
        one: Callable[[str, int, Any], _T],
    ) -> tuple[_T, ...]:
        listed = value.get(key)
        if listed is None:
            return ()
        if not isinstance(listed, list) or len(listed) > most:
            raise self.wrong(key, f"is to be a list of at most {most}")
        return tuple(one(key, number, item) for number, item in enumerate(listed))

    def object(self, key: str, number: int, item: Any) -> Mapping[str, Any]:
        if not isinstance(item, dict):
            raise self.wrong(f"{key}[{number}]", "is to be an object")
        self.known(item, key)
        return item

    def disk(self, key: str, number: int, item: Any) -> GuestDisk:
        disk = self.object(key, number, item)
        return GuestDisk(
            number,
            self.choice(disk, "bus", Bus, Bus.UNKNOWN),
            self.number(disk, "controller", 0, 255) or 0,
            self.place(disk, number),
            model=self.text(disk, "model", 40),
            file=self.text(disk, "file", MAX_NAME) or None,
            capacity=self.number(disk, "capacity", 1, MAX_CAPACITY),
            boot=self.flag(disk, "boot") or False,
        )

    def cdrom(self, key: str, number: int, item: Any) -> GuestCdrom:
        cdrom = self.object(key, number, item)
        return GuestCdrom(
            self.choice(cdrom, "bus", Bus, Bus.UNKNOWN),
            self.number(cdrom, "controller", 0, 255) or 0,
            # Without a place of its own it is out of the disks' way.
            self.place(cdrom, MAX_DISKS + number),
            self.text(cdrom, "file", MAX_NAME) or None,
        )

    def place(self, drive: Mapping[str, Any], otherwise: int) -> int:
        unit = self.number(drive, "unit", 0, 65535)
        return otherwise if unit is None else unit

    def nic(self, key: str, number: int, item: Any) -> GuestNic:
        nic = self.object(key, number, item)
        said = self.text(nic, "mac", 40)
        mac = mac_address(said)
        if said and mac is None:
            raise self.wrong(
                f"nics[{number}].mac", f"{said!r} is no address of a network card"
            )
        connected = self.flag(nic, "connected")
        return GuestNic(
            model=self.text(nic, "model", 40),
            mac=mac,
            network=self.text(nic, "network", MAX_NAME),
            connected=connected is not False,
            vlan=self.number(nic, "vlan", 1, 4094),
        )

    def line(self, key: str, number: int, item: Any) -> str:
        return self.text({key: item}, key, MAX_NAME)

    def pair(self, key: str, number: int, item: Any) -> tuple[str, str]:
        if not isinstance(item, list) or len(item) != 2:
            raise self.wrong(f"{key}[{number}]", "is to be [what, why]")
        return self.line(key, number, item[0]), self.line(key, number, item[1])

    def text(
        self, value: Mapping[str, Any], key: str, most: int, *, lines: bool = False
    ) -> str:
        said = value.get(key)
        if said is None:
            return ""
        if not isinstance(said, str) or len(said) > most:
            raise self.wrong(key, f"is to be a text of at most {most} characters")
        odd = next((c for c in said if not c.isprintable() and c not in " \n\t"), None)
        if odd is not None or (not lines and re.search(r"[\n\t]", said)):
            raise self.wrong(key, "has a control character")
        return said

    def flag(self, value: Mapping[str, Any], key: str) -> bool | None:
        said = value.get(key)
        if said is not None and not isinstance(said, bool):
            raise self.wrong(key, "is to be true, false or null")
        return said

    def number(
        self, value: Mapping[str, Any], key: str, least: int, most: int
    ) -> int | None:
        said = value.get(key)
        if said is None:
            return None
        if type(said) is not int or not least <= said <= most:
            raise self.wrong(key, f"is to be a whole number from {least} to {most}")
        return said

    def choice(
        self, value: Mapping[str, Any], key: str, kind: type[_E], default: _E
    ) -> _E:
        said = value.get(key)
        if said is None:
            return default
        for member in kind:
            if member.value == said:
                return member
        allowed = ", ".join(str(member.value) for member in kind)
        raise self.wrong(key, f"is to be one of {allowed}")

    def uuid(self, value: Mapping[str, Any]) -> str | None:
        said = self.text(value, "uuid", 60)
        try:
            return str(uuid.UUID(said)) if said else None
        except ValueError:
            raise self.wrong("uuid", f"{said!r} is none") from None
