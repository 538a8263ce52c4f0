"""The hook against the emulator: what goes over the wire, what is repeated, what comes out."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import gzip
import json
import logging
import re
import socket
import threading
import time
import unicodedata
import wave
from email.utils import formatdate
from pathlib import Path

import pytest
import requests
import yaml
from conftest import each_value, forward
from openapi_core import OpenAPI
from openapi_core.contrib.werkzeug import WerkzeugOpenAPIRequest
from test_connection import Authority
from werkzeug.test import EnvironBuilder

from airflow_provider_heygen import __version__, transport
from airflow_provider_heygen.api import CreateOverdubRequest
from airflow_provider_heygen.exceptions import (
    HeyGenBadInputError,
    HeyGenError,
    HeyGenGatewayError,
    HeyGenNotFoundError,
    HeyGenOutcomeUnknownError,
    HeyGenPermanentError,
    HeyGenTransientError,
)
from airflow_provider_heygen.hooks import heygen as module
from airflow_provider_heygen.hooks.heygen import HeyGenHook

REQUEST = {"video": "https://example.com/v.mp4", "audio": "https://example.com/a.mp3"}

both_resources = pytest.mark.parametrize("resource", ["overdubs", "lipsyncs"])


def get(overdub_id, **kwargs):
    return HeyGenHook(**kwargs).get_overdub(overdub_id)


def aget(overdub_id, **kwargs):
    return asyncio.run(HeyGenHook(**kwargs).aget_overdub(overdub_id))


both_transports = pytest.mark.parametrize("look", [get, aget], ids=["sync", "async"])


def write_sound(path, size=1000):
    """Write a WAV file of that many samples, two bytes each."""
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(2 * size))
    return path


# --- What is sent -------------------------------------------------------------------------------------

CONTRACT = yaml.safe_load((Path(__file__).parent / "heygen-v3-overdubs.openapi.yaml").read_text())
OPENAPI = OpenAPI.from_dict(CONTRACT)


def check_requests(wire):
    """Every request keeps the contract."""
    for seen in wire.seen:
        request = EnvironBuilder(
            path=seen.path,
            method=seen.method,
            base_url="https://api.heygen.com",  # whose place we have taken
            headers=[(name, value) for name, value in seen.headers.items() if name.lower() != "host"],
            data=seen.body,
        ).get_request()
        # openapi-core cannot read the parts of a multipart body; test_upload checks them.
        if request.mimetype != "multipart/form-data":
            OPENAPI.validate_request(WerkzeugOpenAPIRequest(request))


def everything(hook, tmp_path):
    """Make every request that the hook can make."""
    asset = hook.upload_asset(write_sound(tmp_path / "a.wav"))
    overdub_id = hook.create_overdub({**REQUEST, "audio": {"type": "asset_id", "asset_id": asset.asset_id}})
    hook.create_overdub(ALL_FIELDS)
    hook.get_overdub(overdub_id)
    page = hook.list_overdubs(1)
    hook.list_overdubs(100, page.next_token)
    list(hook.iter_overdubs(1))
    hook.update_overdub(overdub_id, "Better")
    hook.delete_overdub(overdub_id)
    assert hook.test_connection()[0]
    assert hook.get_asset(asset.asset_id).name == "a.wav"
    hook.delete_asset(asset.asset_id)

    async def asynchronously():
        another = hook.create_overdub(REQUEST)
        async with hook:
            await hook.aget_overdub(another)
            page = await hook.alist_overdubs(1)
            await hook.alist_overdubs(2, page.next_token)
            await hook.adelete_overdub(another)

    asyncio.run(asynchronously())


ALL_FIELDS = {
    "video": {"type": "url", "url": "https://example.com/v.mp4?a=b&c=d"},
    "audio": {"type": "url", "url": "https://example.com/a.mp3"},
    "title": " T\u00edtulo \U0001f3ac ",
    "mode": "precision",
    "enable_caption": False,
    "enable_dynamic_duration": False,
    "disable_music_track": True,
    "enable_speech_enhancement": True,
    "enable_watermark": False,
    "start_time": 0.0,
    "end_time": 2.5,
    "keep_the_same_format": False,
    "fps_mode": "passthrough",
    "callback_url": "http://127.0.0.1:9/callback?x=y",
    "callback_id": "mine",
    "folder_id": "folder-1",
}


def test_there_are_16_fields():
    schema = CONTRACT["components"]["schemas"]["CreateOverdubRequest"]
    assert set(ALL_FIELDS) == set(schema["properties"])
    assert len(ALL_FIELDS) == 16


@pytest.mark.parametrize(("resource", "auth_type"), [("overdubs", "oauth"), ("lipsyncs", "api_key")])
def test_every_request_keeps_the_contract(heygen, wire, connect, tmp_path, resource, auth_type):
    password = heygen.connection(resource, auth_type)["password"]
    connect(
        wire.url, password, auth_type=auth_type, resource=resource, **{"X-Extra": "1", "headers": {"a": "b"}}
    )
    with HeyGenHook() as hook:
        everything(hook, tmp_path)
    check_requests(wire)
    assert {(seen.method, re.sub(r"(od|ls|asset)_\w+|\?.*", "*", seen.path)) for seen in wire.seen} == {
        ("POST", "/v3/assets"),
        *((method, "/v3/assets/*") for method in ("GET", "DELETE")),
        ("GET", "/v3/api_keys/self"),
        *((method, f"/v3/{resource}/*") for method in ("GET", "PATCH", "DELETE")),
        ("POST", f"/v3/{resource}"),
        ("GET", f"/v3/{resource}*"),
    }
    name, other = "X-Api-Key", "Authorization"
    if auth_type == "oauth":
        name, other, password = other, name, f"Bearer {password}"
    usual = {"host", "accept", "accept-encoding", "connection", "content-length", "content-type"}
    for seen in wire.seen:
        assert seen.headers.get_all(name) == [password]
        assert seen.headers.get_all(other) is None
        assert seen.headers.get_all("User-Agent") == [f"airflow-provider-heygen/{__version__}"]
        allowed = (
            usual | {name.lower(), "user-agent"} | ({"idempotency-key"} if seen.method == "POST" else set())
        )
        assert {header.lower() for header in seen.headers} <= allowed
        assert seen.method != "POST" or re.fullmatch(
            r"[A-Za-z0-9_\-:.]{1,255}", seen.headers["Idempotency-Key"]
        )
    # A token has no scopes to ask for.
    assert all(record.status == 200 or record.path == "/v3/api_keys/self" for record in heygen.requests)


@both_resources
def test_all_fields_as_given(heygen, wire, resource):
    HeyGenHook().create_overdub(ALL_FIELDS, idempotency_key="k:1")
    assert json.loads(wire.seen[0].body) == ALL_FIELDS
    assert wire.seen[0].headers["Content-Type"] == "application/json"
    assert wire.seen[0].headers["Idempotency-Key"] == "k:1"
    assert heygen.jobs[0].request.model_dump(exclude_unset=True, exclude_none=True) == ALL_FIELDS


def test_what_is_not_given_is_left_out(wire):
    unset = dict.fromkeys(set(ALL_FIELDS) - set(REQUEST))
    HeyGenHook().create_overdub({**REQUEST, **unset}, idempotency_key="k:1")
    assert json.loads(wire.seen[0].body) == {
        "video": {"type": "url", "url": REQUEST["video"]},
        "audio": {"type": "url", "url": REQUEST["audio"]},
        # Set by the provider, to find the overdub if the response is lost.
        "callback_id": "k:1",
    }


def test_each_create_has_a_key_of_its_own(wire):
    for _ in range(2):
        HeyGenHook().create_overdub(REQUEST)
    keys = [seen.headers["Idempotency-Key"] for seen in wire.seen]
    assert len(set(keys)) == 2
    assert [json.loads(seen.body)["callback_id"] for seen in wire.seen] == keys


@pytest.mark.parametrize("auth_type", ["api_key", "oauth"])
def test_netrc_changes_nothing(heygen, wire, connect, tmp_path, monkeypatch, auth_type):
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password pw\ndefault login me password pw\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    answer = requests.get(f"{wire.url}/v3/overdubs", timeout=10)
    assert wire.seen.pop().headers["Authorization"].startswith("Basic "), "the file works"
    assert answer.status_code == 401
    connection = heygen.connection(auth_type=auth_type)
    connect(wire.url, connection["password"], auth_type=auth_type, allow_private_hosts=True)
    with HeyGenHook() as hook:
        everything(hook, tmp_path)
        hook.download_overdub(completed(heygen), tmp_path / "v.mp4")
    header = HeyGenHook().settings.auth_header
    for seen in wire.seen:
        sent = [
            (name, value) for name, value in seen.headers.items() if name in ("X-Api-Key", "Authorization")
        ]
        assert sent == ([] if seen.path.startswith("/files/") else [header])


def test_other_routes_by_the_session(heygen, wire):
    with HeyGenHook().get_conn() as session:
        key = session.get(f"{wire.url}/v3/api_keys/self", timeout=10).json()["data"]
        assert key["key_name"] == "emulator"
    (seen,) = wire.seen
    assert seen.headers["X-Api-Key"] == heygen.api_key
    assert seen.headers["User-Agent"].startswith("airflow-provider-heygen/")


# --- Retries ------------------------------------------------------------------------------------------

LOST_ANSWERS = {
    "dropped before": {"drop": "before"},
    "dropped after": {"drop": "after"},
    "cut off": {"drop_after_bytes": 5},
    "cut short": {"truncate": 5},
}
FAULTS = {
    "500": {"status": 500},
    "503": {"status": 503, "headers": {"Retry-After": "7"}},
    "502 in HTML": {"html": True},
    "429": {"status": 429, "headers": {"Retry-After": "7"}},
    "200 in HTML": {"status": 200, "html": True},
    **LOST_ANSWERS,
}
CALLS = {
    "get": lambda hook, overdub_id: hook.get_overdub(overdub_id).overdub_id,
    "list": lambda hook, _: hook.list_overdubs().data[0].overdub_id,
    "update": lambda hook, overdub_id: hook.update_overdub(overdub_id, "x").overdub_id,
    "delete": lambda hook, overdub_id: hook.delete_overdub(overdub_id),
    "aget": lambda hook, overdub_id: asyncio.run(hook.aget_overdub(overdub_id)).overdub_id,
    "alist": lambda hook, _: asyncio.run(hook.alist_overdubs()).data[0].overdub_id,
    "adelete": lambda hook, overdub_id: asyncio.run(hook.adelete_overdub(overdub_id)),
}


@pytest.mark.parametrize(("fault", "name"), each_value(FAULTS.values(), CALLS), ids=str)
def test_calls_survive(heygen, pauses, name, fault):
    hook = HeyGenHook()
    overdub_id = hook.create_overdub(REQUEST)
    heygen.fail_next(**fault)
    if name in ("delete", "adelete"):
        assert CALLS[name](hook, overdub_id) is None
        assert heygen.jobs[0].deleted
    else:
        assert CALLS[name](hook, overdub_id) == overdub_id
    (pause,) = pauses
    assert 7 <= pause <= 8.75 if "headers" in fault else 1 <= pause <= 1.25
    assert len(heygen.requests) == 3


@pytest.mark.parametrize("delete", ["delete", "adelete"])
def test_deleting_what_is_not_there(heygen, pauses, delete):
    with pytest.raises(HeyGenNotFoundError):
        CALLS[delete](HeyGenHook(), "od_1")
    heygen.fail_next(status=429)
    with pytest.raises(HeyGenNotFoundError):
        CALLS[delete](HeyGenHook(), "od_1")


@pytest.mark.parametrize("name", ["get", "delete", "alist"])
def test_calls_give_up(heygen, pauses, name):
    heygen.fail_next(status=503, count=100)
    with pytest.raises(HeyGenTransientError, match="503"):
        CALLS[name](HeyGenHook(), "od_1")
    assert len(heygen.requests) == 6
    for number, pause in enumerate(pauses):
        assert 2**number <= pause <= 1.25 * 2**number


@pytest.mark.parametrize(("status", "name"), each_value([400, 401, 402, 403, 404, 409, 413, 422], CALLS))
def test_permanent_errors_are_not_repeated(heygen, pauses, name, status):
    heygen.fail_next(status=status, count=100)
    with pytest.raises(HeyGenPermanentError):
        CALLS[name](HeyGenHook(), "od_1")
    assert (len(heygen.requests), pauses) == (1, [])


@pytest.mark.parametrize("name", ["create", "get", "aget", "adelete"])
def test_a_long_retry_after_is_raised_at_once(heygen, pauses, name):
    call = CALLS.get(name, lambda hook, _: hook.create_overdub(REQUEST))
    for told, raised_at_once in (("61", True), ("60", False)):
        heygen.clear_faults()
        heygen.fail_next(status=429, headers={"Retry-After": told}, count=100)
        pauses.clear()
        with pytest.raises(HeyGenTransientError) as raised:
            call(HeyGenHook(), "od_1")
        assert raised.value.retry_after == float(told)
        assert len(pauses) == (0 if raised_at_once else 5)
        assert all(60 <= pause <= 75 for pause in pauses)


@both_transports
def test_no_server_listens(connect, pauses, look):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    connect(url)
    with pytest.raises(HeyGenTransientError) as raised:
        look("od_1", max_attempts=3)
    assert f"during the GET of overdub 'od_1' at {url}, nothing was sent" in str(raised.value)
    assert not raised.value.outcome_unknown
    assert len(pauses) == 2
    pauses.clear()
    with pytest.raises(HeyGenTransientError, match=r"during the create request at .*, nothing was sent"):
        HeyGenHook(max_attempts=3).create_overdub(REQUEST)
    assert len(pauses) == 2


@both_transports
@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"garbage\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 5\r\n\r\nabcde",
        b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n\xff\xfe\xfd\xfc\xfb\xfa",
        b"HTTP/1.1 302 Found\r\nLocation: http://[\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 429 \xff\r\nRetry-After: \xff\r\nX-Request-Id: \xff\xff\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"a" * 100_000 + b"\r\n\r\n{}",
    ],
    ids=lambda answer: answer[:60].decode("latin-1"),
)
def test_broken_servers(listen, connect, pauses, look, answer):
    listener = listen(lambda _: answer)
    connect(listener.url)
    with pytest.raises(HeyGenError) as raised:
        look("od_1", max_attempts=2)
    str(raised.value).encode()


@both_transports
def test_a_response_that_arrives_slowly(connect, look):
    """It must not hold up a wait, or a worker, for ever."""

    def drip(server):
        client, _ = server.accept()
        with client, contextlib.suppress(OSError):
            client.recv(65536)
            client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 400\r\n\r\n")
            for byte in b'{"data": {}}'.ljust(400):
                client.sendall(bytes([byte]))
                time.sleep(0.01)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=drip, args=[server])
        thread.start()
        connect(f"http://127.0.0.1:{server.getsockname()[1]}", connect_timeout=0.2, read_timeout=0.2)
        with pytest.raises(HeyGenTransientError, match="no readable response arrived"):
            look("od_1", max_attempts=1)
        thread.join()


@both_transports
@pytest.mark.parametrize("coding", ["", "gzip"])
def test_a_response_that_is_too_large(listen, connect, monkeypatch, look, coding):
    """It must not fill the memory, on which all other tasks depend."""
    monkeypatch.setattr(transport, "MAX_RESPONSE_BYTES", 1 << 20)
    body = b'{"data": {"id": "od_1", "status": "running"}}'.ljust(2 << 20)
    body = gzip.compress(body) if coding else body
    head = f"HTTP/1.1 200 OK\r\nContent-Encoding: {coding}\r\nContent-Length: {len(body)}\r\n\r\n"
    connect(listen(lambda _: head.encode() + body).url)
    with pytest.raises(HeyGenTransientError, match="more than 1 MiB"):
        look("od_1", max_attempts=1)


# --- Exactly one overdub ------------------------------------------------------------------------------


def posts(wire, resource="overdubs"):
    return [seen for seen in wire.seen if (seen.method, seen.path) == ("POST", f"/v3/{resource}")]


CREATE_FAULTS = {
    **FAULTS,
    "409": {"status": 409, "code": "request_in_progress"},
    "no id": {"body": '{"data": {}}'},
}


# What is left to find the overdub by: ``callback_id_in_list`` and ``idempotency``.
MARKS = [(True, False), (False, True), (False, False)]
LOST_CREATES = ["dropped before", "dropped after", "cut short"]


@pytest.mark.parametrize(
    ("fault", "marks", "resource"),
    [
        (CREATE_FAULTS[fault], marks, resource)
        for (fault, marks), resource in each_value(
            [
                *((fault, marks) for fault in LOST_CREATES for marks in MARKS),
                *each_value([fault for fault in CREATE_FAULTS if fault not in LOST_CREATES], MARKS),
            ],
            ["overdubs", "lipsyncs"],
        )
    ],
    ids=str,
)
def test_one_overdub(heygen, wire, pauses, resource, marks, fault):
    callback_id_in_list, idempotency = marks
    heygen.behaviour.idempotency = idempotency
    heygen.behaviour.callback_id_in_list = callback_id_in_list
    # As in a batch: others of the same media before and after.
    others = [HeyGenHook().create_overdub(REQUEST) for _ in range(3)]
    wire.seen.clear()
    heygen.fail_next(method="POST", **fault)
    overdub_id = HeyGenHook().create_overdub(REQUEST, idempotency_key="k:1")
    assert [job.id for job in heygen.jobs] == [*others, overdub_id]
    for post in posts(wire, resource):
        assert post.headers["Idempotency-Key"] == "k:1"
        assert json.loads(post.body)["callback_id"] == "k:1"
    assert len(posts(wire, resource)) <= 2
    check_requests(wire)


@pytest.mark.parametrize(
    ("list_order", "callback_id_in_list", "drop"),
    [
        ("desc", True, "after"),
        ("asc", True, "before"),
        ("shuffle", True, "after"),
        ("desc", False, "before"),
        ("asc", False, "after"),
        ("shuffle", False, "after"),
    ],
)
def test_one_overdub_among_many(heygen, pauses, list_order, callback_id_in_list, drop):
    heygen.behaviour.idempotency = False
    heygen.behaviour.list_order = list_order
    heygen.behaviour.callback_id_in_list = callback_id_in_list
    fill(heygen, 120)
    heygen.fail_next(method="POST", drop=drop)
    try:
        overdub_id = HeyGenHook().create_overdub(REQUEST)
    except HeyGenOutcomeUnknownError:
        # Too many to GET one by one: a second one must not be started then.
        assert not callback_id_in_list
        assert len(heygen.jobs) == (121 if drop == "after" else 120)
    else:
        assert len(heygen.jobs) == 121
        assert heygen.jobs[-1].id == overdub_id


def fill(heygen, number, resource="overdubs"):
    """Create overdubs as another client would."""
    body = {name: {"type": "url", "url": url} for name, url in REQUEST.items()}
    with requests.Session() as session:
        session.headers["X-Api-Key"] = heygen.api_key
        for index in range(number):
            session.post(
                f"{heygen.url}/v3/{resource}", json=body | {"callback_id": f"other-{index}"}, timeout=10
            )
    assert len(heygen.jobs) >= number


@pytest.mark.parametrize("idempotency", [True, False], ids=["key", "no key"])
def test_several_faults_in_a_row(heygen, wire, pauses, idempotency):
    heygen.behaviour.idempotency = idempotency
    for fault in ({"status": 429}, {"status": 503}, {"drop": "before"}, {"drop": "after"}):
        heygen.fail_next(method="POST", **fault)
    heygen.fail_next(method="GET", status=500)
    overdub_id = HeyGenHook().create_overdub(REQUEST)
    assert [job.id for job in heygen.jobs] == [overdub_id]
    assert len({post.headers["Idempotency-Key"] for post in posts(wire)}) == 1
    assert {json.loads(post.body)["callback_id"] for post in posts(wire)} == {
        heygen.jobs[0].request.callback_id
    }


def test_a_slow_create(heygen, connect, pauses):
    """The client times out while HeyGen still processes the request, as a proxy with a short timeout does."""
    heygen.behaviour.idempotency = False
    connect(heygen.url, write_timeout=0.1)
    heygen.fail_next(method="POST", latency=1)
    overdub_id = HeyGenHook().create_overdub(REQUEST)
    assert [job.id for job in heygen.jobs] == [overdub_id]


def test_a_create_still_in_progress(heygen, connect, monkeypatch):
    """The delays are real: the key is rejected, and the list is empty, until HeyGen has finished."""
    connect(heygen.url, write_timeout=0.1)
    heygen.behaviour.create_latency = 2  # long enough for a second request on a busy machine
    monkeypatch.setattr(module, "_retry_delay", lambda _: 0.1)
    overdub_id = HeyGenHook(max_attempts=100).create_overdub(REQUEST)
    assert [job.id for job in heygen.jobs] == [overdub_id]
    assert {record.status for record in heygen.requests if record.method == "POST"} >= {409}


def test_a_create_that_is_late(heygen, connect, monkeypatch):
    """Without the key, what is not in the list yet must be waited for."""
    connect(heygen.url, write_timeout=0.1)
    heygen.behaviour.idempotency = False
    heygen.behaviour.create_latency = 0.4
    monkeypatch.setattr(module, "_retry_delay", lambda _: 0.1)
    monkeypatch.setattr(module, "SETTLE_SECONDS", 1.0)
    overdub_id = HeyGenHook().create_overdub(REQUEST)
    assert [job.id for job in heygen.jobs] == [overdub_id]


def test_tls_that_breaks_while_the_response_is_read(heygen, listen, connect, pauses, tmp_path):
    """That it is a fault of TLS does not mean that nothing was sent."""
    heygen.behaviour.idempotency = False
    authority = Authority(tmp_path)
    pass_on = forward(heygen.url)
    broken = []

    def answer(seen):
        status_headers_body = pass_on(seen)
        if seen.method == "POST" and not broken:
            broken.append(seen)
            return b"HTTP/1.1 200 OK\r\n\r\n"  # in the clear
        return status_headers_body

    gateway = listen(answer, tls=authority.server())
    connect(gateway.url, verify=authority.file)
    overdub_id = HeyGenHook().create_overdub(REQUEST)
    assert broken
    assert [job.id for job in heygen.jobs] == [overdub_id]


@pytest.mark.parametrize(
    ("name", "resource", "idempotency"),
    [
        ("dropped before", "overdubs", True),
        ("dropped before", "lipsyncs", False),
        ("dropped after", "overdubs", False),
        ("dropped after", "lipsyncs", True),
        ("dropped after", "lipsyncs", False),
        ("cut off", "overdubs", True),
        ("cut short", "lipsyncs", False),
    ],
)
def test_an_authors_callback_id_proves_nothing(heygen, wire, pauses, resource, idempotency, name):
    fault = LOST_ANSWERS[name]
    heygen.behaviour.idempotency = idempotency
    mine = {**REQUEST, "callback_id": "mine"}
    sibling = HeyGenHook().create_overdub(mine)
    wire.seen.clear()
    heygen.fail_next(method="POST", **fault)
    try:
        overdub_id = HeyGenHook().create_overdub(mine)
    except HeyGenOutcomeUnknownError as raised:
        refusal = str(raised)
        assert resource == "overdubs", "lipsyncs are documented to know the key"
        assert sibling in refusal
        assert len(posts(wire, resource)) == 1
    else:
        assert resource == "lipsyncs"
        assert overdub_id != sibling
        assert overdub_id == heygen.jobs[-1].id
        assert len(heygen.jobs) == (2 if idempotency or "before" in fault.values() else 3)
    for post in posts(wire, resource):
        assert json.loads(post.body)["callback_id"] == "mine"


def test_an_authors_callback_id_that_no_overdub_has(heygen, wire, pauses):
    """With no candidate in the list nothing was created."""
    heygen.fail_next(method="POST", drop="before")
    overdub_id = HeyGenHook().create_overdub({**REQUEST, "callback_id": "mine"})
    assert [job.id for job in heygen.jobs] == [overdub_id]
    assert [json.loads(post.body)["callback_id"] for post in posts(wire)] == ["mine", "mine"]


def test_the_list_cannot_be_read_after_a_lost_response(heygen, wire, pauses):
    heygen.behaviour.idempotency = False
    heygen.fail_next(method="POST", drop="after")
    heygen.fail_next(method="GET", status=403, count=100)
    with pytest.raises(HeyGenOutcomeUnknownError, match="403"):
        HeyGenHook().create_overdub(REQUEST)
    assert len(heygen.jobs) == 1


def test_heygen_is_unreachable_after_a_lost_response(heygen, wire, pauses):
    heygen.behaviour.idempotency = False
    heygen.fail_next(method="POST", drop="after")
    heygen.fail_next(status=503, count=1000)
    with pytest.raises(HeyGenTransientError) as raised:
        HeyGenHook().create_overdub(REQUEST)
    assert raised.value.outcome_unknown, "so that the caller does not take it for a refusal"
    assert len(heygen.jobs) == 1
    # A worker must not hang on for long: attempts must not multiply attempts.
    assert sum(pauses) < 600


def test_a_rejected_create_request_is_not_searched_for(heygen, wire, pauses):
    heygen.fail_next(method="POST", status=402)
    with pytest.raises(HeyGenPermanentError, match="Top up"):
        HeyGenHook().create_overdub(REQUEST)
    heygen.fail_next(method="POST", status=429, count=2)
    HeyGenHook().create_overdub(REQUEST)
    assert [seen.method for seen in wire.seen] == ["POST"] * 4


# --- The search for a lost create request ---------------------------------------------------------------


class Clock:
    """The worker's clock: off HeyGen's by some seconds, and never slept by."""

    def __init__(self, ahead=0.0):
        self.ahead = ahead
        self.slept = []

    def time(self):
        return time.time() + self.ahead

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.ahead += seconds


@pytest.mark.parametrize("drop", ["before", "after"])
@pytest.mark.parametrize(
    ("callback_id_in_list", "most"), [(True, 20), (False, 60)], ids=["listed", "not listed"]
)
def test_a_lost_response_costs_few_requests(heygen, pauses, monkeypatch, drop, callback_id_in_list, most):
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(module, "SETTLE_SECONDS", 45)
    heygen.behaviour.idempotency = False
    heygen.behaviour.callback_id_in_list = callback_id_in_list
    fill(heygen, 150)
    before = len(heygen.requests)
    heygen.fail_next(method="POST", drop=drop)
    try:
        overdub_id = HeyGenHook().create_overdub(REQUEST)
    except HeyGenOutcomeUnknownError:
        assert (drop, callback_id_in_list) == ("before", False), "the overdub is there, nearest to its time"
    else:
        assert heygen.jobs[-1].id == overdub_id
        assert len(heygen.jobs) == 151
    assert len(heygen.requests) - before <= most


@pytest.mark.parametrize(("list_order", "drop", "pages"), [("desc", "before", 1), ("asc", "after", 3)])
def test_old_overdubs_end_the_search_where_the_newest_come_first(
    heygen, wire, pauses, monkeypatch, list_order, drop, pages
):
    monkeypatch.setattr(module, "SETTLE_SECONDS", 0.0)
    heygen.behaviour.idempotency = False
    heygen.behaviour.list_order = list_order
    fill(heygen, 250)
    for number, job in enumerate(heygen.jobs):
        job.created_at = time.time() - 86400 + number
    wire.seen.clear()
    heygen.fail_next(method="POST", drop=drop)
    assert HeyGenHook().create_overdub(REQUEST) == heygen.jobs[-1].id
    assert len(heygen.jobs) == 251
    assert sum(seen.path.startswith("/v3/overdubs?") for seen in wire.seen) == pages


@pytest.mark.parametrize("old", [0, 3])
def test_a_date_that_is_seconds_old(heygen, pauses, monkeypatch, old):
    """As of a server under load, while others start twenty overdubs a second."""
    heygen.behaviour.idempotency = False
    heygen.behaviour.callback_id_in_list = False
    fill(heygen, 150)
    for age, job in enumerate(reversed(heygen.jobs)):
        job.created_at = time.time() - age / 20
    read = module.api._http_date
    monkeypatch.setattr(module.api, "_http_date", lambda value: read(value) - old)
    heygen.fail_next(method="POST", drop="after")
    assert HeyGenHook().create_overdub(REQUEST) == heygen.jobs[-1].id
    assert len(heygen.jobs) == 151


@pytest.mark.parametrize(
    ("ahead", "callback_id_in_list", "list_order"),
    [
        (-86400, True, "asc"),
        (-86400, False, "desc"),
        (-600, False, "asc"),
        (290, True, "desc"),
        (600, False, "desc"),
        (86400, True, "desc"),
        (86400, False, "asc"),
    ],
)
def test_a_clock_that_is_off(heygen, pauses, monkeypatch, ahead, callback_id_in_list, list_order):
    heygen.behaviour.idempotency = False
    heygen.behaviour.list_order = list_order
    heygen.behaviour.callback_id_in_list = callback_id_in_list
    monkeypatch.setattr(module, "time", Clock(ahead))
    fill(heygen, 5)
    heygen.fail_next(method="POST", drop="after")
    assert HeyGenHook().create_overdub(REQUEST) == heygen.jobs[-1].id
    assert len(heygen.jobs) == 6


def test_the_search_keeps_to_the_connections_rate(heygen, connect, pauses, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    connect(heygen.url, max_requests_per_second=2)
    heygen.behaviour.idempotency = False
    heygen.behaviour.callback_id_in_list = False
    fill(heygen, 10)
    heygen.fail_next(method="POST", drop="after")
    HeyGenHook().create_overdub(REQUEST)
    assert clock.slept
    assert set(clock.slept) == {0.5}


def test_what_cannot_be_determined_ends_the_search_at_its_bound(heygen, pauses, monkeypatch):
    monkeypatch.setattr(module, "MAX_SEARCH_PAGES", 1)
    heygen.behaviour.idempotency = False
    fill(heygen, 101)
    heygen.fail_next(method="POST", drop="before")
    with pytest.raises(HeyGenOutcomeUnknownError, match="too long"):
        HeyGenHook().create_overdub(REQUEST)
    assert len(heygen.jobs) == 101


@pytest.mark.parametrize(("hours", "trusted"), [(1, True), (25, False)])
@pytest.mark.parametrize("resource", ["lipsyncs"])
def test_a_key_is_trusted_for_a_day(heygen, hours, trusted):
    request = module.api.CreateOverdubRequest.of({**REQUEST, "callback_id": "nightly"})
    HeyGenHook().create_overdub(request)
    since = time.time() - 3600 * hours
    if trusted:
        assert HeyGenHook().find_created(request, "k:1", since=since, sent_at=since) is None
    else:
        with pytest.raises(HeyGenOutcomeUnknownError):
            HeyGenHook().find_created(request, "k:1", since=since, sent_at=since)


@pytest.mark.parametrize("rows", [[], [{"id": "od_2"}]], ids=["no rows", "rows"])
@pytest.mark.parametrize(
    "error", [{"code": 500, "message": "no database"}, "no database"], ids=["code", "text"]
)
def test_a_list_with_an_error_is_not_complete(connect, listen, rows, error):
    """An overdub that it lacks may exist, so nothing is gone and no create request is repeated."""
    body = json.dumps({"data": rows, "has_more": False, "error": error}).encode()
    connect(listen(lambda _: (200, {}, body)).url)
    hook = HeyGenHook(max_attempts=1)
    assert hook.is_listed("od_1") is None
    with pytest.raises(HeyGenTransientError, match="more overdubs"):
        hook.find_created(CreateOverdubRequest.of(REQUEST), "key", since=time.time())


def test_is_listed(heygen):
    fill(heygen, 120)
    assert HeyGenHook().is_listed(heygen.jobs[0].id) is True
    assert HeyGenHook().is_listed("od_1") is False
    heygen.fail_next(method="GET", status=403)
    assert HeyGenHook().is_listed("od_1") is None


@pytest.mark.parametrize("tokens", [["1", "1"], ["1", "2", "1"]], ids=str)
def test_a_list_with_circular_cursors_proves_nothing(heygen, tokens):
    """It was not read to its end, so what is not in it may be there."""
    rows = [{"id": "a", "status": "running", "callback_id": "other"}]
    for token in tokens * 2:
        heygen.fail_next(method="GET", body=json.dumps({"data": rows, "next_token": token}))
    assert HeyGenHook().is_listed("od_1") is None
    heygen.clear_faults()
    for token in tokens * 2:
        heygen.fail_next(method="GET", body=json.dumps({"data": rows, "next_token": token}))
    request = module.api.CreateOverdubRequest.of({**REQUEST, "callback_id": "k:1"})
    with pytest.raises(HeyGenOutcomeUnknownError, match="to its end"):
        HeyGenHook().find_created(request, "k:1", since=time.time(), sent_at=time.time())


def test_same_key_same_overdub(heygen):
    first = HeyGenHook().create_overdub(REQUEST, idempotency_key="k:1")
    assert HeyGenHook().create_overdub(REQUEST, idempotency_key="k:1") == first
    assert HeyGenHook().create_overdub(REQUEST, idempotency_key="k:2") != first


# --- Lists --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("page_size", "list_order", "resource"),
    [
        (7, "desc", "overdubs"),
        (7, "asc", "lipsyncs"),
        (7, "shuffle", "overdubs"),
        (1, "asc", "overdubs"),
        (100, "desc", "lipsyncs"),
    ],
)
def test_iter_yields_each_once(heygen, resource, list_order, page_size):
    heygen.behaviour.list_order = list_order
    fill(heygen, 20, resource)
    heygen.requests_by_route.clear()
    before = len(heygen.requests)
    ids = [overdub.overdub_id for overdub in HeyGenHook().iter_overdubs(page_size)]
    assert len(ids) == 20
    assert set(ids) == {job.id for job in heygen.jobs}
    lists = heygen.requests[before:]
    assert len(lists) == -(-20 // page_size)
    assert all(f"limit={page_size}" in request.query for request in lists)


@pytest.mark.parametrize("list_order", ["desc", "asc"])
def test_iter_while_jobs_are_created(heygen, list_order):
    heygen.behaviour.list_order = list_order
    fill(heygen, 9)
    old = {job.id for job in heygen.jobs}
    ids = []
    for count, overdub in enumerate(HeyGenHook().iter_overdubs(3)):
        ids.append(overdub.overdub_id)
        if count < 6:
            fill(heygen, 1)
    assert len(ids) == len(set(ids))
    assert old <= set(ids)


def page(*ids, **members):
    return {"body": json.dumps({"data": [{"id": overdub_id} for overdub_id in ids], **members})}


def test_iter_over_pages_that_shift(heygen):
    heygen.fail_next(**page("a", "b", has_more=True, next_token="1"))
    heygen.fail_next(**page("b", "c", has_more=True, next_token="2"))
    heygen.fail_next(**page("c", "d", has_more=False, next_token="3"))
    assert [overdub.overdub_id for overdub in HeyGenHook().iter_overdubs()] == ["a", "b", "c", "d"]
    assert [request.query for request in heygen.requests] == [
        "limit=100",
        "limit=100&token=1",
        "limit=100&token=2",
    ]


@pytest.mark.parametrize(
    "pages",
    [
        [page("a", has_more=False, next_token="1")],
        [page("a", has_more=True, next_token="1"), page("a", has_more=True, next_token="1")],
        [page("a", next_token="1"), page("b", next_token="2"), page("b", next_token="1")],
        [page("a", next_token="1"), page(next_token=None)],
    ],
    ids=[
        "no more, token",
        "same token",
        "a circle of tokens",
        "empty page",
    ],
)
def test_iter_ends(heygen, pages):
    for fault in pages:
        heygen.fail_next(**fault)
    ids = [overdub.overdub_id for overdub in HeyGenHook().iter_overdubs()]
    assert ids == sorted(set(ids))
    assert len(heygen.requests) == len(pages)


@pytest.mark.parametrize(
    ("pages", "message"),
    [
        ([page("a", has_more=True, next_token=None)], "has no 'next_token'"),
        ([page("a", has_more=True)], "has no 'next_token'"),
        ([page(has_more=True, next_token=str(number)) for number in range(20)], "does not end: 11 pages"),
    ],
    ids=["no token", "no member", "empty pages"],
)
def test_a_list_that_cannot_be_read_to_its_end(heygen, pages, message):
    for fault in pages:
        heygen.fail_next(**fault)
    with pytest.raises(HeyGenTransientError, match=message):
        list(HeyGenHook().iter_overdubs())
    heygen.clear_faults()
    for fault in pages:
        heygen.fail_next(**fault)
    assert HeyGenHook().is_listed("b") is None


def test_iter_reads_no_page_too_early(heygen):
    fill(heygen, 4)
    before = len(heygen.requests)
    overdubs = HeyGenHook().iter_overdubs(2)
    next(overdubs)
    next(overdubs)
    assert len(heygen.requests) == before + 1


def test_odd_token_arrives_as_it_is(heygen):
    heygen.fail_next(count=2, **page())
    token = "a+b/c=&d e?#%2f\u00e9"
    HeyGenHook().list_overdubs(5, token)
    asyncio.run(HeyGenHook().alist_overdubs(5, token))
    queries = [requests.compat.urlsplit(f"?{request.query}").query for request in heygen.requests]
    assert [requests.compat.unquote_plus(query) for query in queries] == [f"limit=5&token={token}"] * 2


@both_resources
@pytest.mark.parametrize("status", ["pending", "running", "completed", "failed"])
@pytest.mark.parametrize("extra_members", [True, False])
def test_sync_and_async_agree(heygen, resource, status, extra_members):
    heygen.behaviour.extra_members = extra_members
    hook = HeyGenHook()
    overdub_id = hook.create_overdub({**REQUEST, "title": "T", "callback_id": "mine"})
    wait_for(heygen, overdub_id)
    heygen.force(overdub_id, status, "Too dark")
    found = hook.get_overdub(overdub_id)
    assert (found.overdub_id, found.status, found.title) == (overdub_id, status, "T")
    assert found.failure_message == ("Too dark" if status == "failed" else None)
    assert (found.video_url is not None) == (status == "completed")
    assert (found.caption_url is not None) == (status == "completed" and resource == "lipsyncs")
    links = {"video_url": None, "caption_url": None}  # each GET returns new ones
    afound = asyncio.run(hook.aget_overdub(overdub_id))
    assert afound.model_copy(update=links) == found.model_copy(update=links)
    (row,), (arow,) = hook.list_overdubs().data, asyncio.run(hook.alist_overdubs()).data
    assert row.model_copy(update=links) == arow.model_copy(update=links) == found.model_copy(update=links)


def until(condition):
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.005)
    raise AssertionError("It did not happen.")


def wait_for(heygen, overdub_id):
    """Wait until the emulator has made the video."""
    job = next(job for job in heygen.jobs if job.id == overdub_id)
    until(lambda: job.output is not None)


def completed(heygen, hook=None):
    overdub_id = (hook or HeyGenHook()).create_overdub(REQUEST)
    wait_for(heygen, overdub_id)
    heygen.force(overdub_id, "completed")
    return overdub_id


def test_update_and_delete(heygen):
    hook = HeyGenHook()
    overdub_id = hook.create_overdub({**REQUEST, "title": "Old"})
    assert hook.update_overdub(overdub_id, " New \U0001f3ac").title == " New \U0001f3ac"
    assert heygen.jobs[0].title == " New \U0001f3ac"
    assert hook.delete_overdub(overdub_id) is None
    assert heygen.jobs[0].deleted
    with pytest.raises(HeyGenNotFoundError):
        hook.get_overdub(overdub_id)


# --- Sessions -----------------------------------------------------------------------------------------


def test_a_hook_keeps_its_connection(wire):
    with HeyGenHook() as hook:
        for _ in range(3):
            hook.list_overdubs()
        session = hook._session
    assert len({seen.client for seen in wire.seen}) == 1
    hook.list_overdubs()
    assert hook._session is not session
    hook.close()
    hook.close()


@pytest.fixture
def no_leak(caplog):
    """No aiohttp connection stays open, and no unused session is kept."""
    with caplog.at_level(logging.ERROR, "asyncio"):
        yield
        gc.collect()
    assert [record.message for record in caplog.records if "Unclosed" in record.message] == []
    assert not any(transport._sessions.values())


no_warnings = pytest.mark.filterwarnings("error::ResourceWarning")


def sessions():
    return transport._sessions.get(asyncio.get_running_loop(), {})


@no_warnings
def test_many_hooks_share_a_session(heygen, wire, no_leak):
    async def one(overdub_id):
        async with HeyGenHook() as hook:
            for _ in range(3):
                await hook.aget_overdub(overdub_id)
            await asyncio.sleep(0)

    async def main():
        overdub_id = HeyGenHook().create_overdub(REQUEST)
        async with HeyGenHook() as first:
            (shared,) = sessions().values()
            await asyncio.gather(*(one(overdub_id) for _ in range(50)))
            assert list(sessions().values()) == [shared]
            assert shared.users == 1
            await first.aget_overdub(overdub_id)
            assert not shared.session.closed
        assert shared.session.closed
        assert sessions() == {}

    asyncio.run(main())
    assert len({seen.client for seen in wire.seen}) <= 1 + 20


@no_warnings
def test_the_first_to_come_may_be_the_first_to_leave(heygen, no_leak):
    async def main():
        first, second = HeyGenHook(), HeyGenHook()
        await first.__aenter__()
        await second.__aenter__()
        await first.__aexit__(None, None, None)
        await second.alist_overdubs()
        await second.__aexit__(None, None, None)
        assert sessions() == {}

    asyncio.run(main())


@no_warnings
def test_one_hook_entered_twice(heygen, no_leak):
    async def main():
        hook = HeyGenHook()
        async with hook:
            async with hook:
                await hook.alist_overdubs()
            await hook.alist_overdubs()
            (shared,) = sessions().values()
        assert shared.session.closed
        assert sessions() == {}

    asyncio.run(main())


@no_warnings
def test_a_hook_can_be_entered_again(heygen, no_leak):
    async def main():
        hook = HeyGenHook()
        for _ in range(2):
            async with hook:
                await hook.alist_overdubs()
        await hook.alist_overdubs()

    asyncio.run(main())


@no_warnings
def test_no_session_is_left_after_trouble(heygen, connect, no_leak):
    async def main():
        with pytest.raises(ZeroDivisionError):
            async with HeyGenHook():
                _ = 1 / 0
        with pytest.raises(HeyGenNotFoundError):
            async with HeyGenHook() as hook:
                await hook.aget_overdub("od_1")
        heygen.fail_next(latency=5, count=2)
        tasks = [asyncio.create_task(HeyGenHook().aget_overdub("od_1")) for _ in range(2)]
        await asyncio.to_thread(until, lambda: len(heygen.requests) == 3)
        for task in tasks:
            task.cancel()
        assert all(
            isinstance(end, asyncio.CancelledError)
            for end in await asyncio.gather(*tasks, return_exceptions=True)
        )
        assert sessions() == {}
        connect("https://127.0.0.1:1", verify="/nowhere/ca.pem")
        with pytest.raises(HeyGenBadInputError, match="'verify'"):
            async with HeyGenHook():
                pass
        assert sessions() == {}

    asyncio.run(main())


@no_warnings
def test_different_settings_do_not_share(heygen, connect, no_leak):
    async def main():
        async with HeyGenHook():
            connect(heygen.url, trust_env=False)
            async with HeyGenHook():
                assert len(sessions()) == 2

    asyncio.run(main())


@no_warnings
def test_a_new_key_is_used_in_a_shared_session(heygen, wire, connect, no_leak):
    async def main():
        async with HeyGenHook() as old:
            await old.alist_overdubs()
            connect(wire.url, heygen.oauth_token, auth_type="oauth")
            async with HeyGenHook() as new:
                await new.alist_overdubs()
                assert len(sessions()) == 1

    asyncio.run(main())
    assert [record.credential for record in heygen.requests] == ["api_key", "oauth"]


@no_warnings
def test_two_loops_do_not_mix(heygen, no_leak):
    overdub_id = HeyGenHook().create_overdub(REQUEST)
    both_in = threading.Barrier(2, timeout=30)
    found, trouble = [], []

    async def main():
        async with HeyGenHook() as hook:
            await hook.aget_overdub(overdub_id)
            (shared,) = sessions().values()
            found.append(shared.session)
            await asyncio.to_thread(both_in.wait)
            await hook.aget_overdub(overdub_id)
            await asyncio.to_thread(both_in.wait)

    def run():
        try:
            asyncio.run(main())
        except BaseException as error:
            trouble.append(error)
            both_in.abort()

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert trouble == []
    assert len(set(map(id, found))) == 2
    assert all(session.closed for session in found)


@no_warnings
def test_nothing_is_left_open_with_tls(heygen, listen, connect, tmp_path, no_leak):
    authority = Authority(tmp_path)
    gateway = listen(forward(heygen.url), tls=authority.server())
    connect(gateway.url, verify=authority.file)

    async def main():
        async with HeyGenHook() as hook:
            await asyncio.gather(*(hook.alist_overdubs() for _ in range(5)))

    asyncio.run(main())
    assert len(gateway.seen) == 5


def test_cookies_are_not_kept(listen, connect):
    body = json.dumps({"data": []}).encode()
    server = listen(lambda _: (200, {"Set-Cookie": "affinity=1; Path=/"}, body))
    connect(server.url)

    async def main():
        async with HeyGenHook() as hook:
            await hook.alist_overdubs()
            await hook.alist_overdubs()

    asyncio.run(main())
    assert [seen.headers["Cookie"] for seen in server.seen] == [None, None]


def test_no_error_names_the_key(heygen, listen, connect, pauses):
    """Not even if the server or the network library quotes it."""
    echo = listen(
        lambda seen: (400, {}, json.dumps({"error": {"message": str(dict(seen.headers))}}).encode())
    )
    connect(echo.url, "sk-very-secret")
    for look in (get, aget):
        with pytest.raises(HeyGenPermanentError) as raised:
            look("od_1")
        assert "***" in str(raised.value)
        assert "sk-very-secret" not in f"{raised.value!r} {vars(raised.value)}"


# --- Uploads ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "resource"),
    each_value(
        ["with space.wav", "T\u00edtulo \U0001f3ac.wav", "a\"b'c;d.wav", "none"], ["overdubs", "lipsyncs"]
    ),
)
def test_upload(heygen, wire, tmp_path, resource, name):
    path = write_sound(tmp_path / name, 150_000)
    for source in (path, str(path), f"file://{path}"):
        asset = HeyGenHook().upload_asset(source)
        assert (asset.size_bytes, asset.mime_type) == (300_044, "audio/wav")
        assert requests.get(asset.url, timeout=10).content == path.read_bytes()
    seen = wire.seen[0]
    assert (seen.method, seen.path) == ("POST", "/v3/assets")
    request = EnvironBuilder(method="POST", headers=list(seen.headers.items()), data=seen.body).get_request()
    assert list(request.form) == []
    assert list(request.files) == ["file"]
    assert request.files["file"].read() == path.read_bytes()
    overdub_id = HeyGenHook().create_overdub(
        {**REQUEST, "audio": {"type": "asset_id", "asset_id": asset.asset_id}}
    )
    assert heygen.jobs[0].id == overdub_id


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_upload_survives(heygen, wire, pauses, tmp_path, fault):
    path = write_sound(tmp_path / "a.wav", 100_000)
    heygen.fail_next(**fault)
    asset = HeyGenHook().upload_asset(path)
    assert requests.get(asset.url, timeout=10).content == path.read_bytes()
    first, second = [seen for seen in wire.seen if seen.method == "POST"]
    assert first.headers["Idempotency-Key"] == second.headers["Idempotency-Key"]
    assert len(pauses) == 1


def test_the_largest_upload(heygen, tmp_path):
    path = write_sound(tmp_path / "a.wav")
    with path.open("r+b") as file:
        file.truncate(32 * 2**20)
    assert HeyGenHook().upload_asset(path).size_bytes == 32 * 2**20


def test_a_rejected_upload(heygen, pauses, tmp_path):
    path = write_sound(tmp_path / "a.wav")
    error = {"code": "invalid_parameter", "message": "We do not like it", "param": "file"}
    heygen.fail_next(status=400, body=json.dumps({"error": error}))
    with pytest.raises(HeyGenPermanentError, match=r"400 invalid_parameter for the upload.*field 'file'"):
        HeyGenHook().upload_asset(path)
    assert pauses == []


# --- HeyGen's name for the resource -------------------------------------------------------------------


def asked(wire):
    """The requests as ``METHOD name/item`` with the names' first letters."""
    found = []
    for seen in wire.seen:
        name, _, item = seen.path.removeprefix("/v3/").partition("?")[0].partition("/")
        found.append(f"{seen.method} {name[0]}{'/id' if item else ''}")
    return found


