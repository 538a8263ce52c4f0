"""The rules of waiting, on a clock that we turn ourselves."""

from __future__ import annotations

import json
import math
import time
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest
from airflow_task import StateStore, Task
from hypothesis import given
from hypothesis import strategies as st
from test_exactly_once import dub

from airflow_provider_heygen import exceptions, waiting
from airflow_provider_heygen.api import DEFAULT_FAILURE_MESSAGE, Overdub
from airflow_provider_heygen.emulator import Emulator
from airflow_provider_heygen.exceptions import (
    HeyGenBadInputError,
    HeyGenError,
    HeyGenGatewayError,
    HeyGenNotFoundError,
    HeyGenOverdubFailedError,
    HeyGenOverdubTimeoutError,
    HeyGenPermanentError,
    HeyGenTransientError,
    HeyGenTriggerEventError,
)
from airflow_provider_heygen.hooks.heygen import HeyGenHook
from airflow_provider_heygen.metrics import WaitMetrics

NOW = 1_800_000_000.0
SECRET = "QUERY-SECRET"
LINK = f"https://files.heygen.ai/v.mp4?Signature={SECRET}"


class Log:
    def __init__(self):
        self.lines = []

    def info(self, text, *values):
        self.lines.append(text % values)

    warning = info


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """The time that the rules see, to be set forward; and a jitter that is always the greatest."""
    clock = SimpleNamespace(now=NOW)
    times = {"time": lambda: clock.now, "monotonic": lambda: clock.now - NOW}
    monkeypatch.setattr(waiting, "time", SimpleNamespace(**times))
    monkeypatch.setattr(exceptions, "random", SimpleNamespace(uniform=lambda _, greatest: greatest))
    return clock


def watching(**changes):
    settings = {
        "poke_interval": 10.0,
        "deadline": None,
        "not_found_until": 0.0,
        "log": Log(),
    }
    return waiting.OverdubWait("od_1", **settings | changes)


def overdub(status, **members):
    return Overdub(id="od_1", status=status, **members)


# --- Polls --------------------------------------------------------------------------------------------


def test_the_usual_course():
    watch = watching()
    assert [watch.on_poll(overdub(word)) for word in ("pending", "pending", "running", "running")] == [10] * 4
    end = watch.on_poll(overdub("completed", title="T", duration=4.2, video_url=LINK, caption_url=LINK))
    assert end["status"] == "completed"
    assert end["overdub_id"] == "od_1"
    assert end["overdub"] == overdub("completed", title="T", duration=4.2).details()
    assert SECRET not in json.dumps(end)
    assert watch.log.lines == [
        "Overdub od_1 is pending.",
        "Overdub od_1 is running.",
    ]


def test_a_long_wait_logs_a_line_every_five_minutes(clock):
    watch = watching()
    watch.on_poll(overdub("running"))
    for seconds in range(30, 3600, 30):
        clock.now = NOW + seconds
        watch.on_unchanged()
    first, *further = watch.log.lines
    assert first == "Overdub od_1 is running."
    assert further == [f"Overdub od_1 is still running after {minutes} min." for minutes in range(5, 60, 5)]


@pytest.mark.parametrize(
    ("left", "text"),
    [
        (None, "Waiting here, checking every 10 s without a limit."),
        (600, "Waiting here, checking every 10 s until 01:10 UTC."),
        (2 * 86400, "Waiting here, checking every 10 s until 1970-01-03 01:00 UTC."),
    ],
)
def test_the_log_line_at_the_start_of_a_wait(monkeypatch, left, text):
    monkeypatch.setattr(waiting, "time", SimpleNamespace(time=lambda: 3600.0))
    assert waiting.waiting_text("here", 10, None if left is None else 3600.0 + left) == text


@pytest.mark.parametrize(
    ("reason", "shown"),
    [
        ("No speaker detected", "Overdub od_1 failed: No speaker detected"),
        (None, f"Overdub od_1 failed: {DEFAULT_FAILURE_MESSAGE}"),
        ("", f"Overdub od_1 failed: {DEFAULT_FAILURE_MESSAGE}"),
        (f"Cannot fetch {LINK}", "Overdub od_1 failed: Cannot fetch https://files.heygen.ai/v.mp4?***"),
    ],
)
def test_failed(reason, shown):
    end = watching().on_poll(overdub("failed", failure_message=reason))
    assert end == {"overdub_id": "od_1", "status": "failed", "message": shown}


