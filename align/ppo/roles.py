"""The trained roles of PPO as one model: the policy, and the value with its own modules on the same base."""

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
    """Tables (episodes, longest completion), 0 behind a completion's end.

    Attributes:
        logps: log pi(y_t | x, y_<t) at the sampling temperature.
        entropies: of the distribution that y_t was drawn from, in nats.
        values: of the state that y_t is drawn in.
        unlikelihood: a scalar, the policy's summed negative log-likelihood of the labels beside them, or 0.
    """

    logps: Tensor
    entropies: Tensor
    values: Tensor
    unlikelihood: Tensor | float = 0.0


class Roles(nn.Module):
    """Policy and value. The library trains, saves and resumes them as one model with their trained weights.

    Each has modules of its own and none is switched, so that a backward pass that recomputes activations
    (gradient checkpointing) recomputes with the adapter of its forward pass.
    """

    def __init__(self, policy: nn.Module, value: nn.Module, *, column: int, temperature: float) -> None:
        """Put two models together.

        Args:
            policy: a causal model in any wrapper.
            value: a scoring model in any wrapper, on the same base or another one.
            column: which of its scores is the value.
            temperature: the policy's, as it samples.
        """
        super().__init__()
        self.policy, self.value = policy, value
        self.column, self.temperature = column, temperature
        self.had_dropout = without_dropout(self)

    def forward(
        self, batch: Mapping[str, Tensor], *, spread: bool, beside: Mapping[str, Tensor] | None = None
    ) -> Outputs:
        """Return what both say of the completions of a ``GroupBatch``, with gradients.

        Whatever is learnt in a step goes through this one call, as wrappers of several processes need it.

        Args:
            batch: lines of completions on the models' device.
            spread: whether entropies are wanted; they are 0 otherwise.
            beside: rows with labels that the policy learns too.
        """
        logps, entropies = policy_tables(self.policy, batch, temperature=self.temperature, spread=spread)
        values = self.values(batch)
        if beside is None:
            return Outputs(logps, entropies, values)
        head = output_head(unwrapped(self.policy))
        return Outputs(logps, entropies, values, completion_loss_sum(self.policy, head, beside))

    def values(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the value of each state that a token of a completion is drawn in, in float32."""
        scores = all_scores(self.value, batch)[..., self.column]
        return as_table(scores[batch["predicts"]][batch["sources"]], batch)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """Return what is trained: the frozen base is in no checkpoint."""
        return {name: weight.detach() for name, weight in self.named_parameters() if weight.requires_grad}

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Take what ``state_dict`` gave; that the base is not in it is as it should be."""
        found = super().load_state_dict(state_dict, strict=False, assign=assign)
        lost = self.state_dict().keys() & set(found.missing_keys)
        assert not lost and not found.unexpected_keys, f"another model's weights: {lost or found}"
        return found._replace(missing_keys=[])

    def activation_checkpointing_enable(self, **settings: Any) -> None:
        """Let both recompute activations in the backward pass."""
        for role in (self.policy, self.value):
            base: PreTrainedModel = unwrapped(role)
            base.activation_checkpointing_enable(**settings)


def without_dropout(model: nn.Module) -> bool:
    """Switch dropout off for good, and tell whether there was any.

    The ratio to the policy that sampled has to begin at 1.

    Huang et al. 2024 (arXiv 2403.17031) train without it for that reason.
    """
    found = False
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            found, module.p = found or module.p > 0, 0.0
        elif "attention_dropout" in vars(module):
            found = found or vars(module)["attention_dropout"] > 0
            vars(module)["attention_dropout"] = 0.0
    return found
