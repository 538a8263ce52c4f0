"""The emulator's behaviour: time, URLs, media, faults, callbacks, and each of its settings."""

from __future__ import annotations

import builtins
import http.client
import importlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import requests
from pydantic import ValidationError

import airflow_provider_heygen.emulator
from airflow_provider_heygen.emulator import Behaviour, Emulator, Fault, media
from airflow_provider_heygen.emulator.state import State

ROOT = Path(__file__).parent.parent
BY_URL = {
    "video": {"type": "url", "url": "https://example.com/v.mp4"},
    "audio": {"type": "url", "url": "https://example.com/a.mp3"},
}


NAN = json.dumps({**BY_URL, "start_time": float("nan")})


@pytest.fixture(scope="module")
def server():
    with Emulator(Behaviour(job_seconds=0)) as emulator:
        yield emulator


@pytest.fixture
def heygen(server):
    server.reset()
    return server


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("media")
    media.make_video(directory / "v.mp4", 2.0, hz=300)
    media.make_video(directory / "v.webm", 1.0)
    media.make_audio(directory / "long.mp3", 3.3)
    media.make_audio(directory / "short.mp3", 1.27)
    media.make_audio(directory / "long.wav", 2.7)
    return directory


class Api(requests.Session):
    def __init__(self, heygen):
        super().__init__()
        self.url = heygen.url
        self.headers["X-Api-Key"] = heygen.api_key

    def request(self, method, url, **kwargs):
        return super().request(method, self.url + url if url.startswith("/") else url, timeout=10, **kwargs)

    def create(self, body=BY_URL, resource="overdubs", **kwargs):
        answer = self.post(f"/v3/{resource}", json=body, **kwargs)
        assert answer.status_code == 200, answer.text
        (job_id,) = answer.json()["data"].values()
        return job_id

    def upload(self, path):
        with path.open("rb") as file:
            return self.post("/v3/assets", files={"file": file}).json()["data"]

    def job(self, job_id, resource="overdubs"):
        return self.get(f"/v3/{resource}/{job_id}").json()["data"]

    def ended(self, job_id, resource="overdubs"):
        return wait_for(
            lambda: (job := self.job(job_id, resource))["status"] in ("completed", "failed") and job
        )


@pytest.fixture
def api(heygen):
    with Api(heygen) as session:
        yield session


def wait_for(condition, seconds=15):
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return result


def asset(asset_id):
    return {"type": "asset_id", "asset_id": asset_id}


# Refusals


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"video": None}, "video"),
        ({"audio": ...}, "audio"),
        ({"video": {"type": "url"}}, "video"),
        ({"video": {"type": "file", "url": "https://example.com/v.mp4"}}, "video.type"),
        ({"video": {"type": "url", "url": "https://e.com/v.mp4", "asset_id": "a"}}, "video"),
        ({"video": {"type": "url", "url": "http://example.com/v.mp4"}}, "video"),
        ({"video": {"type": "url", "url": "https://[broken"}}, "video"),
        ({"video": "https://example.com/v.mp4"}, "video"),
        ({"title": 5}, "title"),
        ({"mode": "fast"}, "mode"),
        ({"fps_mode": "30"}, "fps_mode"),
        ({"enable_caption": "true"}, "enable_caption"),
        ({"enable_caption": None}, "enable_caption"),
        ({"start_time": -1}, "start_time"),
        ({"start_time": "1"}, "start_time"),
        ({"start_time": True}, "start_time"),
        ({"start_time": 10**400}, "start_time"),
        ({"start_time": 2, "end_time": 2}, "end_time"),
        ({"callback_url": "ftp://example.com"}, "callback_url"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_bodies_that_heygen_rejects(heygen, api, change, param):
    body = {name: value for name, value in {**BY_URL, **change}.items() if value is not ...}
    answer = api.post("/v3/overdubs", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "invalid_parameter", param)
    assert not heygen.jobs


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"video": NaN}', "\xff", '{"a":' * 9999, NAN, '{"title": 1e999}']
)
def test_bodies_that_are_no_json_object(api, text):
    answer = api.post(
        "/v3/overdubs", data=text.encode("latin-1"), headers={"Content-Type": "application/json"}
    )
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_parameter")


@pytest.mark.parametrize(
    ("method", "path", "kwargs", "status"),
    [
        ("GET", "/v3/overdubs?limit=0", {}, 400),
        ("GET", "/v3/overdubs?limit=101", {}, 400),
        ("GET", "/v3/overdubs?limit=x", {}, 400),
        ("GET", "/v3/overdubs?limit=", {}, 400),
        ("GET", "/v3/overdubs?token=bad", {}, 400),
        ("GET", "/v3/overdubs?token=%F0%9F%92%A9", {}, 400),
        ("POST", "/v3/overdubs", {"data": json.dumps(BY_URL)}, 400),
        ("POST", "/v3/overdubs", {"json": BY_URL, "headers": {"Idempotency-Key": "a b"}}, 400),
        ("POST", "/v3/overdubs", {"json": BY_URL, "headers": {"Idempotency-Key": "x" * 256}}, 400),
        ("PUT", "/v3/overdubs", {}, 405),
        ("HEAD", "/v3/overdubs", {}, 405),
        ("POST", "/v3/overdubs/od_1", {}, 405),
        ("GET", "/v3/overdubs/od_1", {}, 404),
        ("GET", "/v3/overdubs/", {}, 404),
        ("GET", "/v3/overdub", {}, 404),
        ("GET", "/", {}, 404),
        ("POST", "/v3/lipsyncs/statuses", {"json": {}}, 405),
        ("GET", "/v3/lipsyncs/statuses?lipsync_ids=" + "a," * 100, {}, 400),
        ("POST", "/v3/assets", {"files": {"file": b"\x00\x00\x00\x14ftypqt  "}}, 400),
        ("POST", "/v3/assets", {"files": {"file": b"\xff\xf1aac"}}, 400),
        ("POST", "/v3/assets", {"files": {"file": b""}}, 400),
        ("POST", "/v3/assets", {"files": {"upload": b"%PDF-"}}, 400),
        ("POST", "/v3/assets", {"data": {"file": "%PDF-"}}, 400),
        ("POST", "/v3/assets", {"data": b"x", "headers": {"Content-Type": "multipart/form-data"}}, 400),
        ("POST", "/v3/assets/asset_1/complete", {"json": {}}, 404),
    ],
)
def test_requests_that_heygen_rejects(api, method, path, kwargs, status):
    answer = api.request(method, path, **kwargs)
    assert answer.status_code == status, answer.text
    assert answer.headers["X-Request-Id"]
    if status == 405:
        assert answer.headers["Allow"]
    if method != "HEAD":
        assert answer.json()["error"]["code"]


