# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pveplug.errors import (
    ConfigError,
    LocalProtocolError,
    PveplugError,
    RemoteProtocolError,
    TransportError,
)
from pveplug.proto import pve_values as values
from pveplug.proto.pve import (
    MAX_ATTEMPTS,
    MAX_REQUEST_BODY,
    OutcomeUnknownError,
    Response,
    build,
    decipher,
    is_passing,
    path,
    retry_delay,
)
from pveplug.proto.pve_login import (
    Endpoint,
    Ticket,
    TicketAuth,
    TokenAuth,
    check_user,
    colon_hex,
    parse_fingerprints,
    parse_ticket,
    token_header,
)
from pveplug.proto.pve_refusal import PveRefusalError, Reason, classify, one_line
from pveplug.proto.pve_values import Snapshot

TOKEN = "bacula@pve!plug"
GET = build("GET", "/nodes/pve1/qemu/100/config")
PUT = build("PUT", "/nodes/pve1/qemu/100/config", {"name": "x"})


def answer(status: int, said: str = "", errors: dict[str, str] | None = None):
    body: dict[str, object] = {"data": None, "message": f"{said}\n"}
    if errors:
        body["errors"] = errors
    return Response(status, said, json.dumps(body).encode())


def refused(
    status: int,
    said: str,
    errors: dict[str, str] | None = None,
    *,
    who: str = TOKEN,
    request=PUT,
) -> PveRefusalError:
    with pytest.raises(PveRefusalError) as caught:
        decipher(request, answer(status, said, errors), who)
    assert "\n" not in str(caught.value)
    return caught.value


# --- requests ----------------------------------------------------------------------


def test_get_and_delete_carry_parameters_in_the_query():
    request = build("GET", "/cluster/resources", {"type": "vm", "none": None})
    assert request.target == "/api2/json/cluster/resources?type=vm"
    assert request.body is None
    request = build("DELETE", "/nodes/a/qemu/1", {"purge": True})
    assert (request.target, request.body) == ("/api2/json/nodes/a/qemu/1?purge=1", None)


def test_post_and_put_carry_parameters_in_a_form():
    request = build("PUT", "/x", {"on": True, "off": False, "n": 7, "s": "a b&c=d;+"})
    assert request.body == b"on=1&off=0&n=7&s=a%20b%26c%3Dd%3B%2B"


def test_lists_become_repeated_keys():
    assert (
        build("POST", "/x", {"command": ["ls", "-l"]}).body == b"command=ls&command=-l"
    )


def test_text_is_sent_as_utf8():
    assert build("POST", "/x", {"name": "Größe"}).body == b"name=Gr%C3%B6%C3%9Fe"


def test_volume_ids_are_encoded_as_one_path_segment():
    assert path(
        "nodes", "pve1", "storage", "local", "content", "local:100/vm.qcow2"
    ) == ("/nodes/pve1/storage/local/content/local%3A100%2Fvm.qcow2")


def test_only_reads_are_repeatable_unless_said_otherwise():
    assert build("GET", "/x").repeatable
    assert not build("POST", "/x").repeatable
    assert not build("DELETE", "/x").repeatable
    assert build("POST", "/x", repeatable=True).repeatable


def test_a_body_over_the_limit_of_pveproxy_is_our_own_mistake():
    with pytest.raises(LocalProtocolError, match="524288"):
        build("POST", "/x", {"a": "b" * MAX_REQUEST_BODY})


@pytest.mark.parametrize("bad", ["nodes", "/a b", "/a?b", "/a#b", "/a\r\nX: y"])
def test_a_path_that_is_not_encoded_is_our_own_mistake(bad):
    with pytest.raises(LocalProtocolError):
        build("GET", bad)


def test_the_name_of_a_request_has_no_parameters():
    assert build("GET", "/nodes/a/x", {"k": "v"}).name == "GET /nodes/a/x"


# --- answers -----------------------------------------------------------------------


def test_a_success_gives_its_data_and_total():
    envelope = decipher(GET, Response(200, "OK", b'{"data":[1],"total":9}'), TOKEN)
    assert (envelope.data, envelope.total) == ([1], 9)


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"{", b"[]", b'{"success":1}', b"[" * 9999]
)
def test_a_success_that_is_no_pve_envelope_is_the_peers_fault(body):
    with pytest.raises(RemoteProtocolError, match="8006"):
        decipher(GET, Response(200, "OK", body), TOKEN)


