"""HeyGen's API: overdubs and lipsyncs (one resource under two names), assets, the caller's key."""

import asyncio
import json
import logging
import re
import shutil
import time
from collections.abc import Callable, Coroutine
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, UploadFile
from fastapi.requests import Request
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute

from airflow_provider_heygen.emulator.contract import (
    MAX_INPUT_BYTES,
    SUFFIXES,
    ApiError,
    CompleteUpload,
    CreateDirectUpload,
    CreateJob,
    UpdateTitle,
    credential_of,
    detect_type,
    invalid,
)
from airflow_provider_heygen.emulator.state import (
    IDEMPOTENCY_SECONDS,
    Asset,
    Job,
    State,
    StateHere,
    get_state,
    new_id,
)
from airflow_provider_heygen.emulator.storage import upload_headers

Handler = Callable[[Request], Coroutine[Any, Any, Response]]

log = logging.getLogger(__name__)

_BULK_STATUSES = {"pending": "queued", "running": "processing", "completed": "completed", "failed": "failed"}
# The client sends their members back, so they get no unknown ones.
_OPEN_OBJECTS = {"upload_headers"}


class HeyGenRoute(APIRoute):
    """A route that checks name, credential, scope and Idempotency-Key before it reads the body."""

    def get_route_handler(self) -> Handler:
        """Return FastAPI's handler behind these checks."""
        handle = super().get_route_handler()

        async def respond(request: Request) -> Response:
            state = await get_state(request)
            resource = _resource(request)
            served = state.behaviour.resources
            if served != "both" and resource in {"overdubs", "lipsyncs"} - {served}:
                page = state.behaviour.missing_resource == "page"
                raise ApiError(404, "not_found", f"No route {request.scope['path']}.", html=page)
            credential = _authenticate(request, state)
            if request.method == "POST" and state.behaviour.idempotency:
                response = await _handle_once(request, handle, credential, state)
            else:
                response = await handle(request)
            if state.behaviour.extra_members:
                response = JSONResponse(with_extra_members(json.loads(bytes(response.body))))
            return response

        return respond


def _authenticate(request: Request, state: State) -> str:
    """Return kind and value of the credential, or raise the 401 or 403."""
    kind, behaviour = credential_of(request.headers), state.behaviour
    if kind == "both":
        raise _unauthorized("Send either X-Api-Key or Authorization, not both.")
    if kind is None:
        raise _unauthorized("Send your API key as X-Api-Key, or an OAuth token as Authorization: Bearer.")
    header = request.headers["X-Api-Key" if kind == "api_key" else "Authorization"]
    expires_at = behaviour.key_expires_at if kind == "api_key" else None
    expired = expires_at is not None and time.time() >= expires_at
    if expired or header != f"{'' if kind == 'api_key' else 'Bearer '}{state.credentials[kind]}":
        raise _unauthorized(f"Invalid or expired {'API key' if kind == 'api_key' else 'access token'}.")
    area = {"assets": "assets", "api_keys": None}.get(_resource(request), "lipsync")
    action = "read" if request.method == "GET" else "write"
    if kind == "api_key" and area is not None and not behaviour.allows(area, action):
        message = f"This API key lacks the scope {area}:{action}."
        raise ApiError(403, "insufficient_api_key_scope", message)
    return f"{kind} {header}"


def _unauthorized(message: str) -> ApiError:
    return ApiError(401, "authentication_failed", message)


async def _handle_once(request: Request, handle: Handler, credential: str, state: State) -> Response:
    key = request.headers.get("Idempotency-Key")
    if key is None:
        return await handle(request)
    if not re.fullmatch(r"[A-Za-z0-9_\-:.]{1,255}", key):
        raise invalid("Idempotency-Key must match ^[A-Za-z0-9_\\-:.]{1,255}$", "Idempotency-Key")
    scope = credential, request.scope["path"], key
    begun, first = state.idempotency.get(scope, (0.0, None))
    if time.time() < begun + IDEMPOTENCY_SECONDS:
        if first is None:
            message = "A request with this Idempotency-Key is still running."
            raise ApiError(409, "request_in_progress", message)
        log.info("Idempotency-Key %s: sending the first response again", key)
        return Response(first, media_type="application/json")
    state.idempotency[scope] = time.time(), None
    try:
        response = await handle(request)
    except BaseException:
        # It is unknown whether HeyGen stores errors; here, a repeated request runs again.
        state.idempotency.pop(scope, None)
        raise
    state.idempotency[scope] = time.time(), bytes(response.body)
    return response


def with_extra_members(value: Any) -> Any:
    """Return JSON with unknown members in every object."""
    if isinstance(value, list):
        return [with_extra_members(item) for item in value]
    if isinstance(value, dict):
        known = {
            name: item if name in _OPEN_OBJECTS else with_extra_members(item) for name, item in value.items()
        }
        return known | {"new_member": "unheard of", "new_object": {"deep": [{"down": None}]}}
    return value


