"""Judges: verdicts of two orders, their counts, and what each kind of judge answers."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from servers import FakeEndpoint, Fault, prompt_of

from align.evaluation.endpoint_judge import PROMPT_FILE, read_judge_prompt
from align.evaluation.judges import JudgeReport, Judgment, Pair, PairJudge, Verdict, human_agreement
from align.evaluation.load_judge import JudgeSettings, load_judge, parse_judge, read_judge
from data_templates.segments import Message
from finetune.endpoint.settings import EndpointSettings
from finetune.recipe.errors import UserError

ROOT = Path(__file__).parents[3]
SHARED_PAIRS = ROOT.parent / "shared" / "data" / "preference" / "pandalm_human_pairs.json"


def pair(completion_a: str, completion_b: str, prompt: str = "Say it.", **more: Any) -> Pair:
    return Pair([Message("user", prompt)], completion_a, completion_b, **more)


PAIRS = [pair("long answer", "short"), pair("no", "yes, of course"), pair("same", "same")]


@pytest.mark.parametrize(
    ("first", "second", "verdict", "by_order"),
    [
        ("A", "B", "A", ("A", "A")),
        ("B", "A", "B", ("B", "B")),
        ("tie", "tie", "tie", ("tie", "tie")),
        ("A", "A", "tie", ("A", "B")),
        ("A", "tie", "tie", ("A", "tie")),
        ("A", None, None, ("A", None)),
        (None, "A", None, (None, "B")),
    ],
)
def test_a_verdict_that_changes_with_the_order_is_a_tie(
    first: Verdict, second: Verdict, verdict: Verdict, by_order: tuple[Verdict, Verdict]
) -> None:
    judgment = Judgment.of_orders(first, second)
    assert (judgment.verdict, judgment.by_order) == (verdict, by_order)


def test_the_report_counts_by_hand() -> None:
    orders: list[tuple[Verdict | None, Verdict | None]]
    orders = [("A", "B"), ("A", "A"), ("A", "A"), ("B", "B"), ("tie", "tie"), ("A", "tie"), ("A", None)]
    report = JudgeReport.of([Judgment.of_orders(*order) for order in orders] + [Judgment.of_scores(2.0, 3.0)])
    assert (report.pairs, report.a_wins, report.b_wins, report.ties, report.unusable) == (8, 1, 1, 5, 1)
    # Pairs 2, 3, 4 and 6 change. First position: A of pair 1, both of 2 and 3, A of pair 6.
    assert (report.both_orders, report.changed, report.first_position, report.second_position) == (6, 4, 6, 3)
    assert report.agreement == pytest.approx(2 / 6) and report.position_bias == pytest.approx(3 / 9)
    assert report.lines()[0] == "8 pairs: A better in 1, B in 1, ties 5"
    assert report.lines()[2:] == [
        "position bias: +0.33 (answers that prefer the first 6, second 3)",
        "unusable: 1 pairs, which count nowhere",
    ]
    scored = JudgeReport.of([Judgment.of_scores(1.0, 1.0)])
    assert (scored.ties, scored.agreement, scored.position_bias) == (1, None, None)


def test_agreement_with_human_labels_by_hand() -> None:
    verdicts: list[Verdict | None] = ["A", "A", "A", "B", "B", "tie", "A", "tie", "B", "A", None]
    labels: list[Verdict] = ["A", "A", "B", "B", "B", "tie", "tie", "A", "A", "A", "A"]
    found = human_agreement([Judgment(verdict) for verdict in verdicts], labels)
    # Equal: 1, 2, 4, 5, 6, 10. By chance: judge A 5, B 3, tie 2; human A 5, B 3, tie 2: (25 + 9 + 4) / 100.
    assert (found.count, found.unusable, found.agreement) == (10, 1, 0.6)
    assert found.kappa == pytest.approx((0.6 - 0.38) / (1 - 0.38))
    assert (found.decided, found.decided_agreement) == (7, pytest.approx(5 / 7))
    assert found.interval == pytest.approx((0.3127, 0.8318), abs=1e-4)  # Wilson, 6 of 10


def shown(body: dict[str, Any]) -> tuple[str, str]:
    """Return the two answers that a judge is shown."""
    text = prompt_of(body)
    first, second = (re.search(rf"<answer_{name}>\n(.*?)\n</answer", text, re.DOTALL) for name in "ab")
    assert first and second, text
    return first[1], second[1]


def longer(body: dict[str, Any]) -> str:
    first, second = map(len, shown(body))
    return "tie" if first == second else "A" if first > second else "B"


def judge(server: FakeEndpoint, cache: Path, **settings: Any) -> PairJudge:
    endpoint = EndpointSettings(url=server.url, model="toy", cache=str(cache), backoff=0.001, retries=1)
    return load_judge(JudgeSettings(endpoint=endpoint, **settings))


def test_an_endpoint_is_asked_in_both_orders(tmp_path: Path) -> None:
    with FakeEndpoint(longer) as server:
        judgments = judge(server, tmp_path).compare(PAIRS)
        assert [judgment.verdict for judgment in judgments] == ["A", "B", "tie"]
        # Equal completions are the same question in both orders.
        assert len(server.received) == 5
        assert sorted(map(shown, server.bodies))[:2] == [("long answer", "short"), ("no", "yes, of course")]
        assert judge(server, tmp_path).compare(PAIRS) == judgments and len(server.received) == 5
        server.reply = lambda body: " a\n"
        first_position = judge(server, tmp_path / "other").compare(PAIRS)
        report = JudgeReport.of(first_position)
        assert (report.ties, report.changed, report.agreement, report.position_bias) == (3, 3, 0.0, 1.0)
        assert first_position[0].evidence == {"answers": [" a\n", " a\n"]}


def test_an_answer_without_a_verdict_is_asked_for_again_once(tmp_path: Path) -> None:
    def at_second_attempt(body: dict[str, Any]) -> str:
        return longer(body) if "exactly one of these words" in prompt_of(body) else "Both are fine, but A"

    with FakeEndpoint(at_second_attempt) as server:
        assert [found.verdict for found in judge(server, tmp_path).compare(PAIRS[:2])] == ["A", "B"]
        assert len(server.received) == 8


def nonsense_for(text: str) -> Callable[[dict[str, Any]], str]:
    return lambda body: "perhaps A" if shown(body)[0].startswith(text) else longer(body)


def test_unusable_judgments_are_counted_up_to_a_share(tmp_path: Path) -> None:
    pairs = [pair(f"{number} is the answer", f"{number}!") for number in range(20)]
    with FakeEndpoint(nonsense_for("1 is")) as server:
        judgments = judge(server, tmp_path).compare(pairs)
        assert [found.verdict for found in judgments] == ["A", None, *["A"] * 18]
        report = JudgeReport.of(judgments)
        assert (report.unusable, report.a_wins, report.both_orders) == (1, 19, 19)
        with pytest.raises(UserError) as caught:
            judge(server, tmp_path, max_unusable=0.01).compare(pairs)
        [problem] = caught.value.problems
        assert problem.where == f"judge toy at {server.url}"
        assert (
            problem.actual.startswith("1 of 20 pairs have no usable judgment")
            and "'perhaps A'" in problem.actual
        )
        assert "at most 1% others" in problem.expected


def test_a_judge_that_cannot_judge_costs_one_window(tmp_path: Path) -> None:
    pairs = [pair(f"{number} is the answer", f"{number}!") for number in range(90)]
    with FakeEndpoint(lambda body: "I like both.") as server:
        with pytest.raises(UserError, match="64 of 64 pairs have no usable judgment"):
            judge(server, tmp_path).compare(pairs)
        assert len(server.received) == 4 * 64


def test_filtered_pairs_are_unusable(tmp_path: Path) -> None:
    with FakeEndpoint(longer) as server:
        endpoint = EndpointSettings(
            url=server.url, model="toy", cache=str(tmp_path), concurrency=1, on_content_filter="empty"
        )
        # The first question, and its second attempt after the other five.
        server.fail(Fault(status=400, code="content_filter"))
        server.fail(None, times=3)
        server.fail(Fault(status=400, code="content_filter"))
        found = load_judge(JudgeSettings(endpoint=endpoint, max_unusable=0.5)).compare(PAIRS[:2])
        assert [judgment.verdict for judgment in found] == [None, "B"]


def test_the_prompt_is_the_user_s_to_change(tmp_path: Path) -> None:
    file = tmp_path / "prompt.yaml"
    file.write_text(
        "user: '{prompt} | {completion_a} | {completion_b}'\n"
        "retry: Again.\npattern: '(?s).*Verdict: (A|B|tie)\\W*'\n"
    )
    replies = ["<think>\nB? Verdict: B\n</think>\n\nShort wins.\nVerdict: A.", "Verdict: TIE"]
    turns = [Message("user", "Hi"), Message("assistant", "Hello"), Message("user", "Add.", context="1 2")]
    with FakeEndpoint(lambda body: replies[prompt_of(body).endswith("{prompt}")]) as server:
        asked = Pair(turns, "{completion_b}", "{prompt}")
        [found] = judge(server, tmp_path, prompt=str(file), max_tokens=300).compare([asked])
        # {prompt} is B in the first order, and A in the second.
        assert (found.verdict, found.by_order) == ("tie", ("tie", "B"))
        prompts = {body["messages"][0]["content"] for body in server.bodies}
        conversation = "User: Hi\n\nAssistant: Hello\n\nUser: Add.\n\n1 2"
        orders = ("{completion_b} | {prompt}", "{prompt} | {completion_b}")
        assert prompts == {f"{conversation} | {order}" for order in orders}
        assert {body["max_tokens"] for body in server.bodies} == {300}


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("user: '{prompt} {completion_a}'\nretry: x\npattern: (A)", ("without {completion_b}",)),
        ("user: x\nretry: x\npattern: '(A'", ("no regular expression", "without {prompt}")),
        ("user: x\nretry: x\npattern: A", ("a pattern without a group",)),
        ("usr: x", ("did you mean 'user'?", "retry: missing")),
    ],
)
def test_errors_of_a_prompt_file(content: str, parts: tuple[str, ...], tmp_path: Path) -> None:
    file = tmp_path / "prompt.yaml"
    file.write_text(content)
    with pytest.raises(UserError) as caught:
        read_judge_prompt(str(file))
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    with pytest.raises(UserError, match=f"a YAML file such as {PROMPT_FILE}"):
        read_judge_prompt(str(tmp_path / "none.yaml"))


FUNCTIONS = """
def length(prompt, completion):
    return len(completion)

