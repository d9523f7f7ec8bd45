# SPDX-License-Identifier: Apache-2.0
"""What a job was told, as frozen values.

::

    plug-in string (FileSet) ──► BackupConfig(connection, selection, capture)
    plug-in string (as it was at the backup)  ┐
    bconsole's Plugin Options                 ├──► RestoreConfig(connection, target, …)
    where=/@pve/key=value,…                   ┘    later ones win

Nothing here touches the network or reads a secret; see ``Connection.resolve()``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from pveplug.errors import ConfigError
from pveplug.secrets import Secret, SecretSource
from pveplug.selection import Selection
from pveplug.values import Mapped
from pveplug.vmrestore import Wishes

_AT_THE_SOURCE: Final = (
    *("backup", "seed", "incremental"),
    *("failback", "failback-commit", "failback-undo"),
)


@dataclass(frozen=True, slots=True)
class TokenLogin:
    token_id: str
    secret: Secret


@dataclass(frozen=True, slots=True)
class PasswordLogin:
    user: str
    password: Secret


@dataclass(frozen=True, slots=True)
class Connection:
    """How to reach the Proxmox VE API and as whom."""

    host: str
    port: int
    node: str
    """This node's name in the cluster."""
    fingerprints: tuple[str, ...] = ()
    ca_file: str | None = None
    insecure: bool = False
    timeout_s: int = 30
    token_id: str | None = None
    user: str | None = None
    secret: SecretSource | None = None
    """Of the token, or of the user."""

    def check(self) -> None:
        """Refuse a connection without a complete credential; reads nothing.

        Raises:
            ConfigError: what is missing, and which key gives it.
        """
        if self.token_id and not self.secret:
            raise ConfigError(
                "pve_token_id needs pve_token_secret_file (or _cmd)", key="pve_token_id"
            )
        if self.user and not self.secret:
            raise ConfigError(
                "pve_user needs pve_password_file (or _cmd)", key="pve_user"
            )
        if not self.token_id and not self.user:
            raise ConfigError(
                "no credential for the Proxmox VE API: give pve_token_id and "
                "pve_token_secret_file",
                key="pve_token_id",
            )

    def resolve(self) -> TokenLogin | PasswordLogin:
        """Read the secret now; may block for 30 s, so call it in a thread.

        Raises:
            ConfigError: no credential, or its file or command gives none.
        """
        self.check()
        assert self.secret is not None  # noqa: S101 - check() has refused that
        if self.token_id:
            return TokenLogin(self.token_id, self.secret.resolve())
        return PasswordLogin(self.user or "", self.secret.resolve())


@dataclass(frozen=True, slots=True)
class Capture:
    """How the backup is taken; names and units are those of the parameters."""

    quiesce: Literal["auto", "yes", "no"] = "auto"
    quiesce_timeout: int = 60
    mechanism: Literal["auto", "cbw", "fleece"] = "auto"
    fleecing_storage: str | None = None
    scratch_dir: str = ""
    cbw_timeout: int = 10
    latency_budget_ms: int = 0
    """Mean time of the guest's requests above which reading backs off; 0: never."""
    cbt: Literal["on", "persistent", "off"] = "on"
    compare: bool = True
    lock_wait: int = 60
    max_parallel_disks: int = 2
    bwlimit: int = 0
    """KiB/s, 0 is unlimited."""
    offsets: bool = True
    digests: bool = True
    pre_freeze_cmd: str | None = None
    post_thaw_cmd: str | None = None
    hook_timeout: int = 30
    progress_interval: int = 60


@dataclass(frozen=True, slots=True)
class Peer:
    """The receiver of a replica: where it is, and how each side proves itself."""

    host: str
    port: int
    token: SecretSource | None = None
    cert_file: str | None = None
    key_file: str | None = None
    ca_file: str | None = None
    fingerprints: tuple[str, ...] = ()
    bwlimit: int = 0
    """KiB/s, 0 is unlimited."""


@dataclass(frozen=True, slots=True)
class Replication:
    """What disaster recovery was told; names and units are those of the parameters."""

    peer: Peer
    dr_storage: str | None = None
    dr_bridge_map: Mapped = field(default_factory=Mapped)
    dr_vmid_map: Mapped = field(default_factory=Mapped)
    dr_restore_points: int = 7
    verify_sample_blocks: int = 0
    verify_slice: str = "1/16"
    dr_rpo: int | None = None
    dr_restore_point: str = "latest"
    dr_unplanned: bool = False
    dr_final_sync: bool = False
    dr_shutdown_timeout: int = 180
    dr_boot_timeout: int = 180
    dr_discard: bool = False
    dr_start: bool = True
    dr_takeover: bool = False

    @property
    def slices(self) -> int:
        """Into how many slices a disk is divided for verification; 0: none."""
        return 0 if self.verify_slice == "off" else int(self.verify_slice[2:])


@dataclass(frozen=True, slots=True)
class ProofOrder:
    """What a proof as a job of its own was told.

    Attributes:
        options: of the restore jobs it submits, as ``where=`` carries them.
        console: file of bconsole's configuration; None: its default.
        client: who restores; None: whose backup it is.
        restore_job: Bacula's Job of Type = Restore; None: the only one.
    """

    options: Mapping[str, str]
    console: str | None = None
    client: str | None = None
    restore_job: str | None = None


