"""What arrives at a StatsD: real datagrams, on loopback. From all of Airflow in `stack/test_failures.py`."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from contextlib import suppress
from importlib import import_module
from types import SimpleNamespace

import pytest
from airflow.providers.common.compat.sdk import AirflowSkipException, TaskDeferred
from airflow_task import StateStore, Task
from conftest import HAS_STATE_STORE, STATS_ARE_SET_UP, StatsD
from statsd import StatsClient
from test_exactly_once import dub, finish
from test_sensor import ALL_MODES, wait

from airflow_provider_heygen import metrics
from airflow_provider_heygen.exceptions import HeyGenError, HeyGenOverdubFailedError, HeyGenTaskFailedError
from airflow_provider_heygen.hooks.heygen import HeyGenHook
from airflow_provider_heygen.waiting import resolve_wait


class Broken(StatsClient):
    """A client that cannot send, in place of Airflow's own."""

    def incr(self, *_, **__):
        raise OSError("no route")

    timing = incr


def set_up() -> None:
    """Set up Airflow's metrics again from its settings, as the start of a worker or a triggerer does."""
    if not STATS_ARE_SET_UP:
        from airflow.metrics import statsd_logger
        from airflow.stats import Stats

        type(Stats).factory, Stats.instance = statsd_logger.get_statsd_logger, None
        return
    for home in ("airflow.sdk.observability", "airflow.observability"):
        factory = import_module(f"{home}.metrics.stats_utils").get_stats_factory
        stats = import_module(f"{home}.stats").Stats
        if HAS_STATE_STORE:
            stats.initialize(factory=factory(), export_legacy_names=False)
        else:  # Airflow 3.2
            stats.initialize(factory=factory(stats))


def counts(statsd) -> Counter[str]:
    """Return the counters that have arrived since, but the poller's, and how often each timer has."""
    found = Counter()
    for name, _, value, kind in statsd.take():
        if name != "heygen.polls":
            found[name.removeprefix("heygen.overdubs.")] += int(value) if kind == "c" else 1
    return found


@pytest.fixture
def statsd(monkeypatch):
    listening = StatsD()
    for name, value in {
        "STATSD_ON": "True",
        "STATSD_HOST": "127.0.0.1",
        "STATSD_PORT": str(listening.port),
        "STATSD_INFLUXDB_ENABLED": "True",
        "METRICS_ALLOW_LIST": "heygen",
    }.items():
        monkeypatch.setenv(f"AIRFLOW__METRICS__{name}", value)
    metrics._warn_once.cache_clear()
    set_up()
    yield listening
    listening.close()


@pytest.mark.parametrize("deferrable", [True, False])
def test_a_create(heygen, statsd, deferrable):
    heygen.behaviour.job_seconds = 2
    task = Task(dub(deferrable=deferrable), store=StateStore())
    finish(task, task.start())
    found = statsd.take()
    tags = {"dag_id": "dag", "task_id": "task"}
    ours = [(name, seen, kind) for name, seen, _, kind in found if name != "heygen.polls"]
    assert ours == [
        ("heygen.overdubs.submitted", tags, "c"),
        ("heygen.overdubs.completed", tags, "c"),
        ("heygen.overdubs.wait", tags | {"status": "completed"}, "ms"),
    ]
    (took,) = [value for name, _, value, _ in found if name == "heygen.overdubs.wait"]
    assert 1000 < took < 10_000
    polls = [(seen, value) for name, seen, value, _ in found if name == "heygen.polls"]
    assert polls == ([({"conn_id": "heygen_default"}, 1)] * len(polls) if deferrable else [])
    assert bool(polls) == deferrable


def test_each_request_of_the_poller_is_counted(heygen, statsd):
    heygen.behaviour.job_seconds = 2
    deferred = Task(dub(deferrable=True), store=StateStore()).start()
    before = len(heygen.requests)
    heygen.fail_next(method="GET", status=500, count=2)
    asyncio.run(anext(deferred.trigger.run()))
    polls = [name for name, *_ in statsd.take() if name == "heygen.polls"]
    assert len(polls) == len(heygen.requests) - before > 2


