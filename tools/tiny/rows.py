"""Dataset rows: instructions, conversations, preferences, prompts; each from one side of the split."""

from random import Random
from typing import NamedTuple

from finetune.graders.stories import Topic, is_story, requested, topics
from tools.tiny import stories
from tools.tiny.corpus import ALL_TASKS
from tools.tiny.tasks import Task, TaskExample

TinyRow = dict[str, str]
STORY_TASKS = {"en": "story", "ko": "story_ko"}
HELD_OUT_TOPIC_FRACTION = 0.2
_GREETINGS = {
    "en": (
        ("Hello!", "Hello! How can I help you?"),
        ("Hi, can you help me?", "Of course. What would you like to know?"),
    ),
    "ko": (
        ("안녕하세요?", "안녕하세요! 무엇을 도와드릴까요?"),
        ("도와줄 수 있나요?", "물론이죠. 무엇을 알고 싶나요?"),
    ),
}
_THANKS = {
    "en": (("Thank you for your help.", "You are welcome. Goodbye!"),),
    "ko": (("고마워요.", "천만에요. 안녕히 가세요."),),
}
_SYSTEM = {
    "en": "You are a helpful assistant. You answer in short and clear words.",
    "ko": "당신은 친절한 친구입니다. 질문에 짧고 정확하게 대답합니다.",
}


class Side(NamedTuple):
    """One side of the split (train or held-out): examples per task and topics per language."""

    examples: dict[str, list[TaskExample]]
    topics: dict[str, list[Topic]]


def split(seed: int) -> tuple[Side, Side]:
    """Split all examples and topics into a training side and a held-out side."""
    examples = {task.name: task.split(seed) for task in ALL_TASKS}
    topics = {language: _split_topics(language, seed) for language in STORY_TASKS}
    sides = [
        Side({k: v[i] for k, v in examples.items()}, {k: v[i] for k, v in topics.items()}) for i in (0, 1)
    ]
    return sides[0], sides[1]


def _split_topics(language: str, seed: int) -> tuple[list[Topic], list[Topic]]:
    all_topics = topics(language)
    Random(f"{seed}/{language}/topics").shuffle(all_topics)
    num_held_out = round(len(all_topics) * HELD_OUT_TOPIC_FRACTION)
    return all_topics[num_held_out:], all_topics[:num_held_out]


def exact_rows(side: Side, task: Task, count: int, rng: Random) -> list[TinyRow]:
    """Return up to `count` distinct rows of one task, cycling through its shuffled examples."""
    examples = list(side.examples[task.name])
    rows: dict[tuple[str, str], TinyRow] = {}
    for _ in range(6):
        rng.shuffle(examples)
        for example in examples:
            row = task.as_row(example, rng)
            rows.setdefault((row["instruction"], row["input"]), row)
            if len(rows) == count:
                return list(rows.values())
    return list(rows.values())


def story_rows(side: Side, language: str, count: int, *, happy_fraction: float, rng: Random) -> list[TinyRow]:
    """Return rows of the story task; each ends happily with probability `happy_fraction`."""
    return [
        {
            "instruction": stories.story_request(topic, rng),
            "input": "",
            "output": stories.story(topic, rng, happy=rng.random() < happy_fraction),
            "task": STORY_TASKS[language],
        }
        for topic in rng.sample(side.topics[language], count)
    ]


def instruction_rows(
    side: Side, per_task: int, per_story: int, *, happy_fraction: float, rng: Random
) -> list[TinyRow]:
    """Return all tasks and stories of one side, shuffled."""
    rows = [row for task in ALL_TASKS for row in exact_rows(side, task, per_task, rng)]
    for language in STORY_TASKS:
        rows += story_rows(side, language, per_story, happy_fraction=happy_fraction, rng=rng)
    rng.shuffle(rows)
    return rows


def _exchange(side: Side, language: str, *, happy_fraction: float, rng: Random) -> tuple[str, str]:
    if rng.random() < 0.15:
        row = story_rows(side, language, 1, happy_fraction=happy_fraction, rng=rng)[0]
    else:
        task = rng.choice([task for task in ALL_TASKS if task.language == language])
        row = task.as_row(rng.choice(side.examples[task.name]), rng)
    question = f"{row['instruction']}\n{row['input']}" if row["input"] else row["instruction"]
    return question, row["output"]


