"""Compatibility rules that several stages share: each lists them in its own ``RULES``."""

from finetune.recipe.compatibility import Rule, is_set
from finetune.recipe.errors import Problem

_COPY_REASON = "TRL copies the adapter for its reference, and the copy would change the base again"
_COPY_PROBLEM = Problem(
    "adapter.method",
    "'{adapter.method}', which changes the base weights at initialization",
    "with train.engine 'trl': an adapter that leaves the base unchanged; TRL copies it",
    "adapter.method=lora",
)
_COPY_SOURCE = 'trl 1.16, trainer/dpo_trainer.py, grpo_trainer.py: model.add_adapter("ref", default_config)'

TRL_REFERENCE = Rule(
    "trl-reference",
    {"train.engine": ("trl",), "traits.changes_base": (True,)},
    _COPY_REASON,
    source=_COPY_SOURCE,
    changes={"train.engine": "native"},
    problem=_COPY_PROBLEM,
)
TRL_REFERENCE_ONLY = Rule(
    "trl-reference-only",
    {"traits.changes_base": (True,)},
    _COPY_REASON,
    source=_COPY_SOURCE,
    repair="adapter.method=lora, or another one that does not change the base",
    problem=_COPY_PROBLEM,
)
"""The same for stages that run only on TRL's trainer."""

TRL_ONLY = Rule(
    "trl-only",
    {"train.engine": ("native",)},
    "this stage runs only on TRL's trainer",
    source="align/engines/trl/online.py, kto.py: no native trainer",
    changes={"train.engine": "trl"},
)

CONSISTENCY = Rule(
    "consistency",
    {"adapter.consistency": (True,)},
    "the consistency loss of two forward passes needs labels, which this stage does not have",
    source="arXiv 2205.12410, equation 5: a loss on labels",
    changes={"adapter.consistency": False},
)

PREFERENCE_NEFTUNE = Rule(
    "preference-neftune",
    {"train.neftune_alpha": is_set},
    source="arXiv 2310.05914: noise in each forward pass of the trained model",
    problem=Problem(
        "train.neftune_alpha",
        "{train.neftune_alpha:g}",
        "null: NEFTune noise would change the policy's log-probabilities but not the reference's",
        "train.neftune_alpha=null",
    ),
)

RL_EXACT_MATCH = Rule(
    "rl-exact-match",
    {"evaluate.exact_match": bool},
    source="align/rl/prompts.py: prompts without reference answers",
    problem=Problem(
        "evaluate.exact_match",
        "{evaluate.exact_match}",
        "0: prompts need no reference answer; use a grader or a reward",
        "evaluate.exact_match=0",
    ),
)

RL_LABEL_SMOOTHING = Rule(
    "rl-label-smoothing",
    {"train.label_smoothing": bool},
    source="the policy gradient has no label distribution",
    problem=Problem(
        "train.label_smoothing",
        "{train.label_smoothing:g}",
        "0: RL has no labels to smooth",
        "train.label_smoothing=0",
    ),
)