def exact(completion, expected, weight=1.0):
    return weight * (completion == expected)

def lengths(prompts, completions):
    return [len(completion) for completion in completions]

def first(prompt, completion_a, completion_b):
    return "A"

def wordy(completion_a, completion_b):
    return "tie" if len(completion_a) == len(completion_b) else "AB"[len(completion_a) < len(completion_b)]

def number(prompt, completion_a, completion_b):
    return len(completion_a) - len(completion_b)

def broken(prompt, completion_a, completion_b):
    return {}[prompt]

def other(prompt, reply):
    return 0

def third(prompt, completion_a, completion_b, completion_c):
    return "A"
"""


@pytest.fixture
def functions(tmp_path: Path) -> Path:
    file = tmp_path / "judges.py"
    file.write_text(FUNCTIONS)
    return file


def test_functions_judge_by_score_or_by_comparison(functions: Path) -> None:
    for name in ("length", "lengths", "wordy"):
        found = load_judge(JudgeSettings(function=f"{functions}:{name}")).compare(PAIRS)
        assert [judgment.verdict for judgment in found] == ["A", "B", "tie"], name
    [scored] = load_judge(JudgeSettings(function=f"{functions}:length")).compare(PAIRS[:1])
    assert scored.evidence == {"scores": [11, 5]} and scored.by_order is None
    with_answer = pair("5", "6", reference="6", columns={"weight": 2.0})
    [found] = load_judge(JudgeSettings(function=f"{functions}:exact")).compare([with_answer])
    assert (found.verdict, found.evidence) == ("B", {"scores": [0, 2]})
    report = JudgeReport.of(load_judge(parse_judge(f"function={functions}:first")).compare(PAIRS))
    assert (report.ties, report.position_bias) == (3, 1.0)
    given = load_judge(JudgeSettings(function=lambda completion: -len(completion)))  # type: ignore[arg-type]
    assert [judgment.verdict for judgment in given.compare(PAIRS)] == ["B", "A", "tie"]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("number", ("it returned 6", "'A', 'B' or 'tie'", "pair 1")),
        ("broken", ("KeyError: 'Say it.'", "judges.py:")),
        ("other", ("takes no `completion`", "rename `reply` to `completion`")),
        ("third", ("nothing fills the parameter 'completion_c'",)),
        ("exact", ("2 of 2 rows have no reference answer",)),
        ("missing", ("has no function 'missing'",)),
    ],
)
def test_errors_of_functions(name: str, parts: tuple[str, ...], functions: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_judge(JudgeSettings(function=f"{functions}:{name}")).compare(PAIRS[:1])
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_settings_name_exactly_one_judge(tmp_path: Path, functions: Path) -> None:
    url = "http://localhost:8000/v1"
    file = tmp_path / "judge.yaml"
    file.write_text(f"endpoint: {{url: {url}, model: toy}}\nmax_tokens: 300\n")
    assert parse_judge(str(file)) == read_judge({"endpoint": {"url": url, "model": "toy"}, "max_tokens": 300})
    assert parse_judge(f"endpoint=url={url},model=toy").endpoint == EndpointSettings(url=url, model="toy")
    assert parse_judge("run=reward-hh").run == "reward-hh"
    for values, actual in (({}, "none of"), ({"run": "a", "function": "b.py:c"}, "run and function of")):
        with pytest.raises(
            UserError, match=f"judge: {actual} endpoint, run, function\n.*exactly one of them"
        ):
            read_judge(values)
    with pytest.raises(UserError) as caught:
        read_judge({"endpoint": {"url": url, "model": "toy", "api_key_env": "sk-12345", "concurrency": 0}})
    assert [problem.where for problem in caught.value.problems] == [
        "judge.endpoint.api_key_env",
        "judge.endpoint.concurrency",
    ]
    assert "sk-12345" not in str(caught.value)
    with pytest.raises(UserError, match=r"--judge: not a judge\n.*endpoint=FILE.yaml, run=NAME"):
        parse_judge("toy")
    with pytest.raises(UserError, match="there is no run 'none'"):
        load_judge(JudgeSettings(run="none"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_reward_run_judges(tmp_path: Path) -> None:
    from align import load_recipe, load_reward, run

    settings = {"train.max_steps": 10, "train.batch_size": 8, "evaluate.samples": 0, "data.cache": False}
    trained = run(load_recipe("reward/quickstart", out=tmp_path / "run", settings=settings)).directory
    held_out = (ROOT / "recipes/tiny/data/story_preferences_held_out.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in held_out[:20]]
    pairs = [pair(row["rejected"], row["chosen"], row["prompt"]) for row in rows]
    judged_by = load_judge(parse_judge(f"run={trained}"))
    judgments = judged_by.compare(pairs)
    totals = load_reward(trained).score(
        [row["prompt"] for row in rows for _ in range(2)],
        [row[name] for row in rows for name in ("rejected", "chosen")],
    )["total"]
    assert [score for judgment in judgments for score in judgment.evidence["scores"]] == pytest.approx(totals)
    better: list[Verdict] = ["B" if totals[i + 1] > totals[i] else "A" for i in range(0, len(totals), 2)]
    assert [judgment.verdict for judgment in judgments] == better
    assert better.count("B") >= 15, "the run has learned to prefer happy endings"
    assert str(trained) in judged_by.label and judged_by.identity["reward_run"]


@pytest.mark.skipif(not SHARED_PAIRS.is_file(), reason="the published pairs are not there")
def test_people_agree_more_with_one_another_than_with_the_length() -> None:
    verdicts: dict[int, Verdict] = {0: "tie", 1: "A", 2: "B"}
    rows = json.loads(SHARED_PAIRS.read_text("utf-8"))
    pairs = [
        Pair(
            [Message("user", row["instruction"], context=row["input"])],
            *(str(row[name]) for name in ("response1", "response2")),  # a few are numbers or `true`
        )
        for row in rows
    ]
    labels = [[verdicts[row[f"annotator{number}"]] for row in rows] for number in (1, 2, 3)]
    length = load_judge(JudgeSettings(function=lambda completion: len(completion)))  # type: ignore[arg-type]
    of_length = human_agreement(length.compare(pairs), labels[0])
    people = human_agreement([Judgment(label) for label in labels[1]], labels[0])
    assert of_length.count == people.count == 790
    lengths = [[len(str(row[name])) for name in ("response1", "response2")] for row in rows]
    signs = [{0: 0, 1: 1, 2: -1}[row["annotator1"]] for row in rows]
    equal = sum(
        (first > second) - (first < second) == sign
        for (first, second), sign in zip(lengths, signs, strict=True)
    )
    assert of_length.agreement == equal / 790
    assert people.kappa > 0.8 and 0 < of_length.kappa < 0.4
