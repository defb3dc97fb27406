"""Faults of PPO and rejection sampling, and the advice that their findings print."""

from advice_cases import LOWER, Advice, Fault
from advice_runs import FULL

FREE = {"ppo.kl_coef": 0.0, "train.max_steps": 40}
COLLAPSING = {"adapter": FULL, "train.learning_rate": 0.15, "ppo.ppo_epochs": 8} | {
    "train.max_steps": None,
    "train.epochs": 4,
}
ONLY_A = FREE | {"rewards.sources": "REWARDS:only_a"}
BRIEF = FREE | {"rewards.sources": "REWARDS:short"}

MANY_PROMPTS = {"rows": {"number": 148}, "data.held_out": 100}

PPO = (
    Fault(
        "ppo",
        COLLAPSING | MANY_PROMPTS | {"rewards.sources": "REWARDS:variety"},
        "reward",
        "eval/objective/reward_after",
        1,
        (Advice(LOWER, {"train.learning_rate": 1e-3}),),
    ),
    Fault(
        "ppo",
        {"train.learning_rate": 1e-7},
        "reward",
        "eval/objective/reward_after",
        1,
        (Advice("raise train.learning_rate", {"train.learning_rate": 1e-2}),),
    ),
    Fault(
        "ppo",
        {"ppo.kl_coef": 50.0, "train.learning_rate": 1e-4, "train.max_steps": 60},
        "reward",
        "eval/objective/reward_after",
        1,
        (Advice("lower ppo.kl_coef", {"ppo.kl_coef": 0.05}),),
    ),
    Fault(
        "ppo",
        ONLY_A | {"evaluate.graders": {"variety": "REWARDS:variety"}, "stop.max_gold_drop": None},
        "graders",
        "eval/gold/variety_after",
        1,
        (
            Advice("raise ppo.kl_coef", {"ppo.kl_coef": 1.0}),
            Advice("train shorter", {"train.max_steps": 4}),
        ),
    ),
    Fault(
        "ppo",
        ONLY_A | {"sampling.max_new_tokens": 40, "ppo.kl_coef": 0.01, "train.learning_rate": 0.03},
        "KL",
        "eval/objective/kl_per_completion_after",
        -1,
        (
            Advice("raise ppo.kl_coef", {"ppo.kl_coef": 1.0}),
            Advice("ppo.adaptive_kl_target=6", {"ppo.adaptive_kl_target": 6.0, "ppo.kl_horizon": 8}),
        ),
    ),
    Fault(
        "ppo",
        {"sampling.max_new_tokens": 1, "train.max_steps": 2},
        "length",
        "eval/val/eos_rate_after",
        1,
        (
            Advice("raise sampling.max_new_tokens", {"sampling.max_new_tokens": 24}, slow=False),
            Advice("--from RUN", {"from": ["sft", {"rows": {"reply": 1}, "train.max_steps": 60}]}),
        ),
    ),
    Fault(
        "ppo",
        BRIEF,
        "length",
        "eval/val/completion_length_after",
        1,
        (
            Advice("raise ppo.kl_coef", {"ppo.kl_coef": 1.0}),
            Advice("reward longer completions", {"rewards.sources": "REWARDS:long"}),
        ),
    ),
    Fault(
        "ppo",
        BRIEF,
        "diversity",
        "eval/val/unique_fraction_after",
        1,
        (
            Advice("raise ppo.kl_coef", {"ppo.kl_coef": 1.0}),
            Advice("ppo.entropy_coef=0.1", {"ppo.entropy_coef": 0.1}),
        ),
    ),
    Fault(
        "ppo",
        {"train.learning_rate": 0.1, "ppo.ppo_epochs": 8, "adapter": FULL},
        "updates",
        "policy/clip_frac_after",
        -1,
        (Advice("ppo.ppo_epochs", {"ppo.ppo_epochs": 1}),),
    ),
    Fault(
        "ppo",
        BRIEF,
        "updates",
        "value/explained_variance_after",
        1,
        (
            Advice(LOWER, {"train.learning_rate": 3e-3}),
            Advice(
                "a larger ppo.value_coef with ppo.value_clip_range=null",
                {"ppo.value_coef": 1.0, "ppo.value_clip_range": None},
            ),
        ),
    ),
    Fault(
        "ppo",
        ONLY_A,
        "repetition",
        "repeating",
        -1,
        (
            Advice("raise ppo.kl_coef", {"ppo.kl_coef": 1.0}),
            Advice(LOWER, {"train.learning_rate": 1e-4}),
            Advice("train shorter", {"train.max_steps": 4}),
        ),
    ),
)
RANDOMIZED = {"from": ["sft", {"rows": {"reply": 1}, "train.max_steps": 60}], "ppo.entropy_coef": 5.0}
PPO += (
    Fault(
        "ppo",
        RANDOMIZED,
        "diversity",
        "eval/policy/entropy_after",
        -1,
        (Advice("lower ppo.entropy_coef", {"ppo.entropy_coef": 0.0}),),
    ),
)
REJECTION = (
    Fault(
        "rejection",
        {"rewards.sources": "REWARDS:coarse"},
        "equal rewards",
        "equal rewards",
        -1,
        (
            Advice("a finer reward", {"rewards.sources": "REWARDS:finer"}),
            Advice("rejection.num_generations", {"rejection.num_generations": 16}),
        ),
    ),
    Fault(
        "rejection",
        {"sampling.temperature": 0.01},
        "equal rewards",
        "equal rewards",
        -1,
        (Advice("raise sampling.temperature", {"sampling.temperature": 1.0}),),
    ),
)
REJECTION += (
    Fault(
        "rejection",
        {"train.learning_rate": 1e-6},
        "reward",
        "eval/objective/reward_after",
        1,
        (Advice("raise train.learning_rate", {"train.learning_rate": 1e-2}),),
    ),
    Fault(
        "rejection",
        {"adapter": FULL, "train.learning_rate": 1.0} | MANY_PROMPTS,
        "reward",
        "eval/objective/reward_after",
        1,
        (Advice(LOWER, {"train.learning_rate": 1e-3}),),
    ),
)
