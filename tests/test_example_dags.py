"""
Whole DAGs by `dag.test()`: what the examples save plays with the new audio.

There is no triggerer then, so a wait that would end in it ends as any other.
"""

from __future__ import annotations

import importlib
import os
import sqlite3
from pathlib import Path

import pytest

from airflow_provider_heygen.emulator.media import decode_audio, decode_frames, make_audio, make_video
from airflow_provider_heygen.hooks.heygen import HeyGenHook

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


@pytest.mark.parametrize("name", sorted(path.stem for path in DAGS.glob("example_*.py")))
def test_each_dag_and_task_says_in_the_ui_what_it_does(airflow, name):
    dag = importlib.import_module(name).dag
    assert "::" not in dag.doc_md  # it is Markdown
    for task in dag.tasks:
        assert task.partial_kwargs.get("doc_md") if task.is_mapped else task.doc_md, task.task_id


NO_TRIGGERER = """
from airflow.sdk import DAG, task
from airflow_provider_heygen.sensors.overdub import HeyGenOverdubSensor

with DAG("no_triggerer") as dag:
    wait = HeyGenOverdubSensor(
        task_id="wait", overdub_id={!r}, deferrable=True, poke_interval=0.2, end_from_trigger=True
    )

    @task
    def use(details):
        assert details["status"] == "completed"

    use(wait.output)
"""


def test_there_is_no_triggerer_to_end_in(heygen, airflow, tmp_path, monkeypatch, capsys):
    with HeyGenHook() as hook:
        overdub_id = hook.create_overdub({"video": "https://x.y/v.mp4", "audio": "https://x.y/a.mp3"})
    heygen.force(overdub_id, "completed")
    heygen.fail_next(method="GET", status=500)  # the first look, so that the task defers
    (tmp_path / "no_triggerer.py").write_text(NO_TRIGGERER.format(overdub_id))
    monkeypatch.setattr("airflow.settings.DAGS_FOLDER", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    state, tasks = run("no_triggerer")
    assert state == "success"
    assert set(tasks.values()) == {("success", 1)}
    assert [request.status for request in heygen.requests if request.method == "GET"] == [500, 200]
    assert "pushing its XCom failed" not in capsys.readouterr().out
