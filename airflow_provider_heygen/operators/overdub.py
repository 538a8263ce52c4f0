"""Create, rename and delete overdubs."""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from typing import TYPE_CHECKING, Any

from airflow.providers.common.compat.sdk import BaseOperator, conf

# Whatever needs requests, aiohttp or pydantic is imported where a task runs, not where a DAG is parsed.
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from datetime import timedelta

    import jinja2
    from airflow.providers.common.compat.sdk import Context

    from airflow_provider_heygen.api import CreateOverdubRequest
    from airflow_provider_heygen.hooks.heygen import HeyGenHook
    from airflow_provider_heygen.waiting import WaitEvent

_NAMESPACE = uuid.UUID("6f0c8a2e-41d5-5b7c-9d0e-8f1f6a3b2c4d")

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
"""The 16 fields of the vendor's page."""


class HeyGenCreateOverdubOperator(BaseOperator):
    """
    Put a new audio track on a video; HeyGen re-syncs the speaker's lips.

    Starts one overdub and, unless told otherwise, waits until it has ended. Returns its ``overdub_id``, which
    sensor, transfer, update and delete take as it is. XCom key ``overdub_id`` is pushed as soon as the
    overdub exists, key ``overdub`` (the details, without links) when it has ended.

    The first 16 arguments are the fields of HeyGen's request, all templated; what is not given is left to
    HeyGen's defaults. They are checked when the task runs, before anything is sent.

    :param video: source video: an https URL, ``{"type": "url", "url": ...}`` or
        ``{"type": "asset_id", "asset_id": ...}`` (which is what :class:`.HeyGenUploadAssetOperator` returns).
    :param audio: the new audio, same forms.
    :param title: name shown in HeyGen's dashboard.
    :param mode: ``speed`` (HeyGen's default) or ``precision``: better, slower, twice the price.
    :param enable_caption: generate captions.
    :param enable_dynamic_duration: let the output's length follow the new audio (HeyGen's default: true).
    :param disable_music_track: strip the source's background music.
    :param enable_speech_enhancement: clean up the speech.
    :param enable_watermark: add a watermark.
    :param start_time: start of a partial overdub, seconds.
    :param end_time: end of a partial overdub, seconds.
    :param keep_the_same_format: keep the source's resolution and bitrate.
    :param fps_mode: ``vfr``, ``cfr`` or ``passthrough``.
    :param callback_url: gets one POST from HeyGen when the job completes or fails.
    :param callback_id: echoed in the callback and in the job. Leave it unset and a unique one is sent, by
        which an overdub whose answer was lost is found again.
    :param folder_id: project folder of the result.
    :param heygen_conn_id: the Airflow connection.
    :param wait_for_completion: wait for the end; without it the id is returned at once.
    :param deferrable: wait in the triggerer, not on a worker.
    :param poke_interval: seconds (or timedelta) between looks.
    :param timeout: seconds (or timedelta) to wait, ``None`` for no limit. The overdub itself goes on.
    :param delete_on_kill: delete the overdub when the task is killed while it has not ended.
    :raises HeyGenBadInputError: an argument is wrong; nothing was sent.
    :raises HeyGenPermanentError: HeyGen refused, or the overdub failed: the task fails without retry.
    :raises HeyGenTransientError: HeyGen could not be reached for long; worth a retry.
    :raises HeyGenOverdubTimeoutError: ``timeout`` passed; a retry goes on waiting for the same overdub.
    """

    template_fields: Sequence[str] = (*REQUEST_FIELDS, "heygen_conn_id", "poke_interval", "timeout")
    template_fields_renderers = {"video": "json", "audio": "json"}
    ui_color = "#e3d9ff"

    def __init__(
        self,
        *,
        video: str | dict[str, Any],
        audio: str | dict[str, Any],
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
        heygen_conn_id: str = "heygen_default",
        wait_for_completion: bool = True,
        deferrable: bool = conf.getboolean("operators", "default_deferrable", fallback=False),
        poke_interval: timedelta | float = 30,
        timeout: timedelta | float | None = 2 * 60 * 60,
        delete_on_kill: bool = False,
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
        self.heygen_conn_id = heygen_conn_id
        self.wait_for_completion = wait_for_completion
        self.deferrable = deferrable
        self.poke_interval = poke_interval
        self.timeout = timeout
        self.delete_on_kill = delete_on_kill
        self._overdub_id: str | None = None
        self._hook: HeyGenHook | None = None

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
        _mask_links(self.video, self.audio, self.callback_url)

    def execute(self, context: Context) -> str:
        """Start the overdub, then wait for it here or in the triggerer."""
        from airflow_provider_heygen.api import CreateOverdubRequest
        from airflow_provider_heygen.hooks.heygen import HeyGenHook
        from airflow_provider_heygen.waiting import FRESH_SECONDS, backstop, first_deadline, seconds

        fields = {name: getattr(self, name) for name in REQUEST_FIELDS}
        request = CreateOverdubRequest.of(
            {name: value for name, value in fields.items() if value is not None}
        )
        poke_interval = seconds(self.poke_interval, "poke_interval")
        deadline = first_deadline(
            timeout=self.timeout, execution_timeout=self.execution_timeout, context=context
        )
        with HeyGenHook(self.heygen_conn_id) as self._hook:
            overdub_id = self._overdub_id = self._submit(self._hook, request, context)
            context["ti"].xcom_push(key="overdub_id", value=overdub_id)
            if not self.wait_for_completion:
                return overdub_id
            wait: dict[str, Any] = {
                "poke_interval": poke_interval,
                "deadline": deadline,
                "max_consecutive_failures": 10,
                "not_found_until": time.time() + FRESH_SECONDS,
            }
            event = self._wait(overdub_id, wait, once=self.deferrable)
            if event is not None:
                return self._finish(event, self._hook, context)

        from airflow_provider_heygen.triggers.overdub import HeyGenOverdubTrigger

        self.defer(
            trigger=HeyGenOverdubTrigger(
                heygen_conn_id=self.heygen_conn_id,
                overdub_id=overdub_id,
                delete_on_kill=self.delete_on_kill,
                **wait,
            ),
            method_name="execute_complete",
            timeout=backstop(deadline, poke_interval),
        )
        raise AssertionError  # defer() raises; this tells mypy

    def execute_complete(self, context: Context, event: Any = None) -> str:
        """Go on when the trigger has fired."""
        from airflow_provider_heygen.hooks.heygen import HeyGenHook
        from airflow_provider_heygen.waiting import check_event

        with HeyGenHook(self.heygen_conn_id) as hook:
            return self._finish(check_event(event), hook, context)

    def _finish(self, event: WaitEvent, hook: HeyGenHook, context: Context) -> str:
        from airflow_provider_heygen.waiting import conclude

        details = conclude(event, hook)
        self.log.info("Overdub %s gave %s s of video.", event["overdub_id"], details.get("duration"))
        context["ti"].xcom_push(key="overdub", value=details)
        return event["overdub_id"]

    def _submit(self, hook: HeyGenHook, request: CreateOverdubRequest, context: Context) -> str:
        """Start the overdub, or find the one that an earlier try of this task has started."""
        ti = context["ti"]
        generation = _clear_generation(self, context)
        key = _idempotency_key(ti, generation, request)
        if ti.try_number > generation + 1 and request.callback_id is None:
            # An earlier try may have died after HeyGen created the overdub.
            began = context["dag_run"].start_date
            found = hook.find_overdub(key, since=began.timestamp() if began else 0.0)
            if found is not None:
                self.log.info("An earlier try started overdub %s; going on with it.", found.overdub_id)
                return found.overdub_id
        overdub_id = hook.create_overdub(request, idempotency_key=key)
        self.log.info("Started overdub %s (mode %s, key %s).", overdub_id, request.mode or "default", key)
        return overdub_id

    def _wait(self, overdub_id: str, wait: dict[str, Any], *, once: bool) -> WaitEvent | None:
        """Look until the end, or once: ``None`` if it has not ended by then."""
        from airflow_provider_heygen.hooks.heygen import HeyGenHook
        from airflow_provider_heygen.waiting import Watch

        watch = Watch(overdub_id, log=self.log, **wait)
        with HeyGenHook(self.heygen_conn_id, max_attempts=1) as hook:
            while True:
                try:
                    step = watch.saw(hook.get_overdub(overdub_id))
                except Exception as error:
                    step = watch.failed(error)
                if isinstance(step, dict):
                    return step
                if once:
                    return None
                time.sleep(step)

    def on_kill(self) -> None:
        """Delete the overdub, if asked to and if it has not ended. Airflow calls this on the worker."""
        if not (self.delete_on_kill and self._overdub_id and self._hook):
            return
        # The hook in use has its connection resolved; a signal handler must not talk to Airflow.
        if self._hook.get_overdub(self._overdub_id).is_final:
            self.log.info("Overdub %s has already ended; it is kept.", self._overdub_id)
            return
        self._hook.delete_overdub(self._overdub_id)
        self.log.info("The task was killed: deleted overdub %s.", self._overdub_id)


def _mask_links(*values: Any) -> None:
    """Have Airflow mask the query of each link: an input may be presigned, and rendered fields are stored."""
    from airflow.providers.common.compat.sdk import mask_secret

    for value in values:
        url = value.get("url") if isinstance(value, dict) else value
        if isinstance(url, str) and "://" in url and (query := url.partition("?")[2]):
            mask_secret(query)


def _clear_generation(task: BaseOperator, context: Context) -> int:
    """Count up whenever somebody clears the task; stay the same over its retries."""
    return int(context["ti"].max_tries) - int(task.retries or 0)


def _idempotency_key(ti: Any, generation: int, request: CreateOverdubRequest) -> str:
    """
    Give the key under which this task starts this overdub: same over retries, new after a clear or a change.

    It never holds the try number, or a retry would start a second overdub. The digest is in it because
    HeyGen answers a known key with the old overdub even when the request differs.
    """
    digest = hashlib.sha256(json.dumps(request.body(), sort_keys=True).encode()).hexdigest()
    submission = 1
    parts = (ti.dag_id, ti.run_id, ti.task_id, ti.map_index, generation, digest, submission)
    return str(uuid.uuid5(_NAMESPACE, json.dumps(parts)))


class HeyGenUpdateOverdubOperator(BaseOperator):
    """
    Rename an overdub; the title is all that HeyGen lets us change. Returns ``overdub_id``.

    :param overdub_id: the overdub. (templated)
    :param title: its new title. (templated)
    :param heygen_conn_id: the Airflow connection. (templated)
    :raises HeyGenBadInputError: the id or the title is empty or wrong; nothing was sent.
    :raises HeyGenNotFoundError: there is no such overdub.
    """

    template_fields: Sequence[str] = ("overdub_id", "title", "heygen_conn_id")
    ui_color = "#e3d9ff"

    def __init__(
        self, *, overdub_id: str, title: str, heygen_conn_id: str = "heygen_default", **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.overdub_id = overdub_id
        self.title = title
        self.heygen_conn_id = heygen_conn_id

    def execute(self, context: Context) -> str:
        """Rename it."""
        from airflow_provider_heygen.hooks.heygen import HeyGenHook

        with HeyGenHook(self.heygen_conn_id) as hook:
            overdub = hook.update_overdub(self.overdub_id, self.title)
        self.log.info("Overdub %s is now called %r.", self.overdub_id, self.title)
        context["ti"].xcom_push(key="overdub", value=overdub.details())
        return self.overdub_id


class HeyGenDeleteOverdubOperator(BaseOperator):
    """
    Delete an overdub and its files at HeyGen, for good.

    :param overdub_id: the overdub. (templated)
    :param ignore_missing: succeed when there is no such overdub (any more), which makes a retry safe.
    :param heygen_conn_id: the Airflow connection. (templated)
    :raises HeyGenBadInputError: the id is empty or wrong; nothing was sent.
    :raises HeyGenNotFoundError: there is no such overdub and ``ignore_missing`` is off, or the whole route is
        missing (a wrong ``resource`` in the connection).
    """

    template_fields: Sequence[str] = ("overdub_id", "heygen_conn_id")
    ui_color = "#e3d9ff"

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
        """Delete it."""
        from airflow_provider_heygen.exceptions import HeyGenNotFoundError
        from airflow_provider_heygen.hooks.heygen import HeyGenHook

        with HeyGenHook(self.heygen_conn_id) as hook:
            try:
                hook.delete_overdub(self.overdub_id)
            except HeyGenNotFoundError:
                if not self.ignore_missing:
                    raise
                # Under a wrong 'resource' everything looks deleted; this raises if so.
                hook.list_overdubs(limit=1)
                self.log.info("Overdub %s does not exist (any more).", self.overdub_id)
            else:
                self.log.info("Deleted overdub %s.", self.overdub_id)
