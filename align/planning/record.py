"""A plan as JSON data: ``llm-align plan --json``."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from align.planning.fit import Alternative
from align.planning.plan import Plan


def record(plan: Plan, found: Sequence[Alternative] | None = None) -> dict[str, Any]:
    """Return a plan, and its alternatives if given, in bytes, tokens and seconds."""
    step = plan.step
    content: dict[str, Any] = {
        "stage": plan.recipe.stage,
        "recipe": plan.recipe.name,
        "base": plan.recipe.settings.model.base,
        "device": {
            "name": plan.device.name,
            "kind": plan.device.kind,
            "memory": plan.device.memory,
            "room": plan.room,
        },
        "processes": step.processes,
        "strategy": step.strategy,
        "offload": step.offload,
        "fits": plan.fits,
        "peak": {"phase": plan.peak.name, "bytes": plan.peak.total},
        "phases": [
            {"name": phase.name, "total": phase.total, "host": phase.host, "parts": dict(phase.parts)}
            for phase in plan.phases
        ],
        "parameters": {"trained": plan.trained, "total": plan.total},
        "rows": asdict(plan.lengths),
        "work": None if plan.work is None else asdict(plan.work),
        "seconds": None if plan.seconds is None else asdict(plan.seconds),
        "disk": plan.disk,
        "micro_batch_size": plan.rows,
        "chosen": {key: {"value": value, "why": why} for key, (value, why) in plan.chosen.items()},
        "notes": plan.recipe.notes,
    }
    if found is not None:
        content["alternatives"] = [_alternative(one) for one in found]
    return content


def _alternative(one: Alternative) -> dict[str, Any]:
    return {
        "append": one.words,
        "fits": one.plan.fits,
        "peak": one.plan.peak.total,
        "micro_batch_size": one.plan.rows,
        "time": round(one.time, 3),
    }
