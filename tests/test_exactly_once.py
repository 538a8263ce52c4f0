"""One overdub per request, whichever process dies and whenever, asserted by the emulator's job count."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import shutil
import time
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import partial

import pytest
from airflow.providers.common.compat.sdk import AirflowFailException, AirflowSkipException, TaskDeferred
from airflow.providers.standard.triggers.temporal import DateTimeTrigger
from airflow.sdk import ObjectStoragePath
from airflow_task import StateStore, Task
from conftest import each_value

from airflow_provider_heygen import dubbing, upload, waiting
from airflow_provider_heygen.emulator import Behaviour, Emulator, media
from airflow_provider_heygen.exceptions import (
    HeyGenBadInputError,
    HeyGenGatewayError,
    HeyGenNotFoundError,
    HeyGenOutcomeUnknownError,
    HeyGenOverdubFailedError,
    HeyGenOverdubTimeoutError,
    HeyGenPermanentError,
    HeyGenTaskFailedError,
    HeyGenTransientError,
    HeyGenTriggerEventError,
)
from airflow_provider_heygen.hooks import heygen as heygen_hook
from airflow_provider_heygen.hooks.heygen import HeyGenHook
from airflow_provider_heygen.media import storage_path
from airflow_provider_heygen.operators.asset import HeyGenUploadAssetOperator
from airflow_provider_heygen.operators.overdub import HeyGenCreateOverdubOperator
from airflow_provider_heygen.sensors.overdub import HeyGenOverdubSensor
from airflow_provider_heygen.submitter import SubmissionStore
from airflow_provider_heygen.triggers.overdub import HeyGenOverdubTrigger

RESOURCES = pytest.mark.parametrize("resource", ["overdubs", "lipsyncs"])
SERVERS = pytest.mark.parametrize("idempotency", [True, False], ids=["honours the key", "ignores the key"])
MODES = pytest.mark.parametrize("deferrable", [True, False], ids=["deferrable", "sync"])
STORES = pytest.mark.parametrize("store", [True, False], ids=["state store", "no state store"])
# Each two of these in all combinations. The last: nothing but the provider itself saves the request.
KILLS = pytest.mark.parametrize(
    ("idempotency", "after", "store"),
    [(True, False, True), (True, True, False), (False, True, True), (False, False, False)],
)
# What a task can remember: over all tries, until it ends, until it ends on any Airflow.
MEMORIES = pytest.mark.parametrize(
    ("store", "durable"),
    [(True, True), (False, True), (True, False)],
    ids=["state store", "no state store", "not durable"],
)


def dub(**changes):
    arguments = {"video": "https://x.y/v.mp4", "audio": "https://x.y/a.mp3", "poke_interval": 0.02}
    return lambda: HeyGenCreateOverdubOperator(task_id="dub", **arguments | changes)


def finish(task, outcome):
    """Do what the triggerer does until the task has ended."""
    while isinstance(outcome, TaskDeferred):
        event = asyncio.run(anext(outcome.trigger.run()))
        outcome = task.resume(outcome, event.payload)
    return outcome


@contextmanager
def fails_for_good(cause, match=""):
    """Expect that the task fails without a retry, because of ``cause``."""
    with pytest.raises(HeyGenTaskFailedError, match=match) as caught:
        yield caught
    assert isinstance(caught.value, AirflowFailException)
    assert isinstance(caught.value.__cause__, cause)


class Killed(BaseException):
    """A worker that dies; nothing may catch it."""


def killed(*_, **__):
    raise Killed


@pytest.fixture
def reaper(monkeypatch):
    """Kill the worker at the n-th thing it does to the world, just before or just after it took effect."""

    class Reaper:
        left, after = -1, False

        def around(self, call):
            def watched(*args, **kwargs):
                self.left -= 1
                due = self.left == 0  # a call within this one counts, too
                if due and not self.after:
                    raise Killed
                result = call(*args, **kwargs)
                if due:
                    raise Killed
                return result

            return watched

    reaper = Reaper()
    monkeypatch.setattr(HeyGenHook, "_send", reaper.around(HeyGenHook._send))
    monkeypatch.setattr(upload, "put_file", reaper.around(upload.put_file))
    monkeypatch.setattr(StateStore, "set", reaper.around(StateStore.set))
    monkeypatch.setattr(StateStore, "get", reaper.around(StateStore.get))
    return reaper


@KILLS
@MODES
def test_killed_at_any_step_and_retried(heygen, reaper, pauses, idempotency, deferrable, after, store):
    heygen.behaviour.idempotency = idempotency
    died, step = True, 0
    while died:
        heygen.reset()
        heygen.behaviour.idempotency = idempotency
        step += 1
        task = Task(dub(deferrable=deferrable), store=StateStore() if store else None)
        reaper.left, reaper.after, died = step, after, False
        outcome = None
        try:
            outcome = finish(task, task.start())
        except Killed:
            died = True
            outcome = finish(task, task.start())
        assert len(heygen.jobs) == 1, f"killed at step {step}"
        assert outcome == heygen.jobs[0].id
        assert task.xcoms["overdub"]["status"] == "completed"
        assert task.xcoms["overdub_id"] == outcome
    assert step >= 2  # it did die on the way


@pytest.mark.parametrize(
    ("deferrable", "after", "store"),
    [(True, False, True), (True, True, False), (False, True, True), (False, False, False)],
)
def test_dub_and_save_killed_at_any_step_and_retried(heygen, reaper, tmp_path, deferrable, after, store):
    died, step = True, 0
    while died:
        heygen.reset()
        step += 1
        file = tmp_path / f"{step}.mp4"
        make = dub(deferrable=deferrable, destination=str(file))
        task = Task(make, store=StateStore() if store else None)
        reaper.left, reaper.after, died = step, after, False
        try:
            finish(task, task.start())
        except Killed:
            died = True
            finish(task, task.start())
        reaper.left = -1
        (job,) = heygen.jobs
        assert file.read_bytes() == job.output.read_bytes(), f"killed at step {step}"
        assert task.xcoms["overdub"]["size"] == file.stat().st_size
        assert not store or task.store.get("heygen_overdub")["delivered"]
    assert step >= 3  # it did die on the way


def test_triggerer_and_worker_know_the_name_that_the_create_request_found(heygen, connect, tmp_path):
    heygen.behaviour.resources = "lipsyncs"
    connect(heygen.url, allow_http=True, allow_private_hosts=True)  # without the extra 'resource'
    task = Task(dub(deferrable=True, destination=str(tmp_path / "v.mp4")), store=StateStore())
    deferred = task.start()
    before = len(heygen.requests)
    _, arguments = deferred.trigger.serialize()
    assert arguments["resource"] == "lipsyncs"
    heygen_hook._detected.clear()  # as in another process
    event = asyncio.run(anext(HeyGenOverdubTrigger(**arguments).run()))
    heygen_hook._detected.clear()
    task.resume(deferred, event.payload)
    assert not [request.path for request in heygen.requests[before:] if "/overdubs" in request.path]


LOST_RESPONSES = [
    {"drop": "before"},
    {"drop": "after"},
    {"status": 500},
    {"status": 502, "html": True},
    {"status": 503, "headers": {"Retry-After": "1"}},
    {"truncate": True},
    {"status": 409, "code": "request_in_progress"},
]


@pytest.mark.parametrize(
    ("fault", "idempotency", "resource"),
    [
        (*case, resource)
        for case, resource in each_value(
            itertools.product(LOST_RESPONSES, [True, False]), ["overdubs", "lipsyncs", "lipsyncs", "overdubs"]
        )
    ],
    ids=str,
)
def test_a_lost_response(heygen, pauses, idempotency, fault):
    """The same try finds the overdub, or sends the request again, whether HeyGen honours the key or not."""
    heygen.behaviour.idempotency = idempotency
    heygen.fail_next(method="POST", count=2, **fault)
    task = Task(dub(), store=StateStore())
    assert task.start() == heygen.jobs[0].id
    assert len(heygen.jobs) == 1


@SERVERS
def test_all_responses_of_a_try_are_lost(heygen, pauses, idempotency):
    heygen.behaviour.idempotency = idempotency
    heygen.behaviour.list_lag = 0
    # HeyGen creates the job, but responds neither to the create request nor to any GET of the list.
    heygen.fail_next(method="POST", drop="after")
    heygen.fail_next(method="GET", count=1000, status=500)
    task = Task(dub(), store=StateStore())
    with pytest.raises(HeyGenTransientError):
        task.start()
    heygen.clear_faults()
    assert task.start() == heygen.jobs[0].id
    assert len(heygen.jobs) == 1


@pytest.mark.parametrize("resource", [None])
@pytest.mark.parametrize(
    ("resources", "store", "idempotency"),
    [("overdubs", True, False), ("lipsyncs", True, True), ("lipsyncs", False, False), ("both", True, False)],
)
def test_100_retries_while_responses_are_lost(heygen, pauses, monkeypatch, resources, store, idempotency):
    """20 tasks with 5 retries each start one overdub each, while the resource's name is not known."""
    heygen.behaviour.resources, heygen.behaviour.idempotency = resources, idempotency
    monkeypatch.setattr(heygen_hook, "SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(waiting, "GONE_SECONDS", 0.01)
    dice = random.Random(13)
    for number in range(1, 21):
        task = Task(dub(wait_for_completion=False), store=StateStore() if store else None)
        task.ti.run_id = f"run {number}"
        for _ in range(5):
            monkeypatch.setattr(heygen_hook, "_detected", {})  # as in a new process
            for method in dice.sample(["GET", "POST"], dice.choice([1, 2])):
                losses = [{"drop": "after"}, {"drop": "before"}, {"status": 500}, {"truncate": True}]
                heygen.fail_next(method=method, count=dice.choice([1, 2, 1000]), **dice.choice(losses))
            with suppress(HeyGenTransientError, HeyGenOutcomeUnknownError):
                task.start()
            heygen.clear_faults()
        assert task.start() == heygen.jobs[-1].id
        assert len(heygen.jobs) == number


@MODES
def test_timeout_then_retry_reattaches_to_the_same_overdub(heygen, deferrable):
    heygen.behaviour.job_seconds = 60
    task = Task(dub(deferrable=deferrable, timeout=0.2), store=StateStore())
    with pytest.raises(HeyGenOverdubTimeoutError, match="still complete"):
        finish(task, task.start())
    heygen.force(heygen.jobs[0].id, "completed")
    assert finish(task, task.start()) == heygen.jobs[0].id
    assert len(heygen.jobs) == 1


def test_execution_timeout_holds_while_deferred(heygen):
    heygen.behaviour.job_seconds = 60
    task = Task(dub(deferrable=True, execution_timeout=timedelta(seconds=1)), store=StateStore())
    deferred = task.start()
    assert task.xcoms == {"overdub_id": heygen.jobs[0].id, "asset_ids": []}
    with pytest.raises(HeyGenOverdubTimeoutError):
        finish(task, deferred)
    assert 1 <= (datetime.now(UTC) - task.ti.start_date).total_seconds() < 2
    assert not heygen.jobs[0].deleted


def test_a_clear_after_a_timeout_reattaches_too(heygen):
    heygen.behaviour.job_seconds = 60
    task = Task(dub(timeout=0.1), retries=0, store=StateStore())
    with pytest.raises(HeyGenOverdubTimeoutError):
        task.start()
    task.clear()
    heygen.force(heygen.jobs[0].id, "completed")
    assert task.start() == heygen.jobs[0].id
    assert len(heygen.jobs) == 1


@MODES
def test_a_clear_after_success_starts_another(heygen, deferrable):
    task = Task(dub(deferrable=deferrable), store=StateStore())
    first = finish(task, task.start())
    task.clear()
    second = finish(task, task.start())
    assert [job.id for job in heygen.jobs] == [first, second]
    task.clear()
    assert finish(task, task.start()) not in (first, second)


def test_a_clear_after_success_without_waiting_starts_another(heygen):
    task = Task(dub(wait_for_completion=False), store=StateStore())
    task.start()
    task.clear()
    task.start()
    assert len(heygen.jobs) == 2


@MODES
def test_a_failed_overdub_fails_the_task_for_good_and_a_clear_starts_another(heygen, deferrable):
    heygen.behaviour.fail_jobs = 1
    heygen.behaviour.failure_message = "No face in https://x.y/v.mp4?X-Amz-Signature=SECRET1"
    signed = {"video": "https://x.y/v.mp4?sig=SECRET1"}
    task = Task(dub(deferrable=deferrable, title="Talk", **signed), store=StateStore())
    with fails_for_good(HeyGenOverdubFailedError, match="No face") as caught:
        finish(task, task.start())
    assert "SECRET1" not in str(caught.value)
    job = heygen.jobs[0].id
    assert str(caught.value).startswith(f"Overdub {job} ('Talk') failed: No face")
    assert str(caught.value).endswith(r" (video https://x.y/v.mp4?***, audio https://x.y/a.mp3)")
    assert caught.value.overdub_id == job
    task.clear()
    assert finish(task, task.start()) == heygen.jobs[1].id
    assert len(heygen.jobs) == 2


def test_an_overdub_deleted_meanwhile_is_started_again(heygen, monkeypatch):
    heygen.behaviour.job_seconds = 60
    task = Task(dub(timeout=0.1), store=StateStore())
    with pytest.raises(HeyGenOverdubTimeoutError):
        task.start()
    with HeyGenHook() as hook:
        hook.delete_overdub(heygen.jobs[0].id)
    # Just created and not found would be "not readable yet".
    monkeypatch.setattr(waiting, "NOT_FOUND_GRACE_SECONDS", 0)
    monkeypatch.setattr(waiting, "GONE_SECONDS", 0.001)
    with pytest.raises(HeyGenOverdubTimeoutError):
        task.start()
    assert len(heygen.jobs) == 2


@pytest.mark.parametrize(
    "change", [{"mode": "precision"}, {"start_time": 1}, {"enable_watermark": True}], ids=str
)
def test_a_changed_request_is_a_new_overdub(heygen, change):
    heygen.behaviour.job_seconds = 60
    task = Task(dub(timeout=0.1), store=StateStore())
    with pytest.raises(HeyGenOverdubTimeoutError):
        task.start()
    task.make = dub(timeout=0.1, **change)
    with pytest.raises(HeyGenOverdubTimeoutError):
        task.start()
    assert len(heygen.jobs) == 2


@pytest.mark.parametrize(
    ("field", "first", "second", "deferrable"),
    [
        ("title", "talk, try 1", "talk, try 2", True),
        ("title", "talk, try 1", "talk, try 2", False),
        ("callback_id", "of try 1", "of try 2", True),
        ("callback_url", "https://x.y/1", "https://x.y/2?token=SECRET1", False),
        ("folder_id", "f1", "f2", True),
    ],
)
def test_a_changed_label_is_not_another_overdub(heygen, caplog, deferrable, field, first, second):
    """Case review-08."""
    heygen.behaviour.job_seconds = 60
    task = Task(dub(deferrable=deferrable, timeout=0.3, **{field: first}), store=StateStore())
    with pytest.raises(HeyGenOverdubTimeoutError):
        finish(task, task.start())
    heygen.force(heygen.jobs[0].id, "completed")
    task.make = dub(deferrable=deferrable, **{field: second})
    assert finish(task, task.start()) == heygen.jobs[0].id
    assert len(heygen.jobs) == 1
    if field == "title":
        assert heygen.jobs[0].title == second
    else:
        assert f"{field!r}" in caplog.text
    assert "SECRET1" not in json.dumps(task.store) + caplog.text
    # What was done is noted: not a rename for each further try.
    finish(task, task.start())
    assert [request.method for request in heygen.requests].count("PATCH") == (field == "title")


def test_a_rename_logs_no_secret(heygen, caplog, capsys):
    caplog.set_level("INFO")
    heygen.behaviour.job_seconds = 60
    with pytest.raises(HeyGenOverdubTimeoutError):
        (task := Task(dub(timeout=0.1, title="one"), store=StateStore())).start()
    heygen.force(heygen.jobs[0].id, "completed")
    task.make = dub(title="https://x.y/v.mp4?sig=SECRET1")
    task.start()
    text = caplog.text + capsys.readouterr().out
    assert "Renamed overdub" in text
    assert "SECRET1" not in text


def test_a_rejected_rename_does_not_matter(heygen):
    heygen.behaviour.job_seconds = 60
    task = Task(dub(timeout=0.1, title="one"), store=StateStore())
    with pytest.raises(HeyGenOverdubTimeoutError):
        task.start()
    heygen.force(heygen.jobs[0].id, "completed")
    heygen.fail_next(method="PATCH", status=403)
    task.make = dub(title="two")
    assert task.start() == heygen.jobs[0].id
    assert heygen.jobs[0].title == "one"


def test_a_rejection_that_heygen_stores_is_not_met_again(heygen):
    """HeyGen may return its first response to a key for 24 hours, even if it was a rejection."""
    heygen.fail_next(method="POST", status=402, code="insufficient_credit")
    task = Task(dub(), store=StateStore())
    with fails_for_good(HeyGenPermanentError, match="402"):
        task.start()
    task.clear()
    assert task.start() == heygen.jobs[0].id
    first, second = (seen.idempotency_key for seen in heygen.requests if seen.method == "POST")
    assert first != second


@SERVERS
def test_without_durable_a_retry_starts_another(heygen, idempotency):
    heygen.behaviour.idempotency = idempotency
    heygen.behaviour.job_seconds = 60
    task = Task(dub(durable=False, timeout=0.1), store=StateStore())
    for _ in range(2):
        with pytest.raises(HeyGenOverdubTimeoutError):
            task.start()
    assert len(heygen.jobs) == 2
    assert not task.store


def test_reattaching_pushes_the_xcoms_of_an_undisturbed_run(heygen):
    undisturbed = Task(dub(), store=StateStore())
    undisturbed.start()
    heygen.behaviour.job_seconds = 60
    task = Task(dub(timeout=0.1), store=StateStore())
    task.ti.run_id = "another run"
    with pytest.raises(HeyGenOverdubTimeoutError):
        task.start()
    heygen.force(heygen.jobs[1].id, "completed")
    task.start()
    varying = {"overdub_id", "callback_id", "created_at", "duration"}

    def steady(xcoms):
        return {name: value for name, value in xcoms["overdub"].items() if name not in varying}

    assert task.xcoms.keys() == undisturbed.xcoms.keys()
    assert steady(task.xcoms) == steady(undisturbed.xcoms)
    assert task.xcoms["overdub"]["overdub_id"] == task.xcoms["overdub_id"] == heygen.jobs[1].id


def test_a_certain_rejection_proves_nothing_about_an_earlier_try(heygen, pauses):
    heygen.behaviour.idempotency = False
    heygen.fail_next(method="POST", count=6, status=500)
    task = Task(dub(), store=StateStore())
    with pytest.raises(HeyGenTransientError):
        task.start()
    heygen.fail_next(method="POST", status=402, code="insufficient_credit")
    with fails_for_good(HeyGenPermanentError):
        task.start()
    # As if what the first try had sent came through only now.
    with HeyGenHook() as hook:
        late = hook.create_overdub(
            {"video": "https://x.y/v.mp4", "audio": "https://x.y/a.mp3"},
            idempotency_key=task.store.get("heygen_overdub")["key"],
        )
    task.clear()
    assert task.start() == late
    assert len(heygen.jobs) == 1


def test_a_rejected_repeat_after_a_lost_response_is_retryable(heygen, pauses, monkeypatch):
    """What the first request starts may be why there is no credit left for the second, and appear late."""
    monkeypatch.setattr("airflow_provider_heygen.hooks.heygen.SETTLE_SECONDS", 0)
    heygen.behaviour.idempotency = False
    heygen.fail_next(method="POST", status=500)
    heygen.fail_next(method="POST", status=402, code="insufficient_credit")
    task = Task(dub(), store=StateStore())
    with pytest.raises(HeyGenPermanentError) as caught:
        task.start()
    assert not isinstance(caught.value, AirflowFailException)
    with HeyGenHook() as hook:
        late = hook.create_overdub(
            {"video": "https://x.y/v.mp4", "audio": "https://x.y/a.mp3"},
            idempotency_key=task.store.get("heygen_overdub")["key"],
        )
    assert task.start() == late
    assert len(heygen.jobs) == 1


@pytest.mark.parametrize("store", [False])
def test_a_create_that_outlives_our_patience_is_waited_for(heygen, connect, monkeypatch, store):
    monkeypatch.setattr("airflow_provider_heygen.hooks.heygen.SETTLE_SECONDS", 10)
    heygen.behaviour.idempotency = False
    # The worker dies while HeyGen works on the create, and starts again at once.
    heygen.behaviour.create_latency = 2
    task = Task(dub(), store=StateStore() if store else None)
    connection = heygen.connection()
    connect(heygen.url, connection["password"], **connection["extra"], write_timeout=0.5)
    with monkeypatch.context() as patch:
        patch.setattr(HeyGenHook, "_log_retry", killed)
        with pytest.raises(Killed):
            task.start()
    due = time.monotonic() + 3
    connect(heygen.url, connection["password"], **connection["extra"])
    assert task.start() == heygen.jobs[0].id
    time.sleep(max(0.0, due - time.monotonic()))
    assert len(heygen.jobs) == 1


@MODES
@MEMORIES
def test_a_lost_response_is_searched_for_although_heygen_asks_to_wait(
    heygen, pauses, monkeypatch, deferrable, store, durable
):
    monkeypatch.setattr("airflow_provider_heygen.dubbing.time.sleep", pauses.append)
    heygen.behaviour.idempotency = False
    heygen.fail_next(method="POST", drop="after")
    heygen.fail_next(method="GET", status=429, headers={"Retry-After": "90"})
    task = Task(dub(deferrable=deferrable, durable=durable), store=StateStore() if store else None)
    outcome = task.start()
    if deferrable:
        assert outcome.method_name == "execute_again"
        outcome = finish(task, task.resume(outcome, None))
    assert outcome == heygen.jobs[0].id
    assert len(heygen.jobs) == 1
    assert [pause >= 90 for pause in pauses].count(True) == (0 if deferrable else 1)


def test_when_a_create_was_sent_is_known_of_each_attempt(heygen, pauses, monkeypatch):
    """A create may come to be until some time after it was sent: after the last time, not the first."""
    heygen.fail_next(method="POST", count=2, status=500)
    sent = []
    monkeypatch.setattr(
        StateStore,
        "set",
        lambda store, key, value: sent.append(value["sent_at"]) or store.update({key: "null"}),
    )
    Task(dub(), store=StateStore()).start()
    assert len(set(sent) - {0.0}) == 3


@MODES
def test_a_url_signed_again_for_a_retry_is_the_same_request(heygen, deferrable):
    heygen.behaviour.job_seconds = 60
    task = Task(dub(video="https://x.y/v.mp4?sig=1", deferrable=deferrable, timeout=0.1), store=StateStore())
    with pytest.raises(HeyGenOverdubTimeoutError):
        finish(task, task.start())
    task.make = dub(video="https://x.y/v.mp4?sig=2", deferrable=deferrable)
    heygen.force(heygen.jobs[0].id, "completed")
    assert finish(task, task.start()) == heygen.jobs[0].id
    assert len(heygen.jobs) == 1


# --- Uploads --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    directory = tmp_path_factory.mktemp("clips")
    media.make_video(directory / "v.mp4", 0.5)
    media.make_audio(directory / "a.mp3", 0.5)
    return directory


@pytest.fixture
def files(clips, tmp_path, monkeypatch):
    """A video for a direct upload where there are such, and an audio for a form."""
    monkeypatch.setattr(
        "airflow_provider_heygen.api.MAX_MULTIPART_BYTES", (clips / "v.mp4").stat().st_size - 1
    )
    monkeypatch.setattr("airflow_provider_heygen.upload.MAX_MULTIPART_BYTES", 10**9)
    for name in ("v.mp4", "a.mp3"):
        shutil.copy(clips / name, tmp_path)
    return {"video": f"file://{tmp_path}/v.mp4", "audio": f"file://{tmp_path}/a.mp3"}


def uploads(heygen):
    """How often bytes were sent."""
    routes = heygen.requests_by_route
    return routes["POST /v3/assets"] + routes["PUT /uploads/{asset_id}"]


@KILLS
def test_uploads_killed_at_any_step_and_retried(heygen, reaper, pauses, files, idempotency, after, store):
    died, step, most = True, 0, 0
    while died:
        heygen.reset()
        heygen.behaviour.idempotency = idempotency
        step += 1
        task = Task(dub(wait_for_completion=False, **files), store=StateStore() if store else None)
        reaper.left, reaper.after, died = step, after, False
        try:
            outcome = task.start()
        except Killed:
            died = True
            outcome = task.start()
        assert len(heygen.jobs) == 1, f"killed at step {step}"
        assert outcome == heygen.jobs[0].id
        if idempotency:
            assert len(heygen.assets) == 2, f"killed at step {step}"
        most = max(most, uploads(heygen))
    assert step >= 7
    # With a record, no more than the one file that was on its way is sent again.
    assert most <= (3 if store else 4)


@KILLS
@pytest.mark.parametrize("name", ["video", "audio"])
def test_an_upload_killed_at_any_step_and_retried(
    heygen, reaper, pauses, files, name, idempotency, after, store
):
    died, step = True, 0
    while died:
        heygen.reset()
        heygen.behaviour.idempotency = idempotency
        step += 1
        make = lambda: HeyGenUploadAssetOperator(task_id="upload", source=files[name])  # noqa: E731
        task = Task(make, store=StateStore() if store else None)
        reaper.left, reaper.after, died = step, after, False
        try:
            outcome = task.start()
        except Killed:
            died = True
            outcome = task.start()
        assert outcome["asset_id"] == task.xcoms["asset_id"] == heygen.assets[-1].id
        assert len(heygen.assets) == 1 or not idempotency, f"killed at step {step}"
    assert step >= (4 if store else 2)


def uploading(files):
    return lambda: HeyGenUploadAssetOperator(task_id="upload", source=files["audio"])


def test_an_upload_that_was_recorded_is_not_sent_again(heygen, files):
    task = Task(uploading(files), store=StateStore())
    # The worker dies after the last thing it does, and Airflow does not know.
    first, second = task.start(), task.start()
    assert first == second
    assert uploads(heygen) == 1


@pytest.mark.parametrize("lost", [False, True], ids=["id known", "response lost"])
def test_a_clear_that_reattaches_still_reports_the_uploads(heygen, files, lost):
    """A later task deletes them by this XCom."""
    heygen.behaviour.job_seconds = 60
    task = Task(dub(**files, deferrable=True), store=StateStore())
    assert isinstance(task.start(), TaskDeferred)
    sent = task.xcoms["asset_ids"]
    assert len(sent) == 2
    if lost:
        task.store.set("heygen_overdub", {**task.store.get("heygen_overdub"), "overdub_id": None})
    task.clear()
    assert isinstance(task.start(), TaskDeferred)
    assert (task.xcoms["asset_ids"], len(heygen.assets), len(heygen.jobs)) == (sent, 2, 1)


@STORES
def test_a_clear_after_success_uploads_again(heygen, files, store):
    task = Task(uploading(files), store=StateStore() if store else None)
    first = task.start()
    task.clear()
    assert task.start() != first
    assert len(heygen.assets) == 2


@STORES
def test_a_changed_file_is_uploaded_again_and_a_touched_one_is_not(heygen, files, tmp_path, store):
    task = Task(uploading(files), store=StateStore() if store else None)
    first = task.start()
    os.utime(tmp_path / "a.mp3", (1, 1))
    assert task.start() == first
    with (tmp_path / "a.mp3").open("ab") as file:
        file.write(b"more")
    assert task.start() != first
    assert len(heygen.assets) == 2


def test_a_changed_file_is_a_new_overdub(heygen, files, tmp_path):
    heygen.behaviour.job_seconds = 60
    task = Task(dub(timeout=0.1, **files), store=StateStore())
    with pytest.raises(HeyGenOverdubTimeoutError):
        task.start()
    with pytest.raises(HeyGenOverdubTimeoutError):
        task.start()
    assert (len(heygen.jobs), uploads(heygen)) == (1, 2)
    with (tmp_path / "a.mp3").open("ab") as file:
        file.write(b"more")
    with pytest.raises(HeyGenOverdubTimeoutError):
        task.start()
    # The video is the same, and so is its asset.
    assert (len(heygen.jobs), uploads(heygen)) == (2, 3)
    first, second = (job.request for job in heygen.jobs)
    assert first.video == second.video
    assert first.audio != second.audio


@pytest.mark.parametrize(("cleared", "sent"), [(False, 2), (True, 4)])
def test_a_rejected_create_request_keeps_the_uploads_until_a_clear(heygen, pauses, files, cleared, sent):
    heygen.fail_next(method="POST", path="/v3/overdubs", status=409, code="asset_not_available", count=6)
    task = Task(dub(**files), store=StateStore())
    with pytest.raises(HeyGenTransientError, match="asset_not_available"):
        task.start()
    if cleared:
        task.clear()
    assert task.start() == heygen.jobs[0].id
    assert uploads(heygen) == len(heygen.assets) == sent


def test_a_clear_after_success_uploads_and_dubs_again(heygen, files):
    task = Task(dub(**files), store=StateStore())
    first = task.start()
    task.clear()
    assert task.start() != first
    assert (len(heygen.jobs), len(heygen.assets)) == (2, 4)


@SERVERS
@STORES
def test_assets_that_are_gone_are_uploaded_again(heygen, files, monkeypatch, store, idempotency):
    heygen.behaviour.idempotency = idempotency
    task = Task(dub(**files), store=StateStore() if store else None)
    with monkeypatch.context() as patch:
        patch.setattr(HeyGenHook, "create_overdub", killed)
        with pytest.raises(Killed):
            task.start()
    heygen.forget_assets()
    assert task.start() == heygen.jobs[0].id
    assert len(heygen.jobs) == 1
    # Without a record it is not known which of them are gone.
    assert len(heygen.assets) == 2 or not store
    if store:
        assert set(task.store.get("heygen_overdub")["assets"].values()) == {
            asset.id for asset in heygen.assets
        }


def test_assets_that_are_gone_again_and_again_end_the_task(heygen, files):
    heygen.fail_next(method="POST", path="/v3/overdubs", status=404, code="asset_not_found", count=9)
    with fails_for_good(HeyGenPermanentError, match="asset_not_found"):
        Task(dub(**files), store=StateStore()).start()
    assert uploads(heygen) == 4


def test_an_authors_own_asset_that_is_gone_is_reported_at_once(heygen):
    gone = {"type": "asset_id", "asset_id": "asset_gone"}
    with fails_for_good(HeyGenPermanentError, match="asset_not_found"):
        Task(dub(video=gone), store=StateStore()).start()
    assert [request.method for request in heygen.requests] == ["POST"]


def test_429_during_an_upload_defers_and_continues(heygen, pauses, files):
    heygen.fail_next(method="POST", path="/v3/assets", status=429, headers={"Retry-After": "40"})
    task = Task(dub(deferrable=True, **files), store=StateStore())
    deferred = task.start()
    assert deferred.method_name == "execute_again"
    # A 429 to an upload does not mean that HeyGen has no free slot, so the task does not join that queue.
    assert isinstance(deferred.trigger, DateTimeTrigger)
    assert finish(task, task.resume(deferred, None)) == heygen.jobs[0].id
    assert (pauses, len(heygen.assets)) == ([], 2)


@MEMORIES
def test_a_file_that_is_known_is_not_read_again(heygen, clips, storage, monkeypatch, store, durable):
    audio = (clips / "a.mp3").read_bytes()
    storage.write("v.mp4", (clips / "v.mp4").read_bytes())
    storage.write("a.mp3", audio)
    video, audio_uri = (str(storage_path(storage.uri(name), "it")) for name in ("v.mp4", "a.mp3"))
    heygen.fail_next(method="POST", path="/v3/overdubs", status=429, headers={"Retry-After": "40"}, count=4)
    make = dub(video=video, audio=audio_uri, deferrable=True, durable=durable)
    task = Task(make, store=StateStore() if store else None)
    deferred = task.start()
    with monkeypatch.context() as patch:
        patch.setattr(ObjectStoragePath, "open", killed)
        deferred = task.resume(json.loads(json.dumps(deferred.kwargs)) and deferred, None)
        deferred = task.resume(deferred, None)
        # As many bytes, but others.
        storage.write("a.mp3", audio[:-1] + b"x")
        with pytest.raises(Killed):
            task.resume(deferred, None)
    assert len(heygen.assets) == 2
    deferred = task.resume(deferred, None)
    assert finish(task, task.resume(deferred, None)) == heygen.jobs[0].id
    assert [asset.path.read_bytes() for asset in heygen.assets][1:] == [audio, audio[:-1] + b"x"]


# --- Retry-After ----------------------------------------------------------------------------------------


@MEMORIES
def test_429_defers_a_deferrable_create_until_it_may_come_again(heygen, pauses, store, durable):
    heygen.fail_next(method="POST", status=429, headers={"Retry-After": "40"}, code="rate_limit_exceeded")
    operator = dub(deferrable=True, execution_timeout=timedelta(seconds=500), timeout=1, durable=durable)
    task = Task(operator, store=StateStore() if store else None)
    deferred = task.start()
    assert isinstance(deferred, TaskDeferred)
    assert deferred.method_name == "execute_again"
    json.dumps(deferred.kwargs)  # Airflow stores it
    # Should no triggerer be there: Airflow ends it, a little after the task's own time.
    assert timedelta(seconds=500) < deferred.timeout < timedelta(seconds=700)
    assert 40 <= deferred.trigger.not_before - task.ti.start_date.timestamp() <= 60
    assert (deferred.trigger.deadline, deferred.trigger.resumed) == (deferred.kwargs["until"], False)
    assert pauses == []  # no worker sleeps
    assert heygen.jobs == []
    heygen.fail_next(method="POST", status=429, code="rate_limit_exceeded")
    again = task.resume(deferred, None)
    assert (again.trigger.since, again.trigger.resumed) == (deferred.trigger.since, True)
    outcome = finish(task, task.resume(again, None))
    assert outcome == heygen.jobs[0].id
    posts = [request for request in heygen.requests if request.method == "POST"]
    assert len({request.idempotency_key for request in posts}) == 1
    # A plain refusal needs no search.
    assert not [
        request
        for request in heygen.requests
        if request.route.endswith("overdubs") and request.method == "GET"
    ]


def test_429_is_waited_out_in_place_when_sync(heygen, pauses, monkeypatch):
    slept = []
    monkeypatch.setattr("airflow_provider_heygen.dubbing.time.sleep", slept.append)
    heygen.fail_next(method="POST", status=429, headers={"Retry-After": "90"}, code="rate_limit_exceeded")
    task = Task(dub(), store=StateStore())
    assert task.start() == heygen.jobs[0].id
    assert slept[0] >= 90


def test_a_connection_that_is_wrong_for_a_moment_ends_no_wait_on_a_worker(heygen, connect, monkeypatch):
    connect(heygen.url)
    wait = dubbing.Dubbing._wait

    def mend(_):
        connect(heygen.url)
        heygen.force(heygen.jobs[0].id, "completed")

    monkeypatch.setattr(dubbing.Dubbing, "_wait", lambda *args: (connect(heygen.url, ""), wait(*args))[1])
    monkeypatch.setattr("airflow_provider_heygen.waiting.time.sleep", mend)
    assert Task(dub(), store=StateStore()).start() == heygen.jobs[0].id


@MODES
def test_429_beyond_execution_timeout_ends_the_task(heygen, deferrable):
    heygen.fail_next(method="POST", status=429, headers={"Retry-After": "500"}, code="rate_limit_exceeded")
    limit = timedelta(seconds=100)
    task = Task(dub(deferrable=deferrable, execution_timeout=limit), store=StateStore())
    with pytest.raises(HeyGenOverdubTimeoutError, match="no overdub was started"):
        task.start()


@MEMORIES
def test_a_lost_response_after_the_deadline_stays_in_doubt(heygen, pauses, store, durable):
    heygen.fail_next(method="POST", drop="after")
    heygen.fail_next(method="GET", count=2, status=429, headers={"Retry-After": "500"})
    limited = dub(execution_timeout=timedelta(seconds=100), durable=durable)
    task = Task(limited, store=StateStore() if store else None)
    for _ in range(2 if durable else 1):
        with pytest.raises(HeyGenOverdubTimeoutError, match="whether an overdub was started is unknown"):
            task.start()


@pytest.mark.parametrize("deferrable", [True, False])
def test_a_spent_quota_is_not_waited_for(heygen, deferrable):
    heygen.fail_next(method="POST", status=429, code="quota_exceeded")
    task = Task(dub(deferrable=deferrable), store=StateStore())
    with fails_for_good(HeyGenPermanentError, match="quota"):
        task.start()


# --- Ambiguous causes -----------------------------------------------------------------------------------


@STORES
def test_an_authors_callback_id_on_many_jobs_reattaches_to_none(heygen, pauses, monkeypatch, store):
    monkeypatch.setattr("airflow_provider_heygen.dubbing.time.sleep", pauses.append)
    heygen.behaviour.idempotency = False
    sibling = Task(dub(callback_id="nightly"), store=StateStore() if store else None)
    sibling.ti.map_index = 7
    sibling.start()
    heygen.fail_next(method="POST", status=500)
    task = Task(dub(callback_id="nightly"), store=StateStore() if store else None)
    with pytest.raises(HeyGenOutcomeUnknownError, match="Leave callback_id unset"):
        task.start()
    assert len(heygen.jobs) == 1
    # Only a clear is a user's decision, whatever happens in between.
    with pytest.raises(HeyGenOutcomeUnknownError):
        task.start()
    task.clear()
    heygen.fail_next(method="POST", status=429, headers={"Retry-After": "90"})
    if not store:  # Without the store, a clear cannot be distinguished from a retry.
        with pytest.raises(HeyGenOutcomeUnknownError, match="durable=False"):
            task.start()
        task.make = dub(callback_id="nightly", durable=False)
    assert task.start() == heygen.jobs[1].id
    assert max(pauses) >= 90


def test_a_returned_id_can_be_polled(heygen):
    heygen.behaviour.get_lag = 1.2
    overdub_id = Task(dub(wait_for_completion=False), store=StateStore()).start()
    with HeyGenHook() as hook:
        assert hook.get_overdub(overdub_id).overdub_id == overdub_id


@pytest.mark.parametrize("resource", ["lipsyncs"])
def test_the_idempotency_key_is_relied_on_where_it_is_documented(heygen, pauses):
    heygen.fail_next(method="POST", drop="after")
    task = Task(dub(callback_id="nightly"), store=StateStore())
    assert task.start() == heygen.jobs[0].id
    assert len(heygen.jobs) == 1


def test_bad_input_sends_nothing_and_records_nothing(heygen):
    task = Task(dub(mode="fast"), store=StateStore())
    with fails_for_good(HeyGenBadInputError, match="mode"):
        task.start()
    assert heygen.requests == []
    assert not task.store


def test_no_secret_is_in_the_record_or_the_trigger(heygen):
    heygen.behaviour.job_seconds = 60
    task = Task(dub(deferrable=True, video="https://x.y/v.mp4?X-Amz-Signature=SECRET1"), store=StateStore())
    deferred = task.start()
    stored = json.dumps(task.store) + json.dumps(deferred.trigger.serialize()) + json.dumps(deferred.kwargs)
    assert "SECRET1" not in stored
    assert heygen.api_key not in stored


# --- The decision table, carried out -------------------------------------------------------------------

ENVELOPED, PAGE = {"status": 404}, {"status": 404, "html": True}
# What the status check of an earlier overdub gets, and whether it proves that a second one is wanted.
ANSWERS = {
    "running": (None, None, False),
    "completed": ("completed", None, False),
    "failed": ("failed", None, True),
    "404 enveloped, listed": ("running", ENVELOPED, False),
    "404 enveloped, absent": ("deleted", None, True),
    "404 page, listed": ("running", PAGE, False),
    "404 page, absent": ("deleted", PAGE, False),
    "403 page": ("running", {"status": 403, "html": True}, False),
    "403 enveloped": ("running", {"status": 403}, False),
    "401 enveloped": ("running", {"status": 401}, False),
    "503": ("running", {"status": 503}, False),
}
CHANGES = {
    "same": {},
    "label changed": {"title": "another", "folder_id": "another"},
    "billed part changed": {"mode": "precision"},
}


HOW = ["retry", "clear"]
NOT_STARTED, STARTED = ["nothing", "not sent"], ["sent unknown id", "answered", "delivered"]
TRIES = [
    # The same request meets each state of its overdub. A changed request meets each state only once: a state
    # does not matter to a changed billed part, nor a changed label to a state.
    *itertools.product(STARTED, ANSWERS, HOW, ["same"]),
    *zip(itertools.cycle(STARTED), ANSWERS, itertools.cycle(HOW), itertools.repeat("label changed")),
    *zip(itertools.cycle(STARTED), ANSWERS, itertools.cycle(HOW), itertools.repeat("billed part changed")),
    *(
        (record, answer, how, change)
        for (record, how, change), answer in each_value(itertools.product(NOT_STARTED, HOW, CHANGES), ANSWERS)
    ),
]


@pytest.mark.parametrize(("record", "answer", "how", "change"), TRIES)
def test_how_many_overdubs_are_started(heygen, pauses, monkeypatch, record, answer, how, change):
    """A second overdub needs a changed request, or HeyGen's word that the first has failed or is gone."""
    monkeypatch.setattr(waiting, "NOT_FOUND_GRACE_SECONDS", 0)
    monkeypatch.setattr(waiting, "GONE_SECONDS", 0.001)
    heygen.behaviour.idempotency = False  # only the submission record prevents a second one
    heygen.behaviour.job_seconds = 1000
    state, fault, another = ANSWERS[answer]
    task = Task(dub(wait_for_completion=False), store=StateStore())
    there = record not in ("nothing", "not sent")
    if record == "not sent":
        heygen.fail_next(method="POST", status=402, code="insufficient_credit")
        with fails_for_good(HeyGenPermanentError, match="402"):
            task.start()
    elif there:
        task.start()
        (job,) = heygen.jobs
        kept = task.store.get("heygen_overdub")
        # Airflow's worker died before it had noted what it knows in the end; long ago by HeyGen's clock.
        kept |= {"delivered": record == "delivered"}
        if record == "sent unknown id":
            kept |= {"overdub_id": None, "answered": 0.0}
        task.store.set("heygen_overdub", kept)
        if state == "deleted":
            with HeyGenHook() as hook:
                hook.delete_overdub(job.id)
        elif state is not None:
            heygen.force(job.id, state)
    if how == "clear":
        task.clear()
    if fault is not None:
        heygen.fail_next(method="GET", path="/v3/overdubs/", count=1000, **fault)
    before = len(heygen.jobs)
    task.make = dub(wait_for_completion=False, **CHANGES[change])
    outcome = None
    with suppress(HeyGenTransientError, HeyGenOutcomeUnknownError):
        outcome = task.start()
    if not there or change == "billed part changed" or (record == "delivered" and how == "clear"):
        started = 1
    elif record == "sent unknown id" and state == "deleted":
        started = 1  # the list does not have it: it did not come to be
    else:
        started = int(another)
    assert len(heygen.jobs) - before == started
    if started or record != "sent unknown id":
        # A poll that fails is no reason to fail the try.
        assert outcome == heygen.jobs[-1].id


@pytest.mark.parametrize("how", ["retry", "clear"])
@pytest.mark.parametrize(
    "fault", [PAGE, {"status": 404, "body": "default backend - 404"}, ENVELOPED], ids=str
)
def test_one_404_proves_nothing(heygen, monkeypatch, fault, how):
    """Cases bug-01 and review-01."""
    monkeypatch.setattr(waiting, "NOT_FOUND_GRACE_SECONDS", 0)
    monkeypatch.setattr(waiting, "GONE_SECONDS", 0.001)
    heygen.behaviour.job_seconds = 60
    task = Task(dub(deferrable=True), store=StateStore())
    task.start()
    if how == "clear":
        task.clear()
    heygen.fail_next(method="GET", path="/v3/overdubs/", **fault)
    task.start()
    assert len(heygen.jobs) == 1


@pytest.mark.parametrize("fault", [PAGE, {"status": 503}, {"status": 403}], ids=str)
def test_gone_needs_the_list_and_a_second_404(heygen, monkeypatch, pauses, fault):
    monkeypatch.setattr(waiting, "NOT_FOUND_GRACE_SECONDS", 0)
    monkeypatch.setattr(waiting, "GONE_SECONDS", 0.001)
    heygen.behaviour.job_seconds = 60
    task = Task(dub(wait_for_completion=False), store=StateStore())
    first = task.start()
    with HeyGenHook() as hook:
        hook.delete_overdub(first)
    # The list cannot be read.
    heygen.fail_next(method="GET", path="/v3/overdubs$|/v3/overdubs[?]", count=1000, **fault)
    assert task.start() == first
    heygen.clear_faults()
    # The list does not have it, but the second check meets something else.
    slept = []

    def pause(seconds):
        slept.append(seconds)
        heygen.fail_next(method="GET", path="/v3/overdubs/", count=1000, **fault)

    monkeypatch.setattr(waiting, "GONE_SECONDS", 30.0)
    with monkeypatch.context() as patch:
        patch.setattr("airflow_provider_heygen.submitter.time.sleep", pause)
        patch.setattr(HeyGenHook, "_log_retry", lambda *_: None)
        assert task.start() == first
    assert slept[0] == 30.0
    heygen.clear_faults()
    monkeypatch.setattr(waiting, "GONE_SECONDS", 0.001)
    assert task.start() != first


# --- The record ---------------------------------------------------------------------------------------


def record_of(task):
    return task.store.get("heygen_overdub")


def test_a_search_without_a_record_goes_back_to_the_start_of_the_dag_run(heygen, monkeypatch):
    asked = []
    monkeypatch.setattr(HeyGenHook, "find_created", lambda *_, **times: asked.append(times))
    task = Task(dub(wait_for_completion=False))
    task.began -= timedelta(hours=5)
    task.ti.try_number = 1
    task.start()
    assert asked[0]["since"] == task.began.timestamp()
    assert time.time() - asked[0]["sent_at"] < 10


def test_a_record_is_of_the_last_clear(heygen):
    heygen.behaviour.job_seconds = 60
    task = Task(dub(timeout=0.1), store=StateStore())
    with pytest.raises(HeyGenOverdubTimeoutError):
        task.start()
    task.clear()
    with pytest.raises(HeyGenOverdubTimeoutError):
        task.start()
    assert record_of(task)["max_tries"] == task.ti.max_tries
    heygen.force(heygen.jobs[0].id, "completed")
    # The worker dies after the delivery: the retry is none of the clear.
    first = task.start()
    assert task.start() == first == heygen.jobs[0].id
    assert len(heygen.jobs) == 1


@STORES
def test_a_request_without_a_response_is_in_doubt(heygen, monkeypatch, store):
    task = Task(dub(), store=StateStore() if store else None)
    task.ti.try_number = 1

    def records():
        return SubmissionStore(task.context, durable=True, kept=kept)

    for changes, doubt in [({}, False), ({"sent": True}, True), ({"sent": True, "overdub_id": "od"}, False)]:
        kept = {"digest": "d", "number": 1, "key": "k", "began": 0.0, "max_tries": 3} | changes
        if store:
            task.store.set("heygen_overdub", kept)
        assert records().outcome_unknown is doubt


def test_an_unknown_outcome_is_noted_and_nothing_is_uploaded_again(heygen, files, monkeypatch):
    def lost(*_, **__):
        raise HeyGenNotFoundError("Gone", status_code=404, code="asset_not_found", outcome_unknown=True)

    monkeypatch.setattr(HeyGenHook, "create_overdub", lost)
    task = Task(dub(**files), store=StateStore())
    began = time.time()
    with pytest.raises(HeyGenNotFoundError):
        task.start()
    assert uploads(heygen) == 2
    assert record_of(task)["sent"] is True
    assert record_of(task)["sent_at"] >= began


@pytest.mark.parametrize("headers", [{}, {"Retry-After": "1"}], ids=str)
def test_429_is_never_slept_on_a_worker_and_never_deferred_for_a_moment(heygen, monkeypatch, headers):
    slept = []
    monkeypatch.setattr("airflow_provider_heygen.dubbing.time.sleep", slept.append)
    heygen.fail_next(method="POST", status=429, headers=headers, code="rate_limit_exceeded")
    task = Task(dub(deferrable=True), store=StateStore())
    deferred = task.start()
    assert deferred.method_name == "execute_again"
    assert deferred.trigger.not_before - time.time() > 14
    assert not [pause for pause in slept if pause >= 1]
    assert [request.method for request in heygen.requests] == ["POST"]


# --- The end of a wait ---------------------------------------------------------------------------------


def waiting_task(heygen, **changes):
    """A task that has started its overdub and waits in the triggerer."""
    heygen.behaviour.job_seconds = 60
    task = Task(dub(deferrable=True, **changes), store=StateStore())
    deferred = task.start()
    deferred.kwargs["deadline"] = time.time()
    event = {"overdub_id": heygen.jobs[0].id, "status": "timeout", "message": "Timed out waiting"}
    return task, deferred, event


def test_the_last_poll_of_a_wait_does_not_sit_through_a_retry_after(heygen, pauses):
    task, deferred, event = waiting_task(heygen)
    heygen.fail_next(method="GET", count=50, status=503, headers={"Retry-After": "60"})
    with pytest.raises(HeyGenOverdubTimeoutError, match="last status check failed"):
        task.resume(deferred, event)
    assert pauses == []


@pytest.mark.parametrize("by", ["the trigger", "Airflow"])
@pytest.mark.parametrize("status", ["completed", "failed", "running"])
def test_no_wait_times_out_unseen(heygen, by, status):
    task, deferred, event = waiting_task(heygen)
    heygen.force(heygen.jobs[0].id, status)
    if by == "Airflow":  # no triggerer came
        task.ti.xcom_pull = lambda **_: heygen.jobs[0].id
        operator = task.make()
        end = lambda: operator.resume_execution("__fail__", {"error": "Trigger timeout"}, task.context)  # noqa: E731
    else:
        end = lambda: task.resume(deferred, event)  # noqa: E731
    if status == "completed":
        assert end() == heygen.jobs[0].id
        assert task.xcoms["overdub"]["status"] == "completed"
    else:
        error = {"failed": HeyGenTaskFailedError, "running": HeyGenOverdubTimeoutError}[status]
        with pytest.raises(error):
            end()


REFUSED_POLLS = [
    {"status": 401},
    {"status": 402, "code": "insufficient_credit"},
    {"status": 403},
    {"status": 403, "html": True},
    {"status": 404},
    {"status": 404, "html": True},
    {"status": 429, "code": "quota_exceeded"},
    {"status": 503},
]
REFUSALS = pytest.mark.parametrize("fault", REFUSED_POLLS, ids=str)


@pytest.mark.parametrize(("fault", "deferrable"), each_value(REFUSED_POLLS, [True, False]), ids=str)
def test_no_rejected_poll_ends_a_wait(heygen, monkeypatch, deferrable, fault):
    """Cases bug-02 and review-02: the overdub runs and is paid for, whatever a poll returns."""
    monkeypatch.setattr(waiting, "NOT_FOUND_GRACE_SECONDS", 0)
    heygen.behaviour.job_seconds = 0.3
    heygen.fail_next(method="GET", path="/v3/overdubs", count=2, **fault)
    task = Task(dub(deferrable=deferrable), store=StateStore())
    assert finish(task, task.start()) == heygen.jobs[0].id


@REFUSALS
def test_a_wait_with_rejected_polls_to_its_end_is_retryable(heygen, monkeypatch, pauses, fault):
    monkeypatch.setattr(waiting, "NOT_FOUND_GRACE_SECONDS", 0)
    task, deferred, event = waiting_task(heygen)
    heygen.fail_next(method="GET", count=1000, **fault)
    with pytest.raises(HeyGenOverdubTimeoutError) as caught:
        task.resume(deferred, event)
    assert not isinstance(caught.value, AirflowFailException)
    heygen.clear_faults()
    heygen.force(heygen.jobs[0].id, "completed")
    assert finish(task, task.start()) == heygen.jobs[0].id
    assert len(heygen.jobs) == 1


@pytest.mark.parametrize("event", [None, {}, {"status": "success"}, "completed"], ids=str)
def test_an_event_of_another_release_fails_and_a_retry_reattaches(heygen, event):
    task, deferred, _ = waiting_task(heygen)
    with pytest.raises(HeyGenTriggerEventError, match="not affected") as caught:
        task.resume(deferred, event)
    assert not isinstance(caught.value, AirflowFailException)
    heygen.force(heygen.jobs[0].id, "completed")
    assert finish(task, task.start()) == heygen.jobs[0].id


def test_a_cancelled_trigger_deletes_nothing(heygen):
    """A triggerer that restarts or hands on its triggers cancels them."""
    _, deferred, _ = waiting_task(heygen)

    async def restart():
        run = asyncio.create_task(anext(deferred.trigger.run()))
        await asyncio.sleep(0.1)
        run.cancel()
        await asyncio.gather(run, return_exceptions=True)
        await deferred.trigger.cleanup()

    asyncio.run(restart())
    assert not heygen.jobs[0].deleted


def test_an_event_of_an_older_provider_is_accepted(heygen):
    """Rows of an older release may be in the metadata database: these names are frozen."""
    task, deferred, event = waiting_task(heygen)
    assert (deferred.method_name, deferred.kwargs.keys()) == ("execute_complete", {"since", "deadline"})
    again = {"event": None, "since": time.time(), "until": None, "kept": None}
    with pytest.raises(TaskDeferred) as found:
        task.make().resume_execution("execute_again", again, task.context)
    assert found.value.trigger.overdub_id == heygen.jobs[0].id
    heygen.force(heygen.jobs[0].id, "completed")
    kwargs = {"event": event, "since": 1.0}
    assert task.make().resume_execution("execute_complete", kwargs, task.context) == heygen.jobs[0].id


@pytest.mark.parametrize("fault", [None, {"status": 503}], ids=["read", "not read"])
@pytest.mark.parametrize("how", ["retry", "lost response", "reuse"])
def test_a_completed_overdub_is_not_waited_for_in_the_triggerer(heygen, monkeypatch, how, fault):
    """The trigger would fire at once, and Airflow may fail such a deferral."""
    task, _, _ = waiting_task(heygen, reuse="content")
    heygen.force(heygen.jobs[0].id, "completed")
    if how == "lost response":
        task.store.set("heygen_overdub", {**task.store.get("heygen_overdub"), "overdub_id": None})
    if how == "reuse":
        task.store.clear()
    if fault:  # by the poll of the wait itself
        wait = dubbing.Dubbing._wait
        fail = lambda self, *args: (heygen.fail_next(method="GET", **fault), wait(self, *args))[1]  # noqa: E731
        monkeypatch.setattr(dubbing.Dubbing, "_wait", fail)
        assert isinstance(task.start(), TaskDeferred)
    else:
        assert task.start() == heygen.jobs[0].id
    assert len(heygen.jobs) == 1


@pytest.mark.parametrize("how", ["id known", "response lost", "reuse"])
def test_another_account_between_two_tries_starts_no_other_overdub(heygen, connect, monkeypatch, how):
    """Its 404 and its list prove nothing about the account of the create request, but a clear decides."""
    monkeypatch.setattr(waiting, "GONE_SECONDS", 0.001)
    monkeypatch.setattr(waiting, "NOT_FOUND_GRACE_SECONDS", 0)
    task, _, _ = waiting_task(heygen, reuse="content")
    overdub_id = heygen.jobs[0].id
    lost = how == "response lost"
    if lost:
        task.store.set("heygen_overdub", {**task.store.get("heygen_overdub"), "overdub_id": None})
    if how == "reuse":
        task.store.clear()
        assert task.start().trigger.overdub_id == overdub_id
    with Emulator(Behaviour(job_seconds=60), api_key="another-key") as other:
        connect(other.url, "another-key")
        for _ in range(2):
            if lost:
                with pytest.raises(HeyGenOutcomeUnknownError, match="has changed since"):
                    task.start()
            else:
                assert task.start().trigger.overdub_id == overdub_id
        assert other.jobs == []
        connect(heygen.url)
        assert task.start().trigger.overdub_id == overdub_id
        connect(other.url, "another-key")
        task.clear()
        assert task.start().trigger.overdub_id == other.jobs[0].id
    assert len(heygen.jobs) == 1


def test_a_request_in_progress_may_have_started_an_overdub(heygen):
    progress = {"status": 409, "code": "request_in_progress", "headers": {"Retry-After": "20"}}
    heygen.fail_next(method="POST", path="/v3/overdubs", **progress)
    task = Task(dub(deferrable=True, execution_timeout=timedelta(seconds=10)), store=StateStore())
    with pytest.raises(HeyGenOverdubTimeoutError, match="whether an overdub was started is unknown"):
        task.start()


@pytest.mark.parametrize(("waits", "end"), [("operator", "completed"), ("sensor", "time out")])
def test_a_triggerer_whose_clock_is_ahead_ends_no_wait(heygen, monkeypatch, waits, end):
    heygen.behaviour.job_seconds = 10_000
    task = Task(dub(deferrable=True, timeout=1800), store=StateStore())
    if waits == "sensor":
        overdub_id = HeyGenHook().create_overdub({"video": "https://x.y/v.mp4", "audio": "https://x.y/a.mp3"})
        task.make = partial(
            HeyGenOverdubSensor,
            task_id="wait",
            overdub_id=overdub_id,
            deferrable=True,
            timeout=1800,
            never_fail=True,
        )
    deferred = task.start()
    with monkeypatch.context() as triggerer:
        triggerer.setattr(time, "time", lambda real=time.time: real() + 3600)
        event = asyncio.run(anext(deferred.trigger.run())).payload
    assert event["status"] == "timeout"
    again = task.resume(deferred, event)
    assert 1800 - 60 < again.timeout.total_seconds() < 1800 + 120  # Airflow's own
    assert again.trigger.deadline is None
    assert (deferred.trigger.resource, again.trigger.resource) == ("overdubs", None)
    if end == "completed":
        heygen.force(heygen.jobs[0].id, "completed")
        with monkeypatch.context() as triggerer:
            triggerer.setattr(time, "time", lambda real=time.time: real() + 3600)
            event = asyncio.run(anext(again.trigger.run())).payload
        assert task.resume(again, event)
    else:
        with pytest.raises(AirflowSkipException):
            task.make().resume_execution("__fail__", {"error": "Trigger timeout"}, task.context)


def test_a_new_overdub_that_is_not_readable_yet_is_not_gone(heygen):
    heygen.behaviour.job_seconds = 60
    task = Task(dub(timeout=0.1), store=StateStore())
    with pytest.raises(HeyGenOverdubTimeoutError):
        task.start()
    # It began long ago: HeyGen made it wait before it was created.
    record = task.store.get("heygen_overdub")
    task.store.set("heygen_overdub", {**record, "began": record["began"] - 3600})
    heygen.fail_next(method="GET", count=1, status=404, code="not_found")
    with pytest.raises(HeyGenOverdubTimeoutError):
        task.start()
    assert len(heygen.jobs) == 1


# --- What another task or run has paid for ------------------------------------------------------------


def night(store=True, **changes):
    """One more run of the same task."""
    night.runs += 1
    task = Task(dub(**changes), store=StateStore() if store else None)
    task.ti.run_id = f"night {night.runs}"
    return task


night.runs = 0


@pytest.mark.parametrize(
    ("status", "store", "deferrable", "resource"),
    [
        ("pending", True, True, "overdubs"),
        ("pending", False, False, "lipsyncs"),
        ("running", True, False, "lipsyncs"),
        ("running", False, True, "overdubs"),
        ("completed", True, False, "overdubs"),
        ("completed", False, True, "lipsyncs"),
    ],
)
def test_a_run_uses_what_another_run_has_started(heygen, files, deferrable, store, status):
    """The first run was marked failed while its task waited, and did not ask to reuse anything."""
    heygen.behaviour.job_seconds = None
    seconds = {"pending": (0.6, 0.0), "running": (0.0, 0.6), "completed": (0.0, 0.0)}[status]
    heygen.behaviour.pending_seconds, heygen.behaviour.running_seconds = seconds
    night(store, deferrable=True, title="first", **files).start()
    assert heygen.jobs[0].status == status or status == "completed"
    task = night(store, deferrable=deferrable, title="second", reuse="content", **files)
    assert finish(task, task.start()) == heygen.jobs[0].id == task.xcoms["overdub_id"]
    assert len(heygen.jobs) == 1
    assert len(heygen.assets) == 2, "nothing is uploaded again"
    assert heygen.jobs[0].title == "first", "it is another task's to name"
    assert "PATCH" not in {request.method for request in heygen.requests}


@pytest.mark.parametrize(
    ("first", "second", "store"),
    [
        ({}, {"mode": "precision"}, True),
        ({}, {"end_time": 1}, False),
        ({"audio": "https://x.y/a.mp3"}, {"audio": "https://x.y/b.mp3"}, True),
        ({"audio": "https://x.y/a?id=1"}, {"audio": "https://x.y/a?id=2"}, True),
        ({"audio": "https://x.y/a?id=1"}, {"audio": "https://x.y/a?id=2"}, False),
        ({"audio": "https://x.y/a?id=1"}, {"audio": "https://x.y/a"}, False),
        ({"callback_id": "mine"}, {}, True),
    ],
    ids=str,
)
def test_what_differs_or_has_no_mark_is_not_used(heygen, first, second, store):
    finish(task := night(store, **first), task.start())
    finish(task := night(store, reuse="content", **second), task.start())
    assert len(heygen.jobs) == 2


@pytest.mark.parametrize(
    "what", ["failed", "three days old", "deleted", "of an unknown status", "durable=False"]
)
def test_only_what_is_good_and_recent_is_used(heygen, what):
    finish(task := night(durable=what != "durable=False"), task.start())
    (job,) = heygen.jobs
    if what == "failed":
        heygen.force(job.id, "failed", "no face")
    if what == "three days old":
        job.created_at -= 3 * 86400 + 60
    if what == "deleted":
        HeyGenHook().delete_overdub(job.id)
    if what == "of an unknown status":
        heygen.force(job.id, "paused")
    finish(task := night(reuse="content"), task.start())
    assert len(heygen.jobs) == 1 + (what != "durable=False")


def test_an_overdub_among_thousands_is_found(heygen):
    """The list is read as far as overdubs are recent, and no further."""
    finish(task := night(), task.start())
    with HeyGenHook() as hook:
        for number in range(250):
            hook.create_overdub({"video": "https://x.y/v.mp4", "audio": f"https://x.y/{number}.mp3"})
    wanted, *others = heygen.jobs
    finish(task := night(reuse="content"), task.start())
    assert len(heygen.jobs) == 251
    for job in others:
        job.created_at -= 4 * 86400
    wanted.created_at -= 5 * 86400
    before = len(heygen.requests)
    finish(task := night(reuse="content"), task.start())
    assert len(heygen.jobs) == 252
    assert [request.method for request in heygen.requests[before:]][:2] == ["GET", "POST"]


def test_a_clear_reuses_too(heygen):
    task = night(reuse="content")
    for _ in range(2):
        finish(task, task.start())
        task.clear()
    assert len(heygen.jobs) == 1


def test_a_reused_overdub_that_fails_is_not_used_again(heygen):
    heygen.behaviour.job_seconds = 3600
    night(deferrable=True).start()
    task = night(reuse="content", deferrable=True)
    deferred = task.start()
    heygen.force(heygen.jobs[0].id, "failed", "no face")
    with fails_for_good(HeyGenOverdubFailedError):
        finish(task, deferred)
    heygen.behaviour.job_seconds = 0.05
    task.clear()
    finish(task, task.start())
    assert len(heygen.jobs) == 2


@pytest.mark.parametrize("fault", [{"status": 500}, {"status": 403}, {"truncate": True}], ids=str)
def test_nothing_is_started_where_the_list_cannot_be_read(heygen, pauses, fault):
    heygen.fail_next(method="GET", count=100, **fault)
    with pytest.raises((HeyGenTransientError, HeyGenTaskFailedError)):
        night(reuse="content").start()
    assert heygen.jobs == []


@SERVERS
@RESOURCES
def test_a_lost_response_with_reuse(heygen, pauses, monkeypatch, idempotency):
    heygen.behaviour.idempotency = idempotency
    finish(task := night(), task.start())
    heygen.force(heygen.jobs[0].id, "failed", "no face")
    heygen.fail_next(method="POST", drop="after")
    finish(task := night(reuse="content"), task.start())
    assert len(heygen.jobs) == 2


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"reuse": "title"}, "reuse must be 'content' or None"),
        ({"callback_id": "x"}, "Remove your own callback_id"),
    ],
    ids=str,
)
def test_a_bad_reuse_sends_nothing(heygen, changes, error):
    with fails_for_good(HeyGenBadInputError, match=error):
        night(**{"reuse": "content"} | changes).start()
    assert heygen.requests == []


