"""PEFT's published GPU memory of 17 settings, next to their program on fake tensors and the planner's share.

python -m benchmarks.peft_memory    all, in 10 minutes; writes benchmarks/results/peft-memory-<date>.json

Their program (huggingface/peft, method_comparison/MetaMathQA/run.py) trains Llama-3.2-3B in bfloat16 without
autocast on 4 rows, and reports ``torch.cuda.max_memory_reserved()``: segments of the caching allocator, not
tensors. It empties the cache every 10 steps, and its longest rows come right after that. Here their training
step runs on fake tensors with the same adapter, and its allocations are replayed through the allocator's
algorithm. The rows' length is not published: ``ROW_TOKENS`` is what explains the first setting alone.
"""

import gc
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

import peft
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.caching_allocator import CachingAllocator
from benchmarks.common import RESULTS_DIR
from benchmarks.fake_memory import (
    FREED,
    MemoryCase,
    StorageLedger,
    answer_zero_for_meta,
    materialize,
    measure_step,
)
from benchmarks.memory import config_shape
from finetune.planner.memory import allocator_bytes
from finetune.planner.static_memory import static_memory
from finetune.planner.train_step import simulate_train_step

LLAMA_3B = config_shape(
    "llama", 3072, 8192, 28, heads=24, num_key_value_heads=8, head_dim=128, vocab_size=128256
) | {"tie_word_embeddings": True, "max_position_embeddings": 131072}
ROWS, ROW_TOKENS, SHORT_ROW_TOKENS = 4, 693, 110
"""Rows of their micro-batch; tokens of the longest rows, and of the shortest ones, which come before them."""
EMPTY_CACHE = (0, -2)
"""The event of a call of ``torch.cuda.empty_cache``."""
GIB = 2**30
SECTION_HEADER = """
## PEFT's benchmark: what a GPU reserves

PEFT publishes `torch.cuda.max_memory_reserved()` of Llama-3.2-3B on an L40S with many adapters
(huggingface/peft at 5d602fd, method_comparison/MetaMathQA/results; PyTorch 2.13). Their program is not ours:
it runs without autocast, computes logits at all positions, and full fine-tuning stores weights and AdamW's
moments in bfloat16. So their training step was run on fake tensors (`python -m benchmarks.peft_memory`). What
is compared is their tensors plus the planner's share for the allocator. The replay puts each allocation of
that step through the allocator's own algorithm (`benchmarks/caching_allocator.py`). Their longest rows are
not published: {tokens} tokens are what explains `{fitted}`, and all other rows of the table are predictions.
Errors are in percent of the published figure. The last column is our own step with the same adapter: the
plan's tensors in percent of those on fake tensors.

| {columns} |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""
COLUMNS = (
    *("setting", "published, GiB", "tensors", "with the share", "error of tensors", "error with the share"),
    *("error of the replay", "our step"),
)
SECTION_FOOTER = """
* The peak of a prefix of 200 is not in a training step: it is 1.3 GiB above that of a prefix of 50, while
  the published 99th percentile over the training steps is only 0.2 GiB higher. The figure includes their
  evaluation, which generates for 50 rows at once; PEFT expands the prefix to all of them in float32
  (2.1 GiB), and casts it then.
* Full fine-tuning has the largest share. AdamW's temporaries are as large as the weights (6.0 GiB), and the
  blocks that activations leave do not fit them. Its part of the share was chosen by this row and its replay.
* Without a call of `torch.cuda.empty_cache()` every 10 steps, which their program has, rows of other lengths
  leave more fragments.
