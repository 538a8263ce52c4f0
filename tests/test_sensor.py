"""The sensor in its three modes: the same end, whichever way it waits."""

from __future__ import annotations

import asyncio
import json
import time
from datetime import UTC, datetime, timedelta

import pytest
from airflow.exceptions import AirflowRescheduleException, TaskDeferralError
from airflow.providers.common.compat.sdk import (
    AirflowFailException,
    AirflowSensorTimeout,
    AirflowSkipException,
    TaskDeferred,
)
from airflow.sdk import DAG
from airflow_task import Task
from conftest import each_value

from airflow_provider_heygen import waiting
from airflow_provider_heygen.emulator import state
from airflow_provider_heygen.exceptions import (
    HeyGenBadInputError,
    HeyGenNotFoundError,
    HeyGenOverdubFailedError,
    HeyGenOverdubTimeoutError,
    HeyGenTaskFailedError,
    HeyGenTriggerEventError,
)
from airflow_provider_heygen.hooks.heygen import HeyGenHook
from airflow_provider_heygen.poller import SHORTEST_DEFERRAL
from airflow_provider_heygen.sensors.overdub import HeyGenOverdubSensor

MODES = {
    "poke": {"mode": "poke", "deferrable": False},
    "reschedule": {"mode": "reschedule", "deferrable": False},
    "deferrable": {"deferrable": True},
}
ALL_MODES = pytest.mark.parametrize("mode", MODES)
MODES_AND_FLAGS = pytest.mark.parametrize(
    ("flag", "mode"),
    [
        *((None, mode) for mode in MODES),
        *(("soft_fail", mode) for mode in ("poke", "deferrable")),
        *(("never_fail", mode) for mode in ("reschedule", "deferrable")),
    ],
)


@pytest.fixture
def overdub_id(heygen):
    with HeyGenHook() as hook:
        return hook.create_overdub({"video": "https://x.y/v.mp4", "audio": "https://x.y/a.mp3"})


def wait(overdub_id, mode, **changes):
    """Run a sensor to its end as Airflow would, across reschedules and deferrals."""
    arguments = {"poke_interval": 0.02, "timeout": 20, **MODES[mode], **changes}
    task = Task(lambda: HeyGenOverdubSensor(task_id="wait", overdub_id=overdub_id, **arguments))
    began = datetime.now(UTC)
    held = 0
    task.ti.get_first_reschedule_date = lambda _: began if held else None
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


@pytest.mark.parametrize(("mode", "resource"), each_value(MODES, ["overdubs", "lipsyncs"]))
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


@pytest.mark.parametrize("mode", ["speed", "precision"])
def test_default_args_with_the_mode_of_create_tasks(mode):
    with DAG("dag", schedule=None, default_args={"mode": mode}):
        assert HeyGenOverdubSensor(task_id="wait", overdub_id="od_1").mode == "poke"
    with DAG("dag", schedule=None, default_args={"mode": "reschedule"}):
        assert HeyGenOverdubSensor(task_id="wait", overdub_id="od_1").mode == "reschedule"


def test_no_deferral_when_it_has_ended_already(heygen, overdub_id):
    heygen.force(overdub_id, "completed")
    assert wait(overdub_id, "deferrable")[1] == 0
    looks = [request for request in heygen.requests if request.method == "GET"]
    assert len(looks) == 1


@pytest.mark.parametrize(
    ("flag", "mode", "already"),
    [
        *((None, mode, already) for mode in MODES for already in (True, False)),
        ("soft_fail", "poke", True),
        ("soft_fail", "reschedule", False),
        ("soft_fail", "deferrable", False),
        ("never_fail", "poke", False),
        ("never_fail", "deferrable", True),
    ],
)
def test_failed(heygen, mode, already, flag):
    error = AirflowSkipException if flag else HeyGenTaskFailedError
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
        assert isinstance(caught.value.__cause__, HeyGenOverdubFailedError)
        assert "No face found" in str(caught.value)
    assert "SECRET1" not in str(caught.value)


