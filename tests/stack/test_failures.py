"""
What a real Airflow makes of HeyGen's failures, and that no secret is left behind anywhere.

One DAG run has a task for each way to wait and each kind of trouble. The polls of some are refused from the
start; the others wait until each has polled its job, then the emulator is told what to do to each.
A second run has what OpenLineage is to see. OpenLineage and StatsD hear of both.
"""

from __future__ import annotations

import json
import re
import threading
import time
import uuid
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

import pytest
from conftest import HAS_STATE_STORE, Listener, StatsD

from airflow_provider_heygen.emulator.media import make_video
from stack.airflow import Stack, why_no_postgres
from stack.dags.cases import (
    CONNECTIONS,
    CREATE_CASES,
    CREATES,
    FATAL,
    FINE,
    REFUSED_CREATES,
    REFUSED_POLLS,
    SENSOR_CASES,
    SENSORS,
    SKIPS,
    STEERED,
    TIMEOUTS,
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
    "gone_404": "(?i)is gone.* 404",
    "wrong_resource": "'resource'",
    "create_401": "(?i)key",
    "create_402": "(?i)credit",
    "times_out": "(?i)timed out|may still complete",
}


class Outcome:
    """What is left when the runs are over. ``servers`` are the emulators of the run, by connection."""

    def __init__(self, stack: Stack, servers: dict[str, HeyGen], run: Run, midway: Any, watch: Watch) -> None:
        self.stack, self.servers, self.run, self.midway, self.watch = stack, servers, run, midway, watch
        self.heygen = servers["heygen_default"]
        self.tasks = run.tasks()

    def log(self, name: str) -> str:
        return self.run.log(name, self.tasks[name]["try_number"])


class Watch:
    """
    What is watched from outside: one DAG run more, the events of OpenLineage, the datagrams of StatsD.

    :ivar metrics: name, tags, value and type of each datagram.
    """

    def __init__(self, stack: Stack, folder: Path) -> None:
        self.stack, self.folder = stack, folder
        self.statsd, self.lineage = StatsD(), Listener()
        self.metrics: list[tuple[str, dict[str, str], float, str]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()
        self.heygen = stack.heygen(job_seconds=10)
        stack.connect("heygen_observed", self.heygen.connection())
        stack.env |= {
            "AIRFLOW__OPENLINEAGE__TRANSPORT": json.dumps({"type": "http", "url": self.lineage.url}),
            "AIRFLOW__METRICS__STATSD_ON": "True",
            "AIRFLOW__METRICS__STATSD_HOST": "127.0.0.1",
            "AIRFLOW__METRICS__STATSD_PORT": str(self.statsd.port),
            "AIRFLOW__METRICS__STATSD_INFLUXDB_ENABLED": "True",
            "AIRFLOW__METRICS__METRICS_ALLOW_LIST": "heygen",
        }

    def _listen(self) -> None:
        while not self._over.wait(0.05):
            self.metrics += self.statsd.take()

    def run_observed(self) -> None:
        self.observed = Run(self.stack.rest, "observed", folder=str(self.folder))
        (job,) = wait_for("the job that is to fail", lambda: self.heygen.jobs("fails"))
        self.heygen.force(job["id"], "failed", SAYS["job_fails"])
        self.observed.wait()

    def close(self) -> None:
        self._over.set()
        self._thread.join()
        self.statsd.close()
        self.lineage.close()

    @property
    def events(self) -> list[dict[str, Any]]:
        """OpenLineage's, of tasks."""
        found = [json.loads(seen.body) for seen in self.lineage.seen]
        return [event for event in found if event["job"]["name"].startswith("observed.")]

    def told(self, task_id: str, kind: str = "COMPLETE") -> list[tuple[list[Any], list[Any]]]:
        """Return the inputs and outputs of a task's events of a kind, as pairs of namespace and name."""
        return [
            tuple(
                [(found["namespace"], found["name"]) for found in event.get(side, [])]
                for side in ("inputs", "outputs")
            )
            for event in self.events
            if (event["job"]["name"], event["eventType"]) == (f"observed.{task_id}", kind)
        ]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outcome]:
    """Run the whole DAG; each test of this module checks its results."""
    debug = {"AIRFLOW__LOGGING__LOGGING_LEVEL": "DEBUG"}
    with Stack(postgres=not why_no_postgres(), settings=debug) as stack:
        folder = tmp_path_factory.mktemp("media")
        watch = Watch(stack, folder)
        try:
            yield _run(stack, folder, watch)
        finally:
            watch.close()


