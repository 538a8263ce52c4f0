"""
The documentation: it builds, every page is found, and what it shows works.

Every fenced block of every page is run, as far as that can be done here: DAGs run on the emulator, tests are
run, commands are parsed by the program they are for and run where that is quick, settings are read by what
reads them. A block in a language that nobody here knows is an error.
"""

from __future__ import annotations

import ast
import configparser
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tomllib
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest
import yaml
from airflow.cli import cli_parser
from airflow.configuration import conf
from airflow.models import Connection
from airflow.sdk import DAG, BaseOperator
from airflow.sdk.definitions.mappedoperator import MappedOperator
from markdown_it import MarkdownIt
from packaging.requirements import Requirement

from airflow_provider_heygen.connection import HeyGenConnection
from airflow_provider_heygen.emulator import Behaviour
from airflow_provider_heygen.emulator.media import make_audio, make_video, probe
from airflow_provider_heygen.hooks.heygen import HeyGenHook

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), *ROOT.glob("*.md")])
LANGUAGES = ("de", "fr", "es")
MEDIA = {"video": "https://example.com/talk.mp4", "audio": "https://example.com/talk.de.mp3"}


# --- The pages ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The pages as HTML; a warning is an error, and a broken internal link is one."""
    pytest.importorskip("furo", reason="the documentation is built where the dev extra is installed")
    out = tmp_path_factory.mktemp("docs")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", DOCS, out]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out


def test_every_page_is_one_click_from_the_first(built):
    linked = set(re.findall(r'href="([\w/-]+\.html)', (built / "index.html").read_text()))
    pages = {page.relative_to(DOCS).with_suffix(".html").as_posix() for page in DOCS.rglob("*.md")}
    assert pages - {"index.html"} <= linked


def links(page: Path) -> list[str]:
    tokens = MarkdownIt().enable("table").parse(page.read_text())
    inside = [child for token in tokens for child in token.children or ()]
    return [str(child.attrs["href"]) for child in inside if child.type == "link_open"]


def anchors(page: Path) -> set[str]:
    """What a code host calls the headings of a page."""
    tokens = MarkdownIt().parse(page.read_text())
    titles = [after.content for token, after in pairwise(tokens) if token.type == "heading_open"]
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_work_where_the_sources_are_read(page):
    dead = []
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if "://" not in link and not (
            target.exists() and target.is_relative_to(ROOT) and (not anchor or anchor in anchors(target))
        ):
            dead.append(link)
    assert dead == []


# --- The error messages -------------------------------------------------------------------------------


def text_of(node: ast.AST) -> str | None:
    """A text in the code as troubleshooting.md writes it: with ``...`` for what is filled in."""
    if isinstance(node, ast.JoinedStr):
        parts = [part.value if isinstance(part, ast.Constant) else "..." for part in node.values]
        return re.sub(r"\{\w+\}", "...", "".join(parts))
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"\{\w+\}", "...", node.value)
    return None


@cache
def nodes_of_the_code() -> list[ast.AST]:
    paths = (ROOT / "airflow_provider_heygen").rglob("*.py")
    trees = [ast.parse(path.read_text()) for path in paths if "emulator" not in path.parts]
    return [node for tree in trees for node in ast.walk(tree)]


@cache
def texts_of_the_code() -> list[str]:
    return [text for text in map(text_of, nodes_of_the_code()) if text]


def quoted_messages() -> list[str]:
    page = (DOCS / "troubleshooting.md").read_text().partition("## Airflow")[0]
    return re.findall(r"^\| `(.+?)` \|", page, re.MULTILINE)


def test_each_quoted_message_is_in_the_code():
    texts = texts_of_the_code()
    assert [message for message in quoted_messages() if not any(message in text for text in texts)] == []


