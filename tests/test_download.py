"""Downloads: which URLs are followed, which faults are survived, and that a file is complete or absent."""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import logging
import os
import pathlib
import random
import re
import resource as limits
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from airflow.sdk import Asset, ObjectStoragePath
from airflow.sdk.execution_time.context import OutletEventAccessors
from airflow_task import StateStore, Task
from conftest import AIRFLOW, each_value
from packaging.version import Version
from test_hook import REQUEST, both_resources, completed

from airflow_provider_heygen import download, media, upload
from airflow_provider_heygen.exceptions import (
    HeyGenBadInputError,
    HeyGenError,
    HeyGenNotFoundError,
    HeyGenOverdubFailedError,
    HeyGenPermanentError,
    HeyGenTaskFailedError,
    HeyGenTransientError,
)
from airflow_provider_heygen.hooks import heygen as module
from airflow_provider_heygen.hooks.heygen import HeyGenHook
from airflow_provider_heygen.transfers.heygen_to_object_storage import HeyGenOverdubToObjectStorageOperator

MB = 1 << 20


def on_either_storage(names, values, ids=None):
    """Parametrize a test over values, on a file system and on S3 in turn."""
    cases = [value if "," in names else (value,) for value in values]
    cases = [(*case, kind) for case, kind in each_value(cases, ["file", "s3"])]
    return pytest.mark.parametrize(f"{names},storage", cases, ids=ids, indirect=["storage"])


LIPSYNCS = pytest.mark.parametrize("resource", ["lipsyncs"])


@pytest.fixture(scope="module")
def video():
    """20 MiB, more than one part of an upload to S3."""
    return random.Random(1).randbytes(20 * MB)


@pytest.fixture
def overdub_id(heygen, video, tmp_path_factory):
    """A completed overdub with that video."""
    overdub_id = completed(heygen)
    path = tmp_path_factory.mktemp("heygen") / "v.mp4"
    path.write_bytes(video)
    heygen.jobs[0].output = path
    return overdub_id


def fetches(heygen):
    """Status and Range of each request for a file."""
    return [
        (record.status, record.headers.get("range"))
        for record in heygen.requests
        if record.path.startswith("/files/")
    ]


def sha256(content):
    return hashlib.sha256(content).hexdigest()


# --- Breaks -------------------------------------------------------------------------------------------


@on_either_storage("seed", [1, 2])
def test_five_drops_at_random_places(heygen, pauses, storage, overdub_id, video, seed):
    for _ in range(5):
        # What has been sent is sent again, so that all five strike.
        heygen.fail_next(path="/files/", drop_after_bytes=random.Random(seed).randrange(4 * MB))
    assert HeyGenHook().download_overdub(overdub_id, storage.uri("v.mp4")) == len(video)
    assert sha256(storage.read("v.mp4")) == sha256(video)
    assert storage.names() == ["v.mp4"]
    assert len(pauses) == 5
    (first, *later) = fetches(heygen)
    assert first == (200, None)
    starts = [int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) for _, wanted in later]
    assert starts == sorted(starts)
    assert {status for status, _ in later} == {206}
    links = {record.query for record in heygen.requests if record.path.startswith("/files/")}
    assert len(links) > 1


def test_only_attempts_that_bring_nothing_count(heygen, pauses, storage, overdub_id, video):
    heygen.fail_next(path="/files/", drop_after_bytes=3 * MB // 2, count=12)
    assert HeyGenHook(max_attempts=2).download_overdub(overdub_id, storage.uri("v.mp4")) == len(video)
    assert storage.read("v.mp4") == video
    assert len(pauses) == 12
    heygen.fail_next(path="/files/", drop_after_bytes=1000, count=100)
    with pytest.raises(HeyGenTransientError):
        HeyGenHook(max_attempts=3).download_overdub(overdub_id, storage.uri("w.mp4"))
    assert len(pauses) == 14
    assert storage.names() == ["v.mp4"]


def test_a_url_that_expires_during_the_download(heygen, pauses, storage, overdub_id, video):
    heygen.fail_next(path="/files/", drop_after_bytes=5 * MB)
    for status in (401, 403, 404):
        heygen.fail_next(path="/files/", status=status)
    HeyGenHook().download_overdub(overdub_id, storage.uri("v.mp4"))
    assert storage.read("v.mp4") == video
    assert fetches(heygen) == [
        (200, None),
        *((status, f"bytes={5 * MB}-") for status in (401, 403, 404)),
        (206, f"bytes={5 * MB}-"),
    ]


def test_given_up_midway(heygen, pauses, storage, overdub_id):
    """Of which a part has already gone to S3."""
    storage.write("v.mp4", b"old")
    heygen.fail_next(path="/files/", drop_after_bytes=12 * MB)
    heygen.fail_next(path="/files/", status=403, count=100)
    with pytest.raises(HeyGenTransientError, match="returned 403"):
        HeyGenHook(max_attempts=3).download_overdub(overdub_id, storage.uri("v.mp4"), overwrite=True)
    assert storage.names() == ["v.mp4"]
    assert storage.read("v.mp4") == b"old"


class Cdn:
    """The server of the URL: a file, by Range and If-Range. Each of ``faults`` affects one request."""

    def __init__(self, listen, video):
        self.video = video
        self.headers = {"ETag": '"1"', "Content-Type": "video/mp4"}
        self.faults = []
        self.server = listen(self.answer)

    @property
    def ranges(self):
        return [(seen.headers["Range"], seen.headers["If-Range"]) for seen in self.server.seen]

    def answer(self, seen):
        fault = self.faults.pop(0) if self.faults else {}
        headers = dict(self.headers) | fault.get("headers", {})
        video, status, start = fault.get("video", self.video), 200, 0
        wanted = re.fullmatch(r"bytes=(\d+)-", seen.headers["Range"] or "")
        known = {None, headers.get("ETag"), headers.get("Last-Modified")}
        if wanted and fault.get("ranges", True) and (seen.headers["If-Range"] in known or "etag" in fault):
            status, start = 206, int(wanted[1])
            headers["Content-Range"] = f"bytes {start}-{len(video) - 1}/{len(video)}"
        # It closes after each response; without the header a client might still use the old connection.
        headers = {"Content-Length": len(video) - start, "Connection": "close"} | headers
        headers |= fault.get("always", {})
        status = fault.get("status", status)
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items() if value is not None)
        body = fault.get("body", video[start:])
        cut = fault.get("cut", len(body))
        return f"HTTP/1.1 {status} X\r\n{lines}\r\n".encode() + body[:cut]


def box(kind, content=b"", large=False):
    length = (1).to_bytes(4, "big") if large else (8 + len(content)).to_bytes(4, "big")
    return length + kind + ((16 + len(content)).to_bytes(8, "big") if large else b"") + content


def mp4(size):
    """What has the boxes of an mp4, and as many bytes."""
    head = box(b"ftyp", b"isom\0\0\2\0") + box(b"moov", bytes(4))
    return head + box(b"mdat", random.Random(2).randbytes(size - len(head) - 8))


@pytest.fixture
def cdn(heygen, listen):
    cdn = Cdn(listen, mp4(3 * MB))
    leads_to(heygen, f"{cdn.server.url}/v.mp4?Signature=pw")
    return cdn


DATE = "Mon, 01 Jun 2026 00:00:00 GMT"
RESUMES = {
    "ETag": ({"ETag": '"1"'}, '"1"'),
    "weak ETag": (
        {"ETag": 'W/"1"', "Last-Modified": "Mon, 01 Jun 2026 00:00:00 GMT"},
        "Mon, 01 Jun 2026 00:00:00 GMT",
    ),
    "Last-Modified": ({"Last-Modified": "Mon, 01 Jun 2026 00:00:00 GMT"}, "Mon, 01 Jun 2026 00:00:00 GMT"),
    "neither": ({}, None),
}


