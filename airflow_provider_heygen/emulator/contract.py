"""HeyGen's rules for requests: bodies, file types, credentials, and the error envelope.

The rules are those of ``tests/heygen-v3-overdubs.openapi.yaml``. Where its schema is looser than its prose
(plain http, bounds of times), the stricter reading is enforced, so that HeyGen accepts what passes here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_INPUT_BYTES = 33_554_432
"""Limit of POST /v3/assets and of inputs by URL: the published 32 MB, read as MiB."""


@dataclass(eq=False)
class ApiError(Exception):
    """An error response in HeyGen's envelope, or with ``html`` as the page of a gateway."""

    status: int
    code: str
    message: str
    param: str | None = None
    headers: Mapping[str, str] | None = None
    html: bool = False

    @property
    def envelope(self) -> dict[str, Any]:
        """The JSON of the response."""
        doc_url = f"https://developers.heygen.com/docs/error-codes#{self.code.replace('_', '-')}"
        return {
            "error": {"code": self.code, "message": self.message, "param": self.param, "doc_url": doc_url}
        }


def invalid(message: str, param: str | None = None) -> ApiError:
    """Return the 400 of a malformed request; ``param`` names the field."""
    return ApiError(400, "invalid_parameter", message, param)


def too_large(mime_type: str | None) -> str:
    """Return HeyGen's message about an input by URL that is too large."""
    return f"Maximum size for URL inputs of type '{mime_type}' is 32 MB"


def credential_of(headers: Mapping[str, str]) -> Literal["api_key", "oauth", "both"] | None:
    """Return the kind of credential of a request."""
    has_key, has_token = "X-Api-Key" in headers, "Authorization" in headers
    if has_key and has_token:
        return "both"
    return "api_key" if has_key else "oauth" if has_token else None


def is_web_address(url: str, *schemes: str) -> bool:
    """Check that a URL has one of the schemes and a host."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    return parts.scheme in schemes and bool(parts.hostname)


class Body(BaseModel):
    """A JSON body, without conversions between JSON types. ``check_known`` rejects unknown fields."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _storable(cls, value: Any) -> Any:
        # Half of a surrogate pair is valid JSON, but no response can contain it.
        return value.encode(errors="replace").decode() if isinstance(value, str) else value

    def check_known(self, prefix: str = "") -> None:
        """Raise the 400 that names the first unknown field."""
        for name in self.model_extra or ():
            raise invalid(f"{prefix}{name}: unknown field", f"{prefix}{name}")
        for name in self.model_fields_set:
            if isinstance(value := getattr(self, name), Body):
                value.check_known(f"{prefix}{name}.")


class MediaInput(Body):
    """A source: a public https URL, or an uploaded asset."""

    type: Literal["url", "asset_id"]
    url: str | None = None
    asset_id: str | None = None

    @model_validator(mode="after")
    def _exactly_the_named_one(self) -> Self:
        other = "asset_id" if self.type == "url" else "url"
        if getattr(self, self.type) is None or getattr(self, other) is not None:
            raise ValueError(f"type {self.type} needs `{self.type}` and nothing else")
        return self


class CreateJob(Body):
    """The 16 fields of "Create Overdub", which are also those of Create Lipsync."""

    video: MediaInput
    audio: MediaInput
    title: str | None = None
    mode: Literal["speed", "precision"] = "speed"
    enable_caption: bool = False  # ignored: captions are always made
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

    @field_validator("callback_url")
    @classmethod
    def _is_web_address(cls, url: str | None) -> str | None:
        # HeyGen probably requires https; plain http is accepted for tests that listen on loopback.
        if url is not None and not is_web_address(url, "http", "https"):
            raise ValueError("must be an http(s) URL")
        return url

    @field_validator("end_time")
    @classmethod
    def _after_start(cls, end: float | None, info: ValidationInfo) -> float | None:
        start = info.data.get("start_time")
        if end is not None and start is not None and end <= start:
            raise ValueError("end_time must be after start_time")
        return end


class UpdateTitle(Body):
    """Body of PATCH; the title is all that can be changed."""

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
        # In JSON Schema, 5.0 is an integer.
        return int(size) if isinstance(size, float) and size.is_integer() else size

    @field_validator("content_type")
    @classmethod
    def _known(cls, content_type: str) -> str:
        if content_type not in SUFFIXES:
            raise ValueError(f"must be one of {', '.join(SUFFIXES)}")
        return content_type


class CompleteUpload(Body):
    """Step 3 of 3 of a direct upload."""

    checksum_sha256: str | None = None


# The file types HeyGen accepts (no mov, no m4a, no aac), detected from their first bytes as HeyGen does.
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
    """Return the MIME type of a file by its first bytes, or raise the 400 for any other type."""
    for mime_type, signature in _SIGNATURES.items():
        if signature.match(first_bytes):
            return mime_type
    raise invalid(f"Unsupported file type. Supported: {', '.join(SUFFIXES.values())}.", "file")


def mime_type_of(name: str) -> str | None:
    """Return the MIME type of a file that the emulator has named."""
    return next((mime for mime, suffix in SUFFIXES.items() if name.endswith(suffix)), None)
