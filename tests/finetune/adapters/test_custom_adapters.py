"""Our own adapters against plain PyTorch references (forward and gradient), and their papers' properties."""

import math

import pytest
import torch
from adapter_properties import IDS, base_of, build, logits, train
from safetensors.torch import load_file
from torch import nn

from finetune.adapters import (
    adalora,
    adamix,
    bitfit,
    bottleneck,
    lora_plus,
    multitask_prompt,
    progressive_prompt,
    prompt,
)
from finetune.adapters._bottleneck_layer import Bottleneck, BottleneckConfig
from finetune.adapters._prefix_encoders import GatedPrefix
from finetune.adapters.loftq import low_rank_factors
from finetune.recipe.errors import UserError
from finetune.recipe.rules import adapter_rules
from finetune.recipe.settings import StageSettings
from finetune.training.adapter_hooks import scale_learning_rates
from finetune.training.loss import completion_loss_sum, output_head, symmetric_kl_sum

WIDTH, NARROW = 64, 5


def problems(adapter):
    settings = StageSettings(adapter=adapter)
    return [problem for rule in adapter_rules(adapter.method) for problem in rule.find(settings)]


class Reference(nn.Module):
    """The papers' bottleneck: W_up relu(W_down h + b_down) + b_up, times s."""

    def __init__(self, scale):
        super().__init__()
        self.down, self.up = nn.Linear(WIDTH, NARROW), nn.Linear(NARROW, WIDTH)
        self.scale = scale

    def forward(self, states):
        return self.scale * self.up(torch.relu(self.down(states)))


class Sequential(nn.Module):
    """Sequential: h + f(h), with h the module's output."""

    def __init__(self, module, adapter):
        super().__init__()
        self.module, self.adapter = module, adapter

    def forward(self, inputs):
        states = self.module(inputs)
        return states + self.adapter(states)


class Parallel(Sequential):
    """Parallel: h + f(x), with x the module's input."""

    def forward(self, inputs):
        return self.module(inputs) + self.adapter(inputs)


def reference(placement, scale):
    """Return a Llama with hand-written bottlenecks, and the bottlenecks in the order of the blocks."""
    model, adapters = base_of("llama"), []
    for block in model.model.layers:
        if placement == "parallel":
            block.mlp = Parallel(block.mlp, Reference(scale))
            adapters.append(block.mlp.adapter)
            continue
        if placement == "houlsby":
            block.self_attn.o_proj = Sequential(block.self_attn.o_proj, Reference(scale))
            adapters.append(block.self_attn.o_proj.adapter)
        block.mlp = Sequential(block.mlp, Reference(scale))
        adapters.append(block.mlp.adapter)
    return model, adapters


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer", "parallel"])
def test_a_bottleneck_is_the_papers(placement):
    torch.manual_seed(0)
    model, expected = reference(placement, 4.0)
    adapted = bottleneck.build(
        base_of("llama"), bottleneck.Settings(placement=placement, bottleneck_size=NARROW, scale=4.0)
    )
    bottlenecks = [module for module in adapted.modules() if isinstance(module, Bottleneck)]
    assert len(bottlenecks) == len(expected)
    with torch.no_grad():
        for ours, theirs in zip(bottlenecks, expected, strict=True):
            ours.down.copy_(theirs.down.weight[None])
            ours.down_bias.copy_(theirs.down.bias[None])
            ours.up.copy_(theirs.up.weight[None])
            ours.up_bias.copy_(theirs.up.bias[None])
    losses = [m(input_ids=IDS, labels=IDS).loss for m in (model, adapted)]
    assert torch.allclose(*losses, atol=1e-6)
    for loss in losses:
        loss.backward()
    for ours, theirs in zip(bottlenecks, expected, strict=True):
        assert torch.allclose(ours.down.grad[0], theirs.down.weight.grad, atol=1e-6)
        assert torch.allclose(ours.up_bias.grad[0], theirs.up.bias.grad, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({}, 4.0), ({"placement": "pfeiffer"}, 1.0), ({"placement": "houlsby", "scale": 2.0}, 2.0)],
)
def test_scale_of_a_bottleneck(settings, expected):
    adapted = bottleneck.build(base_of("llama"), bottleneck.Settings(**settings))
    assert {module.scale for module in adapted.modules() if isinstance(module, Bottleneck)} == {expected}


