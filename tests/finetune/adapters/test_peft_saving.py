"""PEFT's and transformers' demands of a tuner: saving, loading, several adapters, generation."""

import copy
import pickle
import subprocess
import sys
import tempfile
import warnings
from enum import Enum
from pathlib import Path

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft_cases import (
    CASES,
    FAST_LANGUAGE_MODELS,
    IDS,
    LANGUAGE_MODELS,
    TWO_TARGETS,
    close,
    each_case,
    inputs_of,
    language_model_folder,
    perturb,
    same,
    saved,
    saved_base,
    tuner_layers,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from finetune.training.save import write_adapter

pytestmark = pytest.mark.filterwarnings("ignore")


# Saving and loading


@each_case()
def test_saves_and_loads(case):
    model = case.adapted()
    assert not close(case.output(model), case.output(case.base()))
    with saved(model) as folder:
        file = load_file(folder / "adapter_model.safetensors")
        opened = PeftModel.from_pretrained(case.base(), folder)
    assert same(file, get_peft_model_state_dict(model))
    assert all(case.prefix in name and "default" not in name for name in file)
    assert torch.equal(case.output(opened), case.output(model))
    assert not any(weight.requires_grad for weight in opened.parameters())
    assert not opened.training


@each_case()
def test_loads_for_training(case):
    with saved(case.adapted()) as folder:
        opened = PeftModel.from_pretrained(case.base(), folder, is_trainable=True)
    names = {name for name, weight in opened.named_parameters() if weight.requires_grad}
    assert names and all(case.prefix in name for name in names)


@each_case()
def test_loads_with_low_memory(case):
    model = case.adapted()
    with saved(model) as folder:
        opened = PeftModel.from_pretrained(case.base(), folder, low_cpu_mem_usage=True)
    assert not any(weight.is_meta for weight in opened.parameters())
    assert torch.equal(case.output(opened), case.output(model))


@each_case()
def test_loads_as_second_adapter(case):
    first, second = case.adapted(2), case.adapted(3)
    expected = case.output(first), case.output(second)
    with saved(second) as folder:
        first.load_adapter(folder, adapter_name="other")
    assert first.active_adapters == ["default"] and torch.equal(case.output(first), expected[0])
    first.set_adapter("other")
    assert first.active_adapters == ["other"] and torch.equal(case.output(first), expected[1])
    first.set_adapter("default")
    assert torch.equal(case.output(first), expected[0])


@each_case()
def test_saves_selected_adapters(case):
    """Names that contain each other; each folder has only its own adapter."""
    model = case.adapted()
    for index, name in enumerate(["one", "one_more"]):
        model.add_adapter(name, case.config())
        perturb(model, 5 + index, name)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, save_embedding_layers=False, selected_adapters=["one", "one_more"])
        assert sorted(p.name for p in Path(folder).iterdir() if p.is_dir()) == ["one", "one_more"]
        for name in ("one", "one_more"):
            opened = PeftModel.from_pretrained(case.base(), f"{folder}/{name}")
            model.set_adapter(name)
            assert torch.equal(case.output(opened), case.output(model))


@each_case()
def test_state_dict_round_trip(case):
    model, other = case.adapted(2), case.adapted(3)
    result = set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    assert not result.unexpected_keys
    assert torch.equal(case.output(other), case.output(model))


@each_case()
def test_saves_trained_modules(case):
    head = "lm_head" if case.is_language_model else "head"
    targets = [name for name in case.settings["target_modules"] if name != head]
    model = case.adapted(target_modules=targets, modules_to_save=[head])
    trained = [weight for name, weight in model.named_parameters() if "modules_to_save" in name]
    assert trained and all(weight.requires_grad for weight in trained)
    with torch.no_grad():
        trained[0].add_(1.0)
    with saved(model) as folder:
        opened = PeftModel.from_pretrained(case.base(), folder)
    assert torch.equal(case.output(opened), case.output(model))
    with model.disable_adapter():
        assert torch.equal(case.output(model), case.output(case.base()))


@each_case()
def test_config_round_trip(case):
    config = case.config()
    assert isinstance(config.peft_type, Enum) and config.peft_type.value + "_" == case.prefix.upper()
    assert str(config.peft_type).endswith("." + config.peft_type.value)  # PEFT's status prints this
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        opened = PeftConfig.from_pretrained(folder)
        assert PeftConfig.from_peft_type(**config.from_json_file(f"{folder}/adapter_config.json")) == config
    assert type(opened) is case.config_class and opened == config
    assert opened.to_dict() == config.to_dict() and opened.peft_type is config.peft_type
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config


