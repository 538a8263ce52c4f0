"""
HeyGen's overdub protocol without I/O.

Each function at the end builds one :class:`Call`: what to send, and how to read the response. Both transports
use only these. Requests are validated strictly before anything is sent. Responses are read leniently: members
may be missing, null, renamed (``lipsync_id``) or unknown.

``overdubs`` and ``lipsyncs`` are the same resource before and after HeyGen's rename of April 2026.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Any, Generic, Literal, NamedTuple, TypeVar
from urllib.parse import quote, urlsplit

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_validator,
)

from airflow_provider_heygen.exceptions import (
    HeyGenBadInputError,
    HeyGenError,
    HeyGenGatewayError,
    HeyGenNotFoundError,
    HeyGenOverdubFailedError,
    HeyGenPermanentError,
    HeyGenTransientError,
    validation_problems,
)

if TYPE_CHECKING:
    from airflow_provider_heygen.connection import HeyGenConnection

T = TypeVar("T")

MAX_JOB_SECONDS = 24 * 60 * 60  # after which a job that is not final does not count as running
MAX_PAGE_SIZE = 100  # of the list endpoint (HeyGen's page "Create Overdub")
MAX_MULTIPART_BYTES = 32 * 1024 * 1024  # for POST /v3/assets: "32 MB", read generously (contract, x-limits)
DEFAULT_FAILURE_MESSAGE = "HeyGen stated no reason"  # it may be null (contract, Overdub.failure_message)
# Members that may hold an overdub's id; which one depends on endpoint and year (contract, x-rename).
_ID_NAMES = ("overdub_id", "lipsync_id", "id")


def redact_urls(text: str) -> str:
    """Remove user and query from each URL in a text: a presigned URL is a secret, and HeyGen quotes URLs."""
    text = re.sub(r"(?i)(https?://)[^\s/@\"'<>]*@", r"\1", text)
    # In a storage URI, a user without a password is an Airflow connection id.
    text = re.sub(r"(?<=://)[^\s/@:\"'<>]*:[^\s/@\"'<>]*@", "", text)
    # The query is optional, because a second attempt to match inside of a URL would take quadratic time.
    text = re.sub(
        r"(?i)(https?://[^\s\"'<>?]*)(\?[^\s\"<>]+)?",  # an apostrophe may be part of a query
        lambda url: f"{url[1]}?***" if url[2] else url[1],
        text,
    )
    text = re.sub(r"\?[^\s\"'<>?]*=[^\s\"<>]*", "?***", text)
    # The query of a URL that is percent-encoded within another URL.
    return re.sub(r"(?i)%3f(?:(?!%3[fd])[^\s\"<>])*%3d[^\s\"<>]*", "%3F***", text)


def _text(value: Any, numbers: tuple[type, ...] = (int,)) -> Any:
    # Native rendering makes a number of "2026", and HeyGen may return an id of digits as a number. A float is
    # not accepted as an id: native rendering makes one of "12e4", which cannot be restored.
    value = str(value) if isinstance(value, numbers) and not isinstance(value, bool) else value
    # Half of a surrogate pair, where a text was cut, is valid JSON but can be neither stored nor logged.
    return value.encode(errors="replace").decode() if isinstance(value, str) else value


# --- What is sent -------------------------------------------------------------------------------------


def _url(*schemes: str) -> AfterValidator:
    def check(url: str) -> str:
        with suppress(ValueError):  # urlsplit rejects the URL
            parts = urlsplit(url)
            if parts.scheme in schemes and parts.hostname and url.isprintable() and " " not in url:
                return url
        raise ValueError(f"must be a public {' or '.join(schemes)} URL")

    return AfterValidator(check)


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)


class MediaUrl(_Request):
    """A file of at most 32 MB that HeyGen downloads from a public, direct https URL."""

    type: Literal["url"]
    url: Annotated[str, _url("https")] = Field(repr=False)


def _not_none(text: str) -> str:
    if text == "None":
        raise ValueError("is the text 'None', which is what a template makes of a missing value")
    return text


def _unwrap_asset(value: Any) -> Any:
    # Accepts {"asset_id": upload.output}, because the upload operator returns a whole media input.
    return _text(value.get("asset_id") if isinstance(value, Mapping) else value)


class MediaAsset(_Request):
    """A file that was uploaded to HeyGen."""

    type: Literal["asset_id"]
    asset_id: Annotated[
        str, Field(min_length=1, pattern=r"^\S+$"), BeforeValidator(_unwrap_asset), AfterValidator(_not_none)
    ]


def _as_media(value: Any) -> Any:
    if isinstance(value, str):
        return {"type": "url", "url": value}
    if isinstance(value, Mapping):
        given = {name for name in ("url", "asset_id") if value.get(name) is not None}
        if len(given) != 1:
            raise ValueError("pass exactly one of 'url' and 'asset_id'")
        if value.get("type") not in ("url", "asset_id"):
            raise ValueError("'type' must be 'url' or 'asset_id'")
    elif not isinstance(value, _Request):
        raise ValueError("must be a URL, the URI of a file, or an asset")
    return value


MediaInput = Annotated[MediaUrl | MediaAsset, Field(discriminator="type"), BeforeValidator(_as_media)]
"""An https URL, or ``{"type": "url", "url": ...}``, or ``{"type": "asset_id", "asset_id": ...}``."""


Text = Annotated[
    str,
    Field(min_length=1, pattern=r"\S"),
    BeforeValidator(lambda value: _text(value, (int, float))),
    AfterValidator(_not_none),
]
Flag = Annotated[bool, BeforeValidator(lambda value: value.strip() if isinstance(value, str) else value)]


def _no_flag(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be a number of seconds")
    return value


Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False), BeforeValidator(_no_flag)]


class CreateOverdubRequest(_Request):
    """
    The body of a create request: HeyGen's 16 fields, and others in ``extra_body``.

    A field that is ``None`` is not sent, so HeyGen's own default applies.
    :class:`~airflow_provider_heygen.operators.overdub.HeyGenCreateOverdubOperator` describes the fields.
    """

    video: MediaInput
    audio: MediaInput
    title: Text | None = None
    mode: Literal["speed", "precision"] | None = None
    enable_caption: Flag | None = None
    enable_dynamic_duration: Flag | None = None
    disable_music_track: Flag | None = None
    enable_speech_enhancement: Flag | None = None
    enable_watermark: Flag | None = None
    start_time: Seconds | None = None
    end_time: Seconds | None = None
    keep_the_same_format: Flag | None = None
    fps_mode: Literal["vfr", "cfr", "passthrough"] | None = None
    # That callbacks must be https is inferred, not documented: HeyGen decides.
    callback_url: Annotated[str, _url("https", "http")] | None = Field(default=None, repr=False)
    callback_id: Text | None = None
    folder_id: Text | None = None
    extra_body: dict[str, Any] | None = Field(default=None, repr=False)

    @field_validator("extra_body")
    @classmethod
    def _only_unknown_fields(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        known = [name for name in value or () if name in cls.model_fields]
        if known:
            raise ValueError(f"repeats {', '.join(map(repr, known))}; use the arguments of these names")
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError, RecursionError):
            raise ValueError("must consist of values that JSON has") from None
        return value

    @model_validator(mode="after")
    def _end_after_start(self) -> CreateOverdubRequest:
        if self.end_time is not None and self.end_time <= (self.start_time or 0):
            raise ValueError("end_time must be after start_time")
        return self

    @classmethod
    def of(cls, request: CreateOverdubRequest | Mapping[str, Any]) -> CreateOverdubRequest:
        """
        Validate a mapping; return a request unchanged.

        :raises HeyGenBadInputError: if a field is wrong. The message names the field and shows no value.
        """
        if isinstance(request, cls):
            return request
        try:
            return cls.model_validate(dict(request))
        except ValidationError as error:
            problems = validation_problems(error)
            raise HeyGenBadInputError(
                f"The overdub request is wrong, nothing was sent: {problems}."
            ) from None

    def body(self) -> dict[str, Any]:
        """Return the JSON body, without fields that are ``None``."""
        fields: dict[str, Any] = self.model_dump(mode="json", exclude_none=True, exclude={"extra_body"})
        return fields | (self.extra_body or {})


# --- What comes back ----------------------------------------------------------------------------------


def _none_if_invalid(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    try:
        return handler(value)
    except ValidationError:
        return None


def _none_if_blank(value: Any) -> Any:
    text = _text(value)
    return None if isinstance(text, str) and not text.strip() else text


def _status(value: Any) -> str:
    # Logs and messages show the status, so it must be short and without secrets.
    status = redact_urls(_text(value)).strip().lower()[:100] if isinstance(value, str) else ""
    return status or "unknown"


Lenient = WrapValidator(_none_if_invalid)
OptionalText = Annotated[str | None, BeforeValidator(_text), Lenient]
# Larger numbers fit neither JSON's nor Airflow's messages between processes.
OptionalInt = Annotated[int | None, Field(ge=-(2**53), le=2**53), Lenient]
Id = Annotated[str, Field(min_length=1), BeforeValidator(_text)]


class OverdubStatus(StrEnum):
    """HeyGen's statuses of this resource; the last two are final."""

    PENDING = "pending"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"


