"""The HTTP side of the emulated HeyGen: one ASGI application.

A request passes, in this order: the log, the faults, the route, the credential, Idempotency-Key, the handler.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import html
import json
import logging
import re
import shutil
import time
from collections import Counter, defaultdict
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from xml.sax.saxutils import escape

from pydantic import BaseModel, ConfigDict, ValidationError
from python_multipart.exceptions import FormParserError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response

from airflow_provider_heygen.emulator.contract import (
    MAX_UPLOAD_BYTES,
    SUFFIXES,
    ApiError,
    CompleteUpload,
    CreateBatch,
    CreateDirectUpload,
    CreateJob,
    UpdateTitle,
    detect_type,
    invalid,
    parse,
)
from airflow_provider_heygen.emulator.state import (
    IDEMPOTENCY_SECONDS,
    Asset,
    Batch,
    BatchItem,
    Fault,
    RequestRecord,
    Status,
    new_id,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from starlette.types import Message, Receive, Scope, Send

    from airflow_provider_heygen.emulator.state import Job, State
    from airflow_provider_heygen.emulator.work import Worker

    Handler = Callable[[Request], Awaitable[Response]]

log = logging.getLogger(__name__)

_USUAL_CODES = {
    400: "invalid_parameter",
    401: "authentication_failed",
    402: "insufficient_credit",
    403: "forbidden",
    404: "not_found",
    409: "conflict",
    413: "payload_too_large",
    429: "rate_limit_exceeded",
    503: "service_unavailable",
    504: "gateway_timeout",
}
_BATCH_WORDS = {"pending": "queued", "running": "processing", "completed": "completed", "failed": "failed"}
# Their members are given by the client or counted, not described, so an unknown one would mean something.
_OPEN_OBJECTS = {"upload_headers", "counts_by_status"}


class Route(NamedTuple):
    """A path template and its handlers by HTTP method."""

    template: str
    pattern: re.Pattern[str]
    handlers: dict[str, Handler]


class StorageError(Exception):
    """An answer of the object store behind presigned links, in its XML."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class _Dropped(Exception):
    """The connection is to be closed now."""


class ForceJob(BaseModel):
    """Body of PATCH /emulator/jobs/{job_id}."""

    model_config = ConfigDict(extra="forbid")

    status: Status
    failure_message: str | None = None