@on_either_storage("headers,version", RESUMES.values(), ids=RESUMES)
def test_resume(cdn, pauses, storage, headers, version):
    cdn.headers = headers
    cdn.faults = [{"cut": 2 * MB}]
    HeyGenHook().download_overdub("od_1", storage.uri("v.mp4"))
    assert storage.read("v.mp4") == cdn.video
    assert cdn.ranges == [(None, None), (f"bytes={2 * MB}-", version)]


def test_no_resume_without_a_validator(cdn, pauses, storage):
    """Neither a length nor a validator proves that the rest belongs to the same file."""
    cdn.headers = {}
    cdn.faults = [chunked(OTHER[: 2 * MB])]
    HeyGenHook().download_overdub("od_1", storage.uri("v.mp4"))
    assert storage.read("v.mp4") == cdn.video


def chunked(begun):
    """A fault: the response has no length, and breaks after that many bytes."""
    always = {"Content-Length": None, "Transfer-Encoding": "chunked"}
    return {"always": always, "body": f"{len(begun):x}\r\n".encode() + begun + b"\r\n"}


@pytest.mark.parametrize(
    "fault",
    [
        {},
        {"always": {"Content-Range": f"bytes {2 * MB}-{2 * MB + 9}/{3 * MB}", "Content-Length": 10}},
        {"always": {"Content-Length": None}, "cut": 10},
    ],
    ids=["whole", "a part only", "too little"],
)
def test_the_length_is_known_later(cdn, pauses, storage, fault):
    cdn.faults = [chunked(cdn.video[: 2 * MB]), fault]
    assert HeyGenHook().download_overdub("od_1", storage.uri("v.mp4")) == 3 * MB
    assert storage.read("v.mp4") == cdn.video
    assert cdn.ranges[1] == (f"bytes={2 * MB}-", '"1"')


GONE = {"always": {"Content-Range": "bytes */1000"}, "status": 416, "body": b""}


@pytest.mark.parametrize(
    "fault", [GONE, {"etag": True, "headers": {"ETag": '"2"'}}], ids=["416", "another ETag"]
)
def test_what_does_not_go_on_is_not_asked_for_again(cdn, pauses, storage, fault):
    cdn.faults = [{"cut": 2 * MB}, fault]
    HeyGenHook().download_overdub("od_1", storage.uri("v.mp4"))
    assert cdn.ranges == [(None, None), (f"bytes={2 * MB}-", '"1"'), (None, None)]


OTHER = random.Random(3).randbytes(3 * MB)
RESTARTS = {
    "Range ignored": [{"ranges": False}],
    "Range ignored, length unknown": [{"ranges": False, "always": {"Content-Length": None}}],
    "Range ignored again and again": [{"ranges": False, "cut": MB}, {"ranges": False, "cut": MB // 2}],
    "416": [{"always": {"Content-Range": "bytes */1000"}, "status": 416, "body": b""}],
    "another ETag": [{"etag": True, "headers": {"ETag": '"2"'}, "video": OTHER}],
    "another length": [{"etag": True, "video": OTHER + b"more"}],
    "another place": [{"always": {"Content-Range": f"bytes 0-{3 * MB - 1}/{3 * MB}"}, "body": OTHER[:MB]}],
    "a part only": [
        {"always": {"Content-Range": f"bytes {2 * MB}-{2 * MB + 9}/{3 * MB}", "Content-Length": 10}}
    ],
    "too little": [{"always": {"Content-Length": None}, "cut": 10}],
    "no Content-Range": [{"always": {"Content-Range": None}}],
    "too much": [{"always": {"Content-Length": None}, "body": bytes(2 * MB)}],
}


@on_either_storage("faults", RESTARTS.values(), ids=RESTARTS)
def test_start_over(cdn, pauses, storage, faults):
    cdn.faults = [{"cut": 2 * MB}, *faults]
    assert HeyGenHook().download_overdub("od_1", storage.uri("v.mp4")) == 3 * MB
    assert storage.read("v.mp4") == cdn.video
    assert storage.names() == ["v.mp4"]


def test_another_file_of_another_length(cdn, pauses, storage):
    """The URL leads to another file after a break: that one is saved, complete."""
    cdn.faults = [{"cut": 2 * MB}]
    HeyGenHook().download_overdub("od_1", storage.uri("v.mp4"))
    cdn.faults = [{"cut": 2 * MB}, {"headers": {"ETag": '"2"'}, "video": OTHER[: 2 * MB + 5]}]
    size = HeyGenHook().download_overdub("od_1", storage.uri("v.mp4"), overwrite=True)
    assert size == 2 * MB + 5
    assert storage.read("v.mp4") == OTHER[: 2 * MB + 5]


LENGTHS = {
    "short": {"always": {"Content-Length": 3 * MB + 1}},
    "short by Content-Range": {"status": 206, "always": {"Content-Range": f"bytes 0-9/{3 * MB}"}},
    "nothing": {"video": b""},
    "HTML": {"headers": {"Content-Type": "text/html; charset=utf-8"}},
    "text": {"headers": {"Content-Type": "text/plain"}},
    "HTML that says it is a video": {"headers": {"Content-Type": "video/mp4"}, "video": b"\n <html>Sign in"},
    "XML of no type": {
        "headers": {"Content-Type": None},
        "video": b"\xef\xbb\xbf<?xml version='1.0'?><Error/>",
    },
    "JSON of no type": {"headers": {"Content-Type": None}, "video": b'{"error": "no"}'},
    "a message": {"headers": {"Content-Type": "video/mp4"}, "video": b"upstream connect error"},
    "UTF-16": {"headers": {"Content-Type": "video/mp4"}, "video": "<html>Sign in".encode("utf-16")},
    "gzip": {"headers": {"Content-Type": "video/mp4"}, "video": b"\x1f\x8b\x08abc"},
    "no length in words": {"always": {"Content-Length": "\xb2"}, "video": b""},
    "00": {"always": {"Content-Length": "00"}, "video": b""},
    "XML": {"headers": {"Content-Type": "application/xml"}},
}


@on_either_storage("fault", LENGTHS.values(), ids=LENGTHS)
def test_what_is_not_the_video_is_never_there(cdn, pauses, storage, fault):
    cdn.faults = [{"ranges": False, **fault}] * 3
    with pytest.raises(
        HeyGenTransientError, match=r"ended after|instead of the video|while downloading"
    ) as raised:
        HeyGenHook(max_attempts=3).download_overdub("od_1", storage.uri("v.mp4"))
    assert "pw" not in str(raised.value)
    assert storage.names() == []
    storage.write("v.mp4", b"old")
    cdn.faults = [{"ranges": False, **fault}] * 3
    with pytest.raises(HeyGenTransientError):
        HeyGenHook(max_attempts=3).download_overdub("od_1", storage.uri("v.mp4"), overwrite=True)
    assert storage.read("v.mp4") == b"old"
    assert storage.names() == ["v.mp4"]


# --- The destination ------------------------------------------------------------------------------------


def test_it_is_there_whole_or_not_at_all(heygen, storage, overdub_id, video, slow):
    """No reader sees a partial file, or another name, while a file is written or replaced."""
    server = slow(video)
    leads_to(heygen, server.url)
    storage.write("old.mp4", b"old")
    for name, before in (("new.mp4", None), ("old.mp4", b"old")):
        server.go_on.clear()
        thread = threading.Thread(
            target=lambda name=name: HeyGenHook().download_overdub("od_1", storage.uri(name), overwrite=True)
        )
        thread.start()
        assert server.half_sent.wait(20)
        time.sleep(0.3)
        storage.path.fs.invalidate_cache()
        assert (storage.path / name).exists() is (before is not None)
        assert before is None or storage.read(name) == before
        server.go_on.set()
        thread.join(30)
        assert storage.read(name) == video
        server.half_sent.clear()
    assert storage.names() == ["new.mp4", "old.mp4"]


class SlowServer:
    """Sends half of a file, and the rest when the test says so. Ignores Range."""

    def __init__(self, content):
        self.content = content
        self.half_sent, self.go_on = threading.Event(), threading.Event()
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/v.mp4?Signature=pw"
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self):
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            threading.Thread(target=self.answer, args=(connection,), daemon=True).start()

    def answer(self, connection):
        with connection:
            try:
                connection.recv(65536)
                head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(self.content)}\r\n\r\n".encode()
                half = len(self.content) // 2
                connection.sendall(head + self.content[:half])
                self.half_sent.set()
                self.go_on.wait(60)
                connection.sendall(self.content[half:])
            except OSError:
                pass  # the client is gone