def test_a_redirect_is_never_followed():
    with pytest.raises(RemoteProtocolError, match="pve_host"):
        decipher(GET, Response(302, "Found", b""), TOKEN)


def test_the_reason_phrase_is_used_where_the_body_has_no_message():
    with pytest.raises(PveRefusalError, match="VM is locked"):
        decipher(PUT, Response(500, "VM is locked (backup)", b'{"data":null}'), TOKEN)
    with pytest.raises(PveRefusalError, match="VM is locked"):
        decipher(PUT, Response(500, "VM is locked (backup)", b"<html>no"), TOKEN)


def test_a_missing_privilege_names_privilege_and_path_and_the_grant():
    error = refused(403, "Permission check failed (/vms/100, VM.Backup)")
    assert (error.reason, error.status) == (Reason.PERMISSION, 403)
    assert (error.privilege, error.path) == ("VM.Backup", "/vms/100")
    assert "lacks the privilege VM.Backup on /vms/100" in str(error)
    assert f"pveum acl modify /vms/100 --tokens '{TOKEN}' --roles" in str(error)


def test_alternative_privileges_are_all_named():
    said = (
        "Permission check failed (/vms/100, "
        "VM.GuestAgent.FileSystemMgmt|VM.GuestAgent.Unrestricted)"
    )
    error = refused(403, said, who="bacula@pve")
    assert error.privilege == "VM.GuestAgent.FileSystemMgmt|VM.GuestAgent.Unrestricted"
    assert "--users 'bacula@pve'" in str(error)
    assert "with a ROLE that has VM.GuestAgent.FileSystemMgmt" in str(error)


def test_a_refusal_without_a_path_says_where_to_look():
    error = refused(403, "Permission check failed")
    assert error.reason is Reason.PERMISSION
    assert "pveum user permissions" in str(error)


@pytest.mark.parametrize(
    ("who", "hint"),
    [(TOKEN, "pveum user token list bacula@pve"), ("root@pam", "pve_password")],
)
def test_a_refused_login_says_what_to_check(who, hint):
    error = refused(401, "Authentication failed!", who=who)
    assert error.reason is Reason.LOGIN
    assert hint in str(error)


# Texts as Proxmox VE 8.4 and 9 print them.
TEXTS = [
    (500, "Configuration file 'nodes/pve1/qemu-server/100.conf' does not exist", Reason.VM_MISSING),  # noqa: E501
    (500, "unable to find configuration file for VM 100 on node 'pve1'", Reason.VM_MISSING),  # noqa: E501
    (500, "VM is locked (backup)", Reason.LOCKED),
    (500, "VM is locked (snapshot-delete)", Reason.LOCKED),
    (500, "checksum mismatch (file change by other user?)", Reason.CHANGED),
    (500, "detected modified configuration - file changed by other user? Try again.", Reason.CHANGED),  # noqa: E501
    (500, "can't lock file '/var/lock/qemu-server/lock-100.conf' - got timeout", Reason.BUSY),  # noqa: E501
    (500, "VM 100 qmp command 'query-status' failed - got timeout", Reason.BUSY),
    (500, "VM 100 not running", Reason.NOT_RUNNING),
    (500, "VM 100 is not running", Reason.NOT_RUNNING),
    (500, "QEMU guest agent is not running", Reason.AGENT_SILENT),
    (500, "No QEMU guest agent configured", Reason.AGENT_MISSING),
    (500, "only root can set 'args' config", Reason.ROOT_ONLY),
    (500, "Only root can pass arbitrary filesystem paths.", Reason.ROOT_ONLY),
    (500, "unable to create VM 100 - VM 100 already exists on node 'pve1'", Reason.EXISTS),  # noqa: E501
    (500, "snapshot name 'p1' already used", Reason.EXISTS),
    (500, "snapshot feature is not available", Reason.UNSUPPORTED),
    (500, "Full clone feature is not supported for a snapshot of 'l:9/x.raw' (scsi0)", Reason.UNSUPPORTED),  # noqa: E501
    (500, "snapshot 'p1' does not exist", Reason.MISSING),
    (500, "storage 'nope' does not exist", Reason.MISSING),
    (500, "no such storage 'nope'", Reason.MISSING),
    (500, "hostname lookup 'nope' failed - failed to get address info", Reason.MISSING),
    (500, "cluster not ready - no quorum?", Reason.NO_QUORUM),
    (500, "qemu-img: x.qcow2: error while writing: No space left on device", Reason.NO_SPACE),  # noqa: E501
    (500, "lvcreate 'pve/vm-1-disk-0' error: insufficient free space", Reason.NO_SPACE),
    (400, "Parameter verification failed.", Reason.PARAMETER),
    (501, "Method 'GET /nope' not implemented", Reason.OTHER),
    (500, "something nobody saw before", Reason.OTHER),
]  # fmt: skip


