"""RoPE scaling: frequencies by hand for each method, saved configs, refusals."""

import json
import math
from pathlib import Path

import pytest
import torch
from fixture_types import MakeRecipe, Tune
from peft import PeftModel
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel

from finetune.distributed.hardware import detect_hardware
from finetune.recipe.errors import UserError
from finetune.recipe.settings import ModelSettings, RopeSettings
from finetune.training.loaded_model import load_finished_run
from finetune.training.model import context_length, load_base

CONTEXT, WIDTH, BASE = 256, 16, 10000.0  # of conftest's base: 4 heads over 64
METHODS = ("linear", "dynamic", "yarn")


def load(folder: Path, method: str | None, factor: float = 4.0) -> PreTrainedModel:
    rope = RopeSettings(method=method, factor=factor) if method else None
    settings = ModelSettings(base=str(folder), rope=rope, attention="eager")
    return load_base(settings, precision="float32", quantization="none", hardware=detect_hardware()).eval()


@torch.no_grad()
def logits(model: torch.nn.Module, length: int) -> torch.Tensor:
    ids = torch.arange(length)[None] % 400 + 5
    return model(input_ids=ids).logits


def plain(base: float = BASE) -> list[float]:
    return [base ** (-2 * pair / WIDTH) for pair in range(WIDTH // 2)]


def yarn(factor: float) -> list[float]:
    """From the paper: r(i) = L theta_i / 2 pi turns; the ramp is over pair indices as in transformers."""

    def pair_with_rotations(turns: float) -> float:
        return WIDTH * math.log(CONTEXT / (turns * 2 * math.pi)) / (2 * math.log(BASE))

    low, high = max(math.floor(pair_with_rotations(32)), 0), min(math.ceil(pair_with_rotations(1)), WIDTH - 1)
    slow = [min(max((pair - low) / (high - low), 0.0), 1.0) for pair in range(WIDTH // 2)]
    return [theta * (1 - share) + theta / factor * share for theta, share in zip(plain(), slow, strict=True)]


def test_linear_frequencies_are_divided(base_folder: Path) -> None:
    model = load(base_folder, "linear")
    assert model.model.rotary_emb.inv_freq.tolist() == pytest.approx(
        [theta / 4 for theta in plain()], rel=1e-6
    )
    assert model.config.max_position_embeddings == 4 * CONTEXT


def test_linear_is_interpolation_of_positions(base_folder: Path) -> None:
    ids, fractional_positions = torch.arange(9)[None] + 5, torch.arange(0, 36, 4)[None]
    with torch.no_grad():
        expected = load(base_folder, None)(input_ids=ids).logits
        actual = load(base_folder, "linear")(input_ids=ids, position_ids=fractional_positions).logits
    assert torch.allclose(actual, expected, atol=1e-6)


def test_yarn_frequencies_and_attention(base_folder: Path) -> None:
    rotary = load(base_folder, "yarn").model.rotary_emb
    actual = rotary.inv_freq.tolist()
    assert actual == pytest.approx(yarn(4.0), rel=1e-6)
    assert actual[0] == pytest.approx(1.0) and actual[-1] == pytest.approx(plain()[-1] / 4, rel=1e-6)
    assert rotary.attention_scaling == pytest.approx(0.1 * math.log(4) + 1)


@pytest.mark.parametrize("length", [100, 256, 257, 700, 1024])
def test_dynamic_frequencies_follow_the_length(base_folder: Path, length: int) -> None:
    model = load(base_folder, "dynamic")
    logits(model, 900)  # has no effect on later passes
    logits(model, length)
    scaled_base = max(1.0, 4 * length / CONTEXT - 3) ** (WIDTH / (WIDTH - 2))
    actual = model.model.rotary_emb.inv_freq.tolist()
    assert actual == pytest.approx(plain(BASE * scaled_base), rel=1e-5)


def test_dynamic_rope_does_not_depend_on_earlier_passes(base_folder: Path) -> None:
    model = load(base_folder, "dynamic")
    first = logits(model, 300)
    logits(model, 800)
    assert torch.equal(logits(model, 300), first)


@pytest.mark.parametrize("method", METHODS)
def test_logits_differ_beyond_the_original_context(base_folder: Path, method: str) -> None:
    base, scaled = load(base_folder, None), load(base_folder, method)
    same = method == "dynamic"  # up to the original context dynamic scaling changes nothing
    assert torch.allclose(logits(scaled, 200), logits(base, 200), atol=1e-6) is same
    assert not torch.allclose(logits(scaled, 600), logits(base, 600), atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_factor_one_is_the_base(base_folder: Path, method: str) -> None:
    base, same = load(base_folder, None), load(base_folder, method, 1.0)
    assert torch.allclose(logits(same, 256), logits(base, 256), atol=1e-6)
    assert (
        context_length(ModelSettings(base=str(base_folder), rope={"method": method, "factor": 1})) == CONTEXT
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_loaded_adapter_run_keeps_rope_scaling(tune: Tune, base_folder: Path, method: str) -> None:
    rope = {"method": method, "factor": 2}
    result = tune("run", model__rope=rope, data__max_length=512, train__max_steps=2)
    assert result.record["reload"]["model"]["rope"] == rope
    loaded_model = load_finished_run(result.directory)
    assert loaded_model.context == 2 * CONTEXT
    by_hand = PeftModel.from_pretrained(load(base_folder, method, 2.0), str(result.adapter)).eval()
    assert torch.allclose(logits(loaded_model.model, 400), logits(by_hand, 400), atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_full_model_saves_rope_scaling(tune: Tune, base_folder: Path, method: str) -> None:
    rope = {"method": method, "factor": 2}
    result = tune("run", adapter__method="full", model__rope=rope, train__max_steps=2, evaluate__samples=0)
    config = json.loads((result.adapter / "config.json").read_text())
    assert config["rope_parameters"]["rope_type"] == method and config["rope_parameters"]["factor"] == 2
    loaded_model = load_finished_run(result.directory)
    assert loaded_model.context == 2 * CONTEXT
    assert torch.equal(
        logits(loaded_model.model, 400),
        logits(AutoModelForCausalLM.from_pretrained(result.adapter).eval(), 400),
    )


def test_max_length_follows_rope_scaling(tune: Tune, make_recipe: MakeRecipe) -> None:
    rope = {"method": "yarn", "factor": 4}
    long = {"instruction": "a " * 700, "output": "b"}
    result = tune(
        "run", model__rope=rope, data__source=[long] * 12, data__max_length=1024, train__max_steps=1
    )
    assert result.record["data"]["longest"] > 2 * CONTEXT
    with pytest.raises(UserError, match="at most 1024: the model has 1024 positions"):
        tune("other", model__rope=rope, data__max_length=1025)


def test_pain_24_a_base_without_rotary_positions_is_reported(tmp_path: Path) -> None:
    GPT2Config(n_layer=1, n_embd=16, n_head=2).save_pretrained(tmp_path)
    with pytest.raises(UserError) as error:
        context_length(ModelSettings(base=str(tmp_path), rope={"method": "linear", "factor": 2}))
    assert str(error.value) == (
        f"model.rope: {tmp_path} (gpt2) has no rotary position embeddings (RoPE)\n"
        "    expected: a base with RoPE, such as Llama, Mistral, Qwen, GPT-NeoX\n"
        "    repair:   remove model.rope, or choose another base"
    )


def test_an_already_scaled_base_is_refused(tune: Tune) -> None:
    rope = {"method": "linear", "factor": 2}
    first = tune("run", adapter__method="full", model__rope=rope, train__max_steps=1, evaluate__samples=0)
    with pytest.raises(UserError, match=r"is already scaled \(linear, factor 2\)"):
        tune("again", model__base=str(first.directory), model__rope=rope)


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"method": "ntk", "factor": 2}, "model.rope.method"),
        ({"method": "yarn"}, "model.rope.factor"),
        ({"method": "yarn", "factor": 0.5}, "found 0.5"),
        ({"method": "yarn", "factor": 2, "scale": 1}, "model.rope.scale"),
        ("yarn", "model.rope"),
    ],
)
def test_invalid_rope_settings_are_reported(make_recipe: MakeRecipe, rope: object, message: str) -> None:
    with pytest.raises(UserError) as error:
        make_recipe(model__rope=rope)
    assert message in str(error.value)
