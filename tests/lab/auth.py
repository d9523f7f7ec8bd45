# SPDX-License-Identifier: Apache-2.0
"""Users, tokens, tickets and privileges of the simulated site."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Callable, Iterable, Mapping

from .errors import ApiError, forbidden

COMMON = set(
    """Datastore.Allocate Datastore.AllocateSpace Datastore.AllocateTemplate
    Datastore.Audit Group.Allocate Mapping.Audit Mapping.Modify Mapping.Use
    Permissions.Modify Pool.Allocate Pool.Audit Realm.Allocate Realm.AllocateUser
    SDN.Allocate SDN.Audit SDN.Use Sys.AccessNetwork Sys.Audit Sys.Console
    Sys.Incoming Sys.Modify Sys.PowerMgmt Sys.Syslog User.Modify VM.Allocate VM.Audit
    VM.Backup VM.Clone VM.Config.CDROM VM.Config.CPU VM.Config.Cloudinit
    VM.Config.Disk VM.Config.HWType VM.Config.Memory VM.Config.Network
    VM.Config.Options VM.Console VM.Migrate VM.PowerMgmt VM.Snapshot
    VM.Snapshot.Rollback""".split()
)
ONLY_8 = {"VM.Monitor"}
ONLY_9 = {
    "VM.GuestAgent.Audit",
    "VM.GuestAgent.FileRead",
    "VM.GuestAgent.FileSystemMgmt",
    "VM.GuestAgent.FileWrite",
    "VM.GuestAgent.Unrestricted",
    "VM.Replicate",
}
TICKET_S = 7200


def privileges_of(release: str) -> set[str]:
    """Every privilege a release knows; others are an error in a role."""
    return COMMON | (ONLY_9 if release.startswith("9") else ONLY_8)


def product_acl(release: str) -> dict[str, set[str]]:
    """The least a backup and restore token needs (facts of ``docs``)."""
    agent = (
        {"VM.GuestAgent.Audit", "VM.GuestAgent.FileSystemMgmt"}
        if release.startswith("9")
        else {"VM.Monitor"}
    )
    config = "Disk CDROM CPU Memory Network HWType Options Cloudinit"
    return {
        "/": {"VM.Audit", "Datastore.Audit", "Sys.Audit", "Pool.Audit"},
        "/vms": {"VM.Audit", "VM.Backup", "VM.Snapshot", "VM.Allocate", "VM.PowerMgmt"}
        | agent
        | {f"VM.Config.{name}" for name in config.split()},
        "/storage": {
            "Datastore.AllocateSpace",
            "Datastore.Audit",
            "Datastore.Allocate",
        },
        "/sdn/zones/localnetwork": {"SDN.Use"},
    }


def receiver_acl(release: str) -> dict[str, set[str]]:
    """The least the token of a receiver of replicas needs, on the site it writes to.

    ==========================  =====================================================
    ``/vms`` (or ``/pool/P``)   what for
    ==========================  =====================================================
    VM.Audit                    configurations, lists, status, features, snapshots
    VM.Allocate                 make and destroy replicas and the clones of a test
    VM.Config.Disk CDROM CPU    what a replica's configuration holds; Disk also takes
    Memory Network HWType       a disk in, out (``unusedN``), frees it and grows it
    Options Cloudinit
    VM.PowerMgmt                failover, tests, back to standby
    VM.Snapshot                 restore points: take, delete and go back to them, so
                                that VM.Snapshot.Rollback isn't needed beside it
    VM.Clone                    an older restore point is tested as a full clone
    VM.GuestAgent.Audit         ping: has the guest booted (8.4: VM.Monitor)
    --------------------------  -----------------------------------------------------
    ``/storage/S``              Datastore.AllocateSpace (make, grow and free volumes),
                                Datastore.Audit. Not Datastore.Allocate: volumes are
                                freed through a configuration (``delete=unusedN``)
    ``/sdn/zones/localnetwork`` SDN.Use: NICs, and clones of what has NICs
    ==========================  =====================================================

    Left out on purpose: VM.Backup, VM.Migrate, VM.Console, VM.GuestAgent.Unrestricted
    (programs in the guest), Sys.Modify (``startup`` is not carried over), Permissions.
    What no token has: remove a ``lock`` (``qm unlock`` as root on the node), set
    ``vmgenid``, ``args``, ``hookscript``. A privilege given on ``/vms/ID`` itself is
    gone once that VM is destroyed: give it on ``/vms`` or on a pool.
    """
    config = "Disk CDROM CPU Memory Network HWType Options Cloudinit"
    agent = "VM.GuestAgent.Audit" if release.startswith("9") else "VM.Monitor"
    return {
        "/vms": {
            *("VM.Audit", "VM.Allocate", "VM.PowerMgmt", "VM.Snapshot", "VM.Clone"),
            *(f"VM.Config.{name}" for name in config.split()),
            agent,
        },
        "/storage": {"Datastore.AllocateSpace", "Datastore.Audit"},
        "/sdn/zones/localnetwork": {"SDN.Use"},
    }


class Auth:
    """Who may do what; ``clock`` can be moved to let tickets expire."""

    def __init__(self, release: str, root_password: str) -> None:
        self.known = privileges_of(release)
        self.passwords: dict[str, str] = {"root@pam": root_password}
        self.tokens: dict[str, str] = {}
        self.acl: dict[str, dict[str, set[str]]] = {}
        self.clock_offset_s = 0.0
        self.pool_of: Callable[[int], str | None] = lambda vmid: None
        self._key = secrets.token_bytes(16)

    def now(self) -> float:
        return time.time() + self.clock_offset_s

    # -- who

    def add_user(
        self, user: str, password: str, acl: Mapping[str, Iterable[str]]
    ) -> None:
        self.passwords[user] = password
        self.acl[user] = self._checked(acl)

    def add_token(self, token_id: str, acl: Mapping[str, Iterable[str]]) -> str:
        """Make a token with exactly these privileges; return its secret.

        The user itself holds all privileges, so the token's own ACL decides.
        """
        user = token_id.split("!")[0]
        if user != "root@pam":
            self.acl.setdefault(user, {"/": set(self.known)})
        self.acl[token_id] = self._checked(acl)
        secret = self.tokens.setdefault(token_id, _uuid())
        return secret

    def forget(self, path: str) -> None:
        """Remove everybody's privileges on a path that is gone."""
        for acl in self.acl.values():
            acl.pop(path, None)

    def _checked(self, acl: Mapping[str, Iterable[str]]) -> dict[str, set[str]]:
        result = {path: set(privs) for path, privs in acl.items()}
        for privs in result.values():
            for priv in privs - self.known:
                raise ValueError(f"invalid privilege '{priv}'")
        return result

    def ticket(self, user: str, password: str) -> dict[str, str]:
        """Log in with a password or renew with a ticket."""
        good = self.passwords.get(user)
        renewed = password.startswith("PVE:") and self.verify_ticket(password) == user
        if not renewed and (good is None or not hmac.compare_digest(good, password)):
            raise ApiError(401, "authentication failure")
        stamp = f"{int(self.now()):08X}"
        ticket = f"PVE:{user}:{stamp}::{self._sign(f'PVE:{user}:{stamp}')}"
        return {
            "username": user,
            "ticket": ticket,
            "CSRFPreventionToken": self.csrf(user),
        }

    def csrf(self, user: str) -> str:
        stamp = f"{int(self.now()):08X}"
        return f"{stamp}:{self._sign(f'csrf:{stamp}:{user}')}"

    def verify_csrf(self, user: str, token: str) -> bool:
        stamp, _, sign = token.partition(":")
        good = hmac.compare_digest(sign, self._sign(f"csrf:{stamp}:{user}"))
        return good and self._fresh(stamp)

    def verify_ticket(self, ticket: str) -> str | None:
        """The user of a valid ticket."""
        plain, _, sign = ticket.partition("::")
        parts = plain.split(":")
        if len(parts) != 3 or not hmac.compare_digest(sign, self._sign(plain)):
            return None
        return parts[1] if self._fresh(parts[2]) else None

    def verify_token(self, header: str) -> str | None:
        token_id, _, secret = header.partition("=")
        good = self.tokens.get(token_id)
        if good is None or not hmac.compare_digest(good, secret):
            return None
        return token_id

    def _fresh(self, stamp: str) -> bool:
        try:
            age = self.now() - int(stamp, 16)
        except ValueError:
            return False
        return -300 <= age <= TICKET_S

    def _sign(self, text: str) -> str:
        return hmac.new(self._key, text.encode(), hashlib.sha256).hexdigest()

    # -- what

    def privileges(self, user: str, path: str) -> set[str]:
        """Privileges of ``user`` on ``path``: the nearest ACL above it, inherited."""
        if user == "root@pam":
            return set(self.known)
        if "!" in user:
            owner = self.privileges(user.split("!")[0], path)
            return self._with_pool(user, path) & owner
        return self._with_pool(user, path)

    def _with_pool(self, user: str, path: str) -> set[str]:
        """A member of a pool has the pool's privileges beside its own path's."""
        have = self._nearest(user, path)
        vmid = path.removeprefix("/vms/")
        if vmid.isdigit() and (pool := self.pool_of(int(vmid))):
            have |= self._nearest(user, f"/pool/{pool}")
        return have

    def _nearest(self, user: str, path: str) -> set[str]:
        acl = self.acl.get(user, {})
        while True:
            if path in acl:
                return set(acl[path])
            if path == "/":
                return set()
            path = path.rpartition("/")[0] or "/"

    def paths(self, user: str) -> list[str]:
        return sorted(self.acl.get(user, {}))

    def has(self, user: str, path: str, *wanted: str) -> bool:
        return set(wanted) <= self.privileges(user, path)

    def check(self, user: str, path: str, *wanted: str) -> None:
        """Demand all of ``wanted``."""
        have = self.privileges(user, path)
        for priv in wanted:
            if priv not in have:
                raise forbidden(path, priv)

    def check_any(self, user: str, path: str, *wanted: str) -> None:
        if not set(wanted) & self.privileges(user, path):
            raise forbidden(path, "|".join(wanted))


def _uuid() -> str:
    raw = secrets.token_hex(16)
    return "-".join((raw[:8], raw[8:12], raw[12:16], raw[16:20], raw[20:]))
