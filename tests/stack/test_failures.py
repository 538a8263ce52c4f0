"""
What a real Airflow makes of HeyGen's failures, and that no secret is left behind anywhere.

One DAG run has a task for each way to wait and each kind of trouble. All of them wait until each has had one
good look at its job; then the emulator is told what to do to each. A second run has waits that end in the
triggerer, and what comes after them.
"""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Any

import pytest
from conftest import HAS_STATE_STORE, LABELS_EARLY, MASKS_RENDERED_FIELDS

from airflow_provider_heygen.emulator.media import make_video
from stack.airflow import Stack, why_no_postgres
from stack.dags.cases import (
    CREATE_CASES,
    CREATES,
    REFUSALS,
    REFUSED_CREATES,
    SENSOR_CASES,
    SENSORS,
    SKIPS,
    TROUBLES,
)
from stack.rest import Run, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from stack.heygen import HeyGen

SECRETS = {
    "signature of an input": "5ignature0fTheInput",
    "password in an input": "pa55w0rdOfTheInput",
    "token in the callback": "t0kenOfTheCallback",
}
# The next step that the log must name, or HeyGen's own words.
SAYS = {
    "job_fails": "Nobody is speaking in the video",
    "refused_401": "(?i)key",
    "refused_402": "(?i)credit",
    "gone_404": "(?i)404|does not exist|deleted",
    "wrong_resource": "'resource'",
    "create_401": "(?i)key",
    "create_402": "(?i)credit",
    "times_out": "(?i)timed out|may still complete",
}

# The sensors of the run `ends`, and for what the log says that they need a worker in the end.
ENDS = {
    "on_worker": [],
    "plain": [],
    **{f"mapped[{index}]": [] for index in range(5)},
    # Before Airflow 3.2 the worker that ends a task makes its label.
    "labelled[0]": [] if LABELS_EARLY else ["map_index_template"],
    "silent": [],
    "with_outlets": ["outlets"],
    "with_callback": ["on_success_callback"],
    "expanded": ["a task that expands over its result"],
}


class Outcome:
    """What is left when the run is over."""

    def __init__(self, stack: Stack, heygen: HeyGen, run: Run, ends: Run, midway: Any) -> None:
        self.stack, self.heygen, self.run, self.ends, self.midway = stack, heygen, run, ends, midway
        self.tasks, self.ended = run.tasks(), ends.tasks()

    def log(self, name: str) -> str:
        return self.run.log(name, self.tasks[name]["try_number"])


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outcome]:
    """Let the whole DAG run; everything in this module looks at what it left behind."""
    debug = {"AIRFLOW__LOGGING__LOGGING_LEVEL": "DEBUG"}
    with Stack(postgres=not why_no_postgres(), settings=debug) as stack:
        yield _run(stack, tmp_path_factory.mktemp("media"))


def _run(stack: Stack, folder: Path) -> Outcome:
    # A job takes until it is told to end.
    heygen = stack.heygen(job_seconds=100_000)
    renamed = stack.heygen(resources="lipsyncs")
    heygen.add_fault("/v3/lipsyncs", method="POST", status=402, message="No credit left", count=10_000)
    stack.connect("heygen_default", heygen.connection())
    stack.connect("heygen_oauth", heygen.connection(auth_type="oauth"))
    stack.connect("heygen_wrong_key", heygen.connection(password="sk_wrong"))
    stack.connect("heygen_lipsyncs", heygen.connection(resource="lipsyncs"))
    stack.connect("heygen_wrong_resource", renamed.connection())
    signature, password, token = SECRETS.values()
    stack.env["STACK_VIDEO"] = f"https://example.com/v.mp4?X-Amz-Date=1&X-Amz-Signature={signature}"
    stack.env["STACK_AUDIO"] = f"https://user:{password}@example.com/a.mp3"
    stack.env["STACK_CALLBACK"] = f"https://127.0.0.1:1/done?token={token}"
    stack.start("failures", "ends")

    sensors = [f"{waiter}__{case}" for waiter in SENSORS for case in SENSOR_CASES]
    transfers = ["transfer__after_trouble", "transfer__place_taken"]
    ids = {name: heygen.create(name) for name in sensors + transfers}
    for name in transfers:
        heygen.force(ids[name], "completed")
    heygen.add_fault(f"/files/{ids[transfers[0]]}.mp4", drop="before")
    heygen.add_fault(f"/files/{ids[transfers[0]]}.mp4", status=403)
    make_video(folder / "upload.mp4", seconds=1, hz=440)
    (folder / f"{transfers[1]}.mp4").write_text("something else")
    run = Run(stack.rest, "failures", ids=ids, folder=str(folder))

    # Those that wait without an end of their own.
    steered = [f"{waiter}__{case}" for waiter in SENSORS for case in SENSOR_CASES if "times_out" not in case]
    steered += [f"{waiter}__{case}" for waiter in CREATES for case in CREATE_CASES]
    steered = [name for name in steered if not name.endswith("wrong_resource")] + ["create_mapped"]

    def looked_at() -> dict[str, str] | None:
        states = run.states()
        for name in steered:
            ended = states.get(name) in ("failed", "success", "upstream_failed")
            assert not ended, f"{name} has ended before its trouble began:\n{run.log(name)}"
        seen = {job["title"]: job["id"] for job in heygen.jobs()}
        looks = {request["path"] for request in heygen.requests("GET") if request["status"] == 200}
        return seen if all(f"/v3/overdubs/{seen.get(name)}" in looks for name in steered) else None

    jobs = wait_for("a first look at each job", looked_at)
    deferred = [name for name in steered if "deferred" in name]
    wait_for("them to be deferred", lambda: all(run.states()[name] == "deferred" for name in deferred))
    time.sleep(3)  # let Airflow see the end of their processes, too; see MIN_HEARTBEAT_INTERVAL
    midway = stack.tables()
    # The troubles are those of a look at one overdub; the list would pass them by.
    heygen.add_fault("/v3/overdubs", method="GET", status=404, count=10_000)
    for name in steered:
        _steer(heygen, name, jobs[name])
    run.wait()
    return Outcome(stack, heygen, run, _run_ends(stack, heygen), midway)


