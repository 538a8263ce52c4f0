"""
HeyGen's overdub protocol without I/O.

Each function at the end builds one :class:`Call`: what to send, and how to read the response. Both transports
use these and only these, so they agree. Requests are validated strictly before anything is sent. Responses
are read leniently: members may be missing, null, renamed (``lipsync_id``) or unknown.

``overdubs`` and ``lipsyncs`` are the same resource before and after HeyGen's rename of April 2026.
"""

from __future__ import annotations

import json
import re
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
)

if TYPE_CHECKING:
    from airflow_provider_heygen.connection import HeyGenConnection

T = TypeVar("T")

MAX_PAGE_SIZE = 100  # of the list endpoint (HeyGen's page "Create Overdub")
MAX_MULTIPART_BYTES = 32 * 1024 * 1024  # for POST /v3/assets: "32 MB", read generously (contract, x-limits)
DEFAULT_FAILURE_MESSAGE = "HeyGen gave no reason"  # it may be null (contract, Overdub.failure_message)
# Members that may hold an overdub's id; which one depends on endpoint and year (contract, x-rename).
ID_NAMES = ("overdub_id", "lipsync_id", "id")


def redact_urls(text: str) -> str:
    """Cut the query out of every URL in a text: a presigned URL is a secret, and HeyGen quotes URLs."""
    text = re.sub(r"(?i)(https?://)[^\s/@\"'<>]*@", r"\1", text)
    # In other schemes, a user without a password is an Airflow connection id: s3://aws_default@bucket.
    text = re.sub(r"(://)[^\s/@:\"'<>]*:[^\s/@\"'<>]*@", r"\1", text)
    # A link without a query matches, too: starting again inside of it would take quadratic time.
    text = re.sub(
        r"(?i)(https?://[^\s\"'<>?]*)(\?[^\s\"<>]+)?",  # an apostrophe may be part of a query
        lambda link: f"{link[1]}?***" if link[2] else link[1],
        text,
    )
    text = re.sub(r"\?[^\s\"'<>?]*=[^\s\"<>]*", "?***", text)
    # The same, percent-encoded: a link within a link.
    return re.sub(r"(?i)%3f(?:(?!%3[fd])[^\s\"<>])*%3d[^\s\"<>]*", "%3F***", text)


def _text(value: Any, numbers: tuple[type, ...] = (int,)) -> Any:
    # A native template renders "2026" to a number, and an id of digits may come as one. A float is no id:
    # it is what a native template makes of "12e4", which cannot be restored.
    value = str(value) if isinstance(value, numbers) and not isinstance(value, bool) else value
    # Half an emoji, where a text was cut, is valid JSON but can be neither stored nor logged.
    return value.encode(errors="replace").decode() if isinstance(value, str) else value


# --- What is sent -------------------------------------------------------------------------------------


def _url(*schemes: str) -> AfterValidator:
    def check(url: str) -> str:
        try:
            parts = urlsplit(url)
            usable = parts.scheme in schemes and bool(parts.hostname) and url.isprintable() and " " not in url
        except ValueError:
            usable = False
        if not usable:
            raise ValueError(f"must be a public {' or '.join(schemes)} URL")
        return url

    return AfterValidator(check)


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)


class MediaUrl(_Request):
    """A file that HeyGen downloads: public https, straight to the file, at most 32 MB."""

    type: Literal["url"]
    url: Annotated[str, _url("https")] = Field(repr=False)


def _not_none(text: str) -> str:
    if text == "None":
        raise ValueError("is the text 'None', which is what a template makes of a missing value")
    return text


