# SPDX-License-Identifier: Apache-2.0
"""``python -m tests.lab up|status|shell|down``: a site left running for a person."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
BUILD = REPOSITORY / ".build"
STATE = "state.json"
GUEST = BUILD / "guest/boot.raw"
START_S = 120


def main() -> int:
    """Run one of the four commands; return an exit status."""
    parser = argparse.ArgumentParser(prog="./dev lab", description=__doc__)
    parser.add_argument(
        "command",
        choices=("up", "status", "shell", "down", "serve"),
        metavar="up|status|shell|down",
    )
    parser.add_argument("--release", default="9.2", choices=("9.2", "8.4"))
    parser.add_argument(
        "--state", type=Path, default=BUILD / "lab", help="where the lab notes its own"
    )
    arguments = parser.parse_args()
    place: Path = arguments.state
    match arguments.command:
        case "serve":
            return serve(place, arguments.release)
        case "up":
            return up(place, arguments.release)
        case "status":
            return status(place)
        case "shell":
            return shell(place)
    return down(place)


def read_state(place: Path) -> dict[str, Any] | None:
    """State of the running lab; None where none runs."""
    try:
        state: dict[str, Any] = json.loads((place / STATE).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return state if is_ours(state["pid"]) else None


def is_ours(pid: int) -> bool:
    """Whether this process id is (still) a lab of ours."""
    argv = cmdline(pid).split(b"\0")
    return b"tests.lab" in argv and b"serve" in argv


def cmdline(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def up(place: Path, release: str) -> int:
    """Start the lab in the background and say where everything is."""
    if state := read_state(place):
        print("The lab is running already.\n")
        show(state)
        return 0
    place.mkdir(parents=True, exist_ok=True)
    (place / STATE).unlink(missing_ok=True)
    log_file = place / "lab.log"
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.lab",
                "serve",
                "--release",
                release,
                "--state",
                str(place.resolve()),
            ],
            cwd=REPOSITORY,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        if process.poll() is not None:
            print(f"The lab did not start; {log_file} says:", file=sys.stderr)
            print(log_file.read_text()[-2000:], file=sys.stderr)
            return 1
        if state := read_state(place):
            show(state)
            return 0
        time.sleep(0.1)
    process.terminate()
    print(f"The lab was not up within {START_S} s; see {log_file}", file=sys.stderr)
    return 1


def status(place: Path) -> int:
    """Say where everything is, or that nothing runs."""
    state = read_state(place)
    if state is None:
        print("No lab is running. Start one with: ./dev lab up")
        return 3
    show(state)
    qm = Path(state["root"]) / "usr/sbin/qm"
    print()
    return subprocess.run([str(qm), "list"], check=False).returncode


def show(state: dict[str, Any]) -> None:
    for line in state["lines"]:
        print(line)


def shell(place: Path) -> int:
    """Open a shell in which qm, pvesm and bconsole speak to the lab."""
    state = read_state(place)
    if state is None:
        print("No lab is running. Start one with: ./dev lab up", file=sys.stderr)
        return 3
    profile = place / "shellrc"
    root = state["root"]
    text = [
        "[ -f ~/.bashrc ] && . ~/.bashrc",
        f"export PATH={shlex.quote(root + '/usr/sbin')}:$PATH",
        *(f"export {k}={shlex.quote(v)}" for k, v in state["env"].items()),
        "PS1='(lab) \\w\\$ '",
    ]
    if console := state.get("bconsole"):
        text.append(f"alias bconsole={shlex.quote(console)}")
    text.append(
        'pve() { curl -sSk -H "Authorization: PVEAPIToken=$PVE_TOKEN" '
        '"$PVE_URL/api2/json$1" "${@:2}"; echo; }'
    )
    profile.write_text("\n".join(text) + "\n")
    show(state)
    print("\nIn this shell: qm, pvesm, bconsole, pve /version. Leave with exit.\n")
    return subprocess.run(
        ["bash", "--rcfile", str(profile), "-i"], check=False
    ).returncode


def down(place: Path) -> int:
    """Stop the lab by its process id and remove what it made; fine without one."""
    state = read_state(place)
    if state is None:
        print("No lab is running.")
    else:
        os.kill(state["pid"], signal.SIGTERM)
        end = time.monotonic() + 60
        while is_ours(state["pid"]) and time.monotonic() < end:
            time.sleep(0.1)
        if is_ours(state["pid"]):
            # QEMU dies with this process, Bacula's daemons don't.
            os.kill(state["pid"], signal.SIGKILL)
            for pid in state["daemons"]:
                if state["root"].encode() in cmdline(pid):
                    os.kill(pid, signal.SIGKILL)
        print("The lab is down.")
    (place / STATE).unlink(missing_ok=True)
    return 0


def serve(place: Path, release: str) -> int:
    """The background process: a site, a demo VM, Bacula; until SIGTERM."""
    from .blocking import SiteThread
    from .site import short_base

    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    base = short_base("lab")
    with contextlib.ExitStack() as stack:
        lab = stack.enter_context(SiteThread(base, release=release))
        site = lab.site
        node_file = site.node_toml()
        lines = [
            f"PVE {release} node   {site.url}  (node {site.node.name})",
            f"  fingerprint    {site.fingerprint}",
            f"  token          {site.token}",
            f"  root           root@pam, password {site.root_password}",
            f"  lab root       {site.root}  (etc/pve, var/run/qemu-server, usr/sbin)",
            f"  node file      {node_file}",
        ]
        env = {
            "PVE_URL": site.url,
            "PVE_TOKEN": site.token,
            "PVE_FINGERPRINT": site.fingerprint,
            "PVE_NODE": site.node.name,
            "PODHEITOR_PROXMOX_NODE": str(node_file),
            "LAB_ROOT": str(site.root),
        }
        lines += demo_vm(lab)
        console, daemons, more = bacula(stack, base, env)
        lines += more
        place.mkdir(parents=True, exist_ok=True)
        fresh = (place / STATE).with_suffix(".tmp")
        fresh.write_text(
            json.dumps(
                {
                    "pid": os.getpid(),
                    "root": str(site.root),
                    "env": env,
                    "bconsole": console,
                    "daemons": daemons,
                    "lines": lines,
                }
            )
        )
        fresh.chmod(0o600)
        fresh.rename(place / STATE)
        stop.wait()
    return 0


def demo_vm(lab: Any) -> list[str]:
    """Make and start VM 100: a qcow2 boot disk and a raw data disk."""
    if not GUEST.exists():
        return [
            f"VM 100            not made: {GUEST} is missing (./dev setup builds it)"
        ]
    local = lab.site.node.storages["local"]
    vm = lab.create_vm(
        100,
        {"name": "demo", "agent": "1", "boot": "order=scsi0", "ostype": "l26"},
        disks={"scsi0": GUEST},
    )
    volid = local.alloc(100, None, 64 << 20, "raw")
    vm.set(scsi1=f"{volid},discard=on,size=64M")
    vm.start()
    return [
        "VM 100            demo: scsi0 qcow2 (boots by GRUB), scsi1 raw 64 MiB",
        f"  QMP            {lab.site.node.run_dir}/100.qmp",
        f"  console        {vm.machine.serial}",
    ]


def bacula(
    stack: contextlib.ExitStack, base: Path, env: dict[str, str]
) -> tuple[str | None, list[int], list[str]]:
    """Start Bacula where it is installed and the shim is built.

    Returns: the bconsole command, the daemons' process ids, lines for a person.
    """
    from .bacula import BaculaLab

    plugins = BUILD / "shim"
    if not list(plugins.glob("*-fd.so")):
        plugins = REPOSITORY / "bacula_shim"
    if not list(plugins.glob("*-fd.so")):
        return None, [], ["Bacula            not started: the shim is not built"]
    backend = Path(sys.executable).with_name("podheitor-proxmox-backend")
    secret = base / "token"
    secret.write_text(env["PVE_TOKEN"].partition("=")[2] + "\n")
    secret.chmod(0o600)
    more = {**os.environ, **env, "PODHEITOR_PROXMOX_BACKEND": str(backend)}
    server = stack.enter_context(BaculaLab(base / "b", plugin_dir=plugins, env=more))
    token_id = env["PVE_TOKEN"].partition("=")[0]
    plugin = (
        f"podheitor-proxmox: vmid=100 pve_token_id={token_id} "
        f"pve_token_secret_file={secret} pve_fingerprint={env['PVE_FINGERPRINT']}"
    )
    server.add_job("vm100", plugin)
    console = shlex.join(server._bconsole())
    daemons = [server.pid(name) for name in ("dir", "sd", "fd")]
    return (
        console,
        daemons,
        [
            "Bacula            director, storage and file daemon, job vm100",
            f"  bconsole       {console}",
            f"  job            {plugin}",
        ],
    )


if __name__ == "__main__":
    sys.exit(main())
