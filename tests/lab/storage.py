# SPDX-License-Identifier: Apache-2.0
"""Storages of the lab: directories, and a stand-in for thick LVM with its traps."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import die

EXTENT = 4 << 20
"""LVM allocates in extents of 4 MiB."""
STALE = b"\xa5" * (1 << 20)
"""What a new thick volume holds: never zeroes, as a re-used LV."""


def run(*argv: str) -> str:
    """Run a program; its standard error becomes the PVE error text."""
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        said = " ".join(done.stderr.split())
        raise die(said or f"command '{' '.join(argv)}' failed: exit code 1")
    return done.stdout


class Storage:
    """What all kinds share: name, content types, quota, content listing."""

    type = ""
    formats: tuple[str, ...] = ("raw",)

    def __init__(
        self,
        name: str,
        root: Path,
        *,
        qemu_img: str = "qemu-img",
        total: int = 64 << 30,
        content: str = "images,rootdir",
        type: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """``type``: what PVE calls it, where that isn't the class's own kind;
        ``options``: what else ``storage.cfg`` says of it.
        """
        self.name = name
        self.root = root
        self.qemu_img = qemu_img
        self.total = total
        self.content = content
        self.enabled = True
        self.active = True
        self.shared = False
        self.type = type or self.type
        self.options: dict[str, Any] = dict(options or {})
        root.mkdir(parents=True, exist_ok=True)

    # -- names

    def volname(self, volid: str) -> str:
        storage, _, name = volid.partition(":")
        if storage != self.name or not name:
            raise die(f"unable to parse volume ID '{volid}'")
        return name

    def owner(self, volid: str) -> int:
        match = re.search(r"(?:^|/)(?:vm|base)-(\d+)-", self.volname(volid))
        if not match:
            raise die(f"unable to parse volume filename '{self.volname(volid)}'")
        return int(match[1])

    def file(self, volid: str) -> Path:
        """Where the bytes are, whether the volume is active or not."""
        raise NotImplementedError

    def path(self, volid: str) -> str:
        """What ``pvesm path`` prints."""
        return str(self.file(volid))

    def format(self, volid: str) -> str:
        return "raw"

    def has_feature(self, feature: str, volid: str, snapname: str | None) -> bool:
        """What PVE's table says of ``snapshot``, ``clone`` and ``copy``."""
        base = self.volname(volid).rpartition("/")[2].startswith("base-")
        qcow2 = self.format(volid) == "qcow2"
        match feature:
            case "snapshot":
                return qcow2 and not (base and not snapname)
            case "copy":
                return qcow2 or not snapname
            case "clone":
                return base and not snapname and isinstance(self, DirStorage)
        return False

    def exists(self, volid: str) -> bool:
        return self.file(volid).exists()

    def free_name(self, vmid: int, fmt: str) -> str:
        """The next ``vm-ID-disk-N`` that no volume of the VM has."""
        taken = {
            int(m[1])
            for row in self.volumes(vmid)
            if (m := re.search(r"-disk-(\d+)", str(row["volid"])))
        }
        number = next(n for n in range(1000) if n not in taken)
        return f"vm-{vmid}-disk-{number}"

    def size(self, volid: str) -> int:
        """Virtual size in bytes."""
        if not self.exists(volid):
            raise die(f"volume '{volid}' does not exist")
        if self.format(volid) == "raw":
            return self.file(volid).stat().st_size
        return int(self.info(volid)["virtual-size"])

    def info(self, volid: str) -> dict[str, Any]:
        out = run(
            self.qemu_img, "info", "-U", "--output=json", "-f", self.format(volid),
            str(self.file(volid)),
        )  # fmt: skip
        result: dict[str, Any] = json.loads(out)
        return result

    def used(self) -> int:
        return sum(
            entry.stat().st_blocks * 512
            for entry in self.root.rglob("*")
            if entry.is_file()
        )

    def status(self) -> dict[str, Any]:
        used = min(self.used(), self.total) if self.active and self.enabled else 0
        total = self.total if self.active and self.enabled else 0
        return {
            "type": self.type,
            "content": self.content,
            "total": total,
            "used": used,
            "avail": total - used,
            "active": int(self.active),
            "enabled": int(self.enabled),
            "shared": int(self.shared),
        }

    @property
    def chain(self) -> bool:
        """``snapshot-as-volume-chain``."""
        return bool(self.options.get("snapshot-as-volume-chain"))

    def config(self) -> dict[str, Any]:
        """Its entry of ``storage.cfg``, as ``GET /storage`` tells it."""
        entry: dict[str, Any] = {
            "storage": self.name,
            "type": self.type,
            "content": self.content,
        }
        if self.shared:
            entry["shared"] = 1
        if not self.enabled:
            entry["disable"] = 1
        return {**entry, **self.options}

    def require_images(self) -> None:
        if not self.enabled:
            raise die(f"storage '{self.name}' is disabled")
        if not self.active:
            raise die(f"storage '{self.name}' is not online")
        if "images" not in self.content.split(","):
            raise die(f"storage '{self.name}' does not support content-type 'images'")

    # -- changes; blocking, to be called in a thread

    def alloc(self, vmid: int, name: str | None, size: int, fmt: str | None) -> str:
        raise NotImplementedError

    def free(self, volid: str) -> None:
        raise NotImplementedError

    def resize(self, volid: str, size: int) -> None:
        raise NotImplementedError

    def activate(self, volid: str) -> None:
        if not self.exists(volid):
            raise die(f"volume '{volid}' does not exist")

    def deactivate(self, volid: str) -> None:
        """Nothing to do where volumes are always there."""

    def volumes(self, vmid: int | None = None) -> list[dict[str, Any]]:
        raise NotImplementedError


