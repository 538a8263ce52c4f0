"""
The server that :mod:`polling` measures against: HeyGen's and the peers' status calls over one set of jobs.

It runs in a separate process, so that its CPU is not counted, uses HTTP/1.1 with keep-alive over TLS, and
takes ``latency`` seconds for each response. It records each request and each new TLS connection with the time
of the machine's monotonic clock; the benchmark counts these records.

The server is started with its settings as one JSON argument, and prints its port. Each line on stdin is a
command: a JSON list contains the times at which the jobs complete, ``"count"`` requests the number of
requests, ``"seen"`` all records; the end of stdin stops the server.
"""

from __future__ import annotations

import asyncio
import base64
import json
import random
import ssl
import sys
import time
from contextlib import suppress
from typing import Any
from urllib.parse import parse_qs, urlsplit

import uvloop

PAGE = 100
NEVER = float("inf")


def job_id(number: int) -> str:
    """Return HeyGen's id of a job; the peers use its number."""
    return f"{number * 2654435761 % 2**32:08x}{number:024x}"


class Jobs:
    """
    All jobs of the account; the awaited ones have the numbers from 1 on, 0 has completed long ago.

    :param awaited: how many jobs a trigger awaits.
    :param foreign: how many others run, for good, for each awaited one.
    :param finished: how many have completed long ago; older than all others.
    :param listed: whether the awaited ones are in the list; otherwise 100 others are.
    """

    def __init__(self, awaited: int, *, foreign: int = 0, finished: int = 0, listed: bool = True) -> None:
        self.awaited = awaited
        self.done_at = [0.0] + [NEVER] * awaited
        self.numbers = {job_id(number): number for number in range(awaited + 1)}
        others = range(awaited + 1, awaited + 1 + (awaited * foreign if listed else PAGE))
        newest_first = [*reversed(range(1, awaited + 1)), *others] if listed else list(others)
        if foreign:
            random.Random(1).shuffle(newest_first)
        old = range(10**9, 10**9 + finished)
        self.order = [*newest_first, *([0] if listed else []), *old]
        self.old = frozenset(old)

    def done(self, number: int) -> bool:
        """Check whether a job has completed."""
        if number <= self.awaited:
            return self.done_at[number] <= time.monotonic()
        return number in self.old

    def row(self, number: int) -> dict[str, Any]:
        """Return a job as HeyGen represents it."""
        done = self.done(number)
        link = f"https://files.heygen.ai/{job_id(number)}.mp4?Expires=1717000000&Signature={'0' * 256}"
        return {
            "id": job_id(number),
            "title": f"My Overdub {number}",
            "status": "completed" if done else "running",
            "duration": 42.5 if done else None,
            "video_url": link if done else None,
            "callback_id": None,
            "created_at": 1717000000 if number in self.old else 1787000000 - number % 100000,
            "failure_message": None,
        }


class Routes:
    """The response for each path, as status and JSON."""

    def __init__(self, jobs: Jobs) -> None:
        self.jobs = jobs

    def respond(self, target: str) -> tuple[int, Any]:
        """Return the response to a GET."""
        url = urlsplit(target)
        *_, parent, name = url.path.rstrip("/").split("/")
        if name in ("overdubs", "lipsyncs"):
            return self._list(parse_qs(url.query))
        if name == "statuses":
            return self._statuses(parse_qs(url.query))
        if parent in ("overdubs", "lipsyncs"):
            number = self.jobs.numbers.get(name)
            if number is None:
                return 404, {"error": {"code": "not_found", "message": f"No {name}."}}
            return 200, {"data": self.jobs.row(number)}
        done = self.jobs.done(int(name))
        if parent == "http":
            return (200, {"status": "done"}) if done else (404, {"status": "running"})
        if parent == "runs":
            return 200, {"data": {"id": int(name), "status": 10 if done else 3}}
        if parent == "connectors":
            return 200, {"data": _connector(name, done)}
        if parent == "batches":
            return 200, _batch(name, done)
        return 404, {}

    def _list(self, query: dict[str, list[str]]) -> tuple[int, Any]:
        limit = int(query.get("limit", ["10"])[0])
        token = query.get("token", [""])[0]
        first = int(base64.b64decode(token)[8:]) if token else 0
        rows = [self.jobs.row(number) for number in self.jobs.order[first : first + limit]]
        more = first + limit < len(self.jobs.order)
        cursor = base64.b64encode(b"%08x%d" % (random.getrandbits(32), first + limit)).decode()
        return 200, {"data": rows, "has_more": more, "next_token": cursor if more else None}

    def _statuses(self, query: dict[str, list[str]]) -> tuple[int, Any]:
        rows = []
        for name in query["lipsync_ids"][0].split(","):
            number = self.jobs.numbers.get(name)
            status = (
                "not_found" if number is None else "completed" if self.jobs.done(number) else "processing"
            )
            rows.append(
                {"video_id": name, "status": status, "error": None, "batch_id": None, "item_index": None}
            )
        return 200, {"data": rows, "has_more": False, "next_token": None}


