# SPDX-License-Identifier: Apache-2.0
"""Protect Proxmox VE virtual machines; see docs/library.md for use as a library."""

from __future__ import annotations

__version__ = "0.1.0"

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pveplug.errors import PveplugError
    from pveplug.extents import Block, Extent, Kind
    from pveplug.library import Disk, DiskReader, ImageWritten, Vm, open_vm, write_image
    from pveplug.node import Node, load_node

_HOME = {
    "Block": "extents",
    "Disk": "library",
    "DiskReader": "library",
    "Extent": "extents",
    "ImageWritten": "library",
    "Kind": "extents",
    "Node": "node",
    "PveplugError": "errors",
    "Vm": "library",
    "load_node": "node",
    "open_vm": "library",
    "write_image": "library",
}

__all__ = [
    "Block",
    "Disk",
    "DiskReader",
    "Extent",
    "ImageWritten",
    "Kind",
    "Node",
    "PveplugError",
    "Vm",
    "load_node",
    "open_vm",
    "write_image",
]


def __getattr__(name: str) -> object:
    """Import a public name when it is first used: ``import pveplug`` costs nothing."""
    if name not in _HOME:
        raise AttributeError(f"module 'pveplug' has no attribute {name!r}")
    import importlib

    found: object = getattr(importlib.import_module(f"pveplug.{_HOME[name]}"), name)
    globals()[name] = found
    return found
