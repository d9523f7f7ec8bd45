# SPDX-License-Identifier: Apache-2.0
"""Reading what a job was told: plug-in string, menu and where= to frozen values.

The values are :mod:`pveplug.config`'s. Nothing here touches the network or reads a
secret.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import socket
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Literal

from pveplug.config import (
    BackupConfig,
    Capture,
    Connection,
    ImportConfig,
    Instant,
    Peer,
    ProofOrder,
    Prove,
    Replication,
    RestoreConfig,
)
from pveplug.errors import ConfigError
from pveplug.node import Node
from pveplug.parameter import Parameter
from pveplug.parameters import PARAMETERS, RESTORE_MODES, lookup
from pveplug.pluginstring import (
    PLUGIN_NAME,
    is_vm_where,
    option_words,
    plugin_words,
    where_words,
)
from pveplug.secrets import Origin, Secret, SecretSource
from pveplug.selection import Selection
from pveplug.values import Mapped

_LEVELS: Final = {"F": "full", "I": "incremental", "D": "differential"}
_CREDENTIALS: Final = (
    "pve_token_id",
    "pve_token_secret",
    "pve_token_secret_file",
    "pve_token_secret_cmd",
    "pve_user",
    "pve_password",
    "pve_password_file",
    "pve_password_cmd",
)
_NO_LEVEL: Final = {
    "incremental": ": it is a replication cycle of disaster recovery. The level of a "
    "backup is Bacula's: mode=backup here, Level = Incremental in the Job or Schedule"
}
_TRUST: Final = ("pve_fingerprint", "pve_ca", "pve_insecure")


def parse_backup(
    plugin_string: str, *, node: Node | None = None
) -> tuple[BackupConfig, list[str]]:
    """Return the configuration of a backup job and warnings for its log.

    Raises:
        ConfigError: which key, which value, why.
    """
    words = plugin_words(plugin_string)
    values = _typed(words)
    warnings: list[str] = []
    connection = _connection(values, node or Node(), warnings)
    selection = Selection(
        **{f.name: _value(values, f.name) for f in dataclasses.fields(Selection)}
    )
    config = BackupConfig(
        connection,
        selection,
        _capture(values, node or Node()),
        _value(values, "mode"),
        _value(values, "backup_type"),
        _replication(values, warnings),
        _proof_order(values, words),
    )
    if config.needs_source:
        connection.check()
    if config.mode != "status" or str(selection):
        _check_selection(selection)
    else:
        config = dataclasses.replace(config, selection=Selection(all=True))
    return config, warnings


def level_warning(backup_type: str | None, level: str) -> str | None:
    """Return what to say when ``backup_type`` differs from Bacula's level letter."""
    actual = _LEVELS.get(level, level)
    if backup_type in (None, actual):
        return None
    hint = (
        "; Bacula makes a Full when it finds none to build on"
        if actual == "full"
        else ""
    )
    return (
        f"backup_type={backup_type} is not what Bacula runs: this job is {actual}"
        f"{hint}. The level is set by Level = in the Job or Schedule"
    )


def parse_restore(
    plugin_string: str,
    where: str = "",
    options_text: Sequence[str] = (),
    *,
    node: Node | None = None,
) -> RestoreConfig:
    """Return the configuration of a restore job.

    Args:
        plugin_string: as it was when the backup was made; what only a backup needs
            is not looked at, and an unknown key is a warning.
        where: the job's Where, "" when there is none.
        options_text: restore options objects (type 28), usually none or one.
        node: this node's settings, for defaults.

    Raises:
        ConfigError: which key, which value, why.
    """
    warnings: list[str] = []
    stored = _typed(_old_words(plugin_string, warnings))
    config, _ = _restore(stored, where, options_text, node or Node(), warnings)
    return config


