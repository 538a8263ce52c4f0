"""What operators report to OpenLineage's provider. Events on the wire are in `stack/test_failures.py`."""

from __future__ import annotations

import asyncio
import json
import os

import pytest
from airflow.providers.common.compat.sdk import TaskDeferred
from airflow.providers.openlineage.extractors import manager
from airflow.providers.openlineage.utils.utils import translate_airflow_asset
from airflow.sdk import Asset, ObjectStoragePath
from airflow.utils.state import TaskInstanceState
from airflow_task import StateStore, Task

from airflow_provider_heygen import lineage
from airflow_provider_heygen.emulator.media import make_audio, make_video
from airflow_provider_heygen.exceptions import HeyGenError
from airflow_provider_heygen.hooks import heygen as module
from airflow_provider_heygen.hooks.heygen import HeyGenHook
from airflow_provider_heygen.media import plain_uri, storage_path
from airflow_provider_heygen.operators.asset import HeyGenUploadAssetOperator
from airflow_provider_heygen.operators.overdub import HeyGenCreateOverdubOperator
from airflow_provider_heygen.transfers.heygen_to_object_storage import HeyGenOverdubToObjectStorageOperator

NAMES = {
    "https://example.com/a/talk.mp4": ("https://example.com", "/a/talk.mp4"),
    "https://example.com:8443": ("https://example.com:8443", "/"),
    "HTTPS://user:SECRET@example.com/talk.mp4?X-Amz-Signature=SECRET#SECRET": (
        "https://example.com",
        "/talk.mp4",
    ),
    "s3://media/a/talk.mp4": ("s3://media", "a/talk.mp4"),
    "s3://conn@media/talk.mp4": ("s3://media", "talk.mp4"),
    "S3A://media/talk.mp4": ("s3://media", "talk.mp4"),
    "s3://key:SECRET@media/talk.mp4?X-Amz-Signature=SECRET": ("s3://media", "talk.mp4?***"),
    "gs://media/talk.mp4": ("gs://media", "talk.mp4"),
    "gcs://media/talk.mp4": ("gs://media", "talk.mp4"),
    "abfs://conn@container/talk.mp4": ("abfs://container", "talk.mp4"),
    "file:///data/talk.mp4": ("file", "/data/talk.mp4"),
    "/data/../data/talk.mp4": ("file", "/data/talk.mp4"),
    "file:/data/talk.mp4": ("file", "/data/talk.mp4"),
    "FILE://localhost/data/talk.mp4": ("file", "/data/talk.mp4"),
    "local:///data/talk.mp4": ("file", "/data/talk.mp4"),
    "~/talk.mp4": ("file", os.path.expanduser("~/talk.mp4")),
    "s3://media/talk.mp4?versionId=3": ("s3://media", "talk.mp4"),
    "heygen://overdubs/od_1": ("heygen", "overdubs/od_1"),
    "heygen://assets/asset_1": ("heygen", "assets/asset_1"),
}


def named(datasets):
    return [(found.namespace, found.name) for found in datasets]


def test_names():
    assert {uri: named([lineage.dataset(uri)])[0] for uri in NAMES} == NAMES
    assert "SECRET" not in str(NAMES.values())


@pytest.mark.parametrize(
    "uri", [uri for uri in NAMES if uri.startswith(("s3://media/a", "file:///", "heygen:"))]
)
def test_names_are_those_of_airflows_converters(uri):
    assert named([translate_airflow_asset(Asset(uri=uri), None)]) == named([lineage.dataset(uri)])


@pytest.mark.parametrize("uri", ["heygen://overdubs", "heygen://overdubs/", "heygen:///od_1"])
def test_an_asset_without_an_id_is_rejected(uri):
    with pytest.raises(ValueError, match="heygen://overdubs/<id>"):
        Asset(uri=uri)


