"""Completions are sampled from the distribution of their log-probabilities, independent of the batch."""

from collections import Counter
from typing import Any

import pytest
import torch
from adapter_properties import FAMILIES, base_of, build, default_quantization
from small_models import llama
from torch import nn

from align.rl.sampling import (
    Sampling,
    ShardedMultinomial,
    _generate_batch,
    _length_batches,
    sample_completions,
)
from align.rl.settings import SamplingSettings
from finetune.generation.sampler import SampledCompletion, until_stop_token

pytestmark = pytest.mark.filterwarnings("ignore")
PROMPTS = [(5, 9, 11), (7, 3, 30, 31, 32, 33, 40), (8,), (12, 13, 14, 15, 16)]
EOS = 95
METHODS = ["lora", "prefix", "prompt", "ptuning", "ia3", "llama_adapter"]


def greedy_completion(model: nn.Module, prompt: tuple[int, ...], max_new_tokens: int) -> tuple[int, ...]:
    """Return the greedy completion of a single prompt, without a KV cache."""
    ids = list(prompt)
    while len(ids) < len(prompt) + max_new_tokens and ids[-1] != EOS:
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return tuple(ids[len(prompt) :])


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_completion_is_independent_of_the_batch(method: str, family: str) -> None:
    if method == "llama_adapter" and family != "llama":
        pytest.skip("for Llama alone")
    model = build(method, base_of(family, default_quantization(method)))
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            torch.manual_seed(len(name))
            weight.add_(0.3 * torch.randn_like(weight))
    model.eval()
    sampling = Sampling(temperature=1e-4, max_new_tokens=6, stop_ids=[EOS], tokens_per_batch=4096)
    completions = sample_completions(model, PROMPTS, sampling=sampling, seed=0)
    assert [completion.ids for completion in completions] == [
        greedy_completion(model, prompt, 6) for prompt in PROMPTS
    ]


def test_token_frequencies_match_the_temperature() -> None:
    torch.manual_seed(0)
    model = llama()
    sampling = Sampling(temperature=2.0, max_new_tokens=1, stop_ids=[0], tokens_per_batch=10_000)
    counts = Counter(
        completion.ids[0]
        for completion in sample_completions(model, [PROMPTS[0]] * 6000, sampling=sampling, seed=1)
    )
    with torch.no_grad():
        probs = (model.eval()(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1] / 2.0).softmax(-1)
    # Chi-squared with 96 degrees of freedom stays below 150 in all but 1 of 3000 cases.
    expected = 6000 * probs
    observed = torch.tensor([counts[token] for token in range(len(probs))])
    assert ((observed - expected) ** 2 / expected).sum() < 150
    assert len(counts) > 80, "the distribution was truncated"


def test_sampling_depends_on_the_seed_alone() -> None:
    model = llama()
    model.train()
    sampling = Sampling(temperature=1.0, max_new_tokens=5, stop_ids=[1, 2], tokens_per_batch=40)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first = sample_completions(model, PROMPTS, sampling=sampling, seed=3)
    assert torch.equal(torch.get_rng_state(), state) and model.training
    torch.rand(5)
    assert (
        sample_completions(model, PROMPTS, sampling=sampling, seed=3)
        == first
        != sample_completions(model, PROMPTS, sampling=sampling, seed=4)
    )


@pytest.mark.parametrize(("at_once", "expected"), [("auto", [len(PROMPTS)]), (1, [1] * len(PROMPTS))])
def test_generation_batch_size_is_respected(
    at_once: Any, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch_sizes = llama(), []
    generate = model.generate

    def counted(**inputs: Any) -> Any:
        batch_sizes.append(len(inputs["input_ids"]))
        return generate(**inputs)

    monkeypatch.setattr(model, "generate", counted)
    sampling = Sampling.from_settings(
        "cpu", SamplingSettings(max_new_tokens=3, generation_batch_size=at_once), stop_ids=[1]
    )
    assert len(sample_completions(model, PROMPTS, sampling=sampling, seed=0)) == len(PROMPTS)
    assert batch_sizes == expected


def test_completion_ends_with_eos_or_max_length() -> None:
    torch.manual_seed(0)
    model = llama()
    stop_ids = list(range(0, 97, 4))
    sampling = Sampling(temperature=1.0, max_new_tokens=6, stop_ids=stop_ids, tokens_per_batch=4096)
    completions = sample_completions(model, PROMPTS * 8, sampling=sampling, seed=0)
    assert {completion.ended_with_eos for completion in completions} == {True, False}
    for completion in completions:
        assert not set(completion.ids[:-1]) & set(stop_ids)
        assert (completion.ids[-1] in stop_ids) == completion.ended_with_eos and (
            completion.ended_with_eos or len(completion.ids) == 6
        )


@torch.no_grad()
def sample_on_rank(
    model: nn.Module, sampling: Sampling, rank: int, size: int
) -> dict[int, SampledCompletion]:
    """Return the completions that one of several processes samples; the others' lengths are looked up."""
    prompts, completions = PROMPTS, {}
    reference = sample_completions(model, prompts, sampling=sampling, seed=5)
    torch.manual_seed(5)
    for indices in _length_batches(prompts, sampling):
        local_rows = list(range(rank, len(indices), size)) or [0]
        sampler = ShardedMultinomial(local_rows, len(indices), temperature=sampling.temperature)
        local_prompts = [prompts[indices[index]] for index in local_rows]
        new_ids = _generate_batch(model, local_prompts, sampling, sampler)
        sampler.skip(max(len(reference[index].ids) for index in indices) - len(new_ids[0]))
        completions |= {
            indices[index]: until_stop_token(ids, sampling.stop_ids)
            for index, ids in zip(local_rows, new_ids, strict=True)
        }
    return completions


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("size", "tokens"), [(2, 4096), (3, 4096), (2, 30)])
def test_several_processes_sample_as_one(temperature: float, size: int, tokens: int) -> None:
    torch.manual_seed(0)
    model = llama().eval()
    sampling = Sampling(
        temperature, max_new_tokens=7, stop_ids=list(range(0, 97, 6)), tokens_per_batch=tokens
    )
    expected = sample_completions(model, PROMPTS, sampling=sampling, seed=5)
    assert len({len(completion.ids) for completion in expected}) > 1, (
        "completions of one length would show little"
    )
    shards = [sample_on_rank(model, sampling, rank, size) for rank in range(size)]
    assert {key: completion for shard in shards for key, completion in shard.items()} == dict(
        enumerate(expected)
    )
