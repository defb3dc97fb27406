"""Pre-flight checks of models: each detects its fault, and none changes the model."""

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from small_models import MODELS, make, token_rows
from torch import nn

from finetune.data.collate import IGNORE_INDEX, PackedCollator, PaddedCollator
from finetune.training.loss import completion_loss_sum, output_head
from finetune.training.model import preserve_state
from finetune.training.preflight import gradient_checks, invariance_checks, isolation, weight_checks
from finetune.training.preflight.checks import CheckResult

ROWS = token_rows([9, 3, 14, 2, 6, 40])
PACKED = {"lines": PackedCollator(0), "one line": PackedCollator(0, single_row=True)}
PADDED = PaddedCollator(0)
EXACT = 1e-3


def lora(model: nn.Module, dropout: float = 0.1) -> nn.Module:
    torch.manual_seed(5)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", lora_dropout=dropout)
    return get_peft_model(model, config)


def adapted(name: str, method: str) -> nn.Module:
    model = make(name)
    if method == "full":
        return model.requires_grad_(True)
    configs = {
        "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
        "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    }
    return lora(model) if method == "lora" else get_peft_model(model, configs[method])


def run_batch_invariance(
    model: nn.Module, collate=PADDED, loss_sum: Callable | None = None
) -> list[CheckResult]:
    head = output_head(model)
    summed_loss = loss_sum or (lambda batch: completion_loss_sum(model, head, batch))
    return invariance_checks.check_batch_invariance(
        model, summed_loss, invariance_checks.select_probe_rows(ROWS), collate, tolerance=EXACT
    )


@pytest.mark.parametrize("method", ["lora", "prefix", "prompt", "full"])
@pytest.mark.parametrize("name", MODELS)
def test_pain_12_a_batch_is_the_sum_of_its_rows(name: str, method: str) -> None:
    gradient, accumulation = run_batch_invariance(adapted(name, method))
    assert gradient.problem is None and accumulation.problem is None, (gradient, accumulation)
    assert not gradient.warned


def test_pain_12_packed_rows_add_up_too() -> None:
    assert [result.problem for result in run_batch_invariance(lora(make("llama")), PackedCollator(0))] == [
        None,
        None,
    ]


def test_pain_12_a_mean_of_means_is_found() -> None:
    model = lora(make("llama"))
    head = output_head(model)

    def mean(batch):
        labels = (batch["labels"][:, 1:] != IGNORE_INDEX).sum()
        return completion_loss_sum(model, head, batch) / labels * 4

    _, accumulation = run_batch_invariance(model, loss_sum=mean)
    assert accumulation.problem is not None and accumulation.problem.where == "train.micro_batch_size"


def test_pain_12_a_model_that_mixes_the_rows_of_a_batch_is_found() -> None:
    model = lora(make("llama"))
    model.base_model.model.model.layers[0].mlp.register_forward_hook(
        lambda module, args, output: output - output.mean(0, keepdim=True)
    )
    _, accumulation = run_batch_invariance(model)
    assert accumulation.problem is not None and accumulation.problem.where == "train.micro_batch_size"


def test_pain_24_lora_starts_with_half_of_its_gradients_at_zero() -> None:
    [gradient, _] = run_batch_invariance(lora(make("llama")))
    assert gradient.detail == (
        "reaches all 28 trained tensors (50% of them have a zero gradient at initialization, as expected)"
        "; none in the base"
    )


def layer(model: nn.Module, number: int = 1) -> nn.Module:
    return model.base_model.model.model.layers[number]


def frozen_layer(model: nn.Module) -> None:
    layer(model).requires_grad_(False)


def frozen_matrix(model: nn.Module) -> None:
    layer(model).self_attn.q_proj.lora_A.requires_grad_(False)


def disconnected(model: nn.Module) -> None:
    layer(model).mlp.up_proj.lora_A["default"].register_forward_hook(lambda *args: args[-1].detach())


def never_called(model: nn.Module) -> None:
    layer(model).mlp.up_proj.forward = layer(model).mlp.up_proj.base_layer.forward


def at_zero(model: nn.Module) -> None:
    layer(model).mlp.up_proj.scaling["default"] = 0.0


def trained_base(model: nn.Module) -> None:
    weight = layer(model).input_layernorm.weight
    weight.requires_grad_(True)


def infinite(model: nn.Module) -> None:
    layer(model).mlp.up_proj.lora_B["default"].weight.register_hook(lambda gradient: gradient * torch.inf)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (frozen_layer, "14 tensors are frozen, unlike the same parameter in other layers"),
        (
            frozen_matrix,
            "1 tensors are frozen, unlike the same parameter in other layers: "
            "base_model.model.model.layers.1",
        ),
        (
            disconnected,
            "1 tensors are without a gradient: base_model.model.model.layers.1.mlp.up_proj.lora_A",
        ),
        (never_called, "2 tensors are without a gradient"),
        (
            trained_base,
            "1 tensors are frozen, unlike the same parameter in other layers: "
            "base_model.model.model.layers.0",
        ),
        (infinite, "1 gradients are NaN or infinite"),
    ],
)
def test_pain_24_an_adapter_that_does_not_learn_everywhere_is_found(spoil: Callable, message: str) -> None:
    model = lora(make("llama"))
    spoil(model)
    [gradient] = run_batch_invariance(model)
    assert gradient.problem is not None and message in gradient.detail


