r"""More positions than the base was trained with: its rotary frequencies are made slower.

Rotary positions turn pair i of a head's d dimensions by position times theta_i = b^(-2i/d). With L positions
in training, a factor s and s L wanted:

* ``linear``, position interpolation (Chen et al. 2023, arXiv 2306.15595): theta_i / s.
* ``dynamic``, NTK-aware, by length (Peng et al. 2023, arXiv 2309.00071, section 3.3, and transformers): a
  row of l > L tokens has the base b (s l / L - (s - 1))^(d / (d - 2)); up to L tokens nothing changes.
* ``yarn`` (the same paper, section 3): fast pairs (more than 32 turns in L) stay, slow ones (less than 1
  turn) become theta_i / s, those between are mixed, and attention logits grow by (0.1 ln s + 1)^2.
"""

from typing import Any

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from finetune.recipe.errors import Problem, UserError
from finetune.recipe.settings import RopeSettings

ROTARY = ("Llama", "Mistral", "Qwen", "GPT-NeoX")


def stretch(config: PretrainedConfig, rope: RopeSettings | None, *, base: str) -> None:
    """Write a longer context into a model's config, as transformers reads and saves it.

    ``dynamic`` leaves ``max_position_embeddings`` as it is: there it is the L of the formula.

    Raises:
        UserError: the model has no rotary positions, several kinds of them, or already stretched ones.
    """
    if rope is None:
        return
    text = config.get_text_config()
    parameters = _plain_parameters(text, base)
    original = int(text.max_position_embeddings)
    added: dict[str, Any] = {"rope_type": rope.method, "factor": rope.factor}
    if rope.method == "yarn":
        added["original_max_position_embeddings"] = original
    text.rope_parameters = {**parameters, **added}
    if rope.method != "dynamic":
        text.max_position_embeddings = round(original * rope.factor)


def positions(config: PretrainedConfig) -> int:
    """Return how many positions a model has; dynamic ones reach further than the config's number."""
    text = config.get_text_config()
    parameters = text.to_dict().get("rope_parameters") or {}
    dynamic = parameters.get("rope_type") == "dynamic"
    reach: int = round(text.max_position_embeddings * (parameters["factor"] if dynamic else 1.0))
    return reach


def forget_lengths(model: PreTrainedModel) -> None:
    """Let dynamic frequencies depend on the forward pass in hand alone.

    transformers keeps those of the longest row so far, so that a resumed run would not be the uninterrupted
    one. Within a pass the longest row decides for all. Other kinds of positions keep nothing.
    """
    parameters = model.config.get_text_config().to_dict().get("rope_parameters") or {}
    if parameters.get("rope_type") != "dynamic":
        return
    for module in model.modules():
        if "original_inv_freq" in dict(module.named_buffers(recurse=False)):
            module.register_forward_pre_hook(_start_anew)


def _start_anew(module: Any, args: tuple[Tensor, ...]) -> None:
    module.inv_freq = module.original_inv_freq.clone()
    module.max_seq_len_cached = module.original_max_seq_len


def _plain_parameters(text: PretrainedConfig, base: str) -> dict[str, Any]:
    """Return the base's rotary parameters, which nobody has stretched yet."""
    parameters = text.to_dict().get("rope_parameters")
    repair = "leave model.rope out, or take another base"
    if not parameters:
        found = f"{base} ({text.model_type}) has no rotary positions"
        expected = f"a base that has them, such as {', '.join(ROTARY)}"
        raise UserError(Problem("model.rope", found, expected, repair))
    if "rope_type" not in parameters:
        found = f"{base} ({text.model_type}) has other positions in each kind of layer"
        raise UserError(Problem("model.rope", found, "one kind of rotary positions", repair))
    if parameters["rope_type"] != "default":
        found = f"the positions of {base} are stretched already ({_words(parameters)})"
        raise UserError(Problem("model.rope", found, "a base as it was pretrained", repair))
    own: dict[str, Any] = dict(parameters)
    return own


def _words(parameters: dict[str, Any]) -> str:
    factor = parameters.get("factor")
    return f"{parameters['rope_type']}, factor {factor:g}" if factor else str(parameters["rope_type"])
