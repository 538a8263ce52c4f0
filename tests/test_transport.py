"""The two transports: what a network fault proves, where the credential goes, and what both can read."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import re
import socket
import threading
from contextlib import ExitStack, contextmanager, suppress

import pytest
import requests
from airflow.sdk import Connection
from conftest import each_value
from test_connection import Authority, unused_port

from airflow_provider_heygen import api, transport
from airflow_provider_heygen.connection import HeyGenConnection
from airflow_provider_heygen.exceptions import (
    HeyGenBadInputError,
    HeyGenGatewayError,
    HeyGenPermanentError,
    HeyGenTransientError,
    HeyGenUnreachableError,
)

POLL = api.get_overdub("od_1")
MEDIA = {"video": "https://example.com/v.mp4", "audio": "https://example.com/a.mp3"}
OVERDUB = json.dumps({"data": {"id": "od_1", "status": "running"}}).encode()
SECRET = "pw-of-the-proxy"


def create_call():
    return api.create_overdub(api.CreateOverdubRequest.of(MEDIA), "key-1")


def settings_for(url, **extra):
    return HeyGenConnection(conn_id="mine", base_url=url, credential="sk-secret", **extra)


def send(call, settings):
    with transport.new_session(settings, credential=True) as session:
        return transport.send(session, call, settings)


def asend(call, settings):
    return asyncio.run(asyncio.wait_for(transport.asend(call, settings), 60))


both_transports = pytest.mark.parametrize("send", [send, asend], ids=["sync", "async"])


@pytest.fixture(autouse=True)
def _own_network(connect):
    """No proxy of the machine."""


@pytest.fixture(scope="session")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("authority"))


@contextmanager
def peer(behave):
    """A server on loopback that does with each connection what ``behave(socket)`` does."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    behave(connection)

        threading.Thread(target=serve, daemon=True).start()
        try:
            yield server.getsockname()[1]
        finally:
            server.shutdown(socket.SHUT_RDWR)


def hang_up(connection):
    connection.recv(65536)


def reset(connection):
    connection.recv(1)  # unread bytes turn the end into a reset


def keep_silent(connection):
    connection.settimeout(2)
    try:
        while connection.recv(65536):
            pass
    except OSError:
        pass


def saying(answer):
    def behave(connection):
        connection.recv(65536)
        connection.sendall(answer)
        # Closed with bytes unread, it would be reset, and the response might be lost.
        connection.settimeout(5)
        with suppress(OSError):
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):
                pass

    return behave


@contextmanager
def full_backlog():
    """A port that does not respond to a SYN."""
    with ExitStack() as stack:
        server = stack.enter_context(socket.socket())
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        for _ in range(8):
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(server.getsockname())
        yield server.getsockname()[1]


def refusal(status):
    return lambda _: peer(saying(f"HTTP/1.1 {status} No\r\nContent-Length: 1\r\n\r\nx".encode()))


def peer_that(behave):
    return lambda _: peer(behave)


@contextmanager
def nobody(_):
    yield unused_port()


@contextmanager
def trusted(context):
    """A TLS server with a certificate of the test's authority."""
    yield context["listen"](tls=context["authority"].server()).port


HTTP, HTTPS, HEYGEN = "http://127.0.0.1:{port}", "https://127.0.0.1:{port}", "https://api.heygen.com"
PROXY = {"proxies": {"https": f"http://me:{SECRET}@127.0.0.1:{{port}}"}}
HASTY = {"connect_timeout": 0.3, "read_timeout": 0.3, "write_timeout": 0.3}
TLS = "Check 'verify' or 'cert' or the host"
BY_PROXY = "Check 'proxies' or the host"