def parse_import(
    where: str = "",
    options_text: Sequence[str] = (),
    *,
    node: Node,
    given: str = "",
) -> ImportConfig:
    """Return the configuration of an import.

    Args:
        where: the restore job's Where, "" when there is none.
        options_text: restore options objects (type 28), usually none or one.
        node: this node's settings: its ``import_options`` are the lowest layer.
        given: what the command line gave, as in a plug-in string, over those.

    Raises:
        ConfigError: which key, which value, why.
    """
    warnings: list[str] = []
    layers: dict[str, Any] = {}
    for source, text in (("import_options", node.import_options), ("", given)):
        prefix = f"{source} of the node file: " if source else ""
        try:
            words = plugin_words(f"{PLUGIN_NAME}: {text}")
        except ConfigError as error:
            raise ConfigError(f"{prefix}{error}", key=error.key) from None
        layers = _layered(layers, _typed(words, source=prefix))
    config, values = _restore(layers, where, options_text, node, warnings)
    _check_import(config, values)

    def get(key: str) -> Any:
        return _value(values, key)

    if config.storage is None and config.storage_map.default:
        config = dataclasses.replace(config, storage=config.storage_map.default)
    return ImportConfig(
        config,
        cores=get("import_cores"),
        memory_mib=get("import_memory"),
        firmware=get("import_firmware"),
        raw=get("import_raw"),
        verify=get("import_verify"),
    )


def _check_import(config: RestoreConfig, values: Mapping[str, Any]) -> None:
    """Refuse what makes no sense for a VM that has never been here."""
    for key in ("overwrite", "disks", "mode"):
        if values.get(key):
            raise ConfigError(
                f"{key} is for a VM's own backups; an import makes a new VM", key=key
            )
    if config.target == "files":
        return
    if config.vmids.pairs or config.vmids.default == "same":
        raise ConfigError(
            f"restore_vmid={config.vmids}: an import goes to one id, or to next",
            key="restore_vmid",
        )
    if config.storage_map.pairs:
        raise ConfigError(
            f"storage_map={config.storage_map}: the disks come from no storage of "
            "Proxmox VE; give restore_storage",
            key="storage_map",
        )
    if config.storage is None and config.storage_map.default is None:
        raise ConfigError(
            "an import needs restore_storage: where=/@pve/restore_storage=…, or "
            "import_options in the node file",
            key="restore_storage",
        )


def _restore(
    stored: Mapping[str, Any],
    where: str,
    options_text: Sequence[str],
    node: Node,
    warnings: list[str],
) -> tuple[RestoreConfig, Mapping[str, Any]]:
    """Lay the options of a restore over those that are stored; return both."""
    from_where = where_words(where) if is_vm_where(where) else {}
    from_menu = _menu_words(options_text)
    menu = _typed(from_menu, restore_only=True, source="restore options: ")
    given = _typed(from_where, restore_only=True, source="where=: ")
    for key in sorted(given.keys() & menu.keys()):
        if given[key] != menu[key]:
            warnings.append(
                f"{key} is given in where= and in the restore options; "
                f"where= wins: {from_where[key]}"
            )
    target, reason = _target(where, menu)
    values = _layered(_layered(stored, menu), given)
    connection = _connection(values, node, warnings)
    mode = _restore_mode(values, target, menu.keys() | given.keys())
    if target == "vm":
        connection.check()
        _check_restore(values)

    def get(key: str) -> Any:
        return _value(values, key)

    config = RestoreConfig(
        connection=connection,
        target=target,
        reason=reason,
        where=where,
        vmids=get("restore_vmid") or Mapped(),
        node=get("restore_node"),
        storage=get("restore_storage"),
        storage_map=get("storage_map"),
        bridge_map=get("bridge_map"),
        mac=get("mac"),
        uuid=get("uuid"),
        name=get("restore_name"),
        disk_format=get("disk_format"),
        start_after=get("start_after"),
        overwrite=get("overwrite"),
        disks=get("disks"),
        pool=get("restore_pool"),
        bwlimit=get("restore_bwlimit"),
        warnings=tuple(warnings),
        instant=_instant(values) if mode else None,
        prove=_prove(values) if mode == "prove" else None,
    )
    return config, values


_FOR_THE_RESTORE: Final = (
    *("restore_storage", "storage_map", "restore_pool", "ir_overlay_storage"),
    *("ir_timeout", "prove_evidence", "prove_serial", "prove_timeout"),
    *("prove_memory", "prove_report"),
)


def _proof_order(
    values: Mapping[str, Any], words: Mapping[str, str | None]
) -> ProofOrder | None:
    if _value(values, "mode") != "prove":
        return None
    options = {key: words[key] or "yes" for key in _FOR_THE_RESTORE if key in words}
    _prove(values)  # what is wrong with them is said before a job is submitted
    return ProofOrder(
        options,
        _value(values, "prove_console"),
        _value(values, "prove_client"),
        _value(values, "prove_restore_job"),
    )


