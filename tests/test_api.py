"""The protocol: which input is rejected before a request, and what each possible response means."""

from __future__ import annotations

import asyncio
import itertools
import json
import traceback
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from functools import partial

import pytest
from airflow.providers.common.compat.sdk import AirflowException, AirflowFailException
from conftest import each_value
from hypothesis import example, given, settings
from hypothesis import strategies as st
from requests.structures import CaseInsensitiveDict

from airflow_provider_heygen import api
from airflow_provider_heygen.connection import HeyGenConnection
from airflow_provider_heygen.exceptions import (
    HeyGenBadInputError,
    HeyGenError,
    HeyGenGatewayError,
    HeyGenNotFoundError,
    HeyGenPermanentError,
    HeyGenTransientError,
)
from airflow_provider_heygen.hooks.heygen import HeyGenHook

SECRET = "QUERY-SECRET"
LINK = f"https://files.heygen.ai/v.mp4?Expires=1&Signature={SECRET}"
VIDEO = f"https://example.com/v.mp4?Signature={SECRET}"
REQUEST = {"video": VIDEO, "audio": "https://example.com/a.mp3"}
OTHER = {"overdubs": "lipsyncs", "lipsyncs": "overdubs"}

both_resources = pytest.mark.parametrize("resource", ["overdubs", "lipsyncs"])


def refused(heygen, call, named):
    """The call is rejected with the name of the invalid field, nothing is sent and no query is shown."""
    with pytest.raises(HeyGenBadInputError, match=rf"\b{named}\b") as raised:
        call()
    assert heygen.requests == []
    assert raised.value.status_code is None
    shown = "".join(traceback.format_exception(raised.value)) + repr(raised.value) + repr(raised.value.args)
    assert SECRET not in shown


# --- Refused before anything is sent ------------------------------------------------------------------

BAD_MEDIA = {
    "neither": {"type": "url"},
    "neither, null": {"type": "asset_id", "asset_id": None},
    "both": {"type": "url", "url": VIDEO, "asset_id": "a"},
    "the other": {"type": "asset_id", "url": VIDEO},
    "no type": {"url": VIDEO},
    "unknown type": {"type": "base64", "url": VIDEO},
    "unhashable type": {"type": ["url"], "url": VIDEO},
    "unknown member": {"type": "url", "url": VIDEO, "language": "de"},
    "http": VIDEO.replace("https", "http"),
    "a path": f"/v.mp4?x={SECRET}",
    "no host": f"https:///v.mp4?x={SECRET}",
    "bad host": f"https://[v.mp4?x={SECRET}",
    "space": f"https://example.com/v 1.mp4?x={SECRET}",
    "newline": f"{VIDEO}\n",
    "empty": "",
    "empty asset_id": {"type": "asset_id", "asset_id": ""},
    "asset_id with a space": {"type": "asset_id", "asset_id": "a b"},
    "asset without id": {"type": "asset_id", "asset_id": {"url": VIDEO}},
    "None": None,
    "list": [VIDEO],
    "None, rendered": "None",
    "asset_id None, rendered": {"type": "asset_id", "asset_id": "None"},
}


@pytest.mark.parametrize(
    ("media", "name"), each_value(BAD_MEDIA.values(), ["video", "audio"]), ids=lambda value: ascii(value)[:20]
)
def test_bad_media(heygen, name, media):
    refused(heygen, lambda: HeyGenHook().create_overdub({**REQUEST, name: media}), name)


BAD_FIELDS = [
    ("title", ""),
    ("title", " \n"),
    ("title", True),
    ("title", "None"),
    ("callback_id", "None"),
    ("mode", "fast"),
    ("fps_mode", "60"),
    ("enable_caption", "maybe"),
    ("enable_caption", 2),
    ("start_time", -0.001),
    ("start_time", float("nan")),
    ("start_time", float("inf")),
    ("start_time", "nan"),
    ("start_time", "soon"),
    ("end_time", 0),
    ("end_time", float("inf")),
    ("callback_url", f"ftp://example.com/?x={SECRET}"),
    ("callback_url", f"example.com/?x={SECRET}"),
    ("callback_id", ""),
    ("folder_id", ""),
    ("language", "de"),
    ("extra_body", ["language"]),
    ("extra_body", {"title": "x"}),
    ("extra_body", {"video": VIDEO, "language": "de"}),
    ("extra_body", {"language": object()}),
    ("extra_body", {"language": float("nan")}),
    ("extra_body", {5: "de"}),
    ("Title", "x"),
]


