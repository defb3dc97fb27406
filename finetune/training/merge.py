"""Merge an adapter into its base: one model that any library loads and the next stage takes as its base."""

from pathlib import Path

from peft.tuners.tuners_utils import BaseTuner
from transformers import AutoTokenizer, PreTrainedModel

from finetune.adapters._load import load_saved_adapter
from finetune.distributed.hardware import detect_hardware
from finetune.recipe import yaml_file
from finetune.recipe.checks import adapter_traits
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.runs import read_generative_record
from finetune.recipe.settings import ModelSettings
from finetune.training.atomic_files import atomic_folder
from finetune.training.model import load_base
from finetune.training.run_directory import MERGED
from finetune.training.save import verify_model


def merge_run(run: Path) -> Path:
    """Write ``RUN/merged``: the base's weights with the adapter's delta added, and the tokenizer.

    Raises:
        UserError: not a finished run, no adapter, or one that cannot be merged.
    """
    saved = read_generative_record(run)["reload"]
    adapter = run / "adapter"
    if not adapter.is_dir():
        raise UserError(
            Problem(str(run), "a run without an adapter", "a run with one", f"use it as it is: --base {run}")
        )
    _check_mergeable(run)
    base = load_base(
        ModelSettings(**saved["model"]),
        precision=saved["precision"],
        quantization=saved["quantization"],
        hardware=detect_hardware(),
    )
    if saved["quantization"] != "none":
        # Dequantize to the very values that the adapter was trained on: it compensates the quantization error
        # (arXiv 2305.14314, section 3).
        base = base.dequantize()
    tuner = load_saved_adapter(base, adapter).base_model
    assert isinstance(tuner, BaseTuner), "an adapter that cannot be merged declares it in its traits"
    merged: PreTrainedModel = tuner.merge_and_unload()
    tokenizer = AutoTokenizer.from_pretrained(str(adapter))
    with atomic_folder(run, MERGED) as folder:
        merged.save_pretrained(str(folder))
        verify_model(folder, merged.state_dict())
        tokenizer.save_pretrained(str(folder))
    return run / MERGED


def _check_mergeable(run: Path) -> None:
    """Raise UserError if the run's adapter declares that it cannot be merged."""
    method = yaml_file.read_yaml(run / "recipe.yaml")[0]["adapter"]["method"]
    if reason := adapter_traits(method).merge_unsupported:
        expected = "an adapter that can be merged into the weights, such as lora"
        actual = f"adapter '{method}': {reason}"
        raise UserError(
            Problem(str(run), actual, expected, "train with another adapter.method, or with full")
        )
