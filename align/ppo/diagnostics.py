"""Metrics of a PPO run, and the findings on a finished one: reward, KL, length, diversity, updates."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import log

from align.ppo.settings import PPOSettings, Settings
from align.rl.first_completions import ENDINGS_REPAIR, MIN_EOS_RATE
from align.rl.reward_finding import reward_finding
from finetune.evaluation.small_samples import FEW_CASES, MeanChange
from finetune.training.findings import Finding, repetition_finding
from finetune.training.metric_specs import MetricSpec
from finetune.training.metrics import EVAL_PREFIX, GOLD_PREFIX

RunMetrics = Mapping[str, float]
PPO_COMPLETION_CURVES = {
    "objective/reward": "reward (mean over completions)",
    "objective/kl_per_completion": "KL to the reference (k1, nats per completion)",
    "val/completion_length": "completion length (tokens)",
    "val/eos_rate": "EOS rate",
    "val/unique_fraction": "fraction of unique completions",
    "val/length_reward_corr": "correlation of length and reward",
    "policy/entropy": "policy entropy (nats per token)",
    "val/ref_perplexity": "perplexity of the completions under the reference",
}
PPO_STEP_CURVES = {
    "loss": "training loss",
    "loss/policy": "policy loss (per token)",
    "loss/value": "value loss (per token)",
    "policy/ratio": "ratio to the sampling policy",
    "policy/clip_frac": "clip fraction",
    "policy/approx_kl": "approx_kl to the sampling policy (k3, nats per token)",
    "objective/shaped_reward": "shaped reward (mean over completions)",
    "objective/kl_coef": "KL coefficient",
    "value/explained_variance": "explained variance of the value model",
    "time/generation": "generation time per rollout (s)",
    "time/scoring": "scoring time per rollout (s)",
    "time/updates": "update time since the last rollout (s)",
}
PPO_SUMMARY_METRICS = {
    "eval/objective/reward": ("held-out reward", ".3f"),
    "eval/objective/kl_per_completion": ("held-out KL, nats per completion", ".2f"),
    "eval/val/completion_length": ("held-out completion length", ".1f"),
    "eval/val/eos_rate": ("held-out EOS rate", ".1%"),
    "eval/val/ref_perplexity": ("held-out perplexity under the reference", ".2f"),
}
PPO_FIRST_LAST_METRICS = (
    "loss",
    "objective/reward",
    "objective/shaped_reward",
    "objective/kl_per_completion",
    "policy/entropy",
    "val/completion_length",
    "val/eos_rate",
    "policy/clip_frac",
    "value/explained_variance",
)
"""Training metrics that run.json records for the first and the last rollouts."""
RAISE_GAIN = "raise train.learning_rate, lower ppo.kl_coef, or train longer"
MAX_GRADER_DROP = 0.05
"""Fall of a grader's mean from which the reward no longer measures what it should."""
PPO_LARGE_KL = 25.0
"""KL in nats per completion, our choice: proxy and gold reward diverge with the KL, sooner for a smaller
reward model (arXiv 2210.10760)."""
NOISE_PROBABILITY = 1e-6
"""Probability of a negative KL estimate below which sampling noise does not explain it."""
LARGE_CLIP_FRAC = 0.3
"""Clip fraction above which most of a rollout's updates have no effect."""
LARGE_LENGTH_RATIO, SMALL_LENGTH_RATIO = 1.5, 0.5
MAX_PERPLEXITY_RATIO = 3.0
MAX_EOS_RATE_DROP = 0.1
MAX_ENTROPY_RATIO = 2.0
"""Growth of the entropy from which the policy forgets what it knew; a slight growth is none."""
MIN_EXPLAINED_VARIANCE = 0.0


def ppo_metric_spec(settings: Settings) -> MetricSpec:
    """Return the curves and summary metrics for the recipe's rewards and graders."""
    reward_names = [source.metric_name for source in settings.rewards.sources]
    source_curves = (
        {f"rewards/{name}": f"reward: {name}" for name in reward_names} if len(reward_names) > 1 else {}
    )
    grader_curves = {
        f"{GOLD_PREFIX}{name}": f"grader: {name} (sampled completions)" for name in settings.evaluate.graders
    }
    held_out_curves = {
        f"{EVAL_PREFIX}{name}": f"held-out {title}"
        for name, title in (PPO_COMPLETION_CURVES | source_curves | grader_curves).items()
    }
    grader_summary = {f"{EVAL_PREFIX}{name}": (title, ".3f") for name, title in grader_curves.items()}
    return MetricSpec(
        curves=PPO_COMPLETION_CURVES | source_curves | PPO_STEP_CURVES | held_out_curves,
        summary=PPO_SUMMARY_METRICS | grader_summary,
        main="objective/reward",
        first_last=PPO_FIRST_LAST_METRICS,
    )