def _restore_mode(
    values: Mapping[str, Any], target: str, asked: Iterable[str]
) -> str | None:
    """Return "instant" or "prove"; None: a plain restore.

    Args:
        asked: the keys given for this restore, not the FileSet's defaults.
    """
    mode = values.get("mode")
    if mode is None:
        for key in sorted(asked):
            if PARAMETERS[key].group == "ir" or key == "bwlimit":
                raise ConfigError(
                    f"{key} is for instant recovery; give mode=instant, too "
                    "(a plain restore is limited by restore_bwlimit)"
                    if key == "bwlimit"
                    else f"{key} is for mode=instant or mode=prove; give one, too",
                    key=key,
                )
        return None
    if mode not in RESTORE_MODES:
        raise ConfigError(
            f"mode={mode} is for backup jobs; a restore knows "
            f"{' and '.join(f'mode={m}' for m in RESTORE_MODES)}, or none",
            key="mode",
        )
    if target == "files":
        raise ConfigError(
            f"mode={mode} makes a VM, and where= names a directory; use where=/@pve/",
            key="mode",
        )
    for key in ("disks", "overwrite"):
        if values.get(key):
            raise ConfigError(
                f"mode={mode} makes a new VM; {key} is not possible with it", key=key
            )
    if mode == "prove":
        for key in ("restore_vmid", "start_after", "ir_auto_migrate"):
            if key in asked:
                raise ConfigError(
                    "mode=prove makes a VM for the proof alone and removes it; "
                    f"{key} has no meaning there",
                    key=key,
                )
    return str(mode)


def _instant(values: Mapping[str, Any]) -> Instant:
    bind = _value(values, "ir_nbd_bind")
    if bind is not None and not _is_loopback(bind):
        raise ConfigError(
            f"ir_nbd_bind={bind}: not a loopback address. Proxmox VE gives a VM's "
            "drive no certificates, so its disks would cross the network in plain "
            "text; the VM runs on this node: leave ir_nbd_bind out",
            key="ir_nbd_bind",
        )
    return Instant(
        overlay_storage=_value(values, "ir_overlay_storage"),
        target_storage=_value(values, "ir_target_storage"),
        auto_migrate=_value(values, "ir_auto_migrate"),
        timeout=_value(values, "ir_timeout"),
        network=_value(values, "ir_network"),
        nbd_bind=bind,
        nbd_port=_value(values, "ir_nbd_port"),
        bwlimit=_value(values, "bwlimit"),
    )


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _prove(values: Mapping[str, Any]) -> Prove:
    pattern = _value(values, "prove_serial")
    evidence = _value(values, "prove_evidence")
    if "serial" in evidence and pattern is None:
        raise ConfigError(
            f"prove_evidence={evidence} needs prove_serial, what to look for",
            key="prove_serial",
        )
    return Prove(
        evidence=evidence,
        serial=pattern,
        timeout=_value(values, "prove_timeout"),
        memory=_value(values, "prove_memory"),
        report=_value(values, "prove_report"),
    )


def parse_restore_options(text: str) -> dict[str, Any]:
    """Return the typed values of one restore options object (type 28).

    Raises:
        ConfigError: a line or a value is wrong, or a key is no restore option.
    """
    return _typed(option_words(text), restore_only=True, source="restore options: ")


def _typed(
    words: Mapping[str, str | None], *, restore_only: bool = False, source: str = ""
) -> dict[str, Any]:
    values = {}
    for key, text in words.items():
        try:
            parameter = lookup(key, restore_only=restore_only)
            values[key] = _parsed(parameter, text)
        except ConfigError as error:
            raise ConfigError(f"{source}{error}", key=key) from None
    return values


def _parsed(parameter: Parameter, text: str | None) -> Any:
    if text is not None:
        return parameter.parse(text)
    if parameter.type.bare is None:
        raise ConfigError(
            f"{parameter.name} needs a value: {parameter.name}=… "
            f"({parameter.type.explain})",
            key=parameter.name,
        )
    return parameter.parse(parameter.type.bare)


