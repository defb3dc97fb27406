"""Actor-critic on one base: gradients per role, log-probabilities, entropies, values, saved weights."""

import pytest
import torch
from adapter_properties import FAMILIES, IDS
from ppo_models import build_models, random_ids, random_rollout
from torch import Tensor, nn

from align.ppo.actor_critic import ActorCritic, disable_dropout
from align.ppo.experience import Rollout
from align.preference.reference_policy import ReferencePolicy
from align.reward.model import completion_scores
from align.rl.maths.losses import policy_loss, value_loss
from align.rl.token_stats import collate_completions, token_logps_and_entropy

pytestmark = pytest.mark.filterwarnings("ignore")
METHODS = ["lora", "qlora", "prefix", "prompt", "ia3", "dora", "ptuning", "bitfit"]


def losses(actor_critic: ActorCritic, rollout: Rollout) -> tuple[Tensor, Tensor]:
    batch = rollout.batch([0, 1, 2, 3], pad_id=0)
    outputs = actor_critic(batch, with_entropy=False)
    mask_CT = batch["mask"]
    policy = policy_loss(outputs.logps, outputs.logps.detach(), batch["advantages"], mask_CT, clip_range=0.2)
    value = value_loss(outputs.values, outputs.values.detach(), batch["returns"], mask_CT, clip_range=None)
    return policy.losses.sum(), value.losses.sum()


def names_with_gradient(model: nn.Module) -> set[str]:
    return {
        name for name, weight in model.named_parameters() if weight.grad is not None and weight.grad.any()
    }


