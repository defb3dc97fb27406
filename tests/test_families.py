"""Every family trains, merges and answers, or is refused in a sentence (docs/reference/families.md)."""

import json
from pathlib import Path

import pytest
import torch
from families import DECODERS, ENCODERS, FAMILIES, OTHERS, check_loss, results_of, toy_config
from test_house import ROOT
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from finetune.adapters import lora
from finetune.adapters._targets import ALL_LINEAR, resolve_targets
from finetune.recipe.errors import UserError
from finetune.training.architectures import check_causal_architecture, mask_unsupported
from finetune.training.auto_values import NO_POSITION_LIMIT, max_length
from finetune.training.model import Policy, attach_adapter
from finetune.training.preflight.architecture_checks import check_causality, check_coverage
from finetune.training.rope import max_positions

RESULTS = ROOT / "tools" / "docs" / "families.json"


def check_family(model_type: str, folder: Path, *, renew: bool) -> None:
    results = results_of(model_type, folder)
    known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    if renew:
        known[model_type] = results
        text = json.dumps({name: known[name] for name in sorted(known)}, indent=1, ensure_ascii=False)
        RESULTS.write_text(f"{text}\n", encoding="utf-8")
    assert known.get(model_type) == results


@pytest.mark.slow
@pytest.mark.parametrize("model_type", FAMILIES)
def test_family(model_type: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    check_family(model_type, tmp_path, renew=request.config.getoption("--renew-golden"))


def toy(model_type: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(toy_config(model_type))
    return model.requires_grad_(False).eval()


def test_the_page_has_every_family() -> None:
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert set(results) == set(FAMILIES) and len(DECODERS) >= 53
    assert all(results[name]["sft"] == "works" for name in ("llama", "gpt2", "bloom", "mamba", "qwen3_moe"))
    assert all(results[name]["sft"] != "works" for name in (*ENCODERS, *OTHERS))


@pytest.mark.parametrize(
    ("model_type", "unreached"),
    [
        ("gpt2", ""),
        ("falcon", ""),
        ("bloom", ""),
        ("rwkv", ""),
        ("mamba", "backbone.layers.*.mixer.out_proj.weight"),
        ("qwen3_moe", "model.layers.*.mlp.experts.gate_up_proj"),
        ("phimoe", "model.layers.*.mlp.experts.gate_up_proj"),
        ("deepseek_v3", "model.layers.*.mlp.experts.gate_up_proj"),
    ],
)
def test_lora_reaches_all_linear_layers_and_the_loss_is_that_of_all_logits(
    model_type: str, unreached: str
) -> None:
    settings = lora.Settings(method="lora")
    adapted = attach_adapter(toy(model_type), settings)
    policy = Policy(adapted, "float32", "none")
    assert check_causality(policy).problem is None
    coverage = check_coverage(adapted, settings)
    assert [result.warned for result in coverage] == [True] * bool(unreached)
    assert all(unreached in result.detail for result in coverage)
    check_loss(adapted)


@pytest.mark.parametrize("model_type", ["gemma3", "fuyu"])
def test_lora_adapts_the_text_model_of_a_model_of_images(model_type: str) -> None:
    settings = lora.Settings(method="lora")
    adapted = attach_adapter(toy(model_type), settings)
    names = [name for name, weight in adapted.named_parameters() if weight.requires_grad]
    assert len(names) > 10 and all(".language_model.layers." in name for name in names)
    assert check_coverage(adapted, settings) == []
    assert check_causality(Policy(adapted, "float32", "none")).problem is None


@pytest.mark.parametrize("model_type", ["bert", "xlnet"])
def test_an_encoder_is_refused_by_a_change_of_its_last_tokens(model_type: str) -> None:
    problem = check_causality(Policy(toy(model_type), "float32", "none")).problem
    assert problem is not None and f"'{model_type}'" in problem.actual
    assert "sees later tokens" in problem.actual and "decoder-only" in problem.expected


def test_a_bert_with_causal_attention_is_no_encoder() -> None:
    config = toy_config("bert")
    config.is_decoder = True
    model = AutoModelForCausalLM.from_config(config).eval()
    assert check_causality(Policy(model, "float32", "none")).problem is None


@pytest.mark.parametrize(
    ("model_type", "words"),
    [
        ("t5", "'t5', an encoder-decoder"),
        ("bart", "'bart', an encoder-decoder"),
        ("whisper", "'whisper', an encoder-decoder"),
        ("vit", "'vit', an image model"),
        ("qwen2_vl", "'qwen2_vl', a model of images and text"),
        ("wav2vec2", "'wav2vec2', a speech model"),
        ("distilbert", "'distilbert', an encoder"),
        ("git", "'git', a model of images and text, whose text model is no causal LM of its own"),
        ("mllama", "'mllama', a model of images and text, whose text model"),
    ],
)
def test_other_models_are_refused_by_their_config(model_type: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_causal_architecture(AutoConfig.for_model(model_type), base="folder")
    for decoder in ("llama", "gemma3", "mamba"):
        check_causal_architecture(AutoConfig.for_model(decoder), base="folder")


@pytest.mark.parametrize("model_type", ["bloom", "mamba", "recurrent_gemma", "xlnet"])
def test_no_maximum_position_is_no_limit(model_type: str) -> None:
    positions = max_positions(AutoConfig.for_model(model_type))
    assert positions == NO_POSITION_LIMIT
    assert max_length(None, context=positions, virtual_tokens=20) == (2048, "the model has no maximum")
    assert max_length(100_000, context=positions, virtual_tokens=20) == (100_000, "as requested")


def test_explicit_experts_are_refused_and_attention_is_not() -> None:
    model = toy("deepseek_v3")
    with pytest.raises(UserError, match="PEFT replaces gate_proj, up_proj by the fused experts"):
        resolve_targets(model, ["gate_proj", "up_proj"], lora=True)
    assert resolve_targets(model, ["o_proj"], lora=True) == ["o_proj"]
    # Other adapters of PEFT leave the dense layers where they are.
    assert resolve_targets(model, ["gate_proj"]) == ["gate_proj"]
    assert resolve_targets(toy("llama"), ALL_LINEAR, lora=True) == ALL_LINEAR


@pytest.mark.parametrize("model_type", ["mamba", "recurrent_gemma", "lfm2", "bloom", "mpt"])
def test_packing_is_refused_where_rows_would_mix(model_type: str) -> None:
    assert mask_unsupported(toy_config(model_type))
    assert not mask_unsupported(toy_config("llama"))
