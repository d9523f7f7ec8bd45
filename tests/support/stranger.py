# SPDX-License-Identifier: Apache-2.0
"""A site of the lab as a stranger sees it: its API without our client, its programs."""

from __future__ import annotations

import asyncio
import subprocess
from typing import Any

import aiohttp

from tests.lab.site import Site


class Client:
    """As much of an API client as a stranger would write."""

    def __init__(self, site: Site, headers: dict[str, str] | None = None) -> None:
        self.site = site
        self.headers = headers
        if headers is None:
            self.headers = {"Authorization": f"PVEAPIToken={site.token}"}
        pin = bytes.fromhex(site.fingerprint.replace(":", ""))
        self._ssl = aiohttp.Fingerprint(pin)

    async def __call__(
        self, method: str, path: str, **data: Any
    ) -> tuple[int, str, Any]:
        """Return status, text (``message`` or reason) and the body."""
        url = f"{self.site.url}/api2/json{path}"
        async with (
            aiohttp.ClientSession(headers=self.headers) as session,
            session.request(method, url, ssl=self._ssl, data=data or None) as answer,
        ):
            body = await answer.json(content_type=None)
            text = body.get("message", answer.reason).rstrip("\n")
            if answer.status != 200:
                assert " ".join(text.split()) == answer.reason
            return answer.status, text, body

    async def task(self, method: str, path: str, **data: Any) -> str:
        """Start a task and return its exit status."""
        status, text, body = await self(method, path, **data)
        assert status == 200, text
        upid = body["data"]
        where = f"/nodes/{upid.split(':')[1]}/tasks/{upid}"
        for _ in range(1200):
            state = (await self("GET", f"{where}/status"))[2]["data"]
            if state["status"] == "stopped":
                log = (await self("GET", f"{where}/log?limit=0"))[2]["data"]
                expected = state["exitstatus"]
                good = expected == "OK" or expected.startswith("WARNINGS")
                mark = "TASK " if good else "TASK ERROR: "
                assert log[-1]["t"] == mark + expected
                return str(expected)
            await asyncio.sleep(0.05)
        raise AssertionError(f"{upid} does not end")


def root(site: Site) -> Client:
    """A client with root's ticket."""
    ticket = site.auth.ticket("root@pam", site.root_password)
    return Client(
        site,
        {
            "Cookie": f"PVEAuthCookie={ticket['ticket']}",
            "CSRFPreventionToken": ticket["CSRFPreventionToken"],
        },
    )


async def program(site: Site, name: str, *argv: str) -> tuple[int, str]:
    """Run one of the node's programs; return status and all it said."""
    process = await asyncio.create_subprocess_exec(
        str(site.root / "usr/sbin" / name), *argv,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    out, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode()
