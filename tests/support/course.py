# SPDX-License-Identifier: Apache-2.0
"""A VM's course through events and jobs, and what the jobs must have read.

Each job finds a guest that stands still, so what it must hold is what is on the disks
then; the disks are copied, and all images restored and compared in the end.
"""

from __future__ import annotations

import asyncio
import itertools
import re
from dataclasses import dataclass, field
from pathlib import Path

from pveplug.pve import PveApi
from pveplug.pve_http import Endpoint
from pveplug.pve_session import TicketAuth
from tests.lab.bacula import JobResult
from tests.lab.vm import LabVm
from tests.support import truth
from tests.support.story import content
from tests.support.world import World

KIB, MIB = 1 << 10, 1 << 20
WRITTEN = 3 * MIB
"""What the Full finds on each disk."""
SMALL = MIB
"""More than any Incremental here reads when it reads only what was written."""


@dataclass
class Course:
    """A running VM, its job, and all that was backed up so far."""

    world: World
    vmid: int
    options: str = ""
    storage: int = 1
    """Bacula's; courses that go on at once each need one of their own."""
    jobs: list[JobResult] = field(default_factory=list)
    _truths: list[dict[str, Path]] = field(default_factory=list)
    _fill: itertools.cycle[int] = field(
        default_factory=lambda: itertools.cycle(range(1, 256))
    )

    @property
    def vm(self) -> LabVm:
        """The VM, on whatever node it is now."""
        return self.world.site.vm(self.vmid)

    def keys(self) -> list[str]:
        return [d.key for d in self.vm.conf.drives() if d.volume and not d.cdrom]

    async def begin(self) -> None:
        """Start the VM, write more than ``SMALL`` to each disk, take the Full."""
        await self.vm.start()
        for key in self.keys():
            await self.write(key, 0, WRITTEN)
        text = f"vmid={self.vmid} {self.options}"
        await self.world.add_job(f"job{self.vmid}", text, storage=self.storage)
        await self.job("Full")

    async def write(self, key: str, offset: int, length: int = 64 * KIB) -> None:
        """Write another byte than ever before, as the guest would."""
        await self.vm.qemu_io(key, f"write -P {next(self._fill)} {offset} {length}")

    async def api(self, method: str, what: str, **params: str | int) -> None:
        """One call of PVE's API about the VM, as root, and its task's end.

        Raises:
            PveRefusalError: PVE says no, at once or at the task's end.
        """
        site = self.world.site
        endpoint = Endpoint("127.0.0.1", site.api_port, (site.fingerprint,))
        login = TicketAuth("root@pam", site.root_password)
        async with PveApi(endpoint, login) as api:
            send = {"PUT": api.put, "POST": api.post}.get(method, api.delete)
            path = f"/nodes/{self.vm.node.name}/qemu/{self.vmid}/{what}"
            answer = await send(path, **params)
            if str(answer).startswith("UPID:"):
                await api.wait_task(answer, timeout_s=60)

    async def job(self, level: str = "Incremental") -> JobResult:
        """Run the job and keep what the disks hold."""
        result = await self.world.run(f"job{self.vmid}", level)
        assert result.ok, f"{result.text}\n{self.world.backend_log[-4000:]}"
        self.keep(result, await self.copies(str(result.job_id)))
        return result

    def keep(self, result: JobResult, copies: dict[str, Path]) -> None:
        """Remember a job that ended well, and what it must hold."""
        self.jobs.append(result)
        self._truths.append(copies)

    async def copies(self, label: str) -> dict[str, Path]:
        """Copy what the disks hold now."""
        found = {}
        for key in self.keys():
            if self.vm.running:
                await self.vm.qemu_io(key, "flush")
            path = self.vm.disk_path(key)
            found[key] = self.world.base / f"{self.vmid}-{label}-{key}"
            fmt = "qcow2" if path.suffix == ".qcow2" else "raw"
            await asyncio.to_thread(
                truth.run, "qemu-img", "convert", "-U", "-f", fmt, "-O", "raw",
                str(path), str(found[key]),
            )  # fmt: skip
        return found

    async def reads_only_what_was_written(self, what: str) -> JobResult:
        """An Incremental after an event that left the chain whole."""
        job = await self.job()
        assert whole(job) == {}, f"after {what}: {whole(job)}"
        assert job.bytes < SMALL, f"after {what}: {job.bytes} bytes"
        return job

    async def reads_whole(self, what: str, **reasons: str) -> JobResult:
        """An Incremental that must read just these disks whole, for these reasons."""
        job = await self.job()
        said = whole(job)
        assert set(said) == set(reasons), f"after {what}: {said or job.text}"
        for key, reason in reasons.items():
            assert reason in said[key], f"after {what}: {said}"
        return job

    async def every_image_is_exact(self) -> None:
        """Let Bacula write all images and compare them with the disks of that time."""
        folder = self.world.base / f"files{self.vmid}"
        done = await self.world.restore(
            where=str(folder), job_ids=[job.job_id for job in self.jobs]
        )
        assert done.termination == "Restore OK", done.text
        homes = {path.parent.name: path.parent for path in folder.rglob("vm.conf")}
        for job, copies in zip(self.jobs, self._truths, strict=True):
            for key, copy in copies.items():
                image = homes[job.name] / f"{key}.qcow2"
                found = await content(image, "qcow2")
                assert found == copy.read_bytes(), f"{key} of {job.name}"


def whole(job: JobResult) -> dict[str, str]:
    """Return the reason for each disk that the job log says was read whole."""
    found = re.findall(r"VM \d+ (\w+): read whole, not incrementally: (.*)", job.text)
    return dict(found)