Status = Annotated[OverdubStatus | str, Field(union_mode="left_to_right"), BeforeValidator(_status)]


class _Response(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", hide_input_in_errors=True)


class Overdub(_Response):
    """
    One overdub as HeyGen reports it.

    :param overdub_id: id; also as ``id``, HeyGen's name.
    :param status: an :class:`OverdubStatus`, or an unknown status as HeyGen's text.
    :param duration: length of a completed output in seconds, which HeyGen bills.
    :param video_url: presigned URL of a completed output; a secret that expires.
    :param caption_url: presigned URL of the captions (``lipsyncs`` only).
    :param callback_id: id from the create request.
    :param created_at: Unix seconds.
    :param failure_message: HeyGen's reason for a failure, if it states one.
    """

    overdub_id: Id = Field(validation_alias=AliasChoices(*_ID_NAMES))
    status: Status = "unknown"
    title: OptionalText = None
    duration: Annotated[float | None, Field(allow_inf_nan=False), Lenient] = None
    video_url: Annotated[str | None, Lenient] = Field(default=None, repr=False)
    caption_url: Annotated[str | None, Lenient] = Field(default=None, repr=False)
    callback_id: Annotated[str | None, BeforeValidator(_none_if_blank), Lenient] = None
    created_at: OptionalInt = None
    failure_message: OptionalText = None

    @property
    def id(self) -> str:
        """HeyGen's name for :attr:`overdub_id`."""
        return self.overdub_id

    @property
    def is_final(self) -> bool:
        """Whether the status will not change any more. An unknown status is not final."""
        return self.status in (OverdubStatus.COMPLETED, OverdubStatus.FAILED)

    @property
    def is_completed(self) -> bool:
        """Whether there is a result."""
        return self.status == OverdubStatus.COMPLETED

    def raise_for_failure(self) -> Overdub:
        """
        Return the overdub, unless it has failed.

        :raises HeyGenOverdubFailedError: if it has failed; the message quotes HeyGen's reason.
        """
        if self.status == OverdubStatus.FAILED:
            reason = redact_urls(self.failure_message or DEFAULT_FAILURE_MESSAGE)
            named = f"{self.overdub_id} ({redact_urls(self.title)!r})" if self.title else self.overdub_id
            raise HeyGenOverdubFailedError(f"Overdub {named} failed: {reason}", overdub_id=self.overdub_id)
        return self

    def details(self) -> dict[str, Any]:
        """Return what may be stored and shown: all fields except the presigned URLs."""
        shown = self.model_dump(mode="json", exclude={"video_url", "caption_url"})
        return {
            name: redact_urls(value) if isinstance(value, str) else value for name, value in shown.items()
        }


class OverdubPage(_Response):
    """
    One page of the list endpoint.

    :param has_more: whether there are further pages. If ``next_token`` is ``None`` then, they cannot be read.
    :param server_time: HeyGen's clock in Unix seconds (its ``Date`` header), if known.
    """

    data: list[Overdub]
    has_more: bool
    next_token: str | None
    server_time: float | None = None


# Batches and HeyGen's older videos have these statuses (contract, ``LipsyncStatusEntry.status``).
_BULK_STATUSES = {"queued": "pending", "waiting": "pending", "processing": "running"}
NOT_FOUND = "not_found"  # status of an id that the bulk status endpoint does not know


class Statuses(NamedTuple):
    """
    The statuses of many overdubs at once, for a poller that reads thousands and needs few.

    :param rows: raw rows by overdub id, for :func:`parse_overdub`.
    :param next_token: token of the next page.
    :param has_more: whether there are further pages, even without a token to read them by.
    """

    rows: dict[str, dict[str, Any]]
    next_token: str | None
    has_more: bool

    def running(self) -> set[str]:
        """Return the ids of the jobs that occupy a slot. A job of a day ago is one that HeyGen has lost."""
        oldest = time.time() - MAX_JOB_SECONDS

        def runs(row: Mapping[str, Any]) -> bool:
            created_at = row.get("created_at")
            is_lost = isinstance(created_at, (int, float)) and created_at < oldest
            return row.get("status") in (OverdubStatus.PENDING, OverdubStatus.RUNNING) and not is_lost

        return {name for name, row in self.rows.items() if runs(row)}


class Asset(_Response):
    """
    A HeyGen asset; a create request accepts its ``asset_id``.

    An upload returns ``mime_type`` and ``size_bytes``; a GET returns ``name``, ``type`` and ``uploaded_at``
    (Unix seconds).
    """

    asset_id: Id = Field(validation_alias=AliasChoices("asset_id", "id"))
    url: Annotated[str | None, Lenient] = Field(default=None, repr=False)
    mime_type: OptionalText = None
    size_bytes: OptionalInt = None
    name: OptionalText = None
    type: OptionalText = None
    uploaded_at: OptionalInt = None


_SCOPES = {"lipsync:write": "create, rename or delete overdubs", "assets:write": "upload or delete files"}


class ApiKey(_Response):
    """The API key of the connection; ``expires_at`` is in Unix seconds, ``None`` if the key never expires."""

    scope_mode: OptionalText = None
    scopes: Annotated[list[str] | None, Lenient] = None
    expires_at: OptionalInt = None

    def limits(self) -> list[str]:
        """Return sentences: what the key may not do, and when it expires if that is within 14 days."""
        default = ["*:read"] if self.scope_mode == "read_only" else ["*:*"]
        granted = default if self.scopes is None else self.scopes
        sentences = [
            f"It may not {action}: for that, add the scope '{scope}' to it."
            for scope, action in _SCOPES.items()
            if not any(fnmatchcase(scope, pattern) for pattern in granted)
        ]
        if self.expires_at is not None and self.expires_at < time.time() + 14 * 24 * 3600:
            expiry = datetime.fromtimestamp(max(0, self.expires_at), UTC)
            sentences.append(f"It expires at {expiry:%Y-%m-%d %H:%M} UTC.")
        return sentences


class DirectUpload(_Response):
    """
    The destination of a file above 32 MB.

    :param asset_id: id of the future HeyGen asset; not usable before the upload is complete.
    :param upload_url: presigned storage URL for one PUT of the whole file; a secret that expires.
    :param upload_headers: signed headers, to be sent with the file unchanged.
    :param expires_in_seconds: lifetime of the URL.
    :param max_bytes: size of the largest file.
    """

    asset_id: Annotated[str, BeforeValidator(lambda value: check_id(value, "asset_id"))]
    upload_url: str = Field(min_length=1, repr=False)
    upload_headers: Annotated[
        dict[
            Annotated[str, Field(pattern=r"^[!-9;-~]+$")],
            Annotated[str, Field(pattern=r"^[\t -~]*$"), BeforeValidator(_text)],
        ],
        BeforeValidator(lambda headers: headers or {}),
    ] = Field(default_factory=dict, repr=False)
    expires_in_seconds: Annotated[float | None, Lenient] = None
    max_bytes: OptionalInt = None


def _data(decoded: Any, kind: type) -> Any:
    data = decoded.get("data") if isinstance(decoded, dict) else None
    if not isinstance(data, kind):
        raise ValueError("it has no usable 'data'")
    return data


def _id_of(row: Any, names: tuple[str, ...] = _ID_NAMES) -> str:
    for name in filter(row.get, names) if isinstance(row, dict) else ():
        with suppress(HeyGenBadInputError):
            return check_id(row[name])
    raise ValueError("it has no overdub_id")


def _statuses(
    decoded: Any, id_names: tuple[str, ...] = _ID_NAMES, renamed: Mapping[str, str] = {}
) -> Statuses:
    rows = {}
    for row in _data(decoded, list):
        with suppress(ValueError):  # one unreadable row must not hide the others
            rows[_id_of(row, id_names)] = row
            if isinstance(row.get("status"), str):
                status = row["status"].strip().lower()
                row["status"] = renamed.get(status, status)
    token = _text(decoded.get("next_token"))
    # HeyGen requires neither member.
    more = isinstance(token, str) and token and decoded.get("has_more") is not False
    # A list with an error is incomplete: an overdub that it lacks may exist.
    has_more = more or decoded.get("has_more") is True or decoded.get("error")
    return Statuses(rows, token if more else None, bool(has_more))


def parse_overdub(overdub_id: str, row: Mapping[str, Any]) -> Overdub:
    """Return the overdub of one raw row; each unusable member is ``None``."""
    return Overdub.model_validate({**row, "overdub_id": overdub_id})


def _page(decoded: Any, headers: Mapping[str, str]) -> OverdubPage:
    page = _statuses(decoded)
    data = [parse_overdub(overdub_id, row) for overdub_id, row in page.rows.items()]
    server_time = _http_date(headers.get("Date"))
    return OverdubPage(data=data, has_more=page.has_more, next_token=page.next_token, server_time=server_time)


# --- Calls --------------------------------------------------------------------------------------------

_OVERDUBS, _LIPSYNCS = "/v3/overdubs", "/v3/lipsyncs"
_ASSETS = "/v3/assets"
_DIRECT_UPLOADS = f"{_ASSETS}/direct-uploads"


@dataclass(frozen=True, kw_only=True)
class Call(Generic[T]):
    """
    One HTTP request, and how to read its response.

    :param description: the call in words, for messages.
    :param path: path of the URL; one under ``overdubs`` depends on HeyGen's name for the resource.
    :param read: turns the decoded JSON and the headers into the result, or raises ``ValueError``.
    :param transient_status: an error status that is transient for this call only.
    """

    description: str
    method: Literal["GET", "POST", "PATCH", "DELETE"]
    path: str
    read: Callable[[Any, Mapping[str, str]], T]
    params: Mapping[str, str | int] = field(default_factory=dict)
    json: Mapping[str, Any] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    transient_status: int | None = None

    def under(self, resource: str) -> Call[T]:
        """Return the call with the path under one name of the resource."""
        return replace(self, path=self.path.replace(_OVERDUBS, f"/v3/{resource}", 1))

    @property
    def is_renamed(self) -> bool:
        """Whether the path depends on HeyGen's name for the resource."""
        return self.path.startswith(_OVERDUBS)

    @property
    def is_collection(self) -> bool:
        """Whether the call concerns the resource as a whole: a list or a create request."""
        return self.path in (_OVERDUBS, _LIPSYNCS)

    @property
    def writes(self) -> bool:
        """Whether the call changes something at HeyGen."""
        return self.method != "GET"

    @property
    def scope(self) -> str:
        """The scope that a restricted API key needs for the call."""
        kind = {"assets": "assets", "api_keys": "account"}.get(self.path.split("/")[2], "lipsync")
        return f"{kind}:{'write' if self.writes else 'read'}"

    def _is_moved(self, headers: Mapping[str, str]) -> bool:
        """Return whether a redirect leads to the same call under HeyGen's other name for the resource."""
        names = {_OVERDUBS: _LIPSYNCS, _LIPSYNCS: _OVERDUBS}
        own = next(filter(self.path.startswith, names), None)
        with suppress(ValueError):  # urlsplit rejects the URL
            path = urlsplit(headers.get("Location", "")).path.rstrip("/")
            return own is not None and path.endswith(self.path.replace(own, names[own], 1))
        return False

    def parse(self, status: int, headers: Mapping[str, str], body: bytes, connection: HeyGenConnection) -> T:
        """
        Turn an HTTP response into the result.

        :param headers: case-insensitive mapping.
        :raises HeyGenTransientError: if a repeat may succeed (429, 5xx, 409 in progress, unreadable).
        :raises HeyGenGatewayError: if a gateway, proxy or firewall responded.
        :raises HeyGenPermanentError: if HeyGen rejected the request; the message states what to change.
        """
        try:
            decoded = json.loads(body)
        except (ValueError, RecursionError):
            decoded = None
        if 200 <= status < 300 and _envelope(decoded) and not _has_data(decoded):
            # HeyGen's older endpoints report errors with status 200. The code implies the real status.
            status = _STATUS_BY_CODE.get(str(decoded["error"].get("code")), 400)
        if status in (301, 307, 308) and self._is_moved(headers):  # a 302 or 303 may come after the effect
            raise _moved(self, status, connection)
        if not 200 <= status < 300:
            raise _error(self, status, headers, decoded, connection)
        if decoded is None and (body or self.method != "DELETE"):
            raise HeyGenGatewayError(
                f"HeyGen returned {status} for {self.description} without JSON"
                f" ({_content_type(headers, connection)}, {len(body)} bytes). If this"
                f" persists, check the host of Airflow connection '{connection.conn_id}'.",
                status_code=status,
                outcome_unknown=self.writes,
            )
        try:
            return self.read(decoded, headers)
        except ValidationError as error:
            reason = f"it has no usable '{error.errors()[0]['loc'][0]}'"
        except ValueError as error:
            reason = str(error)
        if quoted := _printable(_quoted(decoded), connection):
            reason += f' (it says "{quoted}")'
        raise HeyGenTransientError(
            f"HeyGen's response to {self.description} cannot be used: {reason}.",
            status_code=status,
            outcome_unknown=self.writes,
        )


def _has_data(decoded: Mapping[str, Any]) -> bool:
    data = decoded.get("data")
    return any(data.values()) if isinstance(data, dict) else bool(data)


def _envelope(decoded: Any) -> Mapping[str, Any]:
    """Return HeyGen's ``error`` envelope, or an empty mapping if the response has none."""
    envelope = decoded.get("error") if isinstance(decoded, dict) else None
    envelope = envelope if isinstance(envelope, dict) else {}
    code, message = envelope.get("code"), envelope.get("message")
    # A gateway's JSON may have a number as the code.
    is_heygens = isinstance(code, str | None) and any(
        isinstance(text, str) and text for text in (code, message)
    )
    return envelope if is_heygens else {}


def _quoted(decoded: Any) -> Any:
    """Return the message of an error in any form: HeyGen's older endpoints and gateways have others."""
    decoded = decoded if isinstance(decoded, dict) else {}
    error = decoded.get("error") or decoded
    return error.get("message") if isinstance(error, dict) else error


_NEXT_STEP: dict[int | str | None, str] = {
    401: "Check the password of Airflow connection '{conn_id}' and its extra 'auth_type' ('{auth_type}')",
    402: "Top up: API keys draw on the API wallet, OAuth tokens on the web plan",
    403: "The credential of Airflow connection '{conn_id}' is valid but may not do this",
    404: "It was deleted, never existed or belongs to another account than Airflow connection '{conn_id}'",
    409: "It is in a state that does not allow this",
    413: "HeyGen accepts files up to 32 MB here",
    429: "The account's quota is used up; waiting a little does not help",
    "download_failed": "HeyGen could not fetch an input: its URL must be public https straight to the file,"
    " and the file at most 32 MB. With upload_links=True, the worker downloads the file and uploads it",
    "asset_not_found": "Upload the file with the same credential and pass the new asset_id",
    "insufficient_api_key_scope": "Add the scope '{scope}' to the API key of Airflow connection '{conn_id}'",
    "redirect": "Redirects are not followed, because they could disclose the credential:"
    " put the final base URL into the host of Airflow connection '{conn_id}'",
    "no_resource": "The host has no resource of that name. Remove the extra 'resource' ('{resource}') of"
    " Airflow connection '{conn_id}', so that the provider detects the name, or check the host",
    "no_direct_uploads": "This API has no direct uploads: make the file smaller than 32 MB",
}

# The status of each code, for an error that comes with status 200 (contract, x-error-catalog).
_STATUS_BY_CODE = {
    code: status
    for status, codes in {
        401: "authentication_failed unauthorized",
        402: "insufficient_credit trial_limit_exceeded plan_upgrade_required subscription_required",
        403: "forbidden resource_access_denied insufficient_api_key_scope",
        404: "not_found resource_not_found asset_not_found",
        409: "conflict",
        429: "rate_limit_exceeded quota_exceeded",
        500: "internal_error",
        503: "service_unavailable",
        504: "gateway_timeout",
    }.items()
    for code in codes.split()
}

# Codes of transient errors whose status is not transient (contract, x-error-catalog).
_TRANSIENT_CODES = {"request_in_progress", "resource_not_ready", "asset_not_available"}


def _printable(value: Any, connection: HeyGenConnection) -> str | None:
    """Return a text from the network without secrets, cut to 1,000 characters."""
    return connection.redact(redact_urls(_text(value)))[:1000] if isinstance(value, str) and value else None


def _content_type(headers: Mapping[str, str], connection: HeyGenConnection) -> str:
    return _printable(headers.get("Content-Type"), connection) or "no content type"


def _moved(call: Call[Any], status: int, connection: HeyGenConnection) -> HeyGenError:
    message = f"HeyGen returned {status} for {call.description}: it has the resource under its other name."
    if connection.resource is None:
        return HeyGenNotFoundError(message, status_code=404)  # nothing was done, and the name is tried
    step = _NEXT_STEP["no_resource"].format(conn_id=connection.conn_id, resource=connection.resource)
    return HeyGenPermanentError(f"{message} {step}.", status_code=status)


def _error(
    call: Call[Any], status: int, headers: Mapping[str, str], decoded: Any, connection: HeyGenConnection
) -> HeyGenError:
    envelope = _envelope(decoded)
    facts: dict[str, Any] = {
        name: _printable(envelope.get(name), connection) for name in ("code", "param", "doc_url")
    }
    facts["status_code"] = status
    facts["request_id"] = _printable(headers.get("X-Request-Id"), connection)
    facts["retry_after"] = _retry_after(headers)
    quoted, code = _printable(_quoted(decoded), connection), facts["code"]
    message = f"HeyGen returned {status}{f' {code}' if code else ''} for {call.description}"
    message += f": {quoted}" if quoted else ""
    message += "" if message.endswith((".", "!", "?")) else "."
    trace = f" (request {facts['request_id']})" if facts["request_id"] else ""
    step = _next_step(call, status, facts, connection)
    if not envelope or status < 200:
        # HeyGen may have processed the request although something else responded.
        message += (
            f" The response ({_content_type(headers, connection)}) does not have the form of HeyGen's errors,"
            " so it came from a gateway, proxy or firewall in between. If this persists, check these and the"
            f" host of Airflow connection '{connection.conn_id}'."
        )
        message += f" {step}." if status // 100 == 3 or status == 404 else ""
        return HeyGenGatewayError(message + trace, outcome_unknown=call.writes, **facts)
    if _is_transient(call, status, code):
        # After 408 and 5xx, HeyGen may have done it; after 429 and the transient codes, it has not.
        outcome_unknown = call.writes and (status >= 500 or status == 408)
        return HeyGenTransientError(message + trace, outcome_unknown=outcome_unknown, **facts)
    kind = HeyGenNotFoundError if status == 404 else HeyGenPermanentError
    return kind(f"{message} {step}.{trace}", **facts)


def _is_transient(call: Call[Any], status: int, code: str | None) -> bool:
    """Return whether an error that HeyGen itself reports is likely to pass."""
    if status == 429:
        return not re.search("trial|quota", code or "")
    # HeyGen still processes the first request under this key; its response may have no code.
    in_progress = status == 409 and code is None and "Idempotency-Key" in call.headers
    is_listed = code in _TRANSIENT_CODES or status in (408, 425, call.transient_status)
    return in_progress or is_listed or status >= 500


def _next_step(
    call: Call[Any], status: int, facts: Mapping[str, str | None], connection: HeyGenConnection
) -> str:
    """Return what to do about an error, without a full stop."""
    code = facts["code"]
    if 300 <= status < 400:
        step = _NEXT_STEP["redirect"]
    elif status == 404 and code != "asset_not_found" and call.is_collection and connection.resource:
        step = _NEXT_STEP["no_resource"]
    elif status == 404 and call.path == _DIRECT_UPLOADS:
        step = _NEXT_STEP["no_direct_uploads"]
    else:
        step = _NEXT_STEP.get(code) or _NEXT_STEP.get(status) or "Correct the request"
        if status == 404 and connection.resource and call.scope.startswith("lipsync"):
            step += "; or the connection's extra 'resource' ('{resource}') is the wrong name"
    step = step.format(
        conn_id=connection.conn_id,
        auth_type=connection.auth_type,
        resource=connection.resource,
        scope=call.scope,
    )
    step += f" (field '{facts['param']}')" if facts["param"] else ""
    return step + (f"; see {facts['doc_url']}" if facts["doc_url"] else "")


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds in ``Retry-After``: a whole number (HeyGen's page) or an HTTP date (RFC 9110)."""
    value = headers.get("Retry-After")
    if value and value.isascii() and value.strip().isdigit():
        return float(value) if len(value) < 10 else None  # a timedelta cannot hold a much larger number
    moment = _http_date(value)
    # This machine's clock may be wrong by minutes.
    now = _http_date(headers.get("Date")) or time.time()
    return None if moment is None else max(0.0, moment - now)


def _http_date(value: str | None) -> float | None:
    """Return an HTTP date in Unix seconds, or ``None`` if it is invalid."""
    try:
        moment = parsedate_to_datetime(value or "")
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, TypeError, OverflowError):
        return None


def check_id(value: Any, name: str = "overdub_id") -> str:
    """
    Return an id that is safe as one segment of a path.

    :raises HeyGenBadInputError: if it is empty, not text, or has a character that no id has.
    """
    value = _text(value)
    if not isinstance(value, str) or not value.strip():
        raise HeyGenBadInputError(f"{name} is empty or not text; pass the id that the create task returned.")
    if value == "None":  # a template renders a missing XCom to it
        raise HeyGenBadInputError(
            f"{name} is the text 'None'; the task it should come from returned nothing."
        )
    if value in (".", "..") or re.search(r"[\s/\\?#%\[\]{}]", value) or not value.isprintable():
        raise HeyGenBadInputError(
            f"{name} {redact_urls(value)!r} is not an id: it has characters of a path, a query or a list."
        )
    return value


def asset_ids(value: Any) -> Iterator[str]:
    """
    Return the ids in a HeyGen asset id, a media input, or a list of these.

    :raises HeyGenBadInputError: if one of them is not an id.
    """
    value = value.get("asset_id") if isinstance(value, Mapping) else value
    if isinstance(value, Iterable) and not isinstance(value, (str, bytes)):
        for item in value:
            yield from asset_ids(item)
    else:
        yield check_id(value, "asset_id")


def _model(kind: Callable[[Any], T], **known: str) -> Callable[[Any, Any], T]:
    """Return a function that reads the object in ``data``; ``known`` members replace HeyGen's."""
    return lambda decoded, _: kind({**_data(decoded, dict), **known})


def _on_item(
    kind: str, action: str, method: Any, item_id: str, read: Any = None, *, step: str = "", **rest: Any
) -> Call[Any]:
    path, model = (_OVERDUBS, Overdub) if kind == "overdub" else (_ASSETS, Asset)
    return Call(
        description=f"the {action} of {kind} '{item_id}'",
        method=method,
        path=f"{path}/{quote(check_id(item_id, f'{kind}_id'), safe='')}{step}",
        read=read or _model(model.model_validate, **{f"{kind}_id": item_id}),
        **rest,
    )


def _once(description: str, path: str, key: str, kind: Callable[[Any], T]) -> Call[T]:
    """Return a POST that takes effect once, however often it is sent under its idempotency key."""
    if not isinstance(key, str) or not re.fullmatch(r"[A-Za-z0-9_\-:.]{1,255}", key):
        raise HeyGenBadInputError("idempotency_key must be 1 to 255 characters of 'A-Za-z0-9_-:.'.")
    headers = {"Idempotency-Key": key}
    return Call(description=description, method="POST", path=path, headers=headers, read=_model(kind))


def create_overdub(request: CreateOverdubRequest, idempotency_key: str) -> Call[str]:
    """Start an overdub and return its id. A repeat under the same key starts no other one for 24 hours."""
    call = _once("the create request", _OVERDUBS, idempotency_key, _id_of)
    return replace(call, json=request.body())


def get_overdub(overdub_id: str) -> Call[Overdub]:
    """Read one overdub."""
    return _on_item("overdub", "GET", "GET", overdub_id)


def list_overdubs(limit: int, token: str | None) -> Call[OverdubPage]:
    """List one page of overdubs; ``limit`` is 1 to 100, ``token`` the ``next_token`` of the page before."""
    return _list(_page, limit, token)


def list_raw_overdubs(limit: int, token: str | None) -> Call[Statuses]:
    """List one page of overdubs as raw rows; see :func:`list_overdubs`."""
    return _list(lambda decoded, _: _statuses(decoded), limit, token)


def _list(read: Callable[[Any, Any], T], limit: int, token: str | None) -> Call[T]:
    if isinstance(limit, bool) or not isinstance(limit, int) or not 1 <= limit <= MAX_PAGE_SIZE:
        raise HeyGenBadInputError(f"limit must be a whole number from 1 to {MAX_PAGE_SIZE}, not {limit!r}.")
    params: dict[str, Any] = {"limit": limit, **({"token": token} if token else {})}
    return Call(description="the list of overdubs", method="GET", path=_OVERDUBS, params=params, read=read)


def list_statuses(overdub_ids: Iterable[str]) -> Call[Statuses]:
    """
    Read the status of up to 100 overdubs; ``lipsyncs`` only (contract, ``listLipsyncStatuses``).

    An id that HeyGen does not know has the status :data:`NOT_FOUND`.
    """
    return Call(
        description="the statuses of overdubs",
        method="GET",
        path=f"{_LIPSYNCS}/statuses",
        params={"lipsync_ids": ",".join(map(check_id, overdub_ids))},
        read=lambda decoded, _: _statuses(decoded, ("video_id", *_ID_NAMES), _BULK_STATUSES),
    )


def update_overdub(overdub_id: str, title: Any) -> Call[Overdub]:
    """Rename an overdub; HeyGen can change nothing else."""
    title = _text(title, (int, float))
    if not isinstance(title, str) or not title.strip() or title == "None":
        raise HeyGenBadInputError("title is empty or the text 'None'; pass a title.")
    return _on_item("overdub", "renaming", "PATCH", overdub_id, json={"title": title})


def delete_overdub(overdub_id: str) -> Call[None]:
    """Delete an overdub and its files. HeyGen does not document whether this cancels a running overdub."""
    return _on_item("overdub", "deletion", "DELETE", overdub_id, lambda *_: None)


def upload_asset(idempotency_key: str) -> Call[Asset]:
    """Upload one file as ``multipart/form-data``, field name ``file``; the transport adds the body."""
    return _once("the upload", _ASSETS, idempotency_key, Asset.model_validate)


def get_asset(asset_id: str) -> Call[Asset]:
    """Read one HeyGen asset."""
    return _on_item("asset", "GET", "GET", asset_id)


def delete_asset(asset_id: str) -> Call[None]:
    """Delete one HeyGen asset."""
    return _on_item("asset", "deletion", "DELETE", asset_id, lambda *_: None)


def get_api_key() -> Call[ApiKey]:
    """Read the scopes and the expiry of the connection's API key, free of charge."""
    read = _model(ApiKey.model_validate)
    return Call(description="the GET of the API key", method="GET", path="/v3/api_keys/self", read=read)


def create_direct_upload(idempotency_key: str, **file: str | int) -> Call[DirectUpload]:
    """
    Request a URL to upload one file to (step 1 of 3). Storage enforces size and checksum.

    :param file: ``filename``, ``content_type``, ``size_bytes`` and the hexadecimal ``checksum_sha256``.
    """
    kind = DirectUpload.model_validate
    call = _once("the request for a direct upload", _DIRECT_UPLOADS, idempotency_key, kind)
    return replace(call, json=file)


def complete_direct_upload(asset_id: str) -> Call[Asset]:
    """
    Create the HeyGen asset after the upload (step 3 of 3); it may be repeated.

    HeyGen returns 409 until it finds the file, which may take a moment.
    """
    return _on_item("asset", "completion", "POST", asset_id, step="/complete", json={}, transient_status=409)
