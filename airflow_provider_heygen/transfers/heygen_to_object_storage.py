"""Save the result of an overdub."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow_provider_heygen.operators.asset import HeyGenBaseOperator
from airflow_provider_heygen.plugin import WatchLink

if TYPE_CHECKING:
    from collections.abc import Sequence

    from airflow.providers.common.compat.sdk import Context
    from airflow.providers.openlineage.extractors import OperatorLineage


class HeyGenOverdubToObjectStorageOperator(HeyGenBaseOperator):
    """
    Stream the video of a completed overdub to storage, atomically. Returns the URI of the file.

    Each attempt requests a new URL, which is never stored, and resumes where the last one broke. An object
    store shows the object when its upload is complete. Elsewhere the video has a temporary name beside the
    destination until it is complete. The page "What happens when" describes what a killed task leaves.

    Airflow's lineage has the overdub as input and the file as output. The event of an Airflow Asset in
    ``outlets`` has ``overdub_id``, ``uri`` and ``size_bytes`` as extra.

    :param overdub_id: the overdub; it must be completed. (templated)
    :param destination: absolute path, or any URI that Airflow's ObjectStoragePath supports (``file://``,
        ``s3://conn_id@bucket/key``, ``gs://`` ...). If it ends with a slash, the file in this folder is named
        ``<overdub_id>.mp4``. (templated)
    :param overwrite: replace an existing file. Without it, a file of the same size with the same first MiB is
        kept, a file that this task instance wrote before it was cleared is replaced (Airflow 3.3 and newer),
        and any other file is an error.
    :param captions: save the captions, too, after the video and beside it, with the suffix ``.srt``. Their
        URI is in XCom key ``captions``. HeyGen makes captions under ``resource`` ``lipsyncs`` only.
    :param heygen_conn_id: Airflow connection id. (templated)
    :raises HeyGenTaskFailedError: if the id or the destination is wrong, another file is at the destination,
        or the overdub failed.
    :raises HeyGenTransientError: if there are no captions, or the download breaks too often. Retry.
    :raises HeyGenError: if the overdub is not completed yet, or the destination cannot be written. Retry.
    """

    template_fields: Sequence[str] = ("overdub_id", "destination", "heygen_conn_id")
    url_fields = ("destination",)
    operator_extra_links = (WatchLink(),)

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
        self.written: dict[str, int] = {}  # for lineage, which Airflow requests at the end

    def execute(self, context: Context) -> str:
        """Save the video, and the captions if requested."""
        from airflow_provider_heygen.dubbing import fails_task
        from airflow_provider_heygen.hooks.heygen import HeyGenHook
        from airflow_provider_heygen.saving import Saving

        with fails_task():
            saving = Saving(self, context, self.overdub_id)
            with HeyGenHook(self.heygen_conn_id) as hook:
                saving.save(hook)
        return saving.uri

    def get_openlineage_facets_on_complete(self, task_instance: Any) -> OperatorLineage[Any, Any]:  # noqa: ARG002
        """Report to OpenLineage the overdub as input and the saved files as outputs, also after a failure."""
        from airflow_provider_heygen import lineage

        files = [lineage.output_dataset(uri, size) for uri, size in self.written.items()]
        return lineage.operator_lineage([lineage.overdub_uri(self.overdub_id)], files)
