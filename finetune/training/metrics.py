"""Every metric of every stage: name, unit, formula, and whether higher or lower is better.

A metric of held-out data has the prefix ``eval/`` in metrics.jsonl and run.json. Callbacks get it as
``eval_...``, which transformers' trackers rewrite to ``eval/...``; every other name gets ``train/``.
In run.json the values before and after training have the suffixes ``_before`` and ``_after``.
"""

from dataclasses import dataclass
from typing import Literal

EVAL_PREFIX, LOGGED_EVAL_PREFIX = "eval/", "eval_"
GOLD_PREFIX = "gold/"
"""Graders that RL does not optimize (gold rewards of arXiv 2210.10760)."""
LABELED = ("sft", "pretrain", "chain_of_hindsight")
SUPERVISED = (*LABELED, "rejection")
TEXT_STAGES = (*SUPERVISED, "dpo", "kto", "ppo", "rloo", "grpo")
ONLINE = ("ppo", "rloo", "grpo")
EVERY_STAGE = (*TEXT_STAGES, "reward")
COUNTING_TOKENS = ("sft", "pretrain", "chain_of_hindsight", "dpo", "reward", "ppo")
"""Stages of one training on our own engine; TRL's trainers and rounds of rejection report no rate."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric.

    Attributes:
        name: its key; ``<name>`` stands for a name of the recipe: a reward, a grader, a head.
        unit: of the value.
        formula: one line.
        stages: those that record it.
        where: of training steps, of held-out data (``eval/``), or of both.
        better: the direction that is better, empty where there is none.
    """

    name: str
    unit: str
    formula: str
    stages: tuple[str, ...]
    where: Literal["train", "eval", "both"] = "both"
    better: Literal["", "higher", "lower"] = ""

    @property
    def names(self) -> list[str]:
        """Return the keys that it has in metrics.jsonl or run.json."""
        prefixes = {"train": [""], "eval": [EVAL_PREFIX], "both": ["", EVAL_PREFIX]}[self.where]
        return [f"{prefix}{self.name}" for prefix in prefixes]


