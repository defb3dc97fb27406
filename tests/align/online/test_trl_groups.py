"""TRL's inputs and what it computes from our rewards: prompts, order, groups, advantages by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_models import VOCABULARY, make
from transformers import set_seed
from trl import GRPOConfig, RLOOConfig

from align.online.prompt_numbers import PromptNumbers
from align.online.trl_engine import Judging, online_trainer, prompt_order
from align.rl.prompts import Prompt, Prompts
from align.rl.rewards.rewards import Judged
from data_templates._segments import Message
from finetune.adapters.lora import Settings, build

STOP = 5
ASKED = [(7, 8, 9), (10, 11), (12, 13, 14, 15), (16,)]
PROMPTS = Prompts(
    tuple(
        Prompt((Message("user", f"prompt {number}"),), ids, f"file:{number}", None)
        for number, ids in enumerate(ASKED)
    )
)


class Words:
    """A tokenizer whose token 7 is the word 7."""

    eos_token_id = STOP

    def convert_ids_to_tokens(self, token):
        return str(token)

    def convert_tokens_to_ids(self, token):
        return None if token is None else int(token)

    def __len__(self):
        return VOCABULARY


class Rewards:
    """Known rewards: 100 times the prompt's index, plus the mean of a completion's token ids."""

    def __init__(self):
        self.seen = []

    def judge(self, talks, places, *, expected):
        self.seen.append(
            [(talk[0].content, talk[-1].content, place) for talk, place in zip(talks, places, strict=True)]
        )
        prompts = np.array([100.0 * int(talk[0].content.split()[1]) for talk in talks])
        means = np.array([np.mean([int(word) for word in talk[-1].content.split()]) for talk in talks])
        return Judged(prompts + means, {"prompt": prompts, "mean": means})


def judging():
    """Return known rewards as TRL's reward function."""
    encoder = SimpleNamespace(
        tokenizer=Words(), stop_ids=[STOP], decode_reply=lambda ids: " ".join(map(str, ids))
    )
    return Judging(Rewards(), PROMPTS, encoder)


def trainer(config, folder, **own):
    """Return TRL's trainer on a small random model with LoRA."""
    set_seed(0)
    model = build(make("llama"), Settings(rank=4, dropout=0.5))
    arguments = config(
        **{"output_dir": str(folder), "per_device_train_batch_size": 8, "num_generations": 4},
        **{"max_completion_length": 6, "use_cpu": True, "report_to": "none", "max_steps": 1},
        **{"shuffle_dataset": False, "disable_dropout": True, "disable_tqdm": True, "beta": 0.3},
        **{"save_strategy": "no"},
        **own,
    )
    return online_trainer(model, arguments, judging(), order=[2, 0, 3, 1], held_out=None)


def generated(made):
    """Return the first batch that a trainer passes to ``compute_loss``."""
    kept = {}
    loss = made.compute_loss

    def keep(model, inputs, **more):
        kept.update(inputs)
        return loss(model, inputs, **more)

    made.compute_loss = keep
    made.train()
    return kept


def replies(batch):
    """Yield prompt and completion token ids of a batch."""
    for ids, mask, reply, own in zip(
        batch["prompt_ids"],
        batch["prompt_mask"],
        batch["completion_ids"],
        batch["completion_mask"],
        strict=True,
    ):
        yield tuple(ids[mask.bool()].tolist()), tuple(reply[own.bool()].tolist())


@pytest.mark.parametrize("config", [RLOOConfig, GRPOConfig])
def test_the_prompts_are_ours_to_the_token_and_answered_in_groups(config, tmp_path):
    made = trainer(config, tmp_path)
    batch = generated(made)
    asked = [ids for ids, _ in replies(batch)]
    assert sorted(asked) == sorted([ASKED[2]] * 4 + [ASKED[0]] * 4), (
        "the first two of the order, 4 times each"
    )
    [seen] = made.judging.rewards.seen
    assert [place for *_, place in seen] == ["file:2"] * 4 + ["file:0"] * 4
    told = sorted((question, text) for question, text, _ in seen)
    number = {ids: f"prompt {index}" for index, ids in enumerate(ASKED)}
    assert sorted((number[ids], " ".join(map(str, reply))) for ids, reply in replies(batch)) == told
    assert len({reply for _, reply in replies(batch)}) > 4, "sampled, not repeated"


def groups(batch):
    """Return each completion's advantage, its reward, and the rewards of its group."""
    worth = [(ids, float(np.mean(reply))) for ids, reply in replies(batch)]
    return [
        (float(advantage), own, torch.tensor([other for asked, other in worth if asked == ids]))
        for advantage, (ids, own) in zip(batch["advantages"], worth, strict=True)
    ]


def test_rloo_compares_each_reply_with_the_mean_of_the_others(tmp_path):
    found = groups(generated(trainer(RLOOConfig, tmp_path)))
    for advantage, own, group in found:
        assert advantage == pytest.approx(own - (float(group.sum()) - own) / 3, abs=1e-3)
    assert len({round(advantage, 3) for advantage, *_ in found}) > 4


def test_grpo_divides_by_the_deviation_of_the_group(tmp_path):
    found = groups(generated(trainer(GRPOConfig, tmp_path, loss_type="grpo", scale_rewards="group")))
    for advantage, own, group in found:
        assert advantage == pytest.approx(float((own - group.mean()) / (group.std() + 1e-4)), abs=1e-3)
    assert len({round(advantage, 3) for advantage, *_ in found}) > 4


def test_a_reply_ends_at_any_of_the_encoder_s_stop_tokens(tmp_path):
    made = trainer(RLOOConfig, tmp_path)
    assert made.eos_token_ids == [STOP] and made.generation_config.pad_token_id == STOP
    for _, reply in replies(generated(made)):
        assert STOP not in reply[:-1] and len(reply) <= 6


def test_the_copy_is_the_reference_and_dropout_is_off(tmp_path):
    made = trainer(GRPOConfig, tmp_path)
    assert sorted(made.model.peft_config) == ["default", "ref"] and made.model.active_adapter == "default"
    drops = [module.p for module in made.model.modules() if isinstance(module, torch.nn.Dropout)]
    assert drops and set(drops) == {0.0}
    trained = {name for name, weight in made.model.named_parameters() if weight.requires_grad}
    assert trained and all(".default." in name for name in trained)


def test_numbers_stand_for_prompts(tmp_path):
    numbers = PromptNumbers(Words(), ASKED, end=STOP)
    assert numbers(text=["2", "0"])["input_ids"] == [[12, 13, 14, 15], [7, 8, 9]]
    assert (numbers.eos_token_id, numbers.pad_token_id, numbers.bos_token_id) == (STOP, STOP, None)
    assert numbers.batch_decode([[1], [2]]) == ["", ""] and len(numbers) == VOCABULARY


def test_the_order_is_a_new_shuffle_of_all_prompts_for_each_pass():
    lengths = [3, 1, 2, 5, 4, 6]
    order = prompt_order(lengths, count=15, seed=0, group_by_length=False, together=2)
    assert sorted(order[:6]) == sorted(order[6:12]) == list(range(6)) and order[:6] != order[6:12]
    assert len(order) == 15 and order[:12] == prompt_order(
        lengths, count=12, seed=0, group_by_length=False, together=2
    )
    assert order != prompt_order(lengths, count=15, seed=1, group_by_length=False, together=2)
