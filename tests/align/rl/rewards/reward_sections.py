"""Shared by the reward tests: comparisons, reward functions, settings with a rewards section."""

from pathlib import Path
from typing import Any

from align.rl.rewards.settings import RewardsSettings
from data_templates.segments import Message
from finetune.recipe.settings import DataSettings, ModelSettings, StageSettings

PAIRS = [
    {"prompt": f"Add the numbers. {i}", "chosen": f"good {i % 7}", "rejected": f"evil {i % 5}"}
    for i in range(20)
]
REWARD_FUNCTIONS = """\
def brief(prompt, completion):
    return -len(completion) / 10

def asks(prompt):
    return "danger" in prompt

def good(prompt, completion):
    return "good" in completion

def few(prompt):
    return 1.0

def broken(prompt, completion):
    return 1 / len(completion)

def nan(prompt, completion):
    return float("nan")

def text(prompt, completion):
    return completion
"""


class RewardedSettings(StageSettings):
    """Settings of a stage with a rewards section."""

    rewards: RewardsSettings = RewardsSettings()


def rewards(*sources: Any, **settings: Any) -> RewardsSettings:
    return RewardsSettings.model_validate({"sources": list(sources), **settings})


def stage(base: Path, section: RewardsSettings, *, template: str = "plain") -> RewardedSettings:
    model, data = ModelSettings(base=str(base)), DataSettings(template=template, source="rows.jsonl")
    return RewardedSettings(model=model, data=data, rewards=section)


def conversation(prompt: str, reply: str) -> list[Message]:
    return [Message("user", prompt), Message("assistant", reply)]
