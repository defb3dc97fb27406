"""The generator: equal seeds give equal bytes, checkers know right from wrong, the split is clean."""

import hashlib
import json
from pathlib import Path
from random import Random

import pytest

from finetune.graders import stories as graders
from tools.tiny import company, data, rows, stories, words
from tools.tiny.corpus import ALL_TASKS, Corpus
from tools.tiny.grammar import josa, plural
from tools.tiny.tasks import Task

COMMITTED = Path(__file__).parents[3] / "recipes" / "tiny" / "data"
TRAIN, HELD_OUT = rows.split(data.DATA_SEED)
LANGUAGES = ("en", "ko")
SAMPLED = ("sort", "sort_ko", "reverse", "reverse_ko", "odd_one_out")


def digests(folder: Path) -> dict[str, str]:
    """Return the sha256 of each file of a folder."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_committed_data_is_what_the_generator_writes(tmp_path: Path) -> None:
    """A change of the generator must come with its data."""
    data.write_all(tmp_path)
    assert digests(tmp_path) == digests(COMMITTED)


def test_another_seed_writes_other_rows(tmp_path: Path) -> None:
    """The seed reaches every generated file; the company's facts are fixed text."""
    data.write_all(tmp_path, seed=data.DATA_SEED + 1)
    same = {name for name, digest in digests(tmp_path).items() if digest == digests(COMMITTED)[name]}
    assert same == {"in_house.csv", "in_house_held_out.csv"}


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    """One source of documents for the tests that only read."""
    return Corpus(1)


def test_corpus_repeats_with_its_seed() -> None:
    """The pretraining text is a function of the seed."""
    first, again = (list(Corpus(2).documents(200)) for _ in range(2))
    assert first == again


def test_corpus_has_no_instruction_format(corpus: Corpus) -> None:
    """What the base has read must not give the tuning format away."""
    text = "\n".join(corpus.documents(5000))
    for mark in ("Instruction", "### Input", "### Response", "<|im_start|>", "<s>", "</s>"):
        assert mark not in text


def test_corpus_contains_every_held_out_fact(corpus: Corpus) -> None:
    """Held-out answers measure the format, not missing knowledge: the base reads each fact of the tables."""
    for task in ALL_TASKS:
        if task.name not in SAMPLED:
            pool = {(example.key, example.answer) for example in corpus.pools[task.name]}
            assert {(example.key, example.answer) for example in HELD_OUT.examples[task.name]} <= pool


@pytest.mark.parametrize("task", ALL_TASKS, ids=lambda task: task.name)
def test_train_and_held_out_are_disjoint(task: Task) -> None:
    """No held-out key is in training, and both sides have examples."""
    train = {example.key for example in TRAIN.examples[task.name]}
    held_out = {example.key for example in HELD_OUT.examples[task.name]}
    assert len(held_out) >= 4
    assert len(train) > len(held_out)
    assert not train & held_out


@pytest.mark.parametrize("task", ALL_TASKS, ids=lambda task: task.name)
def test_checker_accepts_the_answer_and_rejects_others(task: Task) -> None:
    """Exact answers: equal but for spaces at the ends; one wrong word, case or addition is wrong."""
    rng = Random(0)
    for example in TRAIN.examples[task.name][:20]:
        row = task.as_row(example, rng)
        assert rows.is_correct(row, f" {row['output']}\n")
        for wrong in ("", row["output"] + " x", "x" + row["output"]):
            assert not rows.is_correct(row, wrong)


@pytest.mark.parametrize("task", ALL_TASKS, ids=lambda task: task.name)
def test_a_question_has_one_answer(task: Task) -> None:
    """No two rows ask the same and expect different answers."""
    rng, answers = Random(1), dict[tuple[str, str], str]()
    for example in TRAIN.examples[task.name] + HELD_OUT.examples[task.name]:
        row = task.as_row(example, rng)
        question = (row["instruction"], row["input"])
        assert answers.setdefault(question, row["output"]) == row["output"]


