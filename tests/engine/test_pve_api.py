# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web

from pveplug.errors import (
    ConfigError,
    LocalProtocolError,
    RemoteProtocolError,
    TransportError,
)
from pveplug.proto.pve import MAX_ATTEMPTS, Response
from pveplug.pve import (
    Endpoint,
    NotSentError,
    OutcomeUnknownError,
    PveApi,
    PveRefusalError,
    Reason,
    Snapshot,
    TicketAuth,
    TlsTrustError,
    TokenAuth,
    path,
)
from pveplug.pve_http import presented_fingerprint
from tests.support.pve_server import (
    Certificate,
    ScriptedPve,
    refused,
    scripted_pve,
    self_signed,
    tls_recorder,
)

SECRET = "11111111-2222-3333-4444-555555555555"
TOKEN = TokenAuth("bacula@pve!plug", SECRET)
UPID = "UPID:pve1:0000C530:001C9BEC:677E934A:qmcreate:100:bacula@pve!plug:"
TASK = path("nodes", "pve1", "tasks", UPID)


class Clock:
    """Time that passes only by sleeping."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
        await asyncio.sleep(0)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return self_signed(tmp_path_factory.mktemp("tls"))


@pytest.fixture
async def pve(certificate: Certificate) -> AsyncIterator[ScriptedPve]:
    async with scripted_pve(certificate) as server:
        yield server


@pytest.fixture
def clock() -> Clock:
    return Clock()


def opened(server, certificate, clock, *, auth=TOKEN, **options) -> PveApi:
    options.setdefault("fingerprints", (certificate.fingerprint,))
    endpoint = Endpoint("127.0.0.1", server.port, **options)
    return PveApi(endpoint, auth, clock=clock, sleep=clock.sleep, jitter=lambda: 0.5)


@pytest.fixture
async def api(pve, certificate, clock) -> AsyncIterator[PveApi]:
    async with opened(pve, certificate, clock) as api:
        yield api


# --- certificate -------------------------------------------------------------------


async def test_a_wrong_certificate_is_refused_before_any_byte_is_sent(
    certificate: Certificate, clock: Clock
):
    expected = "AA:" * 31 + "AA"
    async with tls_recorder(certificate) as recorder:
        api = opened(recorder, certificate, clock, fingerprints=("aa" * 32,))
        async with api:
            with pytest.raises(TlsTrustError) as caught:
                await api.version()
            with pytest.raises(TlsTrustError):
                await api.post("/nodes/pve1/qemu", vmid=100)
        await asyncio.sleep(0.05)
    assert str(caught.value) == (
        f"TLS fingerprint mismatch. Expected {expected} got {certificate.fingerprint}"
    )
    assert recorder.handshakes == 2  # neither call was repeated
    assert bytes(recorder.received) == b""
    assert clock.slept == []


async def test_the_recorder_would_have_seen_the_credential(certificate, clock):
    async with tls_recorder(certificate) as recorder:
        recorder.reply = b'HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\n{"data":{}}'
        async with opened(recorder, certificate, clock) as api:
            await api.get("/version")
    assert SECRET.encode() in recorder.received


async def test_a_ticket_user_sends_no_password_to_a_wrong_certificate(
    certificate: Certificate, clock: Clock
):
    auth = TicketAuth("root@pam", "hunter2")
    async with tls_recorder(certificate) as recorder:
        async with opened(
            recorder, certificate, clock, auth=auth, fingerprints=("bb" * 32,)
        ) as api:
            with pytest.raises(TlsTrustError, match=r"^TLS fingerprint mismatch"):
                await api.version()
    assert bytes(recorder.received) == b""


@pytest.mark.parametrize("spelling", ["upper", "lower", "plain", "rotation"])
async def test_the_pin_is_accepted_in_every_spelling(pve, certificate, clock, spelling):
    pve.on("GET /version", {"version": "9.0.3"})
    shown = certificate.fingerprint
    pins = {
        "upper": (shown,),
        "lower": (shown.lower(),),
        "plain": (shown.replace(":", ""),),
        "rotation": ("00" * 32, shown),
    }[spelling]
    async with opened(pve, certificate, clock, fingerprints=pins) as api:
        assert (await api.version()).major == 9


async def test_a_mismatch_names_every_pin(certificate, clock):
    async with tls_recorder(certificate) as recorder:
        pins = ("aa" * 32, "bb" * 32)
        async with opened(recorder, certificate, clock, fingerprints=pins) as api:
            with pytest.raises(TlsTrustError, match=r"AA:AA.* or BB:BB.* got "):
                await api.version()


async def test_a_self_signed_certificate_without_pin_is_refused_naming_the_pin_to_set(
    pve, certificate, clock
):
    async with opened(pve, certificate, clock, fingerprints=()) as api:
        with pytest.raises(TlsTrustError) as caught:
            await api.version()
    assert f"pve_fingerprint={certificate.fingerprint}" in str(caught.value)
    assert "self-signed" in str(caught.value)
    assert pve.calls == []


async def test_a_ca_file_is_enough_and_is_checked_against_the_host(
    pve, certificate, clock, tmp_path
):
    pve.on("GET /version", {"version": "8.4.1"})
    ca = str(certificate.ca_file)
    async with opened(pve, certificate, clock, fingerprints=(), ca_file=ca) as api:
        assert (await api.version()).text == "8.4.1"
    other = self_signed(tmp_path, "other", host="elsewhere.example")
    async with tls_recorder(other) as recorder:
        ca = str(other.ca_file)
        async with opened(recorder, other, clock, fingerprints=(), ca_file=ca) as api:
            with pytest.raises(TlsTrustError, match="IP address mismatch"):
                await api.version()
    assert bytes(recorder.received) == b""


async def test_a_ca_file_that_is_not_there_is_a_config_error(certificate, clock):
    api = PveApi(Endpoint("127.0.0.1", 1, ca_file="/nonexistent.pem"), TOKEN)
    with pytest.raises(ConfigError, match=r"pve_ca /nonexistent\.pem") as caught:
        await api.__aenter__()
    assert caught.value.key == "pve_ca"


async def test_insecure_checks_nothing(pve, certificate, clock):
    pve.on("GET /version", {"version": "8.4.1"})
    async with opened(pve, certificate, clock, fingerprints=(), insecure=True) as api:
        await api.version()


async def test_a_pin_counts_even_when_insecure_is_set(certificate, clock):
    async with tls_recorder(certificate) as recorder:
        async with opened(
            recorder, certificate, clock, fingerprints=("cc" * 32,), insecure=True
        ) as api:
            with pytest.raises(TlsTrustError):
                await api.version()
    assert bytes(recorder.received) == b""


async def test_the_presented_fingerprint_is_read_without_sending_anything(certificate):
    async with tls_recorder(certificate) as recorder:
        got = await presented_fingerprint("127.0.0.1", recorder.port)
        await asyncio.sleep(0.02)
    assert got == certificate.fingerprint
    assert bytes(recorder.received) == b""


# --- reaching it -------------------------------------------------------------------


async def test_an_unreachable_node_is_tried_again_and_then_explained(
    certificate, clock, unused_port
):
    class Nowhere:
        port = unused_port

    async with opened(Nowhere, certificate, clock) as api:
        with pytest.raises(
            NotSentError, match=r"can't be reached: .*refused.*pve_host"
        ):
            await api.version()
    assert clock.slept == [0.25, 0.5, 1.0]


@pytest.fixture
def unused_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def test_a_name_that_does_not_resolve_is_explained(clock):
    endpoint = Endpoint("no-such-host.invalid")
    async with PveApi(endpoint, TOKEN, sleep=clock.sleep) as api:
        with pytest.raises(NotSentError, match=r"no-such-host\.invalid:8006"):
            await api.version()


async def test_a_port_without_tls_is_explained(certificate, clock):
    async with tls_recorder(None) as recorder:
        recorder.reply = b"HTTP/1.1 400 Bad Request\r\n\r\n"
        async with opened(recorder, certificate, clock) as api:
            with pytest.raises(NotSentError, match="pve_port"):
                await api.version()
    assert SECRET.encode() not in recorder.received


async def test_what_is_no_http_is_the_peers_fault(certificate, clock):
    async with tls_recorder(certificate) as recorder:
        recorder.reply = b"SSH-2.0-OpenSSH_9.2\r\n\r\n"
        async with opened(recorder, certificate, clock) as api:
            with pytest.raises(RemoteProtocolError, match="HTTP"):
                await api.version()


async def test_an_answer_that_never_comes_ends_by_the_time_limit(
    pve, certificate, clock, monkeypatch
):
    monkeypatch.setattr("pveplug.pve_http._MARGIN_S", 0.05)
    pve.on("PUT /x", slow)
    pve.on("GET /x", slow)
    async with opened(pve, certificate, clock, timeout_s=0.1) as api:
        with pytest.raises(
            OutcomeUnknownError, match=r"PUT /x: .*within .* s.*may go on"
        ):
            await api.put("/x")
        assert pve.lines() == ["PUT /x"]
        with pytest.raises(TransportError, match="GET /x"):
            await api.get("/x")
        assert pve.lines()[1:] == ["GET /x"] * MAX_ATTEMPTS


async def slow(call, request):
    await asyncio.sleep(2)
    return {}


async def drop(call, request):
    request.transport.abort()
    await asyncio.sleep(0.05)
    return {}


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
async def test_a_changing_call_whose_connection_breaks_is_sent_once(pve, api, method):
    pve.on("GET /version", {"version": "8.4.1"})
    await api.version()  # a connection is in the pool
    pve.on(f"{method} /x", drop)
    with pytest.raises(OutcomeUnknownError, match="may go on"):
        await api.call(method, "/x")
    assert pve.lines().count(f"{method} /x") == 1


async def test_a_read_whose_connection_breaks_is_repeated(pve, api):
    pve.on("GET /version", drop, drop, {"version": "8.4.1"})
    assert (await api.version()).major == 8


@pytest.mark.parametrize("status", [595, 596, 599, 503])
async def test_a_read_that_pveproxy_could_not_pass_on_is_repeated(
    pve, api, clock, status
):
    pve.on("GET /version", (status, "Connection timed out"), {"version": "8.4.1"})
    assert (await api.version()).major == 8
    assert clock.slept == [0.25]


@pytest.mark.parametrize("status", [595, 596, 599, 504])
async def test_a_changing_call_that_hits_the_proxy_limit_is_never_repeated(
    pve, api, clock, status
):
    pve.on("PUT /x", (status, "Connection timed out"))
    with pytest.raises(OutcomeUnknownError, match="may go on"):
        await api.put("/x")
    assert (pve.lines(), clock.slept) == (["PUT /x"], [])


@pytest.mark.parametrize("status", [400, 401, 403, 500, 501])
async def test_a_refusal_is_final(pve, api, clock, status):
    pve.on("GET /x", (status, "no"))
    with pytest.raises(PveRefusalError):
        await api.get("/x")
    assert (pve.lines(), clock.slept) == (["GET /x"], [])


async def test_reads_share_a_kept_connection_and_changes_do_not(pve, api):
    pve.on("GET /version", {"version": "8.4.1"})
    for _ in range(5):
        await api.version()
    assert len(pve.connections) == 1


async def test_redirects_are_not_followed(pve, api, certificate):
    async with tls_recorder(certificate) as elsewhere:
        target = f"https://127.0.0.1:{elsewhere.port}/"
        pve.on(
            "GET /x",
            lambda c, r: web.Response(status=302, headers={"Location": target}),
        )
        with pytest.raises(RemoteProtocolError, match="redirected"):
            await api.get("/x")
    assert elsewhere.handshakes == 0


async def test_an_endless_answer_is_cut(pve, api, monkeypatch):
    monkeypatch.setattr("pveplug.pve_http.MAX_RESPONSE_BODY", 100_000)
    big = b'{"data":"' + b"x" * 200_000 + b'"}'
    pve.on("GET /x", lambda c, r: web.Response(body=big))
    with pytest.raises(RemoteProtocolError, match="longer than 100000"):
        await api.get("/x")
    pve.on("GET /x", lambda c, r: web.Response(status=500, reason="boo", body=big))
    with pytest.raises(PveRefusalError, match="boo"):
        await api.get("/x")


async def test_a_closed_api_says_so(certificate):
    api = PveApi(Endpoint("127.0.0.1"), TOKEN)
    with pytest.raises(LocalProtocolError, match="not open"):
        await api.version()


# --- login -------------------------------------------------------------------------


async def test_a_token_is_sent_and_no_csrf(pve, api):
    pve.on("POST /x", None)
    await api.post("/x")
    headers = pve.calls[0].headers
    assert headers["Authorization"] == f"PVEAPIToken=bacula@pve!plug={SECRET}"
    assert "CSRFPreventionToken" not in headers
    assert "Cookie" not in headers


async def test_a_wrong_token_is_one_clear_line(pve, api):
    pve.on("GET /version", (401, "invalid token value!"))
    with pytest.raises(PveRefusalError, match="pve_token_secret") as caught:
        await api.version()
    assert caught.value.reason is Reason.LOGIN
    assert SECRET not in str(caught.value)


ROOT = TicketAuth("root@pam", "hunter2")


def ticket(number: int) -> dict[str, object]:
    return {"ticket": f"PVE:root@pam:{number}", "CSRFPreventionToken": f"csrf{number}"}


async def test_a_ticket_is_fetched_once_and_csrf_goes_with_changes(
    pve, certificate, clock
):
    pve.on("POST /access/ticket", ticket(1))
    pve.on("GET /version", {"version": "8.4.1"})
    pve.on("PUT /x", None)
    async with opened(pve, certificate, clock, auth=ROOT) as api:
        await asyncio.gather(api.version(), api.version(), api.version())
        await api.put("/x")
    login, *rest = pve.calls
    assert pve.lines().count("POST /access/ticket") == 1
    assert login.form == {"username": ["root@pam"], "password": ["hunter2"]}
    assert "Cookie" not in login.headers
    assert {c.headers["Cookie"] for c in rest} == {"PVEAuthCookie=PVE:root@pam:1"}
    csrf = [c.headers.get("CSRFPreventionToken") for c in rest]
    assert csrf == [None, None, None, "csrf1"]


async def test_a_ticket_is_renewed_with_itself_before_two_hours(
    pve, certificate, clock
):
    pve.on("POST /access/ticket", ticket(1), ticket(2))
    pve.on("GET /version", {"version": "8.4.1"})
    async with opened(pve, certificate, clock, auth=ROOT) as api:
        await api.version()
        clock.now += 89 * 60
        await api.version()
        assert len(pve.calls) == 3
        clock.now += 2 * 60
        await api.version()
    assert pve.calls[3].form["password"] == ["PVE:root@pam:1"]
    assert pve.calls[4].headers["Cookie"] == "PVEAuthCookie=PVE:root@pam:2"


async def test_a_ticket_older_than_two_hours_is_replaced_by_the_password(
    pve, certificate, clock
):
    pve.on("POST /access/ticket", ticket(1), ticket(2))
    pve.on("GET /version", {"version": "8.4.1"})
    async with opened(pve, certificate, clock, auth=ROOT) as api:
        await api.version()
        clock.now += 3 * 3600
        await api.version()
    assert pve.calls[2].form["password"] == ["hunter2"]


async def test_a_renewal_that_is_refused_falls_back_to_the_password(
    pve, certificate, clock
):
    pve.on("POST /access/ticket", ticket(1), (401, "authentication failure"), ticket(3))
    pve.on("GET /version", {"version": "8.4.1"})
    async with opened(pve, certificate, clock, auth=ROOT) as api:
        await api.version()
        clock.now += 100 * 60
        await api.version()
    assert [c.form["password"] for c in pve.calls if c.form] == [
        ["hunter2"],
        ["PVE:root@pam:1"],
        ["hunter2"],
    ]


async def test_a_renewal_nobody_answers_keeps_the_living_ticket(
    pve, certificate, clock
):
    pve.on("POST /access/ticket", ticket(1), (596, "Connection timed out"))
    pve.on("GET /version", {"version": "8.4.1"})
    async with opened(pve, certificate, clock, auth=ROOT) as api:
        await api.version()
        clock.now += 100 * 60
        await api.version()
    assert pve.calls[-1].headers["Cookie"] == "PVEAuthCookie=PVE:root@pam:1"


async def test_a_ticket_that_ends_early_is_replaced_once(pve, certificate, clock):
    pve.on("POST /access/ticket", ticket(1), ticket(2))
    pve.on("PUT /x", (401, "permission denied - invalid PVE ticket"), None)
    async with opened(pve, certificate, clock, auth=ROOT) as api:
        await api.put("/x")
    assert pve.lines() == ["POST /access/ticket", "PUT /x"] * 2
    assert pve.calls[-1].headers["CSRFPreventionToken"] == "csrf2"


async def test_a_ticket_refused_twice_is_an_error(pve, certificate, clock):
    pve.on("POST /access/ticket", ticket(1), ticket(2))
    pve.on("GET /x", (401, "permission denied - invalid PVE ticket"))
    async with opened(pve, certificate, clock, auth=ROOT) as api:
        with pytest.raises(PveRefusalError, match="pve_password") as caught:
            await api.get("/x")
    assert caught.value.reason is Reason.LOGIN
    assert len(pve.calls) == 4


async def test_a_wrong_password_is_tried_once(pve, certificate, clock):
    pve.on("POST /access/ticket", (401, "authentication failure"))
    async with opened(pve, certificate, clock, auth=ROOT) as api:
        with pytest.raises(PveRefusalError, match="root@pam"):
            await api.version()
    assert len(pve.calls) == 1  # a second try could lock the account


async def test_an_account_with_second_factor_is_told_to_use_a_token(
    pve, certificate, clock
):
    pve.on("POST /access/ticket", {**ticket(1), "NeedTFA": 1})
    async with opened(pve, certificate, clock, auth=ROOT) as api:
        with pytest.raises(PveRefusalError, match="API token"):
            await api.version()


# --- tasks -------------------------------------------------------------------------


async def test_a_task_is_polled_to_its_end_with_growing_pauses(pve, api, clock):
    running = {"status": "running"}
    done = {"status": "stopped", "exitstatus": "OK"}
    pve.on(f"GET {TASK}/status", *[running] * 9, done)
    assert await api.wait_task(UPID) == []
    assert clock.slept[0] == pytest.approx(0.1)
    assert clock.slept == sorted(clock.slept)
    assert clock.slept[-1] == 1.0
    assert len(clock.slept) == 9


async def test_warnings_are_success_and_are_returned(pve, api):
    pve.on(f"GET {TASK}/status", {"status": "stopped", "exitstatus": "WARNINGS: 1"})
    log = [{"n": 1, "t": "WARN: iothread is only valid with virtio disk"}]
    pve.on(f"GET {TASK}/log", [*log, {"n": 2, "t": "TASK WARNINGS: 1"}])
    assert await api.wait_task(UPID) == ["iothread is only valid with virtio disk"]


async def test_a_failed_task_raises_with_the_end_of_its_log(pve, api):
    status = {
        "status": "stopped",
        "exitstatus": "unable to create VM 100 - lvcreate failed",
    }
    pve.on(f"GET {TASK}/status", status)
    lines = ["allocating", "lvcreate: VG thick full", "TASK ERROR: unable to create"]
    pve.on(f"GET {TASK}/log", [{"n": n, "t": t} for n, t in enumerate(lines)])
    with pytest.raises(PveRefusalError) as caught:
        await api.wait_task(UPID)
    assert "task qmcreate 100 on pve1: unable to create VM 100" in str(caught.value)
    assert "lvcreate: VG thick full" in str(caught.value)
    assert (caught.value.status, caught.value.reason) == (0, Reason.TASK)


async def test_a_task_failure_has_the_reason_of_its_text(pve, api):
    status = {"status": "stopped", "exitstatus": "VM is locked (backup)"}
    pve.on(f"GET {TASK}/status", status)
    with pytest.raises(PveRefusalError) as caught:
        await api.wait_task(UPID)
    assert (caught.value.reason, caught.value.lock) == (Reason.LOCKED, "backup")


async def test_a_long_log_is_read_at_its_end_only(pve, api):
    pve.on(f"GET {TASK}/status", {"status": "stopped", "exitstatus": "job errors"})

    def log(call, request):
        start, limit = (int(call.query[key][0]) for key in ("start", "limit"))
        rows = [
            {"n": n, "t": f"line {n}"} for n in range(start, min(9000, start + limit))
        ]
        return web.json_response({"data": rows, "total": 9000})

    pve.on(f"GET {TASK}/log", log)
    with pytest.raises(PveRefusalError, match="line 8997; line 8998; line 8999"):
        await api.wait_task(UPID)
    assert [c.query["start"] for c in pve.calls if c.line.endswith("log")] == [
        ["0"],
        ["8900"],
    ]


async def test_a_task_that_outlasts_its_time_goes_on_and_says_so(pve, api, clock):
    pve.on(f"GET {TASK}/status", {"status": "running"})
    with pytest.raises(OutcomeUnknownError, match=r"still runs after 10 s.*UPID:pve1"):
        await api.wait_task(UPID, timeout_s=10)
    assert sum(clock.slept) <= 10


async def test_a_restart_of_pveproxy_does_not_lose_a_task(pve, api):
    gone = (596, "Connection refused")
    done = {"status": "stopped", "exitstatus": "OK"}
    pve.on(f"GET {TASK}/status", *[gone] * 12, done)
    assert await api.wait_task(UPID) == []


async def test_a_task_whose_node_is_gone_is_given_up(pve, api, clock):
    pve.on(f"GET {TASK}/status", (595, "No route to host"))
    with pytest.raises(OutcomeUnknownError, match="can't be seen"):
        await api.wait_task(UPID)
    assert sum(clock.slept) < 120


# --- typed calls -------------------------------------------------------------------

DONE = {"status": "stopped", "exitstatus": "OK"}


async def test_creating_a_vm_waits_for_its_task(pve, api):
    pve.on("POST /nodes/pve1/qemu", UPID)
    pve.on(f"GET {TASK}/status", DONE)
    assert await api.create_vm("pve1", 100, {"cores": 2, "onboot": False}) == []
    assert pve.calls[0].form == {"cores": ["2"], "onboot": ["0"], "vmid": ["100"]}


async def test_a_taken_vmid_is_told_apart(pve, api):
    said = "unable to create VM 100: config file already exists"
    pve.on("POST /nodes/pve1/qemu", (500, said))
    with pytest.raises(PveRefusalError) as caught:
        await api.create_vm("pve1", 100, {})
    assert caught.value.reason is Reason.EXISTS


@pytest.mark.parametrize(
    ("params", "delete", "method"),
    [
        ({"name": "x"}, (), "PUT"),
        ({"scsi0": "local:100/vm-100-disk-0.qcow2,discard=on"}, (), "PUT"),
        ({"scsi0": "local-lvm:vm-100-disk-0"}, (), "PUT"),
        ({"net0": "virtio=BC:24:11:00:00:01,bridge=vmbr0"}, (), "PUT"),
        ({}, ("lock",), "PUT"),
        ({"scsi0": "local:32,format=qcow2"}, (), "POST"),
        ({"scsi0": "local:0,import-from=local:99/x.raw"}, (), "POST"),
        ({"ide2": "local:cloudinit"}, (), "POST"),
        ({"efidisk0": "local-lvm:1,efitype=4m"}, (), "POST"),
        ({}, ("unused0",), "POST"),
    ],
)
async def test_only_what_moves_volumes_is_changed_by_a_task(
    pve, api, params, delete, method
):
    pve.on("PUT /nodes/pve1/qemu/100/config", None)
    pve.on("POST /nodes/pve1/qemu/100/config", UPID)
    pve.on(f"GET {TASK}/status", DONE)
    await api.update_config("pve1", 100, params, delete=delete, digest="ab" * 20)
    assert pve.calls[0].method == method
    assert pve.calls[0].form["digest"] == ["ab" * 20]


async def test_destroying_a_vm_spares_volumes_it_does_not_name(pve, api):
    pve.on("DELETE /nodes/pve1/qemu/100", UPID)
    pve.on(f"GET {TASK}/status", DONE)
    await api.destroy_vm("pve1", 100)
    assert pve.calls[0].query == {"purge": ["1"], "destroy-unreferenced-disks": ["0"]}


async def test_a_volume_is_allocated_in_whole_kib(pve, api):
    line = "POST /nodes/pve1/storage/local/content"
    pve.on(line, "local:100/vm-100-disk-0.qcow2")
    volid = await api.allocate_volume(
        "pve1", "local", 100, "vm-100-disk-0.qcow2", 1_000_001, "qcow2"
    )
    assert volid == "local:100/vm-100-disk-0.qcow2"
    assert pve.calls[0].form == {
        "vmid": ["100"],
        "filename": ["vm-100-disk-0.qcow2"],
        "size": ["977"],
        "format": ["qcow2"],
    }


async def test_a_volume_name_of_another_vm_is_never_asked_for(pve, api):
    for name in ("vm-101-disk-0", "vm-100-disk-0/../../x", "disk", "vm-1000-disk-0"):
        with pytest.raises(LocalProtocolError):
            await api.allocate_volume("pve1", "local", 100, name, 1024)
    assert pve.calls == []


async def test_a_volume_is_deleted_by_its_encoded_id(pve, api):
    where = "/nodes/pve1/storage/local/content/local%3A100%2Fvm-100-disk-0.qcow2"
    pve.on(f"DELETE {where}", None, UPID)
    pve.on(f"GET {TASK}/status", DONE)
    await api.delete_volume("pve1", "local:100/vm-100-disk-0.qcow2")
    await api.delete_volume("pve1", "local:100/vm-100-disk-0.qcow2")
    assert pve.lines()[-1].endswith("/status")


async def test_containers_are_left_out_unless_asked_for(pve, api):
    rows = [
        {"type": "qemu", "vmid": 100, "node": "a", "id": "qemu/100"},
        {"type": "lxc", "vmid": 101, "node": "a", "id": "lxc/101"},
    ]
    pve.on("GET /cluster/resources", rows)
    assert [r.vmid for r in await api.resources()] == [100]
    assert [r.type for r in await api.resources(containers=True)] == ["qemu", "lxc"]


async def test_the_configuration_in_force_is_asked_for(pve, api):
    pve.on("GET /nodes/pve1/qemu/100/config", {"cores": 2, "digest": "aa"})
    config = await api.vm_config("pve1", 100)
    assert (config.values["cores"], config.digest) == ("2", "aa")
    assert pve.calls[0].query == {"current": ["1"]}


async def test_agent_calls_unwrap_the_result(pve, api):
    base = "POST /nodes/pve1/qemu/100/agent"
    pve.on(f"{base}/ping", {"result": {}})
    pve.on(f"{base}/fsfreeze-status", {"result": "thawed"})
    pve.on(f"{base}/fsfreeze-freeze", {"result": 2})
    pve.on(f"{base}/fsfreeze-thaw", (596, "Connection timed out"), {"result": 2})
    await api.agent_ping("pve1", 100)
    assert await api.fsfreeze_status("pve1", 100) == "thawed"
    assert await api.fsfreeze_freeze("pve1", 100) == 2
    assert await api.fsfreeze_thaw("pve1", 100) == 2  # a thaw may be repeated


async def test_a_freeze_is_never_repeated(pve, api):
    line = "POST /nodes/pve1/qemu/100/agent/fsfreeze-freeze"
    pve.on(line, (596, "Connection timed out"))
    with pytest.raises(OutcomeUnknownError):
        await api.fsfreeze_freeze("pve1", 100)
    assert pve.lines() == [line]


SNAPSHOT = "/nodes/pve1/qemu/100/snapshot"


async def test_a_snapshot_is_taken_and_its_task_waited_for(pve, api):
    pve.on(f"POST {SNAPSHOT}", UPID)
    pve.on(f"GET {TASK}/status", DONE)
    assert await api.snapshot_create("pve1", 100, "p-7", "cycle 7") == []
    await api.snapshot_create("pve1", 100, "p-8")
    first, second = (call.form for call in pve.calls if call.method == "POST")
    assert first == {"snapname": ["p-7"], "description": ["cycle 7"]}
    assert second == {"snapname": ["p-8"]}


@pytest.mark.parametrize(
    "name", ["", "a", "7p", "a b", "current", "Pending", "p/../x", "a" * 41, "pé"]
)
async def test_a_name_pve_would_refuse_for_a_snapshot_is_never_asked_for(
    pve, api, name
):
    with pytest.raises(LocalProtocolError, match="name for a snapshot"):
        await api.snapshot_create("pve1", 100, name)
    assert pve.calls == []


async def test_a_disk_without_snapshots_is_told_apart_from_a_used_name(pve, api):
    pve.on(f"POST {SNAPSHOT}", UPID)
    no = {"status": "stopped", "exitstatus": "snapshot feature is not available"}
    used = {"status": "stopped", "exitstatus": "snapshot name 'p1' already used"}
    pve.on(f"GET {TASK}/status", no, used)
    with pytest.raises(PveRefusalError, match="qcow2") as unsupported:
        await api.snapshot_create("pve1", 100, "p1")
    with pytest.raises(PveRefusalError) as exists:
        await api.snapshot_create("pve1", 100, "p1")
    assert unsupported.value.reason is Reason.UNSUPPORTED
    assert exists.value.reason is Reason.EXISTS


async def test_snapshots_are_listed_oldest_first(pve, api):
    rows = [
        {"name": "p2", "snaptime": 20, "parent": "p1", "description": "b\n"},
        {"name": "p1", "snaptime": 10, "description": ""},
        {"name": "current", "parent": "p2", "description": "You are here!"},
    ]
    pve.on(f"GET {SNAPSHOT}", rows)
    assert await api.snapshot_list("pve1", 100) == [
        Snapshot("p1", "", 10, ""),
        Snapshot("p2", "p1", 20, "b"),
    ]
    assert await api.snapshots("pve1", 100) == ["p1", "p2"]


async def test_the_configuration_of_a_snapshot_is_read(pve, api):
    pve.on(f"GET {SNAPSHOT}/p1/config", {"cores": 2, "snaptime": 5, "scsi0": "a:1/x"})
    config = await api.snapshot_config("pve1", 100, "p1")
    assert config.values == {"cores": "2", "snaptime": "5", "scsi0": "a:1/x"}


async def test_going_back_and_deleting_wait_for_their_tasks(pve, api):
    pve.on(f"POST {SNAPSHOT}/p1/rollback", UPID)
    pve.on(f"DELETE {SNAPSHOT}/p1", UPID)
    pve.on(f"GET {TASK}/status", DONE)
    await api.rollback("pve1", 100, "p1")
    await api.rollback("pve1", 100, "p1", start=True)
    await api.snapshot_delete("pve1", 100, "p1")
    await api.snapshot_delete("pve1", 100, "p1", force=True)
    sent = [{**c.form, **c.query} for c in pve.calls if c.method != "GET"]
    assert sent == [{}, {"start": ["1"]}, {}, {"force": ["1"]}]
    assert pve.lines()[-1] == f"GET {TASK}/status"


async def test_a_snapshot_whose_answer_is_lost_is_not_taken_again(pve, api):
    pve.on(f"POST {SNAPSHOT}", (596, "Connection timed out"))
    with pytest.raises(OutcomeUnknownError):
        await api.snapshot_create("pve1", 100, "p1")
    assert pve.lines() == [f"POST {SNAPSHOT}"]


async def test_a_clone_says_what_it_was_told_and_nothing_more(pve, api):
    line = "POST /nodes/pve1/qemu/100/clone"
    pve.on(line, UPID)
    pve.on(f"GET {TASK}/status", DONE)
    await api.clone_vm("pve1", 100, 901, name="t", snapname="p1", storage="dr")
    await api.clone_vm("pve1", 100, 902, full=False)
    full, linked = (call.form for call in pve.calls if call.line == line)
    assert full == {
        "newid": ["901"],
        "full": ["1"],
        "name": ["t"],
        "snapname": ["p1"],
        "storage": ["dr"],
    }
    assert linked == {"newid": ["902"], "full": ["0"]}


async def test_a_disk_grows_to_a_size_in_bytes(pve, api):
    pve.on("PUT /nodes/pve1/qemu/100/resize", UPID)
    pve.on(f"GET {TASK}/status", DONE)
    await api.resize_disk("pve1", 100, "scsi0", 1 << 30, digest="ab")
    expected = {"disk": ["scsi0"], "size": ["1073741824"], "digest": ["ab"]}
    assert pve.calls[0].form == expected


async def test_a_disk_is_unlinked_by_a_task(pve, api):
    pve.on("POST /nodes/pve1/qemu/100/config", UPID)
    pve.on(f"GET {TASK}/status", DONE)
    await api.unlink_disk("pve1", 100, "scsi1")
    await api.unlink_disk("pve1", 100, "scsi1", destroy=True)
    kept, freed = (call.form for call in pve.calls if call.method == "POST")
    assert kept == {"delete": ["scsi1"]}
    assert freed == {"delete": ["scsi1"], "force": ["1"]}


async def test_a_feature_is_asked_for_by_name(pve, api):
    pve.on("GET /nodes/pve1/qemu/100/feature", {"hasFeature": 0, "nodes": []})
    assert not await api.has_feature("pve1", 100, "snapshot")
    assert pve.calls[0].query == {"feature": ["snapshot"]}


async def test_a_program_runs_in_the_guest_and_is_asked_about(pve, api):
    base = "/nodes/pve1/qemu/100/agent"
    pve.on(f"POST {base}/exec", {"pid": 812})
    pve.on(f"GET {base}/exec-status", {"exited": 0}, {"exited": 1, "exitcode": 3})
    argv = ["/bin/sh", "-c", "exit 3"]
    assert await api.agent_exec("pve1", 100, argv, stdin="x") == 812
    assert pve.calls[0].form == {"command": argv, "input-data": ["x"]}
    assert not (await api.agent_exec_status("pve1", 100, 812)).exited
    assert (await api.agent_exec_status("pve1", 100, 812)).exitcode == 3
    assert pve.calls[-1].query == {"pid": ["812"]}
    with pytest.raises(LocalProtocolError):
        await api.agent_exec("pve1", 100, [])


async def test_the_remaining_calls_reach_their_paths(pve, api):
    pve.on("GET /nodes", [{"node": "pve1", "status": "online"}])
    pve.on("GET /cluster/nextid", "105")
    pve.on("GET /access/permissions", {"/": {"VM.Audit": 1}})
    pve.on("GET /nodes/pve1/storage", [{"storage": "local", "type": "dir"}])
    pve.on(
        "GET /nodes/pve1/storage/local/content", [{"volid": "local:1/x.raw", "size": 5}]
    )
    pve.on("GET /nodes/pve1/qemu/100/status/current", {"status": "stopped"})
    for action in ("status/start", "status/stop", "status/shutdown", "template"):
        pve.on(f"POST /nodes/pve1/qemu/100/{action}", UPID)
    pve.on(f"GET {TASK}/status", DONE)
    assert (await api.nodes())[0].online
    assert await api.next_id() == 105
    assert await api.permissions("/") == {"/": {"VM.Audit"}}
    assert (await api.storages("pve1"))[0].type == "dir"
    assert (await api.volumes("pve1", "local", vmid=100))[0].size == 5
    assert not (await api.vm_status("pve1", 100)).running
    await api.start_vm("pve1", 100)
    await api.stop_vm("pve1", 100)
    await api.shutdown_vm("pve1", 100, force=True)
    await api.convert_to_template("pve1", 100)
    for call in pve.calls:
        if call.line.endswith("/content"):
            assert call.query == {"content": ["images"], "vmid": ["100"]}


@pytest.mark.optional("recorded PVE data lies beside the project, not in it")
async def test_every_call_exists_in_the_schema_of_proxmox_ve(pve, api):
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    schema_file = beside / "pve-api-schema.json"
    if not schema_file.exists():
        pytest.skip("no recorded API schema on this machine")
    schema = json.loads(schema_file.read_text())["endpoints"]
    vm, volid = "/nodes/{node}/qemu/{vmid}", "local:100/vm-100-disk-0"
    calls = [
        (api.version(), "/version", "GET"),
        (api.resources(), "/cluster/resources", "GET"),
        (api.nodes(), "/nodes", "GET"),
        (api.next_id(), "/cluster/nextid", "GET"),
        (api.permissions("/"), "/access/permissions", "GET"),
        (api.vm_config("n", 100), f"{vm}/config", "GET"),
        (api.vm_status("n", 100), f"{vm}/status/current", "GET"),
        (api.create_vm("n", 100, {"scsi0": "a:1"}), "/nodes/{node}/qemu", "POST"),
        (api.update_config("n", 100, {"name": "x"}, digest="a"), f"{vm}/config", "PUT"),
        (api.update_config("n", 100, delete=["unused0"]), f"{vm}/config", "POST"),
        (api.destroy_vm("n", 100), vm, "DELETE"),
        (api.start_vm("n", 100), f"{vm}/status/start", "POST"),
        (api.stop_vm("n", 100), f"{vm}/status/stop", "POST"),
        (api.shutdown_vm("n", 100), f"{vm}/status/shutdown", "POST"),
        (api.convert_to_template("n", 100), f"{vm}/template", "POST"),
        (api.snapshot_list("n", 100), f"{vm}/snapshot", "GET"),
        (api.snapshot_create("n", 100, "p1", "x"), f"{vm}/snapshot", "POST"),
        (
            api.snapshot_delete("n", 100, "p1", force=True),
            f"{vm}/snapshot/{{snapname}}",
            "DELETE",
        ),
        (
            api.snapshot_config("n", 100, "p1"),
            f"{vm}/snapshot/{{snapname}}/config",
            "GET",
        ),
        (
            api.rollback("n", 100, "p1", start=True),
            f"{vm}/snapshot/{{snapname}}/rollback",
            "POST",
        ),
        (
            api.clone_vm(
                *("n", 100, 901),
                **dict.fromkeys(("name", "snapname", "storage", "fmt", "pool"), "x"),
            ),
            f"{vm}/clone",
            "POST",
        ),
        (api.has_feature("n", 100, "copy", snapname="p"), f"{vm}/feature", "GET"),
        (api.resize_disk("n", 100, "scsi0", 1, digest="a"), f"{vm}/resize", "PUT"),
        (api.unlink_disk("n", 100, "scsi1", destroy=True), f"{vm}/config", "POST"),
        (api.agent_exec("n", 100, ["x"], stdin="y"), f"{vm}/agent/exec", "POST"),
        (api.agent_exec_status("n", 100, 1), f"{vm}/agent/exec-status", "GET"),
        (api.agent_ping("n", 100), f"{vm}/agent/ping", "POST"),
        (api.fsfreeze_status("n", 100), f"{vm}/agent/fsfreeze-status", "POST"),
        (api.fsfreeze_freeze("n", 100), f"{vm}/agent/fsfreeze-freeze", "POST"),
        (api.fsfreeze_thaw("n", 100), f"{vm}/agent/fsfreeze-thaw", "POST"),
        (api.storages("n"), "/nodes/{node}/storage", "GET"),
        (
            api.volumes("n", "s", vmid=1),
            "/nodes/{node}/storage/{storage}/content",
            "GET",
        ),
        (
            api.allocate_volume("n", "s", 100, "vm-100-disk-0", 1, "raw"),
            "/nodes/{node}/storage/{storage}/content",
            "POST",
        ),
        (
            api.delete_volume("n", volid),
            "/nodes/{node}/storage/{storage}/content/{volume}",
            "DELETE",
        ),
        (api.get(f"{TASK}/status"), "/nodes/{node}/tasks/{upid}/status", "GET"),
        (
            api.get(f"{TASK}/log", start=0, limit=5),
            "/nodes/{node}/tasks/{upid}/log",
            "GET",
        ),
    ]
    for coroutine, template, method in calls:
        pve.calls.clear()
        with pytest.raises(PveRefusalError):  # 501 of the scripted server
            await coroutine
        (call,) = pve.calls
        assert call.method == method
        assert len(call.raw_path.partition("?")[0].split("/")) == len(
            template.split("/")
        )
        for release in ("8.4", "9.2"):
            entry = schema[template][method]
            entry = entry["9.2"] if entry[release] == "same" else entry[release]
            known = entry["parameters"]["properties"]
            for name, given in {**call.query, **call.form}.items():
                indexed = name.rstrip("0123456789") + "[n]"
                assert name in known or indexed in known, (template, method, name)
                if known.get(name, {}).get("type") == "boolean":
                    assert given[0] in ("0", "1")
            assert entry.get("allowtoken", 1) == 1


# --- cancellation and cost ---------------------------------------------------------


async def test_a_cancelled_call_leaves_the_api_usable(pve, api):
    pve.on("GET /slow", slow)
    pve.on("GET /version", {"version": "8.4.1"})
    task = asyncio.create_task(api.get("/slow"))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await api.version()).major == 8


async def test_a_scripted_transport_is_enough_to_run_it():
    class Canned:
        async def send(self, request, headers):
            return Response(200, "OK", b'{"data":{"version":"9.1"}}')

        async def aclose(self):
            pass

    async with PveApi(Endpoint("x"), TOKEN, transport=Canned()) as api:
        assert (await api.version()).minor == 1


def test_importing_the_api_loads_neither_aiohttp_nor_cryptography():
    code = (
        "import sys, pveplug.pve, pveplug.pve_local, pveplug.watchdog\n"
        "bad = {'aiohttp', 'cryptography', 'yarl'} & set(sys.modules)\n"
        "sys.exit(f'loaded {bad}' if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_error_of_the_scripted_server_looks_like_one_of_pve():
    response = refused(403, "Permission check failed (/vms/100, VM.Audit)")
    assert response.reason == "Permission check failed (/vms/100, VM.Audit)"
    assert json.loads(response.body)["data"] is None  # type: ignore[arg-type]
