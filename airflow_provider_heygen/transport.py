"""
The two transports over :mod:`.api`: requests on the worker, aiohttp in the triggerer.

Both send the same calls under the same network settings, send the credential to the connection's own origin
only, and raise the same exceptions. The important one is what a network fault proves: whether a request that
failed may have reached HeyGen. Neither library says so by the class of its exception, so each attempt
records whether it got a connection. Without one, nothing was sent; with one, the outcome is unknown.
"""

from __future__ import annotations

import asyncio
import base64
import http.client
import os
import re
import socket
import ssl
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit
from weakref import WeakKeyDictionary

import aiohttp
import certifi
import requests
from requests.adapters import HTTPAdapter
from requests.auth import AuthBase
from requests.exceptions import RequestException
from urllib3.connection import HTTPConnection
from urllib3.exceptions import HTTPError, NameResolutionError
from urllib3.exceptions import TimeoutError as Urllib3TimeoutError
from urllib3.util.ssl_match_hostname import CertificateError

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
    from urllib3.connectionpool import HTTPConnectionPool

    from airflow_provider_heygen.api import Call
    from airflow_provider_heygen.connection import HeyGenConnection

T = TypeVar("T")

# HeyGen's gateway is known to refuse the default agents of HTTP libraries (contract notes, section 2).
USER_AGENT = f"airflow-provider-heygen/{__version__}"

MAX_HEADER_BYTES = 65536
"""The longest line of a response header. It is the limit of :mod:`http.client`; aiohttp's own is 8190."""


def send(
    session: requests.Session, call: Call[T], settings: HeyGenConnection, form: MultipartEncoder | None = None
) -> T:
    """
    Send a call once, from a worker.

    :param session: from :func:`new_session`, with the credential.
    :param form: the body, if it is a file.
    :raises HeyGenUnreachableError: the call was never sent.
    :raises HeyGenTransientError: the connection broke after sending; or see :meth:`.Call.answer`.
    :raises HeyGenBadInputError: a setting of the connection cannot work.
    """
    data, headers = None, dict(call.headers)
    if form is not None:
        # Here, so that upload may import this module.
        from airflow_provider_heygen.upload import Chunks

        data, headers["Content-Type"] = Chunks(form, settings.upload_timeout), form.content_type
    timeout = (settings.connect_timeout, _read_timeout(settings, call, upload=form is not None))
    attempt = _Attempt()
    token = _attempt.set(attempt)
    try:
        response = session.request(
            call.method,
            settings.base_url + call.path,
            params=call.params,
            json=call.json,
            data=data,
            headers=headers,
            timeout=timeout,
            allow_redirects=False,
        )
    except HeyGenError:
        raise  # the file cannot be read; some of them are a ValueError
    except (OSError, ValueError, HTTPError) as error:  # a RequestException is an OSError
        wrong = None if attempt.connected else _wrong_setting(settings, proxies=isinstance(error, ValueError))
        raise (wrong or _fault(error, attempt, call, settings)) from None
    finally:
        _attempt.reset(token)
    if response.status_code < 200:
        # http.client takes a 1xx for the response. The real one must not pass for that of the next request.
        session.close()
    return call.answer(response.status_code, response.headers, response.content, settings)


async def asend(call: Call[T], settings: HeyGenConnection) -> T:
    """:func:`send` for an event loop, by :func:`shared_session`."""
    name, value = settings.auth_header
    read_timeout = _read_timeout(settings, call)
    timeout = aiohttp.ClientTimeout(
        # A response that drips in must not outlive the deadline of a wait.
        total=settings.connect_timeout + read_timeout,
        sock_connect=settings.connect_timeout,
        sock_read=read_timeout,
    )
    attempt = _Attempt()
    async with shared_session(settings) as (session, options):
        headers = {**call.headers, name: value}
        if urlsplit(settings.base_url).scheme == "http":
            # There is no CONNECT, and aiohttp sends proxy_headers with nothing else.
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
                trace_request_ctx=attempt,
                **options,
            ) as response:
                body = await response.read()
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise _fault(error, attempt, call, settings, options["proxy"]) from None
        return call.answer(response.status, response.headers, body, settings)


def _read_timeout(settings: HeyGenConnection, call: Call[Any], *, upload: bool = False) -> float:
    if upload:
        return settings.upload_timeout
    return settings.read_timeout if call.method == "GET" else settings.write_timeout