@pytest.mark.parametrize(("status", "said", "reason"), TEXTS)
def test_each_refusal_of_pve_has_its_reason_and_keeps_its_words(status, said, reason):
    error = refused(status, said)
    assert error.reason is reason
    assert error.status == status
    assert said.rstrip(".") in str(error)
    assert error.said == said
    assert "PUT /nodes/pve1/qemu/100/config" in str(error)


def test_the_name_of_a_lock_is_kept():
    assert refused(500, "VM is locked (rollback)").lock == "rollback"


def test_parameter_errors_name_each_parameter():
    error = refused(400, "Parameter verification failed.", {"vmid": "invalid format"})
    assert error.params == {"vmid": "invalid format"}
    assert "vmid: invalid format" in str(error)


@pytest.mark.parametrize("status", [595, 596, 597, 599, 502, 504])
def test_a_lost_answer_of_a_changing_call_warns_that_the_work_may_go_on(status):
    with pytest.raises(OutcomeUnknownError, match="may go on"):
        decipher(PUT, answer(status, "Connection timed out"), TOKEN)
    with pytest.raises(TransportError) as caught:
        decipher(GET, answer(status, "Connection timed out"), TOKEN)
    assert not isinstance(caught.value, OutcomeUnknownError)
    assert str(status) in str(caught.value)


def test_long_or_unprintable_words_of_the_peer_become_one_bounded_line():
    error = refused(500, "a\nb\tc\x1b[31m" + "x" * 5000)
    assert len(str(error)) < 1000
    assert str(error).isprintable()
    assert one_line("x\ud800y") == "x?y"


@given(st.integers(100, 999), st.text(max_size=200), st.binary(max_size=400))
def test_any_answer_is_a_result_or_a_documented_error(status, reason, body):
    try:
        decipher(GET, Response(status, reason, body), TOKEN)
    except PveplugError as error:
        assert "\n" not in str(error)  # noqa: PT017 - any kind will do


# --- what is repeated --------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "said", "passing"),
    [
        (595, "No route to host", True),
        (596, "Connection timed out", True),
        (599, "Too many redirections", True),
        (502, "Bad Gateway", True),
        (503, "Service Unavailable", True),
        (504, "Gateway Timeout", True),
        (500, "got timeout", True),
        (500, "ipcc_send_rec[1] failed: Connection refused", True),
        (500, "Configuration file 'x' does not exist", False),
        (500, "VM is locked (backup)", False),
        (400, "Parameter verification failed.", False),
        (401, "permission denied - invalid PVE ticket", False),
        (403, "Permission check failed", False),
        (501, "not implemented", False),
        (200, "OK", False),
    ],
)
def test_only_answers_that_mean_not_now_are_worth_another_try(status, said, passing):
    assert is_passing(answer(status, said)) is passing


def test_pauses_grow_and_end():
    pauses = [retry_delay(n, 0.5) for n in range(1, MAX_ATTEMPTS + 1)]
    assert pauses == [0.25, 0.5, 1.0, None]
    assert retry_delay(1, 0.0) == pytest.approx(0.1875)
    assert retry_delay(1, 1.0) == pytest.approx(0.3125)


# --- credentials -------------------------------------------------------------------


def test_secrets_are_not_shown():
    secret = "12345678-aaaa-bbbb-cccc-1234567890ab"
    for thing in (
        TokenAuth(TOKEN, secret),
        TicketAuth("root@pam", secret),
        Ticket(secret, "c"),
    ):
        assert secret not in repr(thing)