def test_a_title_that_is_a_url_is_redacted_where_an_overdub_has_failed():
    end = watching().on_poll(overdub("failed", title=LINK, failure_message="No"))
    assert end["message"] == "Overdub od_1 ('https://files.heygen.ai/v.mp4?***') failed: No"


def test_an_unknown_status_is_not_final_and_logged_once():
    watch = watching()
    assert [watch.on_poll(overdub("rendering")) for _ in range(3)] == [10] * 3
    assert watch.log.lines == ["Overdub od_1 is rendering (an unknown status; treated as not final)."]


def test_a_status_may_be_no_text(clock):
    watch = watching(deadline=NOW + 15)
    assert watch.on_poll(overdub(f"see {LINK} {'x' * 9999}")) == 10
    clock.now += 20
    end = watch.on_poll(overdub(f"see {LINK} {'x' * 9999}"))
    assert end["status"] == "timeout"
    assert len(watch.log.lines) == 1
    for text in (watch.log.lines[0], end["message"]):
        assert SECRET.lower() not in text.lower()
        assert len(text) < 1000


# --- The deadline -------------------------------------------------------------------------------------


def test_pauses_are_clipped_to_the_deadline(clock):
    watch = watching(deadline=NOW + 25)
    pauses = []
    while isinstance(step := watch.on_poll(overdub("running")), float):
        pauses.append(step)
        clock.now += step
    assert pauses == [10, 10, 5]
    assert step["status"] == "timeout"
    for text in ("od_1", "running", "HeyGenOverdubSensor", "'timeout'", "'execution_timeout'"):
        assert text in step["message"]


def test_failed_polls_are_limited_too(clock):
    watch = watching(deadline=NOW + 25)
    assert watch.on_error(HeyGenTransientError("busy", retry_after=500)) == 25
    clock.now += 25
    end = watch.on_error(HeyGenTransientError("busy"))
    assert end["status"] == "timeout"
    assert "not seen yet" in end["message"]


@pytest.mark.parametrize("late", [0, 1000])
def test_the_last_poll_counts_more_than_the_deadline(clock, late):
    clock.now += 100 + late
    watch = watching(deadline=NOW + 100)
    assert watch.on_poll(overdub("completed"))["status"] == "completed"
    assert watch.on_poll(overdub("failed"))["status"] == "failed"
    assert watch.on_error(HeyGenPermanentError("no"))["status"] == "timeout"
    assert watch.on_poll(overdub("pending"))["status"] == "timeout"


# --- Polls that fail ----------------------------------------------------------------------------------


def test_404_means_not_readable_yet_while_the_overdub_is_new(clock):
    watch = watching(not_found_until=NOW + 30)
    for _ in range(15):
        assert watch.on_error(HeyGenNotFoundError("gone")) == 2
        assert not watch.may_be_gone
        clock.now += 2
    assert watch.on_error(HeyGenNotFoundError("gone")) == 12.5
    assert watch.missing_since is not None


def test_an_overdub_is_new_for_half_a_minute(heygen, monkeypatch):
    monkeypatch.setattr(waiting, "time", time)
    heygen.behaviour.job_seconds = 60
    before = time.time()
    _, stored = Task(dub(deferrable=True), store=StateStore()).start().trigger.serialize()
    assert before + 30 <= stored["not_found_until"] <= time.time() + 30


@pytest.mark.parametrize("poke_interval", [5, 10, 300])
def test_gone_takes_two_404_and_the_list(clock, poke_interval):
    watch = watching(poke_interval=poke_interval)
    began = clock.now
    while not watch.may_be_gone:
        step = watch.on_error(HeyGenNotFoundError("no such overdub"))
        assert isinstance(step, float)
        assert step <= 1.25 * waiting.GONE_SECONDS
        clock.now += step
        assert clock.now - began < 100
    assert clock.now - began >= waiting.GONE_SECONDS
    assert watch.absent(None) is None, "the list could not be read"
    assert watch.may_be_gone
    end = watch.absent(False)
    assert end["status"] == "gone"
    assert "od_1" in end["message"]


@pytest.mark.parametrize(
    "news", [lambda watch: watch.on_poll(overdub("running")), lambda watch: watch.absent(True)]
)
def test_a_sign_of_life_after_a_404(clock, news):
    watch = watching()
    watch.on_error(HeyGenNotFoundError("gone"))
    clock.now += 60
    assert not watch.may_be_gone, "one 404, however long ago"
    watch.on_error(HeyGenNotFoundError("gone"))
    assert watch.may_be_gone
    news(watch)
    assert not watch.may_be_gone
    assert watch.absent(False) is None, "a search that began before the sign of life"
    watch.on_error(HeyGenNotFoundError("gone"))
    assert not watch.may_be_gone, "the time counts anew"


