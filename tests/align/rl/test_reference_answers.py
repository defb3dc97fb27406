"""Rewards that compare a completion with the reference answer of its row."""

import pytest
from small_tokenizers import tokenizer

from align.rl.rewards.loading import load_rewards
from align.rl.rewards.settings import RewardsSettings
from data_templates.segments import Message
from finetune.recipe.errors import UserError

RULE = "number"
SOLUTION = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n#### 72"


@pytest.fixture
def rewards():
    """Return the rewards of a recipe with this function."""
    settings = RewardsSettings(sources=[{"function": RULE}])
    return load_rewards(settings, base=None, tokenizer=tokenizer("qwen"))


def test_function_receives_the_reference_answer(rewards):
    conversations = [[Message("user", "How many?"), Message("assistant", text)] for text in ("72", "24")]
    scores = rewards.score(conversations, ["row 1", "row 2"], expected=[SOLUTION, SOLUTION])
    assert scores.total.tolist() == [1.0, 0.0] and list(scores.by_source) == ["number"]


def test_missing_reference_answer_is_reported(rewards):
    rewards.check_values([SOLUTION], ["row 1"])
    with pytest.raises(UserError, match=r"1 of 2 rows have no reference answer \(first: row 2\)"):
        rewards.check_values([SOLUTION, None], ["row 1", "row 2"])