async def _get_job(request: Request) -> Job:
    (job_id,) = request.path_params.values()
    return (await get_state(request)).job(job_id)


async def _get_asset(asset_id: str, request: Request) -> Asset:
    return (await get_state(request)).asset(asset_id)


NamedJob = Annotated[Job, Depends(_get_job)]
NamedAsset = Annotated[Asset, Depends(_get_asset)]
router = APIRouter(prefix="/v3", route_class=HeyGenRoute)


# Overdubs and lipsyncs


@router.post("/overdubs")
@router.post("/lipsyncs")
async def create_job(body: CreateJob, request: Request, state: StateHere) -> dict[str, Any]:
    """Start a job."""
    state.check_known(body)
    await asyncio.sleep(state.behaviour.create_latency)
    job = state.create_job(
        _resource(request), body, _base_url(request), request.headers.get("Idempotency-Key")
    )
    request.app.state.worker.start(job)
    name = state.behaviour.id_field
    return {"data": {f"{job.resource.removesuffix('s')}_id" if name == "route" else name: job.id}}


@router.get("/overdubs")
@router.get("/lipsyncs")
async def list_jobs(
    request: Request,
    state: StateHere,
    limit: Annotated[int, Query(ge=1, le=100)] = 10,
    token: str | None = None,
) -> dict[str, Any]:
    """Return one page of all jobs, under both names of the resource."""
    jobs, next_token = state.page(limit, token)
    at = time.time() - state.behaviour.list_lag
    rows = [_job(job, request, state, at) for job in jobs]
    if not state.behaviour.callback_id_in_list:
        for row in rows:
            del row["callback_id"]
    return {"data": rows, "has_more": next_token is not None, "next_token": next_token}


@router.get("/lipsyncs/statuses")
async def list_statuses(state: StateHere, lipsync_ids: Annotated[list[str], Query()] = []) -> dict[str, Any]:  # noqa: B006
    """Return the statuses of up to 100 jobs. Batches are not emulated; ``batch_ids`` is ignored."""
    ids = [job_id for text in lipsync_ids if text for job_id in text.split(",")]
    if len(ids) > 100:
        raise invalid("lipsync_ids: at most 100", "lipsync_ids")
    rows: list[dict[str, Any]] = []
    for job_id in ids:
        job = state.jobs.get(job_id)
        status = _BULK_STATUSES[job.status] if job else "not_found"
        error = {"code": None, "message": job.failure_message} if job and status == "failed" else None
        row = {"video_id": job_id, "status": status, "error": error}
        rows.append(row | {"batch_id": None, "item_index": None})
    return {"data": rows, "has_more": False, "next_token": None}


@router.get("/overdubs/{overdub_id}")
@router.get("/lipsyncs/{lipsync_id}")
async def get_job(job: NamedJob, request: Request, state: StateHere) -> dict[str, Any]:
    """Return a job."""
    if time.time() < job.created_at + state.behaviour.get_lag:
        raise ApiError(404, "not_found", f"No overdub or lipsync {job.id}.")
    return {"data": _job(job, request, state, time.time())}


@router.patch("/overdubs/{overdub_id}")
@router.patch("/lipsyncs/{lipsync_id}")
async def update_job(body: UpdateTitle, job: NamedJob, request: Request, state: StateHere) -> dict[str, Any]:
    """Rename a job."""
    state.check_known(body)
    job.title = body.title
    return {"data": _job(job, request, state, time.time())}


@router.delete("/overdubs/{overdub_id}")
@router.delete("/lipsyncs/{lipsync_id}")
async def delete_job(job: NamedJob, state: StateHere) -> dict[str, Any]:
    """Delete a job with its files."""
    state.delete_job(job)
    return {"data": {"id": job.id}}


def _job(job: Job, request: Request, state: State, at: float) -> dict[str, Any]:
    status = job.status_at(at)
    completed = status == "completed" and job.output is not None
    video_url = _presign(request, state, f"/files/{job.id}.mp4") if completed else None
    if completed and job.null_video_urls:
        job.null_video_urls -= 1
        video_url = None
    members = {
        "id": job.id,
        "title": job.title,
        "status": (state.behaviour.unknown_status or status) if status == "running" else status,
        "duration": job.duration if completed else None,
        "video_url": video_url,
        "callback_id": job.request.callback_id,
        "created_at": int(job.created_at),
        "failure_message": job.failure_message if status == "failed" else None,
    }
    if _resource(request) == "lipsyncs":
        # Captions are always made; HeyGen ignores enable_caption.
        members["caption_url"] = _presign(request, state, f"/files/{job.id}.srt") if completed else None
    return members


# Assets


