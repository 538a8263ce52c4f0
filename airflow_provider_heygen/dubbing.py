"""One try of a create task: submit the request, wait, save the video, return the result."""

from __future__ import annotations

import time
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

from airflow.providers.common.compat.sdk import TaskDeferred
from airflow.providers.standard.triggers.temporal import DateTimeTrigger

from airflow_provider_heygen import waiting
from airflow_provider_heygen.api import CreateOverdubRequest, redact_urls
from airflow_provider_heygen.exceptions import (
    HeyGenBadInputError,
    HeyGenError,
    HeyGenGatewayError,
    HeyGenNotFoundError,
    HeyGenOverdubFailedError,
    HeyGenOverdubTimeoutError,
    HeyGenPermanentError,
    HeyGenTaskFailedError,
    HeyGenTransientError,
    retry_delay,
)
from airflow_provider_heygen.hooks.heygen import HeyGenHook
from airflow_provider_heygen.lineage import media_uri
from airflow_provider_heygen.media import same_file, size_text
from airflow_provider_heygen.metrics import WaitMetrics
from airflow_provider_heygen.poller import SHORTEST_DEFERRAL
from airflow_provider_heygen.saving import Saving
from airflow_provider_heygen.submitter import SubmissionStore, Submitter
from airflow_provider_heygen.triggers.overdub import (
    HeyGenSlotTrigger,
    wait_in_triggerer,
    waits_again_if_early,
)
from airflow_provider_heygen.upload import check_inputs, is_link, storage_uris
from airflow_provider_heygen.waiting import (
    OverdubWait,
    check_event,
    completion_summary,
    deferral_timeout,
    execution_deadline,
    parse_seconds,
    resolve_wait,
    waiting_text,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from airflow.providers.common.compat.sdk import Context
    from airflow.triggers.base import BaseTrigger

    from airflow_provider_heygen.operators.overdub import HeyGenCreateOverdubOperator


class Dubbing:
    """
    One try of a :class:`.HeyGenCreateOverdubOperator`, from its start or from where a deferral ended.

    :param task: the operator, which declares what to do.
    :param context: Airflow's context of the try.
    :param since: Unix seconds of the first attempt, if the try was deferred before HeyGen accepted its create
        request.
    :param until: Unix seconds at which ``execution_timeout`` ends, from before that deferral.
    :param kept: the submission record before that deferral, where Airflow has no store for it.
    """

    def __init__(
        self,
        task: HeyGenCreateOverdubOperator,
        context: Context,
        *,
        since: float | None = None,
        until: float | None = None,
        kept: dict[str, Any] | None = None,
    ) -> None:
        self.task = task
        self.context = context
        self.resumed = since is not None
        self.since = since or time.time()
        self.until = until or execution_deadline(task.execution_timeout, context)
        self.ti: Any = context["ti"]
        self.store = SubmissionStore(context, durable=task.durable, resumed=self.resumed, kept=kept)
        # A deferrable task waits in the triggerer, not on its worker.
        self.hook = HeyGenHook(task.heygen_conn_id, longest_pause=0.0 if task.deferrable else 60.0)

    def start(self) -> str:
        """Submit the overdub or reattach to it, and wait for it if asked to. Return what the task returns."""
        with fails_task(), self.hook:
            request, uris = self._request()
            # Before anything is sent: these raise if they are wrong.
            self._deadline()
            parse_seconds(self.task.poke_interval, "poke_interval")
            saving = self._saving()
            links = {name: uri for name, uri in uris.items() if is_link(uri)}
            stored = {name: uri for name, uri in uris.items() if name not in links}
            files = check_inputs(stored, self.hook, self.store.files)
            paths = [file.path for file in files.values()]
            written = saving.files.values() if saving else ()
            if any(same_file(path, file) for path in paths for file in written):
                # A retry would dub the saved result instead of the source.
                raise HeyGenBadInputError(
                    "destination is the file in video or audio. Choose another one; nothing was sent."
                )
            if saving and self.task.skip_existing:
                size = saving.size_if_current(paths)
                if size is not None:
                    why = "%s exists (%s) and is not older than its sources: nothing to do."
                    self.task.log.info(why, saving.uri, size_text(size))
                    self.ti.xcom_push(key="overdub", value={"uri": saving.uri, "size": size})
                    self.ti.xcom_push(key="asset_ids", value=[])
                    return saving.uri
            # Only now, because a URL that has expired does not matter for a result that is current.
            files |= check_inputs(links, self.hook, self.store.files)
            overdub_id = self._submit(request, files, partial(saving.check, self.hook) if saving else None)
            self.task.overdub_id = overdub_id
            self.ti.xcom_push(key="overdub_id", value=overdub_id)
            self.ti.xcom_push(key="asset_ids", value=self.store.asset_ids)
            if self.task.wait_for_completion:
                return self._wait(overdub_id, time.time())
            self._wait_until_readable(overdub_id)
            self.store.mark_delivered()
            return overdub_id

    def finish(self, event: Any, since: float | None, deadline: float | None) -> str:
        """Handle the event of the trigger. Return what the task returns."""
        checked = check_event(event)
        with fails_task(), self.hook:
            self.hook.created_under = self.store.record.resource if self.store.record else None
            args = self.hook, checked["overdub_id"], since, deadline, self.task.poke_interval
            with waits_again_if_early(*args):
                return self._finish(self._conclude(checked, since, self.hook))

    def _request(self) -> tuple[CreateOverdubRequest, dict[str, Any]]:
        fields = self.task.request_fields()
        uris = storage_uris(fields, links=self.task.upload_links)
        fields |= {name: {"type": "asset_id", "asset_id": "not-yet"} for name in uris}
        if self.task.reuse not in (None, "content"):
            raise HeyGenBadInputError(f"reuse must be 'content' or None, not {self.task.reuse!r}.")
        if self.task.reuse and self.task.callback_id is not None:
            raise HeyGenBadInputError(
                "reuse='content' finds overdubs by the callback_id that the provider sends. Remove your"
                " own callback_id, or reuse."
            )
        given = {name: value for name, value in fields.items() if value is not None}
        return CreateOverdubRequest.of(given), uris

    def _saving(self, overdub_id: str = "not-yet") -> Saving | None:
        """Return what is to be saved, if anything is."""
        task = self.task
        if task.destination is None:
            if task.captions or task.skip_existing:
                raise HeyGenBadInputError("captions and skip_existing need a destination.")
            return None
        if not task.wait_for_completion:
            raise HeyGenBadInputError(
                "destination needs wait_for_completion=True: the video can be saved when the overdub is"
                " completed. To save it in another task, use HeyGenOverdubToObjectStorageOperator."
            )
        saving = Saving(task, self.context, overdub_id, overwrite=task.skip_existing)
        if task.skip_existing and saving.in_folder:
            raise HeyGenBadInputError(
                "skip_existing needs a destination that names a file; in a folder, the file is named after"
                " its overdub."
            )
        return saving

    def _submit(
        self, request: CreateOverdubRequest, files: dict[str, Any], check: Callable[[], object] | None
    ) -> str:
        """Submit the request, however often HeyGen has no slot for it: that is waiting, not failing."""
        submitter = Submitter(request, self.hook, self.store, files)
        while True:
            if self.resumed and self.until is not None and time.time() >= self.until:
                raise self._out_of_time("'execution_timeout' has ended while the task waited for a free slot")
            try:
                return submitter.submit(check, reuse=self.task.reuse is not None)
            except HeyGenTransientError as error:
                # Without a limit, repeat only after a 429 or a Retry-After of HeyGen itself.
                is_gateways = error.retry_after is None or isinstance(error, HeyGenGatewayError)
                if error.status_code != 429 and is_gateways:
                    raise
                pause = retry_delay(1, error, first=SHORTEST_DEFERRAL)
                if self.until is not None and time.time() + pause > self.until:
                    raise self._out_of_time(
                        "'execution_timeout' ends before the request may be sent again", error
                    ) from error
                self.task.log.info("%s Sending the request again in %.0f s at the soonest.", error, pause)
                if self.task.deferrable:
                    self._defer(error, time.time() + pause)
            time.sleep(pause)
            self.resumed = True

    def _out_of_time(self, why: str, error: HeyGenError | None = None) -> HeyGenOverdubTimeoutError:
        # HeyGen still processes a request that "is in progress".
        doubt = self.store.outcome_unknown or (error is not None and error.code == "request_in_progress")
        started = "whether an overdub was started is unknown" if doubt else "no overdub was started"
        return HeyGenOverdubTimeoutError(
            f"{why}; {started}.{f' {error}' if error else ''}",
            retry_after=error.retry_after if error else None,
            outcome_unknown=doubt,
        )

    def _defer(self, error: HeyGenError, not_before: float) -> None:
        trigger: BaseTrigger = HeyGenSlotTrigger(
            heygen_conn_id=self.task.heygen_conn_id,
            since=self.since,
            not_before=not_before,
            deadline=self.until,
            resumed=self.resumed,
        )
        if not error.no_slot:
            trigger = DateTimeTrigger(moment=datetime.fromtimestamp(not_before, UTC))
        raise TaskDeferred(
            trigger=trigger,
            method_name="execute_again",
            kwargs={"since": self.since, "until": self.until, "kept": self.store.kept},
            timeout=deferral_timeout(self.until, not_before - time.time()),
        )

    def _deadline(self) -> float | None:
        """Return the Unix seconds at which a wait that begins now ends."""
        timeout = self.task.timeout
        ends = [self.until, None if timeout is None else time.time() + parse_seconds(timeout, "timeout")]
        return min((end for end in ends if end is not None), default=None)

    def _wait_until_readable(self, overdub_id: str) -> None:
        """Wait until HeyGen can return the overdub, which may be 404 just after its creation."""
        until = time.time() + waiting.NOT_FOUND_GRACE_SECONDS
        while time.time() < until:
            try:
                self.hook.get_overdub(overdub_id)
            except HeyGenNotFoundError:
                time.sleep(1.0)
                continue
            except HeyGenError as error:
                self.task.log.warning("%s", error)  # no reason to fail: the overdub is started
            return

    def _wait(self, overdub_id: str, since: float) -> str:
        """
        Wait for the end: here, or in the triggerer, which polls at once.

        :param since: Unix seconds when the overdub was started, or found.
        """
        poke_interval, deadline = parse_seconds(self.task.poke_interval, "poke_interval"), self._deadline()
        rules: dict[str, Any] = {
            "poke_interval": poke_interval,
            "deadline": deadline,
            "not_found_until": since + waiting.NOT_FOUND_GRACE_SECONDS,
        }
        # A deferral that ends at once could use up a try; see SHORTEST_DEFERRAL.
        here = not self.task.deferrable or self.store.is_completed
        where = "on this worker" if here else "in the triggerer"
        self.task.log.info("%s", waiting_text(where, poke_interval, deadline))
        if here:
            # A hook of its own: it reads the connection as it is now, and the wait repeats what fails.
            with HeyGenHook(self.task.heygen_conn_id, max_attempts=1) as hook:
                hook.created_under = self.hook.created_under
                watch = OverdubWait(overdub_id, log=self.task.log, **rules)
                watch.is_known = True
                end = watch.poll(hook) if self.task.deferrable else watch.poll_until_final(hook)
            if isinstance(end, dict):
                return self._finish(self._conclude(end, since))
        raise wait_in_triggerer(self.hook, overdub_id, since, rules)

    def _conclude(self, end: Any, since: float | None, hook: HeyGenHook | None = None) -> dict[str, Any]:
        try:
            return resolve_wait(end, WaitMetrics(self.ti, since), hook)
        except HeyGenOverdubFailedError as error:
            sources = ((name, media_uri(getattr(self.task, name))) for name in ("video", "audio"))
            named = ", ".join(f"{name} {redact_urls(uri)}" for name, uri in sources if uri)
            raise HeyGenOverdubFailedError(f"{error} ({named})", overdub_id=error.overdub_id) from error

    def _finish(self, details: dict[str, Any]) -> str:
        result = self.task.overdub_id = str(details["overdub_id"])
        mode = self.task.mode if self.task.mode == "precision" else "speed"
        details = {**details, "mode": mode, "cost": None}
        with suppress(Exception):  # a connection that is invalid by now must not fail a completed overdub
            details["cost"] = self.hook.settings.cost(mode, details.get("duration"))
        self.task.log.info("%s", completion_summary(details))
        try:
            if saving := self._saving(result):
                with HeyGenHook(self.task.heygen_conn_id) as hook:  # one that may wait
                    hook.created_under = self.hook.created_under
                    details["size"] = saving.save(hook)
                result = details["uri"] = saving.uri
        except HeyGenError as error:
            # Never fail without a retry: the overdub is paid for, and before 3.3 a clear starts another.
            raise HeyGenError(
                f"Overdub {result} is completed, but was not saved: {error} A retry saves it and"
                " starts no other overdub.",
                overdub_id=result,
            ) from error
        self.ti.xcom_push(key="overdub", value=details)
        self.store.mark_delivered()
        return result


class fails_task:
    """
    Fail the task without a retry if HeyGen rejects a request, or an overdub failed or is gone.

    :raises HeyGenTaskFailedError: in place of a :class:`.HeyGenPermanentError` whose outcome is known.
    """

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        # After a lost response, an earlier request may have started an overdub, which a retry searches for.
        if isinstance(error, HeyGenPermanentError) and not error.outcome_unknown:
            raise HeyGenTaskFailedError.of(error) from error