@pytest.fixture
def slow():
    servers = []

    def start(content):
        servers.append(SlowServer(content))
        return servers[-1]

    yield start
    for server in servers:
        server.go_on.set()
        server.socket.close()


DOWNLOADER = """
import sys
from airflow_provider_heygen.hooks.heygen import HeyGenHook
HeyGenHook().download_overdub("od_1", sys.argv[1])
"""


def test_a_server_that_stops_sending(heygen, connect, pauses, tmp_path, video, slow):
    server = slow(video)
    connection = heygen.connection()
    connect(heygen.url, connection["password"], **connection["extra"] | {"read_timeout": 0.3})
    leads_to(heygen, server.url)
    resumes = threading.Timer(20, server.go_on.set)  # a download without a timeout would wait for it
    resumes.start()
    with pytest.raises(HeyGenTransientError, match="while downloading the video"):
        HeyGenHook(max_attempts=1).download_overdub("od_1", tmp_path / "v.mp4")
    resumes.cancel()
    assert list(tmp_path.iterdir()) == []


def test_killed_and_retried(heygen, storage, video, slow):
    server = slow(video)
    leads_to(heygen, server.url)
    with subprocess.Popen([sys.executable, "-c", DOWNLOADER, storage.uri("v.mp4")]) as task:
        assert server.half_sent.wait(60)
        # As much as there is has been written, to the last whole buffer.
        deadline = time.monotonic() + 20
        while storage.names() == [] and time.monotonic() < deadline:
            time.sleep(0.05)
        task.send_signal(signal.SIGKILL)
    (left,) = storage.names()
    assert re.fullmatch(r"\.v\.mp4\.\w{8}\.part|upload of v\.mp4", left)
    server.go_on.set()
    assert HeyGenHook().download_overdub("od_1", storage.uri("v.mp4")) == len(video)
    assert sha256(storage.read("v.mp4")) == sha256(video)
    # S3 keeps what was uploaded, unseen, until the bucket's lifecycle rule removes it.
    assert storage.names() == (["upload of v.mp4"] if storage.path.protocol == "s3" else []) + ["v.mp4"]


def test_the_file_of_a_running_writer_stays(heygen, tmp_path, video, slow):
    server = slow(video)
    leads_to(heygen, server.url)
    target = tmp_path / "v.mp4"
    other = tmp_path / ".v.mp4.12345678.part"
    with other.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        server.go_on.set()
        HeyGenHook().download_overdub("od_1", target)
        assert other.exists()
    (tmp_path / ".w.mp4.12345678.part").touch()
    HeyGenHook().download_overdub("od_1", target, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".w.mp4.12345678.part", "v.mp4"]
    assert target.read_bytes() == video