@pytest.mark.parametrize(
    ("headers", "kind"),
    [
        ({}, None),
        ({"X-Api-Key": "wrong"}, "api_key"),
        ({"Authorization": "Bearer wrong"}, "oauth"),
        ({"Authorization": "Basic ZW11bGF0b3I6eA=="}, "oauth"),
        ({"X-Api-Key": "emulator-api-key", "Authorization": "Bearer emulator-oauth-token"}, "both"),
    ],
)
def test_credentials(heygen, headers, kind):
    answer = requests.get(f"{heygen.url}/v3/api_keys/self", headers=headers, timeout=10)
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "authentication_failed")
    assert ("not both" in answer.json()["error"]["message"]) == (kind == "both")
    (record,) = heygen.requests
    assert (record.credential, record.status) == (kind, 401)
    assert "emulator-api-key" not in str(record)


@pytest.mark.parametrize(
    ("scopes", "mode", "lacking"),
    [
        (["*:*"], "full", set()),
        (["*:read"], "read_only", {"lipsync:write", "assets:write"}),
        (["lipsync:write"], "custom", {"assets:read", "assets:write"}),
        (["lipsync:read", "assets:*"], "custom", {"lipsync:write"}),
        ([], "custom", {"lipsync:read", "lipsync:write", "assets:read", "assets:write"}),
    ],
)
def test_scopes_of_the_key(heygen, api, scopes, mode, lacking):
    heygen.behaviour.key_scopes = scopes
    key = api.get("/v3/api_keys/self").json()["data"]
    assert (key["scope_mode"], key["scopes"], key["expires_at"]) == (mode, scopes, None)
    needed = {
        "lipsync:read": [
            ("GET", "/v3/overdubs"),
            ("GET", "/v3/lipsyncs/x"),
            ("GET", "/v3/lipsyncs/statuses"),
        ],
        "lipsync:write": [
            ("POST", "/v3/lipsyncs"),
            ("PATCH", "/v3/overdubs/x"),
            ("DELETE", "/v3/overdubs/x"),
        ],
        "assets:read": [("GET", "/v3/assets/x")],
        "assets:write": [
            ("POST", "/v3/assets"),
            ("POST", "/v3/assets/direct-uploads"),
            ("DELETE", "/v3/assets/x"),
        ],
    }
    for scope, requests_with in needed.items():
        for method, path in requests_with:
            answer = api.request(method, path)
            assert (answer.status_code == 403) == (scope in lacking), (method, path)
            if scope in lacking:
                assert answer.json()["error"]["code"] == "insufficient_api_key_scope"
                assert scope in answer.json()["error"]["message"]
    token = {"Authorization": f"Bearer {heygen.oauth_token}", "X-Api-Key": None}
    assert api.get("/v3/overdubs", headers=token).status_code == 200
    assert api.get("/v3/api_keys/self", headers=token).status_code == 401
    with pytest.raises(ValidationError):
        heygen.behaviour.key_scopes = ["lipsync"]


def test_end_of_the_key(heygen, api):
    heygen.behaviour.key_expires_at = time.time() + 100
    key = api.get("/v3/api_keys/self").json()["data"]
    assert key["expires_at"] == int(heygen.behaviour.key_expires_at)
    assert 90 <= key["expires_in_seconds"] <= 100
    for ended in (time.time() - 1, 0):
        heygen.behaviour.key_expires_at = ended
        answer = api.get("/v3/overdubs")
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "authentication_failed")
        token = {"Authorization": f"Bearer {heygen.oauth_token}", "X-Api-Key": None}
        assert api.get("/v3/overdubs", headers=token).status_code == 200


def test_unknown_fields(heygen, api):
    body = {**BY_URL, "colour": "red", "video": {**BY_URL["video"], "bitrate": 5}}
    assert api.post("/v3/overdubs", json=body).json()["error"]["param"] == "colour"
    answer = api.post("/v3/overdubs", json={**BY_URL, "audio": body["video"]})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "audio.bitrate")
    heygen.behaviour.unknown_fields = "ignore"
    job_id = api.create(body)
    (job,) = api.get("/emulator/state").json()["jobs"]
    assert (job["id"], job["request"]) == (job_id, body)
    assert api.patch(f"/v3/overdubs/{job_id}", json={"title": "x", "colour": "red"}).status_code == 200


def test_title(api):
    job_id = api.create()
    for body in ({}, {"title": ""}, {"title": None}, {"title": "x", "mode": "speed"}):
        assert api.patch(f"/v3/overdubs/{job_id}", json=body).status_code == 400
    assert api.patch(f"/v3/lipsyncs/{job_id}", json={"title": "New"}).json()["data"]["title"] == "New"
    assert api.job(job_id)["title"] == "New"


def test_create_returns_only_the_id(api):
    assert list(api.post("/v3/overdubs", json=BY_URL).json()["data"]) == ["overdub_id"]
    assert list(api.post("/v3/lipsyncs", json=BY_URL).json()["data"]) == ["lipsync_id"]


def test_deleted_jobs_are_gone(heygen, api):
    job_id = api.create()
    url = api.ended(job_id)["video_url"]
    assert api.delete(f"/v3/overdubs/{job_id}").json() == {"data": {"id": job_id}}
    assert api.delete(f"/v3/overdubs/{job_id}").status_code == 404
    assert api.get(f"/v3/overdubs/{job_id}").status_code == 404
    assert requests.get(url, timeout=10).status_code == 404
    assert [job.deleted for job in heygen.jobs] == [True]


# Idempotency-Key


def test_the_same_key_returns_the_first_response(heygen, api):
    key = {"Idempotency-Key": "one"}
    first = api.create(headers=key)
    assert api.create({**BY_URL, "title": "another"}, headers=key) == first
    # Another route, another credential, and another key are other requests.
    assert api.create(resource="lipsyncs", headers=key) != first
    oauth = {"Authorization": f"Bearer {heygen.oauth_token}", "X-Api-Key": None}
    assert api.create(headers={**key, **oauth}) != first
    assert api.create(headers={"Idempotency-Key": "two"}) != first
    assert len(heygen.jobs) == 4
    assert [job.idempotency_key for job in heygen.jobs] == ["one", "one", "one", "two"]


