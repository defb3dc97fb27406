"""Going on with a finished run's adapter: its weights, trainable, on its base."""

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
    """Give an adapter that is new on its base the weights of a finished run.

    An adapter whose parameters are more than what it serves with (an MLP that makes a prefix, gates) takes
    all of them, so training goes on where it ended.

    Args:
        model: base with an adapter of the run's settings; what is trainable stays trainable.
        run: the run's folder.
        head: names of modules that stand beside the adapter and may be new, such as a score's.

    Raises:
        UserError: the run's files are not what it wrote, or do not fit.
    """
    assert isinstance(model, PeftModel), "a run that tuned the whole model is a base, and has no adapter"
    for name, checksum in finished_record(run)["files"].items():
        if sha256(run / name) != checksum:
            raise _damaged(run, f"{name} does not have the checksum it was written with")
    folder = run / "adapter"
    saved, live = load_file(folder / ADAPTER_WEIGHTS), get_peft_model_state_dict(model)
    new = {name for name in live.keys() - saved.keys() if set(head) & set(name.split("."))}
    if other := sorted(saved.keys() ^ live.keys() - new):
        raise _damaged(run, f"it and an adapter of its settings do not both have {some(other)}")
    try:
        if new and not (folder / ENCODER_WEIGHTS).is_file():  # PEFT would look for the head in it
            whole = saved | {name: live[name] for name in new}
            set_peft_model_state_dict(model, whole, adapter_name=model.active_adapter)
        else:
            model.load_adapter(str(folder), model.active_adapter, is_trainable=True)
    except (RuntimeError, OSError, SafetensorError) as error:
        raise _damaged(run, " ".join(str(error).split())[:300]) from error
    live = get_peft_model_state_dict(model)
    if wrong := sorted(name for name, value in saved.items() if not _equal(live[name], value)):
        raise _damaged(run, f"{some(wrong)} did not come back as saved")


def _equal(live: torch.Tensor, saved: torch.Tensor) -> bool:
    """Tell whether a tensor is there as saved; one that a network makes anew differs in its last digits."""
    return live.shape == saved.shape and torch.allclose(
        live.detach().float().cpu(), saved.float(), rtol=1e-4, atol=1e-5
    )


def _damaged(run: Path, found: str) -> UserError:
    repair = f"`{finished_record(run)['command']} --force` makes the run anew"
    return UserError(Problem(f"model.start {run}", found, "the adapter that the run saved", repair))
