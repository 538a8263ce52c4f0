"""
HeyGen's overdub protocol without I/O.

Each function at the end builds one :class:`Call`: what to send, and how to read what comes back. The
worker's transport and the triggerer's (:mod:`.hooks.heygen`) use these and only these, so they cannot drift.

Requests are checked strictly, before anything is sent. Answers are read leniently: members may be missing,
null, renamed (``lipsync_id``) or unknown, and only what no client can work without is an error.

Facts come from the vendor's Overdub page and HeyGen's published OpenAPI; ``overdubs`` and ``lipsyncs`` are
the same resource before and after HeyGen's rename of April 2026.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from enum import StrEnum
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
)

if TYPE_CHECKING:
    from airflow_provider_heygen.connection import HeyGenConnection

T = TypeVar("T")

MAX_PAGE_SIZE = 100
"""The longest page HeyGen lists (vendor's page)."""

MAX_MULTIPART_BYTES = 32 * 1024 * 1024
"""The largest file ``POST /v3/assets`` takes: "32 MB", read generously (contract, x-limits)."""

DEFAULT_FAILURE_MESSAGE = "HeyGen gave no reason"
"""``failure_message`` may be null on a failed job (contract notes, section 11)."""


ID_NAMES = ("overdub_id", "lipsync_id", "id")
"""What an overdub's id is called in answers; which one depends on route and year (contract notes)."""


def redact_links(text: str) -> str:
    """
    Cut the query out of every link in a text.

    A presigned link is a bearer secret while it lives, and HeyGen quotes the links it was given.
    """
    text = re.sub(r"(?i)(https?://)[^\s/@\"'<>]*@", r"\1", text)
    # A link without a query matches, too: starting again inside of it would take quadratic time.
    text = re.sub(
        r"(?i)(https?://[^\s\"'<>?]*)(\?[^\s\"<>]+)?",  # an apostrophe may be part of a query
        lambda link: f"{link[1]}?***" if link[2] else link[1],
        text,
    )
    text = re.sub(r"\?[^\s\"'<>?]*=[^\s\"<>]*", "?***", text)
    # The same, percent-encoded: a link within a link.
    return re.sub(r"(?i)%3f(?:(?!%3[fd])[^\s\"<>])*%3d[^\s\"<>]*", "%3F***", text)


def _text(value: Any) -> Any:
    # A native template renders "2026" to a number, and an id of digits may come as one.
    value = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    # Half an emoji, where a text was cut, is valid JSON but can be neither stored nor logged.
    return value.encode(errors="replace").decode() if isinstance(value, str) else value


# --- What is sent -------------------------------------------------------------------------------------


def _https(url: str) -> str:
    return _url(url, schemes=("https",))


def _http_or_https(url: str) -> str:
    # That callbacks must be https is inferred, not documented: HeyGen decides, not we.
    return _url(url, schemes=("https", "http"))


def _url(url: str, *, schemes: tuple[str, ...]) -> str:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in schemes and bool(parts.hostname) and url.isprintable() and " " not in url
    except ValueError:
        usable = False
    if not usable:
        raise ValueError(f"must be a public {' or '.join(schemes)} URL")
    return url


class MediaUrl(BaseModel):
    """A file HeyGen downloads: public https, straight to the file, no login page in between."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    type: Literal["url"]
    url: Annotated[str, AfterValidator(_https)] = Field(repr=False)


def _not_none(text: str) -> str:
    if text == "None":
        raise ValueError("is the text 'None', which is what a template makes of a missing value")
    return text


def _unwrap_asset(value: Any) -> Any:
    # {"type": "asset_id", "asset_id": upload.output}: the upload operator returns a whole media input.
    return value.get("asset_id") if isinstance(value, Mapping) else value


class MediaAsset(BaseModel):
    """A file uploaded to HeyGen before."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

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
            raise ValueError("give exactly one of 'url' and 'asset_id'")
        if value.get("type") not in ("url", "asset_id"):
            raise ValueError("'type' must be 'url' or 'asset_id'")
    return value


MediaInput = Annotated[
    MediaUrl | MediaAsset,
    Field(discriminator="type"),
    BeforeValidator(_as_media),
]
"""An https URL, or ``{"type": "url", "url": ...}``, or ``{"type": "asset_id", "asset_id": ...}``."""


Text = Annotated[str, Field(min_length=1, pattern=r"\S"), BeforeValidator(_text), AfterValidator(_not_none)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class CreateOverdubRequest(BaseModel):
    """
    The body of a create: the 16 fields of the vendor's page, under their own names.

    ``None`` means "not given" and is left out, so that HeyGen's own default applies. What each is for is said
    at :class:`~airflow_provider_heygen.operators.overdub.HeyGenCreateOverdubOperator`.
    """

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    video: MediaInput
    audio: MediaInput
    title: Text | None = None
    mode: Literal["speed", "precision"] | None = None
    enable_caption: bool | None = None
    enable_dynamic_duration: bool | None = None
    disable_music_track: bool | None = None
    enable_speech_enhancement: bool | None = None
    enable_watermark: bool | None = None
    start_time: Seconds | None = None
    end_time: Seconds | None = None
    keep_the_same_format: bool | None = None
    fps_mode: Literal["vfr", "cfr", "passthrough"] | None = None
    callback_url: Annotated[str, AfterValidator(_http_or_https)] | None = Field(default=None, repr=False)
    callback_id: Text | None = None
    folder_id: Text | None = None

    @model_validator(mode="after")
    def _end_after_start(self) -> CreateOverdubRequest:
        if self.end_time is not None and self.end_time <= (self.start_time or 0):
            raise ValueError("end_time must be after start_time")
        return self

    @classmethod
    def of(cls, request: CreateOverdubRequest | Mapping[str, Any]) -> CreateOverdubRequest:
        """
        Check a mapping, or pass a checked request through.

        :raises HeyGenBadInputError: a field is wrong; the message names it and shows no value.
        """
        if isinstance(request, cls):
            return request
        try:
            return cls.model_validate(dict(request))
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(str(part) for part in problem['loc'][:1]) or 'request'}: "
                f"{problem['msg'].removeprefix('Value error, ')}"
                for problem in error.errors(include_input=False, include_url=False)
            )
            raise HeyGenBadInputError(
                f"The overdub request is wrong, nothing was sent: {problems}."
            ) from None

    def body(self) -> dict[str, Any]:
        """Give the JSON body: given fields only."""
        return self.model_dump(mode="json", exclude_none=True)


