"""A task's log for its readers: one line for each event, and a summary at the end."""

from __future__ import annotations

import asyncio
import re
from datetime import UTC, datetime
from itertools import groupby
from types import SimpleNamespace

import pytest
from airflow.exceptions import AirflowRescheduleException
from airflow.providers.common.compat.sdk import TaskDeferred
from airflow_task import StateStore, Task

from airflow_provider_heygen import waiting
from airflow_provider_heygen.api import Overdub
from airflow_provider_heygen.emulator.media import make_audio, make_video
from airflow_provider_heygen.hooks.heygen import HeyGenHook
from airflow_provider_heygen.media import size_text
from airflow_provider_heygen.operators.overdub import HeyGenCreateOverdubOperator
from airflow_provider_heygen.sensors.overdub import HeyGenOverdubSensor

REQUEST = {"video": "https://x.y/v.mp4", "audio": "https://x.y/a.mp3", "title": "Talk, German"}
LINE = re.compile(
    r"((?:Started overdub|Waiting|Overdub od_|Dubbed|Uploaded|Reattached|Saved|Kept|file:\S+ exists) ?.*?)"
    r"(?= *\[airflow|$)",
    re.MULTILINE,
)
MEASURES = {
    r"od_\w+": "ID",
    r"asset_\w+": "ASSET",
    r"\d+ s, mode": "N s, mode",
    r"\d+ s: overdub": "N s: overdub",
    r"\d+ s ago": "N s ago",
    r"in \d\.\d s": "in N s",
    r"[\d.]+ (kB|MB|bytes)/s": "SPEED",
    r"\d+\.\d [kM]B": "SIZE",
    r"\d\d:\d\d UTC": "TIME",
    r"file:\S+/": "file:///",
}


@pytest.fixture
def said(heygen, caplog, capsys):
    """Return the lines about overdubs and files since the last call, sorted, and without ids and measures."""
    caplog.set_level("INFO")
    heygen.behaviour.job_seconds = None
    heygen.behaviour.pending_seconds = heygen.behaviour.running_seconds = 1.0

    def lines():
        texts = [re.sub(r"\x1b\[\d*m", "", text) for text in (caplog.text, capsys.readouterr().out)]
        caplog.clear()
        found = [line for text in texts for line in LINE.findall(text)]
        for measure, name in MEASURES.items():
            found = [re.sub(measure, name, line) for line in found]
        return sorted(found)

    return lines


def to_the_end(make, task=None):
    task = task or Task(make, store=StateStore())
    began = datetime.now(UTC)
    task.ti.get_first_reschedule_date = lambda _: began
    while True:
        try:
            outcome = task.start()
            while isinstance(outcome, TaskDeferred):
                outcome = task.resume(outcome, asyncio.run(anext(outcome.trigger.run())).payload)
        except AirflowRescheduleException:
            continue
        return task


def dub(**changes):
    return lambda: HeyGenCreateOverdubOperator(task_id="dub", poke_interval=0.05, **REQUEST | changes)


@pytest.mark.parametrize("deferrable", [True, False])
def test_create(said, deferrable):
    to_the_end(dub(deferrable=deferrable, mode="precision"))
    where = "in the triggerer" if deferrable else "on this worker"
    assert said() == [
        "Dubbed 2.5 s of video in N s, mode precision: overdub ID 'Talk, German'.",
        # In the triggerer, "pending" would say no more than "Started".
        *([] if deferrable else ["Overdub ID is pending."]),
        "Overdub ID is running.",
        "Started overdub ID 'Talk, German', mode precision.",
        f"Waiting {where}, checking every 0 s until TIME.",
    ]


@pytest.fixture
def files(tmp_path):
    make_video(tmp_path / "v.mp4", 1)
    make_audio(tmp_path / "a.mp3", 1)
    return {"video": f"file://{tmp_path}/v.mp4", "audio": f"file://{tmp_path}/a.mp3"}