class HeyGen:
    """The ASGI application. ``directory`` takes the files; ``worker`` runs the jobs."""

    def __init__(
        self, state: State, worker: Worker, directory: Path, *, api_key: str, oauth_token: str
    ) -> None:
        self.state = state
        self._worker = worker
        self._directory = directory
        self._credentials = {"api_key": api_key, "oauth": oauth_token}
        self._routes: list[Route] = []
        self._route("/v3/lipsyncs/batches", POST=self._create_batch)
        self._route("/v3/lipsyncs/batches/{batch_id}", GET=self._get_batch)
        self._route("/v3/lipsyncs/statuses", GET=self._list_statuses)
        for resource, name in (("overdubs", "overdub_id"), ("lipsyncs", "lipsync_id")):
            self._route(f"/v3/{resource}", GET=self._list_jobs, POST=self._create_job)
            self._route(
                f"/v3/{resource}/{{{name}}}",
                GET=self._get_job,
                PATCH=self._update_job,
                DELETE=self._delete_job,
            )
        self._route("/v3/assets", POST=self._upload_asset)
        self._route("/v3/assets/direct-uploads", POST=self._create_direct_upload)
        self._route("/v3/assets/{asset_id}/complete", POST=self._complete_direct_upload)
        self._route("/v3/users/me", GET=self._get_current_user)
        self._route("/files/{name}", GET=self._get_file, HEAD=self._get_file)
        self._route("/uploads/{asset_id}", PUT=self._put_upload)
        self._route("/emulator/state", GET=self._read_state, DELETE=self._reset_state)
        self._route("/emulator/requests", GET=self._read_requests)
        self._route("/emulator/behaviour", GET=self._read_behaviour, PATCH=self._change_behaviour)
        self._route(
            "/emulator/faults", GET=self._read_faults, POST=self._add_fault, DELETE=self._clear_faults
        )
        self._route("/emulator/jobs/{job_id}", PATCH=self._force_job)

    def _route(self, template: str, **handlers: Handler) -> None:
        pattern = re.compile(re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", template))
        self._routes.append(Route(template, pattern, handlers))

    # The way of a request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        request = Request(scope, receive)
        route = self._match(scope)
        if scope["path"].startswith("/emulator/"):
            response = await self._answer(request, route)
            await response(scope, receive, send)
            return
        record = _record(request, route.template if route else "(none)")
        self.state.record(record)
        fault = self.state.next_fault(request.method, scope["path"]) or Fault()
        sender = _Sender(send, fault, record)
        try:
            if fault.drop == "before":
                await asyncio.sleep(fault.latency)
                raise _Dropped
            response = _faulty_answer(fault) or await self._answer(request, route)
            await asyncio.sleep(fault.latency)
            if fault.drop == "after":
                raise _Dropped
            await response(scope, receive, sender)
        except _Dropped:
            # uvicorn answers 500 for an application that gives up, so take the socket from under it.
            scope["state"]["transport"].close()
            while (await receive())["type"] != "http.disconnect":
                pass

    def _match(self, scope: Scope) -> Route | None:
        for route in self._routes:
            if match := route.pattern.fullmatch(scope["path"]):
                scope["path_params"] = match.groupdict()
                return route
        return None

    async def _answer(self, request: Request, route: Route | None) -> Response:
        try:
            return await self._dispatch(request, route)
        except ApiError as error:
            return self._error(error)
        except StorageError as error:
            xml = f"<Error><Code>{error.code}</Code><Message>{escape(error.message)}</Message></Error>"
            body = f'<?xml version="1.0" encoding="UTF-8"?>\n{xml}'
            return Response(body, error.status, media_type="application/xml")
        except ClientDisconnect:
            return Response(status_code=400)
        except Exception:
            log.exception("The emulator failed on %s %s", request.method, request.scope["path"])
            return self._error(ApiError(500, "internal_error", "The emulator failed; its log says why."))

    async def _dispatch(self, request: Request, route: Route | None) -> Response:
        path = request.scope["path"]
        resource = path.split("/")[2] if path.startswith("/v3/") else ""
        missing = {"overdubs", "lipsyncs"} - self.state.behaviour.resources
        if route is None or resource in missing:
            raise ApiError(404, "not_found", f"No route {path}.")
        handler = route.handlers.get(request.method)
        if handler is None:
            allow = {"Allow": ", ".join(route.handlers)}
            raise ApiError(405, "method_not_allowed", f"{request.method} is not allowed.", headers=allow)
        if not resource:
            return await handler(request)
        credential = self._authenticate(request)
        if request.method == "POST" and self.state.behaviour.idempotency:
            return await self._idempotent(request, handler, credential)
        return await handler(request)

    def _authenticate(self, request: Request) -> str:
        """The credential of the request: its kind and value."""
        kind = _credential(request)
        if kind == "both":
            message = "Send either X-Api-Key or Authorization, not both."
        elif kind is None:
            message = "Send your API key as X-Api-Key, or an OAuth token as Authorization: Bearer."
        else:
            header = request.headers["X-Api-Key" if kind == "api_key" else "Authorization"]
            secret = f"{'' if kind == 'api_key' else 'Bearer '}{self._credentials[kind]}"
            if header == secret:
                return f"{kind} {header}"
            message = f"Invalid or expired {'API key' if kind == 'api_key' else 'access token'}."
        raise ApiError(401, "authentication_failed", message)

    async def _idempotent(self, request: Request, handler: Handler, credential: str) -> Response:
        key = request.headers.get("Idempotency-Key")
        if key is None:
            return await handler(request)
        if not re.fullmatch(r"[A-Za-z0-9_\-:.]{1,255}", key):
            raise invalid("Idempotency-Key must match ^[A-Za-z0-9_\\-:.]{1,255}$", "Idempotency-Key")
        answers = self.state.idempotency
        scope = credential, request.scope["path"], key
        begun, answer = answers.get(scope, (0.0, None))
        if time.time() < begun + IDEMPOTENCY_SECONDS:
            if answer is None:
                raise ApiError(
                    409, "request_in_progress", "A request with this Idempotency-Key is still running."
                )
            log.info("Idempotency-Key %s: the first answer again", key)
            return Response(answer[1], answer[0], media_type="application/json")
        answers[scope] = time.time(), None
        stored = False
        try:
            response = await handler(request)
            if response.status_code < 400:
                answers[scope] = time.time(), (response.status_code, bytes(response.body))
                stored = True
            return response
        finally:
            # Whether HeyGen stores errors is unknown; replaying one for a day would help nobody.
            if not stored:
                answers.pop(scope, None)

    def _json(
        self, payload: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None
    ) -> Response:
        if self.state.behaviour.extra_members:
            payload = _with_extra_members(payload)
        return JSONResponse(payload, status, headers)

    def _error(self, error: ApiError) -> Response:
        if self.state.behaviour.html_errors:
            return _html_page(error.status, error.message, error.headers)
        return self._json(error.envelope, error.status, error.headers)

    # Overdubs and lipsyncs

    async def _create_job(self, request: Request) -> Response:
        base_url = _base_url(request)
        body = parse(CreateJob, _content_type(request), await request.body(), base_url)
        await asyncio.sleep(self.state.behaviour.create_latency)
        job = self.state.create_job(
            _resource(request), body, base_url, request.headers.get("Idempotency-Key")
        )
        self._worker.start(job)
        name = self.state.behaviour.id_field
        if name == "route":
            name = "overdub_id" if job.resource == "overdubs" else "lipsync_id"
        return self._json({"data": {name: job.id}})

    async def _list_jobs(self, request: Request) -> Response:
        token = request.query_params.get("token")
        jobs, next_token = self.state.page(_limit(request, 10), token)
        at = time.time() - self.state.behaviour.list_lag
        rows = [self._job(job, request, at) for job in jobs]
        if not self.state.behaviour.callback_id_in_list:
            for row in rows:
                del row["callback_id"]
        return self._json({"data": rows, "has_more": next_token is not None, "next_token": next_token})

    async def _get_job(self, request: Request) -> Response:
        job = self._named_job(request)
        if time.time() < job.created_at + self.state.behaviour.get_lag:
            raise ApiError(404, "not_found", f"No overdub or lipsync {job.id}.")
        return self._json({"data": self._job(job, request, time.time())})

    async def _update_job(self, request: Request) -> Response:
        job = self._named_job(request)
        job.title = parse(UpdateTitle, _content_type(request), await request.body()).title
        return self._json({"data": self._job(job, request, time.time())})

    async def _delete_job(self, request: Request) -> Response:
        job = self._named_job(request)
        self.state.delete_job(job)
        return self._json({"data": {"id": job.id}})

    def _named_job(self, request: Request) -> Job:
        return self.state.job(next(iter(request.path_params.values())))

    def _job(self, job: Job, request: Request, at: float) -> dict[str, Any]:
        status = job.status_at(at)
        completed = status == "completed" and job.output is not None
        video_url = self._link(request, f"/files/{job.id}.mp4") if completed else None
        if completed and job.null_video_urls:
            job.null_video_urls -= 1
            video_url = None
        answer = {
            "id": job.id,
            "title": job.title,
            "status": (self.state.behaviour.unknown_status or status) if status == "running" else status,
            "duration": job.duration if completed else None,
            "video_url": video_url,
            "callback_id": job.request.callback_id,
            "created_at": int(job.created_at),
            "failure_message": job.failure_message if status == "failed" else None,
        }
        if _resource(request) == "lipsyncs":
            answer["caption_url"] = self._link(request, f"/files/{job.id}.srt") if completed else None
        return answer

    def _link(self, request: Request, path: str) -> str:
        return self.state.presign("GET", _base_url(request), path, self.state.behaviour.link_seconds)

    # Batches and statuses

    async def _create_batch(self, request: Request) -> Response:
        base_url = _base_url(request)
        body = parse(CreateBatch, _content_type(request), await request.body(), base_url)
        await asyncio.sleep(self.state.behaviour.create_latency)
        items = []
        for item in body.lipsyncs:
            try:
                items.append(BatchItem(self.state.create_job("lipsyncs", item, base_url, None)))
            except ApiError as error:
                items.append(BatchItem(None, {"code": error.code, "message": error.message}))
        batch = Batch(new_id("btch"), body.title, items)
        self.state.batches[batch.id] = batch
        self._worker.start_batch(batch, body.callback_url)
        return self._json({"data": {"batch_id": batch.id}}, 202)

    async def _get_batch(self, request: Request) -> Response:
        batch = self.state.batches.get(request.path_params["batch_id"])
        if batch is None:
            raise ApiError(404, "not_found", f"No batch {request.path_params['batch_id']}.")
        limit, token = _limit(request, 100), request.query_params.get("token")
        rows = [_batch_row(index, item) for index, item in enumerate(batch.items)]
        first = 0
        if token is not None:
            batch_id, *place = self.state.read_token(token)
            if batch_id != batch.id:
                raise invalid("token: not a cursor of this batch", "token")
            first = place[0]
        counts = Counter(row["status"] for row in rows)
        ended = counts["completed"] + counts["failed"] == len(rows)
        more = first + limit < len(rows)
        data = {
            "batch_id": batch.id,
            "status": ("completed" if counts["completed"] else "failed") if ended else "processing",
            "title": batch.title,
            "total_items": len(rows),
            "counts_by_status": dict(counts),
            "created_at": int(batch.created_at),
            "items": rows[first : first + limit],
            "has_more": more,
            "next_token": self.state.make_token(batch.id, first + limit) if more else None,
        }
        return self._json({"data": data})

    async def _list_statuses(self, request: Request) -> Response:
        ids, batch_ids = (
            [word for text in request.query_params.getlist(name) if text for word in text.split(",")]
            for name in ("lipsync_ids", "batch_ids")
        )
        if len(ids) > 100:
            raise invalid("lipsync_ids: at most 100", "lipsync_ids")
        rows = []
        for job_id in ids:
            job = self.state.find_job(job_id)
            status = _BATCH_WORDS[job.status] if job else "not_found"
            rows.append(_status_row(job_id, status, _failure(job), None, None))
        for batch_id in batch_ids:
            batch = self.state.batches.get(batch_id)
            if batch is None:
                rows.append(_status_row(None, "not_found", None, batch_id, None))
                continue
            for index, item in enumerate(batch.items):
                row = _batch_row(index, item)
                rows.append(_status_row(row["video_id"], row["status"], row["error"], batch_id, index))
        return self._json({"data": rows, "has_more": False, "next_token": None})

    # Assets

    async def _upload_asset(self, request: Request) -> Response:
        length = request.headers.get("Content-Length", "")
        if length.isdecimal() and int(length) > MAX_UPLOAD_BYTES + 2**20:
            # Read it all the same: a client that is still sending would see a reset instead of the answer.
            async for _ in request.stream():
                pass
            raise _too_large()
        try:
            # starlette spools parts above 1 MB to disk.
            async with request.form(max_files=1) as form:
                file = form.get("file")
                if not isinstance(file, UploadFile):
                    raise invalid("File is required. Upload a file using multipart/form-data.", "file")
                if (file.size or 0) > MAX_UPLOAD_BYTES:
                    raise _too_large()
                mime_type = detect_type(await file.read(512))
                await file.seek(0)
                asset = Asset(new_id("asset"), mime_type, file.size or 0)
                path = self._directory / f"{asset.id}{SUFFIXES[mime_type]}"
                await asyncio.to_thread(_save, file, path)
        except (MultiPartException, FormParserError) as error:  # of starlette and of what it reads forms with
            raise invalid(f"The form could not be read: {error}", "file") from error
        asset.path = path
        self.state.assets[asset.id] = asset
        return self._json({"data": self._asset(asset, request)})

    async def _create_direct_upload(self, request: Request) -> Response:
        body = parse(CreateDirectUpload, _content_type(request), await request.body())
        behaviour = self.state.behaviour
        if body.size_bytes > behaviour.max_upload_bytes:
            raise invalid(f"size_bytes: at most {behaviour.max_upload_bytes}", "size_bytes")
        asset = Asset(
            new_id("asset"),
            body.content_type,
            body.size_bytes,
            ready=False,
            checksum_sha256=body.checksum_sha256 and body.checksum_sha256.lower(),
        )
        self.state.assets[asset.id] = asset
        url = self.state.presign("PUT", _base_url(request), f"/uploads/{asset.id}", behaviour.upload_seconds)
        data = {
            "asset_id": asset.id,
            "upload_url": url,
            "upload_headers": _upload_headers(asset),
            "expires_in_seconds": int(behaviour.upload_seconds),
            "max_bytes": behaviour.max_upload_bytes,
            "status": "pending_upload",
        }
        return self._json({"data": data})

    async def _complete_direct_upload(self, request: Request) -> Response:
        asset = self.state.asset(request.path_params["asset_id"])
        body = parse(CompleteUpload, _content_type(request), await request.body())
        if asset.path is None:
            raise ApiError(
                409, "conflict", "Uploaded object not found yet. Retry after upload PUT returns 200."
            )
        if body.checksum_sha256 is not None and body.checksum_sha256.lower() != asset.sha256:
            raise invalid("checksum_sha256: not that of the uploaded object", "checksum_sha256")
        with asset.path.open("rb") as file:
            detected = detect_type(file.read(512))
        if detected != asset.mime_type:
            raise invalid(f"content_type: declared {asset.mime_type}, found {detected}", "content_type")
        asset.ready = True
        return self._json({"data": self._asset(asset, request) | {"status": "processing"}})

    def _asset(self, asset: Asset, request: Request) -> dict[str, Any]:
        return {
            "asset_id": asset.id,
            "url": self._link(request, f"/files/{asset.id}{SUFFIXES[asset.mime_type]}"),
            "mime_type": asset.mime_type,
            "size_bytes": asset.size_bytes,
        }

    # The object store

    async def _put_upload(self, request: Request) -> Response:
        """Step 2 of a direct upload. Storage signs the headers and the length: any other is refused."""
        self._check_signature(request)
        asset = self.state.assets.get(request.path_params["asset_id"])
        if asset is None or asset.ready:
            raise StorageError(404, "NoSuchKey", "The specified key does not exist.")
        if _credential(request) is not None:
            raise StorageError(403, "SignatureDoesNotMatch", "A HeyGen credential does not belong here.")
        wanted = {name.lower(): value for name, value in _upload_headers(asset).items()}
        given = {name: value for name, value in request.headers.items() if name in wanted or "x-amz-" in name}
        if given != wanted:
            raise StorageError(403, "SignatureDoesNotMatch", f"Headers must be {wanted}, not {given}.")
        length = request.headers.get("Content-Length")
        if length is None:
            raise StorageError(
                411, "MissingContentLength", "You must provide the Content-Length HTTP header."
            )
        if length != str(asset.size_bytes):
            raise StorageError(403, "SignatureDoesNotMatch", f"Content-Length must be {asset.size_bytes}.")
        digest = hashlib.sha256()
        path = self._directory / new_id("put")
        with path.open("wb") as file:
            async for chunk in request.stream():
                digest.update(chunk)
                file.write(chunk)
        if asset.checksum_sha256 not in (None, digest.hexdigest()):
            raise StorageError(400, "BadDigest", "The checksum did not match what we received.")
        asset.path, asset.sha256 = path, digest.hexdigest()
        return Response(headers={"ETag": f'"{digest.hexdigest()[:32]}"'})

    async def _get_file(self, request: Request) -> Response:
        """What a presigned link leads to; whole or by Range."""
        self._check_signature(request)
        if _credential(request) is not None:
            raise StorageError(
                400, "InvalidArgument", "Only one auth mechanism allowed: leave the credential out."
            )
        name = request.path_params["name"]
        path = self.state.file(name)
        job = self.state.find_job(name.removesuffix(".srt"))
        if job is not None and job.duration is not None:
            return Response(_captions(job.duration), media_type="application/x-subrip")
        if path is None or not path.exists():
            raise StorageError(404, "NoSuchKey", "The specified key does not exist.")
        return FileResponse(path, media_type=_mime_type(name))

    def _check_signature(self, request: Request) -> None:
        query = request.query_params
        # HEAD goes with GET, as at CloudFront.
        method = "PUT" if request.method == "PUT" else "GET"
        expires, signature = query.get("Expires", ""), query.get("Signature", "")
        if not self.state.link_works(method, request.scope["path"], expires, signature):
            raise StorageError(403, "AccessDenied", "Request has expired, or its signature is wrong.")

    # The caller

    async def _get_current_user(self, request: Request) -> Response:
        by_key = _credential(request) == "api_key"
        wallet = {"currency": "usd", "remaining_balance": 100.0, "auto_reload": None}
        credits = {"premium_credits": {"remaining": 1000, "resets_at": None}, "add_on_credits": None}
        user = {
            "username": "emulator",
            "email": "emulator@example.com",
            "first_name": None,
            "last_name": None,
            "billing_type": "wallet" if by_key else "subscription",
            "wallet": wallet if by_key else None,
            "subscription": None if by_key else {"plan": "pro", "credits": credits},
            "usage_based": None,
        }
        return self._json({"data": user})

    # The emulator's own routes: no part of HeyGen, no credential, never in the log

    async def _read_state(self, _: Request) -> Response:
        statuses: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for record in self.state.requests:
            statuses[f"{record.method} {record.route}"][str(record.status)] += 1
        return JSONResponse(
            {
                "requests_by_route": self.state.requests_by_route,
                "statuses_by_route": statuses,
                "jobs_created": len(self.state.created),
                "jobs": [_job_state(job) for job in self.state.created],
                "assets": list(self.state.assets),
                "batches": list(self.state.batches),
                "faults": [fault.model_dump() for fault in self.state.faults],
                "behaviour": self.state.behaviour.model_dump(mode="json"),
            }
        )

    async def _reset_state(self, _: Request) -> Response:
        self.state.reset()
        return Response(status_code=204)

    async def _read_requests(self, _: Request) -> Response:
        return JSONResponse([asdict(record) for record in self.state.requests])

    async def _read_behaviour(self, _: Request) -> Response:
        return JSONResponse(self.state.behaviour.model_dump(mode="json"))

    async def _change_behaviour(self, request: Request) -> Response:
        changes = await _admin_body(request)
        try:
            self.state.behaviour.update(changes)
        except ValidationError as error:
            raise invalid(str(error)) from error
        return await self._read_behaviour(request)

    async def _read_faults(self, _: Request) -> Response:
        return JSONResponse([fault.model_dump() for fault in self.state.faults])

    async def _add_fault(self, request: Request) -> Response:
        try:
            fault = Fault.model_validate(await _admin_body(request))
        except ValidationError as error:
            raise invalid(str(error)) from error
        self.state.faults.append(fault)
        return JSONResponse(fault.model_dump(), 201)

    async def _clear_faults(self, _: Request) -> Response:
        self.state.faults.clear()
        return Response(status_code=204)

    async def _force_job(self, request: Request) -> Response:
        job = self._named_job(request)
        try:
            body = ForceJob.model_validate(await _admin_body(request))
        except ValidationError as error:
            raise invalid(str(error)) from error
        job.force(body.status, body.failure_message)
        return JSONResponse(_job_state(job))


class _Sender:
    """Sends an answer with a request id, logs its status, and spoils its body as the fault demands."""

    def __init__(self, send: Send, fault: Fault, record: RequestRecord) -> None:
        self._send, self._fault, self._record = send, fault, record
        self._sent = 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._record.status = message["status"]
            headers = [*message["headers"], (b"x-request-id", new_id("req").encode())]
            cut = self._fault.truncate
            if cut is not None:
                headers = [
                    (name, str(min(int(value), cut)).encode() if name == b"content-length" else value)
                    for name, value in headers
                ]
            await self._send({**message, "headers": headers})
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


def _faulty_answer(fault: Fault) -> Response | None:
    if fault.status is None and fault.body is None and not fault.html:
        return None
    status = fault.status or (502 if fault.html else 200)
    if fault.html:
        return _html_page(status, fault.message, fault.headers)
    if fault.body is not None:
        return Response(fault.body, status, {"Content-Type": "application/json", **fault.headers})
    code = fault.code or _USUAL_CODES.get(status, "internal_error")
    return JSONResponse(ApiError(status, code, fault.message).envelope, status, fault.headers)


def _html_page(status: int, message: str, headers: dict[str, str] | None) -> Response:
    page = f"<html><head><title>{status}</title></head><body><h1>{html.escape(message)}</h1></body></html>"
    return HTMLResponse(page, status, headers)


def _with_extra_members(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_extra_members(item) for item in value]
    if isinstance(value, dict):
        known = {
            name: item if name in _OPEN_OBJECTS else _with_extra_members(item) for name, item in value.items()
        }
        return known | {"new_member": "unheard of", "new_object": {"deep": [{"down": None}]}}
    return value


def _credential(request: Request) -> Literal["api_key", "oauth", "both"] | None:
    has_key, has_token = "X-Api-Key" in request.headers, "Authorization" in request.headers
    if has_key and has_token:
        return "both"
    if has_key:
        return "api_key"
    return "oauth" if has_token else None


def _record(request: Request, route: str) -> RequestRecord:
    # A real key may have been sent here by mistake; the log does not keep it.
    secret = {"x-api-key", "authorization"}
    return RequestRecord(
        method=request.method,
        path=request.scope["path"],
        route=route,
        query=request.url.query,
        headers={name: "***" if name in secret else value for name, value in request.headers.items()},
        credential=_credential(request),
        idempotency_key=request.headers.get("Idempotency-Key"),
        at=time.time(),
    )


def _base_url(request: Request) -> str:
    """Links name the host by which the client reached us, which differs between containers."""
    return str(request.base_url).rstrip("/")


def _content_type(request: Request) -> str:
    return request.headers.get("Content-Type", "")


def _resource(request: Request) -> str:
    return str(request.scope["path"]).split("/")[2]


def _limit(request: Request, default: int) -> int:
    text = request.query_params.get("limit", str(default))
    if not re.fullmatch(r"[0-9]{1,4}", text) or not 1 <= int(text) <= 100:
        raise invalid("limit: must be an integer from 1 to 100", "limit")
    return int(text)


def _failure(job: Job | None) -> dict[str, Any] | None:
    if job is None or job.status != "failed":
        return None
    return {"code": None, "message": job.failure_message}


def _batch_row(index: int, item: BatchItem) -> dict[str, Any]:
    status = _BATCH_WORDS[item.job.status] if item.job else "failed"
    return {
        "item_index": index,
        "status": status,
        "video_id": item.job.id if item.job else None,
        "error": item.error or _failure(item.job),
    }


def _status_row(
    job_id: str | None, status: str, error: dict[str, Any] | None, batch_id: str | None, index: int | None
) -> dict[str, Any]:
    return {"video_id": job_id, "status": status, "error": error, "batch_id": batch_id, "item_index": index}


def _too_large() -> ApiError:
    return ApiError(413, "payload_too_large", f"The file is larger than {MAX_UPLOAD_BYTES} bytes.", "file")


def _save(file: UploadFile, path: Path) -> None:
    with path.open("wb") as target:
        shutil.copyfileobj(file.file, target)


def _upload_headers(asset: Asset) -> dict[str, str]:
    headers = {"Content-Type": asset.mime_type}
    if asset.checksum_sha256 is not None:
        headers["x-amz-checksum-sha256"] = base64.b64encode(bytes.fromhex(asset.checksum_sha256)).decode()
    return headers


def _mime_type(name: str) -> str | None:
    return next((mime for mime, suffix in SUFFIXES.items() if name.endswith(suffix)), None)


def _captions(seconds: float) -> str:
    minutes, rest = divmod(round(seconds * 1000), 60_000)
    end = f"{minutes // 60:02}:{minutes % 60:02}:{rest // 1000:02},{rest % 1000:03}"
    return f"1\n00:00:00,000 --> {end}\n[Captions of the new audio]\n\n"


def _job_state(job: Job) -> dict[str, Any]:
    return {
        "id": job.id,
        "resource": job.resource,
        "status": job.status,
        "title": job.title,
        "request": job.request.model_dump(exclude_unset=True),
        "idempotency_key": job.idempotency_key,
        "created_at": job.created_at,
        "duration": job.duration,
        "failure_message": job.failure_message,
        "deleted": job.deleted,
        "callback_delivered": job.callback_delivered,
    }


async def _admin_body(request: Request) -> dict[str, Any]:
    try:
        body = json.loads(await request.body())
    except ValueError as error:
        raise invalid(f"The body is not valid JSON: {error}") from error
    if not isinstance(body, dict):
        raise invalid("The body must be a JSON object")
    return body
