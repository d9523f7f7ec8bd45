# SPDX-License-Identifier: Apache-2.0
"""The judge: what proves a boot, what ends it, and what proves nothing."""

from __future__ import annotations

import functools
import json

import pytest

from pveplug.errors import ConfigError
from pveplug.proving.judge import (
    ENDED,
    MAX_RESETS,
    PAUSED_S,
    STUCK_LOOKS,
    Judge,
    Look,
    Screen,
)
from pveplug.proving.picture import Picture
from pveplug.proving.processors import Activity
from pveplug.proving.report import (
    ChainMember,
    Subject,
    as_json,
    as_text,
    log_lines,
    summary,
)
from pveplug.proving.screentext import columns_of, joined, read_text
from pveplug.proving.verdict import (
    Evidence,
    Found,
    Outcome,
    Screenshot,
    Verdict,
    Wanted,
)
from tests.support.screens import drawn, recorded

AGENT, SERIAL, SCREEN = Evidence.AGENT, Evidence.SERIAL, Evidence.SCREEN
FIRMWARE, KERNEL, ALIVE = Activity.FIRMWARE, Activity.KERNEL, Activity.ALIVE
POST = drawn("SeaBIOS (version 1.16.3)\n\nBooting from Hard Disk...")
LOADER = drawn("Loading Linux 6.1 ...\nLoading initial ramdisk ...")
LOGIN = drawn("Debian GNU/Linux 12 web tty1\n\nweb login: " + "." * 20)


def wanted(*kinds: Evidence, every: bool = True) -> Wanted:
    return Wanted(frozenset(kinds), every, "login:", 300, stable_s=10)


def look(picture: Picture | None, activity: Activity | None = ALIVE) -> Look:
    return Look("running", activity, screen(picture) if picture else None)


@functools.lru_cache(maxsize=20)
def screen(picture: Picture) -> Screen:
    lines = read_text(picture)
    return Screen(picture, lines, joined(lines, columns_of(picture)))


def watched(*looks: tuple[float, Look], judge: Judge | None = None) -> Judge:
    judge = judge or Judge(wanted(SCREEN))
    for now, one in looks:
        judge.looked(now, one)
    return judge


def why_not(judge: Judge) -> str:
    """The reason of a judge whose time is up."""
    assert judge.decision is None, judge.decision
    judge.time_is_up()
    assert judge.decision
    assert judge.decision[0] is Outcome.NOT_PROVEN
    return judge.decision[1]


def failed(judge: Judge) -> str:
    assert judge.decision
    assert judge.decision[0] is Outcome.FAILED
    return judge.decision[1]


# --- evidence -------------------------------------------------------------------------


def test_an_agent_that_answers_proves_it() -> None:
    judge = Judge(wanted(AGENT))
    judge.agent_answered(12.0)
    assert judge.decision == (
        Outcome.PASSED,
        "the guest agent answers after 12.0 s",
    )


def test_all_that_is_wanted_must_come() -> None:
    judge = Judge(wanted(AGENT, SERIAL))
    judge.serial_matched(5.0, "web login: ")
    assert judge.decision is None
    judge.agent_answered(12.0)
    assert judge.decision
    assert judge.decision[0] is Outcome.PASSED
    assert "web login:" in judge.decision[1]


def test_the_first_is_enough_where_any_is_asked_for() -> None:
    judge = Judge(wanted(AGENT, SERIAL, SCREEN, every=False))
    judge.serial_matched(5.0, "web login: ")
    assert judge.decision
    assert judge.decision[0] is Outcome.PASSED


def test_evidence_nobody_asked_for_decides_nothing_and_is_kept() -> None:
    judge = Judge(wanted(AGENT))
    judge.serial_matched(5.0, "web login: ")
    assert judge.decision is None
    assert [one.kind for one in judge.found] == [SERIAL]
    assert why_not(judge).endswith("the guest agent did not answer")


def test_a_login_screen_that_stays_proves_it() -> None:
    judge = watched(
        (1, look(POST, FIRMWARE)),
        (4, look(LOADER, KERNEL)),
        (8, look(LOGIN)),
        (12, look(LOGIN, KERNEL)),
        (18, look(LOGIN)),
    )
    assert judge.decision == (
        Outcome.PASSED,
        "an operating system's screen was stable for 10.0 s after 18.0 s",
    )