def test_a_token_header_has_id_and_secret():
    assert token_header(TOKEN, "s3-x") == "PVEAPIToken=bacula@pve!plug=s3-x"


@pytest.mark.parametrize(
    "bad", ["", "plug", "bacula@pve", "a b@pve!x", "a@pve!x\r\nX: y"]
)
def test_a_token_id_of_another_form_is_refused(bad):
    with pytest.raises(ConfigError) as caught:
        token_header(bad, "secret")
    assert caught.value.key == "pve_token_id"


@pytest.mark.parametrize("bad", ["", "a b", "x\r\nHost: y", "ü"])
def test_a_secret_that_can_not_be_one_is_refused_without_being_shown(bad):
    with pytest.raises(ConfigError) as caught:
        token_header(TOKEN, bad)
    assert caught.value.key == "pve_token_secret"
    assert not bad or bad not in str(caught.value)


def test_a_user_without_realm_is_refused():
    assert check_user("root@pam") == "root@pam"
    with pytest.raises(ConfigError, match="user@realm"):
        check_user("root")


def test_a_ticket_is_read_and_becomes_a_cookie():
    data = {"ticket": "PVE:root@pam:1234::ab+/=", "CSRFPreventionToken": "12:ab"}
    ticket = parse_ticket(data, "root@pam")
    assert ticket.cookie == "PVEAuthCookie=PVE:root@pam:1234::ab+/="
    assert ticket.csrf == "12:ab"


@pytest.mark.parametrize(
    "data",
    [
        {"ticket": "PVE:!tfa!x:1::y", "CSRFPreventionToken": "x"},
        {"ticket": "PVE:x", "NeedTFA": 1, "CSRFPreventionToken": "x"},
    ],
)
def test_a_second_factor_is_explained(data):
    with pytest.raises(PveRefusalError, match="API token") as caught:
        parse_ticket(data, "root@pam")
    assert caught.value.reason is Reason.LOGIN


@pytest.mark.parametrize("data", [None, {}, {"ticket": 1}, {"ticket": "PVE:x"}])
def test_a_login_answer_without_ticket_is_the_peers_fault(data):
    with pytest.raises(RemoteProtocolError):
        parse_ticket(data, "root@pam")


def test_fingerprints_are_read_in_every_spelling():
    digest = bytes(range(32))
    shown = colon_hex(digest)
    assert (shown[:9], len(shown)) == ("00:01:02:", 95)
    for text in (
        shown,
        shown.lower(),
        digest.hex(),
        digest.hex().upper(),
        f"sha256 Fingerprint={shown}",
        f" {shown} ",
        f"{shown},{digest.hex()}",
    ):
        assert parse_fingerprints(text) == (shown,)
    other = colon_hex(bytes(32))
    assert parse_fingerprints(f"{shown}, {other}") == (shown, other)
    assert parse_fingerprints(" ") == ()


@pytest.mark.parametrize("bad", ["AA:BB", "zz" * 32, "00" * 31, "00" * 33])
def test_what_is_no_sha256_is_refused(bad):
    with pytest.raises(ConfigError) as caught:
        parse_fingerprints(bad)
    assert caught.value.key == "pve_fingerprint"


def test_an_ipv6_endpoint_is_bracketed():
    assert str(Endpoint("::1")) == "[::1]:8006"
    assert str(Endpoint("pve1", 443)) == "pve1:443"


# --- values ------------------------------------------------------------------------

UPID = "UPID:pve1:0000C530:001C9BEC:677E934A:qmcreate:100:bacula@pve!plug:"


def test_a_upid_is_taken_apart():
    upid = values.parse_upid(UPID)
    assert (upid.node, upid.type, upid.id) == ("pve1", "qmcreate", "100")
    assert upid.user == TOKEN
    assert (upid.pid, upid.starttime) == (0xC530, 0x677E934A)
    assert str(upid) == UPID
    long_pstart = UPID.replace("001C9BEC", "101C9BEC0")
    assert values.parse_upid(long_pstart).pstart == 0x101C9BEC0
    assert values.parse_upid(UPID.replace(":100:", "::")).id == ""


