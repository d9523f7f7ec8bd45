# SPDX-License-Identifier: Apache-2.0
"""Chains of foreign images: a full one and the increments that build on each other.

Applied oldest first, each image once: data and zeroes are written, what an image leaves
to its parent is left as it is::

    full           d1 d2 -- d4          written
    increment 1    .. D2 .. ..          D2 over d2
    increment 2    .. .. zz ..          zeroes
    disk           d1 D2 00 d4

That is right only if each is put upon the very state it was made from. By what the
formats offer for that: VMDK a content id (CID), VHDX the parent's DataWriteGuid, VHD a
unique id and the time the parent was last modified, the neutral container a digest.
qcow2 has only a name: that is compared, and said to be weak.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pveplug.errors import IntegrityError
from pveplug.images.stream import ImageInfo, ParentLink
from pveplug.images.vmdk_set import base_name


@dataclass(frozen=True, slots=True)
class Link:
    """An image in a chain, and what its file was called.

    Attributes:
        modified: the file's time of modification in seconds since 2000, where known.
    """

    name: str
    info: ImageInfo
    modified: int | None = None


def why_not(parent: Link, child: Link) -> str | None:
    """Return why ``child`` was not made from ``parent``, or None if it was."""
    link = child.info.parent
    if link is None:
        return f"{child.name} stands alone"
    if parent.info.format != child.info.format and link.kind != "digest":
        return f"{parent.name} is a {parent.info.format}, {child.name} is not"
    if not link.identities:
        name = base_name(parent.name)
        if any(base_name(hint) == name for hint in link.names):
            return None
        return f"{child.name} names {', '.join(link.names)} as its parent"
    if parent.info.identity not in link.identities:
        return (
            f"{child.name} was made from {link.kind} {' or '.join(link.identities)}"
            f"{_hint(link)}, {parent.name} is {parent.info.identity or 'without one'}"
        )
    if None not in (link.modified, parent.modified) and link.modified != (
        parent.modified
    ):
        return (
            f"{parent.name} was modified after {child.name} was made from it "
            f"({link.modified} was recorded, it is {parent.modified})"
        )
    return None


def in_order(links: Iterable[Link]) -> tuple[Link, ...]:
    """Return a chain's images oldest first; all must be of one chain.

    Raises:
        IntegrityError: a parent is missing or changed, there are branches or rings,
            or images of two chains; the text names the files and the identities.
    """
    found = list(links)
    if not found:
        raise IntegrityError("a chain without an image")
    roots = [link for link in found if link.info.parent is None]
    if len(roots) != 1:
        names = ", ".join(link.name for link in roots or found)
        wrong = "several images that stand alone" if roots else "no image stands alone"
        raise IntegrityError(f"{wrong}, so this is not one chain: {names}")
    chain = roots
    rest = [link for link in found if link is not roots[0]]
    while rest:
        children = [link for link in rest if why_not(chain[-1], link) is None]
        if not children:
            reasons = "; ".join(str(why_not(chain[-1], link)) for link in rest[:3])
            raise IntegrityError(f"nothing builds on {chain[-1].name}: {reasons}")
        if len(children) > 1:
            names = ", ".join(link.name for link in children)
            raise IntegrityError(
                f"several images build on {chain[-1].name}, choose one: {names}"
            )
        chain.append(children[0])
        rest.remove(children[0])
    return tuple(chain)


def zeroes_after(chain: Sequence[ImageInfo]) -> list[tuple[int, int]]:
    """Return what must be zeroed before each image is applied, as (start, end).

    A disk that grew shows zeroes behind the parent's end, also where an older and
    longer image had data: nothing of it shines through.
    """
    out = [(0, chain[0].size or 0)]
    for older, newer in itertools.pairwise(chain):
        start, end = older.size or 0, newer.size or 0
        out.append((start, max(start, end)))
    return out


def _hint(link: ParentLink) -> str:
    return f" ({link.names[0]})" if link.names else ""