def _run_ends(stack: Stack, heygen: HeyGen) -> Run:
    ids = [heygen.create(f"ends {number}") for number in range(5)]
    fails, lasts = heygen.create("fails"), heygen.create("lasts")
    run = Run(stack.rest, "ends", ids=ids, fails=fails, lasts=lasts)
    waiting = [*ENDS, "fails", "fails_softly"]
    wait_for("all to be deferred", lambda: {run.states().get(name) for name in waiting} == {"deferred"})
    time.sleep(3)
    for overdub_id in ids:
        heygen.force(overdub_id, "completed")
    heygen.force(fails, "failed", SAYS["job_fails"])
    run.wait()
    return run


def _steer(heygen: HeyGen, name: str, job_id: str) -> None:
    path = f"/v3/overdubs/{job_id}"
    case = name.partition("__")[2].removeprefix("soft_fail_").removeprefix("never_fail_")
    if case == "job_fails":
        heygen.force(job_id, "failed", f"{SAYS['job_fails']} of {name}")
    elif case in REFUSALS:
        heygen.add_fault(path, status=REFUSALS[case], message=f"Refused: {case}", count=10_000)
    else:
        for trouble in TROUBLES if case == "survives_trouble" else ():
            heygen.add_fault(path, **trouble)
        heygen.force(job_id, "completed")


def names(waiters: tuple[str, ...], cases: Any) -> list[str]:
    return [f"{waiter}__{case}" for waiter in waiters for case in cases]


FATAL = ("job_fails", *REFUSALS, "wrong_resource")


@pytest.mark.parametrize(
    "name",
    [
        *names(CREATES + SENSORS, FATAL),
        *names(("create_deferred",), REFUSED_CREATES),
        *names(SENSORS, ["times_out"]),
    ],
)
def test_fails_at_once_and_says_why(outcome: Outcome, name: str) -> None:
    task = outcome.tasks[name]
    assert (task["state"], task["try_number"], task["max_tries"]) == ("failed", 1, 2)
    assert re.search(SAYS[name.partition("__")[2]], outcome.log(name))


@pytest.mark.parametrize("name", names(SENSORS, SKIPS))
def test_is_skipped(outcome: Outcome, name: str) -> None:
    task = outcome.tasks[name]
    assert (task["state"], task["try_number"]) == ("skipped", 1)


@pytest.mark.parametrize("name", names(CREATES + SENSORS, ["survives_trouble"]))
def test_survives_trouble(outcome: Outcome, name: str) -> None:
    task = outcome.tasks[name]
    assert (task["state"], task["try_number"]) == ("success", 1)
    job = next(job for job in outcome.heygen.jobs() if job["title"] == name)
    looks = outcome.heygen.requests("GET", f"/v3/overdubs/{job['id']}")
    # Each trouble was met, and after the last of them (a web page that claims to be fine) came a good look.
    assert [look["status"] for look in looks][-6:] == [500, 503, None, 502, 200, 200]


@pytest.mark.parametrize(
    "name", [*names(CREATES + SENSORS, ["oauth"]), "create_mapped[0]", "upload", "transfer__after_trouble"]
)
def test_succeeds(outcome: Outcome, name: str) -> None:
    task = outcome.tasks[name]
    assert (task["state"], task["try_number"]) == ("success", 1)


