"""
The two transports over :mod:`.api`: requests on the worker, aiohttp in the triggerer.

Both send the same calls with the same network settings, send the credential to the connection's own origin
only, and raise the same exceptions. The class of a library's exception does not prove whether the request
reached HeyGen. Each attempt therefore records whether it had a connection.
"""

from __future__ import annotations

import asyncio
import base64
import http.client
import os
import re
import socket
import ssl
import time
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from threading import Event
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit
from weakref import WeakKeyDictionary

import aiohttp
import certifi
import requests
from requests.auth import HTTPBasicAuth
from requests.utils import get_auth_from_url
from requests_toolbelt.adapters.socket_options import TCPKeepAliveAdapter
from urllib3.connection import port_by_scheme
from urllib3.exceptions import HTTPError
from urllib3.util import parse_url
from yarl import URL

from airflow_provider_heygen import __version__
from airflow_provider_heygen.exceptions import (
    HeyGenBadInputError,
    HeyGenError,
    HeyGenTransientError,
    HeyGenUnreachableError,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from requests_toolbelt import MultipartEncoder

    from airflow_provider_heygen.api import Call
    from airflow_provider_heygen.connection import HeyGenConnection

T = TypeVar("T")

# urllib3's 16 kB are slow. A much larger piece could exceed upload_timeout on a slow network.
_PIECE_BYTES = 256 << 10

# A full page of the list has less than 1 MiB. A longer response must not fill the memory.
MAX_RESPONSE_BYTES = 64 << 20

# A gateway may send some before each response; without end, they would hold a worker for ever.
MAX_INTERIM_RESPONSES = 10

# HeyGen's gateway rejects the default agents of HTTP libraries (third-party report).
USER_AGENT = f"airflow-provider-heygen/{__version__}"


class ChunkedBody:
    """
    A body that is sent in pieces of 256 KiB.

    :param body: object with ``len``, the number of remaining bytes, and ``read``.
    :param write_timeout: longest time to send one piece, in seconds; the connection applies it.
    """

    def __init__(self, body: Any, write_timeout: float | None = None) -> None:
        self._body = body
        self.len = body.len
        self.write_timeout = write_timeout

    def __iter__(self) -> Iterator[bytes]:
        while chunk := self._body.read(_PIECE_BYTES):
            yield chunk


# Set when the worker's current request has a connection, after the proxy's CONNECT and the TLS handshake.
_connected: ContextVar[Event] = ContextVar("_connected")


def send(
    session: requests.Session, call: Call[T], settings: HeyGenConnection, form: MultipartEncoder | None = None
) -> T:
    """
    Send a call once, from a worker.

    :param session: session of :func:`new_session`, with the credential.
    :param form: body of an upload.
    :raises HeyGenUnreachableError: if the call was never sent.
    :raises HeyGenTransientError: if the connection broke after sending; or see :meth:`.Call.parse`.
    :raises HeyGenBadInputError: if a setting of the connection cannot work. Nothing was sent.
    """
    data, headers = None, dict(call.headers)
    timeout = settings.write_timeout if call.writes else settings.read_timeout
    if form is not None:
        timeout = settings.upload_timeout
        data, headers["Content-Type"] = ChunkedBody(form, timeout), form.content_type
    connected = Event()
    _connected.set(connected)
    try:
        response = session.request(
            call.method,
            settings.base_url + call.path,
            params=call.params,
            json=call.json,
            data=data,
            headers=headers,
            timeout=(settings.connect_timeout, timeout),
            stream=True,
        )
        with response:
            body = _read(response, call, settings, settings.connect_timeout + timeout)
    except HeyGenError:
        raise  # the file cannot be read; HeyGenBadInputError is a ValueError
    except (OSError, ValueError, HTTPError) as error:  # a RequestException is an OSError
        # Raises HeyGenBadInputError if a setting is the reason.
        proxy = None if connected.is_set() else _options(settings)["proxy"]
        raise _fault(error, connected, call, settings, proxy) from None
    if response.status_code < 200:
        # http.client returns a 101 as the response. The next request must not read the real one as its own.
        session.close()
    return call.parse(response.status_code, response.headers, body, settings)


def _read(response: requests.Response, call: Call[Any], settings: HeyGenConnection, seconds: float) -> bytes:
    body, ends_at = bytearray(), time.monotonic() + seconds
    while chunk := response.raw.read1(_PIECE_BYTES, decode_content=True):
        _add(body, chunk, call, settings)
        if time.monotonic() > ends_at:  # the timeout is for one read
            raise TimeoutError
    return bytes(body)


def _add(body: bytearray, chunk: bytes, call: Call[Any], settings: HeyGenConnection) -> None:
    body += chunk
    if len(body) > MAX_RESPONSE_BYTES:
        raise HeyGenTransientError(
            f"The response to {call.description} has more than {MAX_RESPONSE_BYTES >> 20} MiB. If this"
            f" persists, check the host of Airflow connection '{settings.conn_id}'.",
            outcome_unknown=call.writes,
        )


def request_elsewhere(
    session: requests.Session, settings: HeyGenConnection, event: str, method: str, url: str, **options: Any
) -> requests.Response:
    """
    Send a request to another host than HeyGen's and return the response, whose body is not read yet.

    :param session: session of :func:`new_session`, without the credential.
    :param event: what fails if the request does, such as "while uploading to example.com".
    :raises HeyGenTransientError: if no response arrived; without a URL, which may be presigned.
    :raises HeyGenBadInputError: if a setting of the connection cannot work. Nothing was sent.
    """
    connected = Event()
    _connected.set(connected)
    try:
        return session.request(method, url, stream=True, allow_redirects=False, **options)
    except HeyGenError:
        raise  # the file cannot be read
    except (OSError, ValueError, HTTPError) as error:
        event = f"{type(error).__name__} {event}"
        if connected.is_set():
            raise HeyGenTransientError(f"{event}.") from None
        raise _not_sent(_innermost(error), event, settings, _options(settings)["proxy"], []) from None


async def asend(call: Call[T], settings: HeyGenConnection) -> T:
    """Send a call once, as :func:`send` does, on an event loop with :func:`shared_session`."""
    name, value = settings.auth_header
    read_timeout = settings.write_timeout if call.writes else settings.read_timeout
    timeout = aiohttp.ClientTimeout(
        # A slow response must not last beyond the deadline of a wait.
        total=settings.connect_timeout + read_timeout,
        sock_connect=settings.connect_timeout,
        sock_read=read_timeout,
    )
    connected = Event()
    async with shared_session(settings) as (session, options):
        headers = {**call.headers, name: value}
        if urlsplit(settings.base_url).scheme == "http":
            # aiohttp sends proxy_headers only with CONNECT, which plain http does not use.
            headers |= options["proxy_headers"]
        try:
            async with session.request(
                call.method,
                settings.base_url + call.path,
                params=dict(call.params),
                json=call.json,
                headers=headers,
                timeout=timeout,
                allow_redirects=False,
                trace_request_ctx=connected,
                **options,
            ) as response:
                body = bytearray()
                async for chunk in response.content.iter_any():
                    _add(body, chunk, call, settings)
        except (aiohttp.ClientError, OSError, ValueError) as error:
            if type(error) is aiohttp.ClientResponseError and not call.writes:
                # aiohttp rejects responses that requests can read, such as one with two Content-Lengths.
                with new_session(settings, credential=True) as worker:
                    return await asyncio.to_thread(send, worker, call, settings)
            raise _fault(error, connected, call, settings, options["proxy"]) from None
        return call.parse(response.status, response.headers, bytes(body), settings)


def _fault(
    error: Exception, connected: Event, call: Call[Any], settings: HeyGenConnection, proxy: str | None
) -> HeyGenError:
    """Return the HeyGenError for an exception of either library: without a connection, nothing was sent."""
    error = _innermost(error)
    event = f"{type(error).__name__} during {call.description} at {settings.base_url}"
    connection = f"of Airflow connection '{settings.conn_id}'"
    if connected.is_set():
        if str(error).startswith("\x15\x03") or r"b'\x15\x03" in str(error):  # a TLS alert
            return HeyGenUnreachableError(
                f"{event}, nothing was sent that could be read. The port speaks TLS. Use https in the host"
                f" {connection}."
            )
        return HeyGenTransientError(f"{event}, no readable response arrived.", outcome_unknown=call.writes)
    return _not_sent(error, event, settings, proxy, ["the host"])


def _innermost(error: Exception) -> Exception:
    # Wrappers may quote the proxy's password. __context__ may belong to an earlier attempt.
    while inner := next((e for e in (error.__cause__, *error.args) if isinstance(e, Exception)), None):
        error = inner
    return error


def _not_sent(
    error: Exception, event: str, settings: HeyGenConnection, proxy: str | None, suspects: list[str]
) -> HeyGenUnreachableError:
    via = f" through the proxy {proxy}" if proxy else ""
    suspects = (["'verify'", "'cert'"] if isinstance(error, ssl.SSLError) else []) + suspects
    suspects = (["'proxies'"] if proxy else []) + suspects
    check = f" Check {' or '.join(suspects)} of Airflow connection '{settings.conn_id}'." if suspects else ""
    why = _why_not_sent(error, settings, proxy)
    return HeyGenUnreachableError(f"{event}, nothing was sent{via}: {why}.{check}")


def _why_not_sent(error: Exception, settings: HeyGenConnection, proxy: str | None) -> str:
    why = getattr(error, "strerror", None) or "no connection"
    if isinstance(error, socket.gaierror):
        why = f"host name not resolved ({why})"
    elif isinstance(error, ConnectionRefusedError):
        why = "connection refused"  # aiohttp would add the address
    elif isinstance(error, TimeoutError):
        why = f"timed out after {settings.connect_timeout:g} s (a firewall?)"
    if proxy and (refusal := re.match(r"(?:Tunnel connection failed: )?(\d{3})\b", str(error))):
        why = f"the proxy returned {refusal[1]} to CONNECT"
    return str(why)


# --- Sessions of the worker -----------------------------------------------------------------------------


def new_session(settings: HeyGenConnection, *, credential: bool) -> requests.Session:
    """
    Return a session with the connection's proxies and TLS settings, which override the environment's.

    It never reads ``~/.netrc`` and never follows a redirect.

    :param credential: whether to send the credential, to the connection's own scheme, host and port only.
    """
    name, value = settings.auth_header
    origin = _origin(settings.base_url)

    def authorize(request: requests.PreparedRequest) -> requests.PreparedRequest:
        if credential and _origin(request.url) == origin:
            request.headers[name] = value
        elif not credential and any(own := get_auth_from_url(str(request.url))):
            HTTPBasicAuth(*own)(request)  # of a source's own URL
        return request

    session = _Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, _Adapter(idle=120, interval=30, count=20))  # as in Airflow's HTTP hook
    session.auth = authorize  # without an auth, requests would read ~/.netrc
    session.headers["User-Agent"] = USER_AGENT
    session.proxies = dict(settings.proxies)
    session.verify = settings.verify
    session.cert = settings.cert
    session.trust_env = settings.trust_env
    return session


