"""Merged models: logits equal base with adapter, and the next stage trains them further."""

from pathlib import Path

import pytest
import torch
from fixture_types import MakeRecipe, Tune
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune.recipe.bases import resolve_base
from finetune.recipe.checkpoint_folder import MERGED
from finetune.recipe.errors import UserError
from finetune.training.loaded_model import load_finished_run
from finetune.training.merge import merge_run
from finetune.training.result import Result

INPUTS = torch.tensor([[5, 17, 300, 42, 7, 9], [8, 1, 2, 300, 17, 99]])


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=INPUTS).logits


def trained(tune: Tune, name: str = "run", **settings: object) -> Result:
    return tune(name, evaluate__samples=0, **settings)


@pytest.mark.parametrize("method", ["lora", "qlora", "dora", "pissa", "ia3", "oft"])
def test_merged_logits_equal_base_with_adapter(tune: Tune, base_folder: Path, method: str) -> None:
    result = trained(tune, adapter__method=method)
    folder = merge_run(result.directory)
    merged = AutoModelForCausalLM.from_pretrained(folder).eval()
    actual, expected = logits(merged), logits(load_finished_run(result.directory).model)
    tolerance = 1e-3 if method == "qlora" else 1e-5  # 4-bit kernels differ in the last digits
    assert torch.allclose(actual, expected, atol=tolerance)
    plain = AutoModelForCausalLM.from_pretrained(base_folder).eval()
    assert not torch.allclose(actual, logits(plain), atol=10 * tolerance)
    assert AutoTokenizer.from_pretrained(folder).eos_token == "</s>"
    assert [path.name for path in result.directory.iterdir() if path.name.endswith(".partial")] == []


def test_a_merged_run_is_a_base(tune: Tune) -> None:
    first = trained(tune, "first")
    merge_run(first.directory)
    second = trained(tune, "second", model__base=str(first.directory), train__max_steps=2)
    losses = [
        first.record["metrics"]["eval/loss_after"],
        second.record["metrics"]["eval/loss_before"],
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    by_hand = AutoModelForCausalLM.from_pretrained(first.directory / MERGED)
    by_hand = PeftModel.from_pretrained(by_hand, str(second.adapter)).eval()
    assert torch.allclose(logits(load_finished_run(second.directory).model), logits(by_hand), atol=1e-6)


def test_a_fully_tuned_run_is_a_base(tune: Tune) -> None:
    first = trained(tune, "first", adapter__method="full", train__learning_rate=1e-3)
    second = trained(tune, "second", model__base=str(first.directory), train__max_steps=2)
    losses = [
        first.record["metrics"]["eval/loss_after"],
        second.record["metrics"]["eval/loss_before"],
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_an_unmerged_run_is_refused_as_a_base(tune: Tune, make_recipe: MakeRecipe) -> None:
    first = trained(tune, "first")
    with pytest.raises(UserError) as error:
        make_recipe("second", model__base=str(first.directory))
    assert str(error.value) == (
        f"model.base (command line): run '{first.directory}' has an adapter, but no merged model\n"
        "    expected: a run with a model: model/ (after full tuning) or merged/\n"
        f"    repair:   `--from {first.directory}` trains its adapter further; "
        f"`llm-align merge {first.directory}` makes a base of it"
    )
    merge_run(first.directory)
    assert resolve_base(str(first.directory)) == str(first.directory / MERGED)


def test_a_new_run_deletes_the_merged_model(tune: Tune) -> None:
    first = trained(tune, "first")
    merge_run(first.directory)
    trained(tune, "first", train__seed=1, force=True)
    assert not (first.directory / MERGED).exists()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("prompt", "adapter 'prompt': virtual tokens are part of the input"),
        ("bottleneck", "adapter 'bottleneck': "),
        ("full", "a run without an adapter"),
    ],
)
def test_unmergeable_adapters_are_refused(tune: Tune, method: str, message: str) -> None:
    result = trained(tune, adapter__method=method, train__max_steps=1)
    with pytest.raises(UserError, match=message):
        merge_run(result.directory)
    assert not (result.directory / MERGED).exists()


def test_an_unfinished_run_is_no_base(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UserError, match="has no model yet"):
        resolve_base(str(tmp_path))
    with pytest.raises(UserError, match="not written by llm-align"):
        merge_run(tmp_path)
