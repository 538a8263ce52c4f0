"""Whole DAGs by `dag.test()`: what the examples save plays with the new audio."""

from __future__ import annotations

import importlib
import os
import sqlite3
from pathlib import Path

import pytest

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
    state, tasks = run("example_heygen_overdub", result=str(result))
    assert state == "success"
    assert set(tasks.values()) == {("success", 1)}
    assert len(heygen.jobs) == 1
    assert heygen.jobs[0].request.mode == "precision"
    assert is_dubbed(result, media, "de")


@pytest.mark.parametrize("resource", ["overdubs", "lipsyncs"])
def test_many_languages(heygen, airflow, media, resource):
    state, tasks = run("example_heygen_localisation")
    assert state == "success"
    assert {task for task in tasks if task[0] == "dub"} == {("dub", index) for index in range(3)}
    assert len(heygen.jobs) == 3
    assert all(job.deleted for job in heygen.jobs)
    assert {job.title for job in heygen.jobs} == {f"Talk, {language}, delivered" for language in LANGUAGES}
    for language in LANGUAGES:
        assert is_dubbed(media / "dubbed" / f"talk.{language}.mp4", media, language)


def test_from_bucket_to_bucket(heygen, airflow, media, s3, tmp_path):
    for name in ("talk.mp4", "talk.de.mp3"):
        s3.write(f"talks/{name}", (media / name).read_bytes())
    state, tasks = run("example_heygen_object_storage", storage=s3.uri("talks"))
    assert state == "success"
    assert {task: state for (task, _), (state, _) in tasks.items()} == {"dub": "success", "save": "success"}
    assert s3.names() == ["talk.de.mp3", "talk.de.mp4", "talk.mp4"]
    result = tmp_path / "talk.de.mp4"
    result.write_bytes(s3.read("talks/dubbed/talk.de.mp4"))
    assert is_dubbed(result, media, "de")
    secrets = [request.query for request in heygen.requests if request.path.startswith("/files/")]
    with sqlite3.connect(Path(os.environ["AIRFLOW_HOME"], "airflow.db")) as database:
        stored = "\n".join(database.iterdump())
    assert secrets != []
    assert "s3://s3@bucket/talks/dubbed/talk.de.mp4" in stored
    assert [secret for secret in secrets if secret in stored or secret.rpartition("=")[2] in stored] == []


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
def test_each_dag_and_task_says_in_the_ui_what_it_does(airflow, name):
    dag = importlib.import_module(name).dag
    assert "::" not in dag.doc_md  # it is Markdown
    for task in dag.tasks:
        assert task.partial_kwargs.get("doc_md") if task.is_mapped else task.doc_md, task.task_id
