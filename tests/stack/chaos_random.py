"""Many overdubs while something dies every few seconds, by a seed that is printed."""

from __future__ import annotations

import random
import signal
import time
from typing import TYPE_CHECKING, Any

import pytest

from stack.airflow import NOTICES_SOON, Stack, kill_worker
from stack.chaos import OVERDUBS, SEED, Chaos, rage
from stack.rest import wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stack.chaos import Dubs

SERVERS = ("honours", "ignores")
# One API server handles the heartbeats of all tasks; with more tasks at a time it does little else.
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
        stack.start("dubs", "dubs_patient")
        yield chaos


@pytest.fixture
def chaos(_chaos: Chaos) -> Chaos:
    _chaos.reset()
    return _chaos


class Storm:
    """The blows to a run of ``dubs``."""

    def __init__(self, chaos: Chaos, dubs: Dubs, dice: random.Random) -> None:
        self.chaos, self.dubs, self.dice = chaos, dubs, dice

    def deal(self, kind: str) -> bool:
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
    # A kill or the death of a component of Airflow may cost a retry, and no task may run out of retries.
    dubs = chaos.dubs(
        (
            {"heygen_conn_id": SERVERS[index % 2], "deferrable": dice.random() < 0.7}
            for index in range(OVERDUBS)
        ),
        "dubs_patient",
    )
    began = time.monotonic()
    dealt = rage(dubs, dice, BLOWS, Storm(chaos, dubs, dice).deal, pause=(1, 3))
    for name in SERVERS:
        chaos.servers[name].clear_faults()
    report = dubs.report()
    with capsys.disabled():
        print(f"\nStorm, seed {SEED}, {time.monotonic() - began:.0f} s, {dealt.total()} blows:")
        print(f"  {dict(dealt)}\n  {report}\n  raised: {dict(dubs.raised())}")
    assert report.jobs == report.tasks
    assert not report.wrong
    assert not report.orphans


def test_without_durable_there_are_duplicates(chaos: Chaos, capsys: pytest.CaptureFixture[str]) -> None:
    """Without the store there are more: the count shows the difference."""
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
