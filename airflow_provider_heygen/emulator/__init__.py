"""
An emulator of HeyGen that runs on your own machine, to try out and test pipelines without a cost.

    with Emulator(Behaviour(job_seconds=0.2), port=0) as heygen:
        os.environ["AIRFLOW_CONN_HEYGEN_DEFAULT"] = json.dumps(heygen.connection())

or ``python -m airflow_provider_heygen.emulator``. It has HeyGen's HTTP API (overdubs, lipsyncs, assets, API
keys, presigned URLs, callbacks) and runs the jobs except for the lip-sync: ffmpeg replaces the audio of the
video. By default, it does not download input URLs but uses a short test clip instead. It deletes all files at
the end.
"""

from __future__ import annotations

try:
    import fastapi  # noqa: F401
    import python_multipart  # noqa: F401 - fastapi imports it only for routes with a form
    import uvicorn
except ImportError as error:
    raise ImportError(
        f"The HeyGen emulator needs {error.name}: pip install 'airflow-provider-heygen[emulator]'",
        name=error.name,
    ) from error

import asyncio
import logging
import shutil
import socket
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from airflow_provider_heygen.emulator.app import HeyGen
from airflow_provider_heygen.emulator.state import (
    Asset,
    Behaviour,
    Fault,
    Job,
    RequestRecord,
    State,
    Status,
)
from airflow_provider_heygen.emulator.work import Worker

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Callable

__all__ = ["Asset", "Behaviour", "Emulator", "Fault", "Job", "RequestRecord"]

API_KEY = "emulator-api-key"
OAUTH_TOKEN = "emulator-oauth-token"  # noqa: S105 - no secret: the emulator has no data


class Emulator:
    """
    The server, in a thread between ``start`` and ``stop``; also a context manager.

    ``url`` is set by ``start`` and does not end with a slash. Other processes use the routes under
    ``/emulator/`` instead of the members of this class.

    :param behaviour: initial behaviour; may be changed while the server runs.
    :param host: address to listen on.
    :param port: TCP port; 0 for a free one.
    :param api_key: the API key that it accepts.
    :param oauth_token: the OAuth token that it accepts.
    """

    def __init__(
        self,
        behaviour: Behaviour | None = None,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        api_key: str = API_KEY,
        oauth_token: str = OAUTH_TOKEN,
    ) -> None:
        self.api_key = api_key
        self.oauth_token = oauth_token
        self._address = host, port
        self._state = State(behaviour or Behaviour(), {"api_key": api_key, "oauth": oauth_token})

    def start(self) -> Self:
        """
        Start the server, and return when it is ready.

        :raises OSError: if the port is in use.
        """
        # asyncio sets TCP_NODELAY only if the protocol is given; otherwise each POST takes 40 ms.
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind(self._address)
        except OSError:
            self._socket.close()
            raise
        host, port = self._socket.getsockname()
        self.url = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"  # noqa: S104
        self._state.directory = Path(tempfile.mkdtemp(prefix="heygen-emulator-"))
        self._worker = Worker(self._state)
        config = uvicorn.Config(
            HeyGen(self._state, self._worker),
            http=_Protocol,
            ws="none",
            lifespan="off",
            proxy_headers=False,
            log_level=logging.WARNING,
            log_config=None,
            access_log=False,
            # Longer than the delay between polls, so that pollers keep their connection.
            timeout_keep_alive=75,
            timeout_graceful_shutdown=1,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._serve, name="heygen-emulator", daemon=True)
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                raise RuntimeError("The HeyGen emulator did not start; see the log")
            time.sleep(0.005)
        return self

    def stop(self) -> None:
        """Cancel all jobs, close the port, and delete the files."""
        self._server.should_exit = True
        self._thread.join()
        self._worker.close()
        shutil.rmtree(self._state.directory, ignore_errors=True)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def connection(
        self,
        resource: Literal["overdubs", "lipsyncs"] | None = None,
        auth_type: Literal["api_key", "oauth"] = "api_key",
    ) -> dict[str, Any]:
        """Return an Airflow connection to this server; its JSON fits ``AIRFLOW_CONN_HEYGEN_DEFAULT``."""
        extra: dict[str, Any] = {
            "allow_http": True,
            "allow_private_hosts": True,
            "max_requests_per_second": 200,  # an emulator needs no rate limit
        }
        if resource is not None:
            extra["resource"] = resource
        if auth_type == "oauth":
            extra["auth_type"] = "oauth"
        # A separate port: the connection test of Airflow 3.3.1 and 3.3.2 requires one.
        host, _, port = self.url.rpartition(":")
        return {
            "conn_type": "heygen",
            "host": host,
            "port": int(port),
            "password": self.api_key if auth_type == "api_key" else self.oauth_token,
            "extra": extra,
        }

    @property
    def behaviour(self) -> Behaviour:
        """Settings; a change takes effect at once."""
        return self._state.behaviour

    @property
    def jobs(self) -> list[Job]:
        """All jobs since the last reset in order, including deleted ones."""
        return list(self._state.created)

    @property
    def assets(self) -> list[Asset]:
        """All assets whose upload is complete, in order."""
        return [asset for asset in self._state.assets.values() if asset.ready]

    @property
    def requests(self) -> list[RequestRecord]:
        """The last 10,000 requests in order of arrival, without those for ``/emulator/``."""
        return list(self._state.requests)

    @property
    def requests_by_route(self) -> Counter[str]:
        """Number of requests for each route, such as ``{"GET /v3/overdubs/{overdub_id}": 7}``."""
        return self._state.requests_by_route.copy()

    def fail_next(self, **fault: Any) -> Fault:
        """Add a fault for the next matching requests; the arguments are the fields of ``Fault``."""
        added = Fault(**fault)
        self._in_loop(lambda: self._state.faults.append(added))
        return added

    def clear_faults(self) -> None:
        """Remove the faults that have not been used up."""
        self._in_loop(self._state.faults.clear)

    def force(self, job_id: str, status: Status, failure_message: str | None = None) -> None:
        """
        Set the status of a job, which stays until another is forced.

        :raises ApiError: if there is no such job.
        """
        self._in_loop(lambda: self._state.job(job_id).force(status, failure_message))

    def forget_assets(self) -> None:
        """Delete all assets."""
        self._in_loop(self._state.assets.clear)

    def reset(self) -> None:
        """Remove all state, and restore the initial behaviour."""
        self._in_loop(self._state.reset)

    def _serve(self) -> None:
        async def serve() -> None:
            self._loop = asyncio.get_running_loop()
            await self._server.serve(sockets=[self._socket])

        asyncio.run(serve())

    def _in_loop(self, change: Callable[[], None]) -> None:
        """Make a change in the thread of the event loop, which owns the state."""

        async def call() -> None:
            change()

        asyncio.run_coroutine_threadsafe(call(), self._loop).result()


class _Protocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """uvicorn's protocol with its transport in the scope, so that the application can drop the connection."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.app_state: dict[str, Any] = {**self.app_state, "transport": transport}
