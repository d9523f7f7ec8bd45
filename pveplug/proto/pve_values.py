# SPDX-License-Identifier: Apache-2.0
"""What Proxmox VE tells, as frozen values: tasks, guests, configurations, storages.

``Any`` from JSON comes in here and nowhere further: every ``parse_*`` function returns
a value or raises :class:`RemoteProtocolError`. PVE is loose with types (numbers as
strings, absent for false), so reading is tolerant and the result is not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final
from urllib.parse import unquote

from pveplug.errors import RemoteProtocolError

# --- tasks -------------------------------------------------------------------------

_UPID: Final = re.compile(
    r"UPID:([A-Za-z0-9][A-Za-z0-9.\-]*):([0-9A-Fa-f]{8}):([0-9A-Fa-f]{8,9})"
    r":([0-9A-Fa-f]{8}):([^:\s]+):([^:\s]*):([^:\s]+):"
)


@dataclass(frozen=True, slots=True)
class Upid:
    """The name of a task: ``UPID:node:pid:pstart:starttime:type:id:user:``."""

    text: str
    node: str
    pid: int
    pstart: int
    starttime: int
    type: str
    id: str
    user: str

    def __str__(self) -> str:
        return self.text


def parse_upid(text: object) -> Upid:
    """Take a UPID apart.

    Raises:
        RemoteProtocolError: ``text`` isn't one.
    """
    found = _UPID.fullmatch(text.strip()) if isinstance(text, str) else None
    if found is None:
        raise RemoteProtocolError(f"not a task id of Proxmox VE: {str(text)[:120]!r}")
    node, pid, pstart, starttime, kind, ident, user = found.groups()
    return Upid(
        found.group(0),
        node,
        int(pid, 16),
        int(pstart, 16),
        int(starttime, 16),
        kind,
        ident,
        user,
    )


def is_upid(value: object) -> bool:
    """Tell whether PVE answered with the id of a task it started."""
    return isinstance(value, str) and value.startswith("UPID:")


@dataclass(frozen=True, slots=True)
class TaskState:
    """A task as its status call tells it; ``exitstatus`` is empty while it runs."""

    running: bool
    exitstatus: str

    @property
    def warnings(self) -> int:
        """How many warnings a successful task counted."""
        head, _, count = self.exitstatus.partition(":")
        if head.strip() != "WARNINGS":
            return 0
        return int(count) if count.strip().isdigit() else 1

    @property
    def succeeded(self) -> bool:
        """``OK`` and ``WARNINGS: n`` are success, every other text is the error."""
        return not self.running and (self.exitstatus == "OK" or self.warnings > 0)


def parse_task(data: Any) -> TaskState:
    """Read ``GET /nodes/{node}/tasks/{upid}/status``.

    Raises:
        RemoteProtocolError: there is no status in it.
    """
    status = _object(data, "task status").get("status")
    if status not in ("running", "stopped"):
        raise RemoteProtocolError(
            f"task status {status!r} is neither running nor stopped"
        )
    exitstatus = str(data.get("exitstatus") or "").strip()
    if status == "running":
        return TaskState(True, "")
    return TaskState(False, exitstatus or "unexpected status")


def parse_log(data: Any) -> list[str]:
    """Read the lines of ``GET …/log``; PVE says ``no content`` for an empty one."""
    rows = [row for row in _list(data, "task log") if isinstance(row, dict)]
    lines = [str(row.get("t") or "").rstrip() for row in rows]
    return [line for line in lines if line and line != "no content"]


def log_warnings(lines: Iterable[str]) -> list[str]:
    """Return the warnings of a task's log without their ``WARN:``."""
    found = []
    for line in lines:
        if cut := re.match(r"(?i)\s*warn(?:ing)?:\s*(.+)", line):
            found.append(cut.group(1).strip())
    return found


def log_tail(lines: list[str], count: int = 3) -> str:
    """Return the last lines that say something beyond the verdict, joined by ``; ``."""
    noise = re.compile(
        r"TASK (?:OK|WARNINGS|ERROR)|\s*(?:transferred|drive-\w+: transf)"
    )
    useful = [line.strip() for line in lines if not noise.match(line)]
    return "; ".join(line[:200] for line in useful[-count:])