@pytest.mark.parametrize("recompute", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("method", ["lora", "qlora", "ia3"])
def test_each_loss_trains_only_its_own_model(method: str, recompute: bool) -> None:
    actor_critic, reward = build_models(method, "llama")
    if recompute:
        actor_critic.activation_checkpointing_enable(activation_checkpointing_kwargs=None)
        for role in (actor_critic.policy, actor_critic.value):
            role.get_base_model().enable_input_require_grads()
    actor_critic.train()
    for which, prefix in ((0, "policy."), (1, "value.")):
        both = losses(actor_critic, random_rollout(actor_critic))
        completion_scores(
            reward, collate_completions(*random_ids(), pad_id=0)
        )  # another model runs before the backward pass
        both[which].backward()
        names = names_with_gradient(actor_critic)
        assert names and all(name.startswith(prefix) for name in names), names
        assert not names_with_gradient(reward)
        actor_critic.zero_grad(set_to_none=True)


def test_recomputed_activations_give_the_same_gradients() -> None:
    grads = []
    for recompute in (False, True):
        actor_critic, _ = build_models("lora", "llama")
        if recompute:
            actor_critic.activation_checkpointing_enable(activation_checkpointing_kwargs=None)
            for role in (actor_critic.policy, actor_critic.value):
                role.get_base_model().enable_input_require_grads()
        actor_critic.train()
        policy, value = losses(actor_critic, random_rollout(actor_critic))
        (policy + value).backward()
        grads.append(
            {name: weight.grad for name, weight in actor_critic.named_parameters() if weight.grad is not None}
        )
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 8
    for name, gradient in grads[0].items():
        torch.testing.assert_close(gradient, grads[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_logps_equal_transformers_independent_of_the_batch(method: str, family: str) -> None:
    if method == "bitfit" and family == "llama":
        pytest.skip("no biases")
    actor_critic, _ = build_models(method, family, temperature=0.7)
    actor_critic.eval()
    prompts, completions = random_ids()
    with torch.no_grad():
        batched_CT, _ = token_logps_and_entropy(
            actor_critic.policy,
            collate_completions(prompts, completions, pad_id=0),
            temperature=0.7,
            with_entropy=False,
        )
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            # Alone; and left-padded, which moves virtual tokens away from the text.
            for pads in (0,) if actor_critic.policy.active_peft_config.is_prompt_learning else (0, 3):
                row_ids = torch.tensor([[0] * pads + [*prompt, *completion]])
                mask = (torch.arange(row_ids.shape[1]) >= pads).long()[None]
                logits = actor_critic.policy(input_ids=row_ids, attention_mask=mask).logits[
                    0, -len(completion) - 1 : -1
                ]
                alone = (logits / 0.7).log_softmax(-1)[range(len(completion)), list(completion)]
                batched = batched_CT[row, : len(completion)]
                torch.testing.assert_close(batched, alone, rtol=1e-4, atol=2e-5)
            assert not batched_CT[row, len(completion) :].any()


def test_values_are_read_before_each_token() -> None:
    actor_critic, _ = build_models("lora", "llama")
    actor_critic.eval()
    prompts, completions = random_ids()
    with torch.no_grad():
        values = actor_critic.values(collate_completions(prompts, completions, pad_id=0))
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            for position in range(len(completion)):
                prefix = (*prompt, *completion[:position])
                alone = completion_scores(
                    actor_critic.value, collate_completions([prefix[:-1]], [prefix[-1:]], pad_id=0)
                )
                assert values[row, position] == pytest.approx(alone.item(), abs=1e-5)


def test_entropy_of_the_sampling_distribution() -> None:
    actor_critic, _ = build_models("lora", "llama", temperature=2.0)
    actor_critic.eval()
    batch = collate_completions(*random_ids(), pad_id=0)
    with torch.no_grad():
        outputs = actor_critic(batch, with_entropy=True)
        single = actor_critic.policy(
            input_ids=batch["input_ids"][:1], attention_mask=batch["attention_mask"][:1]
        )
    logps = (single.logits[0, 4] / 2.0).log_softmax(-1)  # the prompt's last state predicts the first token
    assert outputs.entropies[0, 0] == pytest.approx(float(-(logps.exp() * logps).sum()), abs=1e-5)
    assert not actor_critic(batch, with_entropy=False).entropies.any()


def test_reference_is_the_initial_policy_after_steps() -> None:
    actor_critic, _ = build_models("lora", "llama")
    batch = collate_completions(*random_ids(), pad_id=0)
    reference_policy = ReferencePolicy(actor_critic.policy)
    with torch.no_grad():
        before, _ = token_logps_and_entropy(actor_critic.policy, batch, temperature=1.0, with_entropy=False)
        for weight in actor_critic.parameters():
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn_like(weight))
        current, _ = token_logps_and_entropy(actor_critic.policy, batch, temperature=1.0, with_entropy=False)
        with reference_policy.as_active():
            reference, _ = token_logps_and_entropy(
                actor_critic.policy, batch, temperature=1.0, with_entropy=False
            )
    assert torch.equal(reference, before) and not torch.allclose(current, before, atol=1e-3)


def test_state_dict_holds_trained_weights_only() -> None:
    source, target = build_models("lora", "llama")[0], build_models("lora", "llama")[0]
    with torch.no_grad():
        for weight in source.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight))
    saved = source.state_dict()
    assert {name.split(".")[0] for name in saved} == {"policy", "value"}
    assert sum(tensor.numel() for tensor in saved.values()) < 20_000
    target.load_state_dict(saved, strict=False)
    for source_param, target_param in zip(source.parameters(), target.parameters(), strict=True):
        assert torch.equal(source_param, target_param)
    assert torch.equal(source.policy(input_ids=IDS).logits, target.policy(input_ids=IDS).logits)


def test_trainer_finds_a_config_that_is_not_the_policy_s() -> None:
    """transformers refuses ZeRO without a hidden size, and turns the cache off in the config it finds."""
    actor_critic, _ = build_models("lora", "llama")
    policy_config = actor_critic.policy.get_base_model().config
    assert actor_critic.config.hidden_size == policy_config.hidden_size
    assert actor_critic.config is not policy_config


def test_dropout_is_off() -> None:
    actor_critic, _ = build_models("lora", "gpt-neox")
    assert not actor_critic.had_dropout
    dropout = next(module for module in actor_critic.modules() if isinstance(module, nn.Dropout))
    dropout.p = 0.5
    assert disable_dropout(actor_critic) and dropout.p == 0.0
    attention = [module for module in actor_critic.modules() if hasattr(module, "attention_dropout")]
    attention[-1].attention_dropout = 0.1
    assert disable_dropout(actor_critic) and [module.attention_dropout for module in attention] == [0.0] * 4
    actor_critic.train()
    batch = collate_completions(*random_ids(), pad_id=0)
    assert torch.equal(
        actor_critic(batch, with_entropy=False).logps, actor_critic(batch, with_entropy=False).logps
    )
