"""Actor-critic of PPO: policy and value model as one module on a shared base."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel

from align.preference.attention import unwrapped
from align.reward.model import all_scores
from align.rl.reading import as_table, policy_tables
from finetune.training.completion import completion_loss_sum
from finetune.training.head import output_head


class Outputs(NamedTuple):
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
    unlikelihood: Tensor | float = 0.0


class Roles(nn.Module):
    """Policy and value model, which the Trainer trains, saves and resumes as one module.

    Each has its own modules, and no adapter is switched: gradient checkpointing recomputes activations in the
    backward pass, and must do so with the adapter of the forward pass.
    """

    def __init__(self, policy: nn.Module, value: nn.Module, *, column: int, temperature: float) -> None:
        """Combine two models.

        Args:
            policy: a causal LM in any wrapper.
            value: a sequence-classification model in any wrapper, on the same base or another one.
            head_index: index of the head that is the value.
            temperature: sampling temperature of the policy.
        """
        super().__init__()
        self.policy, self.value = policy, value
        self.column, self.temperature = column, temperature
        self.had_dropout = without_dropout(self)

    def forward(
        self, batch: Mapping[str, Tensor], *, spread: bool, beside: Mapping[str, Tensor] | None = None
    ) -> Outputs:
        """Return log-probabilities, entropies and values of a batch's completions, with gradients.

        Args:
            batch: a ``GroupBatch`` on the models' device.
            with_entropy: whether to compute entropies; they are 0 otherwise.
            pretraining_batch: pretraining rows with labels (PPO-ptx).
        """
        # One forward call for all losses of a step: DDP and DeepSpeed synchronize gradients per call.
        logps, entropies = policy_tables(self.policy, batch, temperature=self.temperature, spread=spread)
        values = self.values(batch)
        if beside is None:
            return Outputs(logps, entropies, values)
        head = output_head(unwrapped(self.policy))
        return Outputs(logps, entropies, values, completion_loss_sum(self.policy, head, beside))

    def values(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the value of the state before each token, (C, T), in float32."""
        # One value head on every state; only the states that predict a completion token are used.
        scores = all_scores(self.value, batch)[..., self.column]
        return as_table(scores[batch["predicts"]][batch["sources"]], batch)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """Return the trained parameters only, so that checkpoints do not hold the frozen base."""
        return {name: weight.detach() for name, weight in self.named_parameters() if weight.requires_grad}

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load trained parameters; the frozen base may be missing."""
        found = super().load_state_dict(state_dict, strict=False, assign=assign)
        lost = self.state_dict().keys() & set(found.missing_keys)
        assert not lost and not found.unexpected_keys, f"checkpoint of another model: {lost or found}"
        # The caller would report the frozen base as missing.
        return found._replace(missing_keys=[])

    def activation_checkpointing_enable(self, **settings: Any) -> None:
        """Turn on gradient checkpointing in both models."""
        for role in (self.policy, self.value):
            base: PreTrainedModel = unwrapped(role)
            base.activation_checkpointing_enable(**settings)


def without_dropout(model: nn.Module) -> bool:
    """Turn dropout off for good. Return whether there was any.

    With dropout the ratio to the sampling policy would not start at 1, which is why Huang et al. 2024
    (arXiv 2403.17031) train without it.
    """
    found = False
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            found, module.p = found or module.p > 0, 0.0
        # Attention modules of transformers hold their dropout as a plain number, not as nn.Dropout.
        elif "attention_dropout" in vars(module):
            found = found or vars(module)["attention_dropout"] > 0
            vars(module)["attention_dropout"] = 0.0
    return found
