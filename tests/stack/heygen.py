"""The emulator as a process of its own, steered through its admin routes."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import IO, Any

import requests


class HeyGen:
    """One emulator. ``behaviour`` are its command line options, such as ``idempotency=False``."""

    def __init__(self, env: dict[str, str], log: IO[bytes], key: str, token: str, **behaviour: Any) -> None:
        command = [sys.executable, "-m", "airflow_provider_heygen.emulator", "--port", "0"]
        command += ["--api-key", key, "--oauth-token", token]
        for name, value in behaviour.items():
            flag = name.replace("_", "-")
            command += (
                [f"--{'' if value else 'no-'}{flag}"]
                if isinstance(value, bool)
                else [f"--{flag}", str(value)]
            )
        self.process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=log)
        assert self.process.stdout is not None
        line = self.process.stdout.readline().decode()
        assert line.startswith("HeyGen emulator: "), f"The emulator did not start: {line}"
        self.url = line.split()[-1]
        self.key, self.token = key, token
        self._session = requests.Session()
        self._session.trust_env = False

    def connection(self, **extra: Any) -> str:
        """An Airflow connection to it, as the value of an environment variable."""
        oauth = extra.get("auth_type") == "oauth"
        password = extra.pop("password", self.token if oauth else self.key)
        extra = {"allow_http": True, "allow_private_hosts": True, **extra}
        return json.dumps({"conn_type": "heygen", "host": self.url, "password": password, "extra": extra})

    def admin(self, method: str, path: str, body: Any = None) -> Any:
        response = self._session.request(method, f"{self.url}/emulator/{path}", json=body, timeout=60)
        response.raise_for_status()
        return response.json() if response.content else None

    def behave(self, **behaviour: Any) -> None:
        self.admin("PATCH", "behaviour", behaviour)

    def add_fault(self, path: str, **fault: Any) -> None:
        """Make the next requests for a path fail; the path is a regular expression for all of it."""
        self.admin("POST", "faults", {"path": f"{path}$", **fault})

    def clear_faults(self) -> None:
        self.admin("DELETE", "faults")

    def jobs(self, title: str | None = None) -> list[dict[str, Any]]:
        """All jobs ever created, or those of one title: that is what is billed."""
        jobs = self.admin("GET", "state")["jobs"]
        return [job for job in jobs if title is None or job["request"].get("title") == title]

    def force(self, job_id: str, status: str, failure_message: str | None = None) -> None:
        self.admin("PATCH", f"jobs/{job_id}", {"status": status, "failure_message": failure_message})

    def requests(self, method: str | None = None, path: str | None = None) -> list[dict[str, Any]]:
        """What it was asked, in order."""
        return [
            request
            for request in self.admin("GET", "requests")
            if method in (None, request["method"]) and path in (None, request["path"])
        ]

    def create(self, title: str, resource: str = "overdubs") -> str:
        """Create a job without Airflow."""
        source = {"type": "url", "url": "https://example.com/a.mp4"}
        response = self._session.post(
            f"{self.url}/v3/{resource}",
            json={"video": source, "audio": source, "title": title},
            headers={"X-Api-Key": self.key},
            timeout=60,
        )
        response.raise_for_status()
        return str(next(iter(response.json()["data"].values())))

    def delete(self, job_id: str, resource: str = "overdubs") -> None:
        """Delete a job without Airflow."""
        response = self._session.delete(
            f"{self.url}/v3/{resource}/{job_id}", headers={"X-Api-Key": self.key}, timeout=60
        )
        response.raise_for_status()
