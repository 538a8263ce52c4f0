"""Remove a stack when the test run that made it has ended, however it ended.

``python keeper.py FOLDER [DATABASE_URL]`` waits for the end of its stdin, which comes when the test run
closes the pipe or dies. Then it kills every process that has FOLDER as its ``AIRFLOW_HOME`` (they inherit
that, in whatever process group or session they are), drops the database and deletes the folder.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from contextlib import suppress

import psutil


def members(folder: str) -> list[psutil.Process]:
    """Find the processes of the stack."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.environ().get("AIRFLOW_HOME") == folder and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def main(folder: str, database: str | None = None) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.read()
    while living := members(folder):
        for process in living:
            with suppress(psutil.Error):
                process.kill()
        time.sleep(0.05)
    if database:
        drop(database)
    shutil.rmtree(folder, ignore_errors=True)


def drop(database: str) -> None:
    import psycopg2

    server, _, name = database.rpartition("/")
    connection = psycopg2.connect(f"{server}/postgres")
    connection.autocommit = True
    with connection.cursor() as cursor:
        cursor.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')
    connection.close()


if __name__ == "__main__":
    os.environ.pop("AIRFLOW_HOME", None)
    main(*sys.argv[1:])
