"""What is saved is reopened: files that load as another model than the trained one are refused."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fixture_types import Tune
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from small_models import llama
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from finetune.recipe.bases import resolve_base
from finetune.recipe.errors import UserError
from finetune.training.inference_files import with_stop_tokens
from finetune.training.merge import merge_adapter, merge_run, restore_layer_types
from finetune.training.reopen import (
    Loading,
    Probe,
    check_saveable,
    logits_difference,
    reopen_adapter,
    reopen_model,
)

PROBE = Probe([[5, 17, 3, 42, 7], [8, 1, 2]], "float32")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
SIZES = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2}


def with_lora(base: PreTrainedModel, target: list[str] | str = "all-linear") -> PeftModel:
    """Return the base with a LoRA whose product is not zero."""
    model = get_peft_model(base, LoraConfig(r=4, target_modules=target, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.normal_(std=0.1)
    return model.train()


def swap_layers(folder: Path) -> None:
    state = load_file(folder / WEIGHTS)
    swapped = {"layers.0": "layers.1", "layers.1": "layers.0"}
    renamed = {re.sub(r"layers\.\d", lambda match: swapped[match[0]], key): state[key] for key in state}
    save_file(renamed, folder / WEIGHTS)


def lose_a_tensor(folder: Path) -> None:
    save_file(dict(list(load_file(folder / WEIGHTS).items())[1:]), folder / WEIGHTS)


def another_scale(folder: Path) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"lora_alpha": 9}))


def test_a_saved_adapter_is_reopened_and_the_trained_one_is_untouched(tmp_path: Path) -> None:
    model = with_lora(llama())
    model.save_pretrained(tmp_path)
    before = {name: (weight, weight.requires_grad) for name, weight in model.named_parameters()}
    rng = torch.get_rng_state()
    assert reopen_adapter(model, tmp_path, PROBE).size == 0
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() and model.active_adapter == "default" and model.training
    assert all(
        after[name] is weight and weight.requires_grad == flag for name, (weight, flag) in before.items()
    )
    assert torch.equal(torch.get_rng_state(), rng)


@pytest.mark.parametrize("damage", [swap_layers, another_scale, lose_a_tensor])
def test_an_adapter_that_loads_as_another_one_is_refused(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    model = with_lora(llama())
    model.save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match="1 tensors are missing|standard deviations"):
        reopen_adapter(model, tmp_path, PROBE).require(tmp_path)
    assert list(model.peft_config) == ["default"]


def test_a_saved_model_is_reopened(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path)
    expected, loading = PROBE.logits(model), Loading.of(model, trust_remote_code=False)
    assert logits_difference(reopen_model(tmp_path, loading, PROBE), expected) == 0
    state = load_file(tmp_path / "model.safetensors")
    norm = state.pop("model.norm.weight")
    save_file(state | {"model.norm.weight": norm * 1.01}, tmp_path / "model.safetensors", {"format": "pt"})
    assert logits_difference(reopen_model(tmp_path, loading, PROBE), expected) > 1e-3
    save_file(state | {"other.weight": norm}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"1 tensors are missing, 1 unexpected: model\.norm\.weight"):
        reopen_model(tmp_path, loading, PROBE)


@pytest.mark.parametrize("target", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens", "q_proj"]])
def test_an_adapter_on_a_tied_table_is_saved_and_merged(tmp_path: Path, target: list[str]) -> None:
    model = with_lora(
        LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=1, tie_word_embeddings=True)), target
    )
    check_saveable(model)
    expected = PROBE.logits(model)
    merged = merge_adapter(model)
    merged.save_pretrained(tmp_path)
    reopened = reopen_model(tmp_path, Loading.of(merged, trust_remote_code=False), PROBE)
    assert logits_difference(reopened, expected) < 1e-5


def test_a_trained_tensor_that_peft_does_not_save_is_refused_before_training() -> None:
    model = with_lora(llama())
    check_saveable(model)
    model.base_model.model.model.norm.weight.requires_grad_(True)
    with pytest.raises(UserError, match=r"PEFT does not save.*model\.norm\.weight"):
        check_saveable(model)


def test_a_dequantized_gpt2_has_its_own_layers(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=128, n_embd=64, n_layer=1, n_head=2, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=four_bits)
    quantized.save_pretrained(tmp_path / "stored")
    for base in (quantized, AutoModelForCausalLM.from_pretrained(tmp_path / "stored")):
        dequantized = base.dequantize(torch.float32)
        expected = PROBE.logits(dequantized)
        restore_layer_types(dequantized).save_pretrained(tmp_path / "merged")
        loading = Loading.of(dequantized, trust_remote_code=False)
        assert logits_difference(reopen_model(tmp_path / "merged", loading, PROBE), expected) < 1e-5


@pytest.mark.parametrize(("own", "expected"), [(None, 7), (7, 7), (3, [3, 7]), ([5, 3], [5, 3, 7])])
def test_stop_tokens_are_added_to_the_base_s_own(own: int | list[int] | None, expected: object) -> None:
    base = GenerationConfig(eos_token_id=own, temperature=0.5)
    config = with_stop_tokens(base, [7])
    assert config.eos_token_id == expected and config.temperature == 0.5 and base.eos_token_id == own


def test_a_base_folder_with_an_adapter_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert resolve_base(str(tmp_path)) == str(tmp_path)
    (tmp_path / CONFIG).write_text('{"base_model_name_or_path": "org/model"}')
    with pytest.raises(UserError, match=r"has an adapter[^\n]*\n.*\n.*own base is 'org/model'"):
        resolve_base(str(tmp_path))


@pytest.fixture
def stored_4bit(tmp_path: Path, base_folder: Path) -> Path:
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(
        base_folder, dtype=torch.bfloat16, quantization_config=four_bits
    )
    model.save_pretrained(tmp_path / "stored")
    AutoTokenizer.from_pretrained(base_folder).save_pretrained(tmp_path / "stored")
    return tmp_path / "stored"


@pytest.mark.slow
def test_a_base_stored_in_4_bits_trains_and_merges(tune: Tune, stored_4bit: Path) -> None:
    result = tune("run", model__base=str(stored_4bit), evaluate__samples=1)
    assert result.record["reload"]["quantization"] == "nf4"
    lines: list[str] = []
    merge_run(result.directory, report=lambda check: lines.append(check.detail))
    assert lines[0].startswith("reopened, logits")
    with pytest.raises(UserError, match="the base is stored in bitsandbytes 4-bit"):
        tune("full", model__base=str(stored_4bit), adapter__method="full")


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        *("adalora", "adaptive_prefix", "bottleneck", "dora", "full", "ia3", "layernorm", "llama_adapter"),
        *("loftq", "multitask_prompt", "oft", "pissa", "prefix", "progressive_prompt", "prompt", "ptuning"),
        *("ptuning_v2", "rslora", "vera", "adamix", "lora_plus", "qlora"),
    ],
)
def test_every_adapter_is_reopened(tune: Tune, method: str) -> None:
    result = tune("run", adapter__method=method, evaluate__samples=0)
    [saved] = [check["detail"] for check in result.record["preflight"] if check["name"] == "saved"]
    assert saved.endswith("reopened, logits equal bit for bit")
