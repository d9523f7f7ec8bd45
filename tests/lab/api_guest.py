# SPDX-License-Identifier: Apache-2.0
"""Calls about the guest agent and the monitor of a VM."""

from __future__ import annotations

import base64
from typing import Any

from . import lifecycle
from .api_vm import VM
from .errors import die, forbidden
from .http import Call, route
from .relay import QmpRefused

AGENT = f"{VM}/agent"


# -- guest agent and monitor


async def _agent(call: Call, command: str, timeout_s: float, **arguments: Any) -> Any:
    await lifecycle.require_agent(call.site, call.node, call.vmid)
    machine = call.site.machine(call.vmid, call.node)
    try:
        return await machine.agent(command, timeout_s=timeout_s, **arguments)
    except TimeoutError:
        raise die(
            f"VM {call.vmid} qga command '{command}' failed - got timeout"
        ) from None
    except QmpRefused as error:
        raise die(f"Agent error: {error}") from error


@route(
    "POST",
    f"{AGENT}/ping",
    need="VM.GuestAgent.Audit VM.GuestAgent.Unrestricted",
    need_8="VM.Monitor",
    any=True,
)
async def ping(call: Call) -> Any:
    return {"result": await _agent(call, "guest-ping", 3)}


FREEZE = "VM.GuestAgent.FileSystemMgmt VM.GuestAgent.Unrestricted"


@route("POST", f"{AGENT}/fsfreeze-freeze", need=FREEZE, need_8="VM.Monitor", any=True)
async def freeze(call: Call) -> Any:
    limit = 600.0 if call.site.release.startswith("9") else 3600.0
    return {"result": await _agent(call, "guest-fsfreeze-freeze", limit)}


@route("POST", f"{AGENT}/fsfreeze-thaw", need=FREEZE, need_8="VM.Monitor", any=True)
async def thaw(call: Call) -> Any:
    return {"result": await _agent(call, "guest-fsfreeze-thaw", 180)}


@route(
    "POST",
    f"{AGENT}/fsfreeze-status",
    need=f"VM.GuestAgent.Audit {FREEZE}",
    need_8="VM.Monitor",
    any=True,
)
async def freeze_status(call: Call) -> Any:
    return {"result": await _agent(call, "guest-fsfreeze-status", 10)}


@route(
    "POST",
    f"{AGENT}/exec",
    "command=array! input-data=str<=65536",
    need="VM.GuestAgent.Unrestricted",
    need_8="VM.Monitor",
)
async def execute(call: Call) -> Any:
    path, *arguments = call.params["command"]
    more: dict[str, Any] = {}
    if data := call.params.get("input-data"):
        more["input_data"] = base64.b64encode(data.encode()).decode()
    return await _agent(
        call, "guest-exec", 10, path=path, arg=arguments, capture_output=True, **more
    )


@route(
    "GET",
    f"{AGENT}/exec-status",
    "pid=int!",
    need="VM.GuestAgent.Unrestricted",
    need_8="VM.Monitor",
)
async def execute_status(call: Call) -> Any:
    result = await _agent(call, "guest-exec-status", 10, pid=call.params["pid"])
    for key in ("out-data", "err-data"):
        if key in result:
            result[key] = base64.b64decode(result[key]).decode("utf-8", "replace")
    result["exited"] = int(result["exited"])
    return result


@route(
    "POST",
    f"{VM}/monitor",
    "command=str!",
    need="Sys.Audit Sys.Modify",
    need_8="VM.Monitor",
    any=True,
)
async def monitor(call: Call) -> Any:
    line = call.params["command"]
    if call.user != "root@pam" and not line.startswith(("info", "help")):
        if not call.site.auth.has(call.user, "/", "Sys.Modify"):
            raise forbidden("/", "Sys.Modify")
    try:
        return await call.site.machine(call.vmid, call.node).hmp(line)
    except TimeoutError:
        raise die(
            f"VM {call.vmid} qmp command 'human-monitor-command' failed - got timeout"
        ) from None
