# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pveplug.config import PasswordLogin, TokenLogin, shown
from pveplug.config_parse import (
    level_warning,
    parse_backup,
    parse_restore,
    parse_restore_options,
)
from pveplug.errors import ConfigError
from pveplug.node import Node
from pveplug.pluginstring import (
    is_vm_where,
    option_words,
    plugin_string,
    plugin_words,
    where_string,
    where_words,
)
from pveplug.values import Mapped

AUTH = "pve_token_id=bacula@pve!backup pve_token_secret_file=/etc/token"
BACKUP = f"podheitor-proxmox: vmid=100 {AUTH}"

keys = st.from_regex("[a-z][a-z_]{0,8}", fullmatch=True)
texts = st.text(
    st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), max_size=30
)


def refusal(parse, text):
    try:
        parse(text)
    except ConfigError as error:
        return str(error)
    return ""


@given(st.dictionaries(keys, st.none() | texts, max_size=5))
def test_any_value_survives_the_plugin_string(values):
    assert plugin_words(plugin_string(values)) == values


@given(texts)
def test_any_text_is_parsed_or_refused_in_one_line(text):
    said = refusal(plugin_words, f"podheitor-proxmox: {text}")
    assert "\n" not in said


@given(st.dictionaries(keys, texts, max_size=5))
def test_any_value_survives_where(values):
    where = where_string(values)
    if len(where) <= 900:
        assert re.fullmatch(r"[A-Za-z0-9._:;+@/=,%-]*", where)
        assert where_words(where) == values
        assert where_words(where + "/") == values


