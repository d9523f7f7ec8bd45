# SPDX-License-Identifier: Apache-2.0
"""Rows of docs/errors.md: what is written wrong, and how the API is reached."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.lab import api_cluster
from tests.support.error_jobs import (
    WITHOUT_GUEST,
    ErrorWorld,
    failed,
    informed,
    messages,
    warned,
)

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world() -> AsyncIterator[ErrorWorld]:
    async with ErrorWorld(site={"nodes": ("pve1", "pve2")}) as world:
        vm = await world.site.create_vm(100, WITHOUT_GUEST, disks={"scsi0": "8M"})
        await vm.start()
        await world.site.create_vm(
            101, {**WITHOUT_GUEST, "name": "web"}, disks={"scsi0": "8M"}, node="pve2"
        )
        yield world


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def nothing_left(world: ErrorWorld) -> AsyncIterator[None]:
    before = world.inventory()
    yield
    world.site.faults.clear()
    await world.assert_nothing_left()
    assert world.inventory() == before


async def all_fail(world: ErrorWorld, cases: dict[str, str]) -> None:
    """Run a job per plug-in string, some at once; each fails with its sentence."""
    names = {text: await world.define(text) for text in cases}
    ids = {text: await world.start(name) for text, name in names.items()}
    for text, job_id in ids.items():
        result = await world.wait(job_id)
        line = failed(result, cases[text])
        assert len([m for m in messages(result) if "rror: " in m]) == 1, line


async def test_wrong_parameters_are_named_with_what_was_meant(
    world: ErrorWorld,
) -> None:
    await all_fail(
        world,
        {
            "vmid=1OO": "vmid=1OO: '1OO' is no VM id",
            "vmdi=100": "unknown parameter vmdi; did you mean vmid?",
            "quiesce=yes": "no VM is selected: give vmid, name, pool, tag, or all=yes",
            "vmid=100 cbw_timeout=99": "cbw_timeout=99:",
            "vmid=100 fleecing_storage=nowhere": "fleecing_storage=nowhere is not",
        },
    )


async def test_an_unknown_mode_says_which_there_are(world: ErrorWorld) -> None:
    await all_fail(
        world,
        {
            "mode=bakup vmid=100": "mode=bakup: must be one of backup",
            "mode=seed vmid=100": "mode=seed needs dr_host",
        },
    )


async def test_mode_and_level_confused_are_told_apart(world: ErrorWorld) -> None:
    await all_fail(
        world,
        {
            "mode=full vmid=100": "full is a level, not a mode: write mode=backup here",
            "backup_type=backup vmid=100": "backup is a mode",
            "backup_type=seed vmid=100": "seed is a mode, not a level",
        },
    )
    result = await world.backup("vmid=100 backup_type=incremental")
    warned(result, "backup_type=incremental is not what Bacula runs: this job is full")


async def test_a_wrong_vmid_and_a_selection_of_nothing_list_what_was_seen(
    world: ErrorWorld,
) -> None:
    await all_fail(
        world,
        {
            "vmid=999": "VM 999 is not there, or this credential lacks VM.Audit on "
            "/vms/999; seen: 100 (vm100), 101 (web)",
            "name=db*": "no VM to back up matches name=db*; seen: 100 (vm100) on node",
            "all=yes exclude=100": "no VM to back up matches all=yes exclude=100",
        },
    )


async def test_a_vm_of_another_node_is_sent_to_its_file_daemon(
    world: ErrorWorld,
) -> None:
    await all_fail(
        world,
        {
            "vmid=101": "VM 101 (web) is on node pve2, and this File Daemon is on "
            "pve1; back it up with the File Daemon of pve2",
        },
    )
    result = await world.backup("all=yes")
    informed(result, "left out because another node runs them (pve2): 101 (web)")


async def test_no_credential_leaves_when_the_certificate_is_another(
    world: ErrorWorld,
) -> None:
    wrong = ":".join(["AA"] * 32)
    proxy = world.site.node.proxy
    before = len(proxy.requests), proxy.unauthenticated
    result = await world.backup(
        "vmid=100", connection=world.connect(pve_fingerprint=wrong)
    )
    failed(
        result,
        f"ERROR: TLS fingerprint mismatch. Expected {wrong} got "
        f"{world.site.fingerprint}",
    )
    assert (len(proxy.requests), proxy.unauthenticated) == before, "a call was made"


async def test_an_untrusted_certificate_comes_with_the_pin_to_set(
    world: ErrorWorld,
) -> None:
    result = await world.backup("vmid=100", connection=world.connect("pve_fingerprint"))
    failed(result, "is not trusted", f"set pve_fingerprint={world.site.fingerprint}")


async def test_an_unchecked_certificate_is_warned_of(world: ErrorWorld) -> None:
    connection = world.connect("pve_fingerprint", pve_insecure="yes")
    result = await world.backup("vmid=100", connection=connection)
    warned(result, "pve_insecure=yes: the API's certificate is not checked")


async def test_an_api_that_is_not_there_says_what_to_check(world: ErrorWorld) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        connection = world.connect(pve_port=str(nobody.getsockname()[1]))
        result = await world.backup("vmid=100", connection=connection)
    failed(result, "can't be reached: Connection refused. Check pve_host, pve_port")


async def test_a_secret_that_cannot_be_read_names_its_file(world: ErrorWorld) -> None:
    open_file, empty = world.base / "open", world.base / "empty"
    open_file.write_text(world.site.token_secret)
    open_file.chmod(0o640)
    empty.touch(mode=0o600)
    cases = {
        "/nonexistent/secret": "pve_token_secret_file: cannot read "
        "/nonexistent/secret: No such file or directory",
        str(open_file): f"{open_file} is open to group or others (mode 0640); run: "
        f"chmod 600 {open_file}",
        str(empty): f"pve_token_secret_file: {empty} is empty",
    }
    results = await asyncio.gather(
        *(
            world.backup(
                "vmid=100", connection=world.connect(pve_token_secret_file=path)
            )
            for path in cases
        )
    )
    for result, sentence in zip(results, cases.values(), strict=True):
        failed(result, sentence)


async def test_a_secret_command_that_fails_is_named_with_what_it_said(
    world: ErrorWorld,
) -> None:
    program = world.base / "vault"
    program.write_text("#!/bin/sh\necho sealed >&2\nexit 3\n")
    program.chmod(0o700)
    connection = world.connect(
        "pve_token_secret_file", pve_token_secret_cmd=str(program)
    )
    result = await world.backup("vmid=100", connection=connection)
    failed(result, f"pve_token_secret_cmd: {program} ended with status 3: sealed")


async def test_a_secret_in_the_plugin_string_warns_once(world: ErrorWorld) -> None:
    connection = world.connect(
        "pve_token_secret_file", pve_token_secret=world.site.token_secret
    )
    result = await world.backup("vmid=100", connection=connection)
    line = warned(result, "use pve_token_secret_file")
    assert messages(result).count(line) == 1
    assert world.site.token_secret not in result.text


async def test_a_wrong_secret_says_how_to_look_at_the_token(world: ErrorWorld) -> None:
    wrong = world.base / "wrong"
    wrong.write_text("00000000-0000-0000-0000-000000000000\n")
    wrong.chmod(0o600)
    connection = world.connect(pve_token_secret_file=str(wrong))
    result = await world.backup("vmid=100", connection=connection)
    failed(
        result,
        f"PVE refused the login of {world.site.token_id} (401: ",
        "pveum user token list bacula@pve",
    )


def ticket_connection(world: ErrorWorld) -> str:
    secret = world.base / "password"
    secret.write_text(world.site.root_password)
    secret.chmod(0o600)
    return world.connect(
        "pve_token_id",
        "pve_token_secret_file",
        pve_user="root@pam",
        pve_password_file=str(secret),
    )


async def locked_with_a_ticket(world: ErrorWorld) -> int:
    """Start a job and let its ticket expire when it has the VM's lock."""
    # The first read is before the lock; the second gives us time to act.
    world.site.faults.delay("GET", r"/qemu/100/config", 1.0, times=2)
    name = await world.define("vmid=100", connection=ticket_connection(world))
    job_id = await world.start(name)
    while not world.site.vm(100).conf.values.get("lock"):
        await asyncio.sleep(0.05)
    world.site.faults.expire_tickets()
    return job_id