def _origin(url: str | None) -> tuple[str | None, str | None, int | None]:
    parts = parse_url(url or "")  # as urllib3 does before it connects
    return parts.scheme, parts.host, parts.port or port_by_scheme.get(parts.scheme or "")


class _Session(requests.Session):
    """A session whose proxies and TLS settings override the environment's, as in Airflow's HTTP hook."""

    def merge_environment_settings(self, url: Any, proxies: Any, stream: Any, verify: Any, cert: Any) -> Any:
        proxies = {**self.proxies, **(proxies or {})}
        verify = self.verify if verify is None else verify
        return super().merge_environment_settings(url, proxies, stream, verify, cert)

    def get_redirect_target(self, resp: Any) -> None:  # noqa: ARG002
        # With allow_redirects=False, requests would still parse the URL and fail on a bad one.
        return None


class _Adapter(TCPKeepAliveAdapter):  # type: ignore[misc]
    """An adapter whose connections record in the current attempt that they are established."""

    def proxy_manager_for(self, proxy: str, **kwargs: Any) -> Any:
        return super().proxy_manager_for(proxy, socket_options=self.socket_options, **kwargs)

    def proxy_headers(self, proxy: str) -> dict[str, str]:
        return _proxy_headers(proxy)

    def get_connection_with_tls_context(self, *args: Any, **kwargs: Any) -> Any:
        pool = super().get_connection_with_tls_context(*args, **kwargs)
        pool.ConnectionCls = _recording(type(pool).ConnectionCls)
        return pool