@pytest.mark.parametrize("resource", ["lipsyncs"])
def test_dub_and_save(heygen, said, files, tmp_path, connect):
    connection = heygen.connection("lipsyncs")
    extra = connection["extra"] | {"price_per_second": {"speed": 0.05}}
    connect(heygen.url, connection["password"], **extra)
    heygen.behaviour.pending_seconds = heygen.behaviour.running_seconds = 0.0
    saved = {"destination": f"{tmp_path}/out/v.mp4", "captions": True, "overwrite": True, "title": None}
    task = to_the_end(dub(deferrable=True, **files, **saved))
    assert said() == [
        f"Dubbed 1.0 s of video in N s, mode speed, $0.05: overdub {heygen.jobs[0].id}.",
        "Saved 61 bytes of captions in N s, SPEED: file:///v.srt.",
        "Saved SIZE of video in N s, SPEED: file:///v.mp4.",
        f"Started overdub {heygen.jobs[0].id}, mode speed.",
        "Uploaded SIZE in N s: file:///a.mp3, audio/mpeg, as asset ASSET.",
        "Uploaded SIZE in N s: file:///v.mp4, video/mp4, as asset ASSET.",
        "Waiting in the triggerer, checking every 0 s until TIME.",
    ]
    # Nothing with the form of a key.
    assert task.store.get("heygen_overdub")["key"] not in str(said())
    to_the_end(dub(deferrable=True, skip_existing=True, **files, **saved))
    assert said() == ["file:///v.mp4 exists (SIZE) and is not older than its sources: nothing to do."]


def test_a_reused_overdub(said, heygen):
    heygen.behaviour.pending_seconds = heygen.behaviour.running_seconds = 0.0
    to_the_end(dub(title="other"))
    said()
    to_the_end(dub(reuse="content"))
    (line,) = [line for line in said() if line.startswith("Reattached")]
    assert line.startswith("Reattached to overdub ID 'other', mode speed, which a task or run")
    assert line.endswith("with the same request started N s ago.")


@pytest.mark.parametrize(
    "how", [{"deferrable": True}, {"deferrable": False}, {"mode": "reschedule"}], ids=str
)
def test_wait(said, how):
    with HeyGenHook() as hook:
        overdub_id = hook.create_overdub(REQUEST)
    to_the_end(
        lambda: HeyGenOverdubSensor(
            task_id="wait", overdub_id=overdub_id, poke_interval=0.05, timeout=20, **how
        )
    )
    lines = said()
    if "mode" in how:  # each poll is a process of its own, which knows nothing of the one before
        lines = [line for line, _ in groupby(lines)]
    assert lines == [
        "Dubbed 2.5 s of video in N s: overdub ID 'Talk, German'.",
        "Overdub ID is pending.",
        "Overdub ID is running.",
        *(["Waiting in the triggerer, checking every 0 s until TIME."] if how.get("deferrable") else []),
    ]


@pytest.mark.parametrize(
    ("members", "tells"),
    [
        ({}, "Dubbed a video: overdub od_1."),
        ({"title": "T", "duration": 42.5}, "Dubbed 42.5 s of video: overdub od_1 'T'."),
        ({"created_at": 1000}, "Dubbed a video in 61 s: overdub od_1."),
        ({"created_at": 2000}, "Dubbed a video in 0 s: overdub od_1."),  # HeyGen's clock is ahead
        ({"created_at": 1}, "Dubbed a video in 18 min: overdub od_1."),
        (
            {"title": "a\nb https://x.y/?Signature=s"},
            r"Dubbed a video: overdub od_1 'a\nb https://x.y/?***'.",
        ),
    ],
    ids=str,
)
def test_summary(monkeypatch, members, tells):
    monkeypatch.setattr(waiting, "time", SimpleNamespace(time=lambda: 1061.2))
    assert waiting.completion_summary(Overdub(id="od_1", status="completed", **members).details()) == tells


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (4_200_000, "4.2 MB"), (7e9, "7.0 GB")],
)
def test_sizes(size, text):
    assert size_text(size) == text