# --- guests ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Resource:
    """One guest of the cluster; ``type`` is ``qemu`` or ``lxc``."""

    vmid: int
    node: str
    name: str
    type: str
    status: str
    template: bool
    pool: str
    tags: tuple[str, ...]
    lock: str
    maxdisk: int = 0


def parse_resources(data: Any) -> list[Resource]:
    """Read ``GET /cluster/resources?type=vm``, ordered by VMID.

    Raises:
        RemoteProtocolError: it isn't a list of guests.
    """
    found = []
    for row in _list(data, "cluster resources"):
        row = _object(row, "cluster resource")
        if row.get("type") not in ("qemu", "lxc"):
            continue
        found.append(
            Resource(
                vmid=_integer(row, "vmid"),
                node=_text(row, "node"),
                name=_text(row, "name"),
                type=_text(row, "type"),
                status=_text(row, "status") or "unknown",
                template=_truth(row, "template"),
                pool=_text(row, "pool"),
                tags=split_tags(_text(row, "tags")),
                lock=_text(row, "lock"),
                maxdisk=_integer(row, "maxdisk", 0),
            )
        )
    return sorted(found, key=lambda resource: resource.vmid)


def split_tags(text: str) -> tuple[str, ...]:
    """Split PVE's tag list, which may be separated by ``;``, ``,`` or spaces."""
    return tuple(tag for tag in re.split(r"[;,\s]+", text) if tag)


@dataclass(frozen=True, slots=True)
class VmConfig:
    """A VM's configuration: key -> value as PVE prints it, and its digest."""

    values: Mapping[str, str]
    digest: str

    @property
    def lock(self) -> str:
        """The ``lock:`` the configuration carries, or an empty text."""
        return self.values.get("lock", "")


def parse_config(data: Any) -> VmConfig:
    """Read ``GET /nodes/{node}/qemu/{vmid}/config``.

    Raises:
        RemoteProtocolError: it isn't an object.
    """
    values = {
        str(key): ("1" if value is True else "0" if value is False else str(value))
        for key, value in _object(data, "VM configuration").items()
        if value is not None and not isinstance(value, dict | list)
    }
    digest = values.pop("digest", "")
    return VmConfig(MappingProxyType(values), digest)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A snapshot of a VM; ``time`` is seconds since 1970, 0 if PVE doesn't say.

    ``parent`` is the snapshot it was taken after, or empty for the first of a line.
    """

    name: str
    parent: str
    time: int
    description: str


def parse_snapshots(data: Any) -> list[Snapshot]:
    """Read ``GET /nodes/{node}/qemu/{vmid}/snapshot``, oldest first.

    The row ``current`` isn't a snapshot and is left out. PVE ends a description with a
    newline, which is not part of it.

    Raises:
        RemoteProtocolError: it isn't a list of named things.
    """
    found = []
    for row in _list(data, "snapshots"):
        row = _object(row, "snapshot")
        if not (name := _text(row, "name")):
            raise RemoteProtocolError("snapshot: no name in it")
        if name == "current":
            continue
        found.append(
            Snapshot(
                name=name,
                parent=_text(row, "parent"),
                time=_integer(row, "snaptime", 0),
                description=_text(row, "description").rstrip("\n"),
            )
        )
    return sorted(found, key=lambda snapshot: (snapshot.time, snapshot.name))


def parse_feature(data: Any) -> bool:
    """Read ``GET /nodes/{node}/qemu/{vmid}/feature``.

    Raises:
        RemoteProtocolError: it doesn't say.
    """
    row = _object(data, "VM feature")
    if row.get("hasFeature") is None:
        raise RemoteProtocolError("VM feature: no hasFeature in it")
    return _truth(row, "hasFeature")


def parse_qm_config(text: str) -> VmConfig:
    """Read what ``qm config VMID`` prints: ``key: value`` lines.

    A description stands there on one line, other bytes than plain ones as %XX.
    """
    values: dict[str, str] = {}
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon and re.fullmatch(r"[A-Za-z][\w-]*", key):
            value = value.strip()
            values[key] = unquote(value) if key == "description" else value
    digest = values.pop("digest", "")
    return VmConfig(MappingProxyType(values), digest)


@dataclass(frozen=True, slots=True)
class VmStatus:
    """What a VM is doing; empty texts and 0 are "PVE doesn't say"."""

    status: str
    qmpstatus: str
    lock: str
    running_machine: str
    running_qemu: str
    pid: int
    agent: bool
    name: str
    uptime_s: int
    template: bool
    ha_managed: bool

    @property
    def running(self) -> bool:
        """QEMU runs, which doesn't mean that the guest isn't paused."""
        return self.status == "running"


def parse_status(data: Any) -> VmStatus:
    """Read ``GET /nodes/{node}/qemu/{vmid}/status/current``.

    Raises:
        RemoteProtocolError: it isn't an object with a status.
    """
    row = _object(data, "VM status")
    if not (status := _text(row, "status")):
        raise RemoteProtocolError("VM status: no status in it")
    ha = row.get("ha")
    return VmStatus(
        status=status,
        qmpstatus=_text(row, "qmpstatus"),
        lock=_text(row, "lock"),
        running_machine=_text(row, "running-machine"),
        running_qemu=_text(row, "running-qemu"),
        pid=_integer(row, "pid", 0),
        agent=_truth(row, "agent"),
        name=_text(row, "name"),
        uptime_s=_integer(row, "uptime", 0),
        template=_truth(row, "template"),
        ha_managed=isinstance(ha, dict) and _truth(ha, "managed"),
    )


def parse_agent_result(data: Any) -> Any:
    """Unwrap ``{"result": …}`` of an ``agent/…`` call.

    Raises:
        RemoteProtocolError: there is no result in it.
    """
    row = _object(data, "guest agent answer")
    if "result" not in row:
        raise RemoteProtocolError("guest agent answer: no result in it")
    return row["result"]


@dataclass(frozen=True, slots=True)
class ExecStatus:
    """How a program in a guest fares; ``exitcode`` is None until it has exited.

    A program that a signal ended has no exit code either: see ``signal``, else 0.
    """

    exited: bool
    exitcode: int | None
    signal: int
    output: str
    errors: str
    truncated: bool


def parse_exec(data: Any) -> int:
    """Read the guest's process id from ``POST …/agent/exec``."""
    return _integer(_object(data, "guest agent exec"), "pid")


