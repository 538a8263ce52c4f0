"""The Airflow connection: each setting, each rejection, and the network settings in both transports."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import socket
import ssl
import time
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address

import pytest
from airflow.sdk import Connection
from conftest import forward
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from airflow_provider_heygen import transport
from airflow_provider_heygen.connection import HeyGenConnection, is_loopback
from airflow_provider_heygen.exceptions import (
    HeyGenBadInputError,
    HeyGenPermanentError,
    HeyGenTransientError,
    HeyGenUnreachableError,
)
from airflow_provider_heygen.hooks.heygen import HeyGenHook

HEYGEN = "https://api.heygen.com"
PAGE = json.dumps({"data": [], "has_more": False, "next_token": None}).encode()


def list_(max_attempts=1):
    return HeyGenHook(max_attempts=max_attempts).list_overdubs()


def alist(max_attempts=1):
    return asyncio.run(HeyGenHook(max_attempts=max_attempts).alist_overdubs())


both_transports = pytest.mark.parametrize("call", [list_, alist], ids=["sync", "async"])


def both_settings():
    """What each transport reads; it must be the same."""
    settings = HeyGenHook().settings
    assert asyncio.run(HeyGenHook().asettings()) == settings
    return settings


# --- Settings -----------------------------------------------------------------------------------------


def test_defaults(connect):
    connect(None, "key")
    settings = both_settings()
    assert settings.model_dump(exclude={"credential"}) == {
        "conn_id": "heygen_default",
        "base_url": HEYGEN,
        "auth_type": "api_key",
        "resource": None,
        "allow_http": False,
        "allow_private_hosts": False,
        "connect_timeout": 10,
        "read_timeout": 30,
        "write_timeout": 120,
        "upload_timeout": 600,
        "max_requests_per_second": 5,
        "max_concurrent_jobs": None,
        "proxies": {},
        "verify": True,
        "cert": None,
        "trust_env": True,
        "price_per_second": {},
    }
    assert settings.auth_header == ("X-Api-Key", "key")


def test_the_key_is_not_shown(connect):
    connect(None, "sk-very-secret")
    settings = both_settings()
    assert "sk-very-secret" not in f"{settings!r} {settings} {settings.model_dump_json()}"
    assert settings.redact("key sk-very-secret, again sk-very-secret") == "key ***, again ***"


@pytest.mark.parametrize(
    ("extra", "name", "value"),
    [
        ({"auth_type": "oauth"}, "auth_header", ("Authorization", "Bearer key")),
        ({"resource": "lipsyncs"}, "resource", "lipsyncs"),
        ({"read_timeout": "2.5"}, "read_timeout", 2.5),
        ({"upload_timeout": 1e4}, "upload_timeout", 10_000),
        ({"allow_http": True}, "allow_http", True),
        ({"allow_http": "true"}, "allow_http", True),
        ({"allow_http": "False"}, "allow_http", False),
        ({"allow_private_hosts": "0"}, "allow_private_hosts", False),
        ({"trust_env": False}, "trust_env", False),
        ({"trust_env": "false"}, "trust_env", False),
        ({"verify": False}, "verify", False),
        ({"verify": "False"}, "verify", False),
        ({"verify": " true "}, "verify", True),
        ({"verify": "/etc/ca.pem"}, "verify", "/etc/ca.pem"),
        ({"verify_ssl": False}, "verify", False),
        ({"verify_ssl": False, "verify": "/etc/ca.pem"}, "verify", "/etc/ca.pem"),
        ({"cert": "/etc/client.pem"}, "cert", "/etc/client.pem"),
        ({"cert": ["/etc/client.crt", "/etc/client.key"]}, "cert", ("/etc/client.crt", "/etc/client.key")),
        ({"proxies": {"https": "http://proxy:3128"}}, "proxies", {"https": "http://proxy:3128"}),
        ({"proxy": {"https": "http://proxy:3128"}}, "proxies", {"https": "http://proxy:3128"}),
        # Not settings: what is given by its own field cannot be given here.
        ({"base_url": "https://example.com"}, "base_url", HEYGEN),
        ({"conn_id": "x"}, "conn_id", "heygen_default"),
        ({"credential": "other"}, "auth_header", ("X-Api-Key", "key")),
        ({"unheard_of": {"x": 1}}, "base_url", HEYGEN),
    ],
    ids=str,
)
def test_extra(connect, extra, name, value):
    connect(None, "key", **extra)
    assert getattr(both_settings(), name) == value


@pytest.mark.parametrize("nothing", [None, ""])
def test_a_form_leaves_nulls_and_empty_texts(connect, nothing):
    connect(None, "key")
    defaults = both_settings()
    names = set(HeyGenConnection.model_fields) - {"conn_id", "base_url", "credential"}
    connect(nothing, "key", **dict.fromkeys([*names, "proxy", "verify_ssl"], nothing))
    assert both_settings() == defaults


@pytest.mark.parametrize(
    ("fields", "base_url"),
    [
        ({}, HEYGEN),
        ({"host": "  "}, HEYGEN),
        ({"host": "https://api.heygen.com/"}, HEYGEN),
        ({"host": "api.heygen.com", "schema": "https"}, HEYGEN),
        ({"host": "gateway.example", "port": 8443}, "https://gateway.example:8443"),
        ({"host": "gateway.example:8443"}, "https://gateway.example:8443"),
        ({"host": "https://gateway.example/heygen/"}, "https://gateway.example/heygen"),
        ({"host": "gateway.example/heygen", "port": 8443}, "https://gateway.example:8443/heygen"),
        ({"host": "https://[2001:db8::1]", "port": 8443}, "https://[2001:db8::1]:8443"),
        ({"host": "2001:db8::1"}, "https://[2001:db8::1]"),
        ({"host": "2001:db8::1", "port": 8443}, "https://[2001:db8::1]:8443"),
        ({"host": "https://2001:db8::1/heygen", "port": 8443}, "https://[2001:db8::1]:8443/heygen"),
        ({"host": "[2001:db8::1]:8443", "port": 8443}, "https://[2001:db8::1]:8443"),
        ({"host": "https://gateway.example:8443", "port": 8443}, "https://gateway.example:8443"),
        ({"host": "gateway.example", "schema": "HTTPS"}, "https://gateway.example"),
        ({"host": "gateway.example", "schema": "/heygen/"}, "https://gateway.example/heygen"),
        ({"host": "HTTPS://Gateway.Example"}, "HTTPS://Gateway.Example"),
        ({"host": "http://localhost:8080"}, "http://localhost:8080"),
        ({"host": "localhost", "schema": "http", "port": 80}, "http://localhost:80"),
        ({"host": "http://[::1]:8080"}, "http://[::1]:8080"),
        ({"host": "http://emulator:8080", "extra": {"allow_http": "true"}}, "http://emulator:8080"),
    ],
    ids=str,
)
def test_base_url(monkeypatch, fields, base_url):
    connection = {"conn_type": "heygen", "password": "key", **fields}
    monkeypatch.setenv("AIRFLOW_CONN_HEYGEN_DEFAULT", json.dumps(connection))
    assert both_settings().base_url == base_url


HOSTS = [
    ("https://gateway.example", None, None, "https://gateway.example"),
    ("https://gateway.example", 8443, None, "https://gateway.example:8443"),
    ("https://gateway.example/heygen", None, None, "https://gateway.example/heygen"),
    ("https://gateway.example/heygen", 8443, None, "https://gateway.example:8443/heygen"),
    ("https://gateway.example:8443/heygen/", None, None, "https://gateway.example:8443/heygen"),
    ("gateway.example", None, None, "https://gateway.example"),
    ("gateway.example", 8443, "https", "https://gateway.example:8443"),
    ("gateway.example:8443", None, None, "https://gateway.example:8443"),
    ("gateway.example/heygen", None, None, "https://gateway.example/heygen"),
    ("::1", 8080, "http", "http://[::1]:8080"),
    ("[::1]", 8080, "http", "http://[::1]:8080"),
    ("http://[::1]:8080", None, None, "http://[::1]:8080"),
]


@pytest.mark.parametrize(("host", "port", "schema", "base_url"), HOSTS)
def test_a_host_in_each_form_in_which_airflow_stores_it(monkeypatch, host, port, schema, base_url):
    fields = {"conn_type": "heygen", "password": "a-key", "host": host, "port": port, "schema": schema}
    connection = Connection(conn_id="heygen_default", **fields)
    for form in (json.dumps(fields), connection.get_uri()):
        monkeypatch.setenv("AIRFLOW_CONN_HEYGEN_DEFAULT", form)
        assert both_settings().base_url == base_url


@pytest.mark.parametrize(
    ("rest", "base_url"),
    [
        ("gateway.example", "https://gateway.example"),
        ("gateway.example:8443", "https://gateway.example:8443"),
        ("gateway.example/https", "https://gateway.example"),
        ("gateway.example/heygen", "https://gateway.example/heygen"),
        ("gateway.example:8443/a/b", "https://gateway.example:8443/a/b"),
        ("https%3A%2F%2Fgateway.example%3A8443%2Fheygen/", "https://gateway.example:8443/heygen"),
        ("[::1]:8080/http", "http://[::1]:8080"),
        ("[2001:db8::1]", "https://[2001:db8::1]"),
    ],
)
def test_a_host_in_a_uri(monkeypatch, rest, base_url):
    monkeypatch.setenv("AIRFLOW_CONN_HEYGEN_DEFAULT", f"heygen://:a-key@{rest}")
    assert both_settings().base_url == base_url


def test_a_host_in_a_uri_with_its_scheme(monkeypatch):
    monkeypatch.setenv("AIRFLOW_CONN_HEYGEN_DEFAULT", "heygen://https://:a-key@gateway.example:8443/heygen")
    assert both_settings().base_url == "https://gateway.example:8443/heygen"


@pytest.mark.parametrize(
    ("name", "hint"),
    [("resorce", "resource"), ("max_request_per_second", "max_requests_per_second"), ("conn_id", None)],
)
def test_an_unknown_extra_is_named_once(connect, caplog, name, hint):
    connect(None, f"key-of-{name}", **{name: "lipsyncs", "verify_ssl": True, "resource": ""})
    connection_id = f"for_{name}"
    os.environ[f"AIRFLOW_CONN_{connection_id.upper()}"] = os.environ["AIRFLOW_CONN_HEYGEN_DEFAULT"]
    for _ in range(2):
        assert HeyGenHook(connection_id).settings.resource is None
    (line,) = [record.getMessage() for record in caplog.records if "unknown extra" in record.getMessage()]
    wanted = f"Airflow connection '{connection_id}' has an unknown extra '{name}', which is ignored."
    assert line == (f"{wanted} Did you mean '{hint}'?" if hint else wanted)


def test_a_path_in_the_host_is_kept(heygen, listen, connect):
    gateway = listen(lambda _: (200, {}, PAGE))
    connect(f"{gateway.url}/heygen/")
    list_()
    alist()
    assert [seen.path for seen in gateway.seen] == ["/heygen/v3/overdubs?limit=10"] * 2


def test_another_connection_id(heygen, monkeypatch):
    monkeypatch.setenv("AIRFLOW_CONN_STAGING", json.dumps(heygen.connection("lipsyncs")))
    monkeypatch.setenv("AIRFLOW_CONN_HEYGEN_DEFAULT", json.dumps({"conn_type": "heygen"}))
    HeyGenHook("staging").list_overdubs()
    assert heygen.requests[-1].path == "/v3/lipsyncs"
    asyncio.run(HeyGenHook("staging").alist_overdubs())
    with pytest.raises(HeyGenBadInputError, match="'heygen_default'"):
        list_()


def test_connection_as_uri(heygen, monkeypatch):
    host = heygen.url.removeprefix("http://")
    uri = f"heygen://:{heygen.oauth_token}@{host}/http?auth_type=oauth&read_timeout=5&verify=false&proxies="
    monkeypatch.setenv("AIRFLOW_CONN_HEYGEN_DEFAULT", uri)
    settings = both_settings()
    assert (settings.base_url, settings.read_timeout, settings.verify) == (heygen.url, 5, False)
    assert HeyGenHook().test_connection()[0]


# --- Refusals -----------------------------------------------------------------------------------------

REFUSALS = [
    ({"password": None}, "password is empty"),
    ({"password": ""}, "password is empty"),
    ({"password": " \n"}, "password is empty"),
    ({"password": "two words"}, "password has characters"),
    ({"password": "k\u00e9y"}, "password has characters"),
    ({"password": "a\x00b"}, "password has characters"),
    ({"host": "http://api.heygen.com"}, "'allow_http'"),
    ({"host": "http://127.0.0.1.example.com"}, "'allow_http'"),
    ({"host": "http://localhost.example.com"}, "'allow_http'"),
    ({"host": "api.heygen.com", "schema": "http"}, "'allow_http'"),
    ({"host": "http://api.heygen.com", "extra": {"allow_http": "false"}}, "'allow_http'"),
    ({"host": "ftp://api.heygen.com"}, "host must be an https URL"),
    ({"host": "https://"}, "host must be an https URL"),
    ({"host": "https://me:pw@api.heygen.com"}, "credential belongs in the password"),
    ({"host": "https://api.heygen.com?key=pw"}, "plain base URL"),
    ({"host": "https://api.heygen.com#pw"}, "plain base URL"),
    ({"host": "https://api.heygen.com:pw"}, "host and port"),
    ({"host": "https://api.heygen.com:18443", "port": 8443}, "host and port"),
    ({"host": "https://[api.heygen.com"}, "host and port"),
    ({"host": "https://api..heygen.com"}, "host and port"),
    ({"host": "https://api.heygen.com%0d"}, "host must be an https URL"),  # requests rejects it
    ({"host": f"https://{'a' * 64}.com"}, "host and port"),
    ({"host": "api.heygen.com", "port": 99999}, "host and port"),
    ({"host": "https://api.heygen .com"}, "host"),
    ({"host": "https://api.\nheygen.com"}, "host"),
    ({"extra": {"auth_type": "basic"}}, "extra 'auth_type'"),
    ({"extra": {"auth_type": 5}}, "extra 'auth_type'"),
    ({"extra": {"resource": "videos"}}, "extra 'resource'"),
    ({"extra": {"resource": "overdubs/x"}}, "extra 'resource'"),
    ({"extra": {"connect_timeout": 0}}, "extra 'connect_timeout'"),
    ({"extra": {"read_timeout": -1}}, "extra 'read_timeout'"),
    ({"extra": {"write_timeout": "soon"}}, "extra 'write_timeout'"),
    ({"extra": {"upload_timeout": "inf"}}, "extra 'upload_timeout'"),
    ({"extra": {"read_timeout": "nan"}}, "extra 'read_timeout'"),
    ({"extra": {"price_per_second": {"speed": "nan"}}}, "extra 'price_per_second'"),
    ({"extra": {"allow_http": "perhaps"}}, "extra 'allow_http'"),
    ({"extra": {"allow_private_hosts": 2}}, "extra 'allow_private_hosts'"),
    ({"extra": {"trust_env": []}}, "extra 'trust_env'"),
    ({"extra": {"verify": {"ca": "pw"}}}, "extra 'verify'"),
    ({"extra": {"cert": ["pw"]}}, "extra 'cert'"),
    ({"extra": {"proxies": "http://me:pw@proxy:3128"}}, "extra 'proxies'"),
    ({"extra": {"proxies": {"https": ["pw"]}}}, "extra 'proxies'"),
]


@pytest.mark.parametrize(("fields", "text"), REFUSALS, ids=lambda value: ascii(value)[:50])
def test_rejections(monkeypatch, fields, text):
    connection = {"conn_type": "heygen", "password": "key", **fields}
    monkeypatch.setenv("AIRFLOW_CONN_HEYGEN_DEFAULT", json.dumps(connection))
    for call in (list_, alist):
        with pytest.raises(HeyGenBadInputError) as raised:
            call()
        assert str(raised.value).startswith("Airflow connection 'heygen_default' is wrong: ")
        assert text in str(raised.value)
        assert "pw" not in str(raised.value)
        shown = str(connection["password"])
        assert not shown.strip() or shown == "key" or shown not in str(raised.value)
    ok, message = HeyGenHook().test_connection()
    assert not ok
    assert text in message


def test_all_problems_are_named(connect):
    connect(None, "key", auth_type="x", resource="y")
    with pytest.raises(HeyGenBadInputError, match=r"extra 'auth_type'.*extra 'resource'"):
        list_()


def test_loopback():
    loopback = ["localhost", "a.localhost", "127.0.0.1", "127.9.9.9", "::1"]
    others = ["0.0.0.0", "10.0.0.1", "heygen.com", "localhost.com", "127.0.0.1.nip.io"]
    assert [host for host in loopback + others if is_loopback(host)] == loopback


# --- Proxies ------------------------------------------------------------------------------------------


@both_transports
def test_proxy_of_the_connection(heygen, listen, connect, call):
    proxy = listen(forward(heygen.url))
    connect(heygen.url, proxies={"http": f"http://me:pw@127.0.0.1:{proxy.port}"})
    call()
    (seen,) = proxy.seen
    assert seen.path == f"{heygen.url}/v3/overdubs?limit=10"
    assert seen.headers["Proxy-Authorization"] == "Basic bWU6cHc="
    assert len(heygen.requests) == 1


@both_transports
def test_proxy_of_the_environment(heygen, listen, connect, monkeypatch, call):
    proxy = listen(forward(heygen.url))
    monkeypatch.setenv("HTTP_PROXY", proxy.url)
    call()
    assert len(proxy.seen) == 1
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    call()
    assert len(proxy.seen) == 1
    monkeypatch.delenv("NO_PROXY")
    connect(heygen.url, trust_env=False)
    call()
    assert len(proxy.seen) == 1
    assert len(heygen.requests) == 3


@both_transports
def test_the_connection_wins_over_the_environment(heygen, listen, connect, monkeypatch, call):
    ours, theirs = listen(forward(heygen.url)), listen(forward(heygen.url))
    monkeypatch.setenv("HTTP_PROXY", theirs.url)
    connect(heygen.url, proxies={"http": ours.url})
    call()
    assert (len(ours.seen), len(theirs.seen)) == (1, 0)


@both_transports
def test_proxy_without_a_scheme(heygen, listen, connect, call):
    proxy = listen(forward(heygen.url))
    connect(heygen.url, proxies={"http": f"127.0.0.1:{proxy.port}"})
    call()
    assert len(proxy.seen) == 1


@both_transports
@pytest.mark.parametrize(
    "proxy",
    ["socks5://127.0.0.1:1080", "http://me:pw#x@h:1", "http://", "http://pw@:x", "http://[pw", "ftp://pw"],
)
def test_useless_proxy(heygen, connect, pauses, call, proxy):
    connect(heygen.url, proxies={"http": proxy})
    with pytest.raises(
        HeyGenBadInputError, match=r"'proxies' of Airflow connection 'heygen_default'.*percent-encoded"
    ) as raised:
        call(max_attempts=3)
    assert "pw" not in str(raised.value)
    assert pauses == []


@both_transports
def test_proxy_that_is_down(heygen, connect, pauses, call):
    connect(heygen.url, proxies={"http": f"http://me:pw@127.0.0.1:{unused_port()}"})
    with pytest.raises(HeyGenUnreachableError, match="'proxies'") as raised:
        call(max_attempts=3)
    assert len(pauses) == 2
    assert "pw" not in str(raised.value)
    assert heygen.requests == []


@both_transports
def test_proxy_for_https(heygen, listen, connect, authority, call):
    proxy, gateway = listen(), listen(forward(heygen.url), tls=authority.server())
    connect(gateway.url, proxies={"https": f"http://127.0.0.1:{proxy.port}"}, verify=authority.file)
    call()
    assert proxy.tunnels == [f"127.0.0.1:{gateway.port}"]
    assert proxy.seen == []
    assert len(gateway.seen) == 1


# --- TLS ----------------------------------------------------------------------------------------------


class Authority:
    """A certificate authority of the tests, and its certificate for 127.0.0.1."""

    def __init__(self, directory):
        self.directory = directory
        self.key, self.certificate = self._issue("Test CA", None)
        self.file = self._write("ca.pem", self.certificate)
        self.chain = self.pair("server")

    def pair(self, name):
        key, certificate = self._issue("127.0.0.1", self)
        return self._write(f"{name}.pem", certificate), self._write(f"{name}.key", key)

    def server(self, ask_for_certificate=False):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*self.chain)
        if ask_for_certificate:
            # With TLS 1.3 a client learns only after its request that its certificate is missed.
            context.maximum_version = ssl.TLSVersion.TLSv1_2
            context.load_verify_locations(self.file)
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def _issue(self, name, issuer):
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        now = datetime.now(UTC)
        public = key.public_key()
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer.certificate.subject if issuer else subject)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
            # Python 3.13 and newer insist on what RFC 5280 does.
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        )
        if issuer:
            known_by = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.key.public_key())
            builder = builder.add_extension(known_by, critical=False)
            address = x509.SubjectAlternativeName([x509.IPAddress(ip_address(name))])
            builder = builder.add_extension(address, critical=False)
        else:
            signs = dict.fromkeys(inspect.signature(x509.KeyUsage).parameters, False)
            usage = x509.KeyUsage(**signs | {"key_cert_sign": True, "crl_sign": True})
            builder = builder.add_extension(usage, critical=True)
        return key, builder.sign(issuer.key if issuer else key, hashes.SHA256())

    def _write(self, name, content):
        path = self.directory / name
        pem = serialization.Encoding.PEM
        if isinstance(content, x509.Certificate):
            path.write_bytes(content.public_bytes(pem))
        else:
            form = serialization.PrivateFormat.PKCS8
            path.write_bytes(content.private_bytes(pem, form, serialization.NoEncryption()))
        return str(path)


@pytest.fixture(scope="session")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("authority"))


@both_transports
@pytest.mark.filterwarnings("ignore::urllib3.exceptions.InsecureRequestWarning")
def test_own_authority(heygen, listen, connect, authority, call):
    gateway = listen(forward(heygen.url), tls=authority.server())
    for verify in (authority.file, False):
        connect(gateway.url, verify=verify)
        call()
    assert len(gateway.seen) == 2


@both_transports
@pytest.mark.parametrize("name", ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"])
def test_authority_of_the_environment(heygen, listen, connect, authority, monkeypatch, call, name):
    gateway = listen(forward(heygen.url), tls=authority.server())
    monkeypatch.setenv(name, authority.file)
    connect(gateway.url)
    call()
    assert len(gateway.seen) == 1
    connect(gateway.url, trust_env=False)
    with pytest.raises(HeyGenUnreachableError, match="'verify'"):
        call()


@both_transports
@pytest.mark.filterwarnings("ignore::urllib3.exceptions.InsecureRequestWarning")
def test_own_authority_wins_over_the_environment(
    heygen, listen, connect, authority, monkeypatch, tmp_path, call
):
    gateway = listen(forward(heygen.url), tls=authority.server())
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", Authority(tmp_path).file)
    for verify in (authority.file, False):
        connect(gateway.url, verify=verify)
        call()
    assert len(gateway.seen) == 2


@both_transports
def test_unknown_authority(heygen, listen, connect, authority, pauses, call):
    gateway = listen(forward(heygen.url), tls=authority.server())
    connect(gateway.url)
    with pytest.raises(HeyGenUnreachableError, match=r"'verify'.*Airflow connection 'heygen_default'"):
        call(max_attempts=3)
    # It may be one that is being renewed, or that of a portal in between.
    assert len(pauses) == 2
    assert gateway.seen == []


@both_transports
def test_certificate_of_another_host(heygen, listen, connect, authority, pauses, call):
    gateway = listen(forward(heygen.url), tls=authority.server())
    connect(gateway.url.replace("127.0.0.1", "localhost"), verify=authority.file)
    with pytest.raises(HeyGenUnreachableError, match="'verify'"):
        call(max_attempts=3)
    assert (len(pauses), gateway.seen) == (2, [])


@pytest.mark.parametrize(
    ("name", "content", "call"),
    [
        ("verify", None, list_),
        ("verify", "this is no certificate", alist),
        ("cert", None, alist),
        ("cert", "this is no certificate", list_),
    ],
)
def test_useless_certificate_file(heygen, listen, connect, authority, pauses, tmp_path, call, name, content):
    gateway = listen(forward(heygen.url), tls=authority.server())
    path = tmp_path / "file.pem"
    if content is not None:
        path.write_text(content)
    connect(gateway.url, **{"verify": authority.file, name: str(path)})
    with pytest.raises(HeyGenBadInputError, match=f"'{name}'.*Airflow connection 'heygen_default'"):
        call(max_attempts=3)
    assert (pauses, gateway.seen) == ([], [])


@both_transports
def test_client_certificate(heygen, listen, connect, authority, call):
    gateway = listen(forward(heygen.url), tls=authority.server(ask_for_certificate=True))
    connect(gateway.url, verify=authority.file)
    with pytest.raises(HeyGenTransientError):
        call()
    connect(gateway.url, verify=authority.file, cert=authority.pair("client"))
    call()
    assert len(gateway.seen) == 1


# --- Timeouts -----------------------------------------------------------------------------------------


@both_transports
def test_read_timeout(heygen, connect, call):
    connect(heygen.url, read_timeout=0.05)
    heygen.fail_next(latency=0.5)
    with pytest.raises(HeyGenTransientError, match="no readable response arrived"):
        call()


def test_each_call_has_its_timeout(heygen, connect, tmp_path):
    times = {"connect_timeout": 5, "read_timeout": 0.05, "write_timeout": 0.05, "upload_timeout": 0.05}
    path = tmp_path / "a.wav"
    path.write_bytes(b"RIFF\x00\x00\x00\x00WAVE")
    calls = {
        "read_timeout": lambda hook: hook.get_overdub("od_1"),
        "write_timeout": lambda hook: hook.update_overdub("od_1", "x"),
        "upload_timeout": lambda hook: hook.upload_asset(path),
    }
    for name, call in calls.items():
        for patient in (False, True):
            connect(heygen.url, **times | ({name: 5} if patient else {}))
            heygen.fail_next(latency=0.3, status=400)
            wanted = HeyGenPermanentError if patient else HeyGenTransientError
            with pytest.raises(wanted):
                call(HeyGenHook(max_attempts=1))


# --- Airflow's "Test" button --------------------------------------------------------------------------


def unused_port():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


@pytest.mark.parametrize("resource", ["overdubs", "lipsyncs"])
def test_good_connection(heygen, resource):
    accepted = "HeyGen accepts the API key."
    assert HeyGenHook().test_connection() == (True, f"{accepted} There are no {resource} yet.")
    media = {"video": "https://example.com/v.mp4", "audio": "https://example.com/a.mp3"}
    HeyGenHook().create_overdub(media)
    assert HeyGenHook().test_connection() == (True, f"{accepted} There are {resource}.")


def key_of(listen, **key):
    """Start an emulator that has only this key."""

    def answer(seen):
        if seen.path != "/v3/api_keys/self":
            return 200, {}, PAGE
        return key.get("status", 200), {}, json.dumps({"data": key}).encode()

    return listen(answer)


MAY_NOT = {
    "lipsync:write": "It may not create, rename or delete overdubs: for that, add the scope 'lipsync:write'",
    "assets:write": "It may not upload or delete files: for that, add the scope 'assets:write'",
}


@pytest.mark.parametrize(
    ("key", "missing"),
    [
        ({"scope_mode": "full", "scopes": ["*:*"]}, ()),
        ({"scope_mode": "full"}, ()),
        ({"scope_mode": "read_only", "scopes": ["*:read"]}, MAY_NOT),
        ({"scope_mode": "read_only"}, MAY_NOT),
        ({"scope_mode": "custom", "scopes": ["lipsync:write", "account:read"]}, ("assets:write",)),
        ({"scope_mode": "custom", "scopes": ["assets:*", "lipsync:read"]}, ("lipsync:write",)),
        ({"scope_mode": "custom", "scopes": []}, MAY_NOT),
        ({"scopes": "odd", "scope_mode": 5, "expires_at": "soon"}, ()),
        ({}, ()),
        *(({"status": status, "scope_mode": "read_only"}, ()) for status in (403, 500)),
    ],
    ids=str,
)
def test_what_a_key_may_do(listen, connect, key, missing):
    connect(key_of(listen, **key).url)
    ok, message = HeyGenHook().test_connection()
    assert ok
    assert {scope for scope, text in MAY_NOT.items() if text in message} == set(missing)
    assert "expires" not in message


@pytest.mark.parametrize(
    ("days", "told"), [(1, True), (13, True), (15, False), (10**9, False), (-(10**6) // 60, True)]
)
def test_when_a_key_expires(listen, connect, days, told):
    moment = time.time() + days * 86400
    connect(key_of(listen, scope_mode="full", expires_at=int(moment)).url)
    ok, message = HeyGenHook().test_connection()
    assert ok
    assert ("It expires at" in message) == told
    assert not told or f"{datetime.fromtimestamp(moment, UTC):%Y-%m-%d %H:%M} UTC." in message


def test_good_token(heygen, connect):
    connect(heygen.url, heygen.oauth_token, auth_type="oauth")
    accepted = "HeyGen accepts the OAuth token."
    assert HeyGenHook().test_connection() == (True, f"{accepted} There are no overdubs yet.")


@pytest.mark.parametrize(
    ("change", "texts"),
    [
        ({"password": "wrong"}, ("401", "the password of this connection", "'auth_type'")),
        ({"auth_type": "oauth"}, ("401", "'auth_type' ('oauth')")),
        ({"password": "emulator-oauth-token"}, ("401", "'auth_type' ('api_key')")),
        ({"resource": "lipsyncs"}, ("404", "Remove the extra 'resource' ('lipsyncs')")),
        ({"host": "https:/api.heygen.com"}, ("host must be an https URL",)),
        ({"host": "https//api.heygen.com"}, ("host must be an https URL",)),
        ({"host": "https://api.heygen.com#"}, ("host must be a plain base URL",)),
        ({"host": "https://api.heygen.com/?"}, ("host must be a plain base URL",)),
        ({"read_timeout": 1e300}, ("extra 'read_timeout'",)),
        ({"host": "http://127.0.0.1.:9", "allow_http": True}, ("nothing was sent", "Check the host")),
        ({"host": "http://127.0.0.1:1"}, ("http://127.0.0.1:1", "nothing was sent")),
        ({"host": "http://nowhere.localhost.invalid", "allow_http": True}, ("nothing was sent",)),
    ],
    ids=str,
)
def test_bad_connection(heygen, connect, change, texts):
    heygen.behaviour.resources = "overdubs"
    given = {"host": heygen.url, "password": heygen.api_key} | change
    connect(**given)
    ok, message = HeyGenHook().test_connection()
    assert not ok
    for text in texts:
        assert text in message
    assert ".;" not in message
    assert given["password"] not in message
    assert "heygen_default" not in message  # in the web UI it would be a temporary id
    assert len(heygen.requests) <= 1


def test_host_is_not_heygen(listen, connect):
    site = listen(lambda _: (200, {"Content-Type": "text/html"}, b"<html>Welcome</html>"))
    connect(site.url)
    ok, message = HeyGenHook().test_connection()
    assert not ok
    assert "without JSON (text/html, 20 bytes)" in message
    assert "check the host of this connection" in message
    assert len(site.seen) == 1


def test_no_session_is_left(heygen):
    alist()
    assert not any(transport._sessions.values())
