"""Saving what was trained, and opening it again to see that it is there."""

import hashlib
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune.recipe.errors import Problem, UserError
from finetune.training import apart
from finetune.training.preflight.ticks import some
from finetune.training.run_directory import RunDirectory

ADAPTER_WEIGHTS = "adapter_model.safetensors"


def save_tuned(run: RunDirectory, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Write ``adapter/`` (PEFT's format) or ``model/``, with the tokenizer, in one move.

    All processes must come here, and rank 0 alone writes: weights may lie in parts on all of them.

    Returns:
        The name of the weights' file(s) and their SHA-256, on rank 0.

    Raises:
        UserError: what lies on the disk is not what is in memory.
    """
    name = "adapter" if isinstance(model, PeftModel) else "model"
    write = write_adapter if isinstance(model, PeftModel) else _write_model
    if not run.writes:
        write(model, Path(name), main=False)
        return {}
    with run.replacing(name) as folder:
        live = write(model, folder, main=True)
        (_verify if isinstance(model, PeftModel) else verify_model)(folder, live)
        tokenizer.save_pretrained(str(folder))
        files = sorted(folder.glob("*.safetensors"))
        return {f"{name}/{file.name}": sha256(file) for file in files}


def write_adapter(model: nn.Module, folder: Path, *, main: bool) -> dict[str, torch.Tensor]:
    """Write the adapter if this is rank 0, and return what lies in memory."""
    assert isinstance(model, PeftModel)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    with apart.whole(*trained):  # twice: PEFT runs prompt encoders, behind which ZeRO-3 parts them again
        found = get_peft_model_state_dict(model)
        live = {name: value.detach().cpu().clone() for name, value in found.items()}
    with apart.whole(*trained):
        model.save_pretrained(
            str(folder),
            save_embedding_layers=False,
            selected_adapters=[model.active_adapter],  # a reference may stand beside it
            is_main_process=main,
        )
    return live


def _write_model(model: nn.Module, folder: Path, *, main: bool) -> dict[str, torch.Tensor]:
    """Write the whole model if this is rank 0, and return what lies in memory."""
    assert isinstance(model, PreTrainedModel)
    if not apart.in_parts(model):
        if main:
            model.save_pretrained(str(folder))
        found: dict[str, torch.Tensor] = model.state_dict()
        return found
    live = apart.state_dict(model)
    model.save_pretrained(str(folder), state_dict=live, is_main_process=main)
    return live


def _verify(folder: Path, live: dict[str, torch.Tensor]) -> None:
    """Compare a saved adapter with the one in memory, tensor by tensor."""
    saved = load_file(folder / ADAPTER_WEIGHTS)
    if not saved or saved.keys() != live.keys():
        raise _lost(folder, f"{len(saved)} tensors of the adapter's {len(live)}")
    wrong = [key for key, value in saved.items() if not torch.equal(value, live[key].cpu())]
    if wrong:
        raise _lost(folder, f"other numbers than the trained weights in {some(wrong)}")
    if all(not value.any() for value in saved.values()):
        raise _lost(folder, "zeros alone")


def verify_model(folder: Path, live: dict[str, torch.Tensor]) -> None:
    """Compare the files of a saved model with the one in memory; tied weights are saved once."""
    for file in sorted(folder.glob("*.safetensors")):
        saved = load_file(file)
        wrong = [
            key for key, value in saved.items() if key not in live or not torch.equal(value, live[key].cpu())
        ]
        if wrong or not saved:
            raise _lost(file, f"other numbers than the trained weights in {some(wrong) or 'an empty file'}")


def _lost(where: Path, found: str) -> UserError:
    repair = "look at the free space of the disk; the same command goes on from the last checkpoint"
    return UserError(
        Problem(f"saved weights ({where})", f"holds {found}", "what was trained, tensor by tensor", repair)
    )


def sha256(file: Path) -> str:
    """Return a file's checksum, as run.json has it."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
