"""Actor-critic of PPO: policy and value model as one module, on one frozen base with the reward models."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from align.ppo.settings import Settings
from align.reward.model import check_scoring_architecture, non_stop_pad_id, token_scores
from align.reward.shared_base import base_for_scorers, scorer_sharing_base, untie_trained_weights
from align.rl.rewards.loading import load_rewards, reward_runs
from align.rl.rewards.rewards import Rewards
from align.rl.token_stats import to_padded, token_logps_and_entropy
from finetune.adapters.traits import Hooks
from finetune.data.row_columns import RowColumns
from finetune.library_internals import disable_attention_dropout
from finetune.recipe import yaml_file
from finetune.recipe.discovery import adapter_settings, adapter_traits
from finetune.recipe.parent_run import continued_settings
from finetune.recipe.runs import read_finished_record
from finetune.recipe.settings import AdapterSettings
from finetune.training.adapter_hooks import adapter_hooks
from finetune.training.context import RunContext
from finetune.training.loading import add_adapter, load_frozen_base, parent_adapter_run
from finetune.training.loss import completion_loss_sum, output_head
from finetune.training.model import (
    SCORE_HEAD,
    Policy,
    TextEncoding,
    attach_adapter,
    count_parameters,
    unwrap_model,
)
from finetune.training.resume_adapter import load_adapter_weights

DEFAULT_VALUE_ADAPTER = "lora"
"""Adapter of the value model where the policy's adapter does not support a scoring head."""


class ActorCriticOutputs(NamedTuple):
    """Outputs per token, (C, T) = completions x longest completion, 0 after the end of each.

    Attributes:
        logps: log pi(y_t | x, y_<t) at the sampling temperature.
        entropies: entropy of pi(. | x, y_<t), in nats.
        values: V(x, y_<t), the value of the state before y_t.
        pretraining_nll: scalar, the policy's summed NLL of the pretraining labels (PPO-ptx), or 0.
    """

    logps: Tensor
    entropies: Tensor
    values: Tensor
    pretraining_nll: Tensor | float = 0.0