@MODES_AND_FLAGS
def test_timeout(heygen, mode, overdub_id, flag):
    error = AirflowSkipException if flag else AirflowSensorTimeout
    heygen.force(overdub_id, "running")
    with pytest.raises(error):
        wait(overdub_id, mode, timeout=0.2, **({flag: True} if flag else {}))


@pytest.mark.parametrize(
    ("flag", "mode"),
    [(None, "poke"), (None, "deferrable"), ("soft_fail", "deferrable"), ("never_fail", "poke")],
)
def test_execution_timeout_is_retried(heygen, mode, overdub_id, flag):
    """Airflow itself retries a task after its execution_timeout, but no sensor after its timeout."""
    error = AirflowSkipException if flag else HeyGenOverdubTimeoutError
    heygen.force(overdub_id, "running")
    with pytest.raises(error):
        wait(overdub_id, mode, execution_timeout=timedelta(seconds=0.2), **({flag: True} if flag else {}))


def test_execution_timeout_is_of_each_rescheduled_poll(heygen, overdub_id):
    heygen.force(overdub_id, "running")
    began = datetime.now(UTC)
    limits = {"poke_interval": 600, "execution_timeout": timedelta(seconds=60)}
    sensor = HeyGenOverdubSensor(task_id="wait", overdub_id=overdub_id, mode="reschedule", **limits)
    task = Task(lambda: sensor)
    task.ti.get_first_reschedule_date = lambda _: None
    with pytest.raises(AirflowRescheduleException) as caught:
        task.start()
    assert caught.value.reschedule_date - began >= timedelta(seconds=600)


def test_the_last_poll_of_a_rescheduled_wait_is_not_due_at_once(heygen, overdub_id):
    """Airflow may fail a task that is due again before its worker has reported that it is rescheduled."""
    heygen.force(overdub_id, "running")
    now = datetime.now(UTC)
    sensor = HeyGenOverdubSensor(task_id="wait", overdub_id=overdub_id, mode="reschedule", timeout=3600)
    task = Task(lambda: sensor)
    task.ti.get_first_reschedule_date = lambda _: now - timedelta(seconds=3598)
    with pytest.raises(AirflowRescheduleException) as caught:
        task.start()
    assert caught.value.reschedule_date - now >= timedelta(seconds=SHORTEST_DEFERRAL)


@ALL_MODES
def test_a_timeout_of_0_is_one_poll(heygen, mode, overdub_id):
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


@pytest.mark.parametrize(
    ("fault", "mode"),
    each_value(
        [
            {"status": 401, "code": "unauthorized"},
            {"status": 402, "code": "insufficient_credit"},
            {"status": 403, "code": "forbidden"},
            {"status": 403, "html": True},
            {"status": 404, "code": "not_found"},
            {"status": 404, "html": True},
            {"status": 500},
            {"status": 503, "html": True},
            {"status": 429, "code": "rate_limit_exceeded"},
            {"status": 429, "code": "quota_exceeded"},
            {"drop": "before"},
            {"truncate": True},
            {"body": "<html>", "status": 200},
        ],
        MODES,
    ),
    ids=str,
)
def test_what_a_poll_meets_does_not_end_the_wait(heygen, mode, overdub_id, fault, monkeypatch):
    monkeypatch.setattr(waiting, "GONE_SECONDS", 0.1)
    heygen.force(overdub_id, "completed")
    # The list, too: it decides whether a 404 is to be believed.
    heygen.fail_next(method="GET", count=3, **fault)
    assert wait(overdub_id, mode)[0]["status"] == "completed"


