"""The page *Watch*: plays the overdub of a task instance to users who may read that task instance."""

from __future__ import annotations

import asyncio
import base64
import hashlib
from html import escape
from typing import Annotated, Any, NamedTuple
from urllib.parse import quote, urlsplit

from airflow.api_fastapi.app import API_ROOT_PATH
from airflow.api_fastapi.auth.managers.models.resource_details import DagAccessEntity
from airflow.api_fastapi.core_api.security import requires_access_dag
from airflow.models import Connection, DagModel, DagRun
from airflow.models.renderedtifields import RenderedTaskInstanceFields as Rendered
from airflow.models.xcom import XComModel
from airflow.providers.common.compat.sdk import AirflowNotFoundException
from airflow.sdk.execution_time.xcom import XCom
from airflow.utils.session import create_session
from fastapi import Depends, FastAPI, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from sqlalchemy import and_, select
from starlette.exceptions import HTTPException

from airflow_provider_heygen.api import DEFAULT_FAILURE_MESSAGE, Overdub, OverdubStatus, redact_urls
from airflow_provider_heygen.connection import HeyGenConnection
from airflow_provider_heygen.exceptions import HeyGenError, HeyGenNotFoundError
from airflow_provider_heygen.hooks.heygen import HeyGenHook
from airflow_provider_heygen.media import check_url
from airflow_provider_heygen.plugin import watch_path

LIMIT_SECONDS = 15.0  # how long a request waits for HeyGen

STYLE = (
    "body{font:16px system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem}"
    "main{display:flex;flex-wrap:wrap;gap:1rem}figure{flex:1 1 22rem;margin:0}video{width:100%}"
    "dl{display:grid;grid-template-columns:max-content 1fr;gap:.3rem 1.5rem}dd{margin:0}"
    ".button{padding:.5rem 1rem;border-radius:.4rem;background:#5b3df5;color:#fff;text-decoration:none}"
)
STYLE_HASH = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()


class Dub(NamedTuple):
    """A task instance's overdub, as stored in Airflow."""

    overdub_id: str
    hook: HeyGenHook
    fields: dict[str, Any]


def _value(row: Any) -> Any:
    if not isinstance(row.value, str):
        return row.value  # no object is deserialized here
    try:
        return XCom.deserialize_value(row)  # a text may refer to an XCom backend's storage
    except Exception as error:
        reason = f"Airflow's XCom backend cannot read '{row.key}' ({type(error).__name__})."
        raise HTTPException(502, reason) from None


def find(dag_id: str, run_id: str, task_id: str, map_index: int) -> Dub:
    """Find the overdub in Airflow's database, and read the connection; FastAPI calls this in a thread."""
    with create_session() as session:
        # Airflow keeps rendered fields for a task's latest DAG runs only; any of them has the connection id.
        rendered = session.execute(
            select(Rendered.run_id, Rendered.rendered_fields)
            .join(DagRun, and_(DagRun.dag_id == Rendered.dag_id, DagRun.run_id == Rendered.run_id))
            .where(Rendered.dag_id == dag_id, Rendered.task_id == task_id, Rendered.map_index == map_index)
            .order_by((Rendered.run_id == run_id).desc(), DagRun.run_after.desc())
        ).first()
        query = XComModel.get_many(run_id=run_id, dag_ids=dag_id, task_ids=task_id, map_indexes=map_index)
        rows: Any = session.scalars(query.where(XComModel.key.in_(("overdub_id", "return_value"))))
        xcoms = {row.key: _value(row) for row in rows}
        team = DagModel.get_team_name(dag_id, session=session)
    fields = rendered.rendered_fields if rendered and rendered.run_id == run_id else {}
    result = xcoms.get("return_value")
    of_sensor = result.get("overdub_id") if isinstance(result, dict) else None
    overdub_id = fields.get("overdub_id") or xcoms.get("overdub_id") or of_sensor
    # Never from an XCom, because a user who may edit XComs must not choose the account.
    conn_id = rendered.rendered_fields.get("heygen_conn_id") if rendered else None
    if not overdub_id or not conn_id:
        raise HTTPException(404, "Airflow has no overdub of this task instance (yet).")
    conn_id = str(conn_id)  # native rendering makes a number of digits
    try:
        # Before Airflow 3.2, a connection cannot belong to a team.
        connection = Connection.get_connection_from_secrets(conn_id, **({"team_name": team} if team else {}))
        if connection.conn_type != HeyGenHook.conn_type:
            raise HTTPException(404, f"Airflow connection '{conn_id}' is not of type heygen.")
        hook = HeyGenHook(conn_id, max_attempts=2, longest_pause=2.0)
        hook._resolved = HeyGenConnection.from_airflow(connection)
    except AirflowNotFoundException:
        raise HTTPException(502, f"The API server has no Airflow connection '{conn_id}'.") from None
    except HeyGenError as error:
        raise HTTPException(502, str(error)) from None
    return Dub(str(overdub_id), hook, fields)


Found = Annotated[Dub, Depends(find)]


