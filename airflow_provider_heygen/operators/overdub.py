"""Create, rename and delete overdubs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from airflow.providers.common.compat.sdk import conf

from airflow_provider_heygen.compat import is_deferral_timeout
from airflow_provider_heygen.operators.asset import HeyGenBaseOperator
from airflow_provider_heygen.plugin import WatchLink

# Modules that need requests, aiohttp or pydantic are imported when a task runs, not when a DAG is parsed.
if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import timedelta

    from airflow.providers.common.compat.sdk import Context, ObjectStoragePath
    from airflow.providers.openlineage.extractors import OperatorLineage

REQUEST_FIELDS = (
    "video",
    "audio",
    "title",
    "mode",
    "enable_caption",
    "enable_dynamic_duration",
    "disable_music_track",
    "enable_speech_enhancement",
    "enable_watermark",
    "start_time",
    "end_time",
    "keep_the_same_format",
    "fps_mode",
    "callback_url",
    "callback_id",
    "folder_id",
)
"""The 16 fields of HeyGen's page "Create Overdub"."""


class HeyGenCreateOverdubOperator(HeyGenBaseOperator):
    """
    Put a new audio track on a video; HeyGen re-syncs the speaker's lips.

    Starts one overdub and, by default, waits until it is final. Returns its ``overdub_id``, which sensor,
    transfer, update and delete accept; with ``destination`` the URI of the saved video, as the transfer does.
    XCom keys ``overdub_id`` and ``asset_ids`` (of the files that were uploaded first) are pushed before the
    wait. XCom key ``overdub`` is pushed at the end: the details without HeyGen's URLs, ``mode``, ``cost`` (in
    dollars, if the connection has ``price_per_second``), and with ``destination`` ``uri`` and ``size``
    (bytes).

    The first 16 arguments are the fields of HeyGen's request, all templated. HeyGen's defaults apply to
    those that are omitted. They are validated when the task runs, before any request is sent.

    :param video: source video: a public https URL, which HeyGen downloads; or the URI of a file
        (``file:///data/talk.mp4``, ``s3://conn_id@bucket/key``, ``gs://`` ..., or an ObjectStoragePath),
        which is uploaded first, as by :class:`.HeyGenUploadAssetOperator`; or
        ``{"type": "asset_id", "asset_id": ...}``, which that operator returns. A file must exist as
        long as the task may be retried: a retry compares the content to detect a changed request.
    :param audio: the new audio, same forms.
    :param title: name in HeyGen's dashboard.
    :param mode: ``speed`` (HeyGen's default) or ``precision``: better, slower, twice the price. A sensor's
        ``mode`` that comes from ``default_args`` is ignored with a warning.
    :param enable_caption: HeyGen ignores this field since August 2026: captions are always made.
    :param enable_dynamic_duration: let the output's length follow the new audio (HeyGen's default: true).
    :param disable_music_track: remove the source's background music.
    :param enable_speech_enhancement: enhance the speech.
    :param enable_watermark: add a watermark.
    :param start_time: start of a partial overdub, in seconds.
    :param end_time: end of a partial overdub, in seconds.
    :param keep_the_same_format: keep the source's resolution and bitrate.
    :param fps_mode: ``vfr``, ``cfr`` or ``passthrough``.
    :param callback_url: receives one POST from HeyGen when the overdub completes or fails.
    :param callback_id: echoed in the callback and in the overdub. If unset, a unique one is sent, by which an
        overdub whose response was lost is found again.
    :param folder_id: project folder of the result.
    :param extra_body: further fields of the request that HeyGen knows and this release does not. (templated)
    :param upload_links: download an https URL in ``video`` or ``audio`` on the worker and upload the file, as
        one in storage. Use it for sources that HeyGen cannot reach, that exceed 32 MB (the account needs
        ``lipsyncs``), or whose URLs expire soon. The worker needs temporary disk space for the file.
    :param destination: save the completed video there: ``destination`` of
        :class:`.HeyGenOverdubToObjectStorageOperator`. If saving fails, a retry saves the video without
        another overdub. (templated)
    :param captions: save the captions beside the video, as that operator does.
    :param overwrite: replace existing files. Without it, an existing file that this task instance did not
        write is an error before any request is sent.
    :param skip_existing: succeed at once, without any request to HeyGen, if the destination exists and is not
        older than the files in ``video`` and ``audio``. Otherwise, the destination is replaced.
    :param reuse: ``"content"`` to use the overdub of any task or DAG run whose request is the same in all
        that is billed, if HeyGen's list has one that is at most three days old and has not failed.
    :param heygen_conn_id: Airflow connection id. (templated)
    :param wait_for_completion: wait until the overdub is final; without it, the id is returned at once.
    :param deferrable: wait in the triggerer, not on a worker.
    :param poke_interval: seconds (or timedelta) between polls. (templated)
    :param timeout: seconds (or timedelta) to wait from the create request on, ``None`` for no limit. The
        overdub itself keeps running. Only ``execution_timeout`` limits the time before the create request,
        such as a queue for HeyGen's slots. (templated)
    :param durable: start one overdub over all retries, even if a worker or triggerer dies: a retry reattaches
        to an overdub that has not failed. Clearing the task after success starts a new one. Airflow before
        3.3 has no task state store; there a retry searches HeyGen's list, and a clear starts a new overdub.
    :raises HeyGenTaskFailedError: if an argument is wrong, HeyGen rejected the create request, or the
        overdub failed or was deleted: the task fails without a retry.
    :raises HeyGenTransientError: if HeyGen was unreachable for too long. Retry.
    :raises HeyGenOutcomeUnknownError: if it cannot be determined whether a lost create request started an
        overdub. Nothing more was sent; a retry searches again.
    :raises HeyGenPermanentError: if HeyGen rejected the repetition of a lost create request. A retry searches
        for the overdub again.
    :raises HeyGenOverdubTimeoutError: if ``timeout`` passed. A retry continues to wait for the same overdub.
    """

    template_fields: Sequence[str] = (
        *REQUEST_FIELDS,
        "extra_body",
        "destination",
        "heygen_conn_id",
        "poke_interval",
        "timeout",
    )
    url_fields = ("video", "audio", "callback_url", "destination", "extra_body")
    template_fields_renderers = {"video": "json", "audio": "json", "extra_body": "json"}
    operator_extra_links = (WatchLink(),)

    def __init__(
        self,
        *,
        video: str | dict[str, Any] | ObjectStoragePath,
        audio: str | dict[str, Any] | ObjectStoragePath,
        title: str | None = None,
        mode: str | None = None,
        enable_caption: bool | None = None,
        enable_dynamic_duration: bool | None = None,
        disable_music_track: bool | None = None,
        enable_speech_enhancement: bool | None = None,
        enable_watermark: bool | None = None,
        start_time: float | None = None,
        end_time: float | None = None,
        keep_the_same_format: bool | None = None,
        fps_mode: str | None = None,
        callback_url: str | None = None,
        callback_id: str | None = None,
        folder_id: str | None = None,
        extra_body: dict[str, Any] | None = None,
        upload_links: bool = False,
        destination: str | None = None,
        captions: bool = False,
        overwrite: bool = False,
        skip_existing: bool = False,
        reuse: Literal["content"] | None = None,
        heygen_conn_id: str = "heygen_default",
        wait_for_completion: bool = True,
        deferrable: bool = conf.getboolean("operators", "default_deferrable", fallback=False),
        poke_interval: timedelta | float = 30,
        timeout: timedelta | float | None = 2 * 60 * 60,
        durable: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.video = video
        self.audio = audio
        self.title = title
        self.mode = mode
        self.enable_caption = enable_caption
        self.enable_dynamic_duration = enable_dynamic_duration
        self.disable_music_track = disable_music_track
        self.enable_speech_enhancement = enable_speech_enhancement
        self.enable_watermark = enable_watermark
        self.start_time = start_time
        self.end_time = end_time
        self.keep_the_same_format = keep_the_same_format
        self.fps_mode = fps_mode
        self.callback_url = callback_url
        self.callback_id = callback_id
        self.folder_id = folder_id
        self.extra_body = extra_body
        self.upload_links = upload_links
        self.destination = destination
        self.captions = captions
        self.overwrite = overwrite
        self.skip_existing = skip_existing
        self.reuse = reuse
        self.heygen_conn_id = heygen_conn_id
        self.wait_for_completion = wait_for_completion
        self.deferrable = deferrable
        self.poke_interval = poke_interval
        self.timeout = timeout
        self.durable = durable
        # For lineage, which Airflow requests from the operator at the end.
        self.overdub_id: str | None = None
        self.written: dict[str, int] = {}

    def request_fields(self) -> dict[str, Any]:
        """Return the rendered fields of HeyGen's request."""
        fields = {name: getattr(self, name) for name in (*REQUEST_FIELDS, "extra_body")}
        if self.mode in ("poke", "reschedule"):
            self.log.warning(
                "Ignoring 'mode' %r, which is a sensor's, perhaps from default_args. For an overdub's, set"
                " mode='speed', mode='precision' or mode=None on this task.",
                self.mode,
            )
            fields["mode"] = None
        return fields

    def execute(self, context: Context) -> str:
        """Start the overdub, and wait on the worker or in the triggerer."""
        from airflow_provider_heygen.dubbing import Dubbing

        return Dubbing(self, context).start()

    def execute_again(
        self,
        context: Context,
        event: Any = None,  # noqa: ARG002
        since: float | None = None,
        until: float | None = None,
        kept: dict[str, Any] | None = None,
    ) -> str:
        """Send the create request again when HeyGen has a free slot, or its ``Retry-After`` has passed."""
        from airflow_provider_heygen.dubbing import Dubbing

        return Dubbing(self, context, since=since, until=until, kept=kept).start()

    def execute_complete(
        self,
        context: Context,
        event: Any = None,
        since: float | None = None,
        deadline: float | None = None,
    ) -> str:
        """Return the result when the trigger has fired."""
        from airflow_provider_heygen.dubbing import Dubbing

        return Dubbing(self, context).finish(event, since, deadline)

    def resume_execution(self, next_method: str, next_kwargs: dict[str, Any] | None, context: Context) -> Any:
        """Poll once more if Airflow itself ended the deferral because no triggerer was running."""
        if is_deferral_timeout(next_method, next_kwargs):
            ti: Any = context["ti"]
            overdub_id = ti.xcom_pull(task_ids=self.task_id, key="overdub_id", map_indexes=ti.map_index)
            if overdub_id:  # otherwise the task was waiting for a slot
                from airflow_provider_heygen.waiting import no_triggerer

                next_method, next_kwargs = "execute_complete", {"event": no_triggerer(overdub_id)}
        return super().resume_execution(next_method, next_kwargs, context)

    def get_openlineage_facets_on_complete(self, task_instance: Any) -> OperatorLineage[Any, Any]:  # noqa: ARG002
        """Report to OpenLineage both sources as inputs; the overdub and the saved files as outputs."""
        from airflow_provider_heygen import lineage

        overdubs = [lineage.dataset(lineage.overdub_uri(self.overdub_id))] if self.overdub_id else []
        return self._lineage(overdubs)

    def get_openlineage_facets_on_failure(self, task_instance: Any) -> OperatorLineage[Any, Any]:  # noqa: ARG002
        """Report to OpenLineage both sources, and the files that were saved before the task failed."""
        return self._lineage([])

    def _lineage(self, overdubs: list[Any]) -> OperatorLineage[Any, Any]:
        from airflow_provider_heygen import lineage

        files = [lineage.output_dataset(uri, size) for uri, size in self.written.items()]
        return lineage.operator_lineage(map(lineage.media_uri, (self.video, self.audio)), [*overdubs, *files])


class HeyGenUpdateOverdubOperator(HeyGenBaseOperator):
    """
    Rename an overdub. Returns ``overdub_id``; XCom key ``overdub`` holds the details.

    :param overdub_id: the overdub. (templated)
    :param title: the new title. (templated)
    :param heygen_conn_id: Airflow connection id. (templated)
    :raises HeyGenTaskFailedError: if the id or the title is wrong, or HeyGen rejected the request.
    """

    template_fields: Sequence[str] = ("overdub_id", "title", "heygen_conn_id")

    def __init__(
        self, *, overdub_id: str, title: str, heygen_conn_id: str = "heygen_default", **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.overdub_id = overdub_id
        self.title = title
        self.heygen_conn_id = heygen_conn_id

    def execute(self, context: Context) -> str:
        """Rename the overdub."""
        from airflow_provider_heygen.api import redact_urls
        from airflow_provider_heygen.dubbing import fails_task
        from airflow_provider_heygen.hooks.heygen import HeyGenHook

        with fails_task(), HeyGenHook(self.heygen_conn_id) as hook:
            overdub = hook.update_overdub(self.overdub_id, self.title)
        self.log.info("Overdub %s is now called %r.", self.overdub_id, redact_urls(str(self.title)))
        context["ti"].xcom_push(key="overdub", value=overdub.details())
        return self.overdub_id


class HeyGenDeleteOverdubOperator(HeyGenBaseOperator):
    """
    Delete an overdub and its files at HeyGen. They cannot be restored.

    :param overdub_id: the overdub. (templated)
    :param ignore_missing: succeed if there is no such overdub (any more), which makes a retry safe. After a
        404, the task reads HeyGen's list, because a new overdub may be a 404 for a moment.
    :param heygen_conn_id: Airflow connection id. (templated)
    :raises HeyGenTaskFailedError: if the id is wrong, HeyGen rejected the request, there is no such overdub
        and ``ignore_missing`` is off, or the whole endpoint is missing (a wrong ``resource`` in the
        connection).
    :raises HeyGenTransientError: if HeyGen returned 404, but its list has the overdub. Retry.
    """

    template_fields: Sequence[str] = ("overdub_id", "heygen_conn_id")

    def __init__(
        self,
        *,
        overdub_id: str,
        ignore_missing: bool = True,
        heygen_conn_id: str = "heygen_default",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.overdub_id = overdub_id
        self.ignore_missing = ignore_missing
        self.heygen_conn_id = heygen_conn_id

    def execute(self, context: Context) -> None:  # noqa: ARG002
        """Delete the overdub."""
        from airflow_provider_heygen.dubbing import fails_task
        from airflow_provider_heygen.exceptions import HeyGenNotFoundError, HeyGenTransientError
        from airflow_provider_heygen.hooks.heygen import HeyGenHook

        with fails_task(), HeyGenHook(self.heygen_conn_id) as hook:
            try:
                hook.delete_overdub(self.overdub_id)
            except HeyGenNotFoundError:
                if not self.ignore_missing:
                    raise
                # A new overdub is a 404 for a moment. A wrong 'resource' makes all of them one, and the list.
                if any(overdub.overdub_id == str(self.overdub_id) for overdub in hook.iter_overdubs()):
                    raise HeyGenTransientError(
                        f"HeyGen returned 404 for the deletion of overdub {self.overdub_id}, but its list has"
                        " it. It was not deleted; retry the task."
                    ) from None
                self.log.info("Overdub %s does not exist (any more).", self.overdub_id)
            else:
                self.log.info("Deleted overdub %s.", self.overdub_id)
