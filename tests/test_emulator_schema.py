"""The emulator against the OpenAPI file: its responses, and which requests it accepts and rejects."""

from __future__ import annotations

import base64
import copy
import hashlib
import time
from functools import cache
from pathlib import Path

import pytest
import requests
import schemathesis
import yaml
from conftest import AIRFLOW, each_value
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from openapi_core import OpenAPI
from openapi_core.contrib.requests import RequestsOpenAPIRequest, RequestsOpenAPIResponse
from packaging.version import Version
from schemathesis.specs.openapi.checks import positive_data_acceptance

from airflow_provider_heygen.emulator import Behaviour, Emulator

CONTRACT = yaml.safe_load((Path(__file__).parent / "heygen-v3-overdubs.openapi.yaml").read_text())

# The smallest files that pass for their type.
FILES = {
    "image/png": b"\x89PNG\r\n\x1a\n",
    "image/jpeg": b"\xff\xd8\xff\xe0",
    "video/mp4": b"\x00\x00\x00\x14ftypisom\x00\x00\x00\x00isom",
    "video/webm": b"\x1a\x45\xdf\xa3\x9f\x42\x82\x84webm",
    "audio/mpeg": b"ID3\x04\x00\x00\x00\x00\x00\x00",
    "audio/wav": b"RIFF\x00\x00\x00\x00WAVE",
    "application/pdf": b"%PDF-1.7\n",
    "application/x-subrip": b"1\n00:00:00,000 --> 00:00:01,000\nHello\n",
}
BY_URL = {
    "video": {"type": "url", "url": "https://example.com/v.mp4"},
    "audio": {"type": "url", "url": "https://example.com/a.mp3"},
}


@pytest.fixture(scope="module")
def heygen():
    with Emulator(Behaviour(job_seconds=0.05)) as emulator:
        yield emulator


@cache
def contract_at(url):
    """Return the contract of a local server, which shares all of the file but the servers."""
    return OpenAPI.from_dict({**CONTRACT, "servers": [{"url": url}]})


class Client:
    """A client that checks each request and response against the contract."""

    def __init__(self, heygen, credential):
        self._api = contract_at(heygen.url)
        self._url = heygen.url
        self._session = requests.Session()
        self._session.headers.update(credential)

    def __call__(self, method, path, *, status=200, valid_request=True, **kwargs):
        answer = self._session.request(method, self._url + path, timeout=10, **kwargs)
        assert answer.status_code == status, answer.text
        assert answer.headers["X-Request-Id"]
        request = RequestsOpenAPIRequest(answer.request)
        # openapi-core cannot read the parts of a multipart body.
        if valid_request and "files" not in kwargs:
            self._api.validate_request(request)
        self._api.validate_response(request, RequestsOpenAPIResponse(answer))
        body = answer.json()
        return body["error"] if "error" in body else body["data"]


CREDENTIALS = {
    "api_key": lambda heygen: {"X-Api-Key": heygen.api_key},
    "oauth": lambda heygen: {"Authorization": f"Bearer {heygen.oauth_token}"},
}


@pytest.fixture(params=CREDENTIALS)
def call(heygen, request):
    heygen.reset()
    return Client(heygen, CREDENTIALS[request.param](heygen))


@pytest.mark.parametrize(
    ("resource", "id_field", "extra_members", "call"),
    [
        ("overdubs", "overdub_id", False, "api_key"),
        ("overdubs", "overdub_id", True, "oauth"),
        ("lipsyncs", "lipsync_id", False, "oauth"),
        ("lipsyncs", "lipsync_id", True, "api_key"),
    ],
    indirect=["call"],
)
def test_life_of_a_job(heygen, call, resource, id_field, extra_members):
    heygen.behaviour.extra_members = extra_members
    heygen.behaviour.job_seconds = 3600
    path = f"/v3/{resource}"
    job_id = call("POST", path, json={**BY_URL, "callback_id": "mine"})[id_field]
    for status in ("pending", "running", "completed"):
        heygen.force(job_id, status)
        job = call("GET", f"{path}/{job_id}")
        assert job["status"] == status
    deadline = time.time() + 60
    while (job := call("GET", f"{path}/{job_id}"))["duration"] is None:  # it is being made
        assert time.time() < deadline, job
    assert job["duration"] == pytest.approx(2.5, abs=0.1)
    assert ("caption_url" in job) == (resource == "lipsyncs")
    assert ("new_member" in job) == extra_members
    assert call("PATCH", f"{path}/{job_id}", json={"title": "Better"})["title"] == "Better"
    (row,) = call("GET", path, params={"limit": 100})
    assert row["callback_id"] == "mine"
    assert call("DELETE", f"{path}/{job_id}")["id"] == job_id
    assert call("GET", path) == []


