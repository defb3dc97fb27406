"""Load the models of PPO: policy, value and reward models share one frozen base in memory."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from align.ppo.actor_critic import ActorCritic
from align.ppo.stage_settings import Settings
from align.reward.loading import non_stop_pad_id
from align.reward.model import check_scoring_architecture
from align.reward.shared_base import base_for_scorers, scorer_sharing_base, untie_trained_weights
from align.rl.rewards.loading import load_rewards, reward_runs
from align.rl.rewards.rewards import Rewards
from finetune.recipe import yaml_file
from finetune.recipe.checks import adapter_traits
from finetune.recipe.parent_run import continued_settings
from finetune.recipe.recipe import adapter_settings
from finetune.recipe.runs import read_finished_record
from finetune.recipe.settings import AdapterSettings
from finetune.training.context import RunContext
from finetune.training.loading import add_adapter, load_frozen_base, parent_adapter_run
from finetune.training.model import SCORE_HEAD, Policy, attach_adapter
from finetune.training.resume_adapter import load_adapter_weights
from finetune.training.text_encoding import TextEncoding

DEFAULT_VALUE_ADAPTER = "lora"
"""Adapter of the value model where the policy's adapter does not support a scoring head."""


@dataclass(frozen=True)
class PPOModels:
    """The models of PPO: the policy as stages save it, policy and value as one module, and the rewards."""

    policy: Policy
    actor_critic: ActorCritic
    rewards: Rewards


def load_ppo_models(ctx: RunContext, text: TextEncoding) -> PPOModels:
    """Load the base once and attach policy, value and reward models to it.

    Raises:
        UserError: the base cannot be loaded or has no sequence-classification class, an adapter does not fit
            it, or a reward run is missing or damaged.
    """
    settings = ctx.recipe.settings
    assert isinstance(settings, Settings)
    check_scoring_architecture(settings.model)
    frozen = load_frozen_base(ctx)
    traits = adapter_traits(settings.adapter.method)
    # An adapter that rewrites base weights (PiSSA) must not change the base of value and reward models.
    base = base_for_scorers(frozen.base, changes_base=traits.changes_base)
    rewards = load_rewards(settings.rewards, base=base, tokenizer=text.encoder.tokenizer)
    for note in rewards.notes:
        ctx.log(note)
    value_model, head_index = _build_value_model(
        settings, base, non_stop_pad_id(text.encoder.tokenizer, text.encoder.stop_ids)
    )
    # The policy's adapter comes last: value and reward models copy the modules of a base without an adapter.
    policy = add_adapter(ctx, frozen)
    other_models = [value_model, *(model.model for model in rewards.models)]
    # Nor may base weights that the policy trains (full fine-tuning, norms): the others get copies.
    for other in other_models:
        untie_trained_weights(other, [policy.model])
    # The base is frozen: a checkpointed block backpropagates only if its inputs require a gradient.
    if settings.train.gradient_checkpointing:
        value_model.get_base_model().enable_input_require_grads()  # type: ignore[operator]
    actor_critic = ActorCritic(
        policy.model, value_model, head_index=head_index, temperature=settings.sampling.temperature
    )
    return PPOModels(policy, actor_critic, rewards)


def value_init_run(settings: Settings) -> tuple[Path, str] | None:
    """Return the reward run and score that initialize the value model; None: the initial policy.

    It is the first reward model with its own adapter (InstructGPT, arXiv 2203.02155, section 3.5).
    """
    if settings.ppo.value_init == "policy":
        return None
    for index, run in reward_runs(settings.rewards).items():
        if (run / "adapter").is_dir():
            return run, settings.rewards.sources[index].score or ""
    return None


def _build_value_model(settings: Settings, base: PreTrainedModel, pad_token_id: int) -> tuple[nn.Module, int]:
    """Return the value model with its trainable adapter, and the index of its head."""
    init_run = value_init_run(settings)
    # New adapter weights depend on the seed alone, not on what was loaded before.
    torch.manual_seed(settings.train.seed)
    if init_run is None:
        scorer = scorer_sharing_base(base, ["value"], pad_id=pad_token_id)
        value_adapter, parent_adapter = (
            _value_adapter_settings(settings.adapter),
            parent_adapter_run(settings.model),
        )
        value_model = attach_adapter(scorer, value_adapter)
        # Like the policy, the value starts from the parent run's adapter; its head is zeros.
        if parent_adapter is not None and value_adapter == settings.adapter:
            load_adapter_weights(value_model, parent_adapter, new_modules=(SCORE_HEAD,))
        return value_model, 0
    run, score = init_run
    heads = read_finished_record(run)["reload"]["heads"]
    adapter_content = yaml_file.read_yaml(run / "recipe.yaml")[0]["adapter"]
    value_adapter = continued_settings(
        adapter_settings(adapter_content["method"]).model_validate(adapter_content)
    )
    value_model = attach_adapter(scorer_sharing_base(base, heads, pad_id=pad_token_id), value_adapter)
    load_adapter_weights(value_model, run, new_modules=(SCORE_HEAD,))
    # A rule's score or the total is no head of the model: take the first one.
    return value_model, heads.index(score) if score in heads else 0


def _value_adapter_settings(adapter: AdapterSettings) -> AdapterSettings:
    """Return the policy's adapter settings, or plain LoRA if that adapter cannot score or share the base."""
    traits = adapter_traits(adapter.method)
    unsupported = traits.scoring_unsupported or traits.full_finetuning or traits.changes_base
    return adapter_settings(DEFAULT_VALUE_ADAPTER)() if unsupported else adapter
