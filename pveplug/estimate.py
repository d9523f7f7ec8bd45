# SPDX-License-Identifier: Apache-2.0
"""The Estimate engine: what a backup would read, without touching anything.

For an Incremental or Differential of a running VM the segments are asked; everything
else counts with the disk's size. Nothing is frozen, locked or added.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from pveplug import cbt
from pveplug.access import choose_vms
from pveplug.bacula import BaculaSession, FileInfo
from pveplug.blockgraph import find_disks
from pveplug.cleanup import query_graph
from pveplug.config import BackupConfig
from pveplug.errors import PveplugError
from pveplug.images.manifest import image_file, job_directory
from pveplug.node import Node
from pveplug.pve import PveApi
from pveplug.pve_local import PveLocal
from pveplug.qmp import qmp_session
from pveplug.selection import SelectedDisks, VmSummary, select_disks
from pveplug.source import segment_homes
from pveplug.units import human
from pveplug.vmconfig import smbios_uuid


class Estimate:
    """One estimate; ``run`` once."""

    def __init__(
        self,
        config: BackupConfig,
        node: Node,
        session: BaculaSession,
        api: PveApi,
        local: PveLocal,
    ) -> None:
        self._config = config
        self._node = node
        self._session = session
        self._api = api
        self._local = local
        self._here = config.connection.node

    async def run(self) -> None:
        """List the images that a backup would make, with what it would read."""
        chosen = await choose_vms(
            self._api, self._config.selection, self._here, self._session
        )
        for vm in chosen:
            config = dict((await self._api.vm_config(self._here, vm.vmid)).values)
            disks = select_disks(
                config, self._config.selection.exclude_disk, vmid=vm.vmid
            )
            sizes = await self._sizes(vm, config, disks)
            directory = job_directory(
                vm.vmid, smbios_uuid(config) or "", self._session.job.name or "estimate"
            )
            for key, size in sizes.items():
                info = FileInfo(f"{directory}/{image_file(key)}", size)
                async with self._session.file(info, offsets=False):
                    pass

    async def _sizes(
        self, vm: VmSummary, config: Mapping[str, str], disks: SelectedDisks
    ) -> dict[str, int]:
        """Return at most how many bytes would be read of each disk."""
        sizes = {drive.key: drive.size or 0 for drive in disks.chosen}
        if self._local.vm_running(vm.vmid) is None:
            return sizes
        volids = {drive.key: drive.file for drive in disks.chosen}
        try:
            async with qmp_session(self._node.qmp_socket(vm.vmid)) as qmp:
                found = find_disks(await query_graph(qmp), volids)
        except PveplugError as error:
            self._session.warning(f"VM {vm.vmid}: sizes are only nominal: {error}")
            return sizes
        sizes |= {key: disk.size for key, disk in found.items()}
        job = self._session.job
        if job.level not in ("I", "D") or self._config.capture.cbt == "off":
            return sizes
        homes = segment_homes(self._config.capture, vm.vmid, config, found)
        tracked = {
            key: disk.tracked("" if disk.volatile_because else homes.get(key, ""))
            for key, disk in found.items()
            if not disk.is_flash
        }
        level = cbt.Level(job.level, job.prev_job or None, job.since or None)
        for key, plan in cbt.plan(job.name, level, tracked, now=time.time()).items():
            if plan.whole:
                self._session.info(f"VM {vm.vmid} {key}: whole: {plan.whole}")
                continue
            counts = {bitmap.name: bitmap.count for bitmap in tracked[key].bitmaps}
            changed = sum(counts[name] for name in plan.union)
            grown = max(tracked[key].size - plan.parent_size, 0)
            sizes[key] = min(changed + grown, tracked[key].size)
            self._session.info(
                f"VM {vm.vmid} {key}: at most {human(sizes[key])} changed since "
                f"{plan.parent_job}"
            )
        return sizes