# --- Sessions of the worker -----------------------------------------------------------------------------


def new_session(settings: HeyGenConnection, *, credential: bool) -> requests.Session:
    """
    Return a session with the connection's proxies and TLS settings, which win over the environment's.

    It never uses ``~/.netrc`` and never follows a redirect.

    :param credential: whether to send the credential, to the connection's own scheme, host and port only.
    """
    session = _Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, _Adapter())
    # Without an auth, requests would look into ~/.netrc.
    session.auth = _Credential(settings) if credential else _no_credential
    if credential:
        session.headers["User-Agent"] = USER_AGENT
    session.proxies = dict(settings.proxies)
    session.verify = settings.verify
    session.cert = settings.cert
    session.trust_env = settings.trust_env
    return session


class _Credential(AuthBase):
    """The one credential header, for requests to the connection's own origin."""

    def __init__(self, settings: HeyGenConnection) -> None:
        self.header = settings.auth_header
        # Written the way requests writes the URL of each request.
        url = requests.Request("GET", settings.base_url).prepare().url
        self.origin = _origin(str(url))

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        name, value = self.header
        if _origin(str(request.url)) == self.origin:
            request.headers[name] = value
        return request


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _no_credential(request: requests.PreparedRequest) -> requests.PreparedRequest:
    return request


class _Session(requests.Session):
    """A session whose own proxies and TLS settings win over the environment's, as in Airflow's HTTP hook."""

    def merge_environment_settings(self, url: Any, proxies: Any, stream: Any, verify: Any, cert: Any) -> Any:
        proxies = {**self.proxies, **(proxies or {})}
        verify = self.verify if verify is None else verify
        return super().merge_environment_settings(url, proxies, stream, verify, cert)

    def get_redirect_target(self, resp: Any) -> None:  # noqa: ARG002
        # Redirects are not followed; requests would still parse them, and fail on a bad one.
        return None


# As in Airflow's HTTP connection: a firewall must not drop a connection on which HeyGen is still working.
_SOCKET_OPTIONS = [
    *HTTPConnection.default_socket_options,
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    *(
        (socket.IPPROTO_TCP, getattr(socket, name), value)
        for name, value in (("TCP_KEEPIDLE", 120), ("TCP_KEEPINTVL", 30), ("TCP_KEEPCNT", 20))
        if hasattr(socket, name)  # macOS names the first differently
    ),
]


class _Adapter(HTTPAdapter):
    """An adapter whose connections record in the current attempt that they are established."""

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **{"socket_options": _SOCKET_OPTIONS, **kwargs})
        self._record(self.poolmanager)

    def proxy_manager_for(self, proxy: Any, **kwargs: Any) -> Any:
        known = proxy in self.proxy_manager
        manager = super().proxy_manager_for(proxy, **{"socket_options": _SOCKET_OPTIONS, **kwargs})
        if not known:
            self._record(manager)
        return manager

    def proxy_headers(self, proxy: Any) -> dict[str, str]:
        return _proxy_headers(proxy)

    @staticmethod
    def _record(manager: Any) -> None:
        pools = manager.pool_classes_by_scheme
        manager.pool_classes_by_scheme = {scheme: _recording(pool) for scheme, pool in pools.items()}


@cache
def _recording(pool: type[HTTPConnectionPool]) -> type[HTTPConnectionPool]:
    """Return a pool class, of whatever kind (SOCKS has its own), whose connections record their state."""
    base: Any = pool.ConnectionCls

    class Connection(base):  # type: ignore[misc]
        def connect(self) -> None:
            attempt = _attempt.get(_Attempt())  # none, when get_conn() is used directly
            try:
                super().connect()  # name look-up, TCP, the proxy's CONNECT, TLS
            except Exception as error:
                attempt.fault, attempt.proxy = error, str(self.proxy or "") or None
                raise
            attempt.connected = True

        def request(self, *args: Any, **kwargs: Any) -> None:
            if self.is_closed:
                self.connect()
            _attempt.get(_Attempt()).connected = True
            # urllib3 would send a body under the connect timeout.
            self.timeout: Any = getattr(kwargs.get("body"), "write_timeout", None) or self.timeout
            super().request(*args, **kwargs)

    class Pool(pool):  # type: ignore[misc, valid-type]
        ConnectionCls = Connection

    return Pool


