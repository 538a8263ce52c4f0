"""
Exceptions that state facts, and the delay after a failure.

An exception states who responded and whether the request took effect. The operators decide what follows: a
rejected create request fails the task, a rejected poll does not end the wait.
"""

from __future__ import annotations

import random
from dataclasses import KW_ONLY, dataclass
from typing import Any

from airflow.providers.common.compat.sdk import AirflowException, AirflowFailException

MAX_RETRY_AFTER = 900.0
"""The longest ``Retry-After`` that is honoured, in seconds: no header may stop a connection for longer."""


@dataclass(eq=False, repr=False)
class HeyGenError(AirflowException):
    """
    Base class of all exceptions about HeyGen.

    The attributes quote HeyGen (contract, ``error`` envelope); each is ``None`` without a value from HeyGen.

    :param message: what happened and what to do next, without credentials and presigned URLs.
    :param status_code: HTTP status; ``None`` if there was no response (network fault, bad input).
    :param code: HeyGen's error code, an open set, such as ``rate_limit_exceeded``.
    :param param: the request field that HeyGen rejects.
    :param doc_url: HeyGen's page about the code.
    :param request_id: ``X-Request-Id``, to quote to HeyGen's support.
    :param retry_after: seconds that HeyGen asked to wait.
    :param outcome_unknown: whether the request may have taken effect although its response was lost or came
        from a gateway. Search for the overdub before you repeat a create request.
    :param overdub_id: the overdub, if known.
    :param no_slot: whether HeyGen returned 429 to a create request. A 429 to an upload has other causes.
    """

    message: str
    _: KW_ONLY
    status_code: int | None = None  # type: ignore[assignment]  # Airflow's own is always 500
    code: str | None = None
    param: str | None = None
    doc_url: str | None = None
    request_id: str | None = None
    retry_after: float | None = None
    outcome_unknown: bool = False
    overdub_id: str | None = None
    no_slot: bool = False

    def __post_init__(self) -> None:
        super().__init__(self.message)


class HeyGenTransientError(HeyGenError):
    """A fault that is likely to pass: 429, 5xx, a network fault, an unreadable response."""


class HeyGenGatewayError(HeyGenTransientError):
    """
    An error response without HeyGen's envelope: a gateway, proxy or firewall responded instead of HeyGen.

    HeyGen documents ``error.code`` and ``error.message`` in every error response. A response without them
    proves nothing about the request, for any status.
    """


class HeyGenUnreachableError(HeyGenTransientError):
    """The request was never sent: no connection, no TLS, or the proxy refused."""


class HeyGenPermanentError(HeyGenError):
    """HeyGen rejected the request and would do so again. This does not affect an overdub that runs."""


class HeyGenBadInputError(HeyGenPermanentError, ValueError):
    """The provider rejected a field, a file or a connection setting before it sent a request."""


class HeyGenNotFoundError(HeyGenPermanentError):
    """HeyGen returned 404 with its envelope: this credential has no such overdub or asset."""


class HeyGenOverdubFailedError(HeyGenPermanentError):
    """The overdub is final with status ``failed``; the message quotes HeyGen's ``failure_message``."""


class HeyGenOutcomeUnknownError(HeyGenError):
    """A create request may have started an overdub, and a repeat could start a second one."""


class HeyGenOverdubTimeoutError(HeyGenError):
    """The wait has timed out. The overdub keeps running and may still complete (and be billed)."""


class HeyGenTriggerEventError(HeyGenError):
    """A deferred task was resumed with an event that :class:`.HeyGenOverdubTrigger` never sends."""


class HeyGenTaskFailedError(HeyGenError, AirflowFailException):
    """The task fails without a retry, because a retry would fail again or cost money; see ``__cause__``."""

    @classmethod
    def of(cls, error: HeyGenError) -> HeyGenTaskFailedError:
        """Return the exception that fails a task, with the message and the attributes of its cause."""
        failure = cls(error.message)
        failure.__dict__.update(error.__dict__)
        return failure


def validation_problems(error: Any, place: str = "{}") -> str:
    """Return what pydantic's ValidationError reports, without any value; ``place`` formats a field's name."""
    return "; ".join(
        f"{place.format(*problem['loc'][:1] or ['request'])}: {problem['msg'].removeprefix('Value error, ')}"
        for problem in error.errors(include_input=False, include_url=False)
    )


def retry_delay(
    failures: int, error: BaseException | None = None, *, first: float = 1.0, longest: float = 30.0
) -> float:
    """
    Return the delay in seconds after a failure: at least what HeyGen asked for, and at most 15 minutes.

    :param failures: consecutive failures so far, from 1.
    :param error: the last failure; its ``retry_after`` applies.
    :param first: delay after the first failure, in seconds; doubles with each further failure.
    :param longest: longest delay, in seconds, unless HeyGen asks for more.
    """
    backoff = min(first * 2.0 ** min(failures - 1, 30), max(first, longest))
    asked = getattr(error, "retry_after", None) or 0.0
    # Jitter spreads requests that failed together; it never shortens what HeyGen asked for.
    return min(max(backoff, asked) * random.uniform(1.0, 1.25), max(MAX_RETRY_AFTER, first))  # noqa: S311
