"""Actor-critic of PPO: policy and value model as one module on a shared base."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel

from align.preference.attention import unwrap_model
from align.reward.model import token_scores
from align.rl.token_stats import to_padded, token_logps_and_entropy
from finetune.training.batch_loss import completion_loss_sum
from finetune.training.head import output_head


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
        # Attention modules of transformers hold their dropout as a plain number, not as nn.Dropout.
        elif "attention_dropout" in vars(module):
            had_dropout = had_dropout or vars(module)["attention_dropout"] > 0
            vars(module)["attention_dropout"] = 0.0
    return had_dropout
