# SPDX-License-Identifier: Apache-2.0
"""Why Proxmox VE said no: its words sorted into reasons, each with its remedy.

Apart from 400, 401 and 403 the status tells nothing (nearly all is 500), so the words
decide. Tables first: a new text of PVE is one more row.
"""

from __future__ import annotations

import enum
import re
from typing import Final

from pveplug.errors import PveError

MAX_TEXT: Final = 600
"""Longest message of the peer that goes into one of ours."""


def one_line(text: str, limit: int = MAX_TEXT) -> str:
    """Return ``text`` as one printable, bounded line."""
    flat = " ".join(text.encode("utf-8", "replace").decode("utf-8").split())
    flat = "".join(c if c.isprintable() else "?" for c in flat)
    return flat if len(flat) <= limit else f"{flat[: limit - 1]}…"


class Reason(enum.Enum):
    """Why PVE refused, as far as an engine cares."""

    OTHER = "other"
    LOGIN = "login"  # wrong or expired token, ticket or password
    PERMISSION = "permission"  # a privilege is missing
    ROOT_ONLY = "root only"  # not delegable to any token or user
    PARAMETER = "parameter"  # 400: see PveError.params
    VM_MISSING = "vm missing"  # no config on that node: deleted or migrated
    MISSING = "missing"  # another object (storage, node, volume) doesn't exist
    EXISTS = "exists"  # the VMID or volume is taken
    LOCKED = "locked"  # config ``lock:``
    CHANGED = "changed"  # digest mismatch
    BUSY = "busy"  # a file lock or a monitor wasn't free in time
    NOT_RUNNING = "not running"
    AGENT_MISSING = "agent missing"  # not configured
    AGENT_SILENT = "agent silent"  # configured, doesn't answer
    NO_QUORUM = "no quorum"
    NO_SPACE = "no space"
    UNSUPPORTED = "unsupported"  # that disk, there, in that format: never
    TASK = "task"  # a task ended with an error of no other kind


class PveRefusalError(PveError):
    """PVE refused a call, with what an engine needs to decide.

    Attributes:
        reason: the kind of refusal.
        said: PVE's own words, one line.
        privilege, path: what is missing where, for ``Reason.PERMISSION``.
        lock: the lock's name, for ``Reason.LOCKED``.
    """

    def __init__(
        self,
        message: str,
        status: int = 0,
        params: dict[str, str] | None = None,
        *,
        reason: Reason = Reason.OTHER,
        said: str = "",
        privilege: str = "",
        path: str = "",
        lock: str = "",
    ) -> None:
        super().__init__(message, status, params)
        self.reason = reason
        self.said = said
        self.privilege = privilege
        self.path = path
        self.lock = lock


_PERMISSION: Final = re.compile(
    r"Permission check failed(?: \((/[^,()]*), ([\w.|, ]+)\))?"
)

# First match wins. The texts are PVE's own, 8.4 and 9; the hint says what to do.
_TEXTS: Final[tuple[tuple[Reason, re.Pattern[str], str], ...]] = tuple(
    (reason, re.compile(pattern, re.IGNORECASE), hint)
    for reason, pattern, hint in (
        (
            Reason.LOCKED,
            r"VM is locked \(([\w-]+)\)",
            "Another operation holds this VM: wait for it, or if it died run "
            "'qm unlock VMID' on the node",
        ),
        (
            Reason.VM_MISSING,
            r"Configuration file '[^']*' does not exist|no such vm"
            r"|VM \d+ does not exist|unable to find configuration file for VM",
            "The VM was deleted or moved to another node: see 'pvesh get "
            "/cluster/resources --type vm'",
        ),
        (
            Reason.ROOT_ONLY,
            r"only root can|Only root may|root@pam only|user != root@pam",
            "No token or role can do this: leave that option out, or do it as "
            "root@pam on the node with qm",
        ),
        (
            Reason.CHANGED,
            r"checksum mismatch|detected modified configuration",
            "The VM's configuration was changed meanwhile: read it again and repeat",
        ),
        (
            Reason.AGENT_MISSING,
            r"No QEMU guest agent configured",
            "Set 'agent: 1' in the VM's options and install qemu-guest-agent in it",
        ),
        (
            Reason.AGENT_SILENT,
            r"QEMU guest agent is not running|guest agent .*timeout"
            r"|qga command '[^']*' failed",
            "Check that qemu-guest-agent runs inside the guest",
        ),
        (
            Reason.NO_QUORUM,
            r"no quorum|cluster not ready",
            "/etc/pve is read-only until the cluster has quorum: see 'pvecm status'",
        ),
        (
            Reason.BUSY,
            r"can't lock file|got timeout|got no lock|unable to acquire lock",
            "Another program holds it: try again in a minute",
        ),
        (
            Reason.NOT_RUNNING,
            r"VM \d+ (?:is )?not running|VM \d+ qmp command .* not running",
            "Start the VM, or take the job that needs it running out",
        ),
        (
            Reason.EXISTS,
            r"already exists|config file already exists|VM \d+ already running"
            r"|snapshot name '[^']*' already used",
            "Choose another id or name",
        ),
        (
            Reason.NO_SPACE,
            r"No space left|not enough free space|out of space|insufficient free",
            "Free space on that storage or choose another one",
        ),
        (
            Reason.UNSUPPORTED,
            r"snapshot feature is not available|clone feature is not supported for",
            "Move the VM's disks to a storage and format that has it (on a directory "
            "or NFS storage: qcow2)",
        ),
        (
            Reason.MISSING,
            r"storage '[^']*' does not exist|no such (?:storage|node|volume|pool)"
            r"|hostname lookup '[^']*' failed|does not exist|no such file",
            "Check the name: see 'pvesm status' and 'pvesh get /nodes'",
        ),
    )
)