def _unwrap_asset(value: Any) -> Any:
    # {"type": "asset_id", "asset_id": upload.output}: the upload operator returns a whole media input.
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
            raise ValueError("give exactly one of 'url' and 'asset_id'")
        if value.get("type") not in ("url", "asset_id"):
            raise ValueError("'type' must be 'url' or 'asset_id'")
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
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class CreateOverdubRequest(_Request):
    """
    The body of a create request: HeyGen's 16 fields, and others in ``extra_body``.

    A field that is ``None`` is not sent, so HeyGen's own default applies. The fields are described at
    :class:`~airflow_provider_heygen.operators.overdub.HeyGenCreateOverdubOperator`.
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
        Validate a mapping; return a request as it is.

        :raises HeyGenBadInputError: if a field is wrong. The message names the field and shows no value.
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
        """Return the JSON body: given fields only."""
        fields: dict[str, Any] = self.model_dump(mode="json", exclude_none=True, exclude={"extra_body"})
        return fields | (self.extra_body or {})


# --- What comes back ----------------------------------------------------------------------------------


def _none_if_invalid(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    try:
        return handler(value)
    except ValidationError:
        return None


def _status_word(value: Any) -> str:
    # Goes into logs and messages, so it must be no more than a word.
    word = redact_urls(_text(value)).strip().lower()[:100] if isinstance(value, str) else ""
    return word or "unknown"


Lenient = WrapValidator(_none_if_invalid)
OptionalText = Annotated[str | None, BeforeValidator(_text), Lenient]
OptionalInt = Annotated[int | None, Lenient]
Id = Annotated[str, Field(min_length=1), BeforeValidator(_text)]


class OverdubStatus(StrEnum):
    """HeyGen's statuses of this resource; the last two are final."""

    PENDING = "pending"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"


Status = Annotated[OverdubStatus | str, Field(union_mode="left_to_right"), BeforeValidator(_status_word)]