def _value(values: Mapping[str, Any], key: str) -> Any:
    return values.get(key, PARAMETERS[key].default)


def _old_words(text: str, warnings: list[str]) -> dict[str, str | None]:
    """Return what a restore needs of a plug-in string that may be years old."""
    words = {}
    for key, value in plugin_words(text).items():
        parameter = PARAMETERS.get(key)
        if parameter is None:
            warnings.append(f"the backup's plug-in string has {key}, unknown here")
        elif parameter.group in ("connection", "restore", "ir"):
            words[key] = value
    return words


def _menu_words(texts: Iterable[str]) -> dict[str, str]:
    words: dict[str, str] = {}
    for text in texts:
        for key, value in option_words(text).items():
            if words.setdefault(key, value) != value:
                raise ConfigError(
                    f"restore options: {key} has two values: {words[key]} and {value}",
                    key=key,
                )
    return words


def _target(where: str, menu: Mapping[str, Any]) -> tuple[Literal["vm", "files"], str]:
    if is_vm_where(where):
        return "vm", f"restoring to a VM, because where={where}"
    if not where.strip("/"):
        named = f"is {where}" if where else "is empty"
        return "vm", f"restoring to a VM, because where= {named}"
    wishes = [
        key
        for key in menu
        if PARAMETERS[key].group in ("restore", "ir") or key == "mode"
    ]
    if wishes:
        return (
            "vm",
            f"restoring to a VM, because the restore options set {', '.join(wishes)}; "
            f"where={where} is not used",
        )
    return (
        "files",
        f"restoring to files, because where={where} and no restore option is set; "
        "where=/@pve/ restores to a VM",
    )


def _layered(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """Return both, ``upper`` winning; a credential replaces another as a whole."""
    kept = dict(lower)
    if upper.keys() & {"pve_token_id", "pve_user"}:
        for key in _CREDENTIALS:
            kept.pop(key, None)
    for stem in ("pve_token_secret", "pve_password"):
        family = {stem, f"{stem}_file", f"{stem}_cmd"}
        if upper.keys() & family:
            for key in family:
                kept.pop(key, None)
    if upper.keys() & set(_TRUST):
        for key in _TRUST:
            kept.pop(key, None)
    if "restore_storage" in upper:
        # A new place for everything must not be half undone by an old map.
        kept.pop("storage_map", None)
    return kept | dict(upper)


def _connection(
    values: Mapping[str, Any], node: Node, warnings: list[str]
) -> Connection:
    token_secret = _secret_source(values, "pve_token_secret", warnings)
    password = _secret_source(values, "pve_password", warnings)
    token_id, user = values.get("pve_token_id"), values.get("pve_user")
    if token_id and user:
        raise ConfigError(
            "pve_token_id and pve_user are two ways to log in; give one", key="pve_user"
        )
    if token_secret and not token_id:
        raise ConfigError(
            f"{token_secret.key} needs pve_token_id", key=token_secret.key
        )
    if password and not user:
        raise ConfigError(f"{password.key} needs pve_user", key=password.key)
    fingerprints = _value(values, "pve_fingerprint")
    insecure = _value(values, "pve_insecure")
    if insecure and fingerprints:
        warnings.append("pve_insecure=yes has no effect: pve_fingerprint is checked")
        insecure = False
    elif insecure:
        warnings.append(
            "pve_insecure=yes: the API's certificate is not checked, so the credential "
            "may reach a stranger; pin it with pve_fingerprint (pveplug pin HOST)"
        )
    return Connection(
        host=values.get("pve_host") or node.pve_host,
        port=values.get("pve_port") or node.pve_port,
        node=values.get("pve_node") or node.pve_node or _own_name(),
        fingerprints=fingerprints,
        ca_file=values.get("pve_ca"),
        insecure=insecure,
        timeout_s=_value(values, "pve_timeout"),
        token_id=token_id,
        user=user,
        secret=token_secret or password,
    )


def _own_name() -> str:
    return socket.gethostname().partition(".")[0]


def _secret_source(
    values: Mapping[str, Any], stem: str, warnings: list[str]
) -> SecretSource | None:
    given = [key for key in (stem, f"{stem}_file", f"{stem}_cmd") if key in values]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)}: give one of them", key=given[1])
    if not given:
        return None
    key = given[0]
    if key == stem:
        warnings.append(
            f"{stem} is stored in the catalogue and on volumes; use {stem}_file"
        )
        return SecretSource(key, Origin.INLINE, Secret(values[key]))
    origin = Origin.FILE if key.endswith("_file") else Origin.COMMAND
    return SecretSource(key, origin, values[key])


