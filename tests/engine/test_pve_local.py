# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import asyncio
import dataclasses
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pveplug.errors import CommandError, TransportError
from pveplug.node import Node
from pveplug.proto.pve_refusal import Reason
from pveplug.pve_local import ProgramError, PveLocal, run

# One program plays qm, pvesm and lvchange: it logs its arguments and obeys files.
PROGRAM = """#!/bin/sh
base=$(dirname "$0"); name=$(basename "$0")
echo "$name $* LC_ALL=$LC_ALL" >> "$base/log"
key="$name-$1"
[ -f "$base/$key.sh" ] && . "$base/$key.sh"
[ -f "$base/$key.err" ] && { cat "$base/$key.err" >&2; exit 255; }
[ -f "$base/$key.out" ] && cat "$base/$key.out"
exit 0
"""


class Programs:
    def __init__(self, base: Path) -> None:
        self.base = base
        for name in ("qm", "pvesm", "lvchange"):
            program = base / name
            program.write_text(PROGRAM)
            program.chmod(0o755)
        self.node = Node(
            qm=str(base / "qm"),
            pvesm=str(base / "pvesm"),
            lvchange=str(base / "lvchange"),
            qemu_run_dir=str(base),
            firewall_dir=str(base / "firewall"),
            qmeventd_socket=str(base / "qmeventd.sock"),
        )
        self.local = PveLocal(self.node, proc=str(base / "proc"))

    def says(self, key: str, text: str) -> None:
        (self.base / f"{key}.out").write_text(text)

    def fails(self, key: str, text: str) -> None:
        (self.base / f"{key}.err").write_text(text)

    def runs(self, key: str, script: str) -> None:
        (self.base / f"{key}.sh").write_text(script)

    def log(self) -> list[str]:
        try:
            lines = (self.base / "log").read_text().splitlines()
        except FileNotFoundError:
            return []
        # By it PVE decodes what it is told: "C" spoils a description's umlauts.
        assert all(line.endswith(" LC_ALL=C.UTF-8") for line in lines)
        return [line.removesuffix(" LC_ALL=C.UTF-8") for line in lines]


@pytest.fixture
def programs(tmp_path: Path) -> Programs:
    return Programs(tmp_path)


# --- locks -------------------------------------------------------------------------


async def test_the_lock_is_set_by_qm(programs):
    await programs.local.set_lock(100)
    assert programs.log() == ["qm set 100 --lock backup"]


async def test_a_locked_vm_names_the_lock_and_the_remedy(programs):
    programs.fails("qm-set", "VM is locked (snapshot)\n")
    with pytest.raises(ProgramError, match="qm unlock") as caught:
        await programs.local.set_lock(100)
    assert (caught.value.reason, caught.value.lock) == (Reason.LOCKED, "snapshot")
    assert caught.value.stderr == "VM is locked (snapshot)"
    assert "\n" not in str(caught.value)


async def test_a_vm_without_config_here_is_told_apart(programs):
    said = "Configuration file 'nodes/pve1/qemu-server/100.conf' does not exist"
    programs.fails("qm-set", said)
    with pytest.raises(CommandError, match="moved to another node") as caught:
        await programs.local.set_lock(100)
    assert caught.value.reason is Reason.VM_MISSING


async def test_a_lock_set_after_our_death_is_still_proven_to_be_ours(
    programs, tmp_path
):
    programs.runs(
        "qm-set",
        f": >{tmp_path}/begun; until [ -e {tmp_path}/go ]; do sleep 0.05; done; "
        f"echo update VM 100; echo a warning >&2; : >{tmp_path}/set",
    )
    backend = f"""
import asyncio, pathlib
from pveplug.node import Node
from pveplug.pve_local import PveLocal
local = PveLocal(Node(qm={programs.node.qm!r}))
asyncio.run(local.set_lock(100, pathlib.Path({str(tmp_path / "held")!r})))
"""
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", backend)
    await appears(tmp_path / "begun")
    process.kill()
    await process.wait()
    (tmp_path / "go").touch()
    await appears(tmp_path / "held")
    assert (tmp_path / "set").exists()


async def appears(path: Path) -> None:
    for _ in range(400):
        if path.exists():
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"no {path}")


async def test_only_a_backup_lock_is_removed(programs):
    programs.says("qm-config", "cores: 2\nlock: backup\n")
    assert await programs.local.unlock(100) is True
    assert programs.log() == ["qm config 100 --current", "qm unlock 100"]
    programs.says("qm-config", "cores: 2\nlock: migrate\n")
    assert await programs.local.unlock(100) is False
    programs.says("qm-config", "cores: 2\n")
    assert await programs.local.unlock(100) is False
    assert programs.log().count("qm unlock 100") == 1