def test_errors_are_not_kept(heygen, api):
    key = {"Idempotency-Key": "one"}
    heygen.behaviour.concurrent_jobs = 0
    assert api.post("/v3/overdubs", json=BY_URL, headers=key).status_code == 429
    assert api.post("/v3/overdubs", json={}, headers=key).status_code == 400
    heygen.behaviour.concurrent_jobs = None
    assert api.create(headers=key)


def test_a_repeat_in_flight_is_a_conflict(heygen, api):
    heygen.behaviour.create_latency = 0.5
    key = {"Idempotency-Key": "one"}
    with ThreadPoolExecutor() as pool:
        first = pool.submit(api.create, headers=key)
        wait_for(lambda: heygen.requests)
        answer = requests.post(
            f"{heygen.url}/v3/overdubs", json=BY_URL, headers={**api.headers, **key}, timeout=10
        )
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "request_in_progress")
        created = first.result()
    assert api.create(headers=key) == created
    assert len(heygen.jobs) == 1


def test_a_client_that_gave_up_has_created_a_job(heygen, api):
    heygen.behaviour.create_latency = 0.3
    key = {"Idempotency-Key": "one"}
    with pytest.raises(requests.ReadTimeout):
        requests.post(f"{heygen.url}/v3/overdubs", json=BY_URL, headers={**api.headers, **key}, timeout=0.1)
    wait_for(lambda: heygen.jobs)
    assert api.create(headers=key) == heygen.jobs[0].id


def test_every_post_honours_the_key(heygen, api, files):
    key = {"Idempotency-Key": "one"}
    for path, kwargs in [
        ("/v3/lipsyncs", {"json": BY_URL}),
        ("/v3/assets", {"files": {"file": b"%PDF-1"}}),
        (
            "/v3/assets/direct-uploads",
            {"json": {"filename": "f", "content_type": "video/mp4", "size_bytes": 9}},
        ),
    ]:
        answers = [api.post(path, headers=key, **kwargs) for _ in range(2)]
        assert answers[0].json() == answers[1].json()
        assert answers[0].status_code == answers[1].status_code < 300
    assert len(heygen.jobs) == 1


def test_idempotency_off(heygen, api):
    heygen.behaviour.idempotency = False
    key = {"Idempotency-Key": "one"}
    assert api.create(headers=key) != api.create(headers=key)


# The list


@pytest.mark.parametrize("order", ["desc", "asc", "shuffle"])
def test_pages_are_stable_under_inserts(heygen, api, order):
    heygen.behaviour.list_order = order
    ids = [api.create() for _ in range(25)]
    seen, token, sizes = [], None, []
    while True:
        page = api.get("/v3/overdubs", params={"limit": 7, "token": token}).json()
        seen += [row["id"] for row in page["data"]]
        sizes.append(len(page["data"]))
        token = page["next_token"]
        assert page["has_more"] == (token is not None)
        if token is None:
            break
        api.create()
        if len(sizes) == 2:
            # The job that the cursor names may go, too.
            api.delete(f"/v3/overdubs/{seen[-1]}")
    assert [job_id for job_id in seen if seen.count(job_id) > 1] == []
    assert set(ids) <= set(seen)
    old = [job_id for job_id in seen if job_id in ids]
    if order == "shuffle":
        assert old not in (ids, ids[::-1])
    else:
        assert old == (ids if order == "asc" else ids[::-1])
    assert len(api.get("/v3/lipsyncs").json()["data"]) == 10


def test_a_cursor_belongs_to_its_list(heygen, api):
    for _ in range(2):
        api.create()
    assert not api.get("/v3/overdubs?limit=2").json()["has_more"]
    token = api.get("/v3/overdubs?limit=1").json()["next_token"]
    heygen.behaviour.list_order = "asc"
    assert api.get("/v3/overdubs", params={"token": token}).status_code == 400


# Time


def test_timeline(heygen, api):
    heygen.behaviour.job_seconds = None
    heygen.behaviour.pending_seconds = 0.3
    heygen.behaviour.running_seconds = 0.4
    begun = time.time()
    job_id = api.create()
    # Changed settings are for new jobs.
    heygen.behaviour.job_seconds = 60
    seen = {}
    while "completed" not in seen and time.time() < begun + 10:
        seen.setdefault(api.job(job_id)["status"], time.time() - begun)
        time.sleep(0.01)
    assert list(seen) == ["pending", "running", "completed"]
    assert seen["running"] == pytest.approx(0.3, abs=0.15)
    assert seen["completed"] == pytest.approx(0.7, abs=0.3)
    assert Behaviour(job_seconds=2).timeline == (0.5, 1.5)


def test_failing_jobs(heygen, api):
    heygen.behaviour.fail_jobs = 2
    first = api.create()
    heygen.behaviour.failure_message = None
    second, third = api.create(), api.create()
    assert api.ended(first)["failure_message"] == "No speaker detected in the video"
    failed = api.ended(second)
    assert (failed["status"], failed["failure_message"], failed["video_url"]) == ("failed", None, None)
    assert api.ended(third)["status"] == "completed"


def test_forced_statuses(heygen, api):
    heygen.behaviour.job_seconds = 60
    job_id = api.create()
    answer = api.patch(f"/emulator/jobs/{job_id}", json={"status": "failed", "failure_message": "No face"})
    assert answer.json()["status"] == "failed"
    assert api.job(job_id)["failure_message"] == "No face"
    heygen.force(job_id, "running")
    assert api.job(job_id)["status"] == "running"
    wait_for(lambda: heygen.jobs[0].output)
    heygen.force(job_id, "completed")
    assert api.job(job_id)["video_url"]
    assert api.patch(f"/emulator/jobs/{job_id}", json={"status": "done"}).status_code == 400
    assert api.patch("/emulator/jobs/none", json={"status": "failed"}).status_code == 404


# Links and files


def test_urls_expire_and_are_signed_again(heygen, api):
    job_id = api.create()
    heygen.behaviour.link_seconds = 0.2
    first, second = (api.ended(job_id)["video_url"] for _ in range(2))
    assert first != second
    assert requests.get(second, timeout=10).status_code == 200
    time.sleep(0.2)
    expired = requests.get(second, timeout=10)
    assert (expired.status_code, expired.headers["Content-Type"]) == (403, "application/xml")
    assert "<Code>AccessDenied</Code>" in expired.text
    assert requests.get(api.job(job_id)["video_url"], timeout=10).status_code == 200
    heygen.behaviour.link_seconds = 60
    link = api.job(job_id)["video_url"]
    later = re.sub(r"Expires=\d+", "Expires=9999999999", link)
    for bad in (link[:-1] + ("0" if link[-1] != "0" else "1"), later, link.partition("?")[0], link + "%F0"):
        assert requests.get(bad, timeout=10).status_code == 403


