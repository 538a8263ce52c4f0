"""Remove a stack when the test run that made it has ended, however it ended.

``python keeper.py FOLDER DATABASE_URL REDIS_URL`` (each URL may be empty) waits for the end of its stdin,
which comes when the test run closes the pipe or dies. Then it kills every process that has FOLDER as its
``AIRFLOW_HOME`` (they inherit that, in whatever process group or session they are), drops the database,
deletes the keys in Redis that begin with FOLDER's name, and deletes the folder.
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


def main(folder: str, database: str, redis: str) -> None:
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
    if redis:
        delete_keys(redis, os.path.basename(folder))
    shutil.rmtree(folder, ignore_errors=True)


def drop(database: str) -> None:
    import psycopg2

    server, _, name = database.rpartition("/")
    connection = psycopg2.connect(f"{server}/postgres")
    connection.autocommit = True
    with connection.cursor() as cursor:
        cursor.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')
    connection.close()


def delete_keys(url: str, prefix: str) -> None:
    from redis import Redis

    with Redis.from_url(url) as redis:
        for key in redis.scan_iter(f"{prefix}*", count=1000):
            redis.delete(key)


if __name__ == "__main__":
    os.environ.pop("AIRFLOW_HOME", None)
    main(*sys.argv[1:])
