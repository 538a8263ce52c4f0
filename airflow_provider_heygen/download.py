"""Download results atomically, using as many URLs and connections as necessary."""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import re
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from requests.exceptions import RequestException
from urllib3.exceptions import HTTPError

from airflow_provider_heygen.api import redact_urls
from airflow_provider_heygen.exceptions import (
    HeyGenBadInputError,
    HeyGenError,
    HeyGenPermanentError,
    HeyGenTransientError,
)
from airflow_provider_heygen.media import (
    CHUNK_BYTES,
    check_url,
    redact_urllib3_logs,
    size_text,
    storage_path,
    translate_storage_errors,
)
from airflow_provider_heygen.transport import request_elsewhere

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import requests
    import tenacity
    from airflow.providers.common.compat.sdk import ObjectStoragePath

    from airflow_provider_heygen.connection import HeyGenConnection

MAX_REDIRECTS = 5

# Size of a part of an upload; s3fs would buffer 50 MB. S3 accepts 10,000 parts, so files of up to 80 GB.
_PART_BYTES = 8 << 20

# Stores that show an object only once its upload is complete (observed in s3fs, gcsfs and adlfs). With a
# temporary name, they would have to copy it.
_ATOMIC_STORES = {"s3", "s3a", "s3n", "gs", "gcs", "abfs", "abfss", "adl", "az"}

# Content codings of IANA's registry. Other values, such as S3's "aws-chunked", encode nothing.
_CODINGS = {"br", "compress", "dcb", "dcz", "deflate", "gzip", "x-compress", "x-gzip", "zstd"}

# The first bytes of HTML, XML and JSON; of a compressed page, a page in UTF-16, or a message in words.
_PAGE = rb"(\xef\xbb\xbf)?\s*[<{]"
_NO_VIDEO = rb"\x1f\x8b|\xff\xfe|\xfe\xff|[\t\r\n!-~]+ [\t\r\n -~]*\Z"
_HEAD_BYTES = 512

_PAGE_TYPES = {"application/json", "application/xml", "application/xhtml+xml", "text/html", "text/xml"}


def save(
    new_url: Callable[[], str],
    destination: ObjectStoragePath,
    *,
    artifact: str,
    overwrite: bool,
    max_bytes: int | None = None,
    attempts: tenacity.Retrying,
    session: requests.Session,
    settings: HeyGenConnection,
    log_info: Callable[..., None],
) -> int:
    """
    Stream a file from presigned URLs to storage: in constant memory, and atomically.

    After a break, the download resumes by Range with a new URL. It starts over if the server may have another
    version of the file.

    :param new_url: returns a URL; called for each attempt.
    :param artifact: "video" or "captions", or what to call another file in log and errors.
    :param overwrite: replace an existing file. Without it, a file of the same size with the same first MiB
        is kept.
    :param max_bytes: size at which the download of a larger file ends; ``None`` for no limit.
    :param attempts: maximum number of consecutive attempts that each add less than 1 MiB.
    :param session: a session without HeyGen's credential.
    :param log_info: writes to the log, as ``Logger.info`` does.
    :returns: size in bytes.
    :raises HeyGenBadInputError: if the destination is a directory, or the file exceeds ``max_bytes``.
    :raises HeyGenError: if the destination cannot be read or written.
    :raises HeyGenTransientError: if no URL works, or the download breaks too often. Retry.
    :raises HeyGenPermanentError: if a URL leads to a forbidden host, or another file is at the destination.
    """
    target = _PendingFile(destination, artifact)
    existing = existing_size(destination)
    keeps = existing is not None and not overwrite
    progress = _Progress(log_info, target)
    furthest = 0
    try:
        for attempt in attempts:
            with attempt:
                url = new_url()
                try:
                    with _open_remainder(url, target, session, settings) as response:
                        head = b""
                        if not target.written:
                            head = _read_head(response, CHUNK_BYTES if keeps else _HEAD_BYTES, artifact)
                        if keeps and (target.size is not None or not target.begins_with(head)):
                            return _kept(target, existing, target.size, head, log_info)
                        for chunk in _chunks(response, head):
                            if max_bytes is not None and target.written + len(chunk) > max_bytes:
                                raise HeyGenBadInputError(
                                    f"The {artifact} has more than {max_bytes >> 20} MiB, the most that"
                                    " HeyGen accepts; nothing was uploaded. Make it smaller."
                                )
                            target.write(chunk)
                            progress.add(len(chunk))
                finally:
                    if target.written >= furthest + CHUNK_BYTES:
                        furthest, attempt.retry_state.attempt_number = target.written, 1
                target.check()
        if keeps:
            return _kept(target, existing, target.written, b"", log_info)
        if not overwrite and existing_size(destination) is not None:
            raise HeyGenError(f"{target} was written by another process while the {artifact} was downloaded.")
        target.publish()
        progress.end()
        return target.written
    finally:
        target.discard()


