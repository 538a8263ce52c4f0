"""Keep the result of an overdub."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow.providers.common.compat.sdk import BaseOperator

from airflow_provider_heygen.plugin import WatchLink

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
        self.written: dict[str, int] = {}  # for lineage, which Airflow asks of the operator after its task

    def execute(self, context: Context) -> str:
        """Fetch and store it."""
        from airflow_provider_heygen.dubbing import fails_task
        from airflow_provider_heygen.hooks.heygen import HeyGenHook
        from airflow_provider_heygen.saving import Saving

        with fails_task():
            saving = Saving(self, context, self.overdub_id)
            with HeyGenHook(self.heygen_conn_id) as hook:
                saving.save(hook)
        return saving.uri

    def get_openlineage_facets_on_complete(self, task_instance: Any) -> OperatorLineage[Any, Any]:  # noqa: ARG002
        """Tell OpenLineage: out of the overdub came the files that are there, if the task failed, too."""
        from airflow_provider_heygen import lineage

        files = [lineage.output_dataset(uri, size) for uri, size in self.written.items()]
        return lineage.operator_lineage([lineage.overdub_uri(self.overdub_id)], files)
