"""Completions depend on prompt, seed and stream alone; their log-probabilities are the model's."""

from collections import Counter
from typing import Any

import pytest
import torch
from small_models import llama, make
from torch import nn

from finetune.generation.sampler import (
    Decoding,
    SampledCompletion,
    Sampler,
    TransformersSampler,
    length_batches,
)

PROMPTS = [(5, 9, 11), (7, 3, 30, 31, 32, 33, 40), (8,), (12, 13, 14, 15, 16)]
STOP = list(range(0, 97, 9))


def sampler(model: nn.Module, **settings: Any) -> TransformersSampler:
    return TransformersSampler(model, STOP, **{"tokens_per_batch": 4096, **settings})


def logps_without_cache(
    model: nn.Module, prompt: tuple[int, ...], completion: SampledCompletion, temperature: float
) -> list[float]:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *completion.ids]]), use_cache=False).logits[0]
    logps = (logits[len(prompt) - 1 : -1] / temperature).log_softmax(-1)
    return [float(row[token]) for row, token in zip(logps, completion.ids, strict=True)]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("batching", [{"tokens_per_batch": 30}, {"max_batch_size": 1}, {}])
def test_a_completion_depends_on_its_prompt_and_stream_alone(
    temperature: float, batching: dict[str, int]
) -> None:
    model, decoding = make("llama"), Decoding(8, temperature, seed=3)
    expected = [
        sampler(model).sample([prompt], decoding, streams=[10 + row])[0] for row, prompt in enumerate(PROMPTS)
    ]
    assert sampler(model, **batching).sample(PROMPTS, decoding, streams=[10, 11, 12, 13]) == expected
    assert sampler(model).sample(PROMPTS[::-1], decoding, streams=[13, 12, 11, 10]) == expected[::-1]


def test_seeds_and_streams_give_other_samples() -> None:
    uniform = llama()  # random weights: nearly every token is as likely
    samples = {
        sampler(uniform).sample([PROMPTS[0]], Decoding(6, 1.0, seed), streams=[stream])[0].ids
        for seed in (0, 1)
        for stream in (0, 1)
    }
    assert len(samples) == 4


def test_token_frequencies_match_the_temperature() -> None:
    torch.manual_seed(0)
    model = llama()
    completions = sampler(model).sample([PROMPTS[0]] * 6000, Decoding(1, 2.0, seed=1))
    counts = Counter(completion.ids[0] for completion in completions)
    with torch.no_grad():
        probs = (model.eval()(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1] / 2.0).softmax(-1)
    # Chi-squared with 96 degrees of freedom stays below 150 in all but 1 of 3000 cases.
    expected = 6000 * probs
    observed = torch.tensor([counts[token] for token in range(len(probs))])
    assert ((observed - expected) ** 2 / expected).sum() < 150


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_logps_are_those_of_the_distribution(temperature: float) -> None:
    model = make("llama")
    completions = sampler(model).sample(PROMPTS, Decoding(8, temperature, logps=True))
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        assert completion.logps == pytest.approx(
            logps_without_cache(model, prompt, completion, temperature or 1.0), abs=2e-4
        )


def test_finish_reason_is_that_of_openai() -> None:
    completions = sampler(llama()).sample(PROMPTS * 8, Decoding(6, 1.0))
    assert {completion.finish_reason for completion in completions} == {"stop", "length"}
    for completion in completions:
        ended = completion.ids[-1] in STOP
        assert completion.finish_reason == ("stop" if ended else "length")
        assert ended or len(completion.ids) == 6
        assert not set(completion.ids[:-1]) & {*STOP}


def test_random_state_and_mode_are_left_as_they_were() -> None:
    model: Any = llama().train()
    state = torch.get_rng_state()
    checked: Sampler = sampler(model)
    checked.sample(PROMPTS, Decoding(3, 1.0))
    assert torch.equal(torch.get_rng_state(), state) and model.training is True


def test_batches_keep_the_budget_and_equal_lengths_where_padding_is_read() -> None:
    lengths = [3, 9, 3, 4, 30, 3]
    batches = length_batches(lengths, max_new_tokens=2, tokens_per_batch=22)
    assert sorted(index for batch in batches for index in batch) == list(range(6))
    assert all(len(batch) == 1 or len(batch) * (lengths[batch[-1]] + 2) <= 22 for batch in batches)
    unpadded = length_batches(lengths, max_new_tokens=2, tokens_per_batch=999, padded=False)
    assert [[lengths[index] for index in batch] for batch in unpadded] == [[3, 3, 3], [4], [9], [30]]
    assert length_batches([], max_new_tokens=2, tokens_per_batch=9) == []
