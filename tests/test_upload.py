"""Uploads: what is taken, what goes over the wire, what is survived, what it costs in memory."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import PurePath

import jinja2
import pytest
from airflow.providers.common.compat.sdk import AirflowFailException, redact
from airflow.sdk import ObjectStoragePath
from airflow.sdk.io import attach
from airflow_task import StateStore, Task
from fsspec.implementations.memory import MemoryFileSystem
from test_hook import check_requests

from airflow_provider_heygen import api, transport, upload
from airflow_provider_heygen.emulator import media
from airflow_provider_heygen.exceptions import (
    HeyGenBadInputError,
    HeyGenError,
    HeyGenNotFoundError,
    HeyGenPermanentError,
    HeyGenTaskFailedError,
    HeyGenTransientError,
)
from airflow_provider_heygen.hooks.heygen import MAX_UPLOAD_URLS, HeyGenHook
from airflow_provider_heygen.operators.asset import HeyGenUploadAssetOperator
from airflow_provider_heygen.operators.overdub import HeyGenCreateOverdubOperator

MB = 1 << 20
RESOURCES = pytest.mark.parametrize("resource", ["overdubs", "lipsyncs"])
LIPSYNCS = pytest.mark.parametrize("resource", ["lipsyncs"])


def mp4(path, size=0, fill=b"\0"):
    """Write a file of that many bytes that is detected as mp4."""
    head = b"\0\0\0\x14ftypisom\0\0\2\0mp41\0\0\0\x08mdat"
    with path.open("wb") as file:
        file.write(head)
        if size:
            file.seek(size - 1)
            file.write(fill)
    return path


@pytest.fixture
def large(tmp_path):
    """A file for a direct upload."""
    return mp4(tmp_path / "large.mp4", 32 * MB + 1, b"x")


@pytest.fixture
def direct(tmp_path, monkeypatch):
    """A small file for a direct upload, because a form may have less than a MiB here."""
    monkeypatch.setattr(api, "MAX_MULTIPART_BYTES", MB - 1)
    return mp4(tmp_path / "direct.mp4", MB, b"x")


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def routes(heygen):
    return [f"{request.method} {request.route}" for request in heygen.requests]


def has_arrived(heygen, route):
    """Wait until a request that was given up is seen, or it would be seen in the next test."""
    until = time.monotonic() + 10
    while route not in routes(heygen):
        assert time.monotonic() < until
        time.sleep(0.01)


DIRECT = [
    "POST /v3/assets/direct-uploads",
    "PUT /uploads/{asset_id}",
    "POST /v3/assets/{asset_id}/complete",
]
DIRECT_PATH = "/v3/assets/direct-uploads"


# --- Types ----------------------------------------------------------------------------------------------


PICTURE = ("-f", "lavfi", "-i", "testsrc2=size=176x144:rate=25", "-t", "0.4")
SOUND = ("-f", "lavfi", "-i", "sine", "-t", "0.4")
TAKEN = {
    "v.mp4": ("video/mp4", *PICTURE),
    "fragmented.mp4": ("video/mp4", *PICTURE, "-movflags", "frag_keyframe+empty_moov"),
    "dash.mp4": ("video/mp4", *PICTURE, "-movflags", "+dash"),
    "v.m4v": ("video/mp4", *PICTURE),
    "v.webm": ("video/webm", *PICTURE),
    "a.mp3": ("audio/mpeg", *SOUND),
    "long-tag.mp3": ("audio/mpeg", *SOUND, "-metadata", f"comment={'x' * 3000}"),
    "bare.mp3": ("audio/mpeg", *SOUND, "-id3v2_version", "0", "-write_xing", "0"),
    "22kHz.mp3": ("audio/mpeg", *SOUND, "-ar", "22050", "-id3v2_version", "0"),
    "8kHz.mp3": ("audio/mpeg", *SOUND, "-ar", "8000", "-id3v2_version", "0"),
    "a.wav": ("audio/wav", *SOUND),
    "p.png": ("image/png", *PICTURE, "-frames:v", "1"),
    "p.jpg": ("image/jpeg", *PICTURE, "-frames:v", "1"),
}
REFUSED = {
    "v.mov": ("a QuickTime movie.*Convert it to mp4", *PICTURE),
    "v.3gp": ("a 3GP file", *PICTURE, "-c:v", "mpeg4"),
    "v.mkv": ("a Matroska file", *PICTURE),
    "v.avi": ("an AVI file", *PICTURE),
    "v.flv": ("a Flash video", *PICTURE),
    "v.ts": ("an MPEG transport stream", *PICTURE),
    "v.mpg": ("an MPEG program stream", *PICTURE),
    "v.wmv": ("a Windows Media file", *PICTURE),
    "a.m4a": ("an m4a audio file.*Convert it to mp3 or wav", *SOUND),
    "a.m4b": ("an m4a audio file", *SOUND, "-f", "ipod"),
    "a.mka": ("a Matroska file", *SOUND),
    "a.ogg": ("an Ogg file", *SOUND, "-c:a", "libvorbis"),
    "a.opus": ("an Ogg file", *SOUND),
    "a.flac": ("a FLAC file", *SOUND),
    "a.aac": ("an AAC file", *SOUND),
    "tagged.aac": ("an AAC file", *SOUND, "-write_id3v2", "1"),
    "a.aiff": ("an AIFF file", *SOUND),
    "rf64.wav": ("an RF64 wave file", *SOUND, "-rf64", "always"),
    "a.mp2": ("an unknown type", *SOUND),
    "p.gif": ("a GIF image.*Convert it to png or jpeg", *PICTURE, "-frames:v", "1"),
    "p.webp": ("a WebP image", *PICTURE, "-frames:v", "1"),
    "p.avif": ("a HEIF or AVIF image", *PICTURE, "-frames:v", "1"),
}
WRITTEN = {
    "page.mp4": ("an HTML or XML page.*login page", b"\n<!DOCTYPE html><html>Sign in</html>"),
    "error.mp4": ("an HTML or XML page", b"\xef\xbb\xbf<?xml version='1.0'?><Error/>"),
    "error.mp3": ("a JSON text", b'{"error": "no"}'),
    "text.mp3": ("an unknown type", b"not a video at all"),
    "utf16.mp3": ("an unknown type", "not a video".encode("utf-16")),
    "short.mp4": ("an unknown type", b"\0\0"),
    "short.mp3": ("an unknown type", b"ID3\4\0"),
    "zeros.wav": ("an unknown type", bytes(1000)),
    "old.mov": ("a QuickTime movie", b"\0\0\0\x08wide\0\0\x10\0mdat"),
    "document.pdf": ("a PDF document", b"%PDF-1.7"),
    "archive.zip": ("a ZIP archive", b"PK\3\4"),
    "tagged.flac": ("a FLAC file", b"ID3\4\0\0\0\0\1\0" + bytes(128) + b"fLaC"),
}


def make(path, *arguments):
    subprocess.run([media.ffmpeg_exe(), "-loglevel", "error", *arguments, path], check=True)
    return path


@pytest.mark.parametrize("name", TAKEN)
def test_a_type_that_is_accepted(heygen, tmp_path, name):
    mime_type, *arguments = TAKEN[name]
    # The name says nothing.
    path = make(tmp_path / name, *arguments).rename(tmp_path / "file.mov")
    assert HeyGenHook().upload_asset(path).mime_type == mime_type
    # The emulator has looked, too; the form says what we think it is.
    assert upload.Source.of(path, HeyGenHook().settings).mime_type == mime_type


@pytest.mark.parametrize("name", REFUSED)
def test_a_type_that_is_rejected(heygen, tmp_path, name):
    error, *arguments = REFUSED[name]
    path = make(tmp_path / name, *arguments).rename(tmp_path / "file.mp4")
    with pytest.raises(HeyGenBadInputError, match=f"{error}.*mp4, webm, mp3, wav, png and jpeg"):
        HeyGenHook().upload_asset(path)
    assert heygen.requests == []


@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_no_media_file(heygen, tmp_path, name):
    error, content = WRITTEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(HeyGenBadInputError, match=error):
        HeyGenHook().upload_asset(tmp_path / name)
    assert heygen.requests == []


def test_an_unknown_brand_of_mp4_is_left_to_heygen(heygen, tmp_path):
    path = tmp_path / "v.mp4"
    path.write_bytes(b"\0\0\0\x14ftypnew1\0\0\2\0isom\0\0\0\x08mdat")
    assert HeyGenHook().upload_asset(path).mime_type == "video/mp4"


# --- Files ----------------------------------------------------------------------------------------------


def bad_files(tmp_path):
    (tmp_path / "empty.mp4").touch()
    mp4(tmp_path / "huge.mp4", 32 * MB + 1)
    return {
        "There is no file": tmp_path / "missing.mp4",
        "is a directory": tmp_path,
        "is empty": tmp_path / "empty.mp4",
        r"has 32\.0 MiB.*'resource'.*'heygen_default'.*'lipsyncs'": tmp_path / "huge.mp4",
        "There is no file ": tmp_path / "empty.mp4" / "below-a-file.mp4",
    }


def test_a_bad_file_sends_nothing(heygen, tmp_path):
    for error, path in bad_files(tmp_path).items():
        for source in (str(path), f"file://{path}"):
            with pytest.raises(HeyGenBadInputError, match=error):
                HeyGenHook().upload_asset(source)
    assert heygen.requests == []


def test_what_is_no_plain_file(heygen, tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "nowhere.mp4").symlink_to(tmp_path / "missing")
    for name, error in (("pipe.mp4", "its size is unknown"), ("nowhere.mp4", "There is no file")):
        with pytest.raises(HeyGenBadInputError, match=error):
            HeyGenHook().upload_asset(tmp_path / name)
    assert heygen.requests == []
    (tmp_path / "link.mp4").symlink_to(mp4(tmp_path / "v.mp4", 1000))
    assert HeyGenHook().upload_asset(tmp_path / "link.mp4").size_bytes == 1000


@LIPSYNCS
@pytest.mark.parametrize(
    ("size", "name", "sent"),
    [
        (1000, "ü 日本.mp4", "ü 日本.mp4"),
        (1000, b"\xff.mp4", "?.mp4"),
        (1000, 'a"; name="b.mp4', "a%22; name=%22b.mp4"),
        (1000, "100%25 #1?.mp4", "100%25 #1?.mp4"),
        (32 * MB + 1, b"\xff.mp4", "?.mp4"),
        (32 * MB + 1, 'ü "; name="b.mp4', "ü %22; name=%22b.mp4"),
    ],
    ids=str,
)
def test_names(heygen, wire, tmp_path, size, name, sent):
    path = mp4(tmp_path / os.fsdecode(name), size)
    asset = HeyGenHook().upload_asset(path)
    assert [(kept.id, sha256(kept.path)) for kept in heygen.assets] == [(asset.asset_id, sha256(path))]
    request = wire.seen[0]
    if size > 1000:
        assert json.loads(request.body)["filename"] == sent.replace("%22", '"')
        return
    head, _, _ = request.body.partition(b"\r\n\r\n")
    assert len(head.split(b"\r\n")) == 3, "the name begins no header of its own"
    assert f'filename="{sent}"'.encode() in head


def test_storage_that_cannot_be_asked(heygen, s3, monkeypatch):
    with pytest.raises(HeyGenBadInputError, match=r"There is no file s3://s3@nowhere/v\.mp4"):
        HeyGenHook().upload_asset("s3://s3@nowhere/v.mp4")
    fs = s3.path.fs
    monkeypatch.setattr(type(fs), "retries", 1)
    extra = {
        "endpoint_url": "http://127.0.0.1:9",
        "region_name": "us-east-1",
        "config_kwargs": {"retries": {"total_max_attempts": 1}},
    }
    connection = {"conn_type": "aws", "login": "key", "password": "secret", "extra": extra}
    monkeypatch.setenv("AIRFLOW_CONN_S3_DOWN", json.dumps(connection))
    with pytest.raises(HeyGenError, match=r"s3://s3_down@bucket/v\.mp4 cannot be read: .*127\.0\.0\.1:9"):
        HeyGenHook().upload_asset("s3://s3_down@bucket/v.mp4")
    assert heygen.requests == []


def test_an_object_that_is_replaced_on_the_way(heygen, pauses, s3):
    """By another of the same size: what is sent would be half of each."""
    first, second = (b"\0\0\0\x14ftypisom" + bytes([fill]) * 20 * MB for fill in (1, 2))
    s3.write("v.mp4", first)
    source = upload.Source.of(s3.uri("v.mp4"), HeyGenHook().settings)
    with upload.Announced(source) as file:
        assert file.read(MB) == first[:MB]
        s3.write("v.mp4", second)
        with pytest.raises(HeyGenTransientError, match=r"v\.mp4 cannot be read"):
            list(upload.ChunkedBody(file))


def test_an_object_that_was_replaced_before(heygen, s3):
    """What the file system remembers of the old one would cut the new one short."""
    fs = s3.path.fs
    elsewhere = type(fs)(**fs.storage_options, skip_instance_cache=True)
    head = b"\0\0\0\x14ftypisom"
    s3.write("v.mp4", head + bytes(1000))
    assert len(fs.ls("bucket")) == 1
    elsewhere.pipe("bucket/v.mp4", head + bytes(2000))
    assert HeyGenHook().upload_asset(s3.uri("v.mp4")).size_bytes == len(head) + 2000


def test_from_memory_storage(heygen):
    attach("memory", fs=MemoryFileSystem())
    path = ObjectStoragePath("memory://bucket/v.mp4")
    with path.open("wb") as file:
        file.write(b"\0\0\0\x14ftypisom\0\0\2\0mp41" + bytes(5000))
    for source in (path, "memory://bucket/v.mp4"):
        asset = HeyGenHook().upload_asset(source)
        assert (asset.mime_type, asset.size_bytes) == ("video/mp4", 5020)


@LIPSYNCS
@pytest.mark.parametrize(
    ("size", "new_size"),
    [(1 * MB, 1), (1 * MB, 40 * MB), (33 * MB, 2000), (33 * MB, 40 * MB)],
    ids=["form, shorter", "form, longer", "direct, shorter", "direct, longer"],
)
def test_a_file_that_changes_its_length_on_the_way(heygen, pauses, tmp_path, size, new_size):
    path = mp4(tmp_path / "v.mp4", size)
    source = upload.Source.of(path, HeyGenHook().settings)
    assert source.digest
    mp4(path, new_size)
    with pytest.raises(HeyGenError, match="has changed while it was read") as caught:
        HeyGenHook().upload_asset(source)
    assert not isinstance(caught.value, AirflowFailException)  # a retry takes it as it is then
    has_arrived(heygen, DIRECT[1] if size > 32 * MB else "POST /v3/assets")
    assert pauses == []
    assert heygen.assets == []


@LIPSYNCS
@pytest.mark.parametrize("size", [1 * MB, 33 * MB], ids=["form", "direct"])
def test_a_file_that_changes_its_bytes_on_the_way(heygen, pauses, tmp_path, size):
    path = mp4(tmp_path / "v.mp4", size)
    source = upload.Source.of(path, HeyGenHook().settings)
    assert source.digest == sha256(path)
    with path.open("r+b") as file:
        file.seek(1000)
        file.write(b"other")
    with pytest.raises(HeyGenError, match="has changed while it was read") as caught:
        HeyGenHook().upload_asset(source)
    assert not isinstance(caught.value, AirflowFailException)
    has_arrived(heygen, DIRECT[1] if size > 32 * MB else "POST /v3/assets")
    assert (heygen.assets, pauses) == ([], [])


def test_a_file_that_the_hook_reads_for_the_first_time_changes_its_bytes(
    heygen, pauses, tmp_path, monkeypatch
):
    path = mp4(tmp_path / "v.mp4", 1 * MB)
    send = transport.send

    def rewrite_and_send(*args):
        with path.open("r+b") as file:
            file.seek(1000)
            file.write(b"other")
        return send(*args)

    monkeypatch.setattr(transport, "send", rewrite_and_send)
    with pytest.raises(HeyGenError, match="has changed while it was read"):
        HeyGenHook().upload_asset(path)
    assert heygen.assets == []


@LIPSYNCS
def test_a_file_that_is_damaged_during_the_upload(heygen, pauses, large, listen):
    storage = listen(lambda _: (400, {}, b"<Error><Code>BadDigest</Code></Error>"))
    upload_to(heygen, storage.url)
    with pytest.raises(HeyGenError, match=r"400 BadDigest.*has changed") as caught:
        HeyGenHook().upload_asset(large)
    assert not isinstance(caught.value, AirflowFailException)


class SlowReader:
    """A server that stops reading for longer than ``connect_timeout``, and then reads on."""

    def __init__(self, seconds):
        self.seconds, self.received = seconds, 0
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self):
        connection, _ = self.socket.accept()
        with connection, connection.makefile("rb") as stream:
            length = 0
            while line := stream.readline().strip():
                name, _, value = line.partition(b":")
                length = int(value) if name.lower() == b"content-length" else length
            time.sleep(self.seconds)
            while self.received < length and (chunk := stream.read1(MB)):
                self.received += len(chunk)
            body = b'{"data": {"asset_id": "asset_1"}}'
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        self.socket.close()


@LIPSYNCS
@pytest.mark.parametrize("size", [31 * MB, 33 * MB], ids=["form", "direct"])
def test_upload_timeout_may_exceed_connect_timeout(heygen, connect, pauses, tmp_path, size):
    server = SlowReader(1.5)
    timeouts = {"connect_timeout": 0.3, "upload_timeout": 30, "allow_private_hosts": True}
    if size > 32 * MB:
        connect(heygen.url, resource="lipsyncs", **timeouts)
        upload_to(heygen, server.url)
        heygen.fail_next(path=".*/complete", body='{"data": {}}')
    else:
        connect(server.url, **timeouts)
    asset = HeyGenHook(max_attempts=1).upload_asset(mp4(tmp_path / "v.mp4", size))
    assert asset.asset_id == "asset_1"
    assert server.received >= size


def test_an_upload_waits_no_longer_than_upload_timeout(connect, pauses, tmp_path):
    connect(SlowReader(30).url, connect_timeout=20, upload_timeout=0.3)
    with pytest.raises(HeyGenTransientError, match="no readable response arrived"):
        HeyGenHook(max_attempts=1).upload_asset(mp4(tmp_path / "v.mp4", 31 * MB))


def test_a_file_that_cannot_be_read_is_no_fault_of_the_network(heygen, pauses, tmp_path, monkeypatch):
    path = mp4(tmp_path / "v.mp4", MB)
    source = upload.Source.of(path, HeyGenHook().settings)
    assert source.digest
    read = upload.Announced.read

    def broken(self, size=-1):
        self._file.close()
        self._file = open("/proc/self/mem", "rb")  # noqa: SIM115 - its first bytes give an input/output error
        return read(self, size)

    monkeypatch.setattr(upload.Announced, "read", broken)
    with pytest.raises(HeyGenTransientError, match=r"v\.mp4 cannot be read: .*Input/output"):
        HeyGenHook(max_attempts=1).upload_asset(source)
    has_arrived(heygen, "POST /v3/assets")


# --- Over the wire --------------------------------------------------------------------------------------


@LIPSYNCS
def test_direct_upload(heygen, wire, large, monkeypatch, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login somebody password NETRC\n")
    monkeypatch.setenv("NETRC", str(netrc))
    asset = HeyGenHook().upload_asset(large, idempotency_key="key-1")
    assert routes(heygen) == DIRECT
    assert heygen.assets[0].id == asset.asset_id
    assert heygen.assets[0].sha256 == sha256(large)
    assert (asset.mime_type, asset.size_bytes) == ("video/mp4", 32 * MB + 1)

    create, put, complete = wire.seen
    wire.seen.remove(put)
    check_requests(wire)
    assert create.headers["Idempotency-Key"] == "key-1"
    assert json.loads(create.body) == {
        "filename": "large.mp4",
        "content_type": "video/mp4",
        "size_bytes": 32 * MB + 1,
        "checksum_sha256": sha256(large),
    }
    assert json.loads(complete.body) == {}
    names = {name.lower() for name in put.headers}
    assert names - {"host", "accept-encoding", "user-agent", "connection"} == {
        "content-length",
        "content-type",
        "x-amz-checksum-sha256",
    }
    assert put.headers["Content-Length"] == str(32 * MB + 1)
    assert "Signature=" in put.path
    assert "/uploads/" in caplog.text  # urllib3 tells of the PUT
    assert "Signature=" not in caplog.text


@RESOURCES
def test_up_to_32_mb_it_is_a_form_under_either_name(heygen, tmp_path):
    path = mp4(tmp_path / "v.mp4", 32 * MB)
    assert HeyGenHook().upload_asset(path).size_bytes == 32 * MB
    assert routes(heygen) == ["POST /v3/assets"]


@LIPSYNCS
@pytest.mark.parametrize(
    "fault",
    [
        {"method": "POST", "path": DIRECT_PATH, "status": 503},
        {"method": "POST", "path": DIRECT_PATH, "drop": "after"},
        {"method": "PUT", "status": 500},
        {"method": "PUT", "status": 429},
        {"method": "PUT", "drop": "before"},
        {"method": "PUT", "drop": "after"},
        {"method": "POST", "path": ".*/complete", "status": 500},
        {"method": "POST", "path": ".*/complete", "drop": "after"},
        {"method": "POST", "path": ".*/complete", "status": 409, "code": "conflict"},
        {"method": "POST", "path": ".*/complete", "status": 409, "body": "{}"},
    ],
    ids=str,
)
def test_direct_upload_survives(heygen, pauses, direct, fault):
    heygen.fail_next(**fault, count=2)
    asset = HeyGenHook().upload_asset(direct)
    assert [(kept.id, kept.sha256) for kept in heygen.assets] == [(asset.asset_id, sha256(direct))]
    assert len(pauses) == 2
    # One request for an upload, however often: its key is the same.
    assert len({request.idempotency_key for request in heygen.requests if request.route == DIRECT_PATH}) == 1


@LIPSYNCS
def test_storage_that_never_shows_the_file(heygen, pauses, direct):
    heygen.fail_next(
        path=".*/complete", status=409, code="conflict", message="Uploaded object not found yet.", count=99
    )
    with pytest.raises(HeyGenTransientError, match=r"409 conflict for the completion.*not found yet"):
        HeyGenHook(max_attempts=4).upload_asset(direct)
    assert len(pauses) == 3
    assert routes(heygen).count(DIRECT[1]) == 1


@LIPSYNCS
@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_a_rejected_upload_url_is_replaced(heygen, pauses, direct, status):
    heygen.fail_next(method="PUT", status=status)
    asset = HeyGenHook().upload_asset(direct, idempotency_key="k")
    assert [kept.id for kept in heygen.assets] == [asset.asset_id]
    keys = [request.idempotency_key for request in heygen.requests if request.route == DIRECT_PATH]
    assert len(keys) == len(set(keys)) == 2  # the same would bring the same URL
    assert pauses == []


@LIPSYNCS
@pytest.mark.parametrize("status", [404, 409])
def test_an_asset_that_is_gone_with_its_upload_url(heygen, pauses, direct, listen, status):
    storage = listen(lambda _: (403, {}, b""))
    upload_to(heygen, storage.url)
    heygen.fail_next(path=".*/complete", status=status)
    asset = HeyGenHook().upload_asset(direct)
    assert [kept.id for kept in heygen.assets] == [asset.asset_id]


@LIPSYNCS
def test_an_upload_url_that_has_expired(heygen, pauses, large):
    heygen.behaviour.upload_seconds = 1
    hook = HeyGenHook()
    call = api.create_direct_upload(
        filename="large.mp4",
        content_type="video/mp4",
        size_bytes=32 * MB + 1,
        checksum_sha256=sha256(large),
        idempotency_key="k",
    )
    old = hook._send(call)
    time.sleep(1.1)
    heygen.behaviour.upload_seconds = 3600
    # As a retry does a while later: the same key brings the old URL.
    asset = hook.upload_asset(large, idempotency_key="k")
    assert asset.asset_id != old.asset_id
    assert [kept.id for kept in heygen.assets] == [asset.asset_id]
    assert [request.status for request in heygen.requests if request.method == "PUT"] == [403, 200]


@LIPSYNCS
def test_upload_urls_that_are_dead_on_arrival(heygen, pauses, direct):
    heygen.behaviour.upload_seconds = 0
    with pytest.raises(HeyGenTransientError, match=r"3 upload URLs in a row.*it has expired"):
        HeyGenHook().upload_asset(direct)
    assert routes(heygen).count(DIRECT[0]) == MAX_UPLOAD_URLS
    assert DIRECT[1] not in routes(heygen)


@LIPSYNCS
def test_storage_that_rejects_every_url_is_quoted(heygen, pauses, direct, listen):
    storage = listen(lambda _: (403, {}, b"<Error><Code>SignatureDoesNotMatch</Code></Error>"))
    upload_to(heygen, storage.url, count=3)
    heygen.fail_next(path=".*/complete", status=409, code="conflict", count=3)
    with pytest.raises(HeyGenTransientError, match="403 SignatureDoesNotMatch") as caught:
        HeyGenHook().upload_asset(direct)
    assert "SECRET" not in str(caught.value)


@LIPSYNCS
def test_the_same_key_brings_the_same_asset_without_the_bytes(heygen, direct):
    first = HeyGenHook().upload_asset(direct, idempotency_key="k")
    again = HeyGenHook().upload_asset(direct, idempotency_key="k")
    assert again.asset_id == first.asset_id
    assert len(heygen.assets) == 1


def upload_to(heygen, url, count=1, **changes):
    """Have HeyGen send the next uploads somewhere else."""
    slot = {
        "asset_id": "asset_1",
        "upload_url": f"{url}/bucket/asset_1?X-Amz-Signature=SECRET",
        "upload_headers": {"Content-Type": "video/mp4", "x-amz-meta-token": "SECRET"},
        "expires_in_seconds": 60,
        "max_bytes": 100 * MB,
        "status": "pending_upload",
        **changes,
    }
    heygen.fail_next(path=DIRECT_PATH, body=json.dumps({"data": slot}), count=count)


@LIPSYNCS
@pytest.mark.parametrize("status", [302, 307])
def test_a_put_follows_no_redirect(heygen, pauses, direct, listen, status):
    other = listen()
    storage = listen(lambda _: (status, {"Location": f"{other.url}/elsewhere"}, b""))
    upload_to(heygen, storage.url)
    with pytest.raises(HeyGenPermanentError, match=f"returned {status}.*does not follow redirects") as caught:
        HeyGenHook().upload_asset(direct)
    assert other.seen == []
    assert len(storage.seen) == 1
    assert "SECRET" not in str(caught.value)


@LIPSYNCS
@pytest.mark.parametrize("status", [400, 501])
def test_what_storage_rejects(heygen, pauses, direct, listen, status):
    storage = listen(
        lambda _: (status, {}, b"<Error><Code>Strange</Code><Message>?sig=SECRET</Message></Error>")
    )
    upload_to(heygen, storage.url)
    with pytest.raises(HeyGenError, match=f"127.0.0.1 returned {status} Strange for the upload") as caught:
        HeyGenHook(max_attempts=2).upload_asset(direct)
    assert isinstance(caught.value, HeyGenPermanentError) is (status < 500)
    assert "SECRET" not in str(caught.value)


@LIPSYNCS
def test_what_storage_rejects_for_a_moment(heygen, pauses, direct, listen):
    """S3 has codes with a status of 400 or 409 for what a repeat, or another URL, mends."""
    codes = ["RequestTimeout", "IncompleteBody", "OperationAborted", "ExpiredToken"]
    for code in codes:
        answers = [(400, {}, f"<Error><Code>{code}</Code></Error>".encode()), (200, {}, b"")]
        storage = listen(lambda _, answers=answers: answers.pop(0))
        upload_to(heygen, storage.url, count=2 if code == "ExpiredToken" else 1)
        with contextlib.suppress(HeyGenNotFoundError):  # the emulator does not have storage's asset
            HeyGenHook(max_attempts=2).upload_asset(direct)
        heygen.clear_faults()
        assert len(storage.seen) == 2, code


@LIPSYNCS
def test_an_error_page_that_breaks_off(heygen, pauses, direct, listen):
    storage = listen(lambda _: b"HTTP/1.1 507 Full\r\nContent-Length: 999\r\n\r\n<Error>")
    upload_to(heygen, storage.url)
    with pytest.raises(HeyGenTransientError, match=r"127\.0\.0\.1 returned 507 for the upload"):
        HeyGenHook(max_attempts=1).upload_asset(direct)


@LIPSYNCS
def test_storage_that_hangs_up(heygen, pauses, direct, listen):
    upload_to(heygen, listen(lambda _: b"").url)
    with pytest.raises(HeyGenTransientError, match=r"while uploading to 127\.0\.0\.1") as raised:
        HeyGenHook(max_attempts=1).upload_asset(direct)
    assert "nothing was sent" not in str(raised.value)  # the file may have arrived


@LIPSYNCS
def test_storage_that_cannot_be_reached(heygen, pauses, direct):
    upload_to(heygen, "http://127.0.0.1:9")
    with pytest.raises(HeyGenTransientError, match=r"ConnectionError while uploading to 127\.0\.0\.1"):
        HeyGenHook(max_attempts=2).upload_asset(direct)


@LIPSYNCS
@pytest.mark.parametrize(
    ("url", "error"),
    [
        ("https://169.254.169.254", "private or loopback"),
        ("http://storage.example", "not https"),
        ("//storage.example", "not a URL"),
        ("https://[", "not a URL"),
        ("https://storage.example:99999", "not a URL"),
        ("https://10.0.0.1\\@8.8.8.8", "private or loopback"),
    ],
)
def test_an_upload_url_that_leads_where_it_must_not(heygen, connect, pauses, direct, url, error):
    connect(heygen.url, resource="lipsyncs")
    upload_to(heygen, url)
    with pytest.raises(HeyGenPermanentError, match=error) as caught:
        HeyGenHook().upload_asset(direct)
    assert "The upload URL" in str(caught.value)
    assert "SECRET" not in str(caught.value)


@LIPSYNCS
def test_heygens_message_about_the_size(heygen, pauses, large, listen):
    storage = listen()
    upload_to(heygen, storage.url, max_bytes=20 * MB)
    with pytest.raises(HeyGenPermanentError, match=r"has 32\.0 MiB, HeyGen accepts 20\.0 MiB"):
        HeyGenHook().upload_asset(large)
    assert storage.seen == []
    heygen.behaviour.max_upload_bytes = 20 * MB
    with pytest.raises(HeyGenPermanentError, match=r"400 invalid_parameter.*field 'size_bytes'"):
        HeyGenHook().upload_asset(large)


@LIPSYNCS
def test_an_api_without_direct_uploads(heygen, pauses, direct):
    heygen.fail_next(path=DIRECT_PATH, status=404)
    with pytest.raises(HeyGenNotFoundError, match="no direct uploads: make the file smaller"):
        HeyGenHook().upload_asset(direct)


@LIPSYNCS
@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"asset_id": None}, "asset_id"),
        ({"asset_id": "../x"}, "asset_id"),
        ({"upload_url": None}, "upload_url"),
        ({"upload_url": ["https://x.y"]}, "upload_url"),
        ({"upload_headers": "none"}, "upload_headers"),
        ({"upload_headers": {"a": []}}, "upload_headers"),
    ],
    ids=str,
)
def test_a_response_that_cannot_be_used(heygen, pauses, direct, changes, error):
    upload_to(heygen, heygen.url, **changes)
    with pytest.raises(HeyGenTransientError, match=error) as caught:
        HeyGenHook(max_attempts=1).upload_asset(direct)
    assert "SECRET" not in str(caught.value)


@LIPSYNCS
def test_a_response_with_few_fields_is_enough(heygen, direct, listen):
    storage = listen()
    changes = {"upload_headers": None, "expires_in_seconds": "soon", "max_bytes": None, "status": 7}
    upload_to(heygen, storage.url, **changes)
    heygen.fail_next(path=".*/complete", body='{"data": {}}')
    assert HeyGenHook().upload_asset(direct).asset_id == "asset_1"
    (seen,) = storage.seen
    assert hashlib.sha256(seen.body).hexdigest() == sha256(direct)
    assert "Content-Type" not in seen.headers


def test_a_slot_does_not_show_its_secrets():
    slot = api.DirectUpload(
        asset_id="a", upload_url="https://x.y/?sig=SECRET", upload_headers={"token": "SECRET"}
    )
    assert "SECRET" not in f"{slot!r} {slot}"


MEASURE = """
import re, sys
from pathlib import Path
from airflow_provider_heygen.hooks.heygen import HeyGenHook
def peak():  # ru_maxrss would begin with that of the process it was forked from
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
with HeyGenHook() as hook:
    hook.upload_asset(sys.argv[1])  # loads what is loaded on first use
    before = peak()
    hook.upload_asset(sys.argv[2])
    print(peak() - before)
