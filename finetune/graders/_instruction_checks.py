"""Checks of IFEval's verifiable instructions, one function each: of the response and the arguments.

The definitions are those of Zhou et al. 2023 (arXiv 2311.07911), table 1. Where the table leaves a choice,
they agree with the authors' judgments: keywords may be parts of words and forbidden words may not, and a text
whose language cannot be detected follows an instruction on its language.
"""

import json
import re
from collections.abc import Callable, Sequence

Check = Callable[..., bool]
CONSTRAINED_RESPONSES = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
_ABBREVIATION = re.compile(
    r"mrs?|ms|dr|prof|st|jr|sr|vs|etc|inc|ltd|co|corp|e\.g|i\.e|u\.s|u\.k|a\.m|p\.m|dept|est|approx|gen|rep|"
    r"sen|gov|lt|col|sgt|capt|cf|al|ph\.d|b\.a|m\.a|jan|feb|mar|apr|aug|sept|oct|nov|dec|[^\W\d_]"
)
_BEFORE_NUMBER = re.compile(r"nos?|vol|fig|pp?")
"""Abbreviations before a number only: "No." is also an answer."""
_SENTENCE_END = re.compile(r"[.!?]+[\"'”’)\]*_]*(?=\s+|$)")
_WORD = re.compile(r"\w+")
_TOKEN = re.compile(r"(?:\w\.){2,}|\w+(?:[-'’.]\w+)*")


def compare(count: int, relation: str, threshold: int) -> bool:
    """Return whether a count is ``at least`` or ``less than`` a threshold."""
    if relation not in ("at least", "less than"):
        raise ValueError(f"unknown relation {relation!r}, expected 'at least' or 'less than'")
    return count >= threshold if relation == "at least" else count < threshold


def count_sentences(text: str) -> int:
    """Return the number of sentences: they end with . ! or ?, not after an abbreviation or an initial.

    >>> count_sentences("Dr. Lee pays $3.50. Why? See Fig. 2.")
    3
    """
    count, start = 0, 0
    for match in _SENTENCE_END.finditer(text):
        word = text[start : match.start()].rsplit(None, 1)[-1:]
        last = word[0].lstrip("(\"'“‘[*_").lower() if word else ""
        follows = text[match.end() :].lstrip()[:1]
        is_abbreviation = match[0].startswith(".") and (
            _ABBREVIATION.fullmatch(last) or (_BEFORE_NUMBER.fullmatch(last) and follows.isdigit())
        )
        # A number such as "1." that begins a line numbers an item of a list.
        is_list_number = last.isdigit() and not text[start : match.start()].strip().removesuffix(last).strip()
        if not (is_list_number or follows.islower() or (is_abbreviation and follows)):
            count, start = count + 1, match.end()
    return count + bool(text[start:].strip())


def is_language(text: str, language: str) -> bool:
    """Return whether langdetect finds this language, an ISO 639-1 code, in the text."""
    from langdetect import DetectorFactory, LangDetectException, detect

    DetectorFactory.seed = 0  # it samples
    try:
        return bool(detect(text) == language)
    except LangDetectException:
        return True


def keyword_existence(text: str, keywords: Sequence[str]) -> bool:
    return all(keyword.lower() in text.lower() for keyword in keywords)


def keyword_frequency(text: str, keyword: str, frequency: int, relation: str) -> bool:
    return compare(text.lower().count(keyword.strip().lower()), relation, frequency)


def forbidden_words(text: str, forbidden_words: Sequence[str]) -> bool:
    return not any(
        re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) for word in forbidden_words
    )