async def test_a_vm_that_is_gone_has_no_lock_to_remove(programs):
    programs.fails("qm-config", "Configuration file 'x/100.conf' does not exist\n")
    assert await programs.local.unlock(100) is False


async def test_a_failing_unlock_is_an_error(programs):
    programs.says("qm-config", "lock: backup\n")
    programs.fails("qm-unlock", "cluster not ready - no quorum?\n")
    with pytest.raises(ProgramError, match="pvecm status") as caught:
        await programs.local.unlock(100)
    assert caught.value.reason is Reason.NO_QUORUM


async def test_the_lock_of_a_vm_is_read(programs):
    programs.says("qm-config", "lock: clone\n")
    assert await programs.local.vm_lock(100) == "clone"


# --- volumes -----------------------------------------------------------------------


async def test_a_volume_has_a_path(programs):
    programs.says("pvesm-path", "/dev/pve/vm-100-disk-0\n")
    assert await programs.local.volume_path("local-lvm:vm-100-disk-0") == (
        "/dev/pve/vm-100-disk-0"
    )
    assert programs.log() == ["pvesm path local-lvm:vm-100-disk-0"]


@pytest.mark.parametrize("bad", ["", "--help", "local", "a b:c", "lo cal:x"])
async def test_what_is_no_volume_id_is_not_handed_to_pvesm(programs, bad):
    with pytest.raises(ProgramError):
        await programs.local.volume_path(bad)
    assert programs.log() == []


async def test_an_unknown_storage_is_explained(programs):
    programs.fails("pvesm-path", "storage 'nope' does not exist\n")
    with pytest.raises(ProgramError, match="pvesm status"):
        await programs.local.volume_path("nope:vm-100-disk-0")


async def test_no_path_is_an_error(programs):
    with pytest.raises(ProgramError, match="printed no path"):
        await programs.local.volume_path("local:x")


async def test_a_file_needs_no_activation(programs, tmp_path):
    image = tmp_path / "vm-100-disk-0.raw"
    image.write_bytes(b"")
    programs.says("pvesm-path", f"{image}\n")
    assert await programs.local.activate("local:100/vm-100-disk-0.raw") is False
    assert len(programs.log()) == 1
    image.unlink()
    with pytest.raises(ProgramError, match="does not exist"):
        await programs.local.activate("local:100/vm-100-disk-0.raw")


async def test_what_is_going_to_be_activated_is_announced_before(programs, monkeypatch):
    dev = programs.base / "dev"
    programs.says("pvesm-path", f"{dev}/thick/vm-100-disk-0\n")
    programs.runs("lvchange--ay", "exit 5")
    local = PveLocal(dataclasses.replace(programs.node, dev_dir=str(dev)))
    announced = []
    with pytest.raises(CommandError):
        await local.activate(
            "thick:vm-100-disk-0", lambda: announced.append(list(programs.log()))
        )
    assert len(announced) == 1
    assert not any("lvchange" in line for line in announced[0])


async def test_fleecing_volumes_of_one_vm_are_found_on_active_storages(programs):
    programs.says(
        "pvesm-status",
        "Name Type Status Total Used Available %\n"
        "local dir active 1 1 1 0.0%\n"
        "nas nfs inactive 0 0 0 0.0%\n",
    )
    programs.says(
        "pvesm-list",
        "Volid Format Type Size VMID\n"
        "local:100/vm-100-fleece-0.qcow2 qcow2 images 1 100\n"
        "local:vm-100-fleece-12 raw images 1 100\n"
        "local:vm-1001-fleece-0 raw images 1 1001\n"
        "local:vm-100-disk-0 raw images 1 100\n"
        "local:xvm-100-fleece-0 raw images 1 100\n",
    )
    found = await programs.local.fleecing_volumes(100)
    assert found == ["local:100/vm-100-fleece-0.qcow2", "local:vm-100-fleece-12"]
    assert [line for line in programs.log() if "pvesm list nas" in line] == []


