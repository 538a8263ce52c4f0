"""Upload and delete HeyGen assets, the files that overdubs are made from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow.providers.common.compat.sdk import BaseOperator

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import jinja2
    from airflow.providers.common.compat.sdk import Context
    from airflow.providers.openlineage.extractors import OperatorLineage


class HeyGenBaseOperator(BaseOperator):
    """An operator that masks the secrets of URLs in ``url_fields`` before Airflow shows them."""

    url_fields: Sequence[str] = ()
    ui_color = "#e3d9ff"

    def _do_render_template_fields(
        self,
        parent: Any,
        template_fields: Iterable[str],
        context: Context,
        jinja_env: jinja2.Environment,
        seen_oids: set[int],
    ) -> None:
        # Called for mapped and plain tasks alike, before Airflow stores the rendered fields.
        super()._do_render_template_fields(parent, template_fields, context, jinja_env, seen_oids)
        from airflow_provider_heygen.media import mask_urls

        mask_urls(*(getattr(self, name) for name in self.url_fields))


class HeyGenUploadAssetOperator(HeyGenBaseOperator):
    """
    Upload a video or audio file to HeyGen, streamed, only once across all retries (Airflow 3.3 and newer).

    The file is uploaded again after a clear, or if it has changed. Returns ``{"type": "asset_id",
    "asset_id": ...}``, which ``video`` and ``audio`` of :class:`.HeyGenCreateOverdubOperator` accept. XCom
    key ``asset_id`` holds the id alone.

    :param source: local path, or any URI that Airflow's ObjectStoragePath supports (``file://``,
        ``s3://conn_id@bucket/key``, ``gs://`` ...). mp4, webm, mp3, wav, png or jpeg, detected from the
        content; up to 32 MB, more if the account has ``lipsyncs`` (HeyGen's own uploader: 200 MB).
        (templated)
    :param heygen_conn_id: Airflow connection id. (templated)
    :raises HeyGenTaskFailedError: if the file is missing, empty, a directory, too large or of another type
        (nothing was sent), or HeyGen or its storage rejected it.
    :raises HeyGenTransientError: if HeyGen or its storage was unreachable, or the upload broke. Retry.
    """

    template_fields: Sequence[str] = ("source", "heygen_conn_id")
    url_fields = ("source",)

    def __init__(self, *, source: str, heygen_conn_id: str = "heygen_default", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.source = source
        self.heygen_conn_id = heygen_conn_id
        self._asset_id: str | None = None

    def execute(self, context: Context) -> dict[str, str]:
        """Upload the file."""
        from airflow_provider_heygen.dubbing import fails_task
        from airflow_provider_heygen.hooks.heygen import HeyGenHook
        from airflow_provider_heygen.submitter import SubmissionStore, upload_once
        from airflow_provider_heygen.upload import Source

        with fails_task(), HeyGenHook(self.heygen_conn_id) as hook:
            store = SubmissionStore(context, durable=True)
            source = Source.of(self.source, hook.settings, store.files)
            self._asset_id = upload_once(source, hook, store)
        context["ti"].xcom_push(key="asset_id", value=self._asset_id)
        return {"type": "asset_id", "asset_id": self._asset_id}

    def get_openlineage_facets_on_complete(self, task_instance: Any) -> OperatorLineage[Any, Any]:  # noqa: ARG002
        """Report to OpenLineage the file as input and the HeyGen asset, if there is one, as output."""
        from airflow_provider_heygen import lineage

        assets = [lineage.dataset(lineage.asset_uri(self._asset_id))] if self._asset_id else []
        return lineage.operator_lineage([lineage.media_uri(self.source)], assets)


class HeyGenDeleteAssetOperator(HeyGenBaseOperator):
    """
    Delete HeyGen assets. They cannot be restored.

    Whether an overdub that is not final still reads its files is not documented, so delete them afterwards.

    :param asset_id: the asset, or a list of assets, such as XCom key ``asset_ids`` of a create task.
        (templated)
    :param ignore_missing: succeed if there is no such asset (any more), which makes a retry safe.
    :param heygen_conn_id: Airflow connection id. (templated)
    :raises HeyGenTaskFailedError: if an id is wrong (nothing was sent), HeyGen rejected the request, or there
        is no such asset and ``ignore_missing`` is off.
    :raises HeyGenTransientError: if HeyGen was unreachable. Retry.
    """

    template_fields: Sequence[str] = ("asset_id", "heygen_conn_id")

    def __init__(
        self,
        *,
        asset_id: str | Sequence[str],
        ignore_missing: bool = True,
        heygen_conn_id: str = "heygen_default",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.asset_id = asset_id
        self.ignore_missing = ignore_missing
        self.heygen_conn_id = heygen_conn_id

    def execute(self, context: Context) -> None:  # noqa: ARG002
        """Delete the files."""
        from airflow_provider_heygen.api import asset_ids
        from airflow_provider_heygen.dubbing import fails_task
        from airflow_provider_heygen.exceptions import HeyGenNotFoundError
        from airflow_provider_heygen.hooks.heygen import HeyGenHook

        with fails_task(), HeyGenHook(self.heygen_conn_id) as hook:
            for asset_id in list(asset_ids(self.asset_id)):
                try:
                    hook.delete_asset(asset_id)
                except HeyGenNotFoundError as error:
                    # With any other code, this API may not have the endpoint at all.
                    if not self.ignore_missing or error.code != "asset_not_found":
                        raise
                    self.log.info("Asset %s does not exist (any more).", asset_id)
                else:
                    self.log.info("Deleted asset %s.", asset_id)
