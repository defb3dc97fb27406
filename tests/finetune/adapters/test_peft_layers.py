"""PEFT's demands of a tuner's layers: disabling, merging, unloading, training, dtype, status, targets."""

import tempfile

import pytest
import torch
from peft import PeftModel, get_model_status, get_peft_model, get_peft_model_state_dict
from peft_cases import (
    CASES,
    FAST,
    FAST_LANGUAGE_MODELS,
    LANGUAGE_MODELS,
    MERGEABLE,
    base_weights,
    close,
    each_case,
    no_error,
    perturb,
    same,
    saved,
    tuner_layers,
)
from safetensors.torch import save_file
from torch import Tensor, nn

from finetune.adapters._bias_layer import BitFitConfig
from finetune.adapters._bottleneck_layer import BottleneckConfig

pytestmark = pytest.mark.filterwarnings("ignore")
NAN_TEXT = "NaNs detected in the merged weights. The adapter default seems to be broken"


# Disabling, merging, unloading


@each_case()
def test_disabled_is_the_base(case):
    model, base = case.adapted(), case.output(case.base())
    expected = case.output(model)
    with model.disable_adapter():
        assert torch.equal(case.output(model), base)
        assert not any(weight.requires_grad for weight in model.parameters())
    assert torch.equal(case.output(model), expected)
    model.base_model.disable_adapter_layers()
    assert torch.equal(case.output(model), base) and get_model_status(model).enabled is False
    model.base_model.enable_adapter_layers()
    assert torch.equal(case.output(model), expected)


@each_case(fast=(*FAST, "convolution and norm, BitFit"))
def test_merges_and_unmerges(case):
    model = case.adapted()
    expected, weights = case.output(model), base_weights(model)
    if case.merges:
        model.merge_adapter()
        assert all(layer.merged for layer in tuner_layers(model))
        assert close(case.output(model), expected)
        model.merge_adapter()  # a second time: no change
        assert close(case.output(model), expected)
        with pytest.raises(ValueError, match="merged"):
            model.delete_adapter("default")
        model.unmerge_adapter()
    else:
        with pytest.raises(ValueError, match="nonlinear and cannot be merged"):
            model.merge_adapter()
        with pytest.warns(UserWarning, match="Already unmerged"):
            model.unmerge_adapter()
    assert not any(layer.merged for layer in tuner_layers(model))
    assert torch.equal(case.output(model), expected)
    assert same(base_weights(model), weights)


@each_case()
def test_disabled_after_merging_is_the_base(case):
    model, base = case.adapted(), case.output(case.base())
    expected = case.output(model)
    with pytest.raises(ValueError, match="nonlinear") if not case.merges else no_error():
        model.merge_adapter(safe_merge=True)
    with model.disable_adapter():
        assert torch.equal(case.output(model), base)
    assert close(case.output(model), expected)


@each_case(only=MERGEABLE)
def test_merges_several(case):
    """One after the other is both at once; unmerging removes both."""
    model = case.adapted()
    model.add_adapter("other", case.config())
    perturb(model, 3, "other")
    model.base_model.set_adapter(["default", "other"])
    expected, weights = case.output(model), base_weights(model)
    model.merge_adapter(["default"])
    model.merge_adapter(["other"])
    assert get_model_status(model).merged_adapters == ["default", "other"]
    assert close(case.output(model), expected)
    model.unmerge_adapter()
    assert same(base_weights(model), weights)
    assert close(case.output(model.merge_and_unload(adapter_names=["default", "other"])), expected)


@each_case()
def test_merged_and_unloaded(case):
    model = case.adapted()
    expected, weights = case.output(model), base_weights(model)
    if not case.merges:
        with pytest.raises(ValueError, match="nonlinear and cannot be merged"):
            model.merge_and_unload()
        assert torch.equal(case.output(model), expected) and same(base_weights(model), weights)
        return
    plain = model.merge_and_unload(safe_merge=True)
    assert type(plain) is type(case.base()) and not tuner_layers(plain)
    assert plain.state_dict().keys() == case.base().state_dict().keys()
    assert close(case.output(plain), expected)


