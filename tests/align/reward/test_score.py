"""``llm-align score``: rows of any layout with their rewards, who wins, and how often the file agrees."""

import json
from pathlib import Path

import pytest
from reward_models import scorer
from small_tokenizers import tokenizer

from align.cli.runs import score_and_print
from align.preference.rows.encode import LengthLimits
from align.reward import scorer as scorer_module
from align.reward.batch import RewardCollator
from align.reward.function_reward import FunctionReward
from align.reward.score_file import score_file, score_statistics, write_scored_rows
from align.reward.scorer import MAX_SHARED_COMPLETIONS, TOTAL, RewardModel
from data_templates.segments import Message
from finetune.data.tokens import Encoder
from finetune.recipe.errors import UserError
from finetune.recipe.user_arguments import RowFunction

pytestmark = pytest.mark.filterwarnings("ignore")
PAIR = {"prompt": "Say it.", "chosen": "a long reply", "rejected": "short"}


@pytest.fixture(scope="module")
def model() -> RewardModel:
    """Return a random model with two heads, and a rule that likes length."""
    encoder = Encoder(tokenizer("qwen"), "plain")
    base = scorer("llama")
    base.resize_token_embeddings(len(encoder.tokenizer))
    return RewardModel(
        base.eval(),
        encoder,
        normalization={"help": (1.0, 2.0), "safety": (0.0, 0.5)},
        rules=[FunctionReward("long", 100.0, RowFunction(lambda prompt, completion: len(completion)))],
        length_limits=LengthLimits(48, 24),
        collator=RewardCollator(pad_id=encoder.tokenizer.unk_token_id or 0),
        tokens_per_forward=256,
    )


def test_scores_do_not_depend_on_the_batch(model: RewardModel) -> None:
    prompts = ["one", "one", "two", "one"] + ["many"] * (MAX_SHARED_COMPLETIONS + 3)
    completions = ["a", "b c", "a", "a"] + [f"n {number}" for number in range(MAX_SHARED_COMPLETIONS + 3)]
    together = model.score(prompts, completions)
    for index, (prompt, text) in enumerate(zip(prompts, completions, strict=True)):
        separate_scores = model.score([prompt], [text])
        for name in ("help", "safety", TOTAL):
            assert separate_scores[name] == pytest.approx([together[name][index]], abs=1e-4)
    assert together["help"][0] == pytest.approx(together["help"][3], abs=1e-5)
    assert model.score([], []) == {"help": [], "safety": [], "long": [], TOTAL: []}


def test_many_completions_of_a_prompt_are_scored_in_chunks(
    model: RewardModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    scored = scorer_module.score_groups

    def seen(network, groups, collate, *, batch_size):
        sizes.extend(len(group.completion_ids) for group in groups)
        return scored(network, groups, collate, batch_size=batch_size)

    monkeypatch.setattr(scorer_module, "score_groups", seen)
    model.score(
        ["many"] * (MAX_SHARED_COMPLETIONS + 3),
        [f"n {number}" for number in range(MAX_SHARED_COMPLETIONS + 3)],
    )
    assert sizes == [MAX_SHARED_COMPLETIONS, 3]


def test_the_total_is_the_sum_of_normalized_heads_and_weighted_rules(model: RewardModel) -> None:
    scores = model.score(["p"], ["four"])
    by_hand = (scores["help"][0] - 1.0) / 2.0 + scores["safety"][0] / 0.5 + 100.0 * 4
    assert scores["long"] == [4.0] and scores[TOTAL] == pytest.approx([by_hand])


def test_a_prompt_may_be_turns_or_a_dialogue(model: RewardModel) -> None:
    turns = [Message("user", "q"), Message("assistant", "r"), Message("user", "s")]
    dialogue = "\n\nHuman: q\n\nAssistant: r\n\nHuman: s\n\nAssistant:"
    encoder = Encoder(model.encoder.tokenizer, "hh")
    hh = RewardModel(**{**vars(model), "encoder": encoder})
    scores = hh.score([turns, dialogue], ["t", "t"])
    assert scores["help"][0] == pytest.approx(scores["help"][1], abs=1e-6)


@pytest.mark.parametrize(
    ("row", "count"),
    [
        ({"prompt": "q", "completion": "r"}, 1),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]}, 1),
        ({"instruction": "q", "input": "", "output": "r"}, 1),
        ({"prompt": "q", "responses": ["a", "b", "c"]}, 3),
        (PAIR, 2),
        ({"chosen": "\n\nHuman: q\n\nAssistant: r", "rejected": "\n\nHuman: q\n\nAssistant: s"}, 2),
        ({"prompt": "q", "responses": ["a", "b"], "scores": [1, 2]}, 2),
        ({"prompt": "q", "responses": ["a", "b"], "ranks": [2, 1]}, 2),
    ],
)
def test_rows_of_every_layout_are_scored(model: RewardModel, row: dict, count: int) -> None:
    encoder = Encoder(model.encoder.tokenizer, "hh")
    [found] = score_file(RewardModel(**{**vars(model), "encoder": encoder}), [row])
    assert {name: len(values) for name, values in found.scores.items()} == {
        "help": count,
        "safety": count,
        "long": count,
        TOTAL: count,
    }
    line = found.to_dict()
    assert line["rewards"]["normalized"].keys() == {"help", "safety"}
    assert isinstance(line["rewards"]["help"], float if count == 1 else list)
    assert {key: line[key] for key in row} == row, "the row itself stays"


