# SPDX-License-Identifier: Apache-2.0
"""What ``qm``, ``pvesm`` and ``lvchange`` of a node do, asked through a unix socket.

The programs are thin: they send their name and arguments, print what comes back and
exit with the status given. They act as root@pam, as on a node.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from . import configops, lifecycle
from .errors import ApiError, die
from .schema import CONFIG, verify

if TYPE_CHECKING:
    from .site import LabNode

ROOT = "root@pam"


class Usage(Exception):
    """Wrong arguments: exit status 255 as PVE's CLI handler."""


class Control:
    """The server side of one node's programs."""

    def __init__(self, node: LabNode) -> None:
        self.node = node
        self.calls: list[list[str]] = []
        """Every program call, for tests."""
        self.fail: list[tuple[re.Pattern[str], str, int]] = []
        """(regex on the joined arguments, text, times left): ordered failures."""
        self.gate: Callable[[str], Awaitable[None]] | None = None
        """Awaited with the joined arguments before anything is done."""
        self._server: asyncio.Server | None = None

    @property
    def path(self) -> str:
        return str(self.node.root / "ctl")

    async def start(self) -> None:
        self._server = await asyncio.start_unix_server(self._client, self.path)

    async def stop(self) -> None:
        if self._server:
            self._server.close()
            self._server = None

    def fail_next(self, regex: str, text: str, *, times: int = 1) -> None:
        """Let the next matching program call fail with ``text`` on stderr."""
        self.fail.append((re.compile(regex), text, times))

    async def _client(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        try:
            argv = json.loads(await reader.readline())
            self.calls.append(argv)
            if self.gate:
                await self.gate(" ".join(argv))
            out, err, status = await self._guarded(argv)
            answer = {"out": out, "err": err, "status": status}
            writer.write(json.dumps(answer).encode() + b"\n")
            await writer.drain()
        except (ConnectionError, ValueError):
            pass  # the program was killed: nobody to answer
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _guarded(self, argv: list[str]) -> tuple[str, str, int]:
        try:
            self._ordered_failure(argv)
            match argv:
                case ["qm", command, *rest]:
                    return await self._qm(command, rest), "", 0
                case ["pvesm", command, *rest]:
                    return await self._pvesm(command, rest), "", 0
                case ["lvchange", *rest]:
                    return await self._lvchange(rest), "", 0
            raise Usage("ERROR: no command specified")
        except Usage as error:
            return "", f"{error}\n", 255
        except ApiError as error:
            text = error.message
            for key, said in (error.errors or {}).items():
                text = f"400 {text}\n{key}: {said}"
            status = 5 if argv[0] == "lvchange" else 255
            return "", text + "\n", status
        except Exception as error:
            return "", f"{error}\n", 255

    def _ordered_failure(self, argv: list[str]) -> None:
        for at, (regex, text, times) in enumerate(self.fail):
            if times and regex.search(" ".join(argv)):
                self.fail[at] = (regex, text, times - 1)
                raise die(text)

    # -- qm

    async def _qm(self, command: str, rest: list[str]) -> str:
        site, node = self.node.site, self.node
        if command == "list":
            head = (
                f"{'VMID':>10} {'NAME':<20} {'STATUS':<10} {'MEM(MB)':<10} "
                f"{'BOOTDISK(GB)':>12} {'PID':<10}\n"
            )
            rows = ""
            for owner, vmid in site.vms():
                if owner is node:
                    row = lifecycle.list_row(site, node, vmid)
                    rows += (
                        f"{vmid:>10} {row['name']:<20} {row['status']:<10} "
                        f"{row['maxmem'] >> 20:<10} {0.0:>12.2f} "
                        f"{row.get('pid', 0):<10}\n"
                    )
            return head + rows
        if not rest or not rest[0].isdigit():
            raise Usage("400 not enough arguments")
        vmid, options = int(rest[0]), _options(rest[1:])
        conf = site.load(node, vmid)
        machine = site.machine(vmid, node)
        match command:
            case "config":
                values = dict(conf.values)
                if not options.pop("current", None):
                    values |= conf.pending
                return "".join(f"{k}: {v}\n" for k, v in sorted(values.items()))
            case "status":
                state = "running" if machine.running else "stopped"
                return f"status: {state}\n"
            case "unlock":
                async with site.lock_config(vmid):
                    site.faults.require_quorum()
                    conf = site.load(node, vmid)
                    conf.values.pop("lock", None)
                    site.save(node, vmid, conf)
                return ""
            case "set":
                return await self._qm_set(vmid, options)
            case "start":
                return await self._task(
                    "qmstart",
                    vmid,
                    lambda t: lifecycle.start_vm(
                        site, node, vmid, skiplock="skiplock" in options
                    ),
                )
            case "stop":
                return await self._task(
                    "qmstop",
                    vmid,
                    lambda t: lifecycle.stop_vm(
                        site, node, vmid, skiplock="skiplock" in options
                    ),
                )
            case "shutdown":
                limit = float(options.get("timeout", 60))
                return await self._task(
                    "qmshutdown",
                    vmid,
                    lambda t: lifecycle.shutdown_vm(
                        site, node, vmid, limit, "forceStop" in options
                    ),
                )
            case "destroy":
                return await self._task(
                    "qmdestroy",
                    vmid,
                    lambda t: lifecycle.destroy_vm(
                        site,
                        node,
                        vmid,
                        skiplock="skiplock" in options,
                        unreferenced=False,
                    ),
                )
        raise Usage(f"ERROR: unknown command 'qm {command}'")

    async def _qm_set(self, vmid: int, options: dict[str, str]) -> str:
        known = {k: p for k, p in CONFIG.items()}
        delete = [k for k in options.pop("delete", "").split(",") if k]
        digest = options.pop("digest", None)
        skiplock = options.pop("skiplock", None) is not None
        force = options.pop("force", None) is not None
        values = verify(options, known, config=True, release=self.node.site.release)
        await configops.update(
            self.node.site,
            self.node,
            ROOT,
            vmid,
            {k: str(v) for k, v in values.items()},
            delete=delete,
            digest=digest,
            skiplock=skiplock,
            force=force,
        )
        parts = [f"-{k} {v}" for k, v in values.items()]
        if delete:
            parts.append(f"-delete {','.join(delete)}")
        return f"update VM {vmid}: {' '.join(parts)}\n"

    async def _task(self, kind: str, vmid: int, work: Any) -> str:
        tasks = self.node.site.tasks
        upid = tasks.start(self.node.name, kind, str(vmid), ROOT, work)
        task = await tasks.wait(upid)
        if task.exitstatus != "OK" and not str(task.exitstatus).startswith("WARNINGS"):
            raise die(str(task.exitstatus))
        return ""

    # -- pvesm and lvchange

    async def _pvesm(self, command: str, rest: list[str]) -> str:
        node = self.node
        words = [word for word in rest if not word.startswith("-")]
        match command, words:
            case "path", [volid]:
                storage = node.storage_of(volid)
                storage.file(volid)
                return storage.path(volid) + "\n"
            case "alloc", [name, vmid, filename, size, *more]:
                if name not in node.storages:
                    raise die(f"storage '{name}' does not exist")
                match = re.fullmatch(r"(\d+)([MG]?)", size)
                if not match:
                    raise Usage(
                        "400 Parameter verification failed.\n"
                        "size: value does not match the regex pattern"
                    )
                unit = {"": 1 << 10, "M": 1 << 20, "G": 1 << 30}[match[2]]
                volid = await asyncio.to_thread(
                    node.storages[name].alloc, int(vmid), filename or None,
                    int(match[1]) * unit, more[0] if more else None,
                )  # fmt: skip
                return f"successfully created '{volid}'\n"
            case "free", [volid, *_]:
                await asyncio.to_thread(node.storage_of(volid).free, volid)
                return f"Removed volume '{volid}'\n"
            case "list", [name, *_]:
                if name not in node.storages:
                    raise die(f"storage '{name}' does not exist")
                rows = await asyncio.to_thread(node.storages[name].volumes)
                text = f"{'Volid':<40} {'Format':<7} {'Type':<7} {'Size':>12} VMID\n"
                return text + "".join(
                    f"{r['volid']:<40} {r['format']:<7} {'images':<7} "
                    f"{r['size']:>12} {r['vmid']}\n"
                    for r in rows
                )
            case "status", _:
                text = (
                    f"{'Name':<12} {'Type':<10} {'Status':<10} {'Total':>12} "
                    f"{'Used':>12} {'Available':>12} {'%':>8}\n"
                )
                for storage in node.storages.values():
                    s = storage.status()
                    share = 100 * s["used"] / s["total"] if s["total"] else 0
                    state = "active" if s["active"] else "inactive"
                    text += (
                        f"{storage.name:<12} {storage.type:<10} {state:<10} "
                        f"{s['total'] >> 10:>12} {s['used'] >> 10:>12} "
                        f"{s['avail'] >> 10:>12} {share:>7.2f}%\n"
                    )
                return text
        raise Usage(f"ERROR: unknown command 'pvesm {command}'")

    async def _lvchange(self, rest: list[str]) -> str:
        text = " ".join(rest)
        on = re.search(r"(?:-a\s*|--activate[ =])e?y|-aly|-asy", text)
        off = re.search(r"(?:-a\s*|--activate[ =])e?n|-aln", text)
        names = [w for w in rest if "/" in w]
        if not names or not (on or off):
            raise Usage("  No command with matching syntax recognised.")
        for name in names:
            group, _, volume = name.rpartition("/")
            storage = self.node.storages.get(group.rpartition("/")[2])
            if storage is None or storage.type != "lvm":
                raise die(f'  Volume group "{group}" not found')
            action = storage.activate if on else storage.deactivate
            await asyncio.to_thread(action, f"{storage.name}:{volume}")
        return ""


def _options(words: list[str]) -> dict[str, str]:
    """``--key value``, ``--key=value`` and bare ``--flag``."""
    found: dict[str, str] = {}
    at = 0
    while at < len(words):
        word = words[at]
        at += 1
        if not word.startswith("-"):
            raise Usage("400 too many arguments")
        key, sep, value = word.lstrip("-").partition("=")
        if not sep:
            following = words[at] if at < len(words) else "-"
            value = "1"
            if not following.startswith("-") or following[1:].isdigit():
                value = following
                at += 1
        if key in found and key == "delete":
            value = f"{found[key]},{value}"
        found[key] = value
    return found
