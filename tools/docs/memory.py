"""The planner's table: peak memory of model x adapter, and the smallest card that holds it."""

from functools import cache

from align import load_recipe, plan
from finetune.distributed.hardware import GIB, device_by_name
from tools.docs.markdown import table

MODELS = ("qwen3-0.6b", "qwen3-4b", "llama-2-7b", "llama-3.1-8b", "llama-2-13b", "qwen3-32b", "llama-3.1-70b")
ADAPTERS = ("qlora", "lora", "full")
WORDS = {
    "en": (("base", "QLoRA (NF4)", "LoRA (bfloat16)", "full (bfloat16, AdamW)"), "more than {} GB"),
    "ko": (("베이스 모델", "QLoRA (NF4)", "LoRA (bfloat16)", "풀 파인튜닝 (bfloat16, AdamW)"), "{} GB 초과"),
}
"""Titles, and the words for a peak that no single card holds, by language."""
CARDS = (8, 12, 16, 24, 32, 48, 80, 141)
"""Sizes of cards in GB."""
RECIPE, SETTINGS = "alpaca", {"train.micro_batch_size": 1, "model.precision": "bfloat16"}


def memory_table(language: str = "en") -> str:
    """Return the peak of one training step on a single card, in GiB, and the smallest card for it."""
    titles, too_large = WORDS[language]
    rows = [(f"`{base}`", *(_cell(base, adapter, too_large) for adapter in ADAPTERS)) for base in MODELS]
    return table(titles, rows)


@cache  # README in two languages, and the guide, have the same cells
def _cell(base: str, adapter: str, too_large: str) -> str:
    recipe = load_recipe(RECIPE, base=base, adapter=adapter, settings=SETTINGS)
    peak = plan(recipe, gpu=f"{CARDS[-1]}GB", gpus=1).peak.total
    cards = [size for size in CARDS if device_by_name(f"{size}GB").available_bytes >= peak]
    card = f"{cards[0]} GB" if cards else too_large.format(CARDS[-1])
    return f"{peak / GIB:.1f} GiB: {card}"
