"""
Cost of a night of overdubs on an account with few slots: with the queue, with a pool, with neither.

    python benchmarks/queueing.py [--plot PATH] [--celery N]

A model on a virtual clock: the operator, the triggers, the poller and its queue are the real ones, while
HeyGen, Airflow's scheduler and its workers are simulated. N mapped deferrable tasks start at once. HeyGen
runs S jobs at a time, returns 429 with ``Retry-After`` above that, and lists them. Jobs of other products,
which no list shows, may occupy some slots. A start of a task occupies a worker for 0.53 s (observed on
Airflow 3.3.2), and a task whose trigger has fired starts a second later, if a worker is free.

- **creates**: create requests per overdub; 1 is ideal.
- **starts**: starts of a worker per overdub; 2 is ideal.
- **makespan**: until the last overdub has ended, over N / S x the length of a job.
- **order**: the largest number of places by which a task was overtaken.

``--celery N`` runs N tasks on a real Airflow with CeleryExecutor, two workers and two triggerers, once with
ten slots and once with as many as there are tasks. Like ``make test-stack`` it needs PostgreSQL and Redis.

*Pool* is Airflow's, with S slots and ``include_deferred``. *No queue* is the same provider whose tasks only
wait for ``Retry-After`` (at least 15 s).
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
import json
import os
import random
import selectors
import sys
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

START = 0.53
SCHEDULING = 1.0
EPOCH = 1_800_000_000.0


class _Jump(selectors.SelectSelector):
    def select(self, timeout: float | None = None) -> Any:
        self.loop.now += max(0.0, timeout or 0.0)
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next moment at which something happens."""

    def __init__(self) -> None:
        self.now = 0.0
        selector = _Jump()
        selector.loop = self
        super().__init__(selector)

    def time(self) -> float:
        """Return the virtual time."""
        return self.now


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    n: int = 500
    slots: int = 10
    job: float = 600.0
    triggerers: int = 1
    workers: int = 32
    hidden: int = 0
    retry_after: int = 10
    how: str = "queue"
    ceiling: int | None = None


@dataclass
class Account:
    """HeyGen, with a ceiling and a list."""

    case: Case
    loop: VirtualLoop
    ends: list[tuple[float, str]] = field(default_factory=list)
    jobs: dict[str, float] = field(default_factory=dict)
    creates: Counter[int] = field(default_factory=Counter)
    requests: int = 0

    def create(self) -> str | None:
        """Create a job if there is a free slot."""
        now = self.loop.now
        while self.ends and self.ends[0][0] <= now:
            heapq.heappop(self.ends)
        self.creates["all"] += 1
        if len(self.ends) >= self.case.slots - self.case.hidden:
            return None
        overdub_id = f"od_{len(self.jobs)}"
        self.jobs[overdub_id] = now + self.case.job
        heapq.heappush(self.ends, (self.jobs[overdub_id], overdub_id))
        return overdub_id

    def row(self, overdub_id: str) -> dict[str, Any]:
        """Return a job as HeyGen shows it."""
        done = self.jobs[overdub_id] <= self.loop.now
        row = {"id": overdub_id, "status": "completed" if done else "running", "title": None}
        created_at = EPOCH + self.jobs[overdub_id] - self.case.job
        return row | {
            "duration": 1.0,
            "callback_id": None,
            "created_at": created_at,
            "failure_message": None,
        }

    def respond(self, path: str, params: Any) -> Any:
        """Return the response to a GET of a job, or of a page of the list, newest first."""
        self.requests += 1
        if path.count("/") > 2:
            return {"data": self.row(path.rpartition("/")[2])}
        first = int(params.get("token", 0))
        ids = list(self.jobs)[::-1]
        more = (
            {"has_more": True, "next_token": str(first + 100)}
            if first + 100 < len(ids)
            else {"has_more": False}
        )
        return {"data": [self.row(overdub_id) for overdub_id in ids[first : first + 100]]} | more


