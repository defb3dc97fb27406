"""A folder with an adapter of PEFT that is no run of llm-align: as a parent run, for chat and for merge."""

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from finetune.recipe.checkpoint_folder import ADAPTER_CONFIG, run_of_checkpoint
from finetune.recipe.errors import Problem, UserError

ADAPTER_WEIGHTS = "adapter_model.safetensors"
CONFIG_EXPECTED = "PEFT's config of an adapter"
PEFT_STAGE = "peft"
"""Stands for the stage of the run in the record of such a folder."""
LORA_KEYS = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "target_modules": "target"}
"""PEFT's name of a setting -> ours."""
LORA_EXTRAS = (
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "layers_to_transform",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "lora_bias",
    "use_qalora",
    "alora_invocation_tokens",
    "exclude_modules",
)
"""Settings of LoRA that our LoRA does not have: with one of them the adapter cannot be trained further."""
REBUILT_INITS = ("pissa", "olora", "loftq", "corda", "eva", "orthogonal")
"""Initializations that change the base's weights, so that the adapter belongs to another base."""
NOT_MERGEABLE = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT")


def is_peft_folder(path: Path) -> bool:
    """Return whether a folder has an adapter of PEFT, and is no run, nor the adapter or checkpoint of one."""
    is_run = any((folder / "run.json").is_file() for folder in (path, path.parent))
    return (path / ADAPTER_CONFIG).is_file() and not is_run and run_of_checkpoint(path) is None


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Return adapter_config.json.

    Raises:
        UserError: it is damaged, or names no base.
    """
    file = folder / ADAPTER_CONFIG
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(Problem(str(file), f"cannot be read: {error}", CONFIG_EXPECTED)) from error
    if not isinstance(content, dict) or not content.get("peft_type"):
        raise UserError(Problem(str(file), "no peft_type", CONFIG_EXPECTED))
    return content


def peft_record(folder: Path) -> dict[str, Any]:
    """Return what run.json would say of an adapter of PEFT.

    Raises:
        UserError: the config is damaged or names no base, or the weights are missing.
    """
    config = read_adapter_config(folder)
    base = config.get("base_model_name_or_path")
    if not base:
        repair = f'add "base_model_name_or_path" to {ADAPTER_CONFIG}'
        raise UserError(Problem(str(folder / ADAPTER_CONFIG), "names no base model", "its base", repair))
    weights = folder / ADAPTER_WEIGHTS
    if not weights.is_file():
        actual = f"'{folder}' has no {ADAPTER_WEIGHTS}"
        repair = "load the adapter with PEFT and save it again: save_pretrained(folder)"
        raise UserError(Problem(str(folder), actual, "an adapter in safetensors", repair))
    stat = weights.stat()
    digest = _file_digest(weights, stat.st_mtime_ns, stat.st_size)
    virtual_tokens = 0 if config["peft_type"] == "PREFIX_TUNING" else config.get("num_virtual_tokens") or 0
    model = {"base": str(base), "revision": config.get("revision"), "trust_remote_code": False}
    return {
        "status": "finished",
        "stage": PEFT_STAGE,
        "recipe": folder.name,
        "digest": digest[:8],
        "files": {ADAPTER_WEIGHTS: digest},
        "command": f"an adapter of PEFT ({config['peft_type']})",
        "reload": {
            "model": model,
            "precision": None,
            "quantization": "none",
            "template": None,
            "template_options": None,
            "system_prompt": None,
            "control_suffix": "",
            "virtual_tokens": virtual_tokens,
        },
    }


def peft_adapter_settings(folder: Path) -> dict[str, Any]:
    """Return the recipe's adapter section for training an adapter of PEFT further.

    Raises:
        UserError: its type, or one of its settings, cannot be trained further.
    """
    config = read_adapter_config(folder)
    expected = "a LoRA adapter (also DoRA, rank-stabilized LoRA), to train it further"
    repair = f"`llm-align merge {folder}`, then a new adapter with --base {folder}/merged"
    kind = config["peft_type"]
    if kind != "LORA":
        actual = f"an adapter of type {kind}, which llm-align loads and does not train further"
        raise UserError(Problem(f"model.init_from {folder}", actual, expected, repair))
    extras = [name for name in LORA_EXTRAS if config.get(name)]
    extras += [f"bias={config['bias']}"] if config.get("bias", "none") != "none" else []
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(REBUILT_INITS):
        extras.append(f"init_lora_weights={init}")
    if config.get("use_dora") and config.get("use_rslora"):
        extras.append("use_dora with use_rslora")
    if extras:
        actual = f"a LoRA adapter with {', '.join(extras)}, which llm-align does not train further"
        raise UserError(Problem(f"model.init_from {folder}", actual, expected, repair))
    method = "dora" if config.get("use_dora") else "rslora" if config.get("use_rslora") else "lora"
    settings = {ours: config[theirs] for theirs, ours in LORA_KEYS.items() if theirs in config}
    target = settings.get("target")
    if not (isinstance(target, list) and target) and target != "all-linear":
        settings["target"] = _adapted_modules(folder)
    # A set in PEFT: its order differs from file to file.
    elif isinstance(target, list):
        settings["target"] = sorted(target)
    return {"method": method, **settings}


def check_peft_mergeable(folder: Path) -> None:
    """Raise UserError if an adapter of PEFT cannot be merged into its base."""
    kind = read_adapter_config(folder)["peft_type"]
    if kind in NOT_MERGEABLE:
        actual = f"an adapter of type {kind}: virtual tokens are part of the input"
        raise UserError(Problem(str(folder), actual, "an adapter of weights, such as LoRA"))


def _adapted_modules(folder: Path) -> list[str]:
    """Return the names of the layers that the saved weights adapt: a pattern may match others."""
    header_size = 8
    with (folder / ADAPTER_WEIGHTS).open("rb") as stream:
        # The format of safetensors: the header's length in 8 bytes, then the header as JSON.
        length = int.from_bytes(stream.read(header_size), "little")
        names = json.loads(stream.read(length))
    layers = {name.rpartition(".lora_A.")[0] for name in names if ".lora_A." in name}
    return sorted(name.removeprefix("base_model.model.") for name in layers)


@lru_cache(maxsize=16)
def _file_digest(file: Path, modified_ns: int, size: int) -> str:
    """Return a file's SHA-256; time and size are part of the key, as the file may change."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
