# SPDX-License-Identifier: Apache-2.0
"""What people see of an instant recovery in Proxmox VE: a tag and a few lines of notes.

The lines stand before the VM's own description, between two marks, so that they can be
changed and taken away again while its user edits the rest.
"""

from __future__ import annotations

from typing import Final

from pveplug.proto.pve_values import split_tags

TAG: Final = "pveplug-ir"
BEGIN: Final = "[pveplug: instant recovery]"
END: Final = "[pveplug: end]"
MAX_DESCRIPTION: Final = 8 * 1024
"""PVE's own limit."""


def noted(description: str, text: str) -> str:
    """Return the description with ``text`` as our note; an old note is replaced.

    Where both together are too long for PVE, the description stays as it is.
    """
    own = without_note(description)
    note = f"{BEGIN}\n{text}\n{END}"
    room = MAX_DESCRIPTION - len(note) - 2
    if len(own) > room:
        return description  # its user's words are worth more than ours
    return f"{note}\n\n{own}" if own else note


def running_note(vmid: int, head: str) -> str:
    """Return what a recovered VM's notes say while it depends on us."""
    return (
        f"This VM was started from backup {head}; its disks still come. Do not "
        "clone, migrate or remove it meanwhile.\n"
        f"State: pveplug ir status --vmid {vmid}. To give it up: pveplug ir "
        f"discard --vmid {vmid}"
    )


def without_note(description: str) -> str:
    """Return the description as its user wrote it."""
    before, begin, rest = description.partition(BEGIN)
    if not begin:
        return description
    _, end, after = rest.partition(END)
    if not end:  # somebody has deleted our last line; what we write has no empty one
        _, _, after = rest.partition("\n\n")
    return (before + after).strip("\n")


def tagged(tags: str) -> str:
    """Return the tags with ours."""
    return ";".join([*_others(tags), TAG])


def untagged(tags: str) -> str:
    """Return the tags without ours."""
    return ";".join(_others(tags))


def _others(tags: str) -> list[str]:
    return [tag for tag in split_tags(tags) if tag != TAG]