def test_two_writers_at_once(heygen, tmp_path, video, slow):
    server = slow(video)
    leads_to(heygen, server.url)
    target = tmp_path / "v.mp4"
    threads = [
        threading.Thread(target=lambda: HeyGenHook().download_overdub("od_1", target, overwrite=True))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
        assert server.half_sent.wait(20)
        server.half_sent.clear()
    time.sleep(0.3)
    assert len(list(tmp_path.iterdir())) == 2
    server.go_on.set()
    for thread in threads:
        thread.join(30)
    assert [path.name for path in tmp_path.iterdir()] == ["v.mp4"]
    assert target.read_bytes() == video


@pytest.fixture
def full_disk(tmp_path):
    """A file system of 4 MiB."""
    folder = tmp_path / "full"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_disk_full(heygen, pauses, full_disk, overdub_id):
    (full_disk / "v.mp4").write_bytes(b"old")
    with pytest.raises(HeyGenError, match=r"v\.mp4 cannot be written: .*No space left on device"):
        HeyGenHook().download_overdub(overdub_id, full_disk / "v.mp4", overwrite=True)
    assert [path.name for path in full_disk.iterdir()] == ["v.mp4"]
    assert (full_disk / "v.mp4").read_bytes() == b"old"
    assert pauses == []


def test_a_file_that_may_not_grow(heygen, pauses, tmp_path, overdub_id):
    """As a full disk, for those who may not mount one."""
    soft, hard = limits.getrlimit(limits.RLIMIT_FSIZE)
    limits.setrlimit(limits.RLIMIT_FSIZE, (4 * MB, hard))
    try:
        with pytest.raises(HeyGenError, match=r"v\.mp4 cannot be written: .*File too large"):
            HeyGenHook().download_overdub(overdub_id, tmp_path / "v.mp4")
    finally:
        limits.setrlimit(limits.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []
    assert pauses == []


def test_not_writable(heygen, pauses, tmp_path, overdub_id):
    (tmp_path / "file").write_text("")
    for destination, reason in ((tmp_path / "file" / "v.mp4", "Not a directory"), ("/proc/v.mp4", "/proc/")):
        with pytest.raises(HeyGenError, match=reason) as raised:
            HeyGenHook().download_overdub(overdub_id, destination)
        assert f"{destination} cannot be" in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert pauses == []


def test_s3_rejects(heygen, pauses, s3, overdub_id, monkeypatch):
    with pytest.raises(
        HeyGenError, match=r"s3://s3@nowhere/v\.mp4 cannot be written: .*bucket does not exist"
    ):
        HeyGenHook().download_overdub(overdub_id, "s3://s3@nowhere/v.mp4")
    assert pauses == []


def test_what_is_there(heygen, pauses, storage, overdub_id, video):
    same_beginning = video[:MB] + bytes(len(video) - MB)
    storage.write("v.mp4", same_beginning)
    assert HeyGenHook().download_overdub(overdub_id, storage.uri("v.mp4")) == len(video)
    assert storage.read("v.mp4") == same_beginning, "kept"
    size = len(video)
    others = {
        b"old": "3 bytes",
        b"": "0 bytes",
        video[:-1]: f"{size - 1} bytes",
        video + b"x": f"{size + 1} bytes",
    }
    others[video[: MB - 1] + bytes(size - MB + 1)] = f"{size} bytes, the video has {size} others"
    for other, error in others.items():
        storage.write("v.mp4", other)
        with pytest.raises(HeyGenPermanentError, match=f"exists with .*{error}"):
            HeyGenHook().download_overdub(overdub_id, storage.uri("v.mp4"))
        assert storage.read("v.mp4") == other
    assert HeyGenHook().download_overdub(overdub_id, storage.uri("v.mp4"), overwrite=True) == len(video)
    assert storage.read("v.mp4") == video
    assert storage.names() == ["v.mp4"]


@on_either_storage(
    "fault",
    [
        {"always": {"Content-Length": 0}, "body": b""},
        {"headers": {"Content-Type": None}, "video": b"<html>Sign in"},
        {"cut": MB // 2},
        {"status": 503},
    ],
    ids=str,
)
def test_an_invalid_response_proves_nothing_about_the_resource(cdn, pauses, storage, fault):
    storage.write("v.mp4", cdn.video)
    cdn.faults = [fault]
    assert HeyGenHook().download_overdub("od_1", storage.uri("v.mp4")) == 3 * MB
    assert len(pauses) == 1
    storage.write("v.mp4", b"")
    cdn.faults = [fault]
    with pytest.raises(HeyGenPermanentError, match="exists with 0 bytes"):
        HeyGenHook().download_overdub("od_1", storage.uri("v.mp4"))
    assert storage.read("v.mp4") == b""


def test_another_task_has_written_the_file_meanwhile(heygen, storage, video, slow):
    server = slow(video)
    leads_to(heygen, server.url)
    told = []

    def download():
        try:
            HeyGenHook().download_overdub("od_1", storage.uri("v.mp4"))
        except HeyGenError as error:
            told.append(error)

    thread = threading.Thread(target=download)
    thread.start()
    assert server.half_sent.wait(20)
    storage.write("v.mp4", b"of another")
    server.go_on.set()
    thread.join(30)
    (error,) = told
    assert "was written by another process while the video was downloaded" in str(error)
    assert not isinstance(error, HeyGenPermanentError)  # a retry checks what it is
    assert storage.read("v.mp4") == b"of another"
    assert storage.names() == ["v.mp4"]


def test_what_a_file_system_remembers_is_not_believed(heygen, s3, overdub_id, video):
    """Neither that nothing is there, nor what was there before."""
    fs = s3.path.fs
    elsewhere = type(fs)(**fs.storage_options, skip_instance_cache=True)
    s3.write("other.mp4", b"")
    assert len(fs.ls("bucket")) == 1
    elsewhere.pipe("bucket/v.mp4", b"old")
    with pytest.raises(HeyGenPermanentError, match="exists with 3 bytes"):
        HeyGenHook().download_overdub(overdub_id, s3.uri("v.mp4"))
    assert len(fs.ls("bucket")) == 2
    elsewhere.rm("bucket/v.mp4")
    assert HeyGenHook().download_overdub(overdub_id, s3.uri("v.mp4")) == len(video)
    assert s3.read("v.mp4") == video


NAMES = [
    "a b.mp4",
    "100%25.mp4",
    "a#b.mp4",
    "a?b=c.mp4",
    "a[1]*.mp4",
    f"{'x' * 251}.mp4",
    f"{'日' * 83}é.mp4",
    "ü.mp4",
    "u\u0308.mp4",
    "'\".mp4",
    "~x.mp4",
    "C:\\x.mp4",
    "a@b:c.mp4",
]


@pytest.mark.parametrize(
    ("name", "storage"),
    # What a URI gives another meaning to has one on each storage.
    [*each_value(NAMES, ["file", "s3"]), *each_value(NAMES[:5], ["s3", "file"])],
    indirect=["storage"],
)
def test_names(heygen, lineage, storage, overdub_id, name):
    heygen.jobs[0].output.write_bytes(mp4(2000))
    returned, _ = transfer(overdub_id, storage.uri(name))
    plain = re.split("[?#]", returned.replace("s3@", ""))[0]
    assert returned.endswith(f"/{name}")
    assert storage.names() == [name]
    assert ObjectStoragePath(returned).read_bytes() == mp4(2000)
    assert transfer(overdub_id, returned)[0] == returned, "kept"
    assert {found.asset.uri.startswith(plain) for found in lineage.collected_assets.outputs} == {True}
    assert upload.Source.of(returned, HeyGenHook().settings).digest == sha256(mp4(2000))


FORMS = {
    "path": "{home}/v.mp4",
    "double slash": "{home}//v.mp4",
    "file:///": "file://{home}/v.mp4",
    "localhost": "file://localhost{home}/v.mp4",
    "file:/": "file:{home}/v.mp4",
    "capitals": "FILE://{home}/v.mp4",
    "~": "~/v.mp4",
    "file://~": "file://~/v.mp4",
    "two dots": "{home}/../{home.name}/v.mp4",
    "two colons": "{home}/C++ std::vector, part 1.mp4",
    "two colons in a URI": "file://{home}/a::b/c::d.mp4",
}


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        *((str, form) for form in FORMS.values()),
        *((pathlib.Path, FORMS[form]) for form in ("path", "~", "two colons")),
    ],
    ids=[*FORMS, *(f"pathlib {form}" for form in ("path", "~", "two colons"))],
)
def test_forms_of_a_local_file(heygen, tmp_path, monkeypatch, overdub_id, form, kind):
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    text = form.format(home=home)
    monkeypatch.chdir(tmp_path)
    heygen.jobs[0].output.write_bytes(mp4(2000))
    returned, _ = transfer(overdub_id, kind(text))
    (saved,) = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert saved.parent.is_relative_to(home)
    assert saved.name == text.rpartition("/")[2]
    assert ObjectStoragePath(returned).read_bytes() == saved.read_bytes() == mp4(2000)
    assert pathlib.Path(returned.removeprefix("file://")).samefile(saved)
    settings = HeyGenHook().settings
    assert {upload.Source.of(source, settings).digest for source in (kind(text), returned)} == {
        sha256(mp4(2000))
    }


WRONG = {
    "": "is empty",
    "None": "the text 'None'",
    "\n/data/v.mp4": "white space",
    "/data/v.mp4\n": "white space",
    "s3://bucket/v.mp4 ": "white space",
    "/data/v\n.mp4": "line break",
    "s3://bucket/a::b.mp4": "'::'",
    "/data/v.mp4?": "another file, 'file:///data/v.mp4'",
    "s3://bucket/v.mp4#": "another file",
    "/data/a\0b.mp4": "NUL byte",
    "v.mp4": "neither absolute",
    "~nobody-here/v.mp4": "neither absolute",
    "file://host/data/v.mp4": "neither absolute",
    "s3:/bucket/v.mp4": "neither absolute",
    "C:\\talks\\v.mp4": "neither absolute",
    "\\\\server\\v.mp4": "neither absolute",
    "warehouse://b/v.mp4?x=pw": "provider of that storage",
    "https://bucket.s3.amazonaws.com/v.mp4": "by the URI of its storage",
}


@pytest.mark.parametrize(("path", "error"), WRONG.items(), ids=repr)
def test_what_names_no_file_sends_nothing(heygen, tmp_path, monkeypatch, s3, path, error):
    if Version("3.2") > AIRFLOW and "::" in path:
        pytest.skip("its ObjectStoragePath takes '::' for a part of the name")
    monkeypatch.chdir(tmp_path)
    for call in (
        lambda: transfer("od_1", path),
        lambda: HeyGenHook().download_overdub("od_1", path),
        lambda: HeyGenHook().download_captions("od_1", path),
        lambda: HeyGenHook().upload_asset(path),
    ):
        with pytest.raises(HeyGenError, match=error) as raised:
            call()
        assert isinstance(raised.value.__cause__ or raised.value, HeyGenBadInputError)
        assert "pw" not in str(raised.value)
    for path in ("/data/", "s3://s3@bucket/"):
        with pytest.raises(HeyGenBadInputError, match="names a folder"):
            HeyGenHook().upload_asset(path)
    assert (heygen.requests, list(tmp_path.iterdir()), s3.names()) == ([], [], [])


def test_the_captions_do_not_replace_the_video(heygen, tmp_path):
    with pytest.raises(HeyGenTaskFailedError, match=r"destination ends in '\.srt'"):
        transfer("od_1", f"{tmp_path}/v.srt", captions=True, overwrite=True)
    assert heygen.requests == []


# --- What a task instance has written itself ----------------------------------------------------------


def saving(overdub_id, destination, store, **kwargs):
    return Task(
        lambda: HeyGenOverdubToObjectStorageOperator(
            task_id="save", overdub_id=overdub_id, destination=destination, **kwargs
        ),
        store=store,
    )


@pytest.mark.parametrize("resource", ["lipsyncs"])
def test_a_clear_replaces_what_the_task_has_written(heygen, storage, overdub_id, video):
    """Create and save are cleared: there is another video, and the old one is in its place."""
    task = saving(overdub_id, storage.uri("v.mp4"), StateStore(), captions=True)
    for length in (MB, 2 * MB, 3 * MB):
        heygen.jobs[0].output.write_bytes(mp4(length))
        task.start()
        assert storage.read("v.mp4") == mp4(length)
        assert task.start().endswith("v.mp4"), "a retry keeps it"
        task.clear()
    assert storage.names() == ["v.mp4", "v.srt"]
    assert "v.mp4" not in json.dumps(task.store)


@on_either_storage("by", ["another", "another instance", "no store", "no clear"])
def test_what_the_task_has_not_written_is_not_replaced(heygen, storage, overdub_id, by):
    task = saving(overdub_id, storage.uri("v.mp4"), None if by == "no store" else StateStore())
    heygen.jobs[0].output.write_bytes(mp4(MB))
    task.start()
    heygen.jobs[0].output.write_bytes(mp4(2 * MB))
    if by != "no clear":
        task.clear()
    if by == "another":
        storage.write("v.mp4", mp4(MB)[:-1] + b"x")
    if by == "another instance":
        task.store.clear()
    before = storage.read("v.mp4")
    with pytest.raises(HeyGenTaskFailedError, match="exists with"):
        task.start()
    assert storage.read("v.mp4") == before


MEASURE = """
import re, sys
from pathlib import Path
from airflow_provider_heygen.hooks.heygen import HeyGenHook
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
with HeyGenHook() as hook:
    hook.download_overdub(sys.argv[1], sys.argv[3])  # loads what is loaded on first use
    before = peak()
    hook.download_overdub(sys.argv[2], sys.argv[4])
    print(peak() - before)
"""


def test_memory_does_not_grow_with_the_video(heygen, tmp_path, overdub_id, tmp_path_factory):
    large = completed(heygen)
    heygen.jobs[1].output = tmp_path_factory.mktemp("heygen") / "large.mp4"
    with heygen.jobs[1].output.open("wb") as file:
        file.truncate(100 * MB)
    arguments = [overdub_id, large, tmp_path / "small.mp4", tmp_path / "large.mp4"]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, check=True
    )
    assert (tmp_path / "large.mp4").stat().st_size == 100 * MB
    assert float(done.stdout.splitlines()[-1]) < 16


