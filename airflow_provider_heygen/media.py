"""Files in storage and behind URLs: which path is meant, where a URL may lead, what of it is secret."""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import json
import logging
import os
import re
import socket
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

from requests import PreparedRequest

from airflow_provider_heygen.api import redact_urls
from airflow_provider_heygen.connection import HeyGenConnection, is_loopback
from airflow_provider_heygen.exceptions import HeyGenBadInputError, HeyGenError, HeyGenPermanentError
from airflow_provider_heygen.lineage import SCHEMES, local_path

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from os import PathLike

    from airflow.providers.common.compat.sdk import ObjectStoragePath

CHUNK_BYTES = 1 << 20

_IPV6_UNICAST = ipaddress.IPv6Network("2000::/3")  # RFC 4291; is_global also covers ranges outside
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052


def mask_urls(*values: Any) -> None:
    """
    Register the secrets of URLs for Airflow to mask: the query, and a user with a password.

    :param values: URLs, mappings and lists with URLs, or anything else, which is skipped.
    """
    from airflow.providers.common.compat.sdk import mask_secret

    for url in values:
        if isinstance(url, (dict, list, tuple)):
            mask_urls(*(url.values() if isinstance(url, dict) else url))
        if not isinstance(url, str) or "://" not in url:
            continue
        scheme, _, rest = url.partition("://")
        user = rest.partition("/")[0].rpartition("@")[0]
        if scheme.lower() not in ("http", "https") and ":" not in user:
            user = ""  # s3://aws_default@bucket: the name of an Airflow connection
        for secret in (url.partition("?")[2], user):
            if secret:
                mask_secret(secret)


def storage_path(
    path: str | PathLike[str] | ObjectStoragePath, name: str, *, written: bool = False
) -> ObjectStoragePath:
    """
    Return the ObjectStoragePath of exactly the file that a local path or a storage URI names.

    :param name: what to call the file in an error.
    :param written: whether the file is to be written, so that the path must not name a version of it.
    :raises HeyGenBadInputError: if the path is empty, relative or a folder, if no installed provider has its
        scheme, or if ObjectStoragePath would read another file.
    """
    from airflow.providers.common.compat.sdk import ObjectStoragePath

    text = str(path)
    named = f"The path of {name}, {redact_urls(text)!r},"
    if text.strip() in ("", "None"):
        raise HeyGenBadInputError(
            f"The path of {name} is empty or the text 'None', which is what a template makes of a missing"
            " value."
        )
    if text != text.strip() or "\0" in text:
        raise HeyGenBadInputError(f"{named} begins or ends with white space, or has a NUL byte. Remove it.")
    uri = re.sub(r"^[A-Za-z][A-Za-z0-9+.-]*(?=://)", lambda scheme: scheme[0].lower(), text)
    if (local := local_path(text)) is not None:
        if not local.startswith("/"):
            raise HeyGenBadInputError(
                f"{named} is neither absolute nor the URI of a file (file:///data/talk.mp4,"
                " s3://bucket/talk.mp4 ...). A relative path depends on the worker's own directory."
            )
        local = re.sub(r"/+", "/", local)
        # Without a scheme, ObjectStoragePath treats "::" as a part of the name.
        uri = local if "::" in local else f"file://{local}"
    if uri.endswith("/"):
        raise HeyGenBadInputError(f"{named} ends with a slash, so it names a folder. Name a file.")
    try:
        found = ObjectStoragePath(uri)
        _ = found.fs  # resolves the scheme here, where the error can name the file
    except (ImportError, ValueError) as error:
        if uri.startswith(("http://", "https://")):
            raise HeyGenBadInputError(
                f"{named} is an http URL. Name the file by the URI of its storage, such as s3://bucket/talk.mp4."
            ) from None
        raise HeyGenBadInputError(
            f"{named} cannot be used: {error}. Check that the Airflow provider of that storage is installed."
        ) from None
    # It drops what follows "::", line breaks and a final "?" or "#". Its paths may omit a host.
    whole = re.sub(r"^[^:/]*://([^/?#]*@)?", "", uri)
    if found.path.strip("/") not in (whole.strip("/"), whole.partition("/")[2]):
        raise HeyGenBadInputError(
            f"{named} has characters (such as '::' or a line break) that make Airflow's ObjectStoragePath"
            f" read another file, {redact_urls(str(found))!r}. Choose another name."
        )
    if written and found.protocol.startswith("s3") and "?versionId=" in found.path:
        raise HeyGenBadInputError(f"{named} names a version, which cannot be written. Remove it.")
    return found


