# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pveplug import values as v
from pveplug.errors import ConfigError
from pveplug.manual import explain, manual
from pveplug.parameters import (
    GROUPS,
    PARAMETERS,
    default_shown,
    lookup,
    restore_template,
)

DOCS = Path(__file__).parents[2] / "docs"
BLOCK = re.compile(
    r'OptPrompt="[^"\n]+"\n(?:OptDefault="[^"\n]+"\n)?'
    r"([a-z_]+)=@(INT32|PINT32|INT64|PINT64|STR|NAME|BOOL|DATE|ALIST)@\n"
)


def test_the_manual_in_docs_is_what_the_table_makes():
    assert (DOCS / "parameters.md").read_text(encoding="utf-8") == manual(), (
        "run: python -m pveplug.manual > docs/parameters.md"
    )


@pytest.mark.parametrize("row", PARAMETERS.values(), ids=lambda row: row.name)
def test_every_parameter_is_explained_and_its_default_is_a_value_of_its_type(row):
    assert row.group in GROUPS
    assert row.summary
    assert not row.summary.endswith(".")
    assert row.name in explain(row)
    if row.default not in (None, (), v.Mapped()):
        text = default_shown(row) if not row.default_text else str(row.default)
        assert row.parse(text) == row.default


def test_the_restore_menu_is_in_bacula_s_syntax_and_small_enough():
    text = restore_template()
    blocks = text.split("\n\n")
    names = []
    for block in blocks:
        found = BLOCK.fullmatch(block.rstrip("\n") + "\n")
        assert found, block
        names.append(found[1])
    assert names == [
        row.name
        for row in PARAMETERS.values()
        if row.restore_option and row.group != "import"
    ], "what imports are told isn't for jobs of ours"
    assert len(names) <= 64
    assert text.isascii()


def test_neither_secrets_nor_commands_can_be_given_at_restore_time():
    for row in PARAMETERS.values():
        if row.secret or row.type is v.COMMAND:
            assert not row.restore_option, row.name


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("vmdi", "did you mean vmid?"),
        ("VMID", "did you mean vmid?"),
        ("pve-host", "did you mean pve_host?"),
        ("pve_fingerprnt", "did you mean pve_fingerprint?"),
        ("dr_prot", "did you mean dr_port?"),
        ("ir_timout", "did you mean ir_timeout?"),
        ("verify_samples", "did you mean verify_sample_blocks?"),
        ("restore_path", "where=/directory"),
        ("xyzzy", "help parameters"),
    ],
)
def test_an_unknown_key_is_refused_with_what_may_have_been_meant(key, said):
    with pytest.raises(ConfigError, match=re.escape(said)) as caught:
        lookup(key)
    assert caught.value.key == key


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("vmid", "100", (v.VmidRange(100, 100),)),
        ("vmid", "100,103-105", (v.VmidRange(100, 100), v.VmidRange(103, 105))),
        ("vmid", "100;101", (v.VmidRange(100, 100), v.VmidRange(101, 101))),
        ("all", "ON", True),
        ("all", "0", False),
        ("bwlimit", "50M", 51200),
        ("bwlimit", "2G", 2 * 1024 * 1024),
        ("bwlimit", "700", 700),
        ("lock_wait", "2m", 120),
        ("name", "web-*,db?", ("web-*", "db?")),
        ("exclude", "105,200-210,test-*", (
            v.VmidRange(105, 105), v.VmidRange(200, 210), "test-*")),
        ("storage_map", "a:b,c:d", v.Mapped({"a": "b", "c": "d"})),
        ("storage_map", "a:b;c:d;rest", v.Mapped({"a": "b", "c": "d"}, "rest")),
        ("storage_map", "fast", v.Mapped({}, "fast")),
        ("pve_fingerprint", "ab" * 32, (":".join(["AB"] * 32),)),
        ("pve_fingerprint", ":".join(["ab"] * 32) + "," + "01" * 32,
         (":".join(["AB"] * 32), ":".join(["01"] * 32))),
        ("pve_host", "pve1.example.org", "pve1.example.org"),
        ("pve_host", "2001:db8::1", "2001:db8::1"),
        ("pve_token_id", "bacula@pve!backup", "bacula@pve!backup"),
        ("restore_vmid", "100:9100,101:next", v.Mapped({"100": "9100", "101": "next"})),
        ("restore_name", "web-1.example.org", "web-1.example.org"),
    ],
)  # fmt: skip
def test_a_value_of_each_type_is_understood(key, text, value):
    assert PARAMETERS[key].parse(text) == value


@pytest.mark.parametrize(
    ("key", "text", "said"),
    [
        ("vmid", "99", "no VM id"),
        ("vmid", "105-103", "runs backwards"),
        ("vmid", "100,,101", "empty member"),
        ("vmid", "web", "no VM id"),
        ("vmid", "", "has no value"),
        ("all", "maybe", "must be yes or no"),
        ("bwlimit", "fast", "KiB/s"),
        ("bwlimit", "-1", "KiB/s"),
        ("max_parallel_disks", "0", "must be from 1 to 16"),
        ("cbw_timeout", "5m", "from 1 to 60 seconds"),
        ("storage_map", "a:b,a:c", "maps a twice"),
        ("storage_map", "a:", "must be from:to"),
        ("storage_map", "x,y", "two values for the rest"),
        ("pve_fingerprint", "AA:BB", "32 bytes in hex"),
        ("pve_fingerprint", "zz" * 32, "32 bytes in hex"),
        ("pve_host", "https://pve1:8006", "without https://"),
        ("pve_token_id", "bacula@pve!backup=secret", "without the secret"),
        ("pve_user", "root", "user with realm"),
        ("restore_vmid", "100:500,101:500", "one VM id to two VMs"),
        ("scratch_dir", "scratch", "absolute path"),
        ("mode", "sed", "must be one of backup, seed, incremental"),
        ("mode", "receiver", "a daemon of its own"),
        ("mode", "test-failover", "it is called failover-test"),
        ("verify_slice", "1/0", "must be 1/N, or off"),
        ("dr_restore_points", "0", "must be from 1 to 500"),
        ("mode", "differential", "a level, not a mode"),
        ("backup_type", "seed", "a mode, not a level"),
        ("quiesce", "maybe", "one of auto, yes, no"),
        ("name", "a\x07b", "control character"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused_with_the_rule_it_breaks(key, text, said):
    with pytest.raises(ConfigError, match=re.escape(said)) as caught:
        PARAMETERS[key].parse(text)
    assert caught.value.key == key
    assert key in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_wrong_secret_is_not_repeated_in_the_message():
    with pytest.raises(ConfigError) as caught:
        PARAMETERS["pve_password"].parse("hunter2\x07")
    assert "hunter2" not in str(caught.value)


@given(
    st.sampled_from(list(PARAMETERS.values())),
    st.text(max_size=20) | st.text("0123456789,;:-.kKmMgGshd*[]", max_size=20),
)
def test_any_text_gives_a_value_or_a_one_line_refusal(row, text):
    try:
        row.parse(text)
    except ConfigError as caught:
        error = str(caught)
    else:
        return
    assert error.startswith(row.name)
    assert len(error.splitlines()) == 1
