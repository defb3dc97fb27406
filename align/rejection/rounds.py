"""The rounds of a run: the policy at the start of each, and its fine-tuning, an SFT run in ``rounds/N``."""

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from align.rejection.selection import Candidate
from align.rejection.settings import Settings
from align.reward.shared_base import copy_sharing_weights, untie_trained_weights
from align.rl.prompts import Prompts
from align.rl.rewards.loading import load_rewards
from align.rl.rewards.rewards import Rewards
from data_templates.segments import Message
from finetune.data.conversation import Conversation
from finetune.data.dataset import Conversations, PreparedData, tokenize_conversations
from finetune.data.row_columns import RowColumns
from finetune.distributed import collectives
from finetune.recipe.discovery import adapter_traits
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.recipe import Recipe
from finetune.recipe.runs import FINISHED, read_run_record, resume_command
from finetune.recipe.settings import EvaluateSettings
from finetune.stages.sft import SFT
from finetune.training.context import RunContext
from finetune.training.loading import (
    FrozenBase,
    add_adapter,
    init_distributed,
    load_frozen_base,
    load_policy,
)
from finetune.training.model import Policy, TextEncoding
from finetune.training.preflight.checks import CheckResult
from finetune.training.run_directory import ROUNDS, RunDirectory
from finetune.training.save import file_sha256
from finetune.training.schedule import SchedulePart
from finetune.training.stage import train


@dataclass
class RoundPolicies:
    """Loads the policy of a round from the weights that the previous round saved, one at a time.

    A resumed run and an uninterrupted one therefore have the same weights.

    Attributes:
        ctx: the run context.
        frozen: the base without an adapter; None if the policy cannot share it.
        rewards: score completions; their reward models share the base.
    """

    ctx: RunContext[Settings]
    frozen: FrozenBase | None
    rewards: Rewards
    _cached: tuple[int, Policy] | None = field(default=None)

    def policy_for_round(self, round_index: int) -> Policy:
        """Return the policy at the start of a round (from 1); in the first round it is the initial policy.

        Raises:
            UserError: the base cannot be loaded, or saved weights are corrupt.
        """
        if self._cached is None or self._cached[0] != round_index:
            self._cached = None  # free its memory before the next one is loaded
            self._cached = (round_index, self._load(round_index))
        return self._cached[1]

    def _load(self, round_index: int) -> Policy:
        ctx = self.ctx
        if round_index > 1:
            ctx = RunContext(
                round_recipe(self.ctx.recipe, self.ctx.run.path, round_index),
                ctx.run,
                ctx.console,
                ctx.command,
            )
        if self.frozen is None:
            return load_policy(ctx)
        # On a copy of the modules: this round's adapter must not stay on the base of the next.
        policy = add_adapter(ctx, replace(self.frozen, base=copy_sharing_weights(self.frozen.base)))
        for other in (self.frozen.base, *(model.model for model in self.rewards.models)):
            untie_trained_weights(other, [policy.model])
        return policy


def load_round_policies(
    ctx: RunContext[Settings], text: TextEncoding, columns: RowColumns | None = None
) -> RoundPolicies:
    """Load the base and the rewards; policies are loaded on demand.

    Raises:
        UserError: the base cannot be loaded, or a reward run is missing or damaged.
    """
    settings = ctx.settings
    traits = adapter_traits(settings.adapter.method)
    # An adapter that rewrites or trains the base weights cannot share them; reward models load their own.
    is_unshared = traits.full_finetuning or traits.changes_base
    frozen = None if is_unshared else load_frozen_base(ctx)
    base = frozen.base if frozen is not None else None
    with ctx.timed("load"):
        rewards = load_rewards(settings.rewards, base=base, tokenizer=text.encoder.tokenizer, columns=columns)
    for note in rewards.notes:
        ctx.log(note)
    return RoundPolicies(ctx, frozen, rewards)


def round_folder(run: Path, round_index: int) -> Path:
    """Return the folder of a round, which is a run itself."""
    return run / ROUNDS / str(round_index)


def round_recipe(recipe: Recipe[Settings], run: Path, round_index: int) -> Recipe[Settings]:
    """Return the recipe of a round: initialized from the previous round, without evaluation."""
    settings = recipe.settings
    # The rejection run evaluates between rounds; a round only trains.
    update: dict[str, Any] = {"evaluate": EvaluateSettings(samples=0)}
    if round_index > 1:
        parent = round_folder(run, round_index - 1)
        model_update: dict[str, Any] = {"init_from": str(parent)}
        # Full fine-tuning saved a model, which is the base of this round.
        if (parent / "model").is_dir():
            model_update |= {"base": str(parent), "revision": None, "rope": None}
        update["model"] = settings.model.model_copy(update=model_update)
    return replace(
        recipe,
        name=f"{recipe.name}, round {round_index}",
        settings=settings.model_copy(update=update),
        out=round_folder(run, round_index),
        notes=[],
    )