# --- The operator -----------------------------------------------------------------------------------------


def transfer(overdub_id, destination, **kwargs):
    """Run the operator; return what it returns, and its XComs."""
    task = Task(
        lambda: HeyGenOverdubToObjectStorageOperator(
            task_id="save", overdub_id=overdub_id, destination=destination, **kwargs
        )
    )
    return task.start(), task.xcoms


@LIPSYNCS
def test_captions(heygen, storage, overdub_id, video):
    returned, xcoms = transfer(overdub_id, storage.uri("a.b.mp4"), captions=True)
    assert ObjectStoragePath(returned).read_bytes() == video
    assert xcoms == {"captions": returned.replace(".mp4", ".srt")}
    assert storage.names() == ["a.b.mp4", "a.b.srt"]
    assert storage.read("a.b.mp4") == video
    assert b"[Captions of the new audio]" in storage.read("a.b.srt")


def test_no_captions(heygen, pauses, storage, overdub_id, video):
    with pytest.raises(HeyGenTransientError, match=r"no URL of the captions yet.*'lipsyncs' only"):
        transfer(overdub_id, storage.uri("v.mp4"), captions=True)
    assert storage.names() == ["v.mp4"], "the video is kept all the same"


@pytest.mark.parametrize("kind", ["text/plain; charset=utf-8", "application/x-subrip", None])
def test_captions_of_any_type_but_a_page(heygen, listen, pauses, tmp_path, kind):
    answers = [b"\n<html>Sign in", b"1\n00:00:00,000 --> 00:00:01,000\n<i>Hallo</i>\n"]
    server = listen(lambda _: (200, {"Content-Type": kind} if kind else {}, answers[len(server.seen) - 1]))
    overdub = {"id": "od_1", "status": "completed", "caption_url": f"{server.url}/v.srt"}
    heygen.fail_next(path="/v3/", body=json.dumps({"data": overdub}), count=2)
    HeyGenHook().download_captions("od_1", tmp_path / "v.srt")
    assert (tmp_path / "v.srt").read_bytes() == answers[1]


@LIPSYNCS
def test_captions_are_not_a_page(heygen, pauses, storage, overdub_id):
    heygen.fail_next(path="/files/.*srt", status=200, html=True)
    heygen.fail_next(path="/files/.*srt", drop_after_bytes=10)
    transfer(overdub_id, storage.uri("v.mp4"), captions=True)
    assert storage.read("v.srt").startswith(b"1\n00:00")
    assert len(pauses) == 2


def test_an_asset_learns_what_it_is(heygen, tmp_path, overdub_id, video):
    asset = Asset("file:///dubs/v.mp4")
    operator = HeyGenOverdubToObjectStorageOperator(
        task_id="save", overdub_id=overdub_id, destination=str(tmp_path / "v.mp4"), outlets=[asset]
    )
    events = OutletEventAccessors()
    uri = operator.execute({"outlet_events": events})
    assert events[asset].extra == {"overdub_id": overdub_id, "uri": uri, "size_bytes": len(video)}


@pytest.fixture
def lineage(monkeypatch):
    """Airflow's collector; without a plugin that reads it, there is one that collects nothing."""
    collector = type(module.get_hook_lineage_collector()).__mro__[1]()
    monkeypatch.setattr(module, "get_hook_lineage_collector", lambda: collector)
    return collector


@pytest.mark.parametrize(
    ("resource", "storage"), [("overdubs", "s3"), ("lipsyncs", "file")], indirect=["storage"]
)
def test_lineage(heygen, lineage, storage, overdub_id, resource):
    returned, _ = transfer(overdub_id, storage.uri("v.mp4"))
    collected = lineage.collected_assets
    assert [found.asset.uri for found in collected.inputs] == [f"heygen://overdubs/{overdub_id}"]
    assert [found.asset.uri for found in collected.outputs] == [returned.replace("s3@", "")]


@LIPSYNCS
@on_either_storage("fault", [{"drop_after_bytes": 2 * MB}, {"status": 403}, {"html": True}], ids=str)
def test_no_url_is_reported(heygen, lineage, pauses, storage, overdub_id, caplog, fault):
    heygen.fail_next(path="/files/", **fault)
    with caplog.at_level(logging.DEBUG):
        told = [*transfer(overdub_id, storage.uri("v.mp4"), captions=True)]
        heygen.fail_next(path="/files/", count=10, **fault | {"drop_after_bytes": 0})
        with pytest.raises(HeyGenTransientError) as raised:
            transfer(overdub_id, storage.uri("w.mp4"))
    told += [caplog.text, str(raised.value), repr(vars(raised.value))]
    told += [asset.asset for asset in (*lineage.collected_assets.inputs, *lineage.collected_assets.outputs)]
    secrets = [record.query for record in heygen.requests if record.path.startswith("/files/")]
    secrets += [query.rpartition("=")[2] for query in secrets]
    assert len(secrets) >= 8
    assert [secret for secret in secrets if any(secret in str(text) for text in told)] == []