def test_a_dead_layer_is_a_warning_and_no_layer_alive_an_error() -> None:
    model = lora(make("llama"))
    at_zero(model)
    gradient, _ = run_batch_invariance(model)
    assert gradient.problem is None and gradient.warned
    assert gradient.detail.startswith(
        "zero for 1 of the trained tensors, unlike the same parameter in other layers: base_model.model"
    )
    for weight in model.parameters():
        weight.requires_grad and weight.register_hook(torch.zeros_like)
    [gradient] = run_batch_invariance(model)
    assert gradient.problem is not None and gradient.detail == "all gradients are zero"


def test_pain_24_a_frozen_weight_that_gets_a_gradient_is_found() -> None:
    model = lora(make("llama"))
    layer(model).input_layernorm.weight.grad = torch.ones(32)
    assert "1 frozen tensors got a gradient" in gradient_checks.check_gradient_flow(model).detail


@pytest.mark.parametrize("name", ["frozen", "unused"])
def test_pain_24_an_adapter_that_learns_nothing_at_all_is_found(name: str) -> None:
    model = lora(make("llama"))
    if name == "frozen":
        model.requires_grad_(False)
    else:
        model.disable_adapter_layers()
        model.requires_grad_(False)
        layer(model).mlp.up_proj.lora_A.requires_grad_(True)
        layer(model, 0).mlp.up_proj.lora_A.requires_grad_(True)
    [gradient] = run_batch_invariance(model)
    assert gradient.problem is not None


def test_unused_experts_pass() -> None:
    """Of the tensors that differ only in an index one must get a gradient; in other layers the others may."""

    class Layer(nn.Module):
        def __init__(self, visited: int) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
            self.visited = visited

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.experts[self.visited](x)

    model = nn.Sequential(nn.Linear(2, 2))
    model.layers = nn.ModuleList([Layer(0), Layer(2)])
    model.layers[1](model.layers[0](torch.ones(1, 2))).sum().backward()
    model[0].requires_grad_(False)
    assert gradient_checks.check_gradient_flow(model).problem is None
    model.zero_grad()
    model.layers[1](torch.ones(1, 2)).sum().backward()
    assert (
        "2 tensors are without a gradient: layers.0.experts.0"
        in gradient_checks.check_gradient_flow(model).detail
    )


def test_unused_modality_layers_are_reported() -> None:
    model = nn.Module()
    model.vision = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    model.text = nn.ModuleList([nn.Linear(2, 2)])
    model.text[0](torch.ones(1, 2)).sum().backward()
    result = gradient_checks.check_gradient_flow(model)
    assert (
        result.problem is None
        and result.warned
        and "text does not use vision: remove them from adapter.target" in result.detail
    )


@pytest.mark.parametrize("layout", PACKED)
@pytest.mark.parametrize("name", MODELS)
def test_pain_13_packed_rows_are_as_if_alone(name: str, layout: str) -> None:
    result = invariance_checks.check_packing_isolation(lora(make(name)), ROWS, PACKED[layout], epsilon=1e-7)
    assert result.problem is None, result