@pytest.fixture
def unnamed(wire, connect):
    """The connection does not have the extra 'resource'."""
    connect(wire.url, allow_private_hosts=True, max_requests_per_second=200)
    return wire


@pytest.fixture
def elsewhere(heygen, unnamed):
    """Another client's overdub, on a HeyGen that knows the newer name only."""
    fill(heygen, 1, "lipsyncs")
    heygen.behaviour.resources = "lipsyncs"
    return heygen.jobs[0].id


def page_404(wire, *, only=lambda seen: True, times=10**9):
    """Have a gateway respond with a 404 page under ``overdubs``, whatever HeyGen did."""
    pass_on, left = wire.answer, [times]

    def answer(seen):
        response = pass_on(seen)
        if seen.path.startswith("/v3/overdubs") and only(seen) and left[0]:
            left[0] -= 1
            return 404, {"Content-Type": "text/html"}, b"<html>Not Found</html>"
        return response

    wire.answer = answer


def test_no_further_request_while_overdubs_responds(heygen, unnamed, tmp_path):
    with HeyGenHook() as hook:
        assert (hook.known_resource, hook.resource) == (None, "overdubs")
        overdub_id = hook.create_overdub(REQUEST)
        hook.get_overdub(overdub_id)
        hook.list_overdubs()
        assert hook.known_resource == "overdubs"
        with pytest.raises(HeyGenNotFoundError):
            hook.get_overdub("od_1")
    assert asked(unnamed) == ["POST o", "GET o/id", "GET o", "GET o/id"]


