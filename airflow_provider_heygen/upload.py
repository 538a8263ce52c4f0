"""
Which files HeyGen accepts, and how their content is sent.

The type is detected from the content, as HeyGen does, not from the name. It is implemented here because
``puremagic`` (1.30) mistakes m4a for mp4 and ``filetype`` has had no release since 2022.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import PurePath, PurePosixPath
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from requests.exceptions import RequestException

from airflow_provider_heygen.api import MAX_MULTIPART_BYTES, redact_urls
from airflow_provider_heygen.exceptions import (
    HeyGenBadInputError,
    HeyGenError,
    HeyGenPermanentError,
    HeyGenTransientError,
)
from airflow_provider_heygen.media import (
    check_url,
    fingerprint,
    redact_urllib3_logs,
    storage_path,
    translate_storage_errors,
)
from airflow_provider_heygen.transport import ChunkedBody, request_elsewhere

if TYPE_CHECKING:
    from collections.abc import Mapping
    from os import PathLike

    import requests
    from airflow.providers.common.compat.sdk import ObjectStoragePath

    from airflow_provider_heygen.api import DirectUpload
    from airflow_provider_heygen.connection import HeyGenConnection
    from airflow_provider_heygen.hooks.heygen import HeyGenHook

MAX_DIRECT_BYTES = 200 << 20
"""What HeyGen's own uploader accepts (contract, ``max_bytes`` of ``createDirectUpload``): 200 MB."""

# S3's codes of errors with a status of 4xx (Amazon S3 API Reference, "Error Responses").
_EXPIRED_CODES = ("ExpiredToken", "TokenRefreshRequired", "RequestTimeTooSkewed")
_TRANSIENT_CODES = ("RequestTimeout", "IncompleteBody", "OperationAborted", "ConditionalRequestConflict")

_BLOCK_BYTES = 4 << 20  # of a read from storage; s3fs would read 50 MB
_HEAD_BYTES = 512

# What HeyGen accepts (contract, `uploadAsset`) and an overdub can be made from.
_ACCEPTED = {
    "video/webm": rb"\x1aE\xdf\xa3.{0,250}?B\x82.{1,8}?webm",
    # Any brand that is not rejected: the list of mp4's brands is open, so HeyGen decides on an unknown one.
    "video/mp4": rb".{4}ftyp",
    "audio/mpeg": rb"ID3|\xff[\xe2\xe3\xf2\xf3\xfa\xfb][^\xf0-\xff]",
    "audio/wav": rb"RIFF.{4}WAVE",
    "image/png": rb"\x89PNG\r\n\x1a\n",
    "image/jpeg": rb"\xff\xd8\xff",
}

# Frequent types that HeyGen does not accept, with the format to convert them to.
_REJECTED = (
    (rb".{4}(ftypqt  |moov|mdat|wide|free|skip|pnot)", "a QuickTime movie (mov)", "mp4"),
    (rb".{4}ftyp(M4A|M4B|M4P|F4A|F4B) ", "an m4a audio file", "mp3 or wav"),
    (rb".{4}ftyp3g", "a 3GP file", "mp4"),
    (rb".{4}ftyp(hei[cxms]|hev[cx]|mif1|msf1|avi[fs])", "a HEIF or AVIF image", "png or jpeg"),
    (rb"\x1aE\xdf\xa3(?!.{0,250}?B\x82.{1,8}?webm)", "a Matroska file (mkv, mka)", "mp4 or mp3"),
    (rb"OggS", "an Ogg file (ogg, opus)", "mp3 or wav"),
    (rb"fLaC", "a FLAC file", "mp3 or wav"),
    (rb"\xff[\xf0\xf1\xf8\xf9]", "an AAC file", "mp3 or wav"),
    (rb"FORM.{4}AIF", "an AIFF file", "mp3 or wav"),
    (rb"RF64.{4}WAVE", "an RF64 wave file", "mp3 or wav"),
    (rb"#!AMR", "an AMR file", "mp3 or wav"),
    (rb"RIFF.{4}AVI ", "an AVI file", "mp4"),
    (rb"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "a Windows Media file (wmv, wma)", "mp4 or mp3"),
    (rb"FLV\x01", "a Flash video (flv)", "mp4"),
    (rb"G.{187}G", "an MPEG transport stream (ts)", "mp4"),
    (rb"\x00\x00\x01[\xba\xb3]", "an MPEG program stream (mpg)", "mp4"),
    (rb"GIF8", "a GIF image", "png or jpeg"),
    (rb"RIFF.{4}WEBP", "a WebP image", "png or jpeg"),
    (rb"%PDF-", "a PDF document", ""),
    (rb"PK\x03\x04", "a ZIP archive", ""),
    (
        rb"(\xef\xbb\xbf)?\s*<",
        "an HTML or XML page, perhaps an error or login page that was saved in its place",
        "",
    ),
    (rb"(\xef\xbb\xbf)?\s*[\[{]", "a JSON text, perhaps an error that was saved in its place", ""),
)


def _media_type(file: Any, name: str) -> str:
    """
    Detect the MIME type of a file from its content.

    :raises HeyGenBadInputError: if HeyGen does not accept it; the message names the detected type.
    """
    head = file.read(_HEAD_BYTES)
    kind, found, instead = _match(head)
    if kind == "audio/mpeg" and head.startswith(b"ID3"):
        # The tag contains its length in digits of 7 bits; a FLAC or AAC file may begin with one, too.
        length = sum((byte & 0x7F) << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=False))
        file.seek(10 + length)
        _, found, instead = _match(file.read(_HEAD_BYTES))
        if len(head) < 10 or found in ("a FLAC file", "an AAC file"):
            kind = None
    if kind is not None:
        return kind
    raise HeyGenBadInputError(
        f"{name} is {found or 'of an unknown type'}.{f' Convert it to {instead}.' if instead else ''}"
        " HeyGen accepts mp4, webm, mp3, wav, png and jpeg, detected from the content, not from the name;"
        " nothing was uploaded."
    )


