"""Wait for an overdub that another task or program has started."""

from __future__ import annotations

import math
import time
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from airflow.exceptions import AirflowRescheduleException  # compat.sdk does not have it
from airflow.providers.common.compat.sdk import (
    AirflowSensorTimeout,
    AirflowSkipException,
    BaseOperator,
    BaseSensorOperator,
    conf,
)

from airflow_provider_heygen.compat import is_deferral_timeout
from airflow_provider_heygen.plugin import WatchLink

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from airflow.providers.common.compat.sdk import Context


class HeyGenOverdubSensor(BaseSensorOperator):
    """
    Wait until an overdub is completed. Returns its details, without presigned URLs.

    A failed or deleted overdub fails the task at once. With ``soft_fail`` or ``never_fail``, this and a
    timeout skip the task, in every mode. After any other fault, the wait continues. ``mode`` is ``poke`` or
    ``reschedule`` and applies if ``deferrable`` is off. The provider itself sets the delay after a fault:
    ``exponential_backoff`` and ``max_wait`` of the base class do not apply.

    :param overdub_id: the overdub. (templated)
    :param heygen_conn_id: Airflow connection id. (templated)
    :param deferrable: wait in the triggerer, not on a worker.
    :param poke_interval: time between polls, in seconds or as a timedelta.
    :raises HeyGenTaskFailedError: if the overdub failed or is gone, or its id is wrong. No retry.
    :raises AirflowSensorTimeout: if ``timeout`` passed. Airflow does not retry it.
    :raises HeyGenOverdubTimeoutError: if ``execution_timeout`` passed first. A retry continues to wait.
    """

    template_fields: Sequence[str] = ("overdub_id", "heygen_conn_id")
    operator_extra_links = (WatchLink(),)
    ui_color = "#e3d9ff"

    def __init__(
        self,
        *,
        overdub_id: str,
        heygen_conn_id: str = "heygen_default",
        deferrable: bool = conf.getboolean("operators", "default_deferrable", fallback=False),
        poke_interval: timedelta | float = 30,
        mode: str = "poke",
        **kwargs: Any,
    ) -> None:
        # From default_args for create tasks, which have a mode of their own.
        mode = "poke" if mode in ("speed", "precision") else mode
        super().__init__(poke_interval=poke_interval, mode=mode, **kwargs)
        self.overdub_id = overdub_id
        self.heygen_conn_id = heygen_conn_id
        self.deferrable = deferrable

    def execute(self, context: Context) -> Any:
        """Poll, and wait on the worker, by rescheduling or in the triggerer."""
        from airflow_provider_heygen.hooks.heygen import HeyGenHook
        from airflow_provider_heygen.metrics import WaitMetrics
        from airflow_provider_heygen.poller import SHORTEST_DEFERRAL
        from airflow_provider_heygen.triggers.overdub import wait_in_triggerer
        from airflow_provider_heygen.waiting import (
            OverdubWait,
            execution_deadline,
            resolve_wait,
            waiting_text,
        )

        # The wait may have begun in another process.
        first = context["ti"].get_first_reschedule_date(context) if self.reschedule else None
        since = first.timestamp() if first else time.time()
        limit = execution_deadline(self._wait_limit, context)
        # In Airflow's sensors, a timeout of 0 means one poll, and it counts from the first reschedule.
        deadline = min(limit or math.inf, since + (self.timeout or 1e-3))
        poke_interval = self.poke_interval or 1.0
        rules: Any = {"poke_interval": poke_interval, "deadline": deadline, "not_found_until": 0.0}
        with self._ends(), HeyGenHook(self.heygen_conn_id, max_attempts=1) as hook:
            watch = OverdubWait(self.overdub_id, log=self.log, **rules)
            watch.is_known = first is not None
            if not watch.is_known:
                _ = hook.settings  # an invalid connection fails the task, unlike a fault of HeyGen
            once = watch.poll_twice if self._reschedules else watch.poll
            step = once(hook) if self._reschedules or self.deferrable else watch.poll_until_final(hook)
            if isinstance(step, dict):
                return self._done(resolve_wait(step, WaitMetrics(context["ti"], since)))
            if self._reschedules:
                step = max(step, min(poke_interval, SHORTEST_DEFERRAL))  # less is left before the deadline
                again = datetime.now(UTC) + timedelta(seconds=step)
                raise AirflowRescheduleException(again)  # type: ignore[no-untyped-call]
        self.log.info("%s", waiting_text("in the triggerer", poke_interval, deadline))
        raise wait_in_triggerer(hook, self.overdub_id, since, rules)

    def execute_complete(
        self,
        context: Context,
        event: Any = None,
        since: float | None = None,
        deadline: float | None = None,
    ) -> dict[str, Any]:
        """Return the details when the trigger has fired."""
        from airflow_provider_heygen.hooks.heygen import HeyGenHook
        from airflow_provider_heygen.metrics import WaitMetrics
        from airflow_provider_heygen.triggers.overdub import waits_again_if_early
        from airflow_provider_heygen.waiting import check_event, resolve_wait

        checked = check_event(event, self.overdub_id)
        poke_interval = self.poke_interval or 1.0
        with (
            HeyGenHook(self.heygen_conn_id, longest_pause=0.0) as hook,
            waits_again_if_early(hook, self.overdub_id, since, deadline, poke_interval),
        ):
            return self._done(resolve_wait(checked, WaitMetrics(context["ti"], since), hook))

    def _done(self, details: dict[str, Any]) -> dict[str, Any]:
        from airflow_provider_heygen.waiting import completion_summary

        self.log.info("%s", completion_summary(details))
        return details

    @property
    def _reschedules(self) -> bool:
        """Whether Airflow starts the task again for each poll. ``deferrable`` overrides ``mode``."""
        return self.reschedule and not self.deferrable

    @property
    def _wait_limit(self) -> timedelta | None:
        """``execution_timeout``, unless it is of one rescheduled poll, where Airflow itself enforces it."""
        return None if self._reschedules else self.execution_timeout

    @contextmanager
    def _ends(self) -> Iterator[None]:
        """Raise the exception of Airflow's sensors for the end of a wait, or skip the task."""
        from airflow_provider_heygen.dubbing import fails_task
        from airflow_provider_heygen.exceptions import (
            HeyGenNotFoundError,
            HeyGenOverdubFailedError,
            HeyGenOverdubTimeoutError,
        )

        try:
            with fails_task():
                yield
        except (AirflowSkipException, AirflowRescheduleException):
            raise
        except Exception as error:
            if self.never_fail:
                raise AirflowSkipException("Skipping due to never_fail is set to True.") from error
            # A crash of the trigger, a malformed event or a wrong setting is no soft failure.
            ends = (HeyGenOverdubFailedError, HeyGenNotFoundError, HeyGenOverdubTimeoutError)
            if self.soft_fail and (isinstance(error.__cause__, ends) or isinstance(error, ends)):
                raise AirflowSkipException("Skipping due to soft_fail is set to True.") from error
            # Airflow retries a task after its execution_timeout, but no sensor after its timeout.
            limit = math.inf if self._wait_limit is None else self._wait_limit.total_seconds()
            if isinstance(error, HeyGenOverdubTimeoutError) and limit >= self.timeout:
                raise AirflowSensorTimeout(str(error)) from error
            raise

    def resume_execution(self, next_method: str, next_kwargs: dict[str, Any] | None, context: Context) -> Any:
        """Poll once more if Airflow itself ended the deferral because no triggerer was running."""
        from airflow_provider_heygen.waiting import no_triggerer

        if is_deferral_timeout(next_method, next_kwargs):
            next_method, next_kwargs = "execute_complete", {"event": no_triggerer(str(self.overdub_id))}
        # BaseSensorOperator would skip the task after a crash of the trigger, too.
        with self._ends():
            return BaseOperator.resume_execution(self, next_method, next_kwargs, context)