def test_a_clear_confirms_nothing_before_the_candidates_were_reported(heygen, pauses):
    """The worker was killed just after its request, so no message has named the candidate."""
    heygen.behaviour.idempotency = False
    task = Task(dub(callback_id="nightly", wait_for_completion=False), store=StateStore())
    task.start()
    kept = task.store.get("heygen_overdub")
    task.store.set("heygen_overdub", kept | {"overdub_id": None, "answered": 0.0, "delivered": False})
    task.clear()
    for _ in range(2):
        with pytest.raises(HeyGenOutcomeUnknownError, match=heygen.jobs[0].id):
            task.start()
    assert len(heygen.jobs) == 1
    task.clear()
    assert task.start() == heygen.jobs[1].id


def test_nothing_is_started_after_execution_timeout(heygen):
    heygen.fail_next(method="POST", path="/v3/overdubs", status=429)
    task = Task(dub(deferrable=True, execution_timeout=timedelta(seconds=100)), store=StateStore())
    deferred = task.start()
    deferred.kwargs["until"] = time.time() - 1
    with pytest.raises(HeyGenOverdubTimeoutError, match=r"has ended.*no overdub was started"):
        task.resume(deferred, {"status": "ready"})
    assert heygen.jobs == []


@MODES
def test_a_gateways_page_with_retry_after_is_not_waited_for_without_end(heygen, pauses, deferrable):
    page = {"status": 503, "html": True, "headers": {"Retry-After": "30"}}
    heygen.fail_next(method="POST", path="/v3/overdubs", count=1000, **page)
    with pytest.raises(HeyGenGatewayError):
        Task(dub(deferrable=deferrable), store=StateStore()).start()
    assert heygen.jobs == []
    assert [request.method for request in heygen.requests].count("POST") == 6


def test_an_overdub_is_found_after_heygen_has_dropped_the_name_of_its_request(heygen, connect, monkeypatch):
    connect(heygen.url)
    monkeypatch.setattr(heygen_hook, "_detected", {})
    monkeypatch.setattr(waiting, "NOT_FOUND_GRACE_SECONDS", 0)
    task = Task(dub(deferrable=True), store=StateStore())
    task.start()
    heygen.force(heygen.jobs[0].id, "completed")
    heygen.behaviour.resources = "lipsyncs"
    monkeypatch.setattr(heygen_hook, "_detected", {})  # another worker
    task.make = dub(timeout=5)
    assert task.start() == heygen.jobs[0].id
    assert len(heygen.jobs) == 1
