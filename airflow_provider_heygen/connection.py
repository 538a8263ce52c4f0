"""The settings of an Airflow connection of type ``heygen``, validated once for both transports."""

from __future__ import annotations

import ipaddress
import json
import logging
from contextlib import suppress
from difflib import get_close_matches
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, ValidationError

from airflow_provider_heygen.exceptions import HeyGenBadInputError, validation_problems

if TYPE_CHECKING:
    from collections.abc import Mapping

    from airflow.providers.common.compat.sdk import Connection

log = logging.getLogger(__name__)

DEFAULT_HOST = "https://api.heygen.com"
MAX_TIMEOUT = 86_400.0  # seconds

_ALIASES = {"proxy": "proxies", "verify_ssl": "verify"}


def _proxies(value: Any) -> Any:
    # Pydantic's own message does not describe the form.
    if isinstance(value, dict) and all(isinstance(part, str) for pair in value.items() for part in pair):
        return value
    raise ValueError('must be a JSON object of texts, such as {"https": "http://proxy.example:3128"}')


def _parse_bool(value: Any) -> Any:
    # A URI has "false" for False, which must not become the name of a CA file.
    text = value.strip().lower() if isinstance(value, str) else ""
    return {"true": True, "false": False}.get(text, value)


def is_loopback(host: str) -> bool:
    """Return whether a host name or IP address belongs to this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


class HeyGenConnection(BaseModel):
    """
    The settings of one connection.

    ``password`` holds the API key or the OAuth access token, ``host`` the base URL. All other settings are
    extras; an unknown extra is ignored with a warning, and none becomes a request header. Timeouts are in
    seconds and limit the silence on the socket, and the time to read a response of the API. Their defaults
    follow HeyGen's own command line client (contract, ``x-timing``).

    :param resource: ``overdubs`` or ``lipsyncs``; ``None`` if the hook detects it.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", hide_input_in_errors=True)

    conn_id: str
    base_url: str
    credential: SecretStr
    auth_type: Literal["api_key", "oauth"] = "api_key"
    resource: Literal["overdubs", "lipsyncs"] | None = None
    allow_http: bool = False
    allow_private_hosts: bool = False
    connect_timeout: float = Field(default=10.0, gt=0, le=MAX_TIMEOUT)
    read_timeout: float = Field(default=30.0, gt=0, le=MAX_TIMEOUT)
    # HeyGen may take 30 s for a create request. Without its response, the hook must search for the overdub.
    write_timeout: float = Field(default=120.0, gt=0, le=MAX_TIMEOUT)
    upload_timeout: float = Field(default=600.0, gt=0, le=MAX_TIMEOUT)
    # HeyGen publishes no limit (contract, ``x-limits``). This one applies to all waits of one triggerer.
    max_requests_per_second: float = Field(default=5.0, gt=0, allow_inf_nan=False)
    # Of the account, at a time. If it is not set, the triggerer's queue learns it from 429 responses.
    max_concurrent_jobs: int | None = Field(default=None, gt=0)
    # The next four have the names of Airflow's HTTP connection.
    proxies: Annotated[dict[str, str], BeforeValidator(_proxies)] = Field(default_factory=dict, repr=False)
    verify: Annotated[bool | str, BeforeValidator(_parse_bool)] = True
    cert: str | tuple[str, str] | None = None
    trust_env: bool = True
    # In dollars, by mode; the page *Watch* and the result show the cost.
    price_per_second: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = Field(
        default_factory=dict
    )

    def cost(self, mode: str, duration: float | None) -> float | None:
        """Return the cost of an overdub in dollars, or ``None`` if the price is not set."""
        price = self.price_per_second.get(mode)
        return None if price is None or duration is None else round(price * duration, 4)

    @classmethod
    async def afrom_airflow(cls, connection: Connection) -> HeyGenConnection:
        """Return :meth:`from_airflow` on an event loop, where Airflow masks secrets by another call."""
        from airflow.providers.common.compat.connection import get_async_extra_dejson

        _check_extra(connection)
        return cls.from_airflow(connection, await get_async_extra_dejson(connection))

    @classmethod
    def from_airflow(cls, connection: Connection, extra: Mapping[str, Any] | None = None) -> HeyGenConnection:
        """
        Read and check an Airflow connection; Airflow masks its secrets.

        :param extra: the extra as a mapping; ``None`` reads it from the connection.
        :raises HeyGenBadInputError: if a setting is missing or wrong; the message names it.
        """
        conn_id = str(connection.conn_id)
        if extra is None:
            _check_extra(connection)
            extra = connection.extra_dejson
        # Forms and secrets backends store "" or null for a setting without a value.
        values = {name: value for name, value in extra.items() if value not in (None, "")}
        settings = cls.model_fields.keys() - {"conn_id", "base_url", "credential"}
        for unknown in values.keys() - settings - _ALIASES.keys():
            _warn_unknown(unknown, conn_id, *get_close_matches(unknown, sorted(settings), 1))
        for alias, name in _ALIASES.items():
            if alias in values:
                values.setdefault(name, values[alias])
        # No extra of the same name replaces these.
        values |= {
            "conn_id": conn_id,
            "base_url": _base_url(connection),
            "credential": (connection.password or "").strip(),
        }
        try:
            resolved = cls.model_validate(values)
        except ValidationError as error:
            problems = validation_problems(error, "extra '{}'")
            raise HeyGenBadInputError(f"Airflow connection '{conn_id}' is wrong: {problems}.") from None
        problem = _problem_of_password(resolved.credential.get_secret_value()) or resolved._problem_of_host()
        if problem:
            raise HeyGenBadInputError(f"Airflow connection '{conn_id}' is wrong: {problem}")
        return resolved

    def _problem_of_host(self) -> str | None:
        try:
            url = urlsplit(self.base_url)
            host, _ = url.hostname, url.port
            (host or "").encode("idna")  # as the DNS query does
        except ValueError:
            return "host and port do not make a URL; leave both empty for HeyGen's own API."
        usable = self.base_url.isprintable() and " " not in self.base_url
        usable = usable and ("%" not in str(host) or ":" in str(host))  # only an IPv6 address has a zone
        # "https:/api.heygen.com" would be a host named "https".
        if url.scheme not in ("http", "https") or host in (None, "", "http", "https") or not usable:
            return f"host must be an https URL such as {DEFAULT_HOST}, or empty."
        if url.username is not None or set(self.base_url) & set("?#"):
            return "host must be a plain base URL; the credential belongs in the password."
        if url.scheme == "http" and not (self.allow_http or is_loopback(str(host))):
            return (
                "plain http would send the credential in the clear; use https, "
                "or set the extra 'allow_http' to true where the network is trusted."
            )
        return None

    @property
    def auth_header(self) -> tuple[str, str]:
        """Name and value of the credential header (HeyGen's page "Create Overdub")."""
        secret = self.credential.get_secret_value()
        return ("Authorization", f"Bearer {secret}") if self.auth_type == "oauth" else ("X-Api-Key", secret)

    def redact(self, text: str) -> str:
        """Remove the credential from a text."""
        return text.replace(self.credential.get_secret_value(), "***")


