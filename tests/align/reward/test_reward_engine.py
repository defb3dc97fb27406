"""TRL's reward trainer with our tokens: loss and gradient of scores read one completion at a time."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig

from align.engines.trl.reward import TrlRewardTrainer, reward_config
from align.preference.losses.reward import bradley_terry
from align.preference.rows.dataset import PreferenceGroups
from align.preference.rows.prepare import prepare_preferences
from align.preference.settings import PreferenceSettings
from finetune.data.tokens import Encoder
from finetune.distributed.interrupts import NotFiniteError

WORDS = ("the", "numbers", "Add", "Response", "Input", "Instruction", "that", "request")
ROWS = [
    {
        "prompt": f"Add {WORDS[i]}.",
        "chosen": " ".join(WORDS[: 2 + i % 4]),
        "rejected": " ".join(WORDS[i % 5 :]),
    }
    for i in range(7)
]
MARGINS = [0.5, 0.0, 2.0, 0.0, 1.0, 0.0, 0.0]


@pytest.fixture
def groups(base_folder: Path) -> PreferenceGroups:
    encoder = Encoder(AutoTokenizer.from_pretrained(base_folder), "plain")
    data = PreferenceSettings(source=ROWS, template="plain", cache=False)
    return prepare_preferences(data, encoder, max_length=64, seed=0).train


def trainer_of(
    base: Path,
    out: Path,
    groups: PreferenceGroups,
    *,
    centring: float = 0.0,
    margins: list[float] | None = None,
) -> TrlRewardTrainer:
    """Return TRL's trainer, the engine's way; the base's padding token is its end token."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.eos_token
    lora = LoraConfig(task_type="SEQ_CLS", r=4, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(AutoModelForSequenceClassification.from_pretrained(base, num_labels=1), lora)
    args = RewardConfig(
        output_dir=str(out),
        per_device_train_batch_size=4,
        use_cpu=True,
        bf16=False,
        report_to="none",
        **reward_config(center_rewards_coefficient=centring).fixed_arguments,
    )
    return TrlRewardTrainer(
        model, args, tokenizer, train=groups, held_out=groups, pad_id=tokenizer.bos_token_id, margins=margins
    )


def separate_scores(trainer: TrlRewardTrainer, groups: PreferenceGroups, count: int) -> tuple[Tensor, Tensor]:
    """Return the scores at each completion's last token, one line at a time, nothing padded."""
    scores_by_side: list[list[Tensor]] = [[], []]
    for group in (groups[index] for index in range(count)):
        for side, completion in enumerate(group.completion_ids):
            ids = torch.tensor([[*group.prompt_ids.tolist(), *completion.tolist()]])
            base = trainer.model.base_model.model
            states = base.model(input_ids=ids).last_hidden_state
            scores_by_side[side].append(trainer.model.base_model.model.score(states[:, -1])[0, 0])
    return torch.stack(scores_by_side[0]), torch.stack(scores_by_side[1])


@pytest.mark.parametrize("centring", [0.0, 0.01])
@pytest.mark.parametrize("margins", [None, MARGINS])
def test_loss_and_gradient_match_bradley_terry(
    base_folder: Path,
    tmp_path: Path,
    groups: PreferenceGroups,
    centring: float,
    margins: list[float] | None,
) -> None:
    trainer = trainer_of(base_folder, tmp_path, groups, centring=centring, margins=margins)
    model = trainer.model.eval()
    weights = [weight for weight in model.parameters() if weight.requires_grad]

    def slope(loss: Tensor) -> Tensor:
        return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, weights)])

    rows = [trainer.train_dataset[index] for index in range(4)]
    expected = trainer.compute_loss(model, trainer.data_collator(rows))
    expected_slope = slope(expected)
    scores = separate_scores(trainer, groups, 4)
    expected_gradient = None if margins is None else torch.tensor(margins[:4])
    loss = bradley_terry(*scores, margins=expected_gradient, center_rewards_coefficient=centring).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert (slope(loss) - expected_slope).norm() < 1e-4 * expected_slope.norm()
    assert expected_slope.norm() > 1e-4, "the comparison is of something"


def test_held_out_metrics_match_single_completions(
    base_folder: Path, tmp_path: Path, groups: PreferenceGroups
) -> None:
    trainer = trainer_of(base_folder, tmp_path, groups)
    trainer.model.eval()
    with torch.no_grad():
        chosen, rejected = separate_scores(trainer, groups, 7)
    metrics = trainer.held_out_metrics()
    assert metrics["loss"] == pytest.approx(float(bradley_terry(chosen, rejected).mean()), rel=1e-5)
    assert metrics["rewards/margins"] == pytest.approx(float((chosen - rejected).mean()), rel=1e-4)
    assert metrics["rewards/accuracies"] == pytest.approx(float((chosen > rejected).float().mean()))


def test_the_user_s_tokenizer_keeps_its_padding_token(
    base_folder: Path, tmp_path: Path, groups: PreferenceGroups
) -> None:
    trainer = trainer_of(base_folder, tmp_path, groups)
    assert trainer.model.config.pad_token_id == trainer.processing_class.bos_token_id
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    tokenizer.pad_token = tokenizer.eos_token
    args = trainer.args
    TrlRewardTrainer(
        trainer.model, args, tokenizer, train=groups, held_out=None, pad_id=tokenizer.bos_token_id
    )
    assert tokenizer.pad_token == tokenizer.eos_token


def test_two_steps_and_a_nan(base_folder: Path, tmp_path: Path, groups: PreferenceGroups) -> None:
    trainer = trainer_of(base_folder, tmp_path, groups)
    trainer.args.logging_steps, trainer.args.max_steps = 1, 2
    trainer.train()
    assert len([entry for entry in trainer.state.log_history if "loss" in entry]) == 2
    next(weight for weight in trainer.model.parameters() if weight.requires_grad).data.fill_(float("nan"))
    with pytest.raises(NotFiniteError, match=r"^loss is nan at step \d, on row \d(, row \d){3}$"):
        trainer.train()