# --- Sessions of the triggerer --------------------------------------------------------------------------


@dataclass
class _Shared:
    """An aiohttp session, the options of its requests, and the number of its users."""

    session: aiohttp.ClientSession
    options: dict[str, Any]
    users: int = 0


# One session for all triggers of an event loop with the same settings, kept while one of them uses it.
_sessions: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, _Shared]] = WeakKeyDictionary()


@asynccontextmanager
async def shared_session(
    settings: HeyGenConnection,
) -> AsyncIterator[tuple[aiohttp.ClientSession, dict[str, Any]]]:
    """
    Share one aiohttp session with every other user of the same settings on this event loop.

    :returns: the session, without the credential, and the options that each of its requests needs.
    :raises HeyGenBadInputError: the proxies or certificate files cannot be used.
    """
    of_loop = _sessions.setdefault(asyncio.get_running_loop(), {})
    # The credential is sent with each request, so a rotated key needs no new session.
    key = settings.model_dump_json(include={"base_url", "proxies", "verify", "cert", "trust_env"})
    if key not in of_loop:
        options = await asyncio.to_thread(_aiohttp_options, settings)
        if key not in of_loop:  # another task may have been quicker
            of_loop[key] = _Shared(_new_aiohttp_session(), options)
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
        attempt = getattr(context, "trace_request_ctx", None)
        if isinstance(attempt, _Attempt):
            attempt.connected = True

    trace = aiohttp.TraceConfig()
    trace.on_connection_create_end.append(record)  # after the proxy's CONNECT and TLS
    trace.on_connection_reuseconn.append(record)
    session = aiohttp.ClientSession(
        # Longer than a sensible poll interval: a waiting trigger must not pay for TLS at each poll.
        connector=aiohttp.TCPConnector(limit=20, keepalive_timeout=120),
        cookie_jar=aiohttp.DummyCookieJar(),
        headers={"User-Agent": USER_AGENT},
        trace_configs=[trace],
        max_line_size=MAX_HEADER_BYTES,
        max_field_size=MAX_HEADER_BYTES,
    )
    # aiohttp would repeat a lost DELETE by itself and return the 404 of its second attempt.
    session._retry_connection = False
    return session


# --- Network settings -----------------------------------------------------------------------------------


def _aiohttp_options(settings: HeyGenConnection) -> dict[str, Any]:
    """
    Return for aiohttp the proxy and TLS settings that requests would use, from connection and environment.

    aiohttp's own ``trust_env`` is left off: it would read ``~/.netrc`` and add a second credential. Reads
    certificate files, so call it off the event loop.
    """
    found = _network(settings)
    proxy, headers = _proxy(settings, found)
    uses_tls = any(urlsplit(url or "").scheme == "https" for url in (settings.base_url, proxy))
    return {
        "proxy": proxy,
        "proxy_headers": headers,
        "ssl": _tls_context(settings, found) if uses_tls else True,
    }


def _wrong_setting(settings: HeyGenConnection, *, proxies: bool) -> HeyGenBadInputError | None:
    """Return which setting made requests fail before it sent anything, if one of them cannot be used."""
    found = _network(settings)
    try:
        if proxies:
            _proxy(settings, found)
        if urlsplit(settings.base_url).scheme == "https":
            _tls_context(settings, found)
    except HeyGenBadInputError as error:
        return error
    return None


def _network(settings: HeyGenConnection) -> dict[str, Any]:
    session = new_session(settings, credential=False)
    return dict(session.merge_environment_settings(settings.base_url, {}, None, None, None))


def _proxy(settings: HeyGenConnection, found: dict[str, Any]) -> tuple[str | None, dict[str, str]]:
    """Return the proxy's URL without user name and password, and the header that holds them."""
    try:
        proxy = requests.utils.select_proxy(settings.base_url, found["proxies"])
        if not proxy:
            return None, {}
        proxy = requests.utils.prepend_scheme_if_needed(proxy, "http")  # type: ignore[no-untyped-call]
        parts = urlsplit(proxy)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        (parts.hostname or "").encode("idna")  # as the look-up of its address does
        headers = _proxy_headers(proxy)
    except ValueError:
        usable = False
    if not usable:
        raise HeyGenBadInputError(
            f"The 'proxies' of Airflow connection '{settings.conn_id}' (or of the environment) must be"
            " http or https URLs: a triggerer can use no others. Nothing was sent."
        )
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl(), headers