def _kept(
    target: _PendingFile, existing: int | None, size: int | None, head: bytes, log_info: Callable[..., None]
) -> int:
    """Return the size of an existing file that is this artifact; another file is an error."""
    # Another video may have the same size, but hardly the same first MiB as well.
    if existing is not None and existing == size and target.begins_with(head):
        log_info("Kept %s (%s): it is this %s.", target, size_text(existing), target.artifact)
        return existing
    raise HeyGenPermanentError(
        f"{target} exists with {existing} bytes, the {target.artifact} has"
        f" {size or 'unknown'}{' others' if existing == size else ''}."
        " Choose another destination or set overwrite."
    )


def peek(
    url: str,
    artifact: str,
    *,
    attempts: tenacity.Retrying,
    session: requests.Session,
    settings: HeyGenConnection,
) -> tuple[bytes, int | None, tuple[str, str] | None]:
    """
    Return the first 64 KiB of the file at a URL, its size and its version.

    :returns: size in bytes, and name and value of ``ETag`` or ``Last-Modified``; each is ``None`` if the
        server does not report it.
    :raises HeyGenError: see :func:`save`.
    """
    target = _PendingFile(storage_path(os.devnull, artifact), artifact)  # nothing is written
    for attempt in attempts:
        with attempt, _open_remainder(url, target, session, settings) as response:
            head = _read_head(response, 1 << 16, artifact)
            return head, target.size, target.version
    raise AssertionError


def existing_size(path: ObjectStoragePath) -> int | None:
    """
    Return the size in bytes of the file at a destination, or ``None`` if there is none.

    :raises HeyGenBadInputError: if the destination is a directory.
    """
    name = redact_urls(str(path))
    with translate_storage_errors(name, "checked"):
        path.fs.invalidate_cache()
        if path.is_dir():
            raise HeyGenBadInputError(f"{name} is a directory; name a file, or end it with a slash.")
        try:
            return int(path.stat().st_size)
        except FileNotFoundError:
            return None


class _PendingFile:
    """
    A file that is being written and is invisible to readers until it is published.

    In an object store, the file is an upload that is completed or aborted. Elsewhere, it has a temporary name
    beside its destination. On a local disk, a later download to the same destination removes the temporary
    file of a killed process. Data is not forced to disk: a power failure may lose a file that was just saved.

    :param artifact: what to call the file in log and errors.
    :ivar written: bytes written so far.
    :ivar size: size of the complete file in bytes; ``None`` if the server does not report it.
    :ivar version: name and value of the header that identifies the version of the file.
    :ivar delimited: whether HTTP itself marks the end of a file of unknown size (RFC 9112, section 7.1).
    """

    def __init__(self, destination: ObjectStoragePath, artifact: str) -> None:
        self.artifact = artifact
        self._path = destination
        self._fs = destination.fs
        self._local = destination.protocol in ("", "file")
        self._direct = destination.protocol in _ATOMIC_STORES
        self._file: Any = None
        self._name = ""
        self.written = 0
        self.size: int | None = None
        self.version: tuple[str, str] | None = None
        self.delimited = False
        self._boxes = _Boxes()

    def __str__(self) -> str:
        return redact_urls(str(self._path))

    def begins_with(self, head: bytes) -> bool:
        """Return whether the file at the destination begins with ``head``."""
        with translate_storage_errors(self, "read"):
            # With an end of 0, s3fs would read the whole file.
            return not head or bool(self._fs.cat_file(self._path.path, start=0, end=len(head)) == head)

    def write(self, chunk: bytes) -> None:
        with translate_storage_errors(self, "written"):
            if self._file is None:
                self._open()
            self._file.write(chunk)
        self.written += len(chunk)
        self._boxes.add(chunk)

    def check(self) -> None:
        """
        Check that the file is complete.

        If its size is unknown, a video must be a complete mp4, and so must any file that begins as one; other
        files need a response whose end is marked.

        :raises HeyGenTransientError: if it is not; a file that is too long is discarded.
        """
        written, size, artifact = self.written, self.size, self.artifact
        is_mp4 = artifact == "video" or self._boxes.is_mp4
        whole = self._boxes.complete if is_mp4 else self.delimited
        if written == size or (size is None and written and whole):
            return
        if size is not None and written > size:
            self.discard()
        of = "an unknown number of" if size is None else size
        raise HeyGenTransientError(f"The download of the {artifact} ended after {written} of {of} bytes.")

    def publish(self) -> None:
        """Make the file visible at its destination, atomically."""
        with translate_storage_errors(self, "written"):
            self._file.close()
            if not self._direct:
                self._fs.mv(self._name, self._path.path)
        self._file = None

    def discard(self) -> None:
        file, self._file = self._file, None
        self.written, self.size, self.version, self._boxes = 0, None, None, _Boxes()
        self.delimited = False
        if file is None:
            return
        with contextlib.suppress(Exception):  # the error that led here matters more
            if self._direct:
                # fsspec completes an upload on close(), also in a failed `with` and at garbage collection.
                file.closed = True
                file.discard()
                return
            try:
                file.close()
            finally:
                self._fs.rm_file(self._name)

    def _open(self) -> None:
        # The path's own open() would report the temporary name to Airflow's lineage.
        if self._direct:
            self._file = self._fs.open(self._path.path, "wb", block_size=_PART_BYTES)
            return
        folder, _, name = self._path.path.rpartition("/")
        # fsspec's mv treats these characters as a pattern, and a name may have at most 255 bytes.
        stem = re.sub(r"[*?\[\]]", "_", name)[:60]
        if self._local:
            Path(f"{folder}/").mkdir(parents=True, exist_ok=True)
            _remove_leftovers(Path(f"{folder}/"), stem)
        self._name = f"{folder}/.{stem}.{uuid.uuid4().hex[:8]}.part"
        self._file = self._fs.open(self._name, "wb")
        if self._local:
            with contextlib.suppress(OSError):
                fcntl.flock(self._file, fcntl.LOCK_SH)