def simulate(case: Case, seed: int = 1) -> dict[str, float]:
    """Run one case; return the figures of its line."""
    from airflow.providers.common.compat.sdk import TaskDeferred

    from airflow_provider_heygen import api, dubbing, poller, submitter, waiting
    from airflow_provider_heygen.connection import HeyGenConnection
    from airflow_provider_heygen.exceptions import HeyGenTransientError
    from airflow_provider_heygen.hooks import heygen
    from airflow_provider_heygen.operators.overdub import HeyGenCreateOverdubOperator
    from airflow_provider_heygen.triggers import overdub as triggers

    random.seed(seed)
    loop = VirtualLoop()
    account = Account(case, loop)
    clock = SimpleNamespace(time=lambda: EPOCH + loop.now, monotonic=lambda: loop.now, sleep=None)

    def send(*_: Any, **__: Any) -> str:
        if (overdub_id := account.create()) is None:
            raise HeyGenTransientError("429", status_code=429, retry_after=float(case.retry_after))
        return overdub_id

    class Hook:
        resource = "overdubs"

        def __init__(self, conn_id: str, **_: Any) -> None:
            self.settings = HeyGenConnection(
                conn_id=conn_id,
                base_url="https://x.y",
                credential="k",
                max_concurrent_jobs=case.ceiling,
            )

        async def asettings(self) -> Any:
            return self.settings

        def assume_resource(self, name: str | None) -> None:
            pass

        async def __aenter__(self) -> Any:
            return self

        async def __aexit__(self, *_: object) -> None:
            pass

        async def asend(self, call: Any) -> Any:
            await asyncio.sleep(0.1)
            call = call.under(self.resource)
            body = json.dumps(account.respond(call.path, call.params)).encode()
            return call.parse(200, {}, body, self.settings)

    class Store:
        def __init__(self) -> None:
            self.kept: dict[str, Any] = {}
            self.get, self.set = self.kept.get, self.kept.__setitem__

    operator = HeyGenCreateOverdubOperator(
        task_id="dub", video="https://e.com/a.mp4", audio="https://e.com/a.mp3", deferrable=True, timeout=7200
    )
    workers = asyncio.Semaphore(case.workers)
    pool = asyncio.Semaphore(case.slots - case.hidden if case.how == "pool" else case.n)
    order: list[int] = []
    figures: Counter[str] = Counter()

    async def fire(trigger: Any) -> Any:
        path, arguments = trigger.serialize()
        if path.endswith("DateTimeTrigger"):
            await asyncio.sleep(max(0.0, trigger.moment.timestamp() - EPOCH - loop.now))
            return None
        arguments["heygen_conn_id"] = f"heygen_{random.randrange(case.triggerers)}"  # a poller each
        async for event in getattr(triggers, path.rpartition(".")[2])(**arguments).run():
            return event.payload
        return None

    async def task(number: int) -> None:
        await asyncio.sleep(number * 0.01)
        store, method, kwargs = Store(), "execute", {}
        ti = SimpleNamespace(
            dag_id="d", run_id="r", task_id="dub", map_index=number, try_number=1, max_tries=3,
            start_date=None, xcom_push=lambda **_: None,
        )  # fmt: skip
        context = {
            "ti": ti,
            "dag_run": SimpleNamespace(start_date=datetime.now(UTC)),
            "task_state_store": store,
        }
        async with pool:
            while True:
                async with workers:
                    await asyncio.sleep(START)
                    figures["starts"] += 1
                    before = len(account.jobs)
                    try:
                        getattr(operator, method)(context, **kwargs)
                        return
                    except TaskDeferred as deferred:
                        trigger, method = deferred.trigger, deferred.method_name
                        kwargs = deferred.kwargs or {}
                    except Exception as error:
                        figures["failed"] += 1
                        print(f"failed: {error}", file=sys.stderr)
                        return
                    if len(account.jobs) > before:
                        order.append(number)
                event = await fire(trigger)
                kwargs = {**kwargs, "event": event}
                await asyncio.sleep(SCHEDULING)

    async def no_queue(_: str, __: float, pause: float, **___: Any) -> None:
        await asyncio.sleep(max(0.0, pause))

    async def main() -> None:
        await asyncio.gather(*map(task, range(case.n)))

    with ExitStack() as patches:
        for module in (api, dubbing, submitter, waiting, triggers):
            patches.enter_context(mock.patch.object(module, "time", clock))
        patches.enter_context(mock.patch.object(heygen.HeyGenHook, "_send", send))
        patches.enter_context(mock.patch.object(poller, "HeyGenHook", Hook))
        if case.how == "no queue":
            patches.enter_context(mock.patch.object(poller, "queue", no_queue))
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(main())
    ideal = case.n / (case.slots - case.hidden) * case.job
    places = {number: place for place, number in enumerate(order)}
    return {
        "creates": account.creates["all"] / case.n,
        "starts": figures["starts"] / case.n,
        "makespan": loop.now / ideal,
        "order": max((place - number for number, place in places.items()), default=0),
        "requests": account.requests / (loop.now / 60),
        "failed": figures["failed"],
    }