def test_a_wrong_clock_makes_nothing_gone(clock, monkeypatch):
    watch = watching()
    watch.on_error(HeyGenNotFoundError("gone"))
    later = {"time": lambda: NOW + 10**6, "monotonic": lambda: 1.0}
    monkeypatch.setattr(waiting, "time", SimpleNamespace(**later))
    watch.on_error(HeyGenNotFoundError("gone"))
    assert not watch.may_be_gone


def test_404_of_a_new_overdub_with_a_short_interval_or_deadline():
    assert watching(not_found_until=NOW + 30, poke_interval=0.5).on_error(HeyGenNotFoundError("gone")) == 0.5
    assert watching(not_found_until=NOW + 30, deadline=NOW + 1).on_error(HeyGenNotFoundError("gone")) == 1


@pytest.mark.parametrize(
    "error",
    [
        HeyGenPermanentError("401: correct the key"),
        HeyGenPermanentError("429 quota", status_code=429, retry_after=5),
        HeyGenGatewayError("a page"),
        HeyGenTransientError("busy"),
        HeyGenError("odd"),
        KeyError("x"),
        OSError("net"),
    ],
    ids=str,
)
def test_no_failure_ends_a_wait_before_its_time(clock, error):
    watch = watching(deadline=NOW + 100_000)
    for _ in range(200):
        step = watch.on_error(error)
        assert isinstance(step, float)
        clock.now += step
    assert isinstance(watch.on_poll(overdub("running")), float)
    clock.now = NOW + 100_001
    end = watch.on_error(error)
    assert end["status"] == "timeout"
    assert str(error) in end["message"]


def test_what_is_wrong_is_logged_once_per_change():
    watch = watching()
    for _ in range(100):
        watch.on_error(HeyGenPermanentError("correct the key"))
    assert len(watch.log.lines) == 7  # and less and less often while nothing changes
    watch.on_error(HeyGenPermanentError("top up"))
    assert "top up" in watch.log.lines[-1]
    watch.on_poll(overdub("running"))
    watch.on_error(HeyGenPermanentError("top up"))
    assert len(watch.log.lines) == 10


def test_urls_in_errors_are_not_shown(clock):
    watch = watching(deadline=NOW + 1)
    watch.on_error(RuntimeError(f"at {LINK}"))
    clock.now += 2
    end = watch.on_error(RuntimeError(f"at {LINK}"))
    assert SECRET not in end["message"] + watch.log.lines[0]


@pytest.mark.parametrize(
    ("poke_interval", "pauses"),
    [(10, [10, 20, 40, 80, 120, 120, 120]), (300, [300, 300, 300]), (0.5, [0.5, 1, 2, 4])],
)
def test_backoff(poke_interval, pauses):
    watch = watching(poke_interval=poke_interval)
    seen = [watch.on_error(HeyGenTransientError("busy")) for _ in pauses]
    assert seen == [1.25 * pause for pause in pauses]
    watch.on_poll(overdub("running"))
    assert watch.on_error(HeyGenTransientError("busy")) == 1.25 * pauses[0]


def test_jitter_never_shortens(monkeypatch):
    monkeypatch.setattr(exceptions, "random", SimpleNamespace(uniform=lambda least, _: least))
    assert watching().on_error(HeyGenTransientError("busy")) == 10
    assert watching().on_error(HeyGenTransientError("busy", retry_after=77)) == 77


@pytest.mark.parametrize(("told", "least"), [(None, 10), (0, 10), (3, 10), (77, 77), (890, 890)])
def test_retry_after_is_not_cut_short(told, least):
    pause = watching(deadline=NOW + 10_000).on_error(HeyGenTransientError("busy", retry_after=told))
    assert least <= pause <= 1.25 * least


@pytest.mark.parametrize("told", [901, 10**9, 1e300])
def test_an_absurd_retry_after_is_cut(told):
    assert watching().on_error(HeyGenTransientError("busy", retry_after=told)) == exceptions.MAX_RETRY_AFTER


def test_failing_for_weeks():
    watch = watching()
    for _ in range(2000):
        pause = watch.on_error(HeyGenTransientError("busy"))
    assert pause == 1.25 * waiting.MAX_BACKOFF_SECONDS