async def test_a_logical_volume_is_activated_and_deactivated(programs, monkeypatch):
    programs.says("pvesm-path", "/dev/thick/vm-100-disk-0\n")
    there = iter([False, False, True])
    monkeypatch.setattr("pveplug.pve_local._is_there", lambda where: next(there))
    assert await programs.local.activate("thick:vm-100-disk-0") is True
    await programs.local.deactivate("thick:vm-100-disk-0")
    assert programs.log() == [
        "pvesm path thick:vm-100-disk-0",
        "lvchange -ay -K thick/vm-100-disk-0",
        "pvesm path thick:vm-100-disk-0",
        "lvchange -an thick/vm-100-disk-0",
    ]


async def test_an_active_volume_is_left_as_it_is(programs, monkeypatch):
    programs.says("pvesm-path", "/dev/thick/vm-100-disk-0\n")
    monkeypatch.setattr("pveplug.pve_local._is_there", lambda where: True)
    assert await programs.local.activate("thick:vm-100-disk-0") is False
    assert programs.log() == ["pvesm path thick:vm-100-disk-0"]


async def test_devices_are_looked_for_where_the_node_has_them(programs, tmp_path):
    device = tmp_path / "dev/thick/vm-100-disk-0"
    device.parent.mkdir(parents=True)
    local = PveLocal(dataclasses.replace(programs.node, dev_dir=str(tmp_path / "dev")))
    programs.says("pvesm-path", f"{device}\n")
    programs.runs("lvchange--ay", f"touch {device}")
    assert await local.activate("thick:vm-100-disk-0") is True
    assert programs.log()[-1] == "lvchange -ay -K thick/vm-100-disk-0"


@pytest.mark.parametrize(
    "where", ["/dev/zvol/rpool/x", "/dev/rbd-pve/f/p/i", "/dev/rbd/p"]
)
async def test_other_devices_are_never_given_to_lvchange(programs, monkeypatch, where):
    async def never(path):
        return False

    monkeypatch.setattr("pveplug.pve_local._appears", never)
    programs.says("pvesm-path", f"{where}\n")
    with pytest.raises(ProgramError, match="isn't active on this node"):
        await programs.local.activate("s:vm-100-disk-0")
    await programs.local.deactivate("s:vm-100-disk-0")
    assert not [line for line in programs.log() if line.startswith("lvchange")]


async def test_a_volume_that_qemu_opens_itself_needs_no_activation(programs):
    programs.says("pvesm-path", "rbd:pool/vm-100-disk-0:mon_host=a:id=admin\n")
    assert await programs.local.activate("ceph:vm-100-disk-0") is False


# --- programs ----------------------------------------------------------------------


async def test_a_program_that_is_not_there_names_the_node_file(tmp_path):
    local = PveLocal(Node(qm=str(tmp_path / "no-qm")))
    with pytest.raises(ProgramError, match=r"node\.toml") as caught:
        await local.set_lock(100)
    assert caught.value.status == 127


async def test_a_program_that_hangs_is_killed_with_its_children(programs, tmp_path):
    programs.runs("qm-set", f"sleep 600 & echo $! > {tmp_path}/child; wait")
    started = time.monotonic()
    with pytest.raises(ProgramError, match=r"did not end within 0\.5 s"):
        await run([programs.node.qm, "set", "100"], timeout_s=0.5)
    assert time.monotonic() - started < 5
    await gone(int((tmp_path / "child").read_text()))


async def test_a_cancelled_program_is_killed_with_its_children(programs, tmp_path):
    programs.runs("qm-set", f"sleep 600 & echo $! > {tmp_path}/child; wait")
    task = asyncio.create_task(programs.local.set_lock(100))
    while not (tmp_path / "child").exists():
        await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await gone(int((tmp_path / "child").read_text()))


async def gone(pid: int) -> None:
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return
        if state in "ZX":
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"{pid} still lives")


async def test_endless_output_is_drained_and_refused():
    argv = [sys.executable, "-c", "print('x' * 3_000_000)"]
    with pytest.raises(ProgramError, match="printed more than"):
        await run(argv, timeout_s=20)


async def test_a_silent_failure_still_says_something():
    with pytest.raises(ProgramError, match="status 3: it said nothing"):
        await run(["/bin/sh", "-c", "exit 3"], timeout_s=5)


# --- files -------------------------------------------------------------------------


async def test_the_firewall_file_is_read_if_there_is_one(programs, tmp_path):
    assert await programs.local.firewall(100) is None
    (tmp_path / "firewall").mkdir()
    (tmp_path / "firewall/100.fw").write_text("[OPTIONS]\nenable: 1\n")
    assert await programs.local.firewall(100) == "[OPTIONS]\nenable: 1\n"
    (tmp_path / "firewall/101.fw").write_bytes(b"x" * (1024 * 1024 + 1))
    with pytest.raises(TransportError, match="longer than"):
        await programs.local.firewall(101)
    (tmp_path / "firewall/102.fw").mkdir()
    with pytest.raises(TransportError, match=r"102\.fw"):
        await programs.local.firewall(102)