METRICS: tuple[Metric, ...] = (
    Metric("learning_rate", "", "learning rate of the step", EVERY_STAGE, "train"),
    Metric("grad_norm", "", "L2 norm of the gradient before clipping", EVERY_STAGE, "train"),
    Metric(
        "tokens_per_second",
        "tokens/s",
        "tokens of the trained rows / seconds of training",
        COUNTING_TOKENS,
        "train",
        "higher",
    ),
    # Supervised stages
    Metric(
        "loss",
        "nats/token",
        "-mean over trained tokens of log pi(y_t | x, y_<t)",
        SUPERVISED,
        "both",
        "lower",
    ),
    Metric("perplexity", "", "exp(eval/loss)", ("pretrain",), "eval", "lower"),
    Metric(
        "exact_match",
        "fraction",
        "fraction of held-out prompts whose greedy completion equals the reference",
        (*LABELED, "dpo", "kto"),
        "eval",
        "higher",
    ),
    Metric(
        "classification/accuracy",
        "fraction",
        "fraction of held-out rows whose most likely label is their own",
        ("sft",),
        "eval",
        "higher",
    ),
    Metric(
        "classification/macro_f1",
        "",
        "mean F1 of the classes that occur in held-out rows or are chosen for them",
        ("sft",),
        "eval",
        "higher",
    ),
    Metric(
        "classification/calibration_error",
        "",
        "ECE of the chosen label's probability (arXiv 1706.04599, equation 3), ten bins",
        ("sft",),
        "eval",
        "lower",
    ),
    Metric(
        "samples/eos_rate",
        "fraction",
        "fraction of the greedy completions in samples.jsonl that end with EOS",
        TEXT_STAGES,
        "train",
        "higher",
    ),
    Metric(
        "graders/<name>",
        "grader's",
        "mean of a grader over greedy completions of held-out prompts",
        TEXT_STAGES,
        "eval",
        "higher",
    ),
    Metric(
        "retention",
        "fraction",
        "fraction of the rows of evaluate.retention whose greedy completion equals the reference",
        TEXT_STAGES,
        "eval",
        "higher",
    ),
    # Preferences: chosen is the best completion of a group, rejected the worst one; r = beta log(pi / pi_ref)
    Metric("loss", "per group", "mean over groups of the preference loss", ("dpo",), "both", "lower"),
    Metric(
        "loss",
        "per completion",
        "mean over completions of KTO's loss (arXiv 2402.01306, equation 8)",
        ("kto",),
        "both",
        "lower",
    ),
    Metric(
        "loss",
        "nats/comparison",
        "-mean log sigmoid(r_chosen - r_rejected) (Bradley-Terry)",
        ("reward",),
        "both",
        "lower",
    ),
    Metric(
        "rewards/chosen",
        "implicit reward",
        "mean of r over desirable completions",
        ("kto",),
        "both",
        "higher",
    ),
    Metric(
        "rewards/rejected",
        "implicit reward",
        "mean of r over undesirable completions",
        ("kto",),
        "both",
        "lower",
    ),
    Metric(
        "rewards/margins",
        "implicit reward",
        "mean of r_chosen - r_rejected",
        ("dpo", "kto"),
        "both",
        "higher",
    ),
    Metric("rewards/margins", "reward", "mean of r_chosen - r_rejected", ("reward",), "both", "higher"),
    Metric(
        "rewards/accuracies",
        "fraction",
        "mean of [r_chosen > r_rejected], 1/2 for a tie",
        ("dpo", "reward"),
        "both",
        "higher",
    ),
    Metric(
        "rewards/accuracies/<head>",
        "fraction",
        "rewards/accuracies on the comparisons of one head",
        ("reward",),
        "eval",
        "higher",
    ),
    Metric(
        "rewards/mean", "reward", "mean over groups of the completions' mean reward", ("reward",), "train"
    ),
    Metric(
        "logps/chosen",
        "nats/token",
        "mean log pi per token of chosen completions (TRL: sum per completion)",
        ("dpo",),
    ),
    Metric(
        "logps/rejected",
        "nats/token",
        "mean log pi per token of rejected completions (TRL: sum per completion)",
        ("dpo",),
    ),
    Metric(
        "logratios/chosen", "nats/token", "mean of log(pi / pi_ref) per token of chosen completions", ("dpo",)
    ),
    Metric(
        "logratios/rejected",
        "nats/token",
        "mean of log(pi / pi_ref) per token of rejected completions",
        ("dpo",),
    ),
    Metric(
        "objective/kl_per_token",
        "nats/token",
        "k2 on the data's completions: mean of (log pi - log pi_ref)^2 / 2",
        ("dpo",),
    ),
    Metric(
        "data/length_ratio", "", "tokens of chosen completions / tokens of rejected completions", ("dpo",)
    ),
    Metric(
        "kto/z",
        "nats/completion",
        "reference point: max(0, mean of log(pi / pi_ref) of mismatched completions)",
        ("kto",),
    ),
    # Reinforcement learning
    Metric(
        "loss",
        "",
        "loss/policy + value_coef loss/value - entropy_coef entropy, mean over tokens",
        ("ppo",),
        "train",
    ),
    Metric("loss", "", "loss of TRL's trainer", ("rloo", "grpo"), "train"),
    Metric(
        "objective/reward",
        "reward",
        "mean reward of completions, all rewards combined",
        (*ONLINE, "rejection"),
        "both",
        "higher",
    ),
    Metric(
        "rewards/<name>",
        "reward",
        "mean of each reward if there are several, including length_penalty",
        (*ONLINE, "rejection"),
        "both",
        "higher",
    ),
    Metric(
        "objective/shaped_reward",
        "reward",
        "mean reward after normalization, clipping and missing_eos_reward",
        ("ppo",),
        "train",
        "higher",
    ),
    Metric(
        "objective/kl_per_completion",
        "nats/completion",
        "k1: mean over completions of sum_t log pi(y_t) - log pi_ref(y_t)",
        ("ppo",),
    ),
    Metric(
        "objective/kl_per_completion",
        "nats/completion",
        "training: TRL's KL per token x mean length; held out: k1",
        ("rloo", "grpo"),
    ),
    Metric("objective/kl_coef", "", "coefficient of the KL penalty in the reward", ("ppo",), "train"),
    Metric(
        "objective/reward_std",
        "reward",
        "TRL's reward_std: standard deviation of rewards",
        ("rloo", "grpo"),
        "train",
    ),
    Metric(
        "objective/frac_reward_zero_std",
        "fraction",
        "fraction of prompts whose completions all have the same reward",
        ("rloo", "grpo"),
        "train",
        "lower",
    ),
    Metric(
        "objective/chosen_reward",
        "reward",
        "mean reward of the completions selected for training",
        ("rejection",),
        "train",
        "higher",
    ),
    Metric(
        "objective/best_of_n_reward",
        "reward",
        "mean over held-out prompts of the highest of n rewards",
        ("rejection",),
        "eval",
        "higher",
    ),
    Metric(
        "gold/<name>",
        "grader's",
        "mean over sampled completions of a grader that is not optimized",
        ("ppo", "rejection"),
        "eval",
        "higher",
    ),
    Metric("policy/entropy", "nats/token", "mean entropy of the policy at the sampled tokens", ONLINE),
    Metric("policy/ratio", "", "mean of pi(y_t) / pi_old(y_t)", ("ppo",), "train"),
    Metric(
        "policy/clip_frac",
        "fraction",
        "fraction of tokens whose policy loss is clipped (arXiv 1707.06347, equation 7)",
        ("ppo",),
        "train",
    ),
    Metric(
        "policy/approx_kl",
        "nats/token",
        "k3 of pi_old and pi: mean of r - 1 - log r, r = pi / pi_old",
        ("ppo",),
        "train",
    ),
    Metric("loss/policy", "", "clipped policy loss, mean over tokens", ("ppo",), "train"),
    Metric("loss/value", "", "clipped value loss, mean over tokens", ("ppo",), "train", "lower"),
    Metric(
        "value/explained_variance",
        "",
        "1 - Var(returns - values) / Var(returns)",
        ("ppo",),
        "train",
        "higher",
    ),
    Metric("val/completion_length", "tokens", "mean length of sampled completions", ONLINE),
    Metric(
        "val/eos_rate",
        "fraction",
        "fraction of sampled completions that end with EOS",
        (*ONLINE, "rejection"),
        "both",
        "higher",
    ),
    Metric("val/unique_fraction", "fraction", "distinct texts / sampled completions", ("ppo",), "both"),
    Metric(
        "val/unique_fraction", "fraction", "distinct texts / sampled completions", ("rloo", "grpo"), "eval"
    ),
    Metric(
        "val/length_reward_corr", "", "Pearson correlation of completion length and reward", ("ppo",), "both"
    ),
    Metric(
        "val/length_reward_corr",
        "",
        "Pearson correlation of completion length and reward",
        ("rloo", "grpo"),
        "eval",
    ),
    Metric("val/ref_perplexity", "", "exp(-mean log pi_ref) of sampled tokens", ("ppo",), "both"),
    Metric("val/ref_perplexity", "", "exp(-mean log pi_ref) of sampled tokens", ("rloo", "grpo"), "eval"),
    Metric("time/generation", "s", "time of sampling since the last rollout", ("ppo",), "train"),
    Metric("time/scoring", "s", "time of rewards and forward passes over a rollout", ("ppo",), "train"),
    Metric(
        "time/updates",
        "s",
        "time of forward and backward passes since the last rollout",
        ("ppo",),
        "train",
    ),
)


def as_logged(name: str) -> str:
    """Return the name that a metric has for callbacks: ``eval/loss`` becomes ``eval_loss``."""
    return LOGGED_EVAL_PREFIX + name.removeprefix(EVAL_PREFIX) if name.startswith(EVAL_PREFIX) else name


def as_recorded(name: str) -> str:
    """Return the name that a logged metric has in metrics.jsonl: ``eval_loss`` becomes ``eval/loss``."""
    return (
        EVAL_PREFIX + name.removeprefix(LOGGED_EVAL_PREFIX) if name.startswith(LOGGED_EVAL_PREFIX) else name
    )


def metric_lines() -> dict[str, str]:
    """Return a line about each metric, by its names."""
    lines: dict[str, list[str]] = {}
    for metric in METRICS:
        stages = "every stage" if metric.stages == EVERY_STAGE else ", ".join(metric.stages)
        facts = [metric.formula, metric.unit, f"{metric.better} is better" if metric.better else ""]
        line = f"{stages}: {'; '.join(filter(None, facts))}"
        for name in metric.names:
            lines.setdefault(name, []).append(line)
    return {name: " | ".join(definitions) for name, definitions in sorted(lines.items())}
