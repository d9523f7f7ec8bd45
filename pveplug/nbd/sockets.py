# SPDX-License-Identifier: Apache-2.0
"""What NBD sockets are set to, on either side."""

from __future__ import annotations

import contextlib
import socket
from typing import Final

_SO_SNDBUFFORCE: Final = 32  # asm-generic/socket.h; Python has no name for it


def widen(sock: socket.socket, size: int) -> bool:
    """Give a UNIX socket a send buffer of ``size`` bytes; say if it has at least half.

    Beyond the system's bound (net.core.wmem_max, usually 208 KiB) only root may go. A
    peer that reads what is there while we do something else needn't wait for us.
    """
    for option in (_SO_SNDBUFFORCE, socket.SO_SNDBUF):
        with contextlib.suppress(PermissionError):
            sock.setsockopt(socket.SOL_SOCKET, option, size)
            break
    # The kernel doubles it, for what it keeps beside the bytes.
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) >= size