def process(base: Path, pid: int, argv: list[str], started: int = 12345) -> None:
    where = base / "proc" / str(pid)
    where.mkdir(parents=True, exist_ok=True)
    (where / "cmdline").write_bytes(b"\0".join(a.encode() for a in argv) + b"\0")
    fields = ["S", *map(str, range(4, 22)), str(started), "23", "24"]
    (where / "stat").write_text(f"{pid} (a ) b) {' '.join(fields)}\n")
    boot = base / "proc/sys/kernel/random"
    boot.mkdir(parents=True, exist_ok=True)
    (boot / "boot_id").write_text("aaaa-bbbb\n")


def test_a_vm_runs_by_the_rule_of_pve(programs, tmp_path):
    pid_file = programs.node.pid_file(100)
    assert programs.local.vm_running(100) is None
    Path(pid_file).write_text("4711\n")
    assert programs.local.vm_running(100) is None  # no such process
    process(tmp_path, 4711, ["/usr/bin/kvm", "-id", "100", "-pidfile", pid_file])
    running = programs.local.vm_running(100)
    assert running is not None
    assert (running.pid, running.started, running.boot_id) == (4711, 12345, "aaaa-bbbb")
    process(tmp_path, 4711, ["qemu-system-x86_64", "-pidfile", pid_file], started=99999)
    replaced = programs.local.vm_running(100)
    assert replaced is not None
    assert replaced.identity != running.identity


@pytest.mark.parametrize(
    "argv",
    [
        ["/usr/bin/vim", "-pidfile", "{pid_file}"],
        ["/usr/bin/kvm", "-pidfile", "{pid_file}0"],
        ["/usr/bin/kvm", "{pid_file}"],
        ["/usr/bin/kvm"],
        [""],
    ],
)
def test_another_program_under_that_pid_is_not_the_vm(programs, tmp_path, argv):
    pid_file = programs.node.pid_file(100)
    Path(pid_file).write_text("4711\n")
    process(tmp_path, 4711, [word.format(pid_file=pid_file) for word in argv])
    assert programs.local.vm_running(100) is None


@pytest.mark.parametrize("text", ["", "x", "-1", "99999999999999999999"])
def test_a_damaged_pid_file_means_not_running(programs, text):
    Path(programs.node.pid_file(100)).write_text(text)
    assert programs.local.vm_running(100) is None


def test_a_real_process_is_recognised(programs, tmp_path):
    pid_file = programs.node.pid_file(100)
    child = subprocess.Popen(
        ["qemu-fake", "-c", "input(chr(10))", "-pidfile", pid_file],
        executable=sys.executable,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert child.stdout is not None
        child.stdout.read(1)  # exec is over: before, its command line may be empty
        Path(pid_file).write_text(f"{child.pid}\n")
        found = PveLocal(programs.node).vm_running(100)
        assert found is not None
        assert found.pid == child.pid
        assert found.started > 0
        assert found.boot_id
    finally:
        child.communicate(b"\n")


# --- qmeventd ----------------------------------------------------------------------


async def test_qmeventd_is_told_and_held_for_the_whole_job(programs):
    received = bytearray()
    closed = asyncio.Event()
    arrived = asyncio.Event()

    async def serve(reader, writer):
        while data := await reader.read(100):
            received.extend(data)
            arrived.set()
        closed.set()
        writer.close()

    server = await asyncio.start_unix_server(serve, programs.node.qmeventd_socket)
    async with server:
        async with programs.local.register_qmeventd(100) as warning:
            assert warning is None
            await asyncio.wait_for(arrived.wait(), 5)
            assert bytes(received) == b'{"vzdump":{"vmid":"100"}}'
            assert not closed.is_set()
        await asyncio.wait_for(closed.wait(), 5)


async def test_without_qmeventd_the_job_goes_on_with_a_warning(programs):
    async with programs.local.register_qmeventd(100) as warning:
        assert warning is not None
        assert "powers off" in warning


async def test_an_error_inside_the_registration_passes(programs):
    with pytest.raises(OSError, match="disk"):
        async with programs.local.register_qmeventd(100):
            raise OSError("disk")
