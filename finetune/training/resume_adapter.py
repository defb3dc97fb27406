"""Initialize an adapter with the weights of a finished run, to train it further."""

from collections.abc import Collection
from pathlib import Path

import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from finetune.adapters._prompt_model import ENCODER_WEIGHTS_FILE
from finetune.recipe.checkpoint_folder import adapter_folder
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.peft_folder import is_peft_folder
from finetune.recipe.runs import read_finished_record, repeat_repair
from finetune.training.preflight.checks import first_few
from finetune.training.save import ADAPTER_WEIGHTS, adapter_tensors, file_sha256


def load_adapter_weights(model: nn.Module, run: Path, *, new_modules: Collection[str] = ()) -> None:
    """Load a finished run's adapter weights into a new adapter.

    Parameters that only training uses (an MLP that computes a prefix, gates) are loaded too, so that training
    continues where it ended.

    Args:
        model: base with an adapter of the run's settings; what is trainable stays trainable.
        run: the run's folder.
        new_modules: names of modules outside the adapter that the run may lack, such as a score head.

    Raises:
        UserError: the run's files are corrupt or do not fit the adapter.
    """
    assert isinstance(model, PeftModel), "a fully fine-tuned run is a base and has no adapter"
    for name, checksum in read_finished_record(run)["files"].items():
        if file_sha256(run / name) != checksum:
            raise _corrupt_run(run, f"{name}: checksum mismatch")
    folder = adapter_folder(run)
    saved, current = load_file(folder / ADAPTER_WEIGHTS), adapter_tensors(model)
    new = {name for name in current.keys() - saved.keys() if set(new_modules) & set(name.split("."))}
    if mismatched := sorted(saved.keys() ^ current.keys() - new):
        raise _corrupt_run(
            run, f"its tensors and those of an adapter of its settings differ: {first_few(mismatched)}"
        )
    try:
        # With new modules not `load_adapter`: it would expect them in the file.
        if new and not (folder / ENCODER_WEIGHTS_FILE).is_file():
            complete = saved | {name: current[name] for name in new}
            set_peft_model_state_dict(model, complete, adapter_name=model.active_adapter)
        else:
            model.load_adapter(str(folder), model.active_adapter, is_trainable=True)
    except (RuntimeError, OSError, SafetensorError) as error:
        raise _corrupt_run(run, " ".join(str(error).split())[:300]) from error
    current = adapter_tensors(model)
    if differing := sorted(name for name, value in saved.items() if not _is_close(current[name], value)):
        raise _corrupt_run(run, f"loaded weights differ from the saved ones: {first_few(differing)}")


def _is_close(current: torch.Tensor, saved: torch.Tensor) -> bool:
    # Close, not equal: a prompt that an encoder network recomputes differs in its last digits.
    return current.shape == saved.shape and torch.allclose(
        current.detach().float().cpu(), saved.float(), rtol=1e-4, atol=1e-5
    )


def _corrupt_run(run: Path, actual: str) -> UserError:
    repair = repeat_repair(run, read_finished_record(run))
    if is_peft_folder(run):
        repair = "the base that it was trained on: --base FOLDER"
    return UserError(Problem(f"model.init_from {run}", actual, "the adapter that the run saved", repair))