LOOKS = st.lists(
    st.sampled_from(["pending", "running", "completed", "failed", "rendering"])
    | st.sampled_from([HeyGenNotFoundError("gone"), HeyGenPermanentError("no"), ValueError("odd")])
    | st.builds(lambda told: HeyGenTransientError("busy", retry_after=told), st.none() | st.floats(0, 1e6)),
    min_size=1,
    max_size=60,
)


@given(
    looks=LOOKS,
    poke_interval=st.floats(0.1, 800),
    left=st.none() | st.floats(-10, 1e5),
    fresh=st.floats(0, 100),
)
def test_any_course(looks, poke_interval, left, fresh):
    # hypothesis runs this many times within one use of the clock fixture.
    waiting.time = SimpleNamespace(time=lambda: now, monotonic=lambda: now)
    now = NOW
    deadline = None if left is None else NOW + left
    watch = watching(poke_interval=poke_interval, deadline=deadline, not_found_until=NOW + fresh)
    for look in looks:
        step = watch.on_poll(overdub(look)) if isinstance(look, str) else watch.on_error(look)
        if isinstance(step, dict):
            ends = {"completed": "completed", "failed": "failed"}
            if look in ends:
                assert step["status"] == ends[look]
            else:
                assert step["status"] == "timeout"
                assert now >= deadline
            assert waiting.check_event(json.loads(json.dumps(step)), "od_1") == step
            return
        assert look not in ("completed", "failed")
        assert 0 < step < math.inf
        told = min(getattr(look, "retry_after", None) or 0, exceptions.MAX_RETRY_AFTER)
        assert step >= told or now + step == pytest.approx(deadline)
        assert deadline is None or now + step <= deadline + 1e-3
        now += step


# --- Events -------------------------------------------------------------------------------------------

DONE = {"overdub_id": "od_1", "status": "completed", "message": "Done.", "overdub": {"overdub_id": "od_1"}}
EVENTS = [
    DONE,
    {"overdub_id": "od_1", "status": "failed", "message": ""},
    {"overdub_id": "od_1", "status": "timeout", "message": "m", "new_member": 1},
    {"overdub_id": "od_1", "status": "gone", "message": "m"},
    {"overdub_id": "od_1", "status": "error", "message": "m"},
]
BAD_EVENTS = [
    *(None, "completed", [], 5, {}, [DONE]),
    {**DONE, "status": "success"},
    {**DONE, "status": None},
    {**DONE, "status": "running"},
    {**DONE, "message": None},
    {**DONE, "overdub_id": None},
    {**DONE, "overdub": None},
    {**DONE, "overdub": "od_1"},
    {name: value for name, value in DONE.items() if name != "overdub"},
    {name: value for name, value in DONE.items() if name != "overdub_id"},
    {"status": "completed", "message": SECRET},
]


@pytest.mark.parametrize("event", EVENTS, ids=str)
def test_good_event(event):
    assert waiting.check_event(event, "od_1") == event


@pytest.mark.parametrize("event", BAD_EVENTS, ids=str)
def test_bad_event(event):
    with pytest.raises(HeyGenTriggerEventError, match="overdub od_1") as raised:
        waiting.check_event(event, "od_1")
    assert SECRET not in str(raised.value)
    with pytest.raises(HeyGenTriggerEventError):
        waiting.check_event(event)


def test_good_event_of_an_id_that_a_template_made_a_number():
    event = {"overdub_id": "4711", "status": "failed", "message": "m"}
    assert waiting.check_event(event, 4711) == event
    with pytest.raises(HeyGenTriggerEventError):
        waiting.check_event(event, 471)


def test_event_of_another_overdub():
    with pytest.raises(HeyGenTriggerEventError, match="overdub od_2"):
        waiting.check_event(DONE, "od_2")
    assert waiting.check_event(DONE) == DONE


def event(status, **members):
    return {"overdub_id": "od_1", "status": status, "message": "The message.", **members}


WAIT = WaitMetrics(SimpleNamespace(dag_id="dag", task_id="task"), None)


