# SPDX-License-Identifier: Apache-2.0
"""``podheitor-proxmox-receiver``: the daemon of a DR site; docs/receiver.md.

::

    configuration ── secrets ── PVE ── what a killed one left ── port ── READY=1
        SIGHUP   token, certificates, limits and PVE's credential are read again
        SIGTERM  no more senders; those there are have 8 s, then their cycles are
                 abandoned, which leaves their last restore points

Exit status: 0 it was asked to end, or ``--check`` found nothing; 2 wrong usage; 69 the
port is taken; 70 a fault of this program; 78 the configuration is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from pveplug import __version__, sdnotify
from pveplug import log as own_log
from pveplug.dr.channel import Server, ServerAuth, serve
from pveplug.dr.metrics import Metrics
from pveplug.dr.provision import Site
from pveplug.dr.receiver import Receiver
from pveplug.dr.receiver_config import ReceiverConfig, load_receiver
from pveplug.dr.services import ReplicaServices
from pveplug.dr.store import ReplicaStore
from pveplug.dr.tls import server_trust
from pveplug.errors import ConfigError, PveplugError, TransportError
from pveplug.events import Reporter
from pveplug.node import Node, load_node
from pveplug.pve import Endpoint, PveApi, TokenAuth
from pveplug.pve_local import PveLocal
from pveplug.tasks import first_failure

log = logging.getLogger(__name__)

EX_OK: Final = 0
EX_USAGE: Final = 2
EX_UNAVAILABLE: Final = 69
EX_SOFTWARE: Final = 70
EX_CONFIG: Final = 78

DRAIN_S: Final = 8.0
"""Of the 10 s a stop may take; abandoning what is left takes the rest."""
RETRY_S: Final = 60.0
"""How long to wait before PVE is asked again to remove what a killed test left."""
PVE_CA: Final = "/etc/pve/pve-root-ca.pem"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status."""
    arguments = _parser().parse_args(argv)
    own_log.setup_service(verbose=arguments.verbose)
    path = Path(arguments.config)
    try:
        node = load_node()
        config = load_receiver(path, node)
        config.check_files()
        server_trust(_auth(config))
        if arguments.check:
            sys.stdout.write(f"{path}: receiver {config.name} can be started\n")
            return EX_OK
        _prepare(config, node)
        return _run(path, config, node)
    except ConfigError as error:
        return _failed(error, EX_CONFIG)
    except PveplugError as error:
        return _failed(error, EX_UNAVAILABLE)
    except Exception:
        log.critical("receiver failed", exc_info=True)
        return EX_SOFTWARE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="podheitor-proxmox-receiver",
        description="Receive replicas of VMs of another site, and fail over to them.",
        epilog="Exit status: 0 it was asked to end, or --check found nothing; 2 wrong "
        "usage; 69 the port is taken; 70 a fault of this program; 78 the configuration "
        "is wrong.",
    )
    parser.add_argument(
        "--version",
        action="version",
        version=f"podheitor-proxmox-receiver {__version__}",
    )
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE",
        help="usually /etc/podheitor-proxmox/receiver-NAME.toml",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="read the configuration, secrets and certificates, contact nobody, end",
    )
    parser.add_argument(
        "--verbose", action="store_true", help="log what each session says, too"
    )
    return parser


def _failed(error: Exception, status: int) -> int:
    log.error("receiver ends status=%d: %s", status, error)
    return status


def _auth(config: ReceiverConfig) -> ServerAuth:
    """Read the token, and name the certificates."""
    token = config.token()
    if token is not None:
        own_log.register_secret(token.reveal())
    return ServerAuth(
        cert_file=config.cert_file,
        key_file=config.key_file,
        token=token.reveal().encode() if token else None,
        ca_file=config.ca_file or None,
        client_names=config.client_names,
    )


def _prepare(config: ReceiverConfig, node: Node) -> None:
    """Make the directories that are ours."""
    for key, where in (
        ("state_dir", config.state_dir),
        ("runtime_dir", node.runtime_dir),
        *([("limits.stage_dir", config.stage_dir)] if config.stage_dir else []),
    ):
        try:
            os.makedirs(where, mode=0o700, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"{key}: cannot make {where}: {error.strerror}", key=key
            ) from error


def _run(path: Path, config: ReceiverConfig, node: Node) -> int:
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_Daemon(path, config, node).run())


def api_of(config: ReceiverConfig) -> tuple[Endpoint, TokenAuth]:
    """Return where this site's API is, and its credential.

    Raises:
        ConfigError: the token's secret can't be read.
    """
    secret = config.pve_secret().reveal()
    own_log.register_secret(secret)
    pins = config.pve_fingerprints
    ca = PVE_CA if not pins and os.path.exists(PVE_CA) else None
    endpoint = Endpoint(config.pve_host, config.pve_port, pins, ca)
    return endpoint, TokenAuth(config.pve_token_id, secret)


def make_site(config: ReceiverConfig, node: Node, api: PveApi) -> Site:
    """Return what the replicas need to know of this site."""
    return Site(
        node=node,
        api=api,
        local=PveLocal(node),
        here=config.pve_node or socket.gethostname().partition(".")[0],
        storage=config.storage,
        bridge_map=config.bridge_map,
        pool=config.pool,
        retention_min=config.retention_min,
        retention_lock_days=config.retention_lock_days,
        stage_dir=config.stage_dir,
        keep_free=config.keep_free,
        version=__version__,
    )