def _problem_of_password(secret: str) -> str | None:
    if not secret:
        return "the password is empty; it must hold the HeyGen API key (or the OAuth access token)."
    if not (secret.isascii() and secret.isprintable() and " " not in secret):
        return (
            "the password has characters that no API key or token has. Check that it was pasted completely."
        )
    return None


@cache  # because a triggerer reads its connections again every minute
def _warn_unknown(unknown: str, conn_id: str, nearest: str | None = None) -> None:
    hint = f" Did you mean '{nearest}'?" if nearest else ""
    log.warning(
        "Airflow connection '%s' has an unknown extra %.100r, which is ignored.%s", conn_id, unknown, hint
    )


def _check_extra(connection: Connection) -> None:
    """
    Reject an extra that is not a JSON object, before Airflow decodes it.

    Airflow returns any other JSON value unchanged, and an empty mapping for invalid JSON.
    """
    try:
        # Reading the extra of a connection from Airflow's database may raise ValueError, too.
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
    """Return the base URL of a connection from a form, JSON or a URI, which stores a path as ``schema``."""
    schema = (connection.schema or "").strip("/ ")
    default, path = (schema.lower(), "") if schema.lower() in ("http", "https") else ("https", schema)
    host = (connection.host or "").strip() or DEFAULT_HOST
    # The default is https, unlike in Airflow's HTTP connection, because a credential is sent.
    scheme, _, rest = host.partition("://") if "://" in host else (default, "", host)
    authority, _, own_path = rest.partition("/")
    with suppress(ValueError):
        authority = f"[{ipaddress.IPv6Address(authority)}]"  # a URI loses the brackets
    port = f":{connection.port}" if connection.port else ""
    authority += "" if authority.endswith(port) else port
    return "/".join(filter(None, (f"{scheme}://{authority}", own_path.strip("/"), path)))
