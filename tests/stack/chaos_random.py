"""
Many overdubs while something dies every few seconds, by a seed that is printed.

``STACK_SEED`` repeats a run: the same blows in the same order, though not at the same microsecond.
``STACK_OVERDUBS`` is the number of overdubs, 200 by default.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from stack.airflow import NOTICES_SOON, Stack, kill_worker
from stack.chaos import Chaos, Dubs
from stack.rest import wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

SEED = int(os.environ.get("STACK_SEED", random.SystemRandom().randrange(10**6)))
OVERDUBS = int(os.environ.get("STACK_OVERDUBS", "200"))
SERVERS = ("honours", "ignores")
# One API server answers the heartbeats of all; with more tasks at a time it does little else.
AT_A_TIME = {"AIRFLOW__CORE__MAX_ACTIVE_TASKS_PER_DAG": "16"}
BLOWS = {
    "kill worker": 12,
    "worker's machine dies": 3,
    "kill triggerer": 2,
    "kill scheduler": 1,
    "kill API server": 1,
    "create: answer lost": 4,
    "create: held back": 4,
    "500": 2,
    "429": 2,
    "HTML": 2,
    "connection drops": 2,
    "silence": 1,
}


@pytest.fixture(scope="module")
def _chaos(postgres: None) -> Iterator[Chaos]:
    with Stack(postgres=True, settings=NOTICES_SOON | AT_A_TIME) as stack:
        chaos = Chaos(stack)
        for name in SERVERS:
            chaos.add_server(name, idempotency=name == "honours", job_seconds=8)
        chaos.add_server("narrow", concurrent_jobs=10, retry_after=10, job_seconds=15)
        stack.start("dubs", "dubs_patient")
        yield chaos


@pytest.fixture
def chaos(_chaos: Chaos) -> Chaos:
    _chaos.reset()
    return _chaos


class Storm:
    """Deals blows until stopped."""

    def __init__(self, chaos: Chaos, dubs: Dubs, dice: random.Random) -> None:
        self.chaos, self.dubs, self.dice = chaos, dubs, dice
        self.dealt: Counter[str] = Counter()

    def rage(self) -> None:
        deck = self.dice.sample(list(BLOWS), len(BLOWS))  # each once, then by weight
        # The last few are left in peace, or it would never end for them.
        while sum(self._ended()) < 0.95 * len(self.dubs.names):
            time.sleep(self.dice.uniform(1, 3))
            kind = deck.pop() if deck else self.dice.choices(list(BLOWS), list(BLOWS.values()))[0]
            if self._deal(kind):
                self.dealt[kind] += 1
            else:
                deck.insert(0, kind)  # there was nobody to hit
        for name in SERVERS:
            self.chaos.servers[name].clear_faults()

    def _ended(self) -> list[bool]:
        states = self.dubs.run.states()
        return [states.get(name) in ("success", "failed") for name in self.dubs.names]

    def _deal(self, kind: str) -> bool:
        stack = self.chaos.stack
        server = self.chaos.servers[self.dice.choice(SERVERS)]
        if kind in ("kill worker", "worker's machine dies"):
            victims = sorted(self.dubs.pids().values())
            return bool(victims) and kill_worker(
                self.dice.choice(victims), stack.home, supervisor=kind != "kill worker"
            )
        if kind == "kill triggerer":
            stack.restart_part("triggerer")
        elif kind == "kill scheduler":
            stack.restart_part("scheduler")
        elif kind == "kill API server":
            stack.restart_part("api-server", down=3)
        elif kind == "silence":
            server.process.send_signal(signal.SIGSTOP)
            time.sleep(8)
            server.process.send_signal(signal.SIGCONT)
        else:
            few = self.dice.randint(1, 4)
            faults: dict[str, dict[str, Any]] = {
                "create: answer lost": {"method": "POST", "drop": "after", "count": few},
                "create: held back": {"method": "POST", "latency": 6, "count": few},
                "500": {"status": 500, "count": few * 5},
                "429": {"status": 429, "headers": {"Retry-After": "2"}, "count": few * 5},
                "HTML": {"html": True, "count": few * 5},
                "connection drops": {"drop": "before", "count": few * 5},
            }
            server.add_fault("/v3/.*", **faults[kind])
        return True


def test_overdubs_in_a_storm(chaos: Chaos, capsys: pytest.CaptureFixture[str]) -> None:
    dice = random.Random(SEED)
    # A kill costs a retry, and so may the death of a part of Airflow. Nobody shall run out of them by that.
    dubs = chaos.dubs(
        (
            {"heygen_conn_id": SERVERS[index % 2], "deferrable": dice.random() < 0.7}
            for index in range(OVERDUBS)
        ),
        "dubs_patient",
    )
    began = time.monotonic()
    storm = Storm(chaos, dubs, dice)
    storm.rage()
    report = dubs.report()
    with capsys.disabled():
        print(f"\nStorm, seed {SEED}, {time.monotonic() - began:.0f} s, {storm.dealt.total()} blows:")
        print(f"  {dict(storm.dealt)}\n  {report}")
    assert report.jobs == report.tasks
    assert not report.wrong
    assert not report.orphans


def test_without_durable_there_are_duplicates(chaos: Chaos, capsys: pytest.CaptureFixture[str]) -> None:
    """The count can tell the difference."""
    for name in SERVERS:
        chaos.servers[name].add_fault("/v3/overdubs", method="POST", latency=60, count=5)
    dubs = chaos.dubs({"heygen_conn_id": SERVERS[index % 2], "durable": False} for index in range(10))
    wait_for("the jobs", dubs.all_created)
    for pid in dubs.pids().values():
        kill_worker(pid, chaos.stack.home)
    report = dubs.report()
    with capsys.disabled():
        print(f"\nWorkers killed with durable=False:\n  {report}")
    assert report.jobs > report.tasks
    assert report.orphans


def test_overdubs_through_10_slots(chaos: Chaos, capsys: pytest.CaptureFixture[str]) -> None:
    """A 429 on create is waiting, not failing, and waiting holds no worker."""
    began, said = time.monotonic(), len(chaos.stack.output("scheduler"))
    dubs = chaos.dubs({"heygen_conn_id": "narrow"} for _ in range(OVERDUBS))
    report = dubs.report(patience=900)
    turned_away = sum(request["status"] == 429 for request in chaos.servers["narrow"].requests("POST"))
    workers = chaos.stack.worker_seconds(since=said)
    with capsys.disabled():
        print(f"\n{OVERDUBS} overdubs through 10 slots, {time.monotonic() - began:.0f} s:\n  {report}")
        print(
            f"  turned away by 429: {turned_away} times; a start of a worker took {workers:.2f} s on average,"
        )
        print(f"  so {turned_away * workers:.0f} worker-seconds went into asking again, none into waiting")
    assert turned_away
    # Airflow itself may fail a try, on a machine as busy as this one: what matters is that ours did not.
    assert not dubs.raised()
    assert report.jobs == report.tasks
    assert not report.wrong
