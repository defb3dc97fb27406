"""Row counts and token lengths of a plan, compared with the tokenized data set."""

import json
from pathlib import Path
from typing import Any

import pytest

from align.planning import lengths as module
from align.planning.lengths import Lengths, lengths
from align.preference.settings import PreferenceSettings
from align.rl.settings import PromptSettings
from finetune.recipe.recipe import load
from finetune.recipe.settings import (
    DataSettings,
    DocumentSettings,
    MixedSource,
    ModelSettings,
    SelectSettings,
)

TINY = ModelSettings(base="tiny")
LLAMA = ModelSettings(base="llama-2-7b")


def found(data: DataSettings, *, most: int = 512, replies: int = 1, **more: Any) -> Lengths:
    model = more.pop("model", TINY)
    return lengths(data, model, seed=0, most=most, replies=replies, labels=more.pop("labels", False))


def test_the_quickstart_s_rows_are_those_of_its_data_stage() -> None:
    from finetune.data.dataset import prepare
    from finetune.data.tokens import Encoder
    from finetune.training.model import load_tokenizer

    settings = load("sft", "quickstart").settings
    encoder = Encoder(load_tokenizer(settings.model), settings.data.template)
    real = prepare(settings.data, encoder, max_length=512, seed=0).train
    told = found(settings.data)
    assert told.rows == len(real) and not told.bound
    assert told.together == pytest.approx(real.num_tokens / len(real), rel=0.1)
    assert told.longest == pytest.approx(max(real.lengths), rel=0.1)


def test_rows_held_out_are_not_learnt(rows_file: Path) -> None:
    assert found(DataSettings(source=str(rows_file))).rows == 48
    assert found(DataSettings(source=str(rows_file), held_out=6)).rows == 42
    assert found(DataSettings(source=str(rows_file), held_out=0.25)).rows == 36


def test_long_rows_are_cut(rows_file: Path) -> None:
    whole, cut = (
        found(DataSettings(source=str(rows_file))),
        found(DataSettings(source=str(rows_file)), most=20),
    )
    assert whole.longest > 20 == cut.longest and cut.together <= 20 < whole.together


def test_completions_stand_behind_one_prompt() -> None:
    rows = [
        {"prompt": f"{i} " * 20, "chosen": "yes it is", "rejected": "no it is not so at all"}
        for i in range(9)
    ]
    pairs = found(PreferenceSettings(source=rows), replies=2)
    assert (pairs.rows, pairs.replies) == (9, 2.0)
    assert pairs.together == pytest.approx(pairs.prompt + 2 * pairs.reply)
    labelled = found(PreferenceSettings(source=rows), labels=True)
    assert (labelled.rows, labelled.replies) == (18, 1.0)


def test_prompts_lose_their_replies(rows_file: Path) -> None:
    asked = found(PromptSettings(source=str(rows_file)), replies=0)
    assert (asked.rows, asked.reply, asked.replies) == (48, 0.0, 0.0)
    assert asked.longest_prompt == pytest.approx(asked.longest, abs=1)


def test_documents_are_all_reply(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("One sentence. " * 30)
    told = found(DocumentSettings(source=str(tmp_path / "a.txt")))
    assert told.rows == 1 and told.prompt <= 1 and told.reply > 30


def test_mixtures_are_gathered_as_the_run_does(rows_file: Path) -> None:
    parts = [MixedSource(source=str(rows_file)), MixedSource(source=str(rows_file), rows=12)]
    assert found(DataSettings(mix=parts)).rows == 60


def test_a_tokenizer_elsewhere_is_said_to_be(rows_file: Path) -> None:
    told = found(DataSettings(source=str(rows_file)), model=LLAMA)
    assert "assuming 4 bytes per token" in told.how
    assert "counted on 48" in found(DataSettings(source=str(rows_file))).how


def test_data_on_the_hub_is_not_read_and_that_is_said() -> None:
    known = found(DataSettings(source="Anthropic/hh-rlhf", held_out=800), most=300)
    assert (known.rows, known.together, known.bound) == (160_000, 300.0, True)
    assert "not read" in known.how and "an upper bound" in known.how
    some = found(DataSettings(source="openai/gsm8k:main", held_out=0.1))
    assert (some.rows, some.bound) == (7473 - 747, False)
    assert some.together == pytest.approx(522 / 4)
    other = found(DataSettings(source="owner/unheard-of"))
    assert other.rows is None and "row count unknown" in other.how
    wrong_split = found(DataSettings(source="Anthropic/hh-rlhf", split="test"))
    assert wrong_split.rows is None


def test_chosen_rows_of_the_hub_are_counted() -> None:
    curated = DataSettings(source="64bits/lima_vicuna_format", select=SelectSettings(rows=1000))
    assert found(curated).rows == 1000
    capped = [MixedSource(source="owner/one", rows=500), MixedSource(source="tatsu-lab/alpaca")]
    assert found(DataSettings(mix=capped)).rows == 52_502
    assert found(DataSettings(mix=capped, mix_rows=77)).rows == 77


def test_large_files_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"instruction": "a" * 200, "output": "b" * 160}] * 50
    lines, whole = tmp_path / "rows.jsonl", tmp_path / "rows.json"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole.write_text(json.dumps(rows))
    monkeypatch.setattr(module, "LARGE", 1000)
    told = found(DataSettings(source=str(lines)))
    assert told.rows == 50 and "not read for a plan" in told.how
    assert told.together == pytest.approx(lines.stat().st_size / 50 / 4)
    assert found(DataSettings(source=str(whole))).rows is None


def test_published_alpaca_is_as_long_as_the_table_says(shared_alpaca: list[dict[str, str]]) -> None:
    sizes = [sum(len(text.encode()) for text in row.values()) for row in shared_alpaca]
    assert sum(sizes) / len(sizes) == pytest.approx(382, rel=0.01)


@pytest.fixture
def shared_alpaca() -> list[dict[str, str]]:
    file = Path(__file__).parents[4] / "shared" / "data" / "alpaca" / "alpaca_data.json"
    if not file.is_file():
        pytest.skip("the published data are not here")
    rows: list[dict[str, str]] = json.loads(file.read_text(encoding="utf-8"))
    return rows
