"""The stacks of these tests."""

from __future__ import annotations

import os

import pytest

from stack.airflow import why_no_postgres
from stack.broker import why_no_redis


def need(what: str, why_not: str | None) -> None:
    """Skip where something is missing, but never in CI."""
    if why_not and os.environ.get("CI") == "true":
        pytest.fail(f"CI must run these tests: {why_not}")
    if why_not:
        pytest.skip(f"needs {what}: {why_not}")


@pytest.fixture(scope="module")
def postgres() -> None:
    need("PostgreSQL, because Airflow on SQLite fails deferred tasks of its own", why_no_postgres())


@pytest.fixture(scope="module")
def redis() -> None:
    need("Redis, the broker of Airflow on Celery", why_no_redis())
