# SPDX-License-Identifier: Apache-2.0
"""Send buffers: as root what is asked for, else what the system allows."""

from __future__ import annotations

import socket

from pveplug.nbd.sockets import widen


class _Socket:
    """A socket of one who isn't root, on a system with a bound."""

    def __init__(self, bound):
        self.size, self.bound = 212992, bound

    def setsockopt(self, level, option, size):
        if option == 32:
            raise PermissionError(1, "Operation not permitted")
        assert (level, option) == (socket.SOL_SOCKET, socket.SO_SNDBUF)
        self.size = 2 * min(size, self.bound)

    def getsockopt(self, level, option):
        assert (level, option) == (socket.SOL_SOCKET, socket.SO_SNDBUF)
        return self.size


def test_who_is_not_root_gets_what_the_system_allows():
    small = _Socket(212992)
    assert not widen(small, 4 << 20)
    assert small.size == 2 * 212992
    assert widen(_Socket(4 << 20), 4 << 20)


def test_a_real_socket_is_widened():
    left, right = socket.socketpair()
    with left, right:
        before = left.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        widen(left, 4 << 20)
        assert left.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) > before
