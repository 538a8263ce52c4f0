"""The sensor in its three modes: the same end, whichever way it waits."""

from __future__ import annotations

import asyncio
import json
import re
from datetime import UTC, datetime
from pkgutil import resolve_name
from types import SimpleNamespace

import pytest
from airflow.exceptions import AirflowRescheduleException
from airflow.listeners.listener import get_listener_manager as core_listener_manager
from airflow.providers.common.compat.sdk import (
    AirflowFailException,
    AirflowSensorTimeout,
    AirflowSkipException,
    TaskDeferred,
    get_listener_manager,
)
from airflow.sdk import DAG, Asset
from airflow.sdk.execution_time.comms import SetXCom
from airflow.sdk.execution_time.xcom import XCom
from airflow.triggers.base import TaskSuccessEvent
from airflow_task import Task

try:
    from airflow.dag_processing.dagbag import DagBag
except ImportError:  # before Airflow 3.2
    from airflow.models.dagbag import DagBag

from airflow_provider_heygen.emulator import state
from airflow_provider_heygen.exceptions import (
    HeyGenBadInputError,
    HeyGenNotFoundError,
    HeyGenOverdubFailedError,
    HeyGenPermanentError,
    HeyGenTransientError,
    HeyGenTriggerEventError,
)
from airflow_provider_heygen.hooks.heygen import HeyGenHook
from airflow_provider_heygen.sensors.overdub import HeyGenOverdubSensor
from airflow_provider_heygen.triggers.overdub import HeyGenOverdubTrigger

MODES = {
    "poke": {"mode": "poke", "deferrable": False},
    "reschedule": {"mode": "reschedule", "deferrable": False},
    "deferrable": {"deferrable": True},
}
ALL_MODES = pytest.mark.parametrize("mode", MODES)


@pytest.fixture
def overdub_id(heygen):
    with HeyGenHook() as hook:
        return hook.create_overdub({"video": "https://x.y/v.mp4", "audio": "https://x.y/a.mp3"})


def wait(overdub_id, mode, **changes):
    """Run a sensor to its end as Airflow would, across reschedules and deferrals."""
    arguments = {"poke_interval": 0.02, "timeout": 20, **MODES[mode], **changes}
    task = Task(lambda: HeyGenOverdubSensor(task_id="wait", overdub_id=overdub_id, **arguments))
    began = datetime.now(UTC)
    task.ti.get_first_reschedule_date = lambda _: began
    held = 0
    while True:
        try:
            outcome = task.start()
            while isinstance(outcome, TaskDeferred):
                held += 1
                trigger = outcome.trigger
                outcome = task.resume(outcome, asyncio.run(anext(trigger.run())).payload)
        except AirflowRescheduleException:
            held += 1
            continue
        return outcome, held


@ALL_MODES
@pytest.mark.parametrize("resource", ["overdubs", "lipsyncs"])
def test_completed(heygen, overdub_id, mode):
    heygen.force(overdub_id, "completed")
    details, _ = wait(overdub_id, mode)
    assert details["overdub_id"] == overdub_id
    assert details["status"] == "completed"
    text = json.dumps(details)
    assert "http" not in text
    assert not {"video_url", "caption_url"} & details.keys()


@ALL_MODES
def test_it_waits(heygen, mode):
    heygen.behaviour.job_seconds = 0.4
    with HeyGenHook() as hook:
        overdub_id = hook.create_overdub({"video": "https://x.y/v.mp4", "audio": "https://x.y/a.mp3"})
    details, held = wait(overdub_id, mode)
    assert details["status"] == "completed"
    assert {"poke": held == 0, "reschedule": held > 1, "deferrable": held == 1}[mode]


@ALL_MODES
def test_an_id_that_a_template_made_a_number(heygen, mode, monkeypatch):
    """As ``render_template_as_native_obj`` does with digits."""
    monkeypatch.setattr(state, "new_id", lambda _: "4711")
    heygen.behaviour.job_seconds = 0.4
    with HeyGenHook() as hook:
        hook.create_overdub({"video": "https://x.y/v.mp4", "audio": "https://x.y/a.mp3"})
    details, _ = wait(4711, mode)
    assert (details["overdub_id"], details["status"]) == ("4711", "completed")


def test_no_deferral_when_it_has_ended_already(heygen, overdub_id):
    heygen.force(overdub_id, "completed")
    assert wait(overdub_id, "deferrable")[1] == 0
    looks = [request for request in heygen.requests if request.method == "GET"]
    assert len(looks) == 1


