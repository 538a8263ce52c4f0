"""Whole DAGs by `dag.test()`: what the examples save plays with the new audio."""

from __future__ import annotations

import importlib
import json
import os
import re
import sqlite3
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from conftest import AIRFLOW, Storage
from packaging.version import Version

from airflow_provider_heygen.emulator.media import decode_audio, decode_frames, make_audio, make_video

DAGS = Path(__file__).parent.parent / "example_dags"
LANGUAGES = {"de": 500, "fr": 700, "es": 900}


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    make_video(folder / "talk.mp4", 2)
    for language, hz in LANGUAGES.items():
        make_audio(folder / f"talk.{language}.mp3", 2, hz)
    return folder


@pytest.fixture(scope="module")
def airflow(airflow_db, media):
    """An Airflow whose DAGs folder is that of the examples."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEYGEN_EXAMPLE_MEDIA", str(media))
        patch.syspath_prepend(str(DAGS))
        yield


def run(name, **conf):
    run = importlib.import_module(name).dag.test(run_conf=conf)
    return run.state, {
        (ti.task_id, ti.map_index): (ti.state, ti.try_number) for ti in run.get_task_instances()
    }


def is_dubbed(result, media, language):
    """Whether a file has the decoded sound of that language's audio and the pictures of the video."""
    sounds = {name: decode_audio(media / f"talk.{name}.mp3") for name in LANGUAGES}
    frames, original = decode_frames(result), decode_frames(media / "talk.mp4")
    length = min(len(frames), len(original))
    return (
        decode_audio(result) == sounds.pop(language)
        and decode_audio(result) not in sounds.values()
        and length > 40
        and frames[:length] == original[:length]
    )


@pytest.mark.parametrize("resource", ["overdubs", "lipsyncs"])
def test_one_video(heygen, airflow, media, resource):
    result = media / f"{resource}.mp4"
    state, tasks = run("example_heygen_overdub", result=str(result), mode="precision")
    assert state == "success"
    assert tasks == {("dub", -1): ("success", 1)}
    assert len(heygen.jobs) == 1
    assert heygen.jobs[0].request.mode == "precision"
    assert is_dubbed(result, media, "de")


def test_one_video_that_fails(heygen, airflow, media, tmp_path):
    heygen.behaviour.fail_jobs = 1
    state, tasks = run("example_heygen_overdub", result=f"{tmp_path}/v.mp4")
    assert (state, tasks) == ("failed", {("dub", -1): ("failed", 1)})
    assert list(tmp_path.iterdir()) == []


# --- A night --------------------------------------------------------------------------------------------


@pytest.fixture(params=["file", "s3"])
def night(request, heygen, airflow, media, tmp_path, connect, monkeypatch):
    """Run the example over a folder or bucket with one video in three languages."""
    dag = importlib.import_module("example_heygen_localisation").dag
    monkeypatch.setitem(dag.get_task("dub").partial_kwargs, "poke_interval", 1)
    connection = heygen.connection()
    connection["extra"]["price_per_second"] = {"speed": 0.05}
    connect(heygen.url, connection["password"], **connection["extra"])
    storage = request.getfixturevalue("s3") if request.param == "s3" else Storage(f"file://{tmp_path}/talks")
    if request.param == "s3":
        storage = Storage(storage.uri("talks"))
    else:
        (tmp_path / "talks").mkdir()
    for name in ("talk.mp4", *(f"talk.{language}.mp3" for language in LANGUAGES)):
        storage.write(name, (media / name).read_bytes())

    def run_it(base=storage.base):
        state, tasks = run("example_heygen_localisation", media=base)
        return state, {f"{task}[{index}]": state for (task, index), (state, _) in tasks.items()}

    run_it.storage = storage
    run_it.manifest = lambda: json.loads(storage.read("dubbed.json"))
    return run_it