def _run(stack: Stack, folder: Path, watch: Watch) -> Outcome:
    # A job runs until the test ends it.
    heygen, gone, refusing = (stack.heygen(job_seconds=100_000) for _ in range(3))
    renamed = stack.heygen(resources="lipsyncs")
    servers = {"heygen_default": heygen, "heygen_gone": gone, "heygen_refusing": refusing}
    heygen.add_fault("/v3/lipsyncs", method="POST", status=402, message="No credit left", count=10_000)
    for path in ("/v3/overdubs", "/v3/overdubs/.*"):
        refusing.add_fault(path, method="GET", status=402, message="No credit left", count=10_000)
    for conn_id, server in servers.items():
        stack.connect(conn_id, server.connection())
    stack.connect("heygen_oauth", heygen.connection(auth_type="oauth"))
    stack.connect("heygen_wrong_key", heygen.connection(password="sk_wrong"))
    stack.connect("heygen_lipsyncs", heygen.connection(resource="lipsyncs"))
    stack.connect("heygen_wrong_resource", renamed.connection(resource="overdubs"))
    signature, password, token = SECRETS.values()
    stack.env["STACK_VIDEO"] = f"https://example.com/v.mp4?X-Amz-Date=1&X-Amz-Signature={signature}"
    stack.env["STACK_AUDIO"] = f"https://user:{password}@example.com/a.mp3"
    stack.env["STACK_CALLBACK"] = f"https://127.0.0.1:1/done?token={token}"
    stack.start("failures", "observed")

    sensors = [f"{waiter}__{case}" for waiter in SENSORS for case in SENSOR_CASES]
    transfers = ["transfer__after_trouble", "transfer__place_taken"]
    ids = {name: _server(servers, name).create(name) for name in sensors + transfers}
    for name in transfers:
        heygen.force(ids[name], "completed")
    heygen.add_fault(f"/files/{ids[transfers[0]]}.mp4", drop="before")
    heygen.add_fault(f"/files/{ids[transfers[0]]}.mp4", status=403)
    make_video(folder / "upload.mp4", seconds=1, hz=440)
    (folder / f"{transfers[1]}.mp4").write_text("something else")
    run = Run(stack.rest, "failures", ids=ids, folder=str(folder))

    # Those that wait without an end of their own.
    steered = names(SENSORS, STEERED) + names(CREATES, [*FATAL, *FINE]) + ["create_mapped"]

    def looked_at() -> dict[str, str] | None:
        states = run.states()
        for name in steered:
            ended = states.get(name) in ("failed", "success", "upstream_failed")
            assert not ended, f"{name} has ended before its trouble began:\n{run.log(name)}"
        seen = {job["title"]: job["id"] for server in (heygen, gone) for job in server.jobs()}
        requests = heygen.requests("GET") + gone.requests("GET")
        looks = {request["path"] for request in requests if request["status"] == 200}
        return seen if all(f"/v3/overdubs/{seen.get(name)}" in looks for name in steered) else None

    jobs = wait_for("a first look at each job", looked_at)
    deferred = [name for name in steered if "deferred" in name]
    wait_for("them to be deferred", lambda: all(run.states()[name] == "deferred" for name in deferred))
    time.sleep(3)  # let Airflow see the end of their processes, too; see MIN_HEARTBEAT_INTERVAL
    midway = stack.tables()
    # The troubles are those of a GET of one overdub; the list must not tell of its end. (If the list was 404,
    # too, the hook would find the overdub under the other name of the resource.)
    heygen.add_fault("/v3/overdubs", method="GET", status=500, count=10_000)
    for name in steered:
        _steer(_server(servers, name), name, jobs[name])
    run.wait()
    watch.run_observed()  # by itself: its waits are measured
    return Outcome(stack, servers, run, midway, watch)


def _server(servers: dict[str, HeyGen], name: str) -> HeyGen:
    """Return the emulator that has the job of a task."""
    conn_id = CONNECTIONS.get(name.partition("__")[2], "")
    return servers.get(conn_id, servers["heygen_default"])


def _steer(heygen: HeyGen, name: str, job_id: str) -> None:
    path = f"/v3/overdubs/{job_id}"
    case = name.partition("__")[2].removeprefix("soft_fail_").removeprefix("never_fail_")
    if case == "job_fails":
        heygen.force(job_id, "failed", f"{SAYS['job_fails']} of {name}")
    elif case == "gone_404":
        heygen.delete(job_id)
    else:
        for trouble in TROUBLES if case == "survives_trouble" else ():
            heygen.add_fault(path, **trouble)
        heygen.force(job_id, "completed")


