"""Cross-field checks of mixtures and row selection; valid combinations pass."""

import pytest

from finetune.recipe.errors import UserError

TEXT = "model: {base: ./base}\ndata: {source: rows.jsonl}\n"
TWO = "[{source: rows.jsonl}, {source: other.jsonl}]"


def mix(first: str, second: str = "") -> str:
    return f"data.mix=[{{source: rows.jsonl, {first}}}, {{source: other.jsonl, {second}}}]"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["data.epoch_rows=100"],
            ["data.epoch_rows (command line): set without data.mix", "list the sources in data.mix"],
        ),
        (["data.mix_temperature=2"], ["data.mix_temperature (command line): set without data.mix"]),
        (
            [mix("weight: 2")],
            ["data.mix[1].weight (command line): not set, but others are", "a weight for each"],
        ),
        ([mix("weight: 2, share: 0.1")], ["data.mix[0] (command line): both weight 2 and share 0.1"]),
        ([mix("share: 0.5", "share: 0.2")], ["data.mix (command line): every source has a share"]),
        (
            ["data.mix=[{source: rows.jsonl, share: 0.5}, {source: other.jsonl, share: 0.5}, {source: a/b}]"],
            ["data.mix (command line): the shares add up to 1\n"],
        ),
        (
            [mix("weight: 2", "weight: 1"), "data.mix_size_cap=3000"],
            ["data.mix_size_cap (command line): set together with weights", "omit data.mix_size_cap"],
        ),
        (
            [f"data.mix={TWO}", "data.select={rows: 5}"],
            ["data.select (command line): set together with data.mix", "{source: ..., select: ...}"],
        ),
        (
            [f"data.mix={TWO}", "data.revision=main"],
            ["data.revision (command line): set together with data.mix"],
        ),
        (
            [f"data.mix={TWO}", "data.held_out=other.jsonl"],
            ["data.held_out (command line): the same as data.mix[1].source"],
        ),
        (
            ["data.select={min_score: 4}"],
            ["data.select.min_score (command line): set without score", "score: COLUMN"],
        ),
        (["data.select={score: rating}"], ["data.select.score (command line): set, but not used"]),
        (
            ["data.select={rows: 9, rows_by: score}"],
            ["data.select.rows_by (command line): 'score', but score is not set"],
        ),
        (["data.select={rows_by: length}"], ["rows_by (command line): 'length', but rows is not set"]),
        (
            ["data.select={min_reply_characters: 9, max_reply_characters: 8}"],
            ["max_reply_characters (command line): 8, below min_reply_characters (9)", "9 or more"],
        ),
        ([mix("select: {min_score: 4}")], ["data.mix[0].select.min_score (command line): set without"]),
        (["data.select={near_dedup: 0.3}"], ["data.select.near_dedup", "found 0.3", "from 0.5 to 1"]),
        ([mix("share: 1")], ["data.mix[0].share", "found 1", "a number above 0 and below 1"]),
        ([f"data.mix={TWO}", "data.mix_temperature=0.5"], ["data.mix_temperature", "1 or more"]),
    ],
)
def test_incompatible_settings_are_reported(workspace, overrides, message):
    source = [] if any("data.select={" in word for word in overrides[:1]) else ["data.source="]
    source = [] if overrides[0].startswith(("data.mix_", "data.epoch_rows")) else source
    with pytest.raises(UserError) as caught:
        workspace.load(TEXT, *source, *overrides)
    assert len(caught.value.problems) == 1, str(caught.value)
    for part in message:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.source=", mix("weight: 2", "weight: 1"), "data.epoch_rows=100"],
        ["data.source=", mix("rows: 5", "share: 0.05"), "data.mix_size_cap=3000", "data.mix_temperature=2"],
        ["data.source=", mix("select: {rows: 3, rows_by: length}"), "data.mix_temperature=1"],
        [
            "data.source=",
            "data.mix=[{source: a/b}]",
            "data.held_out=other.jsonl",
            "data.columns={a: b}",
        ],
        ["data.select={score: rating, min_score: 4.5, near_dedup: 1}"],
        ["data.select={score: rating, rows: 9, rows_by: score}"],
    ],
)
def test_compatible_settings_pass(workspace, overrides):
    assert workspace.load(TEXT, *overrides).notes == []


def test_other_data_drops_the_recipes_select(workspace):
    text = "model: {base: ./base}\ndata: {source: rows.jsonl, select: {rows: 1000}}\n"
    recipe = workspace.load(text, data__source="other.jsonl")
    assert recipe.settings.data.select is None
    assert recipe.notes == [
        "data.select={'rows': 1000} (my.yaml:2) is ignored: it applies to the recipe's data only"
    ]
    mixed = "model: {base: ./base}\ndata: {mix: [{source: rows.jsonl}], epoch_rows: 9}\n"
    assert workspace.load(mixed, data__source="other.jsonl").settings.data.epoch_rows is None
