"""Equality with TRL: its DPO, reward, CPO and ORPO trainers compute the same losses and gradients.

Also the alarm for upgrades: TRL's losses are no functions, so its trainers are driven on a small model.
"""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from preference_batches import random_pairs
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

from align.preference.losses import pairwise
from align.preference.losses.catalog import all_losses
from align.preference.losses.inputs import Pairs
from align.preference.losses.reward import bradley_terry

LENGTHS = ((4, 6, 3), (5, 2, 7), (3, 4, 4))
"""Tokens of prompt, chosen and rejected completion."""
TRL_LOSSES = [
    ("dpo", "sigmoid", {}),
    ("robust", "robust", {"label_smoothing": 0.2}),
    ("ipo", "ipo", {"length_normalized": True}),
    ("hinge", "hinge", {}),
    ("apo_zero", "apo_zero", {}),
    ("apo_down", "apo_down", {}),
    ("exo", "exo_pair", {"label_smoothing": 0.2}),
]
BETA = 0.3


def batch() -> dict[str, Tensor]:
    """Return prompts with chosen, then with rejected completions, in the layout of TRL's collator."""
    generator, rows = torch.Generator().manual_seed(0), []
    prompts = [torch.randint(8, 500, (prompt,), generator=generator) for prompt, _, _ in LENGTHS]
    for side in (1, 2):
        for prompt, lengths in zip(prompts, LENGTHS, strict=True):
            completion = torch.randint(8, 500, (lengths[side],), generator=generator)
            rows.append((torch.cat([prompt, completion]), len(prompt)))
    width = max(len(ids) for ids, _ in rows)
    positions = torch.arange(width)
    in_row = torch.stack([positions < len(ids) for ids, _ in rows])
    in_completion = torch.stack([positions >= prompt for _, prompt in rows])
    return {
        "input_ids": torch.stack([F.pad(ids, (0, width - len(ids))) for ids, _ in rows]),
        "attention_mask": in_row.long(),
        "completion_mask": (in_row & in_completion).long(),
    }


def completion_logps(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """Return the completions' log-probabilities, summed over tokens."""
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
    tokens = logits.log_softmax(-1).gather(-1, inputs["input_ids"][:, 1:, None]).squeeze(-1)
    return (tokens * inputs["completion_mask"][:, 1:]).sum(-1)


def our_pairs(model: PreTrainedModel, reference: PreTrainedModel, inputs: dict[str, Tensor]) -> Pairs:
    chosen, rejected = completion_logps(model, inputs).chunk(2)
    lengths = inputs["completion_mask"].sum(-1).chunk(2)
    with torch.no_grad():
        reference_logps = completion_logps(reference, inputs).chunk(2)
    return Pairs(chosen, rejected, *lengths, *reference_logps)


def gradient(loss: Tensor, model: PreTrainedModel) -> Tensor:
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(model.parameters()))])


@pytest.fixture(scope="module")
def dpo_trainer(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return TRL's trainer with a policy and another random model as the reference."""
    torch.manual_seed(1)
    reference = AutoModelForCausalLM.from_pretrained(base_folder)
    for parameter in reference.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(base_folder),
        ref_model=reference,
        args=DPOConfig(
            output_dir=str(tmp_path_factory.mktemp("dpo")),
            beta=BETA,
            use_cpu=True,
            bf16=False,
            report_to="none",
        ),
        train_dataset=Dataset.from_list([{"prompt": "Add", "chosen": " the", "rejected": " numbers"}]),
        processing_class=AutoTokenizer.from_pretrained(base_folder),
    )


@pytest.mark.parametrize(("ours", "theirs", "settings"), TRL_LOSSES, ids=[ours for ours, _, _ in TRL_LOSSES])
def test_losses_and_gradients_match_trl_dpo_trainer(
    dpo_trainer: Any, ours: str, theirs: str, settings: dict[str, Any]
) -> None:
    dpo_trainer.loss_types = [theirs]
    dpo_trainer.label_smoothing = settings.get("label_smoothing", 0.0)
    inputs, model = batch(), dpo_trainer.model.eval()
    expected = dpo_trainer.compute_loss(model, inputs)
    expected_slope = gradient(expected, model)
    output = all_losses()[ours].function()(
        our_pairs(model, dpo_trainer.ref_model, inputs), beta=BETA, **settings
    )
    loss = output.losses.mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    slope = gradient(loss, model)
    assert (slope - expected_slope).norm() < 1e-4 * expected_slope.norm()
    assert expected_slope.norm() > 1e-4, "the comparison is of something"


