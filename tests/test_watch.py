"""The page Watch, asked as Airflow's API server serves it; in a browser in `stack/test_web_ui.py`."""

from __future__ import annotations

import asyncio
import html
import importlib.util
import json
import re
import sys
from urllib.parse import unquote, urljoin, urlsplit

import pytest
import requests
from airflow.api_fastapi.app import cached_app, get_auth_manager
from airflow.models.renderedtifields import RenderedTaskInstanceFields as Rendered
from airflow.utils.session import create_session
from sqlalchemy import delete, select
from starlette.testclient import TestClient

from airflow_provider_heygen import watch
from airflow_provider_heygen.emulator import Behaviour, Emulator
from airflow_provider_heygen.hooks.heygen import HeyGenHook
from airflow_provider_heygen.plugin import WatchLink, watch_path

TITLE = "<script>alert('Talk')</script>"
SECRET = "5ignature0fTheVideo"
SOURCE = "https://example.com/talk.mp4"
DAG_FILE = f"""
from airflow.sdk import DAG
from airflow_provider_heygen.operators.overdub import HeyGenCreateOverdubOperator
from airflow_provider_heygen.sensors.overdub import HeyGenOverdubSensor
from airflow_provider_heygen.transfers.heygen_to_object_storage import HeyGenOverdubToObjectStorageOperator

with DAG("watched") as dag:
    dub = HeyGenCreateOverdubOperator.partial(
        task_id="dub", audio="https://example.com/talk.mp3", wait_for_completion=False
    ).expand_kwargs([
        {{"video": {SOURCE!r}, "mode": "precision", "title": {TITLE!r}}},
        {{"video": "{SOURCE}?Signature={SECRET}", "title": "1"}},
        {{"video": {{"type": "url", "url": {SOURCE!r}}}, "mode": "speed", "title": "2"}},
    ])
    overdub_id = "{{{{ ti.xcom_pull('dub', map_indexes=0) }}}}"
    wait = HeyGenOverdubSensor(task_id="wait", overdub_id=overdub_id, poke_interval=0.05)
    save = HeyGenOverdubToObjectStorageOperator(
        task_id="save", overdub_id=overdub_id, destination="{{{{ dag_run.conf.folder }}}}/"
    )
    dub >> wait >> save
"""


@pytest.fixture(scope="module")
def dag(airflow_db, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dags")
    path = folder / "watched.py"
    path.write_text(DAG_FILE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("airflow.settings.DAGS_FOLDER", str(folder))  # where Airflow finds DAGs
        spec = importlib.util.spec_from_file_location("watched", path)
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "watched", module)
        spec.loader.exec_module(module)
        yield module.dag


@pytest.fixture(scope="module")
def all_tests_heygen():
    with Emulator(Behaviour(job_seconds=0.05)) as emulator, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AIRFLOW_CONN_HEYGEN_DEFAULT", json.dumps(emulator.connection()))
        yield emulator


@pytest.fixture(scope="module")
def run(all_tests_heygen, dag, tmp_path_factory):
    """A run whose overdubs are completed; one for all tests."""
    run = dag.test(run_conf={"folder": str(tmp_path_factory.mktemp("saved"))})
    assert run.state == "success"
    return run


@pytest.fixture
def heygen(all_tests_heygen, run):
    """HeyGen as the run has left it."""
    yield all_tests_heygen
    all_tests_heygen.clear_faults()
    all_tests_heygen.force(job(all_tests_heygen).id, "completed")


@pytest.fixture(scope="module")
def api_server(airflow_db):
    return cached_app(apps="core")


@pytest.fixture
def nobody(api_server):
    return TestClient(api_server, base_url="http://127.0.0.1", follow_redirects=False)


@pytest.fixture
def user(nobody):
    """A user who is logged in; the cookie is the one that a browser sends."""
    manager = get_auth_manager()
    nobody.cookies["_token"] = manager.generate_jwt(
        manager.deserialize_user({"sub": "ann", "role": "VIEWER", "teams": []})
    )
    return nobody


def address(run, task_id="dub", map_index=0):
    return "/" + watch_path("watched", run.run_id, task_id, map_index if task_id == "dub" else -1)


def job(heygen, map_index=0, since=0):
    """A job of the run, whose mapped tasks may have run in any order."""
    title = (TITLE, "1", "2")[map_index]
    return next(job for job in heygen.jobs[since:] if job.request.title == title)


def get(url):
    with requests.Session() as session:
        session.trust_env = False
        return session.get(url)


def heygen_file(heygen):
    return heygen._state.file(f"{job(heygen).id}.mp4").read_bytes()


def details(page):
    return dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page.text))