@dataclass(frozen=True, slots=True)
class BackupConfig:
    connection: Connection
    selection: Selection
    capture: Capture
    mode: str = "backup"
    backup_type: str | None = None
    replication: Replication | None = None
    """What a mode of disaster recovery was told; None with ``mode=backup``."""
    proof: ProofOrder | None = None
    """With ``mode=prove``."""

    @property
    def needs_source(self) -> bool:
        """Whether this node's Proxmox VE has a part in it."""
        if self.mode == "failover-exec":
            return not (self.replication and self.replication.dr_unplanned)
        return self.mode in _AT_THE_SOURCE


@dataclass(frozen=True, slots=True)
class Instant:
    """How a VM runs while its disks still come; names are those of the parameters."""

    overlay_storage: str | None = None
    target_storage: str | None = None
    auto_migrate: bool = True
    timeout: int = 3600
    network: Literal["auto", "up", "down"] = "auto"
    nbd_bind: str | None = None
    nbd_port: int = 0
    bwlimit: int = 0
    """KiB/s of the migration, 0 is unlimited."""


@dataclass(frozen=True, slots=True)
class Prove:
    """What proves that a backup boots; names are those of the parameters."""

    evidence: str = "auto"
    serial: str | None = None
    timeout: int = 300
    memory: int | None = None
    report: str | None = None


@dataclass(frozen=True, slots=True)
class RestoreConfig:
    """Where a restore goes and what it makes of the VM.

    Attributes:
        target: "vm", or "files" when Bacula itself shall write plain files.
        reason: why, one sentence for the job log.
        where: as Bacula gave it.
        vmids: the ``restore_vmid`` option; see :meth:`vmid_for`.
        bwlimit: KiB/s, 0 is unlimited.
    """

    connection: Connection
    target: Literal["vm", "files"]
    reason: str
    where: str = ""
    vmids: Mapped = field(default_factory=Mapped)
    node: str | None = None
    storage: str | None = None
    storage_map: Mapped = field(default_factory=Mapped)
    bridge_map: Mapped = field(default_factory=Mapped)
    mac: Literal["keep", "new"] = "keep"
    uuid: Literal["auto", "keep", "new"] = "auto"
    name: str | None = None
    disk_format: Literal["keep", "raw", "qcow2", "vmdk"] = "keep"
    start_after: bool = False
    overwrite: bool = False
    disks: tuple[str, ...] = ()
    pool: str | None = None
    bwlimit: int = 0
    warnings: tuple[str, ...] = ()
    instant: Instant | None = None
    """With ``mode=instant`` and ``mode=prove``."""
    prove: Prove | None = None
    """With ``mode=prove``."""

    @property
    def wishes(self) -> Wishes:
        """The options that shape the restored VM's configuration."""
        return Wishes(
            storage=self.storage,
            storage_map=self.storage_map,
            bridge_map=self.bridge_map,
            mac=self.mac,
            uuid=self.uuid,
            name=self.name,
            disk_format=self.disk_format,
        )

    def vmid_for(self, source: int) -> int | None:
        """Return the id that the backup of VM ``source`` goes to; None: the next free.

        With ``disks`` that is the VM to attach them to, by default ``source`` itself.
        """
        wanted = self.vmids.get(str(source)) or ("same" if self.disks else "next")
        if wanted == "next":
            return None
        return source if wanted == "same" else int(wanted)


@dataclass(frozen=True, slots=True)
class ImportConfig:
    """Where another hypervisor's VM goes and what is made of it.

    Attributes:
        common: what it shares with a restore; ``storage`` is set for a VM.
        cores, memory_mib: None: as it is described.
        raw: names of images that are raw disks whatever they begin with.
        verify: read every disk back.
    """

    common: RestoreConfig
    cores: int | None = None
    memory_mib: int | None = None
    firmware: Literal["auto", "bios", "uefi"] = "auto"
    raw: tuple[str, ...] = ()
    verify: bool = False

    @property
    def vmid(self) -> int | None:
        """The id that is wished for; None: the next free one."""
        wanted = self.common.vmids.default
        return None if wanted in (None, "next") else int(wanted)


def shown(config: BackupConfig | RestoreConfig) -> str:
    """Return the configuration as lines ``name = value``, secrets as ``***``."""
    return "".join(f"{name} = {value}\n" for name, value in _flat(config, ""))


def _flat(value: object, prefix: str) -> Iterable[tuple[str, str]]:
    assert dataclasses.is_dataclass(value)  # noqa: S101 - callers pass only those
    for spec in dataclasses.fields(value):
        item = getattr(value, spec.name)
        name = f"{prefix}{spec.name}"
        if isinstance(
            item,
            Connection | Selection | Capture | Replication | Peer | Instant | Prove,
        ):
            yield from _flat(item, f"{name}.")
        elif isinstance(item, SecretSource):
            yield name, f"{item.value} (from {item.key})"
        elif isinstance(item, bool):
            yield name, "yes" if item else "no"
        elif isinstance(item, tuple):
            yield name, ",".join(str(part) for part in item) or "-"
        else:
            yield name, "-" if item is None or str(item) == "" else str(item)
