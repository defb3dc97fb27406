"""Row counts and token lengths of a plan, compared with the tokenized data set."""

import json
from pathlib import Path
from typing import Any

import pytest

from align.planner import row_lengths as module
from align.planner.row_lengths import RowLengths, measure_lengths
from align.preference.settings import PreferenceSettings
from align.rl.settings import PromptSettings
from finetune.recipe.recipe import read_recipe
from finetune.recipe.settings import (
    DataSettings,
    DocumentSettings,
    MixedSource,
    ModelSettings,
    SelectSettings,
)

TINY = ModelSettings(base="tiny")
LLAMA = ModelSettings(base="llama-2-7b")


def lengths_of(
    data: DataSettings, *, max_length: int = 512, completions: int = 1, **options: Any
) -> RowLengths:
    model = options.pop("model", TINY)
    return measure_lengths(
        data,
        model,
        seed=0,
        max_length=max_length,
        completions=completions,
        labels=options.pop("labels", False),
    )


def test_quickstart_lengths_match_its_tokenized_data() -> None:
    from finetune.data.dataset import prepare_conversations
    from finetune.data.tokens import Encoder
    from finetune.training.model import load_tokenizer

    settings = read_recipe("sft", "quickstart").settings
    encoder = Encoder(load_tokenizer(settings.model), settings.data.template)
    tokenized = prepare_conversations(settings.data, encoder, max_length=512, seed=0).train
    planned = lengths_of(settings.data)
    assert planned.rows == len(tokenized) and not planned.is_upper_bound
    assert planned.row_tokens == pytest.approx(tokenized.num_tokens / len(tokenized), rel=0.1)
    assert planned.longest == pytest.approx(max(tokenized.lengths), rel=0.1)


QUESTIONS = [
    f"Tell me about {name} in {count} words." for count, name in enumerate(["Seoul", "rain", "tea"] * 8)
]
ALPACA = [{"instruction": text, "output": f"{text} Yes! {index}"} for index, text in enumerate(QUESTIONS)]
PAIRS = [
    {"prompt": text, "chosen": f"Well, {text}", "rejected": f"No: {index}"}
    for index, text in enumerate(QUESTIONS)
]


@pytest.mark.parametrize(
    ("stage", "rows", "settings"),
    [
        ("sft", ALPACA, {"data.template": "alpaca"}),
        ("sft", ALPACA, {"data.template": "chatml", "data.system_prompt": "Be brief."}),
        ("sft", ALPACA, {"data.template": "tokenizer"}),
        ("sft", ALPACA, {"data.template": "vicuna", "data.max_length": 96, "data.overflow": "drop"}),
        ("dpo", PAIRS, {"data.template": "hh"}),
        ("dpo", PAIRS, {"data.template": "tokenizer", "train.max_steps": 5}),
        ("kto", PAIRS, {"data.template": "zephyr"}),
    ],
)
def test_plan_and_data_count_the_same_tokens(
    stage: str, rows: list[dict[str, str]], settings: dict[str, Any]
) -> None:
    from align import data, load_recipe, plan

    given = {"data.cache": False, "model.init_from": None, "model.base": "tiny", "data.held_out": 3}
    given |= {"evaluate.graders": {}, "evaluate.retention": None, "train.batch_size": 5, "train.warmup": 0.1}
    recipe = load_recipe("quickstart", stage=stage, data=rows, settings=given | settings)
    preview, planned = data(recipe, rows=0), plan(recipe, gpu="cpu")
    assert planned.work is not None and planned.lengths.is_exact
    share = planned.stage.trained_share(planned.lengths)
    assert share is not None
    # One token of a row may begin or end elsewhere, where its texts are joined.
    assert (planned.lengths.rows, planned.work.steps) == (preview["rows"], preview["steps"])
    assert planned.work.trained_tokens == pytest.approx(preview["token_budget"], rel=0.005)
    assert share * planned.work.trained_tokens == pytest.approx(preview["trained_token_budget"], rel=0.01)


def test_held_out_rows_are_not_counted(rows_file: Path) -> None:
    assert lengths_of(DataSettings(source=str(rows_file))).rows == 48
    assert lengths_of(DataSettings(source=str(rows_file), held_out=6)).rows == 42
    assert lengths_of(DataSettings(source=str(rows_file), held_out=0.25)).rows == 36


def test_long_rows_are_truncated(rows_file: Path) -> None:
    full, truncated = (
        lengths_of(DataSettings(source=str(rows_file))),
        lengths_of(DataSettings(source=str(rows_file)), max_length=20),
    )
    assert full.longest > 20 == truncated.longest and truncated.row_tokens <= 20 < full.row_tokens