class _Boxes:
    """
    The boxes of an mp4 while it is written (ISO/IEC 14496-12, section 4.2).

    :ivar is_mp4: whether the first box is that of an mp4.
    :ivar complete: whether the file ends at the end of a box and has the boxes of a video. A box that extends
        to the end of the file by definition proves nothing, and nor do fragments without the index of them
        that is the last box.
    """

    def __init__(self) -> None:
        self.is_mp4 = self.complete = False
        self._kinds: set[bytes] = set()
        self._head, self._left = b"", 0.0

    def add(self, chunk: bytes) -> None:
        data, at = self._head + chunk, self._left
        while at < len(data):
            start = int(at)
            size, kind = int.from_bytes(data[start : start + 4]), data[start + 4 : start + 8]
            length = 16 if size == 1 else 8
            if len(data) < start + length:
                break
            if size == 1:
                size = int.from_bytes(data[start + 8 : start + 16])
            self.is_mp4 = self.is_mp4 or (not self._kinds and kind == b"ftyp")
            self._kinds.add(kind)
            at += size if size >= length else math.inf
        self._head = data[int(at) :] if at < len(data) else b""
        self._left = max(0.0, at - len(data))
        needed = {b"moov", b"mdat"} | ({b"mfra"} if b"moof" in self._kinds else set())
        self.complete = not self._head and not self._left and self._kinds >= needed


def _remove_leftovers(folder: Path, stem: str) -> None:
    """Remove temporary files of killed processes; a living one holds a lock."""
    for path in folder.glob(f".{stem}.????????.part"):
        with contextlib.suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


class _Progress:
    """Logs the progress of a download: every 10 s, and less often as it takes longer."""

    def __init__(self, log_info: Callable[..., None], target: _PendingFile) -> None:
        self._log_info, self._target = log_info, target
        self._started_at = self._logged_at = time.monotonic()
        self._received = self._logged = 0

    def add(self, received: int) -> None:
        """Count received bytes, and log the progress if it is due."""
        self._received += received
        now = time.monotonic()
        if now - self._logged_at < max(10.0, (self._logged_at - self._started_at) / 4):
            return
        written, size = self._target.written, self._target.size
        of = f" of {size_text(size)}, {written / size:.0%}" if size else ""
        speed = size_text((self._received - self._logged) / (now - self._logged_at))
        artifact = self._target.artifact
        self._log_info("%s%s, %s/s: the %s for %s.", size_text(written), of, speed, artifact, self._target)
        self._logged_at, self._logged = now, self._received

    def end(self) -> None:
        """Log size, duration and speed of the whole download."""
        seconds = max(time.monotonic() - self._started_at, 1e-3)
        size, speed = size_text(self._target.written), size_text(self._received / seconds)
        artifact = self._target.artifact
        self._log_info("Saved %s of %s in %.1f s, %s/s: %s.", size, artifact, seconds, speed, self._target)


@contextlib.contextmanager
def _open_remainder(
    url: str, target: _PendingFile, session: requests.Session, settings: HeyGenConnection
) -> Iterator[requests.Response]:
    """
    Request the rest of a file; all of it if the server has another version or does not support Range.

    :raises HeyGenTransientError: if the connection breaks, or the server returns something else. A new URL
        may help.
    """
    headers = {"Accept-Encoding": "identity"}  # Content-Length must be that of the file
    if target.written:
        headers["Range"] = f"bytes={target.written}-"
        if target.version is not None:
            headers["If-Range"] = target.version[1]
    try:
        with redact_urllib3_logs():
            response, host = _follow(url, target.artifact, headers, session, settings)
            with response:
                _check_response(response, host, target)
                yield response
    except (RequestException, HTTPError) as error:
        # The text of the error would quote the URL.
        raise HeyGenTransientError(
            f"{type(error).__name__} while downloading the {target.artifact} from {urlsplit(url).hostname}."
        ) from None


