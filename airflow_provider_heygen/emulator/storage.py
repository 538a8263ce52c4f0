"""The object store behind presigned URLs: downloads, and step 2 of a direct upload."""

import base64
import hashlib

from fastapi import APIRouter, Depends
from fastapi.requests import Request
from fastapi.responses import FileResponse, Response

from airflow_provider_heygen.emulator.contract import ApiError, credential_of, mime_type_of
from airflow_provider_heygen.emulator.state import Asset, StateHere, new_id


class StorageError(ApiError):
    """An error response of the object store, in its XML."""


async def _check_url(request: Request, state: StateHere) -> None:
    # A URL that is signed for GET also works for HEAD, as at CloudFront.
    method = "PUT" if request.method == "PUT" else "GET"
    if not state.is_signed(method, request.scope["path"], request.query_params):
        raise StorageError(403, "AccessDenied", "Request has expired, or its signature is wrong.")


router = APIRouter(dependencies=[Depends(_check_url)])


@router.api_route("/files/{name}", methods=["GET", "HEAD"])
async def get_file(name: str, request: Request, state: StateHere) -> Response:
    """Send a file, or the part that Range names."""
    if credential_of(request.headers) is not None:
        raise StorageError(400, "InvalidArgument", "Only one auth mechanism allowed: omit the credential.")
    job = state.jobs.get(name.removesuffix(".srt"))
    if job is not None and name.endswith(".srt"):
        return Response(_captions(job.duration or 0.0), media_type="application/x-subrip")
    path = state.file(name)
    if path is None or not path.exists():
        raise StorageError(404, "NoSuchKey", "The specified key does not exist.")
    return FileResponse(path, media_type=mime_type_of(name))


@router.put("/uploads/{asset_id}")
async def put_upload(asset_id: str, request: Request, state: StateHere) -> Response:
    """Receive a file. Storage signs the headers and the length, and rejects any other."""
    asset = state.assets.get(asset_id)
    if asset is None or asset.ready:
        raise StorageError(404, "NoSuchKey", "The specified key does not exist.")
    if credential_of(request.headers) is not None:
        raise StorageError(403, "SignatureDoesNotMatch", "A HeyGen credential does not belong here.")
    wanted = {name.lower(): value for name, value in upload_headers(asset).items()}
    given = {name: value for name, value in request.headers.items() if name in wanted or "x-amz-" in name}
    if given != wanted:
        raise StorageError(403, "SignatureDoesNotMatch", f"Headers must be {wanted}, not {given}.")
    length = request.headers.get("Content-Length")
    if length is None:
        raise StorageError(411, "MissingContentLength", "You must provide the Content-Length HTTP header.")
    if length != str(asset.size_bytes):
        raise StorageError(403, "SignatureDoesNotMatch", f"Content-Length must be {asset.size_bytes}.")
    digest = hashlib.sha256()
    path = state.directory / new_id("put")
    with path.open("wb") as file:
        async for chunk in request.stream():
            digest.update(chunk)
            file.write(chunk)
    if asset.checksum_sha256 not in (None, digest.hexdigest()):
        raise StorageError(400, "BadDigest", "The checksum does not match the content.")
    asset.path, asset.sha256 = path, digest.hexdigest()
    return Response(headers={"ETag": f'"{digest.hexdigest()[:32]}"'})


def upload_headers(asset: Asset) -> dict[str, str]:
    """Return the headers that the PUT of a direct upload must have."""
    headers = {"Content-Type": asset.mime_type}
    if asset.checksum_sha256 is not None:
        headers["x-amz-checksum-sha256"] = base64.b64encode(bytes.fromhex(asset.checksum_sha256)).decode()
    return headers


def _captions(seconds: float) -> str:
    minutes, rest = divmod(round(seconds * 1000), 60_000)
    end = f"{minutes // 60:02}:{minutes % 60:02}:{rest // 1000:02},{rest % 1000:03}"
    return f"1\n00:00:00,000 --> {end}\n[Captions of the new audio]\n\n"