class DirStorage(Storage):
    """``dir``: raw and qcow2 files below ``images/VMID``."""

    type = "dir"
    formats = ("qcow2", "raw")

    def __init__(self, name: str, root: Path, **options: Any) -> None:
        super().__init__(name, root, **options)
        self.content = options.get("content", "images,iso,snippets,import")

    def file(self, volid: str) -> Path:
        name = self.volname(volid)
        if name.startswith("iso/"):
            return self.root / "template" / name
        # A volume on another one has both in its name: 100/base-100-disk-0.qcow2/101/…
        one = r"\d+/[^/\s]+\.(?:raw|qcow2|vmdk)"
        if not (found := re.fullmatch(rf"(?:{one}/)?(\d+/(?:vm|base)-\S+)", name)):
            raise die(f"unable to parse directory volume name '{name}'")
        if not re.fullmatch(one, found[1]):
            raise die(f"unable to parse directory volume name '{name}'")
        return self.root / "images" / found[1]

    def owner(self, volid: str) -> int:
        return int(self.volname(volid).split("/")[-2])

    def format(self, volid: str) -> str:
        return volid.rpartition(".")[2]

    def alloc(self, vmid: int, name: str | None, size: int, fmt: str | None) -> str:
        self.require_images()
        fmt = fmt or (name.rpartition(".")[2] if name and "." in name else "raw")
        if fmt not in ("raw", "qcow2"):
            raise die(f"unsupported format '{fmt}'")
        name = name or f"{self.free_name(vmid, fmt)}.{fmt}"
        if not name.endswith(f".{fmt}"):
            raise die(f"illegal name '{name}' - should be 'vm-{vmid}-*.{fmt}'")
        folder = self.root / "images" / str(vmid)
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / name
        if target.exists():
            raise die(f"disk image '{target}' already exists")
        if size > self.total - self.used():
            raise die(
                f"unable to create image: qemu-img: {target}: Could not resize file: "
                "No space left on device"
            )
        try:
            options = ["-o", "preallocation=metadata"] if fmt == "qcow2" else []
            run(
                self.qemu_img, "create", "-q", "-f", fmt, *options, str(target),
                str(size),
            )  # fmt: skip
        except Exception:
            target.unlink(missing_ok=True)
            raise
        return f"{self.name}:{vmid}/{name}"

    def free(self, volid: str) -> None:
        target = self.file(volid)
        if not target.exists():
            raise die(f"disk image '{target}' does not exist")
        target.unlink()
        if not any(target.parent.iterdir()):
            target.parent.rmdir()

    def resize(self, volid: str, size: int) -> None:
        fmt = self.format(volid)
        options = ["--preallocation=metadata"] if fmt == "qcow2" else []
        run(
            self.qemu_img, "resize", "-q", *options, "-f", fmt,
            str(self.file(volid)), str(size),
        )  # fmt: skip

    def volumes(self, vmid: int | None = None) -> list[dict[str, Any]]:
        rows = []
        pattern = f"images/{vmid if vmid is not None else '*'}/*"
        for entry in sorted(self.root.glob(pattern)):
            if entry.suffix not in (".raw", ".qcow2"):
                continue
            volid = f"{self.name}:{entry.parent.name}/{entry.name}"
            stat = entry.stat()
            row: dict[str, Any] = {
                "volid": volid,
                "content": "images",
                "format": entry.suffix[1:],
                "vmid": int(entry.parent.name),
                "ctime": int(stat.st_ctime),
                "used": stat.st_blocks * 512,
                "size": stat.st_size,
            }
            if entry.suffix == ".qcow2":
                info = self.info(volid)
                row["size"] = info["virtual-size"]
                if backing := info.get("backing-filename"):
                    row["parent"] = backing
                    # Only a relative name makes it a linked clone in PVE's eyes.
                    if found := re.fullmatch(r"\.\./(\d+/[^/]+\.\w+)", backing):
                        own = f"{entry.parent.name}/{entry.name}"
                        row["volid"] = f"{self.name}:{found[1]}/{own}"
            rows.append(row)
        return rows


class DeclaredStorage(Storage):
    """One that the cluster lists, of any type, and that holds nothing here.

    For what must be refused before anything is allocated.
    """

    def alloc(self, vmid: int, name: str | None, size: int, fmt: str | None) -> str:
        raise die(f"the lab can allocate nothing on storage '{self.name}'")

    def file(self, volid: str) -> Path:
        return self.root / self.volname(volid)

    def volumes(self, vmid: int | None = None) -> list[dict[str, Any]]:
        return []