# What there is at the port, the connection's host and extras, and what the message says.
NEVER_SENT = {
    "refused": (nobody, HTTP, {}, "nothing was sent: connection refused. Check the host"),
    "refused, https": (nobody, HTTPS, {}, "connection refused. Check the host"),
    "no such name": (
        nobody,
        "https://nowhere.invalid:{port}",
        {},
        r"name not resolved \(.*\). Check the host",
    ),
    "no answer to SYN": (
        lambda _: full_backlog(),
        HTTPS,
        {"connect_timeout": 0.3},
        "timed out after 0.3 s .a firewall.*. Check the host",
    ),
    "unknown authority": (trusted, HTTPS, {}, f"certificate verify failed.* {TLS}"),
    "certificate of another host": (
        trusted,
        "https://localhost:{port}",
        {"verify": "{ca}"},
        f"not valid for 'localhost'.* {TLS}",
    ),
    "https to an http port": (refusal("400"), HTTPS, {}, TLS),
    "handshake cut off": (peer_that(hang_up), HTTPS, {}, "or the host|Check the host"),
    "handshake reset": (peer_that(reset), HTTPS, {}, "or the host|Check the host"),
    "handshake not answered": (
        peer_that(keep_silent),
        HTTPS,
        HASTY,
        "timed out after 0.3 s .* Check the host",
    ),
    "handshake rejected": (peer_that(saying(b"\x15\x03\x03\x00\x02\x02\x28")), HTTPS, {}, TLS),
    "http to a TLS port": (
        peer_that(saying(b"\x15\x03\x03\x00\x02\x02\x46")),
        HTTP,
        {},
        "Use https in the host",
    ),
    "proxy down": (nobody, HEYGEN, PROXY, f"through the proxy http://127.0.0.1:\\d+: .* {BY_PROXY}"),
    "proxy down, http": (
        nobody,
        "http://localhost:1",
        {"proxies": {"http": f"http://me:{SECRET}@127.0.0.1:{{port}}"}},
        BY_PROXY,
    ),
    "proxy has no address": (
        nobody,
        HEYGEN,
        {"proxies": {"https": f"http://me:{SECRET}@nowhere.invalid:1"}},
        f"through the proxy http://nowhere.invalid:1: .* {BY_PROXY}",
    ),
    "proxy does not answer a SYN": (lambda _: full_backlog(), HEYGEN, PROXY | HASTY, BY_PROXY),
    **{
        f"proxy answers {status}": (
            refusal(status),
            HEYGEN,
            PROXY,
            f"returned {status} to CONNECT.* {BY_PROXY}",
        )
        for status in (407, 403, 502)
    },
    "proxy hangs up": (peer_that(hang_up), HEYGEN, PROXY, BY_PROXY),
    "proxy keeps silent": (peer_that(keep_silent), HEYGEN, PROXY | HASTY, BY_PROXY),
    "no TLS behind the proxy": (refusal("200"), HEYGEN, PROXY | HASTY, "Check 'proxies' or .*the host"),
    "https proxy without TLS": (
        refusal("400"),
        HEYGEN,
        {"proxies": {"https": f"https://me:{SECRET}@127.0.0.1:{{port}}"}},
        "Check 'proxies' or .*the host",
    ),
}


def assert_never_sent(raised, base_url, text):
    error = raised.value
    assert type(error) is HeyGenUnreachableError, error
    assert error.outcome_unknown is False
    assert re.match(rf"\w+ during the create request at {re.escape(base_url)}, nothing was sent", str(error))
    assert re.search(rf"(?:{text}) of Airflow connection 'mine'\.$", str(error))
    assert SECRET not in str(error)
    assert error.__suppress_context__ or error.__context__ is None


@both_transports
@pytest.mark.parametrize("case", NEVER_SENT.values(), ids=NEVER_SENT)
def test_never_sent(listen, authority, send, case):
    place, url, extra, text = case
    with place({"listen": listen, "authority": authority}) as port:
        extra = json.loads(json.dumps(extra).replace("{port}", str(port)).replace("{ca}", authority.file))
        settings = settings_for(url.format(port=port), **extra)
        with pytest.raises(HeyGenUnreachableError) as raised:
            send(create_call(), settings)
    assert_never_sent(raised, settings.base_url, text)


