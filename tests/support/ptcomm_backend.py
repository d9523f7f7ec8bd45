#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A scripted backend for tests of the shim: plays a JSON scenario over PTCOMM.

The plugin string is ``podheitor-proxmox: scenario=/path/to/scenario.json``. Its keys::

    record   directory: log.jsonl, sent/<name>, received/<name>
    entries  what a backup sends, in order; "{job}" in a name is the unique job name
             {"object": name, "size": n}   {"config": name, "text": "..."}
             {"file": name, "size": n, "runs": [[offset, length], ...] or null,
              "offsets": bool, "frame": n}
    answers  restore: {part of a name: "SKIP" | "CORE"}; everything else is OK
    faults   {point: action}, see `Backend.at`

Started as ``ptcomm_backend.py --cleanup JOB`` it appends that to the file named by
``PTCOMM_BACKEND_CLEANUPS``. Only the standard library: bacula-fd starts it.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

MESSAGES = "AEQWISNRPOV"


def read_exactly(length: int) -> bytes:
    parts = []
    while length:
        part = os.read(0, min(length, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


def write(data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(1, view) :]


def packet(letter: str, payload: bytes = b"") -> bytes:
    return f"{letter}{len(payload):06}\n".encode() + payload


class Backend:
    def __init__(self) -> None:
        self.job: dict[str, str] = {}
        self.scenario: dict[str, Any] = {}
        self.record = Path(os.devnull)
        self.command_string = ""

    # -- packets -------------------------------------------------------------

    def receive(self) -> tuple[str, bytes]:
        header = read_exactly(8)
        letter, length = chr(header[0]), int(header[1:7])
        return letter, read_exactly(length)

    def line(self) -> str | None:
        """The next command, or None for F."""
        letter, payload = self.receive()
        if letter == "F":
            return None
        assert letter == "C", (letter, payload[:80])
        assert payload.endswith(b"\n"), payload[:80]
        return payload[:-1].decode()

    def block(self) -> list[str]:
        lines = []
        while (line := self.line()) is not None:
            lines.append(line)
        return lines

    def command(self, text: str) -> None:
        write(packet("C", text.encode() + b"\n"))

    def message(self, letter: str, text: str) -> None:
        write(packet(letter, text.encode() + b"\n"))

    def end(self) -> None:
        write(packet("F"))

    # -- what the test sees --------------------------------------------------

    def log(self, event: str, **values: Any) -> None:
        line = json.dumps(
            {"event": event, "job": self.job.get("Name"), "pid": os.getpid(), **values}
        )
        with open(self.record / "log.jsonl", "a") as file:
            file.write(line + "\n")

    def at(self, point: str) -> None:
        """Do what the scenario wants at this point."""
        action = self.scenario.get("faults", {}).get(point)
        if action is None:
            return
        self.log("fault", point=point, action=action)
        match action.split(":", 1):
            case ["exit", status]:
                os._exit(int(status))
            case ["kill"]:
                os.kill(os.getpid(), signal.SIGKILL)
            case ["hang"]:
                while True:
                    time.sleep(60)
            case ["deaf"]:  # does not even end when told to
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                signal.signal(signal.SIGUSR1, signal.SIG_IGN)
                while True:
                    time.sleep(60)
            case ["sleep", seconds]:
                time.sleep(float(seconds))
            case ["raw", text]:
                write(text.encode().decode("unicode_escape").encode("latin-1"))
            case ["flood", count]:
                for number in range(int(count)):
                    self.message("I", f"message {number} of a flood, 100%s %n")
            case ["long", length]:
                self.message("W", "long " + "ä" * (int(length) // 2))
            case ["say", text]:
                self.message(text[0], text[1:])
            case ["die", text]:
                self.message(text[0], text[1:])
                os._exit(1)
            case _:
                raise ValueError(action)

    # -- session -------------------------------------------------------------

    def run(self) -> None:
        hello = self.line()
        assert hello is not None
        assert hello.startswith("Hello podheitor-proxmox 3"), hello
        self.command("Hello Bacula")
        lines = self.block()
        assert lines[0] == "Job"
        self.job = dict(line.split("=", 1) for line in lines[1:])
        self.end()
        lines = self.block()
        assert lines[0] == "Params"
        command = lines[1].removeprefix("Plugin=")
        self.command_string = command
        path = command.split("scenario=", 1)[1].split()[0]
        self.scenario = json.loads(Path(path).read_text())
        self.record = Path(self.scenario["record"])
        self.record.mkdir(parents=True, exist_ok=True)
        self.log("job", command=command, **{"values": self.job})
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self.signalled)
        self.log(
            "process",
            group=os.getpgid(0),
            descriptors=sorted(int(name) for name in os.listdir("/proc/self/fd")),
        )
        self.at("params")
        self.end()
        verb = self.line()
        self.at("start")
        self.end()
        match verb:
            case "BackupStart":
                self.backup(data=True)
                self.status()
            case "EstimateStart":
                self.backup(data=False)
            case "RestoreStart":
                self.restore()
            case _:
                raise ValueError(verb)
        self.at("goodbye")
        line = self.line()
        assert line == "END", line
        self.end()
        letter, _ = self.receive()
        assert letter == "T"
        self.log("goodbye")

    def signalled(self, number: int, _frame: object) -> None:
        self.log("signal", name=signal.Signals(number).name)
        os._exit(0)

    def status(self) -> None:
        (line,) = self.block()
        self.log("status", status=line.removeprefix("JobStatus="))
        self.at("status")
        self.end()

    # -- backup --------------------------------------------------------------

    def backup(self, *, data: bool) -> None:
        self.at("entries")
        for entry in self.scenario.get("entries", []):
            if "object" in entry:
                content = entry.get("text", "").encode() or bytes_of(
                    self.job["Name"] + entry["object"], entry["size"]
                )
                self.log("object", name=entry["object"], sha=sha(content))
                self.send_object("RESTOREOBJ", entry["object"], content)
            elif "config" in entry:
                self.send_object(
                    "PLUGINCONFIG", entry["config"], entry["text"].encode()
                )
            else:
                self.send_file(entry, data=data)
        self.at("end")
        self.end()

    def send_object(self, key: str, name: str, content: bytes) -> None:
        self.command(f"{key}:{name}")
        self.command(f"{key}_LEN:{len(content)}")
        for at in range(0, len(content), 50000):
            write(packet("D", content[at : at + 50000]))
        self.end()

    def send_file(self, entry: dict[str, Any], *, data: bool) -> None:
        name = entry["file"].format(job=self.job["Name"])
        self.command("FileIndex")
        self.log("index", value=self.line())
        self.command(f"FNAME:{name}")
        self.command(f"STAT:F {entry['size']} 0 0 100640 1")
        self.command("TSTAMP:1700000000 1700000001 1700000002")
        if entry.get("offsets"):
            self.command("OPTIONS:offsets")
        self.end()
        if not data:
            return
        if entry.get("runs") is None:
            self.end()
            return
        copy = self.record / "sent" / name.strip("/")
        copy.parent.mkdir(parents=True, exist_ok=True)
        self.command("DATA")
        with open(copy, "wb") as file:
            file.truncate(entry["size"])
            for number, (offset, length) in enumerate(entry["runs"]):
                content = bytes_of(f"{self.job['Name']}{name}{number}", length)
                os.pwrite(file.fileno(), content, offset)
                if entry.get("offsets"):
                    self.command(f"OFFSET:{offset}")
                frame = entry.get("frame", 262144)
                for at in range(0, length, frame):
                    write(packet("D", content[at : at + frame]))
                self.at(f"run{number}")
        self.end()

    # -- restore -------------------------------------------------------------

    def restore(self) -> None:
        while (line := self.line()) != "OBJECTSEND":
            assert line is not None
            values = [line, self.line() or "", self.line() or "", self.line() or ""]
            content = b""
            while True:
                letter, payload = self.receive()
                if letter == "F":
                    break
                content += payload
            name, job_id, kind, length = (value.split(":", 1)[1] for value in values)
            assert len(content) == int(length)
            self.log(
                "restore object",
                command=self.command_string,
                name=name,
                job_id=int(job_id),
                type=int(kind),
                sha=sha(content),
                text=content.decode() if kind == "28" else "",
            )
            self.command("OK")
        self.at("objects")
        self.end()
        while (line := self.line()) != "FINISH":
            assert line is not None
            self.receive_file([line, *self.block()])
        self.at("finish")
        self.end()
        self.log("finished")

    def receive_file(self, lines: list[str]) -> None:
        name = lines[0].removeprefix("FNAME:")
        self.log("file", name=name, lines=lines[1:])
        self.at("file")
        for part, answer in self.scenario.get("answers", {}).items():
            if part in name:
                self.command(answer)
                return
        self.command("OK")
        assert self.line() == "DATA"
        at, runs = 0, []
        out = self.record / "received" / name.strip("/")
        out.parent.mkdir(parents=True, exist_ok=True)
        with open(out, "wb") as file:
            while True:
                letter, payload = self.receive()
                if letter == "F":
                    break
                if letter == "C":
                    at = int(payload.decode().removeprefix("OFFSET:"))
                    continue
                os.pwrite(file.fileno(), payload, at)
                runs.append([at, len(payload)])
                at += len(payload)
                self.at("received")
            size = int(lines[1].split()[1])
            file.truncate(size)
        self.log("data", name=name, runs=len(runs))
        self.at("file end")
        self.command("OK")


def bytes_of(seed: str, length: int) -> bytes:
    return random.Random(seed).randbytes(length)


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def main() -> int:
    if sys.argv[1:2] == ["--cleanup"]:
        with open(os.environ["PTCOMM_BACKEND_CLEANUPS"], "a") as file:
            session = os.getsid(0)
            file.write(f"{sys.argv[2]} session={session} pid={os.getpid()}\n")
        return 0
    backend = Backend()
    try:
        backend.run()
    except (EOFError, BrokenPipeError):
        backend.log("eof")
        return 1
    except Exception as error:
        if backend.scenario:
            backend.log("crash", error=repr(error))
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
