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
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

import psutil
import pytest
from conftest import needs_the_web_ui

from airflow_provider_heygen.emulator.media import make_audio, make_video
from airflow_provider_heygen.plugin import watch_path
from stack.airflow import HERE, Stack, _free_port, end, why_no_postgres
from stack.rest import Rest, Run, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import Browser, Locator, Page

    from stack.heygen import HeyGen

pytestmark = needs_the_web_ui

VIEWPORT: Any = {"width": 1200, "height": 720}
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
EXAMPLE, REVIEW = "example_heygen_overdub", "example_heygen_review"
DUB_TALK, WATCH_TALK = "dub_talk", "watch_talk"
LINKS = {
    "STACK_VIDEO": "https://media.example.com/talk.mp4?X-Amz-Signature=5ignature0fTheVideo",
    "STACK_AUDIO": "https://user:pa55w0rdOfTheAudio@media.example.com/talk.de.mp3",
    "STACK_CALLBACK": "https://127.0.0.1:1/done?token=t0kenOfTheCallback",
}
"""The inputs of the DAG `dub_talk`, each with a secret."""
SECRETS = ("5ignature0fTheVideo", "pa55w0rdOfTheAudio", "t0kenOfTheCallback", "Signature=")
WRONG_KEY = "sk_wr0ngKey"

