"""NEFTune noise: scale by hand, none outside training, reproducible with the seed."""

import math
from pathlib import Path

import pytest
import torch
from fixture_types import MakeRecipe, Tune
from peft import PromptTuningConfig, get_peft_model
from small_models import make, token_rows

from finetune.data.collate import PackedCollator, PaddedCollator
from finetune.recipe.errors import UserError
from finetune.recipe.settings import TrainSettings
from finetune.training.arguments import ExecutionConfig, training_arguments
from finetune.training.loss import held_out_loss
from finetune.training.trainer import NativeTrainer, TrainerData, noisy_embeddings, row_lengths

LENGTHS = [9, 3, 14]


def test_lengths_of_padded_rows() -> None:
    rows = token_rows([4, 2])
    batch = PaddedCollator(0)([rows[0], rows[1]])
    assert row_lengths(batch).tolist() == [[4.0] * 4, [2.0] * 4]


def test_lengths_of_packed_rows() -> None:
    rows = token_rows([5, 2, 2])
    batch = PackedCollator(0)([rows[0], rows[1], rows[2]])  # 5 | 2 + 2 + one position of padding
    assert row_lengths(batch).tolist() == [[5.0] * 5, [2.0] * 4 + [1.0]]


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
@pytest.mark.parametrize("collator", [PaddedCollator(0), PackedCollator(0)])
def test_the_noise_is_uniform_in_alpha_over_root_of_length_times_width(name: str, collator) -> None:
    model = make(name)
    embeddings = model.get_input_embeddings()
    rows = token_rows(LENGTHS)
    batch = collator([rows[index] for index in range(3)])
    clean = embeddings(batch["input_ids"])
    torch.manual_seed(0)
    draws = []
    for _ in range(400):
        with noisy_embeddings(embeddings, 5.0, batch):
            draws.append(embeddings(batch["input_ids"]) - clean)
    noise = torch.stack(draws).detach()
    bounds = 5.0 / torch.sqrt(row_lengths(batch) * clean.shape[-1])
    scaled = noise / bounds[None, :, :, None]
    assert float(scaled.abs().max()) <= 1 + 1e-4 and float(scaled.abs().max()) > 0.999
    assert float(scaled.mean()) == pytest.approx(0.0, abs=5e-3)
    assert float(scaled.var()) == pytest.approx(1 / 3, abs=5e-3)  # of U(-1, 1)
    longest = 14 if isinstance(collator, PackedCollator) else 9  # packed: the longest row first
    assert float(bounds[0, 0]) == pytest.approx(5 / math.sqrt(longest * 32))


def test_without_alpha_nothing_changes() -> None:
    embeddings = make("llama").get_input_embeddings()
    ids = torch.tensor([[1, 2, 3]])
    batch = {"attention_mask": torch.ones(1, 3, dtype=torch.long)}
    clean = embeddings(ids)
    with noisy_embeddings(embeddings, None, batch):
        assert torch.equal(embeddings(ids), clean)
    with pytest.raises(RuntimeError, match="inside"), noisy_embeddings(embeddings, 5.0, batch):
        assert not torch.equal(embeddings(ids), clean)
        raise RuntimeError("inside")
    assert torch.equal(embeddings(ids), clean)


NOISY = {"train__neftune_alpha": 5.0, "evaluate__samples": 0, "train__max_steps": 4}


def test_training_is_noisy_and_repeats_with_the_seed(tune: Tune) -> None:
    noisy, repeated = tune("noisy", **NOISY), tune("again", **NOISY)
    clean = tune("clean", evaluate__samples=0, train__max_steps=4)
    assert noisy.record["files"] == repeated.record["files"]
    assert noisy.record["files"] != clean.record["files"]
    assert noisy.record["metrics"]["eval/loss_before"] == clean.record["metrics"]["eval/loss_before"]
    assert noisy.metrics[0]["loss"] != clean.metrics[0]["loss"]


def test_held_out_rows_are_measured_without_noise(tmp_path: Path) -> None:
    model, rows = make("llama"), token_rows(LENGTHS)
    trainer = NativeTrainer(
        model,
        training_arguments(
            TrainSettings(batch_size=2, max_steps=1),
            folder=tmp_path,
            execution=ExecutionConfig("cpu", "float32"),
            micro_batch_size=2,
            checkpoint_every=9,
        ),
        TrainerData(rows, rows, PaddedCollator(0), 2, True),
        neftune_alpha=50.0,
    )
    clean = held_out_loss(model, rows, PaddedCollator(0), batch_size=2)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(clean, rel=1e-6)


def test_the_noise_is_on_the_rows_and_not_on_virtual_tokens() -> None:
    model = get_peft_model(make("gpt_neox"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
    seen = []
    model.get_input_embeddings().register_forward_hook(lambda *call: seen.append(tuple(call[2].shape)))
    batch = {"input_ids": torch.ones(2, 6, dtype=torch.long), "attention_mask": torch.ones(2, 6)}
    with torch.no_grad():
        clean = model(**batch).logits
        with noisy_embeddings(model.get_input_embeddings(), 5.0, batch):
            noisy = model(**batch).logits
    assert seen == [(2, 6, 32)] * 2
    assert torch.equal(noisy[:, :5], clean[:, :5]) and not torch.allclose(noisy[:, 5:], clean[:, 5:])


@pytest.mark.parametrize("method", ["prefix", "prompt", "qlora"])
def test_every_kind_of_adapter_trains_with_noise(tune: Tune, method: str) -> None:
    result = tune("run", adapter__method=method, **{**NOISY, "train__max_steps": 2})
    assert result.record["status"] == "finished" and len(result.metrics) == 2


def test_trl_gets_neftune_alpha(tune: Tune, make_recipe: MakeRecipe) -> None:
    noisy = tune("noisy", train__engine="trl", **NOISY)
    clean = tune("clean", train__engine="trl", evaluate__samples=0, train__max_steps=4)
    assert noisy.metrics[0]["loss"] != clean.metrics[0]["loss"]
    with pytest.raises(UserError, match=r"train\.neftune_alpha.*: 5 with train\.engine 'trl'"):
        make_recipe(train__engine="trl", train__neftune_alpha=5.0, adapter__method="prompt")


def test_neftune_noise_alpha_is_refused(tune: Tune) -> None:
    for name in ("neftune_noise_alpha", "label_smoothing_factor"):
        with pytest.raises(UserError, match=f"train.engine_args.{name} .*: set by the recipe"):
            tune("run", train__engine_args={name: 5.0})
