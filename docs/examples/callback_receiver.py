"""
Receive HeyGen's callbacks: ``uvicorn callback_receiver:app``.

HeyGen does not sign callbacks, so anyone could have sent one. This receiver uses a callback only as a hint
that the status of an overdub may have changed, and requests the overdub from HeyGen.
"""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.responses import Response
from starlette.routing import Route

from airflow_provider_heygen.exceptions import HeyGenError
from airflow_provider_heygen.hooks.heygen import HeyGenHook

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.requests import Request

    from airflow_provider_heygen.api import Overdub

log = logging.getLogger(__name__)

ID_NAMES = ("overdub_id", "lipsync_id", "id")
MAX_BYTES = 64 * 1024


def hinted_id(body: bytes) -> str | None:
    """Return the overdub's id; HeyGen does not document the shape of the body for overdubs."""
    try:
        event = json.loads(body)
    except ValueError:
        return None
    data = event.get("event_data", event) if isinstance(event, dict) else None
    found = [data.get(name) for name in ID_NAMES] if isinstance(data, dict) else []
    return next((value for value in found if isinstance(value, str)), None)


def make_app(ended: Callable[[Overdub], Any], heygen_conn_id: str = "heygen_default") -> Starlette:
    """
    Return the receiver.

    :param ended: function to call with each overdub that is final at HeyGen, perhaps more than once.
    """

    def check(overdub_id: str) -> None:
        try:
            with HeyGenHook(heygen_conn_id) as hook:
                overdub = hook.get_overdub(overdub_id)
        except HeyGenError as error:
            log.warning("Could not check the overdub of a callback: %s", error)
            return
        if overdub.is_final:
            ended(overdub)

    async def receive(request: Request) -> Response:
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BYTES:
                return Response(status_code=413)
        overdub_id = hinted_id(body)
        # HeyGen expects a response within seconds. It is the same for every sender.
        return Response(status_code=202, background=BackgroundTask(check, overdub_id) if overdub_id else None)

    return Starlette(routes=[Route("/heygen", receive, methods=["POST"])])


app = make_app(lambda overdub: print(f"Overdub {overdub.overdub_id} is {overdub.status}."))
