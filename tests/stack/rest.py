"""Airflow's REST API, as far as these tests need it; waits while the API server is down."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, TypeVar

import requests

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")
PATIENCE = 300
"""Seconds after which a wait is taken for endless. No test measures time."""


def wait_for(what: str, look: Callable[[], T], patience: float = PATIENCE, pause: float = 0.5) -> T:
    """Call ``look`` until it returns a true value."""
    until = time.monotonic() + patience
    while not (found := look()):
        if time.monotonic() > until:
            raise TimeoutError(f"Waited {patience:.0f} s for {what}")
        time.sleep(pause)
    return found


class Rest:
    """Airflow's public API; every user is an admin here."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._session = requests.Session()
        self._session.trust_env = False

    def is_up(self) -> bool:
        try:
            return self._session.get(f"{self.url}/api/v2/monitor/health", timeout=5).ok
        except requests.RequestException:
            return False

    def call(self, method: str, path: str, body: Any = None, **params: Any) -> Any:
        """Make one call; repeat it while no server responds."""
        until = time.monotonic() + PATIENCE
        while True:
            try:
                if "Authorization" not in self._session.headers:
                    token = self._session.get(f"{self.url}/auth/token", timeout=30).json()["access_token"]
                    self._session.headers["Authorization"] = f"Bearer {token}"
                response = self._session.request(
                    method, f"{self.url}/api/v2/{path}", json=body, params=params, timeout=60
                )
                break
            except (requests.ConnectionError, requests.Timeout):
                if time.monotonic() > until:
                    raise
                time.sleep(0.3)
        assert response.ok, f"{method} {path}: {response.status_code} {response.text[:2000]}"
        return response.json() if response.content else None


class Run:
    """One DAG run."""

    def __init__(self, rest: Rest, dag_id: str, **conf: Any) -> None:
        self.rest, self.dag_id = rest, dag_id
        run = rest.call("POST", f"dags/{dag_id}/dagRuns", {"logical_date": None, "conf": conf})
        self.run_id = run["dag_run_id"]
        self.path = f"dags/{dag_id}/dagRuns/{self.run_id}"

    @property
    def state(self) -> str:
        return str(self.rest.call("GET", self.path)["state"])

    def tasks(self) -> dict[str, dict[str, Any]]:
        """Task instances by task id, mapped ones by ``task_id[map_index]``."""
        found = self.rest.call("GET", f"{self.path}/taskInstances", limit=1000)["task_instances"]
        return {_name(task): task for task in found}

    def states(self) -> dict[str, str | None]:
        return {name: task["state"] for name, task in self.tasks().items()}

    def wait(self, patience: float = PATIENCE) -> dict[str, dict[str, Any]]:
        """Wait for its end; return its task instances."""
        try:
            wait_for("the run's end", lambda: self.state in ("success", "failed"), patience)
        except TimeoutError as error:
            raise TimeoutError(f"{error}: {self.dag_id} {self.states()}") from None
        return self.tasks()

    def wait_for_state(self, name: str, *states: str) -> dict[str, Any]:
        """Wait until a task instance is in one of these states; return it."""

        def look() -> dict[str, Any] | None:
            task = self.tasks().get(name)
            return task if task and task["state"] in states else None

        return wait_for(f"{name} to be {' or '.join(states)}", look)

    def xcoms(self, name: str) -> dict[str, Any]:
        """XCom values of a task instance, as JSON."""
        task_id, map_index = _parts(name)
        path = f"{self.path}/taskInstances/{task_id}/xcomEntries"
        entries = self.rest.call("GET", path, map_index=map_index, limit=100)["xcom_entries"]
        return {
            entry["key"]: self.rest.call("GET", f"{path}/{entry['key']}", map_index=map_index)["value"]
            for entry in entries
        }

    def log(self, name: str, try_number: int = 1) -> str:
        """The log of one try, as the UI shows it."""
        task_id, map_index = _parts(name)
        answer = self.rest.call(
            "GET", f"{self.path}/taskInstances/{task_id}/logs/{try_number}", map_index=map_index
        )
        return "\n".join(line if isinstance(line, str) else str(line) for line in answer["content"])

    def tries(self, name: str) -> list[int]:
        """The numbers of the tries that Airflow has kept a record of."""
        tries = self.rest.call("GET", f"{self._task(name)}/tries")["task_instances"]
        return [task["try_number"] for task in tries]

    def clear(self, *names: str) -> None:
        """Clear task instances, as a user does to have them run again."""
        body = {
            "dry_run": False,
            "only_failed": False,
            "dag_run_id": self.run_id,
            "task_ids": [task_id if index < 0 else [task_id, index] for task_id, index in map(_parts, names)],
        }
        self.rest.call("POST", f"dags/{self.dag_id}/clearTaskInstances", body)

    def mark(self, name: str, state: str) -> None:
        """Set a task instance's state, as a user does."""
        self.rest.call("PATCH", self._task(name), {"new_state": state})

    def _task(self, name: str) -> str:
        task_id, map_index = _parts(name)
        return f"{self.path}/taskInstances/{task_id}" + (f"/{map_index}" if map_index >= 0 else "")


def _name(task: dict[str, Any]) -> str:
    return task["task_id"] + (f"[{task['map_index']}]" if task["map_index"] >= 0 else "")


def _parts(name: str) -> tuple[str, int]:
    task_id, _, index = name.removesuffix("]").partition("[")
    return task_id, int(index or -1)