def _match(head: bytes) -> tuple[str | None, str | None, str | None]:
    for signature, found, instead in _REJECTED:
        if re.match(signature, head, re.DOTALL):
            return None, found, instead
    for kind, signature in _ACCEPTED.items():
        if re.match(signature, head, re.DOTALL):
            return kind, None, None
    return None, None, None


@dataclass
class Source:
    """
    A file for HeyGen, as it was when it was checked.

    :param path: ObjectStoragePath of the file; ``None`` if it is behind a URL.
    :param size: in bytes.
    :param mime_type: detected from the content.
    :param fingerprint: see :func:`.fingerprint`.
    :param known_digest: SHA-256 of the content, if an earlier try has computed it.
    """

    path: Any
    size: int
    mime_type: str
    fingerprint: str | None = None
    known_digest: str | None = None

    def __str__(self) -> str:
        return redact_urls(str(self.path))

    @property
    def name(self) -> str:
        """The name of the file, as valid Unicode: that of a local file may be any bytes."""
        return str(self.path.name.encode(errors="replace").decode())

    @classmethod
    def of(
        cls,
        path: Source | str | PathLike[str] | ObjectStoragePath,
        settings: HeyGenConnection,
        known: Mapping[str, tuple[str, str]] | None = None,
    ) -> Source:
        """
        Check a file by its first bytes, or return a checked source unchanged.

        :param path: local path, or any URI that Airflow's ObjectStoragePath supports.
        :param known: digest and MIME type by fingerprint, of files that are not read again.
        :raises HeyGenBadInputError: if the file is missing, a directory, empty, too large for the
            connection's ``resource``, or of a type that HeyGen does not accept.
        """
        if isinstance(path, Source):
            return path
        found = storage_path(path, "the file to upload")
        name = redact_urls(str(found))
        with translate_storage_errors(name, "read"):
            found.fs.invalidate_cache()
            try:
                info = found.fs.info(found.path)
            except (FileNotFoundError, NotADirectoryError):
                raise HeyGenBadInputError(f"There is no file {name}; nothing was uploaded.") from None
        size = info["size"]
        if info["type"] == "directory":
            raise HeyGenBadInputError(f"{name} is a directory; name one file.")
        if not size:
            raise HeyGenBadInputError(f"{name} is empty, or its size is unknown; nothing was uploaded.")
        _check_size(name, size, settings)
        version = fingerprint(found, info)
        if version and known and version in known:
            digest, mime_type = known[version]
            return cls(found, size, mime_type, version, digest)
        with translate_storage_errors(name, "read"), found.open("rb", block_size=1 << 16) as file:  # type: ignore[no-untyped-call]
            return cls(found, size, _media_type(file, name), version)

    @property
    def digest(self) -> str:
        """The SHA-256 of the content, in hexadecimal; the file is read once if it is not known."""
        if self.known_digest is None:
            with Announced(self) as file:
                for _ in ChunkedBody(file):
                    pass
            self.known_digest = file.sha256.hexdigest()
        return self.known_digest

    def open_file(self) -> Any:
        """Open the file in its storage."""
        return self.path.open("rb", block_size=_BLOCK_BYTES)


