"""Merge an adapter into its base's weights; the saved model is reopened and compared with base and adapter.

A merged model has the layers and names that the base's files have, so that every program opens it.
"""

import shlex
from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from finetune.adapters._load import load_saved_adapter
from finetune.library_internals import checkpoint_state_dict
from finetune.recipe import yaml_file
from finetune.recipe.checkpoint_folder import (
    MERGED,
    adapter_folder,
    run_of_checkpoint,
    write_merged_from,
)
from finetune.recipe.discovery import adapter_traits
from finetune.recipe.disk import check_free_space
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.peft_folder import check_peft_mergeable, is_peft_folder
from finetune.recipe.runs import RECIPE_FILE, read_generative_record
from finetune.training.atomic_files import atomic_folder
from finetune.training.inference_files import save_inference_files
from finetune.training.loaded_model import load_finished_run
from finetune.training.model import DTYPES
from finetune.training.model_card import write_model_card
from finetune.training.preflight.checks import CheckResult
from finetune.training.reopen import Difference, Loading, Logits, Probe, logits_difference, reopen_model
from finetune.training.save import verify_model

INT8_LEVELS = 127
MAX_MERGE_BOUND = 0.5
"""In standard deviations: models that have nothing in common differ by 1.4."""


def merge_run(run: Path, *, report: Callable[[CheckResult], None] | None = None) -> Path:
    """Write ``RUN/merged``: the base's weights with the adapter's delta added, and the tokenizer.

    Args:
        run: a finished run, a run's checkpoint, or a folder with an adapter of PEFT.
        report: receives the result of reopening the merged model.

    Returns:
        The folder of the merged model; of a checkpoint, that of its run.

    Raises:
        UserError: not a finished run, no adapter, one that cannot be merged, or the saved model's logits
            are not those of base and adapter.
        StorageError: the disk has no room for the merged model.
    """
    record = read_generative_record(run)
    adapter, home = adapter_folder(run), run_of_checkpoint(run) or run
    if not adapter.is_dir():
        raise UserError(
            Problem(
                str(run),
                "a run without an adapter",
                "a run with one",
                f"use it as it is: --base {shlex.quote(str(run))}",
            )
        )
    _check_mergeable(run)
    loaded, saved = load_finished_run(run), record["reload"]
    assert isinstance(loaded.model, PeftModel)
    # Runs of earlier versions did not record rows.
    rows = record.get("probe_rows") or [loaded.encoder.stop_ids + list(range(16))]
    probe = Probe(rows, loaded.precision)
    trained = probe.logits(loaded.model)
    merged = _merged(loaded.model, adapter, quantized=saved["quantization"] != "none")
    bound = merge_bound(merged, loaded.precision, saved["quantization"])
    in_memory = probe.logits(merged)
    Difference(logits_difference(in_memory, trained), bound).require(run, expected="base with adapter")
    loading = Loading.of(merged, trust_remote_code=saved["model"]["trust_remote_code"])
    size = sum(weight.numel() * weight.element_size() for weight in merged.parameters())
    check_free_space(home, size, what="the merged model", repair="free some space, or move the run's folder")
    with atomic_folder(home, MERGED, repair="then merge again") as folder:
        to_save = merged if saved["quantization"] == "none" else restore_layer_types(merged)
        to_save.save_pretrained(str(folder))
        verify_model(folder, checkpoint_state_dict(to_save, to_save.state_dict()))
        note = save_inference_files(folder, to_save, loaded.encoder)
        write_model_card(folder, record)
        if not is_peft_folder(run):
            write_merged_from(folder, record)
        # Freed before the saved one is loaded.
        del loaded, merged, to_save
        merged_result = check_merged(
            folder, loading, probe, in_memory=in_memory, trained=trained, bound=bound
        )
    if report:
        report(merged_result)
        if note:
            report(report_unsaved_template(note))
    return home / MERGED


def check_merged(
    folder: Path, loading: Loading, probe: Probe, *, in_memory: Logits, trained: Logits, bound: float
) -> CheckResult:
    """Check that the merged model, reopened, has the logits of base with adapter and of the one in memory.

    Args:
        folder: the saved model.
        loading: how it is loaded.
        probe: the rows.
        in_memory: the merged model's logits before it was saved.
        trained: the logits of base with adapter.
        bound: the difference that rounding explains.

    Raises:
        UserError: the logits differ by more.
    """
    reopened = reopen_model(folder, loading, probe)
    Difference(logits_difference(reopened, in_memory), bound).require(folder)
    difference = Difference(logits_difference(reopened, trained), bound)
    difference.require(folder, expected="base with adapter")
    return CheckResult(
        "merged", f"reopened, logits of base with adapter and of the merged model {difference}"
    )


