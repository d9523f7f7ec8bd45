# SPDX-License-Identifier: Apache-2.0
"""``podheitor-proxmox-backend``: the process behind one plug-in string of a Bacula job.

The shim in bacula-fd starts it without arguments and speaks PTCOMM on its standard
input and output. With ``--cleanup JOB`` it undoes what a job that ended uncleanly left
on this node.

Exit status: 0 the job (or the clean-up) went well; 1 it failed, and bacula-fd was told
why; 2 wrong usage; 70 a fault of this program; 74 bacula-fd went away.
"""

from __future__ import annotations

import gc
import os
import sys

from pveplug import log as own_log

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Coroutine

    from pveplug.bacula import BaculaSession
    from pveplug.config import BackupConfig
    from pveplug.node import Node

EX_FAILED = 1
EX_USAGE = 2
EX_SOFTWARE = 70
EX_IOERR = 74

_OBJECTS = 10_000

USAGE = """\
usage: podheitor-proxmox-backend
       podheitor-proxmox-backend --cleanup JOB
       podheitor-proxmox-backend --version | --help

Without arguments it serves bacula-fd's plug-in on its standard input and output; it
is not meant to be started by hand. --cleanup JOB thaws, unlocks and frees every VM of
this node that the job with that unique name left so.
"""


def main() -> None:
    """Entry point of the program."""
    if len(sys.argv) > 1:
        sys.exit(_command(sys.argv[1:]))
    try:
        fd_in, fd_out = own_log.own_stdio()
    except OSError:
        os.write(2, b"podheitor-proxmox-backend: standard input or output is closed\n")
        sys.exit(EX_USAGE)
    # Importing makes objects and hardly any garbage, which it would be searched for.
    gc.set_threshold(_OBJECTS)
    try:
        status = _serve(fd_in, fd_out)
    except Exception as error:
        own_log.last_words(fd_out, f"the backend cannot run: {error!r}")
        status = EX_SOFTWARE
    # Not sys.exit(): nothing is left to do, and a thread may hang in a dead mount.
    sys.stdout.flush()
    os._exit(status)


def _command(arguments: list[str]) -> int:
    match arguments:
        case ["--version"]:
            from pveplug import __version__

            sys.stdout.write(f"podheitor-proxmox-backend {__version__}\n")
            return 0
        case ["--help" | "-h"]:
            sys.stdout.write(USAGE)
            return 0
        case ["--cleanup", job]:
            return _clean_up(job)
    sys.stderr.write(USAGE)
    return EX_USAGE


def _clean_up(job: str) -> int:
    import asyncio
    import logging

    from pveplug.errors import PveplugError
    from pveplug.events import ListReporter
    from pveplug.node import load_node
    from pveplug.recovery import clean_up_job

    try:
        node = load_node()
        own_log.setup_backend(node.log_file)
        say = ListReporter()
        well = asyncio.run(clean_up_job(node, job, say))
    except (PveplugError, OSError) as error:
        sys.stderr.write(f"podheitor-proxmox-backend: {error}\n")
        return EX_FAILED
    for kind, text in say.lines:
        logging.getLogger(__name__).info("cleanup job=%s %s: %s", job, kind, text)
    return 0 if well else EX_FAILED


def _serve(fd_in: int, fd_out: int) -> int:
    import asyncio

    import uvloop

    # Not closed: that would wait for every thread, and one may hang in a dead mount.
    runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
    return runner.run(_session(fd_in, fd_out))


async def _session(fd_in: int, fd_out: int) -> int:
    """Lead one job from the greeting to the goodbye."""
    import asyncio
    import logging
    import signal

    from pveplug.bacula import open_session
    from pveplug.errors import PveplugError, TransportError
    from pveplug.node import load_node
    from pveplug.proto.pve import TlsTrustError

    log = logging.getLogger(__name__)
    node = load_node()
    warning = own_log.setup_backend(node.log_file)
    session = await open_session(fd_in, fd_out)
    loop = asyncio.get_running_loop()
    cancelled = False

    async with session:
        with own_log.context(job=session.job.name):
            if warning:
                session.warning(warning)
            job = loop.create_task(_job(session, node), name="job")

            def cancel() -> None:
                nonlocal cancelled
                if not cancelled:
                    # Once, and only the job: nothing may interrupt the way out.
                    cancelled = True
                    job.cancel()

            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                loop.add_signal_handler(number, cancel)
            try:
                await job
            except asyncio.CancelledError:
                log.warning("job cancelled")
                return EX_FAILED
            except TransportError as error:
                log.exception("job failed")
                if session.closed.is_set():
                    return EX_IOERR
                # The word that monitoring looks for: somebody may sit between.
                alarm = "ERROR: " if isinstance(error, TlsTrustError) else ""
                await session.abort(f"{alarm}{error}")
                return EX_FAILED
            except PveplugError as error:
                log.exception("job failed")
                await session.abort(str(error))
                return EX_FAILED
            except Exception as error:
                log.exception("internal error")
                await session.abort(
                    f"internal error of pveplug: {error!r}. Remedy: please report it; "
                    "the log of the node has the details."
                )
                return EX_SOFTWARE
    return 0


