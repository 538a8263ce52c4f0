"""Workers, Airflow's parts and HeyGen die at the worst moments; the emulators count what it costs."""

from __future__ import annotations

import json
import signal
import time
from typing import TYPE_CHECKING, Any

import pytest
from conftest import needs_state_store

from stack.airflow import NOTICES_SOON, Stack, end, kill_worker
from stack.chaos import Chaos
from stack.rest import wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stack.chaos import Dubs

# One server that honours Idempotency-Key, one that ignores it.
SERVERS = ("honours", "ignores")
OUTAGES: dict[str, list[dict[str, Any]]] = {
    "500": [{"status": 500}],
    "429": [{"status": 429, "headers": {"Retry-After": "3"}}],
    "html": [{"html": True, "status": 502}],
    "resets": [{"drop": "after", "method": "POST"}, {"drop": "before"}],
    "silence": [],
}


@pytest.fixture(scope="module")
def _chaos(postgres: None) -> Iterator[Chaos]:
    with Stack(postgres=True, settings=NOTICES_SOON) as stack:
        chaos = Chaos(stack)
        for name in SERVERS:
            chaos.add_server(name, idempotency=name == "honours")
            for outage in OUTAGES:
                chaos.add_server(f"{name}_{outage}", idempotency=name == "honours", job_seconds=20)
        stack.start("dubs", "dubs_patient")
        yield chaos


@pytest.fixture
def chaos(_chaos: Chaos) -> Chaos:
    _chaos.reset()
    return _chaos


def everywhere(**entry: Any) -> list[dict[str, Any]]:
    """One entry for each server, worker-bound and deferred."""
    return [
        {"heygen_conn_id": server, "deferrable": deferrable, **entry}
        for server in SERVERS
        for deferrable in (False, True)
    ]


def each_server(chaos: Chaos) -> list[Any]:
    return [chaos.servers[name] for name in SERVERS]


def posts(chaos: Chaos, status: int | None = None) -> int:
    found = [request for server in each_server(chaos) for request in server.requests("POST")]
    return sum(status in (None, request["status"]) for request in found)


def kill_all(chaos: Chaos, pids: dict[str, int], *, machine: bool = False) -> None:
    for pid in pids.values():
        assert kill_worker(pid, chaos.stack.home, supervisor=machine)


def deleted(dubs: Dubs) -> list[str]:
    return [job["id"] for jobs in dubs.jobs().values() for job in jobs if job["deleted"]]


def test_killed_before_the_request_takes_effect(chaos: Chaos) -> None:
    for server in each_server(chaos):
        server.add_fault("/v3/overdubs", method="POST", count=2, drop="before", latency=60)
    dubs = chaos.dubs(everywhere())
    wait_for("the requests", lambda: posts(chaos) >= 4)
    kill_all(chaos, dubs.pids())
    dubs.check()


@pytest.mark.parametrize("machine", [False, True], ids=["process", "machine"])
def test_killed_after_the_job_was_created_and_before_the_response(chaos: Chaos, machine: bool) -> None:
    for server in each_server(chaos):
        server.add_fault("/v3/overdubs", method="POST", count=2, latency=60)
    dubs = chaos.dubs(everywhere())
    wait_for("the jobs", dubs.all_created)
    kill_all(chaos, dubs.pids(), machine=machine)
    dubs.check()


def test_killed_before_a_slow_server_creates_the_job(chaos: Chaos) -> None:
    """The job comes into being when its client is long dead, while the next try is already looking for it."""
    for server in each_server(chaos):
        server.behave(create_latency=8)
    dubs = chaos.dubs(everywhere())
    wait_for("the requests", lambda: posts(chaos) >= 4)
    kill_all(chaos, dubs.pids())
    for server in each_server(chaos):
        server.behave(create_latency=0)  # for later requests
    dubs.check()


@needs_state_store
def test_killed_after_the_response_and_before_it_is_stored(chaos: Chaos) -> None:
    for server in each_server(chaos):
        server.add_fault("/v3/overdubs", method="POST", count=2, latency=5)
    dubs = chaos.dubs(everywhere())
    wait_for("the jobs", dubs.all_created)
    pids = dubs.pids()
    # Nothing can be stored while Airflow's API server stands still.
    chaos.stack.freeze_part("api-server")
    try:
        wait_for("the answers", lambda: posts(chaos, 200) == 4)
        time.sleep(0.5)
        kill_all(chaos, pids)
        records = [
            json.loads(row["value"])
            for row in chaos.stack.tables()["task_state_store"]
            if row["run_id"] == dubs.run.run_id
        ]
        assert [(record["sent"], record["overdub_id"]) for record in records] == [(True, None)] * 4
    finally:
        chaos.stack.thaw_part("api-server")
    dubs.check()


def test_killed_while_waiting(chaos: Chaos) -> None:
    for server in each_server(chaos):
        server.behave(job_seconds=15)
    dubs = chaos.dubs(entry for entry in everywhere() if not entry["deferrable"])
    wait_for("the jobs", dubs.all_created)
    time.sleep(2)
    kill_all(chaos, dubs.pids())
    dubs.check()


def test_an_interrupted_run_returns_what_an_undisturbed_run_returns(chaos: Chaos) -> None:
    undisturbed = chaos.dubs(everywhere())
    undisturbed.check()
    for server in each_server(chaos):
        server.add_fault("/v3/overdubs", method="POST", count=2, latency=60)
    disturbed = chaos.dubs(everywhere())
    wait_for("the jobs", disturbed.all_created)
    kill_all(chaos, disturbed.pids())
    disturbed.check()
    own = ("overdub_id", "title", "callback_id", "created_at")
    for name in undisturbed.names:
        expected, found = undisturbed.run.xcoms(name), disturbed.run.xcoms(name)
        job_id = disturbed.jobs()[name][0]["id"]
        assert found["return_value"] == found["overdub_id"] == job_id
        assert found.keys() == expected.keys()
        assert found["overdub"].keys() == expected["overdub"].keys()
        for member in found["overdub"].keys() - set(own):
            assert found["overdub"][member] == expected["overdub"][member]


