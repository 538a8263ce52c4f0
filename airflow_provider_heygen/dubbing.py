"""One try of a create task: submit, wait, hand on the result. The operators only declare."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from airflow.providers.common.compat.sdk import TaskDeferred
from airflow.providers.standard.triggers.temporal import DateTimeTrigger

from airflow_provider_heygen import waiting
from airflow_provider_heygen.api import CreateOverdubRequest
from airflow_provider_heygen.exceptions import (
    HeyGenError,
    HeyGenNotFoundError,
    HeyGenOverdubTimeoutError,
    HeyGenPermanentError,
    HeyGenTaskFailedError,
    HeyGenTransientError,
    retry_delay,
)
from airflow_provider_heygen.hooks.heygen import HeyGenHook
from airflow_provider_heygen.metrics import Wait
from airflow_provider_heygen.submitter import Ledger, submit
from airflow_provider_heygen.triggers.overdub import HeyGenOverdubTrigger
from airflow_provider_heygen.upload import inputs, storage_uris
from airflow_provider_heygen.waiting import (
    Watch,
    backstop,
    check_event,
    conclude,
    first_deadline,
    seconds,
    summary,
)

if TYPE_CHECKING:
    from airflow.providers.common.compat.sdk import Context

    from airflow_provider_heygen.operators.overdub import HeyGenCreateOverdubOperator
    from airflow_provider_heygen.waiting import WaitEvent

SHORTEST_DEFERRAL = 15.0
"""Seconds. Airflow may fail a deferral that ends before its worker has reported it (observed on Airflow
3.3.2)."""


class Dubbing:
    """
    One try of a :class:`.HeyGenCreateOverdubOperator`, from its start or from where a deferral ended.

    :param task: the operator, which declares what to do.
    :param context: Airflow's context of the try.
    :param deadline: Unix seconds at which the wait ends, from before a deferral; computed if not given.
    :param again: whether this goes on after a deferral in which HeyGen's ``Retry-After`` was waited for.
    :param kept: the submission record before that deferral, where Airflow has no store for it.
    """

    def __init__(
        self,
        task: HeyGenCreateOverdubOperator,
        context: Context,
        *,
        deadline: float | None = None,
        again: bool = False,
        kept: dict[str, Any] | None = None,
    ) -> None:
        self.task = task
        self.context = context
        self.deadline = deadline
        self.ti: Any = context["ti"]
        self.ledger = Ledger(context, durable=task.durable, again=again, kept=kept)
        # A deferrable task waits in the triggerer, not on its worker.
        self.hook = HeyGenHook(task.heygen_conn_id, longest_pause=0.0 if task.deferrable else 60.0)

    def start(self) -> str:
        """Submit the overdub or reattach to it, and wait for it if asked to. Return its id."""
        request, uris = self._request()
        with fails_task(), self.hook:
            # Before anything is sent: these raise if they are wrong.
            seconds(self.task.poke_interval, "poke_interval")
            if self.deadline is None:
                self.deadline = first_deadline(self.task.timeout, self.task.execution_timeout, self.context)
            files = inputs(uris, self.hook.settings)
            overdub_id = self._submit(request, files)
            self.ti.xcom_push(key="overdub_id", value=overdub_id)
            if self.task.wait_for_completion:
                return self._wait(overdub_id, time.time())
            self._until_readable(overdub_id)
            self.ledger.delivered()
            return overdub_id

    def finish(self, event: Any, since: float | None) -> str:
        """Hand on what the trigger has waited for. Return the overdub's id."""
        checked = check_event(event)
        with fails_task(), self.hook:
            return self._deliver(conclude(checked, Wait(self.ti, since), self.hook))

    def _request(self) -> tuple[CreateOverdubRequest, dict[str, Any]]:
        with fails_task():
            fields = self.task.request_fields()
            uris = storage_uris(fields)
            fields |= {name: {"type": "asset_id", "asset_id": "not-yet"} for name in uris}
            given = {name: value for name, value in fields.items() if value is not None}
            return CreateOverdubRequest.of(given), uris

    def _submit(self, request: CreateOverdubRequest, files: dict[str, Any]) -> str:
        """Submit the request, however often HeyGen says that it is too busy: that is waiting, not failing."""
        while True:
            try:
                return submit(request, self.hook, self.ledger, files)
            except HeyGenTransientError as error:
                if error.status_code != 429 and error.retry_after is None:
                    raise
                pause = retry_delay(1, error, first=SHORTEST_DEFERRAL)
                if self.deadline is not None and time.time() + pause > self.deadline:
                    doubt = self.ledger.in_doubt
                    started = (
                        "whether an overdub was started is unknown" if doubt else "no overdub was started"
                    )
                    raise HeyGenOverdubTimeoutError(
                        f"HeyGen asks to wait longer than 'timeout' allows; {started}. {error}",
                        retry_after=error.retry_after,
                        outcome_unknown=doubt,
                    ) from error
                self.task.log.info("%s Sending the request again in %.0f s.", error, pause)
            if self.task.deferrable:
                self._defer_for(pause)
            time.sleep(pause)

    def _defer_for(self, pause: float) -> None:
        kept = self.ledger.kept.model_dump(mode="json") if self.ledger.kept else None
        raise TaskDeferred(
            trigger=DateTimeTrigger(moment=datetime.now(UTC) + timedelta(seconds=pause)),
            method_name="execute_again",
            kwargs={"deadline": self.deadline, "kept": kept},
            timeout=backstop(self.deadline, pause),
        )

    def _until_readable(self, overdub_id: str) -> None:
        """Wait until HeyGen can return the overdub, which may be 404 for a moment after its creation."""
        until = time.time() + waiting.FRESH_SECONDS
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
        Wait for the end: here, or after one poll in the triggerer.

        :param since: Unix seconds when the overdub was started, or found.
        """
        poke_interval = seconds(self.task.poke_interval, "poke_interval")
        rules: dict[str, Any] = {
            "poke_interval": poke_interval,
            "deadline": self.deadline,
            "not_found_until": since + waiting.FRESH_SECONDS,
        }
        # A hook of its own: it reads the connection as it is now, and the wait repeats what fails.
        with HeyGenHook(self.task.heygen_conn_id, max_attempts=1) as hook:
            watch = Watch(overdub_id, log=self.task.log, **rules)
            step: WaitEvent | float = watch.follow(hook, once=self.task.deferrable)
        if isinstance(step, dict):
            return self._deliver(conclude(step, Wait(self.ti, since)))
        raise TaskDeferred(
            trigger=HeyGenOverdubTrigger(
                heygen_conn_id=self.task.heygen_conn_id, overdub_id=overdub_id, **rules
            ),
            method_name="execute_complete",
            kwargs={"since": since},
            timeout=backstop(self.deadline, poke_interval),
        )

    def _deliver(self, details: dict[str, Any]) -> str:
        self.task.log.info("%s", summary(details))
        self.ti.xcom_push(key="overdub", value=details)
        self.ledger.delivered()
        return str(details["overdub_id"])


class fails_task:
    """
    Fail the task without a retry if HeyGen rejects a request, or says that an overdub failed or is gone.

    :raises HeyGenTaskFailedError: in place of a :class:`.HeyGenPermanentError`.
    """

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, HeyGenPermanentError):
            raise HeyGenTaskFailedError.of(error) from error
