"""What Airflow 3.1 and 3.2 lack."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Coroutine

T = TypeVar("T")

_calls: set[asyncio.Task[Any]] = set()


async def finish_despite_cancellation(call: Coroutine[Any, Any, T]) -> T:
    """
    Await a call to Airflow, and finish it even if the caller is cancelled.

    Before Airflow 3.2, an unread response stays in the pipe between triggerer and supervisor. The next call
    reads that response and fails (observed on Airflow 3.1). If the trigger runner made the next call, all
    triggers end.
    """
    task = asyncio.create_task(call)
    _calls.add(task)  # the event loop itself holds only a weak reference to it
    task.add_done_callback(_calls.discard)
    return await asyncio.shield(task)


def is_deferral_timeout(next_method: str, next_kwargs: Any) -> bool:
    """Return whether Airflow ended a deferral by its timeout, as it does if no triggerer runs."""
    error = (next_kwargs or {}).get("error")
    return next_method == "__fail__" and str(getattr(error, "value", error)) == "Trigger timeout"


def task_state_store(context: Any) -> Any:
    """Return Airflow's task state store, or ``None`` before Airflow 3.3."""
    return context.get("task_state_store")


def triggerer_stats() -> Any:
    """
    Return the metrics that a triggerer sets up.

    Since Airflow 3.2, a worker sets up the metrics of the Task SDK, and a triggerer those of Airflow core.
    """
    with suppress(ImportError):
        from airflow.observability import stats

        return stats.Stats
    from airflow.providers.common.compat.sdk import Stats

    return Stats