@pytest.mark.parametrize(
    ("value", "uri"),
    [
        ("https://x.y/v.mp4", "https://x.y/v.mp4"),
        ({"type": "url", "url": "https://x.y/v.mp4"}, "https://x.y/v.mp4"),
        ({"type": "asset_id", "asset_id": "asset_1"}, "heygen://assets/asset_1"),
        (ObjectStoragePath("file:///data/v.mp4"), "file:///data/v.mp4"),
        ({}, None),
        (None, None),
    ],
    ids=str,
)
def test_what_an_input_names(value, uri):
    assert lineage.media_uri(value) == uri


class Traced:
    """A task whose operators are seen by OpenLineage's extractors, as at the end of a worker's process."""

    def __init__(self, make, **kwargs):
        self.make, self.made = make, []
        self.task = Task(self._make, **kwargs)

    def _make(self):
        self.made.append(self.make())
        return self.made[-1]

    def told(self, state=TaskInstanceState.SUCCESS):
        extractor = manager.DefaultExtractor(self.made[-1])
        failed = state == TaskInstanceState.FAILED
        return (extractor.extract_on_failure if failed else extractor.extract_on_complete)(self.task.ti)


def dub(**changes):
    arguments = {
        "video": "https://user:SECRET@x.y/v.mp4?sig=SECRET",
        "audio": "https://x.y/a.mp3",
        "poke_interval": 0.02,
    }
    return lambda: HeyGenCreateOverdubOperator(task_id="dub", **arguments | changes)


SOURCES = [("https://x.y", "/v.mp4"), ("https://x.y", "/a.mp3")]


@pytest.mark.parametrize(
    ("deferrable", "wait_for_completion", "resource"),
    [
        (True, True, "overdubs"),
        (True, False, "lipsyncs"),
        (False, True, "lipsyncs"),
        (False, False, "overdubs"),
    ],
)
def test_create(heygen, deferrable, wait_for_completion):
    traced = Traced(dub(deferrable=deferrable, wait_for_completion=wait_for_completion), store=StateStore())
    heygen.behaviour.job_seconds = 0.3
    outcome = traced.task.start()
    if isinstance(outcome, TaskDeferred):
        event = asyncio.run(anext(outcome.trigger.run()))
        traced.task.resume(outcome, event.payload)
        assert len(traced.made) == 2  # the second knows nothing of the first
    told = traced.told()
    assert named(told.inputs) == SOURCES
    assert named(told.outputs) == [("heygen", f"overdubs/{heygen.jobs[0].id}")]
    assert "SECRET" not in str(told)


def test_a_retry_that_reattaches_reports_the_same_overdub(heygen):
    traced = Traced(dub(timeout=0.01), store=StateStore())
    heygen.behaviour.job_seconds = 0.3
    with pytest.raises(HeyGenError, match="Timed out waiting"):
        traced.task.start()
    told = traced.told(TaskInstanceState.FAILED)
    assert (named(told.inputs), told.outputs) == (SOURCES, [])
    traced.make = dub()
    traced.task.start()
    assert named(traced.told().outputs) == [("heygen", f"overdubs/{heygen.jobs[0].id}")]
    assert len(heygen.jobs) == 1


@pytest.fixture
def files(tmp_path):
    make_video(tmp_path / "v.mp4", 1)
    make_audio(tmp_path / "a.mp3", 1)
    return {"video": f"file://{tmp_path}/v.mp4", "audio": ObjectStoragePath(f"file://{tmp_path}/a.mp3")}


def test_a_file_that_is_uploaded_on_the_way_is_the_input(heygen, files, tmp_path):
    traced = Traced(dub(**files), store=StateStore())
    traced.task.start()
    assert named(traced.told().inputs) == [("file", f"{tmp_path}/v.mp4"), ("file", f"{tmp_path}/a.mp3")]


def test_upload_and_create_are_joined_by_the_asset(heygen, files, tmp_path):
    traced = Traced(lambda: HeyGenUploadAssetOperator(task_id="up", source=f"{tmp_path}/v.mp4"))
    asset = traced.task.start()
    told = traced.told()
    assert named(told.inputs) == [("file", f"{tmp_path}/v.mp4")]
    create = Traced(dub(video=asset), store=StateStore())
    create.task.start()
    name = ("heygen", f"assets/{asset['asset_id']}")
    assert named(told.outputs) == named(create.told().inputs)[:1] == [name]