def test_no_server_listens_at_the_url(heygen, pauses, tmp_path):
    """The error of urllib3 would quote it."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    leads_to(heygen, f"http://127.0.0.1:{port}/v.mp4?Signature=pw")
    with pytest.raises(HeyGenTransientError, match="ConnectionError while downloading") as raised:
        HeyGenHook(max_attempts=2).download_overdub("od_1", tmp_path / "v.mp4")
    assert "pw" not in str(raised.value)


@pytest.mark.parametrize(
    "uri", ["s3://user:SECRET@bucket/v.mp4/", "nope://u:SECRET@host/v.mp4", "ftp://:SECRET@h/a::b"]
)
def test_a_password_in_a_destination_is_not_quoted(uri):
    """Airflow's mask does not reach what raises outside of a task."""
    with pytest.raises(HeyGenBadInputError, match="The path of the destination") as raised:
        HeyGenHook().download_overdub("od_1", uri)
    assert "SECRET" not in str(raised.value)
    assert media.redact_urls("s3://aws_default@bucket/v.mp4") == "s3://aws_default@bucket/v.mp4"


def lines_of(hours, monkeypatch, size):
    """The log lines of a download that takes so long, at a MB per second."""
    said, clock = [], itertools.count(0.0)
    monkeypatch.setattr(download, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    target = download._PendingFile(ObjectStoragePath("file:///v.mp4"), "video")
    target.size = size
    progress = download._Progress(lambda text, *values: said.append(text % values), target)
    for _ in range(int(3600 * hours)):
        target.written += 1_000_000
        progress.add(1_000_000)
    progress.end()
    return said


def test_progress_is_logged_at_a_reasonable_rate(monkeypatch):
    said = lines_of(0.01, monkeypatch, 40_000_000)
    assert said == [
        "10.0 MB of 40.0 MB, 25%, 1.0 MB/s: the video for file:///v.mp4.",
        "20.0 MB of 40.0 MB, 50%, 1.0 MB/s: the video for file:///v.mp4.",
        "30.0 MB of 40.0 MB, 75%, 1.0 MB/s: the video for file:///v.mp4.",
        "Saved 36.0 MB of video in 37.0 s, 973.0 kB/s: file:///v.mp4.",
    ]
    assert lines_of(0.003, monkeypatch, None) == [
        "10.0 MB, 1.0 MB/s: the video for file:///v.mp4.",
        "Saved 10.0 MB of video in 11.0 s, 909.1 kB/s: file:///v.mp4.",
    ]
    assert len(lines_of(1, monkeypatch, None)) < 30
    assert len(lines_of(12, monkeypatch, None)) < 40


# --- The link -----------------------------------------------------------------------------------------


def files(wire):
    return [seen for seen in wire.seen if seen.path.startswith("/files/")]


@both_resources
def test_download(heygen, wire, tmp_path, resource):
    overdub_id = completed(heygen)
    target = tmp_path / "new" / "directories" / "v.mp4"
    video = heygen.jobs[0].output.read_bytes()
    assert HeyGenHook().download_overdub(overdub_id, target) == len(video)
    assert target.read_bytes() == video
    assert [path.name for path in target.parent.iterdir()] == ["v.mp4"]
    (seen,) = files(wire)
    assert seen.headers["Accept-Encoding"] == "identity", "or its length would not be that of the file"
    assert seen.headers.get_all("X-Api-Key") is None
    assert seen.headers.get_all("Authorization") is None
    assert HeyGenHook().download_overdub(overdub_id, f"file://{tmp_path}/by-uri.mp4") == len(video)
    assert (tmp_path / "by-uri.mp4").read_bytes() == video


VIDEO_FAULTS = {
    "expired": {"status": 403},
    "gone": {"status": 404},
    "busy": {"status": 503},
    "HTML": {"status": 200, "html": True},
    "JSON": {"status": 200, "body": "{}"},
    "XML": {"status": 200, "body": "<Error/>", "headers": {"Content-Type": "application/xml"}},
    "empty": {"status": 200, "body": "", "headers": {"Content-Type": "video/mp4"}},
    "dropped": {"drop": "after"},
    "dropped midway": {"drop_after_bytes": 1000},
    "partial": {"status": 206, "body": "abc", "headers": {"Content-Type": "video/mp4"}},
}


@pytest.mark.parametrize(("fault", "overwrite"), each_value(VIDEO_FAULTS.values(), [True, False]), ids=str)
def test_download_survives(heygen, wire, pauses, tmp_path, fault, overwrite):
    overdub_id = completed(heygen)
    heygen.fail_next(path="/files/", **fault)
    size = HeyGenHook().download_overdub(overdub_id, tmp_path / "v.mp4", overwrite=overwrite)
    assert (tmp_path / "v.mp4").read_bytes() == heygen.jobs[0].output.read_bytes()
    assert size == (tmp_path / "v.mp4").stat().st_size
    assert [path.name for path in tmp_path.iterdir()] == ["v.mp4"]
    first, second = files(wire)
    assert first.path != second.path, "a fresh link"
    assert len(pauses) == 1


@pytest.mark.parametrize("name", ["expired", "HTML", "dropped midway", "partial"])
def test_download_gives_up(heygen, wire, pauses, tmp_path, name):
    overdub_id = completed(heygen)
    heygen.fail_next(path="/files/", count=100, **VIDEO_FAULTS[name])
    (tmp_path / "old.mp4").write_bytes(b"old")
    for name in ("new.mp4", "old.mp4"):
        with pytest.raises(HeyGenTransientError) as raised:
            HeyGenHook(max_attempts=2).download_overdub(overdub_id, tmp_path / name, overwrite=True)
        assert "Signature" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["old.mp4"]
    assert (tmp_path / "old.mp4").read_bytes() == b"old"


def test_a_url_that_has_expired(heygen, wire, pauses, tmp_path):
    heygen.behaviour.link_seconds = -1
    overdub_id = completed(heygen)
    pass_on = wire.answer

    def answer(seen):
        result = pass_on(seen)
        if seen.path.startswith("/files/"):
            heygen.behaviour.link_seconds = 60
        return result

    wire.answer = answer
    assert HeyGenHook().download_overdub(overdub_id, tmp_path / "v.mp4") > 1000
    assert [record.status for record in heygen.requests if record.path.startswith("/files/")] == [403, 200]


def test_a_url_that_is_not_there_yet(heygen, pauses, tmp_path):
    heygen.behaviour.null_video_url = 2
    assert HeyGenHook().download_overdub(completed(heygen), tmp_path / "v.mp4") > 1000
    assert len(pauses) == 2
    heygen.behaviour.null_video_url = 100
    with pytest.raises(HeyGenTransientError, match="has no URL of the video yet"):
        HeyGenHook().download_overdub(completed(heygen), tmp_path / "v2.mp4")


@pytest.mark.parametrize("fault", [{}, {"status": 403}, {"drop": "before"}], ids=str)
def test_urls_are_not_logged(heygen, wire, pauses, tmp_path, caplog, fault):
    overdub_id = completed(heygen)
    heygen.fail_next(path="/files/", **fault)
    with caplog.at_level(logging.DEBUG):
        HeyGenHook().download_overdub(overdub_id, tmp_path / "v.mp4")
        lines = [record.getMessage() for record in caplog.records if record.name.startswith("urllib3")]
    assert any("/files/" in line for line in lines)
    assert "Signature" not in caplog.text
    assert logging.getLogger("urllib3.connectionpool").filters == []


def test_urls_are_not_logged_when_response_headers_are_invalid(cdn, tmp_path, caplog):
    cdn.headers["Broken\r\nheader"] = ""
    HeyGenHook().download_overdub("od_1", tmp_path / "v.mp4")
    assert "Failed to parse headers" in caplog.text
    assert "Signature" not in caplog.text
    assert logging.getLogger("urllib3.connection").filters == []


def test_urls_are_not_logged_while_another_download_ends(caplog):
    caplog.set_level(logging.DEBUG)
    with media.redact_urllib3_logs():
        with media.redact_urllib3_logs():
            pass
        logging.getLogger("urllib3.connectionpool").debug("GET %s", "/v.mp4?Signature=pw")
    assert "/v.mp4?***" in caplog.text


@pytest.mark.parametrize("link", ["", None, 5])
def test_a_useless_url(heygen, pauses, tmp_path, link):
    leads_to(heygen, link)
    with pytest.raises(HeyGenTransientError, match="no URL of the video yet"):
        HeyGenHook(max_attempts=2).download_overdub("od_1", tmp_path / "v.mp4")


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Type: video/mp4\r\nContent-Length: 10\r\n\r\nabcde",
        b"HTTP/1.1 200 OK\r\nContent-Type: video/mp4\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 3\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"garbage",
    ],
    ids=lambda answer: answer[17:70].decode(),
)
def test_wrong_length(heygen, listen, pauses, tmp_path, answer):
    leads_to(heygen, listen(lambda _: answer).url)
    with pytest.raises(HeyGenTransientError):
        HeyGenHook(max_attempts=2).download_overdub("od_1", tmp_path / "v.mp4")
    assert list(tmp_path.iterdir()) == []
    assert len(pauses) == 1


