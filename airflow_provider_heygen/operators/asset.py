"""Upload the files an overdub is made from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow.providers.common.compat.sdk import BaseOperator

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import jinja2
    from airflow.providers.common.compat.sdk import Context
    from airflow.providers.openlineage.extractors import OperatorLineage


class LinksMaskedOperator(BaseOperator):
    """An operator with fields that may hold links; what is secret in them is masked before it is shown."""

    link_fields: Sequence[str] = ()

    def _do_render_template_fields(
        self,
        parent: Any,
        template_fields: Iterable[str],
        context: Context,
        jinja_env: jinja2.Environment,
        seen_oids: set[int],
    ) -> None:
        # The one place that mapped and plain tasks both pass before Airflow stores the rendered fields.
        super()._do_render_template_fields(parent, template_fields, context, jinja_env, seen_oids)
        from airflow_provider_heygen.media import mask_links

        mask_links(*(getattr(self, name) for name in self.link_fields))


class HeyGenUploadAssetOperator(LinksMaskedOperator):
    """
    Upload a video or audio file to HeyGen, streamed from where it is and once over all retries (Airflow 3.3).

    After a clear, or when it has changed, the file is uploaded again.

    Returns ``{"type": "asset_id", "asset_id": ...}``, which is what ``video`` and ``audio`` of
    :class:`~airflow_provider_heygen.operators.overdub.HeyGenCreateOverdubOperator` take; XCom key
    ``asset_id`` holds the bare id.

    :param source: a local path, or any URI Airflow's ObjectStoragePath understands: ``file://``,
        ``s3://conn_id@bucket/key``, ``gs://`` ... mp4, webm, mp3, wav, png or jpeg, told by its bytes. At
        most 32 MB; more (HeyGen's own uploader: 200 MB) where the connection's ``resource`` is ``lipsyncs``.
        (templated)
    :param heygen_conn_id: the Airflow connection. (templated)
    :raises HeyGenTaskFailedError: if the file is missing, empty, a directory, too large or of another type
        (nothing
        was sent), or HeyGen or its storage rejected it: the task fails without a retry.
    :raises HeyGenTransientError: they could not be reached, or the upload broke off; worth a retry.
    """

    template_fields: Sequence[str] = ("source", "heygen_conn_id")
    link_fields = ("source",)
    ui_color = "#e3d9ff"

    def __init__(self, *, source: str, heygen_conn_id: str = "heygen_default", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.source = source
        self.heygen_conn_id = heygen_conn_id
        self._asset_id: str | None = None

    def execute(self, context: Context) -> dict[str, str]:
        """Upload it."""
        from airflow_provider_heygen.dubbing import fails_task
        from airflow_provider_heygen.hooks.heygen import HeyGenHook
        from airflow_provider_heygen.submitter import Ledger, upload_once
        from airflow_provider_heygen.upload import Source

        with fails_task(), HeyGenHook(self.heygen_conn_id) as hook:
            source = Source.of(self.source, hook.settings)
            self._asset_id = upload_once(source, hook, Ledger(context, durable=True))
        context["ti"].xcom_push(key="asset_id", value=self._asset_id)
        return {"type": "asset_id", "asset_id": self._asset_id}

    def get_openlineage_facets_on_complete(self, task_instance: Any) -> OperatorLineage[Any, Any]:  # noqa: ARG002
        """Tell OpenLineage: the file has become HeyGen's asset, unless the task failed before."""
        from airflow_provider_heygen import lineage

        assets = [lineage.dataset(lineage.asset_uri(self._asset_id))] if self._asset_id else []
        return lineage.of_task([lineage.media_uri(self.source)], assets)
