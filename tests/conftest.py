"""What the tests share: an Airflow of their own, the emulator with a connection to it, a listening server."""

from __future__ import annotations

import ast
import atexit
import fcntl
import http.client
import itertools
import json
import os
import re
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import urllib.request
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

# Airflow reads these when it is imported, so no import of it may stand above.
_AIRFLOW_HOME = tempfile.mkdtemp(prefix="airflow-home-")
atexit.register(shutil.rmtree, _AIRFLOW_HOME, ignore_errors=True)
os.environ.pop("AIRFLOW_CONFIG", None)
os.environ.update(
    AIRFLOW_HOME=_AIRFLOW_HOME,
    AIRFLOW__CORE__LOAD_EXAMPLES="False",
    AIRFLOW__CORE__DAGS_FOLDER=str(Path(__file__).parents[1] / "example_dags"),
)

import tenacity  # noqa: E402
from airflow import __version__ as airflow_version  # noqa: E402
from airflow.sdk import ObjectStoragePath  # noqa: E402
from airflow_task import build_execution_api_once  # noqa: E402
from packaging.version import Version  # noqa: E402

from airflow_provider_heygen.emulator import Behaviour, Emulator  # noqa: E402
from airflow_provider_heygen.hooks import heygen as heygen_hook  # noqa: E402

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Iterable, Iterator
    from email.message import Message

build_execution_api_once()

AIRFLOW = Version(airflow_version)

# What an older Airflow lacks; docs/support.md tells users.
HAS_STATE_STORE = Version("3.3") <= AIRFLOW
STATS_ARE_SET_UP = Version("3.2") <= AIRFLOW  # by worker and triggerer; before, they set themselves up
HAS_THE_WEB_UI = Version("3.3") <= AIRFLOW

needs_state_store = pytest.mark.skipif(
    not HAS_STATE_STORE, reason="Airflow before 3.3 has no task state store"
)
needs_the_web_ui = pytest.mark.skipif(
    not HAS_THE_WEB_UI, reason="Airflow before 3.2 has no fields of ours in its web UI, 3.2 looks different"
)

