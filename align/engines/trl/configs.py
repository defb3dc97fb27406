"""TRL's config of each stage of align, with the arguments that the stage sets and a recipe cannot."""

from typing import Any

from trl import DPOConfig, GRPOConfig, KTOConfig, RewardConfig, RLOOConfig

from finetune.training.arguments import TrlConfigSpec

# Rows are truncated already. Dropout is the adapter's setting.
_PAIRWISE: dict[str, Any] = {"max_length": None, "disable_dropout": False}
# The reference is the initial policy.
_WITH_REFERENCE: dict[str, Any] = {**_PAIRWISE, "precompute_ref_log_probs": True, "sync_ref_model": False}
# On-policy completions with log-probs of the full distribution: no dropout, no top-k or top-p, no reuse.
_ONLINE: dict[str, Any] = {
    "disable_dropout": True,
    "sync_ref_model": False,
    "shuffle_dataset": False,
    "num_iterations": 1,
    "steps_per_generation": None,
    "generation_batch_size": None,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": None,
    "repetition_penalty": 1.0,
    "generation_kwargs": None,
    "num_generations_eval": 1,
}

REWARD_CONFIG = TrlConfigSpec(RewardConfig, _PAIRWISE)
DPO_CONFIG = TrlConfigSpec(DPOConfig, {**_WITH_REFERENCE, "truncation_mode": "keep_start"})
# KTO pairs neighboring rows of a micro-batch for its KL estimate, z: the dataset's order is kept, and each
# micro-batch has at least two rows.
KTO_CONFIG = TrlConfigSpec(
    KTOConfig, {**_WITH_REFERENCE, "train_sampling_strategy": "sequential"}, min_rows=2
)
ONLINE_CONFIGS = {config.__name__: TrlConfigSpec(config, _ONLINE) for config in (RLOOConfig, GRPOConfig)}
"""By the name in a stage's settings, ``TRL_CONFIG``."""
