"""Saved weights load in plain PEFT and transformers, bit for bit."""

from pathlib import Path

import pytest
import torch
from fixture_types import Tune
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel

from finetune.recipe.errors import UserError
from finetune.training import save
from finetune.training.loaded_model import load_finished_run

NF4 = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": torch.float32,
}
INPUTS = torch.tensor([[5, 17, 300, 42, 7, 9], [8, 1, 2, 300, 17, 99]])


def plain_base(folder: Path, method: str) -> PreTrainedModel:
    quantization = BitsAndBytesConfig(**NF4) if method == "qlora" else None
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=quantization
    ).eval()


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=INPUTS).logits


@pytest.mark.parametrize("method", ["lora", "qlora", "prefix", "prompt"])
def test_plain_peft_loads_the_adapter(tune: Tune, base_folder: Path, method: str) -> None:
    result = tune("run", adapter__method=method, evaluate__samples=0)
    plain = PeftModel.from_pretrained(plain_base(base_folder, method), str(result.adapter)).eval()
    loaded_model = load_finished_run(result.directory)
    if method == "qlora":  # otherwise this CPU may repack them
        for module in plain.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    actual = logits(plain)
    assert torch.equal(actual, logits(loaded_model.model))
    assert not torch.allclose(actual[..., -len(INPUTS[0]) :, :], logits(plain_base(base_folder, method)))


def test_plain_transformers_loads_a_fully_tuned_model(tune: Tune, base_folder: Path) -> None:
    result = tune("run", adapter__method="full", evaluate__samples=0)
    assert result.adapter.name == "model" and not (result.directory / "adapter").exists()
    plain = AutoModelForCausalLM.from_pretrained(result.adapter).eval()
    assert torch.equal(logits(plain), logits(load_finished_run(result.directory).model))
    assert not torch.equal(logits(plain), logits(plain_base(base_folder, "full")))
    assert AutoTokenizer.from_pretrained(result.adapter).eos_token == "</s>"


def test_the_record_holds_the_checksum_of_the_weights(tune: Tune) -> None:
    result = tune("run", evaluate__samples=0)
    [(name, checksum)] = result.record["files"].items()
    assert name == "adapter/adapter_model.safetensors"
    assert save.file_sha256(result.directory / name) == checksum


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tensors: {key: torch.zeros_like(value) for key, value in tensors.items()}, "trained weights"),
        (lambda tensors: dict(list(tensors.items())[1:]), "tensors of the adapter's"),
        pytest.param(
            lambda tensors: {key: value + 1e-3 for key, value in tensors.items()},
            "trained weights",
            marks=pytest.mark.slow,
        ),
        pytest.param(lambda tensors: {}, "holds 0 tensors of the adapter's", marks=pytest.mark.slow),
    ],
    ids=["zeros", "one less", "others", "none"],
)
def test_pain_10_a_save_that_loses_weights_is_refused(
    tune: Tune, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, damage, message: str
) -> None:
    first = tune("run", evaluate__samples=0, train__max_steps=2)
    saved_bytes = (first.adapter / save.ADAPTER_WEIGHTS).read_bytes()
    save_pretrained = PeftModel.save_pretrained

    def save_corrupted(model: PeftModel, folder: str, **arguments: object) -> None:
        save_pretrained(model, folder, **arguments)
        if "checkpoint" not in folder:
            path = Path(folder) / save.ADAPTER_WEIGHTS
            save_file(damage(load_file(path)), path)

    monkeypatch.setattr(PeftModel, "save_pretrained", save_corrupted)
    with pytest.raises(UserError, match=message):
        tune("run", evaluate__samples=0, train__max_steps=3, force=True)
    monkeypatch.undo()
    assert not (tmp_path / "run" / "adapter").exists(), "a broken adapter never takes the name"
    with pytest.raises(UserError, match="a run with status 'failed'"):
        load_finished_run(tmp_path / "run")
    again = tune("run", evaluate__samples=0, train__max_steps=3)
    assert again.record["status"] == "finished"
    assert (again.adapter / save.ADAPTER_WEIGHTS).read_bytes() != saved_bytes


def test_pain_10_zeros_that_were_trained_are_refused_too(tmp_path: Path) -> None:
    zeros = {"a.lora_A.weight": torch.zeros(2, 3)}
    save_file(zeros, tmp_path / save.ADAPTER_WEIGHTS)
    with pytest.raises(UserError, match="holds only zeros"):
        save._verify_adapter(tmp_path, zeros)
