"""Write the datasets: `python -m tools.tiny.data --out FOLDER`; deterministic for a seed."""

import argparse
import csv
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random

from tools.tiny import rows
from tools.tiny.company import documents, questions_and_answers
from tools.tiny.corpus import Corpus
from tools.tiny.tickets import tickets

DATA_SEED = 7
SFT_HAPPY_FRACTION = 0.3
TRAIN_PER_TASK, TRAIN_PER_STORY = 240, 360
HELD_OUT_PER_TASK, HELD_OUT_PER_STORY = 8, 8
CHATS_PER_SIDE = (500, 60)
STORY_PAIRS_PER_SIDE, ANSWER_PAIRS_PER_SIDE, SAFE_PAIRS_PER_SIDE = (1000, 100), (500, 50), (600, 60)
PROMPTS_PER_SIDE, STORY_PROMPT_FRACTION = (800, 120), 0.6
DOCUMENTS_PER_SIDE = (400, 60)
GENERAL_TEXTS, GENERAL_SEED = 60, 100
"""Texts of each language; their seed is that of no pretraining text."""


def write_jsonl(path: Path, records: Sequence[Mapping[str, object]]) -> None:
    """Write JSON Lines with unescaped Korean."""
    json_lines = [json.dumps(record, ensure_ascii=False) for record in records]
    path.write_text("\n".join(json_lines) + "\n", encoding="utf-8", newline="\n")


def write_csv(path: Path, records: Sequence[Mapping[str, str]]) -> None:
    """Write the columns of the records with a header."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(records[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)


def preferences(
    side: rows.Side, stories: int, answers: int, rng: Random
) -> tuple[list[rows.TinyRow], list[rows.TinyRow]]:
    """Return story and answer pairs shuffled together, and only the story pairs in the same order."""
    story_pairs = rows.story_preferences(side, stories, rng)
    pairs = story_pairs + rows.answer_preferences(side, answers, rng)
    rng.shuffle(pairs)
    return pairs, [pair for pair in pairs if pair in story_pairs]


def write_side(folder: Path, name: str, side: rows.Side, *, index: int, seed: int) -> None:
    """Write the files of one side of the split; `index` picks the train (0) or held-out (1) sizes."""
    rng = Random(f"{seed}/{name}")
    per_task, per_story = ((TRAIN_PER_TASK, TRAIN_PER_STORY), (HELD_OUT_PER_TASK, HELD_OUT_PER_STORY))[index]
    sft = rows.instruction_rows(side, per_task, per_story, happy_fraction=SFT_HAPPY_FRACTION, rng=rng)
    if (
        name == "held_out"
    ):  # rows with a single correct answer first: `evaluate.exact_match: 200` uses exactly these
        sft.sort(key=lambda row: row["task"].startswith("story"))
    chats = [
        rows.conversation(side, happy_fraction=SFT_HAPPY_FRACTION, rng=rng)
        for _ in range(CHATS_PER_SIDE[index])
    ]
    write_jsonl(folder / f"sft_{name}.jsonl", sft)
    write_jsonl(folder / f"chat_{name}.jsonl", chats)
    pairs, story_pairs = preferences(side, STORY_PAIRS_PER_SIDE[index], ANSWER_PAIRS_PER_SIDE[index], rng)
    write_jsonl(folder / f"preferences_{name}.jsonl", pairs)
    write_jsonl(folder / f"story_preferences_{name}.jsonl", story_pairs)
    safe = rows.safe_preferences(side, SAFE_PAIRS_PER_SIDE[index], Random(f"{seed}/{name}/safe"))
    write_jsonl(folder / f"safe_preferences_{name}.jsonl", safe)
    write_jsonl(
        folder / f"prompts_{name}.jsonl",
        rows.prompt_rows(side, PROMPTS_PER_SIDE[index], STORY_PROMPT_FRACTION, rng),
    )


def write_documents(folder: Path, seed: int) -> None:
    """Write the company's texts separated by blank lines; no held-out text is in the training file."""
    texts = documents(DOCUMENTS_PER_SIDE[0], Random(f"{seed}/in_house"))
    candidates = documents(2 * DOCUMENTS_PER_SIDE[1], Random(f"{seed}/in_house_held_out"))
    held_out = [text for text in candidates if text not in texts][: DOCUMENTS_PER_SIDE[1]]
    for name, documents_of_side in (("in_house.txt", texts), ("in_house_held_out.txt", held_out)):
        (folder / name).write_text("\n\n".join(documents_of_side) + "\n", encoding="utf-8", newline="\n")


def write_general_texts(folder: Path, seed: int) -> None:
    """Write texts of the pretraining's kind in both languages, to measure what tuning forgets."""
    texts: dict[str, list[str]] = {"en": [], "ko": []}
    for text in Corpus(seed + GENERAL_SEED).documents(40 * GENERAL_TEXTS):
        letters = [character for character in text if character.isalpha()]
        num_latin = sum(character.isascii() for character in letters)
        # Many documents have both languages; these are in neither half.
        language = {0: "ko", len(letters): "en"}.get(num_latin)
        if language is not None and len(texts[language]) < GENERAL_TEXTS:
            texts[language].append(text)
    records = [{"text": text, "language": language} for language in texts for text in texts[language]]
    write_jsonl(folder / "general_held_out.jsonl", records)


def write_all(folder: Path, seed: int = DATA_SEED) -> None:
    """Write every data file into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, (name, side) in enumerate(zip(("train", "held_out"), rows.split(seed), strict=True)):
        write_side(folder, name, side, index=index, seed=seed)
    train, held_out = questions_and_answers()
    write_csv(folder / "in_house.csv", train)
    write_csv(folder / "in_house_held_out.csv", held_out)
    write_documents(folder, seed)
    write_general_texts(folder, seed)
    write_csv(folder / "tickets.csv", tickets(Random(f"{seed}/tickets")))


def main(argv: list[str]) -> None:
    """Write the files and print their sizes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("recipes/tiny/data"))
    parser.add_argument("--seed", type=int, default=DATA_SEED)
    options = parser.parse_args(argv)
    write_all(options.out, options.seed)
    for path in sorted(options.out.iterdir()):
        num_lines = path.read_text(encoding="utf-8").count("\n")
        print(f"{path}  {num_lines:,} lines  {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
