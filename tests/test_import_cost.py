"""What parsing a DAG must not load or do. benchmarks/import_cost.py measures the time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from airflow_provider_heygen.get_provider_info import get_provider_info

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).resolve().parent.parent

INFO = get_provider_info()
MODULES = [
    *(name for kind in ("operators", "sensors") for entry in INFO[kind] for name in entry["python-modules"]),
    *(entry["python-module"] for entry in INFO["transfers"]),
    # By Airflow, wherever an Asset is made.
    *(entry["handler"].rpartition(".")[0] for entry in INFO["asset-uris"]),
]
EXAMPLES = sorted((ROOT / "example_dags").rglob("*.py"))

HEAVY_PACKAGES = {"requests", "aiohttp", "tenacity"}
HEAVY_MODULES = {"airflow_provider_heygen.api", "airflow_provider_heygen.hooks.heygen"}

PARSER = """
import json, os, sys, traceback
from airflow.sdk import DAG, BaseOperator, BaseSensorOperator

BaseOperator(task_id="any")  # loads what Airflow itself takes for any operator
before = set(sys.modules)
out = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
for line in sys.stdin:
    if pid := os.fork():
        os.waitpid(pid, 0)
        continue
    sockets = []
    sys.addaudithook(
        lambda event, args: sockets.append(f"{event} {args[1:]}")
        if event.startswith("socket.") and event != "socket.gethostname"
        else None
    )
    try:
        exec(json.loads(line))
        found = {"new": sorted(set(sys.modules) - before), "sockets": sockets}
    except BaseException:
        found = {"error": traceback.format_exc()}
    print(json.dumps(found), file=out, flush=True)
    os._exit(0)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], dict[str, list[str]]]]:
    """Run code in a fork of a process with Airflow's own imports; return what it loads, and its sockets."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("AIRFLOW__")}
    with subprocess.Popen(
        [sys.executable, "-c", PARSER],
        cwd=ROOT,
        env={**env, "AIRFLOW_HOME": str(tmp_path_factory.mktemp("airflow"))},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as parser:

        def run(code: str) -> dict[str, list[str]]:
            print(json.dumps(code), file=parser.stdin, flush=True)
            found = json.loads(parser.stdout.readline())
            assert "error" not in found, found["error"]
            return found

        yield run
        parser.stdin.close()


def assert_light(found: dict[str, list[str]]) -> None:
    loaded = set(found["new"])
    assert not {name for name in loaded if name.partition(".")[0] in HEAVY_PACKAGES}
    assert not loaded & HEAVY_MODULES
    assert found["sockets"] == []


@pytest.mark.parametrize("module", MODULES)
def test_importing_what_a_dag_imports_is_light(module, run):
    found = run(f"import {module}")
    assert module in found["new"]  # else Airflow had it already and nothing was looked at
    assert_light(found)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_parsing_an_example_dag_is_light(path, run):
    # As Airflow's DagBag does it: the file is a module of a made-up name, found by its path.
    found = run(
        "from importlib import util\n"
        f"spec = util.spec_from_file_location('parsed_dag', {str(path)!r})\n"
        "sys.modules['parsed_dag'] = util.module_from_spec(spec)\n"
        "spec.loader.exec_module(sys.modules['parsed_dag'])"
    )
    assert_light(found)


def test_the_leak_check_finds_secrets(run):
    found = run(
        "import airflow_provider_heygen.hooks.heygen, socket\n"
        "s = socket.socket(); s.settimeout(1); s.connect_ex(('127.0.0.1', 9))"
    )
    assert set(found["new"]) >= HEAVY_MODULES | {"requests", "aiohttp"}
    assert any("socket.connect" in event for event in found["sockets"])