# --- What comes back ----------------------------------------------------------------------------------


def _none_if_odd(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    try:
        return handler(value)
    except ValidationError:
        return None


def _status_word(value: Any) -> str:
    # Goes into logs and messages, so it must be no more than a word.
    word = redact_links(_text(value)).strip().lower()[:100] if isinstance(value, str) else ""
    return word or "unknown"


Lenient = WrapValidator(_none_if_odd)
OptionalText = Annotated[str | None, BeforeValidator(_text), Lenient]
Id = Annotated[str, Field(min_length=1), BeforeValidator(_text)]


class OverdubStatus(StrEnum):
    """HeyGen's status words for this resource; the last two are final."""

    PENDING = "pending"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"


Status = Annotated[OverdubStatus | str, Field(union_mode="left_to_right"), BeforeValidator(_status_word)]


class Overdub(BaseModel):
    """
    One overdub as HeyGen reports it.

    :param overdub_id: its id; also as ``id``, the vendor's word here.
    :param status: an :class:`OverdubStatus`, or HeyGen's word where that is not one of the four.
    :param title: display name.
    :param duration: length of the output in seconds, when completed; what HeyGen bills.
    :param video_url: presigned link to the output, when completed; a secret that expires.
    :param caption_url: presigned link to the captions (``lipsyncs`` only).
    :param callback_id: the id given at creation.
    :param created_at: Unix seconds.
    :param failure_message: why it failed, when it failed and HeyGen says.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", hide_input_in_errors=True)

    overdub_id: Id = Field(validation_alias=AliasChoices("id", "overdub_id", "lipsync_id"))
    status: Status = "unknown"
    title: OptionalText = None
    duration: Annotated[float | None, Field(allow_inf_nan=False), Lenient] = None
    video_url: Annotated[str | None, Lenient] = Field(default=None, repr=False)
    caption_url: Annotated[str | None, Lenient] = Field(default=None, repr=False)
    callback_id: OptionalText = None
    created_at: Annotated[int | None, Lenient] = None
    failure_message: OptionalText = None

    @property
    def id(self) -> str:
        """The vendor's word for :attr:`overdub_id`."""
        return self.overdub_id

    @property
    def is_final(self) -> bool:
        """Whether the status will not change any more. A word we do not know is not final."""
        return self.status in (OverdubStatus.COMPLETED, OverdubStatus.FAILED)

    @property
    def is_completed(self) -> bool:
        """Whether the result is there."""
        return self.status == OverdubStatus.COMPLETED

    def raise_for_failure(self) -> Overdub:
        """
        Return the overdub, unless it has failed.

        :raises HeyGenOverdubFailedError: if HeyGen says that it failed; the message has HeyGen's reason.
        """
        if self.status == OverdubStatus.FAILED:
            reason = redact_links(self.failure_message or DEFAULT_FAILURE_MESSAGE)
            raise HeyGenOverdubFailedError(
                f"Overdub {self.overdub_id} failed: {reason}", overdub_id=self.overdub_id
            )
        return self

    def details(self) -> dict[str, Any]:
        """Give what may be stored and shown: everything but the presigned links."""
        shown = self.model_dump(mode="json", exclude={"video_url", "caption_url"})
        return {
            name: redact_links(value) if isinstance(value, str) else value for name, value in shown.items()
        }


class OverdubPage(BaseModel):
    """
    One page of the list; ``next_token`` is ``None`` on the last one.

    :param server_time: HeyGen's clock when it answered, in Unix seconds (its ``Date`` header), if known.
    """

    model_config = ConfigDict(frozen=True)

    data: list[Overdub]
    has_more: bool
    next_token: str | None
    server_time: float | None = None


# The bulk call speaks the language of batches, or of HeyGen's older videos (contract notes, section 11).
_BULK_WORDS = {"queued": "pending", "waiting": "pending", "processing": "running"}

NOT_FOUND = "not_found"
"""The status that the bulk call gives to ids it does not know."""


class Statuses(NamedTuple):
    """
    What is known of many overdubs at once, for a poller that reads thousands and needs few.

    :param rows: the raw rows by overdub id, for :func:`overdub_of`.
    :param next_token: the next page, ``None`` on the last one.
    """

    rows: dict[str, dict[str, Any]]
    next_token: str | None


class Asset(BaseModel):
    """An uploaded file: ``asset_id`` is what a create takes, ``size_bytes`` is in bytes."""

    model_config = ConfigDict(frozen=True, extra="ignore", hide_input_in_errors=True)

    asset_id: Id = Field(validation_alias=AliasChoices("asset_id", "id"))
    url: Annotated[str | None, Lenient] = Field(default=None, repr=False)
    mime_type: OptionalText = None
    size_bytes: Annotated[int | None, Lenient] = None


class DirectUpload(BaseModel):
    """
    Where a file above 32 MB goes.

    :param asset_id: what it will be called; not usable before the upload is complete.
    :param upload_url: presigned storage URL for one PUT of the whole file; a secret that expires.
    :param upload_headers: to be sent with it as they are; signed.
    :param expires_in_seconds: life of the URL.
    :param max_bytes: the largest file.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", hide_input_in_errors=True)

    asset_id: Id
    upload_url: str = Field(min_length=1, repr=False)
    upload_headers: dict[str, Annotated[str, BeforeValidator(_text)]] = Field(
        default_factory=dict, repr=False
    )
    expires_in_seconds: Annotated[float | None, Lenient] = None
    max_bytes: Annotated[int | None, Lenient] = None


def _direct_upload(answer: Any) -> DirectUpload:
    data = _data(answer, dict)
    check_id(data.get("asset_id"), "asset_id")
    try:
        return DirectUpload.model_validate({**data, "upload_headers": data.get("upload_headers") or {}})
    except ValidationError:
        raise ValueError("there is no usable upload_url or upload_headers in it") from None


def _data(answer: Any, kind: type) -> Any:
    data = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(data, kind):
        raise ValueError("there is no usable 'data' in it")
    return data


def _id_of(row: Any, names: tuple[str, ...] = ID_NAMES) -> str:
    for name in filter(row.get, names) if isinstance(row, dict) else ():
        with suppress(HeyGenBadInputError):
            return check_id(_text(row.get(name)))
    raise ValueError("there is no overdub_id in it")


def _statuses(answer: Any, id_names: tuple[str, ...] = ID_NAMES) -> Statuses:
    rows = {}
    for row in _data(answer, list):
        with suppress(ValueError):  # one row we cannot read must not hide the others
            rows[_id_of(row, id_names)] = row
    token = answer.get("next_token")
    token = token if isinstance(token, str) and token else None
    # Neither member is marked as required: without a token there is no next page, whatever has_more says.
    return Statuses(rows, token if answer.get("has_more") is not False else None)


def _bulk_statuses(answer: Any) -> Statuses:
    rows, token = _statuses(answer, ("video_id", *ID_NAMES))
    for row in rows.values():
        if isinstance(row.get("status"), str):
            row["status"] = _BULK_WORDS.get(row["status"], row["status"])
    return Statuses(rows, token)


def overdub_of(overdub_id: str, row: Mapping[str, Any]) -> Overdub:
    """
    Read one raw row.

    :raises ValueError: it cannot be read.
    """
    return Overdub.model_validate({**row, "id": overdub_id})


def _page(answer: Any) -> OverdubPage:
    rows, token = _statuses(answer)
    data = []
    for overdub_id, row in rows.items():
        with suppress(ValueError):
            data.append(overdub_of(overdub_id, row))
    return OverdubPage(data=data, has_more=token is not None, next_token=token)


# --- Calls --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Call(Generic[T]):
    """
    One HTTP request, and how to read its answer.

    :param what: the call in words, for messages.
    :param read: turns the decoded JSON into the result, or raises ``ValueError``.
    :param body_matters: whether a 2xx answer with an empty body is an error, as one that is not JSON is.
    :param not_yet: an error status that calls for patience here, and nowhere else.
    :param read_headers: adds to the result what the headers say.
    """

    what: str
    method: Literal["GET", "POST", "PATCH", "DELETE"]
    path: str
    read: Callable[[Any], T]
    params: Mapping[str, str | int] = field(default_factory=dict)
    json: Mapping[str, Any] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    body_matters: bool = True
    not_yet: int | None = None
    read_headers: Callable[[T, Mapping[str, str]], T] = lambda result, _: result

    def answer(self, status: int, headers: Mapping[str, str], body: bytes, connection: HeyGenConnection) -> T:
        """
        Turn an HTTP answer into the result.

        :param headers: the answer's headers, looked up case-insensitively.
        :raises HeyGenTransientError: if a repeat may succeed (429, 5xx, 409 in progress, unreadable).
        :raises HeyGenGatewayError: if something in between answered: nobody knows what HeyGen did.
        :raises HeyGenPermanentError: if HeyGen rejected the request; the message says what to change.
        """
        try:
            decoded = json.loads(body)
        except (ValueError, RecursionError):
            decoded = None
        if not 200 <= status < 300:
            raise _error(self, status, headers, decoded, connection)
        if _envelope(decoded) and not decoded.get("data"):
            # HeyGen's older routes report errors with status 200; the code says which status is meant.
            raise _error(
                self, _STATUS_BY_CODE.get(decoded["error"].get("code"), 400), headers, decoded, connection
            )
        if decoded is None and (self.body_matters or body):
            kind = _shown(headers.get("Content-Type"), connection) or "no content type"
            raise HeyGenGatewayError(
                f"HeyGen answered {status} to {self.what} without JSON ({kind}, {len(body)} bytes)."
                f" If this goes on, check the host of Airflow connection '{connection.conn_id}'.",
                status_code=status,
                outcome_unknown=self.method != "GET",
            )
        try:
            return self.read_headers(self.read(decoded), headers)
        except ValueError as error:  # pydantic's ValidationError is one
            reason = "it has no id" if isinstance(error, ValidationError) else str(error)
            raise HeyGenTransientError(
                f"HeyGen's answer to {self.what} cannot be used: {reason}.",
                status_code=status,
                outcome_unknown=self.method != "GET",
            ) from None


def _envelope(decoded: Any) -> Mapping[str, Any]:
    """Return HeyGen's ``error`` envelope, or an empty mapping if this is not HeyGen's word."""
    envelope = decoded.get("error") if isinstance(decoded, dict) else None
    envelope = envelope if isinstance(envelope, dict) else {}
    return (
        envelope if any(isinstance(envelope.get(n), str) and envelope[n] for n in ("code", "message")) else {}
    )


_COLLECTION_404 = (
    "The whole route is missing there. HeyGen renamed overdubs to lipsyncs in 2026: set the extra 'resource'"
    " of Airflow connection '{conn_id}' to '{other}' (it is '{resource}'), or check its host"
)

_NEXT_STEP = {
    400: "Correct the request",
    401: "Check the password of Airflow connection '{conn_id}' and its extra 'auth_type' ('{auth_type}')",
    402: "Top up: API keys draw on the API wallet, OAuth tokens on the web plan",
    403: "The credential of Airflow connection '{conn_id}' is valid but may not do this",
    404: "It was deleted, never existed or belongs to another account than Airflow connection '{conn_id}';"
    " or the connection's extra 'resource' ('{resource}') is the wrong name",
    409: "It is in a state that does not allow this",
    413: "HeyGen takes files up to 32 MB here",
    422: "Correct the request",
    429: "The account's quota is used up; waiting a little does not help",
}

_DIRECT_UPLOADS = "/v3/assets/direct-uploads"

_NEXT_STEP_BY_CODE = {
    "download_failed": "HeyGen could not fetch an input: the URL must be public https straight to the file,"
    " or upload the file and pass its asset_id",
    "asset_not_found": "Upload the file with the same credential and pass the new asset_id",
}

# Which status a code has (contract, x-error-catalog), for an error that comes with status 200.
_STATUS_BY_CODE = {
    "authentication_failed": 401,
    "unauthorized": 401,
    "insufficient_credit": 402,
    "trial_limit_exceeded": 402,
    "plan_upgrade_required": 402,
    "subscription_required": 402,
    "forbidden": 403,
    "resource_access_denied": 403,
    "insufficient_api_key_scope": 403,
    "not_found": 404,
    "resource_not_found": 404,
    "asset_not_found": 404,
    "conflict": 409,
    "rate_limit_exceeded": 429,
    "quota_exceeded": 429,
    "internal_error": 500,
    "service_unavailable": 503,
    "gateway_timeout": 504,
}

# Codes that call for patience although their status does not (contract, x-error-catalog).
_WAITING_CODES = {"request_in_progress", "resource_not_ready", "asset_not_available"}


def _shown(value: Any, connection: HeyGenConnection) -> str | None:
    """Give what came back from the network without secrets and not endless, for a message."""
    return connection.redact(redact_links(_text(value)))[:1000] if isinstance(value, str) and value else None


def _error(
    call: Call[Any], status: int, headers: Mapping[str, str], decoded: Any, connection: HeyGenConnection
) -> HeyGenError:
    envelope = _envelope(decoded)
    code, said, param, doc_url = (
        _shown(envelope.get(name), connection) for name in ("code", "message", "param", "doc_url")
    )
    request_id = _shown(headers.get("X-Request-Id"), connection)
    details: dict[str, Any] = {
        "status_code": status,
        "code": code,
        "param": param,
        "doc_url": doc_url,
        "request_id": request_id,
        "retry_after": _retry_after(headers.get("Retry-After")),
    }
    message = f"HeyGen answered {status}{f' {code}' if code else ''} to {call.what}"
    message += f": {said}" if said else "."
    message = message if message.endswith((".", "!", "?")) else f"{message}."
    trace = f" (request {request_id})" if request_id else ""

    in_doubt = call.method != "GET"
    if not envelope or status < 200:
        # A page of something in between. It may also stand for a response that HeyGen did give.
        kind = _shown(headers.get("Content-Type"), connection) or "no content type"
        step = (
            f" {_next_step(call, status, None, connection)}." if status // 100 == 3 or status == 404 else ""
        )
        message += (
            f" The response ({kind}) does not have the form of HeyGen's errors, so it came from a"
            " gateway, proxy or firewall in between. If this goes on, check these and the host of"
            f" Airflow connection '{connection.conn_id}'.{step}{trace}"
        )
        return HeyGenGatewayError(message, outcome_unknown=in_doubt, **details)
    if _is_transient(call, status, code):
        # 429 and the waiting codes say that nothing was done, 408 and 5xx say nothing at all.
        in_doubt = in_doubt and (status >= 500 or status == 408)
        return HeyGenTransientError(message + trace, outcome_unknown=in_doubt, **details)
    step = _next_step(call, status, code, connection)
    if param:
        step += f" (field '{param}')"
    if doc_url:
        step += f"; see {doc_url}"
    message = f"{message} {step}.{trace}"
    return (HeyGenNotFoundError if status == 404 else HeyGenPermanentError)(message, **details)


def _is_transient(call: Call[Any], status: int, code: str | None) -> bool:
    """Return whether an error of HeyGen's own is likely to pass."""
    # A second request under a key that is still being worked on; bodies without a code were seen.
    in_progress = status == 409 and code is None and "Idempotency-Key" in call.headers
    spent = status == 429 and re.search("trial|quota", code or "")
    waits = code in _WAITING_CODES or in_progress or status in (408, 425, call.not_yet)
    return waits or status >= 500 or (status == 429 and not spent)


def _next_step(call: Call[Any], status: int, code: str | None, connection: HeyGenConnection) -> str:
    """Return what to do about an error, without a full stop."""
    if 300 <= status < 400:
        step = (
            "Redirects are not followed, the credential would travel along:"
            " put the final base URL into the host of Airflow connection '{conn_id}'"
        )
    elif status == 404 and code != "asset_not_found" and call.path == f"/v3/{connection.resource}":
        step = _COLLECTION_404
    elif status == 404 and call.path == _DIRECT_UPLOADS:
        step = "This API has no direct uploads: make the file smaller than 32 MB, or pass a public https URL"
    else:
        step = _NEXT_STEP_BY_CODE.get(code or "", _NEXT_STEP.get(status, "Correct the request"))
    other = "lipsyncs" if connection.resource == "overdubs" else "overdubs"
    for name, value in {
        "conn_id": connection.conn_id,
        "auth_type": connection.auth_type,
        "resource": connection.resource,
        "other": other,
    }.items():
        step = step.replace(f"{{{name}}}", value)
    return step


def _retry_after(value: str | None) -> float | None:
    """Read ``Retry-After``: whole seconds (HeyGen's documentation) or an HTTP date (RFC 9110)."""
    if value and value.isascii() and value.strip().isdigit():
        # More digits are no wait but nonsense, which a timedelta could not hold.
        return float(value) if len(value) < 10 else None
    moment = _http_date(value)
    return None if moment is None else max(0.0, moment - datetime.now(UTC).timestamp())


def _http_date(value: str | None) -> float | None:
    """Read an HTTP date as Unix seconds."""
    try:
        moment = parsedate_to_datetime(value or "")
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, TypeError, OverflowError):
        return None


