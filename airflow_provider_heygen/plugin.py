"""The extra link *Watch* and the registration of its page; every Airflow process imports this module."""

from __future__ import annotations

import asyncio
import importlib
from typing import Any
from urllib.parse import quote

from airflow.providers.common.compat.sdk import AirflowPlugin, BaseOperatorLink


def watch_path(dag_id: str, run_id: str, task_id: str, map_index: int) -> str:
    """Return the path of a task instance's page, relative to Airflow's base URL."""
    ids = (dag_id, run_id, task_id, str(map_index))
    return "heygen/watch/" + "/".join(quote(part, safe="") for part in ids)


class WatchLink(BaseOperatorLink):
    """The extra link to the page that plays the task's overdub."""

    name = "Watch"

    @property
    def operators(self) -> list[Any]:  # type: ignore[override]
        """The operators with this link; the API server computes it, so it appears before the task ends."""
        from airflow_provider_heygen.operators.overdub import HeyGenCreateOverdubOperator
        from airflow_provider_heygen.sensors.overdub import HeyGenOverdubSensor
        from airflow_provider_heygen.transfers import heygen_to_object_storage as transfers

        return [
            HeyGenCreateOverdubOperator,
            HeyGenOverdubSensor,
            transfers.HeyGenOverdubToObjectStorageOperator,
        ]

    def get_link(self, operator: Any, *, ti_key: Any) -> str:  # noqa: ARG002
        """Return the path of the page."""
        return watch_path(ti_key.dag_id, ti_key.run_id, ti_key.task_id, ti_key.map_index)


async def _app(scope: Any, receive: Any, send: Any) -> None:
    # The page imports FastAPI and the hook, so it is imported at the first request, and in a thread.
    watch = await asyncio.to_thread(importlib.import_module, "airflow_provider_heygen.watch")
    await watch.app(scope, receive, send)


class HeyGenPlugin(AirflowPlugin):
    """The plugin of entry point group ``airflow.plugins``."""

    name = "heygen"
    fastapi_apps = [{"app": _app, "url_prefix": "/heygen", "name": "HeyGen"}]
    operator_extra_links = [WatchLink()]
