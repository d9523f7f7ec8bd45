# SPDX-License-Identifier: Apache-2.0
"""The lab's calls against the schema of the real releases, where that is at hand."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.lab import site as _site  # noqa: F401  (registers every call)
from tests.lab.auth import privileges_of
from tests.lab.http import ROUTES, Route
from tests.lab.schema import CONFIG, INDEXED, P, config_type

DATA = Path(__file__).resolve().parents[3] / "shared/data/pve-api-schema.json"
RELEASES = ("9.2", "8.4")

pytestmark = [
    pytest.mark.skipif(not DATA.exists(), reason=f"{DATA} is not at hand"),
    pytest.mark.optional(reason="the recorded schema is not part of the repository"),
]


@pytest.fixture(scope="module")
def endpoints() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(DATA.read_text())["endpoints"]
    return found


def recorded(endpoints: dict[str, Any], found: Route, release: str) -> dict[str, Any]:
    entry = endpoints[found.template][found.method]
    return entry["9.2"] if entry[release] == "same" else entry[release]


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("found", ROUTES, ids=lambda r: f"{r.method} {r.template}")
def test_each_call_takes_the_recorded_parameters(
    endpoints: dict[str, Any], found: Route, release: str
) -> None:
    real = recorded(endpoints, found, release)["parameters"].get("properties", {})
    in_path = set(re.findall(r"\{(\w+)\}", found.template))
    real = {k: v for k, v in real.items() if k not in in_path}
    keys = {k for k in real if known_config_key(k, release)} if found.config else set()
    params = found.params[release[0]]
    assert set(params) == set(real) - keys
    for name, kind in params.items():
        same_kind(name, kind, real[name])


def known_config_key(key: str, release: str) -> bool:
    return bool(key.endswith("[n]")) or config_type(key, release) is not None


def same_kind(name: str, kind: P, real: dict[str, Any]) -> None:
    assert kind.type == real["type"], name
    assert kind.required == (not real.get("optional")), name
    for ours, theirs in (
        (kind.low, real.get("minimum")),
        (kind.high, real.get("maximum")),
        (kind.longest, real.get("maxLength")),
    ):
        assert ours == (None if theirs is None else float(theirs)), name
    if "enum" in real and kind.enum:
        assert set(kind.enum) == set(map(str, real["enum"])), name


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("found", ROUTES, ids=lambda r: f"{r.method} {r.template}")
def test_each_call_needs_the_recorded_privileges(
    endpoints: dict[str, Any], found: Route, release: str
) -> None:
    real = recorded(endpoints, found, release)
    if found.template == "/access/ticket":
        assert real["permissions"] == {"user": "world"}
        assert found.world
        assert not found.token
        return
    assert bool(real["allowtoken"]) == found.token
    need = set(found.need_8 if release == "8.4" else found.need)
    check = (real.get("permissions") or {}).get("check")
    if check is None:
        assert not need, "any user may call, the code checks inside"
        return
    if check[0] == "and":
        check = check[1]  # the second half is checked by the handler
    kind, path, privileges, *options = check
    assert kind == "perm"
    assert path == found.on
    assert set(privileges) == need
    wants_any = bool(options and options[0] == "any" and len(set(privileges)) > 1)
    assert wants_any == (found.any and len(need) > 1)


@pytest.mark.parametrize("release", RELEASES)
def test_configuration_keys_are_the_recorded_ones(
    endpoints: dict[str, Any], release: str
) -> None:
    entry = endpoints["/nodes/{node}/qemu/{vmid}/config"]["PUT"]
    real = entry[release] if entry[release] != "same" else entry["9.2"]
    own = {"delete", "digest", "force", "revert", "skiplock", "node", "vmid"}
    for key, value in real["parameters"]["properties"].items():
        if key in own:
            continue
        if key.endswith("[n]"):
            highest, _ = INDEXED[key.removesuffix("[n]")]
            assert highest == value["x-index"][1], key
            found = config_type(key.replace("[n]", "0"), release)
            assert found is not None, key
            kind = found
            assert config_type(key.replace("[n]", str(highest + 1)), release) is None
        else:
            found = config_type(key, release)
            assert found is not None, key
            kind = found
            assert kind.low == value.get("minimum"), key
            assert kind.high == value.get("maximum"), key
            assert kind.type == value["type"], key
        if kind.props is not None and isinstance(value.get("format"), dict):
            assert set(kind.props) == set(value["format"]), key
        if kind.enum and "enum" in value:
            assert set(kind.enum) == set(map(str, value["enum"])), key
    names = {k for k in real["parameters"]["properties"] if not k.endswith("[n]")}
    assert {k for k in CONFIG if config_type(k, release)} <= names


@pytest.mark.parametrize("release", RELEASES)
def test_privileges_exist_in_their_release(release: str) -> None:
    known = privileges_of(release)
    for found in ROUTES:
        assert set(found.need_8 if release == "8.4" else found.need) <= known
