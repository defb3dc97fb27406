"""Examples of every task: a complete table, or a seeded sample of a skill (sums, sorting, odd one out)."""

from itertools import combinations
from random import Random

from tools.tiny import words
from tools.tiny.grammar import article, josa, plural
from tools.tiny.tasks import TaskExample

MAX_SUMMAND = 20
MAX_NUMBER = 30
SKILL_SAMPLE = 900
_TRANSLATED = tuple((n.word, n.korean) for n in words.NOUNS + words.OTHER_NOUNS)
_ODD_KINDS = (
    "animal",
    "fruit",
    "vehicle",
    "garment",
    "body part",
    "instrument",
    "person",
    "tool",
    "furniture",
)
_COUNTABLE = tuple(n for n in words.NOUNS + words.OTHER_NOUNS if n.word not in words.UNCOUNTABLE)


def both_directions(pairs: tuple[tuple[str, str], ...]) -> list[TaskExample]:
    """Return both directions of every pair."""
    return [
        TaskExample(
            f"{first}/{second}", {"word": question_word, "word_은": josa(question_word, "은")}, answer_word
        )
        for first, second in pairs
        for question_word, answer_word in ((first, second), (second, first))
    ]


def opposites(_: Random) -> list[TaskExample]:
    """Return English opposites, in both directions."""
    return both_directions(words.OPPOSITES)


def opposites_korean(_: Random) -> list[TaskExample]:
    """Return Korean opposites, in both directions."""
    return both_directions(words.OPPOSITES_KOREAN)


def plurals(_: Random) -> list[TaskExample]:
    """Return countable nouns with their plural."""
    return [
        TaskExample(n.word, {"word": n.word, "a_word": article(n.word)}, plural(n.word)) for n in _COUNTABLE
    ]


def past_tenses(_: Random) -> list[TaskExample]:
    """Return verbs with their simple past."""
    return [TaskExample(verb, {"word": verb}, past) for verb, past in words.VERBS]


def english_to_korean(_: Random) -> list[TaskExample]:
    """Return nouns of the bilingual lexicon, English to Korean."""
    return [TaskExample(en, {"word": en, "answer_이다": josa(ko, "이다")}, ko) for en, ko in _TRANSLATED]


def korean_to_english(_: Random) -> list[TaskExample]:
    """Return nouns of the bilingual lexicon, Korean to English."""
    return [
        TaskExample(ko, {"word": ko, "word_은": josa(ko, "은"), "word_이": josa(ko, "이")}, en)
        for en, ko in _TRANSLATED
    ]


def sums(_: Random) -> list[TaskExample]:
    """Return all sums of two numbers from 1 to MAX_SUMMAND; a + b and b + a share a key."""
    numbers = range(1, MAX_SUMMAND + 1)
    return [
        TaskExample(
            f"{min(a, b)}+{max(a, b)}",
            {
                "a": f"{a}",
                "b": f"{b}",
                "a_과": josa(f"{a}", "과"),
                "b_은": josa(f"{b}", "은"),
                "b_을": josa(f"{b}", "을"),
                "sum_이다": josa(f"{a + b}", "이다"),
            },
            f"{a + b}",
        )
        for a in numbers
        for b in numbers
    ]


def larger(_: Random) -> list[TaskExample]:
    """Return all ordered pairs of distinct numbers from 1 to MAX_NUMBER."""
    numbers = range(1, MAX_NUMBER + 1)
    return [
        TaskExample(
            f"{min(a, b)},{max(a, b)}",
            {
                "a": f"{a}",
                "b": f"{b}",
                "a_과": josa(f"{a}", "과"),
                "high": f"{max(a, b)}",
                "low": f"{min(a, b)}",
                "high_은": josa(f"{max(a, b)}", "은"),
                "high_이": josa(f"{max(a, b)}", "이"),
            },
            f"{max(a, b)}",
        )
        for a in numbers
        for b in numbers
        if a != b
    ]


def sorted_numbers(rng: Random) -> list[TaskExample]:
    """Return a sample of three distinct numbers to be sorted."""
    triples = rng.sample(list(combinations(range(1, MAX_NUMBER + 1), 3)), SKILL_SAMPLE)
    return [_sorting(triple, rng) for triple in triples]


def _sorting(triple: tuple[int, ...], rng: Random) -> TaskExample:
    a, b, c = rng.sample(triple, 3)
    slots = {
        "numbers": f"{a} {b} {c}",
        "a": f"{a}",
        "b": f"{b}",
        "c": f"{c}",
        "b_과": josa(f"{b}", "과"),
        "c_을": josa(f"{c}", "을"),
    }
    return TaskExample(",".join(map(str, triple)), slots, " ".join(map(str, triple)))


def _reversals(lexicon: list[str], rng: Random) -> list[TaskExample]:
    examples = []
    for _ in range(SKILL_SAMPLE):
        three = rng.sample(lexicon, 3)
        slots = {
            "words": " ".join(three),
            "a": three[0],
            "b": three[1],
            "c": three[2],
            "c_을": josa(three[2], "을"),
        }
        examples.append(TaskExample(",".join(sorted(three)), slots, " ".join(reversed(three))))
    return examples


