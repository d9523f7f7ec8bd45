# SPDX-License-Identifier: Apache-2.0
"""``pveplug ir``: instant recovery by hand; see docs/cli.md."""

from __future__ import annotations

import argparse
import asyncio
import re
import shlex
import signal
import sys
from pathlib import Path
from typing import Any, Final

from pveplug import command_ir_node
from pveplug.bconsole import Console
from pveplug.errors import ConfigError
from pveplug.ir.submit import Plan, make_plan, submit, where_values
from pveplug.pluginstring import where_string, where_words

EX_OK: Final = 0
EX_INTERRUPTED: Final = 130
"""128 and SIGINT's number, as shells have it."""

_FLAGS: Final = (
    ("name", "restore_name"),
    ("overlay_storage", "ir_overlay_storage"),
    ("target_storage", "ir_target_storage"),
    ("timeout", "ir_timeout"),
)


def add_parser(commands: Any, summary: str) -> None:
    """Add the command and its own to those of ``pveplug``."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "ir",
        help=summary,
        description="Run a VM from its backup at once, while its disks still arrive.",
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    _add_start(actions)
    _add_prove(actions)
    command_ir_node.add_actions(actions)


def run(arguments: argparse.Namespace) -> int:
    """Do it, and return the exit status."""
    match arguments.action:
        case "start":
            return _start(arguments)
        case "prove":
            return _prove(arguments)
        case "status" | "migrate" | "discard" | "resume":
            return command_ir_node.run(arguments)
    raise ConfigError(f"pveplug ir has no {arguments.action}")


# --- start ----------------------------------------------------------------------------


def _add_start(actions: Any) -> None:
    parser: argparse.ArgumentParser = actions.add_parser(
        "start",
        help="submit the restore jobs of a VM's chain, newest first",
        description="Find a VM's newest good backup, or the one named by --job, and "
        "have Bacula restore its chain into one instant recovery: a restore job for "
        "what is newer than its oldest job, then one for that, each when the one "
        "before it has ended. The VM starts as soon as what it boots from is here. "
        "Ctrl-C cancels nothing in Bacula: the job that runs goes on, and the same "
        "command goes on from there.",
        epilog="Exit status: 0 everything arrived, or is submitted; 69 Bacula does not "
        "answer or refuses, or a restore job failed, and the line says what to do; 78 "
        "wrong options, or bconsole's configuration; 130 after Ctrl-C.",
    )
    add = parser.add_argument
    add("--vmid", type=_vmid, required=True, metavar="N", help="its id in the backup")
    add("--job", metavar="JOBID|NAME", help="this job, or the newest of this name")
    add("--client", metavar="C", help="only backups of this client of Bacula's")
    add(
        "--restore-client",
        metavar="C",
        help="the node that takes the VM, as Bacula calls it [the backup's client]",
    )
    add(
        "--restore-job",
        metavar="R",
        help="Bacula's Job of Type = Restore [the only one there is]",
    )
    add("--new-vmid", type=_vmid, metavar="N", help="id of the new VM [the next free]")
    add("--name", metavar="NAME", help="name of the new VM")
    add("--overlay-storage", metavar="S", help="what the guest writes goes here")
    add("--target-storage", metavar="S", help="the disks move here in the end")
    add(
        "--one-by-one",
        action="store_true",
        help="a restore job for each job of the chain, not one for all that is newer "
        "than the oldest",
    )
    add(
        "--no-auto-migrate",
        action="store_true",
        help="leave the disks where they are until `pveplug ir migrate`",
    )
    add("--timeout", metavar="SECONDS", help="how long the guest may wait for data")
    add(
        "--map-bridge",
        action="append",
        default=[],
        metavar="OLD:NEW",
        help="may be repeated; or one bridge for all",
    )
    add(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="another restore option of docs/parameters.md; may be repeated",
    )
    add("--console", default="bconsole", metavar="PROGRAM", help="[bconsole]")
    add("--console-config", type=Path, metavar="FILE", help="its -c [its default]")
    add(
        "--dry-run",
        action="store_true",
        help="ask Bacula everything, show the restore jobs, submit none",
    )
    add(
        "--no-wait",
        action="store_true",
        help="submit and return; for a recovery that is one restore job",
    )


def _add_prove(actions: Any) -> None:
    parser: argparse.ArgumentParser = actions.add_parser(
        "prove",
        help="prove that the newest backups boot, and remove what was made for it",
        description="Have Bacula restore the newest good backup of each VM with "
        "mode=prove: it boots without any network, is watched, judged and removed; "
        "docs/prove.md. Ctrl-C cancels nothing in Bacula.",
        epilog="Exit status: 0 every backup is proven; 69 one is not, or Bacula does "
        "not answer; 78 wrong options; 130 after Ctrl-C. For an Admin job: Run Before "
        'Job = "pveplug ir prove --vmid 100".',
    )
    add = parser.add_argument
    add("--vmid", type=_vmid, action="append", required=True, metavar="N")
    add("--restore-client", metavar="C", help="the node that restores for it")
    add("--restore-job", metavar="R", help="Bacula's Job of Type = Restore")
    add(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="prove_evidence, prove_serial, prove_timeout, prove_memory, storages, …",
    )
    add("--console", default="bconsole", metavar="PROGRAM", help="[bconsole]")
    add("--console-config", type=Path, metavar="FILE", help="its -c [its default]")


def _prove(arguments: argparse.Namespace) -> int:
    from pveplug.config import ProofOrder  # of no use to the other actions
    from pveplug.dr.reports import TerminalReports
    from pveplug.proofjob import ProofJob

    options: dict[str, str] = {}
    for option in arguments.option:
        key, equals, value = option.partition("=")
        if not equals or not re.fullmatch("[a-z_]+", key) or key in options:
            raise ConfigError(f"--option {option!r} is not key=value", key=key)
        if key == "mode":
            raise ConfigError(
                f"--option {option!r}: mode is set by this command already", key=key
            )
        options[key] = value
    order = ProofOrder(options, None, arguments.restore_client, arguments.restore_job)
    console = Console(arguments.console, arguments.console_config)
    try:
        asyncio.run(
            ProofJob(arguments.vmid, order, console, None, TerminalReports()).run()
        )
    except KeyboardInterrupt:
        sys.stderr.write("pveplug: interrupted; the restore job goes on in Bacula\n")
        return EX_INTERRUPTED
    return EX_OK


def _vmid(text: str) -> int:
    if not re.fullmatch("[1-9][0-9]{2,8}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not the id of a VM")
    return int(text)


def _start(arguments: argparse.Namespace) -> int:
    where = where_of(arguments)
    console = Console(arguments.console, arguments.console_config)
    running: list[int] = []

    def started(job_id: int | None) -> None:
        running[:] = [] if job_id is None else [job_id]

    try:
        return asyncio.run(_submit(arguments, console, where, started))
    except (KeyboardInterrupt, asyncio.CancelledError):
        going_on = (
            f"restore job {running[0]} goes on in Bacula (`cancel jobid={running[0]}` "
            "in bconsole would end it), no other was submitted; when it has ended"
            if running
            else "no restore job of this command runs in Bacula; to go on"
        )
        sys.stderr.write(
            f"pveplug: interrupted: {going_on}, run the same command again\n"
        )
        return EX_INTERRUPTED


async def _submit(
    arguments: argparse.Namespace, console: Console, where: str, started: Any
) -> int:
    # SIGTERM says the same as Ctrl-C, with the same parting words.
    task = asyncio.current_task()
    if task is not None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    plan = await make_plan(
        console,
        arguments.vmid,
        where,
        job=_job(arguments.job),
        client=arguments.client,
        restore_client=arguments.restore_client,
        restore_job=arguments.restore_job,
        one_by_one=arguments.one_by_one,
    )
    for remark in plan.remarks:
        sys.stderr.write(f"warning: {remark}\n")
    for line in described(plan):
        _say(line)
    if arguments.dry_run:
        for step in plan.steps:
            await console.preview(step.order)
        _say("dry run: Bacula would take each of these; nothing was submitted")
        return EX_OK
    if not arguments.no_wait:
        again = again_command(arguments, plan)
        await submit(console, plan, _say, again=again, started=started)
        _say("everything of the chain has arrived")
        return EX_OK
    if len(plan.steps) > 1:
        raise ConfigError(
            f"--no-wait: this recovery takes {len(plan.steps)} restore jobs, each when "
            "the one before it has ended: leave --no-wait out, or run the command "
            "without it under systemd-run"
        )
    job_id = await console.restore(plan.steps[0].order)
    _say(f"restore job {job_id} is submitted")
    return EX_OK


def where_of(arguments: argparse.Namespace) -> str:
    """Return the ``where`` that says to Bacula's client what these arguments say.

    Raises:
        ConfigError: an option is none, is given twice, or all are too long together.
    """
    options: dict[str, str] = {}
    for flag, key in _FLAGS:
        value = getattr(arguments, flag)
        if value is not None:
            options[key] = value
    if arguments.no_auto_migrate:
        options["ir_auto_migrate"] = "no"
    if arguments.map_bridge:
        options["bridge_map"] = ";".join(arguments.map_bridge)
    values = where_values(arguments.vmid, arguments.new_vmid, options)
    for option in arguments.option:
        key, equals, value = option.partition("=")
        if not equals or not re.fullmatch("[a-z_]+", key):
            raise ConfigError(f"--option {option!r} is not key=value", key=key)
        if key in values:
            raise ConfigError(
                f"--option {option!r}: {key} is set by this command already", key=key
            )
        values[key] = value
    where = where_string(values)
    where_words(where)
    return where


def again_command(arguments: argparse.Namespace, plan: Plan) -> str:
    """Return the command that goes on with this recovery, and no newer backup."""
    words = ["pveplug", "ir", "start", "--vmid", str(arguments.vmid)]
    words += ["--job", str(plan.head.job.job_id)]
    for name in (
        *("restore_client", "restore_job", "new_vmid", "name", "overlay_storage"),
        *("target_storage", "timeout", "map_bridge", "option", "console_config"),
    ):
        value = getattr(arguments, name)
        for each in value if isinstance(value, list) else [value]:
            if each is not None:
                words += [f"--{name.replace('_', '-')}", str(each)]
    for flag in ("no_auto_migrate", "one_by_one"):
        if getattr(arguments, flag):
            words.append(f"--{flag.replace('_', '-')}")
    if arguments.console != "bconsole":
        words += ["--console", arguments.console]
    return shlex.join(words)


def described(plan: Plan) -> list[str]:
    """Return what is going to happen, a line each."""
    head = plan.head
    order = plan.steps[0].order
    lines = [
        f"VM {head.part.vm}, backup of {head.job.started} by {head.job.unique} "
        f"(JobId {head.job.job_id}) of {head.job.client}",
        f"chain {','.join(str(job.job_id) for job in plan.chain)}; "
        f"{order.restore_job} on {order.restore_client}, where={order.where}",
    ]
    for number, step in enumerate(plan.steps, 1):
        count = step.order.files
        lines.append(f"  {number}. {step.title}: {count} file{'s' * (count > 1)}")
    return lines


def _job(text: str | None) -> int | str | None:
    return int(text) if text is not None and text.isdecimal() else text


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