def size_text(size: float) -> str:
    """Return a size in bytes as text with a unit."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size:.0f} bytes"


def fingerprint(path: ObjectStoragePath, info: Mapping[str, Any] | None = None) -> str | None:
    """
    Return a digest that identifies a version of a file without reading it, or ``None`` without metadata.

    :param info: the file system's metadata of the file; requested by default.
    """
    with contextlib.suppress(Exception):
        if info is None:
            path.fs.invalidate_cache()
            info = path.fs.info(path.path)
        version = [str(info.get(name) or "") for name in ("ETag", "etag", "mtime", "created", "ino")]
        if any(version[:3]):
            return hashlib.sha256(json.dumps([str(path), info["size"], version]).encode()).hexdigest()
    return None


@contextlib.contextmanager
def translate_storage_errors(
    path: object, action: str, kind: type[HeyGenError] = HeyGenError
) -> Iterator[None]:
    """
    Turn the error of any storage into one that names the file, what failed and why.

    :param action: past participle for the message, such as "read".
    :raises HeyGenError: of that kind, in place of any other exception.
    """
    try:
        yield
    except HeyGenError:
        raise
    except Exception as error:
        reason = redact_urls(str(error)) or type(error).__name__
        raise kind(f"{path} cannot be {action}: {reason}.") from None


def plain_uri(path: ObjectStoragePath) -> str:
    """Return the absolute URI of a file for lineage, without the id of an Airflow connection."""
    if path.protocol in ("", "file"):
        return f"file://{os.path.abspath(path.path)}"
    return f"{path.protocol}://{path.path.lstrip('/')}"


def same_file(path: ObjectStoragePath, other: ObjectStoragePath) -> bool:
    """Return whether two paths lead to the same file, through links, other schemes or versions of it."""
    return _identity(path) == _identity(other)


def _identity(path: ObjectStoragePath) -> object:
    if path.protocol in ("", "file"):
        with contextlib.suppress(OSError):
            found = os.stat(path.path)
            return found.st_dev, found.st_ino
        return os.path.realpath(path.path)
    key = path.path.partition("?versionId=")[0]  # as s3fs
    return f"{SCHEMES.get(path.protocol, path.protocol)}://{key.lstrip('/')}"


@contextlib.contextmanager
def redact_urllib3_logs() -> Iterator[None]:
    """
    Keep presigned URLs out of urllib3's log.

    At level DEBUG, urllib3 logs each path with its query; its warning about broken headers has the whole URL.
    Airflow's mask is not enough: schedulers and workers copy the lines of their tasks unmasked to their own
    output.
    """

    # A filter per call, because another thread removes its own.
    def redact(record: logging.LogRecord) -> bool:
        if isinstance(record.args, tuple):
            record.args = tuple(redact_urls(arg) if isinstance(arg, str) else arg for arg in record.args)
        return True

    loggers = [logging.getLogger(f"urllib3.{module}") for module in ("connection", "connectionpool")]
    for logger in loggers:
        logger.addFilter(redact)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(redact)


def check_url(base: str, url: str, settings: HeyGenConnection, name: str) -> tuple[str, str]:
    """
    Return a URL that may be followed, and its host: a hostile URL must not reach your network.

    :param base: the URL that ``url`` is relative to, or "" for an absolute one.
    :param name: what to call the URL in an error, such as "The URL of the video".
    :raises HeyGenPermanentError: if it is no URL, not https, or leads to a private or loopback address.
    """
    try:
        request = PreparedRequest()
        # Parsed as requests does: in https://10.0.0.1\@x.y, urlsplit would find the other host.
        request.prepare_url(urljoin(base, url), None)
        url = str(request.url)
        parts = urlsplit(url)
        host = parts.hostname or ""
        host.encode("idna")  # as getaddrinfo does
    except ValueError:
        raise HeyGenPermanentError(f"{name} is not a URL that can be followed.") from None
    secure = parts.scheme == "https" or (
        parts.scheme == "http" and (settings.allow_http or is_loopback(host))
    )
    if not host or not secure:
        raise HeyGenPermanentError(
            f"{name} leads to {parts.scheme}://{host}, which is not https. If that is meant,"
            f" set the extra 'allow_http' of Airflow connection '{settings.conn_id}' to true."
        )
    if not settings.allow_private_hosts and _is_private(host):
        raise HeyGenPermanentError(
            f"{name} leads to {host}, a private or loopback address. If that is meant, set the"
            f" extra 'allow_private_hosts' of Airflow connection '{settings.conn_id}' to true."
        )
    return url, host


def _is_private(host: str) -> bool:
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
    except OSError:
        return False  # the request itself will fail, or a proxy resolves the name
    return not all(_is_public(ipaddress.ip_address(address)) for address in found)


def _is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    if isinstance(address, ipaddress.IPv6Address):
        # The network may route an IPv4 address in the form of an IPv6 one to the IPv4 host.
        embedded = address.ipv4_mapped or address.sixtofour
        if address in _NAT64:  # networks without IPv4 reach public hosts by it
            embedded = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if embedded is None:
            return address.is_global and address in _IPV6_UNICAST
        address = embedded
    return address.is_global and not address.is_multicast