@ALL_MODES
@pytest.mark.parametrize("already", [True, False], ids=["at the first look", "later"])
@pytest.mark.parametrize(
    ("flag", "error"),
    [
        (None, HeyGenOverdubFailedError),
        ("soft_fail", AirflowSkipException),
        ("never_fail", AirflowSkipException),
    ],
)
def test_failed(heygen, mode, already, flag, error):
    heygen.behaviour.job_seconds = 0.01 if already else 0.4
    heygen.behaviour.fail_jobs = 1
    heygen.behaviour.failure_message = "No face found in https://x.y/v.mp4?sig=SECRET1"
    with HeyGenHook() as hook:
        overdub_id = hook.create_overdub({"video": "https://x.y/v.mp4", "audio": "https://x.y/a.mp3"})
        while already and not hook.get_overdub(overdub_id).is_final:
            pass
    with pytest.raises(error) as caught:
        wait(overdub_id, mode, **({flag: True} if flag else {}))
    if flag is None:
        assert isinstance(caught.value, AirflowFailException)  # no retry
        assert "No face found" in str(caught.value)
    assert "SECRET1" not in str(caught.value)


@ALL_MODES
@pytest.mark.parametrize(
    ("flag", "error"),
    [(None, AirflowSensorTimeout), ("soft_fail", AirflowSkipException), ("never_fail", AirflowSkipException)],
)
def test_timeout(heygen, mode, overdub_id, flag, error):
    heygen.force(overdub_id, "running")
    with pytest.raises(error):
        wait(overdub_id, mode, timeout=0.2, **({flag: True} if flag else {}))


@ALL_MODES
def test_a_timeout_of_0_is_one_look(heygen, mode, overdub_id):
    heygen.force(overdub_id, "running")
    with pytest.raises(AirflowSensorTimeout):
        wait(overdub_id, mode, timeout=0)
    heygen.force(overdub_id, "completed")
    assert wait(overdub_id, mode, timeout=0)[0]["status"] == "completed"


@pytest.mark.parametrize(
    ("flag", "error"),
    [(None, AirflowSensorTimeout), ("soft_fail", AirflowSkipException), ("never_fail", AirflowSkipException)],
)
def test_no_triggerer(heygen, overdub_id, flag, error):
    """Airflow ends the deferral then."""
    heygen.force(overdub_id, "running")
    flags = {flag: True} if flag else {}
    sensor = HeyGenOverdubSensor(task_id="wait", overdub_id=overdub_id, deferrable=True, timeout=20, **flags)
    with pytest.raises(error):
        sensor.resume_execution("__fail__", {"error": "Trigger timeout"}, Task(lambda: sensor).context)


@ALL_MODES
@pytest.mark.parametrize(
    ("fault", "error", "says"),
    [
        ({"status": 401, "code": "unauthorized"}, HeyGenPermanentError, "auth_type"),
        ({"status": 402, "code": "insufficient_credit"}, HeyGenPermanentError, "Top up"),
        ({"status": 403, "code": "forbidden"}, HeyGenPermanentError, "may not"),
        ({"status": 404, "code": "not_found"}, HeyGenNotFoundError, "resource"),
    ],
    ids=str,
)
def test_permanent_errors_end_the_wait_at_once(heygen, mode, overdub_id, fault, error, says):
    heygen.force(overdub_id, "running")
    heygen.fail_next(method="GET", count=50, **fault)
    with pytest.raises(error, match=says) as caught:
        wait(overdub_id, mode)
    assert isinstance(caught.value, AirflowFailException)
    assert heygen.api_key not in str(caught.value)


@ALL_MODES
@pytest.mark.parametrize(
    "fault",
    [
        {"status": 500},
        {"status": 503, "html": True},
        {"status": 429, "code": "rate_limit_exceeded"},
        {"drop": "before"},
        {"truncate": True},
        {"body": "<html>", "status": 200},
    ],
    ids=str,
)
def test_an_outage_is_survived(heygen, mode, overdub_id, fault, pauses):
    heygen.force(overdub_id, "completed")
    heygen.fail_next(method="GET", count=4, **fault)
    assert wait(overdub_id, mode)[0]["status"] == "completed"


def test_the_triggerer_gives_up_and_the_worker_finds_it_well(heygen, overdub_id):
    heygen.force(overdub_id, "running")
    sensor = Task(
        lambda: HeyGenOverdubSensor(
            task_id="wait", overdub_id=overdub_id, deferrable=True, poke_interval=0.02, timeout=20
        )
    )
    deferred = sensor.start()
    gone = {"overdub_id": overdub_id, "status": "error", "message": "Gave up"}
    again = sensor.resume(deferred, gone)
    assert isinstance(again, TaskDeferred)
    # The same deadline, not a new one.
    assert again.trigger.deadline == deferred.trigger.deadline
    for _ in range(2):
        again = sensor.resume(again, gone)
    with pytest.raises(HeyGenTransientError, match="same Airflow connection"):
        sensor.resume(again, gone)