async def _while_wanted(
    session: BaculaSession, work: Coroutine[None, None, None]
) -> None:
    """Do the work as long as bacula-fd is there, also where nothing is sent to it.

    Raises:
        TransportError: it went away; what the work had taken has been given back.
    """
    from pveplug.errors import TransportError
    from pveplug.tasks import first_failure

    async def gone() -> None:
        await session.closed.wait()
        raise TransportError("bacula-fd closed the pipe: the job has ended there")

    async with first_failure() as tasks:
        watcher = tasks.create_task(gone(), name="bacula-fd")
        await work
        watcher.cancel()


async def _job(session: BaculaSession, node: Node) -> None:
    from pveplug.config_parse import parse_backup

    if session.job.type == "R":
        from pveplug.restore import Restore
        from pveplug.restore_foreign import RestoreForeign, is_sisters

        await session.accept_params()
        foreign = is_sisters(session.plugin)
        await (RestoreForeign if foreign else Restore)(session, node).run()
        return
    backup, warnings = parse_backup(session.plugin, node=node)
    for text in warnings:
        session.warning(text)
    from pveplug.access import open_api
    from pveplug.pve_local import PveLocal

    local = PveLocal(node)
    if backup.replication is not None:
        await _replication(session, node, backup)
        return
    if backup.proof is not None:
        await _proof(session, node, backup)
        return
    api = await open_api(backup.connection)
    async with api:
        await session.accept_params()
        if session.job.type == "E":
            from pveplug.estimate import Estimate

            await Estimate(backup, node, session, api, local).run()
            await session.no_more_files()
            await session.end()
            return
        from pveplug.backup import Backup

        await session.accept_start()
        await _while_wanted(session, Backup(backup, node, session, api, local).run())
    await _close(session)


async def _replication(
    session: BaculaSession, node: Node, config: BackupConfig
) -> None:
    """Lead a job of disaster recovery; what it stores are reports."""
    import contextlib

    from pveplug.access import open_api
    from pveplug.dr.reports import BaculaReports
    from pveplug.dr.sender import Replicate
    from pveplug.pve_local import PveLocal

    assert config.replication is not None  # noqa: S101 - for the type checker
    async with contextlib.AsyncExitStack() as stack:
        api = None
        if config.needs_source:
            api = await stack.enter_async_context(await open_api(config.connection))
        await session.accept_params()
        if session.job.type == "E":
            session.info(f"mode={config.mode} stores only reports: nothing to estimate")
            await session.no_more_files()
            await session.end()
            return
        await session.accept_start()
        engine = Replicate(
            config,
            config.replication,
            node,
            session.job.name,
            api,
            PveLocal(node),
            BaculaReports(session),
        )
        await _while_wanted(session, engine.run())
    await _close(session)


async def _proof(session: BaculaSession, node: Node, config: BackupConfig) -> None:
    """Lead a job that proves backups; what it stores are reports."""
    from pathlib import Path

    from pveplug.bconsole import Console
    from pveplug.proofjob import BaculaStore, ProofJob, vmids

    order = config.proof
    assert order is not None  # noqa: S101 - for the type checker
    wanted = vmids(config)
    await session.accept_params()
    if session.job.type == "E":
        session.info("mode=prove stores only reports: nothing to estimate")
        await session.no_more_files()
        await session.end()
        return
    await session.accept_start()
    console = Console(node.bconsole, Path(order.console) if order.console else None)
    job = ProofJob(wanted, order, console, BaculaStore(session), session)
    await _while_wanted(session, job.run())
    await _close(session)


async def _close(session: BaculaSession) -> None:
    await session.no_more_files()
    # Nothing waits for the verdict: segments need no commit (docs/cbt.md), and what
    # went to another site was acknowledged there.
    status = await session.job_status()
    import logging

    logging.getLogger(__name__).info("job ended status=%s", status)
    await session.confirm_status()
    await session.end()


if __name__ == "__main__":
    main()