def test_adamix_averages_its_experts():
    """In training one expert runs; at inference a single bottleneck with the mean weights (section 3.4)."""
    mixture = Bottleneck(BottleneckConfig(width=NARROW, experts=3), WIDTH)
    for weight in mixture.parameters():
        nn.init.normal_(weight)
    states = torch.randn(2, 4, WIDTH)
    average = Bottleneck(BottleneckConfig(width=NARROW), WIDTH)
    with torch.no_grad():
        for mean, weight in zip(average.parameters(), mixture.parameters(), strict=True):
            mean.copy_(weight.mean(0, keepdim=True))
    assert torch.equal(mixture.eval()(states), average(states))
    possible = []
    with torch.no_grad():
        for down in range(3):
            for up in range(3):
                inner = torch.relu(states @ mixture.down[down].T + mixture.down_bias[down])
                possible.append(inner @ mixture.up[up].T + mixture.up_bias[up])
    mixture.train()
    samples = [mixture(states) for _ in range(60)]
    matches = [
        [torch.allclose(sample, candidate, atol=1e-5) for candidate in possible].index(True)
        for sample in samples
    ]
    assert len(set(matches)) >= 7  # nine pairs; fewer than seven of them in 60 draws: p < 1e-4


def test_adamix_consistency_loss():
    """Two forward passes take different routes; the loss is the first one's plus their symmetric KL."""
    adapted = adamix.build(base_of("llama"), adamix.Settings(bottleneck_size=NARROW))
    for module in adapted.modules():
        if isinstance(module, Bottleneck):
            nn.init.normal_(module.up, std=30.0)
    adapted.train()
    batch = {"input_ids": IDS, "labels": IDS.clone()}
    head = output_head(adapted)
    torch.manual_seed(4)
    first = adapted(input_ids=IDS).logits[:, :-1].flatten(0, 1).log_softmax(-1)
    second = adapted(input_ids=IDS).logits[:, :-1].flatten(0, 1).log_softmax(-1)
    likelihood = -first.gather(1, IDS[:, 1:].reshape(-1, 1)).sum()
    forward = nn.functional.kl_div(second, first, reduction="sum", log_target=True)
    backward = nn.functional.kl_div(first, second, reduction="sum", log_target=True)
    torch.manual_seed(4)
    loss_sum = completion_loss_sum(adapted, head, batch, num_passes=2)
    assert forward > 1e-3
    assert torch.allclose(loss_sum, likelihood + (forward + backward) / 2, rtol=1e-5)
    assert adamix.hooks(adapted, adamix.Settings(), steps=1).forward_passes == 2
    assert adamix.hooks(adapted, adamix.Settings(consistency=False), steps=1).forward_passes == 1


def test_symmetric_kl_by_hand():
    """p = (1/2, 1/2), q = (1/4, 3/4): KL(p, q) = 1/2 ln(4/3), KL(q, p) = ln 2 - H(q), half their sum."""
    first = torch.tensor([[0.0, 0.0]])
    second = torch.tensor([[0.25, 0.75]]).log()
    kl_pq = 0.5 * math.log(4 / 3)
    kl_qp = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert float(symmetric_kl_sum(first, second)) == pytest.approx((kl_pq + kl_qp) / 2, abs=1e-6)
    assert float(symmetric_kl_sum(second, second)) == 0.0


