"""The native contender of `benchmarks.ppo`: stage ppo as a user runs it, on what `ppo_work` prepared."""

import copy
import json
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from torch import nn

from align import run
from align.ppo.settings import Settings
from align.stages import ppo
from benchmarks.common import peak_memory_gib, reset_peak_memory
from benchmarks.ppo_work import as_text, run_recipe
from finetune.recipe.recipe import Recipe
from finetune.training.context import RunContext
from finetune.training.run_directory import RunDirectory
from finetune.training.stage import train

CONTENDERS = ("native", "native-nf4", "four-models")
"""All roles on one base; the same, with a 4-bit base; one full model per role."""


def recipe_sections(folder: Path, work: dict[str, Any], contender: str) -> dict[str, dict[str, Any]]:
    """Return the recipe's sections; everything else is our default, which is arXiv 2403.17031's.

    A completion without EOS keeps its score, as with TRL's defaults.
    """
    return {
        "model": {"quantization": "nf4" if contender.endswith("nf4") else "none"},
        "rewards": {"sources": str(folder / "runs" / "reward")},
        "sampling": {"max_new_tokens": work["new_tokens"]},
        "ppo": {"rollout_size": work["rollout"], "ppo_epochs": work["epochs"], "missing_eos_reward": None},
        "train": {
            "epochs": 1,
            "batch_size": work["rollout"],
            "micro_batch_size": work["rollout"],
            "learning_rate": work["learning_rate"],
            "lr_schedule": "linear",
            "warmup": 0,
            # No checkpoint is written within the timed training.
            "checkpoint_every": 10**6,
        },
        "evaluate": {"samples": 0},
    }


def split_seconds(rollouts: list[dict[str, float]], seconds: float) -> dict[str, float]:
    """Return the training time by part; updates are the remainder, the engine's overhead included."""
    seconds_by_part = {
        phase: sum(metrics[f"time/{phase}"] for metrics in rollouts) for phase in ("generation", "scoring")
    }
    return {**seconds_by_part, "updates": seconds - sum(seconds_by_part.values())}


def run_four_models(recipe: Recipe[Settings]) -> None:
    """Run stage ppo with one full model for each of its four roles; they compute the same."""
    directory = RunDirectory.of(recipe, force=False)
    ctx = RunContext(recipe, directory, Console(quiet=True), "four models")
    method = ppo.build(ctx)
    models = method.models
    policy = models.policy.model
    for role in (models.actor_critic.value, *(reward.model for reward in models.rewards.models)):
        copy_shared_weights(role, policy)
    # For its memory alone: the stage computes reference log-probabilities with the policy's weights.
    reference = copy.deepcopy(policy)
    train(ctx, method)
    assert reference is not policy, "keeps the reference's weights alive"


def copy_shared_weights(role: nn.Module, policy: nn.Module) -> None:
    """Replace the weights that a role shares with the policy by copies."""
    shared_ids = {id(parameter) for parameter in policy.parameters()}
    copies: dict[int, nn.Parameter] = {}
    for name, parameter in list(role.named_parameters(remove_duplicate=False)):
        if id(parameter) in shared_ids:
            # One copy per shared weight, so that tied weights stay tied.
            copied = copies.setdefault(
                id(parameter), nn.Parameter(parameter.detach().clone(), requires_grad=False)
            )
            module_path, _, attribute = name.rpartition(".")
            role.get_submodule(module_path).register_parameter(attribute, copied)
    assert copies, "a role shares no weights with the policy"


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@click.option("--contender", type=click.Choice(CONTENDERS), required=True)
def main(folder: Path, contender: str) -> None:
    """Train as FOLDER/work.json says, and print the measurements on the last line."""
    work = json.loads((folder / "work.json").read_text(encoding="utf-8"))
    run_number = len(list((folder / "runs").glob(f"{contender}-*")))
    rows = [{"prompt": as_text(ids)} for ids in work["prompts"]]
    reset_peak_memory()
    # Before a model is loaded: what Python and the libraries occupy.
    libraries_gib = peak_memory_gib()
    run_dir = run_recipe(
        folder,
        "ppo",
        rows,
        recipe_sections(folder, work, contender),
        bfloat16=work["bfloat16"],
        name=f"{contender}-{run_number}",
        runner=run_four_models if contender == "four-models" else run,
    )
    peak_gib = peak_memory_gib()
    record = json.loads((run_dir / "run.json").read_text(encoding="utf-8"))
    metrics = [
        json.loads(entry) for entry in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    rollouts = [entry for entry in metrics if "time/generation" in entry]
    assert record["data"]["longest"] == len(work["prompts"][0]), "prompts have the length of TRL's"
    measured = {
        "seconds": record["seconds"]["train"],
        "peak_memory_gib": round(peak_gib, 3),
        "libraries_gib": round(libraries_gib, 3),
        "episodes": len(rollouts) * work["rollout"],
        "rollouts": len(rollouts),
        "trainable": record["parameters"]["trained"],
        "new_tokens": sum(entry["val/completion_length"] for entry in rollouts) / len(rollouts),
        "split": split_seconds(rollouts, record["seconds"]["train"]),
    }
    click.echo(json.dumps(measured))


if __name__ == "__main__":
    main()