@both_transports
def test_never_sent_by_the_proxy_of_the_environment(monkeypatch, send):
    monkeypatch.setenv("https_proxy", f"http://me:{SECRET}@127.0.0.1:{unused_port()}")
    with pytest.raises(HeyGenUnreachableError) as raised:
        send(create_call(), settings_for(HEYGEN))
    assert_never_sent(raised, HEYGEN, BY_PROXY)


@both_transports
def test_certificate_behind_a_proxy(monkeypatch, listen, authority, send):
    """Nor does it help that the machine trusts it: only the connection, or requests' own list, decides."""
    monkeypatch.setenv("SSL_CERT_FILE", authority.file)
    proxy, gateway = listen(), listen(tls=authority.server())
    settings = settings_for(gateway.url, proxies={"https": proxy.url})
    with pytest.raises(HeyGenUnreachableError) as raised:
        send(create_call(), settings)
    assert_never_sent(
        raised, gateway.url, "verify failed.* Check 'proxies' or 'verify' or 'cert' or the host"
    )
    assert gateway.seen == []


HALF = b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{"


@both_transports
@pytest.mark.parametrize(
    ("call", "by_proxy", "scheme", "answer"),
    # Each two of these in all combinations.
    [
        (create_call(), False, "https", b""),
        (create_call(), True, "https", HALF),
        (create_call(), True, "http", b""),
        (POLL, False, "http", HALF),
        (POLL, True, "https", b""),
        (create_call(), False, "http", HALF),
    ],
    ids=[
        "create-https-none",
        "create-proxy-https-half",
        "create-proxy-http-none",
        "poll-http-half",
        "poll-proxy-https-none",
        "create-http-half",
    ],
)
def test_broken_after_sending(listen, authority, send, call, by_proxy, scheme, answer):
    gateway = listen(lambda _: answer, tls=authority.server() if scheme == "https" else None)
    proxy = listen() if scheme == "https" else gateway
    extra = {"proxies": {scheme: proxy.url}} if by_proxy else {}
    settings = settings_for(gateway.url, verify=authority.file, **extra)
    with pytest.raises(HeyGenTransientError, match="no readable response arrived") as raised:
        send(call, settings)
    assert not isinstance(raised.value, HeyGenUnreachableError)
    assert raised.value.outcome_unknown is (call.method == "POST")
    assert len(gateway.seen) == 1


@both_transports
def test_silence_after_sending(listen, send):
    done = threading.Event()
    gateway = listen(lambda _: done.wait(2) and b"")
    with pytest.raises(HeyGenTransientError, match="no readable response arrived") as raised:
        send(create_call(), settings_for(gateway.url, write_timeout=0.2))
    done.set()
    assert raised.value.outcome_unknown
    assert not isinstance(raised.value, HeyGenUnreachableError)


def test_a_connection_that_is_kept_alive_breaks(listen, authority):
    """No connection is opened for the second request, which does not prove whether it was sent."""
    for tls in (None, authority.server()):
        answers = [(200, {}, OVERDUB), b""] * 2
        gateway = listen(lambda _, answers=answers: answers.pop(0), tls=tls)
        settings = settings_for(gateway.url, verify=authority.file)
        with transport.new_session(settings, credential=True) as session:
            transport.send(session, POLL, settings)
            with pytest.raises(HeyGenTransientError) as raised:
                transport.send(session, create_call(), settings)
            assert raised.value.outcome_unknown

        async def twice(settings=settings):
            async with transport.shared_session(settings):
                await transport.asend(POLL, settings)
                await transport.asend(create_call(), settings)

        with pytest.raises(HeyGenTransientError) as raised:
            asyncio.run(twice())
        assert raised.value.outcome_unknown
        assert gateway.seen[0].client == gateway.seen[1].client
        assert gateway.seen[2].client == gateway.seen[3].client


@both_transports
def test_an_earlier_failure_proves_nothing(listen, send):
    """A chain of exceptions may hold that of an earlier attempt, which was never sent."""
    gateway = listen(lambda _: b"")
    try:
        send(POLL, settings_for(f"http://127.0.0.1:{unused_port()}"))
    except HeyGenUnreachableError:
        with pytest.raises(HeyGenTransientError) as raised:
            send(create_call(), settings_for(gateway.url))
    assert re.match(r"(Remote|Server)Disconnected", str(raised.value))
    assert raised.value.outcome_unknown


def test_a_file_that_cannot_be_read_is_no_fault_of_the_network(listen):
    class Form:
        len, content_type = 3, "multipart/form-data"

        def read(self, _):
            raise HeyGenBadInputError("gone")

    settings = settings_for(listen().url)
    with (
        transport.new_session(settings, credential=True) as session,
        pytest.raises(HeyGenBadInputError, match=r"^gone$"),
    ):
        transport.send(session, create_call(), settings, Form())


# --- Settings that cannot work --------------------------------------------------------------------------


@both_transports
@pytest.mark.parametrize(
    "proxy",
    [f"ftp://{SECRET}", f"http://[{SECRET}", f"http://{SECRET}@:x", "http://", f"http://me:{SECRET}@a..b:1"],
)
def test_useless_proxy(monkeypatch, send, proxy):
    monkeypatch.setenv("https_proxy", proxy)
    with pytest.raises(HeyGenBadInputError, match="'proxies' of Airflow connection 'mine'") as raised:
        send(create_call(), settings_for(HEYGEN))
    assert SECRET not in str(raised.value)
    assert raised.value.__suppress_context__ or raised.value.__context__ is None


@both_transports
@pytest.mark.parametrize(
    ("name", "content"),
    # A directory of 'verify' may hold certificates.
    [("verify", None), ("verify", "this is no certificate"), ("cert", "a directory")],
)
def test_useless_file(listen, authority, tmp_path, send, name, content):
    path = tmp_path / "file.pem"
    if content == "a directory":
        path.mkdir()
    elif content is not None:
        path.write_text(content)
    gateway = listen(tls=authority.server())
    settings = settings_for(gateway.url, **{"verify": authority.file, name: str(path)})
    with pytest.raises(HeyGenBadInputError, match=f"^The '{name}' file of Airflow connection 'mine'"):
        send(create_call(), settings)
    assert gateway.seen == []


@both_transports
@pytest.mark.parametrize(
    ("given", "sent", "scheme"),
    [
        ("p%E2%82%ACw", "p€w".encode(), "http"),
        ("p%C3%A9w", b"p\xe9w", "https"),
        ("p%3A%40%2Fw", b"p:@/w", "http"),
        ("p%3A%40%2Fw", b"p:@/w", "https"),
        ("", b"", "https"),
    ],
    ids=["euro", "latin-1", "reserved", "reserved by https", "empty"],
)
def test_password_of_the_proxy(send, scheme, given, sent):
    got = []
    behave = saying(b"HTTP/1.1 407 No\r\nContent-Length: 0\r\n\r\n")

    class Reading:
        def __init__(self, connection):
            self.connection = connection

        def __getattr__(self, name):
            return getattr(self.connection, name)

        def recv(self, size):
            got.append(self.connection.recv(size))

    with peer(lambda connection: behave(Reading(connection))) as port:
        proxy = f"http://m%C3%A9:{given}@127.0.0.1:{port}"
        with pytest.raises((HeyGenTransientError, HeyGenPermanentError)) as raised:
            send(POLL, settings_for(f"{scheme}://heygen.invalid", proxies={scheme: proxy}))
    assert "407" in str(raised.value)
    (header,) = re.findall(rb"(?im)^proxy-authorization: basic (\S+)", got[0])
    user = "mé".encode("latin-1" if given != "p%E2%82%ACw" else "utf-8")
    assert base64.b64decode(header) == user + b":" + sent
    assert (b"X-Api-Key" in got[0]) is (scheme == "http")


@both_transports
def test_the_proxys_password_stays_with_the_proxy(listen, authority, send):
    proxy, gateway = listen(), listen(lambda _: (200, {}, OVERDUB), tls=authority.server())
    url = f"http://me:{SECRET}@127.0.0.1:{proxy.port}"
    send(POLL, settings_for(gateway.url, verify=authority.file, proxies={"https": url}))
    assert proxy.tunnels
    (seen,) = gateway.seen
    assert "Proxy-Authorization" not in seen.headers


# --- Headers --------------------------------------------------------------------------------------------


@both_transports
def test_long_header(listen, send):
    gateway = listen(lambda _: (200, {"Content-Security-Policy": "a" * 65_000}, OVERDUB))
    assert send(POLL, settings_for(gateway.url)).status == "running"


LENGTH = b"Content-Length: %d\r\n" % len(OVERDUB)


@both_transports
@pytest.mark.parametrize(
    "head",
    [
        b"200 " + b"O" * 9000 + b"\r\n" + LENGTH,
        b"200 OK\r\n" + LENGTH * 2,
        b"200 OK\r\nX Y: z\r\n" + LENGTH,
        b"200 OK\r\nno header\r\n" + LENGTH,
        b"200 OK\r\nX: \0\r\n" + LENGTH,
    ],
    ids=["long reason", "two lengths", "space in a name", "no colon", "NUL"],
)
def test_response_that_aiohttp_rejects(listen, send, head):
    """A worker can read it, so a wait in the triggerer must not last until its deadline."""
    gateway = listen(lambda _: b"HTTP/1.1 " + head + b"\r\n" + OVERDUB)
    assert send(POLL, settings_for(gateway.url)).status == "running"
    assert all(seen.headers["X-Api-Key"] == "sk-secret" for seen in gateway.seen)


def test_a_request_that_changes_something_is_not_repeated_for_aiohttp(listen):
    gateway = listen(lambda _: b"HTTP/1.1 200 OK\r\n" + LENGTH * 2 + b"\r\n" + OVERDUB)
    with pytest.raises(HeyGenTransientError, match="no readable response arrived") as raised:
        asend(create_call(), settings_for(gateway.url))
    assert raised.value.outcome_unknown
    assert len(gateway.seen) == 1


@both_transports
@pytest.mark.parametrize(
    "answer",
    [
        (200, {"X-Long": "a" * 70_000}, OVERDUB),
        b"HTTP/1.1 200 OK " + b"a" * 70_000,
        b"SSH-2.0-OpenSSH\r\n\r\n",
    ],
    ids=["header", "status line", "no HTTP"],
)
def test_unreadable_response(listen, send, answer):
    gateway = listen(lambda _: answer)
    with pytest.raises(HeyGenTransientError, match=r"no readable response arrived") as raised:
        send(create_call(), settings_for(gateway.url))
    assert raised.value.outcome_unknown


# --- The credential -------------------------------------------------------------------------------------

SAME = [
    ("https://api.heygen.com", "https://api.heygen.com:443/v3/x"),
    ("https://api.heygen.com:443", "https://api.heygen.com/v3/x"),
    ("HTTPS://Api.HeyGen.com", "https://api.heygen.com/v3/x"),
    ("https://api.heygen.com", "HTTPS://API.heygen.com/v3/x"),
    ("https://gateway.example/heygen", "https://gateway.example/v3/x"),
    ("https://b\u00fccher.example", "https://xn--bcher-kva.example/"),
    ("http://127.0.0.1:80", "http://127.0.0.1/"),
    ("https://[2001:db8::1]", "https://[2001:DB8::1]:443/"),
]
OTHER = [
    ("https://api.heygen.com", "http://api.heygen.com/v3/x"),
    ("https://api.heygen.com", "http://api.heygen.com:443/v3/x"),
    ("https://api.heygen.com", "https://api.heygen.com:8443/v3/x"),
    ("https://api.heygen.com", "https://heygen.com/v3/x"),
    ("https://api.heygen.com", "https://files.api.heygen.com/v3/x"),
    ("https://api.heygen.com", "https://api.heygen.com.evil.example/"),
    ("https://api.heygen.com", "https://api.heygen.com@evil.example/"),
    ("https://api.heygen.com", "https://evil.example/?https://api.heygen.com"),
    ("https://api.heygen.com", "https://evil.example\\@api.heygen.com/"),
    ("https://api.heygen.com", "https://me:pw@evil.example/"),
]


@pytest.fixture
def netrc(monkeypatch, tmp_path):
    """A password for every host, which is for other programs."""
    path = tmp_path / "netrc"
    path.write_text("default login me password pw\n")
    path.chmod(0o600)
    monkeypatch.setenv("NETRC", str(path))


@pytest.mark.parametrize(
    ("base_url", "url", "same"), [(*pair, True) for pair in SAME] + [(*pair, False) for pair in OTHER]
)
def test_credential_of_its_own_origin(netrc, base_url, url, same):
    for auth_type in ("api_key", "oauth"):
        settings = settings_for(base_url, auth_type=auth_type)
        with transport.new_session(settings, credential=True) as session:
            headers = session.prepare_request(requests.Request("GET", url)).headers
        assert headers["User-Agent"] == transport.USER_AGENT
        name, value = settings.auth_header
        assert headers.get(name) == (value if same else None)
        assert {"Authorization", "X-Api-Key"} & set(headers) == ({name} if same else set())


def test_no_redirect_receives_the_credential(listen):
    other = listen()
    gateway = listen(lambda _: (307, {"Location": f"{other.url}/v3/x"}, b""))
    with transport.new_session(settings_for(gateway.url), credential=True) as session:
        response = session.get(f"{gateway.url}/v3/x", allow_redirects=True)
        assert (response.status_code, response.next) == (307, None)
        session.get(other.url)
    (seen,) = other.seen
    assert seen.path == "/"
    assert "X-Api-Key" not in seen.headers
    assert gateway.seen[0].headers["X-Api-Key"] == "sk-secret"


@both_transports
def test_no_redirect_is_followed(listen, send):
    other = listen()
    gateway = listen(lambda _: (307, {"Location": f"{other.url}/v3/x"}, b""))
    with pytest.raises(HeyGenGatewayError, match="307"):
        send(POLL, settings_for(gateway.url))
    assert other.seen == []


@pytest.mark.parametrize("proxies", [{}, {"https": "http://proxy.example:3128"}], ids=["direct", "proxy"])
def test_a_quiet_connection_is_kept_alive(proxies):
    """A firewall must not drop a connection on which HeyGen is still working."""
    with transport.new_session(settings_for(HEYGEN), credential=True) as session:
        request = session.prepare_request(requests.Request("GET", HEYGEN))
        pool = session.get_adapter(HEYGEN).get_connection_with_tls_context(request, True, proxies)
    assert (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1) in pool.conn_kw["socket_options"]


def test_a_session_without_credential(listen, netrc):
    server = listen()
    with transport.new_session(settings_for(server.url), credential=False) as session:
        session.get(server.url)
    assert not {"Authorization", "X-Api-Key"} & set(server.seen[0].headers)


# --- The extra of the connection ------------------------------------------------------------------------


def read(connection):
    return HeyGenConnection.from_airflow(connection)


def aread(connection):
    return asyncio.run(HeyGenConnection.afrom_airflow(connection))


both_extras = pytest.mark.parametrize("read", [read, aread], ids=["sync", "async"])


@pytest.mark.parametrize(
    ("extra", "read"),
    each_value([None, "", '{"read_timeout": 5}', '{"read_timeout": 5}'], [read, aread]),
)
def test_extra(read, extra):
    connection = Connection(conn_id="mine", conn_type="heygen", password="key", extra=extra)
    assert read(connection).read_timeout == json.loads(extra or "{}").get("read_timeout", 30)


@pytest.mark.parametrize(
    ("extra", "read"),
    [
        *each_value(['["pw-a"]', "5", "null", "{'resource': 'pw-a'}"], [read, aread]),
        *itertools.product([json.dumps('{"resource": "pw-a"}'), "pw-a"], [read, aread]),
    ],
)
def test_extra_that_is_no_object(caplog, capsys, read, extra):
    connection = Connection(conn_id="mine", conn_type="heygen", password="key", extra=extra)
    with pytest.raises(HeyGenBadInputError) as raised:
        read(connection)
    assert str(raised.value).startswith("Airflow connection 'mine' is wrong: 'extra' must be a JSON object")
    assert ("encoded twice" in str(raised.value)) is extra.startswith('"')
    assert raised.value.__suppress_context__ or raised.value.__context__ is None
    assert "pw-a" not in f"{raised.value}{caplog.text}{capsys.readouterr()}"


@both_extras
def test_secrets_of_the_extra_are_masked(read):
    from airflow.sdk.log import redact

    secret = f"a-very-long-secret-{read.__name__}"
    extra = json.dumps({"unknown": {"api_key": secret}})
    read(Connection(conn_id="mine", conn_type="heygen", password="key", extra=extra))
    assert secret not in str(redact(f"it is {secret}."))


@pytest.mark.parametrize(
    "proxies",
    [
        "http://pw@proxy:3128",
        ["http://pw@proxy:3128"],
        {"https": ["pw"]},
        {"https": {"a": "pw"}},
        {"https": 5},
        5,
    ],
)
def test_proxies_of_another_form(proxies):
    connection = Connection(conn_id="mine", conn_type="heygen", password="key")
    with pytest.raises(HeyGenBadInputError) as raised:
        HeyGenConnection.from_airflow(connection, {"proxies": proxies})
    assert str(raised.value) == (
        "Airflow connection 'mine' is wrong: extra 'proxies': must be a JSON object of texts, such as"
        ' {"https": "http://proxy.example:3128"}.'
    )


EARLY_HINTS = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"


@both_transports
@pytest.mark.parametrize("interim", [b"HTTP/1.1 100 Continue\r\n\r\n", EARLY_HINTS, EARLY_HINTS * 3])
def test_interim_responses_are_no_answer(listen, send, interim):
    gateway = listen(lambda _: interim + b"HTTP/1.1 200 OK\r\n" + LENGTH + b"\r\n" + OVERDUB)
    assert send(POLL, settings_for(gateway.url)).status == "running"
    assert len(gateway.seen) == 1


def test_interim_responses_without_end_hold_no_worker(listen):
    endless = EARLY_HINTS * (transport.MAX_INTERIM_RESPONSES + 1)
    gateway = listen(lambda _: endless + b"HTTP/1.1 200 OK\r\n" + LENGTH + b"\r\n" + OVERDUB)
    with pytest.raises(HeyGenTransientError, match="no readable response arrived") as raised:
        send(create_call(), settings_for(gateway.url))
    assert raised.value.outcome_unknown


def test_a_101_leaves_nothing_behind_for_the_next_request():
    """The response of an earlier request must not pass for that of the next one on the same connection."""

    def ok(status):
        body = json.dumps({"data": {"id": "od_1", "status": status}}).encode()
        return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)

    def serve(connection, begin):
        with connection:
            if begin:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 101 Switching Protocols\r\n\r\n")
            if connection.recv(65536):  # the next request; in a connection of its own, if all is well
                connection.sendall(ok("late" if begin else "running"))

    def accept(server):
        for begin in (True, False):
            connection, _ = server.accept()
            threading.Thread(target=serve, args=[connection, begin], daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=accept, args=[server], daemon=True).start()
        settings = settings_for(f"http://127.0.0.1:{server.getsockname()[1]}")
        call = api.get_overdub("od_1")
        with transport.new_session(settings, credential=True) as session:
            with pytest.raises(HeyGenGatewayError):
                transport.send(session, call, settings)
            assert transport.send(session, call, settings).status == "running"
