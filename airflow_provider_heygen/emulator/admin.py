"""The emulator's own routes. They need no credential and are not logged."""

from collections import Counter, defaultdict
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict

from airflow_provider_heygen.emulator.state import Fault, Job, StateHere, Status

router = APIRouter(prefix="/emulator")


class ForceJob(BaseModel):
    """Body of PATCH /emulator/jobs/{job_id}."""

    model_config = ConfigDict(extra="forbid")

    status: Status
    failure_message: str | None = None


@router.get("/state")
async def read_state(state: StateHere) -> dict[str, Any]:
    """Return the whole state except the request log."""
    statuses: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for record in state.requests:
        statuses[f"{record.method} {record.route}"][str(record.status)] += 1
    return {
        "requests_by_route": state.requests_by_route,
        "statuses_by_route": statuses,
        "jobs_created": len(state.created),
        "jobs": [_job_state(job) for job in state.created],
        "assets": list(state.assets),
        "faults": state.faults,
        "behaviour": state.behaviour,
    }


@router.delete("/state", status_code=204)
async def reset_state(state: StateHere) -> None:
    """Remove all state, and restore the initial behaviour."""
    state.reset()


@router.get("/requests")
async def read_requests(state: StateHere) -> list[dict[str, Any]]:
    """Return the log of requests."""
    return [asdict(record) for record in state.requests]


@router.patch("/behaviour")
async def change_behaviour(changes: dict[str, Any], state: StateHere) -> dict[str, Any]:
    """Change some settings, or none if one is invalid."""
    state.behaviour.update(changes)
    return state.behaviour.model_dump(mode="json")


@router.post("/faults", status_code=201)
async def add_fault(fault: Fault, state: StateHere) -> Fault:
    """Add a fault."""
    state.faults.append(fault)
    return fault


@router.delete("/faults", status_code=204)
async def clear_faults(state: StateHere) -> None:
    """Remove all faults."""
    state.faults.clear()


@router.patch("/jobs/{job_id}")
async def force_job(job_id: str, body: ForceJob, state: StateHere) -> dict[str, Any]:
    """Set the status of a job, which stays until another is forced."""
    job = state.job(job_id)
    job.force(body.status, body.failure_message)
    return _job_state(job)


def _job_state(job: Job) -> dict[str, Any]:
    names = "id resource status title idempotency_key created_at duration failure_message deleted"
    members = {name: getattr(job, name) for name in [*names.split(), "callback_delivered"]}
    return members | {"request": job.request.model_dump(exclude_unset=True)}
