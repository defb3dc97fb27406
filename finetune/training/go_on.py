"""Initialize an adapter with the weights of a finished run, to train it further."""

from collections.abc import Collection
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from finetune.adapters._prompt_model import ENCODER_WEIGHTS
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.runs import finished_record
from finetune.training.preflight.ticks import some
from finetune.training.save import ADAPTER_WEIGHTS, sha256


def take_weights(model: nn.Module, run: Path, *, head: Collection[str] = ()) -> None:
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
    for name, checksum in finished_record(run)["files"].items():
        if sha256(run / name) != checksum:
            raise _damaged(run, f"{name}: checksum mismatch")
    folder = run / "adapter"
    saved, live = load_file(folder / ADAPTER_WEIGHTS), get_peft_model_state_dict(model)
    new = {name for name in live.keys() - saved.keys() if set(head) & set(name.split("."))}
    if other := sorted(saved.keys() ^ live.keys() - new):
        raise _damaged(run, f"its tensors and those of an adapter of its settings differ: {some(other)}")
    try:
        if new and not (folder / ENCODER_WEIGHTS).is_file():  # load_adapter would expect the head in the file
            whole = saved | {name: live[name] for name in new}
            set_peft_model_state_dict(model, whole, adapter_name=model.active_adapter)
        else:
            model.load_adapter(str(folder), model.active_adapter, is_trainable=True)
    except (RuntimeError, OSError, SafetensorError) as error:
        raise _damaged(run, " ".join(str(error).split())[:300]) from error
    live = get_peft_model_state_dict(model)
    if wrong := sorted(name for name, value in saved.items() if not _equal(live[name], value)):
        raise _damaged(run, f"loaded weights differ from the saved ones: {some(wrong)}")


def _equal(live: torch.Tensor, saved: torch.Tensor) -> bool:
    # Close, not equal: a prompt that an encoder network recomputes differs in its last digits.
    return live.shape == saved.shape and torch.allclose(
        live.detach().float().cpu(), saved.float(), rtol=1e-4, atol=1e-5
    )


def _damaged(run: Path, found: str) -> UserError:
    repair = f"`{finished_record(run)['command']} --force` repeats the run"
    return UserError(Problem(f"model.start {run}", found, "the adapter that the run saved", repair))
