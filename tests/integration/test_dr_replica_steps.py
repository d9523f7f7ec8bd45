# SPDX-License-Identifier: Apache-2.0
"""A receiver that dies, or whose PVE fails, at each single step of a cycle.

After each: every restore point holds what it held, and the next cycle is right and
leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

import pytest

from pveplug.dr.store import ReplicaError
from tests.support.dr_steps import Death, Steps, World
from tests.support.requires import requires

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    requires("qemu-nbd", "qemu-img"),
]
KINDS = ["death", "refused", "lost"]


async def cycle(world: World, mode: str) -> None:
    world.expect()
    world.sender.opening = world.sender.opening.__class__(
        **{**_fields(world), "points": 3}
    )
    await (world.sender.seed() if mode == "seed" else world.sender.increment())


def _fields(world: World) -> dict[str, object]:
    opening = world.sender.opening
    return {name: getattr(opening, name) for name in opening.__slots__}


async def interrupted(world: World, mode: str, steps: Steps) -> bool:
    """Run a cycle that ends early; False: it didn't, there are no more steps."""
    with pytest.MonkeyPatch.context() as patch:
        steps.install(patch, world.pve)
        with contextlib.suppress(Death, ReplicaError):
            await cycle(world, mode)
        world.pve.before = world.pve.after = lambda call: None
    return bool(steps.happened)


async def every_step(before: World, mode: str, kind: str, base: Path) -> int:
    """Interrupt a cycle at its steps in turn; return the last one that was tried.

    Every third, another third for each kind: all of them with PVEPLUG_EVERY_STEP=1.
    """
    stride = 1 if os.environ.get("PVEPLUG_EVERY_STEP") else 3
    at = list(KINDS).index(kind) % stride + 1 - stride
    while True:
        at += stride
        world = before.copied(base / f"{at}")
        steps = Steps(at, kind=kind)
        if not await interrupted(world, mode, steps):
            return at - stride
        try:
            world.check_points()
            record = world.record
            again = record is None or record.role in ("none", "seeding")
            if record is not None and record.intent is not None:
                again = False
            world.source.write("scsi0", 2)
            await cycle(world, "seed" if again and mode == "seed" else "incremental")
            world.check_points()
            world.check_quiet()
            final = world.record
            assert final is not None
            assert final.points[-1].cycle == f"dr-x.2026-11-25_08.00.00_{_last(world)}"
        except BaseException as error:
            error.add_note(f"{kind} at step {at}: {steps.happened}")
            raise
        shutil.rmtree(world.base)


def _last(world: World) -> str:
    return f"{world.source.cycle:02d}"


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", KINDS)
async def test_a_seed_interrupted_anywhere_goes_on(kind, short_tmp):
    before = World(short_tmp / "0")
    (short_tmp / "0").mkdir(exist_ok=True)
    steps = await every_step(before, "seed", kind, short_tmp)
    assert steps > 5


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", KINDS)
async def test_an_increment_interrupted_anywhere_goes_on(kind, short_tmp):
    before = World(short_tmp / "0")
    await cycle(before, "seed")
    before.source.write("scsi0")
    await cycle(before, "incremental")
    before.source.write("scsi1", 3)
    await cycle(before, "incremental")
    # Everything at once: a disk grows, one goes, one comes, the VM is changed.
    before.source.grow("scsi0", 6 << 20)
    before.source.remove("scsi1")
    before.source.add("virtio3", 1 << 20)
    before.source.set("cores", "4")
    before.source.write("scsi0", 6)
    steps = await every_step(before, "incremental", kind, short_tmp)
    assert steps > 8