def test_urls_with_credentials_are_rejected(heygen, api):
    url = api.ended(api.create())["video_url"]
    for headers in ({"X-Api-Key": heygen.api_key}, {"Authorization": f"Bearer {heygen.oauth_token}"}):
        answer = requests.get(url, headers=headers, timeout=10)
        assert (answer.status_code, "InvalidArgument" in answer.text) == (400, True)


def test_range(api):
    url = api.ended(api.create())["video_url"]
    whole = requests.get(url, timeout=10)
    assert int(whole.headers["Content-Length"]) == len(whole.content)
    part = requests.get(url, headers={"Range": "bytes=100-"}, timeout=10)
    assert (part.status_code, part.content) == (206, whole.content[100:])
    assert part.headers["Content-Range"] == f"bytes 100-{len(whole.content) - 1}/{len(whole.content)}"
    assert requests.get(url, headers={"Range": "bytes=99999999-"}, timeout=10).status_code == 416
    assert requests.head(url, timeout=10).headers["Content-Length"] == whole.headers["Content-Length"]


def test_captions(api):
    job_id = api.create(resource="lipsyncs")
    api.ended(job_id, "lipsyncs")
    captions = requests.get(api.job(job_id, "lipsyncs")["caption_url"], timeout=10).text
    assert re.match(r"1\n00:00:00,000 --> 00:00:02,\d{3}\n", captions)
    # The field is ignored.
    for wanted in (True, False):
        job_id = api.create({**BY_URL, "enable_caption": wanted}, resource="lipsyncs")
        assert api.ended(job_id, "lipsyncs")["caption_url"]
    # What it serves is a file it would take.
    assert (
        api.post("/v3/assets", files={"file": captions}).json()["data"]["mime_type"] == "application/x-subrip"
    )


def test_large_uploads(heygen, api):
    content = b"RIFF\x00\x00\x00\x00WAVE" + bytes(33_554_432 - 12)
    asset_url = api.post("/v3/assets", files={"file": content}).json()["data"]["url"]
    assert requests.get(asset_url, timeout=10).content == content
    for much in (content + b"x", content * 2):
        answer = api.post("/v3/assets", files={"file": much})
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "payload_too_large")


def test_direct_upload(heygen, api, files):
    content = (files / "v.mp4").read_bytes()

    def slot(**changes):
        body = {"filename": "v.mp4", "content_type": "video/mp4", "size_bytes": len(content), **changes}
        return api.post("/v3/assets/direct-uploads", json=body).json()["data"]

    def put(slot, content=content, **headers):
        return requests.put(
            slot["upload_url"], data=content, headers={**slot["upload_headers"], **headers}, timeout=10
        )

    good = slot()
    api_key = {"X-Api-Key": api.headers["X-Api-Key"]}
    assert put(good, **api_key).status_code == 403
    assert put(good, Authorization="Bearer x").status_code == 403
    assert put(good, **{"Content-Type": "video/webm"}).status_code == 403
    assert put(good, **{"x-amz-acl": "private"}).status_code == 403
    assert put(good, content + b"x").status_code == 403
    assert put(good, iter([content])).status_code == 411
    assert put({**good, "upload_url": good["upload_url"][:-1]}).status_code == 403
    assert requests.get(good["upload_url"], timeout=10).status_code == 405
    source = {**BY_URL, "video": asset(good["asset_id"])}
    early = api.post("/v3/overdubs", json=source)
    assert (early.status_code, early.json()["error"]["code"]) == (409, "asset_not_available")
    assert put(good).status_code == 200
    assert heygen.assets == []
    complete = api.post(f"/v3/assets/{good['asset_id']}/complete", json={"checksum_sha256": "0" * 64})
    assert complete.status_code == 400
    done = api.post(f"/v3/assets/{good['asset_id']}/complete", json={}).json()["data"]
    assert requests.get(done["url"], timeout=10).content == content
    assert [kept.id for kept in heygen.assets] == [good["asset_id"]]
    assert api.ended(api.create(source))["status"] == "completed"
    assert put(good).status_code == 404  # filled and taken

    wrong_sum = put(slot(checksum_sha256="0" * 64))
    assert (wrong_sum.status_code, "BadDigest" in wrong_sum.text) == (400, True)
    wrong_type = slot(content_type="audio/mpeg")
    assert put(wrong_type).status_code == 200
    answer = api.post(f"/v3/assets/{wrong_type['asset_id']}/complete", json={})
    assert answer.json()["error"]["param"] == "content_type"

    heygen.behaviour.upload_seconds = 0
    dead = slot()
    assert (dead["expires_in_seconds"], put(dead).status_code) == (0, 403)
    heygen.behaviour.max_upload_bytes = len(content) - 1
    body = {"filename": "v.mp4", "content_type": "video/mp4", "size_bytes": len(content)}
    answer = api.post("/v3/assets/direct-uploads", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "size_bytes")
    heygen.forget_assets()
    assert api.post("/v3/overdubs", json=source).json()["error"]["code"] == "asset_not_found"


def test_one_asset(heygen, api, files):
    uploaded = api.upload(files / "v.mp4")
    path = f"/v3/assets/{uploaded['asset_id']}"
    details = api.get(path).json()["data"]
    assert (details["id"], details["name"], details["type"]) == (uploaded["asset_id"], "v.mp4", "video")
    assert requests.get(details["url"], timeout=10).content == (files / "v.mp4").read_bytes()
    body = {"filename": "f", "content_type": "audio/mpeg", "size_bytes": 9}
    slot = api.post("/v3/assets/direct-uploads", json=body).json()["data"]
    assert api.get(f"/v3/assets/{slot['asset_id']}").json()["data"]["url"] is None
    assert api.delete(path).json() == {"data": {"id": uploaded["asset_id"]}}
    for answer in (api.get(path), api.delete(path), api.post("/v3/overdubs", json=with_asset(uploaded))):
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "asset_not_found")
    assert requests.get(uploaded["url"], timeout=10).status_code == 404


def with_asset(uploaded):
    return {**BY_URL, "video": asset(uploaded["asset_id"])}


