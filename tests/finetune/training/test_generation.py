"""Completions do not depend on the other prompts of the batch."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_templates.segments import Message
from finetune.data.tokens import Encoder
from finetune.training import generation
from finetune.training.generation import generate_completions

QUESTIONS = ["Add.", "Add the numbers. Please. Please.", "a", "Say Response twice, and then stop.", "1 2 3"]


@pytest.fixture(scope="module")
def model(base_folder: Path) -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(base_folder).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # no near ties, which the batch's shape could flip by rounding
    return model


@pytest.fixture(scope="module")
def encoder(base_folder: Path) -> Encoder:
    return Encoder(AutoTokenizer.from_pretrained(base_folder), "alpaca")


def prompts(texts: list[str]) -> list[list[Message]]:
    return [[Message("user", text)] for text in texts]


def complete(
    model: nn.Module, encoder: Encoder, texts: list[str], **options: float
) -> list[generation.Completion]:
    settings = {"max_new_tokens": 12, "context": 256, **options}
    return generate_completions(model, encoder, prompts(texts), **settings)


def test_batched_generation_equals_one_by_one(model: nn.Module, encoder: Encoder) -> None:
    batched = complete(model, encoder, QUESTIONS)
    single = [complete(model, encoder, [text])[0] for text in QUESTIONS]
    assert batched == single
    assert len({completion.text for completion in batched}) > 1, "the questions do not all get one answer"
    assert complete(model, encoder, QUESTIONS[::-1]) == single[::-1]


def test_completions_are_in_prompt_order(
    model: nn.Module, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = complete(model, encoder, QUESTIONS * 2)
    monkeypatch.setattr(generation, "generation_tokens", lambda device: 200)
    assert complete(model, encoder, QUESTIONS * 2) == expected


def test_left_padding_is_not_seen(model: nn.Module, encoder: Encoder) -> None:
    ids = encoder.encode_prompt(prompts(QUESTIONS[2:3])[0])
    with torch.no_grad():
        output = model.generate(
            input_ids=torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=encoder.stop_ids
        )
    expected = encoder.decode_reply(output[0, len(ids) :].tolist())
    assert complete(model, encoder, QUESTIONS)[2].text == expected


class Fixed(nn.Module):
    """A model that generates a fixed list of tokens, padded like a batch."""

    def __init__(self, ids: list[int]) -> None:
        super().__init__()
        self.ids = ids
        self.weight = nn.Parameter(torch.zeros(1))
        self.seen: list[torch.Tensor] = []

    def generate(self, input_ids: torch.Tensor, **options: object) -> torch.Tensor:
        self.seen.append(input_ids)
        return torch.cat([input_ids, torch.tensor([self.ids] * len(input_ids))], dim=1)


def test_generation_stops_at_eos(encoder: Encoder) -> None:
    word = encoder.tokenizer("Add", add_special_tokens=False)["input_ids"]
    [stop] = encoder.stop_ids
    [ended] = complete(Fixed([*word, stop, *word]), encoder, ["a"])
    assert (ended.text, ended.ended_with_eos) == ("Add", True)
    [endless] = complete(Fixed([*word, *word]), encoder, ["a"])
    assert (endless.text, endless.ended_with_eos) == ("AddAdd", False)


def test_long_prompts_are_truncated_on_the_left(encoder: Encoder) -> None:
    model = Fixed([3])
    ids = encoder.encode_prompt(prompts(["word " * 100])[0])
    complete(model, encoder, ["word " * 100], context=40, max_new_tokens=10)
    [seen] = model.seen
    assert len(ids) > 30 and seen.tolist() == [ids[-30:]]


@pytest.mark.parametrize("context", [8, 12, 20])
def test_max_new_tokens_is_capped_at_half_the_context(encoder: Encoder, context: int) -> None:
    model = Fixed([3])
    ids = encoder.encode_prompt(prompts(["a"])[0])
    complete(model, encoder, ["a"], context=context, max_new_tokens=12)
    [seen] = model.seen
    assert 0 < seen.shape[1] < context and seen[0].tolist() == ids[-seen.shape[1] :]


@pytest.mark.parametrize("training", [True, False])
def test_the_model_keeps_its_mode(model: nn.Module, encoder: Encoder, training: bool) -> None:
    model.train(training)
    complete(model, encoder, ["a"])
    assert model.training is training
    model.eval()


def test_temperature_samples_and_zero_is_greedy(model: nn.Module, encoder: Encoder) -> None:
    assert complete(model, encoder, QUESTIONS) == complete(model, encoder, QUESTIONS)
    torch.manual_seed(0)
    sampled = {complete(model, encoder, ["a"], temperature=20.0)[0].text for _ in range(4)}
    assert len(sampled) > 1


def test_no_prompts_no_completions(encoder: Encoder) -> None:
    assert complete(Fixed([3]), encoder, []) == []