"""
QV, MLP = ["q_proj", "v_proj"], ["up_proj", "gate_proj", "down_proj"]
CAUSAL = {"task_type": "CAUSAL_LM"}


@dataclass(frozen=True)
class PublishedRun:
    """One result of PEFT's benchmark.

    Attributes:
        name: of its file in method_comparison/MetaMathQA/results, without "--llama-3.2-3B".
        published: bytes: ``accelerator_memory_max``.
        trainable: published number of trained parameters.
        config: PEFT's class and its settings; "" for full fine-tuning.
        adapter: our adapter with the same settings.
    """

    name: str
    published: int
    trainable: int
    config: tuple[str, Mapping[str, Any]]
    adapter: Mapping[str, Any] = field(default_factory=dict)


def _lora(rank: int, target: list[str], **options: bool) -> tuple[str, dict[str, Any]]:
    return "LoraConfig", {"r": rank, "lora_alpha": 2 * rank, "target_modules": target, **options}


def _ours(method: str, rank: int = 32, target: list[str] = QV) -> dict[str, Any]:
    return {"method": method, "rank": rank, "target": target, "dropout": 0.0}


PUBLISHED_RUNS = (
    PublishedRun("lora-rank32", 22292725760, 9175040, _lora(32, QV), _ours("lora")),
    PublishedRun("lora-rank64", 22552772608, 18350080, _lora(64, QV), _ours("lora", 64)),
    PublishedRun(
        "lora-rank64-rslora", 22561161216, 18350080, _lora(64, QV, use_rslora=True), _ours("rslora", 64)
    ),
    PublishedRun("lora-rank10-target-mlp", 24698159104, 9461760, _lora(10, MLP), _ours("lora", 10, MLP)),
    PublishedRun("lora-rank32-dora", 24532484096, 9289728, _lora(32, QV, use_dora=True), _ours("dora")),
    PublishedRun(
        "adalora-rank32",
        22781362176,
        18353664,
        ("AdaLoraConfig", {"r": 64, "init_r": 64, "target_r": 32, "total_step": 5000, "target_modules": QV}),
        _ours("adalora") | {"init_rank": 64},
    ),
    PublishedRun(
        "ia3-default",
        23234347008,
        286720,
        (
            "IA3Config",
            {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
        ),
        {"method": "ia3"},
    ),
    PublishedRun(
        "oft-rank32",
        22332571648,
        8171520,
        ("OFTConfig", {"r": 32, "oft_block_size": 0, "target_modules": QV, "use_cayley_neumann": True}),
    ),
    PublishedRun(
        "vera-default",
        21621637120,
        129024,
        ("VeraConfig", {"r": 256, "target_modules": QV}),
        {"method": "vera", "rank": 256, "target": QV},
    ),
    PublishedRun(
        "ln_tuning-default",
        21181235200,
        175104,
        ("LNTuningConfig", {"target_modules": ["input_layernorm", "post_attention_layernorm", "norm"]}),
        {"method": "layernorm"},
    ),
    PublishedRun(
        "prefixtuning-lr_0.001",
        21952987136,
        11468800,
        ("PrefixTuningConfig", {"num_virtual_tokens": 200}),
        {"method": "prefix", "virtual_tokens": 200},
    ),
    PublishedRun(
        "prefixtuning-tokens50-init_prefix-lr_0.005",
        20585644032,
        2867200,
        ("PrefixTuningConfig", {"num_virtual_tokens": 50}),
        {"method": "prefix", "virtual_tokens": 50},
    ),
    PublishedRun(
        "prompt_tuning-default",
        24394072064,
        614400,
        ("PromptTuningConfig", {"num_virtual_tokens": 200}),
        {"method": "prompt", "virtual_tokens": 200},
    ),
    PublishedRun(
        "ptuning-default",
        20921188352,
        28382208,
        ("PromptEncoderConfig", {"num_virtual_tokens": 20, "encoder_hidden_size": 3072}),
        {"method": "ptuning", "virtual_tokens": 20, "encoder_hidden_size": 3072},
    ),
    PublishedRun(
        "trainable_tokens-sos+eos",
        20937965568,
        6144,
        (
            "TrainableTokensConfig",
            {"token_indices": [128000, 128001], "target_modules": "model.embed_tokens"},
        ),
        {"method": "trainable_tokens", "tokens": [128000, 128001]},
    ),
    PublishedRun(
        "adaptionprompt-lr_0.0005",
        22456303616,
        8601628,
        ("AdaptionPromptConfig", {"adapter_len": 100, "adapter_layers": 28, "target_modules": "self_attn"}),
        {"method": "llama_adapter", "virtual_tokens": 100, "layers": 28},
    ),
    PublishedRun("full-finetuning-lr_0.00001", 38868615168, 3212749824, ("", {}), {"method": "full"}),
)


@dataclass(frozen=True)
class MeasuredRun:
    """Bytes of their step, and of ours with the same adapter and rows, on fake tensors.

    Attributes:
        name: of the published run.
        trainable: trained parameters.
        static: weights and optimizer states.
        requested: peak of all tensors.
        reserved: peak of the allocator's segments in the replay.
        step_workspace: temporaries of AdamW: one tensor of the size of all trained weights.
        ours: peak of our step's tensors without the optimizer step's temporaries; 0 where a setting differs.
    """

    name: str
    trainable: int
    static: int
    requested: int
    reserved: int
    step_workspace: int
    ours: int


def our_case(run: PublishedRun) -> MemoryCase:
    """Return our training step with a run's adapter and rows."""
    sizes: dict[str, Any] = {"rows": ROWS, "seq_len": ROW_TOKENS, "predicted": ROWS * (ROW_TOKENS - 1)}
    return MemoryCase(run.name, LLAMA_3B, dict(run.adapter), masked=True, **sizes)