def diagnose_ppo(
    metrics: RunMetrics,
    completions: Sequence[tuple[str, str]],
    ppo: PPOSettings,
    *,
    num_held_out: int,
    reward: MeanChange | None,
) -> list[Finding]:
    """Return the findings of a run, most important first.

    Args:
        metrics: the metrics of run.json.
        completions: pairs of completions of the same prompt, before and after training.
        ppo: the recipe's hyperparameters, for the advice.
        num_held_out: completions in each mean over held-out prompts.
        reward: the change of the held-out reward; None without held-out prompts.
    """
    diagnostics: tuple[Callable[[RunMetrics, PPOSettings], Finding | None], ...] = (
        _grader_change,
        partial(_kl_to_reference, num_completions=num_held_out),
        _reference_perplexity,
        _length_change,
        _diversity,
        _update_health,
    )
    findings = [diagnostic(metrics, ppo) for diagnostic in diagnostics]
    if 0 < num_held_out < FEW_CASES:
        findings[0] = _of_few_prompts(findings[0], num_held_out)
    if reward is not None:
        findings.insert(0, reward_finding(reward, raise_gain=RAISE_GAIN))
    findings.append(
        repetition_finding(completions, "raise ppo.kl_coef, lower train.learning_rate, or train shorter")
    )
    return [finding for finding in findings if finding is not None]


def _of_few_prompts(finding: Finding | None, count: int) -> Finding | None:
    """Return a finding on means of too few held-out prompts, without an action."""
    if finding is None:
        return None
    evidence = f"{finding.evidence} on {count} prompt{'s' if count > 1 else ''}"
    return Finding(finding.name, evidence, "too few held-out prompts to tell")


def _before_and_after(metrics: RunMetrics, metric: str) -> tuple[float, float] | None:
    """Return a held-out metric before and after training."""
    keys = [f"{EVAL_PREFIX}{metric}_{when}" for when in ("before", "after")]
    if any(key not in metrics for key in keys):
        return None
    return metrics[keys[0]], metrics[keys[1]]


def _grader_change(metrics: RunMetrics, ppo: PPOSettings) -> Finding | None:
    names = [
        name
        for name in metrics
        if name.startswith(f"{EVAL_PREFIX}{GOLD_PREFIX}") and name.endswith("_before")
    ]
    changes = []
    for name in names:
        grader_key = name.removeprefix(EVAL_PREFIX).removesuffix("_before")
        before, after = metrics[name], metrics[f"{EVAL_PREFIX}{grader_key}_after"]
        changes.append((grader_key.removeprefix(GOLD_PREFIX), before, after))
    if not changes:
        return None
    evidence = "; ".join(f"{name} {before:.3f} → {after:.3f}" for name, before, after in changes)
    if any(after < before - MAX_GRADER_DROP for _, before, after in changes):
        action = "raise ppo.kl_coef, train shorter, or train the reward model on more comparisons"
        return Finding("graders", evidence, "a grader outside the reward scores completions lower", action)
    if all(after > before + MAX_GRADER_DROP for _, before, after in changes):
        return Finding("graders", evidence, "graders outside the reward score completions higher")
    return Finding("graders", evidence, "graders outside the reward changed little")


def _kl_to_reference(metrics: RunMetrics, ppo: PPOSettings, *, num_completions: int) -> Finding | None:
    kl = _before_and_after(metrics, "objective/kl_per_completion")
    if kl is None:
        return None
    # Before training the policy is the reference, and the KL is 0.
    after = kl[1]
    evidence = f"{after:.2f} nats per completion from the reference"
    # The mean of ref(y) / policy(y) = exp(-k1) over sampled completions is 1. By Markov's inequality, n
    # estimates k1 have a mean below -t with a probability of at most exp(-n t).
    if num_completions * after < log(NOISE_PROBABILITY):
        meaning = (
            f"a KL is never negative, and sampling noise of {num_completions} completions does not explain it"
        )
        return Finding("KL", evidence, meaning, "this is a bug: please report it with the run's recipe.yaml")
    if after > PPO_LARGE_KL:
        meaning = "large: a reward model is not reliable this far from its training data"
        action = "raise ppo.kl_coef"
        # The controller multiplies the coefficient: 0 stays 0.
        if ppo.kl_coef:
            action += ", or ppo.adaptive_kl_target=6 (with a smaller ppo.kl_horizon it acts sooner)"
        return Finding("KL", evidence, meaning, action)
    return Finding("KL", evidence, "small enough for a reward model to be reliable")


