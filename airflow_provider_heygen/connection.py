"""What an Airflow connection of type ``heygen`` says, checked once and read by both transports."""

from __future__ import annotations

import ipaddress
import json
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, ValidationError

from airflow_provider_heygen.exceptions import HeyGenBadInputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from airflow.providers.common.compat.sdk import Connection

DEFAULT_HOST = "https://api.heygen.com"


def _proxies(value: Any) -> Any:
    # Pydantic's own message does not say which form is meant.
    if isinstance(value, dict) and all(isinstance(part, str) for pair in value.items() for part in pair):
        return value
    raise ValueError('must be a JSON object of texts, such as {"https": "http://proxy.example:3128"}')


def _bool_word(value: Any) -> Any:
    # A form stores booleans as words; "false" must not become the name of a CA file.
    return (
        {"true": True, "false": False}.get(value.strip().lower(), value) if isinstance(value, str) else value
    )


def is_loopback(host: str) -> bool:
    """Tell whether a host name or address is this very machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


class HeyGenConnection(BaseModel):
    """
    The settings of one connection, resolved.

    ``password`` holds the API key or the OAuth access token, ``host`` the base URL. Everything else is an
    extra; extras this class does not know are ignored, and none of them ever becomes a request header.
    Timeouts are in seconds and are the longest silence on the socket, not the length of the call. Their
    defaults follow HeyGen's own command line client (contract notes, section 4).
    """

    model_config = ConfigDict(frozen=True, extra="ignore", hide_input_in_errors=True)

    conn_id: str
    base_url: str
    credential: SecretStr
    auth_type: Literal["api_key", "oauth"] = "api_key"
    resource: Literal["overdubs", "lipsyncs"] = "overdubs"
    allow_http: bool = False
    allow_private_hosts: bool = False
    connect_timeout: float = Field(default=10.0, gt=0, allow_inf_nan=False)
    read_timeout: float = Field(default=30.0, gt=0, allow_inf_nan=False)
    # A create may take 30 s to answer; giving up early makes jobs nobody knows the id of.
    write_timeout: float = Field(default=120.0, gt=0, allow_inf_nan=False)
    upload_timeout: float = Field(default=600.0, gt=0, allow_inf_nan=False)
    # HeyGen publishes no limit (contract notes, section 4). One triggerer keeps to this, for all its waits.
    max_requests_per_second: float = Field(default=5.0, gt=0, allow_inf_nan=False)
    # Of the account, at a time, of all products; the triggerer's queue learns it where it is not set.
    max_concurrent_jobs: int | None = Field(default=None, gt=0)
    # As in Airflow's HTTP connection, by the names its users know.
    proxies: Annotated[dict[str, str], BeforeValidator(_proxies)] = Field(default_factory=dict, repr=False)
    verify: Annotated[bool | str, BeforeValidator(_bool_word)] = True
    cert: str | tuple[str, str] | None = None
    trust_env: bool = True

    @staticmethod
    def extra_of(connection: Connection) -> dict[str, Any]:
        """
        Return the extra of an Airflow connection; Airflow masks the secrets in it.

        Use it instead of ``connection.extra_dejson``:
        ``HeyGenConnection.from_airflow(connection, HeyGenConnection.extra_of(connection))``. On an event
        loop, await :meth:`aextra_of` instead, because Airflow then masks secrets by another call.

        :raises HeyGenBadInputError: the extra is not a JSON object.
        """
        _check_extra(connection)
        return dict(connection.extra_dejson)

    @staticmethod
    async def aextra_of(connection: Connection) -> dict[str, Any]:
        """
        :meth:`extra_of` for an event loop.

        Use it instead of ``get_async_extra_dejson``, for what ``get_async_connection`` of
        :mod:`airflow.providers.common.compat.connection` returned.
        """
        from airflow.providers.common.compat.connection import get_async_extra_dejson

        _check_extra(connection)
        return dict(await get_async_extra_dejson(connection))

    @classmethod
    def from_airflow(cls, connection: Connection, extra: Mapping[str, Any]) -> HeyGenConnection:
        """
        Read and check an Airflow connection.

        :param connection: the connection as Airflow resolved it.
        :param extra: its extra, from :meth:`extra_of` or :meth:`aextra_of`.
        :raises HeyGenBadInputError: a setting is missing or wrong; the message names it.
        """
        conn_id = str(connection.conn_id)
        # Forms and secrets backends store "" or null for "not set".
        values = {name: value for name, value in extra.items() if value not in (None, "")}
        for alias, name in (("proxy", "proxies"), ("verify_ssl", "verify")):
            if alias in values:
                values.setdefault(name, values[alias])
        # What was given by place wins over an extra of the same name.
        values |= {
            "conn_id": conn_id,
            "base_url": _base_url(connection),
            "credential": (connection.password or "").strip(),
        }
        try:
            settings = cls.model_validate(values)
        except ValidationError as error:
            problems = "; ".join(
                f"extra '{'.'.join(map(str, problem['loc'][:1]))}':"
                f" {problem['msg'].removeprefix('Value error, ')}"
                for problem in error.errors(include_input=False, include_url=False)
            )
            raise HeyGenBadInputError(f"Airflow connection '{conn_id}' is wrong: {problems}.") from None
        settings._check()
        return settings

    def _check(self) -> None:
        def refuse(problem: str) -> HeyGenBadInputError:
            return HeyGenBadInputError(f"Airflow connection '{self.conn_id}' is wrong: {problem}")

        secret = self.credential.get_secret_value()
        if not secret:
            raise refuse(
                "the password is empty; it must hold the HeyGen API key (or the OAuth access token)."
            )
        if not (secret.isascii() and secret.isprintable() and " " not in secret):
            raise refuse("the password has characters that no API key or token has; was it pasted whole?")
        try:
            url = urlsplit(self.base_url)
            host, _ = url.hostname, url.port
            (host or "").encode("idna")  # as the look-up of its address does
        except ValueError:
            raise refuse("host and port do not make a URL; leave both empty for HeyGen's own API.") from None
        usable = self.base_url.isprintable() and " " not in self.base_url
        if url.scheme not in ("http", "https") or not host or not usable:
            raise refuse(f"host must be an https URL such as {DEFAULT_HOST}, or empty.")
        if url.username is not None or url.query or url.fragment:
            raise refuse("host must be a plain base URL; the credential belongs in the password.")
        if url.scheme == "http" and not (self.allow_http or is_loopback(host)):
            raise refuse(
                "plain http would send the credential in the clear; use https, "
                "or set the extra 'allow_http' to true where the network is trusted."
            )

    @property
    def auth_header(self) -> tuple[str, str]:
        """Name and value of the one credential header (vendor's page, "Authentication")."""
        secret = self.credential.get_secret_value()
        return ("Authorization", f"Bearer {secret}") if self.auth_type == "oauth" else ("X-Api-Key", secret)

    def redact(self, text: str) -> str:
        """Take the credential out of a text that came back from the network."""
        return text.replace(self.credential.get_secret_value(), "***")


def _check_extra(connection: Connection) -> None:
    """
    Reject an extra that is not a JSON object, before Airflow decodes it.

    Airflow returns anything else as it is, and nothing at all for what is not JSON.
    """
    try:
        # That of a connection that comes from Airflow's database is checked when it is read.
        extra = connection.extra
        decoded = json.loads(extra) if extra else {}
    except (ValueError, RecursionError):
        decoded = None
    if not isinstance(decoded, dict):
        hint = " It is encoded twice." if isinstance(decoded, str) else ""
        raise HeyGenBadInputError(
            f"Airflow connection '{connection.conn_id}' is wrong: 'extra' must be a JSON object such as"
            f' {{"read_timeout": 60}}.{hint}'
        )


def _base_url(connection: Connection) -> str:
    host = (connection.host or "").strip() or DEFAULT_HOST
    if "://" not in host:
        # Unlike Airflow's HTTP connection, whose default is http: there is a key on board.
        host = f"{connection.schema or 'https'}://{host}"
    scheme, _, rest = host.partition("://")
    authority, slash, path = rest.partition("/")
    port = f":{connection.port}" if connection.port else ""
    return f"{scheme}://{authority}{port}{slash}{path}".rstrip("/")