def logins(world: ErrorWorld) -> int:
    calls = world.site.node.proxy.requests
    return sum(path == "/access/ticket" for _, path, _ in calls)


async def test_a_ticket_that_expires_in_the_job_is_renewed(world: ErrorWorld) -> None:
    before = logins(world)
    result = await world.wait(await locked_with_a_ticket(world))
    informed(result, "VM 100 (vm100) is in this job")
    assert logins(world) == before + 2


async def test_a_login_that_is_refused_in_the_job_ends_it(world: ErrorWorld) -> None:
    job_id = await locked_with_a_ticket(world)
    passwords = world.site.auth.passwords
    old, passwords["root@pam"] = passwords["root@pam"], "changed"
    try:
        result = await world.wait(job_id)
    finally:
        passwords["root@pam"] = old
    failed(result, "PVE refused the login of root@pam (401: ", "Check pve_user")


@pytest.mark.parametrize(("found", "age"), [("10.1.3", "newer"), ("7.4.18", "older")])
async def test_another_proxmox_ve_than_known_is_warned_of(
    world: ErrorWorld, monkeypatch: pytest.MonkeyPatch, found: str, age: str
) -> None:
    release = found.rpartition(".")[0]
    answer = {"version": found, "release": release, "repoid": "0123456789abcdef"}
    monkeypatch.setattr(api_cluster, "version_of", lambda _: answer)
    result = await world.backup("vmid=100")
    warned(result, f"Proxmox VE {found} is {age} than this plug-in knows (8.x and 9.x)")
