"""PPO experience: token rewards and advantages, minibatch order, stored rollouts, metrics."""

from pathlib import Path

import pytest
import torch
from ppo_models import LENGTHS, build_models, random_rollout, scored_completions

from align.ppo import metrics
from align.ppo.experience import advantages_and_returns, shape_rewards
from align.ppo.rollout_order import make_minibatches, rollout_prompt_indices
from align.ppo.settings import PPOSettings
from align.ppo.state import load_rollout, save_rollout
from align.rl.completions import completion_metrics, correlation, kl_metrics
from align.rl.maths.advantages import RunningMeanStd
from align.rl.token_stats import TokenStats

NUM_COMPLETIONS, MAX_LENGTH = 4, 6
LENGTHS_C = torch.tensor([length for _, length in LENGTHS])


def token_stats(seed: int = 0) -> TokenStats:
    torch.manual_seed(seed)
    mask_CT = torch.arange(MAX_LENGTH) < LENGTHS_C[:, None]
    tensors = [torch.randn(NUM_COMPLETIONS, MAX_LENGTH) * mask_CT for _ in range(4)]
    return TokenStats(*tensors)


def test_returns_match_the_papers() -> None:
    """With gamma = lambda = 1 and no whitening a return is the score less the KL still to come."""
    settings = PPOSettings(gae_lambda=1.0, whiten_advantages=False)
    stats, rewards = token_stats(), torch.tensor([1.0, -2.0, 0.5, 3.0])
    tensors = advantages_and_returns(stats, rewards, LENGTHS_C, kl_coef=0.3, settings=settings)
    for row in range(NUM_COMPLETIONS):
        for token in range(int(LENGTHS_C[row])):
            later = (stats.logps - stats.reference_logps)[row, token : LENGTHS_C[row]].sum()
            expected = rewards[row] - 0.3 * later
            assert tensors.returns[row, token] == pytest.approx(float(expected), abs=1e-5)
            advantage = expected - stats.values[row, token]
            assert tensors.advantages[row, token] == pytest.approx(float(advantage), abs=1e-5)
        assert (
            not tensors.advantages[row, LENGTHS_C[row] :].any()
            and not tensors.returns[row, LENGTHS_C[row] :].any()
        )


def test_whitened_advantages_have_mean_0_and_std_1() -> None:
    tensors = advantages_and_returns(
        token_stats(), torch.randn(NUM_COMPLETIONS), LENGTHS_C, kl_coef=0.1, settings=PPOSettings()
    )
    advantages = tensors.advantages[torch.arange(MAX_LENGTH) < LENGTHS_C[:, None]]
    assert advantages.mean() == pytest.approx(0, abs=1e-6) and advantages.std() == pytest.approx(1, abs=1e-4)


def test_rewards_are_normalized_then_clipped_then_replaced() -> None:
    settings = PPOSettings(normalize_rewards="running", reward_clip=1.2, missing_eos_reward=-7.0)
    completions = scored_completions([0.0, 2.0, 8.0, 4.0], stopped=[True, True, True, False])
    reward_stats = RunningMeanStd(count=5, mean=2.0, m2=16.0)
    assert shape_rewards(completions, settings, reward_stats).tolist() == [
        -1.0,
        0.0,
        pytest.approx(1.2),
        -7.0,
    ]
    assert shape_rewards(completions, PPOSettings(missing_eos_reward=None), reward_stats).tolist() == [
        0.0,
        2.0,
        8.0,
        4.0,
    ]


def test_prompts_are_reshuffled_per_epoch() -> None:
    rollouts = [rollout_prompt_indices(10, 4, number, seed=3) for number in range(5)]
    flat = [row for rollout in rollouts for row in rollout]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10)) and flat[:10] != flat[10:]
    assert rollout_prompt_indices(10, 4, 2, seed=3) == rollouts[2] != rollout_prompt_indices(10, 4, 2, seed=4)
    assert len(rollout_prompt_indices(3, 8, 0, seed=0)) == 8


def test_minibatches_cover_the_rollout_sorted_by_length() -> None:
    lengths = [3, 9, 4, 8, 5, 7, 6, 2]
    minibatches = make_minibatches(lengths, batch_size=4, micro_batch_size=3, seeds=[0, 0, 0])
    assert [[len(indices) for indices in minibatch] for minibatch in minibatches] == [[3, 1], [3, 1]]
    assert sorted(i for minibatch in minibatches for indices in minibatch for i in indices) == list(range(8))
    for minibatch in minibatches:
        flat = [lengths[i] for indices in minibatch for i in indices]
        assert flat == sorted(flat, reverse=True)
    assert minibatches != make_minibatches(lengths, batch_size=4, micro_batch_size=3, seeds=[0, 0, 1])


def test_rollout_save_and_load_roundtrip(tmp_path: Path) -> None:
    before = random_rollout(build_models("lora", "llama")[0])
    save_rollout(before, tmp_path / "e.safetensors")
    after = load_rollout(tmp_path / "e.safetensors")
    assert (after.prompt_indices, after.prompts, after.completions) == (
        before.prompt_indices,
        before.prompts,
        before.completions,
    )
    for name, tensor in vars(before.tensors).items():
        assert torch.equal(vars(after.tensors)[name], tensor)


def test_completion_metrics_by_hand() -> None:
    computed = completion_metrics(scored_completions([1.0, 2.0, 3.0, 6.0], stopped=[True, False, True, True]))
    assert (
        computed["objective/reward"] == 3.0
        and computed["val/eos_rate"] == 0.75
        and computed["val/unique_fraction"] == 1.0
    )
    assert computed["val/completion_length"] == sum(length for _, length in LENGTHS) / 4
    assert correlation(LENGTHS_C.double().numpy(), LENGTHS_C.double().numpy()) == pytest.approx(1.0)
    stats = token_stats()
    kl = kl_metrics(scored_completions([0.0] * 4), stats)
    assert kl["objective/kl_per_completion"] == pytest.approx(
        float((stats.logps - stats.reference_logps).sum() / 4), abs=1e-5
    )
    assert kl["val/ref_perplexity"] == pytest.approx(
        float(torch.exp(-stats.reference_logps.sum() / LENGTHS_C.sum())), rel=1e-5
    )


def test_undefined_explained_variance_is_not_logged() -> None:
    assert metrics.value_metrics(torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([3, 3])) == {}
    returns = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert metrics.value_metrics(returns, returns, torch.tensor([2, 2])) == {"value/explained_variance": 1.0}


def test_approx_kl_of_an_impossible_token_is_bounded() -> None:
    old_logps, mask = torch.full((1, 3), -1.0), torch.tensor([[True, True, False]])
    kl = metrics.approx_kl(old_logps, torch.tensor([[-41.0, -1.0, -99.0]]), mask)
    assert kl.tolist() == [[pytest.approx(39.0), 0.0, 0.0]]
