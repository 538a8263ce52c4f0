"""The receiver of the documentation: a callback is a hint, and a GET returns what has happened."""

from __future__ import annotations

import importlib.util
import json
import logging
import queue
import socket
import threading
import time
from pathlib import Path

import pytest
import requests
import uvicorn

from airflow_provider_heygen.hooks.heygen import HeyGenHook

PATH = Path(__file__).resolve().parent.parent / "docs" / "examples" / "callback_receiver.py"
MEDIA = {"video": "https://example.com/talk.mp4", "audio": "https://example.com/talk.de.mp3"}


@pytest.fixture(scope="module")
def receiver_module():
    spec = importlib.util.spec_from_file_location("callback_receiver", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def ended():
    """What the receiver has handed on."""
    return queue.Queue()


@pytest.fixture
def url(receiver_module, ended):
    """Where the receiver listens."""
    listening = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(receiver_module.make_app(ended.put), log_level=logging.WARNING, log_config=None)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{listening.getsockname()[1]}/heygen"
    server.should_exit = True
    thread.join()


def created(**fields):
    with HeyGenHook() as hook:
        return hook.create_overdub({**MEDIA, **fields})


@pytest.mark.parametrize("resource", ["overdubs", "lipsyncs"])
@pytest.mark.parametrize("status", ["completed", "failed"])
def test_each_response_of_the_contract_leads_to_its_outcome(heygen, resource, url, ended, status):
    heygen.behaviour.fail_jobs = int(status == "failed")
    overdub_id = created(callback_url=url)
    overdub = ended.get(timeout=20)
    assert (overdub.overdub_id, overdub.status) == (overdub_id, status)
    looks = [record for record in heygen.requests if record.path.endswith(overdub_id)]
    assert looks[0].method == "GET"


def forged(overdub_id):
    link = "https://evil.example/video.mp4"
    return {"event_type": "overdub.success", "event_data": {"overdub_id": overdub_id, "url": link}}


def test_a_forged_success_of_a_running_overdub_is_not_believed(heygen, url, ended):
    heygen.behaviour.job_seconds = 3600
    overdub_id = created()
    assert requests.post(url, json=forged(overdub_id), timeout=10).status_code == 202
    wait_for_look(heygen, overdub_id)
    heygen.force(overdub_id, "completed")
    assert requests.post(url, json=forged(overdub_id), timeout=10).status_code == 202
    overdub = ended.get(timeout=20)  # the second time it was true
    assert (overdub.overdub_id, overdub.status) == (overdub_id, "completed")
    assert "evil" not in str(overdub.video_url)
    assert ended.empty()


def wait_for_look(heygen, overdub_id):
    until = time.monotonic() + 20
    while not any(record.path.endswith(overdub_id) and record.status for record in heygen.requests):
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize(
    "body",
    [
        json.dumps(forged("no-such-overdub")),
        json.dumps(forged("../../v3/users/me")),
        json.dumps(forged(["a", "list"])),
        json.dumps({"event_data": None}),
        "[1, 2]",
        "{",
        "\xff\xfe",
        "",
    ],
)
def test_invalid_http_gets_a_response_too(heygen, url, ended, body):
    assert requests.post(url, data=body.encode("latin-1"), timeout=10).status_code == 202
    created(callback_url=url)
    assert ended.get(timeout=20).overdub_id == heygen.jobs[0].id  # it keeps running
    assert ended.empty()


def test_an_endless_body_is_cut_off(heygen, url):
    assert requests.post(url, data=b"x" * 100_000, timeout=10).status_code == 413