def test_an_asset_that_goes_before_it_is_read_fails_the_job(monkeypatch, files):
    gate, make_video = threading.Event(), media.make_video
    monkeypatch.setattr(media, "make_video", lambda *args: gate.wait(10) and make_video(*args))
    with Emulator(Behaviour(job_seconds=0)) as heygen, Api(heygen) as api:
        audio = api.upload(files / "short.mp3")["asset_id"]
        job_id = api.create({**BY_URL, "audio": asset(audio)})
        api.delete(f"/v3/assets/{audio}")
        gate.set()
        assert api.ended(job_id)["failure_message"] == "Your audio is missing or corrupted"


def test_urls_of_over_32_mb(heygen, api, monkeypatch):
    content = b"\x00\x00\x00\x14ftypisom" + bytes(33_554_432 - 11)
    body = {"filename": "v.mp4", "content_type": "video/mp4", "size_bytes": len(content)}
    slot = api.post("/v3/assets/direct-uploads", json=body).json()["data"]
    requests.put(slot["upload_url"], data=content, headers=slot["upload_headers"], timeout=10)
    done = api.post(f"/v3/assets/{slot['asset_id']}/complete", json={}).json()["data"]
    answer = api.post("/v3/overdubs", json={**BY_URL, "video": {"type": "url", "url": done["url"]}})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "invalid_parameter", "video")
    assert error["message"] == "Maximum size for URL inputs of type 'video/mp4' is 32 MB"
    assert api.create(with_asset(done))
    response = requests.Response()
    response.status_code, response._content, response.headers["Content-Type"] = 200, content, "video/mp4"
    monkeypatch.setattr(requests, "get", lambda *_, **__: response)
    heygen.behaviour.fetch_urls = True
    assert api.ended(api.create())["failure_message"] == error["message"]


# Media


@pytest.mark.parametrize(
    ("picture", "sound"),
    [("v.mp4", "long.mp3"), ("v.mp4", "short.mp3"), ("v.webm", "short.mp3"), ("v.webm", "long.wav")],
)
def test_the_result_has_the_new_audio(api, files, tmp_path, picture, sound):
    video, audio = (api.upload(files / name)["asset_id"] for name in (picture, sound))
    job = api.ended(api.create({"video": asset(video), "audio": asset(audio)}))
    result = tmp_path / "result.mp4"
    result.write_bytes(requests.get(job["video_url"], timeout=10).content)
    assert media.decode_audio(result) == media.decode_audio(files / sound)
    made, given = media.probe(result), media.probe(files / sound)
    # The picture ends with a whole frame or two.
    assert made.duration == pytest.approx(given.duration, abs=0.15)
    assert job["duration"] == made.duration
    assert (made.width, made.height) == (320, 180)
    assert picture_seconds(result) == pytest.approx(given.duration, abs=0.15)
    source = media.probe(files / picture)
    assert made.video_codec in (source.video_codec, "h264")


def picture_seconds(path):
    arguments = ("-an", "-s", "16x16", "-pix_fmt", "gray", "-r", "25", "-f", "rawvideo", "-")
    return len(media._ffmpeg("-i", path, *arguments).stdout) / 256 / 25


def pitches(path):
    """The loudest frequency of each half second."""
    samples = np.frombuffer(media.decode_audio(path), "<i2").astype(float)
    return [
        round(float(np.abs(np.fft.rfft(samples[at : at + 8000])).argmax() * 2))
        for at in range(0, len(samples) - 7999, 8000)
    ]


def test_partial(files, tmp_path):
    # The video has a tone of 300 Hz, the audio one of 880 Hz.
    out = tmp_path / "out.mp4"
    media.mux(files / "v.mp4", files / "long.mp3", out, start_time=0.5, end_time=1.5)
    assert pitches(out) == [300, 880, 880, 300]
    media.mux(files / "v.mp4", files / "short.mp3", out, end_time=1.0)
    assert pitches(out) == [880, 880, 300, 300]
    media.mux(files / "v.mp4", files / "long.mp3", out, start_time=1.0)
    assert pitches(out) == [300, 300, 880, 880]


@pytest.mark.parametrize("sound", ["long.mp3", "short.mp3"])
def test_fixed_duration(files, tmp_path, sound):
    made = media.mux(files / "v.mp4", files / sound, tmp_path / "out.mp4", dynamic_duration=False)
    assert made.duration == pytest.approx(2.0, abs=0.1)


def test_broken_media_fail_the_job(api, files):
    pdf = api.post("/v3/assets", files={"file": b"%PDF-1"}).json()["data"]["asset_id"]
    audio = api.upload(files / "short.mp3")["asset_id"]
    for video in (pdf, audio):
        job = api.ended(api.create({"video": asset(video), "audio": asset(audio)}))
        assert (job["status"], "corrupted" in job["failure_message"]) == ("failed", True)


def test_a_job_that_cannot_be_rendered_fails(api, monkeypatch):
    def broken(*_, **__):
        raise OSError("no ffmpeg today")

    monkeypatch.setattr(media, "mux", broken)
    job = api.ended(api.create({**BY_URL, "start_time": 0.321}))
    assert (job["status"], "no ffmpeg today" in job["failure_message"]) == ("failed", True)


def test_its_own_urls_as_inputs(heygen, api, files):
    video, audio = (api.upload(files / name)["url"] for name in ("v.mp4", "short.mp3"))
    body = {"video": {"type": "url", "url": video}, "audio": {"type": "url", "url": audio}}
    assert api.ended(api.create(body))["duration"] == pytest.approx(1.27, abs=0.1)
    body["audio"]["url"] = audio[:-1]
    expected = "Failed to download audio from url, please check the url is valid or the audio is public"
    assert api.ended(api.create(body))["failure_message"] == expected


def test_fetch_urls(heygen, api):
    heygen.behaviour.fetch_urls = True
    body = {**BY_URL, "video": {"type": "url", "url": "https://127.0.0.1:9/v.mp4"}}
    expected = "Failed to download video from url, please check the url is valid or the video is public"
    assert api.ended(api.create(body))["failure_message"] == expected


def test_equal_jobs_are_rendered_once(heygen, api, monkeypatch):
    runs = []
    monkeypatch.setattr(
        media, "mux", lambda *args, mux=media.mux, **kwargs: runs.append(1) or mux(*args, **kwargs)
    )
    body = {**BY_URL, "start_time": 0.123}
    assert {api.ended(api.create(body))["status"] for _ in range(20)} == {"completed"}
    assert len(runs) == 1