def test_a_recorded_console_of_linux_proves_it() -> None:
    console = recorded("linux-console")
    judge = watched(
        (1, look(recorded("seabios-no-bootable-device"), None)),
    )
    assert judge.decision, "the words fail it whoever drew them"
    judge = watched(
        (1, look(POST, FIRMWARE)),
        (2, look(POST, KERNEL)),
        (3, look(console)),
        (13, look(console)),
    )
    assert judge.decision
    assert judge.decision[0] is Outcome.PASSED


# --- what proves nothing --------------------------------------------------------------


@pytest.mark.parametrize(
    ("picture", "activity", "reason"),
    [
        (recorded("uefi-shell"), FIRMWARE, "firmware or of a boot loader"),
        (drawn("whatever it is " * 4), FIRMWARE, "firmware or of a boot loader"),
        (drawn("whatever it is " * 4), None, "doesn't tell what the processors do"),
        (drawn("whatever it is " * 4), KERNEL, "as after a panic"),
        (drawn(""), ALIVE, "blank"),
        (LOADER, ALIVE, "what firmware and boot loader left"),
        (POST, ALIVE, "what firmware and boot loader left"),
        (recorded("qemu-no-display"), ALIVE, "what firmware and boot loader left"),
    ],
)
def test_a_stable_screen_alone_proves_nothing(
    picture: Picture, activity: Activity | None, reason: str
) -> None:
    judge = watched(
        (1, look(POST, FIRMWARE)),
        *((float(now), look(picture, activity)) for now in range(2, 100)),
    )
    assert reason in why_not(judge)


def test_a_picture_the_loader_left_proves_nothing_though_nobody_can_read_it() -> None:
    logo = Picture(64, 64, bytes(range(256)) * 48)
    judge = watched(
        (1, look(POST, FIRMWARE)),
        *((float(now), look(logo, ALIVE)) for now in range(2, 100)),
    )
    assert "left" in why_not(judge)


def test_a_screen_that_changes_proves_nothing() -> None:
    judge = watched(
        (1, look(POST, FIRMWARE)),
        *(
            (float(now), look(drawn(f"[ {now}.0 ] scanning " * 3)))
            for now in range(2, 60)
        ),
    )
    assert "still changes" in why_not(judge)


def test_no_screen_proves_nothing_and_says_why() -> None:
    judge = watched((1, look(None)))
    judge.no_screen("there is no picture of the screen: no VGA")
    assert why_not(judge).endswith("no VGA")


def test_firmware_at_the_end_is_said() -> None:
    judge = watched((1, look(POST, FIRMWARE)), judge=Judge(wanted(AGENT)))
    assert why_not(judge).endswith("no operating system has started")


def test_a_kernel_that_is_stuck_at_the_end_is_said() -> None:
    looks = ((float(now), look(LOGIN, KERNEL)) for now in range(STUCK_LOOKS + 1))
    assert why_not(watched(*looks)).endswith("the kernel looks stuck")


# --- what ends it ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["seabios-no-bootable-device", "grub-prompt", "linux-panic"]
)
def test_words_of_failure_on_the_screen_end_it_at_once(name: str) -> None:
    judge = watched((1, look(recorded(name), FIRMWARE)), judge=Judge(wanted(AGENT)))
    assert failed(judge).endswith("(screen)")


def test_words_of_failure_on_the_console_end_it_at_once() -> None:
    judge = Judge(wanted(AGENT))
    judge.serial_line("Booting from Hard Disk...")
    assert judge.decision is None
    judge.serial_line("grub rescue> ")
    assert failed(judge) == 'GRUB waits at its prompt: "grub rescue>" (serial console)'


@pytest.mark.parametrize("status", ENDED)
def test_a_vm_that_ended_fails(status: str) -> None:
    assert failed(watched((1, Look(status)))) == ENDED[status]


@pytest.mark.parametrize("status", ["io-error", "paused", "prelaunch", "suspended"])
def test_a_vm_that_stands_still_fails_after_a_while(status: str) -> None:
    judge = watched((1, Look(status)), (PAUSED_S, Look(status)))
    assert judge.decision is None
    judge.looked(PAUSED_S + 1, Look(status))
    assert status in failed(judge)


def test_a_pause_that_ends_is_none() -> None:
    judge = watched(
        (1, Look("io-error")),
        (15, look(LOGIN)),
        (16, Look("io-error")),
        (PAUSED_S + 2, Look("io-error")),
    )
    assert judge.decision is None


