"""
What people see of us in Airflow's web UI, in a real browser: the form of a connection, its test, and a run.

With `SCREENSHOTS=FOLDER` the pictures of the documentation are taken on the way: `make screenshots`.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from conftest import needs_the_web_ui

from airflow_provider_heygen.emulator.media import make_audio, make_video
from stack.airflow import HERE, Stack, why_no_postgres
from stack.rest import Run, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import Browser, Locator

    from stack.heygen import HeyGen

pytestmark = needs_the_web_ui

VIEWPORT: Any = {"width": 1200, "height": 720}
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
EXAMPLE, DUB_TALK = "example_heygen_overdub", "dub_talk"
LINKS = {
    "STACK_VIDEO": "https://media.example.com/talk.mp4?X-Amz-Signature=5ignature0fTheVideo",
    "STACK_AUDIO": "https://user:pa55w0rdOfTheAudio@media.example.com/talk.de.mp3",
    "STACK_CALLBACK": "https://127.0.0.1:1/done?token=t0kenOfTheCallback",
}
"""What the DAG `dub_talk` is given, each with something that nobody may see."""
SECRETS = ("5ignature0fTheVideo", "pa55w0rdOfTheAudio", "t0kenOfTheCallback", "Signature=")
WRONG_KEY = "sk_wr0ngKey"

# The form's fields with their help, in order.
STANDARD_FIELDS = ["Description", "Base URL", "API key or OAuth token"]
EXTRA_FIELDS = {
    "Auth type": "billed to the API wallet",
    "Resource": "overdubs became lipsyncs in 2026",
    "Connect timeout": "Default: 10.",
    "Read timeout": "Default: 30.",
    "Write timeout": "Default: 120.",
    "Upload timeout": "Default: 600.",
    "Requests per second": "Default: 5.",
    "Allow plain http": "unencrypted",
    "Allow private hosts": "private networks",
}


class Web:
    """Somebody who uses the web UI, with a browser that records what it is sent."""

    def __init__(self, browser: Browser, stack: Stack, folder: Path) -> None:
        self.url = stack.rest.url
        self._har = folder / "sent.har"
        self._context = browser.new_context(
            viewport=VIEWPORT,
            color_scheme="light",
            record_har_path=self._har,
            record_har_url_filter=re.compile(r"/(api|ui)/"),
        )
        self.page = self._context.new_page()
        self.page.set_default_timeout(30_000)
        self.dialog = self.page.get_by_role("dialog")

    def open(self, path: str = "") -> None:
        self.page.goto(f"{self.url}/{path}")

    def open_task(self, run: Run, tab: str = "") -> None:
        self.open(f"dags/{run.dag_id}/runs/{run.run_id}/tasks/dub/{tab}")

    def button(self, name: str) -> Locator:
        return self.page.get_by_role("button", name=name, exact=True)

    def row(self, name: str) -> Locator:
        """The row of a table that has a cell of this name."""
        return self.page.get_by_role("row").filter(has=self.page.get_by_role("cell", name=name, exact=True))

    def text(self) -> str:
        return self.page.locator("body").inner_text().replace("\N{NO-BREAK SPACE}", " ")

    def picture(self, name: str, of: Locator | None = None) -> None:
        """Take a picture for the documentation, if somebody wants some."""
        if folder := os.environ.get("SCREENSHOTS"):
            self.page.wait_for_timeout(1000)  # whatever unfolds or fades in
            (of or self.page).screenshot(path=Path(folder, f"{name}.png"), animations="disabled")

    def open_connections(self) -> None:
        self.open()
        self.button("Admin").click()
        self.page.get_by_role("menuitem", name="Connections").click()

    def open_form(self) -> None:
        """From the list of connections to the form, and there as far as to the type."""
        self.button("Add Connection").click()
        self.dialog.get_by_label("Connection Type").click()
        self.page.get_by_role("option", name="HeyGen", exact=True).click()
        self.dialog.get_by_label("Base URL").wait_for()

    def add_connection(self, conn_id: str, url: str, key: str, resource: str | None = None) -> None:
        self.open_form()
        self.dialog.get_by_label("Connection ID").fill(conn_id)
        self.dialog.get_by_label("Base URL").fill(url)
        self.dialog.get_by_label("API key or OAuth token").fill(key)
        self.button("Extra Fields").click()
        if resource:
            self.dialog.get_by_label("Resource").click()
            self.page.get_by_role("option", name=resource, exact=True).click()
        self.dialog.get_by_label("Allow private hosts").press("Space")
        self.button("Save").click()
        self.row(conn_id).wait_for()
        self.dialog.wait_for(state="detached")

    def leave(self) -> str:
        """Close the browser; give all that it was sent."""
        self._context.close()
        contents = [
            entry["response"]["content"] for entry in json.loads(self._har.read_text())["log"]["entries"]
        ]
        return "\n".join(
            base64.b64decode(content["text"]).decode(errors="replace")
            if content.get("encoding") == "base64"
            else content.get("text", "")
            for content in contents
        )


@pytest.fixture(scope="module")
def chromium() -> str:
    """Skip where there is no Chromium, but never in CI."""
    for name in BROWSERS:
        if path := shutil.which(name):
            return path
    if os.environ.get("CI") == "true":
        pytest.fail(f"CI must run these tests: none of {', '.join(BROWSERS)} is installed")
    pytest.skip(f"needs a browser: none of {', '.join(BROWSERS)} is installed")


@pytest.fixture(scope="module")
def stack(chromium: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    dags, media = tmp_path_factory.mktemp("dags"), tmp_path_factory.mktemp("media")
    shutil.copy(HERE.parents[1] / "example_dags" / f"{EXAMPLE}.py", dags)
    shutil.copy(HERE / "dags" / f"{DUB_TALK}.py", dags)
    make_video(media / "talk.mp4", 2)
    make_audio(media / "talk.de.mp3", 2)
    settings = {
        "AIRFLOW__CORE__DAGS_FOLDER": str(dags),
        "AIRFLOW__CORE__TEST_CONNECTION": "Enabled",
        "HEYGEN_EXAMPLE_MEDIA": str(media),
        **LINKS,
    }
    with Stack(postgres=not why_no_postgres(), settings=settings) as stack:
        stack.start(EXAMPLE, DUB_TALK)
        yield stack


@pytest.fixture(scope="module")
def heygen(stack: Stack) -> HeyGen:
    """HeyGen before the renaming; a job takes until it is told to end."""
    return stack.heygen(job_seconds=100_000, resources="overdubs")


@pytest.fixture(scope="module")
def web(chromium: str, stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    from playwright.sync_api import sync_playwright

    options = [
        *("--disable-gpu", "--disable-quic", "--disable-sync"),
        # Whatever a page or the browser itself would like to fetch, there is nothing but this machine.
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    ]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=options)
        yield Web(browser, stack, tmp_path_factory.mktemp("browser"))
        browser.close()


@pytest.fixture(scope="module")
def connected(web: Web, heygen: HeyGen) -> None:
    """Connections made in the web UI: a good one, one with a wrong key, one with a wrong resource."""
    web.open_connections()
    web.add_connection("heygen_default", heygen.url, heygen.key)
    web.add_connection("heygen_wrong_key", heygen.url, WRONG_KEY)
    web.add_connection("heygen_wrong_resource", heygen.url, heygen.key, "lipsyncs")


@pytest.fixture(scope="module")
def runs(web: Web, stack: Stack, heygen: HeyGen, connected: None) -> dict[str, Run]:
    """A run of each DAG with the connection that was made; HeyGen goes on when both tasks wait for it."""
    runs = {dag_id: Run(stack.rest, dag_id) for dag_id in (EXAMPLE, DUB_TALK)}
    for run in runs.values():
        run.wait_for_state("dub", "deferred")
    web.open(f"dags/{EXAMPLE}/runs/{runs[EXAMPLE].run_id}")
    web.row("dub").get_by_text("Deferred").wait_for()
    web.picture("run")

    def all_say(text: str) -> bool:
        return all(text in run.log("dub") for run in runs.values())

    for status in ("running", "completed"):
        for job in heygen.jobs():
            heygen.force(job["id"], status)
        wait_for(f"the tasks to see that it is {status}", partial(all_say, f"is {status}"))
    for run in runs.values():
        assert {task["state"] for task in run.wait().values()} == {"success"}
    return runs


def test_the_form_asks_for_what_heygen_needs(web: Web) -> None:
    web.open_connections()
    web.open_form()
    labels = web.dialog.locator("label").filter(visible=True).all_inner_texts()
    assert [label for label in labels if "Connection" not in label] == STANDARD_FIELDS
    assert web.dialog.get_by_label("Base URL").get_attribute("placeholder") == "https://api.heygen.com"
    web.dialog.get_by_label("Connection ID").fill("heygen_default")
    key = web.dialog.get_by_label("API key or OAuth token")
    key.fill("not to be seen")
    assert key.get_attribute("type") == "password"
    web.picture("connection-form", web.dialog)


def test_the_form_has_our_extra_fields_with_help(web: Web) -> None:
    web.open_connections()
    web.open_form()
    web.button("Extra Fields").click()
    web.dialog.get_by_text(EXTRA_FIELDS["Allow private hosts"]).wait_for()
    shown = web.dialog.inner_text()
    places = [shown.index(f"\n{label}\n") for label in EXTRA_FIELDS]
    assert places == sorted(places)
    for label, start, end in zip(EXTRA_FIELDS, places, [*places[1:], None], strict=True):
        assert EXTRA_FIELDS[label] in shown[start:end]
    height = web.dialog.evaluate("dialog => dialog.scrollHeight")
    web.page.set_viewport_size({"width": 1200, "height": height + 100})
    web.picture("connection-extra", web.dialog)
    web.page.set_viewport_size(VIEWPORT)
    # All of them may stay as they are.
    assert shown.count("*") == len(["Connection ID", "Connection Type"])
    for label, choices in {
        "Resource": ["overdubs", "lipsyncs"],
        "Auth type": ["API key", "OAuth access token"],
    }.items():
        web.dialog.get_by_label(label).click()
        assert web.page.get_by_role("option").all_inner_texts() == choices
        web.page.get_by_role("option").first.click()


def test_a_number_may_be_emptied_and_is_kept_sensible(web: Web) -> None:
    from playwright.sync_api import expect

    web.open_connections()
    web.open_form()
    web.button("Extra Fields").click()
    for label, least in {"Read timeout": "1", "Requests per second": "0.1"}.items():
        field = web.dialog.get_by_label(label)
        for typed, kept in {"7": "7", "": "", "-2": least}.items():
            field.fill(typed)
            field.blur()
            expect(field).to_have_value(kept)  # the page may need a moment to correct it


def test_a_stored_key_is_not_shown_again(web: Web, connected: None, heygen: HeyGen) -> None:
    web.open("connections")
    web.row("heygen_default").get_by_role("button", name="Edit Connection").click()
    assert web.dialog.get_by_label("Base URL").input_value() == heygen.url
    assert web.dialog.get_by_label("API key or OAuth token").input_value() == "***"


@pytest.fixture(scope="module")
def testable(stack: Stack, connected: None) -> None:
    """Airflow 3.3.1 and 3.3.2 refuse to test a connection without a port, as docs/connection.md tells."""
    for connection in stack.rest.call("GET", "connections")["connections"]:
        conn_id = connection["connection_id"]
        host, _, port = connection["host"].rpartition(":")
        body = {"connection_id": conn_id, "conn_type": "heygen", "host": host, "port": int(port)}
        stack.rest.call("PATCH", f"connections/{conn_id}", body, update_mask=["host", "port"])


@pytest.mark.parametrize(
    ("conn_id", "title", "said"),
    [
        ("heygen_default", "Successful", r"HeyGen accepts the API key\. There are "),
        (
            "heygen_wrong_key",
            "Failed",
            "HeyGen answered 401 .* the password of this connection .*'auth_type'",
        ),
        (
            "heygen_wrong_resource",
            "Failed",
            "HeyGen answered 404 .*'resource' of this connection to 'overdubs'",
        ),
    ],
)
def test_the_test_button(web: Web, testable: None, conn_id: str, title: str, said: str) -> None:
    web.open("connections")
    web.row(conn_id).get_by_role("button", name="Test Connection").press("Enter")
    answer = web.page.get_by_role("status").filter(has_text="Test Connection")
    answer.wait_for()
    assert re.match(f"Test Connection {title}\n{said}", answer.inner_text())
    if conn_id == "heygen_wrong_resource":
        web.picture("connection-test")


def test_the_log_has_a_line_for_each_step(web: Web, runs: dict[str, Run]) -> None:
    web.open_task(runs[DUB_TALK])
    web.page.get_by_text("is done").wait_for()
    overdub_id = runs[DUB_TALK].xcoms("dub")["overdub_id"]
    lines = re.findall(r"INFO - ((?:Started o|O)verdub .*)", web.text())
    assert [line.replace(overdub_id, "ID") for line in lines[1:-1]] == [
        f"Overdub ID is {status}." for status in ("pending", "running", "completed")
    ]
    assert re.fullmatch(rf"Started overdub {overdub_id} \(mode precision, key [0-9a-f-]{{36}}\)\.", lines[0])
    done = rf"Overdub {overdub_id} \('Talk, German'\) is done, 2\.5 s of video, \d+ s after it was created\."
    assert re.fullmatch(done, lines[-1])
    web.page.keyboard.press("w")  # wraps the lines
    web.picture("task-log", web.page.get_by_role("code").first)


def test_xcom_has_the_id_and_the_details(web: Web, runs: dict[str, Run]) -> None:
    web.open_task(runs[DUB_TALK], "xcom")
    overdub_id = runs[DUB_TALK].xcoms("dub")["overdub_id"]
    for key in ("overdub_id", "return_value"):
        web.row(key).get_by_text(overdub_id).wait_for()
    web.button("Expand all extra JSON").click()
    for text in (f'"overdub_id": "{overdub_id}"', '"status": "completed"', '"title": "Talk, German"'):
        # The lines unfold one after the other.
        wait_for(text, lambda text=text: text in web.text(), patience=30)
    web.picture("xcom")


def test_the_request_is_shown_without_what_is_secret_in_links(web: Web, runs: dict[str, Run]) -> None:
    web.open_task(runs[DUB_TALK], "rendered_templates")
    web.row("video").wait_for()
    shown = {name: web.row(name).text_content() or "" for name in ("video", "audio", "callback_url", "title")}
    assert "https://media.example.com/talk.mp4?***" in shown["video"]
    assert "https://***@media.example.com/talk.de.mp3" in shown["audio"]
    assert "https://127.0.0.1:1/done?***" in shown["callback_url"]
    assert "Talk, German" in shown["title"]


def test_the_example_says_what_it_does(web: Web, stack: Stack) -> None:
    web.open(f"dags/{EXAMPLE}")
    web.button("Dag Docs").click()
    web.dialog.get_by_text("Trigger it with your own files").wait_for()
    assert "It needs a connection heygen_default" in web.dialog.inner_text()
    web.open(f"dags/{EXAMPLE}/tasks/dub")
    web.button("Documentation").click()
    web.dialog.get_by_text("waits for it in the triggerer").wait_for()


def test_the_browser_was_sent_no_secret(web: Web, heygen: HeyGen, runs: dict[str, Run]) -> None:
    """The last one: it closes the browser."""
    overdub_id = runs[DUB_TALK].xcoms("dub")["overdub_id"]
    web.open_task(runs[DUB_TALK], "rendered_templates")
    web.row("video").wait_for()
    sent = web.leave()
    assert [secret for secret in (heygen.key, WRONG_KEY, *SECRETS) if secret in sent] == []
    # The search sees what it should see.
    assert f"Overdub {overdub_id} is completed." in sent
    assert "talk.mp4?***" in sent
