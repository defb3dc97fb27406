"""The model card: filled from the record, without paths of this machine."""

from pathlib import Path

from huggingface_hub import ModelCard

from finetune.training.model_card import write_model_card

RECORD = {
    "stage": "sft",
    "recipe": "alpaca",
    "seed": 7,
    "steps": 12,
    "versions": {"transformers": "5.23.0", "peft": "0.21.2", "llm-align": "0.1.0"},
    "data": {"lines": ["64 rows (Alpaca), 8 held out", "columns not used: task"]},
    "summary": {"held-out loss": "4.769 → 3.290"},
    "reload": {
        "model": {"base": "/home/me/models/SmolLM2"},
        "template": "alpaca",
        "precision": "bfloat16",
        "quantization": "nf4",
    },
}


def test_the_card_says_what_was_trained(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    own = "---\nbase_model: /home/me/models/SmolLM2\n---\n\n## Load this adapter\n\ntwo lines\n\n"
    (tmp_path / "README.md").write_text(f"{own}# Model Card for Model ID\n\n[More Information Needed]\n")
    for _ in range(2):  # a run that resumes after its last step writes it again
        write_model_card(tmp_path, RECORD)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "SmolLM2" and card.data.library_name == "peft"
    assert card.text.count("two lines") == 1
    for text in (
        "| held-out loss | 4.769 → 3.290 |",
        "64 rows (Alpaca)",
        "pip install transformers==5.23.0 peft",
    ):
        assert text in card.text
    assert "/home" not in card.content and "More Information" not in card.content


def test_a_merged_model_needs_transformers_alone(tmp_path: Path) -> None:
    write_model_card(tmp_path, RECORD)
    card = ModelCard.load(tmp_path / "README.md")
    assert "AutoModelForCausalLM" in card.text and "peft" not in card.text.partition("## Training")[0]
