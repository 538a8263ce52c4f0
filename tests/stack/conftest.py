"""The stacks of these tests."""

from __future__ import annotations

import os

import pytest

from stack.airflow import why_no_postgres


@pytest.fixture(scope="module")
def postgres() -> None:
    """Skip where there is no PostgreSQL, but never in CI."""
    if why := why_no_postgres():
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI must run these tests: {why}")
        pytest.skip(f"needs PostgreSQL, because Airflow on SQLite fails deferred tasks of its own: {why}")
