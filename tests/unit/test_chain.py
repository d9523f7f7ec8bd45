# SPDX-License-Identifier: Apache-2.0
"""Chains: order, missing members, owners; manifests and restore objects."""

from __future__ import annotations

import dataclasses
import json
import random

import pytest
from blake3 import blake3

from pveplug.errors import IntegrityError
from pveplug.extents import Extent, Kind
from pveplug.images import chain as chain_module
from pveplug.images.chain import (
    Chain,
    DiskEntry,
    JobRecord,
    Manifest,
    backing_name,
    by_vm,
    decode_objects,
    encode_objects,
    job_directory,
    parse_backing,
)
from pveplug.images.clusters import ClusterMap
from pveplug.images.manifest import sealed
from pveplug.images.restore_object import MAPS_BYTES, OBJECT_BYTES
from pveplug.units import GiB, MiB
from tests.support.images import kinds_of, map_of

UUID = "1A2B3C4D-0000-0000-0000-000000000000"


def job(name, parent=None, started=0, vmid=100, **kinds):
    """A record with one disk for each keyword; a value may be (kinds, size)."""
    disks, maps = [], {}
    for key, value in kinds.items():
        letters, size = value if isinstance(value, tuple) else (value, None)
        alone = letters.startswith("!")
        made = map_of(letters.lstrip("!"), size)
        maps[key] = made.to_bytes()
        backing = backing_name(parent, key) if parent and not alone else None
        disks.append(DiskEntry(key, made.size, backing=backing))
    manifest = Manifest(
        vmid, UUID, "web", name, parent, "I" if parent else "F", started or len(name),
        "pve1", "crash-consistent", "cores: 1\n", disks=tuple(disks),
    )  # fmt: skip
    return JobRecord(manifest, maps)


def owners(chain, key="scsi0"):
    return [kinds_of(chain.owned(name, key)) for name in chain.jobs]


def never(chain, key="scsi0"):
    return [(run.offset, run.end) for run in chain.never_written(key)]


def test_the_newest_that_says_anything_owns_a_cluster():
    records = [
        job("F", scsi0="ddd..."),
        job("I1", "F", scsi0=".dz.d."),
        job("I2", "I1", scsi0="..d.z."),
    ]
    random.Random(1).shuffle(records)
    chain = Chain(records)
    assert chain.head.job == "I2"
    assert chain.jobs == ("F", "I1", "I2")
    assert owners(chain) == ["d.....", ".d....", "..d.z."]
    assert never(chain) == [(3 * 512, 6 * 512)]
    assert chain.mapped("scsi0")
    assert chain.final_size("scsi0") == 6 * 512


def test_a_differential_leaves_the_incrementals_before_it_unused():
    chain = Chain(
        [
            job("F", started=1, scsi0="dddd"),
            job("I1", "F", started=2, scsi0="d..."),
            job("D", "F", started=3, scsi0=".d.."),
            job("I2", "D", started=4, scsi0="..d."),
        ]
    )
    assert chain.jobs == ("F", "D", "I2")
    assert chain.unused == ("I1",)
    assert Chain(chain._records.values(), head="I1").jobs == ("F", "I1")


def test_of_several_ends_the_newest_is_restored():
    records = [job("A", started=5, scsi0="d"), job("B", started=9, scsi0="d")]
    assert Chain(records).head.job == "B"


def test_a_disk_read_whole_in_the_middle_cuts_older_jobs_off():
    chain = Chain(
        [
            job("F", scsi0="dd", scsi1="dd"),
            job("I1", "F", scsi0="!d.", scsi1=".d"),
            job("I2", "I1", scsi0=".z", scsi1=".."),
        ]
    )
    assert chain.jobs == ("F", "I1", "I2")
    assert chain.members("scsi0") == ("I1", "I2")
    assert not chain.needs("F", "scsi0")
    assert owners(chain) == ["..", "d.", ".z"]
    assert never(chain) == [(512, 1024)]
    assert owners(chain, "scsi1") == ["d.", ".d", ".."]


def test_a_job_that_only_read_whole_disks_needs_no_parent():
    chain = Chain([job("I1", "gone", scsi0="!dd")])
    assert chain.jobs == ("I1",)