@dataclass
class UrlSource(Source):
    """
    A file behind a URL, downloaded at the first read to an unnamed file that no crash leaves behind.

    :param url: the URL.
    :param artifact: what to call the file in log and errors.
    :param hook: downloads the file.
    """

    url: str = field(kw_only=True, repr=False)
    artifact: str = field(kw_only=True)
    hook: HeyGenHook = field(kw_only=True)

    def __str__(self) -> str:
        return redact_urls(self.url)

    @property
    def name(self) -> str:
        """The last part of the URL's path."""
        return PurePosixPath(unquote(urlsplit(self.url).path)).name or "file"

    @classmethod
    def from_url(
        cls, url: str, artifact: str, hook: HeyGenHook, known: Mapping[str, tuple[str, str]]
    ) -> UrlSource:
        """
        Check the file behind a URL by its first bytes. If its server reports no size, download the file.

        A URL may be signed again for each try, so the ``ETag`` identifies the version of the file. If the URL
        has expired since an earlier try, the file that this try uploaded is used.

        :param known: see :meth:`Source.of`.
        :raises HeyGenError: see :meth:`Source.of` and :func:`.download.save`.
        """
        redacted = redact_urls(url)
        if " " in url or not url.isprintable():
            raise HeyGenBadInputError(f"{redacted!r} has white space. Remove it; nothing was sent.")
        place = _digest(artifact, redacted)
        source = cls(None, 0, "", f"{place}:", url=url, artifact=artifact, hook=hook)
        try:
            head, size, version = hook.peek(url, artifact)
        except HeyGenTransientError as error:
            source.fingerprint = next((key for key in known if key.startswith(f"{place}:")), None)
            if source.fingerprint is None:
                raise
            source.known_digest, source.mime_type = known[source.fingerprint]
            hook.log.warning("%s Using the file that an earlier try found there.", error)
            return source
        source.size = source.file.seek(0, os.SEEK_END) if size is None else size
        _check_size(str(source), source.size, hook.settings)
        if size and version:
            source.fingerprint = (
                f"{place}:{_digest(redacted if version[0] == 'ETag' else url, size, version)}"
            )
            source.known_digest, _ = known.get(source.fingerprint, (None, None))
        source.mime_type = _media_type(io.BytesIO(head), str(source))
        return source

    @cached_property
    def file(self) -> Any:
        """
        The downloaded file, which has no name.

        A server that reports no size may never end. The download ends when it exceeds 32 MiB under
        ``overdubs``, otherwise 200 MiB; a larger file whose size is reported is left to HeyGen to reject.
        """
        limit = MAX_MULTIPART_BYTES if self.hook.settings.resource == "overdubs" else MAX_DIRECT_BYTES
        with TemporaryDirectory(prefix="heygen-") as folder:
            path = storage_path(f"{folder}/{self.artifact}", self.artifact)
            self.hook.fetch(self.url, path, self.artifact, max(self.size, limit))
            return open(path.path, "rb")

    def open_file(self) -> Any:
        """Open the downloaded file at its beginning."""
        file = os.fdopen(os.dup(self.file.fileno()), "rb")
        file.seek(0)
        return file


