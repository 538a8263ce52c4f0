"""
Another HeyGen: written from the contract alone, with the standard library, as ugly as the contract allows.

It shares no line with the emulator, so a misreading of the contract cannot hide in both.
"""

from __future__ import annotations

import email
import json
import random
import re
import socket
import struct
import threading
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

KEY = "sk_other_server_0123456789"
VIDEO = b"\x00\x00\x00\x18ftypmp42" + bytes(range(256)) * 2000
HTML = "<html><body><h1>%d gateway page</h1></body></html>"


@dataclass(kw_only=True)
class Ugly:
    """What the contract leaves open. The defaults are the friendly choices; times are in seconds."""

    resource: str = "overdubs"  # the other name returns 404
    list_order: str = "descending"  # ascending, descending, shuffled
    idempotent: bool = True  # False: each POST makes a job
    callback_id_in_list: bool = True
    callback_id_kept: str = "always"  # with_url: only if a callback_url was sent
    html_errors: bool = False
    bare_errors: bool = False  # {"error": {"message": ...}}: no code
    unknown_members: bool = False  # in rows, envelopes, errors, nested
    untitled: str | None = None  # the title of what has none
    sparse: bool = False  # optional members are missing instead of null
    created_at: bool = True
    late_links: int = 0  # completed overdubs without a URL
    odd_words: bool = False  # "queued", "processing" between the known ones
    readable_after: float = 0.0  # GET is 404 until then
    create_takes: float = 0.0
    create_id: str = "overdub_id"  # overdub_id, lipsync_id, id
    too_many: int = 0  # creates that meet a 429 first
    retry_after: str = "seconds"  # or date
    flaky: float = 0.0  # share of 500, 502 and resets, before or after the effect
    lose_creates: int = 0  # first creates whose response is lost although the job was made
    seed: int = 0
    job_takes: float = 0.4
    fails: bool = False
    link_lives: float = 60.0


@dataclass
class Job:
    id: str
    request: dict[str, Any]
    made: float = field(default_factory=time.time)
    title: str | None = None
    links_given: int = 0


