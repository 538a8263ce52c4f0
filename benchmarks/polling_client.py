"""
The measured side of :mod:`polling`: one process that waits for many jobs as Airflow's triggerer does.

Each trigger is a task that iterates ``trigger.run()`` to its first event; all of them share one event loop.
(To measure a single trigger many times at once, a process can have many loops with one trigger each.) As in
the triggerer, each task has a greenback portal and log lines are formatted as JSON; they are discarded.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import resource
import threading
import time
from typing import TYPE_CHECKING, Any

import greenback
import pendulum
from airflow.providers.anthropic.triggers.batch import AnthropicBatchTrigger
from airflow.providers.dbt.cloud.triggers.dbt import DbtCloudRunJobTrigger
from airflow.providers.http.triggers.http import HttpSensorTrigger
from airflow.sdk.log import configure_logging, reset_logging
from airflow.triggers.base import TriggerEvent
from fivetran_provider_async.hooks import FivetranHookAsync
from fivetran_provider_async.triggers import FivetranTrigger
from polling_server import job_id

from airflow_provider_heygen.triggers.overdub import HeyGenOverdubTrigger

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from multiprocessing.connection import Connection

    from airflow.triggers.base import BaseTrigger

FOREVER = 10**8
PROBE = 0.01
"""Seconds that the probe of the event loop sleeps; any longer sleep is a stall."""


class IdleTrigger(HeyGenOverdubTrigger):
    """A trigger that does nothing: the cost of the object and its task."""

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Sleep; only the first one, which warms up, ends."""
        await asyncio.sleep(0 if self.overdub_id == job_id(0) else FOREVER)
        yield TriggerEvent(True)


def make(kind: str, number: int, interval: float) -> BaseTrigger:
    """Return the trigger that waits for a job, with defaults for all that is not named here."""
    end = time.time() + FOREVER
    if kind == "http":
        return HttpSensorTrigger(f"http/{number}", "bench", poke_interval=interval)
    if kind == "dbt":
        return DbtCloudRunJobTrigger("bench", number, end, interval, account_id=1)
    if kind == "fivetran":
        # As FivetranSensor does: it has looked on the worker when the connector completed last.
        before = pendulum.datetime(2026, 1, 1)
        return FivetranTrigger("task", str(number), "bench", before, poke_interval=interval)
    if kind == "anthropic":
        return AnthropicBatchTrigger("bench", str(number), interval, end)
    ours = IdleTrigger if kind == "idle" else HeyGenOverdubTrigger
    return ours(heygen_conn_id="bench", overdub_id=job_id(number), poke_interval=interval, deadline=end)


def connection(kind: str, port: int, extra: dict[str, Any]) -> dict[str, Any]:
    """Return the Airflow connection to the server."""
    url = f"https://localhost:{port}"
    if kind == "dbt":
        return {"conn_type": "dbt_cloud", "host": f"localhost:{port}", "login": "1", "password": "secret"}
    if kind == "fivetran":
        FivetranHookAsync.api_host = f"localhost:{port}"  # no setting leads away from api.fivetran.com
        return {"conn_type": "fivetran", "login": "key", "password": "secret"}
    if kind == "http":
        return {"conn_type": "http", "host": url}
    return {"conn_type": kind, "host": url, "password": "secret", "extra": extra}


def succeeded(payload: Any) -> bool:
    """Check whether an event reports that the job completed."""
    return payload is True or payload.get("status") in ("success", "completed")


class Waits:
    """All waits of the process, and what was measured about them."""

    def __init__(self, case: dict[str, Any], schedule: dict[str, float]) -> None:
        self._case, self.schedule = case, schedule
        self.ended: dict[int, float] = {}
        self.wrong: list[str] = []
        self.stalls: list[float] = []
        self.started = 0

    def start(self) -> None:
        """Start the event loops; each loop has its share of the triggers."""
        loops = self._case["loops"]
        for first in range(loops):
            numbers = range(1 + first, self._case["n"] + 1, loops)
            threading.Thread(target=asyncio.run, args=[self._loop(numbers)], daemon=True).start()

    async def _loop(self, numbers: range) -> None:
        probe = asyncio.create_task(self._probe())
        tasks = []
        for number in numbers:
            turn = (number - 1) / self._case["n"] * self.schedule["join_seconds"]
            pause = self.schedule["join"] + turn - time.monotonic()
            if pause > 0:
                await asyncio.sleep(pause)
            trigger = make(self._case["kind"], number, self._case["interval"])
            tasks.append(asyncio.create_task(self._wait(number, trigger)))
            self.started += 1
        await asyncio.gather(*tasks, probe)

    async def _wait(self, number: int, trigger: BaseTrigger) -> None:
        payload = await first_event(trigger)
        self.ended[number] = time.monotonic()
        if not succeeded(payload):
            self.wrong.append(repr(payload)[:500])

    async def _probe(self) -> None:
        while True:
            # Not while CPU is counted: with few triggers the probe would be most of it.
            if self.schedule.get("hold", FOREVER) <= time.monotonic() + PROBE < self.schedule["finish"]:
                await asyncio.sleep(self.schedule["finish"] - time.monotonic())
            begin = time.monotonic()
            await asyncio.sleep(PROBE)
            self.stalls.append(time.monotonic() - begin - PROBE)


async def first_event(trigger: BaseTrigger) -> Any:
    """Wait for a trigger as the triggerer does."""
    await greenback.ensure_portal()
    async for event in trigger.run():
        return event.payload
    return None


def rss() -> int:
    """Return the resident memory of this process in bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def sleep_until(at: float) -> None:
    """Sleep until a time of the monotonic clock."""
    time.sleep(max(0.0, at - time.monotonic()))


def run(case: dict[str, Any], port: int, pipe: Connection) -> None:
    """Be the process of one case: get warm, say so, take the schedule, send what was measured."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    reset_logging()
    configure_logging(json_output=True, output=open(os.devnull, "wb"), sending_to_supervisor=True)  # noqa: SIM115
    os.environ["AIRFLOW_CONN_BENCH"] = json.dumps(connection(case["kind"], port, case["extra"]))

    # The first wait pays for what all share (imports at first use, certificates, provider look-ups).
    payload = asyncio.run(first_event(make(case["kind"], 0, case["interval"])))
    if not succeeded(payload):
        raise SystemExit(f"{case['kind']} does not get along with the server: {payload}")
    # Airflow's own modules are a million objects. Looking through them stalls whoever allocates.
    gc.collect()
    gc.freeze()
    pipe.send("warm")
    schedule = pipe.recv()
    waits = Waits(case, schedule)
    before = rss()
    waits.start()
    schedule |= pipe.recv()

    sleep_until(schedule["hold"])
    started, cpu = waits.started, time.process_time()
    held = []
    for step in range(1, 6):
        sleep_until(schedule["hold"] + (schedule["finish"] - schedule["hold"]) * step / 5)
        held.append(rss() - before)
    cpu = time.process_time() - cpu

    while time.monotonic() < schedule["end"] and len(waits.ended) < schedule["finishing"]:
        time.sleep(0.1)
    pipe.send(
        {
            "started": started,
            "cpu": cpu,
            "memory": sorted(held)[len(held) // 2],
            "ended": waits.ended,
            "end": time.monotonic(),
            "wrong": waits.wrong,
            "stalls": waits.stalls,
        }
    )
    os._exit(0)  # what still runs is in threads and tasks that nobody needs any more