def test_one_restart_is_allowed_and_a_loop_is_not() -> None:
    judge = Judge(wanted(SCREEN))
    for at in range(MAX_RESETS):
        assert judge.decision is None
        watched(
            (10.0 * at, look(POST, FIRMWARE)),
            (10.0 * at + 5, look(LOGIN)),
            judge=judge,
        )
    watched((100.0, look(POST, FIRMWARE)), judge=judge)
    assert "restarts again and again" in failed(judge)


def test_after_a_restart_the_screen_is_counted_anew() -> None:
    judge = watched(
        (1, look(POST, FIRMWARE)),
        (2, look(LOADER, KERNEL)),
        (3, look(LOGIN)),
        (12, look(POST, FIRMWARE)),
        (13, look(LOADER, KERNEL)),
        (14, look(LOGIN)),
        (20, look(LOGIN)),
    )
    assert judge.decision is None
    judge.looked(24, look(LOGIN))
    assert judge.decision


def test_the_first_decision_stands() -> None:
    judge = Judge(wanted(AGENT))
    judge.vm_ended()
    judge.agent_answered(1.0)
    assert judge.decision == (Outcome.FAILED, "the VM ended before its guest was up")


# --- what is asked for ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"evidence": frozenset()}, "prove_evidence"),
        ({"evidence": frozenset({SERIAL})}, "prove_serial"),
        ({"evidence": frozenset({SERIAL}), "serial": "("}, "prove_serial"),
        ({"evidence": frozenset({SERIAL}), "serial": ".*"}, "prove_serial"),
        ({"evidence": frozenset({SERIAL}), "serial": "a" * 500}, "prove_serial"),
        ({"evidence": frozenset({AGENT}), "timeout_s": 0}, "prove_timeout"),
    ],
)
def test_what_could_never_be_proven_is_refused(
    arguments: dict[str, object], key: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        Wanted(**arguments)  # type: ignore[arg-type]
    assert caught.value.key == key


# --- reports --------------------------------------------------------------------------

SUBJECT = Subject(
    vmid=100,
    name="web",
    job="web-backup",
    chain=(ChainMember(41, "F", "web.1"), ChainMember(57, "I", "web.2")),
    started="2026-03-14T03:15:00+01:00",
    ended="2026-03-14T03:16:10+01:00",
    proved_as=9001,
    restore_s=8.5,
)
VERDICT = Verdict(
    outcome=Outcome.FAILED,
    reason="the kernel panics",
    wanted=wanted(AGENT, SERIAL),
    found=(Found(SCREEN, 3.25, "stable"),),
    seconds=61.5,
    screenshot=Screenshot("/run/x/screen.png", "ab" * 32, 720, 400, ("panic\x1b[2J",)),
    notes=("memory capped",),
    first_lines=("Linux version",),
    last_lines=("end Kernel panic",),
)


def test_the_first_line_of_the_log_says_it_all() -> None:
    lines = log_lines(SUBJECT, VERDICT)
    assert lines[0] == summary(SUBJECT, VERDICT)
    assert lines[0] == (
        "prove VM 100 (web), web-backup JobId 41, 57: FAILED: the kernel panics"
    )
    assert "evidence screen after 3.2 s: stable (not asked for)" in lines
    assert any("ab" * 32 in line for line in lines)
    assert "serial: end Kernel panic" in lines
    assert all(line.isprintable() for line in lines)


def test_the_report_has_what_an_auditor_asks_for() -> None:
    value = json.loads(as_json(SUBJECT, VERDICT, "a.png"))
    assert value["format"] == "pveplug-prove-1"
    assert value["verdict"] == "failed"
    assert [one["jobid"] for one in value["chain"]] == [41, 57]
    assert value["wanted"]["evidence"] == ["agent", "serial"]
    assert value["evidence"] == [
        {"kind": "screen", "after_seconds": 3.25, "what": "stable"}
    ]
    assert value["screenshot"]["sha256"] == "ab" * 32
    assert value["screenshot"]["file"] == "a.png"
    assert value["serial"]["last_lines"] == ["end Kernel panic"]


def test_the_report_to_read_has_no_escape_and_names_the_chain() -> None:
    text = as_text(SUBJECT, VERDICT, "a.png")
    assert "web-backup JobId 41, 57" in text
    assert "\x1b" not in text
    assert "wanted:       agent and serial, within 300 s" in text


def test_reports_have_names_that_are_files() -> None:
    assert SUBJECT.file_name == "100-20260314T0315000100"