def test_disks_that_appear_or_vanish():
    chain = Chain(
        [
            job("F", scsi0="d", scsi1="d"),
            job("I1", "F", scsi0="d", scsi2="!d"),
            job("I2", "I1", scsi0="d", scsi2="d"),
        ]
    )
    assert chain.keys == ("scsi0", "scsi2")
    assert chain.members("scsi1") == ()
    assert chain.members("scsi2") == ("I1", "I2")


def test_a_missing_member_is_named():
    records = [job("F", scsi0="d"), job("I2", "I1", scsi0="d")]
    with pytest.raises(IntegrityError, match="job I2 builds on job I1, which is mis"):
        Chain(records)
    with pytest.raises(IntegrityError, match="no manifest"):
        Chain([])
    with pytest.raises(IntegrityError, match="manifest of job X is missing"):
        Chain(records, head="X")
    with pytest.raises(IntegrityError, match=r"has no scsi0\.qcow2"):
        Chain([job("F", scsi1="d"), job("I1", "F", scsi0="d")])


def test_rings_and_strangers_are_refused():
    with pytest.raises(IntegrityError, match="ring"):
        Chain([job("A", "B", scsi0="d"), job("B", "A", scsi0="d")])
    with pytest.raises(IntegrityError, match="which builds on it"):
        Chain([job("A", "B", scsi0="d"), job("B", "A", scsi0="d")], head="A")
    with pytest.raises(IntegrityError, match="several VMs"):
        Chain([job("A", scsi0="d"), job("A2", vmid=101, scsi0="d")])
    with pytest.raises(IntegrityError, match="contradict"):
        Chain(
            [
                job("A", scsi0="d"),
                JobRecord(_two("B", scsi0="C", scsi1="A")),
                JobRecord(_two("C", scsi0=None, scsi1="B")),
                JobRecord(_two("D", scsi0="B", scsi1="C")),
                JobRecord(_two("A", scsi0=None, scsi1=None)),
            ],
            head="D",
        )


def _two(name, **parents):
    disks = tuple(
        DiskEntry(key, 512, backing=parent and backing_name(parent, key))
        for key, parent in parents.items()
    )
    return Manifest(100, UUID, "", name, None, "I", 0, "", "", "", disks=disks)


def test_records_of_several_vms_are_told_apart():
    groups = by_vm([job("A", scsi0="d"), job("A", vmid=101, scsi0="d")])
    assert list(groups) == ["/@proxmox/100-1a2b3c4d", "/@proxmox/101-1a2b3c4d"]


def test_a_disk_that_grew():
    chain = Chain(
        [job("F", scsi0=("ddd", 2 * 512 + 100)), job("I1", "F", scsi0=".....")]
    )
    assert owners(chain) == ["ddd", "....."]
    assert never(chain) == [(2 * 512 + 100, 5 * 512)]


def test_what_a_smaller_disk_cut_off_does_not_come_back():
    chain = Chain(
        [
            job("F", scsi0="ddddd"),
            job("I1", "F", scsi0=("...", 2 * 512 + 100)),
            job("I2", "I1", scsi0="d...."),
        ]
    )
    assert chain.owned("F", "scsi0").size == 2 * 512 + 100
    assert owners(chain) == [".dd", "...", "d...."]
    assert never(chain) == [(2 * 512 + 100, 5 * 512)]


def test_a_shrunken_disk_ends_where_the_newest_says():
    chain = Chain([job("F", scsi0="dddd"), job("I1", "F", scsi0=("..", 700))])
    assert chain.final_size("scsi0") == 700
    assert list(chain.owned("F", "scsi0").runs()) == [Extent(0, 700, Kind.DATA)]
    assert never(chain) == []


def test_an_unknown_map_means_ordered_replay():
    full = job("F", scsi0="dd")
    chain = Chain([JobRecord(full.manifest), job("I1", "F", scsi0="d.")])
    assert not chain.mapped("scsi0")
    with pytest.raises(IntegrityError, match="map of job F is unknown"):
        chain.owned("I1", "scsi0")


