# SPDX-License-Identifier: Apache-2.0
"""What ``qm``, ``pvesm`` and ``lvchange`` of a node do, asked through a unix socket.

The programs are thin: they send their name and arguments, print what comes back, as it
comes, and exit with the status given. They act as root@pam, as on a node. A task whose
program is gone ends at its next word, of SIGPIPE, and cleans up nothing: so it is on a
node, as the worker's output goes through ``qm`` and ``qm``'s to whoever started it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from . import configops, lifecycle, moves
from .errors import ApiError, die
from .schema import CONFIG, table, verify
from .tasks import Killed

if TYPE_CHECKING:
    from .site import LabNode
    from .vmconfig import VmConf

ROOT = "root@pam"


MOVE = table(
    "bwlimit=int(0,) delete=bool digest=str<=40 format=raw|qcow2|vmdk"
    " target-vmid=vmid target-disk=str target-digest=str<=40"
)
MOVES = ("move-disk", "move_disk")


class _Program:
    """The other end of a connection, as long as it is there."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._writer = writer
        self._gone = False
        self._watch = asyncio.create_task(self._see(reader), name="program")

    async def _see(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(ConnectionError):
            while await reader.read(1024):
                pass
        self._gone = True

    def send(self, **answer: Any) -> None:
        self._writer.write(json.dumps(answer).encode() + b"\n")

    def say(self, text: str) -> None:
        """Let it print something.

        Raises:
            Killed: it is gone.
        """
        if self._gone or self._writer.is_closing():
            raise Killed
        self.send(out=text)

    def close(self) -> None:
        self._watch.cancel()


_ASKING: ContextVar[_Program] = ContextVar("program")


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
            program = _Program(reader, writer)
            _ASKING.set(program)
            try:
                if self.gate:
                    await self.gate(" ".join(argv))
                out, err, status = await self._guarded(argv)
                program.send(out=out, err=err, status=status)
            finally:
                program.close()
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
        if command == "disk" and rest[:1] == ["move"]:
            command, rest = "move-disk", rest[1:]
        if not rest or not rest[0].isdigit():
            raise Usage("400 not enough arguments")
        vmid = int(rest[0])
        if command in MOVES:
            return await self._qm_move(vmid, rest[1:])
        options = _options(rest[1:])
        conf = site.load(node, vmid)
        match command:
            case "config":
                values = dict(conf.values)
                if not options.pop("current", None):
                    for key in conf.pending_delete:
                        values.pop(key, None)
                    values |= conf.pending
                if "description" in values:
                    values["description"] = encode_text(values["description"])
                return "".join(f"{k}: {v}\n" for k, v in sorted(values.items()))
            case "pending":
                return _pending_text(conf)
            case "status":
                row = await lifecycle.current(site, node, vmid)
                if "verbose" not in options:
                    return f"status: {row['qmpstatus']}\n"
                del row["cpu"], row["ha"]
                return "".join(f"{k}: {v}\n" for k, v in sorted(row.items()))
            case "suspend" | "resume":
                if not site.machine(vmid, node).running:
                    raise die(f"VM {vmid} not running")
                if "todisk" in options:
                    raise die("the lab cannot suspend to disk")
                action = (
                    lifecycle.suspend_vm
                    if command == "suspend"
                    else lifecycle.resume_vm
                )
                return await self._task(
                    f"qm{command}",
                    vmid,
                    lambda t: action(site, node, vmid, skiplock="skiplock" in options),
                )
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
                force = "forceStop" in options
                if await lifecycle.require_not_paused(site, node, vmid, force):
                    return await self._task(
                        "qmshutdown",
                        vmid,
                        lambda t: lifecycle.stop_vm(site, node, vmid),
                    )
                return await self._task(
                    "qmshutdown",
                    vmid,
                    lambda t: lifecycle.shutdown_vm(site, node, vmid, limit, force),
                )
            case "destroy":
                purge = options.get("purge", "0") in ("1", "on", "yes", "true")
                lifecycle.require_destroyable(site, node, vmid, True, purge)
                return await self._task(
                    "qmdestroy",
                    vmid,
                    lambda t: lifecycle.destroy_vm(
                        site,
                        node,
                        vmid,
                        skiplock="skiplock" in options,
                        unreferenced=options.get("destroy-unreferenced-disks") == "1",
                        purge=purge,
                        task=t,
                    ),
                )
        raise Usage(f"ERROR: unknown command 'qm {command}'")

    async def _qm_move(self, vmid: int, words: list[str]) -> str:
        site, node = self.node.site, self.node
        plain = [word for at, word in enumerate(words) if not _of_option(words, at)]
        if len(plain) < 2:
            raise Usage(
                "400 not enough arguments\n"
                "qm disk move <vmid> <disk> <storage> [OPTIONS]"
            )
        if len(plain) > 2:
            raise Usage("400 too many arguments")
        options = _options([w for at, w in enumerate(words) if _of_option(words, at)])
        given = verify(options, MOVE)
        if "target-vmid" in given:
            raise die("the lab moves disks between storages only")
        wanted = moves.Wanted(
            plain[0],
            plain[1],
            given.get("format"),
            bool(given.get("delete")),
            given.get("digest"),
            given.get("bwlimit"),
        )
        moves.check(site, node, vmid, wanted)
        return await self._task(
            "qmmove",
            vmid,
            lambda t: moves.move_disk(site, node, vmid, wanted, t),
        )

    async def _qm_set(self, vmid: int, options: dict[str, str]) -> str:
        known = {k: p for k, p in CONFIG.items()}
        delete = [k for k in options.pop("delete", "").split(",") if k]
        digest = options.pop("digest", None)
        skiplock = options.pop("skiplock", None) is not None
        force = options.pop("force", None) is not None
        values = verify(options, known, config=True, release=self.node.site.release)
        if not values and not delete:
            raise die("no options specified")
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
        said = {**values, **({"delete": ",".join(delete)} if delete else {})}
        parts = [f"-{k} {v}" for k, v in sorted(said.items())]
        return f"update VM {vmid}: {' '.join(parts)}\n"

    async def _task(self, kind: str, vmid: int, work: Any) -> str:
        tasks = self.node.site.tasks
        upid = tasks.start(self.node.name, kind, str(vmid), ROOT, work)
        program = _ASKING.get()
        tasks.all[upid].say = program.say
        task = await tasks.wait(upid)
        status = str(task.exitstatus)
        if status.startswith("WARNINGS: "):
            number = status.partition(": ")[2]
            program.send(err=f"Task finished with {number} warning(s)!\n")
        elif status != "OK":
            raise die(status)
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


def encode_text(text: str) -> str:
    """A description on one line: control and other bytes, ``:`` and ``%`` as %XX."""
    return "".join(
        chr(byte) if 0x20 <= byte <= 0x7E and byte not in b":%" else f"%{byte:02X}"
        for byte in text.encode()
    )


def _pending_text(conf: VmConf) -> str:
    """What ``qm pending`` prints."""
    text = ""
    for key in sorted(conf.values.keys() | conf.pending.keys()):
        new, old = conf.pending.get(key), conf.values.get(key)
        if key in conf.pending_delete:
            text += f"del {key}: {old}\n"
        else:
            if old is not None:
                text += f"cur {key}: {old}\n"
            if new is not None:
                text += f"new {key}: {new}\n"
    return text


def _of_option(words: list[str], at: int) -> bool:
    """Whether a word is an option, or the value of the one before it."""
    if words[at].startswith("-"):
        return True
    before = words[at - 1] if at else ""
    return before.startswith("-") and "=" not in before


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