class OtherServer:
    """``with OtherServer(idempotent=False) as server:`` serves on loopback until the end of the block."""

    def __init__(self, **ugly: Any) -> None:
        self.ugly = Ugly(**ugly)
        self.jobs: dict[str, Job] = {}
        self.created: list[dict[str, Any]] = []  # the body of each job ever made; deletes leave it
        self.assets: dict[str, bytes] = {}
        self.routes: Counter[str] = Counter()
        self.stray_credentials: list[str] = []  # paths that must not but did get the key
        self.trouble = 0
        self._random = random.Random(self.ugly.seed)
        self._answers: dict[tuple[str, str], Any] = {}  # by route and Idempotency-Key; None: still running
        self._links: dict[str, tuple[str, float]] = {}
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"server_state": self})
        self._http = _Server(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> OtherServer:
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def connection(self, **extra: Any) -> str:
        """The Airflow connection to this server, as the JSON of an ``AIRFLOW_CONN_...`` variable."""
        extra = {"allow_private_hosts": True, "resource": self.ugly.resource, **extra}
        return json.dumps({"conn_type": "heygen", "host": self.url, "password": KEY, "extra": extra})

    def count(self, member: str) -> Counter[str | None]:
        """How many jobs were made per ``callback_id`` or ``title``: more than one is money lost."""
        return Counter(body.get(member) for body in self.created)

    # --- The resource: each gives (status, body) ---------------------------------------------------------

    def create(self, body: dict[str, Any], key: str | None) -> tuple[int, Any]:
        for name in ("video", "audio"):
            media = body.get(name)
            kind = media.get("type") if isinstance(media, dict) else None
            if kind not in ("url", "asset_id") or not isinstance(media.get(kind), str):
                return self.error(400, "invalid_parameter", param=name)
            if kind == "asset_id" and media["asset_id"] not in self.assets:
                return self.error(404, "asset_not_found")
        slot = (self.ugly.resource, key) if key and self.ugly.idempotent else None
        with self._lock:
            if slot in self._answers:
                known = self._answers[slot]
                return known if known else self.error(409, "request_in_progress")
            if self.ugly.too_many:
                self.ugly.too_many -= 1
                return self.error(429, "rate_limit_exceeded")
            if slot:
                self._answers[slot] = None
        time.sleep(self.ugly.create_takes)
        with self._lock:
            job = Job(
                uuid.UUID(int=self._random.getrandbits(128)).hex,
                body,
                title=body.get("title", self.ugly.untitled),
            )
            self.jobs[job.id] = job
            self.created.append(body)
            answer = 200, {"data": self.decorate({self.ugly.create_id: job.id})}
            if slot:
                self._answers[slot] = answer
        return answer

    def look(self, job: Job) -> dict[str, Any]:
        """The whole job object, with a new URL, as in every GET."""
        age = (time.time() - job.made) / max(self.ugly.job_takes, 1e-9)
        words = ["pending", "running"]
        if self.ugly.odd_words:
            words = ["pending", "queued_2", "running", "processing", "rendering"]
        done = age >= 1
        word = ("failed" if self.ugly.fails else "completed") if done else words[int(age * len(words))]
        link = None
        if word == "completed":
            job.links_given += 1
            if job.links_given > self.ugly.late_links:
                token = uuid.uuid4().hex
                self._links[token] = (job.id, time.time() + self.ugly.link_lives)
                link = f"{self.url}/files/{job.id}.mp4?Expires=1&Signature=SECRET{token}"
        kept = self.ugly.callback_id_kept == "always" or job.request.get("callback_url")
        row = {
            "id": job.id,
            "status": word,
            "title": job.title,
            "duration": 12.5 if word == "completed" else None,
            "video_url": link,
            "callback_id": job.request.get("callback_id") if kept else None,
            "created_at": int(job.made) if self.ugly.created_at else None,
            "failure_message": None,
        }
        if self.ugly.sparse:
            row = {name: value for name, value in row.items() if value is not None}
        return self.decorate(row)

    def page(self, query: dict[str, str]) -> tuple[int, Any]:
        limit = query.get("limit", "10")
        if not limit.isdigit() or not 1 <= int(limit) <= 100:
            return self.error(400, "invalid_parameter", param="limit")
        jobs = list(self.jobs.values())  # oldest first
        if self.ugly.list_order == "descending":
            jobs.reverse()
        elif self.ugly.list_order == "shuffled":
            jobs.sort(key=lambda job: hash((job.id, self.ugly.seed)))  # the same on each page
        ids = [job.id for job in jobs]
        after = query.get("token", "").removeprefix("after-")
        start = ids.index(after) + 1 if after in ids else 0
        rows = [self.look(job) for job in jobs[start : start + int(limit)]]
        for row in rows if not self.ugly.callback_id_in_list else ():
            row.pop("callback_id", None)
        more = start + len(rows) < len(ids)
        body: dict[str, Any] = {"data": rows, "has_more": more}
        if more:
            body["next_token"] = f"after-{ids[start + len(rows) - 1]}"
        elif not self.ugly.sparse:
            body["next_token"] = None
        return 200, self.decorate(body)

    def upload(self, content_type: str, raw: bytes) -> tuple[int, Any]:
        form = email.message_from_bytes(b"Content-Type: " + content_type.encode() + b"\r\n\r\n" + raw)
        parts = form.get_payload() if form.is_multipart() else []
        files = [part for part in parts if part.get_param("name", header="content-disposition") == "file"]
        if len(files) != 1:
            return self.error(400, "invalid_parameter", param="file")
        asset = uuid.uuid4().hex
        self.assets[asset] = files[0].get_payload(decode=True)
        data = {"asset_id": asset, "mime_type": "video/mp4", "size_bytes": len(self.assets[asset])}
        data["url"] = f"{self.url}/files/{asset}?Signature=SECRET"
        return 200, {"data": self.decorate({"asset_id": asset} if self.ugly.sparse else data)}

    def decorate(self, members: dict[str, Any]) -> dict[str, Any]:
        extra = {"beta": {"id": "not-this-one", "status": "failed", "data": []}, "tags": [None, {"id": 1}]}
        return {**extra, **members} if self.ugly.unknown_members else members

    def error(self, status: int, code: str, param: str | None = None) -> tuple[int, Any]:
        if self.ugly.html_errors:
            return status, HTML % status
        error: dict[str, Any] = {"message": f"{code}, you sent key {KEY} and https://a.b/c?Signature=SECRET"}
        if not self.ugly.bare_errors:
            error |= {"code": code, "param": param, "doc_url": None}
        return status, {"error": self.decorate(error)}

    def mischief(self, path: str, *, creates: bool) -> tuple[str, str]:
        """What goes wrong with this request, if anything, and when."""
        with self._lock:
            if creates and self.ugly.lose_creates:
                self.ugly.lose_creates -= 1
                return "reset", "after"
            if self._random.random() >= self.ugly.flaky:
                return "", ""
            self.trouble += 1
            return self._random.choice(["500", "502", "reset"]), self._random.choice(["before", "after"])


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""


class _Handler(BaseHTTPRequestHandler):
    server_state: OtherServer
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # head and body in one segment, or each response waits for a delayed ACK

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.serve()

    do_POST = do_PATCH = do_DELETE = do_GET

    def serve(self) -> None:
        state, url = self.server_state, urlsplit(self.path)
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        collection = f"/v3/{state.ugly.resource}"
        state.routes[f"{self.command} {re.sub('[0-9a-f]{32}', '{id}', url.path)}"] += 1
        creates = (self.command, url.path) == ("POST", collection)
        kind, when = state.mischief(url.path, creates=creates)
        if kind and when == "before":
            return self.misbehave(kind)
        if url.path.startswith("/files/"):
            status, body = self.file(url.path, parse_qs(url.query))
        else:
            query = {name: values[-1] for name, values in parse_qs(url.query).items()}
            status, body = self.api(url.path, collection, query, raw)
        if kind:
            return self.misbehave(kind)
        return self.answer(status, body)

    def api(self, path: str, collection: str, query: dict[str, str], raw: bytes) -> tuple[int, Any]:
        state = self.server_state
        keys = [self.headers.get("X-Api-Key"), self.headers.get("Authorization")]
        if keys not in ([KEY, None], [None, f"Bearer {KEY}"]):
            return state.error(401, "unauthorized")
        route = self.command, path
        if route == ("GET", "/v3/users/me"):
            names = dict.fromkeys(("email", "first_name", "last_name"))
            return 200, {"data": state.decorate({"username": "demo", **names})}
        if route == ("POST", "/v3/assets"):
            return state.upload(self.headers["Content-Type"], raw)
        if route == ("GET", collection):
            return state.page(query)
        if route == ("POST", collection):
            return state.create(json.loads(raw), self.headers.get("Idempotency-Key"))
        parent, _, overdub_id = path.rpartition("/")
        job = state.jobs.get(overdub_id) if parent == collection else None
        fresh = job and self.command == "GET" and time.time() - job.made < state.ugly.readable_after
        if job is None or fresh:
            return state.error(404, "not_found")
        if self.command == "PATCH":
            title = json.loads(raw).get("title")
            if not isinstance(title, str):
                return state.error(400, "invalid_parameter", param="title")
            job.title = title
        if self.command == "DELETE":
            del state.jobs[job.id]
            return 200, {"data": state.decorate({"id": job.id})}
        return 200, {"data": state.look(job)}

    def file(self, path: str, query: dict[str, list[str]]) -> tuple[int, Any]:
        state = self.server_state
        if self.headers.get("X-Api-Key") or self.headers.get("Authorization"):
            state.stray_credentials.append(path)
        token = query.get("Signature", [""])[0].removeprefix("SECRET")
        job_id, until = state._links.get(token, ("", 0.0))
        if job_id not in state.jobs or job_id not in path or time.time() > until:
            return 403, "<Error><Code>AccessDenied</Code></Error>"
        return 200, VIDEO

    def answer(self, status: int, body: Any) -> None:
        html = isinstance(body, str)
        kind = "video/mp4" if isinstance(body, bytes) else "text/html" if html else "application/json"
        raw = body if isinstance(body, bytes) else (body if html else json.dumps(body)).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(raw)))
        self.send_header("X-Request-Id", uuid.uuid4().hex)
        if status == 429:
            in_date = self.server_state.ugly.retry_after == "date"
            self.send_header("Retry-After", formatdate(time.time() + 2, usegmt=True) if in_date else "1")
        self.end_headers()
        self.wfile.write(raw)

    def misbehave(self, kind: str) -> None:
        if kind == "reset":
            # A zero linger time makes close() send RST instead of FIN.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
        else:
            self.answer(int(kind), HTML % int(kind))
