"""What is shipped: wheel and sdist, and the metadata by which Airflow finds what is in them."""

from __future__ import annotations

import importlib
import inspect
import itertools
import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import BytesParser
from functools import partial
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jsonschema
import pytest
import yaml
from airflow.providers.common.compat.sdk import BaseHook, BaseOperator, BaseSensorOperator
from airflow.triggers.base import BaseTrigger
from packaging.requirements import Requirement
from packaging.version import Version

import airflow_provider_heygen
from airflow_provider_heygen.connection import HeyGenConnection
from airflow_provider_heygen.get_provider_info import get_provider_info

if TYPE_CHECKING:
    from collections.abc import Callable
    from email.message import Message

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "airflow_provider_heygen"
DISTRIBUTION = "airflow-provider-heygen"
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))  # not in the sdist


# --- Wheel and sdist ----------------------------------------------------------------------------------


class Built(NamedTuple):
    tree: Path
    wheel: Path
    sdist: Path


def command(*args: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    """Run a command to its end and return its standard output; on failure, report all of it."""
    done = subprocess.run(
        [str(arg) for arg in args], cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, f"{args}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def build(source: Path, out: Path, *kinds: str) -> None:
    command(sys.executable, "-m", "build", "--no-isolation", *kinds, "--outdir", out, source, cwd=source)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Built:
    """Build from what git knows: a file that was forgotten there is missing here."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    for name in command("git", "ls-files", "-z", cwd=ROOT).split("\0"):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
    build(tree, out, "--sdist", "--wheel")
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return Built(tree, wheel, sdist)


def wheel_files(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def sdist_files(sdist: Path) -> dict[str, bytes]:
    """Names are those below the one folder that an sdist has."""
    with tarfile.open(sdist) as archive:
        return {
            member.name.partition("/")[2]: archive.extractfile(member).read()
            for member in archive.getmembers()
            if member.isfile()
        }


def of_dist_info(files: dict[str, bytes], name: str) -> bytes:
    return files[f"{PACKAGE}-{airflow_provider_heygen.__version__}.dist-info/{name}"]


@pytest.fixture(scope="module")
def metadata(built) -> Message:
    return BytesParser().parsebytes(of_dist_info(wheel_files(built.wheel), "METADATA"))


def test_the_wheel_holds_the_package_and_nothing_else(built):
    shipped = {name for name in wheel_files(built.wheel) if ".dist-info/" not in name}
    package = {path.relative_to(built.tree).as_posix() for path in (built.tree / PACKAGE).rglob("*.*")}
    assert shipped == package
    assert {f"{PACKAGE}/py.typed", f"{PACKAGE}/emulator/__main__.py"} <= shipped


def test_the_sdist_holds_the_project_and_nothing_else(built):
    files = (path.relative_to(built.tree) for path in built.tree.rglob("*") if path.is_file())
    tree = {path.as_posix() for path in files if "__pycache__" not in path.parts}  # of the build itself
    shipped = set(sdist_files(built.sdist))
    assert shipped - tree == {"PKG-INFO"}
    assert {name for name in tree - shipped if not name.startswith(".")} == set()  # dotted: CI and such


def test_nothing_shipped_names_a_path_of_this_machine(built):
    paths = [f"{path}/".encode() for path in (ROOT, built.tree, built.wheel.parent)]
    for files in (wheel_files(built.wheel), sdist_files(built.sdist)):
        assert [name for name, body in files.items() if any(path in body for path in paths)] == []


def test_metadata(metadata):
    assert metadata["Name"] == DISTRIBUTION
    assert metadata["Version"] == airflow_provider_heygen.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["License-File"] == "LICENSE"
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload().strip()
    assert "Framework :: Apache Airflow :: Provider" in metadata.get_all("Classifier")


def test_each_link_of_the_description_works_on_a_package_index(metadata):
    links = re.findall(r"\]\((.+?)\)", metadata.get_payload())
    assert links
    assert [link for link in links if not link.startswith("https://")] == []
    assert "quickstart (`docs/quickstart.md`)" in metadata.get_payload()


def test_the_licence_itself_is_in_the_wheel(built):
    text = of_dist_info(wheel_files(built.wheel), "licenses/LICENSE")
    assert text == (ROOT / "LICENSE").read_bytes()
    assert b"Apache License" in text


def test_requirements(metadata):
    requirements = [Requirement(line) for line in metadata.get_all("Requires-Dist")]
    always = {found.name: found.specifier for found in requirements if found.marker is None}
    assert set(always) >= {
        "apache-airflow",
        "apache-airflow-providers-http",
        "apache-airflow-providers-common-compat",
        "requests",
    }
    assert "3.1.0" in always["apache-airflow"]
    assert "3.0.6" not in always["apache-airflow"]
    extra = {
        found.name for found in requirements if found.marker and found.marker.evaluate({"extra": "emulator"})
    }
    assert extra == {"fastapi", "imageio-ffmpeg", "python-multipart", "uvicorn"}


def test_the_entry_point_by_which_airflow_finds_us(built):
    lines = of_dist_info(wheel_files(built.wheel), "entry_points.txt").decode().split("\n")
    assert [line for line in lines if line] == [
        "[airflow.plugins]",
        "heygen = airflow_provider_heygen.plugin:HeyGenPlugin",
        "[apache_airflow_provider]",
        "provider_info = airflow_provider_heygen.get_provider_info:get_provider_info",
    ]


def test_the_sdist_rebuilds_the_same_wheel(built, tmp_path):
    with tarfile.open(built.sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    build(source, tmp_path / "out", "--wheel")
    (again,) = (tmp_path / "out").iterdir()
    assert again.name == built.wheel.name
    assert wheel_files(again) == wheel_files(built.wheel)
    assert again.read_bytes() == built.wheel.read_bytes()


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> Callable[..., str]:
    """
    Run Airflow's commands where the wheel is installed.

    That is the bare environment that `make dist` names, or else one that has the wheel and whatever else this
    one has.
    """
    folder = tmp_path_factory.mktemp("installed")
    bare = os.environ.get("BARE_VENV")
    venv = Path(bare) if bare else folder / "venv"
    env = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("AIRFLOW_", "PYTHON", "PIP_"))
    }
    env |= {"AIRFLOW_HOME": str(folder / "airflow"), "PIP_CONFIG_FILE": os.devnull}
    env |= {"AIRFLOW__CORE__DAGS_FOLDER": str(folder / "dags"), "AIRFLOW__CORE__LOAD_EXAMPLES": "False"}
    shutil.copytree(built.tree / "example_dags", folder / "dags")

    def python(*args: str | Path) -> str:
        return command(venv / "bin" / "python", *args, cwd=folder, env=env)

    if not bare:
        command(sys.executable, "-m", "venv", venv, cwd=folder)
        python("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", built.wheel)
    site = Path(python("-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    if not bare:
        # All that this environment has but ours, whose metadata an editable install would have in it. Behind
        # the environment's own on its path.
        theirs = folder / "theirs"
        theirs.mkdir()
        packages = (Path(path) for path in sys.path if Path(path).name in ("site-packages", "dist-packages"))
        for item in itertools.chain.from_iterable(package.iterdir() for package in packages):
            if not (PACKAGE in item.name or item.suffix == ".pth" or (theirs / item.name).exists()):
                (theirs / item.name).symlink_to(item)
        (site / "theirs.pth").write_text(str(theirs))
    here = python("-c", f"import {PACKAGE}; print({PACKAGE}.__file__)").strip()
    assert Path(here) == site / PACKAGE / "__init__.py"

    return partial(python, "-m", "airflow")


def rows(airflow: Callable[..., str], *args: str) -> list[dict[str, str]]:
    return json.loads(airflow(*args, "--output", "json").splitlines()[-1])


def test_airflow_sees_the_installed_wheel(installed):
    (listed,) = (row for row in rows(installed, "providers", "list") if row["package_name"] == DISTRIBUTION)
    assert listed["version"] == airflow_provider_heygen.__version__
    (hook,) = (row for row in rows(installed, "providers", "hooks") if row["connection_type"] == "heygen")
    assert hook["class"] == "airflow_provider_heygen.hooks.heygen.HeyGenHook"
    assert hook["package_name"] == DISTRIBUTION
    assert hook["hook_name"] == "HeyGen"
    assert hook["conn_id_attribute_name"] == "heygen_conn_id"


def test_example_dags_are_read_with_the_installed_wheel(installed):
    wanted = {path.stem for path in (ROOT / "example_dags").glob("example_*.py")}
    installed("db", "migrate")
    assert {row["dag_id"] for row in rows(installed, "dags", "list", "--local")} == wanted


def test_the_changelog_has_this_version():
    text = (ROOT / "CHANGELOG.md").read_text()
    newest, *released = re.findall(r"^## \[(.+?)\](?: - \d{4}-\d\d-\d\d)?$", text, re.MULTILINE)
    assert newest in ("Unreleased", airflow_provider_heygen.__version__)
    assert released == sorted(released, key=Version, reverse=True)
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.+)$", text, re.MULTILINE)) <= kinds


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_call_make_and_what_is_pinned(path):
    text = path.read_text()
    assert yaml.safe_load(text)["permissions"] == {"contents": "read"}
    uses = re.findall(r"uses: (.+)", text)
    assert uses
    assert [action for action in uses if not re.fullmatch(r"[\w/-]+@[0-9a-f]{40}  # v[\d.]+", action)] == []
    called = " ".join(re.findall(r"(?:run: make |target: )([a-z][a-z -]*)", text)).split()
    targets = re.findall(r"^([\w-]+)[\w -]*:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert called
    assert set(called) <= set(targets)


# --- What get_provider_info() says --------------------------------------------------------------------

INFO = get_provider_info()
(CONNECTION,) = INFO["connection-types"]
KINDS: dict[str, type] = {
    "hooks": BaseHook,
    "operators": BaseOperator,
    "sensors": BaseSensorOperator,
    "triggers": BaseTrigger,
    "transfers": BaseOperator,
}


def schema(name: str) -> dict[str, Any]:
    return json.loads(resources.files("airflow").joinpath(name).read_text())


def named_modules(kind: str) -> list[str]:
    if kind == "transfers":
        return [entry["python-module"] for entry in INFO[kind]]
    return [name for entry in INFO[kind] for name in entry["python-modules"]]


def classes_in(module: str, base: type) -> set[type]:
    """Return what a module itself defines of a kind; a sensor is no operator here."""
    return {
        found
        for _, found in inspect.getmembers(importlib.import_module(module), inspect.isclass)
        if found.__module__ == module
        and issubclass(found, base)
        and (base is not BaseOperator or not issubclass(found, BaseSensorOperator))
    }


def test_provider_info_is_as_airflow_wants_it():
    wanted = schema("provider_info.schema.json")
    jsonschema.Draft7Validator(wanted).validate(INFO)
    # That schema lets unknown keys pass, and so a misspelt one.
    assert set(INFO) <= set(wanted["properties"])
    assert INFO["package-name"] == DISTRIBUTION


def test_the_connection_form_is_as_airflow_wants_it():
    # What Airflow checks providers of its own with, and stricter: it knows the form.
    wanted = schema("provider.yaml.schema.json")["properties"]["connection-types"]
    jsonschema.Draft7Validator(wanted).validate(INFO["connection-types"])


@pytest.mark.parametrize(
    ("kind", "module"), [(kind, module) for kind in KINDS for module in named_modules(kind)]
)
def test_a_named_module_holds_what_it_is_named_for(kind, module):
    assert classes_in(module, KINDS[kind])


def test_every_class_is_in_a_named_module():
    found = {
        (base, cls)
        for info in pkgutil.walk_packages(airflow_provider_heygen.__path__, f"{PACKAGE}.")
        for base in set(KINDS.values())
        for cls in classes_in(info.name, base)
    }
    named = {
        (base, cls)
        for kind, base in KINDS.items()
        for module in named_modules(kind)
        for cls in classes_in(module, base)
    }
    assert {base for base, _ in found} == set(KINDS.values())
    assert found == named


def test_transfers_are_not_listed_as_operators_too():
    assert not set(named_modules("transfers")) & set(named_modules("operators"))


def test_hook_and_connection_type_agree():
    module, _, name = CONNECTION["hook-class-name"].rpartition(".")
    hook = getattr(importlib.import_module(module), name)
    assert module in named_modules("hooks")
    assert hook.conn_type == CONNECTION["connection-type"] == "heygen"
    assert hook.hook_name == CONNECTION["hook-name"]
    assert hook.default_conn_name == "heygen_default"
    assert hook.conn_name_attr in inspect.signature(hook).parameters


@pytest.mark.parametrize("name", CONNECTION["conn-fields"])
def test_a_field_of_the_form_is_a_setting(name):
    given_by_place = {"conn_id", "base_url", "credential"}
    setting = HeyGenConnection.model_fields[name]
    assert name not in given_by_place

    # What the form shows as default is what counts when nothing is set.
    form = CONNECTION["conn-fields"][name]
    if "enum" not in form["schema"]:
        jsonschema.validate(None, form["schema"])  # Airflow's form stores what was left empty as null
    if "default" in form["schema"]:
        assert form["schema"]["default"] == setting.default
        jsonschema.validate(form["schema"]["default"], form["schema"])
    elif setting.default is not None:
        assert form["description"].endswith(f"Default: {setting.default:g}.")
    for choice in form["schema"].get("enum", []):
        HeyGenConnection(conn_id="c", base_url="https://heygen.test", credential="k", **{name: choice})
