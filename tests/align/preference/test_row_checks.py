"""What a method needs of its rows: pairs, both labels, labels of balanced weight."""

from dataclasses import replace
from typing import Any

import pytest
from small_preferences import prepared

from align.preference.rows.row_checks import check_label_balance, require_both_labels, require_pairs
from finetune.recipe.errors import UserError


def rows() -> list[dict[str, Any]]:
    """Return ten completions, two per prompt."""
    return [{"prompt": f"Add {index // 2}.", "completion": f"Here are {index}."} for index in range(10)]


def test_ranked_lists_are_refused_with_the_first_location() -> None:
    lists = [{"prompt": "Add", "responses": ["the", "numbers", "that"], "scores": [3, 2, 1]}]
    with pytest.raises(
        UserError, match=r"1 prompts with more than two completions \(first: row 1, 3 compl"
    ) as error:
        require_pairs(prepared(lists, template="plain"))
    assert error.value.problems[0].where == "data.source"


def test_held_out_lists_are_refused_too() -> None:
    pair = {"prompt": "Add", "responses": ["the", "numbers"], "scores": [3, 2]}
    lists = {**pair, "responses": ["the", "numbers", "that"], "scores": [3, 2, 1]}
    data = prepared([pair], template="plain")
    require_pairs(data)
    with pytest.raises(UserError) as error:
        require_pairs(replace(data, held_out=prepared([lists], template="plain").train))
    assert error.value.problems[0].where == "data.held_out"


@pytest.mark.parametrize(
    ("num_good", "weights", "detail", "advice"),
    [
        (5, {}, "1.00 to 1", ""),
        (2, {}, "0.25 to 1", "kto.desirable_weight=4"),
        (8, {}, "4.00 to 1", "kto.undesirable_weight=3"),
        (8, {"undesirable_weight": 3.0}, "1.33 to 1", ""),
        (2, {"desirable_weight": 4.0}, "1.00 to 1", ""),
    ],
)
def test_unbalanced_labels_suggest_weights(
    num_good: int, weights: dict[str, float], detail: str, advice: str
) -> None:
    """Of ten completions; the paper's range of good to bad weight is 1 to 4/3."""
    labeled = [{**row, "label": index < num_good} for index, row in enumerate(rows())]
    groups = prepared(labeled, template="plain", kind="labels").train
    result = check_label_balance(groups, **{"desirable_weight": 1.0, "undesirable_weight": 1.0, **weights})
    assert detail in result.detail and result.warned == bool(advice)
    assert result.detail.endswith(advice)


def test_completions_of_one_label_are_refused() -> None:
    data = prepared([{**row, "label": True} for row in rows()], template="plain", kind="labels")
    with pytest.raises(UserError, match="10 completions, all good"):
        require_both_labels(data)