class _Response(http.client.HTTPResponse):
    """A response that skips interim ones (1xx), as aiohttp does; http.client skips 100 only."""

    def _read_status(self) -> tuple[str, int, str]:
        for _ in range(MAX_INTERIM_RESPONSES + 1):
            line: tuple[str, int, str] = super()._read_status()  # type: ignore[misc]
            if not 101 < line[1] < 200:
                return line
            http.client.parse_headers(self.fp)
        raise http.client.HTTPException("too many interim responses")


@cache
def _recording(base: Any) -> Any:
    class Connection(base):  # type: ignore[misc]
        response_class = _Response

        def request(self, *args: Any, **kwargs: Any) -> None:
            if self.is_closed:
                self.connect()  # DNS, TCP, the proxy's CONNECT, TLS
            _connected.get(Event()).set()
            # urllib3 would apply the connect timeout to the body.
            self.timeout: Any = getattr(kwargs.get("body"), "write_timeout", None) or self.timeout
            super().request(*args, **kwargs)

    return Connection


# --- Sessions of the triggerer --------------------------------------------------------------------------


@dataclass
class _SharedSession:
    """An aiohttp session, the options of its requests, and the number of its users."""

    session: aiohttp.ClientSession
    options: dict[str, Any]
    users: int = 0


_sessions: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, _SharedSession]] = WeakKeyDictionary()