def check_id(overdub_id: Any, name: str = "overdub_id") -> str:
    """
    Give an id that is safe as one segment of a path.

    :raises HeyGenBadInputError: empty, not text, or with a character that would lead to another path.
    """
    overdub_id = _text(overdub_id)
    if not isinstance(overdub_id, str) or not overdub_id.strip():
        raise HeyGenBadInputError(f"{name} is empty or not text; pass the id that a create returned.")
    if overdub_id == "None":
        # What a template makes of an XCom that is not there.
        raise HeyGenBadInputError(
            f"{name} is the text 'None'; the task it should come from returned nothing."
        )
    if overdub_id in (".", "..") or re.search(r"[\s/\\?#%]", overdub_id) or not overdub_id.isprintable():
        raise HeyGenBadInputError(
            f"{name} {redact_links(overdub_id)!r} is not an id: it has characters of a path or query."
        )
    return overdub_id


def _item_path(resource: str, overdub_id: str) -> str:
    return f"/v3/{resource}/{quote(check_id(overdub_id), safe='')}"


def _read_overdub(overdub_id: str) -> Callable[[Any], Overdub]:
    # We know which one we asked for, so its id may be missing from the answer.
    return lambda answer: Overdub.model_validate({**_data(answer, dict), "id": overdub_id})


