"""What files have in common on their way in and out: paths in storage, and links that may be followed."""

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

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from os import PathLike

    from airflow.providers.common.compat.sdk import ObjectStoragePath

CHUNK_BYTES = 1 << 20

_IPV6_UNICAST = ipaddress.IPv6Network("2000::/3")  # RFC 4291; what is_global leaves open is not meant for it
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052


def mask_urls(*values: Any) -> None:
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
    Return the ObjectStoragePath of exactly the file that a local path or a storage URI names.

    :param what: how to call the file in an error.
    :raises HeyGenBadInputError: if that is empty, relative or a folder, if no installed provider knows its
        scheme, or if ObjectStoragePath would take it for another file.
    """
    from airflow.providers.common.compat.sdk import ObjectStoragePath

    text = str(path)
    named = f"The path of {what}, {redact_urls(text)!r},"
    if text.strip() in ("", "None"):
        raise HeyGenBadInputError(
            f"The path of {what} is empty or the text 'None', which is what a template makes of a missing"
            " value."
        )
    if text != text.strip():
        raise HeyGenBadInputError(f"{named} begins or ends with white space. Remove it.")
    uri = re.sub(r"^[A-Za-z][A-Za-z0-9+.-]*(?=://)", lambda scheme: scheme[0].lower(), text)
    local = re.sub(r"(?i)^file:(//(localhost)?)?", "", text)
    if local != text or not re.match(r"[a-z][a-z0-9+.-]*://", uri):
        local = os.path.expanduser(local)
        if not local.startswith("/"):
            raise HeyGenBadInputError(
                f"{named} is neither absolute nor the URI of a file (file:///data/talk.mp4,"
                " s3://bucket/talk.mp4 ...). A relative path depends on the worker's own directory."
            )
        local = re.sub(r"/+", "/", local)
        # Without a scheme, ObjectStoragePath takes "::" for a part of the name.
        uri = local if "::" in local else f"file://{local}"
    if uri.endswith("/"):
        raise HeyGenBadInputError(f"{named} ends with a slash, so it names a folder. Name a file.")
    try:
        found = ObjectStoragePath(uri)
        _ = found.fs  # resolves the scheme now, where an error can say what is meant
    except (ImportError, ValueError) as error:
        raise HeyGenBadInputError(
            f"{named} cannot be used: {error}. Is the Airflow provider of that storage installed?"
        ) from None
    # It drops what follows "::", line breaks and a last "?" or "#"; its paths may leave out a host.
    whole = re.sub(r"^[^:/]*://([^/?#]*@)?", "", uri)
    if found.path.strip("/") not in (whole.strip("/"), whole.partition("/")[2]):
        raise HeyGenBadInputError(
            f"{named} has characters (such as '::' or a line break) with which Airflow's ObjectStoragePath"
            f" takes it for another file, {redact_urls(str(found))!r}. Choose another name."
        )
    return found


def size_text(size: float) -> str:
    """Return a size in bytes as people read it."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size:.0f} bytes"


def fingerprint(path: ObjectStoragePath, info: Mapping[str, Any] | None = None) -> str | None:
    """
    Return what tells one version of a file from another without reading it; ``None`` if nothing does.

    :param info: what its file system says of the file; asked for if not given.
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
    path: object, done: str, kind: type[HeyGenError] = HeyGenError
) -> Iterator[None]:
    """
    Turn any storage's error into one that names the file, what failed and why.

    :raises HeyGenError: of that kind, in place of whatever was raised.
    """
    try:
        yield
    except HeyGenError:
        raise
    except Exception as error:
        reason = redact_urls(str(error)) or type(error).__name__
        raise kind(f"{path} cannot be {done}: {reason}.") from None


def plain_uri(path: ObjectStoragePath) -> str:
    """Give the URI of a file as lineage knows it: whole, and without the name of an Airflow connection."""
    if path.protocol in ("", "file"):
        return f"file://{os.path.abspath(path.path)}"
    return f"{path.protocol}://{path.path.lstrip('/')}"


@contextlib.contextmanager
def redact_urllib3_logs() -> Iterator[None]:
    """
    Keep presigned links out of urllib3's log.

    At level DEBUG it has each path with its query, and its warning of broken headers has the whole link.
    Airflow's mask does not do: a scheduler or worker mirrors the lines of its tasks to its own output
    unmasked.
    """
    loggers = [logging.getLogger(f"urllib3.{module}") for module in ("connection", "connectionpool")]
    cut = _CutLinks()  # one of its own: what another thread ends must not end ours
    for logger in loggers:
        logger.addFilter(cut)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(cut)


class _CutLinks(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.args, tuple):
            record.args = tuple(redact_urls(arg) if isinstance(arg, str) else arg for arg in record.args)
        return True


def check_url(base: str, link: str, settings: HeyGenConnection, what: str) -> tuple[str, str]:
    """
    Give a link that may be followed, and its host; a hostile one must not reach our own network.

    :param base: the URL the link was found at, or "" for one that must be whole.
    :param what: how to call it in an error, such as "The link to the video".
    :raises HeyGenPermanentError: it is no URL, not https, or leads to a private or loopback address.
    """
    try:
        request = PreparedRequest()
        # As it will be read when it is followed: of https://10.0.0.1\@x.y, urlsplit would see the other host.
        request.prepare_url(urljoin(base, link), None)
        link = str(request.url)
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
    return not all(_is_public(ipaddress.ip_address(address)) for address in found)


def _is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    if isinstance(address, ipaddress.IPv6Address):
        # An IPv4 address in the form of an IPv6 one: the network may lead it back.
        within = address.ipv4_mapped or address.sixtofour
        if address in _NAT64:  # how a network without IPv4 reaches public hosts, too
            within = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if within is None:
            return address.is_global and address in _IPV6_UNICAST
        address = within
    return address.is_global and not address.is_multicast