def letter_frequency(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return compare(text.lower().count(letter.lower()), let_relation, let_frequency)


def number_sentences(text: str, num_sentences: int, relation: str) -> bool:
    return compare(count_sentences(text), relation, num_sentences)


def number_words(text: str, num_words: int, relation: str) -> bool:
    return compare(len(_WORD.findall(text)), relation, num_words)


def number_paragraphs(text: str, num_paragraphs: int) -> bool:
    """Return whether ``***`` separates so many paragraphs, none of them empty."""
    parts = [part.strip() for part in text.split("***")]
    return all(parts[1:-1]) and sum(map(bool, parts)) == num_paragraphs


def nth_paragraph_first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Return whether blank lines separate so many paragraphs, and one of them begins with a word."""
    parts = [part.strip() for part in text.split("\n\n")]
    if sum(map(bool, parts)) != num_paragraphs or not parts[nth_paragraph - 1]:
        return False
    word = re.split(r"[.,?!'\"]", parts[nth_paragraph - 1].split()[0].lstrip("'\""))[0]
    return word.lower() == first_word.lower()


def number_placeholders(text: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[.*?\]", text)) >= num_placeholders


def postscript(text: str, postscript_marker: str) -> bool:
    """Return whether the marker occurs, in any case, with or without a space after its points."""
    letters = [part for part in postscript_marker.strip().split(".") if part]
    pattern = r"\.\s?".join(map(re.escape, letters)) + (
        r"\." if postscript_marker.strip().endswith(".") else ""
    )
    return re.search(pattern, text, re.IGNORECASE) is not None


def number_bullet_lists(text: str, num_bullets: int) -> bool:
    return len(re.findall(r"^\s*(?:\*[^*\n]|-)", text, re.MULTILINE)) == num_bullets


def constrained_response(text: str) -> bool:
    return any(option in text for option in CONSTRAINED_RESPONSES)


def number_highlighted_sections(text: str, num_highlights: int) -> bool:
    spans = re.findall(r"\*\*[^\n*]+\*\*|\*[^\n*]+\*", text)
    return sum(bool(span.strip("*").strip()) for span in spans) >= num_highlights


def multiple_sections(text: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(rf"{re.escape(section_spliter.strip())}\s?\d+", text)) >= num_sections


def json_format(text: str) -> bool:
    body = re.sub(r"^```(?:json)?|```$", "", text.strip(), flags=re.IGNORECASE)
    try:
        json.loads(body)
    except ValueError:
        return False
    return True


def title(text: str) -> bool:
    return any(name.strip("<> \t") for name in re.findall(r"<<[^\n]+>>", text))


def two_responses(text: str) -> bool:
    """Return whether six asterisks separate two different responses."""
    parts = [part.strip() for part in text.split("******")]
    given = [part for part in parts if part]
    return all(parts[1:-1]) and len(given) == 2 and given[0] != given[1]


def repeat_prompt(text: str, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def end_checker(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def quotation(text: str) -> bool:
    stripped = text.strip()
    return len(stripped) > 1 and stripped[0] == stripped[-1] == '"'


def capital_word_frequency(text: str, capital_frequency: int, capital_relation: str) -> bool:
    count = sum(token.isupper() for token in _TOKEN.findall(text))
    return compare(count, capital_relation, capital_frequency)


def english_capital(text: str) -> bool:
    return text.isupper() and is_language(text, "en")


def english_lowercase(text: str) -> bool:
    return text.islower() and is_language(text, "en")


def no_comma(text: str) -> bool:
    return "," not in text


CHECKS: dict[str, Check] = {
    "keywords:existence": keyword_existence,
    "keywords:frequency": keyword_frequency,
    "keywords:forbidden_words": forbidden_words,
    "keywords:letter_frequency": letter_frequency,
    "language:response_language": is_language,
    "length_constraints:number_sentences": number_sentences,
    "length_constraints:number_paragraphs": number_paragraphs,
    "length_constraints:number_words": number_words,
    "length_constraints:nth_paragraph_first_word": nth_paragraph_first_word,
    "detectable_content:number_placeholders": number_placeholders,
    "detectable_content:postscript": postscript,
    "detectable_format:number_bullet_lists": number_bullet_lists,
    "detectable_format:constrained_response": constrained_response,
    "detectable_format:number_highlighted_sections": number_highlighted_sections,
    "detectable_format:multiple_sections": multiple_sections,
    "detectable_format:json_format": json_format,
    "detectable_format:title": title,
    "combination:two_responses": two_responses,
    "combination:repeat_prompt": repeat_prompt,
    "startend:end_checker": end_checker,
    "startend:quotation": quotation,
    "change_case:capital_word_frequency": capital_word_frequency,
    "change_case:english_capital": english_capital,
    "change_case:english_lowercase": english_lowercase,
    "punctuation:no_comma": no_comma,
}
"""Instruction id, without the prefix of a language, to its check."""
