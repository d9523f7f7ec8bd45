# SPDX-License-Identifier: Apache-2.0
"""What an import is told: the node file, the command or the job, one over the other."""

from __future__ import annotations

import pytest

from pveplug.config_parse import parse_import
from pveplug.errors import ConfigError
from pveplug.node import Node

AUTH = "pve_token_id=bacula@pve!backup pve_token_secret_file=/etc/token"
NODE = Node(pve_node="a", import_options=f"{AUTH} restore_storage=local import_cores=2")


def test_the_node_file_says_what_a_job_of_another_plugin_cannot() -> None:
    found = parse_import("/", node=NODE)
    assert found.common.target == "vm"
    assert found.common.storage == "local"
    assert found.common.connection.token_id == "bacula@pve!backup"
    assert (found.cores, found.memory_mib, found.firmware) == (2, None, "auto")
    assert found.vmid is None


def test_where_wins_over_the_menu_and_that_over_the_node_file() -> None:
    found = parse_import(
        "/@pve/restore_vmid=120,import_memory=512,import_raw=a%2A;b,import_verify=yes",
        ["restore_storage=ceph\nrestore_vmid=7000\n"],
        node=NODE,
    )
    assert found.vmid == 120
    assert found.common.storage == "ceph"
    assert (found.cores, found.memory_mib) == (2, 512)
    assert found.raw == ("a*", "b")
    assert found.verify
    assert any("where= wins" in text for text in found.common.warnings)


def test_the_command_wins_over_the_node_file_and_replaces_a_whole_credential() -> None:
    given = "pve_user=root@pam pve_password_file=/p storage_map=ceph import_cores=4"
    found = parse_import(node=NODE, given=given)
    connection = found.common.connection
    assert (connection.user, connection.token_id) == ("root@pam", None)
    assert found.common.storage == "local"
    assert found.cores == 4
    nothing = Node(import_options=AUTH)
    assert parse_import(node=nothing, given="storage_map=ceph").common.storage == "ceph"


def test_a_directory_gets_files_and_needs_no_storage() -> None:
    assert parse_import("/srv/x", node=Node()).common.target == "files"


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("/@pve/overwrite=yes,restore_vmid=7000", "overwrite is for a VM's own"),
        ("/@pve/disks=scsi0", "disks is for a VM's own"),
        ("/@pve/mode=instant", "mode is for a VM's own"),
        ("/@pve/restore_vmid=same", "an import goes to one id"),
        ("/@pve/restore_vmid=100:200", "an import goes to one id"),
        ("/@pve/storage_map=a:b", "give restore_storage"),
        ("/@pve/import_core=1", "did you mean import_cores"),
        ("/@pve/import_cores=0", "must be from 1"),
    ],
)
def test_what_makes_no_sense_for_a_new_vm_is_refused(where: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_import(where, node=NODE)


def test_what_is_missing_is_named_with_where_it_may_stand() -> None:
    with pytest.raises(ConfigError, match="restore_storage=…, or import_options"):
        parse_import("/", node=Node(import_options=AUTH))
    with pytest.raises(ConfigError, match="import_options of the node file: unknown"):
        parse_import("/", node=Node(import_options="nonsense=1"))
