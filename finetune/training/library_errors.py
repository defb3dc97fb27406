"""Exceptions that libraries raise on a user's model or adapter, as user errors that name the failing module.

Only an exception whose innermost frame is a library's is translated. One that our own code raises is a fault
of ours, and stays as it is.
"""

import sysconfig
import traceback
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import FrameType, TracebackType

import torch
from torch import nn
from transformers import PreTrainedModel

from finetune.recipe.disk import is_write_error
from finetune.recipe.errors import LibraryError, Problem, UserError
from finetune.recipe.settings import AdapterSettings

LIBRARIES = (
    "transformers",
    "peft",
    "torch",
    "bitsandbytes",
    "trl",
    "accelerate",
    "deepspeed",
    "safetensors",
    "tokenizers",
    "huggingface_hub",
)
PACKAGE_FOLDERS = tuple(Path(sysconfig.get_path(name)) for name in ("purelib", "platlib"))
PEFT_PREFIX = "base_model.model."
"""What PEFT's wrappers put before the name of a module."""
MAX_MESSAGE = 300
"""Characters of a library's message; some of them run over many lines."""
FULL, LORA = "full", "lora"
"""Adapter methods whose remedy differs from that of the others."""
MEMORY_REPAIR = "train.micro_batch_size=1, train.gradient_checkpointing=true, or adapter.method=qlora"


@contextmanager
def library_errors(where: str, step: str, *, expected: str, repair: str) -> Iterator[None]:
    """Translate an exception that a library raises inside the block.

    Args:
        where: the recipe's key that decides about it.
        step: what failed, as the subject of the message: ``LoRA on 'phimoe'``.
        expected: what works.
        repair: a suggested change.

    Raises:
        LibraryError: a library raised an exception.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of any type: libraries raise what they like, and ours are raised again
        # A full disk has a message of its own.
        if is_write_error(error) or not raised_by_library(error):
            raise
        raise to_library_error(error, where=where, step=step, expected=expected, repair=repair) from error


def adapter_errors(
    model: PreTrainedModel, adapter: AdapterSettings, *, first_pass: bool = False
) -> AbstractContextManager[None]:
    """Translate exceptions of attaching an adapter to a base, or of the first pass with it."""
    kind = f"a model of type '{model.config.model_type}' ({type(model).__name__})"
    if adapter.method == FULL:
        where, step = "model.base", f"the first pass of {kind}"
        expected, repair = "a causal language model", "another base"
    else:
        where, step = "adapter.method", f"'{adapter.method}' does not fit {kind}"
        expected = f"an adapter that works with '{model.config.model_type}'"
        repair = (
            "adapter.method=lora" if adapter.method != LORA else "another adapter.target, or another base"
        )
    if first_pass and adapter.method != FULL:
        step = f"{step}, in the first pass"
    return library_errors(where, step, expected=expected, repair=repair)


def run_errors(num_processes: int) -> AbstractContextManager[None]:
    """Translate exceptions after the first pass: of steps, evaluation, generation and saving.

    With several processes only the first cause is of use: when one of them dies, the libraries of the others
    raise too. The launcher tells them apart, and they stay as they are.
    """
    if num_processes > 1:
        return nullcontext()
    expected = "settings that the libraries accept in every step"
    repair = "the same command resumes from the last checkpoint; if it fails again, other settings or rows"
    return library_errors("train", "the run stopped", expected=expected, repair=repair)


def to_library_error(error: Exception, *, where: str, step: str, expected: str, repair: str) -> LibraryError:
    """Return the user error of a library's exception; ``library_errors`` describes the arguments."""
    cause = describe_cause(error)
    message = " ".join(cause["message"].split())[:MAX_MESSAGE]
    module = f" in {cause['module']}" if cause["module"] else ""
    if isinstance(error, torch.OutOfMemoryError):
        expected, repair = (
            "a model and batch that fit into memory (`llm-align plan` estimates it)",
            MEMORY_REPAIR,
        )
    actual = f"{step}: {cause['type']}{module} ({cause['location']}): {message}"
    return LibraryError(
        Problem(where, actual, expected, f"{repair}; --traceback prints the library's error"), cause
    )


def raised_by_library(error: BaseException) -> bool:
    """Return whether the innermost Python frame of an exception is a library's, or memory ran out."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and _library_file(frames[-1]) is not None


def describe_cause(error: BaseException) -> Mapping[str, str]:
    """Return type, message, module of the model, file with line, and traceback of an exception."""
    walked = list(traceback.walk_tb(error.__traceback__))
    frame, line = walked[-1]
    return {
        "type": type(error).__name__,
        "message": str(error),
        "module": _failing_module(error.__traceback__),
        "location": f"{_library_file(frame) or frame.f_code.co_filename}:{line}",
        "traceback": "".join(traceback.format_exception(error)),
    }


def _library_file(frame: FrameType) -> str | None:
    """Return a frame's file below site-packages if it is one of the libraries', else None."""
    file = Path(frame.f_code.co_filename)
    for folder in PACKAGE_FOLDERS:
        if file.is_relative_to(folder) and (name := file.relative_to(folder)).parts[0] in LIBRARIES:
            return name.as_posix()
    return None


def _failing_module(trace: TracebackType | None) -> str:
    """Return name and class of the innermost module of a forward pass; "" outside of one."""
    # Only frames of `forward` methods: elsewhere `self` may be a module that is not built yet.
    modules = [
        frame.f_locals["self"]
        for frame, _ in traceback.walk_tb(trace)
        if frame.f_code.co_name == "forward" and isinstance(frame.f_locals.get("self"), nn.Module)
    ]
    if not modules:
        return ""
    root, innermost = modules[0], modules[-1]
    name = next((name for name, module in root.named_modules() if module is innermost), "")
    name = name.removeprefix(PEFT_PREFIX)
    return f"{name} ({type(innermost).__name__})" if name else type(innermost).__name__