def test_rpo_matches_two_trl_losses(dpo_trainer: Any) -> None:
    """DPO and `sft`, weights 1 and 1: TRL's likelihood is the mean over all tokens, so one pair at a time."""
    dpo_trainer.loss_types, dpo_trainer.loss_weights = ["sigmoid", "sft"], [1.0, 1.0]
    inputs = {key: value[[0, len(LENGTHS)]] for key, value in batch().items()}
    model = dpo_trainer.model.eval()
    expected = dpo_trainer.compute_loss(model, inputs).item()
    dpo_trainer.loss_types, dpo_trainer.loss_weights = ["sigmoid"], [1.0]
    loss = pairwise.rpo(our_pairs(model, dpo_trainer.ref_model, inputs), beta=BETA).losses
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("center_coefficient", [None, 0.01])
@pytest.mark.parametrize("with_margins", [False, True])
def test_bradley_terry_matches_trl_reward_trainer(
    base_folder: Path, tmp_path: Path, center_coefficient: float | None, with_margins: bool
) -> None:
    torch.manual_seed(0)
    trainer = RewardTrainer(
        model=AutoModelForSequenceClassification.from_pretrained(base_folder, num_labels=1),
        args=RewardConfig(
            output_dir=str(tmp_path),
            center_rewards_coefficient=center_coefficient,
            use_cpu=True,
            bf16=False,
            report_to="none",
        ),
        train_dataset=Dataset.from_list([{"chosen": "Add the", "rejected": "Add numbers"}]),
        processing_class=AutoTokenizer.from_pretrained(base_folder),
    )
    inputs = {key: value for key, value in batch().items() if key != "completion_mask"}
    chosen, rejected = trainer.model.eval()(**inputs).logits.squeeze(-1).chunk(2)
    margins = torch.tensor([0.5, 0.0, 2.0]) if with_margins else None
    ours = bradley_terry(
        chosen, rejected, margins=margins, center_rewards_coefficient=center_coefficient or 0.0
    ).mean()
    extra = {} if margins is None else {"margin": margins}
    expected = trainer.compute_loss(trainer.model, {**inputs, **extra})
    assert ours.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_cpo_simpo_and_cdpo_match_trl_cpo_loss(label_smoothing: float) -> None:
    """`cpo_loss` is a public method of four numbers of its trainer; smoothed and unreferenced it is cDPO."""
    from trl.experimental.cpo import CPOTrainer

    trainer = SimpleNamespace(
        alpha=0.0,
        beta=BETA,
        label_smoothing=label_smoothing,
        simpo_gamma=0.9,
        accelerator=SimpleNamespace(device="cpu"),
    )

    def theirs(loss_type: str, chosen: Tensor, rejected: Tensor) -> Tensor:
        trainer.loss_type = loss_type
        return CPOTrainer.cpo_loss(trainer, chosen, rejected)[0]

    pairs = random_pairs()
    zeros = torch.zeros_like(pairs.chosen_logps)
    unreferenced = replace(pairs, reference_chosen_logps=zeros, reference_rejected_logps=zeros)
    smoothed = pairwise.cdpo(unreferenced, beta=BETA, label_smoothing=label_smoothing).losses
    sums = theirs("sigmoid", pairs.chosen_logps, pairs.rejected_logps)
    assert torch.allclose(smoothed, sums, atol=1e-12)
    if not label_smoothing:
        assert torch.allclose(pairwise.cpo(pairs, beta=BETA, nll_weight=0.0).losses, sums, atol=1e-12)
        means = theirs("simpo", pairs.chosen_mean_logps, pairs.rejected_mean_logps)
        assert torch.allclose(pairwise.simpo(pairs, beta=BETA, margin=0.9).losses, means, atol=1e-12)
        printed = theirs("ipo", pairs.chosen_logps, pairs.rejected_logps)
        assert torch.allclose(pairwise.ipo(unreferenced, beta=BETA).losses, printed, atol=1e-12)


def test_orpo_matches_trl_odds_ratio_loss() -> None:
    """TRL returns beta log s(log odds ratio), in float32, to be taken from the likelihood."""
    from trl.experimental.orpo import ORPOTrainer

    trainer = SimpleNamespace(beta=BETA, accelerator=SimpleNamespace(device="cpu"))
    pairs = random_pairs()
    theirs = ORPOTrainer.odds_ratio_loss(trainer, pairs.chosen_mean_logps, pairs.rejected_mean_logps)[0]
    expected = -pairs.chosen_mean_logps - theirs
    assert torch.allclose(pairwise.orpo(pairs, beta=BETA).losses, expected.double(), atol=1e-6)