def training_rows(
    prompts: Prompts, selected: Mapping[int, Sequence[Candidate]], rounds: Iterable[int]
) -> list[Conversation]:
    """Return prompts with the completions that some rounds selected, without duplicates.

    Args:
        prompts: the training prompts.
        selected: selected completions by round.
        rounds: the rounds to train on.
    """
    rows: dict[tuple[int, str], Conversation] = {}
    for round_index in rounds:
        for candidate in selected[round_index]:
            prompt = prompts[candidate.prompt_index]
            messages = [*prompt.messages, Message("assistant", candidate.text)]
            location = f"{prompt.location}, sampled in round {round_index}"
            # A completion that several rounds sampled is trained on once, as that of the first round.
            rows.setdefault((candidate.prompt_index, candidate.text), Conversation(messages, location))
    return list(rows.values())


def train_round(
    ctx: RunContext[Settings],
    text: TextEncoding,
    policies: RoundPolicies,
    rows: Sequence[Conversation],
    *,
    round_index: int,
) -> None:
    """Fine-tune a round's policy on its rows, or resume; a finished round is left as it is.

    Raises:
        Interrupted: a signal arrived; a checkpoint is saved.
        NotFiniteError: loss or gradient is NaN or infinite.
    """
    recipe = round_recipe(ctx.recipe, ctx.run.path, round_index)
    row_keys = [[list(map(str, row.text_key)), row.location] for row in rows]
    # The fingerprint includes the rows, so a round with other completions is another run.
    content = json.dumps([ctx.run.first_fingerprint, round_index, row_keys])
    fingerprint = hashlib.sha256(content.encode()).hexdigest()
    run = RunDirectory.open(recipe, fingerprint, force=False)
    if run.finished:
        return
    round_ctx = RunContext(
        recipe,
        run,
        ctx.console,
        ctx.command,
        schedule_part=_schedule_part(ctx, round_index),
        callbacks=ctx.callbacks,
    )
    init_distributed(round_ctx)
    with ctx.timed("train"):
        data = _tokenize_rows(rows, text)
        train(round_ctx, SFT(round_ctx, text, data, policies.policy_for_round(round_index)))
    round_ctx.raise_if_interrupted(f"after training of round {round_index}")


def _schedule_part(ctx: RunContext[Settings], round_index: int) -> SchedulePart:
    """Return a round's part of the learning rate schedule: one schedule for all rounds."""
    if round_index == 1:
        return SchedulePart(0, ctx.settings.rejection.rounds)
    first = RunDirectory(round_folder(ctx.run.path, 1), ctx.recipe, "")
    return SchedulePart(round_index - 1, ctx.settings.rejection.rounds, first.record["steps"])


def _tokenize_rows(rows: Sequence[Conversation], text: TextEncoding) -> PreparedData:
    # Earlier replies of a dialogue belong to the prompt: loss on the sampled one alone.
    kind = Conversations(text.encoder, text.max_length, loss_on="last_assistant", overflow="drop")
    return tokenize_conversations(rows, kind)


def last_round(ctx: RunContext[Settings]) -> int:
    """Return the last round of a run; of one that ends early, the last round that is finished.

    Raises:
        UserError: the run shall end early, and no round is finished.
    """
    num_rounds = ctx.settings.rejection.rounds
    if not ctx.finish:
        return num_rounds
    finished = [
        index
        for index in range(1, num_rounds + 1)
        if read_run_record(round_folder(ctx.run.path, index)).get("status") == FINISHED
    ]
    if not finished:
        repair = f"`{resume_command(ctx.run.record)}` resumes it"
        raise UserError(
            Problem(str(ctx.run.path), "no round is finished", "a run with a finished round", repair)
        )
    return max(finished)


def save_last_round(ctx: RunContext[Settings], round_index: int) -> None:
    """Copy the weights of the last round into the run, and record their checksums.

    Raises:
        UserError: the files do not match the round's checksums.
    """
    # One process copies; all record the same checksums.
    files = collectives.broadcast_object(_copy_last_round(ctx, round_index) if ctx.dist.is_main else {})
    ctx.run.update(files=files)
    ctx.check(CheckResult("saved", f"{', '.join(files)} from round {round_index}"))
    if round_index < ctx.settings.rejection.rounds:
        early = {"at": round_index, "of": ctx.settings.rejection.rounds, "unit": "round"}
        ctx.run.update(finished_early=early)


def _copy_last_round(ctx: RunContext[Settings], round_index: int) -> dict[str, str]:
    last = round_folder(ctx.run.path, round_index)
    name = "adapter" if (last / "adapter").is_dir() else "model"
    with ctx.run.atomic_folder(name) as folder:
        shutil.copytree(last / name, folder, dirs_exist_ok=True)
    files: dict[str, str] = RunDirectory(last, ctx.recipe, "").record["files"]
    mismatched = [file for file, checksum in files.items() if file_sha256(ctx.run.path / file) != checksum]
    if mismatched:
        actual = f"checksum mismatch: {', '.join(mismatched)}"
        raise UserError(Problem(str(last), actual, "files as the round saved them", "start over: --force"))
    return files
