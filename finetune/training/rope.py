r"""RoPE scaling for a longer context than the base was trained with: linear, dynamic NTK, YaRN.

RoPE rotates pair i of a head's d dimensions by position times theta_i = b^(-2i/d). With L positions in
training and a factor s, for s L positions:

* ``linear``, position interpolation (Chen et al. 2023, arXiv 2306.15595): theta_i / s.
* ``dynamic``, NTK-aware, by length (Peng et al. 2023, arXiv 2309.00071, section 3.3, and transformers): a
  row of l > L tokens has the base b (s l / L - (s - 1))^(d / (d - 2)); up to L tokens nothing changes.
* ``yarn`` (the same paper, section 3): fast pairs (more than 32 turns in L) stay, slow ones (less than 1
  turn) become theta_i / s, those between are mixed, and attention logits grow by (0.1 ln s + 1)^2.
"""

from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from finetune.library_internals import recomputes_frequencies, restore_frequencies
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.settings import RopeSettings
from finetune.training.auto_values import NO_POSITION_LIMIT

ROTARY_MODELS = ("Llama", "Mistral", "Qwen", "GPT-NeoX")


def extend_context(config: PretrainedConfig, rope: RopeSettings | None, *, base: str) -> None:
    """Write RoPE scaling into a model's config, in transformers' format.

    Raises:
        UserError: the model has no RoPE, different RoPE per layer type, or already scaled RoPE.
    """
    if rope is None:
        return
    text_config = config.get_text_config()
    parameters = _unscaled_parameters(text_config, base)
    if max_positions(config) == NO_POSITION_LIMIT:
        actual = f"{base} ({text_config.model_type}) has no maximum of positions"
        raise UserError(Problem("model.rope", actual, "a base with one, to be extended", "remove model.rope"))
    original = int(text_config.max_position_embeddings)
    rope_parameters: dict[str, Any] = {"rope_type": rope.method, "factor": rope.factor}
    if rope.method == "yarn":
        rope_parameters["original_max_position_embeddings"] = original
    text_config.rope_parameters = {**parameters, **rope_parameters}
    if rope.method != "dynamic":  # for dynamic, max_position_embeddings is the L of the formula
        text_config.max_position_embeddings = round(original * rope.factor)


def max_positions(config: PretrainedConfig) -> int:
    """Return a model's maximum positions; with dynamic scaling more than ``max_position_embeddings``.

    Without that key there is no limit: ``NO_POSITION_LIMIT``.
    """
    text_config = config.get_text_config()
    # Not every config class has it (BLOOM, Mamba), and XLNet's is -1.
    positions = getattr(text_config, "max_position_embeddings", None)
    if positions is None or positions <= 0:
        return NO_POSITION_LIMIT
    parameters = text_config.to_dict().get("rope_parameters") or {}
    dynamic = parameters.get("rope_type") == "dynamic"
    extended: int = round(positions * (parameters["factor"] if dynamic else 1.0))
    return extended


def reset_dynamic_rope(model: PreTrainedModel) -> None:
    """Reset dynamic RoPE frequencies before each forward pass, so that it does not depend on earlier ones."""
    # transformers caches the frequencies of the longest row so far: a resumed run would differ from an
    # uninterrupted one. Within a pass the longest row decides for all. Other RoPE types have no such cache.
    parameters = model.config.get_text_config().to_dict().get("rope_parameters") or {}
    if parameters.get("rope_type") != "dynamic":
        return
    for module in model.modules():
        if recomputes_frequencies(module):
            module.register_forward_pre_hook(_restore_frequencies)


def _restore_frequencies(module: nn.Module, args: tuple[Tensor, ...]) -> None:
    restore_frequencies(module)


def _unscaled_parameters(text_config: PretrainedConfig, base: str) -> dict[str, Any]:
    """Return the base's RoPE parameters, which must be unscaled."""
    parameters = text_config.to_dict().get("rope_parameters")
    repair = "remove model.rope, or choose another base"
    if not parameters:
        actual = f"{base} ({text_config.model_type}) has no rotary position embeddings (RoPE)"
        expected = f"a base with RoPE, such as {', '.join(ROTARY_MODELS)}"
        raise UserError(Problem("model.rope", actual, expected, repair))
    if "rope_type" not in parameters:
        actual = f"{base} ({text_config.model_type}) has different RoPE parameters per layer type"
        raise UserError(Problem("model.rope", actual, "the same RoPE parameters in all layers", repair))
    if parameters["rope_type"] != "default":
        actual = f"the RoPE of {base} is already scaled ({_describe_scaling(parameters)})"
        raise UserError(Problem("model.rope", actual, "a base without RoPE scaling", repair))
    copy: dict[str, Any] = dict(parameters)
    return copy


def _describe_scaling(parameters: dict[str, Any]) -> str:
    factor = parameters.get("factor")
    return f"{parameters['rope_type']}, factor {factor:g}" if factor else str(parameters["rope_type"])