def _reference_perplexity(metrics: RunMetrics, ppo: PPOSettings) -> Finding | None:
    perplexity = _before_and_after(metrics, "val/ref_perplexity")
    if perplexity is None:
        return None
    before, after = perplexity
    evidence = f"perplexity of completions under the reference {before:.2f} → {after:.2f}"
    if after > MAX_PERPLEXITY_RATIO * before:
        return Finding("fluency", evidence, "unlikely text under the reference", "raise ppo.kl_coef")
    change = "less likely than before, within bounds" if after > before else "as likely as before, or more"
    return Finding("fluency", evidence, f"text under the reference is {change}")


def _length_change(metrics: RunMetrics, ppo: PPOSettings) -> Finding | None:
    length, eos_rate = (
        _before_and_after(metrics, "val/completion_length"),
        _before_and_after(metrics, "val/eos_rate"),
    )
    if length is None or eos_rate is None:
        return None
    before, after = length
    evidence = f"{before:.1f} → {after:.1f} tokens, {eos_rate[0]:.0%} → {eos_rate[1]:.0%} end with EOS"
    if eos_rate[1] < eos_rate[0] - MAX_EOS_RATE_DROP:
        return Finding("length", evidence, "fewer completions end with EOS", _missing_eos_action(ppo))
    if eos_rate[1] < MIN_EOS_RATE:
        return Finding("length", evidence, "almost no completion ends with EOS", ENDINGS_REPAIR)
    if after > LARGE_LENGTH_RATIO * before:
        return Finding(
            "length",
            evidence,
            "completions got longer",
            "rewards.length_penalty above what a token earns, or stop.max_length_ratio=1.5",
        )
    if after < SMALL_LENGTH_RATIO * before:
        meaning = "completions got much shorter: check in samples.jsonl that they still answer the prompt"
        return Finding("length", evidence, meaning, "raise ppo.kl_coef, or reward longer completions")
    return Finding("length", evidence, "about as long as before")


def _missing_eos_action(ppo: PPOSettings) -> str:
    below = "below every reward of a completion that ends (line `missing EOS` at the start)"
    if ppo.missing_eos_reward is None:
        return f"set ppo.missing_eos_reward {below}"
    return f"lower ppo.missing_eos_reward ({ppo.missing_eos_reward:g}) {below}"


def _diversity(metrics: RunMetrics, ppo: PPOSettings) -> Finding | None:
    entropy, unique_fraction = (
        _before_and_after(metrics, "policy/entropy"),
        _before_and_after(metrics, "val/unique_fraction"),
    )
    if entropy is None or unique_fraction is None:
        return None
    evidence = (
        f"entropy {entropy[0]:.3f} → {entropy[1]:.3f} nats per token, "
        f"{unique_fraction[0]:.0%} → {unique_fraction[1]:.0%} of completions are unique"
    )
    if unique_fraction[1] < 0.5 * unique_fraction[0]:
        meaning = "the policy samples the same completions again and again (mode collapse)"
        return Finding("diversity", evidence, meaning, "raise ppo.kl_coef, or ppo.entropy_coef=0.1")
    if entropy[1] > MAX_ENTROPY_RATIO * entropy[0]:
        action = "lower ppo.entropy_coef" if ppo.entropy_coef else "lower train.learning_rate"
        return Finding("diversity", evidence, "the policy became random", action)
    return Finding(
        "diversity", evidence, "lower, as expected in RL" if entropy[1] < entropy[0] else "not lower"
    )


def _update_health(metrics: RunMetrics, ppo: PPOSettings) -> Finding | None:
    clip_frac, explained_variance = (
        metrics.get("policy/clip_frac_after"),
        metrics.get("value/explained_variance_after"),
    )
    if clip_frac is None or explained_variance is None:
        return None
    evidence = f"clip fraction {clip_frac:.1%}, explained variance {explained_variance:.0%}"
    if clip_frac > LARGE_CLIP_FRAC:
        # Not a lower learning rate: a policy that no longer collapses may be clipped more. With one epoch of
        # one minibatch the ratio is 1.
        action = "lower ppo.ppo_epochs"
        if ppo.ppo_epochs == 1:
            action = "raise train.batch_size: at ppo.rollout_size there is one update"
        return Finding("updates", evidence, "updates are too large", action)
    if explained_variance < MIN_EXPLAINED_VARIANCE:
        meaning = "the value model predicts worse than a constant"
        action = "lower train.learning_rate, or a larger ppo.value_coef with ppo.value_clip_range=null"
        return Finding("updates", evidence, meaning, action)
    return Finding("updates", evidence, "updates within bounds, and the value model predicts the returns")
