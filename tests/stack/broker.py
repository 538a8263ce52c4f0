"""The Redis of a stack on Celery, through a wire that can be cut without harm to Redis' other users."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from contextlib import suppress
from urllib.parse import urlsplit

REDIS = os.environ.get("STACK_REDIS", "redis://127.0.0.1:6379")
"""Where a Redis is. A stack prefixes its keys there with the name of its folder."""


class Wire:
    """A TCP proxy on loopback to `REDIS`; ``url`` is Redis' URL by way of it. It dies with this process."""

    def __init__(self) -> None:
        parts = urlsplit(REDIS)
        self._target = (parts.hostname or "127.0.0.1", parts.port or 6379)
        self._ends: set[asyncio.StreamWriter] = set()
        self._down = False
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        starting = asyncio.start_server(self._serve, "127.0.0.1", 0)
        self._server = asyncio.run_coroutine_threadsafe(starting, self._loop).result()
        user, at, _ = parts.netloc.rpartition("@")
        port = self._server.sockets[0].getsockname()[1]
        self.url = parts._replace(netloc=f"{user}{at}127.0.0.1:{port}").geturl()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._down:
            writer.transport.abort()
            return
        redis_reader, redis_writer = await asyncio.open_connection(*self._target)
        ends = {writer, redis_writer}
        self._ends |= ends

        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            with suppress(OSError):
                while data := await source.read(65536):
                    sink.write(data)
                    await sink.drain()
            for end in ends:
                end.transport.abort()

        await asyncio.gather(pump(reader, redis_writer), pump(redis_reader, writer))
        self._ends -= ends

    def cut(self, *, down: float = 0) -> None:
        """Break all connections, and reject new ones for as many seconds."""

        def abort() -> None:
            self._down = True
            for end in self._ends:
                end.transport.abort()

        self._loop.call_soon_threadsafe(abort)
        time.sleep(down)
        self._loop.call_soon_threadsafe(setattr, self, "_down", False)


def why_no_redis() -> str | None:
    """Return why Redis cannot be used; ``None`` if it can."""
    try:
        import redis
    except ImportError:
        return "redis is not installed"
    try:
        redis.Redis.from_url(REDIS, socket_connect_timeout=3).ping()
    except redis.RedisError as error:
        return f"no Redis at {REDIS}: {error}"
    return None