CASES = [
    Case(),
    Case(triggerers=2),
    Case(triggerers=4),
    Case(hidden=3),
    Case(ceiling=10),
    Case(how="pool"),
    Case(how="no queue"),
    Case(n=100, job=60.0, triggerers=2),
]


def celery(n: int, slots: int = 10, job: float = 60.0) -> None:
    """Run tasks on a real Airflow, with few slots and with enough."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
    from stack.airflow import Stack
    from stack.chaos import Chaos

    with Stack(postgres=True, celery=True) as stack:
        chaos = Chaos(stack)
        chaos.add_server("few", concurrent_jobs=slots, retry_after=10, job_seconds=job)
        chaos.add_server("enough", concurrent_jobs=n, retry_after=10, job_seconds=job)
        stack.start("dubs")
        for name in ("enough", "few"):
            cpu, starts, began = stack.worker_cpu_seconds(), len(stack.worker_starts()), time.monotonic()
            dubs = chaos.dubs({"heygen_conn_id": name} for _ in range(n))
            report = dubs.report(patience=n / slots * job * 3 + 300)
            took = time.monotonic() - began
            posts = chaos.servers[name].requests("POST")
            print(
                f"Celery, N {n}, {name} slots: creates {len(posts) / n:.2f},"
                f" starts {(len(stack.worker_starts()) - starts) / n:.2f},"
                f" worker CPU {(stack.worker_cpu_seconds() - cpu) / n:.2f} s per overdub, {took:.0f} s"
                f" ({took / (n / slots * job):.2f} of the ideal of {slots} slots)\n  {report}",
                flush=True,
            )


def plot(path: Path) -> None:
    """Draw the creates per overdub over N, with and without the queue."""
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for how in ("queue", "no queue"):
        # Without the queue, 500 tasks take a quarter of an hour of computing.
        numbers = (20, 50, 100, 200, 500) if how == "queue" else (20, 50, 100, 200)
        found = [simulate(Case(n=n, how=how, triggerers=2))["creates"] for n in numbers]
        axis.plot(numbers, found, marker="o", label=f"with the {how}" if how == "queue" else how)
    axis.set(xlabel="tasks on 10 slots", ylabel="create requests per overdub", yscale="log")
    axis.legend()
    axis.grid(alpha=0.3)
    figure.savefig(path)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.strip().partition("\n")[0])
    parser.add_argument(
        "--plot", type=Path, metavar="PATH", help="creates per overdub over N (needs matplotlib)"
    )
    parser.add_argument("--celery", type=int, metavar="N", help="run N tasks on a real Airflow instead")
    arguments = parser.parse_args()
    if arguments.celery:
        celery(arguments.celery)
        return
    print(f"{'':44} {'creates':>8} {'starts':>7} {'makespan':>9} {'order':>6} {'req/min':>8} {'failed':>7}")
    for case in CASES:
        said = ", ".join(
            f"{name} {value}" for name, value in vars(case).items() if value != getattr(Case, name)
        )
        figures = simulate(case)
        print(
            f"{said or 'N 500, S 10, jobs of 600 s':44} {figures['creates']:8.2f} {figures['starts']:7.2f}"
            f" {figures['makespan']:9.3f} {figures['order']:6} {figures['requests']:8.1f}"
            f" {figures['failed']:7}",
            flush=True,
        )
    if arguments.plot:
        plot(arguments.plot)


if __name__ == "__main__":
    os.environ["AIRFLOW_CONN_HEYGEN_DEFAULT"] = json.dumps({"conn_type": "heygen", "password": "k"})
    os.environ.setdefault("AIRFLOW__LOGGING__LOGGING_LEVEL", "ERROR")
    main()
