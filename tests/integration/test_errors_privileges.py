# SPDX-License-Identifier: Apache-2.0
"""Rows of docs/errors.md: a token that lacks one privilege, named with its path.

Each job has a token of its own with all that docs/install.md grants but one privilege.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.lab.auth import product_acl
from tests.lab.bacula import JobResult
from tests.support.error_jobs import ErrorWorld, failed, one_line, warned

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module")]

RELEASE = "9.2"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world() -> AsyncIterator[ErrorWorld]:
    async with ErrorWorld(site={"release": RELEASE}) as world:
        config = {
            "agent": "1",
            "net0": "virtio=BC:24:11:00:00:01,bridge=vmbr0",
            "ciuser": "admin",
            "onboot": "0",
            "cores": "1",
            "vga": "std",
        }
        vm = await world.site.create_vm(100, config, disks={"scsi0": "8M"})
        await vm.start()
        world.site.faults.agent(100, "fake")
        yield world


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def backup(world: ErrorWorld) -> int:
    result = await world.backup("vmid=100")
    assert result.ok, result.text
    return result.job_id


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def nothing_left(world: ErrorWorld, backup: int) -> AsyncIterator[None]:
    before = world.inventory()
    yield
    await world.assert_nothing_left()
    assert world.inventory() == before


def without(*privileges: str) -> dict[str, set[str]]:
    return {
        path: granted - set(privileges)
        for path, granted in product_acl(RELEASE).items()
    }


def lacking(token_id: str, privilege: str, path: str) -> tuple[str, ...]:
    """What the log says of a privilege that is not there."""
    return (
        f"{token_id} lacks the privilege {privilege}",
        f" on {path}. Grant it",
        f"pveum acl modify {path} --tokens '{token_id}'",
    )


async def backup_lacking(
    world: ErrorWorld, name: str, *privileges: str, more: str = ""
) -> tuple[JobResult, str]:
    token_id, secret = world.token(name, without(*privileges))
    connection = world.connect(pve_token_id=token_id, pve_token_secret_file=str(secret))
    result = await world.backup(f"vmid=100 {more}", connection=connection)
    return result, token_id


async def test_a_backup_names_the_privilege_it_lacks(world: ErrorWorld) -> None:
    hidden, space, storages = await asyncio.gather(
        backup_lacking(world, "noaudit", "VM.Audit"),
        backup_lacking(
            world, "nospace", "Datastore.AllocateSpace", more="fleecing_storage=local2"
        ),
        backup_lacking(
            world,
            "nostores",
            "Datastore.AllocateSpace",
            "Datastore.Audit",
            more="fleecing_storage=local2",
        ),
    )
    failed(hidden[0], "this credential lacks VM.Audit on /vms/100")
    failed(space[0], *lacking(space[1], "Datastore.AllocateSpace", "/storage/local2"))
    failed(
        storages[0],
        "fleecing_storage=local2 is not there",
        "lacks Datastore.AllocateSpace on /storage/local2",
    )


async def test_a_freeze_that_the_token_may_not_ask_for_degrades_with_a_warning(
    world: ErrorWorld,
) -> None:
    for name, privilege in (
        ("noping", "VM.GuestAgent.Audit"),
        ("nofreeze", "VM.GuestAgent.FileSystemMgmt"),
    ):
        result, token_id = await backup_lacking(
            world, name, privilege, more="quiesce=yes"
        )
        warned(
            result,
            "VM 100: ",
            f"{token_id} lacks the privilege {privilege}",
            "on /vms/100",
            "the backup is crash-consistent",
        )


RESTORE = {
    "VM.Allocate": "/vms/{vmid}",
    "VM.Config.CPU": "/vms/{vmid}",
    "VM.Config.Memory": "/vms/{vmid}",
    "VM.Config.HWType": "/vms/{vmid}",
    "VM.Config.Network": "/vms/{vmid}",
    "VM.Config.Options": "/vms/{vmid}",
    "VM.Config.Disk": "/vms/{vmid}",
    "SDN.Use": "/sdn/zones/localnetwork/vmbr0",
    "Datastore.AllocateSpace": "/storage/local",
}


async def test_a_restore_names_the_privilege_it_lacks(
    world: ErrorWorld, backup: int
) -> None:
    async def one(number: int, privilege: str) -> JobResult:
        vmid = 300 + number
        token_id, secret = world.token(f"t{number}", without(privilege))
        result = await world.restored(
            f"restore_vmid={vmid},pve_token_id={token_id.replace('!', '%21')},"
            f"pve_token_secret_file={secret}",
            [backup],
        )
        path = RESTORE[privilege].format(vmid=vmid)
        failed(result, *lacking(token_id, privilege, path))
        return result

    for number, privilege in enumerate(RESTORE):
        await one(number, privilege)


async def test_a_restored_vm_that_may_not_be_started_stays_restored(
    world: ErrorWorld, backup: int
) -> None:
    token_id, secret = world.token("nopower", without("VM.PowerMgmt"))
    result = await world.restored(
        f"restore_vmid=320,start_after=yes,pve_token_id={token_id.replace('!', '%21')},"
        f"pve_token_secret_file={secret}",
        [backup],
    )
    assert result.termination == "Restore OK -- with errors", result.text
    one_line(
        result,
        "Error: VM 320 is restored, but was not started: ",
        *lacking(token_id, "VM.PowerMgmt", "/vms/320"),
    )
    await world.destroy(320)