def connect(heygen, monkeypatch, conn_type="heygen", **extra):
    connection = heygen.connection() | {"conn_type": conn_type}
    connection["extra"] |= extra
    monkeypatch.setenv("AIRFLOW_CONN_HEYGEN_DEFAULT", json.dumps(connection))


# --- What is shown ------------------------------------------------------------------------------------


@pytest.mark.parametrize("task_id", ["dub", "wait", "save"])
def test_the_page_of_each_task_plays_the_overdub(heygen, run, user, task_id):
    page = user.get(address(run, task_id))
    assert page.status_code == 200
    assert f"<h1>{html.escape(TITLE)}</h1>" in page.text
    assert "<script" not in page.text
    player = re.findall(r'<video [^>]*src="([^"]*)"', page.text)[0]
    video = user.get(urljoin(address(run, task_id), player))
    assert video.status_code == 302
    assert get(video.headers["location"]).content == heygen_file(heygen)
    shown = details(page)
    assert shown["Status"] == "completed"
    assert shown["Overdub"] == job(heygen).id
    assert shown["Length"] == f"{job(heygen).duration:.1f} s"
    assert shown.get("Mode") == ("precision" if task_id == "dub" else None)
    assert "Cost" not in shown
    assert f'href="{player}" download>' in page.text


@pytest.mark.parametrize(("map_index", "price"), [(0, 20), (1, 10), (2, 10)])
def test_the_cost_is_shown_where_a_price_is_set(heygen, run, user, monkeypatch, map_index, price):
    connect(heygen, monkeypatch, price_per_second={"speed": 10, "precision": 20})
    shown = details(user.get(address(run, "dub", map_index)))
    assert shown["Mode"] == {10: "speed", 20: "precision"}[price]
    assert shown["Cost"] == f"${job(heygen, map_index).duration * price:.2f}"
    # A sensor does not know the mode.
    assert "Cost" not in details(user.get(address(run, "wait")))


def test_the_source_is_shown_where_it_is_public(run, user):
    for map_index in (0, 2):
        assert f'src="{SOURCE}"' in user.get(address(run, "dub", map_index)).text
    signed = user.get(address(run, "dub", 1))
    assert signed.status_code == 200
    assert "example.com" not in signed.text
    assert SECRET not in signed.text


@pytest.mark.parametrize("status", ["pending", "running"])
def test_a_running_overdub_has_no_video_yet(heygen, run, user, status):
    heygen.force(job(heygen).id, status)
    page = user.get(address(run))
    assert details(page)["Status"] == status
    assert "<video" not in page.text
    assert "download" not in page.text
    assert 'http-equiv="refresh"' in page.text
    video = user.get(f"{address(run)}/video")
    assert video.status_code == 404
    assert f"The overdub is {status}; HeyGen has no video of it." in video.text


def test_a_failed_overdub_reports_the_reason(heygen, run, user):
    link = "https://example.com/a.mp4?Signature=5ecret"
    heygen.force(job(heygen).id, "failed", f"<b>No speaker</b> in {link}")
    page = user.get(address(run))
    assert details(page)["Status"] == "failed"
    assert details(page)["Reason"] == "&lt;b&gt;No speaker&lt;/b&gt; in https://example.com/a.mp4?***"
    assert "<video" not in page.text
    assert "refresh" not in page.text
    assert user.get(f"{address(run)}/video").status_code == 404


def test_a_completed_overdub_may_lack_its_video_for_a_moment(heygen, run, user):
    job(heygen).null_video_urls = 2
    assert "<video" not in user.get(address(run)).text
    assert user.get(f"{address(run)}/video").status_code == 404
    assert user.get(f"{address(run)}/video").status_code == 302


# --- Secrets ------------------------------------------------------------------------------------------