class ActorCritic(nn.Module):
    """Policy and value model, which the Trainer trains, saves and resumes as one module.

    Each has its own modules, and no adapter is switched: gradient checkpointing recomputes activations in the
    backward pass, and must do so with the adapter of the forward pass.
    """

    def __init__(self, policy: nn.Module, value: nn.Module, *, head_index: int, temperature: float) -> None:
        """Combine two models.

        Args:
            policy: a causal LM in any wrapper.
            value: a sequence-classification model in any wrapper, on the same base or another one.
            head_index: index of the head that is the value.
            temperature: sampling temperature of the policy.
        """
        super().__init__()
        self.policy, self.value = policy, value
        self.head_index, self.temperature = head_index, temperature
        # With ZeRO the Trainer reads the hidden size. A copy, because it sets `use_cache` too, and the policy
        # generates with a cache.
        self.config = deepcopy(unwrap_model(policy).config)
        self.had_dropout = disable_dropout(self)

    def forward(
        self,
        batch: Mapping[str, Tensor],
        *,
        with_entropy: bool,
        pretraining_batch: Mapping[str, Tensor] | None = None,
    ) -> ActorCriticOutputs:
        """Return log-probabilities, entropies and values of a batch's completions, with gradients.

        Args:
            batch: a ``GroupBatch`` on the models' device.
            with_entropy: whether to compute entropies; they are 0 otherwise.
            pretraining_batch: pretraining rows with labels (PPO-ptx).
        """
        # One forward call for all losses of a step: DDP and DeepSpeed synchronize gradients per call.
        logps_CT, entropies_CT = token_logps_and_entropy(
            self.policy, batch, temperature=self.temperature, with_entropy=with_entropy
        )
        values_CT = self.values(batch)
        if pretraining_batch is None:
            return ActorCriticOutputs(logps_CT, entropies_CT, values_CT)
        head = output_head(unwrap_model(self.policy))
        return ActorCriticOutputs(
            logps_CT, entropies_CT, values_CT, completion_loss_sum(self.policy, head, pretraining_batch)
        )

    def values(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the value of the state before each token, (C, T), in float32."""
        # The head scores every position: keep the states that predict a token of a completion.
        scores_BT = token_scores(self.value, batch)[..., self.head_index]
        return to_padded(scores_BT[batch["predict_mask"]][batch["state_index"]], batch)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """Return the trained parameters only, so that checkpoints do not hold the frozen base."""
        # Detached, as in `nn.Module.state_dict`: a checkpoint holds no autograd graph.
        return {name: weight.detach() for name, weight in self.named_parameters() if weight.requires_grad}

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load trained parameters; the frozen base may be missing."""
        # strict=False, since `state_dict` leaves out the frozen base; missing trained weights are checked
        # next.
        result = super().load_state_dict(state_dict, strict=False, assign=assign)
        missing = self.state_dict().keys() & set(result.missing_keys)
        assert not missing and not result.unexpected_keys, f"checkpoint of another model: {missing or result}"
        # Trainer would warn that the frozen base is missing.
        return result._replace(missing_keys=[])

    def activation_checkpointing_enable(self, **settings: Any) -> None:
        """Turn on gradient checkpointing in both models."""
        # Trainer calls this on the model it trains: this module, which is no PreTrainedModel itself.
        for model in (self.policy, self.value):
            base: PreTrainedModel = unwrap_model(model)
            base.activation_checkpointing_enable(**settings)


def disable_dropout(model: nn.Module) -> bool:
    """Turn dropout off for good. Return whether there was any.

    With dropout the ratio to the sampling policy would not start at 1, which is why Huang et al. 2024
    (arXiv 2403.17031) train without it.
    """
    had_dropout = False
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            had_dropout, module.p = had_dropout or module.p > 0, 0.0
        else:
            had_dropout = disable_attention_dropout(module) > 0 or had_dropout
    return had_dropout


@dataclass(frozen=True)
class PPOModels:
    """The models of PPO: the policy as stages save it, policy and value as one module, and the rewards."""

    policy: Policy
    actor_critic: ActorCritic
    rewards: Rewards


def load_ppo_models(
    ctx: RunContext[Settings], text: TextEncoding, columns: RowColumns | None = None
) -> PPOModels:
    """Load the base once and attach policy, value and reward models to it.

    Raises:
        UserError: the base cannot be loaded or has no sequence-classification class, an adapter does not fit
            it, or a reward run is missing or damaged.
    """
    settings = ctx.settings
    check_scoring_architecture(settings.model)
    frozen = load_frozen_base(ctx)
    traits = adapter_traits(settings.adapter.method)
    # An adapter that rewrites base weights (PiSSA) must not change the base of value and reward models.
    base = base_for_scorers(frozen.base, changes_base=traits.changes_base)
    rewards = load_rewards(settings.rewards, base=base, tokenizer=text.encoder.tokenizer, columns=columns)
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


def describe_models(models: PPOModels, settings: Settings) -> list[str]:
    """Return the trainable parameters of policy and value, and how the value is initialized, in lines."""
    counts = count_parameters(models.actor_critic)
    policy_trained = count_parameters(models.policy.model).trained
    init_run = value_init_run(settings)
    value_init = "the initial policy with a zero head" if init_run is None else f"{init_run[0]}"
    lines = [
        f"trainable parameters: policy {policy_trained:,}, value {counts.trained - policy_trained:,} "
        f"(initialized from {value_init}); {counts.total:,} in total with the shared base"
    ]
    if models.actor_critic.had_dropout:
        lines.append("dropout is off: the ratio to the sampling policy must start at 1")
    return lines


def actor_critic_hooks(models: PPOModels, settings: Settings, *, steps: int) -> Hooks:
    """Return the adapter's training hooks, with the learning rate factors of the value model."""
    hooks = adapter_hooks(models.policy.model, settings.adapter, steps=steps)
    # The adapter names parameters of the policy, which is a submodule of the actor-critic.
    factors = {f"policy.{name}": factor for name, factor in hooks.lr_factors.items()}
    if settings.ppo.value_learning_rate is not None:
        factor = settings.ppo.value_learning_rate / settings.train.learning_rate
        # Factors relative to train.learning_rate: one optimizer and one schedule for both models.
        names = [name for name, weight in models.actor_critic.named_parameters() if weight.requires_grad]
        factors |= {name: factor for name in names if name.startswith("value.")}
    return replace(hooks, lr_factors=factors)


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