def test_statuses(heygen, call):
    heygen.behaviour.job_seconds = 3600
    for _ in range(2):
        call("POST", "/v3/lipsyncs", json=BY_URL)
    failed, running = (job.id for job in heygen.jobs)
    heygen.force(failed, "failed", "Too dark")
    heygen.force(running, "running")
    rows = call("GET", "/v3/lipsyncs/statuses", params={"lipsync_ids": f"{failed},gone,{running}"})
    assert [row["status"] for row in rows] == ["failed", "not_found", "processing"]
    assert rows[0]["error"]["message"] == "Too dark"
    assert call("GET", "/v3/lipsyncs/statuses") == []


@pytest.mark.parametrize(("mime_type", "call"), each_value(FILES, CREDENTIALS), indirect=["call"])
def test_assets(call, mime_type):
    content = FILES[mime_type]
    asset = call("POST", "/v3/assets", files={"file": content})
    assert (asset["mime_type"], asset["size_bytes"]) == (mime_type, len(content))
    downloaded = requests.get(asset["url"], timeout=10)
    assert (downloaded.content, downloaded.headers["Content-Type"].split(";")[0]) == (content, mime_type)
    path = f"/v3/assets/{asset['asset_id']}"
    assert call("GET", path)["id"] == call("DELETE", path)["id"] == asset["asset_id"]
    assert call("GET", path, status=404)["code"] == "asset_not_found"

    checksum = hashlib.sha256(content).hexdigest()
    slot = call(
        "POST",
        "/v3/assets/direct-uploads",
        json={
            "filename": "f",
            "content_type": mime_type,
            "size_bytes": len(content),
            "checksum_sha256": checksum,
        },
    )
    complete = f"/v3/assets/{slot['asset_id']}/complete"
    assert call("POST", complete, status=409, json={})["code"] == "conflict"
    digest = base64.b64encode(hashlib.sha256(content).digest()).decode()
    assert slot["upload_headers"] == {"Content-Type": mime_type, "x-amz-checksum-sha256": digest}
    put = requests.put(slot["upload_url"], data=content, headers=slot["upload_headers"], timeout=10)
    assert put.status_code == 200
    for _ in range(2):
        assert call("POST", complete, json={"checksum_sha256": checksum})["status"] == "processing"


def test_the_key(heygen, call):
    heygen.behaviour.update({"key_scopes": ["*:read"], "key_expires_at": time.time() + 100})
    key = {"X-Api-Key": heygen.api_key, "Authorization": None}
    assert call("GET", "/v3/api_keys/self", headers=key)["scope_mode"] == "read_only"
    error = call("POST", "/v3/lipsyncs", status=403, headers=key, json=BY_URL)
    assert error["code"] == "insufficient_api_key_scope"
    token = {"X-Api-Key": None, "Authorization": f"Bearer {heygen.oauth_token}"}
    assert call("GET", "/v3/api_keys/self", status=401, headers=token)["code"] == "authentication_failed"