def test_a_night(night, heygen, media, tmp_path):
    state, tasks = night()
    assert (state, set(tasks.values())) == ("success", {"success"})
    assert set(night.manifest()) == {f"talk.{language}" for language in LANGUAGES}
    for language in LANGUAGES:
        found = night.manifest()[f"talk.{language}"]
        assert found["uri"] == night.storage.uri(f"dubbed/talk.{language}.mp4")
        assert found["cost"] == pytest.approx(0.05 * found["duration"])
        result = tmp_path / "result.mp4"
        result.write_bytes(night.storage.read(f"dubbed/talk.{language}.mp4"))
        assert found["size"] == len(result.read_bytes())
        assert is_dubbed(result, media, language)
    requests = len(heygen.requests)
    state, tasks = night()
    assert state == "success"
    assert len(heygen.requests) == requests, "nothing is asked of HeyGen"
    assert {name: set(found) for name, found in night.manifest().items()} == {
        f"talk.{language}": {"uri", "size"} for language in LANGUAGES
    }
    secrets = [request.query for request in heygen.requests if request.path.startswith("/files/")]
    with sqlite3.connect(Path(os.environ["AIRFLOW_HOME"], "airflow.db")) as database:
        stored = "\n".join(database.iterdump())
    assert secrets != []
    assert night.storage.uri("dubbed/talk.de.mp4") in stored
    assert [secret for secret in secrets if secret in stored or secret.rpartition("=")[2] in stored] == []


@pytest.mark.parametrize("night", ["s3"], indirect=True)
def test_a_final_slash_of_the_folder_is_rejected_before_any_task(night, heygen):
    """It would be a part of each key: `talks//talk.mp4` is another object."""
    with pytest.raises(Exception, match="does not match"):
        night(f"{night.storage.base}/")
    assert heygen.requests == []


@pytest.mark.parametrize("night", ["s3"], indirect=True)
def test_a_language_that_fails_stops_no_other(night, heygen, tmp_path, monkeypatch):
    printed = []
    monkeypatch.setattr("builtins.print", lambda *texts, **_: printed.extend(texts))
    heygen.behaviour.fail_jobs = 1
    state, tasks = night()
    assert state == "failed"
    assert sorted(tasks.values()) == ["failed", "failed", "success", "success", "success"]
    assert tasks["manifest[-1]"] == "failed"
    (job,) = [job for job in heygen.jobs if job.status == "failed"]
    done = {f"talk.{language}" for language in LANGUAGES} - {job.title}
    assert set(night.manifest()) == done
    alerts = [text for text in printed if str(text).startswith("ALERT")]
    text = f"ALERT: {job.title} is not dubbed: Overdub {job.id} ({job.title!r}) failed: "
    # Before Airflow 3.3, dag.test() calls no callbacks of tasks.
    assert [alert[: len(text)] for alert in alerts] == [text] * (Version("3.3") <= AIRFLOW)
    # The next night makes what is missing, and what has another audio.
    audio = min(done)
    time.sleep(1.1)  # S3 counts in seconds
    make_audio(tmp_path / "new.mp3", 2, 300)
    night.storage.write(f"{audio}.mp3", (tmp_path / "new.mp3").read_bytes())
    assert len(heygen.jobs) == 3
    state, _ = night()
    assert len(heygen.jobs) == 5
    assert {job.title for job in heygen.jobs[3:]} == {job.title, audio}


# --- A review -------------------------------------------------------------------------------------------


@pytest.fixture
def review(heygen, airflow, monkeypatch, tmp_path):
    """Run the example with a person's decision; also return the text that the person reads."""
    from airflow.providers.standard.operators.hitl import HITLBranchOperator

    def run_it(answer):
        texts = []

        def answered(operator, context):
            texts.append(operator.body)
            event = {
                "chosen_options": [answer],
                "params_input": {},
                "responded_at": datetime.now(UTC),
                "responded_by_user": None,
            }
            return operator.execute_complete(context, event)

        monkeypatch.setattr(HITLBranchOperator, "execute", answered)
        state, tasks = run("example_heygen_review", published=f"{tmp_path}/published.mp4")
        return {"run": state} | {task: state for (task, _), (state, _) in tasks.items()}, texts

    return run_it