@ALL_MODES
@pytest.mark.parametrize("number", [False, True], ids=["text", "number"])
def test_a_404_of_what_the_list_has_does_not_end_the_wait(heygen, mode, number, monkeypatch):
    monkeypatch.setattr(waiting, "GONE_SECONDS", 0.1)
    monkeypatch.setattr(state, "new_id", lambda _: "4711")
    HeyGenHook().create_overdub({"video": "https://x.y/v.mp4", "audio": "https://x.y/a.mp3"})
    heygen.force("4711", "running")
    heygen.fail_next(method="GET", path="/v3/overdubs/", count=10**6, status=404)
    # What is listed as running is not final, and no time is left to see it otherwise.
    with pytest.raises(AirflowSensorTimeout):
        wait(4711 if number else "4711", mode, timeout=1)


@MODES_AND_FLAGS
def test_a_deleted_overdub_ends_the_wait(heygen, mode, overdub_id, flag, monkeypatch):
    error = AirflowSkipException if flag else HeyGenTaskFailedError
    monkeypatch.setattr(waiting, "GONE_SECONDS", 0.1)
    with HeyGenHook() as hook:
        hook.delete_overdub(overdub_id)
    with pytest.raises(error, match="is gone" if flag is None else "") as caught:
        wait(overdub_id, mode, **({flag: True} if flag else {}))
    if flag is None:
        assert isinstance(caught.value.__cause__, HeyGenNotFoundError)


@pytest.mark.parametrize(("mode", "status"), [("poke", 429), ("reschedule", 503)])
def test_retry_after_is_heeded(heygen, mode, overdub_id, status):
    heygen.force(overdub_id, "completed")
    heygen.fail_next(method="GET", status=status, headers={"Retry-After": "2"})
    sensor = HeyGenOverdubSensor(
        task_id="wait", overdub_id=overdub_id, poke_interval=0.02, timeout=20, **MODES[mode]
    )
    task = Task(lambda: sensor)
    task.ti.get_first_reschedule_date = lambda _: None
    began = time.time()
    if mode == "reschedule":
        with pytest.raises(AirflowRescheduleException) as caught:
            task.start()
        assert caught.value.reschedule_date.timestamp() >= began + 2
    else:
        assert task.start()["status"] == "completed"
        assert time.time() >= began + 2
    assert heygen.requests_by_route["GET /v3/overdubs/{overdub_id}"] == (2 if mode == "poke" else 1)


def test_an_absurd_retry_after_is_capped(heygen, overdub_id):
    heygen.fail_next(method="GET", status=429, headers={"Retry-After": "1000000000"})
    sensor = HeyGenOverdubSensor(task_id="wait", overdub_id=overdub_id, timeout=10**6, **MODES["reschedule"])
    task = Task(lambda: sensor)
    task.ti.get_first_reschedule_date = lambda _: None
    with pytest.raises(AirflowRescheduleException) as caught:
        task.start()
    assert caught.value.reschedule_date.timestamp() <= time.time() + 900


@ALL_MODES
def test_an_unknown_status_is_logged_and_the_wait_continues(heygen, mode, overdub_id, capsys):
    heygen.force(overdub_id, "running")
    body = {"data": {"id": overdub_id, "overdub_id": overdub_id, "status": "polishing"}}
    heygen.fail_next(method="GET", path="/v3/overdubs/", status=200, body=json.dumps(body))
    with pytest.raises(AirflowSensorTimeout):
        wait(overdub_id, mode, timeout=0.3)
    assert capsys.readouterr().out.count("polishing (an unknown status") == 1


FLAGS = pytest.mark.parametrize("soft_fail", [True, False])