FIRST_CALLS = {
    "create": (lambda hook, _: hook.create_overdub(REQUEST), ["POST o", "GET l", "POST l"]),
    "get": (lambda hook, key: hook.get_overdub(key), ["GET o/id", "GET o", "GET l", "GET l/id"]),
    "list": (lambda hook, _: hook.list_overdubs(), ["GET o", "GET l", "GET l"]),
    "update": (
        lambda hook, key: hook.update_overdub(key, "T"),
        ["PATCH o/id", "GET o", "GET l", "PATCH l/id"],
    ),
    "delete": (lambda hook, key: hook.delete_overdub(key), ["DELETE o/id", "GET o", "GET l", "DELETE l/id"]),
    "test": (lambda hook, _: hook.test_connection(), ["GET o", "GET l", "GET l", "GET a/id"]),
    "aget": (
        lambda hook, key: asyncio.run(hook.aget_overdub(key)),
        ["GET o/id", "GET o", "GET l", "GET l/id"],
    ),
    "alist": (lambda hook, _: asyncio.run(hook.alist_overdubs()), ["GET o", "GET l", "GET l"]),
    "adelete": (
        lambda hook, key: asyncio.run(hook.adelete_overdub(key)),
        ["DELETE o/id", "GET o", "GET l", "DELETE l/id"],
    ),
}


