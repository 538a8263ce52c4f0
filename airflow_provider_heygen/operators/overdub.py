"""Create, rename and delete overdubs."""

from __future__ import annotations

import random
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from airflow.providers.common.compat.sdk import BaseOperator, conf

from airflow_provider_heygen.links import HeyGenDashboardLink
from airflow_provider_heygen.operators.asset import LinksMaskedOperator

# Whatever needs requests, aiohttp or pydantic is imported where a task runs, not where a DAG is parsed.
if TYPE_CHECKING:
    from collections.abc import Sequence

    from airflow.providers.common.compat.sdk import Context, ObjectStoragePath
    from airflow.providers.openlineage.extractors import OperatorLineage

    from airflow_provider_heygen.api import CreateOverdubRequest
    from airflow_provider_heygen.hooks.heygen import HeyGenHook
    from airflow_provider_heygen.submitter import Ledger
    from airflow_provider_heygen.upload import Source

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


class HeyGenCreateOverdubOperator(LinksMaskedOperator):
    """
    Put a new audio track on a video; HeyGen re-syncs the speaker's lips.

    Starts one overdub and, unless told otherwise, waits until it has ended. Returns its ``overdub_id``, which
    sensor, transfer, update and delete take as it is. XCom key ``overdub_id`` is pushed as soon as the
    overdub exists, key ``overdub`` (the details, without links) when it has ended.

    The first 16 arguments are the fields of HeyGen's request, all templated; what is not given is left to
    HeyGen's defaults. They are checked when the task runs, before anything is sent.

    :param video: source video: a public https URL, which HeyGen fetches; or the URI of a file
        (``file:///data/talk.mp4``, ``s3://conn_id@bucket/key``, ``gs://`` ..., or an ObjectStoragePath),
        which is uploaded first, as by :class:`.HeyGenUploadAssetOperator`; or
        ``{"type": "asset_id", "asset_id": ...}``, which is what that one returns. A file must be there as
        long as the task may be tried again: its bytes tell whether a retry has the same wish.
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
    :param heygen_conn_id: the Airflow connection. (templated)
    :param wait_for_completion: wait for the end; without it the id is returned at once.
    :param deferrable: wait in the triggerer, not on a worker.
    :param poke_interval: seconds (or timedelta) between looks. (templated)
    :param timeout: seconds (or timedelta) to wait, ``None`` for no limit. The overdub itself goes on.
        (templated)
    :param delete_on_kill: delete the overdub when the task is killed while it has not ended.
    :param durable: start one overdub over all retries, whatever dies in between: an earlier one that has not
        failed is gone on with. A task cleared after success starts a new one. Airflow before 3.3 has no
        task state store; there a retry searches HeyGen's list, and a clear starts a new overdub.
    :raises HeyGenBadInputError: an argument is wrong; nothing was sent.
    :raises HeyGenPermanentError: HeyGen refused, or the overdub failed: the task fails without retry.
    :raises HeyGenTransientError: HeyGen could not be reached for long; worth a retry.
    :raises HeyGenOverdubTimeoutError: ``timeout`` passed; a retry goes on waiting for the same overdub.
    """

    template_fields: Sequence[str] = (*REQUEST_FIELDS, "heygen_conn_id", "poke_interval", "timeout")
    link_fields = ("video", "audio", "callback_url")
    template_fields_renderers = {"video": "json", "audio": "json"}
    operator_extra_links = (HeyGenDashboardLink(),)
    ui_color = "#e3d9ff"

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
        heygen_conn_id: str = "heygen_default",
        wait_for_completion: bool = True,
        deferrable: bool = conf.getboolean("operators", "default_deferrable", fallback=False),
        poke_interval: timedelta | float = 30,
        timeout: timedelta | float | None = 2 * 60 * 60,
        delete_on_kill: bool = False,
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
        self.heygen_conn_id = heygen_conn_id
        self.wait_for_completion = wait_for_completion
        self.deferrable = deferrable
        self.poke_interval = poke_interval
        self.timeout = timeout
        self.delete_on_kill = delete_on_kill
        self.durable = durable
        self._again = False
        self._kept: dict[str, Any] | None = None
        self._overdub_id: str | None = None
        self._deleted = False
        self._hook: HeyGenHook | None = None

    def execute(self, context: Context) -> str:
        """Start the overdub, then wait for it here or in the triggerer."""
        return self._create(context, deadline=None)

    def execute_again(
        self,
        context: Context,
        event: Any = None,  # noqa: ARG002
        deadline: float | None = None,
        kept: dict[str, Any] | None = None,
        try_number: int | None = None,
    ) -> str:
        """Go on when HeyGen's ``Retry-After`` has passed: send the same create again."""
        from airflow_provider_heygen.waiting import is_stale

        if is_stale(try_number, context):
            return self._create(context, deadline=None)
        self._again = True
        self._kept = kept
        return self._create(context, deadline=deadline)

    def execute_complete(
        self,
        context: Context,
        event: Any = None,
        deadline: float | None = None,
        given_up: int = 0,
        since: float | None = None,
        try_number: int | None = None,
    ) -> str:
        """Go on when the trigger has fired."""
        from airflow_provider_heygen.metrics import Wait
        from airflow_provider_heygen.waiting import check_event, conclude, first_deadline, is_stale

        if is_stale(try_number, context):
            return self._create(context, deadline=None)
        checked = check_event(event)
        with self._connect() as self._hook:
            if checked["status"] == "error":  # there will be a look
                _ = self._hook.settings  # on_kill must not ask Airflow for them
            self._overdub_id = checked["overdub_id"]
            details = conclude(checked, self._hook, given_up, Wait(context["ti"], since))
            if details is None:
                if deadline is None:  # `airflow dags test` forgets it
                    deadline = first_deadline(self.timeout, self.execution_timeout, context)
                return self._await(context, deadline, since, given_up=given_up + 1)
            return self._deliver(context, details)

    def _connect(self) -> HeyGenHook:
        from airflow_provider_heygen.hooks.heygen import HeyGenHook
        from airflow_provider_heygen.waiting import LONGEST_PAUSE_ON_WORKER

        longest_pause = LONGEST_PAUSE_ON_WORKER if self.deferrable else 60.0
        return HeyGenHook(self.heygen_conn_id, longest_pause=longest_pause)

    def _create(self, context: Context, deadline: float | None) -> str:
        from airflow_provider_heygen.exceptions import HeyGenNotFoundError, HeyGenTransientError
        from airflow_provider_heygen.submitter import Ledger

        try:
            return self._start_and_wait(context, deadline)
        except HeyGenNotFoundError:
            if not self._deleted:
                raise
            # Airflow passes on the SIGTERM of a worker that is shut down, too: nobody wished the task to end.
            Ledger(context, durable=self.durable).deleted()
            raise HeyGenTransientError(
                f"Overdub {self._overdub_id} was deleted because the task was killed ('delete_on_kill')."
                " A retry starts another."
            ) from None

    def _start_and_wait(self, context: Context, deadline: float | None) -> str:
        from airflow_provider_heygen.api import CreateOverdubRequest
        from airflow_provider_heygen.submitter import Ledger
        from airflow_provider_heygen.upload import inputs, storage_uris
        from airflow_provider_heygen.waiting import first_deadline, seconds

        fields = {name: getattr(self, name) for name in REQUEST_FIELDS}
        uris = storage_uris(fields)
        fields |= {name: {"type": "asset_id", "asset_id": "not-yet"} for name in uris}
        request = CreateOverdubRequest.of(
            {name: value for name, value in fields.items() if value is not None}
        )
        seconds(self.poke_interval, "poke_interval")
        if deadline is None:
            deadline = first_deadline(self.timeout, self.execution_timeout, context)
        with self._connect() as self._hook:
            files = inputs(uris, self._hook.settings)
            self._overdub_id = self._submit(self._hook, request, files, context, deadline)
            context["ti"].xcom_push(key="overdub_id", value=self._overdub_id)
            if not self.wait_for_completion:
                self._until_readable(self._hook)
                Ledger(context, durable=self.durable).delivered()
                return self._overdub_id
            return self._await(context, deadline, time.time())

    def _until_readable(self, hook: HeyGenHook) -> None:
        """Give the next task an id it can look at: a fresh overdub may be a 404 for a moment."""
        from airflow_provider_heygen.exceptions import HeyGenError, HeyGenNotFoundError
        from airflow_provider_heygen.waiting import FRESH_SECONDS

        until = time.time() + FRESH_SECONDS
        while time.time() < until:
            try:
                hook.get_overdub(str(self._overdub_id))
            except HeyGenNotFoundError:
                time.sleep(1.0)
                continue
            except HeyGenError as error:
                self.log.warning("%s", error)  # no reason to fail: the overdub is started
            return

    def _submit(
        self,
        hook: HeyGenHook,
        request: CreateOverdubRequest,
        files: dict[str, Source],
        context: Context,
        deadline: float | None,
    ) -> str:
        """Submit, however often HeyGen says that it is too busy: that is waiting, not failing."""
        from airflow_provider_heygen.exceptions import HeyGenOverdubTimeoutError, HeyGenTransientError
        from airflow_provider_heygen.submitter import Ledger, submit

        ledger = Ledger(context, durable=self.durable, again=self._again, kept=self._kept)
        while True:
            try:
                return submit(request, hook, ledger, files)
            except HeyGenTransientError as error:
                if error.status_code != 429 and error.retry_after is None:
                    raise
                # Jitter, or all that were turned away together come back together.
                pause = (error.retry_after or 30.0) * random.uniform(1.0, 1.2)  # noqa: S311
                if deadline is not None and time.time() + pause > deadline:
                    doubt = ledger.in_doubt
                    started = (
                        "whether an overdub was started is unknown" if doubt else "no overdub was started"
                    )
                    raise HeyGenOverdubTimeoutError(
                        f"HeyGen asks to wait longer than 'timeout' allows; {started}. {error}",
                        retry_after=error.retry_after,
                        outcome_unknown=doubt,
                    ) from None
                self.log.info("%s Sending it again in %.0f s.", error, pause)
            if self.deferrable:
                self._defer_for(pause, deadline, ledger, context)
            time.sleep(pause)

    def _defer_for(self, pause: float, deadline: float | None, ledger: Ledger, context: Context) -> None:
        from airflow.providers.standard.triggers.temporal import DateTimeTrigger

        from airflow_provider_heygen.waiting import backstop

        kept = ledger.kept.model_dump(mode="json") if ledger.kept else None
        self.defer(
            trigger=DateTimeTrigger(moment=datetime.now(UTC) + timedelta(seconds=pause)),
            method_name="execute_again",
            kwargs={"deadline": deadline, "kept": kept, "try_number": context["ti"].try_number},
            timeout=backstop(deadline, pause),
        )

    def _await(
        self, context: Context, deadline: float | None, since: float | None, *, given_up: int = 0
    ) -> str:
        """
        Wait for the end: here, or after one look in the triggerer.

        :param since: Unix seconds when the overdub was started, or found.
        """
        from airflow_provider_heygen.hooks.heygen import HeyGenHook
        from airflow_provider_heygen.metrics import Wait
        from airflow_provider_heygen.triggers.overdub import HeyGenOverdubTrigger
        from airflow_provider_heygen.waiting import (
            FRESH_SECONDS,
            MAX_CONSECUTIVE_FAILURES,
            Watch,
            backstop,
            conclude,
            seconds,
        )

        overdub_id = str(self._overdub_id)
        poke_interval = seconds(self.poke_interval, "poke_interval")
        rules: dict[str, Any] = {
            "poke_interval": poke_interval,
            "deadline": deadline,
            "max_consecutive_failures": MAX_CONSECUTIVE_FAILURES,
            "not_found_until": (since or 0.0) + FRESH_SECONDS,
        }
        while True:
            # A hook of its own for each wait: it takes the connection as it is now.
            with HeyGenHook(self.heygen_conn_id, max_attempts=1) as looking:
                event = Watch(overdub_id, log=self.log, **rules).follow(looking, once=self.deferrable)
            if event is not None:
                with self._connect() as hook:
                    details = conclude(event, hook, given_up, Wait(context["ti"], since))
                if details is not None:
                    return self._deliver(context, details)
                given_up += 1
            if self.deferrable:
                self.defer(
                    trigger=HeyGenOverdubTrigger(
                        heygen_conn_id=self.heygen_conn_id,
                        overdub_id=overdub_id,
                        delete_on_kill=self.delete_on_kill,
                        **rules,
                    ),
                    method_name="execute_complete",
                    kwargs={
                        "deadline": deadline,
                        "given_up": given_up,
                        "since": since,
                        "try_number": context["ti"].try_number,
                    },
                    timeout=backstop(deadline, poke_interval),
                )
            time.sleep(poke_interval)

    def _deliver(self, context: Context, details: dict[str, Any]) -> str:
        from airflow_provider_heygen.submitter import Ledger
        from airflow_provider_heygen.waiting import summary

        self.log.info("%s", summary(details))
        context["ti"].xcom_push(key="overdub", value=details)
        Ledger(context, durable=self.durable).delivered()
        return str(self._overdub_id)

    def get_openlineage_facets_on_complete(self, task_instance: Any) -> OperatorLineage[Any, Any]:  # noqa: ARG002
        """Tell OpenLineage: out of both sources came the overdub."""
        from airflow_provider_heygen import lineage

        return lineage.of_task(
            map(lineage.media_uri, (self.video, self.audio)),
            [lineage.dataset(lineage.overdub_uri(str(self._overdub_id)))],
        )

    def get_openlineage_facets_on_failure(self, task_instance: Any) -> OperatorLineage[Any, Any]:  # noqa: ARG002
        """Tell OpenLineage what it was to be made of; there is nothing yet that somebody could read."""
        from airflow_provider_heygen import lineage

        return lineage.of_task(map(lineage.media_uri, (self.video, self.audio)), [])

    def on_kill(self) -> None:
        """Delete the overdub, if asked to and if it has not ended. Airflow calls this on the worker."""
        if not (self.delete_on_kill and self._overdub_id and self._hook):
            return
        # The hook in use has its connection resolved; a signal handler must not talk to Airflow.
        if self._hook.get_overdub(self._overdub_id).is_final:
            self.log.info("Overdub %s has already ended; it is kept.", self._overdub_id)
            return
        self._deleted = True
        self._hook.delete_overdub(self._overdub_id)
        self.log.info("The task was killed: deleted overdub %s.", self._overdub_id)


class HeyGenUpdateOverdubOperator(BaseOperator):
    """
    Rename an overdub; the title is all that HeyGen lets us change. Returns ``overdub_id``.

    XCom key ``overdub`` holds its details.

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