class Forgetful(nn.Module):
    """A model that ignores the boundaries of packed rows."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs):
        return self.model(**{key: value for key, value in inputs.items() if key != "position_ids"})


@pytest.mark.parametrize("layout", PACKED)
@pytest.mark.parametrize("lengths", [[9, 3, 14, 2, 6, 40], [2], [3, 3, 3]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pain_13_a_model_that_ignores_the_borders_is_found(layout: str, lengths: list[int], dtype) -> None:
    model = Forgetful(make("llama").to(dtype))
    epsilon = torch.finfo(dtype).eps
    result = invariance_checks.check_packing_isolation(
        model, token_rows(lengths), PACKED[layout], epsilon=epsilon
    )
    assert result.problem is not None and result.problem.where == "data.packing"
    correct = invariance_checks.check_packing_isolation(
        model.model, token_rows(lengths), PACKED[layout], epsilon=epsilon
    )
    assert correct.problem is None, correct


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_a_leak_of_one_percent_is_found_in_every_precision(name: str, dtype: torch.dtype) -> None:
    """Rounding in bfloat16 is as large as this leak: the neighbors' tokens show it."""
    model = make(name).to(dtype)

    def leak(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        previous = torch.roll(output, 1, dims=1)
        previous[:, 0] = 0
        return output + 0.01 * previous

    epsilon = torch.finfo(dtype).eps
    healthy = invariance_checks.check_packing_isolation(model, ROWS, PACKED["lines"], epsilon=epsilon)
    assert healthy.problem is None and "in their neighbors change them not at all" in healthy.detail
    model.get_input_embeddings().register_forward_hook(leak)
    found = invariance_checks.check_packing_isolation(model, ROWS, PACKED["lines"], epsilon=epsilon)
    assert found.problem is not None and "other tokens in the neighbors of a packed row" in found.detail


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_ignores_position_ids_alone_is_found(dtype: torch.dtype) -> None:
    """Its packed rows are separate, but not at the positions of rows alone."""
    model = make("llama").to(dtype)
    # Absolute positions that start at the batch row's beginning.
    model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: output + 0.02 * torch.arange(output.shape[1]).sin()[:, None].to(output)
    )
    result = invariance_checks.check_packing_isolation(
        model, ROWS, PACKED["one line"], epsilon=torch.finfo(dtype).eps
    )
    assert result.problem is not None and "packed and alone, differ" in result.detail


def test_tokens_of_all_rows_in_a_batch_bound_the_effect_of_neighbors() -> None:
    """In a mixture that computes experts for all tokens at once, rounding depends on all rows."""
    texts = [torch.arange(1, 5), torch.arange(2, 7)]

    def forward(effect: float) -> isolation.Forward:
        return lambda texts: [
            ids.float() + effect * float(texts[1 - index].float().sum()) for index, ids in enumerate(texts)
        ]

    for together, separate, leaks in ((0.0, 0.0, False), (1e-3, 1e-3, False), (1e-2, 1e-3, True)):
        leak, allowed = isolation.isolation_leak(
            forward(together),
            forward(separate),
            texts,
            vocab_size=97,
            distance=isolation.relative_rms,
        )
        assert (leak > allowed) == leaks


def randomness() -> list:
    return [random.random(), np.random.rand(), torch.rand(1).item()]


def test_probes_preserve_state() -> None:
    model = lora(make("llama"), dropout=0.5)
    model.train()
    layer(model).mlp.eval()
    modes = [module.training for module in model.modules()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)
    expected = randomness()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)
    with preserve_state(model):
        assert not any(module.training for module in model.modules())
        randomness()
    run_batch_invariance(model)
    invariance_checks.check_packing_isolation(model, ROWS, PACKED["lines"], epsilon=1e-7)
    assert randomness() == expected
    assert [module.training for module in model.modules()] == modes
    assert all(weight.grad is None for weight in model.parameters())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_failing_probes_preserve_state() -> None:
    model = lora(make("llama")).train()
    with pytest.raises(IndexError), preserve_state(model):
        raise IndexError
    assert model.training


def test_probe_rows_are_short_and_differ_in_labels() -> None:
    rows = token_rows([100, 5, 200])
    first, last = invariance_checks.select_probe_rows(rows)
    assert len(first["input_ids"]) == 5 and len(last["input_ids"]) == 64
    assert last["labels"][-1] != IGNORE_INDEX and torch.equal(
        last["input_ids"], rows[last["row"]]["input_ids"][-64:]
    )


def test_base_check_is_bitwise() -> None:
    model = lora(make("llama"))
    before = weight_checks.frozen_checksums(model)
    assert len(before) > 10 and not any("lora" in name for name in before)
    assert (
        "unchanged"
        in weight_checks.check_base_unchanged(before, weight_checks.frozen_checksums(model)).detail
    )
    weight = layer(model).input_layernorm.weight
    with torch.no_grad():
        weight[0] = torch.nextafter(weight[0], torch.tensor(2.0))
    result = weight_checks.check_base_unchanged(before, weight_checks.frozen_checksums(model))
    assert result.problem is not None and "layers.1.input_layernorm.weight" in result.detail
    assert weight_checks.check_base_unchanged({}, {}).problem is None