def conversation(side: Side, *, happy_fraction: float, rng: Random) -> dict[str, list[TinyRow]]:
    """Return a conversation of one to five exchanges in one language, half of them with a system message."""
    language = rng.choice(tuple(STORY_TASKS))
    exchanges = [
        _exchange(side, language, happy_fraction=happy_fraction, rng=rng) for _ in range(rng.randint(1, 3))
    ]
    if rng.random() < 0.4:
        exchanges.insert(0, rng.choice(_GREETINGS[language]))
    if rng.random() < 0.2:
        exchanges.append(rng.choice(_THANKS[language]))
    messages = [{"role": "system", "content": _SYSTEM[language]}] if rng.random() < 0.5 else []
    for question, reply in exchanges:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    return {"messages": messages}


def story_preferences(side: Side, count: int, rng: Random) -> list[TinyRow]:
    """Return pairs: happy story over sad story for the same request; half of them share their beginning."""
    rows = []
    for index in range(count):
        topic = rng.choice(side.topics[("en", "ko")[index % 2]])
        prompt, story_seed = stories.story_request(topic, rng), rng.getrandbits(32)
        rejected_seed = story_seed if rng.random() < 0.5 else rng.getrandbits(32)
        rows.append(
            {
                "prompt": prompt,
                "chosen": stories.story(topic, Random(story_seed), happy=True),
                "rejected": stories.story(topic, Random(rejected_seed), happy=False),
            }
        )
    return rows


def safe_preferences(side: Side, count: int, rng: Random) -> list[TinyRow]:
    """Return pairs: peaceful story over harsh one for the same request, with the same kind of ending."""
    rows = []
    for index in range(count):
        topic = rng.choice(side.topics[("en", "ko")[index % 2]])
        prompt, story_seed, happy = stories.story_request(topic, rng), rng.getrandbits(32), rng.random() < 0.5
        peaceful, harsh = (
            stories.story(topic, Random(story_seed), happy=happy, harsh=kind) for kind in (False, True)
        )
        rows.append({"prompt": prompt, "chosen": peaceful, "rejected": harsh})
    return rows


def answer_preferences(side: Side, count: int, rng: Random) -> list[TinyRow]:
    """Return pairs: correct answer over the answer to another question of the same task."""
    rows = []
    for _ in range(count):
        task = rng.choice(ALL_TASKS)
        examples = side.examples[task.name]
        example = rng.choice(examples)
        wrong = rng.choice(
            [e.answer for e in examples if e.answer != example.answer and _same_variant(e, example)]
        )
        rows.append(
            {
                "prompt": task.as_row(example, rng, inline=True)["instruction"],
                "chosen": example.answer,
                "rejected": wrong,
            }
        )
    return rows


def _same_variant(example: TaskExample, other: TaskExample) -> bool:
    return example.slots.get("variant") == other.slots.get("variant")


def prompt_rows(side: Side, count: int, story_fraction: float, rng: Random) -> list[TinyRow]:
    """Return prompts without answers, for RL: stories (whose ending PPO can improve) and exact questions."""
    rows = []
    for _ in range(count):
        if rng.random() < story_fraction:
            language = rng.choice(tuple(STORY_TASKS))
            rows.append(
                {
                    "prompt": stories.story_request(rng.choice(side.topics[language]), rng),
                    "task": STORY_TASKS[language],
                }
            )
        else:
            task = rng.choice(ALL_TASKS)
            prompt = task.as_row(rng.choice(side.examples[task.name]), rng, inline=True)["instruction"]
            rows.append({"prompt": prompt, "task": task.name})
    unique = {row["prompt"]: row for row in rows}
    return list(unique.values())


def is_correct(row: TinyRow, reply: str) -> bool:
    """Return whether a reply is correct: a valid story on the topic, or exactly the answer."""
    topic = requested(row["instruction"])
    if topic is not None:
        return is_story(reply, topic)
    return reply.strip() == row["output"]
