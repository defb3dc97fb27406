"""An adapter that plain PEFT has saved: trained further, merged, and replied with."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from align import load_recipe, load_tuned, run
from finetune.training.merge import merge_run

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def adapter(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    base: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base_folder)
    config = LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(base, config)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    path = tmp_path_factory.mktemp("foreign") / "peft"
    model.save_pretrained(path)
    return path


def test_training_begins_with_its_weights(adapter: Path, base_folder: Path, tmp_path: Path) -> None:
    rows = [{"instruction": f"Add {i} and {i}.", "output": str(2 * i)} for i in range(8)]
    settings = {
        "model.precision": "float32",
        "data.held_out": 2,
        "data.max_length": 128,
        "train.max_steps": 1,
        "train.batch_size": 4,
        "train.learning_rate": 1e-6,
        "evaluate.samples": 0,
        "evaluate.exact_match": 0,
    }
    recipe = load_recipe("quickstart", init_from=adapter, data=rows, out=tmp_path / "run", settings=settings)
    result = run(recipe)
    before = load_file(adapter / "adapter_model.safetensors")
    after = load_file(result.adapter / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    differences = [float((after[name] - before[name]).abs().max()) for name in before]
    assert 0 < max(differences) < 1e-5
    assert result.record["init_from"]["stage"] == "peft"


def test_it_replies_and_merges_as_peft_does(adapter: Path, base_folder: Path) -> None:
    tuned = load_tuned(adapter)
    assert isinstance(tuned.model, PeftModel) and isinstance(tuned.reply("Hi", max_new_tokens=3), str)
    merged = AutoModelForCausalLM.from_pretrained(merge_run(adapter), dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    expected = PeftModel.from_pretrained(base, adapter)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert torch.allclose(merged(ids).logits, expected(ids).logits, atol=0.05)
