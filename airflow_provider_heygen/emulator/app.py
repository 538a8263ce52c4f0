"""The ASGI application: logs each request, applies faults, and passes it to one of three routers."""

from __future__ import annotations

import asyncio
import html
import logging
import time
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.requests import Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from fastapi.routing import APIRoute
from pydantic import ValidationError
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from airflow_provider_heygen.emulator import admin, api, storage
from airflow_provider_heygen.emulator.contract import ApiError, credential_of, invalid
from airflow_provider_heygen.emulator.state import Fault, RequestRecord, new_id

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starlette.types import Message, Receive, Scope, Send

    from airflow_provider_heygen.emulator.state import State
    from airflow_provider_heygen.emulator.work import Worker

log = logging.getLogger(__name__)

_USUAL_CODES = {
    400: "invalid_parameter",
    401: "authentication_failed",
    402: "insufficient_credit",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    409: "conflict",
    413: "payload_too_large",
    429: "rate_limit_exceeded",
    503: "service_unavailable",
    504: "gateway_timeout",
}


class _Dropped(Exception):
    """The connection must be closed now."""


class HeyGen:
    """The ASGI application: FastAPI behind the request log and the faults."""

    def __init__(self, state: State, worker: Worker) -> None:
        self._state = state
        self._app = FastAPI(
            openapi_url=None,
            redirect_slashes=False,
            exception_handlers={
                ApiError: _api_error,
                RequestValidationError: _unreadable,
                ValidationError: _unreadable,
                HTTPException: _no_route,
                storage.StorageError: _storage_error,
                ClientDisconnect: _client_left,
                Exception: _failed,
            },
        )
        self._app.state.heygen, self._app.state.worker = state, worker
        for router in (api.router, storage.router, admin.router):
            self._app.include_router(router)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Respond to one request."""
        if scope["path"].startswith("/emulator/"):
            MutableHeaders(scope=scope)["Content-Type"] = "application/json"  # `curl -d` sends another type
            await self._app(scope, receive, send)
            return
        record = _record(scope)
        self._state.requests.append(record)
        self._state.requests_by_route[f"{record.method} {record.route}"] += 1
        # FastAPI before 0.132 parses a body without a type as JSON.
        MutableHeaders(scope=scope).setdefault("Content-Type", "application/octet-stream")
        fault = self._state.next_fault(record.method, record.path) or Fault()
        sender = _Sender(send, fault, record)
        try:
            if fault.drop == "before":
                await asyncio.sleep(fault.latency)
                raise _Dropped
            await (_faulty_response(fault) or self._app)(scope, receive, sender)
        except _Dropped:
            # uvicorn would send 500 after an exception, so the socket is closed.
            scope["state"]["transport"].close()
            while (await receive())["type"] != "http.disconnect":
                pass


class _Sender:
    """Sends a response with a request id, records its status, and applies the fault."""

    def __init__(self, send: Send, fault: Fault, record: RequestRecord) -> None:
        self._send, self._fault, self._record = send, fault, record
        self._sent = 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            await self._start(message)
            return
        body, drop_at = message.get("body", b""), self._fault.drop_after_bytes
        limit = self._fault.truncate if drop_at is None else drop_at
        if limit is not None:
            body = body[: max(limit - self._sent, 0)]
        self._sent += len(body)
        dropping = drop_at is not None and self._sent >= drop_at
        await self._send({**message, "body": body, "more_body": message.get("more_body", False) or dropping})
        if dropping:
            raise _Dropped

    async def _start(self, message: Message) -> None:
        await asyncio.sleep(self._fault.latency)
        if self._fault.drop == "after":
            raise _Dropped
        self._record.status = message["status"]
        headers = MutableHeaders(scope=message)
        headers["X-Request-Id"] = new_id("req")
        if self._fault.truncate is not None and "Content-Length" in headers:
            headers["Content-Length"] = str(min(int(headers["Content-Length"]), self._fault.truncate))
        await self._send(message)


def _faulty_response(fault: Fault) -> Response | None:
    if fault.status is None and fault.body is None and not fault.html:
        return None
    status = fault.status or (502 if fault.html else 200)
    if fault.html:
        return _html_page(status, fault.message, fault.headers)
    if fault.body is not None:
        return Response(fault.body, status, {"Content-Type": "application/json", **fault.headers})
    code = fault.code or _USUAL_CODES.get(status, "internal_error")
    return JSONResponse(ApiError(status, code, fault.message).envelope, status, fault.headers)


def _html_page(status: int, message: str, headers: Mapping[str, str] | None) -> Response:
    page = f"<html><head><title>{status}</title></head><body><h1>{html.escape(message)}</h1></body></html>"
    return HTMLResponse(page, status, headers)


def _routes(scope: Scope) -> list[APIRoute]:
    """Return the routes of a path, one for each method."""
    routes = [*api.router.routes, *storage.router.routes, *admin.router.routes]
    found = [route for route in routes if isinstance(route, APIRoute) and route.matches(scope)[0].value]
    return [route for route in found if route.path == found[0].path]


def _record(scope: Scope) -> RequestRecord:
    request, routes = Request(scope), _routes(scope)
    # A user may send a real key by mistake, so the log does not contain it.
    secret = {"x-api-key", "authorization"}
    return RequestRecord(
        method=request.method,
        path=scope["path"],
        route=routes[0].path if routes else "(none)",
        query=request.url.query,
        headers={name: "***" if name in secret else value for name, value in request.headers.items()},
        credential=credential_of(request.headers),
        idempotency_key=request.headers.get("Idempotency-Key"),
        at=time.time(),
    )


# Errors as responses


async def _api_error(request: Request, error: ApiError) -> Response:
    behaviour = request.app.state.heygen.behaviour
    if error.html or behaviour.html_errors:
        return _html_page(error.status, error.message, error.headers)
    envelope = api.with_extra_members(error.envelope) if behaviour.extra_members else error.envelope
    return JSONResponse(envelope, error.status, error.headers)


async def _unreadable(request: Request, error: RequestValidationError | ValidationError) -> Response:
    first = error.errors()[0]
    # FastAPI puts "body" or "query" first, and for invalid JSON its offset second.
    at = first["loc"][1:] if isinstance(error, RequestValidationError) else first["loc"]
    param = ".".join(map(str, at)) if first["type"] != "json_invalid" else ""
    message = first["msg"].removeprefix("Value error, ")
    return await _api_error(request, invalid(f"{param or 'body'}: {message}", param or None))


async def _no_route(request: Request, error: HTTPException) -> Response:
    code = _USUAL_CODES.get(error.status_code, "internal_error")
    message = f"{request.method} {request.scope['path']}: {error.detail}"
    methods = {method for route in _routes(request.scope) for method in route.methods}
    headers = {"Allow": ", ".join(sorted(methods))} if error.status_code == 405 else None
    return await _api_error(request, ApiError(error.status_code, code, message, headers=headers))


async def _storage_error(_: Request, error: storage.StorageError) -> Response:
    xml = f"<Error><Code>{error.code}</Code><Message>{escape(error.message)}</Message></Error>"
    body = f'<?xml version="1.0" encoding="UTF-8"?>\n{xml}'
    return Response(body, error.status, media_type="application/xml")


async def _client_left(_: Request, __: ClientDisconnect) -> Response:
    return Response(status_code=400)


async def _failed(request: Request, _: Exception) -> Response:
    # The server logs the exception.
    return await _api_error(request, ApiError(500, "internal_error", "The emulator failed; see its log."))
