"""Files on their way to HeyGen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from airflow_provider_heygen.api import MAX_MULTIPART_BYTES
from airflow_provider_heygen.exceptions import HeyGenBadInputError
from airflow_provider_heygen.media import storage_path

if TYPE_CHECKING:
    from os import PathLike

    from airflow.providers.common.compat.sdk import ObjectStoragePath


def uploadable(path: str | PathLike[str] | ObjectStoragePath) -> ObjectStoragePath:
    """
    Check that HeyGen could take a file.

    :raises HeyGenBadInputError: it is missing, a directory, empty, or over 32 MB.
    """
    source = storage_path(path, "the file to upload")
    if source.is_dir():
        raise HeyGenBadInputError(f"{source} is a directory; name one file.")
    try:
        size = source.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        raise HeyGenBadInputError(f"There is no file {source}; nothing was uploaded.") from None
    if size == 0:
        raise HeyGenBadInputError(f"{source} is empty; nothing was uploaded.")
    if size > MAX_MULTIPART_BYTES:
        raise HeyGenBadInputError(
            f"{source} has {size / 2**20:.1f} MiB, HeyGen takes {MAX_MULTIPART_BYTES >> 20} MiB per upload."
            " Make it smaller, or pass a public https URL as video or audio."
        )
    return source