@each_case(fast=("llama, parallel bottleneck", "convolution and norm, BitFit"))
def test_unloaded_is_the_base(case):
    model, base = case.adapted(), case.base()
    plain = model.unload()
    assert type(plain) is type(base) and not tuner_layers(plain)
    assert [(n, type(m)) for n, m in plain.named_modules()] == [(n, type(m)) for n, m in base.named_modules()]
    assert same(dict(plain.state_dict()), dict(base.state_dict()))
    assert torch.equal(case.output(plain), case.output(base))
    assert not hasattr(plain, "peft_config")
    again = get_peft_model(plain, case.config())
    with tempfile.TemporaryDirectory() as folder:
        save_file(get_peft_model_state_dict(again), f"{folder}/weights.safetensors")


@each_case(only=MERGEABLE)
def test_broken_weights_are_not_merged(case):
    for value in (float("nan"), float("inf")):
        model = case.adapted()
        weights = base_weights(model)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if case.prefix in name:
                    weight[0] = value
        with pytest.raises(ValueError, match=NAN_TEXT):
            model.merge_adapter(safe_merge=True)
        assert same(base_weights(model), weights)
        with pytest.raises(ValueError, match=NAN_TEXT):
            model.merge_and_unload(safe_merge=True)


# Training


@each_case(fast=(*FAST, "mlp, parallel bottleneck", "convolution and norm, BitFit"))
def test_trains_the_adapter_alone(case):
    model = case.adapted()
    before, weights = get_peft_model_state_dict(model), base_weights(model)
    before = {name: value.clone() for name, value in before.items()}
    names = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert len(names) == len(before) and all(case.prefix in name for name in names)
    trainable, total = model.get_nb_trainable_parameters()
    assert trainable == sum(value.numel() for value in before.values()) < total
    model.train()
    optimizer = torch.optim.SGD([w for w in model.parameters() if w.requires_grad], lr=0.1)
    for _ in range(20):  # AdaMix draws one of three pairs in a step
        case.output(model, grad=True).square().mean().backward()
    assert {name for name, weight in model.named_parameters() if weight.grad is not None} == names
    optimizer.step()
    assert not [n for n, v in get_peft_model_state_dict(model).items() if torch.equal(v, before[n])]
    assert same(base_weights(model), weights)


@each_case()
def test_inference_mode_is_frozen(case):
    model = get_peft_model(case.base(), case.config(inference_mode=True))
    assert not any(weight.requires_grad for weight in model.parameters())
    model.add_adapter("other", case.config())
    model.set_adapter("other", inference_mode=True)
    assert not any(weight.requires_grad for weight in model.parameters())


@each_case(fast=("llama, parallel bottleneck", "mlp, BitFit"))
def test_keeps_the_dtype(case):
    """float32 by default, the base's dtype with autocast off; each way to make or load an adapter."""
    for dtype in (torch.bfloat16, torch.float16):
        for autocast in (True, False):
            option = {"autocast_adapter_dtype": autocast}
            model = get_peft_model(case.base().to(dtype), case.config(), **option).eval()
            model.add_adapter("added", case.config(), **option)
            with saved(model) as folder:
                model.load_adapter(folder, "loaded", **option)
                opened = PeftModel.from_pretrained(case.base().to(dtype), folder, **option)
            expected = torch.float32 if autocast else dtype
            weights = [
                (name, weight.dtype)
                for one in (model, opened)
                for name, weight in one.named_parameters()
                if case.prefix in name
            ]
            assert [name for name, found in weights if found != expected] == []
            output = case.output(opened)
            assert output.dtype == dtype and torch.isfinite(output).all()
            if case.merges:
                opened.merge_adapter()
                assert case.output(opened).dtype == dtype


# What a layer and a model say


@each_case()
def test_layers_have_their_sizes(case):
    layers = tuner_layers(case.adapted())
    assert layers
    for layer in layers:
        base = layer.get_base_layer()
        if isinstance(base, nn.Linear):
            assert (layer.in_features, layer.out_features) == (base.in_features, base.out_features)
        assert isinstance(layer.in_features, int) and isinstance(layer.out_features, int)
        if isinstance(getattr(base, "weight", None), Tensor):
            assert layer.weight is base.weight
        if case.merges:
            assert layer.bias is base.bias and layer.out_features == len(base.bias)


