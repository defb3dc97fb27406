"""Actor-critic on one base: gradients per role, log-probabilities, entropies, values, saved weights."""

import pytest
import torch
from adapter_properties import FAMILIES, IDS
from cast import episodes, ids, models
from torch import Tensor, nn

from align.ppo.episodes import Episodes
from align.ppo.roles import Roles, without_dropout
from align.preference.starting_policy import StartingPolicy
from align.reward.model import completion_scores
from align.rl.maths.losses import policy_loss, value_loss
from align.rl.reading import lay_out, policy_tables

pytestmark = pytest.mark.filterwarnings("ignore")
METHODS = ["lora", "qlora", "prefix", "prompt", "ia3", "dora", "ptuning", "bitfit"]


def losses(roles: Roles, found: Episodes) -> tuple[Tensor, Tensor]:
    batch = found.batch([0, 1, 2, 3], pad_id=0)
    outputs = roles(batch, spread=False)
    mask = batch["mask"]
    policy = policy_loss(outputs.logps, outputs.logps.detach(), batch["advantages"], mask, clip=0.2)
    value = value_loss(outputs.values, outputs.values.detach(), batch["returns"], mask, clip=None)
    return policy.losses.sum(), value.losses.sum()


def touched(model: nn.Module) -> set[str]:
    return {
        name for name, weight in model.named_parameters() if weight.grad is not None and weight.grad.any()
    }


@pytest.mark.parametrize("recompute", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("method", ["lora", "qlora", "ia3"])
def test_each_loss_reaches_its_own_role_alone(method: str, recompute: bool) -> None:
    roles, reward = models(method, "llama")
    if recompute:
        roles.activation_checkpointing_enable(activation_checkpointing_kwargs=None)
        for role in (roles.policy, roles.value):
            role.get_base_model().enable_input_require_grads()
    roles.train()
    for which, prefix in ((0, "policy."), (1, "value.")):
        both = losses(roles, episodes(roles))
        completion_scores(reward, lay_out(*ids(), pad_id=0))  # another model runs before the backward pass
        both[which].backward()
        names = touched(roles)
        assert names and all(name.startswith(prefix) for name in names), names
        assert not touched(reward)
        roles.zero_grad(set_to_none=True)


def test_recomputed_activations_give_the_same_gradients() -> None:
    grads = []
    for recompute in (False, True):
        roles, _ = models("lora", "llama")
        if recompute:
            roles.activation_checkpointing_enable(activation_checkpointing_kwargs=None)
            for role in (roles.policy, roles.value):
                role.get_base_model().enable_input_require_grads()
        roles.train()
        policy, value = losses(roles, episodes(roles))
        (policy + value).backward()
        grads.append({name: w.grad for name, w in roles.named_parameters() if w.grad is not None})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 8
    for name, gradient in grads[0].items():
        torch.testing.assert_close(gradient, grads[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_log_probabilities_are_the_library_s_whatever_stands_beside(method: str, family: str) -> None:
    if method == "bitfit" and family == "llama":
        pytest.skip("no biases")
    roles, _ = models(method, family, temperature=0.7)
    roles.eval()
    prompts, completions = ids()
    with torch.no_grad():
        together, _ = policy_tables(
            roles.policy, lay_out(prompts, completions, pad_id=0), temperature=0.7, spread=False
        )
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            # Alone; and left-padded, which moves virtual tokens away from the text.
            for pads in (0,) if roles.policy.active_peft_config.is_prompt_learning else (0, 3):
                line = torch.tensor([[0] * pads + [*prompt, *completion]])
                mask = (torch.arange(line.shape[1]) >= pads).long()[None]
                logits = roles.policy(input_ids=line, attention_mask=mask).logits[
                    0, -len(completion) - 1 : -1
                ]
                alone = (logits / 0.7).log_softmax(-1)[range(len(completion)), list(completion)]
                found = together[row, : len(completion)]
                torch.testing.assert_close(found, alone, rtol=1e-4, atol=2e-5)
            assert not together[row, len(completion) :].any()


def test_values_are_read_where_a_token_is_drawn() -> None:
    roles, _ = models("lora", "llama")
    roles.eval()
    prompts, completions = ids()
    with torch.no_grad():
        values = roles.values(lay_out(prompts, completions, pad_id=0))
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            for place in range(len(completion)):
                seen = (*prompt, *completion[:place])
                alone = completion_scores(roles.value, lay_out([seen[:-1]], [seen[-1:]], pad_id=0))
                assert values[row, place] == pytest.approx(alone.item(), abs=1e-5)


def test_entropies_are_those_of_the_distribution() -> None:
    roles, _ = models("lora", "llama", temperature=2.0)
    roles.eval()
    batch = lay_out(*ids(), pad_id=0)
    with torch.no_grad():
        found = roles(batch, spread=True)
        line = roles.policy(input_ids=batch["input_ids"][:1], attention_mask=batch["attention_mask"][:1])
    logps = (line.logits[0, 4] / 2.0).log_softmax(-1)  # the prompt's last state predicts the first token
    assert found.entropies[0, 0] == pytest.approx(float(-(logps.exp() * logps).sum()), abs=1e-5)
    assert not roles(batch, spread=False).entropies.any()


def test_the_reference_is_the_start_after_steps() -> None:
    roles, _ = models("lora", "llama")
    batch = lay_out(*ids(), pad_id=0)
    start = StartingPolicy(roles.policy)
    with torch.no_grad():
        before, _ = policy_tables(roles.policy, batch, temperature=1.0, spread=False)
        for weight in roles.parameters():
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn_like(weight))
        now, _ = policy_tables(roles.policy, batch, temperature=1.0, spread=False)
        with start.in_place():
            reference, _ = policy_tables(roles.policy, batch, temperature=1.0, spread=False)
    assert torch.equal(reference, before) and not torch.allclose(now, before, atol=1e-3)


def test_what_is_saved_is_what_is_trained() -> None:
    one, other = models("lora", "llama")[0], models("lora", "llama")[0]
    with torch.no_grad():
        for weight in one.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight))
    saved = one.state_dict()
    assert {name.split(".")[0] for name in saved} == {"policy", "value"}
    assert sum(tensor.numel() for tensor in saved.values()) < 20_000
    other.load_state_dict(saved, strict=False)
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(one.policy(input_ids=IDS).logits, other.policy(input_ids=IDS).logits)


def test_dropout_is_off() -> None:
    roles, _ = models("lora", "gpt-neox")
    assert not roles.had_dropout
    dropped = next(module for module in roles.modules() if isinstance(module, nn.Dropout))
    dropped.p = 0.5
    assert without_dropout(roles) and dropped.p == 0.0
    roles.train()
    batch = lay_out(*ids(), pad_id=0)
    assert torch.equal(roles(batch, spread=False).logps, roles(batch, spread=False).logps)
