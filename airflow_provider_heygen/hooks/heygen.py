"""The calls to HeyGen, synchronous and asynchronous, with retries: :mod:`.api` over :mod:`.transport`."""

from __future__ import annotations

import math
import time
import uuid
from contextlib import AsyncExitStack, ExitStack, contextmanager, suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import tenacity
from airflow.providers.common.compat.sdk import BaseHook, get_hook_lineage_collector
from requests_toolbelt import MultipartEncoder

from airflow_provider_heygen import api, download, lineage, media, transport, upload
from airflow_provider_heygen.compat import finish_despite_cancellation
from airflow_provider_heygen.connection import HeyGenConnection
from airflow_provider_heygen.exceptions import (
    HeyGenError,
    HeyGenGatewayError,
    HeyGenNotFoundError,
    HeyGenOutcomeUnknownError,
    HeyGenPermanentError,
    HeyGenTransientError,
    retry_delay,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
    from os import PathLike

    import requests
    from airflow.providers.common.compat.sdk import ObjectStoragePath

T = TypeVar("T")

NAMES = ("overdubs", "lipsyncs")  # HeyGen's names for the resource, in the order in which they are tried
# How long after a create request was sent its overdub may still appear; HeyGen's p99 is near 31 s
# (contract, x-timing of createOverdub).
SETTLE_SECONDS = 45.0
# How far from the time of sending an overdub may have been created to be a candidate, by HeyGen's clock.
SEARCH_SECONDS = 300.0
# How exact such times are: all are whole seconds, and a server under load may send an old Date.
CLOCK_NOISE_SECONDS = 5.0
MAX_SEARCH_PAGES = 18  # of the list, for one search for a lost create request, over all its passes
MAX_CANDIDATE_GETS = 40  # of overdubs that have no callback_id there, nearest to the time of sending first
MAX_LISTED_PAGES = 100  # of the list, to see whether an overdub is there
KEY_SECONDS = 23 * 60 * 60  # how long an idempotency key is relied on: HeyGen keeps it for 24 hours
MAX_UPLOAD_URLS = 3  # for one file, when they expire or are refused

# HeyGen's name for the resource, as it was found, by base URL and credential.
_found: dict[Any, str] = {}


def _pause(state: tenacity.RetryCallState) -> float:
    return retry_delay(state.attempt_number, state.outcome.exception() if state.outcome else None)


class HeyGenHook(BaseHook):
    """
    Talk to HeyGen with the credential of an Airflow connection of type ``heygen``.

    Use it as a context manager to close its HTTP session early, or ``async with`` in a triggerer to share
    one session with every other hook of the same settings on that event loop.

    Every method raises :class:`~airflow_provider_heygen.exceptions.HeyGenError`: bad input and wrong settings
    before anything is sent, permanent answers at once, transient ones after ``max_attempts``.

    :param heygen_conn_id: the Airflow connection.
    :param max_attempts: how often a call is tried while the failure is transient. Pauses double from 1 to
        30 s, or last as long as HeyGen's ``Retry-After`` says.
    :param longest_pause: seconds; if HeyGen asks to wait longer, the error is raised at once, for the caller
        to defer. A 429 counts as a wait of one second at least.
    """

    conn_name_attr = "heygen_conn_id"
    default_conn_name = "heygen_default"
    conn_type = "heygen"
    hook_name = "HeyGen"

    def __init__(
        self, heygen_conn_id: str = default_conn_name, *, max_attempts: int = 6, longest_pause: float = 60.0
    ) -> None:
        super().__init__()
        self.heygen_conn_id = heygen_conn_id
        self.max_attempts = max_attempts
        self.longest_pause = longest_pause
        self.created_under: str | None = None
        """The name of the resource under which the overdub was created that this hook is for, if known."""
        self._resolved: HeyGenConnection | None = None
        self._closing = ExitStack()
        self._aclosing: list[AsyncExitStack] = []

    # --- The calls ------------------------------------------------------------------------------------

    def create_overdub(
        self,
        request: api.CreateOverdubRequest | Mapping[str, Any],
        *,
        idempotency_key: str | None = None,
        before_sending: Callable[[], object] | None = None,
    ) -> str:
        """
        Start an overdub and return its id. It costs money when it completes.

        However often the response is lost, one overdub is started: each attempt has the same key, and an
        attempt after a lost response first searches the list for the ``callback_id``, because a server may
        not know the key.

        :param request: a :class:`~airflow_provider_heygen.api.CreateOverdubRequest` or a mapping of its
            fields.
        :param idempotency_key: 1 to 255 of ``A-Z a-z 0-9 _ - : .``; the same key gets the same overdub for
            24 hours, even for another request. Random by default. Also sent as ``callback_id`` unless the
            request has one.
        :param before_sending: called before each attempt, for callers that record what may have been sent,
            and when.
        """
        request = api.CreateOverdubRequest.of(request)
        idempotency_key = str(uuid.uuid4()) if idempotency_key is None else idempotency_key
        if request.callback_id is None:
            request = request.model_copy(update={"callback_id": idempotency_key})
        call = api.create_overdub(request, idempotency_key)
        started_at = sent_at = attempted_at = time.time()
        sent_under = self.resource
        answer_lost = False

        def before() -> None:
            nonlocal attempted_at, sent_under
            if before_sending is not None:
                before_sending()
            attempted_at, sent_under = time.time(), self.resource

        for attempt in self._retrying():
            with attempt:
                try:
                    if answer_lost:
                        found = self.find_created(
                            request, idempotency_key, since=started_at, sent_at=sent_at, sent_under=sent_under
                        )
                        if found is not None:
                            self.log.info(
                                "The response to the create request was lost, but HeyGen started overdub %s."
                                " Using it.",
                                found.overdub_id,
                            )
                            return found.overdub_id
                    return self._send(call, before=before)
                except HeyGenError as error:
                    if error.outcome_unknown and error.code is None:
                        # No word from HeyGen itself: the create request may still be processed.
                        sent_at = attempted_at
                    # Once a response was lost, no later error makes that undone.
                    answer_lost = error.outcome_unknown = answer_lost or error.outcome_unknown
                    raise
        raise AssertionError  # tenacity returns or raises; this tells mypy

    def get_overdub(self, overdub_id: str) -> api.Overdub:
        """Read one overdub. Each response has a new ``video_url``."""
        return self._call(api.get_overdub(overdub_id))

    def list_overdubs(self, limit: int = 10, token: str | None = None) -> api.OverdubPage:
        """
        List one page of overdubs.

        :param limit: how many, 1 to 100.
        :param token: ``next_token`` of the page before.
        """
        return self._call(api.list_overdubs(limit, token))

    def iter_overdubs(self, page_size: int = api.MAX_PAGE_SIZE) -> Iterator[api.Overdub]:
        """
        List all overdubs, each once, page after page as they are consumed.

        :param page_size: how many per request, 1 to 100.
        """
        ids = set()
        for page in self._pages(page_size):
            for overdub in page.data:
                # Pages shift while being read when new jobs arrive; the same row may come again.
                if overdub.overdub_id not in ids:
                    ids.add(overdub.overdub_id)
                    yield overdub

    def _pages(self, page_size: int = api.MAX_PAGE_SIZE) -> Iterator[api.OverdubPage]:
        token: str | None = None
        tokens = set()
        while True:
            page = self.list_overdubs(page_size, token)
            yield page
            token = page.next_token
            if token is None or token in tokens:
                return
            tokens.add(token)

    def is_listed(self, overdub_id: str) -> bool | None:
        """Return whether the list has an overdub; ``None`` if that cannot be determined."""
        try:
            for number, page in enumerate(self._pages(), start=1):
                if any(overdub.overdub_id == overdub_id for overdub in page.data):
                    return True
                if page.next_token is None:
                    return False
                if number == MAX_LISTED_PAGES:
                    break
        except HeyGenError as error:
            self.log.warning("%s", error)
        return None

    def find_created(
        self,
        request: api.CreateOverdubRequest,
        idempotency_key: str,
        *,
        since: float,
        sent_at: float = 0.0,
        sent_under: str | None = None,
    ) -> api.Overdub | None:
        """
        Find the overdub that a create request with a lost response has started.

        HeyGen's list has no filter, so pages are read until their rows are too old. Rows without a
        ``callback_id`` are fetched one by one. Only a certain match is returned. If other candidates remain,
        the result is ``None`` on ``lipsyncs`` as long as HeyGen knows the key: a repeat under it is
        documented to be safe there. Otherwise a repeat might start a second overdub, so this method raises.

        :param request: the create request as it was sent. An author's own ``callback_id`` may be on several
            overdubs and proves nothing.
        :param idempotency_key: its key; also its ``callback_id`` unless the author set one.
        :param since: time of the first attempt, in Unix seconds.
        :param sent_at: time of the last attempt without any response, in Unix seconds. The overdub may
            appear for some time after it, so where the key is not relied on, the search is repeated until
            then.
        :param sent_under: the name of the resource under which that attempt was made.
        :returns: the overdub, or ``None`` if the request may be sent again.
        :raises HeyGenOutcomeUnknownError: if it cannot be determined. Nothing more was sent; a retry
            searches again.
        :raises HeyGenTransientError: if HeyGen cannot be searched now. A retry may succeed.
        """
        sent_under = sent_under or self._fixed_resource or NAMES[0]
        search = _Search(self, request, idempotency_key, since, max(sent_at, since))
        settled_at = sent_at + SETTLE_SECONDS
        delay = 5.0
        while True:
            search.read()
            if search.found is not None:
                return search.found
            # A key is known under the name with which it was sent.
            key_is_known = self.resource == sent_under == "lipsyncs" and time.time() - since < KEY_SECONDS
            left = settled_at - time.time()
            if search.doubts or left <= 0 or key_is_known:
                break
            # The last pass has to come when nothing can appear any more, so the pages are kept for it.
            pause = left if search.pages_left < 2 * search.pages else min(left, delay)
            time.sleep(pause)
            delay *= 2
        if search.doubts and not key_is_known:
            raise HeyGenOutcomeUnknownError(
                "A create request was sent, its response was lost, and it cannot be determined whether it"
                f" started an overdub (candidates: {', '.join(search.doubts[:5])}). Nothing more was sent."
                " Check the candidates in HeyGen. If none belongs to this task, clear the task to send the"
                " request again (before Airflow 3.3: run it with durable=False). Leave callback_id unset, so"
                " that the provider sends a unique one by which it can find an overdub.",
                outcome_unknown=True,
            )
        if sent_under == self.resource or not self._answers_now(sent_under):
            return None
        return self.find_created(request, idempotency_key, since=since, sent_under=sent_under)

    def _answers_now(self, name: str) -> bool:
        """Return whether HeyGen has the resource under a name that returned 404 before, and keep it then."""
        try:
            return _run(self._answers(name, self._once))
        except HeyGenPermanentError as error:
            raise HeyGenTransientError(str(error), outcome_unknown=True) from None

    def update_overdub(self, overdub_id: str, title: str) -> api.Overdub:
        """Rename an overdub."""
        return self._call(api.update_overdub(overdub_id, title))

    def delete_overdub(self, overdub_id: str) -> None:
        """Delete an overdub and its files for good."""
        self._delete(api.delete_overdub(overdub_id))

    def get_asset(self, asset_id: str) -> api.Asset:
        """Read what HeyGen holds of an uploaded file."""
        return self._call(api.get_asset(asset_id))

    def delete_asset(self, asset_id: str) -> None:
        """Delete an uploaded file for good. What this does to an overdub that still reads it is unknown."""
        self._delete(api.delete_asset(asset_id))

    def _delete(self, call: api.Call[None]) -> None:
        lost: list[bool] = []
        for attempt in self._retrying():
            with attempt, _unless_done(lost):
                self._send(call)

    def upload_asset(
        self,
        path: upload.Source | str | PathLike[str] | ObjectStoragePath,
        *,
        idempotency_key: str | None = None,
    ) -> api.Asset:
        """
        Upload one file for use as ``video`` or ``audio``, streamed from where it is.

        Up to 32 MB it goes to HeyGen itself, above that (``lipsyncs`` only) to HeyGen's storage.

        :param path: a local path or any URI that Airflow's ObjectStoragePath understands (``file://``,
            ``s3://conn_id@bucket/key``, ``gs://`` ...): mp4, webm, mp3, wav, png or jpeg.
        :param idempotency_key: 1 to 255 of ``A-Z a-z 0-9 _ - : .``; the same key gets the same asset for
            24 hours, even for another file. Made up when not given.
        """
        source = upload.Source.of(path, self.settings)
        idempotency_key = str(uuid.uuid4()) if idempotency_key is None else idempotency_key
        if source.size > api.MAX_MULTIPART_BYTES:
            return self._upload_directly(source, idempotency_key)
        call = api.upload_asset(idempotency_key)
        for attempt in self._retrying():
            with attempt, source.open() as file:
                # The encoder reads the file while the socket takes it: never all of it in memory.
                form = MultipartEncoder({"file": (source.name, file, source.mime_type)})
                return self._send(call, form=form)
        raise AssertionError

    def _upload_directly(self, source: upload.Source, idempotency_key: str) -> api.Asset:
        key = idempotency_key
        for number in range(1, MAX_UPLOAD_URLS + 1):
            slot = self._call(
                api.create_direct_upload(
                    key,
                    filename=source.name,
                    content_type=source.mime_type,
                    size_bytes=source.size,
                    checksum_sha256=source.digest,
                )
            )
            if slot.max_bytes is not None and source.size > slot.max_bytes:
                raise HeyGenPermanentError(
                    f"{source} has {source.size / 2**20:.1f} MiB, HeyGen takes"
                    f" {slot.max_bytes / 2**20:.1f} MiB. Make it smaller; nothing was uploaded."
                )
            refusal = self._put(source, slot, time.monotonic())
            completion = api.complete_direct_upload(slot.asset_id)
            try:
                # A URL is also refused when an earlier run has used it, and then there is an asset.
                return self._send(completion) if refusal else self._call(completion)
            except HeyGenGatewayError:
                raise
            except HeyGenError as error:
                if not refusal or error.status_code not in (404, 409):
                    raise
            self.log.info("The upload URL of asset %s is no longer good (%s).", slot.asset_id, refusal)
            # The same key would get the same URL again.
            key = str(uuid.uuid5(uuid.NAMESPACE_OID, f"{idempotency_key}/{number}"))
        raise HeyGenTransientError(
            f"HeyGen's storage refused {MAX_UPLOAD_URLS} upload URLs in a row for {source}: {refusal}."
        )

    def _put(self, source: upload.Source, slot: api.DirectUpload, began: float) -> str | None:
        """Send a file to an upload URL; gives what is wrong with the URL, if that is why it did not go."""
        for attempt in self._retrying():
            with attempt:
                life = math.inf if slot.expires_in_seconds is None else slot.expires_in_seconds
                if time.monotonic() - began >= life:
                    return "it has expired"
                with transport.new_session(self.settings, credential=False) as session:
                    return upload.put_file(source, slot, session=session, settings=self.settings)
        raise AssertionError

    def download_overdub(
        self,
        overdub_id: str,
        destination: str | PathLike[str] | ObjectStoragePath,
        *,
        overwrite: bool = False,
    ) -> int:
        """
        Stream the video of a completed overdub to storage, over as many links and connections as it takes.

        :param destination: a local path or any URI that Airflow's ObjectStoragePath understands.
        :param overwrite: replace what is there; otherwise a file of the same size and with the same first MiB
            is kept as it is.
        :returns: its size in bytes.
        """
        path = media.storage_path(destination, "the destination")
        return self._download("video", overdub_id, path, overwrite)

    def download_captions(
        self,
        overdub_id: str,
        destination: str | PathLike[str] | ObjectStoragePath,
        *,
        overwrite: bool = False,
    ) -> int:
        """
        Stream the captions of a completed overdub to storage: :meth:`download_overdub` for its SRT file.

        HeyGen has them under ``lipsyncs`` only (contract, ``caption_url``).
        """
        path = media.storage_path(destination, "the destination of the captions")
        return self._download("captions", overdub_id, path, overwrite)

    def _download(self, what: str, overdub_id: str, path: ObjectStoragePath, overwrite: bool) -> int:
        call = api.get_overdub(overdub_id)

        def fresh_link() -> str:
            overdub = self._send(call).raise_for_failure()
            if not overdub.is_completed:
                raise HeyGenError(
                    f"Overdub {overdub_id} is {overdub.status}, there is no video yet."
                    " Wait for it first, with HeyGenOverdubSensor or wait_for_completion."
                )
            link = overdub.video_url if what == "video" else overdub.caption_url
            if not link:
                # For a short time after completion (third-party report).
                hint = "" if what == "video" else ". HeyGen makes captions under resource 'lipsyncs' only"
                raise HeyGenTransientError(
                    f"Overdub {overdub_id} is completed but has no link to the {what} yet{hint}."
                )
            return link

        size = self._save(fresh_link, path, what, overwrite)
        self._report_lineage(lineage.overdub_uri(overdub_id), media.plain_uri(path))
        return size

    def _save(
        self, fresh_link: Callable[[], str], path: ObjectStoragePath, what: str, overwrite: bool
    ) -> int:
        with transport.new_session(self.settings, credential=False) as session:
            return download.save(
                fresh_link,
                path,
                what=what,
                overwrite=overwrite,
                attempts=self._retrying(),
                session=session,
                settings=self.settings,
                say=self.log.info,
            )

    def fetch(self, link: str, path: ObjectStoragePath, what: str) -> int:
        """Stream the file behind a URL to storage, without the credential; see :func:`.download.save`."""
        return self._save(lambda: link, path, what, True)

    def peek(self, link: str, what: str) -> tuple[bytes, int | None, tuple[str, str] | None]:
        """Read the beginning of the file behind a URL, without the credential; see :func:`.download.peek`."""
        with transport.new_session(self.settings, credential=False) as session:
            return download.peek(
                link, what, attempts=self._retrying(), session=session, settings=self.settings
            )

    def _report_lineage(self, source: str, destination: str) -> None:
        try:
            collector = get_hook_lineage_collector()
            collector.add_input_asset(context=self, uri=source)
            collector.add_output_asset(context=self, uri=destination)
        except Exception as error:  # an Asset may have no name of over 1,500 characters, say
            self.log.warning("Airflow's lineage does not take %s: %s", destination, error)

    def test_connection(self) -> tuple[bool, str]:
        """List one overdub, which is free, and read what the API key may do: Airflow's "Test" button."""
        try:
            page = self._send(api.list_overdubs(1, None))
        except Exception as error:
            # The web UI tests it under a random id.
            named = f"Airflow connection '{self.heygen_conn_id}'"
            return False, str(error).replace(named, "this connection")
        credential = "OAuth token" if self.settings.auth_type == "oauth" else "API key"
        said = [f"HeyGen accepts the {credential}.", f"There are {'' if page.data else 'no '}{self.resource}"]
        said[-1] += "." if page.data else " yet."
        with suppress(HeyGenError):  # an older server, an OAuth token, a key that may not read it
            said += self._send(api.get_api_key()).limits()
        return True, " ".join(said)

    async def aget_overdub(self, overdub_id: str) -> api.Overdub:
        """:meth:`get_overdub` for an event loop."""
        return await self._acall(api.get_overdub(overdub_id))

    async def alist_overdubs(self, limit: int = 10, token: str | None = None) -> api.OverdubPage:
        """:meth:`list_overdubs` for an event loop."""
        return await self._acall(api.list_overdubs(limit, token))

    async def adelete_overdub(self, overdub_id: str) -> None:
        """:meth:`delete_overdub` for an event loop."""
        call, lost = api.delete_overdub(overdub_id), list[bool]()
        async for attempt in self._retrying(tenacity.AsyncRetrying):
            with attempt, _unless_done(lost):
                await self.asend(call)

    # --- Sending --------------------------------------------------------------------------------------

    @property
    def settings(self) -> HeyGenConnection:
        """The connection, resolved once per hook."""
        if self._resolved is None:
            connection = self.get_connection(self.heygen_conn_id)
            self._resolved = HeyGenConnection.from_airflow(connection, HeyGenConnection.extra_of(connection))
        return self._resolved

    async def asettings(self) -> HeyGenConnection:
        """:attr:`settings` for an event loop."""
        if self._resolved is None:
            self._resolved = await finish_despite_cancellation(self._resolve_connection())
        return self._resolved

    async def _resolve_connection(self) -> HeyGenConnection:
        from airflow.providers.common.compat.connection import get_async_connection

        connection = await get_async_connection(self.heygen_conn_id, hook=self)
        return HeyGenConnection.from_airflow(connection, await HeyGenConnection.aextra_of(connection))

    @property
    def known_resource(self) -> str | None:
        """HeyGen's name for the resource: of a past create request, as set, or as found."""
        return self._fixed_resource or _found.get(self._account)

    @property
    def _fixed_resource(self) -> str | None:
        return self.created_under or self.settings.resource

    @property
    def resource(self) -> str:
        """HeyGen's name for the resource, ``overdubs`` unless another is known. Sends no request."""
        return self.known_resource or NAMES[0]

    def assume_resource(self, name: str | None) -> None:
        """Use this name for the resource, found by another process, unless a name is known here."""
        if name and self.known_resource is None:
            _found[self._account] = name

    @property
    def _account(self) -> tuple[object, ...]:
        return (self.settings.base_url, self.settings.auth_header)

    def __enter__(self) -> HeyGenHook:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the HTTP session; the next call opens another."""
        self.__dict__.pop("_session", None)
        self._closing.close()

    async def __aenter__(self) -> HeyGenHook:
        stack = AsyncExitStack()
        await stack.enter_async_context(transport.shared_session(await self.asettings()))
        self._aclosing.append(stack)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._aclosing.pop().aclose()

    def get_conn(self) -> requests.Session:
        """
        Return a session with the proxies and TLS settings of the connection, for HeyGen's other endpoints.

        It sends the credential to the connection's own scheme, host and port only.
        """
        return transport.new_session(self.settings, credential=True)

    @cached_property
    def _session(self) -> requests.Session:
        return self._closing.enter_context(self.get_conn())

    def _retrying(self, kind: Callable[..., Any] | None = None) -> Any:
        return (kind or tenacity.Retrying)(
            retry=tenacity.retry_if_exception(self._is_retryable),
            wait=_pause,
            stop=tenacity.stop_after_attempt(self.max_attempts),
            before_sleep=self._log_pause,
            reraise=True,
        )

    def _is_retryable(self, error: BaseException) -> bool:
        if not isinstance(error, HeyGenTransientError):
            return False
        asked = max(error.retry_after or 0.0, 1.0 if error.status_code == 429 else 0.0)
        return asked <= self.longest_pause

    def _log_pause(self, state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        self.log.warning(
            "%s Trying again in %.0f s (attempt %d of %d).",
            error,
            state.upcoming_sleep,
            state.attempt_number + 1,
            self.max_attempts,
        )

    def _call(self, call: api.Call[T]) -> T:
        result: T = self._retrying()(self._send, call)
        return result

    def _send(
        self,
        call: api.Call[T],
        *,
        form: MultipartEncoder | None = None,
        before: Callable[[], object] = lambda: None,
    ) -> T:
        """Send one call once; ``before`` is called before each request that is not a GET."""

        async def send(named: api.Call[Any]) -> Any:
            if named.method != "GET":
                before()
            return await self._once(named, form)

        return _run(self._under_its_name(call, send))

    async def _once(self, call: api.Call[Any], form: MultipartEncoder | None = None) -> Any:
        return transport.send(self._session, call, self.settings, form)

    async def _acall(self, call: api.Call[T]) -> T:
        result: T = await self._retrying(tenacity.AsyncRetrying)(self.asend, call)
        return result

    async def asend(self, call: api.Call[T]) -> T:
        """Send one call once, for callers that repeat it themselves."""
        settings = await self.asettings()
        return await self._under_its_name(call, lambda named: transport.asend(named, settings))

    # --- HeyGen's name for the resource ---------------------------------------------------------------

    async def _under_its_name(self, call: api.Call[T], send: Callable[[api.Call[Any]], Awaitable[Any]]) -> T:
        """Send a call under the name that the resource has; find out which one, if a 404 asks for it."""
        name = self.resource
        try:
            result: T = await send(call.under(name))
        except HeyGenError as error:
            if not call.is_renamed or error.status_code != 404:
                raise
            # Another call may have found it out meanwhile.
            if self.resource == name and not await self._has_other_name(call, name, error, send):
                raise
            return await send(call.under(self.resource))  # type: ignore[no-any-return]
        if call.is_renamed and self.known_resource is None:
            _found[self._account] = name
        return result

    async def _has_other_name(
        self,
        call: api.Call[Any],
        name: str,
        error: HeyGenError,
        send: Callable[[api.Call[Any]], Awaitable[Any]],
    ) -> bool:
        """
        Return whether the resource turns out to have the other name, which is then kept.

        A 404 page of a gateway proves nothing. So it does not tell whether a create request took effect, and
        for any other call only a second one counts.
        """
        is_heygens = isinstance(error, HeyGenNotFoundError)
        of_collection = is_heygens and call.is_collection
        if self._fixed_resource or (self.known_resource and not of_collection):
            return False
        if call.method == "POST":
            of_content = error.param or error.code == "asset_not_found"
            if self.known_resource or of_content or not is_heygens:
                return False
        elif not of_collection and await self._answers(name, send):
            return False
        if await self._answers(NAMES[1 - NAMES.index(name)], send):
            return True
        error.message += (
            " Neither 'overdubs' nor 'lipsyncs', HeyGen's names for the resource, is known at"
            f" {self.settings.base_url}. Check the host of Airflow connection '{self.heygen_conn_id}'."
        )
        error.args = (error.message,)
        return False

    async def _answers(self, name: str, send: Callable[[api.Call[Any]], Awaitable[Any]]) -> bool:
        """Return whether HeyGen has a collection of that name, which is then kept."""
        try:
            await send(api.list_overdubs(1, None).under(name))
        except HeyGenError as error:
            if error.status_code != 404:
                raise
            return False
        _found[self._account] = name
        return True


def _run(steps: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that awaits nothing but coroutines like it: code for worker and event loop alike."""
    try:
        steps.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    raise AssertionError


@contextmanager
def _unless_done(lost: list[bool]) -> Iterator[None]:
    """Make one attempt at a deletion: once a response was lost, a 404 says that it was done."""
    try:
        yield
    except HeyGenError as error:
        if not (any(lost) and isinstance(error, HeyGenNotFoundError)):
            lost.append(error.outcome_unknown)
            raise


class _Search:
    """
    The search for the overdub of a create request whose response was lost, over several passes.

    :ivar found: the overdub, once it is certain.
    :ivar doubts: ids of overdubs that may be it, or why that cannot be determined.
    :ivar pages: pages that the last pass has read.
    :ivar pages_left: pages that further passes may read.
    """

    def __init__(
        self, hook: HeyGenHook, request: api.CreateOverdubRequest, key: str, first: float, last: float
    ) -> None:
        self.hook, self.title, self.first, self.last = hook, request.title, first, last
        self.marker = request.callback_id or key
        self.unique = self.marker == key
        self.found: api.Overdub | None = None
        self.doubts: list[str] = []
        self.pages, self.pages_left, self.gets_left = 0, MAX_SEARCH_PAGES, MAX_CANDIDATE_GETS
        self._known: dict[str, api.Overdub] = {}
        self._candidates: dict[str, tuple[float, float, api.Overdub]] = {}

    def read(self) -> None:
        """Read the list once, and fetch those that could be the overdub and have no ``callback_id`` there."""
        try:
            self._read()
        except HeyGenPermanentError as error:
            self.doubts = [f"the list cannot be read: {error}"]

    def _read(self) -> None:
        self.doubts, self.pages, whole = [], 0, False
        self._candidates, self._newest_first, self._created_last = {}, True, math.inf
        for page in self.hook._pages():
            self.pages, self.pages_left = self.pages + 1, self.pages_left - 1
            if self._match(page):
                return
            old = self._collect(page)
            # The order of the list is not documented; a whole page of falling times is proof enough.
            whole = page.next_token is None or (
                self._newest_first and old and len(page.data) >= api.MAX_PAGE_SIZE
            )
            if whole or self.pages_left <= 0:
                break
            self._keep_to_rate()
        if not whole:  # too long, or its cursors go in circles
            self.doubts.append("further overdubs, the list is too long to be read to its end")
        for *_, row in sorted(self._candidates.values(), key=lambda candidate: candidate[:2]):
            if self._is_it(row):
                return

    def _collect(self, page: api.OverdubPage) -> bool:
        """Note the rows that could be the overdub; return whether some are too old."""
        # HeyGen's clock may be far off ours; how long ago the request was sent depends on neither.
        offset = 0.0 if page.server_time is None else page.server_time - time.time()
        old = False
        for row in page.data:
            created_at = math.inf if row.created_at is None else row.created_at
            self._newest_first = (
                self._newest_first and created_at <= self._created_last and created_at < math.inf
            )
            self._created_last = created_at
            if created_at < self.first + offset - SEARCH_SECONDS:
                old = True
            elif row.callback_id is None:
                # Of those that are equally near as far as the clocks can tell, the newest comes first.
                distance = max(0.0, abs(created_at - self.last - offset) - CLOCK_NOISE_SECONDS)
                self._candidates[row.overdub_id] = (distance, -created_at, row)
        return old

    def _match(self, page: api.OverdubPage) -> bool:
        """Look for the ``callback_id`` in a page, whatever its rows' age; return whether that is certain."""
        found = [row for row in page.data if row.callback_id == self.marker]
        if found and self.unique:
            self.found = found[0]
            return True
        self.doubts += [row.overdub_id for row in found]
        return False

    def _is_it(self, row: api.Overdub) -> bool:
        """Fetch a row without ``callback_id``; return whether it is certainly the overdub."""
        overdub = self._known.get(row.overdub_id)
        if overdub is None and self.gets_left > 0:
            self.gets_left -= 1
            self._keep_to_rate()
            try:
                overdub = self._known[row.overdub_id] = self.hook.get_overdub(row.overdub_id)
            except HeyGenNotFoundError as error:
                # Just listed and not readable: too fresh, or deleted. The next attempt will know.
                raise HeyGenTransientError(str(error), outcome_unknown=True) from None
        if overdub is None:
            self.doubts.append(row.overdub_id)
        elif overdub.callback_id == self.marker:
            if self.unique:
                self.found = overdub
                return True
            self.doubts.append(row.overdub_id)
        elif overdub.callback_id is None and self.title in (None, overdub.title):
            # HeyGen may give a title of its own to an overdub that has none.
            self.doubts.append(row.overdub_id)
        return False

    def _keep_to_rate(self) -> None:
        time.sleep(1 / self.hook.settings.max_requests_per_second)