def test_each_request_gets_a_new_url_and_none_is_shown_or_kept(heygen, run, user, monkeypatch, caplog, capfd):
    caplog.set_level("DEBUG")
    asked = len(heygen.requests)
    with monkeypatch.context() as patch:
        patch.setattr(heygen.behaviour, "link_seconds", -1)
        first = user.get(f"{address(run)}/video")
    second = user.get(f"{address(run)}/video")
    page = user.get(address(run))
    assert [request.method for request in heygen.requests[asked:]] == ["GET"] * 3
    queries = [urlsplit(answer.headers["location"]).query for answer in (first, second)]
    output = capfd.readouterr()
    for place in (page.text, str(page.headers), caplog.text, output.out, output.err):
        assert [secret for secret in (*queries, "Signature=", heygen.api_key) if secret in place] == []
    old, new = (get(answer.headers["location"]) for answer in (first, second))
    assert (old.status_code, new.status_code) == (403, 200)


def test_headers(run, user):
    for path in (address(run), f"{address(run)}/video", f"/{watch_path('watched', 'no', 'dub', 0)}"):
        headers = user.get(path).headers
        assert headers["cache-control"] == "no-store"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["content-security-policy"].startswith("default-src 'none';")
        assert "unsafe" not in headers["content-security-policy"]


@pytest.mark.parametrize(
    "link", ["javascript:alert(1)", "http://example.com/a.mp4", "https://127.0.0.1/a.mp4"]
)
def test_no_browser_is_led_to_a_place_that_heygen_must_not_name(heygen, run, user, monkeypatch, link):
    connect(heygen, monkeypatch, allow_http=False, allow_private_hosts=False)
    heygen.fail_next(
        path=f"/v3/overdubs/{job(heygen).id}",
        count=2,
        body=json.dumps({"data": {"id": job(heygen).id, "status": "completed", "video_url": link}}),
        status=200,
    )
    for path in (address(run), f"{address(run)}/video"):
        answer = user.get(path)
        assert answer.status_code == 502
        assert "The URL of the video leads to" in answer.text or "is not a URL" in answer.text


# --- Who may see it -----------------------------------------------------------------------------------


@pytest.fixture
def unread(monkeypatch):
    """Nothing may be looked up."""

    def fail():
        raise AssertionError("something was read")

    monkeypatch.setattr(watch, "create_session", fail)


@pytest.mark.parametrize("path", ["", "/video"])
def test_no_user_is_logged_in(run, nobody, unread, path):
    answer = nobody.get(f"{address(run)}{path}", headers={"Accept": "*/*"})
    assert answer.status_code == 401
    answer = nobody.get(f"{address(run)}{path}", headers={"Accept": "text/html,*/*"})
    assert answer.status_code == 307
    login, _, query = answer.headers["location"].partition("?next=")
    assert login == "/api/v2/auth/login"
    assert unquote(query) == address(run)
    # Airflow accepts the place to return to.
    led = nobody.get(answer.headers["location"])
    assert led.status_code == 307
    assert "watched" in led.headers["location"]


@pytest.mark.parametrize("denied", ["TASK_INSTANCE", "XCOM"])
@pytest.mark.parametrize("path", ["", "/video"])
def test_a_user_who_may_not_read_this_dag(heygen, run, user, unread, monkeypatch, denied, path):
    def allow(self, *, method, user, access_entity, details):
        return (access_entity.name, details.id) != (denied, "watched")

    monkeypatch.setattr(type(get_auth_manager()), "is_authorized_dag", allow)
    asked = len(heygen.requests)
    answer = user.get(f"{address(run)}{path}")
    assert answer.status_code == 403
    assert job(heygen).id not in answer.text
    assert len(heygen.requests) == asked


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_nothing_but_get_and_head(run, user, method):
    assert user.request(method, address(run)).status_code == 405


def test_head(run, user):
    assert user.head(address(run)).status_code == 200
    assert user.head(f"{address(run)}/video").status_code == 302


# --- What goes wrong ----------------------------------------------------------------------------------


def test_no_such_task_instance(dag, user):
    answer = user.get(f"/{watch_path('watched', 'no_run', 'dub', 0)}")
    assert answer.status_code == 404
    assert "Airflow has no overdub of this task instance (yet)." in answer.text


def test_a_connection_of_another_type_is_left_alone(heygen, run, user, monkeypatch):
    connect(heygen, monkeypatch, conn_type="http")
    asked = len(heygen.requests)
    answer = user.get(address(run))
    assert answer.status_code == 404
    assert "is not of type heygen" in answer.text
    assert len(heygen.requests) == asked


