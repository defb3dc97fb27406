"""``llm-align plan``: memory, time and disk of a recipe in a second or two, without loading it."""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from align.cli.arguments import RecipeArguments, recipe_arguments
from align.cli.completion import complete_gpu, complete_strategy
from align.cli.exit_status import DOES_NOT_FIT
from finetune.recipe.recipe import Recipe
from finetune.recipe.terminal import echo_json

if TYPE_CHECKING:
    from align.planner.alternatives import Alternative
    from align.planner.plan import Plan

GPU_HELP = "GPU to plan for: h100, a100-40g, rtx4090, ..., 24GB, or cpu; default: this machine."
STRATEGY_HELP = "Sharding over processes: ddp, zero1, zero2, zero3, fsdp2."
PLAN_EPILOG = """\b
Examples:
  llm-align plan                                       the bundled quickstart, on this machine
  llm-align plan alpaca --gpu rtx4090
  llm-align plan alpaca --base llama-2-70b --adapter qlora --gpu 24GB --gpus 2 --strategy zero3
  llm-align plan ppo/hh --gpu a100-40g --fit
  llm-align plan dpo --compatibility                   supported adapters, bases and strategies
\b
Exit status: 0 fits, 3 does not fit, 2 an error in the recipe or the command.
"""


@click.command("plan", epilog=PLAN_EPILOG)
@recipe_arguments()
@click.option("--gpu", metavar="G", shell_complete=complete_gpu, help=GPU_HELP)
@click.option(
    "--gpus", type=click.IntRange(1), metavar="N", help="Number of GPUs; default: that of the recipe."
)
@click.option("--strategy", metavar="S", shell_complete=complete_strategy, help=STRATEGY_HELP)
@click.option("--fit", is_flag=True, help="List alternative settings, the cheapest that fits first.")
@click.option(
    "--compatibility",
    is_flag=True,
    help="Show the supported combinations of settings and the reasons for the others.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def plan(
    selected: RecipeArguments,
    gpu: str | None,
    gpus: int | None,
    strategy: str | None,
    fit: bool,
    compatibility: bool,
    as_json: bool,
) -> None:
    """Estimate memory, steps, tokens, time and disk space of a recipe; needs no GPU and loads no model."""
    if compatibility:
        from align.planner.compatibility import show_compatibility

        return show_compatibility(selected.resolve_stage()[0], gpu, as_json=as_json)
    settings = {"train.strategy": strategy} if strategy is not None else {}
    recipe = selected.load(settings=settings)
    command = selected.command(*(f"{key}={value}" for key, value in settings.items()))
    if not _print_plan(recipe, gpu, gpus, fit=fit, as_json=as_json, command=command):
        sys.exit(DOES_NOT_FIT)


def _print_plan(
    recipe: Recipe, gpu: str | None, gpus: int | None, *, fit: bool, as_json: bool, command: str
) -> bool:
    """Print the plan and return whether it fits."""
    # Imported here, so that --help does not wait for them.
    from align.planner.alternatives import find_alternatives
    from align.planner.plan import make_plan
    from align.planner.target_device import resolve_for_device, target_device
    from align.planner.terminal import print_alternatives, print_plan
    from finetune.recipe.console import Terminal, error_terminal, working

    device, count = target_device(recipe.settings.train, gpu, gpus)
    with working(error_terminal(), "planning"):
        recipe_plan = make_plan(resolve_for_device(recipe, device, count), device, count)
        alternatives = find_alternatives(recipe_plan, count) if fit else None
    if as_json:
        echo_json(plan_record(recipe_plan, alternatives))
        return recipe_plan.fits
    console = Terminal()
    print_plan(recipe_plan, console, command=command)
    if alternatives is not None:
        print_alternatives(alternatives, recipe_plan, console, command=command)
    elif not recipe_plan.fits:
        console.print("[bold]next[/]     add --fit to list settings that would fit", highlight=False)
    return recipe_plan.fits


def plan_record(plan: "Plan", alternatives: "Sequence[Alternative] | None" = None) -> dict[str, Any]:
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
            "free": plan.device.free,
            "available": plan.available_bytes,
        },
        "processes": workload.processes,
        "strategy": workload.strategy,
        "offload": workload.offload,
        "fits": plan.fits,
        "peak": {"phase": plan.peak.name, "bytes": plan.peak.total, "program": plan.device.program_bytes},
        "phases": [
            {
                "name": phase.name,
                "total": phase.total,
                "host": phase.host,
                "categories": dict(phase.categories),
            }
            for phase in plan.estimate.phases
        ],
        "parameters": {"trained": plan.estimate.trainable, "total": plan.estimate.total},
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


def _alternative_record(alternative: "Alternative") -> dict[str, Any]:
    return {
        "append": alternative.overrides,
        "fits": alternative.plan.fits,
        "peak": alternative.plan.peak.total,
        "micro_batch_size": alternative.plan.micro_batch_size,
        "time": round(alternative.relative_time, 3),
    }
