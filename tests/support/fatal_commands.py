# SPDX-License-Identifier: Apache-2.0
"""The commands that would end QEMU, or lose data, looked for in all we send.

They are those of docs/cbt.md, "Four commands that end QEMU", and a teardown that puts a
remembered node back though the disk was moved.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.lab.vm import LabVm

Command = Mapping[str, Any]
"""As sent: ``execute`` and ``arguments``."""


@dataclass
class Watch:
    """All commands of the product in their order."""

    drives: dict[str, str] = field(default_factory=dict)
    """QOM path of a device -> the node it has; where the -drive layout matters."""
    commands: list[Command] = field(default_factory=list)

    def fatal(self) -> list[str]:
        """Return what is wrong with the commands so far."""
        return list(fatal_commands(self.commands, self.drives))

    def sent(self, name: str) -> list[Mapping[str, Any]]:
        """Return the arguments of all commands of this name."""
        return [c.get("arguments", {}) for c in self.commands if c["execute"] == name]


@contextlib.asynccontextmanager
async def watched(vm: LabVm) -> AsyncIterator[Watch]:
    """Record what the product sends to a VM's monitor within the block."""
    watch = Watch(roots(await vm.qmp("query-block")))

    async def note(command: dict[str, Any]) -> None:
        if not str(command.get("id", "")).startswith("lab-"):
            watch.commands.append(command)

    relay = vm.machine.qmp_relay
    relay.answer = note
    try:
        yield watch
    finally:
        relay.answer = None


def roots(blocks: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Return which node each device has, from ``query-block``."""
    return {
        f"/machine/peripheral/{block['device'].removeprefix('drive-')}": block[
            "inserted"
        ]["node-name"]
        for block in blocks
        if block.get("device", "").startswith("drive-") and "inserted" in block
    }


def fatal_commands(
    commands: Iterable[Command], drives: Mapping[str, str]
) -> Iterator[str]:
    """Yield what each wrong command would do."""
    now = dict(drives)
    tried: set[str] = set()
    for command in commands:
        name, arguments = command["execute"], command.get("arguments", {})
        actions = [(name, arguments)]
        if name == "transaction":
            actions = [(a["type"], a["data"]) for a in arguments["actions"]]
        for action, data in actions:
            if action == "block-dirty-bitmap-merge" and not data["bitmaps"]:
                yield "a merge of nothing: SIGSEGV"
        match name:
            case "qom-set":
                if now.get(arguments["path"]) == arguments["value"]:
                    yield f"qom-set to {arguments['value']}, which is there: abort"
                now[arguments["path"]] = arguments["value"]
            case "block-export-add":
                for bitmap in arguments.get("bitmaps", ()):
                    if not _on_scratch(bitmap):
                        yield f"{bitmap} exported from the drive: abort at a resize"
            case "block_resize":
                yield "block_resize, which is nothing of ours"
            case "blockdev-del":
                tried.add(arguments["node-name"])
            case "blockdev-reopen":
                for node in arguments["options"]:
                    filter_ = "ph-cbw-" + node["node-name"].removeprefix("drive-")
                    if node["file"] == filter_:
                        tried.discard(filter_)
                    elif filter_ not in tried:
                        yield f"{node['file']} put back unasked: the old volume"


def _on_scratch(bitmap: Any) -> bool:
    return isinstance(bitmap, Mapping) and bitmap["node"].startswith("ph-sc-")