def _proxy_headers(proxy: str) -> dict[str, str]:
    """Return the header with the user name and password of a proxy's URL."""
    user, password = requests.utils.get_auth_from_url(proxy)
    if not (user or password):
        return {}
    pair = f"{user}:{password}"
    try:
        encoded = pair.encode("latin-1")  # what both libraries send
    except UnicodeEncodeError:
        encoded = pair.encode()  # at which both libraries fail
    return {"Proxy-Authorization": f"Basic {base64.b64encode(encoded).decode()}"}


def _tls_context(settings: HeyGenConnection, found: dict[str, Any]) -> ssl.SSLContext:
    verify, cert = found["verify"], found["cert"]
    if verify is False:
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    else:
        bundle = certifi.where() if verify is True else str(verify)
        where = "capath" if os.path.isdir(bundle) else "cafile"
        try:
            context = ssl.create_default_context(**{where: bundle})  # type: ignore[arg-type]
        except (OSError, ValueError) as error:
            raise _unusable("verify", settings, error) from None
    if cert:
        try:
            context.load_cert_chain(*([cert] if isinstance(cert, str) else cert))
        except (OSError, ValueError) as error:
            raise _unusable("cert", settings, error) from None
    return context


def _unusable(name: str, settings: HeyGenConnection, error: Exception) -> HeyGenBadInputError:
    # OpenSSL does not say more than this about the content of a file.
    is_content = isinstance(error, (ssl.SSLError, ValueError)) or not isinstance(error, OSError)
    reason = "it is not valid PEM, or key and certificate differ" if is_content else error.strerror  # type: ignore[attr-defined]
    return HeyGenBadInputError(
        f"The '{name}' file of Airflow connection '{settings.conn_id}' (or of the environment)"
        f" cannot be used: {reason}. Nothing was sent."
    )


# --- What a fault proves --------------------------------------------------------------------------------


@dataclass
class _Attempt:
    """
    How far one request got.

    :param connected: whether there was a connection to send it over, past the proxy's CONNECT and TLS.
        Without one, nothing was sent.
    :param fault: what ended the attempt to connect, if the library tells that.
    :param proxy: the proxy that it went through, if the library tells that.
    """

    connected: bool = False
    fault: BaseException | None = None
    proxy: str | None = None


# The exceptions cannot carry it: those of an earlier attempt may be in their chain.
_attempt: ContextVar[_Attempt] = ContextVar("_attempt")


def _fault(
    error: Exception,
    attempt: _Attempt,
    call: Call[Any],
    settings: HeyGenConnection,
    proxy: str | None = None,
) -> HeyGenError:
    # A library's text may quote the proxy's password; its class is safe.
    what = f"{type(error).__name__} during {call.what} at {settings.base_url}"
    connection = f"of Airflow connection '{settings.conn_id}'"
    if attempt.connected:
        if _is_tls_alert(error):
            return HeyGenUnreachableError(
                f"{what}, nothing was sent that could be read. The port speaks TLS. Use https in the host"
                f" {connection}."
            )
        lost = "no answer arrived"
        if _is_malformed(error):
            lost += " that can be read: it is not valid HTTP, or a header has more than 64 kB"
        return HeyGenTransientError(f"{what}, {lost}.", outcome_unknown=call.method != "GET")
    if _is_wrong_setting(error, attempt):
        return HeyGenBadInputError(
            f"{what}, nothing was sent. Check the host, 'verify', 'cert' and 'proxies' {connection}."
        )
    why, setting = _why(attempt.fault or error, attempt.proxy or proxy)
    return HeyGenUnreachableError(f"{what}, nothing was sent. {why}. Check {setting} {connection}.")


def _is_wrong_setting(error: Exception, attempt: _Attempt) -> bool:
    if isinstance(error, ssl.SSLError):  # that of a bad certificate is a ValueError, too
        return False
    known = isinstance(error, (RequestException, aiohttp.ClientError, TimeoutError, HTTPError))
    return isinstance(error, ValueError) or not (known or attempt.fault)


