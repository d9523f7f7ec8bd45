# SPDX-License-Identifier: Apache-2.0
"""The watch over fatal commands sees each of them, and none in a good sequence."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.fatal_commands import fatal_commands

DRIVES = {"/machine/peripheral/scsi0": "#block142"}


def command(name: str, **arguments: Any) -> dict[str, Any]:
    fixed = {key.replace("_", "-"): value for key, value in arguments.items()}
    return {"execute": name, "arguments": fixed}


def drive(value: str) -> dict[str, Any]:
    path = "/machine/peripheral/scsi0"
    return command("qom-set", path=path, property="drive", value=value)


def reopen(file: str) -> dict[str, Any]:
    return command("blockdev-reopen", options=[{"node-name": "drive-a", "file": file}])


MERGE = {"type": "block-dirty-bitmap-merge", "data": {"bitmaps": []}}


@pytest.mark.parametrize(
    ("commands", "what"),
    [
        ([command("block-dirty-bitmap-merge", bitmaps=[])], "merge of nothing"),
        ([command("transaction", actions=[MERGE])], "merge of nothing"),
        ([drive("#block142")], "which is there"),
        ([drive("ph-cbw-scsi0"), drive("ph-cbw-scsi0")], "which is there"),
        (
            [command("block-export-add", bitmaps=[{"node": "drive-a", "name": "u"}])],
            "exported from the drive",
        ),
        ([command("block-export-add", bitmaps=["u"])], "exported from the drive"),
        ([command("block_resize")], "nothing of ours"),
        ([reopen("ph-cbw-a"), reopen("f1")], "the old volume"),
    ],
)
def test_each_fatal_command_is_seen(commands: list[Any], what: str) -> None:
    (found,) = fatal_commands(commands, DRIVES)
    assert what in found


def test_a_good_sequence_has_none() -> None:
    good = [
        reopen("ph-cbw-a"),
        drive("ph-cbw-scsi0"),
        command("block-export-add", bitmaps=[{"node": "ph-sc-a", "name": "u"}]),
        command("blockdev-del", node_name="ph-cbw-a"),
        reopen("f1"),
        drive("#block142"),
    ]
    assert list(fatal_commands(good, DRIVES)) == []