def parse_exec_status(data: Any) -> ExecStatus:
    """Read ``GET …/agent/exec-status``.

    Raises:
        RemoteProtocolError: it doesn't say whether the program has exited.
    """
    row = _object(data, "guest agent exec-status")
    if row.get("exited") is None:
        raise RemoteProtocolError("guest agent exec-status: no exited in it")
    return ExecStatus(
        exited=_truth(row, "exited"),
        exitcode=_integer(row, "exitcode") if "exitcode" in row else None,
        signal=_integer(row, "signal", 0),
        output=_text(row, "out-data"),
        errors=_text(row, "err-data"),
        truncated=_truth(row, "out-truncated") or _truth(row, "err-truncated"),
    )


# --- nodes and storages ------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Version:
    """``8.4.1`` as numbers, and as PVE prints it."""

    text: str
    major: int
    minor: int


def parse_version(data: Any) -> Version:
    """Read ``GET /version``.

    Raises:
        RemoteProtocolError: the version has no number in front.
    """
    text = _text(_object(data, "version"), "version")
    found = re.match(r"(\d+)(?:\.(\d+))?", text)
    if not found:
        raise RemoteProtocolError(f"Proxmox VE says its version is {text!r}")
    return Version(text, int(found.group(1)), int(found.group(2) or 0))


@dataclass(frozen=True, slots=True)
class ClusterNode:
    """One node of the cluster."""

    name: str
    status: str
    fingerprint: str

    @property
    def online(self) -> bool:
        return self.status == "online"


def parse_nodes(data: Any) -> list[ClusterNode]:
    """Read ``GET /nodes``, ordered by name."""
    rows = [_object(row, "node") for row in _list(data, "nodes")]
    found = [
        ClusterNode(
            _text(row, "node"),
            _text(row, "status") or "unknown",
            _text(row, "ssl_fingerprint"),
        )
        for row in rows
    ]
    return sorted(found, key=lambda node: node.name)