def names(waiters: tuple[str, ...], cases: Any) -> list[str]:
    return [f"{waiter}__{case}" for waiter in waiters for case in cases]


def tries(name: str) -> set[int]:
    """Airflow may fail a try that is rescheduled for a second before its worker has reported that."""
    return {1, 2} if "reschedule" in name else {1}


@pytest.mark.parametrize(
    "name",
    [
        *names(CREATES + SENSORS, FATAL),
        *names(("create_deferred",), REFUSED_CREATES),
    ],
)
def test_fails_at_once_with_the_reason(outcome: Outcome, name: str) -> None:
    task = outcome.tasks[name]
    assert (task["state"], task["max_tries"]) == ("failed", 2)
    assert task["try_number"] in tries(name)
    log = outcome.log(name)
    assert re.search(SAYS[name.partition("__")[2]], log)
    assert "HeyGenTaskFailedError" in log


@pytest.mark.parametrize("name", names(SENSORS, TIMEOUTS) + names(CREATES, REFUSED_POLLS))
def test_waits_until_its_timeout_and_reports_why(outcome: Outcome, name: str) -> None:
    assert outcome.tasks[name]["state"] == "failed"
    log = outcome.log(name)
    assert "HeyGenOverdubTimeoutError" in log
    assert name.startswith("create") or "AirflowSensorTimeout" in log
    assert re.search(SAYS[name.partition("__")[2]], log)


@pytest.mark.parametrize("name", names(SENSORS, SKIPS))
def test_is_skipped(outcome: Outcome, name: str) -> None:
    task = outcome.tasks[name]
    assert task["state"] == "skipped"
    assert task["try_number"] in tries(name), (task, outcome.run.tries(name))


@pytest.mark.parametrize("name", names(CREATES + SENSORS, ["survives_trouble"]))
def test_survives_trouble(outcome: Outcome, name: str) -> None:
    task = outcome.tasks[name]
    assert task["state"] == "success"
    assert task["try_number"] in tries(name), (task, outcome.run.tries(name))
    job = next(job for job in outcome.heygen.jobs() if job["title"] == name)
    looks = outcome.heygen.requests("GET", f"/v3/overdubs/{job['id']}")
    # Each trouble was met, one of them a web page with status 200, and then the end.
    met = " ".join(str(look["status"]) for look in looks)
    assert "500 503 None 502 200 404 200" in met


@pytest.mark.parametrize(
    "name", [*names(CREATES + SENSORS, ["oauth"]), "create_mapped[0]", "upload", "transfer__after_trouble"]
)
def test_succeeds(outcome: Outcome, name: str) -> None:
    task = outcome.tasks[name]
    assert (task["state"], task["try_number"]) == ("success", 1)


def test_one_job_for_each_create(outcome: Outcome) -> None:
    titles = [job["request"]["title"] for server in outcome.servers.values() for job in server.jobs()]
    assert sorted(titles) == sorted(set(titles))


SOURCES = [("https://example.com", "/v.mp4"), ("https://example.com", "/a.mp3")]


def overdubs(outcome: Outcome, task_id: str) -> list[tuple[str, str]]:
    return [("heygen", f"overdubs/{job['id']}") for job in outcome.watch.heygen.jobs(task_id)]


def test_lineage(outcome: Outcome) -> None:
    watch, folder = outcome.watch, outcome.watch.folder
    uploaded = ("file", f"{folder}/upload.mp4")
    asset = ("heygen", f"assets/{watch.observed.xcoms('upload')['asset_id']}")
    assert watch.told("upload") == [([uploaded], [asset])]
    assert watch.told("sync") == [([asset, SOURCES[1]], overdubs(outcome, "sync"))]
    deferred = overdubs(outcome, "deferred")
    assert watch.told("deferred") == [(SOURCES, deferred)]
    assert watch.told("keep") == [
        (deferred, [("file", f"{folder}/kept/{deferred[0][1].removeprefix('overdubs/')}.mp4")])
    ]
    # A Python task has no facets of its own; this is Airflow's hook lineage.
    assert watch.told("download") == [(deferred, [("file", f"{folder}/downloaded.mp4")])]
    mapped = {inputs[0]: outputs for inputs, outputs in watch.told("mapped")}
    ids = [watch.observed.xcoms(f"mapped[{index}]")["return_value"] for index in range(2)]
    assert mapped == {
        ("https://example.com", "/0.mp4"): [("heygen", f"overdubs/{ids[0]}")],
        uploaded: [("heygen", f"overdubs/{ids[1]}")],
    }
    assert (watch.told("fails"), watch.told("fails", "FAIL")) == ([], [(SOURCES, [])])
    # One overdub over two tries.
    (goes_on,) = overdubs(outcome, "goes_on")
    assert watch.told("goes_on", "FAIL") == [(SOURCES, [])]
    assert watch.told("goes_on") == [(SOURCES, [goes_on])]
    assert watch.told("wait") == [([], [])]


