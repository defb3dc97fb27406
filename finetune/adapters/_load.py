"""Load a saved adapter of any kind, PEFT's or ours; what its model card says about loading."""

from pathlib import Path

from huggingface_hub import ModelCard
from peft import MultitaskPromptTuningConfig, PeftConfig, PeftModel
from transformers import PreTrainedModel

from finetune.adapters import register_peft_types
from finetune.adapters._prompt_model import single_task_model
from finetune.adapters._wrapping import CustomPeftType

CARD_SECTION = """\
## Load this adapter

`{peft_type}` is an adapter type of llm-align. Without llm-align, PEFT raises `KeyError: '{peft_type}'`.

```bash
pip install llm-align
```

These two lines register the type. PEFT and transformers then load the adapter like any other:

```python
from finetune.adapters import register_peft_types
register_peft_types()
```
"""


def load_saved_adapter(base: PreTrainedModel, path: Path) -> PeftModel:
    """Load a saved adapter onto a base, for inference.

    Adapters of PEFT's own types also load with plain ``PeftModel.from_pretrained``.
    """
    register_peft_types()
    config = PeftConfig.from_pretrained(str(path))
    if not isinstance(config, MultitaskPromptTuningConfig):
        return PeftModel.from_pretrained(base, str(path))
    # Random: the weights are loaded below, and the run with the source prompt may no longer exist.
    config.prompt_tuning_init, config.inference_mode = "RANDOM", True
    model = single_task_model(base, config)
    model.load_adapter(str(path), "default")
    return model


def add_loading_instructions(folder: Path, config: PeftConfig) -> None:
    """Add to the card of a saved adapter of our own types what loads it.

    PEFT looks the type up in a table, and has no hook for types that are not in it.
    """
    if isinstance(config.peft_type, CustomPeftType):
        file = folder / "README.md"
        card = ModelCard.load(file)
        section = CARD_SECTION.format(peft_type=config.peft_type.value)
        if section not in card.text:  # PEFT updates a card that is there
            card.text = f"\n{section}\n{card.text.lstrip()}"
            card.save(file)