def test_results_from_the_event_alone(heygen):
    hook = HeyGenHook()
    assert waiting.resolve_wait(DONE, WAIT, hook) == DONE["overdub"]
    for status, kind in {
        "failed": HeyGenOverdubFailedError,
        "gone": HeyGenNotFoundError,
        "error": HeyGenError,
    }.items():
        with pytest.raises(kind, match=r"^The message\.$") as raised:
            waiting.resolve_wait(event(status), WAIT, hook)
        assert raised.value.overdub_id == "od_1"
        assert raised.value.status_code == (404 if status == "gone" else None)
    with pytest.raises(HeyGenOverdubTimeoutError, match=r"^The message\.$") as raised:
        waiting.resolve_wait(event("timeout"), WAIT)  # the last poll was made here
    assert raised.value.overdub_id == "od_1"
    assert heygen.requests == []


@pytest.mark.parametrize("status", ["pending", "running"])
def test_no_wait_times_out_unseen(heygen, status):
    late = {**event("timeout"), "overdub_id": create(heygen, status)}
    with pytest.raises(HeyGenOverdubTimeoutError, match=r"^The message\.$"):
        waiting.resolve_wait(late, WAIT, HeyGenHook())
    assert [request.method for request in heygen.requests] == ["POST", "GET"]
    heygen.force(late["overdub_id"], "failed", "Too dark")
    with pytest.raises(HeyGenOverdubFailedError, match="Too dark"):
        waiting.resolve_wait(late, WAIT, HeyGenHook())
    heygen.force(late["overdub_id"], "completed")
    details = waiting.resolve_wait(late, WAIT, HeyGenHook())
    assert (details["overdub_id"], details["status"]) == (late["overdub_id"], "completed")
    assert "Signature" not in json.dumps(details)


@pytest.mark.parametrize(
    "fault", [{"status": 401}, {"status": 404}, {"html": True}, {"status": 503}], ids=str
)
def test_a_last_poll_that_fails(heygen, pauses, fault):
    late = {**event("timeout"), "overdub_id": create(heygen, "completed")}
    heygen.fail_next(method="GET", count=10, **fault)
    with pytest.raises(
        HeyGenOverdubTimeoutError, match=r"^The message\. The last status check failed: HeyGen"
    ) as raised:
        waiting.resolve_wait(late, WAIT, HeyGenHook())
    assert raised.value.overdub_id == late["overdub_id"]


def create(heygen, status):
    media = {"video": "https://example.com/v.mp4", "audio": "https://example.com/a.mp3"}
    overdub_id = HeyGenHook().create_overdub(media)
    heygen.force(overdub_id, status, "Too dark")
    return overdub_id


def test_messages_say_what_happened_and_what_to_do(clock):
    watch = watching(not_found_until=NOW + 30)
    assert watch.timed_out()["message"] == (
        "Timed out waiting for overdub od_1 (status: not seen yet). It keeps running at HeyGen and may still"
        " complete. To keep waiting, retry this task or pass the id to HeyGenOverdubSensor. To wait longer,"
        " raise 'timeout' (or 'execution_timeout')."
    )
    watch.on_error(HeyGenNotFoundError("HeyGen returned 404."))
    clock.now += 30
    watch.on_error(HeyGenNotFoundError("HeyGen returned 404."))
    assert watch.log.lines == [
        "Overdub od_1 is not readable yet; it was created just now.",
        "HeyGen returned 404. Overdub od_1 is not affected. Polling again in 12 s (1 consecutive failures).",
    ]
    assert (
        "od_1 (status: not seen yet). The last status check failed: HeyGen returned 404. It keeps"
        in (watch.timed_out()["message"])
    )
    clock.now += 30
    watch.on_error(HeyGenNotFoundError("HeyGen returned 404."))
    assert watch.may_be_gone
    assert watch.absent(listed=False)["message"] == (
        "Overdub od_1 is gone: HeyGen has returned 404 for it for 30 s, and its list does not have it. It was"
        " deleted, or belongs to another account than the Airflow connection."
    )
    for sign in (lambda: watch.absent(listed=True), watch.on_unchanged):
        watch.missing_for, watch.trouble = 60.0, "trouble"
        sign()
        assert not watch.missing_for
    assert "trouble" not in watch.timed_out()["message"]


@pytest.mark.parametrize(("event", "shape"), [({"b": 1, "a": 2}, "['a', 'b']"), (7, "int")])
def test_a_malformed_event_is_described_without_its_values(event, shape):
    with pytest.raises(HeyGenTriggerEventError) as raised:
        waiting.check_event(event)
    assert str(raised.value) == (
        "The wait for overdub (id unknown) ended with an event that HeyGenOverdubTrigger does not send"
        f" ({shape}). The overdub itself is not affected; retry the task."
    )


