r"""Losses on ranked lists of K completions, one pure function each; ties express no preference.

In the equations: y_i is better than y_j where its score is higher; pi policy, ref reference; p_i is log
pi(y_i) per token. All pairs of a list are compared at once, in a (groups, K, K) tensor; completions come in
any order, and groups may have fewer than K. A list without two different scores has no ranking term. A new
loss is a new function here (see `inputs.py`).
"""

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from align.preference.losses.inputs import Lists, LossOutput, Needs, NonNegativeSetting, PositiveSetting


def plackett_luce(
    lists: Annotated[Lists, Needs(reference=True)], *, beta: PositiveSetting = 0.1
) -> LossOutput:
    """Listwise DPO: the probability of the full ranking, each completion against all worse ones.

    -sum_i [beta h_i - log(exp beta h_i + sum_{j worse than i} exp beta h_j)], h = log pi - log ref;
    arXiv 2305.18290, appendix A.3. With K = 2 it is DPO. Tied completions are not compared.
    """
    rewards = beta * lists.logratios
    rewards_GKK = rewards[:, None, :].expand_as(lists.better)
    return _with_best_worst_rewards(lists, _ranking_loss(rewards, rewards_GKK, lists.better), rewards)


def rrhf(
    lists: Annotated[Lists, Needs(over_tokens="mean", nll=True)],
    *,
    rank_weight: NonNegativeSetting = 1.0,
    nll_weight: NonNegativeSetting = 1.0,
) -> LossOutput:
    """RRHF: hinge ranking loss on log-probabilities per token, plus an NLL term on the best completion.

    v sum_{i better than j} max(0, p_j - p_i) - w p_best; arXiv 2304.05302, section 3, which adds both with
    weight 1 and sums the best one's log-likelihood over tokens. Here it is per token, on the scale of the
    ranking. The authors' code weights the ranking with 100, and divides both by the length of the padded row,
    prompt included. Tied best ones are averaged.
    """
    means = lists.mean_logps
    too_low = F.relu(means[:, None, :] - means[:, :, None]).masked_fill(~lists.better, 0.0)
    losses = rank_weight * too_low.sum((-1, -2)) - nll_weight * _masked_mean(means, lists.best)
    return _with_best_worst_rewards(lists, losses, means)


def pro(
    lists: Annotated[Lists, Needs(over_tokens="mean", nll=True)], *, nll_weight: NonNegativeSetting = 0.05
) -> LossOutput:
    """PRO: each completion against all worse ones, sharper for larger score gaps, plus NLL on the best.

    -sum_i log [exp(p_i t_i) / (exp(p_i t_i) + sum_{j worse than i} exp(p_j t_ij))] - w (K - 1)^2 log
    pi(y_best), t_ij = score_i - score_j and t_i the largest of them; arXiv 2306.17492, section 3 (its
    temperatures are 1 / t). The weight 0.05 (K - 1)^2 is the authors', on the best one's likelihood summed
    over tokens.
    """
    means, better = lists.mean_logps, lists.better
    # Scores of missing completions are arbitrary; `better` excludes them.
    gaps = (lists.scores[:, :, None] - lists.scores[:, None, :]).masked_fill(~better, 0.0)
    ranking = _ranking_loss(means * gaps.amax(-1), means[:, None, :] * gaps, better)
    nll_coefficient = nll_weight * (lists.present.sum(-1) - 1) ** 2
    return _with_best_worst_rewards(
        lists, ranking - nll_coefficient * _masked_mean(lists.logps, lists.best), means
    )


def _ranking_loss(logits_GK: Tensor, worse_logits_GKK: Tensor, better: Tensor) -> Tensor:
    """Return -sum_i log [exp a_i / (exp a_i + sum over the j worse than i of exp b_ij)]: (groups,).

    Args:
        logits_GK: a, (groups, K).
        worse_logits_GKK: b, (groups, K, K), used where ``better`` is true.
        better: (groups, K, K), whether i is better than j at [group, i, j].
    """
    # exp(-inf) = 0: no term. The worst completion has no rivals, and its loss is 0.
    rivals = worse_logits_GKK.masked_fill(~better, -torch.inf)
    return (torch.cat([logits_GK[..., None], rivals], -1).logsumexp(-1) - logits_GK).sum(-1)


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of the entries of each group where the mask is true: (groups,)."""
    return values.masked_fill(~mask, 0.0).sum(-1) / mask.sum(-1).clamp(min=1)


def _with_best_worst_rewards(lists: Lists, losses: Tensor, rewards: Tensor) -> LossOutput:
    """Add the implicit rewards of the best and of the worst completion, averaged over ties."""
    rewards = rewards.detach()
    return LossOutput(losses, _masked_mean(rewards, lists.best), _masked_mean(rewards, lists.worst))