@pytest.mark.parametrize(
    "bad", [None, "", "OK", UPID[:-1], UPID.replace("pve1", "../x"), 7]
)
def test_what_is_no_upid_is_refused(bad):
    with pytest.raises(RemoteProtocolError):
        values.parse_upid(bad)


@pytest.mark.parametrize(
    ("data", "running", "ok", "warnings"),
    [
        ({"status": "running"}, True, False, 0),
        ({"status": "stopped", "exitstatus": "OK"}, False, True, 0),
        ({"status": "stopped", "exitstatus": "WARNINGS: 3"}, False, True, 3),
        ({"status": "stopped", "exitstatus": "unexpected status"}, False, False, 0),
        ({"status": "stopped", "exitstatus": "job errors"}, False, False, 0),
        ({"status": "stopped"}, False, False, 0),
        ({"status": "stopped", "exitstatus": "OKAY"}, False, False, 0),
    ],
)
def test_a_task_status_is_read(data, running, ok, warnings):
    state = values.parse_task(data)
    assert (state.running, state.succeeded, state.warnings) == (running, ok, warnings)


def test_a_task_log_gives_warnings_and_its_last_words():
    rows = [
        {"n": 1, "t": "creating disks"},
        {"n": 2, "t": "WARN: no efidisk configured! Using temporary efivars disk."},
        {"n": 3, "t": ""},
        {"n": 4, "t": "transferred 1.0 GiB of 2.0 GiB (50.00%)"},
        {"n": 5, "t": "lvcreate failed"},
        {"n": 6, "t": "TASK ERROR: unable to create VM 100"},
    ]
    lines = values.parse_log(rows)
    assert values.log_warnings(lines) == [
        "no efidisk configured! Using temporary efivars disk."
    ]
    assert values.log_tail(lines, 1) == "lvcreate failed"
    assert values.parse_log([{"n": 1, "t": "no content"}]) == []


def test_resources_are_read_loosely_typed():
    rows = [
        {"type": "lxc", "vmid": "200", "node": "b", "status": "running"},
        {
            "type": "qemu",
            "vmid": 100,
            "node": "a",
            "name": "web",
            "status": "stopped",
            "template": "1",
            "pool": "prod",
            "tags": "x;y z",
            "lock": "backup",
            "maxdisk": 5,
        },
        {"type": "storage", "storage": "local"},
    ]
    vm, container = values.parse_resources(rows)
    assert (vm.vmid, vm.name, vm.template, vm.tags) == (
        100,
        "web",
        True,
        ("x", "y", "z"),
    )
    assert (vm.pool, vm.lock, vm.node) == ("prod", "backup", "a")
    assert (container.vmid, container.type, container.template) == (200, "lxc", False)


def test_a_config_is_text_and_its_digest_apart():
    data = {"cores": 2, "name": "x", "onboot": True, "digest": "ab", "lock": "backup"}
    config = values.parse_config(data)
    assert config.values == {"cores": "2", "name": "x", "onboot": "1", "lock": "backup"}
    assert (config.digest, config.lock) == ("ab", "backup")


def test_the_output_of_qm_config_is_read():
    text = "boot: order=scsi0;net0\ndescription: a%0Ab: c\nlock: backup\ndigest: ff\n"
    config = values.parse_qm_config(text)
    assert config.values["boot"] == "order=scsi0;net0"
    assert config.values["description"] == "a\nb: c", "qm prints it encoded"
    assert (config.lock, config.digest) == ("backup", "ff")


def test_a_vm_status_is_read():
    data = {
        "status": "running",
        "qmpstatus": "paused",
        "running-machine": "pc-q35-9.2+pve1",
        "running-qemu": "10.0.2",
        "pid": "4711",
        "agent": 1,
        "ha": {"managed": 1},
    }
    status = values.parse_status(data)
    assert (status.running, status.agent, status.ha_managed) == (True, True, True)
    assert (status.qmpstatus, status.pid) == ("paused", 4711)
    assert status.running_machine == "pc-q35-9.2+pve1"
    with pytest.raises(RemoteProtocolError):
        values.parse_status({})