def test_every_error_is_in_troubleshooting():
    raised = [
        text
        for node in nodes_of_the_code()
        if isinstance(node, ast.Call) and re.fullmatch(r"HeyGen\w+Error|refuse", getattr(node.func, "id", ""))
        for text in map(text_of, node.args)
        if text and len(text) > len("Overdub ... is ...")
    ]
    assert len(raised) > 40
    quoted = quoted_messages()
    assert [text for text in raised if not any(message in text for message in quoted)] == []


def test_the_tests_that_the_comparison_names_are_there():
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", (DOCS / "comparison.md").read_text())
    assert len(named) > 40
    assert [(file, name) for file, name in named if f"def {name}(" not in (ROOT / file).read_text()] == []


# --- The quickstart -----------------------------------------------------------------------------------


@contextmanager
def terminal(script: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A shell that knows nothing of the environment the tests run in."""
    env = {"PATH": os.defpath, "HOME": str(folder)}
    shell = subprocess.Popen(
        ["bash", "-e", "-c", script],
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield shell
    finally:
        with suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGKILL)
        shell.communicate()


def test_the_quickstart_word_for_word(tmp_path):
    """As far as the video, with the environment of the tests in place of a new one."""
    if not Path(sys.prefix, "bin", "activate").exists():
        pytest.skip("this Python is in no virtual environment")
    (tmp_path / "dubbing").symlink_to(sys.prefix)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    page = DOCS / "quickstart.md"
    (place,) = re.findall(r"Save this as `(.+?)`", page.read_text())
    script = server_script = ""
    for block in blocks():
        if not block.place.startswith("docs/quickstart.md"):
            continue
        code = block.code.replace("8000", str(port)).replace("/tmp/dubbed", f"{tmp_path}/dubbed")
        if block.language == "python":
            script += f"cat > {place} <<'END'\n{code}END\n"
        elif "airflow_provider_heygen.emulator" in code:
            server_script = code
        else:
            script += re.sub(r"^(python3 -m venv|pip install) .*\n", "", code, flags=re.MULTILINE)
        if "dags test" in code:
            break
    with terminal(server_script, tmp_path) as emulator, terminal(script, tmp_path) as shell:
        out, _ = shell.communicate(timeout=300)
        assert shell.returncode == 0, out
        assert emulator.poll() is None
    assert "Started overdub" in out
    assert re.search(r"Dubbed \d+\.\d s of video in \d+ s, mode speed: overdub \w+", out)
    assert probe(tmp_path / "dubbed" / "talk.de.mp4").duration > 0


# --- The blocks ---------------------------------------------------------------------------------------


class Block(NamedTuple):
    place: str
    language: str
    code: str


def blocks() -> list[Block]:
    """All fenced blocks but MyST's directives, which are Sphinx's to check."""
    return [
        Block(f"{page.relative_to(ROOT)}:{token.map[0] + 1}", token.info.strip(), token.content)
        for page in PAGES
        for token in MarkdownIt().parse(page.read_text())
        if token.type == "fence" and not token.info.startswith("{")
    ]


def blocks_in(*languages: str) -> pytest.MarkDecorator:
    found = [block for block in blocks() if block.language in languages]
    return pytest.mark.parametrize("block", [pytest.param(block, id=block.place) for block in found])


def test_each_block_has_a_language_that_is_tested():
    known = {"python", "bash", "dockerfile", "json", "ini", "yaml", "text"}
    assert {block.place for block in blocks() if block.language not in known} == set()


def quickstart_dag() -> str:
    (dag,) = (
        block.code
        for block in blocks()
        if block.place.startswith("docs/quickstart.md") and block.language == "python"
    )
    return dag


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    make_video(folder / "talk.mp4", 1)
    for language in LANGUAGES:
        make_audio(folder / f"talk.{language}.mp3", 1)
    return folder


@pytest.fixture
def here(tmp_path, media):
    """Return a text with the folders and buckets of the documentation in a folder of the test."""
    shutil.copytree(media, tmp_path / "data")

    def replace(text: str) -> str:
        text = re.sub(r"\bs3://(\w+@)?[\w-]+/", f"file://{tmp_path}/data/", text)
        return re.sub(r"(?<![\w/])/(data|tmp/dubbed|tmp/media)/", f"{tmp_path}/data/", text)

    return replace


@blocks_in("python")
def test_python(block, heygen, airflow_db, here, tmp_path, monkeypatch):
    code = here(block.code)
    for conn_id in set(re.findall(r"\bheygen_[a-z]+\b", code)):
        resource = "lipsyncs" if "lipsyncs" in conn_id else "overdubs"
        monkeypatch.setenv(f"AIRFLOW_CONN_{conn_id.upper()}", json.dumps(heygen.connection(resource)))
    snippet = tmp_path / "test_snippet.py"
    snippet.write_text(code)
    # The folder in which Airflow finds the DAG.
    monkeypatch.setattr("airflow.settings.DAGS_FOLDER", str(tmp_path))
    if "def test_" in code:
        (tmp_path / "dub.py").write_text(here(quickstart_dag()))
        monkeypatch.syspath_prepend(tmp_path)
        # A process of its own would load Airflow again.
        assert (
            pytest.main(
                ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"--rootdir={tmp_path}", str(snippet)]
            )
            == 0
        )
        for name in ("dub", "test_snippet"):
            sys.modules.pop(name, None)
        return
    spec = importlib.util.spec_from_file_location(f"snippet_{abs(hash(block.place))}", snippet)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    values = vars(module).values()
    dags = {value.dag for value in values if isinstance(value, (BaseOperator, MappedOperator))}
    for dag in dags | {value for value in values if isinstance(value, DAG)}:
        given = {"overdub_id": HeyGenHook().create_overdub(MEDIA)} if "overdub_id" in dag.params else {}
        run = dag.test(run_conf=given)
        assert run.state == "success", {ti.task_id: ti.state for ti in run.get_task_instances()}
        assert heygen.jobs


def commands(code: str) -> list[list[str]]:
    """The commands of a script, in words; one may go over several lines."""
    found, text = [], ""
    for line in code.replace("\\\n", " ").splitlines():
        text += f"{line}\n"
        try:
            words = shlex.split(text, comments=True)
        except ValueError:  # a quotation that continues
            continue
        found += [words] if words else []
        text = ""
    assert not text.strip(), text
    return found


@blocks_in("bash")
def test_bash(block, heygen, airflow_db, here, monkeypatch):
    monkeypatch.setenv("HEYGEN_API_KEY", "a-key")
    for words in commands(here(block.code)):
        program = Path(words[0]).name
        assert program in COMMANDS, f"nobody here knows how to test {program!r}"
        COMMANDS[program]([os.path.expandvars(word) for word in words[1:]], heygen, monkeypatch)


def check_airflow(words, heygen, monkeypatch):
    def run(*words):
        arguments = cli_parser.get_parser().parse_args(words)  # exits when an option is wrong
        if words[0] in ("connections", "pools"):
            arguments.func(arguments)

    if words[:2] == ["connections", "test"]:
        monkeypatch.setenv("AIRFLOW__CORE__TEST_CONNECTION", "Enabled")
        variable = f"AIRFLOW_CONN_{words[2].upper()}"
        monkeypatch.setenv(variable, json.dumps(heygen.connection("lipsyncs")))
    if words[:2] == ["connections", "add"]:
        monkeypatch.delenv(f"AIRFLOW_CONN_{words[2].upper()}", raising=False)
    run(*words)
    if words[:2] == ["connections", "add"]:
        settings(Connection.get_connection_from_secrets(words[2]))
        run("connections", "delete", words[2])


@blocks_in("dockerfile")
def test_dockerfile(block, heygen, monkeypatch):
    image, *steps = block.code.splitlines()
    pinned = re.search(r"^apache-airflow==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert image == f"FROM apache/airflow:{pinned[1]}"
    for step in steps:
        run, *words = shlex.split(step)
        assert (run, words.pop(0)) == ("RUN", "pip")
        assert f"apache-airflow=={pinned[1]}" in words
        check_pip(words, heygen, monkeypatch)


def check_make(words, heygen, monkeypatch):
    targets = re.findall(r"^([\w-]+)[\w -]*:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(words) <= set(targets)


def check_pip(words, heygen, monkeypatch):
    assert words[0] == "install"
    for wanted in map(Requirement, [word for word in words[1:] if word not in ("--no-cache-dir", ".")]):
        ours = "airflow-provider-heygen"
        assert wanted.name in (ours, "apache-airflow", "mutmut", "pre-commit", "pytest") or version(
            wanted.name
        )
        assert wanted.extras <= ({"emulator"} if wanted.name == ours else {"statsd"})


def check_mutmut(words, heygen, monkeypatch):
    assert words in (["run"], ["results"])
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mutmut"]
    files = settings["only_mutate"] + settings["pytest_add_cli_args_test_selection"]
    assert [file for file in files if not (ROOT / file).exists()] == []


def check_python(words, heygen, monkeypatch):
    if words[:2] == ["-m", "airflow_provider_heygen.emulator"]:
        flags = {f"--{name.replace('_', '-')}" for name in Behaviour.model_fields}
        assert {word for word in words if word.startswith("--")} <= flags | {"--port", "--host"}
    else:
        assert words[:2] in (["-m", "venv"], ["-m", "pytest"], ["tests/matrix.py", "--chaos"])


def check_export(words, heygen, monkeypatch):
    for word in words:
        name, _, value = word.partition("=")
        monkeypatch.setenv(name, value)
        if name.startswith("AIRFLOW_CONN_"):
            settings(Connection.get_connection_from_secrets(name.removeprefix("AIRFLOW_CONN_").lower()))


def check_curl(words, heygen, monkeypatch):
    words = [word.replace("http://127.0.0.1:8000", heygen.url) for word in words]
    subprocess.run(["curl", "--fail", "--silent", "--show-error", *words], check=True, capture_output=True)


def check_uvicorn(words, heygen, monkeypatch):
    assert (DOCS / "examples" / f"{words[0].partition(':')[0]}.py").exists()


COMMANDS = {
    "airflow": check_airflow,
    "curl": check_curl,
    "export": check_export,
    "make": check_make,
    "mkdir": lambda *_: None,
    "mutmut": check_mutmut,
    "pip": check_pip,
    "pre-commit": lambda *_: None,
    "python": check_python,
    "python3": check_python,
    "source": lambda *_: None,
    "unset": lambda words, _, monkeypatch: [monkeypatch.delenv(name, raising=False) for name in words],
    "uvicorn": check_uvicorn,
}


def settings(connection: Connection) -> HeyGenConnection:
    """Read a connection as a hook does."""
    assert connection.conn_type == "heygen"
    return HeyGenConnection.from_airflow(connection, connection.extra_dejson)


def check_connections(found) -> int:
    """Read all connections in a document, in the form of Airflow's files and variables."""
    if isinstance(found, dict) and "conn_type" in found:
        settings(Connection.from_json(json.dumps(found), conn_id="c"))
        return 1
    return sum(map(check_connections, found.values())) if isinstance(found, dict) else 0


@blocks_in("json", "yaml")
def test_data(block):
    found = (json.loads if block.language == "json" else yaml.safe_load)(block.code)
    assert check_connections(found) or "conn_type" not in block.code


@blocks_in("ini")
def test_ini(block):
    parser = configparser.ConfigParser(interpolation=None)
    parser.read_string(block.code)
    wrong = {
        (section, name)
        for section in parser.sections()
        for name in parser[section]
        if not conf.has_option(section, name)
    }
    assert wrong == set()
