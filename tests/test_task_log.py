"""What a task's log tells people: one line for each thing that happens, and a summary at the end."""

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
from airflow_provider_heygen.hooks.heygen import HeyGenHook
from airflow_provider_heygen.operators.overdub import HeyGenCreateOverdubOperator
from airflow_provider_heygen.sensors.overdub import HeyGenOverdubSensor

REQUEST = {"video": "https://x.y/v.mp4", "audio": "https://x.y/a.mp3", "title": "Talk, German"}
COURSE = [
    "Overdub ID is pending.",
    "Overdub ID is running.",
    "Overdub ID is completed.",
    "Overdub ID ('Talk, German') is done, 2.5 s of video, N s after it was created.",
]


@pytest.fixture
def said(heygen, caplog, capsys):
    """Give the lines about overdubs since the task began, whichever way they were logged."""
    caplog.set_level("INFO")
    heygen.behaviour.job_seconds = None
    heygen.behaviour.pending_seconds = heygen.behaviour.running_seconds = 1.0

    def lines():
        pattern = re.compile(r"(?:Started overdub|Overdub) od_.*?(?= *\[airflow|$)", re.MULTILINE)
        texts = [re.sub(r"\x1b\[\d*m", "", text) for text in (caplog.text, capsys.readouterr().out)]
        found = [line for text in texts for line in pattern.findall(text)]
        return [re.sub(r"\d+ s after", "N s after", re.sub(r"od_\w+", "ID", line)) for line in found]

    return lines


def to_the_end(make):
    task = Task(make, store=StateStore())
    began = datetime.now(UTC)
    task.ti.get_first_reschedule_date = lambda _: began
    while True:
        try:
            outcome = task.start()
            while isinstance(outcome, TaskDeferred):
                outcome = task.resume(outcome, asyncio.run(anext(outcome.trigger.run())).payload)
        except AirflowRescheduleException:
            continue
        return


@pytest.mark.parametrize("deferrable", [True, False])
def test_create(said, deferrable):
    to_the_end(
        lambda: HeyGenCreateOverdubOperator(
            task_id="dub", poke_interval=0.05, deferrable=deferrable, mode="precision", **REQUEST
        )
    )
    started, *course = said()
    assert re.fullmatch(r"Started overdub ID \(mode precision, key [0-9a-f-]{36}\)\.", started)
    # In the triggerer, "pending" would say no more than "Started".
    assert course == COURSE[1:] if deferrable else COURSE


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
    if "mode" in how:  # each look is a process of its own, which knows nothing of the one before
        lines = [line for line, _ in groupby(lines)]
    assert lines == COURSE


@pytest.mark.parametrize(
    ("members", "tells"),
    [
        ({}, "Overdub od_1 is done."),
        ({"title": "T", "duration": 42.5}, "Overdub od_1 ('T') is done, 42.5 s of video."),
        ({"created_at": 1000}, "Overdub od_1 is done, 61 s after it was created."),
        ({"created_at": 2000}, "Overdub od_1 is done, 0 s after it was created."),  # HeyGen's clock is ahead
        ({"title": "a\nb https://x.y/?Signature=s"}, r"Overdub od_1 ('a\nb https://x.y/?***') is done."),
    ],
    ids=str,
)
def test_summary(monkeypatch, members, tells):
    monkeypatch.setattr(waiting, "time", SimpleNamespace(time=lambda: 1061.2))
    assert waiting.summary(Overdub(id="od_1", status="completed", **members).details()) == tells
