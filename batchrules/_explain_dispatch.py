"""How the calls of a batch are issued, in words."""

from __future__ import annotations

from concurrent.futures import Executor

from batchrules._explain_plan import Plan
from batchrules._host_site import Conduct


def host_dispatch(conduct: Conduct, plan: Plan, *, mapped: bool) -> str:
    """How the host calls of a plan are issued."""
    calls = plan.tally.calls.low
    executor = conduct.dispatch.executor
    if not mapped or calls <= 1:
        return "one call, in the thread that runs the program" if executor is not None else ""
    if executor is None or executor == 1 or conduct.allow_jax:
        return "in order"
    return f"{_workers(executor, calls)}{_tasks(plan)}{_bound(conduct.dispatch.max_in_flight)}"


def _workers(executor: int | Executor, calls: int) -> str:
    if isinstance(executor, Executor):
        return type(executor).__name__
    return f"{min(executor, calls)} threads"


def _tasks(plan: Plan) -> str:
    return ", a task for each call" if plan.choice.vectorised else ", groups of elements"


def _bound(limit: int | None) -> str:
    return "" if limit is None else f", at most {limit} tasks submitted and not finished (max_in_flight)"


def device_dispatch(plan: Plan) -> str:
    """How the device calls of a plan are issued: the compiled program makes them."""
    if plan.tally.calls.low <= 1:
        return "in the compiled program"
    unrolled = plan.choice.method == "sequential_unrolled"
    return "in the compiled program, one after another" if unrolled else "in a loop of the compiled program"