class _Daemon:
    def __init__(self, path: Path, config: ReceiverConfig, node: Node) -> None:
        self._path = path
        self._config = config
        self._node = node
        self._store = ReplicaStore(config.state_dir)
        self._metrics = Metrics(self._store, stage_dir=config.stage_dir)
        self._apis = contextlib.AsyncExitStack()
        self._api: PveApi | None = None
        self._api_of: tuple[Endpoint, TokenAuth] | None = None
        self._stop = asyncio.Event()
        self._reload = asyncio.Event()

    async def run(self) -> int:
        """Serve until a signal says otherwise."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        loop.add_signal_handler(signal.SIGHUP, self._reload.set)
        config = self._config
        async with self._apis:
            services = ReplicaServices(self._store, await self._site(config))
            receiver = Receiver(services, config.sessions, self._metrics)
            try:
                server = await serve(
                    config.bind,
                    config.port,
                    auth=_auth(config),
                    handler=receiver.serve,
                )
                if config.metrics_port:
                    self._apis.enter_context(self._metrics.serving(config.metrics_port))
            except TransportError as error:
                return _failed(error, EX_UNAVAILABLE)
            async with server, first_failure() as tasks:
                background = [
                    tasks.create_task(self._feed(receiver), name="watchdog"),
                    tasks.create_task(self._reloads(server, receiver, services)),
                    tasks.create_task(self._recover(services), name="recovery"),
                ]
                host, port = server.address
                log.info(
                    "receiver ready name=%s address=%s:%d version=%s state_dir=%s",
                    *(config.name, host, port, __version__, config.state_dir),
                )
                sdnotify.notify("READY=1", self._status(receiver))
                await self._stop.wait()
                await self._end(server, receiver)
                for task in background:
                    task.cancel()
        log.info("receiver ended name=%s", config.name)
        return EX_OK

    async def _site(self, config: ReceiverConfig) -> Site:
        wanted = await asyncio.to_thread(api_of, config)
        if self._api is None or wanted != self._api_of:
            # The one before is closed at the end: open sessions may be using it.
            self._api = await self._apis.enter_async_context(PveApi(*wanted))
            self._api_of = wanted
        return make_site(config, self._node, self._api)

    async def _end(self, server: Server, receiver: Receiver) -> None:
        sdnotify.notify("STOPPING=1", f"STATUS=ending {receiver.sessions} sessions")
        log.info("receiver stops sessions=%d", receiver.sessions)
        await server.stop_accepting()
        left = await receiver.drain(DRAIN_S)
        if left:
            log.warning("receiver abandons sessions=%d", left)
            await receiver.cancel()

    # --- beside the sessions ---------------------------------------------------------

    async def _feed(self, receiver: Receiver) -> None:
        """Tell systemd that the loop turns."""
        interval_s = sdnotify.watchdog_interval_s()
        while True:
            sdnotify.notify("WATCHDOG=1", self._status(receiver))
            await asyncio.sleep(interval_s or 30)

    def _status(self, receiver: Receiver) -> str:
        return (
            f"STATUS=port {self._config.port}: {receiver.sessions} of {receiver.limit} "
            "sessions"
        )

    async def _reloads(
        self, server: Server, receiver: Receiver, services: ReplicaServices
    ) -> None:
        while True:
            await self._reload.wait()
            self._reload.clear()
            sdnotify.reloading()
            try:
                await self._take_over(server, receiver, services)
            except PveplugError as error:
                log.error("reload failed, all stays as it was: %s", error)
            sdnotify.notify("READY=1", self._status(receiver))

    async def _take_over(
        self, server: Server, receiver: Receiver, services: ReplicaServices
    ) -> None:
        """Read the file again and use what may change without a restart.

        Raises:
            ConfigError: something in it is wrong; nothing was changed.
        """
        config = await asyncio.to_thread(load_receiver, self._path, self._node)
        await asyncio.to_thread(config.check_files)
        for name in ("bind", "port", "state_dir", "metrics_port"):
            if getattr(config, name) != getattr(self._config, name):
                log.warning("reload ignores %s: it needs a restart", name)
        auth = await asyncio.to_thread(_auth, config)
        # Sessions that are open keep the API they began with.
        site = await self._site(config)
        server.reload(auth)
        services.site = site
        receiver.limit = config.sessions
        log.info("reloaded sessions=%d", config.sessions)

    async def _recover(self, services: ReplicaServices) -> None:
        """Remove what a test left that a killed receiver was running."""
        say = _LogReporter()
        while not await services.recover(say):  # noqa: ASYNC110 - PVE doesn't tell when it is back
            await asyncio.sleep(RETRY_S)


class _LogReporter(Reporter):
    def info(self, text: str) -> None:
        log.info("recovery: %s", text)

    def warning(self, text: str) -> None:
        log.warning("recovery: %s", text)

    def error(self, text: str) -> None:
        log.error("recovery: %s", text)


if __name__ == "__main__":
    sys.exit(main())
