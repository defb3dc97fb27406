"""Label smoothing: by hand, against torch, one denominator per step, none in evaluation."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fixture_types import Tune
from small_models import VOCABULARY, assert_close, gradients, make, token_rows
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback

from finetune.data.collate import PackedCollator, PaddedCollator
from finetune.engines.trl.trainer import TrlSFTTrainer
from finetune.recipe.settings import TrainSettings
from finetune.training.arguments import ExecutionConfig, training_arguments
from finetune.training.loss import cross_entropy_sum
from finetune.training.trainer import NativeTrainer, TrainerData

LENGTHS = [9, 3, 14, 2, 6, 20, 5, 11]


def test_by_hand() -> None:
    # Probabilities 3/4, 1/4; target 0 with e = 0.2 over V = 2: 0.9 of entry 0 and 0.1 of entry 1.
    logits = torch.tensor([[math.log(3.0), 0.0]])
    expected = -(0.9 * math.log(3 / 4) + 0.1 * math.log(1 / 4))
    actual = cross_entropy_sum(logits, torch.tensor([0]), label_smoothing=0.2)
    assert float(actual) == pytest.approx(expected)


@pytest.mark.parametrize("max_elements", [VOCABULARY, 2**26])
def test_torch_gives_the_same_in_chunks_and_at_once(max_elements: int) -> None:
    torch.manual_seed(1)
    values, targets = torch.randn(11, VOCABULARY), torch.randint(VOCABULARY, (11,))
    ours, theirs = (values.clone().requires_grad_() for _ in range(2))
    actual = cross_entropy_sum(ours, targets, label_smoothing=0.1, max_logits=max_elements)
    expected = F.cross_entropy(theirs, targets, reduction="sum", label_smoothing=0.1)
    actual.backward()
    expected.backward()
    assert actual.item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-7)


class Gradients(TrainerCallback):
    """Records the gradients before the optimizer step."""

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        weights = kwargs["model"].named_parameters()
        self.grads = {name: weight.grad.clone() for name, weight in weights if weight.grad is not None}


def one_step(engine) -> dict[str, torch.Tensor]:
    seen = Gradients()
    engine.remove_callback(PrinterCallback)
    engine.add_callback(seen)
    engine.train()
    return seen.grads


def arguments(folder: Path, micro: int, engine: str = "native"):
    settings = TrainSettings(
        engine=engine, batch_size=8, max_steps=1, max_grad_norm=0.0, warmup=0, label_smoothing=0.1
    )
    return training_arguments(
        settings,
        folder=folder,
        execution=ExecutionConfig("cpu", "float32"),
        micro_batch_size=micro,
        checkpoint_every=9,
    )


def native(model, folder: Path, micro: int, collator) -> NativeTrainer:
    engine = NativeTrainer(
        model,
        arguments(folder, micro),
        TrainerData(token_rows(LENGTHS), None, collator, 8, True),
        label_smoothing=0.1,
    )
    return engine


@pytest.mark.parametrize("collator", [PaddedCollator(0), PackedCollator(0)])
@pytest.mark.parametrize("micro", [1, 3, 8])
def test_pain_12_accumulation_gives_the_gradient_of_the_full_batch(
    tmp_path: Path, micro: int, collator
) -> None:
    model, rows = make("llama"), token_rows(LENGTHS)
    total = torch.zeros(())
    for index in range(len(rows)):
        row = rows[index]
        logits = model(input_ids=row["input_ids"][None]).logits[0]
        total = total + F.cross_entropy(
            logits[:-1], row["labels"][1:], reduction="sum", ignore_index=-100, label_smoothing=0.1
        )
    expected = gradients(model, total / rows.num_trained)
    assert_close(one_step(native(make("llama"), tmp_path, micro, collator)), expected, 1e-5)


def test_native_and_trl_take_the_same_step(tmp_path: Path, base_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    ours, theirs = (AutoModelForCausalLM.from_pretrained(base_folder) for _ in range(2))
    grads = one_step(native(ours, tmp_path / "native", 4, PaddedCollator(0)))
    engine = TrlSFTTrainer(
        theirs,
        arguments(tmp_path / "trl", 4, "trl"),
        tokenizer,
        train=token_rows(LENGTHS),
        held_out=None,
    )
    assert_close(grads, one_step(engine), 1e-5)


def test_a_run_smooths_in_training_and_not_when_measuring(tune: Tune) -> None:
    smooth = tune("smooth", train__label_smoothing=0.2, evaluate__samples=0)
    sharp = tune("sharp", evaluate__samples=0)
    assert smooth.metrics[0]["loss"] > sharp.metrics[0]["loss"]
    before = [run.record["metrics"]["eval/loss_before"] for run in (smooth, sharp)]
    assert before[0] == before[1]
