"""The native contender of `benchmarks.ppo`: stage ppo as a user runs it, on what `ppo_work` prepared."""

import copy
import json
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from torch import nn

from align import run
from align.ppo.loading import load_cast
from align.ppo.stage_settings import Settings
from align.ppo.tuning import PpoTuning
from align.ppo.watched import watched
from align.rl.prompts import load_prompts
from benchmarks.common import forget_peak, peak
from benchmarks.ppo_work import as_text, run_recipe
from finetune.recipe.recipe import Recipe
from finetune.training.job import Job
from finetune.training.loading import load_text
from finetune.training.run_directory import RunDirectory
from finetune.training.tune import carry_out

CONTENDERS = ("native", "native-nf4", "four-models")
"""All roles on one base; the same, with a 4-bit base; one full model per role."""


def sections(folder: Path, work: dict[str, Any], contender: str) -> dict[str, dict[str, Any]]:
    """Return the recipe's sections; everything else is our default, which is arXiv 2403.17031's.

    A completion without EOS keeps its score, as with TRL's defaults.
    """
    return {
        "model": {"quantization": "nf4" if contender.endswith("nf4") else "none"},
        "reward": {"sources": str(folder / "runs" / "reward")},
        "sampling": {"max_new_tokens": work["new_tokens"]},
        "ppo": {"rollout_size": work["rollout"], "epochs": work["epochs"], "missing_end": None},
        "train": {
            "epochs": 1,
            "batch_size": work["rollout"],
            "micro_batch_size": work["rollout"],
            "learning_rate": work["learning_rate"],
            "schedule": "linear",
            "warmup": 0,
            "checkpoint_every": 10**6,
        },
        "evaluate": {"samples": 0},
    }


def split(rollouts: list[dict[str, float]], seconds: float) -> dict[str, float]:
    """Return the training time by part; updates are the remainder, the engine's overhead included."""
    found = {part: sum(line[f"seconds_{part}"] for line in rollouts) for part in ("generation", "scoring")}
    return {**found, "updates": seconds - sum(found.values())}


def run_apart(recipe: Recipe) -> None:
    """Run stage ppo with one full model for each of its four roles; they compute the same."""
    settings, quietly = recipe.settings, Console(quiet=True)
    assert isinstance(settings, Settings)
    directory = RunDirectory.of(recipe, force=False)
    job = Job(recipe, directory, quietly, "four models", watched=watched(settings))
    text = load_text(job)
    prompts = load_prompts(job, settings.data, text, room=settings.sampling.max_new_tokens)
    cast = load_cast(job, text)
    policy = cast.policy.model
    for role in (cast.roles.value, *(reward.model for reward in cast.rewards.models)):
        copy_shared(role, policy)
    # For its memory alone: the stage computes reference log-probabilities with the policy's weights.
    reference = copy.deepcopy(policy)
    carry_out(job, PpoTuning(job, text, prompts, cast), conclude=lambda: None)
    assert reference is not policy, "keeps the reference's weights alive"


def copy_shared(role: nn.Module, policy: nn.Module) -> None:
    """Replace the weights that a role shares with the policy by copies."""
    shared = {id(weight) for weight in policy.parameters()}
    copies: dict[int, nn.Parameter] = {}
    for name, weight in list(role.named_parameters(remove_duplicate=False)):
        if id(weight) in shared:
            copied = copies.setdefault(id(weight), nn.Parameter(weight.detach().clone(), requires_grad=False))
            place, _, own = name.rpartition(".")
            role.get_submodule(place).register_parameter(own, copied)
    assert copies, "a role shares no weights with the policy"


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@click.option("--contender", type=click.Choice(CONTENDERS), required=True)
def main(folder: Path, contender: str) -> None:
    """Train as FOLDER/work.json says, and print the measurements on the last line."""
    work = json.loads((folder / "work.json").read_text(encoding="utf-8"))
    number = len(list((folder / "runs").glob(f"{contender}-*")))
    rows = [{"prompt": as_text(ids)} for ids in work["prompts"]]
    forget_peak()
    before = peak()
    done = run_recipe(
        folder,
        "ppo",
        rows,
        sections(folder, work, contender),
        bfloat16=work["bfloat16"],
        name=f"{contender}-{number}",
        runner=run_apart if contender == "four-models" else run,
    )
    highest = peak()
    record = json.loads((done / "run.json").read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in (done / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rollouts = [line for line in lines if "seconds_generation" in line]
    assert record["data"]["longest"] == len(work["prompts"][0]), "prompts have the length of TRL's"
    measured = {
        "seconds": record["seconds"]["train"],
        "peak_memory_gib": round(highest, 3),
        "libraries_gib": round(before, 3),
        "episodes": len(rollouts) * work["rollout"],
        "rollouts": len(rollouts),
        "trainable": record["parameters"]["trained"],
        "new_tokens": sum(line["length"] for line in rollouts) / len(rollouts),
        "split": split(rollouts, record["seconds"]["train"]),
    }
    click.echo(json.dumps(measured))


if __name__ == "__main__":
    main()
