"""
The provider, untouched, against another HeyGen (:mod:`other_server`): hook, trigger and whole DAGs.

Every run goes over one row of a pairwise table of the ugly choices the contract leaves to a server, and is
judged by what costs or hurts: one job per wish, the right bytes at the end, no key and no link anywhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from other_server import KEY, VIDEO, OtherServer

if TYPE_CHECKING:
    from collections.abc import Iterator

CHOICES: dict[str, tuple[Any, ...]] = {
    "name": (("overdubs", "overdub_id"), ("lipsyncs", "lipsync_id"), ("overdubs", "id")),
    "list_order": ("ascending", "descending", "shuffled"),
    "idempotent": (True, False),
    "callback_id_in_list": (True, False),
    "callback_id_kept": ("always", "with_url"),
    "html_errors": (False, True),
    "bare_errors": (False, True),
    "unknown_members": (False, True),
    "sparse": (False, True),
    "created_at": (True, False),
    "late_links": (0, 2),
    "odd_words": (False, True),
    "readable_after": (0.0, 1.0),
    "create_takes": (0.0, 0.6),
    "too_many": (0, 2),
    "retry_after": ("seconds", "date"),
    "flaky": (0.0, 0.1),
}


def _fair(row: dict[str, Any]) -> bool:
    """Whether a client can distinguish a lost create from one never sent; :data:`LOST` has the others."""
    troubled = row["flaky"] and not row["idempotent"]
    findable = row["callback_id_kept"] == "always" and (
        row["callback_id_in_list"] or not row["readable_after"]
    )
    return not troubled or findable


def _pairwise(seed: int, most: int) -> list[dict[str, Any]]:
    """A few rows in which (nearly) every two choices meet."""
    rng, rows, met = random.Random(seed), [], set()
    for number in range(most):
        candidates = [{name: rng.choice(of) for name, of in CHOICES.items()} for _ in range(300)]
        pairs = {id(row): set(combinations(row.items(), 2)) - met for row in candidates}
        best = max(filter(_fair, candidates), key=lambda row: len(pairs[id(row)]))
        met |= pairs[id(best)]
        row = dict(best)
        row["resource"], row["create_id"] = row.pop("name")
        rows.append({**row, "seed": seed + number})
    return rows


@pytest.fixture(autouse=True)
def _settled_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("airflow_provider_heygen.hooks.heygen.SETTLE_SECONDS", 2)


HOOK_ROWS = _pairwise(seed=1, most=14)
DAG_ROWS = _pairwise(seed=2, most=2)  # a real Airflow for each

# The response to the create request is lost and the server does not know the key: how the job is found.
LOST = {
    "plain": {"list_order": "ascending"},
    "not in the list": {"callback_id_in_list": False, "list_order": "shuffled"},
    "no created_at": {"callback_id_in_list": False, "created_at": False, "sparse": True},
    "not readable yet": {"callback_id_in_list": False, "readable_after": 4.0},
}
# Where nothing is left, an honest error is right and a second job is wrong.
UNTRACEABLE = {
    "callback_id not kept": {"callback_id_kept": "with_url"},
    "nothing kept, nothing told": {"callback_id_kept": "with_url", "created_at": False, "sparse": True},
    "callback_id not kept, no title": {"callback_id_kept": "with_url", "untitled": "mine"},
    "callback_id of the author": {"own_callback_id": "mine"},
}


# --- The hook and the trigger --------------------------------------------------------------------------


def _connect(server: OtherServer, **extra: Any) -> str:
    """Each run has a connection of its own: they run side by side."""
    conn_id = f"other_{server.url.rpartition(':')[2]}"
    os.environ[f"AIRFLOW_CONN_{conn_id.upper()}"] = server.connection(**extra)
    return conn_id


def _hook_life(ugly: dict[str, Any], folder: Path) -> None:
    from airflow_provider_heygen.exceptions import HeyGenNotFoundError
    from airflow_provider_heygen.hooks.heygen import HeyGenHook
    from airflow_provider_heygen.triggers.overdub import HeyGenOverdubTrigger

    async def wait(trigger: HeyGenOverdubTrigger) -> Any:
        return [event.payload async for event in trigger.run()]

    source = folder / "täglich.mp4"
    source.write_bytes(VIDEO)
    with OtherServer(**ugly) as server, HeyGenHook(conn_id := _connect(server)) as hook:
        for number in range(9):  # other people's jobs, with and without a callback
            other = {
                "title": "other",
                **({"callback_url": "https://x.y", "callback_id": "z"} if number % 2 else {}),
            }
            made, _ = server.create({"video": _url("v"), "audio": _url("a"), **other}, None)
            while made == 429:
                made, _ = server.create({"video": _url("v"), "audio": _url("a"), **other}, None)
        media = {"type": "asset_id", "asset_id": hook.upload_asset(source).asset_id}
        assert server.assets[media["asset_id"]] == VIDEO
        overdub_id = hook.create_overdub({"video": media, "audio": media, "title": "mine"})
        assert server.count("title")["mine"] == 1
        fresh = time.time() + 30
        trigger = HeyGenOverdubTrigger(
            heygen_conn_id=conn_id, overdub_id=overdub_id, poke_interval=0.1, not_found_until=fresh
        )
        (event,) = asyncio.run(wait(trigger))
        assert event["status"] == "completed", event
        assert "Signature" not in json.dumps(event)
        assert hook.update_overdub(overdub_id, "renamed").title == "renamed"
        assert sorted(row.overdub_id for row in hook.iter_overdubs(page_size=4)) == sorted(server.jobs)
        assert hook.download_overdub(overdub_id, folder / "out.mp4") == len(VIDEO)
        assert (folder / "out.mp4").read_bytes() == VIDEO
        with contextlib.suppress(HeyGenNotFoundError):  # a deletion whose response was lost
            hook.delete_overdub(overdub_id)
        assert overdub_id not in server.jobs
        assert server.stray_credentials == []


def _url(name: str) -> dict[str, str]:
    return {"type": "url", "url": f"https://example.com/{name}"}


@pytest.fixture(scope="module")
def hook_runs(tmp_path_factory: pytest.TempPathFactory, dag_runs: Any) -> Iterator[list[Any]]:
    """All rows at once, for they mostly sleep."""
    with ThreadPoolExecutor(len(HOOK_ROWS)) as pool:
        yield [pool.submit(_hook_life, row, tmp_path_factory.mktemp("hook")) for row in HOOK_ROWS]


@pytest.mark.parametrize("number", range(len(HOOK_ROWS)))
def test_hook_and_trigger(hook_runs: list[Any], number: int) -> None:
    hook_runs[number].result(timeout=80)


@pytest.mark.parametrize("case", [*LOST, *UNTRACEABLE])
def test_a_lost_response_makes_one_job(case: str, dag_runs: Any) -> None:
    from airflow_provider_heygen.exceptions import HeyGenOutcomeUnknownError
    from airflow_provider_heygen.hooks.heygen import HeyGenHook

    ugly = dict((LOST | UNTRACEABLE)[case])
    request = {"video": "https://x.y/v", "audio": "https://x.y/a", "title": "mine"}
    if own := ugly.pop("own_callback_id", None):
        request["callback_id"] = own
    if "untitled" in ugly:
        del request["title"]
    refused = pytest.raises(HeyGenOutcomeUnknownError) if case in UNTRACEABLE else contextlib.nullcontext()
    with OtherServer(idempotent=False, lose_creates=1, **ugly) as server:
        with HeyGenHook(_connect(server)) as hook, refused:
            assert hook.create_overdub(request) in server.jobs
        assert len(server.created) == 1


def test_a_create_that_outlives_the_client_makes_one_job(
    dag_runs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from airflow_provider_heygen.hooks.heygen import HeyGenHook

    monkeypatch.setattr("airflow_provider_heygen.hooks.heygen.SETTLE_SECONDS", 8)
    with OtherServer(idempotent=False, create_takes=4.0) as server:
        conn_id = _connect(server, write_timeout=1)
        with HeyGenHook(conn_id) as hook:
            hook.create_overdub({"video": "https://x.y/v", "audio": "https://x.y/a", "title": "mine"})
        assert server.count("title") == {"mine": 1}


def test_a_second_request_under_a_running_key_waits_for_the_first() -> None:
    from airflow_provider_heygen.hooks.heygen import HeyGenHook

    with OtherServer(create_takes=2.0) as server, ThreadPoolExecutor() as pool:
        conn_id, request = _connect(server), {"video": "https://x.y/v", "audio": "https://x.y/a"}
        create = [HeyGenHook(conn_id).create_overdub for _ in range(3)]
        ids = {run.result() for run in [pool.submit(c, request, idempotency_key="same") for c in create]}
        assert ids == set(server.jobs)
        assert len(server.created) == 1


# --- Whole DAGs ----------------------------------------------------------------------------------------

# dag.test() finds the DAG in the dags folder, so this has to be a separate file.
DAG_FILE = """
import json, os, sys
from datetime import timedelta
from airflow.sdk import DAG
from airflow_provider_heygen.hooks import heygen
from airflow_provider_heygen.operators.asset import HeyGenUploadAssetOperator
from airflow_provider_heygen.operators.overdub import (
    HeyGenCreateOverdubOperator, HeyGenDeleteOverdubOperator, HeyGenUpdateOverdubOperator,
)
from airflow_provider_heygen.sensors.overdub import HeyGenOverdubSensor
from airflow_provider_heygen.transfers.heygen_to_object_storage import HeyGenOverdubToObjectStorageOperator

