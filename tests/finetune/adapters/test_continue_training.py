"""Every adapter can continue training: a new one with a run's weights equals the run's, and trains."""

import json
from pathlib import Path

import pytest
import torch
from adapter_properties import (
    FAMILIES,
    METHODS,
    base_of,
    build,
    build_adapter,
    default_quantization,
    logits,
    train,
)
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForSequenceClassification

from finetune.recipe.discovery import ADAPTERS, load_plugin
from finetune.recipe.errors import UserError
from finetune.training.resume_adapter import load_adapter_weights
from finetune.training.save import file_sha256

pytestmark = pytest.mark.filterwarnings("ignore")
UNSUPPORTED = ("has no bias terms", "on a model of type")
VALUES = {
    "dropout": 0.3,
    "lr_ratio": 4.0,
    "warmup": 0.2,
    "cooldown": 0.2,
    "penalty": 0.5,
    "consistency": False,
}


def saved_run(adapted: PeftModel, run: Path) -> Path:
    adapted.save_pretrained(str(run / "adapter"), save_embedding_layers=False)
    files = {f"adapter/{file.name}": file_sha256(file) for file in (run / "adapter").glob("*.safetensors")}
    record = {
        "format": 2,
        "status": "finished",
        "stage": "sft",
        "reload": {},
        "recipe": "a",
        "digest": "b",
        "command": "llm-align sft a",
        "files": files,
    }
    (run / "run.json").write_text(json.dumps(record))
    return run


def trainable(adapted: PeftModel) -> dict[str, torch.Tensor]:
    return {name: weight for name, weight in adapted.named_parameters() if weight.requires_grad}


def traits(method: str):
    return load_plugin(ADAPTERS, method, where="test").TRAITS


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_a_continued_adapter_equals_the_run_s_and_trains_alone(
    method: str, family: str, tmp_path: Path
) -> None:
    try:
        adapted = build_adapter(method, family)
    except UserError as error:
        assert any(reason in str(error) for reason in UNSUPPORTED)
        return
    names = trainable(adapted).keys()
    train(adapted)
    run = saved_run(adapted, tmp_path)
    later = traits(method).continues_as or method
    again = build(later, base_of(family, default_quantization(method)))
    load_adapter_weights(again, run)
    assert trainable(again).keys() == names
    expected, actual = get_peft_model_state_dict(adapted), get_peft_model_state_dict(again)
    assert expected.keys() == actual.keys()
    assert all(torch.equal(actual[name], value) for name, value in expected.items())
    assert (logits(again) - logits(adapted)).abs().max() < 2e-5
    trained = trainable(again)
    before = {name: weight.detach().clone() for name, weight in again.named_parameters()}
    train(again, steps=1)
    moved = {
        name for name, weight in again.named_parameters() if not torch.equal(weight.detach(), before[name])
    }
    assert moved == trained.keys()


@pytest.mark.parametrize(
    ("method", "key"), [(method, key) for method in METHODS for key in traits(method).training_only]
)
def test_training_only_settings_may_change(method: str, key: str, tmp_path: Path) -> None:
    adapted = build_adapter(method, "llama")
    train(adapted)
    run = saved_run(adapted, tmp_path)
    later = traits(method).continues_as or method
    again = build(later, base_of("llama", default_quantization(method)), **{key: VALUES[key]})
    load_adapter_weights(again, run)
    assert (logits(again) - logits(adapted)).abs().max() < 2e-5


def test_a_prompt_encoder_continues_with_all_its_weights(tmp_path: Path) -> None:
    adapted = build_adapter("ptuning", "llama")
    train(adapted)
    again = build("ptuning", base_of("llama"))
    load_adapter_weights(again, saved_run(adapted, tmp_path))
    weights = trainable(adapted)
    assert len(weights) > 1 and all(torch.equal(weights[name], w) for name, w in trainable(again).items())


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "prompt_encoder.safetensors"])
def test_a_corrupt_file_is_named(name: str, tmp_path: Path) -> None:
    run = saved_run(build_adapter("ptuning", "llama"), tmp_path)
    file = run / "adapter" / name
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=f"adapter/{name}: checksum mismatch") as caught:
        load_adapter_weights(build("ptuning", base_of("llama")), run)
    assert f"train it again in another folder: `llm-align sft a --out {run}-again`" in str(caught.value)


def test_an_adapter_of_other_shapes_is_rejected(tmp_path: Path) -> None:
    run = saved_run(build_adapter("lora", "llama"), tmp_path)
    with pytest.raises(UserError, match="size mismatch"):
        load_adapter_weights(build("lora", base_of("llama"), rank=8), run)
    with pytest.raises(UserError, match="of its settings differ: base_model.model"):
        load_adapter_weights(build("lora", base_of("gpt-neox")), run)


def test_a_reward_model_loads_the_adapter_of_a_language_model(tmp_path: Path) -> None:
    adapted = build_adapter("lora", "llama")
    train(adapted)
    run = saved_run(adapted, tmp_path)
    folder = adapted.get_base_model().config.name_or_path
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    config = LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=32.0, target_modules="all-linear")
    scorer = get_peft_model(base, config)
    with pytest.raises(UserError, match=r"of its settings differ: base_model\.model\.score\.weight"):
        load_adapter_weights(scorer, run)
    load_adapter_weights(scorer, run, new_modules=("score",))
    expected, actual = get_peft_model_state_dict(adapted), get_peft_model_state_dict(scorer)
    assert actual.keys() - expected.keys() == {"base_model.model.score.weight"}
    assert all(torch.equal(actual[name], value) for name, value in expected.items())
