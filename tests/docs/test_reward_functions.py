"""The examples of the page on reward functions give the rewards that the page promises."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from page_code import fences

from align.rl.rewards.loading import load_rewards
from align.rl.rewards.settings import RewardsSettings
from data_templates.segments import Message
from finetune.data.row_columns import RowColumns
from finetune.recipe.settings import DataSettings

PAGE = "docs/reward-functions.md"
ROW = {"question": "600 + 400?", "answer": "It is 1,000", "limit": 3}


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write each example to the file that its first line names."""
    for where, code in fences("python"):
        if where == PAGE and code.startswith("# "):
            (tmp_path / code.splitlines()[0][2:]).write_text(code, encoding="utf-8")
    (tmp_path / "q.jsonl").write_text(json.dumps(ROW) + "\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def scores(sources: Any, completion: str) -> dict[str, float]:
    columns = RowColumns(DataSettings(source="q.jsonl"), [["q.jsonl:1"]])
    tokenizer: Any = None  # for a length penalty only
    rewards = load_rewards(RewardsSettings(sources=sources), base=None, tokenizer=tokenizer, columns=columns)
    conversation = [Message("user", "600 + 400?"), Message("assistant", completion)]
    scored = rewards.score([conversation], ["q.jsonl:1"], expected=["1000"])
    by_source = {name: float(values[0]) for name, values in scored.by_source.items()}
    return by_source | {"total": float(scored.total[0])}


@pytest.mark.parametrize(
    ("function", "completion", "reward"),
    [
        ("exact.py:exact", " 1000\n", 1),
        ("exact.py:exact", "It is 1000", 0),
        ("number.py:number", "That makes 1,000.", 1),
        ("number.py:number", "That makes 100.", 0),
        ("number.py:number", "none", 0),
        ("form.py:form", "<think>6 + 4</think> <answer>10</answer>", 1),
        ("form.py:form", "<answer>10</answer>", 0),
        ("length.py:length", "one two three four five", -0.02),
        ("trl_reward.py:reward", "It is 1,000", 1),
        ("trl_reward.py:reward", "1000", 0),
    ],
)
def test_example(page: Path, function: str, completion: str, reward: float) -> None:
    assert scores([function], completion)["total"] == reward


def test_several_with_weights(page: Path) -> None:
    [recipe] = [code for where, code in fences("yaml") if where == PAGE]
    sources = yaml.safe_load(recipe)["rewards"]["sources"]
    text = "<think>add</think> <answer>1000</answer>"
    assert scores(sources, text) == {"number": 1, "form": 1, "brief": 0, "total": pytest.approx(1.2)}
    assert scores(sources, "1000 " * 5) == {
        "number": 1,
        "form": 0,
        "brief": -0.02,
        "total": pytest.approx(0.98),
    }
