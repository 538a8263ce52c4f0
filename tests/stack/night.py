"""
A night of dubs on a real Airflow, in a bucket: 3 videos in 4 languages, over several nights.

The DAG is `example_heygen_localisation`, as it is. What is billed is what the emulator has created.
"""

from __future__ import annotations

import json
import shutil
import time
from typing import TYPE_CHECKING, Any

import pytest

from airflow_provider_heygen.emulator.media import make_audio, make_video
from stack.airflow import HERE, Stack, why_no_postgres
from stack.rest import Run, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from stack.heygen import HeyGen

DAG_ID = "example_heygen_localisation"
NAMES = [f"talk{video}.{language}" for video in range(3) for language in ("de", "es", "fr", "it")]
PATIENCE = 600


class Bucket:
    """An S3 on loopback, and the media in it."""

    def __init__(self, folder: Path) -> None:
        import boto3
        from moto.server import ThreadedMotoServer

        self._server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        self._server.start()
        self.url = "http://{}:{}".format(*self._server.get_host_and_port())
        secrets = {"aws_access_key_id": "key", "aws_secret_access_key": "secret"}
        self._s3 = boto3.client("s3", "us-east-1", endpoint_url=self.url, **secrets)
        self._s3.create_bucket(Bucket="media")
        self._folder = folder
        self._hz = 200
        make_video(folder / "talk.mp4", 2)
        for video in range(3):
            # Each is another video, or its overdubs would be those of the first.
            make_video(folder / "talk.mp4", 2, hz=300 + 50 * video)
            self.write(f"talk{video}.mp4", (folder / "talk.mp4").read_bytes())
        for name in NAMES:
            self.new_audio(name)

    def new_audio(self, name: str) -> None:
        self._hz += 20
        make_audio(self._folder / "new.mp3", 2, hz=self._hz)
        self.write(f"{name}.mp3", (self._folder / "new.mp3").read_bytes())

    def write(self, name: str, content: bytes) -> None:
        self._s3.put_object(Bucket="media", Key=f"talks/{name}", Body=content)

    def read(self, name: str) -> bytes:
        content: bytes = self._s3.get_object(Bucket="media", Key=f"talks/{name}")["Body"].read()
        return content

    def saved(self) -> dict[str, Any]:
        """ETags of the dubbed videos."""
        found = self._s3.list_objects_v2(Bucket="media", Prefix="talks/dubbed/").get("Contents", [])
        return {row["Key"].removeprefix("talks/dubbed/").removesuffix(".mp4"): row["ETag"] for row in found}

    def connection(self) -> str:
        extra = {"endpoint_url": self.url, "region_name": "us-east-1"}
        return json.dumps({"conn_type": "aws", "login": "key", "password": "secret", "extra": extra})

    def stop(self) -> None:
        self._server.stop()


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    bucket = Bucket(tmp_path_factory.mktemp("media"))
    yield bucket
    bucket.stop()


@pytest.fixture(scope="module")
def stack(bucket: Bucket, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    dags = tmp_path_factory.mktemp("dags")
    shutil.copy(HERE.parents[1] / "example_dags" / f"{DAG_ID}.py", dags)
    settings = {"AIRFLOW__CORE__DAGS_FOLDER": str(dags)}
    with Stack(postgres=not why_no_postgres(), settings=settings) as stack:
        stack.connect("s3", bucket.connection())
        yield stack


@pytest.fixture(scope="module")
def heygen(stack: Stack) -> HeyGen:
    heygen = stack.heygen(job_seconds=3)
    stack.connect("heygen_default", heygen.connection(price_per_second={"speed": 0.05}))
    stack.start(DAG_ID)
    return heygen


def night(stack: Stack) -> Run:
    return Run(stack.rest, DAG_ID, media="s3://s3@media/talks")


def dubs(run: Run) -> dict[str, str | None]:
    """The states of the mapped task instances, in the order of the names."""
    return {name: state for name, state in run.states().items() if name.startswith("dub")}


def test_nights(stack: Stack, heygen: HeyGen, bucket: Bucket) -> None:
    # One language fails; the others are saved.
    heygen.behave(fail_jobs=1)
    run = night(stack)
    tasks = run.wait(PATIENCE)
    assert run.state == "failed"
    (failed,) = [name for name, state in dubs(run).items() if state == "failed"]
    assert list(dubs(run).values()).count("success") == 11
    (bad,) = [job["title"] for job in heygen.jobs() if job["status"] == "failed"]
    assert tasks[failed]["rendered_map_index"] == bad
    done = sorted(set(NAMES) - {bad})
    manifest = json.loads(bucket.read("dubbed.json"))
    assert sorted(bucket.saved()) == sorted(manifest) == done
    for name, row in manifest.items():
        assert row["uri"] == f"s3://s3@media/talks/dubbed/{name}.mp4"
        assert row["size"] == len(bucket.read(f"dubbed/{name}.mp4"))
        assert row["cost"] == pytest.approx(row["duration"] * 0.05)
    assert f"ALERT: {bad} is not dubbed: Overdub" in run.log(failed)
    assert f"1 of 12 are missing: {bad}" in run.log("manifest")
    assert len(heygen.jobs()) == 12

    # Cleared: one overdub more.
    run.clear(failed, "manifest")
    wait_for("the cleared tasks", lambda: run.state == "success", PATIENCE)
    assert len(heygen.jobs()) == 13
    assert sorted(json.loads(bucket.read("dubbed.json"))) == sorted(bucket.saved()) == NAMES

    # The next night there is nothing to do.
    before, saved = len(heygen.requests()), bucket.saved()
    run = night(stack)
    assert {task["state"] for task in run.wait(PATIENCE).values()} == {"success"}
    assert (len(heygen.requests()), bucket.saved()) == (before, saved)
    assert {name: set(row) for name, row in json.loads(bucket.read("dubbed.json")).items()} == {
        name: {"uri", "size"} for name in NAMES
    }

    # One audio is replaced: one overdub more.
    time.sleep(1.1)  # S3 counts in seconds
    bucket.new_audio(NAMES[5])
    run = night(stack)
    assert {task["state"] for task in run.wait(PATIENCE).values()} == {"success"}
    assert [job["title"] for job in heygen.jobs()[13:]] == [NAMES[5]]
    assert {name for name, etag in bucket.saved().items() if saved[name] != etag} == {NAMES[5]}

    # All are replaced, and the run is marked failed while it waits. The next one takes over.
    heygen.behave(job_seconds=100_000)
    time.sleep(1.1)
    for name in NAMES:
        bucket.new_audio(name)
    run = night(stack)
    wait_for("all to wait", lambda: list(dubs(run).values()) == ["deferred"] * 12, PATIENCE)
    stack.rest.call("PATCH", run.path, {"state": "failed"})
    wait_for("the run to be over", lambda: "deferred" not in dubs(run).values())
    run = night(stack)
    wait_for("all to wait again", lambda: list(dubs(run).values()) == ["deferred"] * 12, PATIENCE)
    jobs = heygen.jobs()[14:]
    assert sorted(job["title"] for job in jobs) == NAMES, "nothing is paid twice"
    for job in jobs:
        heygen.force(job["id"], "completed")
    assert {task["state"] for task in run.wait(PATIENCE).values()} == {"success"}
    assert len(heygen.jobs()) == 14 + 12
    manifest = json.loads(bucket.read("dubbed.json"))
    assert {row["overdub_id"] for row in manifest.values()} == {job["id"] for job in jobs}
    sizes = {name: len(bucket.read(f"dubbed/{name}.mp4")) for name in NAMES}
    assert {name: row["size"] for name, row in manifest.items()} == sizes