# What would make the machine's own network settings part of a test.
_NETWORK = (
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "ALL_PROXY",
    "NO_PROXY",
    "NETRC",
    "REQUESTS_CA_BUNDLE",
    "CURL_CA_BUNDLE",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the file that sleeps the longest, so that it does not run alone at the end."""
    items.sort(key=lambda item: item.path.name != "test_other_server.py")


@pytest.fixture(scope="session")
def _emulator() -> Iterator[Emulator]:
    with Emulator(Behaviour(job_seconds=0.05)) as emulator:
        yield emulator


@pytest.fixture(scope="session")
def migrated_db(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Airflow's database as ``airflow db migrate`` makes it, once for all processes of a test run."""
    base = tmp_path_factory.getbasetemp()  # with xdist, each process has a folder of its own in it
    home = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "migrated"
    home.mkdir(exist_ok=True)
    with (home / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (home / "done").exists():
            command = [sys.executable, "-m", "airflow", "db", "migrate"]
            subprocess.run(
                command, check=True, capture_output=True, env={**os.environ, "AIRFLOW_HOME": str(home)}
            )
            (home / "done").touch()
    return home / "airflow.db"


@pytest.fixture(scope="session")
def airflow_db(migrated_db: Path) -> None:
    """The tests' Airflow has its database."""
    shutil.copy(migrated_db, _AIRFLOW_HOME)


@pytest.fixture
def resource() -> str:
    """The resource of the connection; parametrize a test over it to run under both names."""
    return "overdubs"


def _parse_again(parse: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """
    Parse source again where CPython 3.11 fails to, as it sometimes does in a process with many threads.

    ``SystemError: AST constructor recursion depth mismatch`` is a fault of CPython (issue 106905).
    """
    with suppress(SystemError):
        return parse(*args, **kwargs)
    return parse(*args, **kwargs)


ast.parse = partial(_parse_again, ast.parse)  # hypothesis and some tests read sources


def each_value(longer: Iterable[Any], shorter: Iterable[Any]) -> list[tuple[Any, Any]]:
    """Return pairs in which each value occurs, where not each combination is worth a test."""
    return list(zip(longer, itertools.cycle(list(shorter)), strict=False))


@pytest.fixture
def heygen(
    _emulator: Emulator, resource: Any, connect: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> Emulator:
    """A fresh HeyGen whose jobs take 0.05 s; the connection ``heygen_default`` leads to it."""
    _emulator.reset()
    # The emulator has done what it was asked to when a connection breaks; nothing has to settle.
    monkeypatch.setattr(heygen_hook, "SETTLE_SECONDS", 0.1)
    connection = _emulator.connection(resource)
    connect(_emulator.url, connection["password"], **connection["extra"])
    return _emulator


@pytest.fixture
def connect(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return ``heygen_default`` another host, password and extra: ``connect(url, "key", verify=False)``."""
    monkeypatch.setattr(heygen_hook, "_detected", {})  # as in a new process
    for name in _NETWORK:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)

    def set_connection(host: str | None, password: str | None = "emulator-api-key", **extra: Any) -> None:
        fields = {"conn_type": "heygen", "host": host, "password": password, "extra": extra}
        monkeypatch.setenv("AIRFLOW_CONN_HEYGEN_DEFAULT", json.dumps(fields))

    return set_connection


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses between attempts, in seconds; none of them is slept."""
    taken: list[float] = []

    async def pause(seconds: float) -> None:
        taken.append(seconds)

    monkeypatch.setattr(tenacity, "Retrying", partial(tenacity.Retrying, sleep=taken.append))
    monkeypatch.setattr(tenacity, "AsyncRetrying", partial(tenacity.AsyncRetrying, sleep=pause))
    return taken


@dataclass
class Seen:
    """One request as it came over the wire: ``path`` with its query, ``client`` the port it came from."""

    method: str
    path: str
    headers: Message
    body: bytes
    client: int


class Listener:
    """An HTTP server on loopback: records requests, responds by a function, tunnels on CONNECT.

    The function gives ``(status, headers, body)``, or the raw bytes to send before hanging up.
    """

    def __init__(
        self, answer: Callable[[Seen], Any] = lambda _: (200, {}, b"{}"), tls: ssl.SSLContext | None = None
    ) -> None:
        self.answer = answer
        self.seen: list[Seen] = []
        self.tunnels: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self))
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # a client that hung up is no error here
        if tls is not None:
            self._server.socket = tls.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        self.port = self._server.server_port
        self.url = f"http{'s' if tls else ''}://127.0.0.1:{self.port}"
        threading.Thread(target=partial(self._server.serve_forever, 0.01), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def __init__(self, listener: Listener, *args: Any) -> None:
        self.listener = listener
        super().__init__(*args)

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        seen = Seen(self.command, self.path, self.headers, body, self.client_address[1])
        self.listener.seen.append(seen)
        self.close_connection = True  # unless all goes well
        answer = self.listener.answer(seen)
        if isinstance(answer, bytes):
            socket.socket.sendall(self.connection, answer)  # past TLS, too
            return
        status, headers, content = answer
        self.send_response_only(status)
        if "content-length" not in map(str.lower, headers):
            headers = {**headers, "Content-Length": len(content)}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)
        self.close_connection = False

    do_GET = do_POST = do_PATCH = do_DELETE = do_PUT = _handle

    def do_CONNECT(self) -> None:
        self.listener.tunnels.append(self.path)
        self.close_connection = True
        host, _, port = self.path.rpartition(":")
        with socket.create_connection((host, int(port))) as other:
            self.send_response_only(200)
            self.end_headers()
            ways = {self.connection: other, other: self.connection}
            while True:
                for source in select.select(list(ways), [], [])[0]:
                    content = source.recv(65536)
                    if not content:
                        return
                    ways[source].sendall(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def listen() -> Iterator[Callable[..., Listener]]:
    """Start a :class:`Listener`: ``listen(answer, tls=context)``."""
    listeners: list[Listener] = []

    def start(*args: Any, **kwargs: Any) -> Listener:
        listeners.append(Listener(*args, **kwargs))
        return listeners[-1]

    yield start
    for listener in listeners:
        listener.close()


class StatsD:
    """A StatsD server on loopback that keeps what it is sent until it is taken."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self._socket.setblocking(False)
        self.port: int = self._socket.getsockname()[1]

    def close(self) -> None:
        self._socket.close()

    def take(self) -> list[tuple[str, dict[str, str], float, str]]:
        """Return new metrics: names without ``airflow.``, tags in InfluxDB's way, values and types."""
        found = []
        while True:
            try:
                text = self._socket.recv(65536).decode()
            except BlockingIOError:
                return found
            for line in text.splitlines():
                match = re.fullmatch(r"airflow\.([^,:]+)((?:,[^:]+)*):(.+)\|(\w+)", line)
                assert match, line
                tags = dict(tag.split("=") for tag in match[2].split(",")[1:])
                found.append((match[1], tags, float(match[3]), match[4]))


def forward(url: str) -> Callable[[Seen], tuple[int, dict[str, str], bytes]]:
    """Response of a :class:`Listener` that forwards requests to ``url``; or a proxy, for absolute URLs."""

    def answer(seen: Seen) -> tuple[int, dict[str, str], bytes]:
        path = seen.path.removeprefix(url)
        upstream = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
        try:
            headers = {name: value for name, value in seen.headers.items() if name.lower() != "connection"}
            upstream.request(seen.method, path, seen.body or None, headers)
            response = upstream.getresponse()
            return response.status, dict(response.headers.items()), response.read()
        finally:
            upstream.close()

    return answer


@pytest.fixture
def wire(
    heygen: Emulator, listen: Callable[..., Listener], connect: Callable[..., None], resource: str
) -> Listener:
    """The emulator behind a server that keeps what it was sent; the connection leads there."""
    listener = listen(forward(heygen.url))
    connect(listener.url, resource=resource, allow_private_hosts=True)
    return listener


class Storage:
    """A place for files: ``uri(name)`` is what a DAG would say, the rest is for looking from outside."""

    def __init__(self, base: str) -> None:
        self.base = base
        self.path = ObjectStoragePath(base)

    def uri(self, name: str) -> str:
        return f"{self.base}/{name}"

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def write(self, name: str, content: bytes) -> None:
        self.path.fs.pipe_file((self.path / name).path, content)

    def names(self) -> list[str]:
        """All that is there, a file with a temporary name or half an upload, too."""
        fs = self.path.fs
        fs.invalidate_cache()
        names = [path.rpartition("/")[2] for path in fs.find(self.path.path)]
        if self.path.protocol == "s3":
            names += [f"upload of {upload['Key']}" for upload in fs.list_multipart_uploads("bucket")]
        return sorted(names)


@pytest.fixture(scope="session")
def _s3_url() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def s3(_s3_url: str, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """An empty bucket in an S3 on loopback, through the Amazon provider; its connection is ``s3``."""
    extra = {"endpoint_url": _s3_url, "region_name": "us-east-1"}
    connection = {"conn_type": "aws", "login": "key", "password": "secret", "extra": extra}
    monkeypatch.setenv("AIRFLOW_CONN_S3", json.dumps(connection))
    request = urllib.request.Request(f"{_s3_url}/moto-api/reset", method="POST")
    urllib.request.urlopen(request, timeout=10).close()
    storage = Storage("s3://s3@bucket")
    storage.path.fs.invalidate_cache()
    storage.path.fs.mkdir("bucket")
    return storage


@pytest.fixture(params=["file", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """An empty place, on each kind of storage in turn: files that can be renamed, objects that cannot."""
    if request.param == "s3":
        found: Storage = request.getfixturevalue("s3")
        return found
    return Storage(str(tmp_path))