def test_jobs_that_share_a_run_do_not_share_its_end(heygen, api, monkeypatch):
    api.ended(api.create())
    gate = threading.Event()
    monkeypatch.setattr(
        media, "mux", lambda *args, mux=media.mux, **kwargs: gate.wait(10) and mux(*args, **kwargs)
    )
    for number in range(os.cpu_count() or 2):
        api.create({**BY_URL, "start_time": 1 + number / 100})
    first, second = (api.create({**BY_URL, "start_time": 0.5}) for _ in range(2))
    wait_for(lambda: len(heygen._worker._pool._threads) == os.cpu_count())
    api.delete(f"/v3/overdubs/{first}")
    gate.set()
    assert api.ended(second)["status"] == "completed"


def test_without_ffmpeg(monkeypatch, caplog, files):
    monkeypatch.setattr(media, "ffmpeg_exe", lambda: None)
    with Emulator(Behaviour(job_seconds=0)) as heygen, Api(heygen) as api:
        assert "No ffmpeg" in caplog.text
        video, audio = (api.upload(files / name)["asset_id"] for name in ("v.mp4", "short.mp3"))
        job = api.ended(api.create({"video": asset(video), "audio": asset(audio)}))
        assert requests.get(job["video_url"], timeout=10).content == (files / "v.mp4").read_bytes()
        captions = requests.get(api.job(job["id"], "lipsyncs")["caption_url"], timeout=10).text
        assert captions.startswith("1\n00:00:00,000 --> ")
        assert api.ended(api.create())["status"] == "completed"


# Callbacks


class Listener:
    def __init__(self, failures=0):
        self.events = []
        listener = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                nonlocal failures
                body = self.rfile.read(int(self.headers["Content-Length"]))
                failures -= 1
                if failures < 0:
                    listener.events.append(json.loads(body))
                self.send_response(200 if failures < 0 else 503)
                self.end_headers()

            def log_message(self, *args):
                pass

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/hook"

    def __enter__(self):
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def test_callbacks(heygen, api, caplog):
    with Listener(failures=1) as listener:
        url = f"{listener.url}?token=SECRET"
        body = {**BY_URL, "callback_url": url, "callback_id": "mine", "folder_id": "f"}
        overdub_id = api.create(body)
        wait_for(lambda: listener.events)
        heygen.behaviour.fail_jobs = 1
        lipsync_id = api.create({**body, "callback_id": None}, resource="lipsyncs")
        wait_for(lambda: len(listener.events) == 2)
        wait_for(lambda: all(job.callback_delivered for job in heygen.jobs))
    assert "to 127.0.0.1 failed (HTTPError)" in caplog.text
    assert "SECRET" not in caplog.text
    success, fail = listener.events
    assert success["event_type"] == "overdub.success"
    assert success["event_data"]["overdub_id"] == overdub_id
    assert (success["event_data"]["callback_id"], success["event_data"]["folder_id"]) == ("mine", "f")
    assert requests.get(success["event_data"]["url"], timeout=10).status_code == 200
    assert fail == {
        "event_type": "lipsync.fail",
        "event_data": {
            "lipsync_id": lipsync_id,
            "callback_id": None,
            "folder_id": "f",
            "msg": "No speaker detected in the video",
        },
    }


def test_forcing_a_status_calls_back_at_once(heygen, api):
    heygen.behaviour.job_seconds = 60
    with Listener() as listener:
        job_id = api.create({**BY_URL, "callback_url": listener.url})
        heygen.force(job_id, "running")
        heygen.force(job_id, "failed", "Forced")
        wait_for(lambda: listener.events)
    assert listener.events[0]["event_data"]["msg"] == "Forced"


# Behaviour


def test_concurrent_jobs(heygen, api):
    heygen.behaviour.update({"concurrent_jobs": 2, "retry_after": 7, "job_seconds": 60})
    first, _ = api.create(), api.create()
    refused = api.post("/v3/overdubs", json=BY_URL)
    assert (refused.status_code, refused.headers["Retry-After"]) == (429, "7")
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    heygen.force(first, "failed")
    assert api.create()


def test_jobs_of_other_products(heygen, api):
    def behave(**changes):
        assert requests.patch(f"{heygen.url}/emulator/behaviour", json=changes, timeout=10).status_code == 200

    behave(concurrent_jobs=3, foreign_jobs=2, job_seconds=60)
    assert api.create()
    assert api.post("/v3/overdubs", json=BY_URL).status_code == 429
    assert len(api.get("/v3/overdubs").json()["data"]) == 1
    behave(foreign_jobs=1)
    assert api.create()
    behave(foreign_jobs=0, concurrent_jobs=2)
    assert api.post("/v3/overdubs", json=BY_URL).status_code == 429
    behave(concurrent_jobs=3)
    assert api.create()


def test_get_lag(heygen, api):
    heygen.behaviour.get_lag = 0.3
    job_id = api.create()
    assert api.get(f"/v3/overdubs/{job_id}").status_code == 404
    assert api.get("/v3/overdubs").json()["data"]
    time.sleep(0.3)
    assert api.get(f"/v3/overdubs/{job_id}").status_code == 200


def test_list_lag(heygen, api):
    heygen.behaviour.list_lag = 1.0
    api.ended(api.create())
    assert api.get("/v3/overdubs").json()["data"][0]["status"] in ("pending", "running")
    wait_for(lambda: api.get("/v3/overdubs").json()["data"][0]["status"] == "completed")


def test_callback_id_in_list(heygen, api):
    heygen.behaviour.callback_id_in_list = False
    job_id = api.create({**BY_URL, "callback_id": "mine"})
    assert "callback_id" not in api.get("/v3/overdubs").json()["data"][0]
    assert api.job(job_id)["callback_id"] == "mine"


def test_html_errors(heygen, api):
    heygen.behaviour.html_errors = True
    answer = api.get("/v3/overdubs/none")
    assert (answer.status_code, answer.headers["Content-Type"]) == (404, "text/html; charset=utf-8")
    assert answer.text.startswith("<html>")


def test_extra_members(heygen, api):
    heygen.behaviour.extra_members = True
    created = api.post("/v3/overdubs", json=BY_URL).json()["data"]
    assert api.job(created["overdub_id"])["new_object"]["deep"]
    listed = api.get("/v3/overdubs").json()
    assert "new_member" in listed
    assert "new_member" in listed["data"][0]
    body = {"filename": "f", "content_type": "video/mp4", "size_bytes": 9}
    slot = api.post("/v3/assets/direct-uploads", json=body).json()["data"]
    assert slot["upload_headers"] == {"Content-Type": "video/mp4"}


def test_null_video_url(heygen, api):
    heygen.behaviour.null_video_url = 2
    job_id = api.create()
    heygen.behaviour.null_video_url = 0
    assert [api.ended(job_id)["video_url"] is None for _ in range(3)] == [True, True, False]