@each_case()
def test_reports_its_status(case):
    model = case.adapted()
    model.add_adapter("other", case.config())
    status = get_model_status(model)
    kind = case.prefix.removesuffix("_").upper()
    assert status.peft_types == {"default": kind, "other": kind}
    assert status.active_adapters == ["default"] and status.available_adapters == ["default", "other"]
    assert status.requires_grad == {"default": True, "other": False}
    assert status.enabled is True and status.merged_adapters == []
    assert status.num_adapter_layers == len(model.get_layer_status()) == len(tuner_layers(model))
    assert status.devices == {"default": ["cpu"], "other": ["cpu"]}


# Target modules


@each_case()
def test_targets_in_every_notation(case):
    targets = case.settings["target_modules"]
    expected = case.adapted().base_model.targeted_module_names
    pattern = rf".*({'|'.join(targets)})" if case.is_language_model else "|".join(targets)
    assert case.adapted(target_modules=pattern).base_model.targeted_module_names == expected
    assert case.adapted(target_modules=set(targets)).base_model.targeted_module_names == expected
    last = expected[-1]
    without = case.adapted(exclude_modules=[last]) if len(expected) > 1 else None
    assert without is None or without.base_model.targeted_module_names == expected[:-1]
    with pytest.raises(ValueError, match="not found in the base model. Please check the target modules"):
        case.adapted(target_modules=["nothing"])
    with pytest.raises(ValueError, match="Please specify `target_modules`"):
        case.adapted(target_modules=None)


@each_case(only=LANGUAGE_MODELS, fast=FAST_LANGUAGE_MODELS)
def test_targets_some_layers(case):
    expected = case.adapted().base_model.targeted_module_names
    names = case.adapted(layers_to_transform=[1]).base_model.targeted_module_names
    assert names == [name for name in expected if ".1." in name]
    with pytest.raises(ValueError, match="layers_to_transform"):
        case.config(target_modules=".*mlp", layers_to_transform=[1])
    with pytest.raises(ValueError, match="layers_pattern"):
        case.config(layers_pattern="layers")


# Modules that our tuners do not support


class Unusual(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.linear = nn.Linear(8, 4, bias=False)
        self.conv = nn.Conv2d(1, 1, 1)
        self.block = nn.Sequential(nn.Linear(8, 8))


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (BottleneckConfig, {"target_modules": ["out_proj"]}, "attention.out_proj is part of nn.Multihead"),
        (BitFitConfig, {"target_modules": ["out_proj"]}, "attention.out_proj is part of nn.Multihead"),
        (BitFitConfig, {"target_modules": ["linear"]}, "Linear.* is not supported: it has no bias"),
        (BottleneckConfig, {"target_modules": ["conv"]}, "channels of a convolution"),
        (BottleneckConfig, {"target_modules": ["block"]}, "without `hidden_size`: Sequential has no size"),
        (BottleneckConfig, {"target_modules": ["linear"], "hidden_size": 8}, "output has another size"),
        (BottleneckConfig, {"target_modules": ["linear"], "parallel": True}, "have different sizes"),
        (BottleneckConfig, {"activation": "tanh"}, "`activation` is relu, gelu, silu, not 'tanh'"),
    ],
)
def test_a_module_that_is_not_supported(config, settings, message):
    with pytest.raises(ValueError, match=message):
        get_peft_model(Unusual(), config(**settings))


def test_a_bottleneck_reads_the_size_of_each_layer():
    model = get_peft_model(Unusual(), BottleneckConfig(target_modules=r"linear|block\.0", width=3))
    sizes = [layer.bottleneck_layers["default"].up.shape for layer in tuner_layers(model)]
    assert sizes == [(1, 4, 3), (1, 8, 3)]


def test_all_linear_targets_every_layer_but_the_head():
    """With the size of each layer's output: 16 of attention, 24 of the feed-forward block."""
    model = get_peft_model(
        CASES["llama, bottleneck"].base(),
        BottleneckConfig(task_type="CAUSAL_LM", target_modules="all-linear", width=2),
    )
    names = model.base_model.targeted_module_names
    assert len(names) == 2 * 7 and not [name for name in names if "lm_head" in name]
    assert sorted({layer.out_features for layer in tuner_layers(model)}) == [16, 24]
