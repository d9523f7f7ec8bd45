# SPDX-License-Identifier: Apache-2.0
"""The engine behind ``pveplug import … --to-vmid``: files on this node to a PVE VM.

::

    FILE… ── what are they? ─┬─ descriptions
                             └─ images ── chains, oldest first ── a disk each, some at
                                          a time ── the VM

Nothing is made before all files have been looked at.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Final

from pveplug.access import check_version, open_api
from pveplug.archive import Member, is_archive, members
from pveplug.config import ImportConfig
from pveplug.diskstream import RateLimit
from pveplug.errors import ConfigError, IntegrityError
from pveplug.events import Reporter
from pveplug.images.detect import Format, Kind
from pveplug.images.foreign_files import (
    MAX_DESCRIPTION,
    Role,
    kind_of,
    role_of,
)
from pveplug.images.lineage import Link, why_not
from pveplug.import_files import Arrival, ForeignFiles, Progress
from pveplug.import_vm import ImportVm
from pveplug.importing import Found, first_of, is_raw, one_image, parts_of
from pveplug.node import Node
from pveplug.pve_local import PveLocal
from pveplug.tasks import first_failure
from pveplug.units import KiB, MiB, human

STDIN: Final = Path("-")
PIECE: Final = 1 * MiB
PROGRESS_S: Final = 10.0


@dataclass(slots=True)
class Survey:
    """What the files are.

    Attributes:
        disks: a chain for each disk, oldest first, in the order they were given.
        descriptions: small files that may describe the VM.
        passed_over: what nothing is made of.
        archives: OVAs: what they hold is seen as it is read.
        described: the operator has named what describes the VM.
    """

    disks: list[list[Found]] = field(default_factory=list)
    descriptions: dict[str, bytes] = field(default_factory=dict)
    passed_over: list[Path] = field(default_factory=list)
    archives: list[Path] = field(default_factory=list)
    described: bool = False
    stdin: bool = False


def survey(paths: Sequence[Path], raw: Sequence[str] = ()) -> Survey:
    """Look at files: which are images, of which disk, and which describe the VM.

    Args:
        raw: names of files that are raw disks, whatever they begin with.

    Raises:
        ConfigError: a file can't be read.
        IntegrityError: an image is of a kind that isn't read, or of no chain.
    """
    found = Survey(stdin=STDIN in paths)
    heads = {path: first_of(path) for path in paths if path != STDIN}
    parts = parts_of(heads)
    kinds: dict[Path, Kind] = {}
    for path, head in heads.items():
        if path not in parts:
            continue  # an extent: what it begins with tells nothing
        trusted = is_raw(path, raw)
        if is_archive(head) and not trusted:
            found.archives.append(path)
            continue
        try:
            role = Role.DISK if trusted else role_of(path.name, head)
            if role is Role.DISK:
                size = path.stat().st_size
                kinds[path] = kind_of(path.name, head, size, trusted=trusted)
        except IntegrityError as error:
            raise IntegrityError(f"{path}: {error}") from error
        if role is Role.DESCRIPTION:
            found.descriptions[path.name] = read_small(path)
        elif role is Role.COMPANION:
            found.passed_over.append(path)
    if found.stdin and kinds:
        raise ConfigError("- (standard input) is one disk; give no other image")
    images = [one_image((p, *parts[p]), kind) for p, kind in kinds.items()]
    found.disks = _chains(images)
    return found


def read_small(path: Path) -> bytes:
    """Return the content of a description.

    Raises:
        ConfigError: it can't be read, or is too long for one.
    """
    try:
        if path.stat().st_size > MAX_DESCRIPTION:
            raise ConfigError(f"{path} is longer than {human(MAX_DESCRIPTION)}")
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error


def _chains(images: Sequence[Found]) -> list[list[Found]]:
    """Put increments behind what they were made from.

    Raises:
        IntegrityError: one belongs to nothing that was given, or to several.
    """
    chains = [[image] for image in images if image.info.parent is None]
    rest = [image for image in images if image.info.parent is not None]
    while rest:
        fits = {
            image.name: [
                c for c in chains if why_not(_link(c[-1]), _link(image)) is None
            ]
            for image in rest
        }
        image = next((i for i in rest if len(fits[i.name]) == 1), None)
        if image is None:
            image = rest[0]
            chain = _by_content(chains, image)
            if chain is None:
                reasons = [str(why_not(_link(c[-1]), _link(image))) for c in chains[:4]]
                raise IntegrityError(
                    f"{image.name} is an increment of nothing that was given: "
                    f"{'; '.join(reasons) or 'no image stands alone'}"
                )
        else:
            chain = fits[image.name][0]
        chain.append(image)
        rest.remove(image)
    return chains


def _by_content(chains: list[list[Found]], image: Found) -> list[Found] | None:
    """Return the one raw image that an increment names by a digest, if there is one.

    Whether it is that is known when it has been read.
    """
    link = image.info.parent
    if link is None or not any(i.startswith("sha256:") for i in link.identities):
        return None
    raw = [c for c in chains if len(c) == 1 and c[0].info.format == "raw"]
    return raw[0] if len(raw) == 1 else None


def _link(image: Found) -> Link:
    return Link(image.name, image.info, image.modified)


async def import_to_vm(
    found: Survey,
    config: ImportConfig,
    node: Node,
    job: str,
    say: Reporter,
    *,
    name: str,
    parallel: int,
    stdin_size: int | None = None,
) -> int:
    """Make a VM of files; return its id.

    Cancelled or failed, no VM is left, no volume and no lock.

    Args:
        name: what the VM is called where nothing describes it.
        parallel: disks that are read at a time.
        stdin_size: bytes of a raw disk that comes from standard input.

    Raises:
        JobError, PveplugError: it can't be made.
    """
    api = await open_api(config.common.connection)
    async with api, contextlib.AsyncExitStack() as stack:
        await check_version(api, say)
        vm = ImportVm(name, config, node, api, PveLocal(node), job, say)
        vm.order = [chain[0].name for chain in found.disks]
        stack.push_async_callback(vm.aclose)
        vm.check(found.descriptions)
        limit = RateLimit(config.common.bwlimit * KiB)
        progress = Progress(say, name, PROGRESS_S)
        files = ForeignFiles(vm, config.raw, node.scratch_dir, limit, progress, say)
        stack.callback(files.close)
        turns = asyncio.Semaphore(parallel)

        async def disk(chain: list[Found]) -> None:
            async with turns:
                for image in chain:
                    for path in image.paths:
                        facts = path.stat()
                        arrival = Arrival(
                            str(path),
                            facts.st_size,
                            int(facts.st_mtime),
                            chain[-1].size if chain[-1].info.size else None,
                            raw=image.kind is Format.RAW,
                        )
                        await files.receive(arrival, _pieces(path))

        async with first_failure() as tasks:
            for chain in found.disks:
                tasks.create_task(disk(chain), name=chain[0].name)
        for path in found.archives:
            await _archive(path, files)
        if found.stdin:
            arrival = Arrival("standard input", stdin_size)
            await files.receive(arrival, _pieces(STDIN))
        files.all_came()
        described = {} if found.described else files.descriptions
        await vm.commit({**found.descriptions, **described})
        return vm.vmid


async def _archive(path: Path, files: ForeignFiles) -> None:
    """Take the files of an OVA, one after the other."""
    with _opened(path) as file:
        found = members(file, str(path))
        while (one := await asyncio.to_thread(next, found, None)) is not None:
            arrival = Arrival(one.name, one.size, one.mtime)
            await files.receive(arrival, _content(one))


async def _content(member: Member) -> AsyncIterator[memoryview]:
    while data := await asyncio.to_thread(member.content.read, PIECE):
        yield memoryview(data)


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error


async def _pieces(path: Path) -> AsyncIterator[memoryview]:
    """Yield a file's bytes; reading blocks, so it is done in a thread."""
    with contextlib.ExitStack() as stack:
        file: BinaryIO
        if path == STDIN:
            file = sys.stdin.buffer
        else:
            file = stack.enter_context(_opened(path))
        while data := await asyncio.to_thread(file.read, PIECE):
            yield memoryview(data)
