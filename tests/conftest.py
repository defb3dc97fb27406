"""What all tests share: a tiny base written to a folder, a few rows, and a cache that is thrown away."""

import functools
import gc
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
# DeepSpeed compiles for the CPU once a machine, not once a session with a cache of its own.
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(CACHE / "torch_extensions"))
if "PYTEST_XDIST_WORKER" in os.environ:  # several processes: one core each, or they wait for one another
    os.environ["OMP_NUM_THREADS"] = "1"
os.fsync = lambda file: None  # for power cuts; the processes that tests kill have the real one
ROOT = Path(__file__).parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"
"""Published data beside a developer's checkout; tests that want it skip where it is absent."""

frozen = 0
"""How many modules were imported at the last freeze."""
DRAWN: dict[str, Callable[..., str]] = {}
"""The functions that draw a report's figures, by name."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--renew-golden", action="store_true", help="write tests/golden_losses/*.json anew")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest: a worker that comes to it last works alone for two minutes."""
    items.sort(key=lambda item: item.path.name != "test_notebooks.py")


def pytest_collection_finish() -> None:
    """Leave what is imported to no search for garbage: every training asks for one, 0.3 s each."""
    freeze()
    if "jinja2" in sys.modules:  # PEFT writes a model card at every save, and compiles its template
        import jinja2

        jinja2.Environment.compile = functools.cache(jinja2.Environment.compile)


def freeze() -> None:
    global frozen
    frozen = len(sys.modules)
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Let figures of reports be drawn for tests marked ``plots`` only: a seventh of a short run's time."""
    if "finetune.training.report" not in sys.modules:  # nothing that is collected writes one
        return
    from finetune.training import report

    if len(sys.modules) > frozen + 50:  # libraries that the first training has imported
        freeze()
    for name in ("figure_svg", "_curve_svg"):
        DRAWN.setdefault(name, getattr(report, name))
    draw_figures(item.get_closest_marker("plots") is not None)


def draw_figures(drawn: bool) -> None:
    from finetune.training import report

    for name, function in DRAWN.items():
        setattr(report, name, function if drawn else _empty_svg)


def _empty_svg(*_: object) -> str:
    return "<svg></svg>"


@pytest.fixture(scope="session")
def figures() -> Callable[[], AbstractContextManager[None]]:
    """Return a context in which figures are drawn, for runs that several tests read."""

    @contextmanager
    def drawn() -> Iterator[None]:
        draw_figures(True)
        yield
        draw_figures(False)

    return drawn


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session", autouse=True)
def _no_lines_of_slow_machines() -> None:
    """On a busy machine a command would say what it is doing, between the lines that tests compare."""
    from finetune.recipe import console

    console.SILENCE = 3600.0


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an Alpaca file of 48 little sums, of different lengths."""
    rows = [
        {
            "instruction": "Add the numbers." + " Please." * (i % 5),
            "input": f"{i} {i % 7}",
            "output": str(i + i % 7),
        }
        for i in range(48)
    ]
    path = tmp_path_factory.mktemp("rows") / "sums.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a random two-layer Llama, widths multiples of 64, and a byte-level tokenizer."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from data_templates.alpaca import ALPACA_PREAMBLE, ALPACA_PREAMBLE_WITH_INPUT

    folder = tmp_path_factory.mktemp("base")
    bpe = ByteLevelBPETokenizer()
    headings = "### Instruction:\n### Input:\n### Response: Add the numbers."
    text = f"{ALPACA_PREAMBLE}\n\n{ALPACA_PREAMBLE_WITH_INPUT}\n\n{headings}"
    bpe.train_from_iterator([text] * 4, vocab_size=500)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer)
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"})
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