def test_a_retry_that_airflow_begins_where_the_last_try_deferred(heygen, overdub_id):
    """As Airflow 3.0 does: with what the last try was told then."""
    heygen.force(overdub_id, "running")
    sensor = Task(lambda: HeyGenOverdubSensor(task_id="wait", overdub_id=overdub_id, deferrable=True))
    deferred = sensor.start()
    sensor.ti.try_number += 1
    heygen.force(overdub_id, "completed")
    details = sensor.resume(deferred, {"overdub_id": overdub_id, "status": "error", "message": "Gave up"})
    assert details["status"] == "completed"
    sensor.ti.try_number += 1
    heygen.force(overdub_id, "running")
    late = {"overdub_id": overdub_id, "status": "timeout", "message": "Stopped waiting"}
    assert isinstance(sensor.resume(deferred, late), TaskDeferred)


@pytest.mark.parametrize("soft_fail", [True, False])
def test_an_outage_seen_from_both_sides_is_worth_a_retry_not_a_skip(heygen, overdub_id, soft_fail, pauses):
    heygen.force(overdub_id, "running")
    sensor = Task(
        lambda: HeyGenOverdubSensor(
            task_id="wait", overdub_id=overdub_id, deferrable=True, soft_fail=soft_fail, timeout=20
        )
    )
    deferred = sensor.start()
    heygen.fail_next(method="GET", count=50, status=500)
    with pytest.raises(HeyGenTransientError):
        sensor.resume(deferred, {"overdub_id": overdub_id, "status": "error", "message": "Gave up"})


@pytest.mark.parametrize(
    "event",
    [
        None,
        {},
        "completed",
        {"status": "completed"},
        {"status": "success", "message": "", "overdub_id": "od_1"},
        {"status": "completed", "message": "", "overdub_id": "another", "overdub": {}},
        {"status": "completed", "message": "", "overdub_id": "od_1"},
    ],
    ids=str,
)
def test_an_event_that_is_not_ours_fails_loudly(heygen, event):
    sensor = Task(lambda: HeyGenOverdubSensor(task_id="wait", overdub_id="od_1", deferrable=True, timeout=20))
    heygen.fail_next(method="GET", status=500)
    with pytest.raises(HeyGenTriggerEventError, match="not affected"):
        sensor.resume(sensor.start(), event)


@ALL_MODES
@pytest.mark.parametrize("overdub_id", ["", "None", "a/b", "..", "od_1?x=1", None])
def test_a_bad_id_sends_nothing(heygen, mode, overdub_id):
    with pytest.raises(HeyGenBadInputError, match="overdub_id"):
        wait(overdub_id, mode)
    assert heygen.requests == []


# --- Ending in the triggerer --------------------------------------------------------------------------


class Comms:
    """What a triggerer has of Airflow: takes the messages that would go to the API server."""

    def __init__(self, error=None):
        self.sent, self.error = [], error

    def send(self, message):
        if isinstance(message, SetXCom):  # not what is to be masked
            self.sent.append(message)
            if self.error:
                raise self.error

    async def asend(self, message):
        self.send(message)


@pytest.fixture
def comms(monkeypatch):
    from airflow.sdk.execution_time import task_runner

    comms = Comms()
    monkeypatch.setattr(task_runner, "SUPERVISOR_COMMS", comms, raising=False)
    return comms


def end_in_triggerer(heygen, overdub_id, *, ti="a task instance", status="completed", **changes):
    """Defer a sensor, end its overdub, give the event its trigger ends with, in a triggerer or without."""
    with DAG("dag"):
        sensor = HeyGenOverdubSensor(
            task_id="task",
            overdub_id=overdub_id,
            deferrable=True,
            poke_interval=0.02,
            **{"end_from_trigger": True} | changes,
        )
    (deferred,) = [Task(lambda: sensor).start()]
    assert isinstance(deferred, TaskDeferred)
    heygen.force(overdub_id, status)
    path, kwargs = deferred.trigger.serialize()
    trigger = resolve_name(path)(**json.loads(json.dumps(kwargs)))
    if ti:
        trigger.task_instance = SimpleNamespace(dag_id="dag", task_id="task", run_id="run", map_index=3)
    return asyncio.run(anext(trigger.run()))


@pytest.fixture
def running(heygen):
    heygen.behaviour.job_seconds = 1000
    with HeyGenHook() as hook:
        return hook.create_overdub({"video": "https://x.y/v.mp4", "audio": "https://x.y/a.mp3"})


