"""Files on their way from HeyGen: whole or not at all, over as many links and connections as it takes."""

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

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import requests
    import tenacity
    from airflow.providers.common.compat.sdk import ObjectStoragePath

    from airflow_provider_heygen.connection import HeyGenConnection

MAX_REDIRECTS = 5

# What an object store is sent at once; s3fs would collect 50 MB. S3 takes 10,000 parts, so 80 GB.
_PART_BYTES = 8 << 20

# Stores that show an object when its upload is completed, and not before: a temporary name would only cost a
# copy of it. Seen in s3fs, gcsfs and adlfs; any other file system gets the temporary name.
_SHOWN_WHEN_WHOLE = {"s3", "s3a", "s3n", "gs", "gcs", "abfs", "abfss", "adl", "az"}

# Content codings of IANA's registry; others, such as S3's "aws-chunked" or an empty one, encode nothing.
_CODINGS = {"br", "compress", "dcb", "dcz", "deflate", "gzip", "x-compress", "x-gzip", "zstd"}

_NO_FILE = {"application/json", "application/xml", "application/xhtml+xml", "text/html", "text/xml"}


def save(
    fresh_link: Callable[[], str],
    destination: ObjectStoragePath,
    *,
    what: str,
    overwrite: bool,
    attempts: tenacity.Retrying,
    session: requests.Session,
    settings: HeyGenConnection,
    say: Callable[..., None],
) -> int:
    """
    Stream what presigned links lead to into storage: in constant memory, whole or not at all.

    After a break it goes on where it was, by Range and with a fresh link. Where it cannot be told that the
    rest belongs to the same file, it starts over.

    :param fresh_link: gives a link; called for each attempt.
    :param what: "video" or "captions".
    :param overwrite: replace what is there; otherwise a file of the same size and with the same first MiB is
        kept as it is.
    :param attempts: how often to try in a row without getting on by a MiB.
    :param session: a session without HeyGen's credential.
    :param say: writes to the log, as ``Logger.info`` does.
    :returns: its size in bytes.
    :raises HeyGenBadInputError: the destination is a directory.
    :raises HeyGenError: the destination cannot be read or written.
    :raises HeyGenTransientError: no link works, or the download breaks off again and again.
    :raises HeyGenPermanentError: the link leads where it must not, or the destination is taken.
    """
    target = _PendingFile(destination)
    there = existing_size(destination)
    progress = _Progress(say, what, target)
    furthest = 0
    with redact_urllib3_logs(), target:
        for attempt in attempts:
            with attempt:
                link = fresh_link()
                try:
                    with (
                        _explained(what, link),
                        _open_remainder(link, what, target, session, settings) as response,
                    ):
                        if there is not None and not overwrite:
                            head = _read_head(response, CHUNK_BYTES)
                            _check_head(what, head)
                            # Another video may have the same size, but hardly the same beginning, too.
                            if there == target.size and target.begins_with(head):
                                say("Kept %s (%s): it is this %s.", target, size_text(there), what)
                                return there
                            raise HeyGenPermanentError(
                                f"{target} exists with {there} bytes, the {what} has"
                                f" {target.size or 'unknown'}{' others' if there == target.size else ''}."
                                " Choose another destination or set overwrite."
                            )
                        # What comes is written at once: a break loses none of it.
                        while chunk := response.raw.read1(CHUNK_BYTES):
                            if not target.written:
                                _check_head(what, chunk)
                            target.write(chunk)
                            progress.add(len(chunk))
                finally:
                    if target.written >= furthest + CHUNK_BYTES:
                        furthest, attempt.retry_state.attempt_number = target.written, 1
                target.check(what)
        if not overwrite and existing_size(destination) is not None:
            raise HeyGenError(f"{target} has been written by another while the {what} was downloaded.")
        target.publish()
        progress.end()
        return target.written


def peek(
    link: str,
    what: str,
    *,
    attempts: tenacity.Retrying,
    session: requests.Session,
    settings: HeyGenConnection,
) -> tuple[bytes, int | None, tuple[str, str] | None]:
    """
    Return what a URL and its server tell of a file: up to 64 KiB of its beginning, its size and its version.

    :returns: size and version are ``None`` if the server does not report them; a version is name and value
        of ``ETag`` or ``Last-Modified``.
    :raises HeyGenError: see :func:`save`.
    """
    target = _PendingFile(storage_path(os.devnull, what))  # nothing is written
    for attempt in attempts:
        with (
            attempt,
            redact_urllib3_logs(),
            _explained(what, link),
            _open_remainder(link, what, target, session, settings) as response,
        ):
            head = _read_head(response, 1 << 16)
            _check_head(what, head)
            return head, target.size, target.version
    raise AssertionError


@contextlib.contextmanager
def _explained(what: str, link: str) -> Iterator[None]:
    try:
        yield
    except (RequestException, HTTPError) as error:
        # Its text would quote the link.
        raise HeyGenTransientError(
            f"{type(error).__name__} while downloading the {what} from {urlsplit(link).hostname}."
        ) from None


