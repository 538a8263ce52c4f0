"""Upload, rename, save and delete; and what Airflow sees of the create operator's arguments."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from datetime import timedelta
from inspect import signature
from types import SimpleNamespace

import jinja2
import pytest
from airflow.providers.common.compat.sdk import AirflowFailException, redact
from airflow_task import StateStore, Task

from airflow_provider_heygen.api import CreateOverdubRequest
from airflow_provider_heygen.exceptions import (
    HeyGenBadInputError,
    HeyGenError,
    HeyGenNotFoundError,
    HeyGenOverdubFailedError,
    HeyGenOverdubTimeoutError,
    HeyGenPermanentError,
    HeyGenTaskFailedError,
    HeyGenTransientError,
)
from airflow_provider_heygen.hooks.heygen import HeyGenHook
from airflow_provider_heygen.operators.asset import HeyGenDeleteAssetOperator, HeyGenUploadAssetOperator
from airflow_provider_heygen.operators.overdub import (
    REQUEST_FIELDS,
    HeyGenCreateOverdubOperator,
    HeyGenDeleteOverdubOperator,
    HeyGenUpdateOverdubOperator,
)
from airflow_provider_heygen.sensors.overdub import HeyGenOverdubSensor
from airflow_provider_heygen.submission import STATE_KEY, digest
from airflow_provider_heygen.transfers.heygen_to_object_storage import HeyGenOverdubToObjectStorageOperator
from airflow_provider_heygen.triggers.overdub import HeyGenOverdubTrigger, HeyGenSlotTrigger

RESOURCES = pytest.mark.parametrize("resource", ["overdubs", "lipsyncs"])
MEDIA = {"video": "https://x.y/v.mp4", "audio": "https://x.y/a.mp3"}


def run(operator, **arguments):
    """Run an operator once; return what it returns and its XComs."""
    task = Task(lambda: operator(task_id="task", **arguments), store=StateStore())
    return task.start(), task.xcoms


@contextmanager
def fails_for_good(cause, match=""):
    """Expect that the task fails without a retry, because of ``cause``."""
    with pytest.raises(HeyGenTaskFailedError, match=match) as caught:
        yield
    assert isinstance(caught.value, AirflowFailException)
    assert isinstance(caught.value.__cause__, cause)


@pytest.fixture
def overdub_id(heygen):
    return run(HeyGenCreateOverdubOperator, poke_interval=0.05, **MEDIA)[0]


# --- Create -------------------------------------------------------------------------------------------


def test_the_operator_has_each_field_of_the_request_as_a_templated_argument():
    assert tuple(CreateOverdubRequest.model_fields) == (*REQUEST_FIELDS, "extra_body")
    assert {*REQUEST_FIELDS, "extra_body", "heygen_conn_id"} <= set(
        HeyGenCreateOverdubOperator.template_fields
    )


@RESOURCES
def test_all_fields_arrive_as_templates_render_them(heygen):
    texts = {
        "title": "T",
        "mode": "precision",
        "enable_caption": "True",
        "enable_dynamic_duration": "false",
        "disable_music_track": "1",
        "enable_speech_enhancement": "yes",
        "enable_watermark": "0",
        "start_time": "0.5",
        "end_time": "2",
        "keep_the_same_format": "true",
        "fps_mode": "cfr",
        "callback_url": "https://x.y/hook?token=1",
        "callback_id": "7",
        "folder_id": "f",
    }
    timeouts = {"poke_interval": "0.05", "timeout": "20"}
    run(HeyGenCreateOverdubOperator, **MEDIA, **texts, **timeouts, wait_for_completion=False)
    sent = heygen.jobs[0].request
    assert (sent.start_time, sent.end_time, sent.mode, sent.fps_mode) == (0.5, 2.0, "precision", "cfr")
    assert (sent.enable_caption, sent.enable_dynamic_duration, sent.disable_music_track) == (
        True,
        False,
        True,
    )
    assert (sent.enable_speech_enhancement, sent.enable_watermark) == (True, False)
    assert (sent.callback_id, sent.folder_id, sent.title) == ("7", "f", "T")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"video": {"type": "url"}}, "video"),
        ({"audio": "http://x.y/a.mp3"}, "audio"),
        ({"audio": None}, "audio"),
        ({"start_time": 3, "end_time": 2}, "end_time"),
        ({"title": "None"}, "title"),
        ({"extra_body": {"title": "x"}}, "extra_body: repeats 'title'"),
        ({"poke_interval": 0}, "poke_interval"),
        ({"poke_interval": "soon"}, "poke_interval"),
        ({"timeout": -1}, "timeout"),
        ({"timeout": timedelta(0)}, "timeout"),
    ],
    ids=str,
)
def test_invalid_input_is_rejected_before_any_request(heygen, changes, field):
    with fails_for_good(HeyGenBadInputError, match=field):
        run(HeyGenCreateOverdubOperator, **MEDIA | changes)
    assert heygen.requests == []


def test_what_the_upload_returns_goes_in_whole_or_by_its_id(heygen, tmp_path):
    (tmp_path / "a.mp3").write_bytes(b"ID3" + bytes(100))
    asset, xcoms = run(HeyGenUploadAssetOperator, source=str(tmp_path / "a.mp3"))
    assert asset == {"type": "asset_id", "asset_id": xcoms["asset_id"]}
    for audio in (asset, {"type": "asset_id", "asset_id": asset}, {**asset, "asset_id": xcoms["asset_id"]}):
        run(HeyGenCreateOverdubOperator, video=MEDIA["video"], audio=audio, wait_for_completion=False)
        assert heygen.jobs[-1].request.audio.asset_id == xcoms["asset_id"]


def test_urls_are_masked_where_rendered_fields_are_stored():
    operator = HeyGenCreateOverdubOperator(
        task_id="task",
        video="https://x.y/v.mp4?X-Amz-Signature={{ secret }}",
        audio={"type": "url", "url": "https://user:RENDERED2@x.y/a.mp3?sig=RENDERED3"},
        callback_url="https://x.y/hook?token=RENDERED4",
        extra_body={"backgrounds": [{"url": "https://x.y/b.png?sig=RENDERED5"}]},
    )
    operator.render_template_fields({"secret": "RENDERED1"}, jinja2.Environment(autoescape=True))
    transfer = HeyGenOverdubToObjectStorageOperator(
        task_id="save", overdub_id="od_1", destination="s3://key:RENDERED6@bucket/{{ name }}"
    )
    transfer.render_template_fields({"name": "v.mp4"}, jinja2.Environment(autoescape=True))
    assert "RENDERED" not in str(redact(transfer.destination))
    assert "RENDERED1" in operator.video
    stored = str([redact(getattr(operator, name)) for name in operator.template_fields])
    assert "RENDERED" not in stored
    assert "https://x.y/v.mp4?" in stored


@pytest.mark.parametrize(
    ("fields", "sent"),
    [
        ({"title": 2026.5, "folder_id": 5, "callback_id": 100000.0}, {"title": "2026.5", "folder_id": "5"}),
        ({"title": 2026, "enable_watermark": " true "}, {"title": "2026", "enable_watermark": True}),
        ({"disable_music_track": "FALSE", "start_time": "1"}, {"disable_music_track": False}),
        (
            {"video": {"type": "asset_id", "asset_id": 123456}},
            {"video": {"type": "asset_id", "asset_id": "123456"}},
        ),
    ],
    ids=str,
)
def test_what_a_native_template_renders(fields, sent):
    body = CreateOverdubRequest.of(MEDIA | fields).body()
    assert {name: body[name] for name in sent} == sent


@RESOURCES
def test_rename_to_a_number(heygen, overdub_id):
    run(HeyGenUpdateOverdubOperator, overdub_id=overdub_id, title=2026.5)
    assert heygen.jobs[0].title == "2026.5"


@pytest.mark.parametrize("name", ["start_time", "end_time", "timeout", "poke_interval"])
def test_a_flag_is_no_number_of_seconds(heygen, name):
    with pytest.raises(HeyGenTaskFailedError, match=f"{name}.* must be a (positive )?number of seconds"):
        run(HeyGenCreateOverdubOperator, **MEDIA, **{name: True})
    assert heygen.requests == []


def test_a_connection_id_that_a_native_template_made_a_number(heygen, monkeypatch):
    monkeypatch.setenv("AIRFLOW_CONN_2026", os.environ["AIRFLOW_CONN_HEYGEN_DEFAULT"])
    run(HeyGenCreateOverdubOperator, **MEDIA, heygen_conn_id=2026, wait_for_completion=False)
    assert len(heygen.jobs) == 1


@pytest.mark.parametrize("mode", ["poke", "reschedule"])
def test_a_sensors_mode_from_default_args(heygen, capsys, mode):
    run(HeyGenCreateOverdubOperator, **MEDIA, mode=mode, poke_interval=0.05)
    assert heygen.jobs[0].request.mode in (None, "speed")
    assert "mode='speed', mode='precision' or mode=None on this task" in capsys.readouterr().out


def test_further_fields(heygen, wire, monkeypatch):
    """They are rendered, sent, and part of what makes a request another one."""
    operator = HeyGenCreateOverdubOperator(task_id="task", **MEDIA, extra_body={"lang": ["{{ lang }}"]})
    operator.render_template_fields({"lang": "de"})
    assert operator.extra_body == {"lang": ["de"]}
    wire.answer = lambda _: (200, {}, b'{"data": {"overdub_id": "od_1", "status": "completed"}}')
    task = Task(lambda: operator, store=StateStore())
    task.start()
    (post,) = [seen for seen in wire.seen if seen.method == "POST"]
    assert json.loads(post.body)["lang"] == ["de"]
    assert "extra_body" not in json.loads(post.body)
    with_it = digest(CreateOverdubRequest.of(MEDIA | {"extra_body": {"lang": "de"}}))
    assert with_it != digest(CreateOverdubRequest.of(MEDIA))
    assert digest(CreateOverdubRequest.of(MEDIA | {"extra_body": {}})) == digest(
        CreateOverdubRequest.of(MEDIA)
    )


# --- HeyGen's name for the resource -------------------------------------------------------------------


def test_a_retry_asks_under_the_name_of_its_overdub(heygen, connect, monkeypatch):
    heygen.behaviour.resources = "lipsyncs"
    heygen.behaviour.job_seconds = 60
    connect(heygen.url, allow_private_hosts=True)
    task = Task(
        lambda: HeyGenCreateOverdubOperator(task_id="task", **MEDIA, timeout=0.2, poke_interval=0.05),
        store=StateStore(),
    )
    with pytest.raises(HeyGenOverdubTimeoutError):
        task.start()
    assert task.store.get(STATE_KEY)["resource"] == "lipsyncs"
    heygen.behaviour.resources = "both"
    heygen.force(heygen.jobs[0].id, "completed")
    connect(heygen.url, allow_private_hosts=True, resource="overdubs")  # forgets what was found, too
    before = len(heygen.requests)
    assert task.start() == heygen.jobs[0].id
    assert {record.path for record in heygen.requests[before:]} == {f"/v3/lipsyncs/{heygen.jobs[0].id}"}
    heygen.behaviour.job_seconds = 0.05
    task.clear()
    task.start()
    assert heygen.requests[-1].path == f"/v3/overdubs/{heygen.jobs[1].id}", "a new one: as it is set"


def test_delete_under_the_name_that_is_found(heygen, connect, overdub_id):
    heygen.behaviour.resources = "lipsyncs"
    connect(heygen.url)
    run(HeyGenDeleteOverdubOperator, overdub_id=overdub_id)
    assert heygen.jobs[0].deleted


# --- Assets -------------------------------------------------------------------------------------------


@RESOURCES
def test_the_inputs_are_deleted_by_the_ids_in_xcom(heygen, tmp_path):
    (tmp_path / "v.mp4").write_bytes(b"\x00\x00\x00\x18ftypmp42" + bytes(100))
    (tmp_path / "a.mp3").write_bytes(b"ID3" + bytes(100))
    files = {"video": f"file://{tmp_path}/v.mp4", "audio": f"file://{tmp_path}/a.mp3"}
    _, xcoms = run(HeyGenCreateOverdubOperator, **files, wait_for_completion=False)
    assert xcoms["asset_ids"] == [asset.id for asset in heygen.assets]
    assert len(xcoms["asset_ids"]) == 2
    run(HeyGenDeleteAssetOperator, asset_id=xcoms["asset_ids"])
    assert heygen.assets == []
    run(HeyGenDeleteAssetOperator, asset_id=xcoms["asset_ids"])
    with fails_for_good(HeyGenNotFoundError):
        run(HeyGenDeleteAssetOperator, asset_id=xcoms["asset_ids"], ignore_missing=False)


def test_no_asset_is_uploaded_for_a_url(heygen):
    assert run(HeyGenCreateOverdubOperator, **MEDIA, wait_for_completion=False)[1]["asset_ids"] == []


@pytest.mark.parametrize(
    ("asset_id", "deleted"),
    [
        ("a", ["a"]),
        (7, ["7"]),
        ({"type": "asset_id", "asset_id": "a"}, ["a"]),
        ([], []),
        ((["a", 7], [], [{"type": "asset_id", "asset_id": "b"}]), ["a", "7", "b"]),
    ],
    ids=str,
)
def test_ids_of_assets_in_each_form(wire, asset_id, deleted):
    run(HeyGenDeleteAssetOperator, asset_id=asset_id)
    assert [f"{seen.method} {seen.path}" for seen in wire.seen] == [f"DELETE /v3/assets/{i}" for i in deleted]


@pytest.mark.parametrize(
    "asset_id", [None, "None", "", ["a", None], "['a','b']", "['a']", {"url": "x"}], ids=str
)
def test_delete_of_a_bad_asset_id_sends_nothing(heygen, asset_id):
    with fails_for_good(HeyGenBadInputError, match="asset_id"):
        run(HeyGenDeleteAssetOperator, asset_id=asset_id)
    assert heygen.requests == []


# --- Upload -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["", "missing.mp4", ".", "nope://bucket/v.mp4"], ids=str)
def test_a_bad_source_sends_nothing(heygen, tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    with fails_for_good(HeyGenBadInputError):
        run(HeyGenUploadAssetOperator, source=source)
    assert heygen.requests == []


# --- Update -------------------------------------------------------------------------------------------


@RESOURCES
def test_rename(heygen, overdub_id):
    returned, xcoms = run(HeyGenUpdateOverdubOperator, overdub_id=overdub_id, title="new")
    assert returned == overdub_id
    assert heygen.jobs[0].title == xcoms["overdub"]["title"] == "new"
    assert "http" not in str(xcoms)


def test_rename_to_a_url_logs_no_secret(heygen, overdub_id, caplog, capsys):
    caplog.set_level("INFO")
    run(HeyGenUpdateOverdubOperator, overdub_id=overdub_id, title="https://x.y/v.mp4?sig=SECRET1")
    text = caplog.text + capsys.readouterr().out
    assert "https://x.y/v.mp4?***" in text
    assert "SECRET1" not in text


@pytest.mark.parametrize("title", ["", " ", None])
def test_rename_to_nothing_sends_nothing(heygen, title):
    with fails_for_good(HeyGenBadInputError, match="title"):
        run(HeyGenUpdateOverdubOperator, overdub_id="od_1", title=title)
    assert heygen.requests == []


# --- Delete -------------------------------------------------------------------------------------------


@RESOURCES
def test_delete_twice(heygen, overdub_id):
    run(HeyGenDeleteOverdubOperator, overdub_id=overdub_id)
    assert heygen.jobs[0].deleted
    run(HeyGenDeleteOverdubOperator, overdub_id=overdub_id)
    with fails_for_good(HeyGenNotFoundError):
        run(HeyGenDeleteOverdubOperator, overdub_id=overdub_id, ignore_missing=False)


def test_delete_does_not_take_a_404_of_what_the_list_has_for_a_missing_overdub(heygen, overdub_id):
    heygen.fail_next(method="DELETE", status=404, code="not_found")
    with pytest.raises(HeyGenTransientError, match="its list has it"):
        run(HeyGenDeleteOverdubOperator, overdub_id=overdub_id)
    run(HeyGenDeleteOverdubOperator, overdub_id=overdub_id)
    assert heygen.jobs[0].deleted


def test_delete_does_not_take_a_wrong_resource_for_a_missing_overdub(heygen, overdub_id):
    heygen.behaviour.resources = "lipsyncs"
    with fails_for_good(HeyGenNotFoundError, match="'resource'"):
        run(HeyGenDeleteOverdubOperator, overdub_id=overdub_id)
    assert not heygen.jobs[0].deleted


@pytest.mark.parametrize("overdub_id", ["", "None", "a/b", "..", "x?y"])
def test_delete_of_a_bad_id_sends_nothing(heygen, overdub_id):
    with fails_for_good(HeyGenBadInputError):
        run(HeyGenDeleteOverdubOperator, overdub_id=overdub_id)
    assert heygen.requests == []


# --- Save ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["{}/v.mp4", "file://{}/v.mp4", "{}/", "file://{}/new/folder/"])
def test_save(heygen, overdub_id, tmp_path, form):
    uri, _ = run(
        HeyGenOverdubToObjectStorageOperator, overdub_id=overdub_id, destination=form.format(tmp_path)
    )
    name = f"{overdub_id}.mp4" if form.endswith("/") else "v.mp4"
    (saved,) = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert saved.name == name
    assert uri == f"file://{saved}"
    assert saved.read_bytes()[4:8] == b"ftyp"


def test_save_keeps_identical_files_and_rejects_others(heygen, overdub_id, tmp_path):
    arguments = {"overdub_id": overdub_id, "destination": str(tmp_path / "v.mp4")}
    run(HeyGenOverdubToObjectStorageOperator, **arguments)
    written = (tmp_path / "v.mp4").stat().st_mtime_ns
    run(HeyGenOverdubToObjectStorageOperator, **arguments)
    assert (tmp_path / "v.mp4").stat().st_mtime_ns == written
    (tmp_path / "v.mp4").write_bytes(b"other")
    with fails_for_good(HeyGenPermanentError, match="overwrite"):
        run(HeyGenOverdubToObjectStorageOperator, **arguments)
    run(HeyGenOverdubToObjectStorageOperator, **arguments, overwrite=True)
    assert len((tmp_path / "v.mp4").read_bytes()) > 1000
    assert [path.name for path in tmp_path.iterdir()] == ["v.mp4"]


def test_save_to_what_a_template_found_missing(heygen):
    with fails_for_good(HeyGenBadInputError, match="destination is empty or the text 'None'"):
        run(HeyGenOverdubToObjectStorageOperator, overdub_id="od_1", destination="None")
    assert heygen.requests == []


def test_save_of_a_failed_or_unfinished_overdub(heygen, tmp_path):
    heygen.behaviour.job_seconds = 60
    with HeyGenHook() as hook:
        overdub_id = hook.create_overdub(MEDIA)
    arguments = {"overdub_id": overdub_id, "destination": str(tmp_path / "v.mp4")}
    with pytest.raises(HeyGenError, match="Wait for it first") as caught:
        run(HeyGenOverdubToObjectStorageOperator, **arguments)
    assert not isinstance(caught.value, AirflowFailException)  # a retry may find it completed
    heygen.force(overdub_id, "failed", "no face")
    with fails_for_good(HeyGenOverdubFailedError, match="no face"):
        run(HeyGenOverdubToObjectStorageOperator, **arguments)
    assert list(tmp_path.iterdir()) == []


# --- Airflow's habits ---------------------------------------------------------------------------------


def test_deferrable_comes_from_the_config():
    source = (
        "import os; os.environ['AIRFLOW__OPERATORS__DEFAULT_DEFERRABLE'] = 'True';"
        "from airflow_provider_heygen.operators.overdub import HeyGenCreateOverdubOperator as Create;"
        "from airflow_provider_heygen.sensors.overdub import HeyGenOverdubSensor as Sensor;"
        "assert Create(task_id='c', video='v', audio='a').deferrable;"
        "assert Sensor(task_id='s', overdub_id='o').deferrable"
    )
    subprocess.run([sys.executable, "-c", source], check=True)
    assert not HeyGenCreateOverdubOperator(task_id="c", **MEDIA).deferrable


def test_constructors_only_assign():
    """Each argument may be a template, and is validated when the task runs."""
    odd = SimpleNamespace()
    operator = HeyGenCreateOverdubOperator(task_id="c", video=odd, audio=odd, mode=odd, timeout=odd)
    assert (operator.video, operator.mode, operator.timeout) == (odd, odd, odd)


def test_what_airflow_stores_during_a_deferral_keeps_its_names():
    """Frozen: a task that was deferred by an older release is resumed by this one."""
    methods = {
        HeyGenCreateOverdubOperator.execute_complete: ["event", "since", "deadline"],
        HeyGenCreateOverdubOperator.execute_again: ["event", "since", "until", "kept"],
        HeyGenOverdubSensor.execute_complete: ["event", "since", "deadline"],
    }
    for method, names in methods.items():
        assert list(signature(method).parameters) == ["self", "context", *names]
    shared = {"heygen_conn_id": "c", "deadline": None}
    triggers = [
        HeyGenOverdubTrigger(
            **shared, overdub_id="od", poke_interval=1.0, not_found_until=0.0, resource=None
        ),
        HeyGenSlotTrigger(**shared, since=1.0, not_before=2.0, resumed=True),
    ]
    assert [trigger.serialize()[0].rpartition(".")[2] for trigger in triggers] == [
        "HeyGenOverdubTrigger",
        "HeyGenSlotTrigger",
    ]
