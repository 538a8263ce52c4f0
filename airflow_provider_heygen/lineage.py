"""
Datasets that tasks report to OpenLineage, without secrets.

HeyGen's objects are in the namespace ``heygen``: ``overdubs/<id>``, under either name of the resource, and
``assets/<id>``. The names of files follow OpenLineage's conventions, without Airflow connection ids and
without the query and user of URLs. Other tasks that use a file then report the same dataset.

Airflow imports this module when it creates an Airflow Asset. Its heavy imports are therefore in functions.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Iterable
    from urllib.parse import SplitResult

    from airflow.providers.common.compat.sdk import Asset
    from airflow.providers.openlineage.extractors import OperatorLineage
    from openlineage.client.event_v2 import Dataset

NAMESPACE = "heygen"

# Clients have different schemes for the same store.
SCHEMES = {"s3a": "s3", "s3n": "s3", "gcs": "gs"}


def overdub_uri(overdub_id: str) -> str:
    """Return the URI of an overdub as an Airflow Asset."""
    return f"{NAMESPACE}://overdubs/{overdub_id}"


def asset_uri(asset_id: str) -> str:
    """Return the URI of a HeyGen asset as an Airflow Asset."""
    return f"{NAMESPACE}://assets/{asset_id}"


def media_uri(value: Any) -> str | None:
    """
    Return the URI of ``video`` or ``audio``, or ``None`` if it is empty.

    :param value: URL, URI or path of a file, ObjectStoragePath, or HeyGen's ``{"type": ...}``.
    """
    if isinstance(value, dict):
        if value.get("asset_id"):
            return asset_uri(value["asset_id"])
        value = value.get("url")
    return str(value) if value else None


def local_path(text: str) -> str | None:
    """Return the local path that a path or a URI names; ``None`` for the URI of another storage."""
    path = re.sub(r"(?i)^(file:(//(localhost)?)?|local://)", "", text)
    if path == text and re.match(r"(?i)[a-z][a-z0-9+.-]*://", text):
        return None
    return os.path.expanduser(path)


def dataset(uri: str) -> Dataset:
    """Return the dataset of a URI or a local path."""
    from airflow.providers.common.compat.openlineage.facet import Dataset

    return Dataset(*_name(uri))


def _name(uri: str) -> tuple[str, str]:
    from airflow_provider_heygen.api import redact_urls

    if (local := local_path(uri)) is not None:
        return "file", os.path.abspath(local)
    scheme, _, rest = uri.partition("://")
    scheme = scheme.lower()
    if scheme in ("http", "https"):
        parts = urlsplit(redact_urls(uri))  # redacted first, because an error of urlsplit quotes the URL
        return f"{scheme}://{parts.netloc.rpartition('@')[2]}", parts.path or "/"
    authority, _, path = redact_urls(rest.partition("?versionId=")[0]).partition("/")
    authority = authority.rpartition("@")[2]  # an Airflow connection id, or a user
    if scheme == NAMESPACE:
        return NAMESPACE, f"{authority}/{path}"
    return f"{SCHEMES.get(scheme, scheme)}://{authority}", path.strip("/") or "/"


def operator_lineage(inputs: Iterable[str | None], outputs: Iterable[Dataset]) -> OperatorLineage[Any, Any]:
    """Return a task's lineage for OpenLineage; ``inputs`` are URIs, and ``None`` is skipped."""
    from airflow.providers.openlineage.extractors import OperatorLineage

    return OperatorLineage(inputs=[dataset(uri) for uri in inputs if uri], outputs=list(outputs))


def output_dataset(uri: str, size: int) -> Dataset:
    """Return the dataset of a file of ``size`` bytes that a task has written."""
    from airflow.providers.common.compat.openlineage.facet import (
        OutputDataset,
        OutputStatisticsOutputDatasetFacet,
    )

    statistics = OutputStatisticsOutputDatasetFacet(size=size, fileCount=1)
    return OutputDataset(*_name(uri), outputFacets={"outputStatistics": statistics})


# --- Assets of scheme heygen, registered in get_provider_info -----------------------------------------


def sanitize_uri(uri: SplitResult) -> SplitResult:
    """
    Check the URI of an Airflow Asset: ``heygen://overdubs/<id>`` or ``heygen://assets/<id>``.

    :raises ValueError: if it names no object.
    """
    if not uri.netloc or uri.path in ("", "/"):
        raise ValueError("URI format heygen:// must be heygen://overdubs/<id> or heygen://assets/<id>")
    return uri


def convert_asset(asset: Asset, lineage_context: Any) -> Dataset:  # noqa: ARG001
    """Return the dataset of an Airflow Asset that OpenLineage finds in hook lineage."""
    return dataset(asset.uri)
