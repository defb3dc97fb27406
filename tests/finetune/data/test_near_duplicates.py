"""Near duplicates: parity with brute force, distinct where one word differs, deterministic."""

import random

import pytest

from finetune.data import near_duplicates as module
from finetune.data.near_duplicates import near_duplicates

WORDS = [f"word{i}" for i in range(300)]


def text(seed: int, length: int = 60) -> list[str]:
    return random.Random(seed).choices(WORDS, k=length)


def changed(words: list[str], places: int, seed: int) -> list[str]:
    words = list(words)
    for place in random.Random(seed).sample(range(len(words)), places):
        words[place] = "other"
    return words


def overlap(one: str, other: str) -> float:
    """Return the Jaccard overlap of word 5-grams, by definition."""
    grams = []
    for words in (one.split(), other.split()):
        grams.append({tuple(words[i : i + 5]) for i in range(max(1, len(words) - 4))})
    return len(grams[0] & grams[1]) / len(grams[0] | grams[1])


def brute_force(texts: list[str], threshold: float) -> list[int | None]:
    selected: list[int] = []
    actual: list[int | None] = []
    for index, one in enumerate(texts):
        twin = next((other for other in selected if overlap(one, texts[other]) >= threshold), None)
        actual.append(twin)
        if twin is None:
            selected.append(index)
    return actual


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 1.0])
def test_parity_with_brute_force(threshold):
    texts = []
    for seed in range(40):
        words = text(seed)
        texts += [" ".join(changed(words, places, seed)) for places in (0, 0, 1, 2, 4)]
    expected, actual = brute_force(texts, threshold), near_duplicates(texts, threshold)
    missed = sum(one is not None and other is None for one, other in zip(expected, actual, strict=True))
    invented = sum(one is None and other is not None for one, other in zip(expected, actual, strict=True))
    assert sum(twin is not None for twin in expected) >= 40
    # A pair exactly at the threshold is missed once in a hundred; then its own twins may differ too.
    assert missed <= 2 and invented <= 2


def test_short_texts_are_the_same_only_when_all_words_are():
    texts = ["Add 3 and 5.", "add 3 and 5", "Add 3 and 6.", "", "", "안녕 하세요", "안녕 하세요!"]
    assert near_duplicates(texts, 0.8) == [None, 0, None, None, 3, None, 5]


def test_chinese_counts_by_the_character():
    sentence = "我们今天去公园看花然后回家吃饭再一起看电影"
    assert near_duplicates([sentence, sentence[:-1], "今天天气很好"], 0.8) == [None, 0, None]


def test_one_word_makes_short_sentences_distinct():
    first = "Name the capital of France and say how many people live in it today"
    assert near_duplicates([first, first.replace("France", "Spain")], 0.8) == [None, None]
    assert near_duplicates([first, first.upper() + "?"], 0.8) == [None, 0]


def test_it_is_the_same_every_time():
    texts = [" ".join(changed(text(0), places, places)) for places in range(12)]
    assert near_duplicates(texts, 0.6) == near_duplicates(texts, 0.6)
    assert near_duplicates(texts[::-1], 0.6)[0] is None, "the first of them is retained"


def test_bands_miss_one_pair_in_a_hundred_at_most():
    for threshold in (0.5, 0.6, 0.7, 0.8, 0.9):
        rows = module._rows_per_band(threshold)
        assert (1 - threshold**rows) ** (module.NUM_HASHES // rows) <= 0.01
