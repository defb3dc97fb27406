"""Completions are sampled from the distribution of their log-probabilities, independent of the batch."""

from collections import Counter
from typing import Any

import pytest
import torch
from adapter_properties import FAMILIES, base_of, build, first_choice
from small_models import llama
from torch import nn

from align.rl.rollout import Completion, DrawsOfAll, Sampling, _completion, _generate, _parts, sample
from align.rl.settings import SamplingSettings

pytestmark = pytest.mark.filterwarnings("ignore")
PROMPTS = [(5, 9, 11), (7, 3, 30, 31, 32, 33, 40), (8,), (12, 13, 14, 15, 16)]
END = 95
METHODS = ["lora", "prefix", "prompt", "ptuning", "ia3", "llama_adapter"]


def likeliest(model: nn.Module, prompt: tuple[int, ...], tokens: int) -> tuple[int, ...]:
    """Return the greedy completion of a single prompt, without a KV cache."""
    ids = list(prompt)
    while len(ids) < len(prompt) + tokens and ids[-1] != END:
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return tuple(ids[len(prompt) :])


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_a_reply_does_not_depend_on_its_neighbours(method: str, family: str) -> None:
    if method == "llama_adapter" and family != "llama":
        pytest.skip("for Llama alone")
    model = build(method, base_of(family, first_choice(method)))
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            torch.manual_seed(len(name))
            weight.add_(0.3 * torch.randn_like(weight))
    model.eval()
    cold = Sampling(temperature=1e-4, max_new_tokens=6, stop_ids=[END], tokens=4096)
    found = sample(model, PROMPTS, sampling=cold, seed=0)
    assert [one.ids for one in found] == [likeliest(model, prompt, 6) for prompt in PROMPTS]


def test_tokens_come_as_often_as_the_temperature_says() -> None:
    torch.manual_seed(0)
    model = llama()
    warm = Sampling(temperature=2.0, max_new_tokens=1, stop_ids=[0], tokens=10_000)
    counts = Counter(one.ids[0] for one in sample(model, [PROMPTS[0]] * 6000, sampling=warm, seed=1))
    with torch.no_grad():
        shares = (model.eval()(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1] / 2.0).softmax(-1)
    # Chi-squared with 96 degrees of freedom stays below 150 in all but 1 of 3000 cases.
    expected = 6000 * shares
    found = torch.tensor([counts[token] for token in range(len(shares))])
    assert ((found - expected) ** 2 / expected).sum() < 150
    assert len(counts) > 80, "the distribution was truncated"


def test_the_seed_alone_decides_and_nothing_else_is_drawn_from() -> None:
    model = llama()
    model.train()
    drawn = Sampling(temperature=1.0, max_new_tokens=5, stop_ids=[1, 2], tokens=40)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first = sample(model, PROMPTS, sampling=drawn, seed=3)
    assert torch.equal(torch.get_rng_state(), state) and model.training
    torch.rand(5)
    assert (
        sample(model, PROMPTS, sampling=drawn, seed=3)
        == first
        != sample(model, PROMPTS, sampling=drawn, seed=4)
    )


@pytest.mark.parametrize(("at_once", "expected"), [("auto", [len(PROMPTS)]), (1, [1] * len(PROMPTS))])
def test_as_many_are_answered_side_by_side_as_is_asked_for(
    at_once: Any, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, lines = llama(), []
    generate = model.generate

    def counted(**inputs: Any) -> Any:
        lines.append(len(inputs["input_ids"]))
        return generate(**inputs)

    monkeypatch.setattr(model, "generate", counted)
    how = Sampling.on("cpu", SamplingSettings(max_new_tokens=3, at_once=at_once), stop_ids=[1])
    assert len(sample(model, PROMPTS, sampling=how, seed=0)) == len(PROMPTS)
    assert lines == expected


def test_a_reply_ends_with_its_end_token_or_with_its_length() -> None:
    torch.manual_seed(0)
    model = llama()
    ends = list(range(0, 97, 4))
    drawn = Sampling(temperature=1.0, max_new_tokens=6, stop_ids=ends, tokens=4096)
    found = sample(model, PROMPTS * 8, sampling=drawn, seed=0)
    assert {one.stopped for one in found} == {True, False}
    for one in found:
        assert not set(one.ids[:-1]) & set(ends)
        assert (one.ids[-1] in ends) == one.stopped and (one.stopped or len(one.ids) == 6)


@torch.no_grad()
def of_a_process(model: nn.Module, sampling: Sampling, rank: int, size: int) -> dict[int, Completion]:
    """Return the completions that one of several processes samples; the others' lengths are looked up."""
    prompts, found = PROMPTS, {}
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    whole = sample(model, prompts, sampling=sampling, seed=5)
    torch.manual_seed(5)
    for part in _parts(order, [len(prompt) for prompt in prompts], sampling):
        own = list(range(rank, len(part), size)) or [0]
        draws = DrawsOfAll(own, len(part), temperature=sampling.temperature)
        asked = [prompts[part[index]] for index in own]
        new = _generate(model, asked, sampling, torch.device("cpu"), draws=draws)
        draws.skip(max(len(whole[index].ids) for index in part) - len(new[0]))
        found |= {part[index]: _completion(ids, sampling) for index, ids in zip(own, new, strict=True)}
    return found


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("size", "tokens"), [(2, 4096), (3, 4096), (2, 30)])
def test_several_processes_draw_what_one_would(temperature: float, size: int, tokens: int) -> None:
    torch.manual_seed(0)
    model = llama().eval()
    drawn = Sampling(temperature, max_new_tokens=7, stop_ids=list(range(0, 97, 6)), tokens=tokens)
    whole = sample(model, PROMPTS, sampling=drawn, seed=5)
    assert len({len(one.ids) for one in whole}) > 1, "completions of one length would show little"
    shares = [of_a_process(model, drawn, rank, size) for rank in range(size)]
    assert {key: one for share in shares for key, one in share.items()} == dict(enumerate(whole))
