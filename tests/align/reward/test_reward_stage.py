"""The stage from end to end: what a run holds, what scores afterwards, and that the library scores alike."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from align import load_recipe, load_reward, load_tuned, run
from align.reward.scorer import TOTAL, RewardModel
from data_templates.segments import Message
from finetune.recipe.errors import UserError
from finetune.training.result import Result

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.plots]
RULES = "def brief(prompt, completion):\n    return -len(completion) / 10\n"
HEADS = ["help", "safety"]


def pairs(count: int, *, better: str, worse: str) -> list[dict[str, object]]:
    """Return rows of which a word decides who is better; the length does not."""
    return [
        {
            "prompt": f"Add the numbers. {number}",
            "chosen": f"{better} {number % 7}",
            "rejected": f"{worse} {number % 5}",
            "margin": 1.0 + number % 3,
        }
        for number in range(count)
    ]


def ranked(count: int) -> list[dict[str, object]]:
    return [
        {
            "prompt": f"Response {number}",
            "responses": ["bad", "good one", "middling"],
            "scores": [1, 3, 2],
        }
        for number in range(count)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rewards")
    files = {
        "first": pairs(24, better="good", worse="evil"),
        "second": pairs(24, better="calm", worse="loud"),
    }
    for name, rows in (files | {"lists": ranked(24)}).items():
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "rules.py").write_text(RULES)
    return path


def train_reward_model(folder: Path, base: Path, name: str, **settings: object) -> Result:
    given = {
        "model.precision": "float32",
        "data.held_out": 6,
        "data.cache": False,
        "data.template": "plain",
        "train.max_steps": 12,
        "train.batch_size": 4,
        "train.learning_rate": 1e-2,
        "evaluate.samples": 2,
        "reward.rules": [],
    }
    overrides = {key.replace("__", "."): value for key, value in settings.items()}
    recipe = load_recipe(
        "quickstart",
        stage="reward",
        base=str(base),
        out=folder / name,
        settings=given | {"data.source": str(folder / "first.jsonl")} | overrides,
    )
    return run(recipe)


@pytest.fixture(scope="module")
def single(folder: Path, base_folder: Path) -> Result:
    rules = [{"name": "brief", "function": f"{folder}/rules.py:brief", "weight": 0.5}]
    return train_reward_model(folder, base_folder, "single", reward__rules=rules, train__evaluate_every=6)


@pytest.fixture(scope="module")
def double(folder: Path, base_folder: Path) -> Result:
    mix = [
        {"source": str(folder / "second.jsonl"), "head": "safety"},
        {"source": str(folder / "lists.jsonl"), "head": "help"},
    ]
    return train_reward_model(
        folder,
        base_folder,
        "double",
        data__source=None,
        data__mix=mix,
        reward__heads=HEADS,
        reward__margin_scale=0.5,
        reward__center_rewards_coefficient=0.01,
    )


def transformers_scores(
    result: Result, base: Path, model: RewardModel, rows: list[tuple[str, str]]
) -> list[float]:
    """Return what a user of plain transformers and PEFT gets."""
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    opened = PeftModel.from_pretrained(plain, result.adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(result.adapter)
    assert len(tokenizer) == len(model.encoder.tokenizer)
    scores = []
    for prompt, completion in rows:
        ids = model.encoder.encode([Message("user", prompt), Message("assistant", completion)]).input_ids
        with torch.no_grad():
            scores.append(float(opened(input_ids=torch.tensor([ids])).logits))
    return scores


def test_a_run_trains_and_records_metrics(single: Result) -> None:
    record = single.record
    metrics = record["metrics"]
    assert metrics["eval/loss_after"] < 0.5 < metrics["eval/loss_before"]
    assert metrics["eval/rewards/accuracies_after"] == 1.0 and metrics["eval/rewards/margins_after"] > 1.0
    held_out = record["preference_data"]["after"]["all"]
    assert held_out["comparisons"] == 6 and held_out["interval"][0] == pytest.approx(6 / (6 + 1.959964**2))
    assert {
        "calibration_error",
        "reliability",
        "longer_is_better",
        "correlation_with_length",
    } <= held_out.keys()
    assert record["reward_normalization"]["reward"]["completions"] == 18
    assert [tick["name"] for tick in record["preflight"]][:9] == [
        *("environment", "causality", "score", "truncation", "vocabulary"),
        *("gradient", "accumulation", "layout", "library"),
    ]
    assert all(tick["passed"] for tick in record["preflight"])
    entries = [entry for entry in single.metrics if "loss" in entry]
    assert (
        len(entries) == 12 and {"rewards/accuracies", "rewards/margins", "rewards/mean"} <= entries[0].keys()
    )
    assert [entry["step"] for entry in single.metrics if "eval/rewards/accuracies" in entry] == [6, 12]
    assert 0.0 <= entries[0]["rewards/accuracies"] <= 1.0 and entries[-1]["rewards/accuracies"] == 1.0


def test_the_report_shows_tables_figures_and_samples(single: Result) -> None:
    page = (single.directory / "report.html").read_text()
    for text in ("Held-out comparisons", "longest wins", "length correlation", "all, after"):
        assert text in page
    assert page.count("<svg") == 11, "nine curves, reliability, scores"
    assert "held-out accuracy" in page and "better: good" in page
    [first, _] = single.samples
    assert first["before"].startswith("better: ") and first["after"] != first["before"]


def test_transformers_and_peft_give_the_same_scores(single: Result, base_folder: Path) -> None:
    rows = [("Add the numbers. 3", "good 3"), ("Add the numbers. 3", "evil 3 and more"), ("Please.", "x")]
    model = load_reward(single.directory)
    scores = model.score([prompt for prompt, _ in rows], [text for _, text in rows])
    assert list(scores) == ["reward", "brief", TOTAL]
    expected = transformers_scores(single, base_folder, model, rows)
    assert scores["reward"] == pytest.approx(expected, abs=1e-5)
    assert scores["reward"][0] > scores["reward"][1]
    normalized = model.normalized(scores)["reward"]
    assert scores[TOTAL] == pytest.approx(
        [a + 0.5 * b for a, b in zip(normalized, scores["brief"], strict=True)]
    )
    assert scores["brief"] == [-0.6, -1.5, -0.1]


def test_normalized_chosen_rewards_have_mean_0_and_std_1(single: Result, folder: Path) -> None:
    model = load_reward(single.directory)
    rows = [json.loads(line) for line in (folder / "first.jsonl").read_text().splitlines()]
    scores = model.score([row["prompt"] for row in rows], [row["chosen"] for row in rows])
    normalized = torch.tensor(model.normalized(scores)["reward"])
    assert abs(float(normalized.mean())) < 0.5 and 0.5 < float(normalized.std()) < 1.5


def test_two_heads_train_on_their_sources(double: Result) -> None:
    metrics = double.record["metrics"]
    assert (
        metrics["eval/rewards/accuracies/help_after"] > 0.8
        and metrics["eval/rewards/accuracies/safety_after"] > 0.8
    )
    comparisons = double.record["preference_data"]["after"]
    assert set(comparisons["heads"]) == set(HEADS) and len(comparisons["sources"]) == 2
    assert comparisons["heads"]["help"]["pairs"] == 3 * comparisons["heads"]["help"]["comparisons"]
    ticks = {tick["name"]: tick for tick in double.record["preflight"]}
    assert "have a margin" in ticks["margins"]["detail"] and not ticks["margins"]["warned"]
    model = load_reward(double.directory)
    scores = model.score(
        ["Add the numbers. 1"] * 2 + ["Response 3"] * 2, ["calm 1", "loud 1", "good one", "bad"]
    )
    assert scores["safety"][0] > scores["safety"][1] and scores["help"][2] > scores["help"][3]
    normalized = model.normalized(scores)
    assert scores[TOTAL][0] == pytest.approx(normalized["help"][0] + normalized["safety"][0])
    page = (double.directory / "report.html").read_text()
    assert "head safety, after" in page and "Scores of held-out completions help" in page


def test_a_full_model_scores_with_plain_transformers(folder: Path, base_folder: Path) -> None:
    result = train_reward_model(
        folder, base_folder, "whole", adapter__method="full", train__learning_rate=1e-3
    )
    model = load_reward(result.directory)
    [ours] = model.score(["Please."], ["good 3"])["reward"]
    plain = AutoModelForSequenceClassification.from_pretrained(result.directory / "model").eval()
    assert plain.config.id2label == {0: "reward"}
    ids = model.encoder.encode([Message("user", "Please."), Message("assistant", "good 3")]).input_ids
    assert float(plain(input_ids=torch.tensor([ids])).logits) == pytest.approx(ours, abs=1e-5)


def test_a_four_bit_base_trains_and_reloads(folder: Path, base_folder: Path) -> None:
    result = train_reward_model(folder, base_folder, "four", adapter__method="qlora", train__max_steps=3)
    assert result.record["reload"]["quantization"] == "nf4"
    scores = load_reward(result.directory).score(["Please."], ["good 3"])
    assert abs(scores["reward"][0]) < 100


def test_the_rules_of_a_run_are_its_own_copies(single: Result, folder: Path) -> None:
    copy = single.directory / "rules" / "0.py"
    assert copy.read_text() == (folder / "rules.py").read_text()
    assert single.record["reload"]["rules"][0]["weight"] == 0.5


def test_a_changed_rule_is_another_run(folder: Path, base_folder: Path) -> None:
    from finetune.training.fingerprint import run_fingerprint

    rules = [{"name": "brief", "function": f"{folder}/rules.py:brief"}]
    more = {"data.source": str(folder / "first.jsonl"), "data.held_out": 3, "reward.rules": rules}
    settings = load_recipe("quickstart", stage="reward", base=str(base_folder), settings=more).settings
    before = run_fingerprint(settings)
    text = (folder / "rules.py").read_text()
    (folder / "rules.py").write_text(text + "# changed\n")
    assert run_fingerprint(settings) != before
    (folder / "rules.py").write_text(text)
    assert run_fingerprint(settings) == before


def test_an_invalid_rule_result_reports_rule_and_row(single: Result) -> None:
    from dataclasses import replace

    from align.reward.function_reward import FunctionReward
    from finetune.recipe.user_arguments import RowFunction

    model = load_reward(single.directory)
    for function, message in (
        (lambda prompt, completion: float("nan"), "nan"),
        (lambda prompt, completion: "x", "'x'"),
        (lambda prompt, completion: 1 / 0, "Zero"),
    ):
        broken = replace(model, rules=[FunctionReward("odd", 1.0, RowFunction(function))])
        with pytest.raises(UserError, match=f"rule 'odd' on completion 1(.|\n)*{message}"):
            broken.score(["p"], ["c"])


def test_a_reward_model_cannot_generate_and_a_language_model_cannot_score(single: Result) -> None:
    with pytest.raises(UserError, match="a reward model, which cannot generate text"):
        load_tuned(single.directory)
    record = json.loads((single.directory / "run.json").read_text())
    record["reload"].pop("heads")
    other = single.directory.parent / "talker"
    other.mkdir()
    (other / "run.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="expected: a run of stage reward"):
        load_reward(other)


def test_a_reward_model_is_initialized_from_sft_and_continues_with_its_head(
    single: Result, folder: Path, base_folder: Path
) -> None:
    row = {"prompt": "Add the numbers.", "completion": "good 1"}
    more = {"model.precision": "float32", "data.held_out": 0, "train.max_steps": 2, "evaluate.samples": 0}
    sft = load_recipe(
        "quickstart",
        base=str(base_folder),
        data=[row] * 8,
        out=folder / "sft",
        settings=more | {"data.template": "plain", "evaluate.exact_match": 0},
    )
    run(sft)
    result = from_run(folder, folder / "sft", "from-sft")
    assert result.record["init_from"]["stage"] == "sft"
    again = from_run(folder, single.directory, "from-reward")
    before = again.record["metrics"]["eval/rewards/accuracies_before"]
    assert before == single.record["metrics"]["eval/rewards/accuracies_after"] == 1.0, (
        "it begins with its head"
    )


def from_run(folder: Path, parent: Path, name: str) -> Result:
    recipe = load_recipe(
        "quickstart",
        stage="reward",
        init_from=str(parent),
        out=folder / name,
        settings={
            "data.source": str(folder / "first.jsonl"),
            "data.held_out": 6,
            "train.max_steps": 2,
            "evaluate.samples": 0,
        },
    )
    return run(recipe)


def test_trl_s_trainer_runs_the_same_recipe(single: Result, folder: Path, base_folder: Path) -> None:
    result = train_reward_model(folder, base_folder, "trl", train__engine="trl", train__evaluate_every=6)
    ours, theirs = single.record["metrics"], result.record["metrics"]
    assert theirs["eval/loss_before"] == pytest.approx(ours["eval/loss_before"], rel=1e-5)
    assert theirs["eval/rewards/accuracies_after"] == 1.0 and theirs["eval/rewards/margins_after"] > 1.0
    assert [line["step"] for line in result.metrics if "eval/rewards/accuracies" in line] == [6, 12]
    assert set(result.record["files"]) == set(single.record["files"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data__source": "lists.jsonl"}, "24 prompts with more than two completions"),
        ({"reward__heads": HEADS}, "train.engine (Python): 'trl' with 2 heads"),
    ],
)
def test_unsupported_trl_settings_are_reported(
    folder: Path, base_folder: Path, settings: dict[str, object], message: str
) -> None:
    if "data__source" in settings:
        settings = {"data__source": str(folder / str(settings["data__source"])), "data__held_out": 0}
    with pytest.raises(UserError) as caught:
        train_reward_model(folder, base_folder, "refused", train__engine="trl", **settings)
    assert message in str(caught.value) and not (folder / "refused").exists()
