"""Keep the result of an overdub."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from airflow.providers.common.compat.sdk import Asset, BaseOperator

if TYPE_CHECKING:
    from collections.abc import Sequence

    from airflow.providers.common.compat.sdk import Context
    from airflow.providers.openlineage.extractors import OperatorLineage


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
    :param destination: a local path, or any URI Airflow's ObjectStoragePath understands: ``file://``,
        ``s3://conn_id@bucket/key``, ``gs://`` ... With a slash at its end, the file in there is named
        ``<overdub_id>.mp4``. (templated)
    :param overwrite: replace what is there. Without it, a file of the same size and with the same first MiB
        is taken for this video and kept, and any other is an error.
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

        destination = str(self.destination)
        if destination == "None":
            raise HeyGenBadInputError(
                "destination is the text 'None', which is what a template makes of a missing value."
            )
        if destination.endswith("/"):
            destination += f"{check_id(self.overdub_id)}.mp4"
        if "://" not in destination:
            destination = f"file://{os.path.abspath(destination)}"
        with HeyGenHook(self.heygen_conn_id) as hook:
            size = hook.download_overdub(self.overdub_id, destination, overwrite=self.overwrite)
            self._written[destination] = size
            self.log.info("Overdub %s is at %s (%.1f MB).", self.overdub_id, destination, size / 1e6)
            if self.captions:
                captions = f"{os.path.splitext(destination)[0]}.srt"
                self._written[captions] = hook.download_captions(
                    self.overdub_id, captions, overwrite=self.overwrite
                )
                context["ti"].xcom_push(key="captions", value=captions)
        for outlet in self.outlets:
            if isinstance(outlet, Asset):
                extra = context["outlet_events"][outlet].extra
                extra.update(overdub_id=self.overdub_id, uri=destination, size_bytes=size)
        return destination

    def get_openlineage_facets_on_complete(self, task_instance: Any) -> OperatorLineage[Any, Any]:  # noqa: ARG002
        """Tell OpenLineage: out of the overdub came the files that are there, if the task failed, too."""
        from airflow_provider_heygen import lineage

        files = [lineage.written(uri, size) for uri, size in self._written.items()]
        return lineage.of_task([lineage.overdub_uri(self.overdub_id)], files)
