# SPDX-License-Identifier: Apache-2.0
"""A site for blocking callers: its own event loop in a thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

from .site import Site
from .vm import LabVm

T = TypeVar("T")


class BlockingVm:
    """``LabVm`` whose coroutines are waited for: ``vm.start()`` returns when done."""

    def __init__(self, thread: SiteThread, vm: LabVm) -> None:
        self._thread = thread
        self.vm = vm

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.vm, name)
        if not callable(value):
            return value

        def call(*args: Any, **kwargs: Any) -> Any:
            return self._thread.run(_either(value, *args, **kwargs))

        return call


async def _either(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Call on the loop's thread; wait where it is a coroutine."""
    result = function(*args, **kwargs)
    return await result if asyncio.iscoroutine(result) else result


class SiteThread:
    """``Site`` in a thread; arguments as ``Site``.

    ::

        with SiteThread(short_base()) as lab:
            vm = lab.create_vm(100, disks={"scsi0": "64M"})
            vm.start()
            vm.qemu_io("scsi0", "write -P 1 0 64k")
            vm.assert_clean()
    """

    site: Site

    def __init__(self, base: Path | str, **options: Any) -> None:
        self._base = base
        self._options = options
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="lab", daemon=True
        )

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.stop()

    def start(self) -> None:
        self._thread.start()
        try:
            self.site = self.run(self._make())
        except BaseException:
            self._end()
            raise

    async def _make(self) -> Site:
        site = Site(self._base, **self._options)
        await site.start()
        return site

    def stop(self) -> None:
        """End every process of the lab; may be called twice."""
        if not self._thread.is_alive():
            return
        try:
            self.run(self.site.stop())
        finally:
            self._end()

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def run(self, work: Coroutine[Any, Any, T], timeout_s: float = 300.0) -> T:
        """Run a coroutine on the site's loop and wait for its result."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        return future.result(timeout_s)

    def create_vm(
        self,
        vmid: int,
        config: Mapping[str, str] | None = None,
        **options: Any,
    ) -> BlockingVm:
        return BlockingVm(self, self.run(self.site.create_vm(vmid, config, **options)))

    def vm(self, vmid: int) -> BlockingVm:
        return BlockingVm(self, self.site.vm(vmid))

    def assert_clean(self) -> None:
        self.run(self.site.assert_clean())
