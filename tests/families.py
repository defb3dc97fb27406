"""Toy models of transformers' families with random weights, and what llm-align does with each of them.

``pytest tests/test_families.py -m "slow or not slow" --renew-golden`` writes ``tools/docs/families.json``,
from which ``python -m tools.docs`` makes the table of the documentation.
"""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PretrainedConfig,
)

from align.api import load_recipe, load_tuned, run
from align.cli.runs import generate_once
from data_templates.segments import Message
from finetune.data.collate import LMExample, PackedCollator, PaddedCollator
from finetune.recipe.discovery import PROJECT
from finetune.recipe.errors import UserError
from finetune.training.architectures import mask_unsupported
from finetune.training.generation import generate_completions
from finetune.training.loaded_model import LoadedModel
from finetune.training.loss import completion_loss_sum, output_head
from finetune.training.merge import merge_run
from finetune.training.model import unwrap_model
from finetune.training.save import ADAPTER_WEIGHTS

TINY = PROJECT / "recipes" / "tiny" / "model"
"""The bundled base, whose tokenizer all toy models have."""
VOCABULARY = 4608
WORKS = "works"
ACTIONS = ("sft", "dpo", "merge", "chat")

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "embedding_size"), 64),
    **dict.fromkeys(("lru_width", "emb_dim", "attention_hidden_size"), 64),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "d_ff", "d_inner", "dff", "dim_ff"), 128),
    **dict.fromkeys(("ffn_hidden_size", "decoder_ffn_dim", "shared_intermediate_size"), 128),
    **dict.fromkeys(("mlp_hidden_size", "intermediate_size_mlp", "expert_ffn_hidden_size"), 128),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "dim_head"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 512),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "moe_top_k", "num_experts_per_token"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **{"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    **{"q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8},
    **{"v_head_dim": 16, "qk_head_dim": 16},
    **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}
"""Sizes of toy models by the keys of all config classes; each class gets those that it has."""

SSM = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 16}
LINEAR_ATTENTION = {
    "layer_types": ["linear_attention", "full_attention"],
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4},
    **{"linear_key_head_dim": 16, "linear_value_head_dim": 16},
}
OWN_SIZES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1], **SSM},
    "codegen": {"rotary_dim": 8},
    "deepseek_v2": {"num_key_value_heads": 4},
    "deepseek_v3": {"num_key_value_heads": 4},
    "dots1": {"layer_types": ["full_attention"] * 2, "n_shared_experts": 1},
    "falcon_h1": {"mamba_d_ssm": 128, **SSM},
    "falcon_mamba": {"state_size": 8},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        **{"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY},
        **{"num_kv_shared_layers": 0, "laurel_rank": 8, "activation_sparsity_pattern": [0.0, 0.0]},
    },
    "gemma4_text": {
        **{"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY},
        **{"global_head_dim": 16, "num_kv_shared_layers": 0},
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 32},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], **SSM},
    "jamba": {
        **{"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
        **{"expert_layer_offset": 1, "mamba_d_state": 8, "use_mamba_kernels": False},
    },
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "mamba": {"state_size": 8},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 8, "n_groups": 2, "chunk_size": 16},
    "qwen3_5_moe_text": LINEAR_ATTENTION,
    "qwen3_5_text": LINEAR_ATTENTION,
    "qwen3_next": LINEAR_ATTENTION,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "attention_window_size": 64},
    "xlstm": {"qk_dim_factor": 1.0, "v_dim_factor": 1.0},
    "zamba2": {
        **{"num_hidden_layers": 3, "layer_types": ["mamba", "hybrid", "mamba"], "hybrid_layer_ids": [1]},
        **{"mamba_d_state": 8, "n_mamba_heads": 8, "mamba_headdim": 16, "chunk_size": 16},
        **{"num_mem_blocks": 1, "adapter_rank": 8},
    },
    "zaya": {"num_experts_per_tok": 1},
}
"""Sizes that a family needs besides those of its keys."""