def test_an_xcom_backend_that_cannot_be_read(run, user, monkeypatch):
    def deserialize_value(row):
        raise PermissionError("s3://bucket/key?X-Amz-Signature=5ecret")

    monkeypatch.setattr(watch.XCom, "deserialize_value", deserialize_value)
    answer = user.get(address(run))
    assert answer.status_code == 502
    assert "cannot read 'return_value' (PermissionError)" in html.unescape(answer.text)
    assert "5ecret" not in answer.text


def test_the_api_server_lacks_the_connection(run, user, monkeypatch):
    monkeypatch.delenv("AIRFLOW_CONN_HEYGEN_DEFAULT")
    answer = user.get(address(run))
    assert answer.status_code == 502
    assert "The API server has no Airflow connection &#x27;heygen_default&#x27;." in answer.text


def test_native_rendering_makes_a_number_of_a_connection_id(heygen, run, user, monkeypatch):
    monkeypatch.setenv("AIRFLOW_CONN_2026", json.dumps(heygen.connection()))
    with create_session() as session:
        rows = session.scalars(select(Rendered).where(Rendered.run_id == run.run_id)).all()
        kept = [row.rendered_fields for row in rows]
        for row in rows:
            row.rendered_fields = row.rendered_fields | {"heygen_conn_id": 2026}
    assert details(user.get(address(run)))["Overdub"] == job(heygen).id
    with create_session() as session:
        for row, fields in zip(rows, kept, strict=True):
            session.merge(row).rendered_fields = fields


def test_a_wrong_connection(heygen, run, user, connect):
    connect(heygen.url, password="")
    answer = user.get(address(run))
    assert answer.status_code == 502
    assert "the password is empty" in answer.text


def test_heygen_rejects_the_key(heygen, run, user, connect):
    connect(heygen.url, "sk_wr0ngKey", allow_private_hosts=True)
    for path in (address(run), f"{address(run)}/video"):
        answer = user.get(path)
        assert answer.status_code == 502
        assert "401" in answer.text
        assert "sk_wr0ngKey" not in answer.text


def test_the_overdub_is_gone(heygen, run, user):
    HeyGenHook().delete_overdub(job(heygen, 2).id)
    assert user.get(address(run, "dub", 2)).status_code == 404


def test_heygen_does_not_respond(heygen, run, user, monkeypatch):
    monkeypatch.setattr(watch, "LIMIT_SECONDS", 0.2)
    heygen.fail_next(path=f"/v3/overdubs/{job(heygen).id}", latency=5)
    answer = user.get(address(run))
    assert answer.status_code == 504
    assert "HeyGen has not responded within" in answer.text


def test_no_database_and_no_dns_on_the_event_loop(run, user, monkeypatch):
    called = []

    def off_the_loop(name):
        real = getattr(watch, name)

        def call(*args, **kwargs):
            with pytest.raises(RuntimeError, match="no running event loop"):
                asyncio.get_running_loop()
            called.append(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(watch, name, call)

    off_the_loop("create_session")
    off_the_loop("check_url")
    assert user.get(address(run)).status_code == 200
    assert called == ["create_session", "check_url"]


def test_the_link_leads_to_the_page():
    key = type("Key", (), {"dag_id": "d", "run_id": "manual__2026-01-01T00:00:00+00:00", "task_id": "g.t"})
    key.map_index = 3
    path = WatchLink().get_link(None, ti_key=key)
    assert path == "heygen/watch/d/manual__2026-01-01T00%3A00%3A00%2B00%3A00/g.t/3"


def test_the_connection_of_a_later_run_is_used_when_the_fields_are_pruned(heygen, run, dag, user, tmp_path):
    later = dag.test(run_conf={"folder": str(tmp_path)})
    with create_session() as session:
        session.execute(delete(Rendered).where(Rendered.run_id == run.run_id))
    for task_id in ("dub", "wait"):
        shown = details(user.get(address(run, task_id)))
        assert shown == {
            "Status": "completed",
            "Overdub": job(heygen).id,
            "Length": f"{job(heygen).duration:.1f} s",
        }
    assert details(user.get(address(later)))["Overdub"] == job(heygen, since=3).id
    with create_session() as session:
        session.execute(delete(Rendered))
    assert user.get(address(run)).status_code == 404