def _check_response(response: requests.Response, host: str, target: _PendingFile) -> None:
    """Check that a response continues ``target``, or has the whole file: then ``target`` starts over."""
    status, headers, artifact = response.status_code, response.headers, target.artifact
    kind = headers.get("Content-Type", "").partition(";")[0].strip().lower()
    encoded = _CODINGS & set(re.split(r"[\s,]+", headers.get("Content-Encoding", "").lower()))
    length = headers.get("Content-Length", "")
    size = int(length) if re.fullmatch("[0-9]{1,18}", length) else None
    is_page = kind in _PAGE_TYPES or (artifact == "video" and kind.startswith("text/"))
    if status == 200 and size != 0 and not is_page and not encoded:
        target.discard()
        target.size = size
        target.delimited = "chunked" in headers.get("Transfer-Encoding", "").lower()
        target.version = _version(headers)
    elif status not in (206, 416) or not target.written:
        raise HeyGenTransientError(
            f"The URL of the {artifact} at {host} returned {status}"
            f" ({', '.join([kind or 'no type', *encoded])}) instead of the {artifact}; it may have expired.",
            status_code=status,
        )
    elif not _resumes_at_offset(target, headers):
        target.discard()
        raise HeyGenTransientError(
            f"The {artifact} at {host} has changed while it was downloaded ({status}); starting over.",
            status_code=status,
        )


def _chunks(response: requests.Response, head: bytes) -> Iterator[bytes]:
    """Yield ``head`` and then the rest as it arrives, so that a break loses nothing."""
    if head:
        yield head
    while chunk := response.raw.read1(CHUNK_BYTES):
        yield chunk


def _read_head(response: requests.Response, size: int, artifact: str) -> bytes:
    """
    Read the first bytes; unlike urllib3's ``read``, raise if the connection breaks.

    :raises HeyGenTransientError: if they are those of a page or a message, because the Content-Type may be
        wrong. A new URL may help.
    """
    head = b""
    while chunk := response.raw.read1(size - len(head)):
        head += chunk
    if re.match(_PAGE, head) or (artifact == "video" and re.match(_NO_VIDEO, head)):
        raise HeyGenTransientError(f"The URL of the {artifact} returned a page instead of the {artifact}.")
    return head


def _version(headers: Mapping[str, str]) -> tuple[str, str] | None:
    # If-Range does not accept a weak ETag (RFC 9110, section 13.1.5).
    for name in ("ETag", "Last-Modified"):
        if (value := headers.get(name)) and not value.startswith("W/"):
            return name, value
    return None


def _resumes_at_offset(target: _PendingFile, headers: Mapping[str, str]) -> bool:
    """Return whether a 206 response continues ``target`` where it is, up to the end of the same file."""
    found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", headers.get("Content-Range", ""))
    if found is None or int(found[1]) != target.written:
        return False
    if target.version is None:
        if target.size is None:
            return False
    elif headers.get(target.version[0], target.version[1]) != target.version[1]:
        return False
    total = int(found[2]) + 1
    if found[3] not in ("*", str(total)) or target.size not in (None, total):
        return False
    target.size = total
    return True


def _follow(
    url: str, artifact: str, headers: dict[str, str], session: requests.Session, settings: HeyGenConnection
) -> tuple[requests.Response, str]:
    """
    Return the response at the end of all redirects, and its host. Each URL on the way is checked.

    TLS protects against a host name that resolves differently after the check (DNS rebinding): a host inside
    your network has no certificate for it.
    """
    name, base = f"The URL of the {artifact}", ""
    for _ in range(MAX_REDIRECTS + 1):
        url, host = check_url(base, url, settings, name)
        response = request_elsewhere(
            session,
            settings,
            f"while downloading the {artifact} from {host}",
            "GET",
            url,
            timeout=(settings.connect_timeout, settings.read_timeout),
            headers=headers,
        )
        if not response.is_redirect:
            return response, host
        base, location = url, response.headers["Location"].encode("latin-1")  # the bytes that were sent
        try:
            url = location.decode()
        except UnicodeDecodeError:
            url = "".join(chr(byte) if byte < 128 else f"%{byte:02X}" for byte in location)
        response.close()
    raise HeyGenPermanentError(f"{name} was redirected more than {MAX_REDIRECTS} times.")
