# SPDX-License-Identifier: Apache-2.0
"""``pveplug ir start`` with real Directors, 15.0.3 and 9.6.7; the VM is scripted.

What a restore job brought is what the shim gave to the scripted backend.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pveplug.cli import main
from tests.integration.test_shim_bacula import BACKEND, ROOT, bacula_96
from tests.lab.bacula import BaculaLab, JobResult

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240)]

VM = "/@proxmox/100-1a2b3c4d"
SMALL = {"layout.json": 300, "vm.conf": 200, "manifest.json": 400}
DISKS = {"scsi0": 200_000, "efidisk0": 70_000}
PLUGIN = "podheitor-proxmox: scenario="
SPACE = "nightly: 2nd try"


def entries(directory: str) -> list[dict[str, Any]]:
    sizes = {**SMALL, **{f"{key}.qcow2": size for key, size in DISKS.items()}}
    return [
        {"object": "map", "size": 999},
        *(
            {"file": f"{directory}/{{job}}/{name}", "size": size, "runs": [[0, size]]}
            for name, size in sizes.items()
        ),
    ]


@dataclass
class Site:
    bacula: BaculaLab
    base: Path
    jobs: list[JobResult]

    def arguments(self, *words: str) -> list[str]:
        return [
            *("ir", "start", "--vmid", "100", *words),
            *("--console", str(self.base / "bconsole")),
            *("--console-config", str(self.base / "lab/etc/bconsole.conf")),
        ]

    def restores(self) -> list[dict[str, list[Any]]]:
        """What each restore job brought: JobIds of objects, and files."""
        found: dict[str, dict[str, list[Any]]] = {}
        for line in (self.base / "record/log.jsonl").read_text().splitlines():
            event = json.loads(line)
            if event["job"].startswith("lab-restore."):
                one = found.setdefault(event["job"], {"objects": [], "files": []})
                if event["event"] == "restore object":
                    one["objects"].append(event["job_id"])
                elif event["event"] == "file":
                    one["files"].append(event["name"])
        return list(found.values())


@pytest.fixture(scope="module", params=["15.0.3", "9.6.7"])
def site(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    prefix = None
    if request.param == "9.6.7":
        prefix = bacula_96()
        if prefix is None:
            pytest.skip("Bacula 9.6.7 is not unpacked: ./dev test does that")
    elif not Path("/usr/sbin/bacula-fd").exists():
        pytest.skip("bacula-fd is not installed")
    base = tmp_path_factory.mktemp(f"ir-{request.param}")
    plugins = base / "plugins"
    plugins.mkdir()
    subprocess.run(
        ["make", "-s", "-C", ROOT / "bacula_shim", f"BUILD={base}/build"], check=True
    )
    shutil.copy(base / "build/podheitor-proxmox-fd.so", plugins)
    scenario = base / "scenario.json"
    record = {"record": str(base / "record")}
    both = [*entries(VM), *entries("/@proxmox/101-aabbccdd")]
    scenario.write_text(json.dumps({**record, "entries": both}))
    env = {"PODHEITOR_PROXMOX_BACKEND": str(BACKEND)}
    with BaculaLab(base / "lab", prefix=prefix, plugin_dir=plugins, env=env) as bacula:
        argv, environment = bacula.bconsole
        exports = "".join(
            f"export {key}={shlex.quote(value)}\n"
            for key, value in environment.items()
            if key not in os.environ
        )
        (base / "bconsole").write_text(f'#!/bin/sh\n{exports}exec {argv[0]} "$@"\n')
        (base / "bconsole").chmod(0o755)
        bacula.add_job(SPACE, f"{PLUGIN}{scenario}")
        jobs = [bacula.run_job(SPACE, level) for level in "Full Incremental".split()]
        if request.param == "15.0.3":
            jobs.append(bacula.run_job(SPACE, "Incremental"))
        assert all(job.ok for job in jobs), jobs
        yield Site(bacula, base, jobs)


def test_a_chain_is_restored_job_by_job_with_the_objects_of_all(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--job", SPACE, "--name", "copy, of: shop", "--one-by-one")
    status = main(site.arguments(*words))
    said = capsys.readouterr()
    assert (status, said.err) == (0, ""), said
    ids = [job.job_id for job in site.jobs]
    assert f"chain {','.join(map(str, ids))};" in said.out
    where = "/@pve/mode=instant,restore_vmid=100:next,restore_name=copy%2C%20of:%20shop"
    names = [*SMALL, *(f"{key}.qcow2" for key in DISKS)]
    first, *others = site.restores()
    newest = [job.name for job in reversed(site.jobs)]
    # The newest job's files, and of the others what a boot can't wait for.
    small = [
        f"{where}{VM}/{job}/{name}"
        for job in newest[1:]
        for name in ("efidisk0.qcow2", "layout.json")
    ]
    small += [f"{where}{VM}/{newest[0]}/{name}" for name in names]
    assert sorted(first["files"]) == sorted(small)
    assert [sorted(one["files"]) for one in others] == [
        sorted(f"{where}{VM}/{job}/{name}" for name in names) for job in newest[1:]
    ]
    for one in (first, *others):
        # Two of each job: the other VM's, too.
        assert sorted(one["objects"]) == sorted(ids * 2)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--restore-client", "nope"], "no client to restore to 'nope'"),
        (["--restore-job", SPACE], f"no restore job '{SPACE}'"),
        (["--client", "nope"], "knows no client 'nope'"),
        (["--job", "999"], "no job 999"),
        (["--job", "other"], "no good backup of a job named 'other'"),
    ],
)
def test_what_bacula_doesn_t_know_submits_nothing(
    site: Site, capsys: pytest.CaptureFixture[str], words: list[str], why: str
) -> None:
    before = site.bacula.query("SELECT max(JobId) FROM Job")
    assert main(site.arguments(*words)) == 69
    assert why in capsys.readouterr().err
    assert site.bacula.query("SELECT max(JobId) FROM Job") == before


@pytest.mark.parametrize("site", ["15.0.3"], indirect=True)
def test_a_failed_restore_job_is_the_last_and_leaves_its_reason(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    scenario = site.base / "scenario.json"
    values = json.loads(scenario.read_text())
    faults = {"file": "die:Athe landing store is full"}
    scenario.write_text(json.dumps({**values, "faults": faults}))
    before = len(site.restores())
    assert main(site.arguments("--job", str(site.jobs[1].job_id))) == 69
    scenario.write_text(json.dumps(values))
    said = capsys.readouterr()
    assert "(1 of 2)" in said.err
    assert "failed: Fatal error: the landing store is full. Remedy: " in said.err
    assert f"pveplug ir start --vmid 100 --job {site.jobs[1].job_id}" in said.err
    assert len(site.restores()) == before + 1
