# SPDX-License-Identifier: Apache-2.0
"""Looking out for the next request: how long, when not, and who may end it."""

from __future__ import annotations

import asyncio
import os
import socket
import time

import pytest
import uvloop

from pveplug.nbd.polling import MOST_SKIPPED, Lookout, worth_polling


@pytest.fixture(params=[asyncio.SelectorEventLoop, uvloop.new_event_loop])
def loop(request):
    loop = request.param()
    yield loop
    loop.close()


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def watched(loop, sock):
    """Have the loop watch ``sock``, as a transport has it, and return the lookout."""
    loop.add_reader(sock, lambda: None)
    loop.run_until_complete(asyncio.sleep(0))  # uvloop tells the kernel when it polls
    return Lookout(loop, sock.fileno())


def test_a_request_that_is_there_is_seen_at_once(loop, pair):
    ours, theirs = pair
    lookout = watched(loop, ours)
    theirs.send(b"x")
    assert all(lookout.look() for _ in range(10))


def test_a_client_that_lets_us_wait_is_polled_for_ever_less_often(
    loop, pair, monkeypatch
):
    lookout = watched(loop, pair[0])
    waits = []

    def now():
        waits.append(None)
        return len(waits)  # a second each time

    monkeypatch.setattr(time, "perf_counter", now)
    replies = 20 * MOST_SKIPPED
    assert not any(lookout.look() for _ in range(replies))
    assert len(waits) / 2 < 10 + replies / MOST_SKIPPED


def test_after_a_request_that_came_in_time_it_is_polled_again(loop, pair):
    ours, theirs = pair
    lookout = watched(loop, ours)
    for _ in range(100):
        lookout.look()
    theirs.send(b"x")
    while not lookout.look():
        pass
    ours.recv(1)
    assert not lookout.look()  # polled in vain
    theirs.send(b"x")
    assert not lookout.look()  # one reply without
    assert lookout.look()


def test_another_clients_event_ends_it(pair):
    loop = uvloop.new_event_loop()
    other, sender = socket.socketpair()
    with other, sender:
        loop.add_reader(other, lambda: None)
        lookout = watched(loop, pair[0])
        sender.send(b"x")
        assert lookout.look()
    loop.close()


@pytest.mark.parametrize(("processors", "worth"), [({3}, False), ({1, 5}, True)])
def test_one_processor_is_left_to_the_client(monkeypatch, processors, worth):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: processors)
    assert worth_polling() is worth
