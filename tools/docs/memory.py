"""The planner's table: peak memory of model x adapter, and the smallest card that holds it."""

from align import load_recipe, plan
from finetune.distributed.hardware import GIB, device_by_name
from tools.docs.markdown import table

MODELS = {
    "qwen3-0.6b": "0.6B",
    "qwen3-4b": "4B",
    "llama-2-7b": "7B",
    "llama-3.1-8b": "8B",
    "llama-2-13b": "13B",
    "qwen3-32b": "32B",
    "llama-3.1-70b": "70B",
}
ADAPTERS = {"qlora": "QLoRA (NF4)", "lora": "LoRA (bfloat16)", "full": "full (bfloat16, AdamW)"}
CARDS = (8, 12, 16, 24, 32, 48, 80, 141)
"""Sizes of cards in GB."""
RECIPE, SETTINGS = "alpaca", {"train.micro_batch_size": 1, "model.precision": "bfloat16"}


def memory_table() -> str:
    """Return the peak of one training step on a single card, in GiB, and the smallest card for it."""
    rows = [(f"`{base}`", *(_cell(base, adapter) for adapter in ADAPTERS)) for base in MODELS]
    return table(("base", *ADAPTERS.values()), rows)


def _cell(base: str, adapter: str) -> str:
    recipe = load_recipe(RECIPE, base=base, adapter=adapter, settings=SETTINGS)
    peak = plan(recipe, gpu=f"{CARDS[-1]}GB", gpus=1).peak.total
    cards = [size for size in CARDS if device_by_name(f"{size}GB").available_bytes >= peak]
    card = f"{cards[0]} GB" if cards else f"more than {CARDS[-1]} GB"
    return f"{peak / GIB:.1f} GiB: {card}"
