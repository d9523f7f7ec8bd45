# SPDX-License-Identifier: Apache-2.0
"""Every parameter, once: the parser, the menu and the manual are made from this table.

``python -m pveplug.manual`` prints ``docs/parameters.md``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Final

from pveplug import values as v
from pveplug.errors import ConfigError
from pveplug.parameter import Parameter, secret_rows
from pveplug.parameters_dr import dr_rows
from pveplug.parameters_ir import ir_rows

GROUPS: Final = {
    "general": "What to do",
    "connection": "Connection to Proxmox VE",
    "selection": "Which VMs and disks",
    "capture": "How the backup is taken",
    "restore": "Where a restore goes",
    "import": "What an import makes of another hypervisor's VM",
    "dr": "Disaster recovery",
    "ir": "Instant recovery and proof",
}

DR_MODES: Final = (
    "seed",
    "incremental",
    "failover-exec",
    "failover-test",
    "failover-undo",
    "failover-permanent",
    "failback-pre",
    "failback",
    "failback-commit",
    "failback-undo",
    "status",
)
"""What disaster recovery can do; docs/dr.md."""
RESTORE_MODES: Final = ("instant", "prove")
"""What a restore job can be besides a plain restore."""
_OTHER_MODES: Final = {
    "receiver": "the receiver is a daemon of its own on the DR node, not a job: "
    "podheitor-proxmox-receiver@NAME.service",
    "test-failover": "it is called failover-test",
    "verify": "each replication cycle verifies (verify_slice, verify_sample_blocks); "
    "of restored files, `pveplug verify` does",
    **{
        level: f"{level} is a level, not a mode: write mode=backup here and "
        f"Level = {level.capitalize()} in Bacula's Job or Schedule"
        for level in ("full", "differential")
    },
}
_OTHER_TYPES: Final = {
    "backup": "must be full, incremental or differential; backup is a mode",
    **{
        mode: f"{mode} is a mode, not a level: backup_type names Bacula's level; "
        f"write mode={mode}"
        for mode in DR_MODES
        if mode != "incremental"
    },
}
# What the values mean for another key that people try first.
_SYNONYMS: Final = {
    "vm": "name",
    "include": "vmid, name, pool or tag",
    "pve_token": "pve_token_id",
    "where": "restore's own where=",
    "level": "Level in Bacula's Job or Schedule",
    "fleecing": "mechanism",
    "bitmap": "cbt",
    "restore_path": "restore's own where=/directory",
    "host": "pve_host",
    "password": "pve_password_file",
    "storage": "restore_storage",
}


def _rows() -> Iterator[Parameter]:
    yield Parameter(
        "mode",
        v.choice("backup", *DR_MODES, *RESTORE_MODES, later=_OTHER_MODES),
        "backup",
        "general",
        "which engine does the job",
        "Orthogonal to the level: Full, Incremental and Differential are Bacula's and "
        "stand in the Job or Schedule. seed to status are disaster recovery "
        "(docs/dr.md): mode=incremental is a replication cycle, whatever Bacula's "
        "level. instant is for a restore: the VM runs while its disks still come "
        "(docs/instant.md). prove, of a restore or as a job of its own, boots the "
        "newest backup in isolation and removes it again (docs/prove.md).",
        restore_option=True,
    )
    yield Parameter(
        "backup_type",
        v.choice("full", "incremental", "differential", later=_OTHER_TYPES),
        None,
        "general",
        "the level you expect; only compared with Bacula's",
        "Bacula decides the level, not this key (and never mode). When the two differ, "
        "Bacula's level is taken and the job log warns.",
    )
    yield Parameter(
        "pve_host",
        v.HOST,
        None,
        "connection",
        "host of the Proxmox VE API",
        "The API of the node the File Daemon runs on, or any node of its cluster.",
        restore_option=True,
        default_text="pve_host of node.toml (127.0.0.1)",
    )
    yield Parameter(
        "pve_port",
        v.integer(1, 65535),
        None,
        "connection",
        "TCP port of the Proxmox VE API",
        restore_option=True,
        default_text="pve_port of node.toml (8006)",
    )
    yield Parameter(
        "pve_node",
        v.NODE_NAME,
        None,
        "connection",
        "this node's name in the cluster",
        "Needed only where it differs from the host name.",
        restore_option=True,
        default_text="pve_node of node.toml, else the host name",
    )
    yield Parameter(
        "pve_token_id",
        v.TOKEN_ID,
        None,
        "connection",
        "API token, as bacula@pve!backup",
        "The recommended way: least privilege, no expiry. A token is never root: "
        "root-only settings of a VM are left out of a restore and reported.",
        restore_option=True,
    )
    yield from secret_rows("pve_token_secret", "secret of the API token")
    yield Parameter(
        "pve_user",
        v.USER,
        None,
        "connection",
        "user with realm, as root@pam, instead of a token",
        restore_option=True,
    )
    yield from secret_rows("pve_password", "password of pve_user")
    yield Parameter(
        "pve_fingerprint",
        v.FINGERPRINTS,
        (),
        "connection",
        "SHA-256 of the API's certificate",
        "Checked before a credential is sent. `pveplug pin HOST` prints the line. "
        "Give the old and the new one while certificates are being exchanged.",
        restore_option=True,
    )
    yield Parameter(
        "pve_ca",
        v.PATH,
        None,
        "connection",
        "PEM file of the CA that signed the API's certificate",
        "On a node that is /etc/pve/pve-root-ca.pem. Without it and without "
        "pve_fingerprint the system's trust store decides.",
        restore_option=True,
    )
    yield Parameter(
        "pve_insecure",
        v.BOOLEAN,
        False,
        "connection",
        "accept any certificate",
        "Whoever sits between can take the credential. Warns in each job.",
        restore_option=True,
    )
    yield Parameter(
        "pve_timeout",
        v.duration(1, 600),
        30,
        "connection",
        "limit of one API call",
        restore_option=True,
    )
    yield from _selection_rows()
    yield from _capture_rows()
    yield from _restore_rows()


def _selection_rows() -> Iterator[Parameter]:
    group = "selection"
    yield Parameter(
        "vmid",
        v.VMIDS,
        (),
        group,
        "VMs by id, as 100,103-105",
        "A single id must exist, on this node; a range takes what is there.",
    )
    yield Parameter("name", v.GLOBS, (), group, "VMs by name, as web-*,db?")
    yield Parameter("pool", v.WORDS, (), group, "VMs of these resource pools")
    yield Parameter("tag", v.WORDS, (), group, "VMs with one of these tags")
    yield Parameter(
        "all",
        v.BOOLEAN,
        False,
        group,
        "every VM of this node, templates included",
        "Cannot be combined with vmid, name, pool and tag, which add up.",
    )
    yield Parameter(
        "exclude",
        v.EXCLUDED,
        (),
        group,
        "VMs to leave out, by id, range or name",
        "Wins over every other key of this group.",
    )
    yield Parameter(
        "exclude_disk",
        v.GLOBS,
        (),
        group,
        "disks to leave out, as scsi1, sata*, or 100:scsi1",
        "Disks with backup=0, CD-ROMs and cloud-init drives are always left out. "
        "The job log names each.",
    )


def _capture_rows() -> Iterator[Parameter]:
    group = "capture"
    yield Parameter(
        "quiesce",
        v.choice("auto", "yes", "no", later={"1": "must be yes", "0": "must be no"}),
        "auto",
        group,
        "freeze the guest's file systems for the instant of the snapshot",
        "auto: where the VM has a guest agent (agent: 1, without freeze-fs=0). yes: "
        "also despite freeze-fs=0, and a warning when it is not possible; the backup "
        "is then crash-consistent. no: never.",
    )
    yield Parameter(
        "quiesce_timeout",
        v.duration(1, 600),
        60,
        group,
        "limit of the guest agent's freeze",
        "Writes stand still meanwhile. Windows ends a freeze after 10 s itself.",
    )
    yield Parameter(
        "mechanism",
        v.choice("auto", "cbw", "fleece"),
        "auto",
        group,
        "how the point in time is kept while it is read",
        "cbw (QEMU 10.0 and later): a full scratch store ends the backup, never the "
        "guest. fleece: for older QEMU. auto takes cbw where QEMU has it.",
    )
    yield Parameter(
        "fleecing_storage",
        v.STORAGE,
        None,
        group,
        "Proxmox VE storage for scratch images",
        "Holds the old content of what the guest overwrites during the backup.",
        default_text="none: scratch_dir is used",
    )
    yield Parameter(
        "scratch_dir",
        v.PATH,
        None,
        group,
        "directory for scratch images",
        "Not together with fleecing_storage.",
        default_text="scratch_dir of node.toml",
    )
    yield Parameter(
        "cbw_timeout",
        v.duration(1, 60),
        10,
        group,
        "how long a guest's write may wait for the scratch store",
        "Then the backup fails and the guest goes on (fleece: when the store itself "
        "has not answered for so long). Keep it below the guest's disk timeout, which "
        "is often 30 s.",
    )
    yield Parameter(
        "latency_budget_ms",
        v.integer(0, 10000),
        0,
        group,
        "how long the guest's disk requests may take, on average of a second",
        "Above it the backup reads more gently, with fewer requests in flight and then "
        "at a lower rate (never below 4 MiB/s), and says so; when it is calm for a "
        "while it speeds up again. Off by default, because what is too slow depends on "
        "the storage: a flush takes 0.1 ms on NVMe, 20 ms on an idle hard disk, where "
        "a common default would slow every backup and help nobody. Take some three "
        "times what the guest sees without a backup.",
        default_text="0, off",
    )
    yield Parameter(
        "cbt",
        v.choice(
            *("on", "persistent", "off"),
            also={"auto": "on", "yes": "on", "no": "off"},
        ),
        "on",
        group,
        "change tracking with dirty bitmaps",
        "on: while the VM runs; after a stop its disks are read whole once. "
        "persistent: also over a clean stop, for qcow2 disks, whose images then hold "
        "the bitmaps; Proxmox VE can't roll such a VM back before 'pveplug bitmaps "
        "drop --vmid N'. off: every level reads the disks whole, and leaves no bitmap "
        "behind.",
    )
    yield Parameter(
        "compare",
        v.BOOLEAN,
        True,
        group,
        "send only what changed of a disk that had to be read whole",
        "For that, digests of what the disks held are kept under state_dir on the "
        "node: 16 bytes for each 64 KiB of data.",
    )
    yield Parameter(
        "lock_wait",
        v.duration(0, 86400),
        60,
        group,
        "how long to wait for another job's lock on the VM",
    )
    yield Parameter(
        "max_parallel_disks", v.integer(1, 16), 2, group, "disks of a VM read at once"
    )
    yield Parameter(
        "bwlimit",
        v.RATE,
        0,
        group,
        "limit of reading, per job",
        "In a restore with mode=instant: of moving the disks to their storage.",
        restore_option=True,
        default_text="0, none",
    )
    yield Parameter(
        "offsets",
        v.BOOLEAN,
        True,
        group,
        "let Bacula store holes as holes",
        "Set offsets=no when the FileSet encrypts (PKI): Bacula 15 fails such a job "
        "and Bacula 9.6 stores it unencrypted.",
    )
    yield Parameter(
        "digests", v.BOOLEAN, True, group, "store a digest of each MiB with the disk"
    )
    yield Parameter(
        "pre_freeze_cmd",
        v.COMMAND,
        None,
        group,
        "program to run on the node before the freeze",
        "Its environment names the VM: PVEPLUG_VMID, PVEPLUG_VM_NAME, PVEPLUG_JOB. "
        "When it fails, that VM's backup fails.",
    )
    yield Parameter(
        "post_thaw_cmd",
        v.COMMAND,
        None,
        group,
        "program to run on the node after the thaw",
        "Runs on every way out when pre_freeze_cmd ran; when it fails, the job warns.",
    )
    yield Parameter(
        "hook_timeout", v.duration(1, 3600), 30, group, "limit of each of the two"
    )
    yield Parameter(
        "progress_interval",
        v.duration(5, 86400),
        60,
        group,
        "time between progress lines in the job log",
    )


def _restore_rows() -> Iterator[Parameter]:
    def row(name: str, type_: v.Type, default: object, *texts: str) -> Parameter:
        return Parameter(
            name,
            type_,
            default,
            "restore",
            texts[0],
            texts[1] if len(texts) > 1 else "",
            restore_option=True,
            default_text=texts[2] if len(texts) > 2 else "",
        )

    yield row(
        "restore_vmid",
        v.VMID_TARGET,
        None,
        "id of the restored VM: an id, next, same, or 100:9100,101:next",
        "With disks=…: the existing VM that gets them. same with overwrite=yes puts "
        "a VM back in its place.",
        "the next free id (with disks: the VM they came from)",
    )
    yield row(
        "restore_node",
        v.NODE_NAME,
        None,
        "node that gets the VM",
        "Disks are written by the node whose File Daemon restores; another node "
        "needs storage that both share.",
        "this node",
    )
    yield row(
        "restore_storage",
        v.STORAGE,
        None,
        "storage for disks that storage_map does not name",
        "",
        "the storage each disk came from",
    )
    yield row(
        "storage_map",
        v.MAPPED,
        v.Mapped(),
        "old storage to new, as local-lvm:ceph,nas:local",
    )
    yield row("bridge_map", v.MAPPED, v.Mapped(), "old bridge to new, as vmbr0:vmbr1")
    yield row(
        "mac",
        v.choice("keep", "new"),
        "keep",
        "MAC addresses of the restored VM",
        "new for a copy that runs beside the original.",
    )
    yield row(
        "uuid",
        v.choice("auto", "keep", "new"),
        "auto",
        "SMBIOS UUID of the restored VM",
        "auto: kept, unless a VM with that UUID still exists.",
    )
    yield row(
        "restore_name", v.VM_NAME, None, "name of the restored VM", "", "its old name"
    )
    yield row(
        "disk_format",
        v.choice("keep", "raw", "qcow2", "vmdk"),
        "keep",
        "image format of the restored disks",
        "keep: as it was where the storage can, else the storage's own.",
    )
    yield row("start_after", v.BOOLEAN, False, "start the VM when it is restored")
    yield row(
        "overwrite",
        v.BOOLEAN,
        False,
        "replace the VM that has the id",
        "Only a stopped VM with the same SMBIOS UUID as the backup is replaced.",
    )
    yield row(
        "disks",
        v.WORDS,
        (),
        "restore only these disks, as scsi1,efidisk0",
        "They are attached as new disks to an existing VM; nothing of it is replaced.",
        "all, as a VM",
    )
    yield row(
        "restore_pool", v.POOL, None, "resource pool of the restored VM", "", "none"
    )
    yield row("restore_bwlimit", v.RATE, 0, "limit of writing", "", "0, none")
    yield from _import_rows()
    yield from dr_rows()
    yield from ir_rows()


def _import_rows() -> Iterator[Parameter]:
    def row(name: str, type_: v.Type, default: object, *texts: str) -> Parameter:
        return Parameter(
            name,
            type_,
            default,
            "import",
            texts[0],
            texts[1] if len(texts) > 1 else "",
            restore_option=True,
            default_text=texts[2] if len(texts) > 2 else "",
        )

    described = "as it is described"
    yield row(
        "import_cores",
        v.integer(1, 8192),
        None,
        "cores of the VM",
        "In one socket. Wins over the description.",
        f"{described}; without a description 2",
    )
    yield row(
        "import_memory",
        v.integer(16, 4 << 20),
        None,
        "memory of the VM in MiB",
        "Wins over the description.",
        f"{described}; without a description 2048",
    )
    yield row(
        "import_firmware",
        v.choice("auto", "bios", "uefi"),
        "auto",
        "what starts the guest",
        "auto: as it is described, checked against the boot disk's partition table; "
        "without a description that table decides.",
    )
    yield row(
        "import_raw",
        v.GLOBS,
        (),
        "images that are raw disks, by name, as data-*.vmdk",
        "For those that begin like no known disk: such a file may as well be an "
        "increment in a format nobody knows, and is refused otherwise.",
    )
    yield row(
        "import_verify",
        v.BOOLEAN,
        False,
        "read every disk back and compare it before the VM is handed over",
    )


PARAMETERS: Final[dict[str, Parameter]] = {row.name: row for row in _rows()}


def lookup(key: str, *, restore_only: bool = False) -> Parameter:
    """Return the parameter ``key``.

    Raises:
        ConfigError: there is none, or it cannot be given at restore time.
    """
    parameter = PARAMETERS.get(key)
    if parameter is None:
        raise ConfigError(_unknown(key, restore_only), key=key)
    if restore_only and not parameter.restore_option:
        raise ConfigError(
            f"{key} cannot be given at restore time, only in the FileSet's plug-in "
            f"string; restore options are: {', '.join(_restore_names())}",
            key=key,
        )
    return parameter


def _restore_names() -> list[str]:
    return [name for name, row in PARAMETERS.items() if row.restore_option]


def _unknown(key: str, restore_only: bool) -> str:
    if key in _SYNONYMS:
        return f"unknown parameter {key}; use {_SYNONYMS[key]}"
    known = _restore_names() if restore_only else list(PARAMETERS)
    near = difflib.get_close_matches(key.lower().replace("-", "_"), known, 1, 0.6)
    if near:
        return f"unknown parameter {key}; did you mean {near[0]}?"
    return f"unknown parameter {key}; `pveplug help parameters` lists all"


def default_shown(parameter: Parameter) -> str:
    """Return the default as the manual writes it."""
    if parameter.default_text:
        return parameter.default_text
    match parameter.default:
        case True:
            return "yes"
        case False:
            return "no"
        case None | () | v.Mapped():
            return "none"
    return str(parameter.default)


def restore_template() -> str:
    """Return the text of the FT_PLUGIN_CONFIG object: bconsole's Plugin Options menu.

    One block per option, as Bacula's own ini reader wants it: OptPrompt, OptDefault
    and ``name=@TYPE@``, a blank line between, at most 64 of them.
    """
    blocks = []
    for row in PARAMETERS.values():
        if not row.restore_option or row.group == "import":
            continue  # jobs of other plug-ins bring a menu of their own, if any
        prompt = row.summary[0].upper() + row.summary[1:]
        lines = [f'OptPrompt="{prompt}"']
        if row.group == "restore" and row.default is not None:
            shown = default_shown(row)
            if shown != "none" and not row.default_text:
                lines.append(f'OptDefault="{shown}"')
        lines.append(f"{row.name}=@{row.type.menu}@")
        blocks.append("\n".join(lines) + "\n")
    return "\n".join(blocks)