@given(texts)
def test_any_where_is_parsed_or_refused(text):
    said = refusal(where_words, f"/@pve/{text}")
    assert "\n" not in said


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("podheitor-proxmox:", {}),
        ("podheitor-proxmox:vmid=100", {"vmid": "100"}),
        ("podheitor-proxmox: \t a=1 \n b=2 ", {"a": "1", "b": "2"}),
        ('podheitor-proxmox: a="two words" b=x', {"a": "two words", "b": "x"}),
        ("podheitor-proxmox: a='it\\s' b", {"a": "it\\s", "b": None}),
        (r'podheitor-proxmox: a="say \"hi\" \\ \n"', {"a": r'say "hi" \ \n'}),
        (r"podheitor-proxmox: a=one\ word b=c:\dir", {"a": "one word", "b": r"c:\dir"}),
        ("podheitor-proxmox: a=''", {"a": ""}),
        ("podheitor-proxmox: a=x=y", {"a": "x=y"}),
        ("podheitor-proxmox: a=pre'mid dle'post", {"a": "premid dlepost"}),
        ("podheitor-proxmox: a=größe", {"a": "größe"}),
    ],
)
def test_quotes_and_backslashes_follow_the_documented_rules(text, words):
    assert plugin_words(text) == words


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("bpipe: a=1", "must begin with"),
        ("", "must begin with"),
        ("podheitor-proxmox: a='x", "is not closed"),
        ("podheitor-proxmox: a =1", "without spaces around"),
        ("podheitor-proxmox: a=1 a=2", "a is given twice"),
        ("podheitor-proxmox: Vmid=1", "lower-case: vmid"),
        ("podheitor-proxmox: name=my vm!", "needs quotes"),
        ("podheitor-proxmox: a=\udcff", "not UTF-8"),
        ("podheitor-proxmox: a=\0", "NUL"),
    ],
)
def test_a_malformed_plugin_string_is_refused(text, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        plugin_words(text)


def test_a_minimal_backup_string_has_every_default():
    config, warnings = parse_backup(BACKUP, node=Node(pve_node="pve1"))
    assert warnings == []
    assert (config.connection.host, config.connection.port) == ("127.0.0.1", 8006)
    assert config.connection.node == "pve1"
    assert config.capture.max_parallel_disks == 2
    assert config.capture.scratch_dir == Node().scratch_dir
    assert config.mode == "backup"
    assert str(config.selection) == "vmid=100"


def test_the_node_file_gives_the_connection_s_defaults():
    node = Node(pve_host="192.0.2.1", pve_port=9006, pve_node="lab")
    config, _ = parse_backup(BACKUP, node=node)
    assert (config.connection.host, config.connection.port) == ("192.0.2.1", 9006)
    config, _ = parse_backup(f"{BACKUP} pve_host=h2 pve_port=1", node=node)
    assert (config.connection.host, config.connection.port) == ("h2", 1)


def test_a_yes_no_key_alone_means_yes():
    config, _ = parse_backup(f"podheitor-proxmox: all {AUTH}")
    assert config.selection.all


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("vmid", "vmid needs a value"),
        ("vmid=", "has no value"),
        ("vmid=100 vmdi=1", "did you mean vmid?"),
        ("quiesce=no", "no VM is selected"),
        ("all=yes vmid=100", "remove vmid or all"),
        ("vmid=100 pve_user=root@pam", "two ways to log in"),
        ("vmid=100 fleecing_storage=fast scratch_dir=/x", "two places"),
        ("vmid=100 post_thaw_cmd=/x", "pre_freeze_cmd"),
        ("vmid=100 pve_token_secret_cmd=/x", "give one of them"),
        ("vmid=100 pve_password_file=/x", "pve_password_file needs pve_user"),
        ("vmid=100 mode=seed", "mode=seed needs dr_host"),
        ("vmid=100 mode=incremental", "Level = Incremental in the Job"),
        ("vmid=100 dr_host=b", "dr_host is for disaster recovery"),
        ("vmid=100 mode=seed dr_host=b", "no credential for the receiver"),
        ("vmid=100 mode=seed dr_host=b dr_auth_cert=/c", "mutual TLS needs"),
        (
            "vmid=100 mode=failover-exec dr_host=b dr_auth_token_file=/t "
            "dr_unplanned dr_final_sync",
            "dr_final_sync needs the source",
        ),
    ],
)
def test_contradictions_and_gaps_are_explained(words, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        parse_backup(f"podheitor-proxmox: {words} {AUTH}")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "no credential"),
        ("pve_token_id=bacula@pve!backup", "needs pve_token_secret_file"),
        ("pve_user=root@pam", "needs pve_password_file"),
        ("pve_token_secret_file=/x", "needs pve_token_id"),
    ],
)
def test_an_incomplete_credential_is_refused(words, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        parse_backup(f"podheitor-proxmox: vmid=100 {words}")


def test_an_inline_secret_works_warns_and_is_never_shown():
    text = "podheitor-proxmox: vmid=100 pve_token_id=b@pve!bk pve_token_secret=hunter2"
    config, warnings = parse_backup(text)
    assert warnings == [
        "pve_token_secret is stored in the catalogue and on volumes; "
        "use pve_token_secret_file"
    ]
    assert "hunter2" not in shown(config) + repr(config)
    login = config.connection.resolve()
    assert isinstance(login, TokenLogin)
    assert login.secret.reveal() == "hunter2"


def test_a_password_is_read_only_when_it_is_asked_for(tmp_path):
    path = tmp_path / "password"
    text = f"podheitor-proxmox: vmid=100 pve_user=root@pam pve_password_file={path}"
    config, _ = parse_backup(text)
    with pytest.raises(ConfigError, match="No such file"):
        config.connection.resolve()
    path.write_text("p w\n")
    path.chmod(0o600)
    login = config.connection.resolve()
    assert isinstance(login, PasswordLogin)
    assert (login.user, login.password.reveal()) == ("root@pam", "p w")


def test_insecure_warns_and_yields_to_a_pin():
    config, warnings = parse_backup(f"{BACKUP} pve_insecure")
    assert config.connection.insecure
    assert "may reach a stranger" in warnings[0]
    config, warnings = parse_backup(
        f"{BACKUP} pve_insecure pve_fingerprint={'ab' * 32}"
    )
    assert not config.connection.insecure
    assert "has no effect" in warnings[0]


def test_backup_type_is_only_compared_with_bacula_s_level():
    config, _ = parse_backup(f"{BACKUP} backup_type=incremental")
    assert level_warning(config.backup_type, "I") is None
    assert level_warning(None, "F") is None
    assert "this job is full; Bacula makes a Full" in (
        level_warning(config.backup_type, "F") or ""
    )


@pytest.mark.parametrize(
    ("where", "menu", "target", "said"),
    [
        ("", [], "vm", "where= is empty"),
        ("/", [], "vm", "where= is /"),
        ("/@pve/", [], "vm", "where=/@pve/"),
        ("/@pve", [], "vm", "where=/@pve"),
        ("/@pve/restore_vmid=120", [], "vm", "restore_vmid=120"),
        ("/tmp/restore", [], "files", "no restore option is set"),
        ("/@pvefoo", [], "files", "where=/@pvefoo"),
        ("/tmp/restore", ["restore_vmid=120\n"], "vm", "set restore_vmid"),
        ("/tmp/restore", ["pve_host=h\n"], "files", "no restore option is set"),
    ],
)
def test_the_target_follows_from_where_and_the_menu(where, menu, target, said):
    config = parse_restore(f"{BACKUP} restore_storage=fast", where, menu)
    assert config.target == target
    assert said in config.reason
    assert config.storage == "fast"


def test_where_wins_over_the_menu_and_the_menu_over_the_plugin_string():
    config = parse_restore(
        f"{BACKUP} mac=new restore_name=stored restore_storage=s1 storage_map=a:b",
        "/@pve/restore_vmid=120,restore_storage=s3",
        ["# comment\nrestore_vmid=130\nrestore_storage=s2\nrestore_name=menu\n"],
    )
    assert config.vmid_for(100) == 120
    assert (config.storage, config.name, config.mac) == ("s3", "menu", "new")
    assert not config.storage_map
    assert len(config.warnings) == 2
    assert all("where= wins" in warning for warning in config.warnings)


def test_where_lists_use_semicolons():
    config = parse_restore(
        BACKUP, "/@pve/storage_map=a:b;c:d,disks=scsi0;scsi1,mac=new"
    )
    assert config.storage_map == Mapped({"a": "b", "c": "d"})
    assert config.disks == ("scsi0", "scsi1")
    assert config.wishes.mac == "new"
    assert config.wishes.storage_map == config.storage_map


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("/@pve/restore_vmdi=1", "did you mean restore_vmid?"),
        ("/@pve/restore_vmid=1,restore_vmid=2", "given twice"),
        ("/@pve/restore_vmid", "not key=value"),
        ("/@pve/storage_map=a:b,c:d", "separated by ';'"),
        ("/@pve/restore_name=a b", "write ' ' as %20"),
        ("/@pve/restore_name=ü", "as %C3%BC"),
        ("/@pve/restore_name=%G1", "two hex digits"),
        ("/@pve/restore_name=%FF", "not UTF-8"),
        ("/@pve/quiesce=no", "cannot be given at restore time"),
        ("/@pve/pve_password=x", "cannot be given at restore time"),
        ("/@pve/restore_vmid=7", "no VM id"),
        ("/@pve/" + "x" * 900, "at most 900"),
        ("/@pve/disks=scsi1,overwrite=yes", "only attaches disks"),
        ("/@pve/overwrite=yes", "needs restore_vmid"),
    ],
)
def test_a_wrong_where_is_fatal_and_says_why(where, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        parse_restore(BACKUP, where)


def test_an_old_plugin_string_does_not_stop_a_restore():
    config = parse_restore(
        f"podheitor-proxmox: gone_key=1 quiesce=rubbish mode=seed {AUTH}", "/@pve/"
    )
    assert config.warnings == (
        "the backup's plug-in string has gone_key, unknown here",
    )


def test_a_restore_to_files_needs_no_credential():
    assert parse_restore("podheitor-proxmox: vmid=100", "/tmp/x").target == "files"
    with pytest.raises(ConfigError, match="no credential"):
        parse_restore("podheitor-proxmox: vmid=100", "/")


def test_a_credential_given_at_restore_replaces_the_old_one_whole():
    config = parse_restore(
        f"{BACKUP} pve_insecure=yes",
        "/@pve/pve_user=root@pam,pve_password_file=/root/pw,pve_ca=/ca.pem",
    )
    assert config.connection.token_id is None
    assert config.connection.user == "root@pam"
    assert not config.connection.insecure
    config = parse_restore(BACKUP, "/@pve/pve_token_secret_file=/new")
    assert config.connection.secret
    assert config.connection.secret.value == "/new"


def test_vmids_for_one_and_for_several_vms():
    assert parse_restore(BACKUP, "/@pve/").vmid_for(100) is None
    several = parse_restore(BACKUP, "/@pve/restore_vmid=100:500;101:same;next")
    assert [several.vmid_for(n) for n in (100, 101, 102)] == [500, 101, None]
    single = parse_restore(BACKUP, "/@pve/disks=scsi1")
    assert single.vmid_for(100) == 100


# What bconsole of Bacula 15.0.3 made of our menu, word for word, with its final NUL.
RESTORE_OPTIONS = """\
# Plugin configuration file
# Version 1
# TCP port of the Proxmox VE API
pve_port=8007

# Id of the restored VM: an id, next, same, or 100:9100,101:next
restore_vmid="100:9100,101:next"

# Old storage to new, as local-lvm:ceph,nas:local
storage_map="a:b,c:d"

# Name of the restored VM
restore_name="web-\\"1\\""

# Start the VM when it is restored
start_after=yes

\0"""


def test_the_restore_options_object_is_read_as_bacula_writes_it():
    assert option_words(RESTORE_OPTIONS) == {
        "pve_port": "8007",
        "restore_vmid": "100:9100,101:next",
        "storage_map": "a:b,c:d",
        "restore_name": 'web-"1"',
        "start_after": "yes",
    }
    values = parse_restore_options(RESTORE_OPTIONS.replace('\\"', ""))
    assert values["start_after"] is True
    assert values["storage_map"] == Mapped({"a": "b", "c": "d"})
    assert option_words("mac=\n") == {}
    with pytest.raises(ConfigError, match="line 1: not key=value"):
        parse_restore_options("rubbish\n")
    with pytest.raises(ConfigError, match="restore options: unknown parameter"):
        parse_restore_options("restore_vm_id2x=5\n")


def test_only_pve_paths_address_a_vm():
    assert is_vm_where("/@pve/x=y")
    assert not is_vm_where("/@pvex")
    assert not is_vm_where("@pve/x")
