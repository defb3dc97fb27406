"""Load a finished run, or a base, for inference: model, tokenizer and chat template."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoTokenizer, GenerationConfig

from data_templates.segments import Message
from finetune.adapters._load import load_saved_adapter
from finetune.data.tokens import Encoder
from finetune.distributed.hardware import detect_hardware
from finetune.recipe.checkpoint_folder import adapter_folder, model_folder
from finetune.recipe.peft_folder import is_peft_folder
from finetune.recipe.runs import read_generative_record
from finetune.recipe.settings import ModelSettings
from finetune.training import auto_values
from finetune.training.generation import generate_completions
from finetune.training.loading import resolve_quantization
from finetune.training.model import context_length, load_base, load_tokenizer

QUANTIZATIONS = ("none", "nf4", "int8")
"""In which a base may be stored; others are loaded without quantization."""
TOKENIZER_CONFIG = "tokenizer_config.json"


@dataclass(frozen=True)
class LoadedModel:
    """A trained model with its encoder, ready to generate.

    Attributes:
        model: base and adapter.
        encoder: tokenizer and template of the run.
        context: context length of the model in tokens.
        precision: of the base.
    """

    model: nn.Module
    encoder: Encoder
    context: int
    precision: str

    def reply(
        self,
        prompt: str | Sequence[Message | Mapping[str, str]],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
    ) -> str:
        """Return the model's reply, with the template of its training.

        Args:
            prompt: a question; or the turns of a conversation up to the user's, as messages or as mappings of
                ``role`` and ``content``.
            max_new_tokens: maximum length of the reply; at least half of the context is left to the prompt.
            temperature: 0 is greedy decoding.

        Raises:
            TemplateError: the template cannot render the conversation.
        """
        turns = [Message("user", prompt)] if isinstance(prompt, str) else list(map(_as_message, prompt))
        [completion] = generate_completions(
            self.model,
            self.encoder,
            [turns],
            max_new_tokens=max_new_tokens,
            context=self.context,
            temperature=temperature,
        )
        return completion.text


def _as_message(turn: Message | Mapping[str, str]) -> Message:
    return turn if isinstance(turn, Message) else Message(turn["role"], turn["content"])  # type: ignore[arg-type]


def load_for_generation(run: Path) -> LoadedModel:
    """Load a finished run's model, ready for ``model.generate``: it ends where the template ends a reply.

    Raises:
        UserError: the folder is not a finished run.
    """
    loaded = load_finished_run(run)
    config = loaded.model.generation_config
    assert isinstance(config, GenerationConfig)
    config.eos_token_id, config.pad_token_id = list(loaded.encoder.stop_ids), loaded.encoder.stop_ids[0]
    return loaded


def load_finished_run(run: Path) -> LoadedModel:
    """Load a finished run's model in the precision of its training.

    Raises:
        UserError: the folder is not a finished run.
    """
    saved: dict[str, Any] = read_generative_record(run)["reload"]
    settings = ModelSettings(**saved["model"])
    full_model = model_folder(run)
    if full_model is not None:
        # The saved config contains the RoPE scaling already, and scaling it twice is refused.
        settings = settings.model_copy(update={"base": str(full_model), "revision": None, "rope": None})
    hardware = detect_hardware()
    # An adapter of PEFT does not say in which precision it was trained.
    precision = saved["precision"] or auto_values.precision("auto", hardware)[0]
    base = load_base(settings, precision=precision, quantization=saved["quantization"], hardware=hardware)
    adapter = adapter_folder(run)
    model: nn.Module = base
    if full_model is None:
        model = load_saved_adapter(base, adapter)
    model.eval()
    if is_peft_folder(run) and not (run / TOKENIZER_CONFIG).is_file():
        tokenizer = load_tokenizer(settings)
    else:
        tokenizer = AutoTokenizer.from_pretrained(str(full_model or adapter))
    encoder = Encoder(
        tokenizer,
        saved["template"] or ("tokenizer" if tokenizer.chat_template else "plain"),
        system=saved["system_prompt"],
        control_suffix=saved["control_suffix"],
        template_options=saved.get("template_options"),
    )
    context = context_length(settings) - saved["virtual_tokens"]
    return LoadedModel(model, encoder, context, precision)


def load_base_model(base: str, *, template: str | None = None) -> LoadedModel:
    """Load a base for inference, in bfloat16 where the hardware supports it.

    Args:
        base: short name, Hub id or folder.
        template: name of a template; None: the tokenizer's chat template, or ``plain`` without one.

    Raises:
        UserError: there is no such base, or no such template.
    """
    settings, hardware = ModelSettings(base=base), detect_hardware()
    tokenizer = load_tokenizer(settings)
    name = template or ("tokenizer" if tokenizer.chat_template else "plain")
    encoder = Encoder(tokenizer, name)
    precision, _ = auto_values.precision("auto", hardware)
    quantization, _ = resolve_quantization(settings, QUANTIZATIONS)
    model = load_base(settings, precision=precision, quantization=quantization, hardware=hardware)
    model.eval()
    return LoadedModel(model, encoder, context_length(settings), precision)
