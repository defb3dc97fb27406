"""PPO-ptx: order of the pretraining rows, their split over micro-batches and processes, their weight."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ppo_models import build_models, random_rollout
from small_models import reference_loss_sum, token_rows
from small_tokenizers import tokenizer
from torch import Tensor

from align.ppo.actor_critic import ActorCritic
from align.ppo.pretraining import (
    NUM_PRETRAINING_LABELS,
    PRETRAINING_BATCH,
    PretrainingMix,
    load_pretraining_mix,
)
from align.ppo.settings import Settings
from finetune.data.collate import PaddedCollator
from finetune.data.dataset import TokenizedRows
from finetune.data.tokens import Encoder
from finetune.distributed.rank import DistInfo
from finetune.training.model import TextEncoding

pytestmark = pytest.mark.filterwarnings("ignore")
LENGTHS = [5, 9, 4, 7, 6]


def rows() -> TokenizedRows:
    tokenized = token_rows(LENGTHS)
    tokenized.arrays["input_ids"] %= 96
    return tokenized


def pretraining_mix(batch_size: int, weight: float = 2.0) -> PretrainingMix:
    return PretrainingMix(rows(), PaddedCollator(0), batch_size, weight, seed=0)


def distributed(mix: PretrainingMix, passes: int, step: int) -> list[dict[str, Any]]:
    batches: list[dict[str, Any]] = [{} for _ in range(passes)]
    mix.add_to_batches(batches, step=step)
    return batches


def pretraining_nll(actor_critic: ActorCritic, batch: dict[str, Any]) -> Tensor | float:
    """Return the summed NLL of the pretraining rows of a micro-batch."""
    rollout_batch = dict(random_rollout(actor_critic).batch([0], pad_id=0))
    return actor_critic(
        rollout_batch, with_entropy=False, pretraining_batch=batch.get(PRETRAINING_BATCH)
    ).pretraining_nll


@pytest.mark.parametrize("passes", [1, 2, 3, 7])
def test_micro_batch_losses_sum_to_gamma_times_mean_over_labels(passes: int) -> None:
    actor_critic, _ = build_models("lora", "llama")
    batches, mix = distributed(pretraining_mix(5), passes, step=0), pretraining_mix(5)
    assert (
        sum(len(batch[PRETRAINING_BATCH]["input_ids"]) for batch in batches if PRETRAINING_BATCH in batch)
        == 5
    )
    total = sum(float(mix.loss(pretraining_nll(actor_critic, batch), batch)) for batch in batches)
    labels = sum(int((rows()[index]["labels"][1:] != -100).sum()) for index in range(5))
    expected = 2.0 * float(reference_loss_sum(actor_critic.policy, rows())) / labels
    assert total == pytest.approx(expected, rel=1e-5)
    assert {batch[NUM_PRETRAINING_LABELS] for batch in batches if PRETRAINING_BATCH in batch} == {labels}


def test_every_row_is_used_once_per_epoch() -> None:
    mix = pretraining_mix(2)
    seen = [
        row
        for step in range(5)
        for batch in distributed(mix, 1, step)
        for row in batch[PRETRAINING_BATCH]["row_ids"].tolist()
    ]
    assert sorted(seen[:5]) == sorted(seen[5:]) == list(range(5)) and seen[:5] != seen[5:]
    again = distributed(pretraining_mix(2), 1, 3)[0][PRETRAINING_BATCH]["row_ids"]
    assert torch.equal(again, torch.tensor(seen[6:8]))


def test_no_loss_without_pretraining_rows() -> None:
    assert pretraining_mix(1).loss(0.0, distributed(pretraining_mix(1), 2, step=0)[1]) == 0.0


def test_processes_shard_rows_and_share_label_count() -> None:
    [single_process] = distributed(pretraining_mix(5), 1, step=0)
    micro_batches = []
    for rank in range(2):
        batches: list[dict[str, Any]] = [{}, {}]
        pretraining_mix(5).add_to_batches(batches, step=0, dist=DistInfo(rank, 2, rank))
        micro_batches += batches
    row_ids = [row for batch in micro_batches for row in batch[PRETRAINING_BATCH]["row_ids"].tolist()]
    assert (
        sorted(row_ids) == sorted(single_process[PRETRAINING_BATCH]["row_ids"].tolist()) and len(row_ids) == 5
    )
    assert {batch[NUM_PRETRAINING_LABELS] for batch in micro_batches} == {
        single_process[NUM_PRETRAINING_LABELS]
    }


@pytest.mark.parametrize("row", [{"text": "A text."}, {"prompt": "Say hi.", "completion": "A text."}])
def test_rows_are_texts_or_conversations(tmp_path: Path, row: dict[str, str]) -> None:
    file = tmp_path / "general.jsonl"
    file.write_text(json.dumps(row) + "\n", encoding="utf-8")
    settings = Settings.model_validate({"pretraining": {"source": str(file), "weight": 1.0}})
    encoder = Encoder(tokenizer("qwen"), "chatml")
    context: Any = SimpleNamespace(settings=settings, log=print)
    mix = load_pretraining_mix(context, TextEncoding(encoder, 64, 0, 64))
    assert mix is not None
    num_untrained = int((mix.rows[0]["labels"] == -100).sum())
    # Every token of a text but its first, which nothing predicts; of a conversation the reply alone.
    assert (num_untrained == 1) == ("text" in row)