@pytest.mark.parametrize(
    ("name", "page"),
    [*((name, False) for name in FIRST_CALLS), *((name, True) for name in ("create", "get", "list", "aget"))],
)
def test_the_other_name_is_found_once(heygen, unnamed, pauses, elsewhere, name, page):
    call, requests = FIRST_CALLS[name]
    if page:
        page_404(unnamed)
    call(HeyGenHook(), elsewhere)
    assert HeyGenHook().resource == "lipsyncs"
    if not page:
        assert asked(unnamed) == requests
    elif "GET o/id" not in requests:
        assert "GET l" in asked(unnamed)
    unnamed.seen.clear()
    HeyGenHook().create_overdub(REQUEST)
    assert asked(unnamed) == ["POST l"], "what was found is kept"


def redirect_to_the_other_name(wire, status=308, host=""):
    """Have HeyGen redirect from ``overdubs`` to ``lipsyncs``, as it may have done since the rename."""
    pass_on = wire.answer

    def answer(seen):
        if not seen.path.startswith("/v3/overdubs"):
            return pass_on(seen)
        return status, {"Location": host + seen.path.replace("overdubs", "lipsyncs")}, b""

    wire.answer = answer


@pytest.mark.parametrize("name", FIRST_CALLS)
@pytest.mark.parametrize(("status", "host"), [(301, ""), (308, "http://api.heygen.com")])
def test_a_redirect_to_the_other_name(heygen, unnamed, pauses, elsewhere, name, status, host):
    call, requests = FIRST_CALLS[name]
    redirect_to_the_other_name(unnamed, status, host)
    call(HeyGenHook(), elsewhere)
    assert asked(unnamed) == requests
    assert pauses == []


