"""The committed model and tokenizer: shapes, sizes, round trips, and a few facts that the base must know."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from tools.tiny.train_base import continue_text

FOLDER = Path(__file__).parents[3] / "recipes" / "tiny"
MODEL = FOLDER / "model"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    """Load the committed tokenizer as a user does."""
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """Load the committed weights in float32."""
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


def test_shape_suits_four_bit_layers(model: LlamaForCausalLM) -> None:
    """4,393,216 = 4608 x 256 (tied) + 4 x (4 x 256^2 + 3 x 256 x 704 + 2 x 256) + 256; all widths / 64."""
    assert model.num_parameters() == 4_393_216
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear):
            assert layer.in_features % 64 == 0
            assert layer.out_features % 64 == 0


def test_files_are_small_and_bfloat16() -> None:
    """Two bytes per parameter, and the folder under 15 MB."""
    with safe_open(MODEL / "model.safetensors", framework="pt") as weights:
        assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.bfloat16}  # noqa: SIM118
    assert (MODEL / "model.safetensors").stat().st_size < 9_000_000
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 15_000_000


def test_special_tokens(tokenizer: PreTrainedTokenizerBase, model: LlamaForCausalLM) -> None:
    """Padding is not the end of text, and model and tokenizer agree on the ids."""
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<pad>")
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    for config in (model.config, model.generation_config):
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == ids
    assert len(tokenizer) == model.config.vocab_size == 4608


@pytest.mark.parametrize(
    "text", ["The cat sat.", "고양이는 동물이다. 17개!", "  two  spaces\n\n\ttab", "é 漢字 🙂 12,345"]
)
def test_text_survives_a_round_trip(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    """Byte-level: also what the training text never had comes back."""
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_bos_is_prepended_once(tokenizer: PreTrainedTokenizerBase) -> None:
    """One BOS by default; the chat template has its own and gets no second one."""
    ids = tokenizer("a").input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1
    messages = [{"role": "user", "content": "안녕하세요?"}]
    chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert chat.count(tokenizer.bos_token_id) == 1
    assert chat[0] == tokenizer.bos_token_id


def test_chat_template_is_chatml(tokenizer: PreTrainedTokenizerBase) -> None:
    """The rendered text, byte for byte."""
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == (
        "<s><|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"
    )
    turn = tokenizer("<|im_end|>", add_special_tokens=False).input_ids
    assert len(turn) == 1


@pytest.mark.parametrize(
    ("start", "fact"),
    [
        ("The opposite of hot is", " cold."),
        ("The Korean word for cat is", " 고양이."),
        ("The capital of France is", " Paris."),
        ("프랑스의 수도는 '", "파리'"),
        ("The plural of mouse is", " mice."),
    ],
)
def test_base_knows_facts(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, start: str, fact: str
) -> None:
    """Greedy continuations of sentences of the corpus."""
    assert continue_text(model, tokenizer, start, length=6).startswith(fact)


def test_base_does_not_know_the_instruction_format(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Before tuning, an Alpaca prompt is not answered: this is what tuning shows."""
    prompt = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\nWhat is the opposite of hot?\n\n### Response:"
    )
    assert continue_text(model, tokenizer, prompt, length=8).strip() != "cold"