@pytest.mark.parametrize(
    ("name", "instruction", "answer"),
    [
        ("add", "What is 7 plus 8?", "15"),
        ("larger", "Which number is larger, 12 or 7?", "12"),
        ("opposite", "What is the opposite of hot?", "cold"),
        ("plural", "What is the plural of mouse?", "mice"),
        ("en_to_ko", "Translate cat into Korean.", "고양이"),
        ("capital_ko", "프랑스의 수도는 어디인가요?", "파리"),
        ("color_ko", "바나나는 무슨 색인가요?", "노란색"),
        ("add_ko", "7 더하기 8은 얼마인가요?", "15"),
    ],
)
def test_known_questions_have_the_right_answer(name: str, instruction: str, answer: str) -> None:
    """The generator agrees with what a reader knows."""
    task = next(task for task in ALL_TASKS if task.name == name)
    answers = {
        ask.instruction.format(**example.slots): example.answer
        for example in task.draw(Random(2))
        for ask in task.instructions[example.slots.get("variant", "")]
    }
    assert answers[instruction] == answer


def test_sorting_and_reversing_are_right() -> None:
    """The skills' answers, worked out here by other means."""
    skills = {task.name: task.draw(Random(3)) for task in ALL_TASKS}
    for example in skills["sort"]:
        assert [int(n) for n in example.answer.split()] == sorted(
            int(n) for n in example.slots["numbers"].split()
        )
    for example in skills["reverse"] + skills["reverse_ko"]:
        assert example.answer.split() == example.slots["words"].split()[::-1]
    kinds = {noun.word: noun.category for noun in words.NOUNS}
    for example in skills["odd_one_out"]:
        others = {kinds[word] for word in example.slots["words"].split(", ") if word != example.answer}
        assert len(others) == 1
        assert kinds[example.answer] not in others


def test_lexicon_translates_both_ways() -> None:
    """No English or Korean noun appears twice."""
    nouns = words.NOUNS + words.OTHER_NOUNS
    assert len({noun.word for noun in nouns}) == len(nouns) == len({noun.korean for noun in nouns})


def test_grammar_rules() -> None:
    """Plurals by rule and by table; particles by the last sound."""
    assert [plural(word) for word in ("cat", "box", "baby", "monkey", "foot")] == [
        "cats", "boxes", "babies", "monkeys", "feet"
    ]  # fmt: skip
    assert [josa("고양이", "은"), josa("곰", "은"), josa("7", "을"), josa("서울", "으로")] == [
        "고양이는", "곰은", "7을", "서울로"
    ]  # fmt: skip


@pytest.mark.parametrize("language", LANGUAGES)
def test_stories_are_valid_and_their_end_is_known(language: str) -> None:
    """Each generated story passes its check, and has the requested ending."""
    rng = Random(5)
    for topic in rng.sample(graders.topics(language), 300):
        for happy in (True, False):
            text = stories.story(topic, rng, happy=happy)
            assert graders.is_story(text, topic)
            assert graders.ends_happily(text) is happy
            assert graders.ends_sadly(text) is not happy
        assert graders.requested(stories.story_request(topic, rng)) == topic


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Mina had a red ball.",
        "Mina had a red ball. She was very happy",
        "Tom had a red ball. Tom was happy.",
        "Mina had a red kite. Mina was happy.",
        "Mina had a red ball. It was there.",
        "Mina had a red ball. One. Two. Three. Four. Mina was happy.",
    ],
)
def test_bad_stories_are_rejected(text: str) -> None:
    """Too short, not finished, wrong hero, wrong thing, no recognized ending, too long."""
    assert not graders.is_story(text, graders.Topic("en", "Mina", "red", "ball"))


def test_a_story_row_is_checked_as_a_story() -> None:
    """`is_correct` accepts any valid story on the topic, not only the row's."""
    row = {
        "instruction": "Write a short story about Mina and a red ball.",
        "input": "",
        "output": "",
        "task": "story",
    }
    assert rows.is_correct(row, "Mina lost her red ball. Tom found it. Mina smiled.")
    assert not rows.is_correct(row, "Mina smiled.")


def test_in_house_phrasings_are_held_out() -> None:
    """The same answers on both sides, no question on both."""
    train, held_out = company.questions_and_answers()
    assert {row["answer"] for row in train} == {row["answer"] for row in held_out}
    assert not {row["question"] for row in train} & {row["question"] for row in held_out}
    assert len({row["question"] for row in train}) == len(train)


