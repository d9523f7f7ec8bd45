# SPDX-License-Identifier: Apache-2.0
"""The parameters of disaster recovery: where the receiver is, and what to do there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from pveplug import values as v
from pveplug.parameter import Parameter, secret_rows

PORT: Final = 9190


def dr_rows() -> Iterator[Parameter]:
    """Yield the rows of the group ``dr``."""

    def row(
        name: str, kind: v.Type, default: Any, summary: str, detail: str, text: str = ""
    ) -> Parameter:
        return Parameter(name, kind, default, "dr", summary, detail, default_text=text)

    yield row("dr_host", v.HOST, None, "host of the receiver on the DR site", "")
    yield row("dr_port", v.integer(1, 65535), PORT, "TCP port of the receiver", "")
    yield from secret_rows(
        "dr_auth_token", "token that both sides share", "dr", restore=False
    )
    yield row(
        "dr_auth_cert",
        v.PATH,
        None,
        "file on the node: our certificate, for mutual TLS",
        "PEM, version 3, with this node's IP address or name as subjectAltName. With "
        "dr_auth_key and dr_auth_ca; together with a token, both are required.",
    )
    yield row("dr_auth_key", v.PATH, None, "file on the node: its private key", "")
    yield row(
        "dr_auth_ca",
        v.PATH,
        None,
        "file on the node: the CA that the receiver's certificate must be of",
        "The certificate must also name dr_host, an IP address or a DNS name.",
    )
    yield row(
        "dr_peer_fingerprint",
        v.FINGERPRINTS,
        (),
        "SHA-256 pin of the receiver's certificate",
        "Checked before anything is sent; several, separated by commas, for rotation.",
    )
    yield row(
        "dr_storage",
        v.STORAGE,
        None,
        "Proxmox VE storage of the DR site for the replica's disks",
        "It must be able to take snapshots of the disks' format: a directory holds "
        "them as qcow2; thick LVM is refused.",
        "storage of the receiver's own configuration",
    )
    yield row(
        "dr_bridge_map",
        v.MAPPED,
        v.Mapped(),
        "bridges of the replica, as vmbr0:vmbr9",
        "What the receiver's configuration maps goes first.",
    )
    yield row(
        "dr_vmid_map",
        v.VMID_TARGET,
        None,
        "id of the replica VM, as 100:9100",
        "Only looked at by seed. The replica is known by the source's UUID, not by "
        "its number.",
        "the source's, if it is free there",
    )
    yield row(
        "dr_restore_points",
        v.integer(1, 500),
        7,
        "restore points to keep on the replica",
        "The receiver's own retention wins over it: a sender can't delete history.",
    )
    yield row("dr_bwlimit", v.RATE, 0, "limit of sending", "", "0, none")
    yield row(
        "verify_sample_blocks",
        v.integer(0, 4096),
        0,
        "blocks of 64 KiB compared after each cycle",
        "Drawn anew each time and compared by FNV-1a-64; one that differs fails the "
        "job and names disk and offset.",
    )
    yield row(
        "verify_slice",
        v.matching("slice", r"off|1/[1-9][0-9]{0,3}", "1/N, or off"),
        "1/16",
        "part of the whole replica compared by a strong digest each cycle",
        "The next cycle takes the next slice, so every byte is compared every N "
        "cycles. What differs is sent again and reported.",
    )
    yield row(
        "dr_rpo",
        v.duration(60, 30 * 86400),
        None,
        "age of the newest restore point that status calls late",
        "",
        "none: never late",
    )
    yield row(
        "dr_restore_point",
        v.matching("restore point", r"[A-Za-z][A-Za-z0-9_-]{1,39}", "its name"),
        "latest",
        "restore point that failover-exec and failover-test boot",
        "`pveplug dr status` lists them.",
    )
    yield row(
        "dr_unplanned",
        v.BOOLEAN,
        False,
        "failover-exec without the source: it is lost or unreachable",
        "Nothing is asked of the source's Proxmox VE; its sender is refused from then "
        "on, until a failback.",
    )
    yield row(
        "dr_final_sync",
        v.BOOLEAN,
        False,
        "failover-exec shuts the source down and replicates once more",
        "So nothing is lost. Not with dr_unplanned.",
    )
    yield row(
        "dr_shutdown_timeout",
        v.duration(10, 3600),
        180,
        "how long a guest may take to shut down",
        "Of the source (dr_final_sync) and of the replica (failback). Then the job "
        "fails; nobody is powered off.",
    )
    yield row(
        "dr_boot_timeout",
        v.duration(5, 3600),
        180,
        "how long the replica's guest agent may take to answer",
        "",
    )
    yield row(
        "dr_discard",
        v.BOOLEAN,
        False,
        "failback-pre throws away what was written on the DR side",
        "",
    )
    yield row(
        "dr_start",
        v.BOOLEAN,
        True,
        "start the VM that goes on",
        "After failback-commit the source, after failback-undo the replica.",
    )
    yield row(
        "dr_takeover",
        v.BOOLEAN,
        False,
        "continue a replica whose epoch this node does not know",
        "After the node was reinstalled, say. Only when its replica stands by.",
    )