async def fetch(dub: Found) -> Overdub:
    """Read the overdub from HeyGen; the new URL of its video is checked."""
    try:
        async with asyncio.timeout(LIMIT_SECONDS):
            overdub = await dub.hook.aget_overdub(dub.overdub_id)
            if not overdub.is_completed or not overdub.video_url:
                return overdub.model_copy(update={"video_url": None})
            url, _ = await asyncio.to_thread(
                check_url, "", overdub.video_url, dub.hook.settings, "The URL of the video"
            )
            return overdub.model_copy(update={"video_url": url})
    except TimeoutError:
        raise HTTPException(504, f"HeyGen has not responded within {LIMIT_SECONDS:.0f} s.") from None
    except HeyGenError as error:
        status = 404 if isinstance(error, HeyGenNotFoundError) else 502
        raise HTTPException(status, redact_urls(str(error))) from None


Fetched = Annotated[Overdub, Depends(fetch)]

# FastAPI resolves these dependencies first, so nothing is read for a user without access.
MAY_READ = [
    Depends(requires_access_dag("GET", entity))
    for entity in (DagAccessEntity.TASK_INSTANCE, DagAccessEntity.XCOM)
]
PATH = "/watch/{dag_id}/{run_id}/{task_id}/{map_index}"
app = FastAPI(openapi_url=None, dependencies=MAY_READ)


@app.api_route(f"{PATH}/video", methods=["GET", "HEAD"])
async def video(overdub: Fetched) -> Response:
    """Redirect to a new URL of the video."""
    if not overdub.video_url:
        raise HTTPException(404, f"The overdub is {overdub.status}; HeyGen has no video of it.")
    return RedirectResponse(overdub.video_url, 302, _headers())


@app.api_route(PATH, methods=["GET", "HEAD"])
async def page(dub: Found, overdub: Fetched, map_index: int) -> Response:
    """Show the overdub."""
    title = overdub.title or f"Overdub {overdub.overdub_id}"
    players = {}
    if overdub.video_url:
        players = {"Dubbed": f"{map_index}/video"} | _source(dub.fields.get("video"))
    figures = "".join(
        f'<figure><video controls preload="metadata" src="{escape(url)}"></video>'
        f"<figcaption>{name}</figcaption></figure>"
        for name, url in players.items()
    )
    details = "".join(
        f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in _details(dub, overdub).items()
    )
    download = f'<p><a class="button" href="{map_index}/video" download>Download</a></p>' if players else ""
    return _html(
        title,
        f"<h1>{escape(title)}</h1><main>{figures}</main>{download}<dl>{details}</dl>",
        head="" if overdub.is_final else '<meta http-equiv="refresh" content="30">',
        video_url=overdub.video_url or "",
    )


def _source(given: Any) -> dict[str, str]:
    """Return the source if it is a public URL. Airflow stores ``***`` for a secret in a URL."""
    url = given.get("url") if isinstance(given, dict) else given
    if isinstance(url, str) and url.startswith("https://") and "***" not in url:
        return {"Source": url}
    return {}


def _details(dub: Dub, overdub: Overdub) -> dict[str, str]:
    shown = {"Status": overdub.status, "Overdub": overdub.overdub_id}
    mode = ""
    if "video" in dub.fields:  # only the create task has the mode
        mode = shown["Mode"] = str(dub.fields.get("mode") or "speed")
    if overdub.duration is not None:
        shown["Length"] = f"{overdub.duration:.1f} s"
        if (cost := dub.hook.settings.cost(mode, overdub.duration)) is not None:
            shown["Cost"] = f"${cost:.2f}"
    if overdub.status == OverdubStatus.FAILED:
        shown["Reason"] = redact_urls(overdub.failure_message or DEFAULT_FAILURE_MESSAGE)
    return shown


@app.exception_handler(HTTPException)
async def explain(request: Request, error: HTTPException) -> Response:
    """Show the error; redirect a browser without a login to the login page, which returns to this page."""
    if error.status_code == 401 and "text/html" in request.headers.get("accept", ""):
        # Quoted twice, because Airflow 3.1 decodes it once too often.
        page = quote(API_ROOT_PATH + watch_path(**request.path_params), safe="")
        return RedirectResponse(f"{API_ROOT_PATH}api/v2/auth/login?next={page}", 307, _headers())
    text = escape(str(error.detail))
    return _html(f"HTTP {error.status_code}", f"<h1>Watch</h1><p>{text}</p>", status=error.status_code)


def _headers(video_url: str = "") -> dict[str, str]:
    url = urlsplit(video_url)
    emulator = f" http://{url.netloc}" if url.scheme == "http" else ""
    return {
        "Cache-Control": "no-store",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "Content-Security-Policy": "default-src 'none'; base-uri 'none'; form-action 'none';"
        f" frame-ancestors 'none'; media-src 'self' https:{emulator}; style-src 'sha256-{STYLE_HASH}'",
    }


def _html(title: str, body: str, *, head: str = "", status: int = 200, video_url: str = "") -> Response:
    return HTMLResponse(
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>{head}'
        f"<style>{STYLE}</style></head><body>{body}</body></html>",
        status,
        _headers(video_url),
    )