def create_overdub(resource: str, request: CreateOverdubRequest, idempotency_key: str) -> Call[str]:
    """Start an overdub; the result is its id. The key makes a repetition harmless for 24 hours."""
    return Call(
        what="the create",
        method="POST",
        path=f"/v3/{resource}",
        headers={"Idempotency-Key": _check_key(idempotency_key)},
        json=request.body(),
        read=lambda answer: _id_of(_data(answer, dict)),
    )


def get_overdub(resource: str, overdub_id: str) -> Call[Overdub]:
    """Read one overdub."""
    return Call(
        what=f"the look at overdub '{overdub_id}'",
        method="GET",
        path=_item_path(resource, overdub_id),
        read=_read_overdub(overdub_id),
    )


def list_overdubs(resource: str, limit: int, token: str | None) -> Call[OverdubPage]:
    """List one page of overdubs; ``limit`` is 1 to 100, ``token`` the ``next_token`` of the page before."""
    if isinstance(limit, bool) or not isinstance(limit, int) or not 1 <= limit <= MAX_PAGE_SIZE:
        raise HeyGenBadInputError(f"limit must be a whole number from 1 to {MAX_PAGE_SIZE}, not {limit!r}.")
    return Call(
        what="the list of overdubs",
        method="GET",
        path=f"/v3/{resource}",
        params={"limit": limit, **({"token": token} if token else {})},
        read=_page,
        read_headers=lambda page, headers: page.model_copy(
            update={"server_time": _http_date(headers.get("Date"))}
        ),
    )


