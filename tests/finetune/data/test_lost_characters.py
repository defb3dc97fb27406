"""Characters that a tokenizer loses: counted by kind, named with their counts, located."""

import json

import pytest
from small_tokenizers import LINES, tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data_templates.segments import Message
from finetune.data.dataset import prepare_conversations
from finetune.data.documents import prepare_documents
from finetune.data.lost_characters import LostCharacters
from finetune.data.report import DataReport
from finetune.data.tokens import Encoder
from finetune.recipe.settings import DataSettings, DocumentSettings

SPECIAL = {"<unk>": 0, "<s>": 1, "</s>": 2}


def words(*known, normalizer=None, model="words"):
    """Return a tokenizer of words, or of characters, with a normalizer."""
    vocabulary = SPECIAL | {word: index for index, word in enumerate(dict.fromkeys(known), len(SPECIAL))}
    if model == "words":
        backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    else:
        backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
        backend.decoder = decoders.Fuse()
    if normalizer is not None:
        backend.normalizer = normalizer
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def letters(normalizer=None, extra=""):
    return words(*map(chr, range(32, 127)), *"\n\t", *extra, normalizer=normalizer, model="letters")


def lost(of, *texts):
    """Return the report's lines on texts, one row each."""
    report, characters = DataReport(), LostCharacters(of)
    rows = [(f"rows:{number}", [Message("user", text)]) for number, text in enumerate(texts, 1)]
    characters.add(rows, report)
    return [*characters.notes(), *report.lines()[1:]]


ACCENTS = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
CONTROLS = normalizers.BertNormalizer(clean_text=True, strip_accents=False, lowercase=False)
UNKNOWN, REMOVED, REPLACED = (
    "become <unk>",
    "are removed by the tokenizer",
    "are replaced by the tokenizer",
)
CASES = {
    "one unknown": (lambda: letters(), ["a한b", "한"], UNKNOWN, "2 (한 (U+D55C) 2)", 2),
    "several unknown": (
        lambda: letters(),
        ["éé 한 \u200b"],
        UNKNOWN,
        "4 (é (U+00E9) 2, U+200B 1, 한 (U+D55C) 1)",
        1,
    ),
    "many unknown": (
        lambda: letters(),
        ["αβγδεζη"],
        UNKNOWN,
        "7 (α (U+03B1) 1, β (U+03B2) 1, γ (U+03B3) 1, δ (U+03B4) 1, ε (U+03B5) 1, 2 others)",
        1,
    ),
    "an unknown control": (lambda: letters(), ["a\x1b[0m"], UNKNOWN, "1 (U+001B 1)", 1),
    "an unknown emoji": (lambda: letters(), ["😀a", "b😀😀"], UNKNOWN, "3 (😀 (U+1F600) 3)", 2),
    "a letter of <unk>'s name": (
        lambda: words(*map(chr, range(32, 117)), model="letters"),
        ["unk"],
        UNKNOWN,
        "1 (u (U+0075) 1)",
        1,
    ),
    "accents": (lambda: letters(ACCENTS), ["é", "à é"], REPLACED, "3 (é (U+00E9) by e (U+0065) 2, à", 2),
    "capitals": (
        lambda: letters(normalizers.Lowercase()),
        ["Add A"],
        REPLACED,
        "2 (A (U+0041) by a (U+0061) 2)",
        1,
    ),
    "full width": (
        lambda: letters(normalizers.NFKC()),
        ["Ａ1"],
        REPLACED,
        "1 (Ａ (U+FF21) by A (U+0041) 1)",
        1,
    ),
    "a ligature": (
        lambda: letters(normalizers.NFKC()),
        ["ﬁne"],
        REPLACED,
        "1 (ﬁ (U+FB01) by f (U+0066) i (U+0069) 1)",
        1,
    ),
    "controls": (
        lambda: letters(CONTROLS),
        ["a\x00\x1bb", "\u200bc"],
        REMOVED,
        "3 (U+0000 1, U+001B 1, U+200B 1)",
        2,
    ),
    "line feeds": (lambda: letters(CONTROLS), ["a\nb\n"], REPLACED, "2 (U+000A by U+0020 2)", 1),
    "soft hyphens": (
        lambda: letters(normalizers.Replace("\xad", "")),
        ["co\xadop", "no"],
        REMOVED,
        "1 (U+00AD 1)",
        1,
    ),
    "an unknown word": (
        lambda: words("hello", "you"),
        ["hello you", "hello x"],
        UNKNOWN,
        "1 (x (U+0078) 1)",
        1,
    ),
    "unigram": (lambda: tokenizer("unigram"), ["Hi é"], UNKNOWN, "1 (é (U+00E9) 1)", 1),
    "▁": (lambda: tokenizer("llama2"), ["a▁b"], REPLACED, "1 (▁ (U+2581) by U+0020 1)", 1),
}