def _check_selection(selection: Selection) -> None:
    named = [key for key in ("vmid", "name", "pool", "tag") if getattr(selection, key)]
    if selection.all and named:
        raise ConfigError(
            f"all=yes takes every VM of the node already; remove {' and '.join(named)} "
            "or all",
            key="all",
        )
    if not selection.all and not named:
        raise ConfigError(
            "no VM is selected: give vmid, name, pool, tag, or all=yes", key="vmid"
        )


def _replication(values: Mapping[str, Any], warnings: list[str]) -> Replication | None:
    mode = _value(values, "mode")
    given = [key for key in values if PARAMETERS[key].group == "dr"]
    if mode == "instant":
        raise ConfigError(
            "mode=instant is for a restore: where=/@pve/mode=instant", key="mode"
        )
    if mode in ("backup", "prove"):
        if given:
            raise ConfigError(
                f"{given[0]} is for disaster recovery, and mode=backup is none; give "
                "its mode, seed or incremental as a rule",
                key=given[0],
            )
        return None
    if "dr_host" not in values:
        raise ConfigError(
            f"mode={mode} needs dr_host{_NO_LEVEL.get(mode, '')}", key="dr_host"
        )
    pair = [key for key in ("dr_auth_cert", "dr_auth_key") if key in values]
    if len(pair) == 1 or (pair and "dr_auth_ca" not in values):
        raise ConfigError(
            "mutual TLS needs dr_auth_cert, dr_auth_key and dr_auth_ca", key=pair[0]
        )
    token = _secret_source(values, "dr_auth_token", warnings)
    if token is None and not pair:
        raise ConfigError(
            "no credential for the receiver: give dr_auth_token_file, or dr_auth_cert, "
            "dr_auth_key and dr_auth_ca",
            key="dr_auth_token",
        )
    if _value(values, "dr_unplanned") and _value(values, "dr_final_sync"):
        raise ConfigError(
            "dr_final_sync needs the source, and dr_unplanned says that it is lost",
            key="dr_final_sync",
        )
    peer = Peer(
        values["dr_host"],
        _value(values, "dr_port"),
        token,
        values.get("dr_auth_cert"),
        values.get("dr_auth_key"),
        values.get("dr_auth_ca"),
        _value(values, "dr_peer_fingerprint"),
        _value(values, "dr_bwlimit"),
    )
    told = {
        spec.name: _value(values, spec.name)
        for spec in dataclasses.fields(Replication)
        if spec.name != "peer"
    }
    told["dr_vmid_map"] = told["dr_vmid_map"] or Mapped()
    return Replication(peer, **told)


def _capture(values: Mapping[str, Any], node: Node) -> Capture:
    if "fleecing_storage" in values and "scratch_dir" in values:
        raise ConfigError(
            "fleecing_storage and scratch_dir are two places for the scratch images; "
            "give one",
            key="scratch_dir",
        )
    if "post_thaw_cmd" in values and "pre_freeze_cmd" not in values:
        raise ConfigError(
            "post_thaw_cmd runs when pre_freeze_cmd ran; give that, too",
            key="post_thaw_cmd",
        )
    taken = {f.name: _value(values, f.name) for f in dataclasses.fields(Capture)}
    taken["scratch_dir"] = taken["scratch_dir"] or node.scratch_dir
    return Capture(**taken)


def _check_restore(values: Mapping[str, Any]) -> None:
    if values.get("disks"):
        for key in ("overwrite", "restore_name", "restore_pool", "start_after"):
            if values.get(key):
                raise ConfigError(
                    f"{key} is for a whole VM; disks={','.join(values['disks'])} "
                    "only attaches disks to an existing one",
                    key=key,
                )
    elif values.get("overwrite") and not values.get("restore_vmid"):
        raise ConfigError(
            "overwrite=yes needs restore_vmid: same, or the id to overwrite",
            key="overwrite",
        )