def measure_run(run: PublishedRun) -> MeasuredRun:
    """Run two of their steps on fake tensors, replay them, and run one of ours."""
    model, ledger = _build(run), StorageLedger(ROW_TOKENS)
    with FakeTensorMode(allow_non_fake_inputs=True), ledger:
        materialize(model)
        gc.collect()
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        # foreach: PyTorch's default on a GPU.
        optimizer = torch.optim.AdamW(weights, lr=1e-4, weight_decay=0.1, foreach=True)
        loaded = ledger.live
        outputs: Any = None
        for tokens in (SHORT_ROW_TOKENS, ROW_TOKENS):
            ledger.events.append(EMPTY_CACHE)
            ids = torch.zeros(ROWS, tokens, dtype=torch.long)
            batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
            optimizer.zero_grad()
            # As in their loop, the outputs of a step, logits included, are alive during the next one.
            outputs = model(**batch, num_items_in_batch=ROWS * tokens)
            outputs.loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
            optimizer.step()
        weight_bytes = sum(weight.nbytes for weight in weights)
    del outputs
    allocator = replay(ledger.events)
    return MeasuredRun(
        name=run.name,
        trainable=sum(weight.numel() for weight in weights),
        static=loaded + 2 * weight_bytes,
        requested=allocator.peak_requested,
        reserved=allocator.peak_reserved,
        step_workspace=weight_bytes,
        ours=_measure_ours(run) if run.adapter else 0,
    )


def replay(events: list[tuple[int, int]]) -> CachingAllocator:
    """Replay recorded allocations through the allocator."""
    allocator = CachingAllocator()
    for event in events:
        if event == EMPTY_CACHE:
            allocator.empty_cache()
        elif event[1] == FREED:
            allocator.free(event[0])
        else:
            allocator.allocate(*event)
    return allocator


def _build(run: PublishedRun) -> nn.Module:
    class_name, settings = run.config
    with torch.device("meta"), answer_zero_for_meta():
        config = AutoConfig.for_model(**LLAMA_3B)
        base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
        base.train()
        if not class_name:
            return base
        model: nn.Module = peft.get_peft_model(base, getattr(peft, class_name)(**settings, **CAUSAL)).train()
        return model


def _measure_ours(run: PublishedRun) -> int:
    measured = measure_step(our_case(run))
    return measured.loaded + measured.states + measured.pass_peak


def load_results() -> list[tuple[PublishedRun, MeasuredRun]]:
    """Return the published runs with their latest measurements."""
    content = json.loads(max(RESULTS_DIR.glob("peft-memory-*.json")).read_text())
    measured = {one["name"]: MeasuredRun(**one) for one in content["runs"]}
    return [(run, measured[run.name]) for run in PUBLISHED_RUNS]


def planned_reserved(measured: MeasuredRun) -> int:
    """Return the peak of their step with the planner's share for the allocator."""
    transient = measured.requested - measured.static
    return measured.requested + allocator_bytes(transient, measured.step_workspace)


def planned_tensors(run: PublishedRun) -> int:
    """Return the planner's peak of our step's tensors, for a CPU, as fake tensors are."""
    workload = our_case(run).workload
    static, tape = static_memory(workload), simulate_train_step(workload, in_place=False)
    return static.base + static.adapter + static.optimizer + tape.peak


def published_section() -> str:
    """Return the section of PUBLISHED.md."""
    lines = [
        SECTION_HEADER.format(tokens=ROW_TOKENS, fitted=PUBLISHED_RUNS[0].name, columns=" | ".join(COLUMNS))
    ]
    for run, measured in load_results():
        planned = planned_reserved(measured)
        sizes = [f"{nbytes / GIB:.2f}" for nbytes in (run.published, measured.requested, planned)]
        errors = [_percent(size, run.published) for size in (measured.requested, planned, measured.reserved)]
        ours = _percent(planned_tensors(run), measured.ours) if run.adapter else "-"
        lines.append("| " + " | ".join([run.name, *sizes, *errors, ours]) + " |\n")
    return "".join(lines) + SECTION_FOOTER


def _percent(planned: int, actual: int) -> str:
    percent = round(100 * (planned / actual - 1), 1)
    return f"{percent:+.1f}" if percent else "0.0"


def main() -> None:
    """Measure all runs, and write the results."""
    path = RESULTS_DIR / f"peft-memory-{datetime.now(UTC):%Y-%m-%d}.json"
    measured = []
    for run in PUBLISHED_RUNS:
        measured.append(measure_run(run))
        print(measured[-1], f"published {run.published}", flush=True)
        content = {"peft": peft.__version__, "torch": torch.__version__, "row_tokens": ROW_TOKENS}
        path.write_text(json.dumps(content | {"runs": [asdict(one) for one in measured]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