@asynccontextmanager
async def shared_session(
    settings: HeyGenConnection,
) -> AsyncIterator[tuple[aiohttp.ClientSession, dict[str, Any]]]:
    """
    Share one aiohttp session among all users with the same settings on this event loop.

    :returns: session without the credential, and the options that each request needs.
    :raises HeyGenBadInputError: if the proxies or certificate files cannot be used.
    """
    of_loop = _sessions.setdefault(asyncio.get_running_loop(), {})
    # The credential is sent with each request, so a rotated key needs no new session.
    key = settings.model_dump_json(include={"base_url", "proxies", "verify", "cert", "trust_env"})
    if key not in of_loop:
        options = await asyncio.to_thread(_options, settings)  # reads certificate files
        if key not in of_loop:  # another task may have been quicker
            of_loop[key] = _SharedSession(_new_aiohttp_session(), options)
    shared = of_loop[key]
    shared.users += 1
    try:
        yield shared.session, shared.options
    finally:
        shared.users -= 1
        if not shared.users:
            del of_loop[key]
            await shared.session.close()


def _new_aiohttp_session() -> aiohttp.ClientSession:
    async def record(_session: Any, context: Any, _params: Any) -> None:
        context.trace_request_ctx.set()

    trace = aiohttp.TraceConfig()
    trace.on_connection_create_end.append(record)  # after the proxy's CONNECT and TLS
    trace.on_connection_reuseconn.append(record)
    session = aiohttp.ClientSession(
        # Longer than the usual poke_interval, so that a poll needs no new TLS handshake.
        connector=aiohttp.TCPConnector(limit=20, keepalive_timeout=120),
        cookie_jar=aiohttp.DummyCookieJar(),
        headers={"User-Agent": USER_AGENT},
        trace_configs=[trace],
        # The limits of http.client.
        max_field_size=65536,
        max_line_size=65536,
    )
    # aiohttp would repeat a DELETE without a response and return the 404 of its second attempt.
    session._retry_connection = False
    return session


# --- Network settings -----------------------------------------------------------------------------------


def _options(settings: HeyGenConnection) -> dict[str, Any]:
    """
    Return the proxy and TLS settings that requests would use, as options for aiohttp.

    aiohttp's own ``trust_env`` stays off, because it would read ``~/.netrc`` and add a second credential.

    :raises HeyGenBadInputError: if a setting cannot be used.
    """
    session = new_session(settings, credential=False)
    found = session.merge_environment_settings(settings.base_url, {}, None, None, None)
    proxy = requests.utils.select_proxy(settings.base_url, found["proxies"])
    headers = {}
    if proxy:
        try:
            proxy = requests.utils.prepend_scheme_if_needed(proxy, "http")  # type: ignore[no-untyped-call]
            headers = _proxy_headers(proxy)
            url = URL(proxy)
            usable = url.scheme in ("http", "https") and url.port != 0 and " " not in (url.host or " ")
            str(url.host).encode("idna")  # as the DNS query does
            proxy = str(url.with_user(None))
        except ValueError:
            usable = False
        if not usable:
            raise HeyGenBadInputError(
                f"The 'proxies' of Airflow connection '{settings.conn_id}' (or of the environment) must be"
                " http or https URLs (a triggerer can use no others), with special characters in user and"
                " password percent-encoded. Nothing was sent."
            ) from None
    uses_tls = any(urlsplit(url or "").scheme == "https" for url in (settings.base_url, proxy))
    return {
        "proxy": proxy,
        "proxy_headers": headers,
        "ssl": _tls_context(settings, found["verify"], found["cert"]) if uses_tls else True,
    }


def _proxy_headers(proxy: str) -> dict[str, str]:
    """Return the header with the user name and password of a proxy's URL."""
    user, password = requests.utils.get_auth_from_url(proxy)
    if not (user or password):
        return {}
    pair = f"{user}:{password}"
    # Both libraries send latin-1 and fail on any other character.
    encoded = pair.encode("latin-1" if max(pair) <= "\xff" else "utf-8")
    return {"Proxy-Authorization": f"Basic {base64.b64encode(encoded).decode()}"}


def _tls_context(settings: HeyGenConnection, verify: Any, cert: Any) -> ssl.SSLContext:
    bundle = certifi.where() if verify in (True, False) else str(verify)
    file, directory = (None, bundle) if os.path.isdir(bundle) else (bundle, None)
    name = "verify"
    try:
        context = ssl.create_default_context(cafile=file, capath=directory)
        if not verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        name = "cert"
        if cert:
            context.load_cert_chain(*([cert] if isinstance(cert, str) else cert))
    except (OSError, ValueError) as error:
        raise HeyGenBadInputError(
            f"The '{name}' file of Airflow connection '{settings.conn_id}' (or of the environment) cannot be"
            f" used: {getattr(error, 'strerror', None) or error}. It must be a readable file in PEM format."
            " Nothing was sent."
        ) from None
    return context