def test_what_is_approved_is_published(heygen, review, media, tmp_path):
    states, (text,) = review("Publish")
    assert [states[name] for name in ("run", "publish", "delete")] == ["success", "success", "skipped"]
    assert is_dubbed(tmp_path / "published.mp4", media, "de")
    assert [job.deleted for job in heygen.jobs] == [False]
    link = r"\*\*Talk, German\*\*, 2\.\d+ s: \[Watch\]\(heygen/watch/example_heygen_review/[^/]+/dub/-1\)"
    assert re.fullmatch(link, text)


def test_what_is_rejected_is_deleted(heygen, review, tmp_path):
    states, _ = review("Delete")
    assert [states[name] for name in ("run", "publish", "delete")] == ["success", "skipped", "success"]
    assert list(tmp_path.iterdir()) == []
    assert [job.deleted for job in heygen.jobs] == [True]


def test_what_failed_is_not_reviewed(heygen, review):
    heygen.behaviour.fail_jobs = 1
    states, texts = review("Publish")
    assert (states.pop("run"), states.pop("dub"), set(states.values())) == (
        "failed",
        "failed",
        {"upstream_failed"},
    )
    assert texts == []


# --- On purpose -----------------------------------------------------------------------------------------


@pytest.fixture
def cleanup(airflow, monkeypatch):
    """Run the example of a deletion; no task of it is tried again."""
    dag = importlib.import_module("example_heygen_cleanup").dag
    for task in dag.tasks:
        monkeypatch.setattr(task, "retries", 0)

    def run_it(**conf):
        state, tasks = run("example_heygen_cleanup", **conf)
        return state, {task: state for (task, _), (state, _) in tasks.items()}

    return run_it


def test_what_is_wanted_is_kept(heygen, cleanup, media):
    state, tasks = cleanup()
    assert state == "success"
    assert tasks == {"dub": "success", "save": "success", "is_left_behind": "skipped", "delete": "skipped"}
    assert [job.deleted for job in heygen.jobs] == [False]
    assert is_dubbed(media / "talk.kept.mp4", media, "de")


@pytest.mark.parametrize("fault", ["times out", "fails"])
def test_what_is_left_behind_is_deleted(heygen, cleanup, fault):
    heygen.behaviour.job_seconds = 3600 if fault == "times out" else 0.05
    heygen.behaviour.fail_jobs = int(fault == "fails")
    state, tasks = cleanup(timeout=2)
    assert state == "failed"
    assert tasks == {
        "dub": "failed",
        "save": "upstream_failed",
        "is_left_behind": "success",
        "delete": "success",
    }
    assert [job.deleted for job in heygen.jobs] == [True]


def test_nothing_is_deleted_where_nothing_was_started(heygen, cleanup):
    heygen.fail_next(method="POST", path="/v3/overdubs", status=402)
    state, tasks = cleanup()
    assert state == "failed"
    assert tasks == {
        "dub": "failed",
        "save": "upstream_failed",
        "is_left_behind": "success",
        "delete": "skipped",
    }
    assert not heygen.jobs
    assert "DELETE" not in {request.method for request in heygen.requests}


@pytest.mark.parametrize("name", sorted(path.stem for path in DAGS.glob("example_*.py")))
def test_each_dag_and_task_has_a_description_in_the_ui(airflow, name):
    dag = importlib.import_module(name).dag
    assert "::" not in dag.doc_md  # it is Markdown
    assert dag.description
    for param in map(dag.params.get_param, dag.params):
        assert param.schema.get("title"), param.value
        assert param.description, param.value
    for task in dag.tasks:
        assert task.partial_kwargs.get("doc_md") if task.is_mapped else task.doc_md, task.task_id
