"""A plan as JSON data: ``llm-align plan --json``."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from align.planner.alternatives import Alternative
from align.planner.plan import Plan


def plan_record(plan: Plan, alternatives: Sequence[Alternative] | None = None) -> dict[str, Any]:
    """Return a plan, and its alternatives if given, in bytes, tokens and seconds."""
    workload = plan.workload
    content: dict[str, Any] = {
        "stage": plan.recipe.stage,
        "recipe": plan.recipe.name,
        "base": plan.recipe.settings.model.base,
        "device": {
            "name": plan.device.name,
            "kind": plan.device.kind,
            "memory": plan.device.memory,
            "available": plan.available_bytes,
        },
        "processes": workload.processes,
        "strategy": workload.strategy,
        "offload": workload.offload,
        "fits": plan.fits,
        "peak": {"phase": plan.peak.name, "bytes": plan.peak.total},
        "phases": [
            {
                "name": phase.name,
                "total": phase.total,
                "host": phase.host,
                "categories": dict(phase.categories),
            }
            for phase in plan.phases
        ],
        "parameters": {"trained": plan.trainable, "total": plan.total},
        "rows": asdict(plan.lengths),
        "work": None if plan.work is None else asdict(plan.work),
        "seconds": None if plan.time is None else asdict(plan.time),
        "disk": plan.disk,
        "micro_batch_size": plan.micro_batch_size,
        "auto": {key: {"value": value, "reason": reason} for key, (value, reason) in plan.auto.items()},
        "notes": plan.recipe.notes,
    }
    if alternatives is not None:
        content["alternatives"] = [_alternative_record(alternative) for alternative in alternatives]
    return content


def _alternative_record(alternative: Alternative) -> dict[str, Any]:
    return {
        "append": alternative.overrides,
        "fits": alternative.plan.fits,
        "peak": alternative.plan.peak.total,
        "micro_batch_size": alternative.plan.micro_batch_size,
        "time": round(alternative.relative_time, 3),
    }
