# SPDX-License-Identifier: Apache-2.0
"""One cycle of a receiver in a process of its own, to be killed.

``python -m tests.support.dr_child FILE``: the file holds what to connect to, and the
source, pickled by :func:`save`.
"""

from __future__ import annotations

import asyncio
import pickle
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pveplug.dr.provision import Site
from pveplug.dr.store import ReplicaStore
from pveplug.node import load_node
from pveplug.proto.pve_login import Endpoint, TokenAuth
from pveplug.pve import PveApi
from pveplug.pve_local import PveLocal
from tests.support.dr_sender import Sender, Source


@dataclass
class Task:
    """What a child is to do."""

    mode: str
    source: Source
    node_toml: Path
    port: int
    fingerprint: str
    token_id: str
    secret: str
    options: dict[str, Any]

    async def run(self) -> None:
        node = load_node(self.node_toml)
        endpoint = Endpoint("127.0.0.1", self.port, fingerprints=(self.fingerprint,))
        async with PveApi(endpoint, TokenAuth(self.token_id, self.secret)) as api:
            site = Site(node, api, PveLocal(node), node.pve_node, **self.options)
            sender = Sender(ReplicaStore(node.state_dir), site, self.source)
            await (sender.seed() if self.mode == "seed" else sender.increment())


if __name__ == "__main__":
    task = pickle.loads(Path(sys.argv[1]).read_bytes())
    asyncio.run(task.run())