def test_errors(heygen, call):
    for resource in ("overdubs", "lipsyncs"):
        path = f"/v3/{resource}"
        for body in ({}, {**BY_URL, "mode": "fast"}, {**BY_URL, "video": {"type": "url"}}):
            assert call("POST", path, status=400, valid_request=False, json=body)["param"]
        unknown = {**BY_URL, "audio": {"type": "asset_id", "asset_id": "nowhere"}}
        assert call("POST", path, status=404, json=unknown)["code"] == "asset_not_found"
        for method in ("GET", "DELETE"):
            assert call(method, f"{path}/nowhere", status=404)["code"] == "not_found"
        assert call("PATCH", f"{path}/nowhere", status=404, json={"title": "x"})["code"] == "not_found"
        assert call("GET", path, status=400, valid_request=False, params={"limit": 101})["param"] == "limit"
        assert call("GET", path, status=400, params={"token": "bad"})["param"] == "token"
        heygen.behaviour.concurrent_jobs = 0
        assert call("POST", path, status=429, json=BY_URL)["code"] == "rate_limit_exceeded"
        heygen.behaviour.concurrent_jobs = None
        for status in (402, 403, 409, 500, 503, 504):
            heygen.fail_next(status=status)
            assert call("POST", path, status=status, json=BY_URL)["message"]
    assert call("POST", "/v3/assets", status=400, files={"file": b"GIF89a"})["param"] == "file"
    big = FILES["video/mp4"] + bytes(33_554_433 - len(FILES["video/mp4"]))
    assert call("POST", "/v3/assets", status=413, files={"file": big})["code"] == "payload_too_large"
    assert call("POST", "/v3/assets/nowhere/complete", status=404, json={})["code"] == "asset_not_found"
    headers = {"X-Api-Key": "wrong", "Authorization": None}
    error = call("GET", "/v3/overdubs", status=401, headers=headers)
    assert error["code"] == "authentication_failed"


def tightened():
    """The contract with its prose written out as schema, so that schemathesis knows what HeyGen rejects.

    Only rules that the prose states or that the design takes as the stricter reading; answers are left alone.
    """
    contract = copy.deepcopy(CONTRACT)
    # What the provider never calls is not emulated.
    for path in ("/v3/lipsyncs/batches", "/v3/lipsyncs/batches/{batch_id}", "/v3/users/me"):
        del contract["paths"][path]
    schemas = contract["components"]["schemas"]
    # "Send only known fields": unknown ones are refused on other v3 routes.
    requests_with = [name for name in schemas if name.endswith("Request")]
    for name in [*requests_with, "MediaUrl", "MediaAsset"]:
        schemas[name]["additionalProperties"] = False
    schemas["MediaUrl"]["properties"]["url"] = {
        "type": "string",
        "pattern": r"^https://[a-z]{1,9}\.example/[a-z]*$",
    }
    schemas["UpdateTitleRequest"]["properties"]["title"]["minLength"] = 1
    for name in ("CreateOverdubRequest", "CreateLipsyncRequest"):
        fields = schemas[name]["properties"]
        fields["fps_mode"]["enum"] = ["vfr", "cfr", "passthrough", None]
        fields["start_time"] |= {"minimum": 0}
        fields["end_time"] |= {"exclusiveMinimum": 0}
        # No server listens there, so nothing leaves this machine.
        fields["callback_url"]["pattern"] = r"^http://127\.0\.0\.1:9/[a-z]*$"
    upload = schemas["CreateDirectUploadRequest"]["properties"]
    upload["content_type"]["enum"] = list(FILES)
    upload["size_bytes"]["maximum"] = 209_715_200
    # A cursor cannot be made up; tests/test_emulator.py walks the pages.
    del contract["components"]["parameters"]["Token"]
    for path in contract["paths"].values():
        for operation in path.values():
            if isinstance(operation, dict) and "parameters" in operation:
                operation["parameters"] = [
                    parameter
                    for parameter in operation["parameters"]
                    if "Token" not in parameter.get("$ref", "")
                ]
    return contract


for mime_type, content in FILES.items():
    schemathesis.openapi.media_type(mime_type, st.just(content))

api = schemathesis.openapi.from_dict(tightened())


@pytest.mark.skipif(Version("3.3") > AIRFLOW, reason="the emulator is the same on each Airflow")
@pytest.mark.parametrize("credential", CREDENTIALS)
@api.parametrize()
@settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_schemathesis(case, heygen, credential):
    """Each operation keeps the contract for every request."""
    # A known key gets its first response again, even with an invalid body.
    heygen._state.idempotency.clear()
    # That the end must come after the start cannot be said in JSON Schema.
    excluded = [positive_data_acceptance] if has_reversed_times(case.body) else []
    case.call_and_validate(
        base_url=heygen.url, headers=CREDENTIALS[credential](heygen), excluded_checks=excluded
    )


def has_reversed_times(body):
    if not isinstance(body, dict):
        return False
    start, end = body.get("start_time"), body.get("end_time")
    return isinstance(start, int | float) and isinstance(end, int | float) and end <= start