def test_gates_start_open_and_scale_a_layer_and_a_position():
    prefix = torch.randn(3, 2 * 2 * 4)  # 3 positions, 2 layers of key and value, width 4
    gated = GatedPrefix(prefix, layers=2)
    positions = torch.arange(3)[None]
    assert torch.allclose(gated(positions)[0], prefix, atol=1e-6)
    with torch.no_grad():
        gated.layer_gate[1] = 3.0
        gated.position_gate[2, 0] = -1e9
    changed = gated(positions)[0]
    assert torch.allclose(changed[:, 8:], 3 * prefix[:, 8:], atol=1e-5)
    assert torch.equal(changed[2, :8], torch.zeros(8))
    assert torch.allclose(changed[:2, :8], prefix[:2, :8], atol=1e-6)


def test_progressive_prompts_keep_earlier_tasks(tmp_path):
    """The prompt of the first task is in the second's adapter bit for bit, after the new one."""
    first = prompt.build(base_of("llama"), prompt.Settings(virtual_tokens=4))
    train(first)
    before = logits(first)
    first.save_pretrained(tmp_path / "one" / "adapter", save_embedding_layers=False)
    settings = progressive_prompt.Settings(virtual_tokens=3, previous=str(tmp_path / "one"))
    assert settings.positions == 7
    second = progressive_prompt.build(base_of("llama"), settings)
    train(second)
    second.save_pretrained(tmp_path / "two" / "adapter", save_embedding_layers=False)
    old, new = (
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")["prompt_embeddings"]
        for name in ("one", "two")
    )
    assert torch.equal(new[3:], old) and len(new) == 7
    assert sum(weight.numel() for weight in second.parameters() if weight.requires_grad) == 3 * WIDTH
    assert torch.equal(logits(first), before)
    third = progressive_prompt.Settings(virtual_tokens=2, previous=str(tmp_path / "two"))
    assert third.positions == 9


def test_progressive_prompts_report_an_invalid_run(tmp_path):
    settings = progressive_prompt.Settings(previous=str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="adapter.previous: '.*nothing' is not the folder of a finished run"):
        progressive_prompt.build(base_of("llama"), settings)
    other = bottleneck.build(base_of("llama"), bottleneck.Settings())
    other.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with pytest.raises(UserError, match="has an adapter of type BOTTLENECK"):
        progressive_prompt.build(base_of("llama"), progressive_prompt.Settings(previous=str(tmp_path)))


def test_bitfit_is_the_base_with_other_biases():
    adapted = bitfit.build(base_of("gpt-neox"), bitfit.Settings())
    base = base_of("gpt-neox")
    biases = {name for name, _ in base.named_parameters() if name.endswith("bias")}
    trained = [name for name, weight in adapted.named_parameters() if weight.requires_grad]
    assert len(trained) == len(biases)
    train(adapted)
    with torch.no_grad():
        changes = dict(adapted.named_parameters())
        for name, weight in base.named_parameters():
            if name in biases:
                weight += changes[f"base_model.model.{name.removesuffix('.bias')}.bitfit_bias.default"]
    assert torch.allclose(logits(base), logits(adapted), atol=1e-6)


def test_lora_plus_scales_the_learning_rate_of_b():
    adapted = build("lora_plus", base_of("llama"))
    hooks = lora_plus.hooks(adapted, lora_plus.Settings(lr_ratio=8.0), steps=1)
    weights = [weight for weight in adapted.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-3, weight_decay=0.01)
    scale_learning_rates(optimizer, adapted, hooks)
    names = {id(weight): name for name, weight in adapted.named_parameters()}
    rates = {names[id(w)]: group["lr"] for group in optimizer.param_groups for w in group["params"]}
    assert len(rates) == len(weights)
    assert {rate for name, rate in rates.items() if "lora_B" in name} == {8e-3}
    assert {rate for name, rate in rates.items() if "lora_A" in name} == {1e-3}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.01}