@each_case()
def test_copies_and_pickles(case):
    model = case.adapted()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(case.output(twin), case.output(model))
        perturb(twin, 7)
        assert not torch.equal(case.output(twin), case.output(model))


# Several adapters


@each_case()
def test_activates_several(case):
    model = case.adapted()
    model.add_adapter("other", case.config())
    perturb(model, 3, "other")
    alone = [case.output(model)]
    model.set_adapter("other")
    alone.append(case.output(model))
    model.base_model.set_adapter(["default", "other"])
    assert model.active_adapters == ["default", "other"]
    assert not any(close(case.output(model), output) for output in alone)
    assert all(weight.requires_grad for name, weight in model.named_parameters() if case.prefix in name)


@each_case()
def test_adds_an_adapter_frozen(case):
    model = case.adapted()
    before = case.output(model)
    model.add_adapter("other", case.config())
    perturb(model, 3, "other")
    assert torch.equal(case.output(model), before)
    trainable = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trainable and all("default" in name for name in trainable)
    model.set_requires_grad("default", False)
    assert not any(weight.requires_grad for weight in model.parameters())
    model.set_adapter("other")
    trainable = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trainable and all("other" in name for name in trainable)


@each_case(only=TWO_TARGETS)
def test_adapters_of_other_modules(case):
    sequential = {} if case.merges else {"parallel": False}
    alone = case.adapted(target_modules=list(case.second_targets), **sequential)
    model = case.adapted()
    expected = case.output(model)
    with saved(alone) as folder:
        model.load_adapter(folder, adapter_name="other")
    assert torch.equal(case.output(model), expected)
    model.set_adapter("other")
    assert torch.equal(case.output(model), case.output(alone))
    model.set_adapter("default")
    assert torch.equal(case.output(model), expected)


@each_case()
def test_deletes_the_active_adapter(case):
    model = case.adapted()
    model.add_adapter("other", case.config())
    perturb(model, 3, "other")
    model.set_adapter("other")
    expected = case.output(model)
    model.set_adapter("default")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.delete_adapter("default")
    assert list(model.peft_config) == ["other"] and model.active_adapters == ["other"]
    for layer in tuner_layers(model):
        for name in layer.adapter_layer_names + layer.other_param_names:
            assert "default" not in getattr(layer, name)
    assert not [name for name in model.state_dict() if "default" in name]
    assert torch.equal(case.output(model), expected)
    model.delete_adapter("other")
    assert torch.equal(case.output(model.base_model.model), case.output(case.base()))


@each_case()
def test_deletes_an_inactive_adapter(case):
    model = case.adapted()
    expected = case.output(model)
    model.add_adapter("other", case.config())
    model.delete_adapter("other")
    assert list(model.peft_config) == ["default"] and torch.equal(case.output(model), expected)
    assert not [layer for layer in tuner_layers(model) if "other" in layer._all_available_adapter_names()]
    with pytest.raises(ValueError, match="Adapter unknown does not exist"):
        model.delete_adapter("unknown")


@each_case()
def test_refuses_combinations(case):
    """A weighted sum, adapters by row, a second adapter of one name, and adapters of several types."""
    model = case.adapted()
    model.add_adapter("other", case.config())
    with pytest.raises(ValueError, match="does not support `add_weighted_adapter`"):
        model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "sum")
    inputs = inputs_of(case.base_kind)
    with pytest.raises(ValueError, match="does not support `adapter_names`"):
        model(inputs, adapter_names=["default"] * len(inputs))
    with pytest.raises(ValueError, match="[Aa]dapter.* 'other'.* already exists"):
        model.add_adapter("other", case.config())
    with pytest.raises(ValueError, match="not compatible with .*PeftMixedModel|does not support mixed"):
        get_peft_model(case.base(), case.config(), mixed=True)


# transformers


@each_case(only=LANGUAGE_MODELS, fast=FAST_LANGUAGE_MODELS)
def test_opens_by_the_adapters_folder(case):
    """Auto classes of transformers and PEFT find the base in the adapter's config."""
    with language_model_folder(case) as (folder, expected):
        for auto in (AutoModelForCausalLM, AutoPeftModelForCausalLM):
            opened = auto.from_pretrained(folder)
            assert torch.equal(case.output(opened), expected)


