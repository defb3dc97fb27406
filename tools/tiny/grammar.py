"""English and Korean grammar rules: articles, plurals, Korean particles, lists."""

from tools.tiny.words import IRREGULAR_PLURALS

VOWELS = "aeiou"
_PARTICLES = {
    "은": ("은", "는"),
    "이": ("이", "가"),
    "을": ("을", "를"),
    "과": ("과", "와"),
    "이라": ("이라", "라"),
    "이다": ("이다", "다"),
    "으로": ("으로", "로"),
    "이야": ("이야", "야"),
    "아": ("아", "야"),
}
_DIGIT_FINALS = {
    "0": True,
    "1": True,
    "2": False,
    "3": True,
    "4": False,
    "5": False,
    "6": True,
    "7": True,
    "8": True,
    "9": False,
}


def article(word: str) -> str:
    """Prepend `a` or `an` to a word, by its first letter."""
    return f"{'an' if word[0] in VOWELS else 'a'} {word}"


def plural(word: str) -> str:
    """Return the plural: the irregular table first, then the spelling rules."""
    if word in IRREGULAR_PLURALS:
        return IRREGULAR_PLURALS[word]
    if word.endswith(("s", "x", "ch", "sh")):
        return word + "es"
    if word.endswith("y") and word[-2] not in VOWELS:
        return word[:-1] + "ies"
    return word + "s"


def has_final(word: str) -> bool:
    """Return whether the last sound of a Korean word (or number read in Korean) is a consonant."""
    last = word[-1]
    if last in _DIGIT_FINALS:
        return _DIGIT_FINALS[last]
    return "가" <= last <= "힣" and (ord(last) - ord("가")) % 28 != 0


def josa(word: str, particle: str) -> str:
    """Attach the particle in the form that fits the last sound, e.g. `고양이` + `은` -> `고양이는`."""
    after_consonant, after_vowel = _PARTICLES[particle]
    rieul = particle == "으로" and "가" <= word[-1] <= "힣" and (ord(word[-1]) - ord("가")) % 28 == 8
    return word + (after_consonant if has_final(word) and not rieul else after_vowel)


def comma_list(words: list[str]) -> str:
    """Join as `a, b and c`."""
    return f"{', '.join(words[:-1])} and {words[-1]}"