def reversals(rng: Random) -> list[TaskExample]:
    """Return a sample of three English words to be reversed."""
    return _reversals([n.word for n in words.NOUNS + words.OTHER_NOUNS], rng)


def reversals_korean(rng: Random) -> list[TaskExample]:
    """Return a sample of three Korean words to be reversed."""
    return _reversals([n.korean for n in words.NOUNS + words.OTHER_NOUNS], rng)


def odd_ones(rng: Random) -> list[TaskExample]:
    """Return a sample of four nouns: three of one category, and one of another, which is the answer."""
    return [_odd_one(rng) for _ in range(SKILL_SAMPLE)]


def _odd_one(rng: Random) -> TaskExample:
    kind, other_kind = rng.sample(_ODD_KINDS, 2)
    three = rng.sample([n for n in words.NOUNS if n.category == kind], 3)
    odd = rng.choice([n for n in words.NOUNS if n.category == other_kind])
    four = [n.word for n in rng.sample([*three, odd], 4)]
    slots = {"words": ", ".join(four), "kind": kind, "kinds": plural(kind), "a_other": article(other_kind)}
    return TaskExample(",".join(sorted(four)), slots, odd.word)


def _sounds(table: tuple[tuple[str, str], ...]) -> list[TaskExample]:
    examples = []
    for animal, sound in table:
        slots = {
            "animal": animal,
            "sound": sound,
            "animal_은": josa(animal, "은"),
            "a_animal": article(animal),
        }
        examples.append(TaskExample(animal, {**slots, "variant": "sound"}, sound))
        examples.append(TaskExample(animal, {**slots, "variant": "animal"}, animal))
    return examples


def sounds(_: Random) -> list[TaskExample]:
    """Return animals and their sounds in English, in both directions."""
    return _sounds(words.SOUNDS)


def sounds_korean(_: Random) -> list[TaskExample]:
    """Return animals and their sounds in Korean, in both directions."""
    return _sounds(words.SOUNDS_KOREAN)


def babies(_: Random) -> list[TaskExample]:
    """Return animals and the names of their young."""
    return [
        TaskExample(a, {"animal": a, "a_animal": article(a), "a_baby": article(b)}, b)
        for a, b in words.BABIES
    ]


def categories(_: Random) -> list[TaskExample]:
    """Return nouns and the name of their category."""
    return [
        TaskExample(
            n.word, {"word": n.word, "a_kind": article(n.category), "Word": n.word.capitalize()}, n.category
        )
        for n in words.NOUNS
    ]


def categories_korean(_: Random) -> list[TaskExample]:
    """Return Korean nouns and the Korean name of their category."""
    kinds = words.CATEGORY_KOREAN
    return [
        TaskExample(
            n.korean,
            {"word": n.korean, "word_은": josa(n.korean, "은"), "kind_이다": josa(kinds[n.category], "이다")},
            kinds[n.category],
        )
        for n in words.NOUNS
    ]


def _capitals(rows: list[tuple[str, str]]) -> list[TaskExample]:
    examples = []
    for country, capital in rows:
        slots = {
            "country": country,
            "capital": capital,
            "capital_은": josa(capital, "은"),
            "capital_이": josa(capital, "이"),
            "capital_이다": josa(capital, "이다"),
            "country_은": josa(country, "은"),
        }
        examples.append(TaskExample(country, {**slots, "variant": "capital"}, capital))
        examples.append(TaskExample(country, {**slots, "variant": "country"}, country))
    return examples


def capitals(_: Random) -> list[TaskExample]:
    """Return countries and capitals in English, in both directions."""
    return _capitals([(row[0], row[1]) for row in words.CAPITALS])


def capitals_korean(_: Random) -> list[TaskExample]:
    """Return countries and capitals in Korean, in both directions."""
    return _capitals([(row[2], row[3]) for row in words.CAPITALS])


def colors(_: Random) -> list[TaskExample]:
    """Return things and their usual color."""
    return [
        TaskExample(t, {"thing": t, "Thing": t.capitalize()}, color) for t, _ko, color in words.THING_COLORS
    ]


def colors_korean(_: Random) -> list[TaskExample]:
    """Return the same things and colors in Korean."""
    rows = [(ko, words.COLORS[color]) for _en, ko, color in words.THING_COLORS]
    return [
        TaskExample(t, {"thing": t, "thing_은": josa(t, "은"), "color_이다": josa(c, "이다")}, c)
        for t, c in rows
    ]


def first_letters(_: Random) -> list[TaskExample]:
    """Return English nouns and verbs with their first letter."""
    lexicon = sorted(
        {n.word for n in words.NOUNS + words.OTHER_NOUNS} | {verb for verb, _past in words.VERBS}
    )
    return [TaskExample(w, {"word": w}, w[0]) for w in lexicon]