def test_a_map_of_another_disk_is_refused():
    full = job("F", scsi0="dd")
    wrong = JobRecord(full.manifest, {"scsi0": map_of("ddd").to_bytes()})
    with pytest.raises(IntegrityError, match="1536 bytes"):
        wrong.map("scsi0")


def linked(*records):
    """Have each record name the manifest of the one before it."""
    made, digest = [], None
    for record in records:
        manifest = dataclasses.replace(record.manifest, parent_manifest=digest)
        made.append(JobRecord(manifest, record.maps))
        digest = manifest.digest
    return made


def test_a_chain_whose_manifests_name_each_other_is_taken():
    records = linked(
        job("F", scsi0="dd"), job("I1", "F", scsi0="d."), job("I2", "I1", scsi0=".d")
    )
    assert Chain(records).jobs == ("F", "I1", "I2")
    # Where it is not known nothing is compared.
    records[1] = job("I1", "F", scsi0="d.")
    records[2] = job("I2", "I1", scsi0=".d")
    assert Chain(records).jobs == ("F", "I1", "I2")


@pytest.mark.parametrize("which", [0, 1])
def test_a_member_that_is_not_the_one_built_on_is_refused_by_name(which):
    records = linked(
        job("F", scsi0="dd"), job("I1", "F", scsi0="d."), job("I2", "I1", scsi0=".d")
    )
    old = records[which]
    other = dataclasses.replace(old.manifest, started=4711)
    records[which] = JobRecord(other, old.maps)
    wrong, child = (("F", "I1"), ("I1", "I2"))[which]
    with pytest.raises(
        IntegrityError,
        match=f"manifest of job {wrong} is not the one that job {child} was built on",
    ):
        Chain(records)


def test_a_parent_that_no_disk_needs_is_not_compared():
    records = linked(job("F", scsi0="dd"), job("I1", "F", scsi0="!d."))
    other = dataclasses.replace(records[0].manifest, started=4711)
    assert Chain([JobRecord(other, None), records[1]]).jobs == ("I1",)


# --- manifests -------------------------------------------------------------------


def rich():
    return Manifest(
        100, UUID, "wéb \udc80", "job.2026-11-22_22.35.59_56", None, "F", 1_790_000_000,
        "pve1", "application-consistent", "name: wéb\ncores: 2\n",
        firewall="[OPTIONS]\nenable: 1\n",
        disks=(
            DiskEntry("scsi0", 4 * GiB, "qcow2", "local", "scsi0.qcow2", None, "cbw",
                      "first job", 5, 6, "00" * 16),
            DiskEntry("efidisk0", 540672, backing="../x:y.1/efidisk0.qcow2"),
        ),
        versions={"pveplug": "0.1.0", "qemu": "10.0.2"},
        left_out={"ide2": "cdrom"}, chain="k1", parent_manifest="ff" * 16,
        template=True, edges="ab" * 16,
    )  # fmt: skip


def fields(manifest):
    values = json.loads(manifest.to_json())
    values.pop("self", None)
    return values


def test_a_manifest_comes_back_from_json():
    assert Manifest.from_json(rich().to_json()) == rich()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"version": 5}, "restore with a newer one"),
        ({"version": 2}, "version 2 has no edges"),
        ({"edges": "0" * 31}, "impossible edges"),
        ({"version": None}, "without a version"),
        ({"vmid": "100"}, "vmid must be int"),
        ({"vmid": True}, "vmid must be int"),
        ({"vmid": -1}, "negative"),
        ({"surprise": 1}, "unknown field 'surprise'"),
        ({"firewall": 3}, r"firewall must be str \| None"),
        ({"versions": {"a": 1}}, "versions must be"),
        ({"disks": {}}, "disks is not a list"),
        ({"disks": [1]}, "a disk is not an object"),
        ({"disks": [{"key": "scsi0"}]}, "size is missing"),
        ({"disks": [{"key": "scsi0", "size": 0}]}, "impossible sizes"),
        ({"disks": [{"key": "../etc", "size": 512}]}, "impossible disk key"),
        ({"disks": [{"key": "a", "size": 512, "file": "../x"}]}, "impossible file"),
        ({"disks": [{"key": "a", "size": 512}] * 2}, "appears twice"),
        ({"disks": [{"key": "a", "size": 9, "backing": "/etc/shadow"}]}, "backing"),
        ({"uuid": "../../.."}, "impossible uuid"),
        ({"job": "a/b"}, "cannot be a directory"),
    ],
)
def test_a_manifest_that_is_not_right_is_refused(change, reason):
    values = fields(rich()) | change
    with pytest.raises(IntegrityError, match=reason):
        Manifest.from_json(sealed(values))


