"""
What tasks tell OpenLineage: datasets under the names that other tools give them, and none of their secrets.

HeyGen's own objects are in the namespace ``heygen``: ``overdubs/<id>``, whatever the connection's resource is
called, and ``assets/<id>``. Files are named as OpenLineage's conventions say, without the Airflow connection
that reads them; links without their query and user.

Airflow imports this module wherever an Asset is made, so nothing heavy stands at its top, and what it needs
of OpenLineage is imported where OpenLineage calls.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Iterable
    from urllib.parse import SplitResult

    from airflow.providers.common.compat.sdk import Asset
    from airflow.providers.openlineage.extractors import OperatorLineage
    from openlineage.client.event_v2 import Dataset

NAMESPACE = "heygen"

# The same store under the names of several clients.
_ONE_STORE = {"s3a": "s3", "s3n": "s3", "gcs": "gs"}


def overdub_uri(overdub_id: str) -> str:
    """Give the URI of an overdub as an Airflow Asset."""
    return f"{NAMESPACE}://overdubs/{overdub_id}"


def asset_uri(asset_id: str) -> str:
    """Give the URI of an uploaded file as an Airflow Asset."""
    return f"{NAMESPACE}://assets/{asset_id}"


def media_uri(value: Any) -> str | None:
    """
    Give the URI of what ``video`` or ``audio`` names.

    :param value: a link, the URI or path of a file, an ObjectStoragePath, or HeyGen's ``{"type": ...}``.
    :returns: ``None`` if it names nothing.
    """
    if isinstance(value, dict):
        if value.get("asset_id"):
            return asset_uri(value["asset_id"])
        value = value.get("url")
    return str(value) if value else None


def dataset(uri: str) -> Dataset:
    """
    Give the dataset of a URI, or of a local path.

    By OpenLineage's naming conventions, as the converters of Airflow's own providers have it: a file that
    another task writes or reads is the same dataset there.
    """
    from airflow.providers.common.compat.openlineage.facet import Dataset

    return Dataset(*_name(uri))


def _name(uri: str) -> tuple[str, str]:
    from airflow_provider_heygen.api import redact_links

    scheme, separator, rest = uri.partition("://")
    scheme = scheme.lower()
    if not separator or scheme == "file":
        return "file", os.path.abspath(rest if separator else uri)
    if scheme in ("http", "https"):
        parts = urlsplit(redact_links(uri))  # before, because an error of urlsplit quotes what it was given
        return f"{scheme}://{parts.netloc.rpartition('@')[2]}", parts.path or "/"
    authority, _, path = redact_links(rest).partition("/")
    authority = authority.rpartition("@")[2]  # the name of an Airflow connection, or a user
    if scheme == NAMESPACE:
        return NAMESPACE, f"{authority}/{path}"
    return f"{_ONE_STORE.get(scheme, scheme)}://{authority}", path.strip("/") or "/"


def of_task(inputs: Iterable[str | None], outputs: Iterable[Dataset]) -> OperatorLineage[Any, Any]:
    """
    Give a task's lineage as OpenLineage takes it.

    :param inputs: URIs; ``None`` is passed over.
    """
    from airflow.providers.openlineage.extractors import OperatorLineage

    return OperatorLineage(inputs=[dataset(uri) for uri in inputs if uri], outputs=list(outputs))


def written(uri: str, size: int) -> Dataset:
    """
    Give the dataset of a file that a task has written.

    :param size: in bytes.
    """
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

    :raises ValueError: it names nothing.
    """
    if not uri.netloc or uri.path in ("", "/"):
        raise ValueError("URI format heygen:// must be heygen://overdubs/<id> or heygen://assets/<id>")
    return uri


def convert_asset(asset: Asset, lineage_context: Any) -> Dataset:  # noqa: ARG001
    """Translate such an Asset for OpenLineage, which finds it in the lineage of hooks."""
    return dataset(asset.uri)
