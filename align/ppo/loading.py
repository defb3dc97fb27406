"""Load the models of PPO: policy, value and reward models share one frozen base in memory."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from align.ppo.roles import Roles
from align.ppo.stage_settings import Settings
from align.reward.loading import pad_id
from align.reward.model import refuse_without_scores
from align.reward.shared_base import base_for_scorers, own_weights, scorer_on
from align.rl.rewards.loading import load_rewards, reward_runs
from align.rl.rewards.rewards import Rewards
from finetune.recipe import yaml_file
from finetune.recipe.checks import adapter_traits
from finetune.recipe.recipe import adapter_settings
from finetune.recipe.runs import finished_record
from finetune.recipe.settings import AdapterSettings
from finetune.recipe.start import going_on
from finetune.training.go_on import take_weights
from finetune.training.job import Job
from finetune.training.loading import Policy, adapter_start, load_frozen, put_adapter
from finetune.training.model import SCORE, attach_adapter
from finetune.training.text import Text

FRESH = "lora"
"""Adapter of the value model where the policy's adapter does not support a scoring head."""


@dataclass(frozen=True)
class Cast:
    """The models of PPO: the policy as stages save it, policy and value as one module, and the rewards."""

    policy: Policy
    roles: Roles
    rewards: Rewards


def load_cast(job: Job, text: Text) -> Cast:
    """Load the base once and attach policy, value and reward models to it.

    Raises:
        UserError: the base cannot be loaded or has no sequence-classification class, an adapter does not fit
            it, or a reward run is missing or damaged.
    """
    settings = job.recipe.settings
    assert isinstance(settings, Settings)
    refuse_without_scores(settings.model)
    frozen = load_frozen(job)
    traits = adapter_traits(settings.adapter.method)
    # An adapter that rewrites base weights (PiSSA) must not change the base of value and reward models.
    base = base_for_scorers(frozen.base, rewritten=traits.changes_base)
    rewards = load_rewards(settings.reward, base=base, tokenizer=text.encoder.tokenizer)
    for note in rewards.notes:
        job.say(note)
    value, column = _value(settings, base, pad_id(text.encoder.tokenizer, text.encoder.stop_ids))
    # The policy's adapter comes last: value and reward models copy the modules of a base without an adapter.
    policy = put_adapter(job, frozen)
    others = [value, *(model.model for model in rewards.models)]
    # Nor may base weights that the policy trains (full fine-tuning, norms): the others get copies.
    for other in others:
        own_weights(other, [policy.model])
    # The base is frozen: a checkpointed block backpropagates only if its inputs require a gradient.
    if settings.train.gradient_checkpointing:
        value.get_base_model().enable_input_require_grads()  # type: ignore[operator]
    roles = Roles(policy.model, value, column=column, temperature=settings.sampling.temperature)
    return Cast(policy, roles, rewards)


def value_run(settings: Settings) -> tuple[Path, str] | None:
    """Return the reward run and score that initialize the value model; None: the initial policy.

    It is the first reward model with its own adapter (InstructGPT, arXiv 2203.02155, section 3.5).
    """
    if settings.ppo.value_from == "start":
        return None
    for index, run in reward_runs(settings.reward).items():
        if (run / "adapter").is_dir():
            return run, settings.reward.sources[index].score or ""
    return None


def _value(settings: Settings, base: PreTrainedModel, pad: int) -> tuple[nn.Module, int]:
    """Return the value model with its trainable adapter, and the index of its head."""
    found = value_run(settings)
    # New adapter weights depend on the seed alone, not on what was loaded before.
    torch.manual_seed(settings.train.seed)
    if found is None:
        scorer = scorer_on(base, ["value"], pad_id=pad)
        own, start = _fresh(settings.adapter), adapter_start(settings.model)
        value = attach_adapter(scorer, own)
        # Like the policy, the value starts from the parent run's adapter; its head is zeros.
        if start is not None and own == settings.adapter:
            take_weights(value, start, head=(SCORE,))
        return value, 0
    run, score = found
    heads = finished_record(run)["load"]["heads"]
    content = yaml_file.read(run / "recipe.yaml")[0]["adapter"]
    own = going_on(adapter_settings(content["method"]).model_validate(content))
    value = attach_adapter(scorer_on(base, heads, pad_id=pad), own)
    take_weights(value, run, head=(SCORE,))
    # A rule's score or the total is no head of the model: take the first one.
    return value, heads.index(score) if score in heads else 0


def _fresh(adapter: AdapterSettings) -> AdapterSettings:
    """Return the policy's adapter settings, or plain LoRA if that adapter cannot score or share the base."""
    traits = adapter_traits(adapter.method)
    unfit = traits.scores or traits.whole_model or traits.changes_base
    return adapter_settings(FRESH)() if unfit else adapter