@dataclass(frozen=True, slots=True)
class Storage:
    """A storage as one node sees it; sizes in bytes, 0 when PVE doesn't say."""

    name: str
    type: str
    content: tuple[str, ...]
    total: int
    used: int
    avail: int
    active: bool
    enabled: bool
    shared: bool
    formats: tuple[str, ...] = field(default=())
    default_format: str = ""

    @property
    def holds_images(self) -> bool:
        return "images" in self.content


FILE_STORAGES: Final = frozenset({"dir", "nfs", "cifs", "cephfs", "glusterfs", "btrfs"})
"""Types whose volumes are files below a directory per VM."""


def volume_id(storage: Storage, vmid: int, name: str) -> str:
    """Return the id that a new volume of this file name will have."""
    if storage.type in FILE_STORAGES:
        return f"{storage.name}:{vmid}/{name}"
    return f"{storage.name}:{name}"


def parse_storages(data: Any) -> list[Storage]:
    """Read ``GET /nodes/{node}/storage?format=1``, ordered by name.

    8.4 and 9 give ``format`` as ``[{raw: 1, …}, "default"]``, newer ones ``formats``.
    """
    found = []
    for row in _list(data, "storages"):
        row = _object(row, "storage")
        formats, default = _formats(row)
        found.append(
            Storage(
                name=_text(row, "storage"),
                type=_text(row, "type"),
                content=split_tags(_text(row, "content")),
                total=_integer(row, "total", 0),
                used=_integer(row, "used", 0),
                avail=_integer(row, "avail", 0),
                active=_truth(row, "active"),
                enabled=_truth(row, "enabled", True),
                shared=_truth(row, "shared"),
                formats=formats,
                default_format=default,
            )
        )
    return sorted(found, key=lambda storage: storage.name)


def _formats(row: Mapping[str, Any]) -> tuple[tuple[str, ...], str]:
    match row.get("formats") or row.get("format"):
        case {"supported": list(supported), **rest}:
            return tuple(sorted(map(str, supported))), str(rest.get("default") or "")
        case [dict(supported), default, *_]:
            given = tuple(sorted(str(k) for k, v in supported.items() if v))
            return given, str(default)
        case _:
            return (), ""


@dataclass(frozen=True, slots=True)
class Volume:
    """A volume on a storage; ``size`` is 0 where only an approximation is known."""

    volid: str
    size: int
    format: str
    vmid: int
    parent: str
    used: int


def parse_volumes(data: Any) -> list[Volume]:
    """Read ``GET /nodes/{node}/storage/{storage}/content``, ordered by volume id."""
    found = []
    for row in _list(data, "volumes"):
        row = _object(row, "volume")
        found.append(
            Volume(
                volid=_text(row, "volid"),
                size=_integer(row, "size", 0),
                format=_text(row, "format"),
                vmid=_integer(row, "vmid", 0),
                parent=_text(row, "parent"),
                used=_integer(row, "used", 0),
            )
        )
    return sorted(found, key=lambda volume: volume.volid)


def parse_permissions(data: Any) -> dict[str, frozenset[str]]:
    """Read ``GET /access/permissions``: path -> privileges held there.

    The value behind a privilege is whether it propagates: held either way.
    """
    held = {}
    for where, privileges in _object(data, "permissions").items():
        if isinstance(privileges, dict):
            held[str(where)] = frozenset(
                str(name) for name, value in privileges.items() if value is not None
            )
    return held


# --- reading JSON ------------------------------------------------------------------


def _object(data: Any, what: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise RemoteProtocolError(f"{what}: expected an object, got {_kind(data)}")
    return data


def _list(data: Any, what: str) -> list[Any]:
    if not isinstance(data, list):
        raise RemoteProtocolError(f"{what}: expected a list, got {_kind(data)}")
    return data


def _kind(data: Any) -> str:
    return "nothing" if data is None else type(data).__name__


def _text(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    return "" if value is None or isinstance(value, dict | list) else str(value)


def _integer(row: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = row.get(key)
    if value is None and default is not None:
        return default
    try:
        return int(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise RemoteProtocolError(f"{key}: {value!r} is not a number") from None


def _truth(row: Mapping[str, Any], key: str, default: bool = False) -> bool:
    value = row.get(key)
    if value is None:
        return default
    return str(value) not in ("0", "", "False", "false")