@pytest.mark.parametrize("name", CASES)
def test_lost_characters_are_counted_named_and_located(name):
    make, texts, kind, named, num_rows = CASES[name]
    note, count = lost(make(), *texts)
    assert note.startswith(f"characters that {kind}: {named}")
    assert count.startswith(f"rows with characters that {kind}: {num_rows} (first: rows:")


KEPT = "한국어 é e\u0301 😀 \x1b\u200b\u202e\n\t ﬁ Ａ <unk> \U0010ffff"


@pytest.mark.parametrize("name", ["qwen", "gpt2", "llama3", "llama2"])
def test_tokenizers_with_bytes_lose_nothing(name):
    assert lost(tokenizer(name), KEPT) == []


@pytest.mark.parametrize("normalizer", [normalizers.NFC(), normalizers.NFD(), None])
def test_canonical_equivalents_are_no_loss(normalizer):
    assert (
        lost(letters(normalizer, extra="éẹ\u0301\u0323한ᄒ\u1161\u11ab"), "é e\u0301 e\u0301\u0323 한") == []
    )


def test_known_words_have_all_their_characters():
    assert lost(words("hello", "<s>x"), "hello hello") == []


def test_chunks_are_added_and_each_character_is_tested_once(monkeypatch):
    monkeypatch.setattr("finetune.data.lost_characters.PIECE", 3)
    characters, report = LostCharacters(letters()), DataReport()
    for chunk in range(3):
        characters.add([(f"rows:{chunk}", [Message("user", "한abcdefg한", context="é")])], report)
    assert characters.notes() == ["characters that become <unk>: 9 (한 (U+D55C) 6, é (U+00E9) 3)"]
    assert report.counts == {"with characters that become <unk>": 3}
    assert len(characters.tested) == 9


def settings_of(tmp_path, rows, kind=DataSettings, **values):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return kind(source=str(file), cache=False, **values)


def test_the_reports_of_conversations_and_documents_have_them(tmp_path):
    of = letters()
    rows = [{"prompt": "say é", "completion": "é\u200b"}, {"prompt": "a", "completion": "b"}]
    settings = settings_of(tmp_path, rows, template="plain")
    data = prepare_conversations(settings, Encoder(of, "plain"), max_length=64, seed=0)
    assert "characters that become <unk>: 3 (é (U+00E9) 2, U+200B 1)" in data.report.lines()
    assert f"rows with characters that become <unk>: 1 (first: {settings.source}:1)" in data.report.lines()
    # The tokens are those of the tokenizer: é is <unk>.
    assert data.train.arrays["input_ids"].tolist().count(0) == 3
    settings = settings_of(tmp_path, [{"text": LINES[5]}], DocumentSettings, template="plain", held_out=0)
    report = prepare_documents(settings, Encoder(of, "plain"), max_length=64, seed=0).report
    assert any(line.startswith("characters that become <unk>: ") for line in report.lines())