@pytest.mark.parametrize("text", ["", "[]", "{", "\xff", "1" * 5000, "[" * 100_000])
def test_what_is_no_manifest_is_refused(text):
    with pytest.raises(IntegrityError):
        Manifest.from_json(text)
    with pytest.raises(IntegrityError):
        Manifest.from_json(text.encode("latin-1"))


def test_a_missing_field_is_named():
    values = fields(rich())
    del values["config"]
    with pytest.raises(IntegrityError, match="config is missing"):
        Manifest.from_json(sealed(values))


def test_a_bit_that_turned_anywhere_in_a_manifest_is_found():
    text = rich().to_json()
    for at in range(len(text)):
        bad = bytearray(text)
        bad[at] ^= 1 << at % 8
        with pytest.raises(IntegrityError, match="manifest: "):
            Manifest.from_json(bytes(bad))


def test_a_manifest_of_version_1_is_read_and_keeps_its_digest():
    values = fields(rich()) | {"version": 1}
    del values["edges"]
    text = json.dumps(values, indent=1).encode() + b"\n"
    old = Manifest.from_json(text)
    assert old == dataclasses.replace(rich(), version=1, edges="")
    assert old.to_json() == text
    assert old.digest == blake3(text).hexdigest(16)
    with pytest.raises(IntegrityError, match="unknown field 'self'"):
        Manifest.from_json(sealed(fields(old)))


def test_a_manifest_of_version_2_knows_no_edges_and_keeps_its_digest():
    values = fields(rich()) | {"version": 2}
    del values["edges"]
    text = sealed(values)
    old = Manifest.from_json(text)
    assert (old.version, old.edges) == (2, "")
    assert old.to_json() == text


def test_what_a_manifest_is_built_on_is_what_its_images_name():
    assert rich().built_on == "x:y.1"
    alone = dataclasses.replace(rich(), disks=(), parent_job="virtual")
    assert alone.built_on == "virtual"
    torn = tuple(
        DiskEntry(key, 512, backing=f"../{key}/{key}.qcow2") for key in ("a", "b")
    )
    assert dataclasses.replace(rich(), disks=torn).built_on is None


@pytest.mark.parametrize("name", ["x", "../x", "../../a/b", "/a/b", "../../b", "../a/"])
def test_a_backing_name_that_leaves_the_vms_directory_is_refused(name):
    with pytest.raises(IntegrityError):
        parse_backing(name)


def test_paths():
    assert rich().directory == "/@proxmox/100-1a2b3c4d/job.2026-11-22_22.35.59_56"
    assert parse_backing("../x:y.1/scsi0.qcow2") == ("x:y.1", "scsi0.qcow2")
    assert chain_module.digest_file("scsi0") == "scsi0.digests"
    assert chain_module.vm_directory(7, "") == "/@proxmox/7-nouuid"
    for bad in ("", ".", "..", "a/b"):
        with pytest.raises(IntegrityError):
            job_directory(1, UUID, bad)


# --- restore objects -------------------------------------------------------------


def maps_for(manifest, seed=1, share=0.0):
    made = {}
    for disk in manifest.disks:
        clusters = made[disk.key] = ClusterMap(disk.size)
        noise = random.Random(seed)
        for number in range(clusters.clusters):
            if noise.random() < share:
                start = number << 16
                length = min(1 << 16, disk.size - start)
                clusters.mark(Extent(start, length, Kind.DATA))
    return made


def big(size=700 * GiB):
    manifest = rich()
    clusters = ClusterMap(size)
    noise = random.Random(2)
    clusters.data[:] = noise.randbytes(len(clusters.data))
    disk = DiskEntry("scsi0", size)
    other = DiskEntry("scsi1", 64 * MiB)
    manifest = dataclasses.replace(manifest, disks=(disk, other))
    return manifest, {"scsi0": clusters, "scsi1": ClusterMap.all_data(other.size)}


