"""
Cost of an import when a DAG is parsed: the CPU time each operator or sensor module adds to Airflow's.

    python benchmarks/import_cost.py [--runs N]

Airflow imports each DAG file repeatedly. Each figure is the median over ``--runs`` new processes of the CPU
milliseconds between ``from airflow.sdk import ...`` and the end of the import of one module, with byte code
already compiled. The modules take turns, so that other work on the machine slows all of them. The provider is
imported from this checkout, the peers from the environment of this interpreter. Missing peers are named and
omitted.

Exits with an error if a module of the provider adds more than 40 ms, or loads requests or aiohttp.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
LIMIT_MS = 40.0
PROVIDER = (
    "airflow_provider_heygen.operators.overdub",
    "airflow_provider_heygen.operators.asset",
    "airflow_provider_heygen.sensors.overdub",
    "airflow_provider_heygen.transfers.heygen_to_object_storage",
)
PEERS = {
    "airflow.providers.http.operators.http": "apache-airflow-providers-http",
    "airflow.providers.dbt.cloud.operators.dbt": "apache-airflow-providers-dbt-cloud",
    "airflow.providers.anthropic.operators.batch": "apache-airflow-providers-anthropic",
    "airflow.providers.databricks.operators.databricks": "apache-airflow-providers-databricks",
}

CHILD = """
import importlib, json, sys, time
from airflow.sdk import DAG, BaseOperator, BaseSensorOperator

before = set(sys.modules)
start = time.process_time()
importlib.import_module(sys.argv[1])
cost = time.process_time() - start
print(json.dumps([cost * 1000, sorted({"requests", "aiohttp"} & (set(sys.modules) - before))]))
"""


def measure(module: str, airflow_home: str) -> tuple[float, list[str]]:
    """Return the CPU milliseconds one import adds in a new process, and the HTTP libraries it loads."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD, module],
        cwd=ROOT,  # first on the child's sys.path
        env={**env, "AIRFLOW_HOME": airflow_home},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{module} cannot be imported, see above.")
    cost, loaded = json.loads(done.stdout.splitlines()[-1])
    return cost, loaded


def main() -> None:
    """Measure, print the table, check the limits."""
    parser = argparse.ArgumentParser(description=__doc__.strip().partition("\n")[0])
    parser.add_argument("--runs", type=int, default=7, help="processes per module (default: %(default)s)")
    runs = parser.parse_args().runs
    if runs < 1:
        parser.error("--runs must be at least 1")

    of = dict.fromkeys(PROVIDER, "this checkout")
    for module, distribution in PEERS.items():
        try:
            of[module] = f"{distribution} {version(distribution)}"
        except PackageNotFoundError:
            print(f"skipped {module}: {distribution} is not installed")

    costs: dict[str, list[float]] = {module: [] for module in of}
    loads: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as airflow_home:
        for module in of:
            measure(module, airflow_home)  # not counted: compiles the byte code
        for _ in range(runs):
            for module in of:
                cost, loads[module] = measure(module, airflow_home)
                costs[module].append(cost)

    result = {module: median(found) for module, found in costs.items()}
    unit = max(result[module] for module in PROVIDER)
    print(f"\nAirflow {version('apache-airflow')}, Python {sys.version.split()[0]}, median of {runs}\n")
    width = max(map(len, of))
    print(f"{'module':{width}}  {'CPU ms':>7}  {'min':>6}  {'max':>6}  {'ratio':>6}  loads")
    for module, cost in result.items():
        spread = f"{min(costs[module]):6.1f}  {max(costs[module]):6.1f}"
        print(
            f"{module:{width}}  {cost:7.1f}  {spread}  {cost / unit:6.1f}"
            f"  {', '.join(loads[module]) or 'neither':17}  {of[module]}"
        )
    print("\nratio: to the provider's most expensive module; loads: requests or aiohttp, unless Airflow did")

    missed = [module for module in PROVIDER if result[module] > LIMIT_MS or loads[module]]
    if missed:
        sys.exit(f"MISSED (at most {LIMIT_MS:g} ms, neither library): {', '.join(missed)}")


if __name__ == "__main__":
    main()