@pytest.mark.parametrize(("name", "value"), BAD_FIELDS)
def test_bad_field(heygen, name, value):
    refused(heygen, lambda: HeyGenHook().create_overdub({**REQUEST, name: value}), name)


@pytest.mark.parametrize(("start", "end"), [(5, 5), (5, 4.999), (0, 0), (None, 0)])
def test_end_before_start(heygen, start, end):
    request = {**REQUEST, "start_time": start, "end_time": end}
    refused(heygen, lambda: HeyGenHook().create_overdub(request), "end_time")


@pytest.mark.parametrize("name", ["video", "audio"])
def test_missing_media(heygen, name):
    request = {key: value for key, value in REQUEST.items() if key != name}
    refused(heygen, lambda: HeyGenHook().create_overdub(request), name)


def test_every_wrong_field_is_named(heygen):
    with pytest.raises(HeyGenBadInputError) as raised:
        HeyGenHook().create_overdub({"video": "x", "mode": "fast", "end_time": -1, "colour": "red"})
    for name in ("video", "audio", "mode", "end_time", "colour"):
        assert f"{name}: " in str(raised.value)


BAD_IDS = [
    *(
        None,
        "None",
        True,
        5.5,
        "",
        " ",
        ".",
        "..",
        "a/b",
        "/",
        "../users/me",
        "a?b",
        "a#b",
        "%2f",
        "a%2fb",
        "a\\b",
        "['a','b']",
        "{'type':'asset_id'}",
    ),
    *(LINK, "a b", "a\n", "\ta", "a\x00", "a\x7f", "a\u2028b", "\ud800"),
]


@pytest.mark.parametrize(
    "call",
    [
        lambda hook, overdub_id: hook.get_overdub(overdub_id),
        lambda hook, overdub_id: hook.update_overdub(overdub_id, "title"),
        lambda hook, overdub_id: hook.delete_overdub(overdub_id),
        lambda hook, overdub_id: hook.download_overdub(overdub_id, "/tmp/never-written.mp4"),
        lambda hook, overdub_id: asyncio.run(hook.aget_overdub(overdub_id)),
        lambda hook, overdub_id: asyncio.run(hook.adelete_overdub(overdub_id)),
    ],
    ids=["get", "update", "delete", "download", "aget", "adelete"],
)
def test_bad_id(heygen, call):
    for overdub_id in BAD_IDS:
        refused(heygen, partial(call, HeyGenHook(), overdub_id), "overdub_id")


@pytest.mark.parametrize(
    "overdub_id", ["a:b", "a@b", "a+b", "a,b;c=d&e", "a'b", "\u00e9", "a.b", "~", "*"], ids=ascii
)
def test_odd_but_possible_id(heygen, overdub_id):
    for call in (HeyGenHook().get_overdub, lambda odd: asyncio.run(HeyGenHook().aget_overdub(odd))):
        with pytest.raises(HeyGenNotFoundError):
            call(overdub_id)
        assert heygen.requests[-1].path == f"/v3/overdubs/{overdub_id}"
        assert heygen.requests[-1].query == ""


@pytest.mark.parametrize("title", ["", "\n", "None", True])
def test_bad_new_title(heygen, title):
    refused(heygen, lambda: HeyGenHook().update_overdub("od_1", title), "title")


@pytest.mark.parametrize("limit", [0, 101, True, "10", 1.5, None])
def test_bad_limit(heygen, limit):
    refused(heygen, lambda: HeyGenHook().list_overdubs(limit), "limit")
    refused(heygen, lambda: list(HeyGenHook().iter_overdubs(limit)), "limit")
    refused(heygen, lambda: asyncio.run(HeyGenHook().alist_overdubs(limit)), "limit")


@pytest.mark.parametrize(
    "key", ["", " ", "a b", "key\n", "k\u00e9y", "a/b", "x" * 256, 5, b"key", object], ids=ascii
)
@pytest.mark.filterwarnings("error")
def test_bad_idempotency_key(heygen, key):
    refused(heygen, lambda: HeyGenHook().create_overdub(REQUEST, idempotency_key=key), "idempotency_key")