def test_each_run_of_openlineage_is_whole(outcome: Outcome) -> None:
    runs = defaultdict(list)
    for event in outcome.watch.events:
        runs[str(uuid.UUID(event["run"]["runId"]))].append(event["eventType"])
        assert event["run"]["facets"]["parent"]["job"]["name"] == "observed"
        failures = [name for name in event["run"]["facets"] if "extractionError" in name]
        assert not failures, event
    assert len(runs) == 12  # 10 tasks, one of them mapped over two, one with two tries
    for kinds in runs.values():
        assert set(kinds) in ({"START", "COMPLETE"}, {"START", "FAIL"})
        assert kinds.count("COMPLETE") + kinds.count("FAIL") == 1


def counted(outcome: Outcome, name: str) -> Counter[str]:
    found: Counter[str] = Counter()
    for metric, tags, value, kind in outcome.watch.metrics:
        if metric == f"heygen.overdubs.{name}":
            found[f"{tags['dag_id']}.{tags['task_id']}"] += int(value) if kind == "c" else 1
    return found


def test_metrics(outcome: Outcome) -> None:
    creates = [*names(CREATES, CREATE_CASES), "create_mapped"]
    fine = [*names(CREATES + SENSORS, ["survives_trouble", "oauth"]), "create_mapped"]
    bad = names(CREATES + SENSORS, ["job_fails"])
    bad += names(SENSORS, ["soft_fail_job_fails", "never_fail_job_fails"])
    observed = Counter(f"observed.{name}" for name in ("sync", "deferred", "mapped", "mapped", "goes_on"))
    submitted = Counter(f"failures.{name}" for name in creates)
    submitted += observed + Counter(["observed.fails", "observed.started"])
    completed = observed + Counter(["observed.wait"]) + Counter(f"failures.{name}" for name in fine)
    failed = Counter(["observed.fails"])
    failed += Counter(f"failures.{name}" for name in bad)
    assert counted(outcome, "submitted") == submitted
    assert counted(outcome, "completed") == completed
    assert counted(outcome, "failed") == failed
    assert counted(outcome, "reattached") == {"observed.goes_on": 1}
    assert counted(outcome, "wait") == completed + failed
    waits = [
        (tags["task_id"], value)
        for name, tags, value, kind in outcome.watch.metrics
        if (name, kind) == ("heygen.overdubs.wait", "ms") and tags["dag_id"] == "observed"
    ]
    assert 8_000 < dict(waits)["deferred"] < 120_000  # milliseconds, over the deferral


def test_polls(outcome: Outcome) -> None:
    polls = Counter(tags["conn_id"] for name, tags, *_ in outcome.watch.metrics if name == "heygen.polls")
    assert {"heygen_default", "heygen_oauth", "heygen_observed"} <= set(polls)
    asked = [request for request in outcome.watch.heygen.requests("GET") if "/files/" not in request["path"]]
    assert 0 < polls["heygen_observed"] < len(asked)


def test_no_secret_is_left_behind(outcome: Outcome) -> None:
    secrets = {**SECRETS, "OAuth token": outcome.heygen.token}
    secrets |= {f"API key of {conn_id}": server.key for conn_id, server in outcome.servers.items()}
    secrets["another API key"] = outcome.watch.heygen.key
    downloads = [*outcome.heygen.requests("GET"), *outcome.watch.heygen.requests("GET")]
    for number, request in enumerate(downloads):
        if match := re.search("Signature=([0-9a-f]+)", request["query"]):
            secrets[f"signature of download {number}"] = match[1]
    assert len(secrets) > len(SECRETS) + 2
    places = {f"table {name}": repr(rows) for name, rows in outcome.stack.tables().items()}
    places |= {f"table {name} while tasks wait": repr(rows) for name, rows in outcome.midway.items()}
    for path in outcome.stack.home.rglob("*"):
        # The emulator's own output is HeyGen's affair.
        if path.is_file() and not path.is_relative_to(outcome.stack.home / "heygen"):
            places[str(path.relative_to(outcome.stack.home))] = path.read_bytes().decode(errors="replace")
    places["OpenLineage's events"] = " ".join(seen.body.decode() for seen in outcome.watch.lineage.seen)
    places["StatsD's datagrams"] = repr(outcome.watch.metrics)
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
