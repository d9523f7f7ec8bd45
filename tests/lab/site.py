# SPDX-License-Identifier: Apache-2.0
"""A simulated Proxmox VE site over real QEMU: nodes, storages, VMs, faults.

::

    async with Site(Path("/tmp/lab1")) as site:
        vm = await site.create_vm(100, {"scsihw": "virtio-scsi-single"},
                                  disks={"scsi0": "64M", "scsi1": "32M"})
        await vm.start()
        await vm.qemu_io("scsi0", "write -P 1 0 64k")

``SiteThread`` is the same for blocking callers. Everything lives below ``base``.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from pathlib import Path
from typing import Any

from . import (  # noqa: F401  (they register calls)
    api_cluster,
    api_guest,
    api_migration,
    api_snapshot,
    api_storage,
    api_vm,
)
from .auth import Auth, product_acl
from .control import Control
from .deviations import supports_direct_io
from .errors import die
from .faults import Faults
from .http import Proxy
from .qemu import Machine, qemu_version
from .qmeventd import Qmeventd
from .storage import DeclaredStorage, DirStorage, Storage, ThickStorage
from .tasks import Tasks
from .vm import LabVm
from .vmconfig import VmConf

TOKEN = "bacula@pve!backup"
PROGRAMS = ("qm", "pvesm", "lvchange")
NODE_DIRS = ("var/run/qemu-server", "usr/sbin", "storage", "log", "dev", "ph")


class FileLock:
    """``flock``: many may share it, or one has it alone."""

    def __init__(self) -> None:
        self._holders = 0
        self._shared = False
        self._freed = asyncio.Event()

    async def acquire(self, *, shared: bool = False) -> None:
        while self._holders and not (shared and self._shared):
            self._freed.clear()
            await self._freed.wait()
        self._holders += 1
        self._shared = shared

    def release(self) -> None:
        self._holders -= 1
        self._freed.set()


class LabNode:
    """One node: its programs, sockets, storages and HTTPS server."""

    def __init__(self, site: Site, name: str, root: Path) -> None:
        self.site = site
        self.name = name
        self.root = root
        self.run_dir = root / "var/run/qemu-server"
        self.log_dir = root / "log"
        for folder in NODE_DIRS:
            (root / folder).mkdir(parents=True, exist_ok=True)
        self.qmeventd = Qmeventd(root / "var/run/qmeventd.sock")
        self.control = Control(self)
        self.proxy = Proxy(site, self)
        self.machines: dict[int, Machine] = {}
        common: dict[str, Any] = {"qemu_img": site.qemu_img}
        self.storages: dict[str, Storage] = {
            "local": DirStorage("local", root / "storage/local", **common),
            "local2": DirStorage("local2", root / "storage/local2", **common),
            "thick": ThickStorage(
                "thick", root / "storage/thick", dev=root / "dev/thick", **common
            ),
        }
        for shared in site.shared:
            where = site.root / "storage" / shared
            self.storages[shared] = DirStorage(shared, where, **common)
            self.storages[shared].shared = True

    @property
    def conf_dir(self) -> Path:
        return self.site.root / "etc/pve/nodes" / self.name / "qemu-server"

    def conf_path(self, vmid: int) -> Path:
        return self.conf_dir / f"{vmid}.conf"

    def storage_of(self, volid: str) -> Storage:
        """The storage of a volume id."""
        name, sep, _ = volid.partition(":")
        if not sep:
            raise die(f"unable to parse volume ID '{volid}'")
        if name not in self.storages:
            raise die(f"storage '{name}' does not exist")
        return self.storages[name]

    async def start(self, port: int = 0) -> None:
        self.conf_dir.mkdir(parents=True, exist_ok=True)
        local = self.root / "etc/pve/qemu-server"
        local.parent.mkdir(parents=True, exist_ok=True)
        if not local.is_symlink():
            local.symlink_to(self.conf_dir)
        firewall = self.root / "etc/pve/firewall"
        if self.root == self.site.root:
            firewall.mkdir(exist_ok=True)
        elif not firewall.is_symlink():
            firewall.symlink_to(self.site.root / "etc/pve/firewall")
        source = Path(__file__).with_name("programs") / "program.py"
        for name in PROGRAMS:
            program = self.root / "usr/sbin" / name
            program.write_text(f"#!{sys.executable} -IS\n{source.read_text()}")
            program.chmod(0o755)
        await self.qmeventd.start()
        await self.control.start()
        await self.proxy.start(port)

    async def stop(self) -> None:
        for machine in self.machines.values():
            await machine.kill()
        await self.proxy.stop()
        await self.control.stop()
        await self.qmeventd.stop()


class Site:
    """Several nodes that share a cluster file system, users and tasks."""

    def __init__(
        self,
        base: Path | str,
        *,
        nodes: Iterable[str] = ("pve1",),
        shared: Iterable[str] = (),
        release: str = "9.2",
        qemu: str | None = None,
        qemu_img: str | None = None,
        firmware: str = "/usr/share/OVMF",
        qemu_data_dirs: tuple[str, ...] = (),
        port: int = 0,
        root_password: str = "lab-root",
        auth_delay_s: float = 0.05,
        proxy_limit_s: float = 30.0,
        keep: bool = False,
    ) -> None:
        """Prepare a site below ``base``, a short path (unix sockets end at 107 bytes).

        ``auth_delay_s`` is 3 s on PVE; ``keep`` leaves ``base`` when it ends;
        ``shared``: names of directory storages that all nodes have.
        """
        self.root = Path(base).resolve()
        if len(str(self.root)) > 60:
            raise ValueError(f"lab root {self.root} is too long for unix sockets")
        self.shared = tuple(shared)
        self.release = release
        self.qemu = qemu or shutil.which("qemu-system-x86_64") or "qemu-system-x86_64"
        self.qemu_img = qemu_img or shutil.which("qemu-img") or "qemu-img"
        self.firmware = Path(firmware)
        self.qemu_data_dirs = qemu_data_dirs
        self.qemu_version = qemu_version(self.qemu)
        self.port = port
        self.auth_delay_s = auth_delay_s
        self.proxy_limit_s = proxy_limit_s
        self.keep = keep
        self.root_password = root_password
        self.auth = Auth(release, root_password)
        self.faults = Faults(self)
        self.tasks = Tasks(self.faults.before_task)
        self.bridges = ["vmbr0", "vmbr1"]
        self.pools: dict[str, set[int]] = {}
        self.auth.pool_of = self.pool_of
        self.ha: set[int] = set()
        self.offline: set[str] = set()
        self._locks: dict[int, FileLock] = {}
        self._log: list[str] = []
        self.root.mkdir(parents=True, exist_ok=True)
        self.direct_io = supports_direct_io(self.root)
        self.nodes: dict[str, LabNode] = {}
        for at, name in enumerate(nodes):
            root = self.root if at == 0 else self.root / name
            self.nodes[name] = LabNode(self, name, root)
        self.node = next(iter(self.nodes.values()))
        self.token_id = TOKEN
        self.token_secret = self.auth.add_token(TOKEN, product_acl(release))
        self.storages = self.node.storages

    # -- life

    async def __aenter__(self) -> Site:
        await self.start()
        return self

    async def __aexit__(self, kind: object, error: object, trace: object) -> None:
        await self.stop()

    async def start(self) -> None:
        for at, node in enumerate(self.nodes.values()):
            await node.start(self.port if at == 0 else 0)

    async def stop(self) -> None:
        """End every process and, unless ``keep``, remove ``base``."""
        await self.tasks.stop()
        for node in self.nodes.values():
            await node.stop()
        if not self.keep:
            await asyncio.to_thread(shutil.rmtree, self.root, True)

    def log(self, text: str) -> None:
        self._log.append(text)
        with (self.root / "log/lab.log").open("a") as out:
            out.write(f"{time.strftime('%H:%M:%S')} {text}\n")

    # -- what clients need

    @property
    def fingerprint(self) -> str:
        return self.node.proxy.fingerprint

    @property
    def api_port(self) -> int:
        return self.node.proxy.port

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.api_port}"

    @property
    def token(self) -> str:
        """``USER@REALM!NAME=SECRET`` of the least-privilege token."""
        return f"{self.token_id}={self.token_secret}"

    def add_token(self, token_id: str, acl: Mapping[str, Iterable[str]]) -> str:
        """Make a token with exactly these privileges; return its secret."""
        return self.auth.add_token(token_id, acl)

    def add_user(
        self, user: str, password: str, acl: Mapping[str, Iterable[str]]
    ) -> None:
        self.auth.add_user(user, password, acl)

    def node_values(self, name: str | None = None) -> dict[str, str | int]:
        """Every field of a node file for the product on that node."""
        node = self.nodes[name] if name else self.node
        root = node.root
        return {
            "qemu_run_dir": str(node.run_dir),
            "qmeventd_socket": str(node.qmeventd.path),
            "firewall_dir": str(root / "etc/pve/firewall"),
            "dev_dir": str(root / "dev"),
            "qm": str(root / "usr/sbin/qm"),
            "pvesm": str(root / "usr/sbin/pvesm"),
            "lvchange": str(root / "usr/sbin/lvchange"),
            "qemu_nbd": shutil.which("qemu-nbd") or "/usr/bin/qemu-nbd",
            "qemu_img": self.qemu_img,
            "state_dir": str(root / "ph/lib"),
            "runtime_dir": str(root / "ph/run"),
            "scratch_dir": str(root / "ph/scratch"),
            "landing_dir": str(root / "ph/landing"),
            "keeper": "child",
            "pve_host": "127.0.0.1",
            "pve_port": node.proxy.port,
            "pve_node": node.name,
            "log_file": str(root / "log/backend.log"),
        }

    def node_toml(self, name: str | None = None, **changes: str | int) -> Path:
        """Write ``node.toml`` for the product on that node; return its path."""
        node = self.nodes[name] if name else self.node
        values = {**self.node_values(name), **changes}
        lines = [
            f"{key} = {value}" if isinstance(value, int) else f'{key} = "{value}"'
            for key, value in values.items()
        ]
        path = node.root / "node.toml"
        path.write_text("\n".join(lines) + "\n")
        return path

    # -- configurations and machines

    def find(self, vmid: int) -> LabNode | None:
        """The node that owns a VM."""
        for node in self.nodes.values():
            if node.conf_path(vmid).exists():
                return node
        return None

    def vms(self) -> list[tuple[LabNode, int]]:
        """All VMs with their nodes, by id."""
        found = [
            (node, int(path.stem))
            for node in self.nodes.values()
            for path in node.conf_dir.glob("*.conf")
        ]
        return sorted(found, key=lambda pair: pair[1])

    def load(self, node: LabNode, vmid: int) -> VmConf:
        path = node.conf_path(vmid)
        try:
            return VmConf.parse(path.read_text())
        except FileNotFoundError:
            raise die(
                f"Configuration file 'nodes/{node.name}/qemu-server/{vmid}.conf' "
                "does not exist"
            ) from None

    def save(self, node: LabNode, vmid: int, conf: VmConf) -> None:
        conf.drop_used()
        path = node.conf_path(vmid)
        fresh = path.with_suffix(".tmp")
        fresh.write_text(conf.text())
        fresh.rename(path)

    def machine(self, vmid: int, node: LabNode | None = None) -> Machine:
        node = node or self.find(vmid) or self.node
        return node.machines.setdefault(vmid, Machine(node, vmid))

    @contextlib.asynccontextmanager
    async def lock_config(
        self, vmid: int, *, shared: bool = False, patience_s: float = 10
    ) -> AsyncIterator[None]:
        """The file lock around changes of a configuration, 10 s of patience.

        ``shared`` is how a clone holds its stopped source until its copy is done.
        """
        lock = self._locks.setdefault(vmid, FileLock())
        try:
            async with asyncio.timeout(patience_s):
                await lock.acquire(shared=shared)
        except TimeoutError:
            raise die(
                f"can't lock file '/var/lock/qemu-server/lock-{vmid}.conf' - "
                "got timeout"
            ) from None
        try:
            yield
        finally:
            lock.release()

    def pool_of(self, vmid: int) -> str | None:
        return next((n for n, members in self.pools.items() if vmid in members), None)

    def may_see(self, user: str, vmid: int) -> bool:
        return self.auth.has(user, f"/vms/{vmid}", "VM.Audit")

    # -- for tests

    def add_storage(
        self,
        name: str,
        type: str = "dir",
        *,
        root: Path | None = None,
        node: str | None = None,
        **options: Any,
    ) -> Storage:
        """Give a node one more storage.

        One with files (``dir``, ``nfs``, ``cifs``) works; of any other type it is only
        listed. ``options``: what ``storage.cfg`` says of it (``path``,
        ``snapshot_as_volume_chain=1``), and ``content`` and ``total``.
        """
        owner = self.nodes[node] if node else self.node
        kind = DirStorage if type in ("dir", "nfs", "cifs") else DeclaredStorage
        where = root or owner.root / "storage" / name
        own = {key: options.pop(key) for key in ("content", "total") if key in options}
        if kind is DirStorage:
            options.setdefault("path", str(where))
        named = {key.replace("_", "-"): value for key, value in options.items()}
        storage = kind(
            name, where, qemu_img=self.qemu_img, type=type, options=named, **own
        )
        owner.storages[name] = storage
        return storage

    async def create_vm(
        self,
        vmid: int,
        config: Mapping[str, str] | None = None,
        *,
        disks: Mapping[str, Path | str] | None = None,
        storage: str = "local",
        fmt: str | None = None,
        node: str | None = None,
    ) -> LabVm:
        """Make a VM as root.

        ``disks`` maps keys to an image to copy, a size (``"64M"``), or a whole drive
        text (``"thick:1,discard=on"``).
        """
        from .vm import make_vm

        owner = self.nodes[node] if node else self.node
        return await make_vm(self, owner, vmid, config or {}, disks or {}, storage, fmt)

    def vm(self, vmid: int) -> LabVm:
        node = self.find(vmid)
        if node is None:
            raise KeyError(vmid)
        return LabVm(self, node, vmid)

    async def assert_clean(self) -> None:
        """Assert that no VM holds anything of the product's."""
        for _, vmid in self.vms():
            await self.vm(vmid).assert_clean()
        for node in self.nodes.values():
            assert not +node.qmeventd.backups, f"registered: {node.qmeventd.backups}"
            scratch = node.root / "ph/scratch"
            left = (
                [p for p in scratch.rglob("*") if p.is_file()]
                if scratch.exists()
                else []
            )
            assert not left, f"scratch files left: {left}"


def short_base(prefix: str = "pl") -> Path:
    """A fresh short directory for a lab root; ``PVEPLUG_LAB_DIR`` says below what."""
    where = os.environ.get("PVEPLUG_LAB_DIR", "/tmp")
    return Path(tempfile.mkdtemp(prefix=f"{prefix}-", dir=where))