def test_objects_come_back():
    manifest = rich()
    maps = maps_for(manifest, share=0.5)
    objects = encode_objects(manifest, maps)
    assert len(objects) == 1
    records, problems = decode_objects(content for _, content in objects)
    assert problems == []
    assert records[0].manifest == manifest
    assert {key: records[0].map(key) for key in maps} == maps


def test_objects_of_a_large_map_are_split_and_come_in_any_order():
    manifest, maps = big()
    objects = encode_objects(manifest, maps)
    assert len(objects) == 2
    assert objects[0][0] == ("pveplug/100-1a2b3c4d/job.2026-11-22_22.35.59_56/1of2")
    contents = [content for _, content in objects]
    assert all(len(content) <= OBJECT_BYTES for content in contents)
    assert all(len(content) % 3 == 0 for content in contents)
    records, problems = decode_objects([*reversed(contents), contents[0]])
    assert problems == []
    assert {key: records[0].map(key) for key in maps} == maps
    assert encode_objects(manifest, maps) == objects


def test_small_objects_are_never_compressed_by_bacula():
    """Its release 9.6 loses some of what it compresses, in an SQLite catalogue."""
    manifest = dataclasses.replace(rich(), config="name: x\n" * 40)
    maps = maps_for(manifest, share=0.5)
    objects = encode_objects(manifest, maps, small=True)
    assert len(objects) > 1
    assert all(len(c) < 1000 and len(c) % 3 == 0 for _, c in objects)
    records, problems = decode_objects(content for _, content in objects)
    assert problems == []
    assert records[0].manifest == manifest
    assert {key: records[0].map(key) for key in maps} == maps
    large, many = big()
    assert len(encode_objects(large, many, small=True)) == 2


def test_a_lost_part_costs_its_maps_and_says_so():
    manifest, maps = big()
    first, second = (content for _, content in encode_objects(manifest, maps))
    records, problems = decode_objects([first])
    assert records[0].maps is None
    assert len(problems) == 2
    assert "1 of 2 restore objects" in problems[0]
    assert "no extent map of scsi0, scsi1" in problems[1]
    records, problems = decode_objects([second])
    assert records == []
    assert "the manifest is missing" in problems[1]


def test_an_object_that_came_back_as_zeroes_is_recognised():
    records, problems = decode_objects([bytes(1234)])
    assert records == []
    assert problems == [
        "a restore object of 1234 bytes holds only zeroes: the catalogue lost it"
    ]


def test_maps_too_large_for_the_catalogue_are_left_out():
    size = (MAPS_BYTES * 8 << 16) + GiB
    manifest, maps = big(size)
    objects = encode_objects(manifest, maps)
    assert len(objects) == 1
    records, problems = decode_objects(content for _, content in objects)
    assert problems == []
    assert records[0].maps is None
    assert records[0].maps_left_out


def test_a_damaged_object_is_a_sentence_and_never_an_error():
    manifest = rich()
    other = job("other", scsi0="dd")
    good = encode_objects(other.manifest, {"scsi0": map_of("dd")})[0][1]
    content = encode_objects(manifest, maps_for(manifest))[0][1]
    noise = random.Random(3)
    for _ in range(300):
        bad = bytearray(content.rstrip(b"\0"))
        bad[noise.randrange(len(bad))] ^= 1 << noise.randrange(8)
        records, problems = decode_objects([bytes(bad), good])
        assert [record.manifest.job for record in records] == ["other"]
        assert len(problems) == 1
        records, problems = decode_objects([content[: noise.randrange(200)], good])
        assert len(records) == len(problems) == 1


def test_a_chain_of_objects_becomes_a_chain():
    records = [job("F", scsi0="ddd"), job("I1", "F", scsi0="..d")]
    blobs = [
        content
        for record in records
        for _, content in encode_objects(
            record.manifest, {"scsi0": ClusterMap.from_bytes(record.maps["scsi0"])}
        )
    ]
    found, problems = decode_objects(blobs)
    assert not problems
    assert owners(Chain(found)) == ["dd.", "..d"]