def test_unknown_status(heygen, api):
    heygen.behaviour.update({"unknown_status": "rendering", "pending_seconds": 0, "job_seconds": None})
    assert api.job(api.create())["status"] == "rendering"


@pytest.mark.parametrize(("served", "missing"), [("overdubs", "lipsyncs"), ("lipsyncs", "overdubs")])
def test_resources(heygen, api, served, missing):
    heygen.behaviour.resources = served
    assert api.create(resource=served)
    assert api.get(f"/v3/{missing}").status_code == 404
    assert api.post(f"/v3/{missing}", json=BY_URL).json()["error"]["code"] == "not_found"
    assert api.get("/v3/lipsyncs/statuses").status_code == (200 if served == "lipsyncs" else 404)
    heygen.behaviour.missing_resource = "page"
    page = api.get(f"/v3/{missing}")
    assert (page.status_code, page.headers["Content-Type"]) == (404, "text/html; charset=utf-8")
    assert "resource" not in heygen.connection()["extra"]
    assert heygen.connection(missing)["extra"]["resource"] == missing


@pytest.mark.parametrize("name", ["overdub_id", "lipsync_id", "id"])
def test_id_field(heygen, api, name):
    heygen.behaviour.id_field = name
    for resource in ("overdubs", "lipsyncs"):
        assert list(api.post(f"/v3/{resource}", json=BY_URL).json()["data"]) == [name]


def test_behaviour_is_checked():
    with pytest.raises(ValidationError):
        Behaviour(job_seconds=-1)
    with pytest.raises(ValidationError):
        Behaviour(speed=9)
    behaviour = Behaviour()
    with pytest.raises(ValidationError):
        behaviour.update({"fail_jobs": 3, "list_order": "sideways"})
    assert behaviour == Behaviour()


# Faults


def test_faults_strike_in_order_and_are_used_up(heygen, api):
    heygen.fail_next(method="POST", path="/v3/overdubs$", status=429, headers={"Retry-After": "3"}, count=2)
    heygen.fail_next(status=500)
    statuses = [api.post("/v3/overdubs", json=BY_URL) for _ in range(4)]
    assert [answer.status_code for answer in statuses] == [429, 429, 500, 200]
    assert statuses[0].headers["Retry-After"] == "3"
    assert statuses[0].json()["error"]["code"] == "rate_limit_exceeded"
    assert len(heygen.jobs) == 1
    heygen.fail_next(path="/v3/assets/")
    heygen.clear_faults()
    with pytest.raises(ValidationError):
        heygen.fail_next(path="(")


@pytest.mark.parametrize(("drop", "created"), [("before", 0), ("after", 1)])
def test_dropped_connections(heygen, api, drop, created):
    heygen.fail_next(method="POST", drop=drop)
    with pytest.raises(requests.ConnectionError):
        api.post("/v3/overdubs", json=BY_URL)
    assert len(heygen.jobs) == created
    assert heygen.requests[0].status is None
    # Neither an HTTP error nor a hang: the socket is closed.
    heygen.fail_next(drop="before")
    connection = http.client.HTTPConnection(urlsplit(heygen.url).netloc, timeout=5)
    connection.request("GET", "/v3/overdubs")
    with pytest.raises(http.client.RemoteDisconnected):
        connection.getresponse()
    connection.close()


def test_bodies_of_faults(heygen, api):
    heygen.fail_next(html=True)
    heygen.fail_next(body="[1, 2")
    heygen.fail_next(status=503, body="", headers={"Content-Type": "text/plain"})
    heygen.fail_next(status=402, code="trial_limit_exceeded", message="No more")
    answers = [api.get("/v3/overdubs") for _ in range(4)]
    assert (answers[0].status_code, "<html>" in answers[0].text) == (502, True)
    assert (answers[1].status_code, answers[1].text) == (200, "[1, 2")
    assert (answers[2].status_code, answers[2].content) == (503, b"")
    assert answers[3].json()["error"]["code"] == "trial_limit_exceeded"


def test_truncated_bodies(heygen, api):
    whole = api.get("/v3/api_keys/self").content
    heygen.fail_next(truncate=20)
    assert api.get("/v3/api_keys/self").content == whole[:20]
    heygen.fail_next(truncate=99999)
    assert api.get("/v3/api_keys/self").content == whole


def test_latency(heygen, api):
    heygen.fail_next(latency=0.2)
    begun = time.monotonic()
    assert api.get("/v3/api_keys/self").status_code == 200
    assert time.monotonic() - begun >= 0.2


def test_broken_downloads(heygen, api):
    url = api.ended(api.create())["video_url"]
    whole = requests.get(url, timeout=10).content
    heygen.fail_next(path="/files/", drop_after_bytes=70_000)
    answer = requests.get(url, stream=True, timeout=10)
    assert int(answer.headers["Content-Length"]) == len(whole)
    got = bytearray()
    with pytest.raises((requests.ConnectionError, requests.exceptions.ChunkedEncodingError)):
        list(map(got.extend, answer.iter_content(1000)))
    assert got == whole[: len(got)]
    assert 60_000 < len(got) <= 70_000
    heygen.fail_next(path="/files/", status=503)
    assert requests.get(url, timeout=10).status_code == 503


# The admin routes, and the two ways to start


def test_admin_routes(heygen, api):
    admin = requests.Session()
    url = f"{heygen.url}/emulator"
    behaviour = admin.patch(
        f"{url}/behaviour", json={"job_seconds": 60, "key_scopes": ["*:read", "assets:write"]}
    ).json()
    assert (behaviour["job_seconds"], behaviour["key_scopes"]) == (60, ["*:read", "assets:write"])
    assert heygen.behaviour.job_seconds == 60
    assert admin.patch(f"{url}/behaviour", data='{"key_scopes": ["*:*"]}').status_code == 200  # as curl -d
    for bad in ({"speed": 1}, {"job_seconds": "soon"}, []):
        assert admin.patch(f"{url}/behaviour", json=bad).status_code == 400
    fault = admin.post(f"{url}/faults", json={"status": 500, "count": 2})
    assert (fault.status_code, fault.json()["count"]) == (201, 2)
    assert admin.post(f"{url}/faults", json={"path": "("}).status_code == 400
    assert api.post("/v3/overdubs", json=BY_URL).status_code == 500
    assert [fault["count"] for fault in admin.get(f"{url}/state").json()["faults"]] == [1]
    assert admin.delete(f"{url}/faults").status_code == 204
    job_id = api.create({**BY_URL, "title": "T"}, headers={"Idempotency-Key": "k"})
    state = admin.get(f"{url}/state").json()
    assert state["requests_by_route"] == {"POST /v3/overdubs": 2}
    assert state["statuses_by_route"] == {"POST /v3/overdubs": {"500": 1, "200": 1}}
    assert state["jobs_created"] == 1
    assert (state["jobs"][0]["id"], state["jobs"][0]["title"]) == (job_id, "T")
    assert state["jobs"][0]["request"] == {**BY_URL, "title": "T"}
    assert state["jobs"][0]["idempotency_key"] == "k"
    (_, record) = admin.get(f"{url}/requests").json()
    assert (record["route"], record["idempotency_key"], record["status"]) == ("/v3/overdubs", "k", 200)
    assert admin.delete(f"{url}/state").status_code == 204
    assert heygen.jobs == heygen.requests == []
    assert heygen.requests_by_route == {}
    assert heygen.behaviour == Behaviour(job_seconds=0)


