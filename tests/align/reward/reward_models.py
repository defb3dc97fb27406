"""Small reward models on the adapters' toy bases, and the plain way that ours must equal."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from adapter_properties import WORDS, _folder, build, first_choice
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from align.preference.groups import Group
from align.preference.rows.dataset import TokenizedGroup
from align.reward.model import completion_scores, draw_head, load_scorer
from finetune.planning.hardware import detect
from finetune.recipe.settings import ModelSettings

HEADS = ["help", "safety"]


def folder_of(family: str) -> Path:
    return _folder(family)


def scorer(family: str, quantization: str = "none", heads: Sequence[str] = HEADS) -> PreTrainedModel:
    settings = ModelSettings(base=str(folder_of(family)))
    base = load_scorer(
        settings, heads, precision="float32", quantization=quantization, hardware=detect(), pad_id=0
    )
    draw_head(base, seed=1)
    return base


def adapted(method: str, family: str) -> PeftModel:
    return build(method, scorer(family, first_choice(method)))


def train(model: nn.Module, batch: dict[str, Tensor], steps: int = 3) -> None:
    """Take some steps that give each completion another score."""
    torch.manual_seed(3)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=0.02, weight_decay=0.0)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        scores = completion_scores(model, batch)
        (torch.linspace(-1.0, 1.7, scores.numel()).view_as(scores) * scores).sum().backward()
        optimizer.step()
    model.eval()


@torch.no_grad()
def plain_scores(model: nn.Module, groups: Sequence[Group]) -> Tensor:
    """Return the scores of transformers' own forward pass, one row per completion: (C, heads)."""
    rows = [torch.cat([group.prompt, ids]) for group in groups for ids in group.completions]
    return torch.cat([model(input_ids=row[None]).logits[:1] for row in rows])


def tokenized(ranks: Sequence[Sequence[int]], *, seed: int = 0, heads: int = 1) -> list[TokenizedGroup]:
    """Return random groups with these ranks; their sources go round through the heads."""
    draw = np.random.default_rng(seed)

    def ids(length: int) -> np.ndarray:
        return draw.integers(1, WORDS, length).astype(np.int32)

    return [
        TokenizedGroup(
            prompt_ids=ids(3 + number),
            completion_ids=tuple(ids(2 + (3 * place + number) % 5) for place in range(len(own))),
            scores=-np.asarray(own, dtype=np.float64),
            ranks=np.asarray(own, dtype=np.int32),
            margin=float(max(own) - min(own)),
            row=number,
            place=f"rows:{number + 1}",
            source=number % heads,
        )
        for number, own in enumerate(ranks)
    ]