def test_pairs_report_winner_and_accuracy(model: RewardModel) -> None:
    rows = score_file(model, [PAIR, {**PAIR, "chosen": "x", "rejected": "much longer"}])
    assert [row.to_dict()["winner"] for row in rows] == ["chosen", "rejected"], "the rule outweighs the heads"
    facts = score_statistics(rows)
    assert facts["rewards"]["long"]["accuracy"] == 0.5 and facts["rewards"]["length"]["accuracy"] == 0.5
    assert facts["rewards"]["long"]["comparisons"] == 2 and facts["rewards"]["long"]["completions"] == 4
    assert facts["rewards"]["long"]["mean"] == pytest.approx((12 + 5 + 1 + 11) / 4)
    low, high = facts["rewards"]["long"]["interval"]
    assert low < 0.5 < high


def test_accuracy_of_lists_by_scores_or_ranks(model: RewardModel) -> None:
    by_length = {"prompt": "q", "responses": ["a", "bbb", "cc"], "scores": [1, 3, 2]}
    against = {"prompt": "q", "responses": ["a", "bbb", "cc"], "scores": [3, 1, 2]}
    facts = score_statistics(score_file(model, [by_length, by_length, against]))
    assert facts["rewards"]["long"]["accuracy"] == pytest.approx(2 / 3)
    unjudged = score_statistics(score_file(model, [{"prompt": "q", "responses": ["a", "bbb"]}]))
    assert "accuracy" not in unjudged["rewards"]["long"] and "length" not in unjudged["rewards"]


def test_a_row_without_a_reply_is_counted_and_written(model: RewardModel, tmp_path: Path) -> None:
    cut = {"messages": [{"role": "user", "content": "q"}]}
    with_reply = {"messages": [*cut["messages"], {"role": "assistant", "content": "r"}]}
    rows = score_file(model, [cut, with_reply])
    assert score_statistics(rows)["without_reply"] == 1
    write_scored_rows(rows, tmp_path / "out.jsonl")
    first, second = (json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines())
    assert first["rewards"] is None and second["rewards"]["long"] == 1.0
    with pytest.raises(UserError, match="no row ends with a reply"):
        score_file(model, [cut])


def test_unscorable_files_are_reported(model: RewardModel, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no known layout has columns a"):
        score_file(model, [{"a": 1}])
    with pytest.raises(UserError, match="no such file or folder"):
        score_file(model, "nowhere.jsonl")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(PAIR) + "\n")
    with pytest.raises(UserError, match="the input file"):
        score_and_print(tmp_path, str(rows), out=rows, as_json=False)
    with pytest.raises(UserError, match="no such folder"):
        score_and_print(tmp_path, str(rows), out=tmp_path / "no" / "out.jsonl", as_json=False)
    with pytest.raises(UserError, match="expected: the folder of a finished run"):
        score_and_print(tmp_path, str(rows), out=None, as_json=False)


def test_the_terminal_and_json_show_the_same_facts(
    model: RewardModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(PAIR) + "\n")
    monkeypatch.setattr(scorer_module, "load_reward_model", lambda run: model)
    score_and_print(tmp_path, str(rows), out=tmp_path / "out.jsonl", as_json=True)
    facts = json.loads(capsys.readouterr().out)
    assert facts["rows"] == 1 and list(facts["rewards"]) == ["help", "safety", "long", TOTAL, "length"]
    score_and_print(tmp_path, str(rows), out=tmp_path / "out.jsonl", as_json=False)
    shown = capsys.readouterr().out
    assert "accuracy" in shown and "100.0%" in shown and "out.jsonl" in shown
    assert json.loads((tmp_path / "out.jsonl").read_text())["winner"] == "chosen"
