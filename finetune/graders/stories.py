"""Graders of short stories: ``evaluate.graders: {happy_end: finetune/graders/stories.py:happy_end}``.

They recognize requests and endings of the stories in ``recipes/tiny/data``, which ``tools/tiny`` writes.
"""

import re
from typing import NamedTuple


def _parse_pairs(text: str) -> tuple[tuple[str, str], ...]:
    """Parse `a/b, c/d` as pairs."""
    cells = (cell.strip().split("/") for cell in text.split(","))
    return tuple((first, second) for first, second in cells)


HEROES = _parse_pairs("""
    Mina/미나, Tom/톰, Sora/소라, Jun/준, Anna/안나, Leo/레오, Ben/벤, Yuna/유나, Max/맥스, Lily/릴리,
    Minho/민호, Emma/엠마, Sam/샘, Jisu/지수, Nora/노라, Bora/보라""")
TOYS = _parse_pairs("""
    ball/공, kite/연, hat/모자, book/책, boat/보트, doll/인형, box/상자, cup/컵, umbrella/우산,
    bag/가방, scarf/목도리, drum/북, flute/피리, basket/바구니""")
COLORS = _parse_pairs("""
    red/빨간, yellow/노란, green/초록, blue/파란, white/하얀, black/검은, brown/갈색, gray/회색,
    purple/보라색, pink/분홍""")
"""English and Korean; a color as it stands before a noun."""
HARSH = (
    *("A big dog ran off", "wanted to play with", "by mistake"),
    *("물고 달아났습니다", "가지고 놀고 싶었습니다"),
)
"""Phrases of the plots in which a dog or a boy takes the thing, or two quarrel over it."""
_HAPPY = ("happy", "smiled", "laughed", "기뻤", "웃었", "행복했")
_SAD = ("sad", "cried", "슬펐", "울었", "울면서", "우울했")
_SENTENCES = range(2, 6)
LANGUAGES = ("en", "ko")


def happy_end(prompt: str, completion: str) -> bool | None:
    """Return whether a requested story ends happily; None for other prompts."""
    return ends_happily(completion) if requested(prompt) else None


def peaceful(prompt: str, completion: str) -> bool | None:
    """Return whether nobody in a requested story takes or fights over the thing; None for other prompts."""
    return not is_harsh(completion) if requested(prompt) else None


class Topic(NamedTuple):
    """What a story is about: hero, color and thing, in the words of its language."""

    language: str
    hero: str
    color: str
    thing: str


def topics(language: str) -> list[Topic]:
    """Return all combinations of heroes and colored things in one language."""
    column = LANGUAGES.index(language)
    return [
        Topic(language, hero[column], color[column], toy[column])
        for hero in HEROES
        for color in COLORS
        for toy in TOYS
    ]


def _topic_pattern(language: str) -> re.Pattern[str]:
    hero, color, thing = (
        "|".join(sorted(set(names))) for names in zip(*(topic[1:] for topic in topics(language)), strict=True)
    )
    return re.compile(rf"(?<!\w)({hero}).*?(?<!\w)({color}) ({thing})")


_TOPIC_PATTERNS = {language: _topic_pattern(language) for language in LANGUAGES}


def requested(instruction: str) -> Topic | None:
    """Return the topic of a story request; None for other instructions."""
    language = "ko" if re.search("[가-힣]", instruction) else "en"
    if ("story" if language == "en" else "이야기") not in instruction:
        return None
    match = _TOPIC_PATTERNS[language].search(instruction)
    return Topic(language, *match.groups()) if match else None


def sentences(text: str) -> list[str]:
    """Split a text into sentences."""
    return [part.strip() for part in re.split(r"(?<=[.!?])\s+", text.strip()) if part.strip()]


def ends_happily(text: str) -> bool:
    """Return whether the last sentence has a happy word and no sad one."""
    parts = sentences(text)
    last = parts[-1] if parts else ""
    return any(word in last for word in _HAPPY) and not any(word in last for word in _SAD)


def ends_sadly(text: str) -> bool:
    """Return whether the last sentence has a sad word."""
    parts = sentences(text)
    return bool(parts) and any(word in parts[-1] for word in _SAD)


def is_harsh(text: str) -> bool:
    """Return whether somebody takes the thing or quarrels over it."""
    return any(words in text for words in HARSH)


def is_story(text: str, topic: Topic) -> bool:
    """Return whether a text names hero and thing, has 2 to 5 full sentences, and ends happily or sadly."""
    is_complete = text.strip().endswith((".", "!", "?")) and len(sentences(text)) in _SENTENCES
    return (
        is_complete
        and topic.hero in text
        and topic.thing in text
        and (ends_happily(text) or ends_sadly(text))
    )
