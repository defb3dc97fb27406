"""The model card (README.md) of a saved adapter or model, filled from the run's record."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from finetune.recipe.checkpoint_folder import describe_steps

CARD_FILE = "README.md"
EMPTY_CARD = "# Model Card for Model ID"
"""Title of PEFT's card, which has headings only."""
SHOWN_PACKAGES = ("llm-align", "torch", "transformers", "peft")
ADAPTER_CODE = """\
```python
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```
"""
MODEL_CODE = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```
"""


def write_model_card(folder: Path, record: Mapping[str, Any]) -> None:
    """Write the card of a folder with an adapter or a model; no absolute path is in it.

    Args:
        folder: the saved adapter or model.
        record: the run's run.json, with its summary.
    """
    file = folder / CARD_FILE
    is_adapter = (folder / "adapter_config.json").is_file()
    saved = record["reload"]
    base = base_name(str(saved["model"]["base"]))
    text = ModelCard.load(file).text if file.is_file() else EMPTY_CARD
    if EMPTY_CARD not in text:
        return  # written already: PEFT puts its empty card into every new folder
    # What loads an adapter of our own types is before it.
    loading = text.partition(EMPTY_CARD)[0].strip()
    code = ADAPTER_CODE if is_adapter else MODEL_CODE
    packages = ("transformers", "peft") if is_adapter else ("transformers",)
    versions = record.get("versions", {})
    data = ModelCardData(base_model=base, library_name=packages[-1], tags=["llm-align", str(record["stage"])])
    install = " ".join(f"{name}=={versions[name]}" for name in packages if name in versions)
    lines = [
        f"# {record['recipe']}: {'adapter' if is_adapter else 'model'} of `llm-align {record['stage']}`",
        *([loading] if loading else []),
        "## Load",
        f"`pip install {install}`. `FOLDER` is the folder of this file.",
        code.strip() if "heads" not in saved else "`align.load_reward(RUN)` loads a reward model.",
        "## Training",
        _table(
            {
                "base": base,
                "template": saved.get("template") or "plain text",
                "precision": f"{saved['precision']}, quantization {saved['quantization']}",
                "steps": describe_steps(record),
                "seed": record.get("seed", ""),
                "data": next(iter(record.get("data", {}).get("lines", [])), ""),
                "versions": ", ".join(
                    f"{name} {versions[name]}" for name in SHOWN_PACKAGES if name in versions
                ),
            }
        ),
        "## Results",
        _table(record.get("summary", {})),
        "All settings with their origins are in the run's `recipe.yaml`.",
    ]
    file.write_text(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(lines) + "\n", encoding="utf-8")


def base_name(base: str) -> str:
    """Return a base's name without the folders of this machine: an absolute path's last part."""
    return Path(base).name if Path(base).expanduser().is_absolute() else base


def _table(rows: Mapping[str, Any]) -> str:
    cells = [f"| {name} | {str(value).replace('|', chr(92) + '|')} |" for name, value in rows.items()]
    return "\n".join(["| | |", "| --- | --- |", *cells])
