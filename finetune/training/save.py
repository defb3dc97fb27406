"""Save the adapter or the model, and compare the files with the model in memory.

First tensor by tensor, then by the logits of the reopened files (``reopen``). Checkpoints are compared by
tensors only, when they are read.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from finetune.adapters._load import add_loading_instructions
from finetune.data.tokens import Encoder
from finetune.distributed import collectives, sharding
from finetune.distributed.strategies import SHARDED_WEIGHTS
from finetune.library_internals import checkpoint_state_dict
from finetune.recipe.console import working
from finetune.recipe.errors import Problem, UserError
from finetune.training.context import RunContext
from finetune.training.inference_files import save_inference_files
from finetune.training.model import Policy, TextEncoding, unwrap_model
from finetune.training.preflight.checks import CheckResult, first_few
from finetune.training.reopen import (
    Difference,
    Loading,
    Probe,
    logits_difference,
    reopen_adapter,
    reopen_model,
    reopening_unsupported,
)

ADAPTER_WEIGHTS = "adapter_model.safetensors"


def save_policy(
    ctx: RunContext, text: TextEncoding, policy: Policy, probe_rows: Sequence[Sequence[int]]
) -> None:
    """Save the adapter (or the model), compare the reopened files with it, and record their checksums.

    A collective: every rank must call it (weights may be sharded), and rank 0 writes.

    Args:
        ctx: context of the run.
        text: tokenizer and template.
        policy: the trained model.
        probe_rows: token ids of a few rows of the run, on which logits are compared.

    Raises:
        UserError: the saved weights differ from the trained ones.
    """
    if ctx.run.is_writer:
        with working(ctx.console, "saving, and reading back what was saved"):
            saved = _save(ctx, text.encoder, policy, probe_rows)
    else:  # the other ranks only take part in the gathers, and wait for rank 0
        _writer(policy.model)(policy.model, Path(_saved_name(policy.model)), main=False)
        saved = None
    saved = collectives.broadcast_object(saved)
    assert saved is not None, "rank 0 saves"
    ctx.run.update(files=saved.files, probe_rows=[list(row) for row in probe_rows])
    ctx.check(CheckResult("saved", f"{', '.join(saved.files)}: reloaded, {saved.comparison}"))
    if saved.note:
        ctx.log(f"chat template: {saved.note}")


@dataclass(frozen=True, slots=True)
class _Saved:
    """Names and SHA-256 of the weight files, what they were compared with, a note on the chat template."""

    files: dict[str, str]
    comparison: str
    note: str


def _save(ctx: RunContext, encoder: Encoder, policy: Policy, rows: Sequence[Sequence[int]]) -> _Saved:
    """Write ``adapter/`` (PEFT's format) or ``model/`` atomically, and reopen it."""
    model, name = policy.model, _saved_name(policy.model)
    with ctx.run.atomic_folder(name) as folder:
        live = _writer(model)(model, folder, main=True)
        (_verify_adapter if isinstance(model, PeftModel) else verify_model)(folder, live)
        del live
        note = save_inference_files(folder, unwrap_model(model), encoder)
        comparison = "equal to the trained weights"
        unsupported = reopening_unsupported(model)
        if ctx.strategy in SHARDED_WEIGHTS:
            unsupported = f"the weights are sharded ({ctx.strategy})"
        if unsupported:
            comparison += f"; not reopened: {unsupported}"
        else:
            probe = Probe(rows, policy.precision)
            trust = ctx.settings.model.trust_remote_code
            comparison += f"; reopened, logits {_reopened(model, folder, probe, trust_remote_code=trust)}"
        files = {f"{name}/{file.name}": file_sha256(file) for file in sorted(folder.glob("*.safetensors"))}
    return _Saved(files, comparison, note)


def _reopened(model: nn.Module, folder: Path, probe: Probe, *, trust_remote_code: bool) -> Difference:
    """Compare the logits of saved weights with those of the trained model."""
    if isinstance(model, PeftModel):
        difference = reopen_adapter(model, folder, probe)
    else:
        assert isinstance(model, PreTrainedModel)
        expected = probe.logits(model)
        noise = logits_difference(probe.logits(model), expected)
        actual = reopen_model(folder, Loading.of(model, trust_remote_code=trust_remote_code), probe)
        difference = Difference(logits_difference(actual, expected), 2 * noise)
    difference.require(folder)
    return difference


def _saved_name(model: nn.Module) -> str:
    return "adapter" if isinstance(model, PeftModel) else "model"


def _writer(model: nn.Module) -> Callable[..., dict[str, torch.Tensor]]:
    return write_adapter if isinstance(model, PeftModel) else _write_model


def adapter_tensors(model: PeftModel) -> dict[str, torch.Tensor]:
    """Return the active adapter's tensors by their names in its file."""
    # PEFT's default looks the base up on the hub, and may add the base's own embeddings.
    tensors: dict[str, torch.Tensor] = get_peft_model_state_dict(
        model, adapter_name=model.active_adapter, save_embedding_layers=False
    )
    return tensors


def write_adapter(model: nn.Module, folder: Path, *, main: bool) -> dict[str, torch.Tensor]:
    """Write the adapter on rank 0, and return its tensors in memory."""
    assert isinstance(model, PeftModel)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    # Gathered twice: PEFT runs prompt encoders, after which ZeRO-3 shards their weights again.
    with sharding.gathered_params(*trained):
        adapter_state = adapter_tensors(model)
        live = {name: value.detach().cpu().clone() for name, value in adapter_state.items()}
    with sharding.gathered_params(*trained):
        model.save_pretrained(
            str(folder),
            # As in adapter_tensors.
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