def test_an_upload_that_failed_has_no_asset(heygen, tmp_path):
    traced = Traced(lambda: HeyGenUploadAssetOperator(task_id="up", source=f"{tmp_path}/none.mp4"))
    with pytest.raises(HeyGenError):
        traced.task.start()
    told = traced.told(TaskInstanceState.FAILED)
    assert (named(told.inputs), told.outputs) == ([("file", f"{tmp_path}/none.mp4")], [])


def keep(overdub_id, destination, **changes):
    return lambda: HeyGenOverdubToObjectStorageOperator(
        task_id="keep", overdub_id=overdub_id, destination=destination, **changes
    )


@pytest.fixture
def overdub_id(heygen):
    overdub_id = HeyGenHook().create_overdub({"video": "https://x.y/v.mp4", "audio": "https://x.y/a.mp3"})
    heygen.force(overdub_id, "completed")
    return overdub_id


@pytest.mark.parametrize("resource", ["lipsyncs"])
def test_transfer(heygen, overdub_id, storage):
    traced = Traced(keep(overdub_id, storage.uri(""), captions=True))
    traced.task.start()
    told = traced.told()
    assert named(told.inputs) == [("heygen", f"overdubs/{overdub_id}")]
    names = [f"{overdub_id}.mp4", f"{overdub_id}.srt"]
    plain = [plain_uri(storage_path(storage.uri(name), "it")) for name in names]
    assert named(told.outputs) == named(map(lineage.dataset, plain))
    sizes = [len(storage.read(name)) for name in names]
    assert [found.outputFacets["outputStatistics"].size for found in told.outputs] == sizes


def test_a_failed_transfer_reports_what_exists(heygen, overdub_id, tmp_path, pauses):
    traced = Traced(keep(overdub_id, str(tmp_path / "v.mp4"), captions=True))  # 'overdubs' has no captions
    with pytest.raises(HeyGenError):
        traced.task.start()
    told = traced.told(TaskInstanceState.FAILED)
    assert named(told.outputs) == [("file", f"{tmp_path}/v.mp4")]
    again = Traced(keep("od_none", str(tmp_path / "w.mp4")))
    with pytest.raises(HeyGenError):
        again.task.start()
    assert again.told(TaskInstanceState.FAILED).outputs == []


@pytest.fixture
def collector(monkeypatch):
    """Airflow's collector; without a plugin that reads it, there is one that collects nothing."""
    collector = type(module.get_hook_lineage_collector()).__mro__[1]()
    monkeypatch.setattr(module, "get_hook_lineage_collector", lambda: collector)
    return collector


def test_hook_lineage_has_the_same_names(heygen, overdub_id, s3, tmp_path, collector):
    for destination in (s3.uri("v.mp4"), str(tmp_path / "v.mp4")):
        collector.__init__()
        traced = Traced(keep(overdub_id, destination))
        traced.task.start()
        told, collected = traced.told(), collector.collected_assets
        for ours, theirs in ((told.inputs, collected.inputs), (told.outputs, collected.outputs)):
            translated = [translate_airflow_asset(found.asset, found.context) for found in theirs]
            assert named(translated) == named(ours)


def test_no_download_fails_of_lineage(heygen, overdub_id, tmp_path, collector, monkeypatch, capsys):
    def refuse(**_):
        raise ValueError("Asset name cannot exceed 1500 characters")

    monkeypatch.setattr(collector, "add_output_asset", refuse)
    size = HeyGenHook().download_overdub(overdub_id, tmp_path / "v.mp4")
    assert size == (tmp_path / "v.mp4").stat().st_size
    assert "cannot exceed 1500 characters" in capsys.readouterr().out


def test_it_can_be_serialized(heygen):
    from openlineage.client.serde import Serde

    traced = Traced(dub(), store=StateStore())
    traced.task.start()
    told = traced.told()
    assert json.loads(Serde.to_json(told.outputs[0]))["namespace"] == "heygen"
