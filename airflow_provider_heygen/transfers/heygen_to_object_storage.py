"""Keep the result of an overdub."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from airflow.providers.common.compat.sdk import Asset, BaseOperator

from airflow_provider_heygen.plugin import WatchLink

if TYPE_CHECKING:
    from collections.abc import Sequence

    from airflow.providers.common.compat.sdk import Context, ObjectStoragePath
    from airflow.providers.openlineage.extractors import OperatorLineage

STATE_KEY = "heygen_saved"
"""The key in the task state store; its value is :attr:`max_tries` by fingerprint of what was written."""


class HeyGenOverdubToObjectStorageOperator(BaseOperator):
    """
    Stream the video of a completed overdub to storage. Returns the URI it was written to.

    The link is fetched anew for each attempt and never stored; an attempt goes on where the last one broke
    off. Nobody sees half a file: an object store shows the object when its upload is complete, elsewhere the
    video is written under a temporary name beside the destination and moved when it is whole. What happens
    when a task is killed half-way is told in the documentation, under "What happens when ...".

    Airflow's lineage gets the overdub as input and the file as output. An Asset in ``outlets`` gets
    ``overdub_id``, ``uri`` and ``size_bytes`` as extra of its event.

    :param overdub_id: the overdub; it must be completed. (templated)
    :param destination: an absolute path, or any URI Airflow's ObjectStoragePath understands: ``file://``,
        ``s3://conn_id@bucket/key``, ``gs://`` ... With a slash at its end, the file in there is named
        ``<overdub_id>.mp4``. (templated)
    :param overwrite: replace what is there. Without it, a file of the same size and with the same first MiB
        is taken for this video and kept; one that this task instance wrote before it was cleared is replaced
        (Airflow 3.3); any other is an error.
    :param captions: keep the captions, too, beside the video and with the suffix ``.srt``; their URI goes to
        XCom key ``captions``. The video is kept first; then it is an error if there are no captions. HeyGen
        has them under ``resource`` ``lipsyncs`` only.
    :param heygen_conn_id: the Airflow connection. (templated)
    :raises HeyGenTaskFailedError: if id or destination is wrong, the destination is taken, or the overdub
        failed.
    :raises HeyGenTransientError: there are no captions, or the download broke off again and again.
    :raises HeyGenError: the overdub is not completed yet, or the destination cannot be written.
    """

    template_fields: Sequence[str] = ("overdub_id", "destination", "heygen_conn_id")
    operator_extra_links = (WatchLink(),)
    ui_color = "#e3d9ff"

    def __init__(
        self,
        *,
        overdub_id: str,
        destination: str,
        overwrite: bool = False,
        captions: bool = False,
        heygen_conn_id: str = "heygen_default",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.overdub_id = overdub_id
        self.destination = destination
        self.overwrite = overwrite
        self.captions = captions
        self.heygen_conn_id = heygen_conn_id
        self._written: dict[str, int] = {}

    def execute(self, context: Context) -> str:
        """Fetch and store it."""
        from airflow_provider_heygen.dubbing import fails_task

        with fails_task():
            return self._save(context)

    def _save(self, context: Context) -> str:
        from airflow_provider_heygen.api import check_id
        from airflow_provider_heygen.exceptions import HeyGenBadInputError
        from airflow_provider_heygen.hooks.heygen import HeyGenHook
        from airflow_provider_heygen.media import storage_path

        text = str(self.destination)
        video = storage_path(
            f"{text}{check_id(self.overdub_id)}.mp4" if text.endswith("/") else text, "the destination"
        )
        destination = str(video)
        captions = storage_path(f"{os.path.splitext(destination)[0]}.srt", "the captions")
        if self.captions and str(captions) == destination:
            raise HeyGenBadInputError("destination ends in '.srt', which is the name of the captions.")
        with HeyGenHook(self.heygen_conn_id) as hook:
            size = self._write(video, hook.download_overdub, context)
            self.log.info("Overdub %s is at %s (%.1f MB).", self.overdub_id, destination, size / 1e6)
            if self.captions:
                self._write(captions, hook.download_captions, context)
                context["ti"].xcom_push(key="captions", value=str(captions))
        for outlet in self.outlets:
            if isinstance(outlet, Asset):
                extra = context["outlet_events"][outlet].extra
                extra.update(overdub_id=self.overdub_id, uri=destination, size_bytes=size)
        return destination

    def _write(self, path: ObjectStoragePath, download: Any, context: Context) -> int:
        """Download a file, in place of one that this task instance has written before it was cleared."""
        from airflow_provider_heygen.compat import task_state_store
        from airflow_provider_heygen.media import fingerprint

        store, overwrite = task_state_store(context), self.overwrite
        written: dict[str | None, int] = {}
        if store is not None:
            max_tries = context["ti"].max_tries  # Airflow changes it at a clear
            written = store.get(STATE_KEY) or {}
            overwrite = overwrite or written.get(fingerprint(path), max_tries) != max_tries
        size: int = download(self.overdub_id, path, overwrite=overwrite)
        self._written[str(path)] = size
        if store is not None and (version := fingerprint(path)):
            store.set(STATE_KEY, {**written, version: max_tries})
        return size

    def get_openlineage_facets_on_complete(self, task_instance: Any) -> OperatorLineage[Any, Any]:  # noqa: ARG002
        """Tell OpenLineage: out of the overdub came the files that are there, if the task failed, too."""
        from airflow_provider_heygen import lineage

        files = [lineage.written(uri, size) for uri, size in self._written.items()]
        return lineage.of_task([lineage.overdub_uri(self.overdub_id)], files)