def _digest(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def _check_size(name: str, size: int, settings: HeyGenConnection) -> None:
    if size > MAX_MULTIPART_BYTES and settings.resource == "overdubs":
        raise HeyGenBadInputError(
            f"{name} has {size / 2**20:.1f} MiB, HeyGen accepts {MAX_MULTIPART_BYTES >> 20} MiB per upload"
            " under 'overdubs'. Make it smaller, or, if the account has 'lipsyncs', remove the extra"
            f" 'resource' of Airflow connection '{settings.conn_id}', or set it to 'lipsyncs'."
        )


class Announced:
    """
    The content of a file whose length, and perhaps digest, was announced to the server.

    :raises HeyGenError: if the file cannot be opened, or its content is not what was announced.
    :raises HeyGenTransientError: if the file cannot be read.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        with translate_storage_errors(source, "read"):
            self._file: Any = source.open_file()
        self.len = source.size
        self.sha256 = hashlib.sha256()

    def __enter__(self) -> Announced:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()

    def read(self, size: int = -1) -> bytes:
        """Return up to ``size`` bytes; by default, all that are left."""
        wanted = self.len if size < 0 else min(size, self.len)
        # Translated, because requests would take an OSError for a fault of the network.
        with translate_storage_errors(self._source, "read", HeyGenTransientError):
            chunk: bytes = self._file.read(wanted)
            self.len -= len(chunk)
            changed = (not chunk and wanted) or (not self.len and self._file.read(1))
        self.sha256.update(chunk)
        if not self.len:  # checked before the last chunk is sent, so that no upload is completed
            changed = changed or self._source.known_digest not in (None, self.sha256.hexdigest())
        if changed:
            raise HeyGenError(
                f"{self._source} has changed while it was read. No asset was created. Try again."
            )
        return chunk


def put_file(
    source: Source, slot: DirectUpload, *, session: requests.Session, settings: HeyGenConnection
) -> str | None:
    """
    Send a file to the storage behind an upload URL.

    :param session: a session without HeyGen's credential.
    :returns: ``None``, or the response of storage if the URL has expired or was used before.
    :raises HeyGenTransientError: if the upload breaks, or storage is busy. Retry.
    :raises HeyGenPermanentError: if the URL leads to a forbidden host, or storage rejects the file.
    """
    url, host = check_url("", slot.upload_url, settings, "The upload URL")
    session.headers.clear()  # the signature covers the headers, so only HeyGen's are sent
    with (
        redact_urllib3_logs(),
        Announced(source) as file,
        request_elsewhere(
            session,
            settings,
            f"while uploading to {host}",
            "PUT",
            url,
            data=ChunkedBody(file, settings.upload_timeout),
            headers=slot.upload_headers,
            timeout=(settings.connect_timeout, settings.upload_timeout),
        ) as response,
    ):
        status = response.status_code
        if 200 <= status < 300:
            return None
        page = b""
        with suppress(RequestException):  # the status is enough
            page = next(response.iter_content(1000), b"")
    found = re.search(rb"<Code>(\w{1,100})</Code>", page)
    code = found[1].decode() if found else ""
    result = f"{status} {code}".strip()
    if status in (401, 403, 404, 410) or code in _EXPIRED_CODES:
        return result
    message = f"Storage at {host} returned {result} for the upload of {source}"
    if status in (408, 429) or status >= 500 or code in _TRANSIENT_CODES:
        raise HeyGenTransientError(f"{message}.", status_code=status)
    if code in ("BadDigest", "XAmzContentChecksumMismatch"):
        raise HeyGenError(f"{message}: it has changed while it was sent, or was damaged. Try again.")
    if 300 <= status < 400:
        message += ". An upload does not follow redirects"
    raise HeyGenPermanentError(f"{message}.", status_code=status)


def storage_uris(fields: Mapping[str, Any], *, links: bool = False) -> dict[str, Any]:
    """
    Return those of ``video`` and ``audio`` that have to be uploaded first: files in storage.

    A file is named by a URI (``s3://bucket/key``, ``file:///data/a.mp4`` ...), plain or as
    ``{"type": "url", "url": ...}``, or by a path object. HeyGen itself downloads ``http`` and ``https``.

    :param links: whether the files at ``http`` and ``https`` URLs are uploaded, too.
    :raises HeyGenBadInputError: if a text is neither URL nor URI, such as a bare path.
    """
    from airflow.providers.common.compat.sdk import ObjectStoragePath

    found: dict[str, Any] = {}
    for name in ("video", "audio"):
        value = fields.get(name)
        if isinstance(value, dict) and value.get("type") == "url" and value.get("asset_id") is None:
            value = value.get("url")
        if isinstance(value, (ObjectStoragePath, PurePath)):
            found[name] = value
        elif isinstance(value, str):
            if not re.match(r"(?i)file:|.*?://", value, re.DOTALL):
                raise HeyGenBadInputError(
                    f"{name}: must be a public https URL, or the URI of a file (file:///data/talk.mp4,"
                    " s3://bucket/talk.mp4 ...), or an asset; nothing was sent."
                )
            if links or not is_link(value):
                found[name] = value
    return found


def is_link(uri: Any) -> bool:
    """Return whether a file is behind an ``http`` or ``https`` URL."""
    return isinstance(uri, str) and re.match(r"(?i)https?://", uri) is not None


def check_inputs(
    uris: Mapping[str, Any], hook: HeyGenHook, known: Mapping[str, tuple[str, str]]
) -> dict[str, Source]:
    """
    Check the files for an overdub, all of them before the first is uploaded.

    :param uris: the result of :func:`storage_uris`.
    :param known: see :meth:`Source.of`.
    :raises HeyGenBadInputError: see :meth:`Source.of`; or if ``video`` is no video, or ``audio``
        is an image.
    """
    sources: dict[str, Source] = {}
    for name, uri in uris.items():
        try:
            if is_link(uri):
                sources[name] = UrlSource.from_url(uri, f"source {name}", hook, known)
            else:
                sources[name] = Source.of(uri, hook.settings, known)
        except HeyGenBadInputError as error:
            raise HeyGenBadInputError(f"{name}: {error}") from None
        source = sources[name]
        kind = source.mime_type.partition("/")[0]
        if kind == "image" or (name == "video" and kind != "video"):
            raise HeyGenBadInputError(f"{name}: {source} is {source.mime_type}, no {name}; nothing was sent.")
    return sources