def skim_overdubs(resource: str, limit: int, token: str | None) -> Call[Statuses]:
    """:func:`list_overdubs`, with the rows left as they are."""
    call = list_overdubs(resource, limit, token)
    return Call(what=call.what, method="GET", path=call.path, params=call.params, read=_statuses)


def list_statuses(overdub_ids: Iterable[str]) -> Call[Statuses]:
    """
    Read the status of up to 100 overdubs; ``lipsyncs`` only (contract, ``listLipsyncStatuses``).

    An id that HeyGen does not know has the status :data:`NOT_FOUND`.
    """
    return Call(
        what="the statuses of overdubs",
        method="GET",
        path="/v3/lipsyncs/statuses",
        params={"lipsync_ids": ",".join(check_id(overdub_id) for overdub_id in overdub_ids)},
        read=_bulk_statuses,
    )


def update_overdub(resource: str, overdub_id: str, title: str) -> Call[Overdub]:
    """Rename an overdub: ``title`` is all that HeyGen lets us change."""
    title = _text(title)
    if not isinstance(title, str) or not title.strip():
        raise HeyGenBadInputError("title is empty; an overdub cannot be renamed to nothing.")
    if title == "None":
        raise HeyGenBadInputError(
            "title is the text 'None', which is what a template makes of a missing value."
        )
    return Call(
        what=f"the renaming of overdub '{overdub_id}'",
        method="PATCH",
        path=_item_path(resource, overdub_id),
        json={"title": title},
        read=_read_overdub(overdub_id),
    )


