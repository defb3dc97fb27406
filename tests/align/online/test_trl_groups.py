"""TRL's inputs and what it computes from our rewards: prompts, order, groups, advantages by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_models import VOCABULARY, make
from transformers import set_seed
from trl import GRPOConfig, RLOOConfig

from align.engines.trl.online import TRAINERS, PromptIdTokenizer, TRLRewardFunction, prompt_order
from align.online.settings import GRPOSettings
from align.rl.prompts import Prompts
from align.rl.rewards.rewards import RewardScores
from data_templates.segments import Message
from finetune.adapters.lora import Settings, build
from finetune.data.conversation import Conversation

STOP = 5
PROMPT_IDS = [(7, 8, 9), (10, 11), (12, 13, 14, 15), (16,)]
PROMPTS = Prompts(
    {
        "input_ids": np.concatenate(PROMPT_IDS).astype(np.int32),
        "offsets": np.cumsum([0, *map(len, PROMPT_IDS)]),
    },
    [
        Conversation([Message("user", f"prompt {number}"), Message("assistant", "")], f"file:{number}")
        for number in range(len(PROMPT_IDS))
    ],
)


class NumberTokenizer:
    """A tokenizer whose token 7 is the word 7."""

    eos_token_id = STOP

    def convert_ids_to_tokens(self, token):
        return str(token)

    def convert_tokens_to_ids(self, token):
        return None if token is None else int(token)

    def __len__(self):
        return VOCABULARY


class KnownRewards:
    """Known rewards: 100 times the prompt's index, plus the mean of a completion's token ids."""

    def __init__(self):
        self.seen = []

    def score(self, conversations, locations, *, expected):
        self.seen.append(
            [
                (conversation[0].content, conversation[-1].content, location)
                for conversation, location in zip(conversations, locations, strict=True)
            ]
        )
        prompts = np.array(
            [100.0 * int(conversation[0].content.split()[1]) for conversation in conversations]
        )
        means = np.array(
            [
                np.mean([int(word) for word in conversation[-1].content.split()])
                for conversation in conversations
            ]
        )
        return RewardScores(prompts + means, {"prompt": prompts, "mean": means})


def known_reward_function():
    """Return known rewards as TRL's reward function."""
    encoder = SimpleNamespace(
        tokenizer=NumberTokenizer(), stop_ids=[STOP], decode_reply=lambda ids: " ".join(map(str, ids))
    )
    return TRLRewardFunction(KnownRewards(), PROMPTS, encoder, lambda ended_with_eos: None)


def make_trainer(config, folder, **overrides):
    """Return TRL's trainer on a small random model with LoRA."""
    set_seed(0)
    model = build(make("llama"), Settings(rank=4, dropout=0.5))
    arguments = config(
        **{"output_dir": str(folder), "per_device_train_batch_size": 8, "num_generations": 4},
        **{"max_completion_length": 6, "use_cpu": True, "report_to": "none", "max_steps": 1},
        **{"shuffle_dataset": False, "disable_dropout": True, "disable_tqdm": True, "beta": 0.3},
        **{"save_strategy": "no"},
        **overrides,
    )
    return TRAINERS[config.__name__](
        model, arguments, known_reward_function(), order=[2, 0, 3, 1], evaluate_held_out=None
    )


def first_batch(trainer):
    """Return the first batch that a trainer passes to ``compute_loss``."""
    batch = {}
    compute_loss = trainer.compute_loss

    def keep(model, inputs, **more):
        batch.update(inputs)
        return compute_loss(model, inputs, **more)

    trainer.compute_loss = keep
    trainer.train()
    return batch


def prompts_and_completions(batch):
    """Yield prompt and completion token ids of a batch."""
    for ids, mask, completion, completion_mask in zip(
        batch["prompt_ids"],
        batch["prompt_mask"],
        batch["completion_ids"],
        batch["completion_mask"],
        strict=True,
    ):
        yield tuple(ids[mask.bool()].tolist()), tuple(completion[completion_mask.bool()].tolist())


