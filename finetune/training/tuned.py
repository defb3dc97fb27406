"""Load a finished run for inference: base, adapter, tokenizer and chat template."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoTokenizer

from finetune.adapters._load import open_adapter
from finetune.data.tokens import Encoder
from finetune.planning.hardware import detect
from finetune.recipe.runs import record_of_writer
from finetune.recipe.settings import ModelSettings
from finetune.training.model import context_length, load_base


@dataclass(frozen=True)
class Tuned:
    """A trained model with its encoder, ready to generate."""

    model: nn.Module
    encoder: Encoder
    context: int


def load_tuned(run: Path) -> Tuned:
    """Load a finished run's model in the precision of its training.

    Raises:
        UserError: the folder is not a finished run.
    """
    load: dict[str, Any] = record_of_writer(run)["load"]
    settings = ModelSettings(**load["model"])
    whole = run / "model"
    if whole.is_dir():
        # The saved config holds the RoPE scaling already; scaling it a second time would be refused.
        settings = settings.model_copy(update={"base": str(whole), "revision": None, "rope": None})
    hardware = detect()
    base = load_base(
        settings, precision=load["precision"], quantization=load["quantization"], hardware=hardware
    )
    adapter = run / "adapter"
    model: nn.Module = base
    if not whole.is_dir():
        model = open_adapter(base, adapter)
    model.eval()
    tokenizer = AutoTokenizer.from_pretrained(str(whole if whole.is_dir() else adapter))
    encoder = Encoder(tokenizer, load["template"], system=load["system"], wish=load.get("wish", ""))
    return Tuned(model, encoder, context_length(settings) - load["virtual_tokens"])