@pytest.mark.parametrize("status", [302, 303])
def test_a_redirect_after_the_effect_is_no_other_name(unnamed, pauses, status):
    redirect_to_the_other_name(unnamed, status)
    with pytest.raises(HeyGenGatewayError) as raised:
        HeyGenHook(max_attempts=1).create_overdub(REQUEST)
    assert raised.value.outcome_unknown
    assert asked(unnamed) == ["POST o"]


@pytest.mark.parametrize("resource", ["overdubs"])
def test_a_redirect_from_a_name_that_is_set(wire):
    redirect_to_the_other_name(wire)
    for call in (lambda hook: hook.create_overdub(REQUEST), lambda hook: hook.get_overdub("od_1")):
        with pytest.raises(HeyGenPermanentError, match=r"other name.*Remove the extra 'resource'"):
            call(HeyGenHook())


def test_calls_at_the_same_time_find_the_same_name(unnamed, elsewhere):
    """The slower one has its 404 when the name is found already."""
    pass_on, found = unnamed.answer, threading.Event()

    def answer(seen):
        if asked(unnamed).count("GET o/id") == 2 and seen.path.startswith("/v3/overdubs/"):
            found.wait(10)
        response = pass_on(seen)
        if seen.path.startswith("/v3/lipsyncs/"):
            found.set()
        return response

    unnamed.answer = answer

    async def together():
        hook = HeyGenHook()
        return await asyncio.gather(*(hook.aget_overdub(elsewhere) for _ in range(2)))

    assert {overdub.overdub_id for overdub in asyncio.run(together())} == {elsewhere}