def delete_overdub(resource: str, overdub_id: str) -> Call[None]:
    """Delete an overdub and its files for good. Whether this cancels a running one is not documented."""
    return Call(
        what=f"the deletion of overdub '{overdub_id}'",
        method="DELETE",
        path=_item_path(resource, overdub_id),
        read=lambda _: None,
        body_matters=False,
    )


def upload_asset(idempotency_key: str) -> Call[Asset]:
    """Upload one file as ``multipart/form-data``; the transport adds the body, field name ``file``."""
    return Call(
        what="the upload",
        method="POST",
        path="/v3/assets",
        headers={"Idempotency-Key": _check_key(idempotency_key)},
        read=lambda answer: Asset.model_validate(_data(answer, dict)),
    )


def create_direct_upload(
    *, filename: str, content_type: str, size_bytes: int, checksum_sha256: str, idempotency_key: str
) -> Call[DirectUpload]:
    """Ask for a URL to upload one file to, step 1 of 3; storage enforces size and checksum (hexadecimal)."""
    return Call(
        what="the request for a direct upload",
        method="POST",
        path=_DIRECT_UPLOADS,
        headers={"Idempotency-Key": _check_key(idempotency_key)},
        json={
            "filename": filename,
            "content_type": content_type,
            "size_bytes": size_bytes,
            "checksum_sha256": checksum_sha256,
        },
        read=_direct_upload,
    )


def complete_direct_upload(asset_id: str) -> Call[Asset]:
    """
    Make an asset of what was uploaded, step 3 of 3. May be repeated.

    HeyGen answers 409 as long as it does not see the file, which may last a little after the upload.
    """
    return Call(
        what=f"the completion of asset '{asset_id}'",
        method="POST",
        path=f"/v3/assets/{quote(check_id(asset_id, 'asset_id'), safe='')}/complete",
        json={},
        read=lambda answer: Asset.model_validate({**_data(answer, dict), "asset_id": asset_id}),
        not_yet=409,
    )


def _check_key(key: str) -> str:
    if not isinstance(key, str) or not re.fullmatch(r"[A-Za-z0-9_\-:.]{1,255}", key):
        raise HeyGenBadInputError("idempotency_key must be 1 to 255 characters of A-Z a-z 0-9 _ - : . ")
    return key
