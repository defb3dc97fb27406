"""Shared prompts give the log-probabilities of separate forward passes, for every adapter."""

from collections.abc import Sequence

import pytest
import torch
from adapter_properties import FAMILIES, METHODS, base_of, build, default_quantization
from small_models import MODELS, make
from torch import nn
from transformers import AutoModelForCausalLM, MambaConfig, OpenAIGPTConfig, PretrainedConfig

from finetune.generation import label_likelihoods
from finetune.generation.label_likelihoods import choice_logps, label_logps, separate_logps

pytestmark = pytest.mark.filterwarnings("ignore")
EOS = 95
PROMPTS = [(5, 9, 11), (7, 3, 30, 31, 32, 33, 40), (8, 20), (12, 13, 14, 15, 16)]
LABELS = [(60, EOS), (60, 61, EOS), (62, 63, 64, 65, EOS), (66, EOS), (EOS,)]
"""The first is a prefix of the second; token counts differ; the last is the empty reply."""


@torch.no_grad()
def naive_logps(
    model: nn.Module, prompts: Sequence[Sequence[int]], labels: Sequence[Sequence[int]]
) -> torch.Tensor:
    """One forward pass for each prompt and label, without padding, masks and cache."""
    rows = []
    for prompt in prompts:
        for label in labels:
            logits = model(input_ids=torch.tensor([[*prompt, *label]]), use_cache=False).logits[0].double()
            logps = logits.log_softmax(-1)[-len(label) - 1 : -1]
            rows.append(sum(logps[step, token] for step, token in enumerate(label)))
    return torch.stack(rows).view(len(prompts), len(labels)).float()


def disturbed(model: nn.Module) -> nn.Module:
    """Return the model with other trained weights, since most adapters begin without effect."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                torch.manual_seed(len(name))
                weight.add_(0.1 * torch.randn_like(weight))
    return model.eval()


@pytest.fixture
def separate_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []

    def counted(*arguments: object, **options: object) -> torch.Tensor:
        calls.append(1)
        return separate_logps(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(label_likelihoods, "separate_logps", counted)
    return calls


@pytest.mark.parametrize("method", METHODS)
def test_every_adapter(method: str, separate_calls: list[int]) -> None:
    family = "llama" if method == "llama_adapter" else "qwen2"  # which has biases, for BitFit
    model = disturbed(build(method, base_of(family, default_quantization(method))))
    expected = naive_logps(model, PROMPTS, LABELS)
    # 4-bit and 8-bit products round by the rows of a batch.
    tolerance = 1e-5 if default_quantization(method) == "none" else 2e-2
    actual = label_logps(model, PROMPTS, LABELS, tokens_per_batch=4096)
    assert torch.allclose(actual, expected, atol=tolerance, rtol=tolerance)
    separate = separate_logps(model, PROMPTS, [LABELS] * len(PROMPTS), tokens_per_batch=64)
    assert torch.allclose(separate.view_as(expected), expected, atol=tolerance, rtol=tolerance)
    assert separate_calls == [], "every adapter shares the prompt"


@pytest.mark.parametrize("method", ["lora", "prefix", "prompt"])
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "qwen2"])
def test_families(method: str, family: str) -> None:
    model = disturbed(build(method, base_of(family)))
    expected = naive_logps(model, PROMPTS, LABELS)
    for budget in (4096, 60, 1):  # all labels at once, some, one prompt and one label at a time
        actual = label_logps(model, PROMPTS, LABELS, tokens_per_batch=budget)
        assert torch.allclose(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_models_with_windows_and_capped_logits(name: str) -> None:
    model = make(name)
    for prompts in (PROMPTS, [tuple(range(20, 34)), tuple(range(40, 54))], [*PROMPTS, tuple(range(20, 50))]):
        actual = label_logps(model, prompts, LABELS, tokens_per_batch=4096)
        assert torch.allclose(actual, naive_logps(model, prompts, LABELS), atol=2e-5, rtol=2e-5)


def test_a_prompt_of_one_token(separate_calls: list[int]) -> None:
    model = make("llama")
    actual = label_logps(model, [(5,), *PROMPTS], LABELS, tokens_per_batch=4096)
    assert torch.allclose(actual, naive_logps(model, [(5,), *PROMPTS], LABELS), atol=2e-5, rtol=2e-5)
    assert separate_calls == [1]


@pytest.mark.parametrize(
    "config",
    [
        OpenAIGPTConfig(vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=2),
        MambaConfig(vocab_size=97, hidden_size=32, state_size=8, num_hidden_layers=2),
    ],
    ids=["no cache", "recurrent state"],
)
def test_models_without_keys_and_values(config: PretrainedConfig, separate_calls: list[int]) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    actual = label_logps(model, PROMPTS, LABELS, tokens_per_batch=4096)
    assert torch.allclose(actual, naive_logps(model, PROMPTS, LABELS), atol=2e-5, rtol=2e-5)
    assert separate_calls == [1]


def test_labels_that_end_are_disjoint_events() -> None:
    """All replies of at most one token before the stop token: their probabilities sum to at most 1."""
    model = make("llama")
    labels = [(EOS,), *((token, EOS) for token in range(97) if token != EOS)]
    total = label_logps(model, PROMPTS, labels, tokens_per_batch=4096).exp().sum(-1)
    assert ((total > 0) & (total <= 1 + 1e-5)).all()


def test_many_labels_and_the_model_s_mode() -> None:
    model = make("llama").train()
    labels = [(40 + index // 10, 50 + index % 10, EOS) for index in range(100)]
    actual = label_logps(model, PROMPTS, labels, tokens_per_batch=500)
    assert model.training and actual.shape == (4, 100)
    assert torch.allclose(actual, naive_logps(model.eval(), PROMPTS, labels), atol=2e-5, rtol=2e-5)


def test_each_prompt_has_choices_of_its_own() -> None:
    model = disturbed(build("lora", base_of("llama")))
    choices = [LABELS[: 1 + index % len(LABELS)] for index in range(len(PROMPTS))]
    expected = naive_logps(model, PROMPTS, LABELS)
    for budget in (4096, 60, 1):
        actual = choice_logps(model, PROMPTS, choices, tokens_per_batch=budget)
        for index, logps in enumerate(actual):
            assert torch.allclose(logps, expected[index, : len(choices[index])], atol=1e-5, rtol=1e-5)
