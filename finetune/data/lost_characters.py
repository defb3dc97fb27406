"""Count the characters of the data that a tokenizer loses: they become <unk>, are removed or replaced.

Each distinct character is tokenized once, not each row. A tokenizer with bytes as tokens loses none. What
depends on the text around a character is seen at its first word only: normalizations of several characters,
and tokenizers of words, which have a character in some words and not in others.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from transformers import PreTrainedTokenizerBase

from data_templates.segments import Message
from finetune.data.report import DataReport
from finetune.data.tokenizer_probes import tokenize_batch
from finetune.recipe.visible_text import code_point

PIECE = 1 << 20
"""Characters that are counted at a time, in 12 bytes each."""
NAMED = 5
"""Characters that the report names of each kind."""
CONTEXT = 40
"""Characters of a word before and after a character in doubt."""
UNKNOWN, REMOVED, REPLACED = "become {unk}", "are removed by the tokenizer", "are replaced by the tokenizer"
LABELS = {kind: f"with characters that {kind}" for kind in (UNKNOWN, REMOVED, REPLACED)}


@dataclass(frozen=True, slots=True)
class _Loss:
    """What becomes of a character: the kind of its loss, and the text that replaces it."""

    kind: str
    replacement: str = ""


@dataclass
class LostCharacters:
    """Counts of the characters that a tokenizer loses, over chunks of rows."""

    tokenizer: PreTrainedTokenizerBase
    counts: dict[str, int] = field(default_factory=dict)
    tested: dict[str, _Loss | None] = field(default_factory=dict)

    def add(self, rows: Iterable[tuple[str, Sequence[Message]]], report: DataReport) -> None:
        """Count the characters of rows, given with their locations; ``report`` counts rows that lose some."""
        located = [(location, _texts(messages)) for location, messages in rows]
        lost = self._lost_in([text for _, texts in located for text in texts])
        if not lost:
            return
        pattern = re.compile(f"[{re.escape(''.join(lost))}]")
        for location, texts in located:
            characters = {character for text in texts for character in pattern.findall(text)}
            kinds = {lost[character].kind for character in characters}
            for kind in sorted(kinds):
                report.count(LABELS[kind].format(unk=self.tokenizer.unk_token), location)

    def notes(self) -> list[str]:
        """Return one line per kind of loss: the characters with their counts, the most frequent first."""
        lines = []
        for kind in (UNKNOWN, REMOVED, REPLACED):
            counts = {c: n for c, n in self.counts.items() if (loss := self.tested[c]) and loss.kind == kind}
            if not counts:
                continue
            order = sorted(counts, key=lambda character: (-counts[character], character))
            names = [f"{self._name(character)} {counts[character]:,}" for character in order[:NAMED]]
            names += [f"{len(order) - NAMED:,} others"] if len(order) > NAMED else []
            label = kind.format(unk=self.tokenizer.unk_token)
            lines.append(f"characters that {label}: {sum(counts.values()):,} ({', '.join(names)})")
        return lines

    def _name(self, character: str) -> str:
        loss = self.tested[character]
        by = f" by {' '.join(map(code_point, loss.replacement))}" if loss and loss.replacement else ""
        return f"{code_point(character)}{by}"

    def _lost_in(self, texts: list[str]) -> dict[str, _Loss]:
        """Return the lost characters of texts, and add their counts."""
        # Line feeds keep the words of different texts apart; they are not counted.
        text, totals = "\n".join(texts), {"\n": 1 - len(texts)}
        for start in range(0, len(text), PIECE):
            codes = np.frombuffer(text[start : start + PIECE].encode("utf-32-le", "surrogatepass"), np.uint32)
            counts = np.bincount(codes)
            for code in np.flatnonzero(counts).tolist():
                totals[chr(code)] = totals.get(chr(code), 0) + int(counts[code])
        totals = {character: number for character, number in totals.items() if number > 0}
        self._test([character for character in totals if character not in self.tested], text)
        lost = {character: loss for character in totals if (loss := self.tested[character])}
        for character in lost:
            self.counts[character] = self.counts.get(character, 0) + totals[character]
        return lost

    def _test(self, characters: list[str], text: str) -> None:
        """Tokenize characters between letters, and those that get lost there in their first word."""
        # Alone, a character at the start or the end of a text may be stripped.
        anchors = ["b" if character == "a" else "a" for character in characters]
        probes = [
            f"{anchor}{character}{anchor}" for character, anchor in zip(characters, anchors, strict=True)
        ]
        decoded = self._round_trip(probes)
        for character, anchor, probe, (result, has_unknown) in zip(
            characters, anchors, probes, decoded, strict=True
        ):
            self.tested[character] = None
            if _is_kept(character, probe, result):
                continue
            word = _first_word(text, character)
            [(in_word, _)] = self._round_trip([word])
            if _is_kept(character, word, in_word):
                continue
            replacement = result.strip().removeprefix(anchor).removesuffix(anchor)
            kind = UNKNOWN if has_unknown else REPLACED if replacement else REMOVED
            self.tested[character] = _Loss(kind, replacement if kind == REPLACED else "")

    def _round_trip(self, texts: list[str]) -> list[tuple[str, bool]]:
        """Return each text as it is after tokenization, without <unk>, and whether it has <unk>."""
        unk_id, unk = self.tokenizer.unk_token_id, self.tokenizer.unk_token
        results = []
        for ids in tokenize_batch(self.tokenizer, texts):
            known = [token for token in ids if unk is None or token != unk_id]
            text = str(self.tokenizer.decode(known, clean_up_tokenization_spaces=False))
            results.append((text, len(known) < len(ids)))
        return results


def _is_kept(character: str, text: str, decoded: str) -> bool:
    """Return True if a text has a character as often after tokenization, or its canonical equivalent."""
    if decoded.count(character) >= text.count(character):
        return True
    composed, expected = (unicodedata.normalize("NFC", value) for value in (decoded, text))
    return expected in composed


def _first_word(text: str, character: str) -> str:
    """Return the start of the text's first word with a character, or what surrounds a space."""
    position = text.index(character)
    before, after = text[max(0, position - CONTEXT) : position], text[position + 1 : position + 1 + CONTEXT]
    if character.isspace():
        return f"{before}{character}{after}"
    # Not `split()`, which returns nothing for a text of spaces.
    return "".join((re.split(r"\s", before)[-1], character, re.split(r"\s", after)[0]))


def _texts(messages: Sequence[Message]) -> list[str]:
    return [
        text for turn in messages for text in (turn.content, turn.context, turn.reasoning, turn.tool_calls)
    ]
