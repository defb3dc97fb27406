"""Reference policy: the initial policy, live or precomputed, and its cache."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from torch import nn

from align.dpo import reference_logps
from align.dpo.reference_logps import model_digest
from finetune.data.cache import DamagedCacheError, read_cached
from finetune.recipe.errors import UserError
from finetune.recipe.recipe import Recipe
from finetune.training import loading
from finetune.training.result import Result
from finetune.training.stage import run_stage

Runs, Recipes = Callable[..., Result], Callable[..., Recipe]
QUIET = {"evaluate__samples": 0}
STABLE = {"train__engine_args": {"adam_epsilon": 1e-3}, "train__max_steps": 4, **QUIET}
"""Adam's first steps have the size of the learning rate even for rounding noise in gradients; not so here."""


@pytest.fixture
def trained_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start runs with a trained adapter, as after SFT."""
    attach = loading.attach_adapter

    def with_weights(model: Any, settings: Any) -> nn.Module:
        adapted = attach(model, settings)
        torch.manual_seed(5)
        with torch.no_grad():
            for name, weight in adapted.named_parameters():
                if "lora_B" in name:
                    weight.normal_(0.0, 0.2)
        return adapted

    monkeypatch.setattr(loading, "attach_adapter", with_weights)


def logged_values(result: Result, key: str) -> list[float]:
    return [line[key] for line in result.metrics if key in line]


def weights(result: Result) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load_file(result.directory / "adapter" / "adapter_model.safetensors")
    return tensors


def check_live_equals_precomputed(prefer: Runs, **settings: Any) -> None:
    """Check that a live and a precomputed reference give the same run."""
    runs = [prefer(mode, dpo__reference=mode, **STABLE, **settings) for mode in ("precomputed", "live")]
    for key in ("loss", "rewards/margins", "logratios/chosen", "objective/kl_per_token"):
        assert logged_values(runs[0], key) == pytest.approx(logged_values(runs[1], key), abs=1e-5), key
    assert max(map(abs, logged_values(runs[0], "rewards/margins"))) > 1e-2, "the policy has moved"
    for name, value in weights(runs[0]).items():
        assert torch.allclose(value, weights(runs[1])[name], atol=1e-5), name
    held_out_losses = [mode.record["metrics"]["eval/loss_after"] for mode in runs]
    assert held_out_losses[0] == pytest.approx(held_out_losses[1], abs=1e-5)


@pytest.mark.parametrize("method", ["lora", "prompt", "prefix", "pissa"])
def test_live_reference_equals_precomputed(prefer: Runs, method: str) -> None:
    virtual = {"adapter__virtual_tokens": 5} if method in ("prompt", "prefix") else {}
    rate = {"train__learning_rate": 0.1} if virtual else {}
    check_live_equals_precomputed(prefer, adapter__method=method, **virtual, **rate)


@pytest.mark.usefixtures("trained_adapter")
def test_live_reference_is_the_initial_adapter(prefer: Runs) -> None:
    check_live_equals_precomputed(prefer, adapter__dropout=0.0)


def test_live_reference_with_gradient_checkpointing(prefer: Runs) -> None:
    plain = prefer("plain", dpo__reference="live", **STABLE)
    checked = prefer("checked", dpo__reference="live", train__gradient_checkpointing=True, **STABLE)
    assert min(logged_values(checked, "grad_norm")) > 0
    for name, value in weights(plain).items():
        assert torch.allclose(value, weights(checked)[name], atol=1e-5), name


@pytest.mark.usefixtures("trained_adapter")
def test_live_reference_in_bfloat16(prefer: Runs) -> None:
    """Autocast caches bfloat16 casts: the reference's weights must not be used for the policy."""
    rough = {"model__precision": "bfloat16", **STABLE}
    runs = [prefer(way, dpo__reference=way, **rough) for way in ("precomputed", "live")]
    norms = [logged_values(way, "grad_norm") for way in runs]
    assert min(norms[1]) > 0 and norms[0] == pytest.approx(norms[1], rel=0.1)
    margins = [logged_values(way, "rewards/margins")[-1] for way in runs]
    assert margins[0] > 0.05 and margins[0] == pytest.approx(margins[1], abs=0.02)


@pytest.mark.usefixtures("trained_adapter")
def test_pain_14_reference_is_the_initial_policy_not_the_base(prefer: Runs) -> None:
    result = prefer(**STABLE)
    assert logged_values(result, "loss")[0] == pytest.approx(math.log(2), abs=1e-5)
    [tick] = [tick for tick in result.record["preflight"] if tick["name"] == "reference"]
    assert "margin 0.0000, loss 0.6931 (ln 2 = 0.6931)" in tick["detail"]


@pytest.mark.usefixtures("trained_adapter")
def test_pain_14_the_base_in_the_reference_s_place_stops_the_run(
    prefer: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = reference_logps.compute_reference_logps

    def of_the_base(model: PeftModel, *args: Any, **kwargs: Any) -> Any:
        with model.disable_adapter():
            return original(model, *args, **kwargs)

    monkeypatch.setattr(reference_logps, "compute_reference_logps", of_the_base)
    with pytest.raises(UserError, match=r"dpo.reference: policy and reference differ by .* on 8 groups"):
        prefer(data__cache=False, **STABLE)


def test_reference_is_cached(prefer: Runs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first = prefer("first", **STABLE)
    files = sorted((tmp_path / "cache" / "llm-align" / "reference").glob("*"))
    assert len(files) == 2, "one for training, one for held-out groups"

    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("computed again")

    with monkeypatch.context() as patch:
        patch.setattr(reference_logps, "compute_reference_logps", never)
        again = prefer("again", dpo__loss={"name": "dpo", "beta": 0.5}, **STABLE)  # a sweep over beta
        with pytest.raises(AssertionError, match="computed again"):
            prefer("other start", train__seed=1, **STABLE)
    assert logged_values(again, "logps/chosen")[0] == logged_values(first, "logps/chosen")[0]
    assert logged_values(again, "loss")[0] == pytest.approx(math.log(2), abs=1e-5)


def test_corrupt_reference_cache_is_recomputed(
    dpo_recipe: Recipes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first = run_stage(dpo_recipe("first", **STABLE), Console(quiet=True))
    for file in (tmp_path / "cache" / "llm-align" / "reference").glob("*"):
        content = bytearray(file.read_bytes())
        content[-3] ^= 1
        file.write_bytes(content)
        with pytest.raises(DamagedCacheError, match="checksum mismatch"):
            read_cached(file)
    second = run_stage(dpo_recipe("second", **STABLE), Console(width=200))
    assert capsys.readouterr().out.count("corrupt reference cache, recomputing") == 2
    assert weights(first).keys() == weights(second).keys()
    assert all(torch.equal(value, weights(second)[name]) for name, value in weights(first).items())
    assert read_cached(file) is not None


def test_model_digest_depends_on_every_weight(base_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base_folder)
    before = model_digest(model)
    assert model_digest(AutoModelForCausalLM.from_pretrained(base_folder)) == before
    weight = model.get_output_embeddings().weight
    with torch.no_grad():
        weight[3, 5] = torch.nextafter(weight[3, 5], torch.tensor(2.0))
    assert model_digest(model) != before
