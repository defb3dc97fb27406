"""Benchmark of data preparation against TRL: from a JSON Lines file to token ids and loss masks.

    make bench-data ARGS=...      or      python -m benchmarks.data --rows 50000

Synthetic conversations of one turn, made from the bundled stories, with a ChatML template and loss on the
reply. Contenders: llm-align, on its first and on its second start; TRL's SFTTrainer, which reads the file
with `datasets`, renders and tokenizes each row with `datasets.map`, in one process or in one per core. Every
contender runs in a fresh process with empty caches; the time begins when the libraries are loaded.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import datasets
import numpy as np
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from benchmarks.common import RESULTS_DIR, environment_metadata, peak_memory_gib, save_result, times_slower
from finetune.data.dataset import prepare_conversations
from finetune.data.tokens import Encoder
from finetune.recipe.settings import DataSettings

STORIES = "recipes/tiny/data/sft_train.jsonl"
TOKENIZER = "recipes/tiny/model"
CONTENDERS = ("native", "trl", "trl-all-cores")
CHATML_WITH_MASK = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}{{ '\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"
)
"""ChatML with the marks that TRL derives its loss mask from."""


def write_rows(path: Path, rows: int, tokens: int) -> None:
    """Write conversations of about ``tokens`` tokens."""
    texts = [json.loads(line)["output"] for line in Path(STORIES).read_text(encoding="utf-8").splitlines()]
    rng = np.random.default_rng(0)
    with path.open("w", encoding="utf-8") as stream:
        for index in range(rows):
            stream.write(json.dumps({"messages": _conversation(texts, tokens, index, rng)}) + "\n")


def _conversation(
    texts: list[str], tokens: int, index: int, rng: np.random.Generator
) -> list[dict[str, str]]:
    # The stories have about 3.2 characters per token of the bundled tokenizer.
    length = int(3.2 * tokens)
    start = int(rng.integers(len(texts)))
    text = ""
    while len(text) < length:
        text += texts[start % len(texts)] + " "
        start += 1
    text = text[:length]
    return [
        {"role": "user", "content": f"Story {index}: {text[: len(text) // 4]}"},
        {"role": "assistant", "content": text[len(text) // 4 :]},
    ]


def prepare_native(path: Path) -> dict[str, Any]:
    """Prepare with llm-align; the cache is where XDG_CACHE_HOME says."""
    encoder = Encoder(AutoTokenizer.from_pretrained(TOKENIZER), "chatml")
    start = time.perf_counter()
    data = prepare_conversations(
        DataSettings(source=str(path), template="chatml"), encoder, max_length=1024, seed=0
    )
    seconds = time.perf_counter() - start
    arrays = data.train.arrays
    held_bytes = sum(values.nbytes for values in arrays.values())
    return {
        "seconds": seconds,
        "tokens": data.train.num_tokens,
        "bytes_per_token": held_bytes / data.train.num_tokens,
        "from_cache": data.report.from_cache,
    }


def prepare_trl(path: Path, processes: int | None) -> dict[str, Any]:
    """Prepare with TRL's SFTTrainer; the cache is where HF_HOME says."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.chat_template = CHATML_WITH_MASK
    model = AutoModelForCausalLM.from_pretrained(TOKENIZER)
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            folder,
            assistant_only_loss=True,
            max_length=1024,
            dataset_num_proc=processes,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        start = time.perf_counter()
        rows = datasets.load_dataset("json", data_files=str(path), split="train")
        trainer = SFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer)
        seconds = time.perf_counter() - start
        tokens = sum(map(len, trainer.train_dataset["input_ids"]))
    return {"seconds": seconds, "tokens": tokens}


def run_fresh(contender: str, path: Path, cache: str) -> dict[str, Any]:
    """Run a contender in a process of its own with the caches in a folder."""
    environment = os.environ | {"XDG_CACHE_HOME": cache, "HF_HOME": cache, "HF_DATASETS_CACHE": f"{cache}/ds"}
    command = [sys.executable, "-m", "benchmarks.data", "--only", contender, "--file", str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(done.stderr[-3000:])
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {"contender": contender, **result}


def measure(path: Path, repeats: int, contenders: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Yield each run; llm-align's is followed by its second start."""
    for repeat in range(repeats):
        # Alternating order, so that a drift of the machine hits all contenders alike.
        for contender in contenders if repeat % 2 == 0 else reversed(contenders):
            with tempfile.TemporaryDirectory() as cache:
                yield {"repeat": repeat, **run_fresh(contender, path, cache)}
                if contender == "native":
                    second = run_fresh(contender, path, cache)
                    yield {"repeat": repeat, **second, "contender": "native-second-start"}


@click.command()
@click.option("--rows", default=20_000, show_default=True)
@click.option("--tokens", default=200, show_default=True, help="Tokens per row, about.")
@click.option("--repeats", default=3, show_default=True)
@click.option("--native-only", is_flag=True, help="Without TRL.")
@click.option("--only", type=click.Choice(CONTENDERS), help="Prepare --file with one contender.")
@click.option("--file", type=click.Path(path_type=Path))
@click.option("--save", is_flag=True, help=f"Write the result to {RESULTS_DIR.name}/.")
def main(
    rows: int, tokens: int, repeats: int, native_only: bool, only: str | None, file: Path | None, save: bool
) -> None:
    """Measure, and print the ratios on the last line."""
    if only:
        assert file is not None
        processes = os.cpu_count() if only == "trl-all-cores" else None
        result = prepare_native(file) if only == "native" else prepare_trl(file, processes)
        click.echo(json.dumps({**result, "peak_memory_gib": round(peak_memory_gib(), 3)}))
        return
    contenders = CONTENDERS[:1] if native_only else CONTENDERS
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        write_rows(path, rows, tokens)
        for run in measure(path, repeats, contenders):
            runs.append({**run, "rows_per_second": round(rows / run["seconds"])})
            click.echo(json.dumps(runs[-1]))
        size = path.stat().st_size
    firsts = [run for run in runs if run["contender"] in contenders]
    ratios = times_slower(firsts, contenders)
    if save:
        metadata = environment_metadata(bfloat16=False)
        save_result(
            "data", {**metadata, "rows": rows, "file_bytes": size, "times_slower": ratios, "runs": runs}
        )
    click.echo(
        "time of others / native: " + ", ".join(f"{name} {value:.2f}x" for name, value in ratios.items())
    )


if __name__ == "__main__":
    main()
