"""LoRA's inputs: the same numbers as PEFT's without dropout, masks of torch's random state with it."""

from typing import Any

import pytest
import torch
from adapter_properties import IDS, WIDTH, base_of
from torch import Tensor, nn

from align.ppo.actor_critic import disable_dropout
from finetune.adapters._lora_input import CheapDropout, DropoutLinear, optimize_lora_inputs
from finetune.recipe.discovery import ADAPTERS, load_plugin

pytestmark = pytest.mark.filterwarnings("ignore")
LONG_IDS = IDS.repeat(1, 4)


def build(
    method: str,
    *,
    optimized: bool,
    dropout: float = 0.0,
    quantization: str = "none",
    recomputed: bool = False,
) -> Any:
    """Return a bfloat16 base with an adapter that changes its outputs, in training mode."""
    plugin = load_plugin(ADAPTERS, method, where="adapter.method")
    base = base_of("llama", quantization)
    if quantization == "none":
        base = base.to(torch.bfloat16)
    torch.manual_seed(0)
    model = plugin.build(base, plugin.Settings(rank=4, dropout=dropout))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if any(part in name for part in ("lora_B", "lora_E", "lambda_b")):
                weight.normal_(std=0.05)
    if optimized:
        optimize_lora_inputs(model)
    if recomputed:
        base.enable_input_require_grads()
        base.activation_checkpointing_enable()
    return model.train()


def train_step(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Return loss and gradients of a step under autocast, as the Trainer takes it."""
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(input_ids=LONG_IDS, labels=LONG_IDS).loss
    loss.backward()
    return loss, {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}


def same_step(one: Any, other: Any) -> bool:
    (loss, grads), (other_loss, other_grads) = train_step(one), train_step(other)
    assert grads.keys() == other_grads.keys() and all(grad.any() for grad in grads.values())
    return torch.equal(loss, other_loss) and all(
        torch.equal(grads[name], other_grads[name]) for name in grads
    )


@pytest.mark.parametrize("method", ["lora", "rslora", "pissa", "dora", "vera", "adalora"])
def test_without_dropout_every_bit_is_peft_s(method: str) -> None:
    """A cast to float32 and back is the identity."""
    assert same_step(build(method, optimized=False), build(method, optimized=True))


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantized_without_dropout(quantization: str) -> None:
    plain, optimized = (build("qlora", optimized=one, quantization=quantization) for one in (False, True))
    assert same_step(plain, optimized)


def test_queries_keys_and_values_save_one_input() -> None:
    """PEFT's cast and autocast's make two copies for each layer, and the second is saved."""

    def saved_inputs(model: Any) -> int:
        inputs = {}

        def note(tensor: Tensor) -> Tensor:
            if tensor.numel() == LONG_IDS.numel() * WIDTH:
                inputs[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", dtype=torch.bfloat16):
            model(input_ids=LONG_IDS)
        return [tensor.dtype for tensor in inputs.values()].count(torch.bfloat16)

    plain, optimized = (saved_inputs(build("lora", optimized=one)) for one in (False, True))
    # In two decoder layers: one input of q, k, v instead of three, one of gate and up instead of two, and
    # that of o is attention's output, which is saved anyway.
    assert plain - optimized == 2 * (2 + 1 + 1)
    # With dropout there are masks, and still the same inputs.
    assert saved_inputs(build("lora", optimized=True, dropout=0.1)) == optimized


@pytest.mark.parametrize("method", ["lora", "vera", "adalora", "dora"])
def test_checkpointing_draws_the_same_masks(method: str) -> None:
    models = [
        build(method, optimized=True, dropout=0.2, recomputed=recomputed) for recomputed in (False, True)
    ]
    assert same_step(*models)
    undropped = build(method, optimized=True)
    assert not torch.equal(train_step(models[0])[0], train_step(undropped)[0])


def test_gradients_of_dropout() -> None:
    """Against finite differences; the seed gives every pass the same mask."""
    inputs = torch.randn(2, 5, 16, dtype=torch.float64, requires_grad=True)
    layer = DropoutLinear(nn.Linear(16, 3, bias=False).double(), CheapDropout(0.3))

    def product(inputs: Tensor, weight: Tensor) -> Tensor:
        torch.manual_seed(1)
        return torch.func.functional_call(layer, {"weight": weight}, (inputs,))

    assert torch.autograd.gradcheck(product, (inputs, layer.weight.detach().clone().requires_grad_()))

    def dropped(inputs: Tensor) -> Tensor:
        torch.manual_seed(1)
        return layer.dropout(inputs)

    assert torch.autograd.gradcheck(dropped, inputs)
    # Both draw the same mask from the same seed.
    expected = dropped(inputs) @ layer.weight.T
    torch.testing.assert_close(product(inputs, layer.weight), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_are_independent_and_unbiased(dtype: torch.dtype) -> None:
    """Six standard deviations of a million draws: at p = 0.05 one is 0.0002."""
    torch.manual_seed(0)
    dropout = CheapDropout(0.05)
    mask, other = (dropout(torch.ones(1000, 1000, dtype=dtype)) == 0 for _ in range(2))
    assert abs(mask.float().mean() - 0.05) < 0.0013
    # Both masks, neighbors in a row, neighbors in a column: both are dropped with p ** 2.
    for left, right in ((mask, other), (mask[:, 1:], mask[:, :-1]), (mask[1:], mask[:-1])):
        assert abs((left & right).float().mean() - 0.0025) < 0.0003
    kept = dropout(torch.ones(10, 10, dtype=dtype)).unique()
    torch.testing.assert_close(kept[-1].float(), torch.tensor(1 / 0.95), rtol=4e-3, atol=0)
    assert torch.equal(dropout.eval()(torch.ones(3)), torch.ones(3))


def test_masks_come_from_torch_s_random_state() -> None:
    """A checkpoint stores that state, and numpy's is not touched."""
    dropout, ones = CheapDropout(0.5), torch.ones(64)
    torch.manual_seed(3)
    first, state = dropout(ones), torch.get_rng_state()
    second = dropout(ones)
    torch.set_rng_state(state)
    assert torch.equal(dropout(ones), second) and not torch.equal(first, second)


def test_generation_without_autocast_casts_again() -> None:
    model, plain = build("lora", optimized=True, dropout=0.1), build("lora", optimized=False, dropout=0.1)
    train_step(model)
    with torch.no_grad():
        logits = model.eval()(input_ids=IDS).logits
        assert torch.equal(logits, plain.eval()(input_ids=IDS).logits)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(input_ids=IDS, **options), plain.generate(input_ids=IDS, **options))


def test_names_of_weights_and_dropout_that_is_switched_off() -> None:
    model, plain = build("lora", optimized=True, dropout=0.5), build("lora", optimized=False)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert disable_dropout(model)
    assert same_step(model, plain)