@pytest.mark.parametrize("config", [RLOOConfig, GRPOConfig])
def test_prompts_have_our_token_ids_and_are_sampled_in_groups(config, tmp_path):
    trainer = make_trainer(config, tmp_path)
    batch = first_batch(trainer)
    prompts = [ids for ids, _ in prompts_and_completions(batch)]
    assert sorted(prompts) == sorted([PROMPT_IDS[2]] * 4 + [PROMPT_IDS[0]] * 4), (
        "the first two of the order, 4 times each"
    )
    [seen] = trainer.reward_function.rewards.seen
    assert [location for *_, location in seen] == ["file:2"] * 4 + ["file:0"] * 4
    expected = sorted((question, text) for question, text, _ in seen)
    number = {ids: f"prompt {index}" for index, ids in enumerate(PROMPT_IDS)}
    assert (
        sorted(
            (number[ids], " ".join(map(str, completion)))
            for ids, completion in prompts_and_completions(batch)
        )
        == expected
    )
    assert len({completion for _, completion in prompts_and_completions(batch)}) > 4, "sampled, not repeated"


def advantages_with_rewards(batch):
    """Return each completion's advantage, its reward, and the rewards of its group."""
    rewards = [(ids, float(np.mean(completion))) for ids, completion in prompts_and_completions(batch)]
    return [
        (float(advantage), reward, torch.tensor([other for prompt, other in rewards if prompt == ids]))
        for advantage, (ids, reward) in zip(batch["advantages"], rewards, strict=True)
    ]


def test_rloo_baseline_is_the_mean_of_the_other_completions(tmp_path):
    results = advantages_with_rewards(first_batch(make_trainer(RLOOConfig, tmp_path)))
    for advantage, reward, group in results:
        assert advantage == pytest.approx(reward - (float(group.sum()) - reward) / 3, abs=1e-3)
    assert len({round(advantage, 3) for advantage, *_ in results}) > 4


def test_grpo_is_the_papers_by_default():
    """arXiv 2402.03300, equation 3; TRL's own defaults are the loss of DAPO, and no KL."""
    paper = {"loss_type": "grpo", "beta": 0.04, "scale_rewards": "group"}
    ours, trl = GRPOSettings().trl_arguments, GRPOConfig(use_cpu=True, bf16=False)
    assert {key: ours[key] for key in paper} == paper
    assert (trl.loss_type, trl.beta) == ("dapo", 0.0)


def test_grpo_normalizes_by_group_std(tmp_path):
    results = advantages_with_rewards(
        first_batch(make_trainer(GRPOConfig, tmp_path, loss_type="grpo", scale_rewards="group"))
    )
    for advantage, reward, group in results:
        assert advantage == pytest.approx(float((reward - group.mean()) / (group.std() + 1e-4)), abs=1e-3)
    assert len({round(advantage, 3) for advantage, *_ in results}) > 4


def test_completions_stop_at_any_stop_token(tmp_path):
    trainer = make_trainer(RLOOConfig, tmp_path)
    assert trainer.eos_token_ids == [STOP] and trainer.generation_config.pad_token_id == STOP
    for _, completion in prompts_and_completions(first_batch(trainer)):
        assert STOP not in completion[:-1] and len(completion) <= 6


def test_adapter_copy_is_the_reference_and_dropout_is_off(tmp_path):
    trainer = make_trainer(GRPOConfig, tmp_path)
    assert (
        sorted(trainer.model.peft_config) == ["default", "ref"] and trainer.model.active_adapter == "default"
    )
    drops = [module.p for module in trainer.model.modules() if isinstance(module, torch.nn.Dropout)]
    assert drops and set(drops) == {0.0}
    trained = {name for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    assert trained and all(".default." in name for name in trained)


def test_prompt_id_tokenizer_maps_indices_to_ids(tmp_path):
    tokenizer = PromptIdTokenizer(NumberTokenizer(), PROMPT_IDS, eos_token_id=STOP)
    assert tokenizer(text=["2", "0"])["input_ids"] == [[12, 13, 14, 15], [7, 8, 9]]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id) == (STOP, STOP, None)
    assert tokenizer.batch_decode([[1], [2]]) == ["", ""] and len(tokenizer) == VOCABULARY


def test_prompt_order_is_reshuffled_per_epoch():
    lengths = [3, 1, 2, 5, 4, 6]
    order = prompt_order(lengths, count=15, seed=0, group_by_length=False, prompts_per_step=2)
    assert sorted(order[:6]) == sorted(order[6:12]) == list(range(6)) and order[:6] != order[6:12]
    assert len(order) == 15 and order[:12] == prompt_order(
        lengths, count=12, seed=0, group_by_length=False, prompts_per_step=2
    )
    assert order != prompt_order(lengths, count=15, seed=1, group_by_length=False, prompts_per_step=2)