def test_completions_share_one_prompt() -> None:
    rows = [
        {"prompt": f"{i} " * 20, "chosen": "yes it is", "rejected": "no it is not so at all"}
        for i in range(9)
    ]
    pairs = lengths_of(PreferenceSettings(source=rows), completions=2)
    assert (pairs.rows, pairs.completions) == (9, 2.0)
    assert pairs.row_tokens == pytest.approx(pairs.prompt + 2 * pairs.completion)
    labelled = lengths_of(PreferenceSettings(source=rows), labels=True)
    assert (labelled.rows, labelled.completions) == (18, 1.0)


def test_prompts_drop_their_completions(rows_file: Path) -> None:
    prompts = lengths_of(PromptSettings(source=str(rows_file)), completions=0)
    assert (prompts.rows, prompts.completion, prompts.completions) == (48, 0.0, 0.0)
    assert prompts.longest_prompt == pytest.approx(prompts.longest, abs=1)


def test_documents_are_all_completion(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("One sentence. " * 30)
    planned = lengths_of(DocumentSettings(source=str(tmp_path / "a.txt")))
    assert planned.rows == 1 and planned.prompt <= 1 and planned.completion > 30


def test_mixtures_are_sampled_as_in_a_run(rows_file: Path) -> None:
    components = [MixedSource(source=str(rows_file)), MixedSource(source=str(rows_file), rows=12)]
    assert lengths_of(DataSettings(mix=components)).rows == 60


def test_a_missing_tokenizer_is_reported(rows_file: Path) -> None:
    planned = lengths_of(DataSettings(source=str(rows_file)), model=LLAMA)
    assert "assuming 4 bytes per token" in planned.basis
    assert "counted on 48" in lengths_of(DataSettings(source=str(rows_file))).basis


def test_hub_data_is_not_read_and_reported() -> None:
    hh = lengths_of(DataSettings(source="Anthropic/hh-rlhf", held_out=800), max_length=300)
    assert (hh.rows, hh.row_tokens, hh.is_upper_bound) == (160_000, 300.0, True)
    assert "not read" in hh.basis and "an upper bound" in hh.basis
    gsm8k = lengths_of(DataSettings(source="openai/gsm8k:main", held_out=0.1))
    assert (gsm8k.rows, gsm8k.is_upper_bound) == (7473 - 747, False)
    assert gsm8k.row_tokens == pytest.approx(522 / 4)
    unknown = lengths_of(DataSettings(source="owner/unheard-of"))
    assert unknown.rows is None and "row count unknown" in unknown.basis
    wrong_split = lengths_of(DataSettings(source="Anthropic/hh-rlhf", split="test"))
    assert wrong_split.rows is None


def test_selected_hub_rows_are_counted() -> None:
    curated = DataSettings(source="64bits/lima_vicuna_format", select=SelectSettings(rows=1000))
    assert lengths_of(curated).rows == 1000
    capped = [MixedSource(source="owner/one", rows=500), MixedSource(source="tatsu-lab/alpaca")]
    assert lengths_of(DataSettings(mix=capped)).rows == 52_502
    assert lengths_of(DataSettings(mix=capped, epoch_rows=77)).rows == 77


def test_large_files_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"instruction": "a" * 200, "output": "b" * 160}] * 50
    jsonl_file, json_file = tmp_path / "rows.jsonl", tmp_path / "rows.json"
    jsonl_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    json_file.write_text(json.dumps(rows))
    monkeypatch.setattr(module, "MAX_READ_BYTES", 1000)
    planned = lengths_of(DataSettings(source=str(jsonl_file)))
    assert planned.rows == 50 and "not read for a plan" in planned.basis
    assert planned.row_tokens == pytest.approx(jsonl_file.stat().st_size / 50 / 4)
    assert lengths_of(DataSettings(source=str(json_file))).rows is None


def test_published_alpaca_has_the_length_of_the_table(shared_alpaca: list[dict[str, str]]) -> None:
    sizes = [sum(len(text.encode()) for text in row.values()) for row in shared_alpaca]
    assert sum(sizes) / len(sizes) == pytest.approx(382, rel=0.01)


@pytest.fixture
def shared_alpaca() -> list[dict[str, str]]:
    file = Path(__file__).parents[4] / "shared" / "data" / "alpaca" / "alpaca_data.json"
    if not file.is_file():
        pytest.skip("the published data are not here")
    rows: list[dict[str, str]] = json.loads(file.read_text(encoding="utf-8"))
    return rows