def test_triggerer_restarts_with_50_in_flight(chaos: Chaos) -> None:
    for server in each_server(chaos):
        server.behave(job_seconds=100_000)
    dubs = chaos.dubs([{"heygen_conn_id": SERVERS[i % 2]} for i in range(50)])
    dubs.wait_until("deferred")
    chaos.stack.restart_part("triggerer")
    time.sleep(10)
    assert not deleted(dubs)
    assert set(dubs.run.states().values()) == {"success", "deferred"}
    for server in each_server(chaos):
        for job in server.jobs():
            server.force(job["id"], "completed")
    dubs.check()


def test_scheduler_and_its_workers_die(chaos: Chaos) -> None:
    for server in each_server(chaos):
        server.behave(job_seconds=25)
    dubs = chaos.dubs(everywhere() * 3)
    wait_for("the jobs", dubs.all_created)
    chaos.stack.restart_part("scheduler")
    dubs.check()


def test_scheduler_dies_and_its_workers_continue(chaos: Chaos) -> None:
    """The next scheduler starts the tasks again that the old workers are still at."""
    for server in each_server(chaos):
        server.behave(job_seconds=25)
    dubs = chaos.dubs(everywhere() * 3)
    wait_for("the jobs", dubs.all_created)
    workers = chaos.stack.kill_part("scheduler", tree=False)
    chaos.stack.start_part("scheduler")
    time.sleep(30)
    # They keep the dead scheduler's database connections open, and so its locks, which stop the next one.
    end(workers)
    dubs.check()


def test_api_server_is_down_for_20_seconds(chaos: Chaos) -> None:
    for server in each_server(chaos):
        server.behave(job_seconds=15)
    dubs = chaos.dubs(everywhere() * 3, "dubs_patient")
    wait_for("the jobs", dubs.all_created)
    chaos.stack.restart_part("api-server", down=20)
    dubs.check()


def test_heygen_is_out_for_30_seconds(chaos: Chaos) -> None:
    """In five ways at once; half of the tasks wait when it begins, half have yet to start their job."""
    names = [f"{server}_{outage}" for server in SERVERS for outage in OUTAGES]
    waiting = chaos.dubs(
        {"heygen_conn_id": name, "deferrable": deferrable} for name in names for deferrable in (False, True)
    )
    wait_for("the jobs", waiting.all_created)
    for name in names:
        for fault in OUTAGES[name.partition("_")[2]]:
            chaos.servers[name].add_fault("/v3/.*", count=1_000_000, **fault)
        if name.endswith("silence"):
            chaos.servers[name].process.send_signal(signal.SIGSTOP)
    starting = None
    try:
        starting = chaos.dubs({"heygen_conn_id": name} for name in names)
        time.sleep(30)
    finally:
        for name in names:
            chaos.servers[name].process.send_signal(signal.SIGCONT)
            chaos.servers[name].clear_faults()
    waiting.check()
    starting.check()


def test_clearing_a_succeeded_task_makes_one_new_job(chaos: Chaos) -> None:
    dubs = chaos.dubs(everywhere())
    dubs.check()
    first = {name: jobs[0]["id"] for name, jobs in dubs.jobs().items()}
    dubs.run.clear(*dubs.names)
    dubs.run.wait()
    for name, jobs in dubs.jobs().items():
        assert [job["id"] for job in jobs] == [first[name], dubs.run.xcoms(name)["return_value"]]
        assert len(jobs) == 2


@needs_state_store
def test_clearing_a_timed_out_task_makes_none(chaos: Chaos) -> None:
    for server in each_server(chaos):
        server.behave(job_seconds=100_000)
    dubs = chaos.dubs(everywhere(timeout=3))
    dubs.wait_until("failed")
    for server in each_server(chaos):
        for job in server.jobs():
            server.force(job["id"], "completed")
    dubs.run.clear(*dubs.names)
    dubs.check()


def test_the_triggerer_stands_still(chaos: Chaos) -> None:
    """Airflow moves its triggers to another triggerer, and back when it continues."""
    for server in each_server(chaos):
        server.behave(job_seconds=100_000)
    dubs = chaos.dubs([{"heygen_conn_id": SERVERS[i % 2]} for i in range(10)])
    dubs.wait_until("deferred")
    chaos.stack.freeze_part("triggerer")
    try:
        time.sleep(40)  # more than twice as long as Airflow takes to miss it
    finally:
        chaos.stack.thaw_part("triggerer")
    time.sleep(15)
    assert not deleted(dubs)
    for server in each_server(chaos):
        for job in server.jobs():
            server.force(job["id"], "completed")
    dubs.check()


@pytest.mark.parametrize("deferrable", [False, True], ids=["on a worker", "deferred"])
def test_ending_a_task_deletes_nothing(chaos: Chaos, deferrable: bool) -> None:
    for server in each_server(chaos):
        server.behave(job_seconds=100_000)
    dubs = chaos.dubs({"heygen_conn_id": name, "deferrable": deferrable} for name in SERVERS)
    wait_for("the jobs", dubs.all_created)
    dubs.wait_until("deferred" if deferrable else "running")
    time.sleep(3)  # for the triggerer to have taken them up
    for name in dubs.names:
        dubs.run.mark(name, "failed")
    time.sleep(10)
    assert set(map(len, dubs.jobs().values())) == {1}
    assert not deleted(dubs)
