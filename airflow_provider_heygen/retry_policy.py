"""When to try again, by what HeyGen said: a retry policy for Airflow 3.3 and newer."""

from __future__ import annotations

import random
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from airflow_provider_heygen.exceptions import HeyGenError, HeyGenPermanentError

if TYPE_CHECKING:
    from airflow.providers.common.compat.sdk import Context, RetryDecision, RetryPolicy
else:
    try:
        from airflow.providers.common.compat.sdk import RetryDecision, RetryPolicy
    except ImportError:
        RetryDecision, RetryPolicy = None, object


class HeyGenRetryPolicy(RetryPolicy):
    """
    Retry when HeyGen says so, and not at all when it is no use.

    ===========================================  ========================================
    the task failed with                         the policy
    ===========================================  ========================================
    an error with HeyGen's ``Retry-After``       retries then, not after ``retry_delay``
    another error that a permanent one caused    fails the task at once
    anything else                                leaves it to ``retries``
    ===========================================  ========================================

    What caused an error is what it was raised ``from``. A permanent error that leaves a task as it is needs
    no policy: Airflow fails the task at once. ``retries`` remains the limit.

    :raises RuntimeError: this Airflow is older than 3.3 and has no retry policies.
    """

    def __init__(self) -> None:
        if RetryDecision is None:
            raise RuntimeError(
                "HeyGenRetryPolicy needs Airflow 3.3 or newer, which has retry policies. Leave it away: a"
                " permanent error fails a task at once without it, any other is retried after 'retry_delay'."
            )

    def evaluate(
        self,
        exception: BaseException,
        try_number: int,  # noqa: ARG002
        max_tries: int,  # noqa: ARG002
        context: Context | None = None,  # noqa: ARG002
    ) -> RetryDecision:
        """Decide; Airflow calls this on the worker, for all errors but those that are final to Airflow."""
        error = _cause(exception)
        if isinstance(error, HeyGenPermanentError):
            return RetryDecision.fail(f"HeyGen will refuse it again: {error}")
        if error is None or error.retry_after is None:
            return RetryDecision.default()
        # Jitter, or all that were turned away together come back together; never sooner than asked for.
        delay = timedelta(seconds=max(0.0, error.retry_after) * random.uniform(1.0, 1.2))  # noqa: S311
        return RetryDecision.retry(delay, f"HeyGen asks to wait {error.retry_after:.0f} s: {error}")

    def serialize(self) -> dict[str, Any]:
        """Give its settings: it has none."""
        return {}

    @classmethod
    def deserialize(cls, data: dict[str, Any]) -> HeyGenRetryPolicy:  # noqa: ARG003
        """Make one from its settings."""
        return cls()


def _cause(exception: BaseException | None) -> HeyGenError | None:
    """Find the error of HeyGen's in what a task failed with and in what that was raised from."""
    while exception is not None and not isinstance(exception, HeyGenError):
        # Not its context: a task that deals with a refusal may fail of something else, which may pass.
        exception = exception.__cause__
    return exception