def _why(fault: BaseException, proxy: str | None) -> tuple[str, str]:
    """Return why there is no connection, and the setting to check."""
    chain = tuple(_causes(fault))
    status = next(filter(None, map(_proxy_status, chain)), None)
    if status is not None:
        hint = ": it requires a user name and password, or others" if status == 407 else ""
        return f"The proxy answered {status} to CONNECT{hint}", "'proxies'"
    for error in chain:
        # aiohttp's own wrappers are SSLErrors, too, but do not have the reason.
        if isinstance(error, (ssl.SSLError, CertificateError)) and not isinstance(error, aiohttp.ClientError):
            return _why_tls(error, proxy)
    words, is_far = next(
        (words, is_far)
        for kinds, words, is_far in _REASONS
        if any(isinstance(error, kinds) for error in chain)
    )
    if proxy is None:
        return f"The host {words}", "the host"
    if is_far:
        return f"The proxy, or the host behind it, {words}", "'proxies' and the host"
    return f"The proxy {words}", "'proxies'"


# Classes, what they say, and whether the host behind a proxy may be the cause.
_REASONS: tuple[tuple[tuple[type[BaseException], ...], str, bool], ...] = (
    ((socket.gaierror, NameResolutionError), "was not found by its name", False),
    ((ConnectionRefusedError,), "refused the connection", False),
    ((TimeoutError, Urllib3TimeoutError), "did not answer in time", True),
    ((ConnectionError, aiohttp.ServerDisconnectedError), "closed the connection", True),
    ((BaseException,), "could not be reached", True),
)


def _why_tls(error: BaseException, proxy: str | None) -> tuple[str, str]:
    # A proxy that is spoken to by TLS may be the one whose TLS failed.
    also = "'proxies', " if proxy and urlsplit(proxy).scheme == "https" else ""
    reason = getattr(error, "reason", None) or ""
    code = getattr(error, "verify_code", None)
    if isinstance(error, CertificateError) or code in (62, 64):  # X509_V_ERR_HOSTNAME_MISMATCH, _IP_ADDRESS_
        return "The certificate is for another host", f"{also}'verify' and the host"
    if isinstance(error, ssl.SSLCertVerificationError):
        state = "has expired" if code == 10 else "is not trusted"  # X509_V_ERR_CERT_HAS_EXPIRED
        return f"The certificate {state}", f"{also}'verify'"
    if reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE", "UNKNOWN_PROTOCOL"):
        return "The port does not speak TLS", f"{also}the host and its port"
    if "ALERT" in reason:
        return "The server rejected the TLS handshake", f"{also}'cert' and the host"
    return "The TLS handshake failed", f"{also}the host, 'verify' and 'cert'"


def _proxy_status(error: BaseException) -> int | None:
    """Return the status with which a proxy refused CONNECT, if this is what the error says."""
    if isinstance(error, aiohttp.ClientHttpProxyError):
        return error.status
    # http.client has no class of its own for it.
    found = re.search(r"^Tunnel connection failed: (\d{3})\b", str(error)) if type(error) is OSError else None
    return int(found[1]) if found else None


def _is_tls_alert(error: BaseException) -> bool:
    """Return whether the response to a request in the clear is an alert of TLS, which did not read it."""
    for cause in _causes(error):
        if isinstance(cause, http.client.BadStatusLine) and str(cause).startswith("\x15\x03"):
            return True
        if isinstance(cause, aiohttp.ClientResponseError) and r"b'\x15\x03" in cause.message:
            return True
    return False


def _is_malformed(error: BaseException) -> bool:
    broken_off = (http.client.RemoteDisconnected, http.client.IncompleteRead)
    return any(
        isinstance(cause, (http.client.HTTPException, aiohttp.ClientResponseError))
        and not isinstance(cause, broken_off)
        for cause in _causes(error)
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    """
    Return an exception and those that a library wrapped in it.

    Leaves out ``__context__``, which may belong to an earlier attempt.
    """
    waiting, seen = [error], set()
    while waiting:
        cause = waiting.pop(0)
        if id(cause) in seen:
            continue
        seen.add(id(cause))
        yield cause
        inner = (cause.__cause__, getattr(cause, "reason", None), *cause.args)
        waiting += [wrapped for wrapped in inner if isinstance(wrapped, BaseException)]
