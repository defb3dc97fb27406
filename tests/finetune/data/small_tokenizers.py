"""Small real tokenizers, trained on a few lines: one of each kind that base models use."""

import json
from functools import lru_cache

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

LINES = [
    "Below is an instruction that describes a task.",
    "Write a response that appropriately completes the request.",
    "### Instruction:\nAdd the numbers.\n\n### Input:\n2, 3\n\n### Response: The sum is 5.",
    "A chat between a curious user and an artificial intelligence assistant. USER: hello ASSISTANT: Hello!",
    "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWhat is it? [/INST] It is a question.",
    "### 질문: 더하면 얼마인가요?\n\n### 맥락: 2, 3\n\n### 답변: 다섯입니다.",
    "system user assistant the and of to in a is that for it as was with be by on not he his but at are this",
    "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ 0123456789 .,;:!?'\"()[]{}<>|/#@%&*+-=_~^`\\$",
] * 3

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _byte_level(special):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(LINES, trainer)
    return backend


def _prepend(backend, token):
    special = [(token, backend.token_to_id(token))]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A $B", special_tokens=special
    )


def qwen():
    """Byte-level BPE with ChatML's tokens and no BOS: Qwen, SmolLM."""
    backend = _byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    )


def gpt2():
    """Byte-level BPE with one special token, both BOS and EOS, and never added: GPT-2."""
    backend = _byte_level(["<|endoftext|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )


def llama3():
    """Byte-level BPE that adds BOS; turns are marked by unnamed special tokens: Llama-3."""
    special = [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    ]
    backend = _byte_level(special)
    _prepend(backend, "<|begin_of_text|>")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>"
    )


def llama2():
    """BPE with spaces as ▁, one before every text, byte fallback, BOS: Llama-2."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    # A line feed is a byte there, never part of a longer token.
    lines = [line.replace("\n", " ") for line in LINES]
    trained.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=400, show_progress=False))
    state = json.loads(trained.to_str())["model"]
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = [token for token in state["vocab"] if token not in special]
    vocabulary = {token: index for index, token in enumerate([*special, *words])}
    merges = [tuple(merge) for merge in state["merges"]]
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")])
    _prepend(backend, "<s>")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def unigram():
    """Unigram with spaces as ▁, and a named BOS that is never added: like T5."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator([*LINES, *(chr(code) for code in range(33, 127)), "\n \t"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


MAKERS = {maker.__name__: maker for maker in (qwen, gpt2, llama3, llama2, unigram)}


@lru_cache
def tokenizer(name):
    """Return a tokenizer by name; cached."""
    return MAKERS[name]()