@pytest.mark.parametrize(
    ("formats", "expected"),
    [
        (
            {"format": [{"raw": 1, "qcow2": 1, "vmdk": 0}, "raw"]},
            (("qcow2", "raw"), "raw"),
        ),
        ({"formats": {"supported": ["raw"], "default": "raw"}}, (("raw",), "raw")),
        ({}, ((), "")),
    ],
)
def test_storages_are_read_with_their_formats(formats, expected):
    row = {
        "storage": "local",
        "type": "dir",
        "content": "iso,images",
        "total": 10,
        "active": 1,
        "enabled": 1,
        "shared": 0,
        **formats,
    }
    (storage,) = values.parse_storages([row])
    assert (storage.formats, storage.default_format) == expected
    flags = (storage.holds_images, storage.active, storage.shared)
    assert flags == (True, True, False)


def test_permissions_are_held_whether_or_not_they_propagate():
    data = {"/vms/100": {"VM.Audit": 1, "VM.Backup": 0}}
    assert values.parse_permissions(data) == {"/vms/100": {"VM.Audit", "VM.Backup"}}


def test_a_version_is_read():
    assert values.parse_version({"version": "8.4.1"}).major == 8
    assert values.parse_version({"version": "9.2"}).minor == 2
    with pytest.raises(RemoteProtocolError):
        values.parse_version({"version": ""})


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                [
                    "status",
                    "type",
                    "vmid",
                    "node",
                    "ticket",
                    "t",
                    "storage",
                    "format",
                    "ha",
                ]
            )
            | st.text(max_size=5),
            inner,
            max_size=5,
        )
    ),
    max_leaves=20,
)


@pytest.mark.parametrize(
    "parse",
    [
        values.parse_agent_result,
        values.parse_config,
        values.parse_exec,
        values.parse_exec_status,
        values.parse_feature,
        values.parse_log,
        values.parse_nodes,
        values.parse_permissions,
        values.parse_resources,
        values.parse_snapshots,
        values.parse_status,
        values.parse_storages,
        values.parse_task,
        values.parse_upid,
        values.parse_version,
        values.parse_volumes,
    ],
)
@given(data=json_values)
def test_any_json_is_a_value_or_a_documented_error(parse, data):
    try:
        parse(data)
    except RemoteProtocolError:
        pass


@given(st.text())
def test_any_words_have_a_reason(said):
    assert isinstance(classify(said)[0], Reason)


def test_a_vms_snapshots_are_listed_without_its_current_state():
    rows = [
        {"name": "later", "snaptime": 9, "parent": "before", "description": "two\n"},
        {"name": "before", "snaptime": "1", "vmstate": 0, "description": ""},
        {"name": "current", "digest": "x", "parent": "later", "running": 0},
    ]
    assert values.parse_snapshots(rows) == [
        Snapshot("before", "", 1, ""),
        Snapshot("later", "before", 9, "two"),
    ]
    for wrong in ({"name": "before"}, [{}], [{"name": "a1", "snaptime": "soon"}]):
        with pytest.raises(RemoteProtocolError):
            values.parse_snapshots(wrong)


@pytest.mark.parametrize(
    ("answer", "can"),
    [({"hasFeature": 1, "nodes": []}, True), ({"hasFeature": "0"}, False)],
)
def test_a_feature_is_there_or_not(answer, can):
    assert values.parse_feature(answer) is can


def test_an_answer_without_the_feature_is_no_no():
    with pytest.raises(RemoteProtocolError):
        values.parse_feature({"nodes": []})


def test_a_program_in_the_guest_is_told_running_ended_or_killed():
    running = values.parse_exec_status({"exited": 0})
    assert (running.exited, running.exitcode) == (False, None)
    ended = values.parse_exec_status(
        {"exited": 1, "exitcode": 0, "out-data": "up\n", "out-truncated": 1}
    )
    assert (ended.exited, ended.exitcode, ended.signal) == (True, 0, 0)
    assert (ended.output, ended.errors, ended.truncated) == ("up\n", "", True)
    killed = values.parse_exec_status({"exited": 1, "signal": 9, "err-data": "x"})
    assert (killed.exitcode, killed.signal, killed.errors) == (None, 9, "x")
    with pytest.raises(RemoteProtocolError):
        values.parse_exec_status({"pid": 7})
    assert values.parse_exec({"pid": 812}) == 812
    with pytest.raises(RemoteProtocolError):
        values.parse_exec({})
