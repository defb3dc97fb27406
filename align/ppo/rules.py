"""Rules of stage ppo."""

from collections.abc import Iterator

from align.ppo.settings import Settings
from align.rl.rewards.run_info import reward_run_info
from align.rl.rewards.settings import REWARD_RULES, RewardSource
from align.shared_rules import CONSISTENCY, RL_EXACT_MATCH, RL_LABEL_SMOOTHING
from finetune.recipe.compatibility import Rule, is_set
from finetune.recipe.errors import Problem, UserError


def _check_sizes(settings: Settings) -> Iterator[Problem]:
    rollout_size, batch_size, ppo = settings.ppo.rollout_size, settings.train.batch_size, settings.ppo
    # Every PPO epoch then consists of full minibatches.
    if rollout_size % batch_size:
        rounded = max(1, rollout_size // batch_size) * batch_size
        actual = f"{rollout_size}, not a multiple of train.batch_size ({batch_size})"
        expected = "a multiple of train.batch_size"
        yield Problem("ppo.rollout_size", actual, expected, f"ppo.rollout_size={rounded}")
    # A fifth: the controller clips its error to 0.2, so one rollout changes the coefficient by at most 0.2
    # rollout_size / kl_horizon of its value.
    if ppo.adaptive_kl_target is not None and ppo.kl_horizon <= rollout_size / 5:
        actual = f"{ppo.kl_horizon} with rollouts of {rollout_size} completions"
        expected = "more than a fifth of ppo.rollout_size, or the KL coefficient could become negative"
        yield Problem("ppo.kl_horizon", actual, expected, f"ppo.kl_horizon={20 * rollout_size}")
    if ppo.adaptive_kl_target is not None and not ppo.kl_coef:
        expected = "a coefficient above 0: the controller multiplies it"
        yield Problem("ppo.kl_coef", "0 with ppo.adaptive_kl_target", expected, "ppo.kl_coef=0.05")


def _check_pretraining(settings: Settings) -> Iterator[Problem]:
    pretraining = settings.pretraining
    if pretraining.weight and pretraining.source is None:
        repair = "pretraining.source=FILE, or pretraining.weight=0"
        yield Problem("pretraining.source", "null with a weight above 0", "a source of rows", repair)
    if pretraining.source is not None and not pretraining.weight:
        repair = "pretraining.weight=1, or remove the source"
        yield Problem("pretraining.weight", "0 with a source given", "a weight above 0", repair)


def _no_reward_adapter(sources: list[RewardSource]) -> bool:
    return bool(sources) and not any(_may_have_adapter(source) for source in sources)


def _may_have_adapter(source: RewardSource) -> bool:
    if source.run is None:
        return False
    try:
        return not reward_run_info(source.run, where="rewards.sources").full_model
    except UserError:
        return True  # the rule of the rewards reports it


RULES = (
    *REWARD_RULES,
    Rule(
        "native-only",
        {"train.engine": ("trl",)},
        "TRL 1.16 has no PPO trainer",
        source="trl 1.16: no PPOTrainer, not in trl.experimental either",
        evidence="source",
        changes={"train.engine": "native"},
        problem=Problem(
            "train.engine",
            "'trl'",
            "native: TRL 1.16, which is pinned, has no PPO trainer",
            "train.engine=native; `llm-align rloo` and `llm-align grpo` run on TRL",
        ),
    ),
    Rule(
        "ppo-neftune",
        {"train.neftune_alpha": is_set},
        source="arXiv 1707.06347, equation 6",
        problem=Problem(
            "train.neftune_alpha",
            "{train.neftune_alpha:g}",
            "null: with noise, the ratio to the sampling policy does not start at 1",
            "train.neftune_alpha=null",
        ),
    ),
    RL_EXACT_MATCH,
    RL_LABEL_SMOOTHING,
    CONSISTENCY,
    Rule(
        "ppo-sizes",
        message="a rollout consists of full minibatches, and the KL controller's step is small",
        source="arXiv 1909.08593, section 2.2: the controller's clipped error",
        find=_check_sizes,
        reads=("ppo", "train"),
    ),
    Rule(
        "value-init",
        {"ppo.value_init": ("reward",), "rewards.sources": _no_reward_adapter},
        "the value model is to start from a reward model's adapter, but no source has one",
        source="arXiv 2203.02155, appendix C.4: the value function starts from the reward model",
        problem=Problem(
            "ppo.value_init",
            "'reward', but no source is a reward model with an adapter",
            "a reward run with an adapter among rewards.sources",
            "ppo.value_init=policy",
        ),
    ),
    Rule(
        "ppo-ptx",
        message="PPO-ptx has both a weight and a source, or neither",
        source="arXiv 2203.02155, equation 2",
        find=_check_pretraining,
        reads=("pretraining",),
    ),
)