@pytest.mark.parametrize("deferrable", [True, False])
def test_an_overdub_that_fails(heygen, statsd, deferrable):
    heygen.behaviour.fail_jobs = 1
    heygen.behaviour.job_seconds = 0.3
    task = Task(dub(deferrable=deferrable), store=StateStore())
    with pytest.raises(HeyGenTaskFailedError):
        finish(task, task.start())
    assert counts(statsd) == {"submitted": 1, "failed": 1, "wait": 1}


@pytest.mark.parametrize("store", [True, False], ids=["state store", "no state store"])
def test_a_retry_that_reattaches(heygen, statsd, store):
    heygen.behaviour.job_seconds = 0.4
    task = Task(dub(timeout=0.1), store=StateStore() if store else None)
    with pytest.raises(HeyGenError, match="Timed out waiting"):
        task.start()
    assert counts(statsd) == {"submitted": 1}
    task.make = dub()
    task.start()
    assert counts(statsd) == {"reattached": 1, "completed": 1, "wait": 1}


def test_a_create_that_does_not_wait(heygen, statsd):
    Task(dub(wait_for_completion=False), store=StateStore()).start()
    assert counts(statsd) == {"submitted": 1}


def test_a_rejected_create_request_is_not_counted(heygen, statsd, pauses):
    heygen.fail_next(method="POST", status=402)
    with pytest.raises(HeyGenError):
        Task(dub(), store=StateStore()).start()
    heygen.fail_next(method="POST", status=503, count=2)
    Task(dub(wait_for_completion=False), store=StateStore()).start()
    assert counts(statsd) == {"submitted": 1}


@pytest.fixture
def overdub_id(heygen):
    heygen.behaviour.job_seconds = 0.4
    return HeyGenHook().create_overdub({"video": "https://x.y/v.mp4", "audio": "https://x.y/a.mp3"})


@ALL_MODES
def test_a_sensor(heygen, overdub_id, statsd, mode):
    wait(overdub_id, mode)
    found = statsd.take()
    assert sum(value for name, _, value, _ in found if name == "heygen.overdubs.completed") == 1
    (took,) = [value for name, _, value, _ in found if name == "heygen.overdubs.wait"]
    assert 200 < took < 5000


@ALL_MODES
@pytest.mark.parametrize("soft_fail", [True, False])
def test_a_sensor_of_one_that_fails(heygen, statsd, mode, soft_fail):
    heygen.behaviour.fail_jobs = 1
    heygen.behaviour.job_seconds = 0.3
    overdub_id = HeyGenHook().create_overdub({"video": "https://x.y/v.mp4", "audio": "https://x.y/a.mp3"})
    with pytest.raises(AirflowSkipException if soft_fail else HeyGenTaskFailedError):
        wait(overdub_id, mode, soft_fail=soft_fail)
    assert counts(statsd) == {"failed": 1, "wait": 1}


@pytest.mark.parametrize("status", ["completed", "failed"])
def test_an_end_found_late_is_counted(heygen, overdub_id, statsd, status):
    heygen.force(overdub_id, status, "Too dark")
    event = {"overdub_id": overdub_id, "status": "timeout", "message": "The time is over."}
    wait = metrics.WaitMetrics(SimpleNamespace(dag_id="dag", task_id="task"), time.time() - 9)
    with suppress(HeyGenOverdubFailedError):
        resolve_wait(event, wait, HeyGenHook())
    assert counts(statsd) == {status: 1, "wait": 1}


@pytest.mark.parametrize("broken", ["incr", "__init__"])
def test_a_broken_client_fails_nothing(heygen, statsd, monkeypatch, caplog, broken):
    def refuse(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr(Broken, broken, refuse)
    monkeypatch.setenv("AIRFLOW__METRICS__STATSD_CUSTOM_CLIENT_PATH", "test_metrics.Broken")
    set_up()
    heygen.behaviour.job_seconds = 0.3
    task = Task(dub(deferrable=True), store=StateStore())
    outcome = task.start()
    assert isinstance(outcome, TaskDeferred)
    assert finish(task, outcome) == heygen.jobs[0].id
    assert caplog.text.count("Metrics of HeyGen are lost (OSError: no route)") == 1
