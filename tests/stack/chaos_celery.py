"""Many overdubs through few slots on CeleryExecutor, while its parts die, by a seed that is printed."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING

import pytest

from stack.airflow import NOTICES_SOON, Stack
from stack.chaos import OVERDUBS, SEED, Chaos, rage

if TYPE_CHECKING:
    from collections.abc import Iterator

BLOWS = {"worker": 1, "triggerer": 1, "scheduler": 1, "Redis": 1}


@pytest.fixture(scope="module")
def chaos(postgres: None, redis: None) -> Iterator[Chaos]:
    with Stack(postgres=True, celery=True, settings=NOTICES_SOON) as stack:
        chaos = Chaos(stack)
        chaos.add_server("narrow", concurrent_jobs=10, retry_after=10, job_seconds=25)
        stack.start("dubs_patient")
        yield chaos


def test_overdubs_through_10_slots(chaos: Chaos, capsys: pytest.CaptureFixture[str]) -> None:
    """A create request that gets 429 waits without a worker, and no death of a process fails it."""
    dice = random.Random(SEED)

    def deal(kind: str) -> bool:
        chaos.stack.wait_until_up()  # on a busy machine nothing would ever be up otherwise
        if kind == "Redis":
            assert chaos.stack.redis
            chaos.stack.redis.cut(down=dice.uniform(0, 5))
        else:
            chaos.stack.restart_part(kind if kind == "scheduler" else f"{kind}-{dice.randint(1, 2)}")
        return True

    began = time.monotonic()
    dubs = chaos.dubs(({"heygen_conn_id": "narrow"} for _ in range(OVERDUBS)), "dubs_patient")
    dealt = rage(dubs, dice, BLOWS, deal, pause=(22, 28))
    report = dubs.report(patience=900)
    turned_away = sum(request["status"] == 429 for request in chaos.servers["narrow"].requests("POST"))
    starts, cpu = chaos.stack.worker_starts(), chaos.stack.worker_cpu_seconds()
    with capsys.disabled():
        print(
            f"\nCelery, 10 slots, seed {SEED}, {time.monotonic() - began:.0f} s:\n  {dict(dealt)}\n  {report}"
        )
        print(f"  {turned_away} creates turned away by 429; {cpu / OVERDUBS:.1f} CPU s of worker per overdub")
        if starts:  # Airflow 3.1 does not log them
            print(f"  {len(starts)} starts of a worker, each {sum(starts) / len(starts):.2f} s")
    assert turned_away
    # Airflow itself may fail a try when a component of it dies; the provider must not.
    assert not dubs.raised()
    assert report.jobs == report.tasks
    assert not report.wrong
    assert not report.orphans
