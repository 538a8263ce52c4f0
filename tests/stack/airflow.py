"""A real Airflow: scheduler, DAG processor, API server, triggerers and workers can be killed, one by one."""

from __future__ import annotations

import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import psutil
import sqlalchemy

from stack import keeper
from stack.broker import REDIS, Wire
from stack.heygen import HeyGen
from stack.rest import Rest, wait_for

NOTICES_SOON = {
    "AIRFLOW__SCHEDULER__JOB_HEARTBEAT_SEC": "2",
    "AIRFLOW__SCHEDULER__SCHEDULER_HEALTH_CHECK_THRESHOLD": "15",
    "AIRFLOW__SCHEDULER__ORPHANED_TASKS_CHECK_INTERVAL": "5",
    "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "20",
    "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT_DETECTION_INTERVAL": "3",
    "AIRFLOW__TRIGGERER__JOB_HEARTBEAT_SEC": "2",
    "AIRFLOW__TRIGGERER__TRIGGERER_HEALTH_CHECK_THRESHOLD": "15",
    # What a Celery worker has taken and not finished by then is given to another one, even if it lives.
    "AIRFLOW__CELERY_BROKER_TRANSPORT_OPTIONS__VISIBILITY_TIMEOUT": "30",
    "AIRFLOW__CELERY_BROKER_TRANSPORT_OPTIONS__UNACKED_RESTORE_INTERVAL": "2",
    "AIRFLOW__CELERY_BROKER_TRANSPORT_OPTIONS__UNACKED_RESTORE_THROTTLE": "1",
}
"""Settings by which Airflow misses what has died within seconds, not minutes."""

HERE = Path(__file__).resolve().parent
POSTGRES = os.environ.get("STACK_POSTGRES", "postgresql://postgres@127.0.0.1:5432")
"""A PostgreSQL in which the tests may create databases; without it, SQLite is used."""

COMMON_PARTS = {
    "api-server": ("api-server", "--workers", "1"),
    "scheduler": ("scheduler", "--skip-serve-logs"),
    "dag-processor": ("dag-processor",),
}
TRIGGERER = ("triggerer", "--skip-serve-logs")
# A Celery worker may end when it acknowledges a message while its lost connection to Redis is made anew
# (observed with kombu 5.7), so it runs under a supervisor, as in production.
SUPERVISOR = ("sh", "-c", 'while :; do "$@"; sleep 1; done', "supervisor")
WORKER = ("celery", "worker", "--skip-serve-logs", "--without-mingle", "--celery-hostname")
PARTS = {**COMMON_PARTS, "triggerer": TRIGGERER}
CELERY_PARTS = {
    **COMMON_PARTS,
    **{f"triggerer-{number}": TRIGGERER for number in (1, 2)},
    **{f"worker-{number}": (*WORKER, f"worker-{number}") for number in (1, 2)},
}