class ThickStorage(Storage):
    """Thick LVM: whole extents, stale bytes, a device only while active.

    The bytes lie in ``root``; ``dev/NAME/VOLUME`` is a symbolic link that exists only
    while the volume is active.
    """

    type = "lvm"

    def __init__(self, name: str, root: Path, *, dev: Path, **options: Any) -> None:
        super().__init__(name, root, **options)
        self.dev = dev
        dev.mkdir(parents=True, exist_ok=True)

    def file(self, volid: str) -> Path:
        name = self.volname(volid)
        if not re.fullmatch(r"(vm|base)-\d+-[A-Za-z0-9_-]+", name):
            raise die(f"unable to parse lvm volume name '{name}'")
        return self.root / name

    def path(self, volid: str) -> str:
        return str(self.dev / self.file(volid).name)

    def is_active(self, volid: str) -> bool:
        return (self.dev / self.volname(volid)).is_symlink()

    def used(self) -> int:
        return sum(entry.stat().st_size for entry in self.root.iterdir())

    def alloc(self, vmid: int, name: str | None, size: int, fmt: str | None) -> str:
        self.require_images()
        if fmt not in (None, "raw"):
            raise die(f"unsupported format '{fmt}'")
        name = name or self.free_name(vmid, "raw")
        if not re.fullmatch(rf"vm-{vmid}-[A-Za-z0-9_-]+", name):
            raise die(f"illegal name '{name}' - should be 'vm-{vmid}-*'")
        target = self.root / name
        if target.exists():
            raise die(
                f"lvcreate '{self.name}/{name}' error:   Logical Volume \"{name}\" "
                f'already exists in volume group "{self.name}"'
            )
        size = self._extents(name, size, 0)
        with target.open("xb") as out:
            for at in range(0, size, len(STALE)):
                out.write(STALE[: size - at])
        return f"{self.name}:{name}"

    def _extents(self, name: str, size: int, have: int) -> int:
        size = -(-size // EXTENT) * EXTENT
        free = self.total - self.used() + have
        if size > free:
            raise die(
                f"lvcreate '{self.name}/{name}' error:   Volume group \"{self.name}\" "
                f"has insufficient free space ({free // EXTENT} extents): "
                f"{size // EXTENT} required."
            )
        return size

    def free(self, volid: str) -> None:
        target = self.file(volid)
        if not target.exists():
            raise die(
                f"lvremove '{self.name}/{target.name}' error:   Failed to find logical "
                f'volume "{self.name}/{target.name}"'
            )
        if self.is_active(volid):
            self.deactivate(volid)
        target.unlink()

    def resize(self, volid: str, size: int) -> None:
        target = self.file(volid)
        have = target.stat().st_size
        size = self._extents(target.name, size, have)
        with target.open("ab") as out:
            for at in range(have, size, len(STALE)):
                out.write(STALE[: size - at])

    def activate(self, volid: str) -> None:
        target = self.file(volid)
        if not target.exists():
            raise die(
                f"can't activate LV '{self.path(volid)}':   Failed to find logical "
                f'volume "{self.name}/{target.name}"'
            )
        link = self.dev / target.name
        if not link.is_symlink():
            link.symlink_to(target)

    def deactivate(self, volid: str) -> None:
        """Take the device away.

        Raises:
            ApiError: some process has it open.
        """
        target = self.file(volid)
        if holders(target):
            raise die(
                f"can't deactivate LV '{self.path(volid)}':   Logical volume "
                f"{self.name}/{target.name} in use."
            )
        (self.dev / target.name).unlink(missing_ok=True)

    def volumes(self, vmid: int | None = None) -> list[dict[str, Any]]:
        rows = []
        for entry in sorted(self.root.iterdir()):
            match = re.match(r"(?:vm|base)-(\d+)-", entry.name)
            if match and (vmid is None or int(match[1]) == vmid):
                rows.append(
                    {
                        "volid": f"{self.name}:{entry.name}",
                        "content": "images",
                        "format": "raw",
                        "vmid": int(match[1]),
                        "ctime": int(entry.stat().st_ctime),
                        "size": entry.stat().st_size,
                    }
                )
        return rows


def holders(path: Path) -> list[int]:
    """Ids of the processes that have ``path`` open."""
    try:
        wanted = os.stat(path)
    except FileNotFoundError:
        return []
    found = []
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        with contextlib.suppress(OSError), os.scandir(process / "fd") as fds:
            # suppressed: the process went away meanwhile
            for fd in fds:
                try:
                    stat = os.stat(fd.path)
                except OSError:
                    continue
                if (stat.st_dev, stat.st_ino) == (wanted.st_dev, wanted.st_ino):
                    found.append(int(process.name))
                    break
    return found


def copy_image(qemu_img: str, source: Path, fmt: str, target: Path, to: str) -> None:
    """Copy an image into an existing target of another format, whole."""
    if fmt == to == "raw":
        with source.open("rb") as reader, target.open("r+b") as writer:
            shutil.copyfileobj(reader, writer, 1 << 20)
        return
    run(qemu_img, "convert", "-n", "-q", "-f", fmt, "-O", to, str(source), str(target))