def existing_size(path: ObjectStoragePath) -> int | None:
    """
    Return the size in bytes of what is at a destination, or ``None`` if nothing is.

    :raises HeyGenBadInputError: if that is a directory.
    """
    name = redact_urls(str(path))
    with translate_storage_errors(name, "looked at"):
        path.fs.invalidate_cache()  # what is remembered of it may no longer be so
        if path.is_dir():
            raise HeyGenBadInputError(f"{name} is a directory; name a file, or end it with a slash.")
        try:
            return int(path.stat().st_size)
        except FileNotFoundError:
            return None


class _PendingFile:
    """
    A file that is being written, and that nobody sees before it is published.

    In an object store it is an upload that is completed or aborted. Elsewhere it has a temporary name beside
    its own; what a killed writer has left under such a name goes when the same file is written again, on a
    local disk. Data is not forced to disk: when its host loses power, a file may be lost after the task has
    succeeded, like any that was just written.

    :ivar written: bytes so far.
    :ivar size: bytes of the whole, as announced; ``None`` when the server did not say.
    :ivar version: name and value of the header that tells one version of the file from another.
    """

    def __init__(self, destination: ObjectStoragePath) -> None:
        self._path = destination
        self._fs = destination.fs
        self._local = destination.protocol in ("", "file")
        self._direct = destination.protocol in _SHOWN_WHEN_WHOLE
        self._file: Any = None
        self._name = ""
        self.written = 0
        self.size: int | None = None
        self.version: tuple[str, str] | None = None
        self._boxes = _Boxes()

    def __str__(self) -> str:
        return redact_urls(str(self._path))

    def __enter__(self) -> _PendingFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.discard()

    def begins_with(self, head: bytes) -> bool:
        """Tell whether what is at the destination begins with that."""
        with translate_storage_errors(self, "read"):
            return bool(self._fs.cat_file(self._path.path, start=0, end=len(head)) == head)

    def write(self, chunk: bytes) -> None:
        """Add to it."""
        with translate_storage_errors(self, "written"):
            if self._file is None:
                self._open()
            self._file.write(chunk)
        self.written += len(chunk)
        self._boxes.add(chunk)

    def check(self, what: str) -> None:
        """
        Raise unless it is as long as announced; or, where nothing was, if the video is no whole mp4.

        :raises HeyGenTransientError: if it is not whole; one that is too long is dropped.
        """
        written, size = self.written, self.size
        if written == size or (size is None and written and (what != "video" or self._boxes.whole)):
            return
        if size is not None and written > size:
            self.discard()
        of = "an unknown number of" if size is None else size
        raise HeyGenTransientError(f"The download of the {what} ended after {written} of {of} bytes.")

    def publish(self) -> None:
        """Let everybody see it, at once and whole."""
        with translate_storage_errors(self, "written"):
            self._file.close()
            if not self._direct:
                self._fs.mv(self._name, self._path.path)
        self._file = None

    def discard(self) -> None:
        """Forget what was written."""
        file, self._file = self._file, None
        self.written, self.size, self.version, self._boxes = 0, None, None, _Boxes()
        if file is None:
            return
        # What went wrong before is what matters.
        if self._direct:
            # fsspec completes an upload on close(), in a `with` that fails as well as on collection.
            file.closed = True
            with contextlib.suppress(Exception):
                file.discard()
            return
        with contextlib.suppress(Exception):
            file.close()
        with contextlib.suppress(Exception):
            self._fs.rm_file(self._name)

    def _open(self) -> None:
        # By the file system, not the path, which would tell Airflow's lineage of the temporary name.
        if self._direct:
            self._file = self._fs.open(self._path.path, "wb", block_size=_PART_BYTES)
            return
        folder, _, name = self._path.path.rpartition("/")
        # fsspec's mv takes these characters for a pattern, and a name may have no more than 255 bytes.
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
    Walks over the boxes of an mp4 as it is written (ISO/IEC 14496-12, section 4.2).

    :ivar whole: whether the file ends where a box does and has the boxes of a video. A box that reaches to
        the end of the file by definition proves nothing.
    """

    def __init__(self) -> None:
        self.whole = False
        self._kinds: set[bytes] = set()
        self._head, self._left = b"", 0.0

    def add(self, chunk: bytes) -> None:
        """Take the next bytes."""
        if self._left < len(chunk):
            data, at = self._head + chunk, self._left
            while (start := int(at)) < len(data):
                size, kind = int.from_bytes(data[start : start + 4]), data[start + 4 : start + 8]
                length = 16 if size == 1 else 8
                if len(data) < start + length:
                    break
                if size == 1:
                    size = int.from_bytes(data[start + 8 : start + 16])
                self._kinds.add(kind)
                at += size if size >= length else math.inf
                if at == math.inf:
                    break
            self._head, self._left = data[start:] if at < len(data) else b"", max(0.0, at - len(data))
        else:
            self._left -= len(chunk)
        self.whole = not self._head and not self._left and self._kinds >= {b"moov", b"mdat"}


def _remove_leftovers(folder: Path, stem: str) -> None:
    """Remove what killed writers of the same file have left; a lock is the sign of one that lives."""
    for path in folder.glob(f".{stem}.????????.part"):
        with contextlib.suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


class _Progress:
    """Says in the log how far a download is: every 10 s, and less and less often when it takes long."""

    def __init__(self, say: Callable[..., None], what: str, target: _PendingFile) -> None:
        self._say, self._what, self._target = say, what, target
        self._began = self._said = time.monotonic()
        self._received = self._told = 0

    def add(self, received: int) -> None:
        """Count bytes, and say so if it is time."""
        self._received += received
        now = time.monotonic()
        if now - self._said < max(10.0, (self._said - self._began) / 4):
            return
        written, size = self._target.written, self._target.size
        of = f" of {size_text(size)}, {written / size:.0%}" if size else ""
        speed = size_text((self._received - self._told) / (now - self._said))
        self._say("%s%s, %s/s: the %s for %s.", size_text(written), of, speed, self._what, self._target)
        self._said, self._told = now, self._received

    def end(self) -> None:
        """Say what it came to."""
        seconds = max(time.monotonic() - self._began, 1e-3)
        size, speed = size_text(self._target.written), size_text(self._received / seconds)
        self._say("Saved %s of %s in %.1f s, %s/s: %s.", size, self._what, seconds, speed, self._target)


@contextlib.contextmanager
def _open_remainder(
    link: str, what: str, target: _PendingFile, session: requests.Session, settings: HeyGenConnection
) -> Iterator[requests.Response]:
    """
    Open what is still missing of a file; all of it, if the server has another one or knows no Range.

    :raises HeyGenTransientError: the server gives something else; a fresh link may help.
    """
    headers = {"Accept-Encoding": "identity"}  # Content-Length must be that of the file
    if target.written:
        headers["Range"] = f"bytes={target.written}-"
        if target.version is not None:
            headers["If-Range"] = target.version[1]
    response, host = _follow(link, what, headers, session, settings)
    with response:
        status = response.status_code
        kind = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        encoded = _CODINGS & set(re.split(r"[\s,]+", response.headers.get("Content-Encoding", "").lower()))
        usable = (
            kind not in _NO_FILE
            and not (what == "video" and kind.startswith("text/"))
            and not encoded
            and response.headers.get("Content-Length") != "0"
        )
        if status == 200 and usable:
            target.discard()
            length = response.headers.get("Content-Length", "")
            target.size = int(length) if length.isdigit() else None
            target.version = _version(response.headers)
        elif status in (206, 416) and target.written:
            if not _resumes_at_offset(target, response.headers):
                target.discard()
                raise HeyGenTransientError(
                    f"The {what} at {host} has changed while it was downloaded ({status}); starting over.",
                    status_code=status,
                )
        else:
            raise HeyGenTransientError(
                f"{_the_link(what)} at {host} returned {status} ({', '.join([kind or 'no type', *encoded])})"
                f" instead of the {what}; it may have expired.",
                status_code=status,
            )
        yield response


def _read_head(response: requests.Response, size: int) -> bytes:
    """Read the first bytes; unlike urllib3's ``read``, raise when they break off."""
    head = b""
    while chunk := response.raw.read1(size - len(head)):
        head += chunk
    return head