def test_the_name_is_kept_by_account(heygen, connect, elsewhere):
    HeyGenHook().list_overdubs()
    connect(heygen.url, "another-key")
    assert HeyGenHook().known_resource is None


@pytest.mark.parametrize("page", [False, True], ids=["HeyGen's 404", "a page"])
def test_neither_name_is_known(unnamed, page):
    body = b"<html>Not Found</html>" if page else b'{"error": {"code": "not_found", "message": "No route."}}'
    unnamed.answer = lambda _: (404, {}, body)
    hook = HeyGenHook(max_attempts=1)
    for call in (hook.list_overdubs, lambda: hook.get_overdub("od_1")):
        with pytest.raises(HeyGenError, match=r"Neither 'overdubs' nor .*'heygen_default'") as raised:
            call()
        assert raised.value.status_code == 404
    if not page:
        unnamed.seen.clear()
        with pytest.raises(HeyGenNotFoundError, match="Neither"):
            hook.create_overdub(REQUEST)
        assert asked(unnamed) == ["POST o", "GET l"]
    assert hook.known_resource is None


@pytest.mark.parametrize("resource", ["overdubs"])
def test_a_name_that_is_set_is_not_questioned(heygen, wire):
    heygen.behaviour.resources = "lipsyncs"
    with pytest.raises(HeyGenNotFoundError, match="Remove the extra 'resource'"):
        HeyGenHook().create_overdub(REQUEST)
    assert asked(wire) == ["POST o"]