def test_responses_are_prompt(api):
    seconds = []
    for _ in range(20):
        began = time.monotonic()
        api.create()
        seconds.append(time.monotonic() - began)
    # With Nagle's algorithm, none would be quicker than the 40 ms of a delayed ACK, on any machine.
    assert min(seconds) < 0.04


def test_log_names_routes(heygen, api):
    job_id = api.create()
    api.job(job_id)
    api.get("/v3/overdubs?limit=3")
    assert heygen.requests_by_route == {
        "POST /v3/overdubs": 1,
        "GET /v3/overdubs/{overdub_id}": 1,
        "GET /v3/overdubs": 1,
    }
    last = heygen.requests[-1]
    assert (last.query, last.credential, last.headers["x-api-key"]) == ("limit=3", "api_key", "***")


def test_two_emulators_and_a_clean_stop():
    threads = set(threading.enumerate())
    with Emulator() as one, Emulator(api_key="other") as two:
        assert one.url != two.url
        Api(two).create()
        assert not one.jobs
        directory = two._state.directory
        assert directory.exists()
    assert not directory.exists()
    with pytest.raises(requests.ConnectionError):
        requests.get(one.url, timeout=10)
    assert set(threading.enumerate()) <= threads


def test_stop_does_not_wait_for_slow_responses():
    heygen = Emulator(Behaviour(create_latency=60)).start()
    with ThreadPoolExecutor() as pool:
        pending = pool.submit(Api(heygen).post, "/v3/overdubs", json=BY_URL)
        wait_for(lambda: heygen.requests)
        begun = time.monotonic()
        heygen.stop()
        assert time.monotonic() - begun < 4
        assert pending.exception() or pending.result().status_code == 500


def test_port_in_use():
    with Emulator() as heygen, pytest.raises(OSError, match="in use"):
        Emulator(port=urlsplit(heygen.url).port).start()


@pytest.mark.parametrize(
    "command",
    [["-m", "airflow_provider_heygen.emulator"], [str(ROOT / "example_dags" / "run_local.py"), "ui"]],
    ids=["emulator", "make ui"],
)
def test_a_port_in_use_is_reported_before_anything_starts(command):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        command = [sys.executable, *command, "--port", str(port)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(f"Port {port}: Address already in use. Choose another .*\n", done.stderr)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_command_line(number, tmp_path):
    command = [sys.executable, "-m", "airflow_provider_heygen.emulator", "--port", "0", "--job-seconds", "0"]
    command += ["--api-key", "k", "--resources", "lipsyncs", "--extra-members", "--concurrent-jobs", "3"]
    command += ["--key-scopes", "*:read", "assets:write", "--foreign-jobs", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            url, admin, connection = (process.stdout.readline().split(": ", 1)[1].strip() for _ in range(3))
            connection = json.loads(connection)
            assert connection == {
                "conn_type": "heygen",
                "host": url.rpartition(":")[0],
                "port": int(url.rpartition(":")[2]),
                "password": "k",
                "extra": {
                    "allow_http": True,
                    "allow_private_hosts": True,
                    "max_requests_per_second": 200,
                },
            }
            behaviour = requests.get(admin, timeout=10).json()["behaviour"]
            assert (behaviour["job_seconds"], behaviour["concurrent_jobs"]) == (0, 3)
            assert (behaviour["key_scopes"], behaviour["foreign_jobs"]) == (["*:read", "assets:write"], 1)
            answer = requests.get(f"{url}/v3/lipsyncs", headers={"X-Api-Key": "k"}, timeout=10)
            assert answer.json()["new_member"]
        finally:
            process.send_signal(number)
        assert process.wait(10) == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--list-order", "sideways"], "list_order"),
        (["--port", "99999"], "argument --port"),
        (["--host", "::1", "--port", "0"], "Host ::1: .* Choose another one with --host"),
    ],
)
def test_command_line_rejects_invalid_options(options, message):
    command = [sys.executable, "-m", "airflow_provider_heygen.emulator", *options]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode
    assert re.search(message, done.stderr)
    assert "Traceback" not in done.stderr


def test_half_a_character_is_stored_as_a_question_mark(heygen):
    media = '"video": {"type": "url", "url": "https://x.y/v.mp4"}, "audio": {"type": "url", "url": "https://x.y/a"}'
    headers = {"X-Api-Key": heygen.api_key, "Content-Type": "application/json"}
    url = f"{heygen.url}/v3/overdubs"
    requests.post(url, data=f'{{{media}, "title": "\\ud800"}}', headers=headers, timeout=10)
    assert [row["title"] for row in requests.get(url, headers=headers, timeout=10).json()["data"]] == ["?"]


def test_a_missing_dependency_is_named(monkeypatch):
    real_import = builtins.__import__

    def without_multipart(name, *args, **kwargs):
        if name == "python_multipart":
            raise ImportError("No module named 'python_multipart'", name=name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_multipart)
    with pytest.raises(ImportError, match=re.escape("pip install 'airflow-provider-heygen[emulator]'")):
        importlib.reload(airflow_provider_heygen.emulator)


def test_faults_match_method_and_path():
    state = State(Behaviour())
    state.faults.append(Fault(path="/v3/overdubs", method="GET"))
    assert state.next_fault("POST", "/v3/overdubs") is None
    assert state.next_fault("GET", "/v3/lipsyncs") is None
    assert state.next_fault("GET", "/v3/overdubs/od_1") is not None
    assert state.next_fault("GET", "/v3/overdubs/od_1") is None
