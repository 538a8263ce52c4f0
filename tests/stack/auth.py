"""An auth manager with users of unequal rights."""

from __future__ import annotations

from typing import Any

from airflow.api_fastapi.auth.managers.simple.simple_auth_manager import SimpleAuthManager

WATCHED = "watch_talk"


class OneMayWatch(SimpleAuthManager):
    """Airflow's simple one, whose roles hold for all DAGs; but of users, only ``ann`` may read one DAG."""

    def is_authorized_dag(self, *, user: Any, details: Any = None, **request: Any) -> bool:
        if details is not None and details.id == WATCHED and user.username != "ann":
            return False
        return super().is_authorized_dag(user=user, details=details, **request)