BAD_FILES = {
    "missing": ("There is no file", lambda path: path / "nothing.mp4"),
    "missing directory": ("There is no file", lambda path: path / "nowhere" / "nothing.mp4"),
    "file as directory": ("There is no file", lambda path: sparse(path, 1) / "v.mp4"),
    "empty": ("is empty", lambda path: sparse(path, 0)),
    "directory": ("is a directory", lambda path: path),
    "too large": ("32.0 MiB, HeyGen accepts 32 MiB", lambda path: sparse(path, 32 * 2**20 + 1)),
    "unknown scheme": ("provider of that storage", lambda _: f"warehouse://bucket/v.mp4?x={SECRET}"),
    "no path": ("is empty", lambda _: ""),
    "blank path": ("is empty", lambda _: "  "),
}


def sparse(directory, size):
    path = directory / "v.mp4"
    with path.open("wb") as file:
        file.truncate(size)
    return path


@pytest.mark.parametrize(("text", "make"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_upload(heygen, tmp_path, text, make):
    path = make(tmp_path)
    refused(heygen, lambda: HeyGenHook().upload_asset(path), text)
    if "://" not in str(path) and str(path).strip():
        refused(heygen, lambda: HeyGenHook().upload_asset(f"file://{path}"), text)


# --- Responses ----------------------------------------------------------------------------------------

KEY = "sk_V2_hgu_CREDENTIAL"
CONNECTION = HeyGenConnection(conn_id="dubbing", base_url="https://api.heygen.com", credential=KEY)

CALLS = {
    "create": api.create_overdub(api.CreateOverdubRequest.of(REQUEST), "key"),
    "get": api.get_overdub("od_1"),
    "list": api.list_overdubs(10, None),
    "update": api.update_overdub("od_1", "title"),
    "delete": api.delete_overdub("od_1"),
    "upload": api.upload_asset("key"),
}


def answer(call, body, status=200, headers=None):
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    return CALLS[call].parse(status, CaseInsensitiveDict(headers or {}), body, CONNECTION)


def test_the_bulk_endpoint_has_other_words_for_statuses():
    words = {
        "Queued": "pending",
        "waiting ": "pending",
        "processing": "running",
        "completed": "completed",
        7: 7,
    }
    rows = [{"video_id": str(number), "status": word} for number, word in enumerate(words)]
    page = api.list_statuses(["0"]).parse(200, {}, json.dumps({"data": rows}).encode(), CONNECTION)
    assert [row["status"] for row in page.rows.values()] == list(words.values())


@pytest.mark.parametrize("member", ["overdub_id", "lipsync_id", "id"])
def test_id_by_any_name(member):
    assert answer("create", {"data": {member: "od_1"}}) == "od_1"
    assert answer("list", {"data": [{member: "od_1"}]}).data[0].overdub_id == "od_1"


@pytest.mark.parametrize(
    "data",
    [
        {"overdub_id": None, "lipsync_id": "od_1"},
        {"overdub_id": "", "id": "od_1"},
        {"id": None, "overdub_id": "od_1", "lipsync_id": ["x"]},
    ],
)
def test_id_beside_unusable_ones(data):
    assert answer("create", {"data": data}) == "od_1"
    assert answer("list", {"data": [data]}).data[0].overdub_id == "od_1"


def test_id_as_a_number():
    assert answer("create", {"data": {"overdub_id": 17}}) == "17"
    assert answer("list", {"data": [{"id": 17}]}).data[0].overdub_id == "17"


FULL = {
    "id": "od_1",
    "title": "Title",
    "status": "completed",
    "duration": 42.5,
    "video_url": LINK,
    "caption_url": LINK,
    "callback_id": "mine",
    "created_at": 1717000000,
    "failure_message": None,
}


def test_everything_given():
    overdub = answer("get", {"data": FULL})
    assert {name: getattr(overdub, name) for name in FULL} == FULL
    assert overdub.status is api.OverdubStatus.COMPLETED
    assert overdub.is_final
    assert SECRET not in repr(overdub)
    assert overdub.details() == {
        "overdub_id": "od_1",
        "title": "Title",
        "status": "completed",
        "duration": 42.5,
        "callback_id": "mine",
        "created_at": 1717000000,
        "failure_message": None,
    }


@pytest.mark.parametrize("call", ["get", "update"])
def test_nothing_given(call):
    overdub = answer(call, {"data": {}})
    assert overdub.overdub_id == "od_1"
    assert overdub.status == "unknown"
    assert not overdub.is_final
    assert set(overdub.details().values()) == {"od_1", "unknown", None}


ODD = [True, 1.5, 10**400, float("nan"), float("inf"), [], {}, [{}], {"a": 1}, "\ud800", "x" * 10_000]


@pytest.mark.parametrize("name", [name for name in FULL if name != "id"])
def test_invalid_and_unknown_members(name):
    for value in (None, *ODD):
        check_invalid_member(name, value)


def check_invalid_member(name, value):
    given = {**FULL, name: value, "new_member": {"deep": [value]}}
    overdub = answer("get", {"data": given})
    assert overdub == answer("list", {"data": [given]}).data[0]
    assert overdub.overdub_id == "od_1"
    others = [other for other in FULL if other != name]
    assert [getattr(overdub, other) for other in others] == [FULL[other] for other in others]
    # Goes into an XCom and an event: JSON without NaN, text without half characters.
    json.dumps(overdub.details(), allow_nan=False, ensure_ascii=False).encode()


@pytest.mark.parametrize("asked", ["od_1", None, "another", 5, ["x"]])
def test_the_id_asked_for_counts(asked):
    assert answer("get", {"data": {"id": asked, "status": "failed"}}).overdub_id == "od_1"


@pytest.mark.parametrize(
    ("word", "status", "final"),
    [
        ("pending", "pending", False),
        ("running", "running", False),
        ("completed", "completed", True),
        ("failed", "failed", True),
        (" Completed\n", "completed", True),
        ("succeeded", "succeeded", False),
        ("", "unknown", False),
        (None, "unknown", False),
        (5, "unknown", False),
    ],
)
def test_statuses(word, status, final):
    overdub = answer("get", {"data": {"status": word}})
    assert overdub.status == status
    assert overdub.is_final is final
    assert isinstance(overdub.status, api.OverdubStatus) == (status in list(api.OverdubStatus))


def test_a_number_that_no_message_can_carry_is_no_time():
    """Airflow's frames hold 64 bits; one larger number would end all triggers of the process."""
    for created_at in (2**70, -(2**70), 10**400):
        overdub = answer("get", {"data": {"id": "od_1", "status": "completed", "created_at": created_at}})
        assert overdub.details()["created_at"] is None


def test_list_keeps_the_rows_it_can_read():
    rows = [None, 5, "x", [], {}, {"id": None}, {"id": ""}, {"id": "od_1"}, {"id": True}, {"id": "od_2"}]
    assert [row.overdub_id for row in answer("list", {"data": rows}).data] == ["od_1", "od_2"]


NEXT_PAGE = [
    ({"has_more": True, "next_token": "t"}, "t"),
    ({"next_token": "t"}, "t"),
    ({"has_more": None, "next_token": "t"}, "t"),
    ({"has_more": False, "next_token": "t"}, None),
    ({"has_more": True, "next_token": None}, None),
    ({"has_more": True, "next_token": ""}, None),
    ({"has_more": True, "next_token": 5}, "5"),
    ({"has_more": True, "next_token": []}, None),
    ({"has_more": True}, None),
    ({}, None),
]


def test_next_page():
    """There is a next page if HeyGen returns a token, or says so: then it cannot be read."""
    for members, token in NEXT_PAGE:
        page = answer("list", {"data": [], **members})
        more = token is not None or members.get("has_more") is True
        assert (page.next_token, page.has_more) == (token, more), members


def test_asset():
    data = {"asset_id": "a", "url": LINK, "mime_type": "video/mp4", "size_bytes": 5}
    asset = answer("upload", {"data": data})
    assert asset.model_dump(exclude_none=True) == data
    assert SECRET not in repr(asset)
    assert answer("upload", {"data": {"id": 17, "url": 5, "size_bytes": "?"}}).asset_id == "17"


UNREADABLE = {
    "empty": b"",
    "HTML": b"<html>Bad gateway</html>",
    "cut": b'{"data": {"overdub_id"',
    "not UTF-8": b'{"data": "\xff\xfe"}',
    "deep": b"[" * 100_000,
    "deep objects": b'{"data":' * 100_000,
    "huge number": b'{"data": ' + b"9" * 10_000 + b"}",
    "null": b"null",
}
UNUSABLE = {
    "number": b"5",
    "text": b'"completed"',
    "list": b"[]",
    "no data": b"{}",
    "null data": b'{"data": null}',
    "wrong data": b'{"data": 5}',
    "error with 200": b'{"error": {}}',
}


@pytest.mark.parametrize("body", [*UNREADABLE.values(), *UNUSABLE.values()], ids=[*UNREADABLE, *UNUSABLE])
def test_useless_body(body):
    for call in CALLS:
        check_useless_body(call, body)


def check_useless_body(call, body):
    if call == "delete" and (body == b"" or body in UNUSABLE.values()):
        assert answer(call, body) is None  # its content does not matter
        return
    with pytest.raises(HeyGenTransientError) as raised:
        answer(call, body, headers={"Content-Type": "text/html"})
    assert raised.value.status_code == 200
    assert raised.value.outcome_unknown == (call not in ("get", "list"))
    if body in UNREADABLE.values():
        assert "'dubbing'" in str(raised.value)
        assert "text/html" in str(raised.value)


@pytest.mark.parametrize(
    "data", [{}, {"overdub_id": ""}, {"overdub_id": " "}, {"overdub_id": {}}, {"overdub_id": "\ud800"}]
)
def test_create_without_id(data):
    with pytest.raises(HeyGenTransientError, match="no overdub_id") as raised:
        answer("create", {"data": data})
    assert raised.value.outcome_unknown


words = st.text() | st.builds(
    "{}{}{}".format, st.text(), st.sampled_from([KEY, LINK, f"{KEY}{LINK}"]), st.text()
)
names = st.sampled_from(
    [*("data", "error", "code", "message", "param", "doc_url", "has_more", "next_token", "asset_id"), *FULL]
)
anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | words
    | st.sampled_from(["completed", "failed"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names | st.text(), inner, max_size=5),
    max_leaves=15,
)
envelopes = st.fixed_dictionaries(
    {}, optional={"data": anything, "error": st.dictionaries(names, words) | anything, "next_token": words}
)
bodies = st.binary() | (anything | envelopes).map(lambda value: json.dumps(value).encode())
header_sets = st.fixed_dictionaries(
    {},
    optional={
        "Retry-After": st.text() | st.integers().map(str),
        "Content-Type": words,
        "X-Request-Id": words,
    },
)


@settings(max_examples=300, deadline=None)
@given(call=st.sampled_from([*CALLS]), status=st.integers(100, 599), headers=header_sets, body=bodies)
@example(call="get", status=429, headers={"Retry-After": "9" * 400}, body=b"")
@example(call="get", status=429, headers={"Retry-After": "\u00b2"}, body=b"")
@example(call="get", status=429, headers={"Retry-After": "Mon, 1 Jan 0000 00:00:00 +9999"}, body=b"")
def test_any_response(call, status, headers, body):
    check_any_answer(call, status, headers, body)


@settings(max_examples=300, deadline=None)
@given(call=st.sampled_from([*CALLS]), body=bodies)
@example(call="get", body=b'{"error": {"code": [], "message": "M"}}')
def test_any_valid_response(call, body):
    check_any_answer(call, 200, {"Content-Type": "application/json"}, body)


def check_any_answer(call, status, headers, body):
    try:
        result, error = answer(call, body, status, headers), None
    except HeyGenError as raised:
        result, error = None, raised
    if error is None:
        assert 200 <= status < 300
        kinds = {"create": str, "list": api.OverdubPage, "upload": api.Asset, "delete": type(None)}
        assert isinstance(result, kinds.get(call, api.Overdub))
        if call == "create":
            assert api.check_id(result) == result
        return
    assert isinstance(error, HeyGenTransientError) != isinstance(error, HeyGenPermanentError)
    assert error.status_code == status or 200 <= status < 300  # an error in a good response
    assert error.retry_after is None or 0 <= error.retry_after < float("inf")
    shown = "".join(traceback.format_exception(error)) + repr(error) + repr(vars(error))
    assert KEY not in shown
    assert SECRET not in shown
    str(error).encode()


# --- Errors -------------------------------------------------------------------------------------------

TRANSIENT, PERMANENT, NOT_FOUND = HeyGenTransientError, HeyGenPermanentError, HeyGenNotFoundError
ERRORS = [
    (400, "invalid_parameter", PERMANENT, "Correct the request"),
    (400, "download_failed", PERMANENT, "public https straight to the file"),
    (400, "resource_not_ready", TRANSIENT, ""),
    (400, "asset_not_available", TRANSIENT, ""),
    (401, "authentication_failed", PERMANENT, "password of Airflow connection 'heygen_default'"),
    (401, "unauthorized", PERMANENT, "'auth_type' ('api_key')"),
    (402, "insufficient_credit", PERMANENT, "Top up"),
    (402, "trial_limit_exceeded", PERMANENT, "Top up"),
    (403, "forbidden", PERMANENT, "Airflow connection 'heygen_default'"),
    (403, "insufficient_api_key_scope", PERMANENT, "Add the scope 'lipsync:read' to the API key"),
    (404, "not_found", NOT_FOUND, "extra 'resource' ('overdubs')"),
    (404, "asset_not_found", NOT_FOUND, "Upload the file"),
    (408, "timeout", TRANSIENT, ""),
    (409, "request_in_progress", TRANSIENT, ""),
    (409, "resource_not_ready", TRANSIENT, ""),
    (409, "conflict", PERMANENT, "a state that does not allow this"),
    (413, "payload_too_large", PERMANENT, "32 MB"),
    (418, "teapot", PERMANENT, "Correct the request"),
    (422, "invalid_parameter", PERMANENT, "Correct the request"),
    (425, "too_early", TRANSIENT, ""),
    (429, "rate_limit_exceeded", TRANSIENT, ""),
    (429, "something_new", TRANSIENT, ""),
    (429, "quota_exceeded", PERMANENT, "quota is used up"),
    (429, "trial_video_limit_exceeded", PERMANENT, "quota is used up"),
    (500, "internal_error", TRANSIENT, ""),
    (502, "bad_gateway", TRANSIENT, ""),
    (503, "service_unavailable", TRANSIENT, ""),
    (504, "gateway_timeout", TRANSIENT, ""),
    (520, "unknown", TRANSIENT, ""),
]


@pytest.mark.parametrize(("status", "code", "kind", "step"), ERRORS)
def test_errors(heygen, status, code, kind, step):
    detail = {"code": code, "message": "It is so.", "param": "video", "doc_url": "https://heygen.example/doc"}
    hook = HeyGenHook(max_attempts=1)
    for call in (lambda: hook.get_overdub("od_1"), lambda: asyncio.run(hook.aget_overdub("od_1"))):
        for fault in ({"code": code, "message": "It is so."}, {"body": json.dumps({"error": detail})}):
            heygen.fail_next(status=status, **fault)
            with pytest.raises(kind) as raised:
                call()
            error = raised.value
            assert isinstance(error, AirflowException)
            assert not isinstance(error, AirflowFailException)
            assert isinstance(error, NOT_FOUND) == (status == 404)
            assert (error.status_code, error.code) == (status, code)
            assert error.request_id.startswith("req_")
            assert error.request_id in str(error)
            assert f"HeyGen returned {status} {code} for the GET of overdub 'od_1': It is so." in str(error)
            assert step in str(error)
            if "body" in fault:
                assert (error.param, error.doc_url) == ("video", "https://heygen.example/doc")
                assert kind is TRANSIENT or "(field 'video'); see https://heygen.example/doc." in str(error)


@pytest.mark.parametrize(
    ("body", "who"),
    [
        ({"error": {"message": "M"}}, "HeyGen"),
        ({"error": {"code": "c"}}, "HeyGen"),
        ({"error": {"code": "", "message": None}}, "a gateway"),
        ({"error": "M"}, "a gateway"),
        ({"error": {"code": 403, "message": "M", "status": "PERMISSION_DENIED"}}, "a gateway"),
        ({}, "a gateway"),
        ([], "a gateway"),
        (None, "a gateway"),
        (b"<html>Forbidden</html>", "a gateway"),
        (b"default backend - 404", "a gateway"),
    ],
)
def test_who_has_responded(body, who):
    for call in ("create", "get", "delete"):
        for status in (301, 400, 401, 402, 403, 404, 409, 429, 451, 500, 502):
            check_who_has_responded(call, body, who, status)


def check_who_has_responded(call, body, who, status):
    with pytest.raises(HeyGenError, match=f"HeyGen returned {status}") as raised:
        answer(call, body, status)
    assert isinstance(raised.value, HeyGenGatewayError) == (who == "a gateway")
    if who == "a gateway":
        assert isinstance(raised.value, TRANSIENT)
        assert "gateway, proxy or firewall" in str(raised.value)
        assert raised.value.outcome_unknown == (call != "get"), "what HeyGen did is not known"


@pytest.mark.parametrize("status", [100, 102, 103, 199])
def test_1xx_is_no_response(status):
    with pytest.raises(HeyGenGatewayError) as raised:
        answer("create", {"error": {"code": "forbidden"}}, status)
    assert raised.value.outcome_unknown


@pytest.mark.parametrize(
    ("code", "status", "kind"),
    [
        ("insufficient_credit", 402, PERMANENT),
        ("something_new", 400, PERMANENT),
        ("internal_error", 500, TRANSIENT),
        ("rate_limit_exceeded", 429, TRANSIENT),
        ("not_found", 404, NOT_FOUND),
    ],
)
def test_an_error_with_status_200_keeps_heygens_message(code, status, kind):
    error = {"code": code, "message": "Your account has 5 credits but this video requires 10 credits."}
    for call, data in itertools.product(("create", "get"), ({}, {"data": None}, {"data": {"id": None}})):
        with pytest.raises(kind, match="requires 10 credits") as raised:
            answer(call, {"error": error, **data}, 200)
        assert raised.value.status_code == status
    assert answer("create", {"error": error, "data": {"overdub_id": "od_1"}}) == "od_1"


@pytest.mark.parametrize(
    "body",
    [
        {"error": {"code": 400543, "message": "needs 10 credits"}, "data": None},
        {"code": 400543, "message": "needs 10 credits", "data": None},
        {"error": "needs 10 credits"},
    ],
    ids=str,
)
@pytest.mark.parametrize("status", [200, 400])
def test_an_error_of_another_form_is_quoted(body, status):
    for call in ("create", "get", "list"):
        with pytest.raises(TRANSIENT, match="needs 10 credits") as raised:
            answer(call, body, status)
        assert raised.value.outcome_unknown == (call == "create")


@both_resources
def test_missing_route_names_the_setting(heygen, resource):
    heygen.behaviour.resources = OTHER[resource]
    hook = HeyGenHook(max_attempts=1)
    for call in (
        lambda: hook.create_overdub(REQUEST),
        hook.list_overdubs,
        lambda: asyncio.run(hook.alist_overdubs()),
    ):
        with pytest.raises(NOT_FOUND) as raised:
            call()
        wanted = f"Remove the extra 'resource' ('{resource}') of Airflow connection 'heygen_default'"
        assert wanted in str(raised.value)


@pytest.mark.parametrize(
    ("call", "scope"),
    [
        (api.get_overdub("od_1"), "lipsync:read"),
        (api.get_overdub("od_1").under("lipsyncs"), "lipsync:read"),
        (api.delete_overdub("od_1"), "lipsync:write"),
        (api.list_statuses(["od_1"]), "lipsync:read"),
        (api.upload_asset("key"), "assets:write"),
        (api.get_asset("a"), "assets:read"),
        (api.complete_direct_upload("a"), "assets:write"),
        (api.get_api_key(), "account:read"),
    ],
)
def test_scopes(call, scope):
    body = json.dumps({"error": {"code": "insufficient_api_key_scope", "message": "M"}}).encode()
    with pytest.raises(PERMANENT, match=f"Add the scope '{scope}' to the API key of Airflow connection"):
        call.parse(403, {}, body, CONNECTION)


def test_another_missing_route_does_not_blame_the_resource():
    with pytest.raises(NOT_FOUND) as raised:
        answer("upload", {"error": {"code": "not_found"}}, 404)
    assert "resource" not in str(raised.value)


RETRY_AFTER = [
    ("0", 0),
    ("7", 7),
    (" 120 ", 120),
    ("999999", 999999),
    ("", None),
    ("soon", None),
    ("-5", None),
    ("1.5", None),
    ("inf", None),
    ("nan", None),
    ("\u00b2", None),
    ("9" * 400, None),
    ("Wed, 99 Foo 2026", None),
    ("Wed, 21 Oct 2015 07:28:00 GMT", 0),
    ("Wed, 21 Oct 2015 07:28:00", 0),
]


def test_retry_after():
    """``Retry-After`` is a whole number of seconds or a date; anything else is ignored."""
    for value, seconds in RETRY_AFTER:
        with pytest.raises(TRANSIENT) as raised:
            answer("create", b"", 429, {"retry-after": value})
        assert raised.value.retry_after == seconds, ascii(value)[:20]


def test_retry_after_as_a_date():
    in_an_hour = format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True)
    with pytest.raises(TRANSIENT) as raised:
        answer("get", b"", 503, {"Retry-After": in_an_hour})
    assert 3500 < raised.value.retry_after <= 3600
    with pytest.raises(TRANSIENT) as raised:  # HeyGen's clock counts
        answer("get", b"", 429, {"Retry-After": in_an_hour, "Date": in_an_hour})
    assert raised.value.retry_after == 0


@pytest.mark.parametrize(
    ("call", "status", "unknown"),
    [
        ("create", 500, True),
        ("create", 408, True),
        ("create", 429, False),
        ("create", 425, False),
        ("delete", 502, True),
        ("get", 500, False),
        ("list", 503, False),
    ],
)
def test_whether_it_may_have_taken_effect(call, status, unknown):
    with pytest.raises(TRANSIENT) as raised:
        answer(call, {"error": {"code": "c"}}, status)
    assert raised.value.outcome_unknown is unknown


def test_long_texts_are_cut():
    with pytest.raises(PERMANENT) as raised:
        answer("get", {"error": dict.fromkeys(("code", "message", "param", "doc_url"), "x" * 10**6)}, 400)
    assert len(str(raised.value)) < 10_000


@pytest.mark.parametrize("status", [301, 303, 307])
def test_redirects_are_not_followed(heygen, listen, status):
    other = listen()
    heygen.fail_next(status=status, headers={"Location": f"{other.url}/v3/overdubs/od_1"}, count=100)
    hook = HeyGenHook()
    for call in (
        lambda: hook.create_overdub(REQUEST),
        lambda: hook.get_overdub("od_1"),
        hook.list_overdubs,
        lambda: hook.update_overdub("od_1", "title"),
        lambda: hook.delete_overdub("od_1"),
        lambda: asyncio.run(hook.aget_overdub("od_1")),
        lambda: asyncio.run(hook.alist_overdubs()),
        lambda: asyncio.run(hook.adelete_overdub("od_1")),
    ):
        with pytest.raises(PERMANENT, match=r"Redirects are not followed.*'heygen_default'"):
            call()
    assert len(heygen.requests) == 8
    assert other.seen == []
    assert hook.test_connection()[0] is False
    assert other.seen == []


# --- Texts --------------------------------------------------------------------------------------------


REDACT_LINKS = [
    ("see https://h/v.mp4?a=b&c=d.", "see https://h/v.mp4?***"),
    ('{"url":"https://h/v.mp4?a=b&c=d"}', '{"url":"https://h/v.mp4?***"}'),
    ("HTTPS://h/v?a=b?c=d now", "HTTPS://h/v?*** now"),
    ("https://user:pw@h/v", "https://h/v"),
    ("s3://user:pw@bucket/v and s3://conn_id@bucket/v", "s3://bucket/v and s3://conn_id@bucket/v"),
    ("https://h/v?token", "https://h/v?***"),
    ("https://h/v?token?a=b", "https://h/v?***"),
    ("Is it so? Yes = no", "Is it so? Yes = no"),
    ("at https://h/v? Why?", "at https://h/v? Why?"),
    ("https://h/v?a='x'&sig=pw", "https://h/v?***"),
    ("'https://h/v?sig=pw' is gone", "'https://h/v?*** is gone"),
    (
        "https://h/v?u=1 and https%3A%2F%2Fh%2fv%3fsig%3Dpw%26a",
        "https://h/v?*** and https%3A%2F%2Fh%2fv%3F***",
    ),
    ("100%3F or 5%3D5", "100%3F or 5%3D5"),
]


def test_redact_urls():
    """The query of each URL is redacted, and no other text."""
    assert [(text, api.redact_urls(text)) for text, _ in REDACT_LINKS] == REDACT_LINKS