def report_unsaved_template(note: str) -> CheckResult:
    """Report what chat template was saved in place of the base's, or why there is none."""
    return CheckResult("chat template", note, warned=True)


def _merged(model: nn.Module, adapter: Path, *, quantized: bool) -> PreTrainedModel:
    """Return the base with the adapter merged; a quantized base is dequantized first."""
    assert isinstance(model, PeftModel)
    if quantized:
        # Dequantize to the very values that the adapter was trained on: it compensates the quantization error
        # (arXiv 2305.14314, section 3).
        model = load_saved_adapter(model.unload().dequantize(), adapter)
    return merge_adapter(model)


def _check_mergeable(run: Path) -> None:
    """Raise UserError if the run's adapter declares that it cannot be merged."""
    if is_peft_folder(run):
        check_peft_mergeable(run)
        return
    recipe = (run_of_checkpoint(run) or run) / RECIPE_FILE
    method = yaml_file.read_yaml(recipe)[0]["adapter"]["method"]
    if reason := adapter_traits(method).merge_unsupported:
        expected = "an adapter that can be merged into the weights, such as lora"
        actual = f"adapter '{method}': {reason}"
        raise UserError(
            Problem(str(run), actual, expected, "train with another adapter.method, or with full")
        )


def merge_bound(merged: PreTrainedModel, precision: str, quantization: str) -> float:
    """Return the RMS difference that rounding explains between a base with its adapter and the merged model.

    Merging rounds each matrix to its dtype, a relative error of at most eps / 2 in the layer's output, and
    the sum W x + B A x is rounded alike. The errors of N layers are independent and add up to sqrt(N) eps; a
    factor of 4 is for cancellation. Products are summed in float32: with float32 weights the errors of their
    K summands, sqrt(K) eps, count too. LLM.int8 rounds the inputs of each layer to 8 bits.
    """
    sizes = [module.in_features for module in merged.modules() if isinstance(module, nn.Linear)]
    sizes += [module.nx for module in merged.modules() if isinstance(module, Conv1D)]
    eps = torch.finfo(DTYPES[precision]).eps
    if quantization == "int8":
        eps = max(eps, 1 / INT8_LEVELS)
    if precision == "float32":
        eps *= max(sizes) ** 0.5
    return float(min(4 * eps * len(sizes) ** 0.5, MAX_MERGE_BOUND))


def merge_adapter(model: PeftModel) -> PreTrainedModel:
    """Return the base with the adapter merged into its weights, which no longer are tied if it needs that."""
    tuner = model.base_model
    assert isinstance(tuner, BaseTuner), "an adapter that cannot be merged declares it in its traits"
    _untie_adapted_tables(tuner.model)
    merged: PreTrainedModel = tuner.merge_and_unload()
    return merged


def _untie_adapted_tables(base: PreTrainedModel) -> None:
    """Give input embeddings and LM head a weight each, if an adapter changes one of them or each differently.

    PEFT merges in place, so that the product for one of them would also change the other.
    """
    layers = [base.get_input_embeddings(), base.get_output_embeddings()]
    if None in layers or not any(isinstance(layer, BaseTunerLayer) for layer in layers):
        return
    inputs, outputs = (
        layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer for layer in layers
    )
    # Trainable tokens replace the same rows in both, which stay tied.
    if inputs.weight is not outputs.weight or any(
        isinstance(layer, TrainableTokensLayer) for layer in layers
    ):
        return
    outputs.weight = nn.Parameter(inputs.weight.detach().clone(), requires_grad=False)
    for config in (base.config, base.config.get_text_config()):
        config.tie_word_embeddings = False


def restore_layer_types(dequantized: PreTrainedModel) -> PreTrainedModel:
    """Return a dequantized model with its architecture's own layers, to be saved.

    bitsandbytes' layers become ``nn.Linear``, also where the architecture has ``Conv1D`` (GPT-2), whose
    weight is transposed; and transformers cannot invert the renaming of stored 4-bit weights.
    """
    with torch.device("meta"):
        model: PreTrainedModel = type(dequantized)(dequantized.config)
    state = dequantized.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, Conv1D) and isinstance(dequantized.get_submodule(name), nn.Linear):
            state[f"{name}.weight"] = state[f"{name}.weight"].T.contiguous()
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    model.generation_config = dequantized.generation_config
    return model