@router.post("/assets")
async def upload_asset(file: UploadFile, request: Request, state: StateHere) -> dict[str, Any]:
    """Receive a file as a form."""
    size = file.size or 0
    if size > MAX_INPUT_BYTES:
        message = f"The file is larger than {MAX_INPUT_BYTES} bytes."
        raise ApiError(413, "payload_too_large", message, "file")
    mime_type = detect_type(await file.read(512))
    await file.seek(0)
    asset = Asset(new_id("asset"), file.filename or "", mime_type, size)
    asset.path = state.directory / f"{asset.id}{SUFFIXES[mime_type]}"
    with asset.path.open("wb") as target:
        await asyncio.to_thread(shutil.copyfileobj, file.file, target)
    state.assets[asset.id] = asset
    return {"data": _asset(asset, request, state)}


@router.post("/assets/direct-uploads")
async def create_direct_upload(
    body: CreateDirectUpload, request: Request, state: StateHere
) -> dict[str, Any]:
    """Return a URL for an upload."""
    state.check_known(body)
    behaviour = state.behaviour
    if body.size_bytes > behaviour.max_upload_bytes:
        raise invalid(f"size_bytes: at most {behaviour.max_upload_bytes}", "size_bytes")
    asset = Asset(new_id("asset"), body.filename, body.content_type, body.size_bytes, ready=False)
    asset.checksum_sha256 = body.checksum_sha256 and body.checksum_sha256.lower()
    state.assets[asset.id] = asset
    data = {
        "asset_id": asset.id,
        "upload_url": state.presign("PUT", _base_url(request), f"/uploads/{asset.id}"),
        "upload_headers": upload_headers(asset),
        "expires_in_seconds": int(behaviour.upload_seconds),
        "max_bytes": behaviour.max_upload_bytes,
        "status": "pending_upload",
    }
    return {"data": data}


@router.post("/assets/{asset_id}/complete")
async def complete_direct_upload(
    body: CompleteUpload, asset: NamedAsset, request: Request, state: StateHere
) -> dict[str, Any]:
    """Check an upload, and make it available to jobs."""
    state.check_known(body)
    if asset.path is None:
        raise ApiError(409, "conflict", "Uploaded object not found yet. Retry after upload PUT returns 200.")
    if body.checksum_sha256 is not None and body.checksum_sha256.lower() != asset.sha256:
        raise invalid("checksum_sha256: not that of the uploaded object", "checksum_sha256")
    with asset.path.open("rb") as file:
        detected = detect_type(file.read(512))
    if detected != asset.mime_type:
        raise invalid(f"content_type: declared {asset.mime_type}, found {detected}", "content_type")
    asset.ready = True
    return {"data": _asset(asset, request, state) | {"status": "processing"}}


@router.get("/assets/{asset_id}")
async def get_asset(asset: NamedAsset, request: Request, state: StateHere) -> dict[str, Any]:
    """Return the details of an asset."""
    data = {
        "id": asset.id,
        "name": asset.name,
        "type": asset.mime_type.partition("/")[0],
        "owner": "emulator",
        "space_id": "emulator",
        "uploaded_at": int(asset.uploaded_at),
        "url": _asset(asset, request, state)["url"] if asset.ready else None,
        "folder_id": None,
    }
    return {"data": data}


@router.delete("/assets/{asset_id}")
async def delete_asset(asset: NamedAsset, state: StateHere) -> dict[str, Any]:
    """Delete an asset. A job that has not read it yet fails."""
    del state.assets[asset.id]
    return {"data": {"id": asset.id}}


def _asset(asset: Asset, request: Request, state: State) -> dict[str, Any]:
    return {
        "asset_id": asset.id,
        "url": _presign(request, state, f"/files/{asset.id}{SUFFIXES[asset.mime_type]}"),
        "mime_type": asset.mime_type,
        "size_bytes": asset.size_bytes,
    }


# The caller


@router.get("/api_keys/self")
async def get_own_key(request: Request, state: StateHere) -> dict[str, Any]:
    """Return scopes and expiry of the API key of the request."""
    if credential_of(request.headers) != "api_key":
        raise _unauthorized("An access token is not an API key.")
    scopes, expires_at = list(state.behaviour.key_scopes), state.behaviour.key_expires_at
    data = {
        "key_id": "key_emulator",
        "key_name": "emulator",
        "status": "active",
        "scope_mode": {"*:*": "full", "*:read": "read_only"}.get(",".join(scopes), "custom"),
        "scopes": scopes,
        "created_at": int(state.started_at),
        "updated_at": int(state.started_at),
        "expires_at": None if expires_at is None else int(expires_at),
        "expires_in_seconds": None if expires_at is None else int(expires_at - time.time()),
    }
    return {"data": data}


def _resource(request: Request) -> str:
    return str(request.scope["path"]).split("/")[2]


def _base_url(request: Request) -> str:
    """Return the URL by which the client reached the emulator, which may differ between containers."""
    return str(request.base_url).rstrip("/")


def _presign(request: Request, state: State, path: str) -> str:
    return state.presign("GET", _base_url(request), path)