def _connector(name: str, done: bool) -> dict[str, Any]:
    return {
        "id": name,
        "service": "google_sheets",
        "schema": "sheets",
        "succeeded_at": "2026-01-02T00:00:00.000000Z" if done else "2026-01-01T00:00:00.000000Z",
        "failed_at": None,
        "schedule_type": "auto",
        "status": {"sync_state": "scheduled" if done else "syncing", "setup_state": "connected"},
    }


def _batch(name: str, done: bool) -> dict[str, Any]:
    counts = {"canceled": 0, "errored": 0, "expired": 0, "processing": 0 if done else 1}
    return {
        "id": name,
        "type": "message_batch",
        "processing_status": "ended" if done else "in_progress",
        "request_counts": {**counts, "succeeded": 1 if done else 0},
        "created_at": "2026-01-01T00:00:00Z",
        "expires_at": "2026-01-02T00:00:00Z",
        "ended_at": "2026-01-01T01:00:00Z" if done else None,
        "archived_at": None,
        "cancel_initiated_at": None,
        "results_url": None,
    }


class Seen:
    """The time of each request and of each TLS connection."""

    def __init__(self) -> None:
        self.requests: list[float] = []
        self.connections: list[float] = []


class Http(asyncio.Protocol):
    """One TLS connection; created when the handshake ends."""

    def __init__(self, routes: Routes, seen: Seen, latency: float) -> None:
        self._routes, self._seen, self._latency = routes, seen, latency
        self._buffer = b""

    def connection_made(self, transport: Any) -> None:
        """Record the connection."""
        self._transport = transport
        self._seen.connections.append(time.monotonic())

    def data_received(self, data: bytes) -> None:
        """Handle a request; all are GETs without a body."""
        self._buffer += data
        while b"\r\n\r\n" in self._buffer:
            head, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
            self._seen.requests.append(time.monotonic())
            target = head.split(b" ", 2)[1].decode()
            asyncio.get_running_loop().call_later(self._latency, self._answer, target)

    def _answer(self, target: str) -> None:
        if self._transport.is_closing():
            return
        status, response = self._routes.respond(target)
        body = json.dumps(response, separators=(",", ":")).encode()
        self._transport.write(
            b"HTTP/1.1 %d OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
            % (status, len(body), body)
        )


async def main() -> None:
    """Serve until stdin ends."""
    settings = json.loads(sys.argv[1])
    jobs, seen = Jobs(**settings["jobs"]), Seen()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(settings["certificate"])
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: Http(Routes(jobs), seen, settings["latency"]),
        "127.0.0.1",
        0,
        ssl=context,
        backlog=4096,
    )
    print(server.sockets[0].getsockname()[1], flush=True)
    commands = asyncio.StreamReader(limit=2**24)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    while line := await commands.readline():
        command = json.loads(line)
        if command == "count":
            print(len(seen.requests), flush=True)
        elif command == "seen":
            times = {"requests": seen.requests, "connections": seen.connections}
            print(json.dumps({**times, "cpu": time.process_time()}), flush=True)
        else:
            jobs.done_at[1:] = [NEVER if at is None else at for at in command]


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        uvloop.run(main())