class _Response(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", hide_input_in_errors=True)


class Overdub(_Response):
    """
    One overdub as HeyGen reports it.

    :param overdub_id: id; also as ``id``, HeyGen's name.
    :param status: an :class:`OverdubStatus`, or HeyGen's text if it is none of the four.
    :param title: display name.
    :param duration: length of a completed output in seconds, which HeyGen bills.
    :param video_url: presigned URL of a completed output; a secret that expires.
    :param caption_url: presigned URL of the captions (``lipsyncs`` only).
    :param callback_id: the id given at creation.
    :param created_at: Unix seconds.
    :param failure_message: HeyGen's reason for a failure, if it states one.
    """

    overdub_id: Id = Field(validation_alias=AliasChoices("id", "overdub_id", "lipsync_id"))
    status: Status = "unknown"
    title: OptionalText = None
    duration: Annotated[float | None, Field(allow_inf_nan=False), Lenient] = None
    video_url: Annotated[str | None, Lenient] = Field(default=None, repr=False)
    caption_url: Annotated[str | None, Lenient] = Field(default=None, repr=False)
    callback_id: OptionalText = None
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

        :raises HeyGenOverdubFailedError: if HeyGen says that it failed; the message has HeyGen's reason.
        """
        if self.status == OverdubStatus.FAILED:
            reason = redact_urls(self.failure_message or DEFAULT_FAILURE_MESSAGE)
            named = f"{self.overdub_id} ({self.title!r})" if self.title else self.overdub_id
            raise HeyGenOverdubFailedError(f"Overdub {named} failed: {reason}", overdub_id=self.overdub_id)
        return self

    def details(self) -> dict[str, Any]:
        """Return what may be stored and shown: everything except the presigned URLs."""
        shown = self.model_dump(mode="json", exclude={"video_url", "caption_url"})
        return {
            name: redact_urls(value) if isinstance(value, str) else value for name, value in shown.items()
        }


class OverdubPage(_Response):
    """
    One page of the list endpoint; ``next_token`` is ``None`` on the last one.

    :param server_time: HeyGen's clock in Unix seconds (its ``Date`` header), if known.
    """

    data: list[Overdub]
    has_more: bool
    next_token: str | None
    server_time: float | None = None


# Batches and HeyGen's older videos have these statuses (contract, ``LipsyncStatusEntry.status``).
_BULK_STATUSES = {"queued": "pending", "waiting": "pending", "processing": "running"}
NOT_FOUND = "not_found"  # the status of an id that the bulk status endpoint does not know


class Statuses(NamedTuple):
    """
    The statuses of many overdubs at once, for a poller that reads thousands and needs few.

    :param rows: the raw rows by overdub id, for :func:`parse_overdub`.
    :param next_token: the next page, ``None`` on the last one.
    """

    rows: dict[str, dict[str, Any]]
    next_token: str | None


class Asset(_Response):
    """
    An uploaded file; a create request accepts its ``asset_id``.

    HeyGen returns ``mime_type`` and ``size_bytes`` after an upload, ``name``, ``type`` and ``uploaded_at``
    (Unix seconds) later.
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
    """The API key of the connection: what it may do, and until when in Unix seconds (``None``: for ever)."""

    scope_mode: OptionalText = None
    scopes: Annotated[list[str] | None, Lenient] = None
    expires_at: OptionalInt = None

    def limits(self) -> list[str]:
        """Return what the key may not do, and when it expires if that is within 14 days, in sentences."""
        granted = self.scopes or (["*:read"] if self.scope_mode == "read_only" else ["*:*"])
        said = [
            f"It may not {what}: for that, add the scope '{scope}' to it."
            for scope, what in _SCOPES.items()
            if not any(fnmatchcase(scope, pattern) for pattern in granted)
        ]
        now = datetime.now(UTC).timestamp()
        if self.expires_at is not None and self.expires_at < now + 14 * 24 * 3600:
            said.append(f"It expires at {datetime.fromtimestamp(self.expires_at, UTC):%Y-%m-%d %H:%M} UTC.")
        return said


class DirectUpload(_Response):
    """
    The place for a file above 32 MB.

    :param asset_id: id of the future asset; not usable before the upload is complete.
    :param upload_url: presigned storage URL for one PUT of the whole file; a secret that expires.
    :param upload_headers: headers to send with it unchanged; signed.
    :param expires_in_seconds: lifetime of the URL.
    :param max_bytes: size of the largest file.
    """

    asset_id: Id
    upload_url: str = Field(min_length=1, repr=False)
    upload_headers: dict[str, Annotated[str, BeforeValidator(_text)]] = Field(
        default_factory=dict, repr=False
    )
    expires_in_seconds: Annotated[float | None, Lenient] = None
    max_bytes: OptionalInt = None


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
        with suppress(ValueError):  # one unreadable row must not hide the others
            rows[_id_of(row, id_names)] = row
    token = answer.get("next_token")
    token = token if isinstance(token, str) and token else None
    # Neither member is marked as required: without a token there is no next page, whatever has_more says.
    return Statuses(rows, token if answer.get("has_more") is not False else None)


def _bulk_statuses(answer: Any) -> Statuses:
    rows, token = _statuses(answer, ("video_id", *ID_NAMES))
    for row in rows.values():
        if isinstance(row.get("status"), str):
            row["status"] = _BULK_STATUSES.get(row["status"], row["status"])
    return Statuses(rows, token)


def parse_overdub(overdub_id: str, row: Mapping[str, Any]) -> Overdub:
    """Return the overdub of one raw row; raise ``ValueError`` if it cannot be read."""
    return Overdub.model_validate({**row, "id": overdub_id})


def _page(answer: Any) -> OverdubPage:
    rows, token = _statuses(answer)
    data = []
    for overdub_id, row in rows.items():
        with suppress(ValueError):
            data.append(parse_overdub(overdub_id, row))
    return OverdubPage(data=data, has_more=token is not None, next_token=token)


# --- Calls --------------------------------------------------------------------------------------------

_COLLECTIONS = ("/v3/overdubs", "/v3/lipsyncs")


@dataclass(frozen=True, kw_only=True)
class Call(Generic[T]):
    """
    One HTTP request, and how to read its response.

    :param what: the call in words, for messages.
    :param path: path of the URL; under ``overdubs`` if the call is ``renamed``.
    :param read: turns the decoded JSON into the result, or raises ``ValueError``.
    :param renamed: whether the path depends on HeyGen's name for the resource, which :meth:`under` sets.
    :param requires_body: whether a 2xx response with an empty body is an error, as one that is not JSON is.
    :param transient_status: an error status that is transient for this call only.
    :param read_headers: adds to the result what the headers say.
    """

    what: str
    method: Literal["GET", "POST", "PATCH", "DELETE"]
    path: str
    read: Callable[[Any], T]
    renamed: bool = False
    params: Mapping[str, str | int] = field(default_factory=dict)
    json: Mapping[str, Any] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    requires_body: bool = True
    transient_status: int | None = None
    read_headers: Callable[[T, Mapping[str, str]], T] = lambda result, _: result

    def under(self, resource: str) -> Call[T]:
        """Return the call as it is sent under a name of the resource."""
        path = self.path.replace("overdubs", resource, 1) if self.renamed else self.path
        return replace(self, path=path, renamed=False)

    @property
    def is_collection(self) -> bool:
        """Whether the call concerns the resource as a whole: a list or a create request."""
        return self.path in _COLLECTIONS

    @property
    def scope(self) -> str:
        """The scope that a restricted API key needs for the call."""
        kind = {"assets": "assets", "api_keys": "account"}.get(self.path.split("/")[2], "lipsync")
        return f"{kind}:{'read' if self.method == 'GET' else 'write'}"

    def answer(self, status: int, headers: Mapping[str, str], body: bytes, connection: HeyGenConnection) -> T:
        """
        Turn an HTTP response into the result.

        :param headers: the response's headers, looked up case-insensitively.
        :raises HeyGenTransientError: if a repeat may succeed (429, 5xx, 409 in progress, unreadable).
        :raises HeyGenGatewayError: if something in between responded: what HeyGen did is not known.
        :raises HeyGenPermanentError: if HeyGen rejected the request; the message says what to change.
        """
        try:
            decoded = json.loads(body)
        except (ValueError, RecursionError):
            decoded = None
        if not 200 <= status < 300:
            raise _error(self, status, headers, decoded, connection)
        if _envelope(decoded) and not decoded.get("data"):
            # HeyGen's older endpoints report errors with status 200; the code says which status is meant.
            status = _STATUS_BY_CODE.get(decoded["error"].get("code"), 400)
            raise _error(self, status, headers, decoded, connection)
        in_doubt = self.method != "GET"
        if decoded is None and (self.requires_body or body):
            raise HeyGenGatewayError(
                f"HeyGen returned {status} for {self.what} without JSON"
                f" ({_content_type(headers, connection)}, {len(body)} bytes). If this"
                f" persists, check the host of Airflow connection '{connection.conn_id}'.",
                status_code=status,
                outcome_unknown=in_doubt,
            )
        try:
            return self.read_headers(self.read(decoded), headers)
        except ValueError as error:  # pydantic's ValidationError is one
            reason = "it has no id" if isinstance(error, ValidationError) else str(error)
            raise HeyGenTransientError(
                f"HeyGen's response to {self.what} cannot be used: {reason}.",
                status_code=status,
                outcome_unknown=in_doubt,
            ) from None


def _envelope(decoded: Any) -> Mapping[str, Any]:
    """Return HeyGen's ``error`` envelope, or an empty mapping if the response has none."""
    envelope = decoded.get("error") if isinstance(decoded, dict) else None
    envelope = envelope if isinstance(envelope, dict) else {}
    said = (envelope.get(name) for name in ("code", "message"))
    return envelope if any(isinstance(text, str) and text for text in said) else {}


_REDIRECT = (
    "Redirects are not followed, the credential would travel along:"
    " put the final base URL into the host of Airflow connection '{conn_id}'"
)

_NO_ROUTE = (
    "The whole route is missing there. Remove the extra 'resource' ('{resource}') of Airflow connection"
    " '{conn_id}', and the provider finds HeyGen's name for it, or check its host"
)

_NEXT_STEP = {
    400: "Correct the request",
    401: "Check the password of Airflow connection '{conn_id}' and its extra 'auth_type' ('{auth_type}')",
    402: "Top up: API keys draw on the API wallet, OAuth tokens on the web plan",
    403: "The credential of Airflow connection '{conn_id}' is valid but may not do this",
    404: "It was deleted, never existed or belongs to another account than Airflow connection '{conn_id}'",
    409: "It is in a state that does not allow this",
    413: "HeyGen takes files up to 32 MB here",
    422: "Correct the request",
    429: "The account's quota is used up; waiting a little does not help",
}

_DIRECT_UPLOADS = "/v3/assets/direct-uploads"

_NEXT_STEP_BY_CODE = {
    "download_failed": "HeyGen could not fetch an input: the URL must be public https straight to the file,"
    " which may have 32 MB; or set upload_links=True, and the worker downloads the file and uploads it",
    "asset_not_found": "Upload the file with the same credential and pass the new asset_id",
    "insufficient_api_key_scope": "Add the scope '{scope}' to the API key of Airflow connection '{conn_id}'",
}

# Which status a code has (contract, x-error-catalog), for an error that comes with status 200.
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
    """Return a text from the network as a message may show it: without secrets, and not endless."""
    return connection.redact(redact_urls(_text(value)))[:1000] if isinstance(value, str) and value else None


def _content_type(headers: Mapping[str, str], connection: HeyGenConnection) -> str:
    return _printable(headers.get("Content-Type"), connection) or "no content type"


def _error(
    call: Call[Any], status: int, headers: Mapping[str, str], decoded: Any, connection: HeyGenConnection
) -> HeyGenError:
    envelope = _envelope(decoded)
    facts: dict[str, Any] = {
        name: _printable(envelope.get(name), connection) for name in ("code", "message", "param", "doc_url")
    }
    said = facts.pop("message")
    facts["status_code"] = status
    facts["request_id"] = _printable(headers.get("X-Request-Id"), connection)
    facts["retry_after"] = _retry_after(headers.get("Retry-After"))
    code = facts["code"]
    message = " ".join(filter(None, ("HeyGen returned", str(status), code, "for", call.what)))
    message += f": {said}" if said else "."
    message = message if message.endswith((".", "!", "?")) else f"{message}."
    trace = f" (request {facts['request_id']})" if facts["request_id"] else ""
    in_doubt = call.method != "GET"
    step = _next_step(call, status, facts, connection)
    if not envelope or status < 200:
        # A page of something in between. It may also stand for a response that HeyGen did give.
        message += (
            f" The response ({_content_type(headers, connection)}) does not have the form of HeyGen's errors,"
            " so it came from a gateway, proxy or firewall in between. If this persists, check these and the"
            f" host of Airflow connection '{connection.conn_id}'."
        )
        message += f" {step}." if status // 100 == 3 or status == 404 else ""
        return HeyGenGatewayError(message + trace, outcome_unknown=in_doubt, **facts)
    if _is_transient(call, status, code):
        # 429 and the waiting codes say that nothing was done, 408 and 5xx say nothing at all.
        in_doubt = in_doubt and (status >= 500 or status == 408)
        return HeyGenTransientError(message + trace, outcome_unknown=in_doubt, **facts)
    kind = HeyGenNotFoundError if status == 404 else HeyGenPermanentError
    return kind(f"{message} {step}.{trace}", **facts)


def _is_transient(call: Call[Any], status: int, code: str | None) -> bool:
    """Return whether an error of HeyGen's own is likely to pass."""
    # A second request under a key that is still being worked on; bodies without a code were seen.
    in_progress = status == 409 and code is None and "Idempotency-Key" in call.headers
    spent = status == 429 and re.search("trial|quota", code or "")
    waits = code in _TRANSIENT_CODES or in_progress or status in (408, 425, call.transient_status)
    return waits or status >= 500 or (status == 429 and not spent)


def _next_step(
    call: Call[Any], status: int, facts: Mapping[str, str | None], connection: HeyGenConnection
) -> str:
    """Return what to do about an error, without a full stop."""
    code = facts["code"]
    if 300 <= status < 400:
        step = _REDIRECT
    elif status == 404 and code != "asset_not_found" and call.is_collection and connection.resource:
        step = _NO_ROUTE
    elif status == 404 and call.path == _DIRECT_UPLOADS:
        step = "This API has no direct uploads: make the file smaller than 32 MB"
    else:
        step = _NEXT_STEP_BY_CODE.get(code or "", _NEXT_STEP.get(status, "Correct the request"))
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


def check_id(value: Any, name: str = "overdub_id") -> str:
    """
    Return an id that is safe as one segment of a path.

    :raises HeyGenBadInputError: if it is empty, not text, or has a character that no id has.
    """
    value = _text(value)
    if not isinstance(value, str) or not value.strip():
        raise HeyGenBadInputError(f"{name} is empty or not text; pass the id that a create returned.")
    if value == "None":
        # What a template makes of an XCom that is not there.
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
    Return the ids in what may be an id, a media input, or a list of them.

    :raises HeyGenBadInputError: if one of them is no id.
    """
    value = value.get("asset_id") if isinstance(value, Mapping) else value
    if isinstance(value, Iterable) and not isinstance(value, str):
        for each in value:
            yield from asset_ids(each)
    else:
        yield check_id(value, "asset_id")


def _model(kind: Callable[[Any], T], **known: str) -> Callable[[Any], T]:
    """Read an object under ``data``; what is known, such as the id asked for, may be missing there."""
    return lambda answer: kind({**_data(answer, dict), **known})


def _nothing(_: Any) -> None:
    """Read no result."""


def _on_resource(what: str, method: Any, read: Callable[[Any], T], item: str = "", **rest: Any) -> Call[T]:
    return Call(what=what, method=method, read=read, path=_COLLECTIONS[0] + item, renamed=True, **rest)


def _on_overdub(what: str, method: str, overdub_id: str, read: Any = None, **rest: Any) -> Call[Any]:
    item = f"/{quote(check_id(overdub_id), safe='')}"
    read = read or _model(Overdub.model_validate, id=overdub_id)
    return _on_resource(f"the {what} overdub '{overdub_id}'", method, read, item, **rest)


def _on_asset(
    what: str, method: Any, asset_id: str, read: Any = None, step: str = "", **rest: Any
) -> Call[Any]:
    path = f"/v3/assets/{quote(check_id(asset_id, 'asset_id'), safe='')}{step}"
    read = read or _model(Asset.model_validate, asset_id=asset_id)
    return Call(what=f"the {what} of asset '{asset_id}'", method=method, path=path, read=read, **rest)


def create_overdub(request: CreateOverdubRequest, idempotency_key: str) -> Call[str]:
    """Start an overdub; the result is its id. The key makes a repeat harmless for 24 hours."""
    headers = _key_header(idempotency_key)
    return _on_resource("the create request", "POST", _model(_id_of), json=request.body(), headers=headers)


def get_overdub(overdub_id: str) -> Call[Overdub]:
    """Read one overdub."""
    return _on_overdub("GET of", "GET", overdub_id)


def list_overdubs(limit: int, token: str | None) -> Call[OverdubPage]:
    """List one page of overdubs; ``limit`` is 1 to 100, ``token`` the ``next_token`` of the page before."""
    return replace(
        _list(_page, limit, token),
        read_headers=lambda page, headers: page.model_copy(
            update={"server_time": _http_date(headers.get("Date"))}
        ),
    )


def list_raw_overdubs(limit: int, token: str | None) -> Call[Statuses]:
    """:func:`list_overdubs`, with the rows left as they are."""
    return _list(_statuses, limit, token)


def _list(read: Callable[[Any], T], limit: int, token: str | None) -> Call[T]:
    if isinstance(limit, bool) or not isinstance(limit, int) or not 1 <= limit <= MAX_PAGE_SIZE:
        raise HeyGenBadInputError(f"limit must be a whole number from 1 to {MAX_PAGE_SIZE}, not {limit!r}.")
    params = {"limit": limit, **({"token": token} if token else {})}
    return _on_resource("the list of overdubs", "GET", read, params=params)


def list_statuses(overdub_ids: Iterable[str]) -> Call[Statuses]:
    """
    Read the status of up to 100 overdubs; ``lipsyncs`` only (contract, ``listLipsyncStatuses``).

    An id that HeyGen does not know has the status :data:`NOT_FOUND`.
    """
    params = {"lipsync_ids": ",".join(check_id(overdub_id) for overdub_id in overdub_ids)}
    path = "/v3/lipsyncs/statuses"
    return Call(what="the statuses of overdubs", method="GET", path=path, params=params, read=_bulk_statuses)


def update_overdub(overdub_id: str, title: Any) -> Call[Overdub]:
    """Rename an overdub: HeyGen can change nothing but the title."""
    title = _text(title, (int, float))
    if not isinstance(title, str) or not title.strip():
        raise HeyGenBadInputError("title is empty; an overdub cannot be renamed to nothing.")
    try:
        _not_none(title)
    except ValueError as error:
        raise HeyGenBadInputError(f"title {error}.") from None
    return _on_overdub("renaming of", "PATCH", overdub_id, json={"title": title})


def delete_overdub(overdub_id: str) -> Call[None]:
    """Delete an overdub and its files for good. Whether this cancels a running one is not documented."""
    return _on_overdub("deletion of", "DELETE", overdub_id, _nothing, requires_body=False)


def upload_asset(idempotency_key: str) -> Call[Asset]:
    """Upload one file as ``multipart/form-data``; the transport adds the body, field name ``file``."""
    headers, read = _key_header(idempotency_key), _model(Asset.model_validate)
    return Call(what="the upload", method="POST", path="/v3/assets", headers=headers, read=read)


def get_asset(asset_id: str) -> Call[Asset]:
    """Read what HeyGen holds of one asset."""
    return _on_asset("GET", "GET", asset_id)


def delete_asset(asset_id: str) -> Call[None]:
    """Delete one asset for good."""
    return _on_asset("deletion", "DELETE", asset_id, _nothing, requires_body=False)


def get_api_key() -> Call[ApiKey]:
    """Read what the API key of the connection may do, and until when; free."""
    read = _model(ApiKey.model_validate)
    return Call(what="the GET of the API key", method="GET", path="/v3/api_keys/self", read=read)


def create_direct_upload(idempotency_key: str, **file: str | int) -> Call[DirectUpload]:
    """
    Ask for a URL to upload one file to, step 1 of 3; storage enforces size and checksum.

    :param file: ``filename``, ``content_type``, ``size_bytes`` and the hexadecimal ``checksum_sha256``.
    """
    return Call(
        what="the request for a direct upload",
        method="POST",
        path=_DIRECT_UPLOADS,
        headers=_key_header(idempotency_key),
        json=file,
        read=_direct_upload,
    )


def complete_direct_upload(asset_id: str) -> Call[Asset]:
    """
    Make an asset of what was uploaded, step 3 of 3. May be repeated.

    HeyGen returns 409 until it finds the file, which may take a moment after the upload.
    """
    return _on_asset("completion", "POST", asset_id, step="/complete", json={}, transient_status=409)


def _key_header(key: str) -> dict[str, str]:
    if not isinstance(key, str) or not re.fullmatch(r"[A-Za-z0-9_\-:.]{1,255}", key):
        raise HeyGenBadInputError("idempotency_key must be 1 to 255 characters of A-Z a-z 0-9 _ - : . ")
    return {"Idempotency-Key": key}