def test_adalora_spends_its_budget():
    """After training the ranks sum to layers x the requested average, and the masks are fixed."""
    settings = adalora.Settings(rank=2, init_rank=4, warmup=0.1, cooldown=0.3)
    torch.manual_seed(0)
    adapted = adalora.build(base_of("llama"), settings)
    hooks = adalora.hooks(adapted, settings, steps=10)
    weights = [weight for weight in adapted.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=0.01)
    ranks = []
    for step in range(1, 11):
        optimizer.zero_grad()
        (adapted(input_ids=IDS).logits.logsumexp(-1).mean() + hooks.penalty()).backward()
        optimizer.step()
        hooks.after_step(step)
        values = [weight for name, weight in adapted.named_parameters() if "lora_E" in name]
        ranks.append(sum(int((value != 0).sum()) for value in values))
    layers = len(values)
    assert ranks[0] == 4 * layers and ranks[6:] == [2 * layers] * 4
    assert sorted(ranks, reverse=True) == ranks


def test_adaloras_penalty_by_hand():
    """Every P and Q is twice the identity: ||4 I - I||^2 = 9 r for each of them."""
    settings = adalora.Settings(rank=2, init_rank=4, penalty=0.5)
    adapted = adalora.build(base_of("llama"), settings)
    matrices = 0
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                matrices += 1
                weight.zero_().fill_diagonal_(2.0)
    penalty = adalora.hooks(adapted, settings, steps=10).penalty()
    assert float(penalty) == pytest.approx(0.5 * matrices * 9 * 4)


def test_loftq_keeps_the_largest_singular_values():
    matrix = torch.diag(torch.tensor([5.0, 4.0, 3.0, 2.0]))
    up, down = low_rank_factors(matrix, 2)
    assert torch.allclose(up @ down, torch.diag(torch.tensor([5.0, 4.0, 0.0, 0.0])), atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_rank": 8, "rank": 8}, "adapter.init_rank: 8, with adapter.rank 8"),
        ({"warmup": 0.5, "cooldown": 0.5}, "adapter.warmup, adapter.cooldown: 0.5 and 0.5"),
    ],
)
def test_adalora_reports_a_budget_that_cannot_decrease(settings, message):
    (problem,) = problems(adalora.Settings(**settings))
    assert str(problem).startswith(message)
    assert not problems(adalora.Settings())


def test_a_multitask_prompt_starts_from_an_earlier_run(tmp_path):
    first = build("multitask_prompt", base_of("llama"))
    train(first)
    first.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    settings = multitask_prompt.Settings(virtual_tokens=6, source=str(tmp_path))
    assert not problems(settings)
    second = multitask_prompt.build(base_of("llama"), settings)
    shared = [model.prompt_encoder["default"].embedding.weight for model in (first, second)]
    assert torch.equal(*shared)
    (problem,) = problems(multitask_prompt.Settings(source="nowhere"))
    assert "'nowhere' has no adapter" in str(problem)


def test_doras_norm_is_a_constant_in_the_backward_pass():
    """Section 4.3 of the paper: y = m x W^T / c, with W = W_0 + s B A and c its norms, detached."""
    adapted = build("dora", base_of("llama"), dropout=0.0)
    layer = adapted.base_model.model.model.layers[0].self_attn.q_proj
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    nn.init.normal_(up)
    states = torch.randn(3, WIDTH)
    layer(states).square().sum().backward()
    gradients = []
    for is_constant in (True, False):
        factors = [weight.detach().clone().requires_grad_() for weight in (down, up)]
        weight = layer.weight.detach() + layer.scaling["default"] * factors[1] @ factors[0]
        norms = weight.norm(dim=1, keepdim=True)
        magnitudes = layer.lora_magnitude_vector["default"].weight.detach()[:, None]
        scaled = magnitudes * weight / (norms.detach() if is_constant else norms)
        nn.functional.linear(states, scaled).square().sum().backward()
        gradients.append(factors[0].grad)
    assert torch.allclose(down.grad, gradients[0], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(down.grad, gradients[1], rtol=0.1)


def test_llama_adapter_has_one_gate_per_layer():
    adapted = build("llama_adapter", base_of("llama"))
    gates = {name: gate for name, gate in adapted.named_parameters() if "gate" in name and gate.requires_grad}
    assert [gate.tolist() for gate in gates.values()] == [[0.0]] * adapted.config.num_hidden_layers