ZERO_SCALES = ("self_attn.A", "correct_output_scale")
"""Ends of the names of scales that doge and gemma3n initialize with zeros."""
DECODERS = (
    *("afmoe", "apertus", "arcee", "aria_text", "bamba", "biogpt", "bitnet", "bloom", "codegen", "cohere"),
    *("cohere2", "ctrl", "cwm", "deepseek_v2", "deepseek_v3", "diffllama", "doge", "dots1"),
    *(
        "ernie4_5",
        "ernie4_5_moe",
        "exaone4",
        "exaone_moe",
        "falcon",
        "falcon_h1",
        "falcon_mamba",
        "flex_olmo",
        "gemma",
    ),
    *("gemma2", "gemma3_text", "gemma3n_text", "gemma4_text", "glm", "glm4", "glm4_moe", "gpt2"),
    *("gpt_bigcode", "gpt_neo", "gpt_neox", "gpt_neox_japanese", "gpt_oss", "gptj", "granite", "granitemoe"),
    *("granitemoehybrid", "granitemoeshared", "helium", "hunyuan_v1_dense", "hunyuan_v1_moe", "jamba"),
    *("jetmoe", "lfm2", "lfm2_moe", "llama", "llama4_text", "mamba", "mamba2", "minimax", "ministral"),
    *("mistral", "mixtral", "modernbert-decoder", "mpt", "nanochat", "nemotron", "nemotron_h", "olmo"),
    *("olmo2", "olmo3", "olmo_hybrid", "olmoe", "openai-gpt", "opt", "persimmon", "phi", "phi3", "phimoe"),
    *(
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_5_text",
        "qwen3_moe",
        "qwen3_next",
        "recurrent_gemma",
        "rwkv",
        "seed_oss",
    ),
    *("smollm3", "solar_open", "stablelm", "starcoder2", "xglm", "xlstm", "zamba2"),
)
"""Families of ``MODEL_FOR_CAUSAL_LM_MAPPING_NAMES`` that are language models without an encoder."""
ENCODERS = ("bert", "camembert", "electra", "roberta", "roformer", "xlnet", "xlm-roberta")
"""Families of that mapping that attend to later tokens; they are refused once they are loaded."""
OTHERS = (
    *("bart", "blenderbot", "marian", "mbart", "pegasus", "t5", "umt5", "whisper", "vit", "clip", "dinov2"),
    *("llava", "qwen2_vl", "wav2vec2", "distilbert", "modernbert", "git", "mllama"),
)
"""Families that are refused by their config.json, before weights are loaded."""
VISION = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
VISION |= {"image_size": 28, "patch_size": 14}
PROJECTED = {"vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64}
WRAPPERS: dict[str, tuple[str, dict[str, Any]]] = {
    "fuyu": ("persimmon", {"vocab_size": VOCABULARY, "hidden_size": 64, "image_size": 28, "patch_size": 14}),
    "gemma3": ("gemma3_text", {"vision_config": VISION, "mm_tokens_per_image": 4}),
    "gemma4": ("gemma4_text", {"vision_config": None, "audio_config": None}),
    "llama4": ("llama4_text", {"vision_config": VISION | {"intermediate_size": 128} | PROJECTED}),
    "qwen3_5": (
        "qwen3_5_text",
        {"vision_config": {"depth": 1, "num_heads": 2, "hidden_size": 32, "out_hidden_size": 64}},
    ),
}
"""Models of images and text whose text model is trained: its type, and the sizes of the rest."""
FAMILIES = [*DECODERS, *WRAPPERS, *ENCODERS, *OTHERS]

ROWS = [
    {
        "instruction": f"Add {index} and {index % 3}." + " Please." * (index % 2),
        "output": str(index + index % 3),
    }
    for index in range(4)
]
PAIRS = [
    {"prompt": row["instruction"], "chosen": f"It is {row['output']}.", "rejected": "I do not know."}
    for row in ROWS
]
SETTINGS = {
    **{"train.max_steps": 3, "train.batch_size": 4, "train.micro_batch_size": 2, "train.learning_rate": 1e-2},
    **{"data.template": "plain", "data.max_length": 64, "data.held_out": 0, "data.cache": False},
    **{"model.precision": "float32", "evaluate.samples": 0},
}
PROMPTS = [[Message("user", "Add 1 and 2.")], [Message("user", "Add 1 and 2. Please, please, please.")]]
TOLERANCE = 1e-3
"""Difference of losses and logits that float32 and other orders of sums explain."""


def toy_config(model_type: str) -> PretrainedConfig:
    """Return a config of a family with two layers of width 64."""
    if model_type in WRAPPERS:
        text_type, sizes = WRAPPERS[model_type]
        return CONFIG_MAPPING[model_type](text_config=toy_config(text_type).to_dict(), **sizes)
    config_class = CONFIG_MAPPING[model_type]
    keys = {field.name for field in dataclasses.fields(config_class)}
    sizes = {key: value for key, value in SIZES.items() if key in keys}
    return config_class(**(sizes | OWN_SIZES.get(model_type, {})))


def save_toy(model_type: str, folder: Path) -> Path:
    """Save a family's toy model with the bundled tokenizer; of the refused families only the config."""
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    if model_type in OTHERS:
        AutoConfig.for_model(model_type).save_pretrained(folder)
        return folder
    torch.manual_seed(0)
    # As published, with the layers for images.
    auto_class = AutoModelForImageTextToText if model_type in WRAPPERS else AutoModelForCausalLM
    model = auto_class.from_config(toy_config(model_type)).float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # Some classes leave parameters uninitialized, which a checkpoint would fill.
            # Zeros that scale other weights' outputs would leave these without a gradient.
            is_zero_scale = name.endswith(ZERO_SCALES) and not weight.any()
            if is_zero_scale or not torch.isfinite(weight).all() or weight.abs().max() > 1e3:
                nn.init.normal_(weight, std=0.02)
            assert torch.isfinite(weight).all(), name
    model.save_pretrained(folder)
    return folder


def results_of(model_type: str, folder: Path) -> dict[str, str]:
    """Run each action on a family's toy model; return ``works``, or the message that refuses it."""
    base = save_toy(model_type, folder / "base")
    tuned = folder / "sft"
    results = {
        "sft": _attempt(lambda: train_toy("sft", base, tuned, ROWS)),
        "dpo": _attempt(lambda: train_toy("dpo", base, folder / "dpo", PAIRS)),
    }
    if results["sft"] == WORKS:
        results["chat"] = _attempt(lambda: _check_chat(tuned))
        results["merge"] = _attempt(lambda: _check_merged(tuned))
    shutil.rmtree(folder)
    return {action: results.get(action, "-") for action in ACTIONS}


def _attempt(action: Callable[[], None]) -> str:
    try:
        action()
    except UserError as error:
        return "; ".join(problem.actual for problem in error.problems)
    return WORKS


def train_toy(stage: str, base: Path, out: Path, rows: list[dict[str, Any]]) -> None:
    recipe = out.with_suffix(".yaml")
    recipe.write_text(f"stage: {stage}\ndata: {{source: rows.jsonl}}\n", encoding="utf-8")
    result = run(load_recipe(str(recipe), stage=stage, base=str(base), data=rows, out=out, settings=SETTINGS))
    saved = load_file(result.adapter / ADAPTER_WEIGHTS)
    trained = [value.any() for name, value in saved.items() if "lora_B" in name]
    assert len(trained) > 1 and all(trained), "a layer was not trained"


def _check_chat(tuned: Path) -> None:
    """Check that a run answers, alone and in a padded batch, and that its loss is that of all logits."""
    assert isinstance(generate_once(tuned, "Add 1 and 2.", max_new_tokens=4, temperature=0.0), str)
    loaded = load_tuned(tuned)
    alone = [text for prompt in PROMPTS for text in _replies(loaded, [prompt])]
    assert _replies(loaded, PROMPTS) == alone, "padding changes a reply"
    check_loss(loaded.model)


def _replies(loaded: LoadedModel, prompts: list[list[Message]]) -> list[str]:
    completions = generate_completions(
        loaded.model, loaded.encoder, prompts, max_new_tokens=4, context=loaded.context
    )
    return [completion.text for completion in completions]


@torch.no_grad()
def check_loss(model: nn.Module) -> None:
    """Compare the loss of a padded batch, and of an allowed packed one, with that of all logits."""
    rows = [_example(length, row) for row, length in enumerate((11, 6))]
    expected = sum(_loss_of_all_logits(model, row) for row in rows)
    collators = [PaddedCollator(0)]
    if not mask_unsupported(unwrap_model(model).config):
        collators.append(PackedCollator(0))
    for collate in collators:
        loss = float(completion_loss_sum(model, output_head(model), dict(collate(rows))))
        assert abs(loss / expected - 1) < TOLERANCE, f"{type(collate).__name__}: {loss} is not {expected}"


def _example(length: int, row: int) -> LMExample:
    ids = torch.arange(100 + 50 * row, 100 + 50 * row + length)
    labels = torch.where(torch.arange(length) < 3, -100, ids)
    return LMExample(input_ids=ids, labels=labels, row=row)


def _loss_of_all_logits(model: nn.Module, row: LMExample) -> float:
    logits = model(input_ids=row["input_ids"][None]).logits[0].float()
    return float(F.cross_entropy(logits[:-1], row["labels"][1:], reduction="sum", ignore_index=-100))


@torch.no_grad()
def _check_merged(tuned: Path) -> None:
    merged = AutoModelForCausalLM.from_pretrained(merge_run(tuned)).float().eval()
    ids = torch.arange(100, 112)[None]
    logits, expected = merged(input_ids=ids).logits, load_tuned(tuned).model(input_ids=ids).logits
    difference = float((logits - expected).abs().max() / expected.std())
    assert difference < TOLERANCE, f"the merged model's logits differ by {difference:.1e}"
