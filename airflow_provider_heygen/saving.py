"""The files that a task saves of an overdub: the transfer, and the create operator with ``destination``."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from airflow.providers.common.compat.sdk import Asset

from airflow_provider_heygen.api import check_id, redact_urls
from airflow_provider_heygen.compat import task_state_store
from airflow_provider_heygen.download import existing_size
from airflow_provider_heygen.exceptions import HeyGenBadInputError
from airflow_provider_heygen.media import fingerprint, storage_path

if TYPE_CHECKING:
    from collections.abc import Iterable

    from airflow.providers.common.compat.sdk import Context, ObjectStoragePath

    from airflow_provider_heygen.hooks.heygen import HeyGenHook
    from airflow_provider_heygen.operators.overdub import HeyGenCreateOverdubOperator
    from airflow_provider_heygen.transfers.heygen_to_object_storage import (
        HeyGenOverdubToObjectStorageOperator,
    )

STATE_KEY = "heygen_saved"
"""Key in the task state store; its value is ``max_tries`` by fingerprint of each file that was written."""


class Saving:
    """
    The files that a task saves of one overdub.

    :param task: an operator with ``destination``, ``captions`` and ``overwrite``. Its ``written`` receives
        the size of each file by URI.
    :param overdub_id: the overdub; only a destination that is a folder needs the id.
    :param overwrite: replace existing files, even if the task does not.
    :raises HeyGenBadInputError: if the id is malformed, or the destination names no file.
    """

    def __init__(
        self,
        task: HeyGenCreateOverdubOperator | HeyGenOverdubToObjectStorageOperator,
        context: Context,
        overdub_id: str = "not-yet",
        *,
        overwrite: bool = False,
    ) -> None:
        self.task = task
        self.context = context
        self.overdub_id = check_id(overdub_id)
        self.overwrite = overwrite or task.overwrite
        text = str(task.destination)
        self.in_folder = text.endswith("/")
        name = f"{text}{self.overdub_id}.mp4" if self.in_folder else text
        video = storage_path(name, "the destination", written=True)
        self.uri = str(video)
        self.files = {"video": video}
        captions = storage_path(f"{os.path.splitext(self.uri)[0]}.srt", "the captions")
        if task.captions:
            if str(captions) == self.uri:
                raise HeyGenBadInputError("destination ends in '.srt', which is the name of the captions.")
            self.files["captions"] = captions
        self.store = task_state_store(context)

    def save(self, hook: HeyGenHook) -> int:
        """Download the files; return the size of the video in bytes."""
        size = self._write("video", hook.download_overdub)
        if "captions" in self.files:
            self._write("captions", hook.download_captions)
            self.context["ti"].xcom_push(key="captions", value=str(self.files["captions"]))
        for outlet in self.task.outlets:
            if isinstance(outlet, Asset):
                extra = self.context["outlet_events"][outlet].extra
                extra.update(overdub_id=self.overdub_id, uri=self.uri, size_bytes=size)
        return size

    def _write(self, artifact: str, download: Any) -> int:
        path = self.files[artifact]
        size: int = download(self.overdub_id, path, overwrite=self._replaces(path))
        self.task.written[str(path)] = size
        if self.store is not None and (version := fingerprint(path)):
            written = self.store.get(STATE_KEY) or {}
            self.store.set(STATE_KEY, {**written, version: self.context["ti"].max_tries})
        return size

    def _replaces(self, path: ObjectStoragePath) -> bool:
        """Return whether to replace a file: on request, or if this task wrote it before it was cleared."""
        if self.overwrite or self.store is None:
            return self.overwrite
        max_tries = self.context["ti"].max_tries  # clearing the task raises it
        return bool((self.store.get(STATE_KEY) or {}).get(fingerprint(path), max_tries) != max_tries)

    def check(self, hook: HeyGenHook) -> None:
        """
        Check the destination, and that there will be captions, before anything is paid for.

        :raises HeyGenBadInputError: if :meth:`save` would not replace an existing file, or the account has
            ``overdubs``, which have no captions.
        """
        for path in () if self.in_folder else self.files.values():
            if existing_size(path) is not None and not self._replaces(path):
                raise HeyGenBadInputError(
                    f"{redact_urls(str(path))} exists already; no overdub was started. Set overwrite=True to"
                    " replace it or skip_existing=True to keep it, or choose another destination."
                )
        if "captions" in self.files:
            _ = hook.known_resource or hook.list_overdubs(limit=1)  # finds out the name
            if hook.resource == "overdubs":
                raise HeyGenBadInputError(
                    "captions=True: HeyGen makes captions under resource 'lipsyncs' only; no overdub was"
                    " started. If the account has it, set the extra 'resource' of Airflow connection"
                    f" '{hook.heygen_conn_id}' to 'lipsyncs'; otherwise remove captions."
                )

    def size_if_current(self, sources: Iterable[ObjectStoragePath]) -> int | None:
        """
        Return the size of the video in bytes, or ``None`` if a file is missing or older than its sources.

        :param sources: the files that the overdub is made from.
        """
        sizes = [existing_size(path) for path in self.files.values()]
        oldest = min(_modified(path, float("inf")) for path in self.files.values())
        if not all(sizes) or any(_modified(path, 0.0) > oldest for path in sources):
            return None
        return sizes[0]


def _modified(path: ObjectStoragePath, unknown: float) -> float:
    """Return the Unix seconds when a file was modified; ``unknown`` if its storage does not report them."""
    with suppress(Exception):
        return float(path.fs.modified(path.path).timestamp())
    return unknown
