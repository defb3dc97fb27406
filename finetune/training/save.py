"""Save the adapter or the model and verify the files against the weights in memory; merge an adapter."""

import hashlib
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTuner
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from finetune.adapters._load import add_loading_instructions, load_saved_adapter
from finetune.distributed import collectives, sharding
from finetune.distributed.hardware import detect_hardware
from finetune.library_internals import checkpoint_state_dict
from finetune.recipe import yaml_file
from finetune.recipe.discovery import adapter_traits
from finetune.recipe.disk import check_free_space
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.runs import read_generative_record
from finetune.recipe.settings import ModelSettings
from finetune.training.atomic_files import atomic_folder
from finetune.training.context import RunContext
from finetune.training.model import Policy, TextEncoding, load_base
from finetune.training.preflight.checks import CheckResult, first_few
from finetune.training.run_directory import MERGED, RunDirectory

ADAPTER_WEIGHTS = "adapter_model.safetensors"


def save_policy(ctx: RunContext, text: TextEncoding, policy: Policy) -> None:
    """Save the adapter (or the model), compare the reloaded file with it, and record its checksums.

    Raises:
        UserError: the saved weights differ from the trained ones.
    """
    files = collectives.broadcast_object(save_trained(ctx.run, policy.model, text.encoder.tokenizer))
    ctx.run.update(files=files)
    ctx.check(CheckResult("saved", f"{', '.join(files)}: reloaded, equal to the trained weights"))


def save_trained(run: RunDirectory, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Write ``adapter/`` (PEFT's format) or ``model/``, with the tokenizer, atomically.

    A collective: every rank must call it (weights may be sharded), and rank 0 writes.

    Returns:
        The names of the weight files and their SHA-256, on rank 0.

    Raises:
        UserError: the files on disk differ from the weights in memory.
    """
    name = "adapter" if isinstance(model, PeftModel) else "model"
    write = write_adapter if isinstance(model, PeftModel) else _write_model
    # The other ranks only take part in the gathers.
    if not run.is_writer:
        write(model, Path(name), main=False)
        return {}
    with run.atomic_folder(name) as folder:
        live = write(model, folder, main=True)
        (_verify_adapter if isinstance(model, PeftModel) else verify_model)(folder, live)
        tokenizer.save_pretrained(str(folder))
        files = sorted(folder.glob("*.safetensors"))
        return {f"{name}/{file.name}": file_sha256(file) for file in files}


def write_adapter(model: nn.Module, folder: Path, *, main: bool) -> dict[str, torch.Tensor]:
    """Write the adapter on rank 0, and return its tensors in memory."""
    assert isinstance(model, PeftModel)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    # Gathered twice: PEFT runs prompt encoders, after which ZeRO-3 shards their weights again.
    with sharding.gathered_params(*trained):
        adapter_state = get_peft_model_state_dict(model)
        live = {name: value.detach().cpu().clone() for name, value in adapter_state.items()}
    with sharding.gathered_params(*trained):
        model.save_pretrained(
            str(folder),
            # PEFT's default looks the base up on the hub, and may add its embeddings to the file.
            save_embedding_layers=False,
            selected_adapters=[model.active_adapter],  # the model may hold a reference adapter too
            is_main_process=main,
        )
    if main:
        add_loading_instructions(folder, model.peft_config[model.active_adapter])
    return live


def _write_model(model: nn.Module, folder: Path, *, main: bool) -> dict[str, torch.Tensor]:
    """Write the full model on rank 0, and return its tensors in memory by their names in the files."""
    assert isinstance(model, PreTrainedModel)
    if not sharding.is_sharded(model):
        if main:
            model.save_pretrained(str(folder))
        return checkpoint_state_dict(model, model.state_dict())
    live = sharding.full_state_dict(model)
    model.save_pretrained(str(folder), state_dict=live, is_main_process=main)
    return checkpoint_state_dict(model, live)


def _verify_adapter(folder: Path, live: dict[str, torch.Tensor]) -> None:
    """Compare a saved adapter with the one in memory, tensor by tensor."""
    saved = load_file(folder / ADAPTER_WEIGHTS)
    if not saved or saved.keys() != live.keys():
        raise _save_error(folder, f"{len(saved)} tensors of the adapter's {len(live)}")
    differing = [key for key, value in saved.items() if not torch.equal(value, live[key].cpu())]
    if differing:
        raise _save_error(folder, f"values unlike the trained weights in {first_few(differing)}")
    if all(not value.any() for value in saved.values()):
        raise _save_error(folder, "only zeros")


def verify_model(folder: Path, live: dict[str, torch.Tensor]) -> None:
    """Compare the files of a saved model with the one in memory; tied weights are saved once."""
    for file in sorted(folder.glob("*.safetensors")):
        saved = load_file(file)
        differing = [
            key for key, value in saved.items() if key not in live or not torch.equal(value, live[key].cpu())
        ]
        if differing or not saved:
            raise _save_error(
                file, f"values unlike the trained weights in {first_few(differing) or 'an empty file'}"
            )


def _save_error(where: Path, actual: str) -> UserError:
    repair = "check the free disk space, then run the same command to resume from the last checkpoint"
    return UserError(Problem(f"saved weights ({where})", f"holds {actual}", "the trained weights", repair))


def file_sha256(file: Path) -> str:
    """Return a file's SHA-256 as in run.json."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def merge_run(run: Path) -> Path:
    """Write ``RUN/merged``: the base's weights with the adapter's delta added, and the tokenizer.

    Raises:
        UserError: not a finished run, no adapter, or one that cannot be merged.
        StorageError: the disk has no room for the merged model.
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
    size = sum(weight.numel() * weight.element_size() for weight in merged.parameters())
    check_free_space(run, size, what="the merged model", repair="free some space, or move the run's folder")
    with atomic_folder(run, MERGED, repair="then merge again") as folder:
        merged.save_pretrained(str(folder))
        verify_model(folder, checkpoint_state_dict(merged, merged.state_dict()))
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