"""


@LIPSYNCS
@pytest.mark.parametrize(("size", "limit"), [(32, 16), (100, 32)], ids=["form", "direct"])
def test_memory_does_not_grow_with_the_file(heygen, tmp_path, size, limit):
    files = [mp4(tmp_path / "small.mp4", MB), mp4(tmp_path / "large.mp4", size * MB)]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, files)], capture_output=True, text=True, check=True
    )
    assert heygen.assets[1].size_bytes == size * MB
    assert float(done.stdout.splitlines()[-1]) < limit


# --- Inputs of an overdub -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    directory = tmp_path_factory.mktemp("clips")
    media.make_video(directory / "v.mp4", 1.0)
    media.make_audio(directory / "a.mp3", 1.0)
    return directory


def dub(clips, **changes):
    uris = {"video": f"file://{clips}/v.mp4", "audio": f"file://{clips}/a.mp3"}
    return lambda: HeyGenCreateOverdubOperator(task_id="dub", poke_interval=0.02, **uris | changes)


@RESOURCES
def test_files_are_uploaded_and_dubbed(heygen, clips):
    task = Task(dub(clips), store=StateStore())
    assert task.start() == heygen.jobs[0].id
    sent = heygen.jobs[0].request
    assets = {asset.id: asset for asset in heygen.assets}
    assert len(assets) == 2
    assert assets[sent.video.asset_id].path.read_bytes() == (clips / "v.mp4").read_bytes()
    assert assets[sent.audio.asset_id].path.read_bytes() == (clips / "a.mp3").read_bytes()
    assert task.store.get("heygen_overdub")["assets"] == {
        sha256(clips / "v.mp4"): sent.video.asset_id,
        sha256(clips / "a.mp3"): sent.audio.asset_id,
    }
    assert task.xcoms["overdub"]["status"] == "completed"


@pytest.mark.parametrize(
    "form",
    [
        lambda path: {"type": "url", "url": f"file://{path}"},
        lambda path: ObjectStoragePath(f"file://{path}"),
        lambda path: f"FILE://{path}",
        lambda path: f"file:{path}",
        lambda path: path,
    ],
    ids=["mapping", "ObjectStoragePath", "upper case", "one slash", "pathlib"],
)
def test_other_forms_of_a_file(heygen, clips, form):
    video, audio = form(clips / "v.mp4"), "HTTPS://x.y/a.mp3"
    operator = dub(clips, video=video, audio=audio, wait_for_completion=False)()
    operator.render_template_fields({}, jinja2.Environment(autoescape=True))
    Task(lambda: operator, store=StateStore()).start()
    assert heygen.jobs[0].request.video.asset_id == heygen.assets[0].id
    assert heygen.jobs[0].request.audio.url == audio


def test_one_file_for_both_is_uploaded_once(heygen, clips):
    Task(dub(clips, audio=f"file://{clips}/v.mp4"), store=StateStore()).start()
    sent = heygen.jobs[0].request
    assert sent.video.asset_id == sent.audio.asset_id == heygen.assets[0].id
    assert len(heygen.assets) == 1


@LIPSYNCS
def test_a_large_video_is_dubbed(heygen, clips, tmp_path):
    # A box of nothing makes any mp4 as long as one likes.
    video = tmp_path / "large.mp4"
    padding = 33 * MB
    video.write_bytes((clips / "v.mp4").read_bytes() + padding.to_bytes(4, "big") + b"free")
    with video.open("r+b") as file:
        file.truncate(video.stat().st_size - 8 + padding)
    assert Task(dub(clips, video=f"file://{video}"), store=StateStore()).start() == heygen.jobs[0].id
    assert routes(heygen)[:4] == [*DIRECT, "POST /v3/assets"]
    assert heygen.jobs[0].status == "completed"


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"audio": "file:///missing.mp3"}, "audio: There is no file"),
        ({"audio": "file://{clips}"}, "audio: .* is a directory"),
        ({"audio": "nope://bucket/a.mp3"}, "audio: .*cannot be used"),
        ({"video": "file://{clips}/a.mp3"}, "video: .*is audio/mpeg, no video"),
        ({"audio": "file://{clips}/p.png"}, "audio: .*is image/png, no audio"),
        ({"video": "file://{clips}/p.png"}, "video: .*is image/png, no video"),
        ({"video": "{clips}/v.mp4"}, "video: .*file:///data/talk.mp4"),
        ({"video": "v.mp4"}, "video: .*file:///data/talk.mp4"),
        ({"video": PurePath("v.mp4")}, "video: .* is neither absolute"),
        ({"video": b"v.mp4"}, "video: must be a URL, the URI of a file, or an asset"),
        ({"audio": ["s3://b/a.mp3"]}, "audio: must be a URL, the URI of a file, or an asset"),
        ({"video": "\nhttps://x.y/v.mp4"}, "video: .* white space"),
        ({"audio": "file:a.mp3"}, "audio: .* is neither absolute"),
        ({"audio": "http://x.y/a.mp3"}, "audio: must be a public https URL"),
        ({"mode": "fast"}, "mode"),
    ],
    ids=str,
)
def test_nothing_is_uploaded_before_all_is_checked(heygen, clips, changes, error):
    if not (clips / "p.png").exists():
        make(clips / "p.png", *PICTURE, "-frames:v", "1")
    changes = {
        name: str(value).format(clips=clips) if isinstance(value, str) else value
        for name, value in changes.items()
    }
    task = Task(dub(clips, **changes), store=StateStore())
    with pytest.raises(HeyGenTaskFailedError, match=error) as caught:
        task.start()
    assert isinstance(caught.value.__cause__, HeyGenBadInputError)
    assert heygen.requests == []
    assert not task.store


def test_a_rejected_upload_starts_no_overdub(heygen, pauses, clips):
    heygen.fail_next(path="/v3/assets", status=402)
    with pytest.raises(HeyGenTaskFailedError, match="402"):
        Task(dub(clips), store=StateStore()).start()
    assert heygen.jobs == []


def test_what_is_secret_in_a_uri_is_masked_and_a_connection_id_is_not():
    uris = {"video": "s3://aws_masked@bucket/v.mp4?sig=MASKED1", "audio": "sftp://user:MASKED2@x.y/a.mp3"}
    operator = HeyGenCreateOverdubOperator(task_id="task", **uris)
    operator.render_template_fields({}, jinja2.Environment(autoescape=True))
    assert redact(operator.video) == "s3://aws_masked@bucket/v.mp4?***"
    assert "MASKED2" not in redact(operator.audio)
    operator = HeyGenUploadAssetOperator(task_id="task", source="https://x.y/v.mp4?sig=MASKED3")
    operator.render_template_fields({}, jinja2.Environment(autoescape=True))
    assert "MASKED3" not in redact(operator.source)


def test_no_secret_is_in_the_record_or_the_log(heygen, clips, caplog):
    caplog.set_level(logging.DEBUG)
    task = Task(dub(clips, wait_for_completion=False), store=StateStore())
    task.start()
    for text in (json.dumps(task.store), json.dumps(task.xcoms), caplog.text):
        assert "Signature" not in text
        assert heygen.api_key not in text


def test_the_form_is_sent_in_large_pieces(heygen, tmp_path):
    """Not in the 16 kB of urllib3, nor so large that a slow line would not do."""
    source = upload.Source.of(mp4(tmp_path / "v.mp4", 3 * MB), HeyGenHook().settings)
    with upload.Announced(source) as file:
        assert [len(chunk) for chunk in upload.ChunkedBody(file)] == [MB // 4] * 12


# --- Links that are uploaded ----------------------------------------------------------------------------


MP4 = b"\0\0\0\x14ftypisom"


class Origin:
    """A server of source files on loopback, which knows Range; ``files`` has content and headers by path."""

    def __init__(self, listen, clips):
        self.files = {
            "/v.mp4": ((clips / "v.mp4").read_bytes(), {"ETag": '"1"'}),
            "/a.mp3": ((clips / "a.mp3").read_bytes(), {}),
        }
        self.breaks = 0
        self.server = listen(self.answer)

    def answer(self, seen):
        path = seen.path.partition("?")[0]
        content, headers = self.files.get(path, (None, {}))
        if content is None:
            return 404, {}, b"no such file"
        if "Location" in headers:
            return 302, headers, content
        start = int(seen.headers.get("Range", "bytes=0-")[6:-1])
        length = len(content)
        if start:
            headers = {**headers, "Content-Range": f"bytes {start}-{length - 1}/{length}"}
        if self.breaks and self.paths.count(path) > 1:
            self.breaks -= 1
            head = [f"HTTP/1.1 {206 if start else 200} OK", f"Content-Length: {length - start}"]
            head += [f"{name}: {value}" for name, value in headers.items()]
            return "\r\n".join([*head, "", ""]).encode() + content[start:][: length // 3]
        return (206 if start else 200), headers, content[start:]

    @property
    def paths(self):
        return [seen.path.partition("?")[0] for seen in self.server.seen]

    def url(self, name):
        return f"{self.server.url}{name}?X-Amz-Signature=SECRET"


@pytest.fixture
def origin(listen, clips):
    return Origin(listen, clips)


def dub_links(origin, **changes):
    given = {"video": origin.url("/v.mp4"), "audio": origin.url("/a.mp3"), "upload_links": True}
    operator = HeyGenCreateOverdubOperator(task_id="dub", poke_interval=0.02, **given | changes)
    return lambda: operator


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The folder for temporary files."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"verify": "/nowhere/ca.pem"}, "The 'verify' file of Airflow connection 'heygen_default'"),
        ({"cert": "/nowhere/client.pem"}, "The 'cert' file of Airflow connection 'heygen_default'"),
        ({"proxies": {"https": "nope://me:pw@x:1"}}, "The 'proxies' of Airflow connection 'heygen_default'"),
        ({"proxies": {"https": " http://x:1"}}, "The 'proxies' of Airflow connection 'heygen_default'"),
    ],
    ids=["verify", "cert", "proxy scheme", "proxy space"],
)
def test_a_setting_cannot_work_for_a_url(connect, pauses, extra, message):
    """The worker downloads the URL before its first request to HeyGen."""
    connect(None, allow_private_hosts=True, **extra)
    urls = {"video": "https://127.0.0.1:9/v.mp4", "audio": "https://127.0.0.1:9/a.mp3"}
    operator = HeyGenCreateOverdubOperator(task_id="dub", upload_links=True, **urls)
    with pytest.raises(HeyGenTaskFailedError, match=message) as raised:
        Task(lambda: operator, store=StateStore()).start()
    assert "pw" not in str(raised.value)
    assert pauses == []


def test_the_proxy_is_named_if_a_url_cannot_be_downloaded(connect, pauses):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    connect(None, allow_private_hosts=True, proxies={"https": f"http://me:pw@127.0.0.1:{port}"})
    with pytest.raises(HeyGenTransientError, match="while downloading the source video") as raised:
        HeyGenHook(max_attempts=2).peek("https://127.0.0.1:9/v.mp4?Signature=SECRET", "source video")
    assert "connection refused. Check 'proxies' of Airflow connection" in str(raised.value)
    assert "pw" not in str(raised.value)
    assert "SECRET" not in str(raised.value)
    assert len(pauses) == 1


@RESOURCES
def test_urls_are_uploaded(heygen, origin, temporary, caplog):
    caplog.set_level(logging.DEBUG)
    task = Task(dub_links(origin), store=StateStore())
    assert task.start() == heygen.jobs[0].id
    sent = heygen.jobs[0].request
    kept = {asset.id: asset.path.read_bytes() for asset in heygen.assets}
    assert kept[sent.video.asset_id] == origin.files["/v.mp4"][0]
    assert kept[sent.audio.asset_id] == origin.files["/a.mp3"][0]
    for seen in origin.server.seen:
        assert heygen.api_key not in str(seen.headers)
    assert list(temporary.iterdir()) == []
    for text in (json.dumps(task.store), json.dumps(task.xcoms), caplog.text):
        assert "SECRET" not in text


@pytest.mark.parametrize(
    ("url", "error"),
    [
        ("https://10.0.0.1/v.mp4", "source video leads to 10.0.0.1, a private.*'allow_private_hosts'"),
        ("http://example.com/v.mp4", "source video leads to http://example.com.*'allow_http'"),
        ("https://[/v.mp4", "source video is not a URL"),
    ],
)
@pytest.mark.parametrize("redirected", [False, True], ids=["at once", "redirected"])
def test_a_url_that_leads_where_it_must_not(heygen, connect, origin, url, error, redirected, monkeypatch):
    connect(heygen.url)
    if redirected:
        # Only the origin itself may be private.
        monkeypatch.setattr("airflow_provider_heygen.media._is_private", lambda host: host == "10.0.0.1")
        origin.files["/v.mp4"] = (b"", {"Location": url})
        url = origin.url("/v.mp4")
    with pytest.raises(HeyGenTaskFailedError, match=error):
        Task(dub_links(origin, video=url), store=StateStore()).start()
    assert heygen.requests == []
    assert origin.paths == ["/v.mp4"] * redirected


@pytest.mark.parametrize(
    ("content", "kind", "error"),
    [
        ((404, {}, b""), HeyGenTransientError, "source video at 127.0.0.1 returned 404"),
        ((200, {"Content-Type": "text/html"}, b"<html>"), HeyGenTransientError, "returned 200 .text/html"),
        ((200, {}, b"<html>Sign in"), HeyGenTransientError, "returned a page instead of the source video"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n", HeyGenTransientError, "ProtocolError while down"),
        ((200, {}, b"OggS" + bytes(600)), HeyGenTaskFailedError, "video: http.*v.mp4.* is an Ogg file"),
        ((200, {}, b"ID3\4" + bytes(99)), HeyGenTaskFailedError, "video: .*is audio/mpeg, no video"),
        (
            (200, {"Content-Length": 32 * MB + 1}, MP4 + bytes(MB)),
            HeyGenTaskFailedError,
            "has 32.0 MiB",
        ),
    ],
    ids=str,
)
def test_a_url_of_no_video(heygen, pauses, origin, content, kind, error):
    origin.server.answer = lambda _: content
    with pytest.raises(kind, match=error) as caught:
        Task(dub_links(origin), store=StateStore()).start()
    assert heygen.requests == []
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize(("name", "kind"), [("/v.mp4", "video"), ("/a.mp3", "audio")])
def test_half_of_a_file_of_unknown_length_is_not_uploaded(heygen, pauses, origin, name, kind):
    content, _ = origin.files[name]
    cut = b"HTTP/1.0 200 OK\r\n\r\n" + content[: len(content) // 2]
    answer, origin.server.answer = (
        origin.server.answer,
        lambda seen: cut if name in seen.path else answer(seen),
    )
    with pytest.raises(HeyGenTransientError, match=f"download of the source {kind} ended after"):
        Task(dub_links(origin), store=StateStore()).start()
    assert heygen.requests == []


def test_a_url_with_white_space(heygen, origin):
    for url in (f"{origin.server.url}/v.mp4\n", f"{origin.server.url}/v v.mp4"):
        with pytest.raises(HeyGenTaskFailedError, match=r"video: .* has white space"):
            Task(dub_links(origin, video=url), store=StateStore()).start()
    assert origin.server.seen == heygen.requests == []


def test_the_password_of_a_url_goes_to_its_host_only(heygen, origin, listen):
    other = listen(origin.answer)
    origin.files["/moved.mp4"] = (b"", {"Location": f"{other.url}/v.mp4"})
    url = origin.server.url.replace("://", "://user:pass@")
    Task(dub_links(origin, video=f"{url}/moved.mp4"), store=StateStore()).start()
    basic = "Basic dXNlcjpwYXNz"
    assert {seen.headers["Authorization"] for seen in origin.server.seen if "moved" in seen.path} == {basic}
    assert {seen.headers["Authorization"] for seen in other.seen} == {None}


def test_a_url_whose_download_breaks_is_resumed(heygen, pauses, origin):
    origin.breaks = 2
    Task(dub_links(origin), store=StateStore()).start()
    assert heygen.assets[0].path.read_bytes() == origin.files["/v.mp4"][0]
    assert [seen.headers["Range"] for seen in origin.server.seen if seen.headers["Range"]]


def test_a_url_of_unknown_length(heygen, origin):
    content = origin.files["/v.mp4"][0]
    origin.files["/v.mp4"] = (b"", {})
    origin.server.answer, answer = (
        (lambda seen: b"HTTP/1.0 200 OK\r\n\r\n" + content if "/v.mp4" in seen.path else answer(seen)),
        origin.server.answer,
    )
    Task(dub_links(origin), store=StateStore()).start()
    assert heygen.assets[0].path.read_bytes() == content


@RESOURCES
def test_a_url_without_an_end(heygen, resource, monkeypatch):
    """It would fill the disk; 120 MB stand for no end here."""
    limit = 32 if resource == "overdubs" else 40
    monkeypatch.setattr(upload, "MAX_DIRECT_BYTES", 40 * MB)
    sent = []

    def send(connection):
        connection.recv(65536)
        with contextlib.suppress(OSError):
            connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n" + MP4)
            for size in range(120):
                sent.append(size)
                connection.sendall(bytes(MB))
        connection.close()

    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            for _ in "head", "file":
                send(server.accept()[0])

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/v.mp4"
        with pytest.raises(HeyGenBadInputError, match=f"source video has more than {limit} MiB"):
            upload.check_inputs({"video": url}, HeyGenHook(), {})
        thread.join(60)
    assert limit <= max(sent) < 100
    assert routes(heygen) == []


@pytest.mark.parametrize(
    "headers", [{}, {"Last-Modified": "Sat, 28 Nov 2026 10:00:00 GMT"}, {"ETag": '"1"'}], ids=str
)
@pytest.mark.parametrize("signed_again", [False, True], ids=["same link", "signed again"])
def test_a_retry_downloads_no_more_than_it_must(heygen, pauses, origin, headers, signed_again):
    for name, (content, _) in origin.files.items():
        origin.files[name] = (content, headers)
    heygen.fail_next(method="POST", path="/v3/overdubs", status=503, count=6)
    task = Task(dub_links(origin), store=StateStore())
    with pytest.raises(HeyGenTransientError):
        task.start()
    before = len(origin.paths)
    assert before == 4
    if signed_again:
        task.make = dub_links(origin, **{name: f"{origin.url(path)}2" for name, path in VIDEO_AND_AUDIO})
    task.start()
    known = headers and (not signed_again or "ETag" in headers)
    assert len(origin.paths) - before == (2 if known else 4)
    assert (len(heygen.assets), len(heygen.jobs)) == (2, 1)


VIDEO_AND_AUDIO = (("video", "/v.mp4"), ("audio", "/a.mp3"))


def expire(origin):
    origin.server.answer = lambda _: (403, {}, b"<Error><Code>AccessDenied</Code></Error>")


@pytest.mark.parametrize("headers", [{}, {"ETag": '"1"'}], ids=str)
def test_a_url_that_expires_loses_no_overdub(heygen, pauses, origin, headers, tmp_path):
    for name, (content, _) in origin.files.items():
        origin.files[name] = (content, headers)
    heygen.fail_next(path="/files/", status=403, count=6)
    task = Task(dub_links(origin, destination=f"{tmp_path}/v.mp4"), store=StateStore())
    with pytest.raises(HeyGenError, match="not saved"):
        task.start()
    expire(origin)
    assert task.start() == f"file://{tmp_path}/v.mp4"
    assert (len(heygen.assets), len(heygen.jobs)) == (2, 1)
    task.clear()  # perhaps because of what was there
    with pytest.raises(HeyGenTransientError, match="may have expired"):
        task.start()


@pytest.mark.parametrize("store", [True, False], ids=["state store", "no state store"])
def test_a_url_that_expires_in_the_queue_is_not_needed_again(heygen, pauses, origin, store):
    task = Task(dub_links(origin, deferrable=True), store=StateStore() if store else None)
    heygen.fail_next(method="POST", path="/v3/overdubs", status=429)
    deferred = task.start()
    expire(origin)
    task.resume(deferred, {"status": "ready"})
    assert (len(heygen.assets), len(heygen.jobs)) == (2, 1)


def test_a_url_that_expires_before_the_file_is_uploaded(heygen, pauses, origin):
    heygen.fail_next(path="/v3/assets", status=503, count=6)
    task = Task(dub_links(origin), store=StateStore())
    with pytest.raises(HeyGenTransientError, match="503"):
        task.start()
    expire(origin)
    with pytest.raises(HeyGenTransientError, match="may have expired") as caught:
        task.start()
    assert "SECRET" not in str(caught.value)
    assert heygen.jobs == []


def test_a_retry_after_an_upload_that_failed_downloads_again(heygen, pauses, origin):
    heygen.fail_next(path="/v3/assets", status=503, count=6)
    task = Task(dub_links(origin), store=StateStore())
    with pytest.raises(HeyGenTransientError):
        task.start()
    assert task.start() == heygen.jobs[0].id
    assert heygen.assets[0].path.read_bytes() == origin.files["/v.mp4"][0]


def test_another_file_at_the_url_makes_another_overdub(heygen, origin):
    task = Task(dub_links(origin), store=StateStore())
    task.start()
    origin.files["/v.mp4"] = (origin.files["/v.mp4"][0] + bytes(8), {"ETag": '"2"'})
    task.start()
    assert len(heygen.jobs) == 2
    assert [asset.size_bytes for asset in heygen.assets].count(len(origin.files["/v.mp4"][0])) == 1


def test_a_file_that_changes_while_it_is_fetched(heygen, pauses, origin):
    """Its length is that of the first read, its bytes are those of the second."""
    content = origin.files["/v.mp4"][0]
    contents = iter([content, content + b"more"])
    origin.server.answer = lambda _: (200, {}, next(contents))
    with pytest.raises(HeyGenError, match=r"v\.mp4.* has changed while it was read"):
        Task(dub_links(origin, audio={"type": "asset_id", "asset_id": "a"}), store=StateStore()).start()
    assert heygen.requests == []


@LIPSYNCS
def test_the_large_file_of_a_url_is_uploaded(heygen, origin):
    content = MP4 + bytes(33 * MB)
    origin.files["/v.mp4"] = (content, {})
    Task(dub_links(origin, wait_for_completion=False), store=StateStore()).start()
    assert routes(heygen)[:3] == DIRECT
    assert heygen.assets[0].path.read_bytes() == content
