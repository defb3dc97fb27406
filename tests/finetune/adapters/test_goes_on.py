"""Every adapter can continue training: a new one with a run's weights equals the run's, and trains."""

import json
from pathlib import Path

import pytest
import torch
from adapter_properties import FAMILIES, METHODS, base_of, build, first_choice, logits, made, train
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForSequenceClassification

from finetune.recipe.discovery import ADAPTERS, load_plugin
from finetune.recipe.errors import UserError
from finetune.training.go_on import take_weights
from finetune.training.save import sha256

pytestmark = pytest.mark.filterwarnings("ignore")
REFUSED = ("has no bias terms", "on a model of type")
VALUES = {"dropout": 0.3, "ratio": 4.0, "warmup": 0.2, "cooldown": 0.2, "penalty": 0.5, "consistency": False}


def saved_run(adapted: PeftModel, run: Path) -> Path:
    adapted.save_pretrained(str(run / "adapter"), save_embedding_layers=False)
    files = {f"adapter/{file.name}": sha256(file) for file in (run / "adapter").glob("*.safetensors")}
    record = {
        "status": "finished",
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
def test_it_is_the_run_s_adapter_and_trains_alone(method: str, family: str, tmp_path: Path) -> None:
    try:
        adapted = made(method, family)
    except UserError as error:
        assert any(reason in str(error) for reason in REFUSED)
        return
    names = trainable(adapted).keys()
    train(adapted)
    run = saved_run(adapted, tmp_path)
    later = traits(method).goes_on_as or method
    again = build(later, base_of(family, first_choice(method)))
    take_weights(again, run)
    assert trainable(again).keys() == names
    expected, found = get_peft_model_state_dict(adapted), get_peft_model_state_dict(again)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert (logits(again) - logits(adapted)).abs().max() < 2e-5
    own = trainable(again)
    before = {name: weight.detach().clone() for name, weight in again.named_parameters()}
    train(again, steps=1)
    moved = {
        name for name, weight in again.named_parameters() if not torch.equal(weight.detach(), before[name])
    }
    assert moved == own.keys()


@pytest.mark.parametrize(
    ("method", "key"), [(method, key) for method in METHODS for key in traits(method).in_training]
)
def test_what_acts_in_training_alone_may_change(method: str, key: str, tmp_path: Path) -> None:
    adapted = made(method, "llama")
    train(adapted)
    run = saved_run(adapted, tmp_path)
    later = traits(method).goes_on_as or method
    again = build(later, base_of("llama", first_choice(method)), **{key: VALUES[key]})
    take_weights(again, run)
    assert (logits(again) - logits(adapted)).abs().max() < 2e-5


def test_a_network_that_makes_the_prompt_goes_on_with_all_its_weights(tmp_path: Path) -> None:
    adapted = made("ptuning", "llama")
    train(adapted)
    again = build("ptuning", base_of("llama"))
    take_weights(again, saved_run(adapted, tmp_path))
    weights = trainable(adapted)
    assert len(weights) > 1 and all(torch.equal(weights[name], w) for name, w in trainable(again).items())


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "prompt_encoder.safetensors"])
def test_a_damaged_file_is_named(name: str, tmp_path: Path) -> None:
    run = saved_run(made("ptuning", "llama"), tmp_path)
    file = run / "adapter" / name
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=f"adapter/{name}: checksum mismatch") as caught:
        take_weights(build("ptuning", base_of("llama")), run)
    assert "`llm-align sft a --force` repeats the run" in str(caught.value)


def test_an_adapter_of_other_shapes_is_refused(tmp_path: Path) -> None:
    run = saved_run(made("lora", "llama"), tmp_path)
    with pytest.raises(UserError, match="size mismatch"):
        take_weights(build("lora", base_of("llama"), rank=8), run)
    with pytest.raises(UserError, match="of its settings differ: base_model.model"):
        take_weights(build("lora", base_of("gpt-neox")), run)


def test_a_model_that_scores_takes_the_adapter_of_one_that_writes(tmp_path: Path) -> None:
    adapted = made("lora", "llama")
    train(adapted)
    run = saved_run(adapted, tmp_path)
    folder = adapted.get_base_model().config.name_or_path
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    config = LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=32.0, target_modules="all-linear")
    scorer = get_peft_model(base, config)
    with pytest.raises(UserError, match=r"of its settings differ: base_model\.model\.score\.weight"):
        take_weights(scorer, run)
    take_weights(scorer, run, head=("score",))
    expected, found = get_peft_model_state_dict(adapted), get_peft_model_state_dict(scorer)
    assert found.keys() - expected.keys() == {"base_model.model.score.weight"}
    assert all(torch.equal(found[name], value) for name, value in expected.items())
