"""Upload the files an overdub is made from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow.providers.common.compat.sdk import BaseOperator

if TYPE_CHECKING:
    from collections.abc import Sequence

    from airflow.providers.common.compat.sdk import Context


class HeyGenUploadAssetOperator(BaseOperator):
    """
    Upload a video or audio file to HeyGen, streamed from where it is.

    Returns ``{"type": "asset_id", "asset_id": ...}``, which is what ``video`` and ``audio`` of
    :class:`~airflow_provider_heygen.operators.overdub.HeyGenCreateOverdubOperator` take; XCom key
    ``asset_id`` holds the bare id.

    :param source: a local path, or any URI Airflow's ObjectStoragePath understands: ``file://``,
        ``s3://conn_id@bucket/key``, ``gs://`` ... At most 32 MB. (templated)
    :param heygen_conn_id: the Airflow connection. (templated)
    :raises HeyGenBadInputError: the file is missing, empty, a directory or too large; nothing was sent.
    """

    template_fields: Sequence[str] = ("source", "heygen_conn_id")
    ui_color = "#e3d9ff"

    def __init__(self, *, source: str, heygen_conn_id: str = "heygen_default", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.source = source
        self.heygen_conn_id = heygen_conn_id

    def execute(self, context: Context) -> dict[str, str]:
        """Upload it."""
        from airflow_provider_heygen.hooks.heygen import HeyGenHook

        with HeyGenHook(self.heygen_conn_id) as hook:
            asset = hook.upload_asset(self.source)
        self.log.info("Uploaded as asset %s (%s).", asset.asset_id, asset.mime_type)
        context["ti"].xcom_push(key="asset_id", value=asset.asset_id)
        return {"type": "asset_id", "asset_id": asset.asset_id}