class Stack:
    """
    Airflow with its own home, database and ports; `stop` or the end of this process removes it all.

    :param postgres: keep the metadata in PostgreSQL; else in SQLite.
    :param celery: run on CeleryExecutor, with two workers and two triggerers; else on LocalExecutor.
    :param settings: more of ``AIRFLOW__...``.
    """

    def __init__(
        self, *, postgres: bool, celery: bool = False, settings: dict[str, str] | None = None
    ) -> None:
        self.parts = CELERY_PARTS if celery else PARTS
        self.redis = Wire() if celery else None
        self.home = Path(tempfile.mkdtemp(prefix="heygen-stack-"))
        self.database = f"{POSTGRES}/heygen_stack_{secrets.token_hex(6)}" if postgres else None
        self._parts: dict[str, subprocess.Popen[bytes]] = {}
        self._said: dict[str, int] = {}
        self._heygens: list[HeyGen] = []
        self._cpu_of_killed_workers = 0.0
        command = [sys.executable, keeper.__file__, str(self.home), self.database or ""]
        command.append(REDIS if celery else "")
        # Ctrl-C goes to the group of the test run, so the keeper has a session of its own.
        self._keeper = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        try:
            if self.database:
                _create(self.database)
            self._port = _free_port()
            self.rest = Rest(f"http://127.0.0.1:{self._port}")
            self.env = self._environment(settings or {})
        except BaseException:
            self.stop()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _environment(self, settings: dict[str, str]) -> dict[str, str]:
        sqlite = f"sqlite:///{self.home / 'airflow.db'}"
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("AIRFLOW", "PYTEST")) and not name.lower().endswith("_proxy")
        }
        temporary = self.home / "tmp"
        temporary.mkdir()
        return {
            **inherited,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "TMPDIR": str(temporary),
            "PYTHONUNBUFFERED": "1",
            "SPT_NOENV": "1",  # else a process that renames itself overwrites the keeper's mark
            "AIRFLOW_HOME": str(self.home),
            "AIRFLOW__CORE__DAGS_FOLDER": str(HERE / "dags"),
            "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
            "AIRFLOW__CORE__DAGS_ARE_PAUSED_AT_CREATION": "False",
            "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "True",
            "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"http://127.0.0.1:{self._port}/execution/",
            # Tasks queued beyond the workers would fill the executor's pipe, which blocks the scheduler.
            "AIRFLOW__CORE__PARALLELISM": "28",
            "AIRFLOW__CORE__MAX_ACTIVE_TASKS_PER_DAG": "24",
            # Nothing is encrypted, so that a secret in the database is seen.
            "AIRFLOW__CORE__FERNET_KEY": "",
            "AIRFLOW__API__HOST": "127.0.0.1",
            "AIRFLOW__API__PORT": str(self._port),
            "AIRFLOW__API__SECRET_KEY": secrets.token_hex(16),
            "AIRFLOW__API__MAXIMUM_PAGE_LIMIT": "1000",
            "AIRFLOW__API_AUTH__JWT_SECRET": secrets.token_hex(32),
            "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": (self.database or sqlite).replace(
                "postgresql:", "postgresql+psycopg2:"
            ),
            # One API server serves all tasks; with 15 connections, the default, a burst locks it up.
            "AIRFLOW__DATABASE__SQL_ALCHEMY_POOL_SIZE": "35",
            "AIRFLOW__DATABASE__SQL_ALCHEMY_MAX_OVERFLOW": "5",
            "AIRFLOW__DAG_PROCESSOR__PARSING_PROCESSES": "1",
            "AIRFLOW__DAG_PROCESSOR__MIN_FILE_PROCESS_INTERVAL": "120",  # the files do not change
            "AIRFLOW__SCHEDULER__SCHEDULER_HEARTBEAT_SEC": "1",
            "AIRFLOW__SCHEDULER__SCHEDULER_IDLE_SLEEP_TIME": "0.5",
            # Airflow's supervisor may notice the end of a task's process only at its next heartbeat. A task
            # that is due again by then (deferred or rescheduled for less) is failed by the scheduler.
            "AIRFLOW__WORKERS__MIN_HEARTBEAT_INTERVAL": "1",
            "AIRFLOW__WORKERS__MAX_FAILED_HEARTBEATS": "15",
            # On a busy machine the API server needs more than 5 s for a response, and the task would be lost.
            "AIRFLOW__WORKERS__EXECUTION_API_TIMEOUT": "20",
            **(self._celery(self.redis) if self.redis else {}),
            **settings,
        }

    def _celery(self, redis: Wire) -> dict[str, str]:
        return {
            "AIRFLOW__CORE__EXECUTOR": "CeleryExecutor",
            "AIRFLOW__CELERY__BROKER_URL": redis.url,
            "AIRFLOW__CELERY__WORKER_CONCURRENCY": "8",
            # A scheduler on a busy machine needs more than 1 s to hand over a task, and would give up.
            "AIRFLOW__CELERY__OPERATION_TIMEOUT": "10",
            # Stacks share a Redis without meeting in it.
            "AIRFLOW__CELERY_BROKER_TRANSPORT_OPTIONS__GLOBAL_KEYPREFIX": self.home.name,
        }

    # The emulator and the connections to it

    def heygen(self, **behaviour: Any) -> HeyGen:
        """Start one more emulator."""
        number = len(self._heygens)
        key, token = f"sk_{secrets.token_hex(16)}", f"oauth_{secrets.token_hex(16)}"
        folder = self.home / "heygen"
        folder.mkdir(exist_ok=True)
        with (folder / f"{number}.stderr").open("ab") as log:
            env = {**self.env, "TMPDIR": str(folder)}
            self._heygens.append(HeyGen(env, log, key, token, **behaviour))
        return self._heygens[-1]

    def connect(self, conn_id: str, connection: str) -> None:
        """Define a connection; to be called before ``start``."""
        self.env[f"AIRFLOW_CONN_{conn_id.upper()}"] = connection

    # The parts

    def start(self, *dag_ids: str) -> None:
        """Prepare the database, start all parts, wait until they work and have read these DAGs."""
        migration = subprocess.run(
            [sys.executable, "-m", "airflow", "db", "migrate"], env=self.env, capture_output=True, check=False
        )
        assert migration.returncode == 0, (migration.stdout + migration.stderr).decode()
        for part in self.parts:
            self.start_part(part)
        self.wait_until_up()

        def known() -> bool:
            errors = self.rest.call("GET", "importErrors")["import_errors"]
            assert not errors, errors
            return set(dag_ids) <= {dag["dag_id"] for dag in self.rest.call("GET", "dags")["dags"]}

        wait_for("the DAGs", known)

    def start_part(self, part: str) -> None:
        command = (sys.executable, "-m", "airflow", *self.parts[part])
        with (self.home / f"{part}.stdout").open("ab") as output:
            self._said[part] = output.tell()
            self._parts[part] = subprocess.Popen(
                [*SUPERVISOR, *command] if part.startswith("worker") else command,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def wait_until_up(self) -> None:
        """Wait until all parts report that they are well."""
        triggerers = sum(part.startswith("triggerer") for part in self.parts)
        workers = [part for part in self.parts if part.startswith("worker")]

        def ready(worker: str) -> bool:
            return " ready." in self.output(worker)[self._said[worker] :]

        def well() -> bool:
            for part, process in self._parts.items():
                assert process.poll() is None, f"{part} has ended:\n{self.output(part)[-3000:]}"
            if not self.rest.is_up():
                return False
            health = self.rest.call("GET", "monitor/health")
            if any(health[part]["status"] != "healthy" for part in ("scheduler", "dag_processor")):
                return False
            alive = self.rest.call("GET", "jobs", job_type="TriggererJob", is_alive=True)
            return alive["total_entries"] >= triggerers and all(map(ready, workers))

        wait_for("Airflow to be up", well)

    def kill_part(self, part: str, *, tree: bool = True) -> list[psutil.Process]:
        """
        SIGKILL a part.

        :param tree: its children too, as when its machine dies.
        :returns: the children that live on.
        """
        process = self._parts.pop(part)
        if part.startswith("worker"):
            self._cpu_of_killed_workers += _cpu_seconds(process.pid)
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        if tree:
            end(children)
        return [] if tree else children

    def freeze_part(self, part: str) -> None:
        self._signal_tree(self._parts[part].pid, signal.SIGSTOP)

    def thaw_part(self, part: str) -> None:
        self._signal_tree(self._parts[part].pid, signal.SIGCONT)

    def _signal_tree(self, pid: int, number: int) -> None:
        process = psutil.Process(pid)
        for member in [process, *process.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                member.send_signal(number)

    def restart_part(self, part: str, *, down: float = 0) -> None:
        self.kill_part(part)
        time.sleep(down)
        self.start_part(part)

    def output(self, part: str) -> str:
        """What a part has printed."""
        return (self.home / f"{part}.stdout").read_text(errors="replace")

    def worker_starts(self) -> list[float]:
        """How many seconds each start of a task has held a worker, by the executor's account."""
        pattern = r"Workload finished .*?duration=([0-9.]+)"
        return [float(found) for part in self.parts for found in re.findall(pattern, self.output(part))]

    def worker_cpu_seconds(self) -> float:
        """The CPU that the Celery workers have used so far, with all processes of tasks."""
        living = [process.pid for part, process in self._parts.items() if part.startswith("worker")]
        return self._cpu_of_killed_workers + sum(map(_cpu_seconds, living))

    # The database

    def tables(self) -> dict[str, list[dict[str, Any]]]:
        """Everything in the metadata database: all rows of all tables."""
        engine = sqlalchemy.create_engine(self.env["AIRFLOW__DATABASE__SQL_ALCHEMY_CONN"])
        try:
            with engine.connect() as connection:
                metadata = sqlalchemy.MetaData()
                metadata.reflect(connection)

                def rows(table: str) -> list[dict[str, Any]]:
                    # As stored in the database; the column types differ between Airflow releases.
                    result = connection.execute(sqlalchemy.text(f'SELECT * FROM "{table}"'))
                    return [dict(row) for row in result.mappings()]

                return {table: rows(table) for table in metadata.tables}
        finally:
            engine.dispose()

    def stop(self) -> None:
        """Kill all of it and leave nothing behind."""
        assert self._keeper.stdin is not None
        self._keeper.stdin.close()
        self._keeper.wait(timeout=60)
        for process in [*self._parts.values(), *(heygen.process for heygen in self._heygens)]:
            process.wait(timeout=10)


def end(processes: list[psutil.Process]) -> None:
    """SIGKILL processes; they may have ended already."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _cpu_seconds(pid: int) -> float:
    """The CPU of a process and its descendants, those that have ended included: their parents reap them."""
    total, process = 0.0, psutil.Process(pid)
    for member in [process, *process.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            used = member.cpu_times()
            total += used.user + used.system + used.children_user + used.children_system
    return total


def kill_worker(pid: int | None, home: Path, *, supervisor: bool = False) -> bool:
    """SIGKILL a task's process if it is one of the stack's."""
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        if pid and process.environ().get("AIRFLOW_HOME") == str(home):
            parent = process.parent() if supervisor else None
            process.kill()
            if parent is not None:
                parent.kill()
            return True
    return False


def why_no_postgres() -> str | None:
    """Return why PostgreSQL cannot be used; ``None`` if it can."""
    try:
        import psycopg2
    except ImportError:
        return "psycopg2 is not installed"
    try:
        psycopg2.connect(f"{POSTGRES}/postgres", connect_timeout=3).close()
    except psycopg2.OperationalError as error:
        return f"no PostgreSQL at {POSTGRES}: {error}".strip()
    return None


def _create(database: str) -> None:
    import psycopg2

    server, _, name = database.rpartition("/")
    connection = psycopg2.connect(f"{server}/postgres")
    connection.autocommit = True
    with connection.cursor() as cursor:
        cursor.execute(f'CREATE DATABASE "{name}"')
    connection.close()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
