"""PPO experience: token rewards and advantages, minibatch order, stored rollouts, metrics."""

from pathlib import Path

import pytest
import torch
from cast import LENGTHS, episodes, models, replies

from align.ppo import measures
from align.ppo.episodes import Episodes
from align.ppo.experience import cut_updates, learnt_from, rows_of_rollout, shaped_scores
from align.ppo.settings import PpoSettings
from align.rl import measures as of
from align.rl.maths.scores import Running
from align.rl.reading import Said

COUNT, LONGEST = 4, 6
OWN = torch.tensor([length for _, length in LENGTHS])


def said(seed: int = 0) -> Said:
    torch.manual_seed(seed)
    mask = torch.arange(LONGEST) < OWN[:, None]
    tables = [torch.randn(COUNT, LONGEST) * mask for _ in range(4)]
    return Said(*tables)


def test_a_token_earns_what_the_papers_say() -> None:
    """With gamma = lambda = 1 and no whitening a return is the score less the KL still to come."""
    settings = PpoSettings(trace=1.0, whiten_advantages=False)
    seen, scores = said(), torch.tensor([1.0, -2.0, 0.5, 3.0])
    tables = learnt_from(seen, scores, OWN, coefficient=0.3, settings=settings)
    for row in range(COUNT):
        for token in range(int(OWN[row])):
            later = (seen.logps - seen.reference_logps)[row, token : OWN[row]].sum()
            expected = scores[row] - 0.3 * later
            assert tables.returns[row, token] == pytest.approx(float(expected), abs=1e-5)
            gained = expected - seen.values[row, token]
            assert tables.advantages[row, token] == pytest.approx(float(gained), abs=1e-5)
        assert not tables.advantages[row, OWN[row] :].any() and not tables.returns[row, OWN[row] :].any()


def test_whitened_advantages_have_mean_0_and_deviation_1() -> None:
    tables = learnt_from(said(), torch.randn(COUNT), OWN, coefficient=0.1, settings=PpoSettings())
    found = tables.advantages[torch.arange(LONGEST) < OWN[:, None]]
    assert found.mean() == pytest.approx(0, abs=1e-6) and found.std() == pytest.approx(1, abs=1e-4)


def test_scores_are_normalised_then_clipped_then_replaced() -> None:
    settings = PpoSettings(normalise="running", clip_scores=1.2, missing_end=-7.0)
    found = replies([0.0, 2.0, 8.0, 4.0], stopped=[True, True, True, False])
    running = Running(count=5, mean=2.0, m2=16.0)
    assert shaped_scores(found, settings, running).tolist() == [-1.0, 0.0, pytest.approx(1.2), -7.0]
    assert shaped_scores(found, PpoSettings(missing_end=None), running).tolist() == [0.0, 2.0, 8.0, 4.0]


def test_every_prompt_comes_once_an_epoch_in_another_order() -> None:
    rollouts = [rows_of_rollout(10, 4, number, seed=3) for number in range(5)]
    flat = [row for rollout in rollouts for row in rollout]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10)) and flat[:10] != flat[10:]
    assert rows_of_rollout(10, 4, 2, seed=3) == rollouts[2] != rows_of_rollout(10, 4, 2, seed=4)
    assert len(rows_of_rollout(3, 8, 0, seed=0)) == 8


def test_updates_see_every_episode_once_an_epoch_longest_first() -> None:
    lengths = [3, 9, 4, 8, 5, 7, 6, 2]
    steps = cut_updates(lengths, batch_size=4, size=3, draw=[0, 0, 0])
    assert [[len(part) for part in step] for step in steps] == [[3, 1], [3, 1]]
    assert sorted(i for step in steps for part in step for i in part) == list(range(8))
    for step in steps:
        flat = [lengths[i] for part in step for i in part]
        assert flat == sorted(flat, reverse=True)
    assert steps != cut_updates(lengths, batch_size=4, size=3, draw=[0, 0, 1])


def test_episodes_come_back_from_their_file(tmp_path: Path) -> None:
    before = episodes(models("lora", "llama")[0])
    before.save(tmp_path / "e.safetensors")
    after = Episodes.load(tmp_path / "e.safetensors")
    assert (after.rows, after.prompts, after.completions) == (before.rows, before.prompts, before.completions)
    for name, table in vars(before.tables).items():
        assert torch.equal(vars(after.tables)[name], table)


def test_measures_by_hand() -> None:
    found = of.of_replies(replies([1.0, 2.0, 3.0, 6.0], stopped=[True, False, True, True]))
    assert found["reward"] == 3.0 and found["ends"] == 0.75 and found["distinct"] == 1.0
    assert found["length"] == sum(length for _, length in LENGTHS) / 4
    assert of.correlation(OWN.double().numpy(), OWN.double().numpy()) == pytest.approx(1.0)
    seen = said()
    distance = of.of_distance(replies([0.0] * 4), seen)
    assert distance["kl"] == pytest.approx(float((seen.logps - seen.reference_logps).sum() / 4), abs=1e-5)
    assert distance["perplexity"] == pytest.approx(
        float(torch.exp(-seen.reference_logps.sum() / OWN.sum())), rel=1e-5
    )


def test_values_that_explain_nothing_are_not_logged() -> None:
    assert measures.of_values(torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([3, 3])) == {}
    returns = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert measures.of_values(returns, returns, torch.tensor([2, 2])) == {"explained_variance": 1.0}


def test_a_token_that_became_impossible_does_not_drown_the_distance() -> None:
    then, mask = torch.full((1, 3), -1.0), torch.tensor([[True, True, False]])
    found = measures.from_sampler(then, torch.tensor([[-41.0, -1.0, -99.0]]), mask)
    assert found.tolist() == [[pytest.approx(39.0), 0.0, 0.0]]