FTYP, MOOV, MDAT = box(b"ftyp", b"isom\0\0\2\0"), box(b"moov", bytes(50)), box(b"mdat", bytes(3 * MB))
FRAGMENTS = (box(b"moof", bytes(20)) + box(b"mdat", bytes(1001))) * 2000
WHOLE = {
    "index first": FTYP + MOOV + MDAT,
    "index last": FTYP + MDAT + MOOV,
    "large": FTYP + MOOV + box(b"mdat", bytes(9), large=True),
    "fragments": FTYP + MOOV + FRAGMENTS + box(b"mfra", bytes(9)),
}
CUT = {
    "midway": (FTYP + MOOV + MDAT)[: 2 * MB],
    "by a byte": (FTYP + MOOV + MDAT)[:-1],
    "before the index": FTYP + MDAT,
    "before the media": FTYP + MOOV,
    "in the head of a box": FTYP + MDAT + MOOV + MOOV[:6],
    "in a large box": FTYP + MOOV + box(b"mdat", bytes(9), large=True)[:-1],
    "in the head of a large box": FTYP + MOOV + MDAT + box(b"mdat", bytes(9), large=True)[:12],
    "a box that has no end": FTYP + MOOV + bytes(4) + b"mdat" + bytes(50),
    "a box that is too short": FTYP + MOOV + MDAT + (7).to_bytes(4, "big") + b"free",
    "after a fragment": FTYP + MOOV + FRAGMENTS,
    "no mp4": b"abcde",
}


@on_either_storage("video", WHOLE.values(), ids=WHOLE)
def test_length_unknown(cdn, storage, video):
    for _ in range(2):  # a retry keeps what an earlier try has saved
        cdn.faults = [{"video": video, "always": {"Content-Length": None}}]
        assert HeyGenHook().download_overdub("od_1", storage.uri("v.mp4")) == len(video)
        assert storage.read("v.mp4") == video
    cdn.faults = [{"always": {"Content-Length": None}}]
    with pytest.raises(HeyGenPermanentError, match=f"exists with {len(video)} bytes"):
        HeyGenHook().download_overdub("od_1", storage.uri("v.mp4"))


@pytest.mark.parametrize("video", WHOLE.values(), ids=WHOLE)
@pytest.mark.parametrize("size", [7, 1001])
def test_the_head_of_a_box_may_come_in_pieces(video, size):
    boxes = download._Boxes()
    for start in range(0, len(video), size):
        boxes.add(video[start : start + size])
    assert boxes.is_mp4
    assert boxes.complete


@on_either_storage("video", CUT.values(), ids=CUT)
def test_a_video_of_unknown_length_that_is_cut_off(cdn, pauses, storage, video):
    fault = {"video": video, "headers": {"ETag": None}, "always": {"Content-Length": None}, "ranges": False}
    cdn.faults = [fault] * 2
    with pytest.raises(HeyGenTransientError, match=f"ended after {len(video)} of an unknown number of bytes"):
        HeyGenHook(max_attempts=2).download_overdub("od_1", storage.uri("v.mp4"))
    assert storage.names() == []
    cdn.faults = [fault]
    assert HeyGenHook().download_overdub("od_1", storage.uri("v.mp4")) == 3 * MB
    assert storage.read("v.mp4") == cdn.video


@pytest.mark.parametrize("coding", ["", "Identity", "aws-chunked,", "binary"])
def test_what_encodes_nothing(cdn, tmp_path, coding):
    cdn.headers["Content-Encoding"] = coding
    HeyGenHook(max_attempts=1).download_overdub("od_1", tmp_path / "v.mp4")
    assert (tmp_path / "v.mp4").read_bytes() == cdn.video


@pytest.mark.parametrize("coding", ["GZIP", "aws-chunked, gzip", "x-gzip", "zstd"])
def test_what_is_encoded(cdn, pauses, tmp_path, coding):
    cdn.headers["Content-Encoding"] = coding
    with pytest.raises(HeyGenTransientError, match=r"returned 200 \(video/mp4, (x-)?(gzip|br|zstd)\)"):
        HeyGenHook(max_attempts=2).download_overdub("od_1", tmp_path / "v.mp4")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("location", "path"),
    [
        ("/ü 日.mp4?a=ü".encode(), "/%C3%BC%20%E6%97%A5.mp4?a=%C3%BC"),
        ("/ü.mp4".encode("latin-1"), "/%FC.mp4"),
        (b"/%C3%BC.mp4", "/%C3%BC.mp4"),
        (b"\xfc/../v%20w.mp4", "/v%20w.mp4"),
    ],
    ids=str,
)
def test_a_location_of_raw_bytes(cdn, heygen, listen, tmp_path, location, path):
    first = listen(
        lambda seen: b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: " + location + b"\r\n\r\n"
    )
    pages = [first.answer, cdn.answer]
    first.answer = lambda seen: pages.pop(0)(seen)  # noqa: PLW0108 - one for each request
    heygen.clear_faults()
    leads_to(heygen, f"{first.url}/first")
    HeyGenHook(max_attempts=1).download_overdub("od_1", tmp_path / "v.mp4")
    assert [seen.path for seen in first.seen] == ["/first", path]
    assert (tmp_path / "v.mp4").read_bytes() == cdn.video


def leads_to(heygen, link):
    """From now on an overdub is completed and its video is there."""
    overdub = {"id": "od_1", "status": "completed", "video_url": link}
    heygen.fail_next(path="/v3/", body=json.dumps({"data": overdub}), count=1000)


def test_what_is_there_already(heygen, wire, tmp_path):
    overdub_id = completed(heygen)
    video = heygen.jobs[0].output.read_bytes()
    target = tmp_path / "v.mp4"
    target.write_bytes(video)
    os.utime(target, (0, 0))
    assert HeyGenHook().download_overdub(overdub_id, target) == len(video)
    assert target.stat().st_mtime == 0, "kept"
    target.write_bytes(bytes(len(video)))
    with pytest.raises(HeyGenPermanentError, match=r"exists with (\d+) bytes, the video has \1 others"):
        HeyGenHook().download_overdub(overdub_id, target)
    target.write_bytes(b"something else")
    with pytest.raises(HeyGenPermanentError, match=f"exists with 14 bytes, the video has {len(video)}"):
        HeyGenHook().download_overdub(overdub_id, target)
    assert target.read_bytes() == b"something else"
    assert HeyGenHook().download_overdub(overdub_id, target, overwrite=True) == len(video)
    assert target.read_bytes() == video
    assert [path.name for path in tmp_path.iterdir()] == ["v.mp4"]