def classify(said: str) -> tuple[Reason, str, str]:
    """Return the reason, the hint and the lock's name for PVE's words ``said``."""
    for reason, pattern, hint in _TEXTS:
        if found := pattern.search(said):
            lock = found.group(1) if reason is Reason.LOCKED else ""
            return reason, hint, lock
    return Reason.OTHER, "", ""


def refusal(
    name: str, status: int, said: str, params: dict[str, str], who: str
) -> PveRefusalError:
    """Turn a refusal into one line with its remedy.

    ``name`` is ``METHOD /path`` of the call, or what the task was; ``status`` is
    HTTP's, or 0 for a failed task.
    """
    if status == 401:
        return PveRefusalError(
            f"PVE refused the login of {who} (401: {said}). {_login_hint(who)}",
            status,
            reason=Reason.LOGIN,
            said=said,
        )
    if (found := _PERMISSION.search(said)) or status == 403:
        where, wanted = found.groups() if found else (None, None)
        return _missing_privilege(name, status, said, where, wanted, who)
    reason, hint, lock = classify(said)
    detail = "; ".join(f"{key}: {text}" for key, text in params.items())
    if status == 400:
        reason = Reason.PARAMETER if reason is Reason.OTHER else reason
    text = f"PVE refused {name} ({status}): {said}" if status else f"{name}: {said}"
    if detail:
        text = f"{text.rstrip('. ')}: {detail}"
    if status == 501:
        hint = "This Proxmox VE doesn't know that call: versions 8 and 9 are supported"
    if hint:
        text = f"{text.rstrip('. ')}. {hint}"
    if not status and reason is Reason.OTHER:
        reason = Reason.TASK
    return PveRefusalError(text, status, params, reason=reason, said=said, lock=lock)


def _missing_privilege(
    name: str, status: int, said: str, where: str | None, wanted: str | None, who: str
) -> PveRefusalError:
    if not where or not wanted:
        return PveRefusalError(
            f"PVE refused {name} to {who} ({status or 'task'}: {said}). See what it "
            f"may do with 'pveum user permissions {who}'",
            status,
            reason=Reason.PERMISSION,
            said=said,
        )
    privilege = wanted.replace(" ", "")
    first = privilege.partition("|")[0].partition(",")[0]
    flag = "--tokens" if "!" in who else "--users"
    also = " (a token with privsep needs it on its user too)" if "!" in who else ""
    return PveRefusalError(
        f"PVE refused {name}: {who} lacks the privilege {privilege} on {where}. Grant "
        f"it{also}: pveum acl modify {where} {flag} '{who}' --roles ROLE, with a ROLE "
        f"that has {first}",
        status,
        reason=Reason.PERMISSION,
        said=said,
        privilege=privilege,
        path=where,
    )


def _login_hint(who: str) -> str:
    if "!" in who:
        user = who.partition("!")[0]
        return (
            "Check pve_token_id and pve_token_secret, and that the token exists and "
            f"has not expired: pveum user token list {user}"
        )
    return "Check pve_user and pve_password; the realm is part of the name (root@pam)"
