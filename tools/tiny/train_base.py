"""Pretrain the bundled base model on generated text: `python -m tools.tiny.train_base --out FOLDER`."""

import argparse
import sys
import time
from collections import deque
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from statistics import fmean

import torch
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from tools.tiny import words
from tools.tiny.corpus import POLISH, Corpus
from tools.tiny.tokenizer import MAX_LENGTH, VOCAB_SIZE, train_tokenizer

PRETRAIN_SEED = 20261121
TOKENIZER_DOCUMENTS = 60_000
LEXICON_REPEATS = 250
STEPS, POLISH_STEPS = 2000, 250
POLISH_LR_FACTOR = 0.4
SEQUENCE_LENGTH = MAX_LENGTH
BATCH_SIZE = 8
WARMUP_STEPS = 60
MUON_LR, ADAMW_LR = 5e-3, 4e-3
LOG_EVERY = 50
SAMPLE_PROMPTS = (
    "The opposite of hot is",
    "7 plus 8 is",
    "The Korean word for cat is",
    'In reverse order, "sun cat red" is',
    "Sorted from small to large, 9 3 5 becomes",
    "프랑스의 수도는",
    "A story about Mina and a red ball\n\nMina",
)


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Build the untrained model; every width is a multiple of 64, which 4-bit (NF4) layers need."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def lexicon_texts() -> list[str]:
    """Return the lexicon's words, repeated, with and without leading space, so that both become one token."""
    nouns = [word_form for n in words.NOUNS + words.OTHER_NOUNS for word_form in (n.word, n.korean)]
    pairs = words.OPPOSITES + words.OPPOSITES_KOREAN + words.VERBS + words.CAPITALS + words.SOUNDS
    lexicon = [*nouns, *(word_form for pair in pairs for word_form in pair)]
    return [f"{word} {word}" for word in sorted(set(lexicon)) for _ in range(LEXICON_REPEATS)]


def token_stream(tokenizer: PreTrainedTokenizerFast, corpus: Corpus) -> Iterator[int]:
    """Yield an endless stream of token ids: BOS, text, EOS per document."""
    while True:
        for ids in tokenizer(list(corpus.documents(1000)))["input_ids"]:
            yield from ids
            yield tokenizer.eos_token_id


def optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of the layers, AdamW for embeddings and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=MUON_LR, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=ADAMW_LR, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def lr_factor(step: int, steps: int) -> float:
    """Return the learning rate factor: warmup, constant, then linear decay to zero over the last half."""
    return min(1.0, (step + 1) / WARMUP_STEPS, 2.0 * (steps - step) / steps)


def train(model: LlamaForCausalLM, ids: Iterator[int], steps: int, *, peak_factor: float = 1.0) -> float:
    """Train with bfloat16 autocast over float32 weights; return the mean loss of the last LOG_EVERY steps."""
    opts = optimizers(model)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda step: peak_factor * lr_factor(step, steps)) for o in opts
    ]
    start, losses = time.perf_counter(), deque[float](maxlen=LOG_EVERY)
    for step in range(1, steps + 1):
        batch = torch.tensor(list(islice(ids, BATCH_SIZE * SEQUENCE_LENGTH))).view(
            BATCH_SIZE, SEQUENCE_LENGTH
        )
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(opts, schedules, strict=True):
            optimizer.step()
            schedule.step()
        model.zero_grad()
        losses.append(loss.item())
        if step % LOG_EVERY == 0 or step == steps:
            print_progress(step, steps, fmean(losses), time.perf_counter() - start)
    return fmean(losses)


def print_progress(step: int, steps: int, loss: float, seconds: float) -> None:
    tokens_per_second = step * BATCH_SIZE * SEQUENCE_LENGTH / seconds
    seconds_left = seconds / step * (steps - step)
    rate, remaining = f"{tokens_per_second:,.0f} tokens/s", f"{seconds_left / 60:.1f} min left"
    print(f"step {step}/{steps}  loss {loss:.4f}  {rate}  {remaining}", flush=True)


def continue_text(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: str, length: int = 40
) -> str:
    """Continue a text greedily until EOS or `length` new tokens."""
    inputs = tokenizer(text, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=length, do_sample=False)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write bfloat16 safetensors, tokenizer, config and generation config."""
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def pretrain_phase(folder: Path, steps: int, seed: int) -> None:
    """Train tokenizer and model on the broad mixture, and save both."""
    tokenizer = train_tokenizer(chain(Corpus(seed + 1).documents(TOKENIZER_DOCUMENTS), lexicon_texts()))
    model = build_model(tokenizer)
    threads = torch.get_num_threads()
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens, {threads} threads", flush=True)
    train(model, token_stream(tokenizer, Corpus(seed)), steps)
    save(model, tokenizer, folder)


def polish_phase(folder: Path, steps: int, seed: int) -> None:
    """Continue from the saved (bfloat16) weights with the polish mixture, save, and print continuations."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    loss = train(
        model, token_stream(tokenizer, Corpus(seed + 2, POLISH)), steps, peak_factor=POLISH_LR_FACTOR
    )
    save(model, tokenizer, folder)
    print(f"final loss {loss:.4f}; saved in {folder}")
    for sample_prompt in SAMPLE_PROMPTS:
        print(f"  {sample_prompt!r} -> {continue_text(model.eval(), tokenizer, sample_prompt)!r}")


def main(argv: list[str]) -> None:
    """Train in two phases; `--only-polish` runs only the second, from the weights in the folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("recipes/tiny/model"))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--polish-steps", type=int, default=POLISH_STEPS)
    parser.add_argument("--only-polish", action="store_true")
    parser.add_argument("--seed", type=int, default=PRETRAIN_SEED)
    options = parser.parse_args(argv)
    torch.manual_seed(options.seed)
    if not options.only_polish:
        pretrain_phase(options.out, options.steps, options.seed)
    polish_phase(options.out, options.polish_steps, options.seed)


if __name__ == "__main__":
    main(sys.argv[1:])