# The form's fields with their help, in order.
STANDARD_FIELDS = ["Description", "Base URL", "API key or OAuth token"]
EXTRA_FIELDS = {
    "Auth type": "HeyGen bills an API key to the API wallet",
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
    """A user of the web UI, whose browser records all responses."""

    def __init__(self, browser: Browser, stack: Stack, folder: Path) -> None:
        self.url = stack.rest.url
        self._har = folder / "sent.har"
        self._context = browser.new_context(
            viewport=VIEWPORT,
            color_scheme="light",
            reduced_motion="reduce",  # animations cost CPU time
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
        """Save a screenshot for the documentation if SCREENSHOTS is set."""
        if folder := os.environ.get("SCREENSHOTS"):
            self.page.wait_for_timeout(1000)  # until animations have ended
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
        """Close the browser; return all that it was sent."""
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
    for dag_id in (EXAMPLE, REVIEW):
        shutil.copy(HERE.parents[1] / "example_dags" / f"{dag_id}.py", dags)
    for dag_id in (DUB_TALK, WATCH_TALK):
        shutil.copy(HERE / "dags" / f"{dag_id}.py", dags)
    make_video(media / "talk.mp4", 2)
    make_audio(media / "talk.de.mp3", 2)
    settings = {
        "AIRFLOW__CORE__DAGS_FOLDER": str(dags),
        "AIRFLOW__CORE__TEST_CONNECTION": "Enabled",
        "HEYGEN_EXAMPLE_MEDIA": str(media),
        **LINKS,
    }
    with Stack(postgres=not why_no_postgres(), settings=settings) as stack:
        stack.start(EXAMPLE, REVIEW, DUB_TALK, WATCH_TALK)
        yield stack


@pytest.fixture(scope="module")
def heygen(stack: Stack) -> HeyGen:
    """HeyGen before the renaming; a job runs until the test ends it."""
    return stack.heygen(job_seconds=100_000, resources="overdubs")


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    options = [
        *("--disable-gpu", "--disable-quic", "--disable-sync"),
        # Pages and the browser itself may fetch from this machine only.
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    ]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=options)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def web(browser: Browser, stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Web:
    return Web(browser, stack, tmp_path_factory.mktemp("browser"))


@pytest.fixture(scope="module")
def connected(web: Web, heygen: HeyGen) -> None:
    """Connections made in the web UI: a good one, one with a wrong key, one with a wrong resource."""
    web.open_connections()
    web.add_connection("heygen_default", heygen.url, heygen.key)
    web.add_connection("heygen_wrong_key", heygen.url, WRONG_KEY)
    web.add_connection("heygen_wrong_resource", heygen.url, heygen.key, "lipsyncs")


@pytest.fixture(scope="module")
def runs(web: Web, stack: Stack, heygen: HeyGen, connected: None) -> dict[str, Run]:
    """Runs with the new connection, by DAG or status; the jobs get on when each task waits for its own."""
    path = "connections/heygen_default"
    extra = json.loads(stack.rest.call("GET", path)["extra"])
    extra["price_per_second"] = {"speed": 0.05, "precision": 0.1}
    body = {"connection_id": "heygen_default", "conn_type": "heygen", "extra": json.dumps(extra)}
    stack.rest.call("PATCH", path, body, update_mask=["extra"])
    runs = {dag_id: Run(stack.rest, dag_id) for dag_id in (EXAMPLE, DUB_TALK, REVIEW)}
    for status in ("completed", "running", "failed"):
        runs[status] = Run(stack.rest, WATCH_TALK, title=f"Talk, {status}")
    for run in runs.values():
        run.wait_for_state("dub", "deferred")
    jobs = {name: run.xcoms("dub")["overdub_id"] for name, run in runs.items()}
    heygen.force(jobs[REVIEW], "completed")
    for status in ("completed", "running", "failed"):
        heygen.force(jobs[status], status, "No speaker <detected> in the video")
    web.open(f"dags/{EXAMPLE}/runs/{runs[EXAMPLE].run_id}")
    web.row("dub").get_by_text("Deferred").wait_for()
    web.picture("run")

    def all_say(text: str) -> bool:
        return all(text in runs[dag_id].log("dub") for dag_id in (EXAMPLE, DUB_TALK))

    for status, text in {"running": "is running", "completed": "Dubbed"}.items():
        for dag_id in (EXAMPLE, DUB_TALK):
            heygen.force(jobs[dag_id], status)
        wait_for(f"the tasks to see that it is {status}", partial(all_say, text))
    for dag_id in (EXAMPLE, DUB_TALK):
        assert {task["state"] for task in runs[dag_id].wait().values()} == {"success"}
    assert runs["failed"].wait()["dub"]["state"] == "failed"
    assert runs["completed"].wait()["wait"]["state"] == "success"
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
    for label, start, stop in zip(EXTRA_FIELDS, places, [*places[1:], None], strict=True):
        assert EXTRA_FIELDS[label] in shown[start:stop]
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
    """Airflow 3.3.1 and 3.3.2 do not test a connection without a port, see docs/connection.md."""
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
            "HeyGen returned 401 .* the password of this connection .*'auth_type'",
        ),
        (
            "heygen_wrong_resource",
            "Failed",
            r"HeyGen returned 404 .* Remove the extra 'resource' \('lipsyncs'\) of this connection",
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
    web.page.get_by_text("Dubbed").wait_for()
    overdub_id = runs[DUB_TALK].xcoms("dub")["overdub_id"]
    lines = re.findall(r"INFO - ((?:Started overdub|Waiting in|Overdub|Dubbed) .*)", web.text())
    assert [re.sub(r"\d+ s, mode|\d\d:\d\d", "N", line.replace(overdub_id, "ID")) for line in lines] == [
        "Started overdub ID 'Talk, German', mode precision.",
        "Waiting in the triggerer, checking every 1 s until N UTC.",
        "Overdub ID is running.",
        "Dubbed 2.5 s of video in N precision, $0.25: overdub ID 'Talk, German'.",
    ]
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


def test_the_request_is_shown_without_the_secrets_of_urls(web: Web, runs: dict[str, Run]) -> None:
    web.open_task(runs[DUB_TALK], "rendered_templates")
    web.row("video").wait_for()
    shown = {name: web.row(name).text_content() or "" for name in ("video", "audio", "callback_url", "title")}
    assert "https://media.example.com/talk.mp4?***" in shown["video"]
    assert "https://***@media.example.com/talk.de.mp3" in shown["audio"]
    assert "https://127.0.0.1:1/done?***" in shown["callback_url"]
    assert "Talk, German" in shown["title"]


def test_the_example_has_a_description(web: Web, stack: Stack) -> None:
    web.open(f"dags/{EXAMPLE}")
    web.button("Dag Docs").click()
    web.dialog.get_by_text("Dub one video and save the result").wait_for()
    assert "an Airflow connection heygen_default" in web.dialog.inner_text()
    web.open(f"dags/{EXAMPLE}/tasks/dub")
    web.button("Documentation").click()
    web.dialog.get_by_text("waits for it in the triggerer").wait_for()


def page_of(run: Run, task_id: str = "dub") -> str:
    return watch_path(run.dag_id, run.run_id, task_id, -1)


def shown(page: Page) -> dict[str, str]:
    """The details on the page Watch."""
    names, values = (page.locator(f"dl {tag}").all_inner_texts() for tag in ("dt", "dd"))
    return dict(zip(names, values, strict=True))


def play(page: Page) -> dict[str, float]:
    """Play the dubbed video for a moment; return what the browser knows of it."""
    player = page.locator("video").first
    player.evaluate("video => { video.muted = true; return video.play(); }")
    # The page lets no script run that the browser would have to evaluate from a text.
    wait_for("the video to play", lambda: player.evaluate("video => video.currentTime > 0.2"))
    properties = ("readyState", "videoWidth", "videoHeight", "duration")
    return {name: player.evaluate(f"video => video.{name}") for name in properties}


def plays(page: Page) -> bool:
    video = play(page)
    return video["readyState"] >= 2 and video["videoWidth"] > 0 and 1 < video["duration"] < 10


@pytest.mark.parametrize("task_id", ["dub", "wait"])
def test_the_link_in_the_ui_leads_to_the_video(
    web: Web, stack: Stack, runs: dict[str, Run], task_id: str
) -> None:
    source = Path(stack.env["HEYGEN_EXAMPLE_MEDIA"], "talk.mp4")
    web.page.route("https://media.example.com/**", lambda route: route.fulfill(path=source))
    web.open(f"dags/{WATCH_TALK}/runs/{runs['completed'].run_id}/tasks/{task_id}/details")
    web.page.get_by_role("link", name="Watch", exact=True).click()
    web.page.wait_for_url(f"{web.url}/{page_of(runs['completed'], task_id)}")
    assert web.page.get_by_role("heading").inner_text() == "Talk, completed"
    assert plays(web.page)
    details = shown(web.page)
    assert details.pop("Overdub") == runs["completed"].xcoms("dub")["overdub_id"]
    assert details.pop("Status") == "completed"
    assert details.pop("Length") == "2.5 s"
    assert details == ({"Mode": "precision", "Cost": "$0.25"} if task_id == "dub" else {})
    sources = [video.get_attribute("src") for video in web.page.locator("video").all()]
    assert sources == ["-1/video", *["https://media.example.com/talk.mp4"][: task_id == "dub"]]
    if task_id == "dub":
        player = web.page.locator("video").last
        wait_for("the source to be loaded", lambda: player.evaluate("video => video.readyState > 0"))
        web.picture("watch")


def test_a_person_watches_and_decides(web: Web, stack: Stack, runs: dict[str, Run]) -> None:
    run = runs[REVIEW]
    run.wait_for_state("review", "awaiting_input", "deferred")
    question = f"dags/{REVIEW}/runs/{run.run_id}/tasks/review/required_actions"
    web.open(question)
    link = web.page.get_by_role("link", name="Watch", exact=True)
    link.wait_for()
    assert "Talk, German, 2.0 s: Watch" in web.text()
    web.picture("review")
    assert link.evaluate("link => link.href") == f"{web.url}/{page_of(run)}"
    web.open(page_of(run))
    assert plays(web.page)
    web.open(question)
    web.button("Publish").click()
    states = {name: task["state"] for name, task in run.wait().items()}
    assert states == {"dub": "success", "review": "success", "publish": "success", "delete": "skipped"}
    assert Path(stack.env["HEYGEN_EXAMPLE_MEDIA"], "published", "talk.de.mp4").stat().st_size > 1000


def test_a_running_overdub_can_be_watched_from_its_deferred_task(web: Web, runs: dict[str, Run]) -> None:
    run = runs["running"]
    assert run.tasks()["dub"]["state"] == "deferred"
    web.open_task(run, "details")
    web.page.get_by_role("link", name="Watch", exact=True).click()
    web.page.wait_for_url(re.compile("/heygen/watch/"))
    assert shown(web.page)["Status"] == "running"
    assert web.page.locator("video").count() == 0


def test_a_failed_overdub_shows_the_reason(web: Web, runs: dict[str, Run]) -> None:
    web.open(page_of(runs["failed"]))
    assert shown(web.page)["Status"] == "failed"
    assert shown(web.page)["Reason"] == "No speaker <detected> in the video"
    assert web.page.locator("video").count() == 0


def test_each_load_of_the_page_plays_by_a_new_url(
    web: Web, stack: Stack, heygen: HeyGen, runs: dict[str, Run]
) -> None:
    """And none of them is anywhere: not in a log, not in the database, not in the page."""
    followed: list[str] = []
    pages = []
    web.page.on(
        "response",
        lambda response: followed.append(response.headers["location"]) if response.status == 302 else None,
    )
    for _ in range(2):
        web.open(page_of(runs["completed"]))
        assert plays(web.page)
        pages.append(web.page.content())
    queries = {urlsplit(url).query for url in followed}
    assert len(queries) >= 2
    assert all("Signature=" in query for query in queries)
    places = {str(path): path.read_text(errors="replace") for path in logs_of(stack)}
    tables = stack.tables()
    # Nothing in this stack's database is encrypted.
    assert heygen.key in str(tables.pop("connection"))
    places |= {"the page": "".join(pages), "the database": str(tables)}
    assert "/heygen/watch/" in places[str(stack.home / "api-server.stdout")]
    secrets = (heygen.key, "Signature=", *queries)
    assert [(place, secret) for place, text in places.items() for secret in secrets if secret in text] == []


def logs_of(stack: Stack) -> list[Path]:
    """All that Airflow has printed and logged; HeyGen's own output is in a folder beside that."""
    found = [path for path in stack.home.rglob("*") if path.suffix in (".log", ".stdout")]
    assert len(found) > len(stack.parts)
    return found


def test_the_button_leads_to_the_video(web: Web, heygen: HeyGen, runs: dict[str, Run]) -> None:
    """The emulator does not send it as an attachment, so the browser opens it."""
    web.open(page_of(runs["completed"]))
    web.page.get_by_role("link", name="Download").click()
    web.page.wait_for_url(f"{heygen.url}/files/*")
    assert plays(web.page)


@pytest.fixture(scope="module")
def guarded(stack: Stack, runs: dict[str, Run]) -> Iterator[str]:
    """A second API server of the same Airflow, with a login: only ann may read the DAG."""
    port = _free_port()
    users = {"ann": "viewer", "bob": "viewer"}
    passwords = stack.home / "passwords.json"
    passwords.write_text(json.dumps({name: name for name in users}))
    env = {
        **stack.env,
        "PYTHONPATH": str(HERE.parent),
        "AIRFLOW__API__PORT": str(port),
        "AIRFLOW__CORE__AUTH_MANAGER": "stack.auth.OneMayWatch",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "False",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS": ",".join(map(":".join, users.items())),
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE": str(passwords),
    }
    with (stack.home / "guarded.stdout").open("ab") as output:
        command = [sys.executable, "-m", "airflow", "api-server", "--workers", "1"]
        server = subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for("the API server with a login", Rest(url).is_up)
        yield url
    finally:
        end(psutil.Process(server.pid).children(recursive=True))
        server.kill()
        server.wait()


@pytest.fixture
def visitor(browser: Browser) -> Iterator[Page]:
    """A browser without cookies."""
    with browser.new_context(viewport=VIEWPORT) as context:
        yield context.new_page()


def log_in(page: Page, name: str) -> None:
    page.get_by_label("Username").fill(name)
    page.get_by_label("Password").fill(name)
    page.get_by_role("button", name="Sign in").click()


def test_a_browser_without_a_login_is_led_there_and_back(
    guarded: str, visitor: Page, runs: dict[str, Run]
) -> None:
    page = f"{guarded}/{page_of(runs['completed'])}"
    visitor.goto(page)
    assert "/login" in visitor.url
    log_in(visitor, "ann")
    visitor.wait_for_url(re.compile("/heygen/watch/"))
    assert unquote(visitor.url) == unquote(page)
    assert plays(visitor)


def test_a_user_who_may_not_read_the_dag_sees_nothing_of_it(
    guarded: str, visitor: Page, heygen: HeyGen, runs: dict[str, Run]
) -> None:
    overdub_id = runs["completed"].xcoms("dub")["overdub_id"]
    asked = heygen.requests(path=f"/v3/overdubs/{overdub_id}")
    page = f"{guarded}/{page_of(runs['completed'])}"
    visitor.goto(page)
    log_in(visitor, "bob")
    visitor.wait_for_url(re.compile("/heygen/watch/"))
    for path in ("", "/video"):
        answer = visitor.goto(page + path)
        assert answer is not None
        assert answer.status == 403
        assert overdub_id not in visitor.content()
    assert heygen.requests(path=f"/v3/overdubs/{overdub_id}") == asked


def test_the_browser_was_sent_no_secret(web: Web, heygen: HeyGen, runs: dict[str, Run]) -> None:
    """The last one: it closes the browser."""
    overdub_id = runs[DUB_TALK].xcoms("dub")["overdub_id"]
    web.open_task(runs[DUB_TALK], "rendered_templates")
    web.row("video").wait_for()
    sent = web.leave()
    assert [secret for secret in (heygen.key, WRONG_KEY, *SECRETS) if secret in sent] == []
    # The search sees what it should see.
    assert f"Overdub {overdub_id} is running." in sent
    assert "talk.mp4?***" in sent