@FLAGS
@pytest.mark.parametrize(
    ("method", "kwargs", "error"),
    [
        ("__fail__", {"error": "Trigger failure", "traceback": ["ModuleNotFoundError"]}, TaskDeferralError),
        ("execute_complete", {"event": {"status": "success"}}, HeyGenTriggerEventError),
        ("execute_complete", {"event": None, "since": 1.0}, HeyGenTriggerEventError),
        ("execute_complete", {"event": {}, "try_number": 1}, TypeError),
    ],
    ids=["crash", "another release", "nothing", "an argument of another release"],
)
def test_what_is_no_end_of_a_wait_is_never_skipped(heygen, overdub_id, soft_fail, method, kwargs, error):
    """Case bug-14: a skip would hide it, and go without a retry."""
    sensor = HeyGenOverdubSensor(
        task_id="wait", overdub_id=overdub_id, deferrable=True, soft_fail=soft_fail, timeout=20
    )
    with pytest.raises(error) as caught:
        sensor.resume_execution(method, kwargs, Task(lambda: sensor).context)
    assert not isinstance(caught.value, AirflowFailException)


@pytest.mark.parametrize(("mode", "soft_fail"), [*((mode, True) for mode in MODES), ("poke", False)])
def test_a_wrong_setting_is_never_skipped(heygen, mode, overdub_id, soft_fail, connect):
    connect("http://user:pw@x.y", verify="nonsense")
    with pytest.raises(HeyGenTaskFailedError):
        wait(overdub_id, mode, soft_fail=soft_fail)


@pytest.mark.parametrize("wrong", ["no password", "no connection"])
def test_a_setting_that_is_wrong_for_a_moment_ends_no_rescheduled_wait(
    heygen, overdub_id, wrong, connect, monkeypatch
):
    heygen.force(overdub_id, "running")
    task = Task(lambda: HeyGenOverdubSensor(task_id="wait", overdub_id=overdub_id, mode="reschedule"))
    began: list[datetime] = []
    task.ti.get_first_reschedule_date = lambda _: began[0] if began else None
    for settings in ("right", wrong, "right"):
        connect(heygen.url, "" if settings == "no password" else "emulator-api-key")
        if settings == "no connection":
            monkeypatch.delenv("AIRFLOW_CONN_HEYGEN_DEFAULT")
        with pytest.raises(AirflowRescheduleException):
            task.start()
        began.append(datetime.now(UTC))


@pytest.mark.parametrize("status", ["completed", "failed", "running"])
@pytest.mark.parametrize("by", ["the trigger", "a clock a little ahead", "Airflow"])
def test_no_wait_times_out_unseen(heygen, overdub_id, status, by):
    heygen.force(overdub_id, status)
    sensor = HeyGenOverdubSensor(task_id="wait", overdub_id=overdub_id, deferrable=True, timeout=20)
    event = {"overdub_id": overdub_id, "status": "timeout", "message": "Timed out waiting"}
    end = {
        # As stored in a metadata database; these names are frozen.
        "the trigger": ("execute_complete", {"event": event, "since": 1.0}),
        "a clock a little ahead": (
            "execute_complete",
            {"event": event, "since": 1.0, "deadline": time.time() + 3},
        ),
        "Airflow": ("__fail__", {"error": "Trigger timeout"}),
    }[by]
    go = lambda: sensor.resume_execution(*end, Task(lambda: sensor).context)  # noqa: E731
    if status == "completed":
        assert go()["status"] == "completed"
        return
    with pytest.raises({"failed": HeyGenTaskFailedError, "running": AirflowSensorTimeout}[status]):
        go()


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
def test_an_event_of_another_trigger_fails(heygen, event):
    sensor = Task(lambda: HeyGenOverdubSensor(task_id="wait", overdub_id="od_1", deferrable=True, timeout=20))
    heygen.fail_next(method="GET", status=500)
    with pytest.raises(HeyGenTriggerEventError, match="not affected"):
        sensor.resume(sensor.start(), event)


@pytest.mark.parametrize(
    ("overdub_id", "mode"), each_value(["", "None", "a/b", "..", "od_1?x=1", None], MODES)
)
def test_a_bad_id_sends_nothing(heygen, mode, overdub_id):
    with pytest.raises(HeyGenTaskFailedError, match="overdub_id") as caught:
        wait(overdub_id, mode)
    assert isinstance(caught.value.__cause__, HeyGenBadInputError)
    assert heygen.requests == []