@pytest.mark.parametrize("overwrite", [True, False])
def test_destination_is_a_directory(heygen, tmp_path, overwrite):
    overdub_id = completed(heygen)
    with pytest.raises(HeyGenBadInputError, match="is a directory"):
        HeyGenHook().download_overdub(overdub_id, tmp_path, overwrite=overwrite)
    assert list(tmp_path.iterdir()) == []


def test_overdub_without_a_video(heygen, pauses, tmp_path):
    hook = HeyGenHook()
    overdub_id = hook.create_overdub(REQUEST)
    heygen.force(overdub_id, "running")
    with pytest.raises(HeyGenError, match="is running, there is no video yet"):
        hook.download_overdub(overdub_id, tmp_path / "v.mp4")
    heygen.force(overdub_id, "failed", "Too dark")
    with pytest.raises(HeyGenOverdubFailedError, match="Too dark"):
        hook.download_overdub(overdub_id, tmp_path / "v.mp4")
    with pytest.raises(HeyGenNotFoundError):
        hook.download_overdub("nowhere", tmp_path / "v.mp4")
    assert (list(tmp_path.iterdir()), pauses) == ([], [])


BAD_LINKS = {
    "private": "https://10.0.0.1/v.mp4",
    "loopback": "https://127.0.0.1:1/v.mp4",
    "loopback name": "https://localhost:1/v.mp4",
    "IPv6 loopback": "https://[::1]/v.mp4",
    "mapped": "https://[::ffff:10.0.0.1]/v.mp4",
    "metadata": "http://169.254.169.254/latest",
    "metadata by https": "https://169.254.169.254/latest",
    "shared": "https://100.64.0.1/v.mp4",
    "any": "https://0.0.0.0/v.mp4",
    "as a number": "https://2130706433/v.mp4",
    "octal": "https://0177.0.0.1/v.mp4",
    "hexadecimal": "https://0x7f.1/v.mp4",
    "in other digits": "https://\uff11\uff12\uff17.0.0.1/v.mp4",
    "behind a user": "https://8.8.8.8@127.0.0.1:1/v.mp4",
    "before a backslash": "https://127.0.0.1:1\\@8.8.8.8/v.mp4",
    "NAT64": "https://[64:ff9b::a9fe:a9fe]/v.mp4",
    "6to4": "https://[2002:a00:1::]/v.mp4",
    "in the old form": "https://[::7f00:1]/v.mp4",
    "site": "https://[fec0::1]/v.mp4",
    "many": "https://224.0.0.1/v.mp4",
    "http": "http://8.8.8.8/v.mp4",
    "ftp": "ftp://8.8.8.8/v.mp4",
    "file": "file:///etc/passwd",
    "no scheme": "//8.8.8.8/v.mp4",
    "no link": "somewhere",
    "broken": "https://[/v.mp4",
    "broken name": "https://a..b/v.mp4",
    "long name": f"https://{'a' * 70}/v.mp4",
    "half a character": "https://127.0.0.1:1/\ud800.mp4",
}


@pytest.mark.parametrize("link", BAD_LINKS.values(), ids=BAD_LINKS)
def test_where_a_url_must_not_lead(heygen, connect, pauses, tmp_path, link):
    connect(heygen.url)
    leads_to(heygen, f"{link}?Signature=pw")
    with pytest.raises(HeyGenPermanentError, match="URL of the video") as raised:
        HeyGenHook().download_overdub("od_1", tmp_path / "v.mp4")
    assert "pw" not in str(raised.value)
    assert (pauses, list(tmp_path.iterdir())) == ([], [])


ADDRESSES = [
    (["8.8.8.8"], False),
    (["2606:4700::1111"], False),
    (["64:ff9b::808:808"], False),
    (["::ffff:8.8.8.8"], False),
    (["8.8.8.8", "2606:4700::1111"], False),
    (["8.8.8.8", "10.0.0.1"], True),
    (["10.0.0.1", "8.8.8.8"], True),
    (["8.8.8.8", "fe80::1%eth0"], True),
    (["8.8.8.8", "64:ff9b::7f00:1"], True),
]


def test_every_address_of_a_name_counts(monkeypatch):
    """A host is private if one of its addresses is."""
    for addresses, private in ADDRESSES:
        found = [(0, 0, 0, "", (address, 0)) for address in addresses]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, found=found: found)
        assert media._is_private("files.example") is private, addresses


def test_private_hosts_on_demand(heygen, listen, connect, tmp_path):
    server = listen(lambda _: (200, {"Content-Type": "video/mp4"}, b"video"))
    leads_to(heygen, f"{server.url}/v.mp4?Signature=pw")
    connect(heygen.url)
    with pytest.raises(HeyGenPermanentError, match="'allow_private_hosts'"):
        HeyGenHook().download_overdub("od_1", tmp_path / "v.mp4")
    assert server.seen == []
    connect(heygen.url, allow_private_hosts=True)
    assert HeyGenHook().download_overdub("od_1", tmp_path / "v.mp4") == 5


def test_redirects_of_a_url(heygen, listen, tmp_path):
    last = listen(lambda _: (200, {"Content-Type": "video/mp4"}, b"video"))
    first = listen()
    first.answer = lambda seen: (
        302,
        {"Location": "/second?x=y" if seen.path == "/first" else f"{last.url}/v.mp4"},
        b"elsewhere",
    )
    leads_to(heygen, f"{first.url}/first")
    assert HeyGenHook().download_overdub("od_1", tmp_path / "v.mp4") == 5
    assert [seen.path for seen in first.seen + last.seen] == ["/first", "/second?x=y", "/v.mp4"]
    for seen in first.seen + last.seen:
        assert seen.headers.get_all("X-Api-Key") is None
        assert seen.headers.get_all("Authorization") is None


HOPS = ("private", "IPv6 loopback", "metadata by https", "as a number", "behind a user", "http", "file")
HOPS += ("no scheme", "broken", "half a character")


@pytest.mark.parametrize("link", [BAD_LINKS[name] for name in HOPS], ids=HOPS)
def test_each_hop_is_checked(heygen, listen, connect, pauses, tmp_path, link):
    """The first host has a public address; its proxy is on this machine."""
    proxy = listen(lambda _: (302, {"Location": link.encode("utf-8", "replace").decode("latin-1")}, b""))
    connect(heygen.url, proxies={"http://files.invalid": proxy.url}, allow_http=True)
    leads_to(heygen, "http://files.invalid/v.mp4")
    with pytest.raises(HeyGenError) as raised:
        HeyGenHook(max_attempts=2).download_overdub("od_1", tmp_path / "v.mp4")
    # With http allowed, and a relative link led back to the first host, these are not refused.
    if link not in (BAD_LINKS["http"], BAD_LINKS["no scheme"]):
        assert isinstance(raised.value, HeyGenPermanentError)
        assert len(proxy.seen) == 1


def test_endless_redirects(heygen, listen, pauses, tmp_path):
    server = listen(lambda _: (302, {"Location": "/again"}, b""))
    leads_to(heygen, server.url)
    with pytest.raises(HeyGenPermanentError, match="redirected more than 5 times"):
        HeyGenHook().download_overdub("od_1", tmp_path / "v.mp4")
    assert len(server.seen) == 6


def test_redirect_to_nowhere(heygen, listen, pauses, tmp_path):
    server = listen(lambda _: (302, {}, b""))
    leads_to(heygen, server.url)
    with pytest.raises(HeyGenTransientError, match="302"):
        HeyGenHook(max_attempts=2).download_overdub("od_1", tmp_path / "v.mp4")
