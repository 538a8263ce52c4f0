"""HeyGen's rules for what comes in: request bodies, file types, and the error envelope.

The rules are those of ``tests/heygen-v3-overdubs.openapi.yaml``. Where its schema is looser than its prose
(unknown fields, plain http, bounds of times) the stricter reading is enforced: a client that passes here
passes there.
"""

from __future__ import annotations

import json
import re
from typing import Any, Literal, Self, TypeVar
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

MAX_UPLOAD_BYTES = 33_554_432
"""Of POST /v3/assets: the published 32 MB, read as binary."""


class ApiError(Exception):
    """An answer other than success, in HeyGen's envelope."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.param, self.headers = status, code, message, param, headers

    @property
    def envelope(self) -> dict[str, Any]:
        """The JSON of the answer."""
        doc_url = f"https://developers.heygen.com/docs/error-codes#{self.code.replace('_', '-')}"
        return {
            "error": {"code": self.code, "message": self.message, "param": self.param, "doc_url": doc_url}
        }


def invalid(message: str, param: str | None = None) -> ApiError:
    """The 400 of a malformed request; ``param`` names the field."""
    return ApiError(400, "invalid_parameter", message, param)


class Body(BaseModel):
    """A JSON body: no unknown fields, no conversions between JSON types."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class MediaInput(Body):
    """A source: a public https link, or an uploaded asset."""

    type: Literal["url", "asset_id"]
    url: str | None = None
    asset_id: str | None = None

    @model_validator(mode="after")
    def _exactly_the_named_one(self, info: ValidationInfo) -> Self:
        other = "asset_id" if self.type == "url" else "url"
        if getattr(self, self.type) is None or getattr(self, other) is not None:
            raise ValueError(f"type {self.type} takes `{self.type}` and nothing else")
        if self.url is not None:
            parts = urlsplit(self.url)
            # A link of the emulator's own is the one exception from https.
            own = f"{parts.scheme}://{parts.netloc}" == (info.context or {}).get("base_url")
            if not own and (parts.scheme != "https" or not parts.hostname):
                raise ValueError("url must be a public https link")
        return self


def _web_address(url: str | None) -> str | None:
    # HeyGen probably wants https; plain http is let in so that a test can listen on loopback.
    if url is not None and (urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname):
        raise ValueError("must be an http(s) URL")
    return url


class CreateJob(Body):
    """The 16 fields of Create Overdub, of which Create Lipsync has the same."""

    video: MediaInput
    audio: MediaInput
    title: str | None = None
    mode: Literal["speed", "precision"] = "speed"
    enable_caption: bool = False
    enable_dynamic_duration: bool = True
    disable_music_track: bool = False
    enable_speech_enhancement: bool = False
    enable_watermark: bool = False
    start_time: float | None = Field(default=None, ge=0)
    end_time: float | None = Field(default=None, gt=0)
    keep_the_same_format: bool | None = None
    fps_mode: Literal["vfr", "cfr", "passthrough"] | None = None
    callback_url: str | None = None
    callback_id: str | None = None
    folder_id: str | None = None

    _callback_url = field_validator("callback_url")(_web_address)

    @field_validator("end_time")
    @classmethod
    def _after_start(cls, end: float | None, info: ValidationInfo) -> float | None:
        start = info.data.get("start_time")
        if end is not None and start is not None and end <= start:
            raise ValueError("end_time must be after start_time")
        return end


class CreateBatch(Body):
    """1 to 100 jobs; no item is taken when one is malformed."""

    lipsyncs: list[CreateJob] = Field(min_length=1, max_length=100)
    title: str | None = None
    callback_url: str | None = None

    _callback_url = field_validator("callback_url")(_web_address)


class UpdateTitle(Body):
    """Of PATCH; the title is all that can be changed."""

    title: str = Field(min_length=1)


class CreateDirectUpload(Body):
    """Step 1 of 3 of a direct upload."""

    filename: str
    content_type: str
    size_bytes: int = Field(ge=1)
    checksum_sha256: str | None = Field(default=None, pattern=r"^[0-9a-fA-F]{64}$")

    @field_validator("size_bytes", mode="before")
    @classmethod
    def _whole(cls, size: Any) -> Any:
        # JSON knows one kind of number: 5.0 is an integer there.
        return int(size) if isinstance(size, float) and size.is_integer() else size

    @field_validator("content_type")
    @classmethod
    def _known(cls, content_type: str) -> str:
        if content_type not in _SIGNATURES:
            raise ValueError(f"must be one of {', '.join(_SIGNATURES)}")
        return content_type


class CompleteUpload(Body):
    """Step 3 of 3."""

    checksum_sha256: str | None = None


AnyBody = TypeVar("AnyBody", bound=BaseModel)


def parse(model: type[AnyBody], content_type: str, body: bytes, base_url: str = "") -> AnyBody:
    """Read a JSON body, or raise the 400 that names the first offending field."""
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise invalid("Content-Type must be application/json.")
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise invalid(f"The body is not valid JSON: {error}") from error
    try:
        return model.model_validate(data, context={"base_url": base_url})
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        param = ".".join(map(str, first["loc"])) or None
        message = first["msg"].removeprefix("Value error, ")
        raise invalid(f"{param or 'body'}: {message}", param) from error


# The file types HeyGen takes (no mov, no m4a, no aac), told by their first bytes as HeyGen does.
_SIGNATURES = {
    "image/png": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "image/jpeg": re.compile(rb"\xff\xd8\xff"),
    "video/mp4": re.compile(rb"....ftyp(?!qt  |M4A )", re.DOTALL),
    "video/webm": re.compile(rb"\x1a\x45\xdf\xa3.{0,60}webm", re.DOTALL),
    "audio/mpeg": re.compile(rb"ID3|\xff[\xe2\xe3\xf2\xf3\xfa\xfb]"),
    "audio/wav": re.compile(rb"RIFF....WAVE", re.DOTALL),
    "application/pdf": re.compile(rb"%PDF-"),
    "application/x-subrip": re.compile(rb"(\xef\xbb\xbf)?\s*\d+\r?\n\d\d:\d\d:\d\d,\d{3} --> "),
}
SUFFIXES = dict(
    zip(_SIGNATURES, (".png", ".jpg", ".mp4", ".webm", ".mp3", ".wav", ".pdf", ".srt"), strict=True)
)
"""MIME type -> file name suffix."""


def detect_type(first_bytes: bytes) -> str:
    """The MIME type of a file by its first bytes, or the 400 for a type HeyGen does not take."""
    for mime_type, signature in _SIGNATURES.items():
        if signature.match(first_bytes):
            return mime_type
    raise invalid(f"Unsupported file type. Supported: {', '.join(SUFFIXES.values())}.", "file")
