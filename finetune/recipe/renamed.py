"""Keys, sections, values, functions and stages that were renamed: an old one is refused with its new name."""

import re
from collections.abc import Collection
from typing import Any

from finetune.recipe.errors import Problem

RENAMED = {
    "model.start": "model.init_from",
    "data.too_long": "data.overflow",
    "data.system": "data.system_prompt",
    "data.mix_limit": "data.mix_size_cap",
    "data.mix_rows": "data.epoch_rows",
    "data.select.distinct": "data.select.near_dedup",
    "data.mix[].select.distinct": "data.mix[].select.near_dedup",
    "adapter.ratio": "adapter.lr_ratio",
    "adapter.first_rank": "adapter.init_rank",
    "adapter.width": "adapter.bottleneck_size",
    "adapter.encoder_width": "adapter.encoder_hidden_size",
    "adapter.start": "adapter.d_initial",
    "train.schedule": "train.lr_schedule",
    "train.processes": "train.num_processes",
    "evaluate.judges": "evaluate.graders",
    "evaluate.judge_rows": "evaluate.grader_rows",
    "evaluate.skill": "evaluate.retention",
    "evaluate.skill_rows": "evaluate.retention_rows",
    "dpo.stop_when_chosen_falls": "dpo.max_chosen_logp_drop",
    "dpo.loss.over_tokens": "dpo.loss.length_normalized",
    "reward.centring": "reward.center_rewards_coefficient",
    "reward.margins": "reward.margin_scale",
    "rewards.risky": "rewards.unsafe_prompt_fn",
    "rewards.risky_below": "rewards.safety_threshold",
    "sampling.at_once": "sampling.generation_batch_size",
    "sampling.samples": "sampling.num_generations",
    "ppo.epochs": "ppo.ppo_epochs",
    "ppo.clip": "ppo.clip_range",
    "ppo.value_clip": "ppo.value_clip_range",
    "ppo.value_coefficient": "ppo.value_coef",
    "ppo.value_from": "ppo.value_init",
    "ppo.discount": "ppo.gamma",
    "ppo.trace": "ppo.gae_lambda",
    "ppo.entropy_coefficient": "ppo.entropy_coef",
    "ppo.kl_coefficient": "ppo.kl_coef",
    "ppo.kl_target": "ppo.adaptive_kl_target",
    "ppo.missing_end": "ppo.missing_eos_reward",
    "ppo.normalise": "ppo.normalize_rewards",
    "ppo.clip_scores": "ppo.reward_clip",
    "ppo.epoch_stop_kl": "ppo.target_kl",
    "stop.gold_falls": "stop.max_gold_drop",
    "stop.kl": "stop.max_kl",
    "stop.longer": "stop.max_length_ratio",
    "stop.entropy": "stop.min_entropy_ratio",
    "stop.ends": "stop.min_eos_rate",
    "rejection.samples": "rejection.num_generations",
    "rejection.share": "rejection.top_fraction",
    "rejection.above": "rejection.min_reward",
    "rejection.unfinished": "rejection.truncated",
    "rejection.memory": "rejection.accumulate_rounds",
    "rloo.normalise": "rloo.normalize_advantages",
    "grpo.scale": "grpo.scale_rewards",
}
"""Old key -> new key; ``[]`` is the index of a list's entry."""

SECTIONS = {
    "align": ("dpo", "kto", "rloo", "grpo"),
    "hindsight": ("chain_of_hindsight",),
    "reward": ("rewards",),
}
"""Old section -> the sections that it became; a stage has one of them at most."""

VALUES = {
    "data.loss_on": {"reply": "assistant", "last": "last_assistant"},
    "data.overflow": {"cut": "truncate"},
    "data.template": {"model": "tokenizer"},
    "dpo.loss.length_normalized": {"sum": "false", "mean": "true"},
    "ppo.value_init": {"start": "policy"},
    "rejection.keep": {"best": "best_of_n", "share": "top_fraction"},
    "rejection.truncated": {"learn": "train"},
}
"""Key, by its new name -> old value -> new value."""

FUNCTIONS = {
    "finetune/tiny/graders.py:happy_end": "finetune/graders/stories.py:happy_end",
    "finetune/tiny/graders.py:peaceful": "finetune/graders/stories.py:peaceful",
    "align/rl/rules/answers.py:same_number": "number",
    "finetune/graders/answers.py:same_number": "number",
}
"""Old -> new name of the shipped functions that recipes name."""

STAGES = {"hindsight": "chain_of_hindsight"}


def renamed_key(where: str, value: Any, known: Collection[str]) -> Problem | None:
    """Return the problem of a key that was renamed, None for any other key.

    Args:
        where: the key as the user wrote it, ``section.key``.
        value: the value that the user gave it.
        known: the keys that exist at that place.
    """
    target = RENAMED.get(re.sub(r"\[\d+\]", "[]", where), "")
    key = target.rpartition(".")[2]
    if not target or key not in known:
        return None
    changed = _changed(target, value)
    new = f"{where.rpartition('.')[0]}.{key}"
    return Problem(where, _renamed(where, new), new, f"write {key}: {changed}" if changed else "")


def renamed_section(section: str, known: Collection[str]) -> str:
    """Return a section's new name among the sections of a stage; empty where it was not renamed."""
    return next((new for new in SECTIONS.get(section, ()) if new in known), "")


def section_problem(where: str, section: str, key: str, new: str) -> Problem:
    """Return the problem of a section that was renamed.

    Args:
        where: the place of the mistake.
        section: the section as the user wrote it.
        key: the key after it on the command line; empty for a section of a file.
        new: the section's new name.
    """
    if not key:
        return Problem(where, _renamed(section, new), new)
    target = RENAMED.get(f"{new}.{key}", f"{new}.{key}")
    return Problem(where, _renamed(f"{section}.{key}", target), target)


def renamed_value(where: str, value: Any) -> str:
    """Return the message about a value that was renamed; empty for any other value."""
    changed = _changed(where, value)
    return _renamed(value, changed) if changed else ""


def renamed_function(text: str) -> str:
    """Return the message about a ``path/to/file.py:function`` that was moved; empty for any other."""
    return _renamed(text, FUNCTIONS[text]) if text in FUNCTIONS else ""


def renamed_stage(stage: Any) -> str:
    """Return the message about a stage that was renamed; empty for any other stage."""
    return _renamed(stage, STAGES[stage]) if isinstance(stage, str) and stage in STAGES else ""


def renamed_verb(stage: str) -> str:
    """Return the message about the verb of a stage that was renamed."""
    return _renamed(stage, STAGES[stage].replace("_", "-"))


def _changed(key: str, value: Any) -> str:
    return VALUES.get(key, {}).get(value, "") if isinstance(value, str) else ""


def _renamed(old: str, new: str) -> str:
    return f"`{old}` was renamed to `{new}`"