def _check_head(what: str, head: bytes) -> None:
    """
    Refuse what begins as HTML, XML or JSON do and no video or SRT does, whatever its Content-Type says.

    :raises HeyGenTransientError: a fresh link may help.
    """
    if re.match(rb"(\xef\xbb\xbf)?\s*[<{]", head):
        raise HeyGenTransientError(f"{_the_link(what)} gave a page instead of the {what}.")


def _version(headers: Mapping[str, str]) -> tuple[str, str] | None:
    # A weak ETag is not good for If-Range (RFC 9110, section 13.1.5).
    for name in ("ETag", "Last-Modified"):
        if (value := headers.get(name)) and not value.startswith("W/"):
            return name, value
    return None


def _resumes_at_offset(target: _PendingFile, headers: Mapping[str, str]) -> bool:
    """Whether an answer 206 goes on where we are, to the end of the same file."""
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
    link: str, what: str, headers: dict[str, str], session: requests.Session, settings: HeyGenConnection
) -> tuple[requests.Response, str]:
    """
    Give the answer at the end of all redirects, and its host; each hop is checked.

    A name that leads elsewhere a moment after the check is met by TLS: who has our own network answer for it
    has no certificate.
    """
    base = ""
    for _ in range(MAX_REDIRECTS + 1):
        link, host = check_url(base, link, settings, _the_link(what))
        response = session.get(
            link,
            stream=True,
            allow_redirects=False,
            timeout=(settings.connect_timeout, settings.read_timeout),
            headers=headers,
        )
        if not response.is_redirect:
            return response, host
        base, location = link, response.headers["Location"].encode("latin-1")  # the bytes that were sent
        try:
            link = location.decode()
        except UnicodeDecodeError:
            link = "".join(chr(byte) if byte < 128 else f"%{byte:02X}" for byte in location)
        response.close()
    raise HeyGenPermanentError(f"{_the_link(what)} was redirected more than {MAX_REDIRECTS} times.")


def _the_link(what: str) -> str:
    return f"The link to the {what}"