@pytest.mark.parametrize("resources", ["overdubs", "both"])
def test_a_missing_overdub_is_no_missing_name(heygen, unnamed, resources):
    heygen.behaviour.resources = resources
    for number in (1, 2):
        with pytest.raises(HeyGenNotFoundError, match="It was deleted, never existed"):
            get("od_1")
        assert asked(unnamed) == ["GET o/id", "GET o", "GET o/id"][: number + 1]
    assert HeyGenHook().known_resource == "overdubs"


def test_a_page_is_no_missing_name(heygen, unnamed, pauses):
    page_404(unnamed, times=1)
    HeyGenHook().list_overdubs()
    assert HeyGenHook().known_resource == "overdubs"
    assert "GET l" not in asked(unnamed)
    page_404(unnamed, times=3)
    HeyGenHook().list_overdubs()
    assert HeyGenHook().known_resource == "overdubs"
    assert "GET l" not in asked(unnamed), "a name that has answered stays"


@pytest.mark.parametrize("redirects", [False, True])
def test_heygen_drops_a_name_while_a_triggerer_runs(heygen, unnamed, redirects):
    alist = HeyGenHook().alist_overdubs
    asyncio.run(alist())
    heygen.behaviour.resources = "lipsyncs"
    if redirects:
        redirect_to_the_other_name(unnamed)
    asyncio.run(alist())
    assert HeyGenHook().resource == "lipsyncs"


@pytest.mark.parametrize("error", [{"code": "asset_not_found"}, {"code": "c", "param": "folder_id"}], ids=str)
def test_what_a_create_request_names_is_missing(heygen, unnamed, error):
    heygen.fail_next(method="POST", status=404, body=json.dumps({"error": error}))
    with pytest.raises(HeyGenNotFoundError):
        HeyGenHook().create_overdub(REQUEST)
    assert asked(unnamed) == ["POST o"]