heygen.SETTLE_SECONDS = 2  # this server's creates take no longer
soon = {"poke_interval": 0.2, "timeout": 40}
with DAG("life", default_args={"retries": 2, "retry_delay": timedelta(0)}) as dag:
    video = HeyGenUploadAssetOperator(task_id="video", source="{{ dag_run.conf['source'] }}")
    audio = HeyGenUploadAssetOperator(task_id="audio", source="file://{{ dag_run.conf['source'] }}")
    media = {"video": video.output, "audio": audio.output}
    here = HeyGenCreateOverdubOperator(task_id="here", title="here", **media, deferrable=False, **soon)
    away = HeyGenCreateOverdubOperator(task_id="away", title="away", **media, deferrable=True, **soon)
    quick = HeyGenCreateOverdubOperator.partial(
        task_id="quick", wait_for_completion=False, **media
    ).expand(title=["a", "b"])
    wait = HeyGenOverdubSensor.partial(task_id="defers", deferrable=True, **soon)
    wait.expand(overdub_id=quick.output)
    poked = HeyGenOverdubSensor(task_id="pokes", overdub_id=here.output, deferrable=False, **soon)
    saved = HeyGenOverdubToObjectStorageOperator(
        task_id="saved", overdub_id=away.output, destination="{{ dag_run.conf['folder'] }}/"
    )
    named = HeyGenUpdateOverdubOperator(task_id="named", overdub_id=away.output, title="named")
    gone = HeyGenDeleteOverdubOperator(task_id="gone", overdub_id="{{ ti.xcom_pull('away') }}")
    [saved, named, poked] >> gone

