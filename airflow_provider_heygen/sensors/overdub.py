"""Wait for an overdub that something else has started."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from airflow.providers.common.compat.sdk import (
    AirflowSensorTimeout,
    AirflowSkipException,
    BaseSensorOperator,
    PokeReturnValue,
    conf,
)

from airflow_provider_heygen.links import HeyGenDashboardLink

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import timedelta

    from airflow.providers.common.compat.sdk import Context


class HeyGenOverdubSensor(BaseSensorOperator):
    """
    Wait until an overdub is completed. Returns its details, without links.

    A failed overdub fails the task at once; ``soft_fail`` and ``never_fail`` make that, and a timeout, a skip
    in every mode. ``mode`` is ``poke`` or ``reschedule`` when ``deferrable`` is off.

    :param overdub_id: the overdub. (templated)
    :param heygen_conn_id: the Airflow connection. (templated)
    :param deferrable: wait in the triggerer, not on a worker.
    :param poke_interval: seconds (or timedelta) between looks.
    :param end_from_trigger: with ``deferrable``, let the triggerer end the task when the overdub is
        completed, which saves the second start of a worker. The return value is the same; a failure or a
        timeout is still dealt with by a worker. Where only a worker can do what is left to do (``outlets``,
        ``on_success_callback``, listeners such as OpenLineage's ...) one is started all the same, and the
        log says why.
    :raises HeyGenOverdubFailedError: HeyGen says it failed; the message carries HeyGen's reason.
    :raises HeyGenNotFoundError: there is no such overdub.
    :raises AirflowSensorTimeout: ``timeout`` passed.
    """

    template_fields: Sequence[str] = ("overdub_id", "heygen_conn_id")
    operator_extra_links = (HeyGenDashboardLink(),)
    ui_color = "#e3d9ff"

    def __init__(
        self,
        *,
        overdub_id: str,
        heygen_conn_id: str = "heygen_default",
        deferrable: bool = conf.getboolean("operators", "default_deferrable", fallback=False),
        poke_interval: timedelta | float = 30,
        end_from_trigger: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(poke_interval=poke_interval, **kwargs)
        self.overdub_id = overdub_id
        self.heygen_conn_id = heygen_conn_id
        self.deferrable = deferrable
        # Not by its own name: where there are listeners, Airflow refuses a DAG with a task that has it.
        self._end_from_trigger = end_from_trigger
        self._told: str | None = None
        self._began: float | None = None

    def execute(self, context: Context) -> Any:
        """Wait here, or after one look in the triggerer."""
        self._began = time.time()
        try:
            return super().execute(context)
        except AirflowSensorTimeout as error:
            # The base class skips on a timeout only after a deferral.
            if self.never_fail:
                raise AirflowSkipException("Skipping due to never_fail is set to True.") from error
            raise

    def poke(self, context: Context) -> PokeReturnValue:
        """
        Look once.

        Deferring from here, and not from ``execute``, lets the base class treat what the first look finds as
        it treats any other: one rule for ``soft_fail`` and ``never_fail`` in all modes.
        """
        from airflow_provider_heygen.api import OverdubStatus
        from airflow_provider_heygen.exceptions import HeyGenOverdubFailedError, HeyGenTransientError
        from airflow_provider_heygen.hooks.heygen import HeyGenHook
        from airflow_provider_heygen.metrics import Wait
        from airflow_provider_heygen.waiting import failure, summary

        try:
            # One attempt: looking again is what a sensor does anyway, and it may not hold its worker.
            with HeyGenHook(self.heygen_conn_id, max_attempts=1) as hook:
                overdub = hook.get_overdub(self.overdub_id)
        except HeyGenTransientError as error:
            self.log.warning("%s Looking again later.", error)
        else:
            if overdub.status != self._told:
                self._told = overdub.status
                self.log.info("Overdub %s is %s.", overdub.overdub_id, overdub.status)
            if overdub.status == OverdubStatus.FAILED:
                Wait(context["ti"], self._since(context)).failed()
                raise HeyGenOverdubFailedError(failure(overdub))
            if overdub.status == OverdubStatus.COMPLETED:
                Wait(context["ti"], self._since(context)).completed()
                details = overdub.details()
                self.log.info("%s", summary(details))
                return PokeReturnValue(is_done=True, xcom_value=details)
        if self.deferrable:
            self._defer(context, self._deadline(context), self._began)
        return PokeReturnValue(is_done=False)

    def _since(self, context: Context) -> float | None:
        """Give the Unix seconds when the wait began, perhaps in another process."""
        first = context["ti"].get_first_reschedule_date(context) if self.reschedule else None
        return first.timestamp() if first else self._began

    def _deadline(self, context: Context) -> float | None:
        from airflow_provider_heygen.waiting import first_deadline

        # Airflow's sensors take a timeout of 0 for one look.
        return first_deadline(self.timeout or 1e-3, self.execution_timeout, context)

    def _defer(
        self, context: Context, deadline: float | None, since: float | None, given_up: int = 0
    ) -> None:
        from airflow_provider_heygen.triggers.overdub import HeyGenOverdubTrigger
        from airflow_provider_heygen.waiting import backstop

        self.defer(
            trigger=HeyGenOverdubTrigger(
                heygen_conn_id=self.heygen_conn_id,
                overdub_id=self.overdub_id,
                poke_interval=self.poke_interval or 1.0,
                deadline=deadline,
                end_task=self._end_from_trigger and not self._needs_worker(context),
                do_xcom_push=self.do_xcom_push,
                since=since,
            ),
            method_name="execute_complete",
            kwargs={
                "deadline": deadline,
                "given_up": given_up,
                "since": since,
                "try_number": context["ti"].try_number,
            },
            timeout=backstop(deadline, self.poke_interval),
        )

    def _needs_worker(self, context: Context) -> bool:
        """Tell whether something is left to do after the wait that Airflow does on workers only."""
        from airflow.providers.common.compat.sdk import get_listener_manager
        from airflow.sdk.execution_time import comms

        own = type(self)
        # Before Airflow 3.2 the label is made by the worker that ends the task.
        late_label = not hasattr(comms, "SetRenderedMapIndex")
        duties = {
            "outlets": self.outlets,
            "on_success_callback": self.on_success_callback,
            "listeners": get_listener_manager().has_listeners,
            "post_execute": self._post_execute_hook or own.post_execute != BaseSensorOperator.post_execute,
            "its own execute_complete": own.execute_complete != HeyGenOverdubSensor.execute_complete,
            "multiple_outputs": self.multiple_outputs,
            "map_index_template": self.map_index_template and late_label,
            "being the DAG's result": getattr(self, "returns_dag_result", False),
            "a task that expands over its result": context["ti"].map_index in (None, -1)
            and any(True for _ in self.iter_mapped_dependants()),
        }
        found = [name for name, duty in duties.items() if duty]
        if found:
            self.log.info("end_from_trigger is off, a worker is needed for: %s.", ", ".join(found))
        return bool(found)

    def execute_complete(
        self,
        context: Context,
        event: Any = None,
        deadline: float | None = None,
        given_up: int = 0,
        since: float | None = None,
        try_number: int | None = None,
    ) -> dict[str, Any]:
        """Go on when the trigger has fired."""
        from airflow_provider_heygen.exceptions import HeyGenOverdubTimeoutError
        from airflow_provider_heygen.hooks.heygen import HeyGenHook
        from airflow_provider_heygen.metrics import Wait
        from airflow_provider_heygen.waiting import (
            LONGEST_PAUSE_ON_WORKER,
            check_event,
            conclude,
            is_stale,
            summary,
        )

        if is_stale(try_number, context):
            fresh: dict[str, Any] = self.execute(context)
            return fresh
        try:
            with HeyGenHook(self.heygen_conn_id, longest_pause=LONGEST_PAUSE_ON_WORKER) as hook:
                wait = Wait(context["ti"], since)
                details = conclude(check_event(event, self.overdub_id), hook, given_up, wait)
        except HeyGenOverdubTimeoutError as error:
            raise AirflowSensorTimeout(str(error)) from None
        if details is None:
            if deadline is None:  # `airflow dags test` forgets it
                deadline = self._deadline(context)
            self._defer(context, deadline, since, given_up + 1)
            raise AssertionError  # defer() raises; this tells mypy
        self.log.info("%s", summary(details))
        return details

    def resume_execution(
        self, next_method: str, next_kwargs: dict[str, Any] | None, context: Context
    ) -> dict[str, Any]:
        """Give ``soft_fail`` and ``never_fail`` the meaning they have in poke mode."""
        from airflow_provider_heygen.exceptions import HeyGenTransientError

        try:
            details: dict[str, Any] = super().resume_execution(next_method, next_kwargs, context)
            return details
        except AirflowSkipException as skip:
            if self.soft_fail and isinstance(skip.__cause__, HeyGenTransientError):
                raise skip.__cause__ from None  # worth a retry, not a skip
            raise
        except Exception as error:
            if self.never_fail:
                raise AirflowSkipException("Skipping due to never_fail is set to True.") from error
            if self.soft_fail and isinstance(error, AirflowSensorTimeout):  # Airflow 3.0 lets it pass
                raise AirflowSkipException("Skipping due to soft_fail is set to True.") from error
            raise