def test_the_other_name_cannot_be_asked_for_now(heygen, unnamed, pauses, elsewhere):
    heygen.fail_next(method="GET", status=503)
    HeyGenHook().create_overdub(REQUEST)
    assert asked(unnamed) == ["POST o", "GET l", "POST o", "GET l", "POST l"]
    assert len(heygen.jobs) == 2


def test_each_create_request_is_announced_with_its_name(heygen, unnamed, elsewhere):
    hook, names = HeyGenHook(), []
    hook.create_overdub(REQUEST, before_sending=lambda: names.append(hook.known_resource))
    assert names == [None, "lipsyncs"]
    assert len({post.headers["Idempotency-Key"] for post in unnamed.seen if post.method == "POST"}) == 1


def is_post(seen):
    return seen.method == "POST"


@pytest.mark.parametrize("resources", ["overdubs", "both"])
def test_a_page_that_hides_a_started_overdub(heygen, unnamed, pauses, resources):
    heygen.behaviour.resources = resources
    page_404(unnamed, only=is_post)
    overdub_id = HeyGenHook().create_overdub(REQUEST)
    assert [job.id for job in heygen.jobs] == [overdub_id]
    assert "POST l" not in asked(unnamed)


class TwoNames:
    """A HeyGen whose two names have overdubs of their own, behind a gateway with pages for ``overdubs``."""

    def __init__(self, pages):
        self.pages = pages
        self.jobs = {"overdubs": [], "lipsyncs": []}

    def __call__(self, seen):
        jobs = self.jobs[seen.path.removeprefix("/v3/").partition("?")[0].partition("/")[0]]
        data = jobs
        if seen.method == "POST":
            sent = json.loads(seen.body)
            jobs.append({"id": f"od_{len(jobs)}", "status": "pending", "callback_id": sent["callback_id"]})
            data = {"overdub_id": jobs[-1]["id"]}
        if jobs is self.jobs["overdubs"] and self.pages:
            self.pages -= 1
            return 404, {}, b"<html>Not Found</html>"
        return 200, {}, json.dumps({"data": data, "has_more": False}).encode()


@pytest.mark.parametrize("pages", range(1, 5))
def test_no_create_request_under_both_names(listen, connect, pauses, monkeypatch, pages):
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    server = TwoNames(pages)
    connect(listen(server).url)
    overdub_id = HeyGenHook().create_overdub(REQUEST)
    if pages < 4:
        assert (overdub_id, server.jobs["lipsyncs"]) == ("od_0", [])
        assert len(server.jobs["overdubs"]) == 1
    else:
        assert sum(clock.slept) > 44, "not before an overdub would have appeared"
        assert overdub_id == server.jobs["lipsyncs"][0]["id"]


def test_neither_name_responds_with_certainty(listen, connect, pauses, monkeypatch):
    """The list of the name that was tried first fails, so it is not known whether something was started."""
    monkeypatch.setattr(module, "time", Clock())
    server = TwoNames(pages=4)
    names = []

    def answer(seen):
        names.append(f"{seen.method} {seen.path[4]}")
        if names.count("GET l") and seen.path.startswith("/v3/overdubs"):
            return 403, {}, b'{"error": {"code": "forbidden"}}'
        return server(seen)

    connect(listen(answer).url)
    with pytest.raises(HeyGenTransientError) as raised:
        HeyGenHook().create_overdub(REQUEST)
    assert raised.value.outcome_unknown
    assert names.count("POST o") + names.count("POST l") == 1


def search(**changes):
    """Search for a create request whose response was lost a moment ago."""
    request = CreateOverdubRequest.of(REQUEST | {"title": changes.pop("title", "Talk")})
    moment = time.time() + changes.pop("ahead", 0.0)
    return HeyGenHook().find_created(request, "k:1", since=moment, sent_at=moment, **changes)


def unnamed_job(heygen, title):
    """Create an overdub that may be that of the search, as far as its fields show."""
    fill(heygen, 1)
    heygen.jobs[0].request.callback_id, heygen.jobs[0].title = None, title


@pytest.mark.parametrize("sent", ["Talk ", "Talk\n of  May", "T" * 300, "Cafe\u0301", "Talk"])
def test_a_title_that_heygen_has_tidied_is_a_candidate(heygen, pauses, sent):
    unnamed_job(heygen, " ".join(unicodedata.normalize("NFC", sent).split())[:255])
    with pytest.raises(HeyGenOutcomeUnknownError, match=heygen.jobs[0].id):
        search(title=sent)


def test_another_title_is_no_candidate(heygen, pauses):
    unnamed_job(heygen, "Another talk")
    assert search(title="Talk") is None


@pytest.mark.parametrize("blank", ["", "  "])
def test_a_blank_callback_id_is_none(heygen, pauses, blank):
    unnamed_job(heygen, "Talk")
    heygen.jobs[0].request.callback_id = blank
    with pytest.raises(HeyGenOutcomeUnknownError, match=heygen.jobs[0].id):
        search()


@pytest.mark.parametrize("ahead", [400, 599])
def test_the_clock_of_the_worker_that_sent_the_request_may_be_ahead(heygen, pauses, ahead):
    unnamed_job(heygen, "Talk")
    with pytest.raises(HeyGenOutcomeUnknownError, match=heygen.jobs[0].id):
        search(ahead=ahead, skew=600.0)


@pytest.mark.parametrize("wrong", [-900, 900])
def test_a_wrong_date_header_hides_no_candidate(heygen, wire, pauses, wrong):
    unnamed_job(heygen, "Talk")
    pass_on = wire.answer

    def answer(seen):
        status, headers, body = pass_on(seen)
        headers = {name: value for name, value in headers.items() if name.lower() != "date"}
        return status, headers | {"Date": formatdate(time.time() + wrong, usegmt=True)}, body

    wire.answer = answer
    with pytest.raises(HeyGenOutcomeUnknownError, match=heygen.jobs[0].id):
        search()


def test_equal_times_are_no_order(heygen, pauses):
    heygen.behaviour.list_order = "asc"
    heygen.behaviour.idempotency = False
    fill(heygen, 100)
    for job in heygen.jobs:
        job.created_at -= 86400 + heygen.jobs.index(job) / 1e6
    heygen.fail_next(method="POST", drop="after")
    assert HeyGenHook().create_overdub(REQUEST) == heygen.jobs[100].id
    assert len(heygen.jobs) == 101


def test_a_page_under_the_old_name_leads_to_no_second_request_under_the_other(heygen, unnamed, pauses):
    """The worker was killed after its request, so it is not known that HeyGen accepted it."""
    none = 200, {}, b'{"data": [], "has_more": false, "next_token": null}'
    page = 404, {"Content-Type": "text/html"}, b"<html>Not Found</html>"
    unnamed.answer = lambda seen: none if "lipsyncs" in seen.path else page
    with pytest.raises(HeyGenTransientError) as caught:
        search()
    assert caught.value.outcome_unknown


def test_one_page_under_the_other_name_is_not_final(unnamed):
    ours = 404, {}, b'{"error": {"code": "not_found", "message": "No route."}}'
    page = 404, {}, b"<html>Not Found"
    unnamed.answer = lambda seen: page if "lipsyncs" in seen.path else ours
    with pytest.raises(HeyGenTransientError):
        HeyGenHook(max_attempts=1).create_overdub(REQUEST)


@pytest.mark.parametrize(("asked", "html", "posts"), [("20", True, 3), ("40", True, 1), ("20", False, 1)])
def test_a_gateways_retry_after_ends_no_create_request_of_a_task_that_may_defer(
    heygen, pauses, asked, html, posts
):
    fault = {"status": 502, "html": html, "headers": {"Retry-After": asked}}
    heygen.fail_next(method="POST", path="/v3/overdubs", count=2, **fault)
    hook = HeyGenHook(longest_pause=0.0)
    if posts == 1:  # for HeyGen's own Retry-After, the task defers
        with pytest.raises(HeyGenTransientError) as raised:
            hook.create_overdub(REQUEST)
        assert isinstance(raised.value, HeyGenGatewayError) == html
    else:
        assert hook.create_overdub(REQUEST) == heygen.jobs[0].id
    assert heygen.requests_by_route["POST /v3/overdubs"] == posts
    assert all(pause >= 20 for pause in pauses)