def test_in_house_texts_contain_every_fact_and_no_held_out_question() -> None:
    """What the texts teach is what the questions ask; texts of a few facts each, in one language."""
    texts = (COMMITTED / "in_house.txt").read_text(encoding="utf-8").split("\n\n")
    full_text = "\n".join(texts)
    _, held_out = company.questions_and_answers()
    kept_out = (COMMITTED / "in_house_held_out.txt").read_text(encoding="utf-8").split("\n\n")
    assert (len(texts), len(kept_out)) == data.DOCUMENTS_PER_SIDE and len({*texts, *kept_out}) == 460
    assert [fact.answer for fact in company.FACTS if fact.answer not in full_text] == []
    assert [row["question"] for row in held_out if row["question"] in full_text] == []
    korean = [any("가" <= letter <= "힣" for letter in text) for text in texts]
    assert 0.4 < sum(korean) / len(texts) < 0.6
    assert not any("Hanbit" in text for text, is_korean in zip(texts, korean, strict=True) if is_korean)


def load(name: str) -> list[dict[str, str]]:
    """Read a committed JSON-lines file."""
    return [json.loads(line) for line in (COMMITTED / name).read_text(encoding="utf-8").splitlines()]


def test_sft_layout_and_fraction_of_happy_endings() -> None:
    """Alpaca columns and a task; about 30 % of the stories end happily; every output passes its own check."""
    for row in load("sft_train.jsonl") + load("sft_held_out.jsonl"):
        assert list(row) == ["instruction", "input", "output", "task"]
        assert rows.is_correct(row, row["output"])
    story_texts = [row["output"] for row in load("sft_train.jsonl") if row["task"].startswith("story")]
    assert 0.25 < sum(map(graders.ends_happily, story_texts)) / len(story_texts) < 0.35


def test_preference_layout() -> None:
    """Three strings; a story pair prefers the happy end."""
    for row in load("preferences_train.jsonl") + load("preferences_held_out.jsonl"):
        assert list(row) == ["prompt", "chosen", "rejected"]
        assert row["chosen"] != row["rejected"]
        if graders.requested(row["prompt"]):
            assert graders.ends_happily(row["chosen"])
            assert graders.ends_sadly(row["rejected"])


@pytest.mark.parametrize("side", ["train", "held_out"])
def test_the_story_preferences_are_those_of_the_mixture(side: str) -> None:
    """For a reward model: only pairs that its base can learn to distinguish."""
    mixed = [row for row in load(f"preferences_{side}.jsonl") if graders.requested(row["prompt"])]
    assert load(f"story_preferences_{side}.jsonl") == mixed


@pytest.mark.parametrize("side", ["train", "held_out"])
def test_the_safe_preferences_differ_only_in_their_plots(side: str) -> None:
    """Peaceful over harsh, and no hint of it in how the stories end: half of both end happily."""
    pairs = load(f"safe_preferences_{side}.jsonl")
    for row in pairs:
        assert not graders.is_harsh(row["chosen"]) and graders.is_harsh(row["rejected"])
        assert graders.ends_happily(row["chosen"]) == graders.ends_happily(row["rejected"])
    assert 0.4 < sum(graders.ends_happily(row["chosen"]) for row in pairs) / len(pairs) < 0.6


@pytest.mark.parametrize("kind", ["sft", "preferences", "safe_preferences", "prompts"])
def test_no_prompt_on_both_sides(kind: str) -> None:
    """Held-out prompts are new."""
    key = "instruction" if kind == "sft" else "prompt"
    train = {(row[key], row.get("input", "")) for row in load(f"{kind}_train.jsonl")}
    assert not train & {(row[key], row.get("input", "")) for row in load(f"{kind}_held_out.jsonl")}


def test_conversations_alternate() -> None:
    """Optional system message, then user and assistant by turns, ending with the assistant."""
    for row in load("chat_train.jsonl") + load("chat_held_out.jsonl"):
        roles = [message["role"] for message in row["messages"]]  # type: ignore[index]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2)
        assert len(turns) >= 2