if __name__ == "__main__":
    sys.path.insert(0, os.environ["TESTS"])
    from airflow_task import build_execution_api_once
    from other_server import VIDEO, OtherServer

    build_execution_api_once()
    folder = sys.argv[1]
    open(f"{folder}/source.mp4", "wb").write(VIDEO)
    for number, row in json.load(open(f"{folder}/rows.json")):
        with OtherServer(**row) as server:
            os.environ["AIRFLOW_CONN_HEYGEN_DEFAULT"] = server.connection()
            os.mkdir(out := f"{folder}/out{number}")
            run = dag.test(run_conf={"source": f"{folder}/source.mp4", "folder": out})
            seen = {
                "state": str(run.state),
                "tasks": {f"{ti.task_id}[{ti.map_index}]": ti.state for ti in run.get_task_instances()},
                "made": server.count("title"),
                "left": sorted(job.title for job in server.jobs.values()),
                "saved": [open(f"{out}/{name}", "rb").read() == VIDEO for name in os.listdir(out)],
                "stray_credentials": server.stray_credentials,
            }
        json.dump(seen, open(f"{folder}/{number}.part", "w"))
        os.rename(f"{folder}/{number}.part", f"{folder}/{number}.json")
"""


class DagRuns:
    """A process with an Airflow of its own that goes through the rows."""

    def __init__(self, place: Path, database: Path) -> None:
        self.place = place
        (place / "dags").mkdir()
        (place / "dags" / "life.py").write_text(DAG_FILE)
        (place / "rows.json").write_text(json.dumps(list(enumerate(DAG_ROWS))))
        shutil.copy(database, place)
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("AIRFLOW_")},
            "AIRFLOW_HOME": str(place),
            "AIRFLOW__CORE__DAGS_FOLDER": str(place / "dags"),
            "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
            "TESTS": str(Path(__file__).parent),
            "PYTHONPATH": str(Path(__file__).parents[1]),
            "PYTHONWARNINGS": "ignore",
        }
        with (place / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "dags/life.py", place], cwd=place, env=environment, stdout=log, stderr=log
            )

    def result(self, number: int) -> dict[str, Any]:
        until = time.monotonic() + 600
        while not (found := self.place / f"{number}.json").exists():
            if self.process.poll() not in (None, 0) or time.monotonic() > until:
                pytest.fail((self.place / "log").read_text()[-4000:])
            time.sleep(0.1)
        return json.loads(found.read_text())

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def dag_runs(tmp_path_factory: pytest.TempPathFactory, migrated_db: Path) -> Iterator[DagRuns]:
    """Started first, so that they run while the hook's tests sleep."""
    runs = DagRuns(tmp_path_factory.mktemp("dags"), migrated_db)
    yield runs
    runs.stop()


@pytest.mark.parametrize("number", range(len(DAG_ROWS)))
def test_dag(dag_runs: DagRuns, number: int) -> None:
    seen = dag_runs.result(number)
    assert seen["state"] == "success", seen
    assert seen["made"] == {"here": 1, "away": 1, "a": 1, "b": 1}
    assert seen["left"] == ["a", "b", "here"]
    assert seen["saved"] == [True]
    assert seen["stray_credentials"] == []


def test_no_key_and_no_url_in_logs_or_database(dag_runs: DagRuns) -> None:
    dag_runs.result(len(DAG_ROWS) - 1)
    place = dag_runs.place
    for file in [place / "log", place / "airflow.db", *place.glob("logs/**/*.log")]:
        content = file.read_bytes().decode(errors="replace")
        assert KEY not in content, file
        assert "Signature=SECRET" not in content, file
