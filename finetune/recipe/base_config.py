"""A base's config.json, read without torch and transformers, and how the base's weights are stored.

No download: the file is read from our table, a folder or the Hugging Face cache.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import try_to_load_from_cache

from finetune.recipe import yaml_file
from finetune.recipe.bases import load_bases, resolve_base
from finetune.recipe.discovery import PROJECT
from finetune.recipe.errors import Problem, UserError

ARCHITECTURES = PROJECT / "recipes" / "architectures.yaml"
BITSANDBYTES = "bitsandbytes"
FOUR_BIT_TYPES = ("nf4", "fp4")
DTYPE_NAMES = ("float32", "bfloat16", "float16")
QUANTIZATION_KEYS = ("quantization_config", "compression_config")
"""Where a config.json describes stored quantization; the latter is the old name of compressed-tensors."""


@dataclass(frozen=True, slots=True)
class StoredQuantization:
    """How a base's files store its linear layers; defaults are those of transformers' BitsAndBytesConfig.

    Attributes:
        method: ``quant_method`` of the config: bitsandbytes, gptq, awq, fp8, ...
        quantization: the value of ``model.quantization`` that it amounts to; "": another format.
        data_type: of a weight: ``nf4``, ``fp4`` or ``int8``; in other formats "", or the number of bits.
        double_quantization: whether the scales of 4-bit weights are quantized to 8 bits as well.
        compute_dtype: of a 4-bit layer's matrix product.
        skip_modules: modules that are not quantized, as names, prefixes or regular expressions; None: the
            output head.
    """

    method: str
    quantization: Literal["nf4", "int8", ""]
    data_type: str = ""
    double_quantization: bool = False
    compute_dtype: str = "float32"
    skip_modules: tuple[str, ...] | None = None

    def __str__(self) -> str:
        if self.quantization != "nf4":
            return f"{self.method} {self.data_type}".rstrip()
        double = "with" if self.double_quantization else "without"
        return f"bitsandbytes 4-bit ({self.data_type}, {double} double quantization)"

    def skips(self, module: str) -> bool:
        """Return whether a linear layer is not quantized, by the rule of transformers.

        A pattern matches a name from its start to a module boundary, or its end
        (transformers/quantizers/quantizers_utils.py, ``should_convert_module``).
        """
        boundary = r"(?:(?<=\.)|(?=\.|$))"
        return any(
            re.match(rf"(?:{pattern}){boundary}", module) or module.endswith(pattern)
            for pattern in self.skip_modules or ()
        )

    def check(self, requested: str, supported: tuple[str, ...]) -> None:
        """Raise UserError if a recipe cannot train on the base as it is stored.

        Args:
            requested: the recipe's ``model.quantization``.
            supported: the adapter's quantizations.
        """
        actual = f"the base is stored in {self}"
        if not self.quantization:
            expected = "unquantized weights, or bitsandbytes in 4 or 8 bits"
            repair = "the unquantized base of the same model; model.quantization=nf4 stores it in 4 bits"
            raise UserError(Problem("model.base", actual, expected, repair))
        if requested not in ("auto", self.quantization):
            repair = f"model.quantization={self.quantization}, or the unquantized base of the same model"
            expected = f"{self.quantization} or auto: {actual}"
            raise UserError(Problem("model.quantization", f"found {requested}", expected, repair))
        if self.quantization not in supported:
            names = " or ".join(name for name in supported if name != "none")
            expected = f"an unquantized base, or one in {names}" if names else "an unquantized base"
            actual += ", which this adapter does not train on"
            repair = "the unquantized base of the same model, or adapter.method=qlora"
            raise UserError(Problem("model.base", actual, expected, repair))


def load_base_config(base: str, revision: str | None = None) -> dict[str, Any]:
    """Return a base model's config.json; known bases are in our table.

    Args:
        base: short name, Hub id or folder.
        revision: branch, tag or commit of a Hub model.

    Raises:
        UserError: the base does not exist, or its config.json is not on this machine.
    """
    config = _local_config(base, revision)
    if config is None:
        raise UserError(_unknown_base(base, resolve_base(base), revision))
    return config


def load_stored_quantization(base: str, revision: str | None = None) -> StoredQuantization | None:
    """Return how a base's files store its weights; None: unquantized, or its config.json is not here yet.

    Raises:
        UserError: the base does not exist, or its ``quantization_config`` is invalid.
    """
    config = _local_config(base, revision)
    return None if config is None else stored_quantization(config)


def stored_quantization(config: Mapping[str, Any]) -> StoredQuantization | None:
    """Return how the weights of a config.json are stored; None: unquantized.

    Raises:
        UserError: an invalid ``quantization_config``.
    """
    text = config.get("text_config")
    # Multimodal configs may nest the decoder's.
    for section in (config, text if isinstance(text, Mapping) else {}):
        for key in QUANTIZATION_KEYS:
            if section.get(key) is not None:
                return _read_quantization(section[key])
    return None


def _read_quantization(content: Any) -> StoredQuantization:
    if not isinstance(content, Mapping):
        raise _invalid("", content, "a mapping")
    four_bit, eight_bit = (_read_flag(content, f"load_in_{bits}bit") for bits in (4, 8))
    method = content.get("quant_method", BITSANDBYTES if four_bit or eight_bit else None)
    if not isinstance(method, str) or not method:
        raise _invalid("quant_method", method, f"the name of a format, such as {BITSANDBYTES}")
    if method != BITSANDBYTES:
        bits = content.get("bits", content.get("w_bit"))
        return StoredQuantization(method, "", f"{bits}-bit" if isinstance(bits, int) else "")
    if four_bit == eight_bit:
        raise _invalid("load_in_4bit", four_bit, "true in one of load_in_4bit and load_in_8bit")
    skip_modules = _read_skip_modules(content)
    if eight_bit:
        return StoredQuantization(method, "int8", "int8", skip_modules=skip_modules)
    return StoredQuantization(
        method,
        "nf4",
        _read_choice(content, "bnb_4bit_quant_type", FOUR_BIT_TYPES, default="fp4"),
        _read_flag(content, "bnb_4bit_use_double_quant"),
        _read_choice(content, "bnb_4bit_compute_dtype", DTYPE_NAMES, default="float32"),
        skip_modules,
    )


def _read_flag(content: Mapping[str, Any], key: str) -> bool:
    value = content.get(key, False)
    if not isinstance(value, bool):
        raise _invalid(key, value, "true or false")
    return value


def _read_choice(content: Mapping[str, Any], key: str, choices: tuple[str, ...], *, default: str) -> str:
    value = content.get(key) or default
    if value not in choices:
        raise _invalid(key, value, f"one of {', '.join(choices)}")
    return str(value)


def _read_skip_modules(content: Mapping[str, Any]) -> tuple[str, ...] | None:
    key = "llm_int8_skip_modules"
    value = content.get(key)
    if value is None:
        return None
    expected = "a list of module names, as text or regular expressions"
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise _invalid(key, value, expected)
    try:
        return tuple(name for name in value if re.compile(name))
    except re.error as error:
        raise _invalid(key, value, expected) from error


def _invalid(key: str, value: Any, expected: str) -> UserError:
    name = "quantization_config" + (f".{key}" if key else "")
    actual = f"config.json has {name}={json.dumps(value, default=str)[:80]}"
    return UserError(Problem("model.base", actual, expected, "an undamaged config.json of the same model"))


def _local_config(base: str, revision: str | None) -> dict[str, Any] | None:
    """Return a base's config.json; None if it is not on this machine."""
    base_id = resolve_base(base)
    if Path(base_id).is_dir():
        return _read_config(Path(base_id) / "config.json")
    known = {entry.id: name for name, entry in load_bases().items()}
    # The table has the configs of the default branches; another revision may differ.
    if base_id in known and revision is None:
        return _known_configs()[known[base_id]]
    cached = try_to_load_from_cache(base_id, "config.json", revision=revision)
    # Neither None (unknown) nor the sentinel of a file that the repository is known to lack.
    return _read_config(Path(cached)) if isinstance(cached, str) else None


@cache  # a search for alternatives asks for each of its plans
def _known_configs() -> dict[str, dict[str, Any]]:
    content, _ = yaml_file.read_yaml(ARCHITECTURES)
    return {name: entry["config"] for name, entry in content.items()}


def _unknown_base(base: str, base_id: str, revision: str | None) -> Problem:
    at = f" at revision '{revision}'" if revision else ""
    text = f"'{base}'{at} is not a known base, and its config.json is not on this machine"
    expected = (
        f"one of {len(load_bases())} short names (`llm-align list bases`), a folder, or a model in the hub's "
        "cache"
    )
    option = f" --revision {revision}" if revision else ""
    return Problem("model.base", text, expected, f"hf download {base_id} config.json{option}   (no weights)")


def _damaged_config(actual: str) -> Problem:
    return Problem("model.base", actual, "the JSON of a config.json", "download or save the model again")


def _read_config(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    # ValueError: not UTF-8, not JSON, or a number of thousands of digits; RecursionError: deep nesting.
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(_damaged_config(f"{file}: {error}")) from error
    if not isinstance(content, dict):
        raise UserError(_damaged_config(f"{file} is not a JSON object"))
    return content
