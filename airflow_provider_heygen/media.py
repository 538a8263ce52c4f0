"""Files on their way in and out: where they are stored, and how a result link is fetched."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import socket
import uuid
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

from requests.exceptions import RequestException

from airflow_provider_heygen.api import redact_links
from airflow_provider_heygen.connection import HeyGenConnection, is_loopback
from airflow_provider_heygen.exceptions import (
    HeyGenBadInputError,
    HeyGenPermanentError,
    HeyGenTransientError,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from os import PathLike

    import requests
    from airflow.providers.common.compat.sdk import ObjectStoragePath

CHUNK_BYTES = 1 << 20
MAX_REDIRECTS = 5


def mask_links(*values: Any) -> None:
    """
    Have Airflow mask what is secret in links: the query, and a user's password.

    :param values: links, media inputs that hold one, or anything else, which is passed over.
    """
    from airflow.providers.common.compat.sdk import mask_secret

    for value in values:
        url = value.get("url") if isinstance(value, dict) else value
        if not isinstance(url, str) or "://" not in url:
            continue
        scheme, _, rest = url.partition("://")
        user = rest.partition("/")[0].rpartition("@")[0]
        if scheme.lower() not in ("http", "https") and ":" not in user:
            user = ""  # s3://aws_default@bucket: the name of an Airflow connection
        for secret in (url.partition("?")[2], user):
            if secret:
                mask_secret(secret)


def storage_path(path: str | PathLike[str] | ObjectStoragePath, what: str) -> ObjectStoragePath:
    """
    Give an ObjectStoragePath for a local path or a storage URI.

    :param what: how to call it in an error.
    :raises HeyGenBadInputError: it is empty, or no installed provider knows its scheme.
    """
    from airflow.providers.common.compat.sdk import ObjectStoragePath

    if not isinstance(path, ObjectStoragePath) and not str(path).strip():
        raise HeyGenBadInputError(f"The path of {what} is empty.")
    try:
        found = ObjectStoragePath(path)
        _ = found.fs  # resolves the scheme now, where an error can say what is meant
    except (ImportError, ValueError) as error:
        raise HeyGenBadInputError(
            f"The path of {what}, {redact_links(str(path))}, cannot be used: {error}."
            " Is the Airflow provider of that storage installed?"
        ) from None
    return found


def save(
    link: str,
    destination: ObjectStoragePath,
    *,
    session: requests.Session,
    settings: HeyGenConnection,
    overwrite: bool,
) -> int:
    """
    Stream what a presigned link leads to into storage; constant memory, whole or not at all.

    :param session: a session without HeyGen's credential.
    :param overwrite: replace what is there; otherwise a file of the same size is kept as it is.
    :returns: its size in bytes.
    :raises HeyGenBadInputError: the destination is a directory.
    :raises HeyGenTransientError: the link has expired or the download broke off; try a fresh link.
    :raises HeyGenPermanentError: the link leads where it must not, or the destination is taken.
    """
    if destination.is_dir():
        raise HeyGenBadInputError(f"{destination} is a directory; name a file, or end it with a slash.")
    try:
        with links_unlogged(), _open(link, session, settings) as response:
            length = response.headers.get("Content-Length")
            size = int(length) if length and length.isdigit() else None
            if not overwrite and destination.exists():
                there: int = destination.stat().st_size
                if there == size:
                    return there
                raise HeyGenPermanentError(
                    f"{destination} exists with {there} bytes, the video has {size or 'unknown'}."
                    " Choose another destination or set overwrite."
                )
            return _publish(response, size, destination)
    except RequestException as error:
        # Its text would quote the link.
        raise HeyGenTransientError(
            f"{type(error).__name__} while downloading from {urlsplit(link).hostname}."
        ) from None


@contextlib.contextmanager
def links_unlogged() -> Iterator[None]:
    """
    Keep presigned links out of urllib3's log, which at level DEBUG has each path with its query.

    Airflow's mask does not do: a scheduler or worker mirrors the lines of its tasks to its own output
    unmasked.
    """
    logger = logging.getLogger("urllib3.connectionpool")
    logger.addFilter(_cut_links)
    try:
        yield
    finally:
        logger.removeFilter(_cut_links)


def _cut_links(record: logging.LogRecord) -> bool:
    if isinstance(record.args, tuple):
        record.args = tuple(redact_links(arg) if isinstance(arg, str) else arg for arg in record.args)
    return True


def _publish(response: requests.Response, size: int | None, destination: ObjectStoragePath) -> int:
    if destination.protocol in ("", "file"):
        destination.parent.mkdir(parents=True, exist_ok=True)
    temporary = destination.parent / f".{destination.name}.{uuid.uuid4().hex[:8]}.part"
    written = 0
    try:
        with temporary.open("wb") as file:  # type: ignore[no-untyped-call]
            for chunk in response.iter_content(CHUNK_BYTES):
                file.write(chunk)
                written += len(chunk)
        if written == 0 or (size is not None and written != size):
            raise HeyGenTransientError(f"The download ended after {written} of {size} bytes.")
        temporary.fs.mv(temporary.path, destination.path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    return written


def _open(link: str, session: requests.Session, settings: HeyGenConnection) -> requests.Response:
    base = ""
    for _ in range(MAX_REDIRECTS + 1):
        link, host = check_link(base, link, settings, _WHAT)
        response = session.get(
            link,
            stream=True,
            allow_redirects=False,
            timeout=(settings.connect_timeout, settings.read_timeout),
            headers={"Accept-Encoding": "identity"},  # Content-Length must be that of the file
        )
        if response.is_redirect:
            base, link = link, response.headers["Location"]
            response.close()
            continue
        kind = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if response.status_code == 200 and not kind.startswith("text/") and kind not in _NOT_VIDEO:
            return response
        response.close()
        raise HeyGenTransientError(
            f"{_WHAT} at {host} answered {response.status_code} ({kind or 'no type'}) instead"
            " of the video; it may have expired.",
            status_code=response.status_code,
        )
    raise HeyGenPermanentError(f"{_WHAT} was redirected more than {MAX_REDIRECTS} times.")


_WHAT = "The link to the video"
_NOT_VIDEO = {"application/json", "application/xml", "application/xhtml+xml"}


def check_link(base: str, link: str, settings: HeyGenConnection, what: str) -> tuple[str, str]:
    """
    Give a link that may be followed, and its host; a hostile one must not reach our own network.

    :param base: the URL the link was found at, or "" for one that must be whole.
    :param what: how to call it in an error, such as "The link to the video".
    :raises HeyGenPermanentError: it is no URL, not https, or leads to a private or loopback address.
    """
    try:
        link = urljoin(base, link)
        link.encode()
        parts = urlsplit(link)
        host = parts.hostname or ""
        host.encode("idna")  # as the look-up of its address does
    except ValueError:
        raise HeyGenPermanentError(f"{what} is not a URL that can be followed.") from None
    secure = parts.scheme == "https" or (
        parts.scheme == "http" and (settings.allow_http or is_loopback(host))
    )
    if not host or not secure:
        raise HeyGenPermanentError(
            f"{what} leads to {parts.scheme}://{host}, which is not https. If that is meant,"
            f" set the extra 'allow_http' of Airflow connection '{settings.conn_id}' to true."
        )
    if not settings.allow_private_hosts and _is_private(host):
        raise HeyGenPermanentError(
            f"{what} leads to {host}, a private or loopback address. If that is meant, set the"
            f" extra 'allow_private_hosts' of Airflow connection '{settings.conn_id}' to true."
        )
    return link, host


def _is_private(host: str) -> bool:
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
    except OSError:
        return False  # the request itself will fail, or a proxy resolves the name
    return any(not ipaddress.ip_address(address.partition("%")[0]).is_global for address in found)
