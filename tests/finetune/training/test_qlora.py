"""QLoRA: the base is stored in NF4, and generating between steps changes nothing."""

from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from fixture_types import Tune
from peft.tuners.lora import LoraLayer

from finetune.adapters import qlora
from finetune.distributed.hardware import detect_hardware
from finetune.recipe.settings import ModelSettings
from finetune.training.model import attach_adapter, count_parameters, load_base


def quantized(base_folder: Path, kind: str) -> torch.nn.Module:
    settings = ModelSettings(base=str(base_folder))
    base = load_base(settings, precision="float32", quantization=kind, hardware=detect_hardware())
    return attach_adapter(base, qlora.Settings(rank=4))


def test_every_targeted_layer_is_stored_in_nf4(base_folder: Path) -> None:
    model = quantized(base_folder, "nf4")
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    assert len(layers) == 2 * 7, "seven linear layers in each of two blocks"
    for layer in layers:
        base = layer.get_base_layer()
        assert isinstance(base, Linear4bit)
        state = base.weight.quant_state
        assert base.weight.dtype == torch.uint8 and state.quant_type == "nf4" and state.nested
        numbers = base.in_features * base.out_features
        assert base.weight.nbytes == numbers // 2
        # Blocks of 64 share a scale of one byte; the scales' own scales, one in 256, and a table are small.
        scales = state.absmax.nbytes
        assert state.absmax.dtype == torch.uint8 and scales == numbers // 64
        assert (base.weight.nbytes + scales) / numbers < 0.52
        assert not base.weight.requires_grad


def test_4_bit_weights_count_unpacked_elements(base_folder: Path) -> None:
    packed = count_parameters(quantized(base_folder, "nf4"))
    plain = count_parameters(quantized(base_folder, "none"))
    assert packed == plain and 0 < packed.trained < packed.total


def test_head_and_embeddings_are_not_quantized(base_folder: Path) -> None:
    model = quantized(base_folder, "nf4")
    assert type(model.get_output_embeddings()) is torch.nn.Linear
    assert model.get_input_embeddings().weight.dtype == torch.float32


def test_evaluating_between_steps_does_not_change_a_qlora_run(
    tune: Tune, rows_file: Path, tmp_path: Path
) -> None:
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("".join(rows_file.read_text().splitlines(keepends=True)[:5]))
    plain = tune("blind", adapter__method="qlora", evaluate__samples=0, data__held_out=0)
    evaluating = tune(
        "seeing",
        adapter__method="qlora",
        evaluate__samples=4,
        data__held_out=str(held_out),
        train__evaluate_every=1,
    )
    assert plain.record["reload"]["quantization"] == "nf4"
    assert plain.record["files"] == evaluating.record["files"]
    assert len(evaluating.samples) == 4 and plain.samples == []


def test_int8_is_an_option(tune: Tune, base_folder: Path) -> None:
    model = quantized(base_folder, "int8")
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    assert layers and all(isinstance(layer.get_base_layer(), Linear8bitLt) for layer in layers)
    assert all(layer.get_base_layer().weight.dtype == torch.int8 for layer in layers)
    result = tune("run", adapter__method="qlora", model__quantization="int8", train__max_steps=4)
    assert result.record["reload"]["quantization"] == "int8"
    metrics = result.record["metrics"]
    assert metrics["eval/loss_after"] < metrics["eval/loss_before"]


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_4_bit_run_trains_like_full_precision(tune: Tune, method: str) -> None:
    result = tune("run", adapter__method=method, evaluate__samples=0, train__max_steps=6)
    metrics = result.record["metrics"]
    assert metrics["eval/loss_after"] < metrics["eval/loss_before"] - 0.05
