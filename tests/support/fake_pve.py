# SPDX-License-Identifier: Apache-2.0
"""A PVE node as :mod:`pveplug.dr` uses it: real qcow2 files, no daemons.

The calls of ``PveApi`` and ``PveLocal`` that a replica needs, on a directory of images
that the real qemu-img and qemu-nbd work on. ``before`` is told each changing call, and
may raise; so may ``after``, when it has been done.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pveplug.dr.provision import Site
from pveplug.node import Node
from pveplug.proto.pve_refusal import PveRefusalError, Reason
from pveplug.proto.pve_values import Resource, Snapshot, Version, VmConfig, Volume
from pveplug.pve import Storage
from pveplug.pve_local import ProgramError
from pveplug.vmconfig import drives, is_drive_key, parse_drive, render_size
from tests.support.requires import program

FORMATS = {
    "dir": (("raw", "qcow2"), "raw"),
    "lvm": (("raw",), "raw"),
    "lvmthin": (("raw",), "raw"),
}


def refused(text: str, reason: Reason = Reason.OTHER) -> PveRefusalError:
    return PveRefusalError(text, 500, reason=reason, said=text)


class FakePve:
    """Both ``api`` and ``local`` of a :class:`Site`."""

    def __init__(self, base: Path, *, release: str = "9.2") -> None:
        self.base = base
        self.release = release
        self.types = {"dr": "dir", "thick": "lvm"}
        self.vms: dict[int, dict[str, str]] = {}
        self.snaps: dict[int, dict[str, dict[str, str]]] = {}
        self.calls: list[str] = []
        self.running: set[int] = set()
        self.root = True
        self.total = self.avail = 1 << 40
        self.before: Callable[[str], None] = lambda call: None
        self.after: Callable[[str], None] = lambda call: None
        self.node = Node(
            state_dir=str(base / "state"),
            runtime_dir=str(base / "run"),
            qemu_nbd=program("qemu-nbd") or "",
            qemu_img=program("qemu-img") or "",
        )

    def site(self, **more: Any) -> Site:
        values: dict[str, Any] = {"storage": "dr", "keep_free": 0, **more}
        api: Any = self
        return Site(self.node, api, api, "pve1", **values)

    def _did(self, call: str) -> None:
        self.calls.append(call)
        self.after(call)

    # --- reading

    async def version(self) -> Version:
        major, minor = self.release.split(".")[:2]
        return Version(self.release, int(major), int(minor))

    async def storages(self, node: str) -> list[Storage]:
        return [
            Storage(
                n,
                t,
                ("images",),
                self.total,
                0,
                self.avail,
                True,
                True,
                False,
                *FORMATS[t],
            )
            for n, t in self.types.items()
        ]

    async def resources(self, *, containers: bool = False) -> list[Resource]:
        return [
            Resource(v, "pve1", c.get("name", ""), "qemu", "stopped", False, "", (), "")
            for v, c in self.vms.items()
        ]

    async def next_id(self) -> int:
        return next(n for n in range(100, 999) if n not in self.vms)

    def _vm(self, vmid: int) -> dict[str, str]:
        if vmid not in self.vms:
            raise refused(f"no VM {vmid}", Reason.VM_MISSING)
        return self.vms[vmid]

    def _unlocked(self, vmid: int) -> dict[str, str]:
        config = self._vm(vmid)
        if lock := config.get("lock"):
            raise refused(f"VM is locked ({lock})", Reason.LOCKED)
        return config

    async def vm_config(self, node: str, vmid: int) -> VmConfig:
        return VmConfig(dict(self._vm(vmid)), "")

    async def volumes(
        self, node: str, storage: str, *, vmid: int | None = None
    ) -> list[Volume]:
        found = sorted((self.base / storage / str(vmid)).glob("*"))
        return [
            Volume(f"{storage}:{vmid}/{p.name}", 1, p.suffix[1:], vmid or 0, "", 1)
            for p in found
        ]

    async def has_feature(self, node: str, vmid: int, feature: str) -> bool:
        return all(d.format != "raw" for d in drives(self._vm(vmid)) if d.storage)

    async def snapshot_list(self, node: str, vmid: int) -> list[Snapshot]:
        self._vm(vmid)
        return [
            Snapshot(name, "", int(body["snaptime"]), body.get("description", ""))
            for name, body in self.snaps[vmid].items()
        ]

    async def snapshots(self, node: str, vmid: int) -> list[str]:
        return [snapshot.name for snapshot in await self.snapshot_list(node, vmid)]

    async def snapshot_config(self, node: str, vmid: int, name: str) -> VmConfig:
        return VmConfig(dict(self.snaps[vmid][name]), "")

    # --- changing

    async def create_vm(
        self, node: str, vmid: int, params: dict[str, str]
    ) -> list[str]:
        self.before(f"create {vmid}")
        if vmid in self.vms:
            raise refused(f"VM {vmid} already exists", Reason.EXISTS)
        self.vms[vmid] = {k: str(v) for k, v in params.items() if k != "pool"}
        self.snaps[vmid] = {}
        self._did(f"create {vmid}")
        return []

    async def destroy_vm(
        self, node: str, vmid: int, *, purge: bool = True, unreferenced: bool = False
    ) -> list[str]:
        self.before(f"destroy {vmid}")
        if self._unlocked(vmid).get("protection") == "1":
            raise refused(f"can't remove VM {vmid} - protection mode enabled")
        del self.vms[vmid], self.snaps[vmid]
        for path in self.base.glob(f"*/{vmid}/*"):
            path.unlink()
        self._did(f"destroy {vmid}")
        return []

    async def update_config(
        self,
        node: str,
        vmid: int,
        params: dict[str, str] | None = None,
        *,
        delete: list[str] | tuple[str, ...] = (),
    ) -> list[str]:
        call = f"config {','.join(sorted(params or {}))} -{','.join(delete)}"
        self.before(call)
        config = self._unlocked(vmid)
        for key in delete:
            if key not in config:
                continue
            removes = is_drive_key(key) or key.startswith("unused")
            if removes and config.get("protection") == "1":
                raise refused("can't remove unused disk - protection mode enabled")
            value = config.pop(key)
            file = value.split(",")[0]
            if key.startswith("unused"):
                if self._held(vmid, file):
                    raise refused(f"unable to delete '{file}' - in use (snapshot?)")
                self.file(file).unlink()
            elif removes:
                self._unused(vmid, file)
        for key, value in (params or {}).items():
            if is_drive_key(key) and ":" in value:
                drive = parse_drive(key, value)
                size = render_size(self.size(drive.file))
                rest = [o for o in drive.options if o[0] != "size"]
                text = ",".join([drive.file, *(f"{k}={v}" for k, v in rest)])
                config[key] = f"{text},size={size}"
            else:
                config[key] = value
        self._did(call)
        return []

    def _held(self, vmid: int, volid: str) -> bool:
        return any(
            d.file == volid for b in self.snaps[vmid].values() for d in drives(b)
        )

    def _unused(self, vmid: int, volid: str) -> None:
        config = self.vms[vmid]
        if self._held(vmid, volid) or volid in config.values():
            return
        number = next(n for n in range(99) if f"unused{n}" not in config)
        config[f"unused{number}"] = volid

    async def allocate_volume(
        self, node: str, storage: str, vmid: int, name: str, size: int, fmt: str
    ) -> str:
        self.before(f"allocate {name}")
        folder = self.base / storage / str(vmid)
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / name).exists():
            raise refused(f"disk image '{name}' already exists", Reason.EXISTS)
        more = ["-o", "preallocation=metadata"] if fmt == "qcow2" else []
        self.img("create", "-q", "-f", fmt, *more, str(folder / name), str(size))
        self._did(f"allocate {name}")
        return f"{storage}:{vmid}/{name}"

    async def delete_volume(self, node: str, volid: str) -> None:
        self.before(f"free {volid}")
        self.file(volid).unlink()
        self._did(f"free {volid}")

    async def resize_disk(self, node: str, vmid: int, key: str, size: int) -> list[str]:
        self.before(f"resize {key}")
        self._unlocked(vmid)
        if self.snaps[vmid]:
            raise refused(f"can't resize volume: {key} if snapshot exists")
        drive = parse_drive(key, self._vm(vmid)[key])
        self.img("resize", "-q", "-f", "qcow2", str(self.file(drive.file)), str(size))
        await self.update_config(node, vmid, {key: self.vms[vmid][key]})
        self._did(f"resize {key}")
        return []

    async def snapshot_create(
        self, node: str, vmid: int, name: str, description: str = ""
    ) -> list[str]:
        self.before(f"snapshot {name}")
        config = self._unlocked(vmid)
        if name in self.snaps[vmid]:
            raise refused(f"snapshot name '{name}' already used", Reason.EXISTS)
        for drive in drives(config):
            if drive.storage:
                self.img("snapshot", "-c", name, str(self.file(drive.file)))
        body = {k: v for k, v in config.items() if not k.startswith("unused")}
        body |= {"snaptime": str(int(time.time())), "description": description}
        body["own-description"] = config.get("description", "")
        self.snaps[vmid][name] = body
        self._did(f"snapshot {name}")
        return []

    async def snapshot_delete(
        self, node: str, vmid: int, name: str, *, force: bool = False
    ) -> list[str]:
        self.before(f"unsnapshot {name}")
        self._unlocked(vmid)
        body = self.snaps[vmid].pop(name)
        for drive in drives(body):
            if drive.storage:
                self.img("snapshot", "-d", name, str(self.file(drive.file)))
                self._unused(vmid, drive.file) if drive.file not in {
                    d.file for d in drives(self.vms[vmid])
                } else None
        self._did(f"unsnapshot {name}")
        return []

    async def rollback(self, node: str, vmid: int, name: str) -> list[str]:
        self.before(f"rollback {name}")
        self._unlocked(vmid)
        body = dict(self.snaps[vmid][name])
        for drive in drives(body):
            if drive.storage:
                self.img("snapshot", "-a", name, str(self.file(drive.file)))
        kept = {d.file for d in drives(body)}
        before = self.vms[vmid]
        body.pop("snaptime")
        body.pop("own-description")
        body["description"] = before.get("description", "")
        self.vms[vmid] = body | {
            k: v for k, v in before.items() if k.startswith("unused")
        }
        for drive in drives(before):
            if drive.storage and drive.file not in kept:
                self._unused(vmid, drive.file)
        self._did(f"rollback {name}")
        return []

    # --- local

    @contextlib.contextmanager
    def keeping(self, fd: int) -> Iterator[None]:
        yield

    async def set_lock(self, vmid: int, proof: Path) -> None:
        self.before("lock")
        config = self._vm(vmid)
        if lock := config.get("lock"):
            raise ProgramError(["qm", "set"], 255, f"VM is locked ({lock})")
        if not self.root:
            raise ProgramError(["qm", "set"], 255, "please run as root")
        config["lock"] = "backup"
        proof.touch()
        self._did("lock")

    async def unlock(self, vmid: int) -> bool:
        self.before("unlock")
        config = self.vms.get(vmid, {})
        had = config.get("lock") == "backup"
        if had:
            del config["lock"]
        self._did("unlock")
        return had

    def vm_running(self, vmid: int) -> object | None:
        return object() if vmid in self.running else None

    async def volume_path(self, volid: str) -> str:
        return str(self.file(volid))

    async def activate(self, volid: str) -> bool:
        return False

    async def deactivate(self, volid: str) -> None:
        pass

    # --- for tests

    def file(self, volid: str) -> Path:
        storage, _, name = volid.partition(":")
        assert re.fullmatch(r"\d+/[\w.-]+", name), volid
        return self.base / storage / name

    def size(self, volid: str) -> int:
        said = self.img("info", "-U", "--output=json", str(self.file(volid)))
        return int(json.loads(said)["virtual-size"])

    def img(self, *argv: str) -> str:
        done = subprocess.run(
            [self.node.qemu_img, *argv], capture_output=True, text=True, check=False
        )
        if done.returncode:
            full = "No space left" in done.stderr
            raise refused(done.stderr, Reason.NO_SPACE if full else Reason.OTHER)
        return done.stdout

    def content(self, volid: str, snapshot: str = "") -> bytes:
        """What a disk holds, now or at a snapshot."""
        raw = self.base / "content.raw"
        at = ["-l", f"snapshot.name={snapshot}"] if snapshot else []
        where = str(self.file(volid))
        self.img("convert", "-f", "qcow2", "-O", "raw", *at, where, str(raw))
        data = raw.read_bytes()
        raw.unlink()
        return data

    def volids(self, vmid: int) -> set[str]:
        """All volumes named as this VM's."""
        return {
            f"{p.parent.parent.name}:{vmid}/{p.name}"
            for p in self.base.glob(f"*/{vmid}/*")
        }