def test_a_completed_wait_ends_in_the_triggerer(heygen, running, comms, capsys):
    event = end_in_triggerer(heygen, running)
    assert re.search(f"Overdub {running} is done, .* The task ends here.", capsys.readouterr().out)
    assert isinstance(event, TaskSuccessEvent)
    assert not event.xcoms
    (push,) = comms.sent
    assert (push.dag_id, push.task_id, push.run_id, push.map_index) == ("dag", "task", "run", 3)
    assert push.key == "return_value"
    with HeyGenHook() as hook:
        assert push.value == hook.get_overdub(running).details()


def test_nothing_is_pushed_that_is_not_wanted(heygen, running, comms):
    assert isinstance(end_in_triggerer(heygen, running, do_xcom_push=False), TaskSuccessEvent)
    assert comms.sent == []


def test_other_ends_are_for_a_worker(heygen, running, comms):
    assert end_in_triggerer(heygen, running, status="failed").payload["status"] == "failed"
    assert comms.sent == []


def test_without_a_triggerer_the_event_is_the_usual_one(heygen, running, comms):
    assert end_in_triggerer(heygen, running, ti=None).payload["status"] == "completed"
    assert comms.sent == []


def test_an_xcom_that_cannot_be_pushed_is_left_to_a_worker(heygen, running, comms):
    comms.error = OSError("no")
    assert end_in_triggerer(heygen, running).payload["status"] == "completed"


@pytest.mark.skipif(not hasattr(XCom, "aset"), reason="Airflow before 3.3 pushes in a thread")
def test_a_push_is_never_cut_off(comms, monkeypatch):
    """See `test_poller.py` for why."""
    trigger = HeyGenOverdubTrigger(heygen_conn_id="heygen_default", overdub_id="od_1", end_task=True)
    trigger.task_instance = SimpleNamespace(dag_id="dag", task_id="task", run_id="run", map_index=3)

    async def leave_midway():
        asked, may_answer, answered = asyncio.Event(), asyncio.Event(), asyncio.Event()

        async def send(message):
            asked.set()
            await may_answer.wait()
            answered.set()

        monkeypatch.setattr(comms, "asend", send)
        push = asyncio.create_task(trigger._push({"status": "completed"}))
        await asked.wait()
        push.cancel()
        await asyncio.wait([push])
        may_answer.set()
        await asyncio.wait_for(answered.wait(), 30)

    asyncio.run(leave_midway())


def test_ending_in_the_triggerer_is_off_by_default(heygen, running, comms):
    event = end_in_triggerer(heygen, running, end_from_trigger=False)
    assert event.payload["status"] == "completed"


@pytest.mark.parametrize(
    ("duty", "name"),
    [
        ({"outlets": [Asset("a")]}, "outlets"),
        ({"on_success_callback": print}, "on_success_callback"),
        ({"post_execute": print}, "post_execute"),
        ({"multiple_outputs": True}, "multiple_outputs"),
    ],
    ids=str,
)
def test_what_a_worker_has_to_do_is_not_skipped(heygen, running, comms, duty, name, capsys):
    assert end_in_triggerer(heygen, running, **duty).payload["status"] == "completed"
    assert f"a worker is needed for: {name}." in capsys.readouterr().out


@pytest.fixture
def listener():
    """A listener on a worker and where DAGs are parsed."""
    managers = {get_listener_manager(), core_listener_manager()}
    for manager in managers:
        manager.add_listener(object())
    yield
    for manager in managers:
        manager.clear()


def test_where_somebody_listens_a_worker_ends_the_task(heygen, running, comms, listener, capsys):
    assert end_in_triggerer(heygen, running).payload["status"] == "completed"
    assert "a worker is needed for: listeners." in capsys.readouterr().out


def test_airflow_takes_the_dag_where_somebody_listens(listener):
    with DAG("dag", schedule=None) as dag:
        HeyGenOverdubSensor(task_id="wait", overdub_id="od_1", deferrable=True, end_from_trigger=True)
    bag = DagBag(collect_dags=False)
    bag.bag_dag(dag)
    assert list(bag.dags) == ["dag"]


def test_where_a_worker_makes_the_label_one_ends_the_task(heygen, running, comms, monkeypatch, capsys):
    # Airflow 3.0 and 3.1 do not know it.
    monkeypatch.delattr("airflow.sdk.execution_time.comms.SetRenderedMapIndex", raising=False)
    assert end_in_triggerer(heygen, running, map_index_template="{{ 1 }}").payload["status"] == "completed"
    assert "a worker is needed for: map_index_template." in capsys.readouterr().out