@each_case(only=LANGUAGE_MODELS, fast=FAST_LANGUAGE_MODELS)
def test_transformers_loads_an_adapter(case):
    with language_model_folder(case) as (folder, expected):
        model = case.base()
        base = case.output(model)
        model.load_adapter(str(folder))
        assert torch.equal(case.output(model), expected)
        model.disable_adapters()
        assert torch.equal(case.output(model), base)
        model.enable_adapters()
        assert torch.equal(case.output(model), expected)
        state = model.get_adapter_state_dict()
        assert state and all(case.prefix in name for name in state)
        with saved(model) as again:
            opened = PeftModel.from_pretrained(case.base(), again)
            assert torch.equal(case.output(opened), expected)


@each_case(only=LANGUAGE_MODELS, fast=FAST_LANGUAGE_MODELS)
def test_transformers_switches_adapters(case):
    model = case.base()
    model.add_adapter(case.config(), "one")
    model.add_adapter(case.config(), "two")
    perturb(model, 2, "one")
    perturb(model, 3, "two")
    model.eval()
    outputs = []
    for name, seed in (("one", 2), ("two", 3)):
        model.set_adapter(name)
        assert model.active_adapters() == [name]
        outputs.append(case.output(model))
        assert torch.equal(outputs[-1], case.output(case.adapted(seed)))
    model.delete_adapter("one")
    assert torch.equal(case.output(model), outputs[1])
    assert not [name for name in model.state_dict() if ".one" in name]


@each_case(only=LANGUAGE_MODELS, fast=FAST_LANGUAGE_MODELS)
def test_generates(case):
    model = case.adapted()
    options = {"do_sample": False, "max_new_tokens": 3, "pad_token_id": 0, "eos_token_id": None}
    cached = model.generate(input_ids=IDS, **options)
    assert cached.shape == (2, IDS.shape[1] + 3)
    assert torch.equal(cached, model.generate(IDS, **options))
    assert torch.equal(cached, model.generate(input_ids=IDS, use_cache=False, **options))
    with torch.no_grad():
        embedded = model(inputs_embeds=model.get_input_embeddings()(IDS)).logits
    assert torch.equal(embedded, case.output(model))


@each_case(fast=())
def test_compiles(case):
    model = case.adapted()
    compiled = torch.compile(copy.deepcopy(model), backend="eager")
    assert (case.output(compiled) - case.output(model)).abs().max() < 1e-5


# The model card


def _code_of_the_card(folder):
    card = (folder / "README.md").read_text(encoding="utf-8")
    return card, card.split("```python\n")[1].split("```")[0]


@pytest.mark.parametrize("name", ["llama, parallel bottleneck", "gpt2, BitFit"])
def test_the_card_says_what_loads_the_adapter(name, tmp_path):
    case = CASES[name]
    for _ in range(2):
        write_adapter(case.adapted(), tmp_path, main=True)
    card, code = _code_of_the_card(tmp_path)
    kind = case.config().peft_type.value
    assert card.startswith("---\n") and card.count("## Load this adapter") == 1
    assert f"PEFT raises `KeyError: '{kind}'`" in card and "pip install llm-align" in card
    assert len(code.splitlines()) == 2 and "\n# Model Card" in card


def test_the_card_of_an_adapter_of_peft_is_peft_s(tmp_path):
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    write_adapter(get_peft_model(CASES["llama, BitFit"].base(), config), tmp_path, main=True)
    assert "llm-align" not in (tmp_path / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_new_process_loads_the_adapter_with_the_lines_of_the_card(tmp_path):
    """Without them, it is PEFT's KeyError."""
    case = CASES["llama, parallel bottleneck"]
    base = AutoModelForCausalLM.from_pretrained(saved_base("llama"))
    write_adapter(get_peft_model(base, case.config()), tmp_path, main=True)
    load = f"from peft import AutoPeftModelForCausalLM as Auto; Auto.from_pretrained({str(tmp_path)!r})"
    with_lines = subprocess.run([sys.executable, "-c", _code_of_the_card(tmp_path)[1] + load], check=False)
    assert with_lines.returncode == 0
    without = subprocess.run([sys.executable, "-c", load], check=False, capture_output=True, text=True)
    assert without.returncode == 1 and without.stderr.endswith("KeyError: 'BOTTLENECK'\n")