# --- Durations and deadlines --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (5, 5),
        (0.5, 0.5),
        ("90", 90),
        (" 1e3 ", 1000),
        (timedelta(minutes=2), 120),
        (timedelta(milliseconds=1), 0.001),
    ],
)
def test_seconds(value, number):
    assert waiting.parse_seconds(value, "timeout") == number


@pytest.mark.parametrize(
    "value",
    [
        0,
        -1,
        "0",
        "-5",
        "soon",
        "",
        None,
        "None",
        "nan",
        "inf",
        math.nan,
        math.inf,
        10**400,
        1e12,
        timedelta.max,
        True,
        [],
        timedelta(0),
        timedelta(-1),
    ],
    ids=lambda value: str(value)[:20],
)
def test_not_seconds(value):
    with pytest.raises(HeyGenBadInputError, match=r"^poke_interval must be a positive number"):
        waiting.parse_seconds(value, "poke_interval")


STARTED = datetime.fromtimestamp(NOW - 100, UTC)


@pytest.mark.parametrize(
    ("execution_timeout", "started", "deadline"),
    [
        (None, STARTED, None),
        (timedelta(seconds=500), STARTED, NOW + 400),  # Airflow counts from the start of the try
        (timedelta(seconds=500), None, NOW + 500),
        (timedelta(seconds=50), STARTED, NOW - 50),
    ],
)
def test_execution_deadline(execution_timeout, started, deadline):
    context = {"ti": SimpleNamespace(start_date=started)}
    assert waiting.execution_deadline(execution_timeout, context) == deadline


@pytest.mark.parametrize(
    ("deadline", "seconds"), [(None, None), (NOW + 100, 170), (NOW, 70), (NOW - 1000, 70)]
)
def test_backstop_is_later_than_the_deadline(deadline, seconds):
    found = waiting.deferral_timeout(deadline, 10)
    assert found == (None if seconds is None else timedelta(seconds=seconds))


@pytest.mark.parametrize(("host", "key"), [(None, "a-wrong-key"), ("http://127.0.0.1:9", "emulator-api-key")])
def test_a_worker_reads_the_connection_again_after_a_failed_poll(heygen, connect, host, key):
    overdub_id = HeyGenHook().create_overdub({"video": "https://x.y/v.mp4", "audio": "https://x.y/a.mp3"})
    heygen.force(overdub_id, "completed")
    connect(host or heygen.url, key)
    with HeyGenHook(max_attempts=1) as hook:
        rules = watching()
        rules.overdub_id = overdub_id
        assert isinstance(rules.poll(hook), float)
        connect(heygen.url)
        assert rules.poll(hook)["status"] == "completed"


def test_a_key_of_another_account_for_a_while_ends_no_wait(heygen, connect, monkeypatch):
    """Its 404 prove nothing, until a poll finds the overdub again."""
    monkeypatch.setattr(waiting, "GONE_SECONDS", 0.001)
    heygen.behaviour.job_seconds = 60
    create = {"video": "https://x.y/v.mp4", "audio": "https://x.y/a.mp3"}
    overdub_id = HeyGenHook().create_overdub(create)
    rules = watching()
    rules.overdub_id = overdub_id
    with Emulator() as other, HeyGenHook(max_attempts=1) as hook:
        assert isinstance(rules.poll(hook), float)
        heygen.fail_next(status=401, code="unauthorized")
        assert isinstance(rules.poll(hook), float)
        connect(other.url)
        assert [isinstance(rules.poll(hook), float) for _ in range(3)] == [True] * 3
        connect(heygen.url)
        heygen.force(overdub_id, "completed")
        assert rules.poll(hook)["status"] == "completed"


def test_a_setting_that_is_wrong_for_a_moment_ends_no_wait_that_has_begun(heygen, connect):
    heygen.behaviour.job_seconds = 60
    overdub_id = HeyGenHook().create_overdub({"video": "https://x.y/v.mp4", "audio": "https://x.y/a.mp3"})
    rules, other = watching(), watching()
    rules.overdub_id = other.overdub_id = overdub_id
    rules.poll(HeyGenHook(max_attempts=1))
    connect(heygen.url, proxies={"http": "ftp://x.y"}, trust_env=False)
    assert isinstance(rules.poll(HeyGenHook(max_attempts=1)), float)
    with pytest.raises(HeyGenBadInputError):
        other.poll(HeyGenHook(max_attempts=1))