@pytest.mark.parametrize("name", ENDS)
def test_only_a_wait_that_needs_no_worker_ends_in_the_triggerer(outcome: Outcome, name: str) -> None:
    task = outcome.ended[name]
    log = outcome.ends.log(name, task["try_number"])
    assert task["state"] == "success"
    assert set(re.findall(r"a worker is needed for: (.*?)\.", log)) == set(ENDS[name])
    needs_one = name == "on_worker" or ENDS[name]
    assert outcome.ends.starts(name, task["try_number"]) == (2 if needs_one else 1)


def test_the_value_is_the_same_however_a_wait_ends(outcome: Outcome) -> None:
    ends = outcome.ends
    details = ends.xcoms("on_worker")["return_value"]
    assert (details["title"], details["status"]) == ("ends 0", "completed")
    assert ends.xcoms("plain") == ends.xcoms("on_worker")
    for sensor in ("on_worker", "plain"):
        assert ends.xcoms(f"take_{sensor}")["return_value"] == [details, details, "completed"]
    assert "return_value" not in ends.xcoms("silent")


def test_each_index_has_its_own_value(outcome: Outcome) -> None:
    indexes = range(5)
    values = [outcome.ends.xcoms(f"mapped[{index}]")["return_value"] for index in indexes]
    assert [value["title"] for value in values] == [f"ends {index}" for index in indexes]
    assert values[0] == outcome.ends.xcoms("on_worker")["return_value"]
    assert outcome.ends.xcoms("take_all")["return_value"] == [values, values]
    assert [outcome.ends.xcoms(f"take_each[{index}]")["return_value"] for index in indexes] == values
    assert outcome.ended["labelled[0]"]["rendered_map_index"] == f"overdub {values[4]['overdub_id']}"


def test_what_only_a_worker_does_is_done(outcome: Outcome) -> None:
    events = outcome.stack.rest.call("GET", "assets/events")["asset_events"]
    assert [event["source_task_id"] for event in events] == ["with_outlets"]
    assert "Called back: with_callback" in outcome.ends.log("with_callback")
    members = [name for name in outcome.ended if name.startswith("members[")]
    assert len(members) == len(outcome.ends.xcoms("expanded")["return_value"])


def test_what_goes_wrong_ends_on_a_worker(outcome: Outcome) -> None:
    states = outcome.ends.states()
    errors = {
        "fails": f"HeyGenOverdubFailedError.*{SAYS['job_fails']}",
        "times_out": f"AirflowSensorTimeout.*{SAYS['times_out'].removeprefix('(?i)')}",
    }
    for case, error in errors.items():
        assert (states.pop(case), states.pop(f"{case}_softly")) == ("failed", "skipped")
        tries = outcome.ended[case]["try_number"]
        assert re.search(error, outcome.ends.log(case, tries))
        assert outcome.ends.starts(case, tries) == 2
    assert set(states.values()) == {"success"}


def test_one_job_for_each_create(outcome: Outcome) -> None:
    titles = [job["request"]["title"] for job in outcome.heygen.jobs()]
    assert sorted(titles) == sorted(set(titles))


def test_no_secret_is_left_behind(outcome: Outcome) -> None:
    secrets = {**SECRETS, "API key": outcome.heygen.key, "OAuth token": outcome.heygen.token}
    for number, request in enumerate(outcome.heygen.requests("GET")):
        if match := re.search("Signature=([0-9a-f]+)", request["query"]):
            secrets[f"signature of download {number}"] = match[1]
    assert len(secrets) > len(SECRETS) + 2
    places = {f"table {name}": repr(rows) for name, rows in outcome.stack.tables().items()}
    places |= {f"table {name} while tasks wait": repr(rows) for name, rows in outcome.midway.items()}
    for path in outcome.stack.home.rglob("*"):
        # The emulator's own output is HeyGen's affair.
        if path.is_file() and not path.is_relative_to(outcome.stack.home / "heygen"):
            places[str(path.relative_to(outcome.stack.home))] = path.read_bytes().decode(errors="replace")
    if not MASKS_RENDERED_FIELDS:
        # Airflow 3.0 stores rendered fields whole, whatever a task has asked it to mask.
        places = {name: text for name, text in places.items() if "rendered_task_instance_fields" not in name}
    leaks = [
        f"{what} in {where}: {text[max(0, found.start() - 200) : found.end() + 100]}"
        for where, text in places.items()
        for what, secret in {**secrets, "a signed link": "Signature="}.items()
        for found in re.finditer(re.escape(secret), text)
        if not text.startswith("***", found.end())
    ]
    assert not leaks
    # The search sees what it should see.
    overdub_id = next(job["id"] for job in outcome.heygen.jobs() if job["title"] == "create_deferred__oauth")
    seen = " ".join(where for where, text in places.items() if overdub_id in text)
    expected = {"table trigger while tasks wait", "table xcom", "table task_state_store", "attempt=1.log"}
    expected -= set() if HAS_STATE_STORE else {"table task_state_store"}
    assert not {place for place in expected if place not in seen}
