"""
The support matrix: the suite on every Airflow and Python we claim, each pair in an environment of its own.

    python tests/matrix.py [--chaos] [CELL ...]

A cell is AIRFLOW-PYTHON, such as 3.1-3.11; all of them by default. With --chaos, only the chaos
tests of `make test-stack` run; they need PostgreSQL and Redis.

The environments stay in `.matrix/` for the next time. A cell whose Python is not on this machine is left out,
and the table says so; a cell that was asked for by name fails then. Needs nothing but Python; it is faster
where uv is installed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.11", "3.12", "3.13")
NEWEST = "3.3-3.14"  # Airflow declares Python 3.14 from 3.3 on
CONSTRAINTS = {
    "3.1": "constraints/3.1.txt",
    "3.2": "constraints/3.2.txt",
    "3.3": "constraints.txt",
}
# Most tests wait, so four processes share two cores, but only two that start an Airflow.
PARTS = (
    ("--ignore", "tests/stack", "--numprocesses", "4", "--dist", "loadfile"),
    ("tests/stack", "--numprocesses", "2", "--dist", "loadfile"),
)
CHAOS = tuple(
    (f"tests/stack/{part}.py",) for part in ("chaos_kills", "chaos_random", "chaos_celery", "night")
)
ABSENT = "no such Python here"


def find_python(version: str) -> str | None:
    """Find a Python with venv, on PATH or in pyenv; a shim of pyenv may be on PATH and yet not work."""
    on_path = shutil.which(f"python{version}")
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    in_pyenv = sorted(pyenv.glob(f"versions/{version}.*/bin/python{version}"))
    for found in filter(None, [on_path, *map(str, in_pyenv)]):
        check = [found, "-c", "import ensurepip"]
        if subprocess.run(check, capture_output=True, check=False).returncode == 0:
            return found
    return None


def build(cell: Path, python: str, constraints: str) -> Path:
    """Build the environment of a cell, unless it is there and nothing it was built from has changed."""
    built_from = (ROOT / "pyproject.toml").read_text() + (ROOT / constraints).read_text()
    mark, inside = cell / "built-from", cell / "bin" / "python"
    if not mark.exists() or mark.read_text() != built_from:
        arguments = ["--constraint", constraints, "--editable", ".[emulator,dev]"]
        subprocess.run([ROOT / "tests" / "environment.sh", python, cell, *arguments], cwd=ROOT, check=True)
        mark.write_text(built_from)
    return inside


def run(name: str, parts: tuple[tuple[str, ...], ...]) -> tuple[bool, str]:
    """Run these parts of the suite in one cell; return whether all passed, and a summary."""
    airflow, _, version = name.partition("-")
    python = find_python(version)
    if python is None:
        return True, ABSENT
    cell = ROOT / ".matrix" / name
    print(f"\n=== Airflow {airflow} on Python {version}", flush=True)
    try:
        inside = build(cell, python, CONSTRAINTS[airflow])
    except subprocess.CalledProcessError as error:
        return False, f"could not be installed: {error}"
    results = cell / "results.xml"
    counts, minutes, well = Counter[str](), 0.0, True
    for part in parts:
        results.unlink(missing_ok=True)
        suite = [inside, "-m", "pytest", f"--junitxml={results}", *part]
        code = subprocess.run(suite, cwd=ROOT, check=False).returncode
        if not results.exists():
            return False, f"pytest ended with {code}"
        found = ET.parse(results).getroot()[0].attrib
        counts.update({name: int(found[name]) for name in ("tests", "skipped", "failures", "errors")})
        minutes += float(found["time"]) / 60
        well = well and code == 0
    bad = counts["failures"] + counts["errors"]
    good = counts["tests"] - counts["skipped"] - bad
    return well, f"{good} passed, {counts['skipped']} skipped, {bad} failed, {minutes:.1f} min"


def main() -> int:
    asked_for = [argument for argument in sys.argv[1:] if argument != "--chaos"]
    parts = CHAOS if "--chaos" in sys.argv[1:] else PARTS
    names = asked_for or [f"{airflow}-{python}" for airflow in CONSTRAINTS for python in PYTHONS]
    names += [] if asked_for else [NEWEST]
    outcomes = {name: run(name, parts) for name in names}
    if asked_for:
        outcomes = {name: (good and text != ABSENT, text) for name, (good, text) in outcomes.items()}
    print("\nAirflow  Python")
    for name, (good, text) in outcomes.items():
        airflow, _, python = name.partition("-")
        print(f"{airflow:8} {python:7} {'ok  ' if good else 'FAIL'} {text}")
    return 0 if all(good for good, _ in outcomes.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
