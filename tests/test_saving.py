"""Dub and save in one task: `destination` of the create operator, and what it skips."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import pytest
from airflow.providers.common.compat.sdk import AirflowFailException, ObjectStoragePath, TaskDeferred
from airflow_task import StateStore, Task

from airflow_provider_heygen import lineage
from airflow_provider_heygen.emulator.media import make_audio, make_video
from airflow_provider_heygen.exceptions import HeyGenBadInputError, HeyGenError, HeyGenTaskFailedError
from airflow_provider_heygen.hooks.heygen import HeyGenHook
from airflow_provider_heygen.operators.overdub import HeyGenCreateOverdubOperator

MODES = pytest.mark.parametrize("deferrable", [True, False], ids=["deferrable", "sync"])
PAIRS = pytest.mark.parametrize(
    ("deferrable", "store", "storage"),
    # Each two of these in all combinations.
    [(True, True, "file"), (True, False, "s3"), (False, True, "s3"), (False, False, "file")],
    indirect=["storage"],
)
LIPSYNCS = pytest.mark.parametrize("resource", ["lipsyncs"])


def dubbing(destination, *, store=True, **changes):
    arguments = {"video": "https://x.y/v.mp4", "audio": "https://x.y/a.mp3", "poke_interval": 0.02}
    arguments |= {"destination": destination} | changes
    made = []

    def make():
        made.append(HeyGenCreateOverdubOperator(task_id="dub", **arguments))
        return made[-1]

    task = Task(make, store=StateStore() if store else None)
    task.made, task.arguments = made, arguments
    return task


def run(task):
    """Run a try to its end; return what the task returns."""
    outcome = task.start()
    while isinstance(outcome, TaskDeferred):
        outcome = task.resume(outcome, asyncio.run(anext(outcome.trigger.run())).payload)
    return outcome


@MODES
@LIPSYNCS
def test_dub_and_save(heygen, storage, deferrable):
    task = dubbing(storage.uri("v.mp4"), captions=True, deferrable=deferrable)
    uri = run(task)
    (job,) = heygen.jobs
    assert ObjectStoragePath(uri).read_bytes() == job.output.read_bytes()
    assert storage.names() == ["v.mp4", "v.srt"]
    found = task.xcoms["overdub"]
    assert (found["overdub_id"], found["status"], found["duration"]) == (job.id, "completed", job.duration)
    assert (found["uri"], found["size"]) == (uri, len(job.output.read_bytes()))
    assert task.xcoms["overdub_id"] == job.id
    assert task.xcoms["captions"] == uri.replace(".mp4", ".srt")


def test_in_a_folder_the_file_has_the_name_of_the_overdub(heygen, tmp_path):
    assert run(dubbing(f"{tmp_path}/new/")) == f"file://{tmp_path}/new/{heygen.jobs[0].id}.mp4"


@PAIRS
def test_a_retry_only_saves(heygen, pauses, storage, deferrable, store):
    task = dubbing(storage.uri("v.mp4"), deferrable=deferrable, store=store)
    heygen.fail_next(path="/files/", status=403, count=6)
    with pytest.raises(HeyGenError, match=r"was not saved: .* A retry saves it") as caught:
        run(task)
    assert not isinstance(caught.value, AirflowFailException)
    assert caught.value.overdub_id == heygen.jobs[0].id
    assert "overdub" not in task.xcoms
    assert run(task).endswith("v.mp4")
    assert len(heygen.jobs) == 1
    assert storage.read("v.mp4") == heygen.jobs[0].output.read_bytes()


def test_a_clear_only_saves_while_nothing_is_saved(heygen, pauses, tmp_path):
    task = dubbing(f"{tmp_path}/v.mp4")
    heygen.fail_next(path="/files/", status=403, count=6)
    with pytest.raises(HeyGenError, match="not saved"):
        run(task)
    task.clear()
    run(task)
    assert len(heygen.jobs) == 1
    task.clear()
    run(task)  # it was delivered: a clear wants another, which takes the place of what this task has saved
    assert len(heygen.jobs) == 2
    assert (tmp_path / "v.mp4").read_bytes() == heygen.jobs[1].output.read_bytes()


@pytest.mark.parametrize("refusal", [{"status": 401}, {"status": 404}], ids=str)
def test_a_rejected_poll_does_not_end_the_task_for_good(heygen, tmp_path, monkeypatch, refusal):
    """A permanent error would need a clear, which before Airflow 3.3 starts another overdub."""
    save = HeyGenHook.download_overdub

    def refused(hook, *args, **kwargs):
        heygen.fail_next(path="/v3/overdubs/", **refusal)
        return save(hook, *args, **kwargs)

    task = dubbing(f"{tmp_path}/v.mp4", store=False)
    monkeypatch.setattr(HeyGenHook, "download_overdub", refused)
    with pytest.raises(HeyGenError, match="not saved") as caught:
        run(task)
    assert not isinstance(caught.value, AirflowFailException)
    monkeypatch.setattr(HeyGenHook, "download_overdub", save)
    run(task)
    assert len(heygen.jobs) == 1


@pytest.mark.parametrize(("store", "storage"), [(True, "s3"), (False, "file")], indirect=["storage"])
def test_what_is_in_the_way_is_found_before_anything_is_sent(heygen, storage, store):
    storage.write("v.mp4", b"mine")
    task = dubbing(storage.uri("v.mp4"), store=store)
    with pytest.raises(HeyGenTaskFailedError, match=r"v\.mp4 exists already; no overdub was started"):
        run(task)
    assert (heygen.requests, storage.read("v.mp4")) == ([], b"mine")
    task.arguments["overwrite"] = True
    run(task)
    assert storage.read("v.mp4") == heygen.jobs[0].output.read_bytes()


@LIPSYNCS
def test_captions_in_the_way_are_found_too(heygen, tmp_path):
    (tmp_path / "v.srt").write_text("mine")
    with pytest.raises(HeyGenTaskFailedError, match=r"v\.srt exists already"):
        run(dubbing(f"{tmp_path}/v.mp4", captions=True))
    assert heygen.requests == []


@pytest.mark.parametrize("resource", ["overdubs", None])
def test_captions_that_heygen_does_not_make_cost_nothing(heygen, tmp_path, resource):
    with pytest.raises(HeyGenTaskFailedError, match="captions under resource 'lipsyncs' only; no overdub"):
        run(dubbing(f"{tmp_path}/v.mp4", captions=True))
    assert [request.path for request in heygen.requests] == ["/v3/overdubs"] * (resource is None)
    assert heygen.jobs == []


def test_a_retry_finds_its_own_file_and_starts_nothing(heygen, tmp_path):
    """The worker died after the video was saved, and before Airflow knew."""
    task = dubbing(f"{tmp_path}/v.mp4")
    run(task)
    record = task.store.get("heygen_overdub")
    task.store.set("heygen_overdub", record | {"delivered": False})
    run(task)
    assert len(heygen.jobs) == 1


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"destination": ""}, "destination is empty"),
        ({"destination": "None"}, "the text 'None'"),
        ({"destination": "v.mp4"}, "neither absolute"),
        ({"destination": "nowhere://b/v.mp4"}, "provider of that storage is installed"),
        ({"destination": "/tmp/v.srt", "captions": True}, r"ends in '\.srt'"),
        ({"destination": "/tmp"}, "is a directory"),
        ({"wait_for_completion": False}, "destination needs wait_for_completion=True"),
        ({"destination": None, "captions": True}, "captions and skip_existing need a destination"),
        ({"destination": None, "skip_existing": True}, "captions and skip_existing need a destination"),
        ({"destination": "/tmp/", "skip_existing": True}, "skip_existing needs a destination that names a"),
    ],
    ids=str,
)
def test_a_bad_destination_sends_nothing(heygen, tmp_path, changes, error):
    with pytest.raises(HeyGenTaskFailedError, match=error) as caught:
        run(dubbing(**{"destination": f"{tmp_path}/v.mp4"} | changes))
    assert isinstance(caught.value.__cause__, HeyGenBadInputError)
    assert heygen.requests == []


def test_the_destination_is_a_template_and_its_password_is_masked():
    assert "destination" in HeyGenCreateOverdubOperator.template_fields
    assert "destination" in HeyGenCreateOverdubOperator.url_fields


def named(datasets):
    return [(found.namespace, found.name) for found in datasets]


@LIPSYNCS
@MODES
def test_lineage_has_the_overdub_and_the_files(heygen, tmp_path, deferrable):
    task = dubbing(f"{tmp_path}/v.mp4", captions=True, deferrable=deferrable)
    run(task)
    told = task.made[-1].get_openlineage_facets_on_complete(task.ti)
    assert named(told.inputs) == [("https://x.y", "/v.mp4"), ("https://x.y", "/a.mp3")]
    overdub = lineage.dataset(lineage.overdub_uri(heygen.jobs[0].id))
    files = [("file", f"{tmp_path}/v.mp4"), ("file", f"{tmp_path}/v.srt")]
    assert named(told.outputs) == [*named([overdub]), *files]
    assert told.outputs[1].outputFacets["outputStatistics"].size == (tmp_path / "v.mp4").stat().st_size


@LIPSYNCS
def test_a_failed_task_reports_what_it_has_saved(heygen, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise HeyGenError("It broke.")

    monkeypatch.setattr(HeyGenHook, "download_captions", broken)
    task = dubbing(f"{tmp_path}/v.mp4", captions=True)
    with pytest.raises(HeyGenError, match="It broke"):
        run(task)
    told = task.made[-1].get_openlineage_facets_on_failure(task.ti)
    assert named(told.outputs) == [("file", f"{tmp_path}/v.mp4")]


# --- What is there is not made again ------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    """Sources that are an hour old."""
    folder = tmp_path / "in"
    folder.mkdir()
    make_video(folder / "v.mp4", 1)
    make_audio(folder / "a.mp3", 1)
    for path in folder.iterdir():
        os.utime(path, (time.time() - 3600,) * 2)
    return {"video": f"file://{folder}/v.mp4", "audio": f"file://{folder}/a.mp3"}


def another_run(task):
    """The same task in another run, which knows nothing of the first."""
    task.store = task.store and StateStore()
    task.ti.run_id += "+"
    task.ti.try_number = 0


@PAIRS
def test_what_is_up_to_date_is_not_made_again(heygen, storage, files, deferrable, store):
    task = dubbing(storage.uri("v.mp4"), skip_existing=True, deferrable=deferrable, store=store, **files)
    uri = run(task)
    requests = len(heygen.requests)
    before = storage.read("v.mp4")
    for again in (lambda: another_run(task), task.clear):
        again()
        assert task.start() == uri
        assert task.xcoms == {"overdub": {"uri": uri, "size": len(before)}, "asset_ids": []}
    assert len(heygen.requests) == requests
    told = task.made[-1].get_openlineage_facets_on_complete(task.ti)
    assert told.outputs == []


@pytest.mark.parametrize(("store", "storage"), [(True, "file"), (False, "s3")], indirect=["storage"])
def test_what_is_older_than_a_source_is_replaced(heygen, storage, files, store):
    task = dubbing(storage.uri("v.mp4"), skip_existing=True, store=store, **files)
    run(task)
    audio = files["audio"].removeprefix("file://")
    make_audio(audio, 2)
    os.utime(audio, (time.time() + 60,) * 2)
    another_run(task)
    run(task)
    assert [job.request.audio.asset_id for job in heygen.jobs] == [
        heygen.assets[1].id,
        heygen.assets[3].id,
    ]
    assert storage.read("v.mp4") == heygen.jobs[1].output.read_bytes()


def test_where_a_time_is_not_known_what_is_there_counts(heygen, tmp_path):
    task = dubbing(f"{tmp_path}/v.mp4", skip_existing=True)  # two URLs, which HeyGen fetches
    run(task)
    another_run(task)
    run(task)
    assert len(heygen.jobs) == 1


@pytest.mark.parametrize("expired", ["video", "audio"])
def test_an_expired_url_does_not_matter_where_the_result_is_current(heygen, tmp_path, files, expired):
    (tmp_path / "v.mp4").write_bytes(b"a video")
    files[expired] = f"{heygen.url}/files/gone?Signature=expired"
    run(dubbing(f"{tmp_path}/v.mp4", skip_existing=True, upload_links=True, **files))
    assert heygen.requests == []


@LIPSYNCS
def test_a_missing_part_is_made_again(heygen, tmp_path):
    task = dubbing(f"{tmp_path}/v.mp4", skip_existing=True)
    run(task)
    task.arguments["captions"] = True
    another_run(task)
    run(task)
    assert len(heygen.jobs) == 2
    assert (tmp_path / "v.srt").exists()


def test_an_empty_file_is_no_video(heygen, tmp_path):
    (tmp_path / "v.mp4").touch()
    run(dubbing(f"{tmp_path}/v.mp4", skip_existing=True))
    assert (tmp_path / "v.mp4").read_bytes() == heygen.jobs[0].output.read_bytes()


@pytest.mark.parametrize(
    ("how", "storage"), [("overwrite", "s3"), ("skip_existing", "file")], indirect=["storage"]
)
def test_the_destination_is_not_a_source(heygen, storage, files, how):
    """A retry would dub what the first try has saved."""
    with open(files["video"].removeprefix("file://"), "rb") as file:
        storage.write("v.mp4", file.read())
    uri = storage.uri("v.mp4")
    with pytest.raises(HeyGenTaskFailedError, match="destination is the file in video or audio"):
        run(dubbing(uri, **{how: True, "video": ObjectStoragePath(uri), "audio": files["audio"]}))
    assert heygen.requests == []


@pytest.mark.parametrize("how", ["overwrite", "skip_existing"])
@pytest.mark.parametrize("alias", ["link/v.mp4", "other.mp4", "local", "s3a", "a version"])
def test_the_destination_is_not_a_source_by_another_name(heygen, tmp_path, s3, files, alias, how):
    source = Path(files["video"].removeprefix("file://"))
    (tmp_path / "link").symlink_to(source.parent)
    (tmp_path / "other.mp4").symlink_to(source)
    destination = {"local": f"local://{source}"}.get(alias, f"file://{tmp_path}/{alias}")
    if alias in ("s3a", "a version"):
        s3.write("v.mp4", source.read_bytes())
        source = ObjectStoragePath(s3.uri("v.mp4"))
        destination = str(source).replace("s3://", "s3a://")
        source = source if alias == "s3a" else ObjectStoragePath(f"{source}?versionId=null")
    before = source.read_bytes() if alias != "a version" else b""
    video = source if alias in ("s3a", "a version") else files["video"]
    with pytest.raises(HeyGenTaskFailedError, match="destination is the file in video or audio"):
        run(dubbing(destination, **{how: True, "video": video, "audio": files["audio"]}))
    assert heygen.requests == []
    assert alias == "a version" or source.read_bytes() == before


def test_a_version_cannot_be_written(heygen, s3):
    with pytest.raises(HeyGenTaskFailedError, match="names a version, which cannot be written"):
        run(dubbing(f"{s3.uri('v.mp4')}?versionId=1"))
    assert heygen.requests == []


def test_a_destination_that_is_lost_while_the_task_waits_is_not_final(heygen, tmp_path):
    """Its template may read what a cleared task has returned."""
    task = dubbing(f"{tmp_path}/v.mp4", deferrable=True)
    deferred = task.start()
    event = asyncio.run(anext(deferred.trigger.run())).payload
    task.arguments["destination"] = "None"
    with pytest.raises(HeyGenError, match=r"not saved: The path of the destination .* 'None'") as caught:
        task.resume(deferred, event)
    assert not isinstance(caught.value, AirflowFailException)
    task.arguments["destination"] = f"{tmp_path}/v.mp4"
    run(task)
    assert len(heygen.jobs) == 1


@pytest.mark.parametrize("saves", [True, False])
def test_a_connection_that_breaks_while_the_task_waits_is_not_final(heygen, connect, tmp_path, saves):
    task = dubbing(f"{tmp_path}/v.mp4" if saves else None, deferrable=True)
    deferred = task.start()
    event = asyncio.run(anext(deferred.trigger.run())).payload
    connect(heygen.url, "")
    if saves:
        with pytest.raises(HeyGenError, match=r"not saved: .* password is empty") as caught:
            task.resume(deferred, event)
        assert not isinstance(caught.value, AirflowFailException)
    else:
        assert task.resume(deferred, event) == heygen.jobs[0].id
