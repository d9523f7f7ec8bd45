# SPDX-License-Identifier: Apache-2.0
"""Talking to a keeper, and starting one.

The keeper listens on a unix socket in its recovery's runtime directory: a line of JSON
in, ``{"do": "status"|"migrate"|"release"|"retire"}``, a line of JSON out.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any, Final

from pveplug.errors import ConfigError, TransportError
from pveplug.ir.record import Recovery
from pveplug.node import Node
from pveplug.pve_local import ProgramError, run

UNIT: Final = "podheitor-proxmox-ir@{vmid}.service"
ANSWER_S: Final = 20.0
START_S: Final = 60.0
SYSTEMCTL_S: Final = 90.0
POLL_S: Final = 0.1
RETIRE_S: Final = 15.0
BEGIN_S: Final = 5.0
"""How long a keeper may take to be seen; then another is started."""
MAX_LINE: Final = 64 * 1024


@dataclass(slots=True)
class DiskState:
    """How far a disk is; bytes."""

    key: str
    size: int
    owed: int
    moved: bool = False
    moving: str = ""
    """What PVE says of the move, while it lasts."""


@dataclass(slots=True)
class State:
    """What a keeper says of its recovery.

    Attributes:
        phase: ``landing`` (data is owed), ``landed`` (all is here), ``migrating``,
            ``done``.
        trouble: what went wrong last and still matters; empty: nothing.
        paused: we have paused the VM.
        feeding: a restore job delivers.
        clients: connections of the VM (and others) to the NBD server.
    """

    phase: str
    trouble: str = ""
    paused: bool = False
    feeding: bool = False
    clients: int = 0
    disks: list[DiskState] = field(default_factory=list)

    @property
    def owed(self) -> int:
        """Bytes that have not come yet."""
        return sum(disk.owed for disk in self.disks)

    def dump(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return dataclasses.asdict(self)

    @classmethod
    def parsed(cls, values: dict[str, Any]) -> State:
        """Return what :meth:`dump` gave."""
        known = {each.name for each in dataclasses.fields(cls)}
        values = {k: v for k, v in values.items() if k in known}  # of another version
        disks = [DiskState(**disk) for disk in values.pop("disks")]
        return cls(**values, disks=disks)


async def ask(recovery: Recovery, do: str) -> State:
    """Give the keeper an order and return its state.

    Raises:
        TransportError: it doesn't run, or doesn't answer.
    """
    try:
        async with asyncio.timeout(ANSWER_S):
            reader, writer = await asyncio.open_unix_connection(
                recovery.control_socket, limit=MAX_LINE
            )
            try:
                writer.write(json.dumps({"do": do}).encode() + b"\n")
                answer = json.loads(await reader.readline())
            finally:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()
    except (OSError, ValueError, TimeoutError) as error:
        raise TransportError(
            f"the keeper of VM {recovery.vmid} does not answer: "
            f"{error or 'no answer in time'}. Remedy: `pveplug ir resume --vmid "
            f"{recovery.vmid}` starts one"
        ) from error
    if "error" in answer:
        raise TransportError(f"the keeper of VM {recovery.vmid}: {answer['error']}")
    return State.parsed(answer)


async def release(recovery: Recovery) -> None:
    """Fail the reads that wait for what will not come, so that QEMU can end."""
    with contextlib.suppress(TransportError):
        await ask(recovery, "release")


async def retire(node: Node, recovery: Recovery) -> None:
    """End the keeper, which nobody needs, and remove all that has landed."""
    with contextlib.suppress(TransportError):
        await ask(recovery, "retire")
    with contextlib.suppress(TransportError):
        async with recovery.keeping(RETIRE_S):
            pass  # it has ended
    recovery.remove()
    await disable_unit(node, recovery.vmid)


async def start_keeper(node: Node, recovery: Recovery) -> State:
    """Start the keeper unless it runs, and wait until it serves.

    Raises:
        TransportError: it does not come up; where to look is named.
    """
    if node.keeper not in ("unit", "child"):
        raise ConfigError(
            f"keeper={node.keeper} in node.toml: must be unit or child", key="keeper"
        )
    loop = asyncio.get_running_loop()
    deadline = loop.time() + START_S
    begun = -BEGIN_S
    while True:
        # Again, too: the one that had the lock may just have been ending.
        if not recovery.kept() and loop.time() - begun > BEGIN_S:
            recovery.make_runtime()
            if node.keeper == "unit":
                await _start_unit(node, recovery.vmid)
            else:
                _start_child(recovery.vmid)
            begun = loop.time()
        try:
            return await ask(recovery, "status")
        except TransportError as error:
            if loop.time() > deadline:
                raise TransportError(
                    f"the process that serves the disks of VM {recovery.vmid} did not "
                    f"come up within {START_S:.0f} s: {error}. Its log says why: "
                    f"journalctl -u {UNIT.format(vmid=recovery.vmid)}, or log_file of "
                    "node.toml"
                ) from error
        await asyncio.sleep(POLL_S)


async def _start_unit(node: Node, vmid: int) -> None:
    # Enabled, too: after a reboot of the node the VM can be started again.
    unit = UNIT.format(vmid=vmid)
    try:
        argv = [node.systemctl, "enable", "--now", unit]
        await run(argv, timeout_s=SYSTEMCTL_S)
    except ProgramError as error:
        raise TransportError(
            f"systemd does not start {unit}: {error}. The unit comes with the package "
            '(deploy/podheitor-proxmox-ir@.service); keeper = "child" in node.toml '
            "does without systemd"
        ) from error


async def disable_unit(node: Node, vmid: int) -> None:
    """Let systemd forget a keeper that has ended."""
    if node.keeper != "unit":
        return
    with contextlib.suppress(ProgramError):
        argv = [node.systemctl, "disable", UNIT.format(vmid=vmid)]
        await run(argv, timeout_s=SYSTEMCTL_S)


def _start_child(vmid: int) -> None:
    """Start a keeper that outlives us, and whoever kills our process group."""
    subprocess.Popen(  # noqa: S603 - ourselves
        [sys.executable, "-m", "pveplug.ir.keeper", str(vmid)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        close_fds=True,
        cwd="/",
    )
