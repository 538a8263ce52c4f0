"""The work on a job: download the inputs, render, wait until it is due to end, send the callback."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from tenacity import RetryCallState, retry, stop_after_attempt, wait_exponential

from airflow_provider_heygen.emulator import media
from airflow_provider_heygen.emulator.contract import MAX_INPUT_BYTES, too_large
from airflow_provider_heygen.emulator.media import MediaError
from airflow_provider_heygen.emulator.state import new_id

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable
    from concurrent.futures import Future
    from pathlib import Path

    from airflow_provider_heygen.emulator.contract import MediaInput
    from airflow_provider_heygen.emulator.state import Job, State

log = logging.getLogger(__name__)


class Worker:
    """Runs the jobs, with ffmpeg and downloads in threads, so that they do not block the event loop."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._pool = ThreadPoolExecutor(os.cpu_count() or 2, thread_name_prefix="heygen-emulator")
        # Cached by input: a thousand jobs on the same pair of files need one run of ffmpeg.
        self._made: dict[Hashable, Future[tuple[Path, float | None]]] = {}
        self._has_ffmpeg = media.ffmpeg_exe() is not None
        if not self._has_ffmpeg:
            log.warning("No ffmpeg (imageio-ffmpeg): every result is the unchanged source video")

    def start(self, job: Job) -> None:
        """Start the work on a job in the background."""
        job.work = asyncio.create_task(self._run(job))

    def close(self) -> None:
        """Wait for the ffmpeg processes that are running, and start no others."""
        self._pool.shutdown(cancel_futures=True)

    async def _run(self, job: Job) -> None:
        try:
            job.output, job.duration = await self._render(job)
        except MediaError as error:
            job.fail(str(error))
        except Exception as error:  # such as an ffmpeg that cannot be started: the job must end
            log.exception("Could not render job %s", job.id)
            job.fail(f"The emulator could not render it: {error}")
        job.rendered_at = time.time()
        while not job.ended:
            # A forced status interrupts the wait, and a forced job ends only when it is forced again.
            ends_at = None if job.forced else job.ends_at
            job.forcing.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(None if ends_at is None else max(ends_at - time.time(), 0.001)):
                    await job.forcing.wait()
        if job.request.callback_url is not None:
            job.callback_delivered = await asyncio.to_thread(
                _call_back, job.request.callback_url, self._event(job)
            )

    def _event(self, job: Job) -> dict[str, Any]:
        # Modelled on the documented avatar_video events; only the echo of callback_id is promised.
        name = job.resource.removesuffix("s")
        data: dict[str, Any] = {
            f"{name}_id": job.id,
            "callback_id": job.request.callback_id,
            "folder_id": job.request.folder_id,
        }
        if job.status == "failed":
            return {"event_type": f"{name}.fail", "event_data": data | {"msg": job.failure_message}}
        url = self._state.presign("GET", job.base_url, f"/files/{job.id}.mp4")
        return {"event_type": f"{name}.success", "event_data": data | {"url": url}}

    async def _render(self, job: Job) -> tuple[Path, float | None]:
        request = job.request
        video = await self._source(request.video, "video", job.base_url)
        audio = await self._source(request.audio, "audio", job.base_url)
        if not self._has_ffmpeg:
            return video, None
        out = self._state.directory / f"{job.id}.mp4"
        dynamic = request.enable_dynamic_duration
        start, end = request.start_time, request.end_time

        def mux() -> tuple[Path, float | None]:
            made = media.mux(video, audio, out, start_time=start, end_time=end, dynamic_duration=dynamic)
            return out, made.duration

        return await self._once((video, audio, start, end, dynamic), mux)

    async def _source(self, source: MediaInput, kind: str, base_url: str) -> Path:
        """
        Return the file of an input.

        :raises MediaError: if it is missing or cannot be downloaded, with HeyGen's text.
        """
        url = source.url
        if url is None:
            asset = self._state.assets.get(source.asset_id or "")
            if asset is None or asset.path is None:
                raise MediaError(f"Your {kind} is missing or corrupted")
            return asset.path
        unavailable = MediaError(
            f"Failed to download {kind} from url, please check the url is valid or the {kind} is public"
        )
        if url.startswith(f"{base_url}/"):
            if (own := self._state.file_at(url)) is None:
                raise unavailable
            return own
        if not self._state.behaviour.fetch_urls:
            return await self._sample(kind)
        target = self._state.directory / new_id("url")
        try:
            await asyncio.wrap_future(self._pool.submit(_download, url, target))
        except (OSError, ValueError) as error:
            raise unavailable from error
        return target

    async def _sample(self, kind: str) -> Path:
        path = self._state.directory / ("sample.mp4" if kind == "video" else "sample.mp3")

        def make() -> tuple[Path, None]:
            if not self._has_ffmpeg:
                path.write_bytes(b"\x00\x00\x00\x14ftypisom\x00\x00\x00\x00isom")
            elif kind == "video":
                media.make_video(path)
            else:
                media.make_audio(path, seconds=2.5)
            return path, None

        return (await self._once(path, make))[0]

    async def _once(
        self, key: Hashable, make: Callable[[], tuple[Path, float | None]]
    ) -> tuple[Path, float | None]:
        if key not in self._made:
            self._made[key] = self._pool.submit(make)
        # Shielded: the deletion of one job must not cancel what other jobs wait for.
        return await asyncio.shield(asyncio.wrap_future(self._made[key]))


def _download(url: str, target: Path) -> None:
    import requests  # imported here for fast parsing of files that start an emulator

    response = requests.get(url, timeout=30)
    response.raise_for_status()
    if len(response.content) > MAX_INPUT_BYTES:
        raise MediaError(too_large(response.headers.get("Content-Type")))
    target.write_bytes(response.content)


def _log_failure(state: RetryCallState) -> None:
    # Without the text of the error, which would quote the URL with its query.
    error = state.outcome and state.outcome.exception()
    host, delay = urlsplit(state.args[0]).hostname, state.upcoming_sleep
    log.warning("A callback to %s failed (%s). Sending it again in %.1f s", host, type(error).__name__, delay)


@retry(
    stop=stop_after_attempt(3),
    wait=wait_exponential(0.2),
    before_sleep=_log_failure,
    retry_error_callback=lambda _: False,
)
def _call_back(url: str, event: dict[str, Any]) -> bool:
    import requests

    requests.post(url, json=event, headers={"User-Agent": "heygen-emulator"}, timeout=5).raise_for_status()
    return True
