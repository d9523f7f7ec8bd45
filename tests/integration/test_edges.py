# SPDX-License-Identifier: Apache-2.0
"""The ends of all disks are served while the rest is still in Bacula."""

from __future__ import annotations

import asyncio
import json
import subprocess
from pathlib import Path

import pytest

from pveplug.bconsole import Console
from pveplug.images.edges import FAR, TAIL
from pveplug.ir.control import ask
from pveplug.ir.record import Recovery
from pveplug.ir.submit import make_plan, submit
from pveplug.node import load_node
from pveplug.units import CLUSTER, MiB
from tests.lab.vm import LabVm
from tests.support import truth
from tests.support.requires import requires
from tests.support.world import World

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(180),
    requires("qemu-system-x86_64", "qemu-img", "qemu-nbd", "qemu-io", "nbdinfo"),
]

SIZES = {"scsi0": 16 * MiB, "scsi1": 24 * MiB + CLUSTER // 2}
WHERE = "/@pve/mode=instant,restore_vmid=100:120"


async def write(vm: LabVm, key: str, *writes: tuple[int, int, int]) -> None:
    """Write (pattern, offset, length) as the guest would."""
    for pattern, offset, length in writes:
        line = f'qemu-io -d {key} "write -P {pattern} {offset} {length}"'
        assert not (await vm.machine.hmp(line)).strip()


def io(uri: str, *commands: str) -> str:
    argv = ["qemu-io", "-r", "-f", "raw"]
    for command in commands:
        argv += ["-c", command]
    done = subprocess.run(
        [*argv, uri], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def middle(key: str) -> int:
    return SIZES[key] // 2 // CLUSTER * CLUSTER


async def test_both_ends_of_all_disks_are_served_while_the_rest_is_owed() -> None:
    async with World() as world:
        config = {"agent": "0", "boot": "order=scsi0"}
        disks = {key: f"{size // 512 * 512}" for key, size in SIZES.items()}
        vm = await world.site.create_vm(100, config, disks=disks)
        await vm.start()
        await world.add_job("nightly", "vmid=100")
        for key, size in SIZES.items():
            await write(
                vm,
                key,
                (1, 0, CLUSTER),
                (2, FAR, CLUSTER),
                (3, middle(key) - 2 * MiB, 4 * MiB),
                (4, size - TAIL, CLUSTER),
                (5, size - 34 * 512, 34 * 512),
            )
        full = await world.run("nightly", "Full")
        assert full.ok, full.text
        await write(vm, "scsi1", (6, SIZES["scsi1"] - TAIL, 4096))
        await write(vm, "scsi1", (7, middle("scsi1"), CLUSTER))
        increment = await world.run("nightly", "Incremental")
        assert increment.ok, increment.text
        # 2 clusters, one of them twice, and the layouts of two images.
        assert increment.bytes < 4 * CLUSTER + MiB // 2
        await vm.stop()

        argv, _ = world.bacula.bconsole
        console = Console(argv[0], Path(argv[-1]))
        plan = await make_plan(console, 100, WHERE)
        # The newest job's files, and of the Full nothing but the ends.
        newest = f"{increment.name} (JobId {increment.job_id})"
        assert [step.title for step in plan.steps] == [
            f"ends of the disks of the whole chain, and {newest}",
            f"{full.name} (JobId {full.job_id})",
        ]
        job_id = await console.restore(plan.steps[0].order)
        first = await console.wait(job_id, every_s=0.5)
        assert first.good
        assert first.bytes < MiB
        recovery = Recovery(load_node(world.node_file), 120)
        state = await ask(recovery, "status")
        assert all(disk.owed >= 3 * MiB for disk in state.disks), state
        assert world.site.vm(120).running

        for key, size in SIZES.items():
            uri = f"nbd+unix:///{key}?socket={recovery.nbd_socket}"
            last = 6 if key == "scsi1" else 4
            patterns = [
                f"read -P 1 0 {CLUSTER}",
                f"read -P 0 {CLUSTER} {FAR - CLUSTER}",
                f"read -P 2 {FAR} {CLUSTER}",
                f"read -P {last} {size - TAIL} 4096",
                f"read -P 4 {size - TAIL + 4096} {CLUSTER - 4096}",
                f"read -P 0 {size - TAIL + CLUSTER} {TAIL - CLUSTER - 34 * 512}",
                f"read -P 5 {size - 34 * 512} {34 * 512}",
            ]
            said = await asyncio.to_thread(io, uri, *patterns)
            assert "Pattern verification failed" not in said, said
            # What is owed is told as data, and what is zero was never owed.
            shown = await asyncio.to_thread(
                truth.run, "nbdinfo", "--map", "--json", uri
            )
            assert any(one["type"] == 3 for one in json.loads(shown))

        rest = type(plan)(plan.head, plan.chain, plan.parts, plan.steps[1:])
        said_lines: list[str] = []
        await submit(console, rest, said_lines.append, again="")
        assert "its disks are on their storage" in "\n".join(said_lines)
        back = world.site.vm(120)
        await back.stop()
        for key in SIZES:
            found = []
            for machine in (vm, back):
                path = machine.disk_path(key)
                form = path.suffix.removeprefix(".")
                found.append(await asyncio.to_thread(truth.sha256_of_image, path, form))
            assert found[0] == found[1], key
