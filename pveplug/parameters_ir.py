# SPDX-License-Identifier: Apache-2.0
"""The parameters of instant recovery and of the proof that a backup boots."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from pveplug import values as v
from pveplug.parameter import Parameter

PORT: Final = 10809
"""IANA's for NBD."""


def ir_rows() -> Iterator[Parameter]:
    """Yield the rows of the group ``ir``."""

    def row(
        name: str,
        kind: v.Type,
        default: Any,
        summary: str,
        *,
        text: str = "",
        **more: str,
    ) -> Parameter:
        return Parameter(
            name,
            kind,
            default,
            "ir",
            summary,
            more.get("detail", ""),
            restore_option=True,
            default_text=text,
        )

    def job_row(name: str, kind: v.Type, summary: str, text: str) -> Parameter:
        return Parameter(name, kind, None, "ir", summary, default_text=text)

    yield row(
        "ir_overlay_storage",
        v.STORAGE,
        None,
        "storage for what the guest writes while its disks still come",
        detail="A directory (dir, nfs, cifs, cephfs) that holds qcow2 images; the "
        "overlays grow with the guest's writes.",
        text="the first directory storage that can, local before others",
    )
    yield row(
        "ir_target_storage",
        v.STORAGE,
        None,
        "storage that the disks move to in the end",
        text="restore_storage, storage_map, or the storage each disk came from",
    )
    yield row(
        "ir_auto_migrate",
        v.BOOLEAN,
        True,
        "move each disk to its storage as soon as it is here, while the guest runs",
        detail="no: the VM stays on its overlays until `pveplug ir migrate` or "
        "`pveplug ir discard`. bwlimit throttles the move.",
    )
    yield row(
        "ir_timeout",
        v.duration(10, 30 * 86400),
        3600,
        "how long the guest may wait for data that doesn't come",
        detail="Reads of missing data wait so long; then the VM is paused with the "
        "reason in its notes. Running the restore job again goes on where it was.",
    )
    yield row(
        "ir_network",
        v.choice("auto", "up", "down"),
        "auto",
        "whether the recovered VM's network cards are plugged in",
        detail="down: each gets link_down=1. auto: down where the original VM still "
        "exists, else up; two of one address must not meet. bridge_map and mac "
        "hold as in every restore.",
    )
    yield row(
        "ir_nbd_bind",
        v.HOST,
        None,
        "address the disks are served on",
        detail="The VM runs on this node, so a unix socket serves it best; a loopback "
        "address is possible, any other is refused: a Proxmox VE drive can't name the "
        "certificates that NBD over a network needs.",
        text="a unix socket",
    )
    yield row(
        "ir_nbd_port", v.integer(0, 65535), PORT, "TCP port on ir_nbd_bind; 0: any"
    )
    yield row(
        "prove_evidence",
        v.matching(
            "evidence",
            r"auto|any|(agent|serial|screen)(\+(agent|serial|screen))*",
            "auto, any, or agent, serial and screen with + between",
        ),
        "auto",
        "what proves that a backup boots (mode=prove)",
        detail="agent: the guest agent answers. serial: prove_serial appears on the "
        "serial console. screen: the screen shows something steady that is no failure "
        "of the firmware. agent+serial: both. any: the first that comes. auto: agent "
        "where the VM has one, else serial where prove_serial is given, else screen.",
    )
    yield row(
        "prove_serial",
        v.TEXT,
        None,
        "regular expression that the serial console must show",
        detail="As 'login:'. The VM gets a serial port if it has none.",
        text="none",
    )
    yield row(
        "prove_timeout",
        v.duration(5, 86400),
        300,
        "how long the guest may take to boot, from its start",
    )
    yield row(
        "prove_memory",
        v.integer(64, 16 * 1024 * 1024),
        None,
        "MiB of memory at most while it is proved",
        text="as the VM has",
    )
    yield job_row(
        "prove_console",
        v.PATH,
        "file on the node: bconsole's configuration (mode=prove as a job)",
        "bconsole's own default",
    )
    yield job_row(
        "prove_client",
        v.TEXT,
        "client of Bacula's that restores for the proof",
        "the client of the backup",
    )
    yield job_row(
        "prove_restore_job",
        v.TEXT,
        "Bacula's Job of Type = Restore for the proof",
        "the only one there is",
    )
    yield row(
        "prove_report",
        v.PATH,
        None,
        "directory on the node for the report and the screenshot",
        text="reports below state_dir of node.toml",
    )
