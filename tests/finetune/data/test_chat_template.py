"""The chat template that a run saves: transformers renders the text that was trained, byte for byte."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from data_templates.segments import Message
from finetune.data.chat_template import as_dicts, template_text
from finetune.data.tokens import Encoder
from finetune.recipe.discovery import TEMPLATES, plugin_names
from finetune.training.inference_files import trained_chat_template

OWN = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    "{% if shout is defined and shout %}{{ '!' }}{% endif %}"
)
"""ChatML, as a chat model's tokenizer has it."""
NOT_EXPRESSIBLE = ("flan",)
"""Selects a phrasing by a hash of the text, which Jinja cannot compute."""
CONVERSATIONS = {
    "prompt": [Message("user", "How are you?")],
    "quotes and braces": [Message("user", "He said \"hi\" \\n {{ x }} {% y %} 'z'\n\n안녕 😀")],
    "system": [Message("system", "Be {short}."), Message("user", "How are you?")],
    "blank system": [Message("system", " "), Message("user", "How are you?")],
    "reply": [Message("user", "Hi"), Message("assistant", " I am well.\n")],
    "turns": [Message("user", "Hi"), Message("assistant", "Yes"), Message("user", "Why?")],
    "system and turns": [
        Message("system", "S"),
        *[Message("user", "Hi"), Message("assistant", "Yes")] * 3,
        Message("user", "Why?"),
    ],
}


@pytest.fixture
def tokenizer(base_folder: Path) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = OWN
    return tokenizer


def saved_tokenizer(encoder: Encoder, folder: Path) -> PreTrainedTokenizerBase:
    """Return what plain transformers loads from a run's folder."""
    copy = AutoTokenizer.from_pretrained(_save(encoder.tokenizer, folder / "copy"))
    copy.chat_template, _ = trained_chat_template(encoder)
    return AutoTokenizer.from_pretrained(_save(copy, folder / "saved"))


def _save(tokenizer: PreTrainedTokenizerBase, folder: Path) -> Path:
    tokenizer.save_pretrained(folder)
    return folder


def check_equal(encoder: Encoder, saved: PreTrainedTokenizerBase) -> int:
    """Compare all conversations; return how many the template renders."""
    rendered = 0
    for name, conversation in CONVERSATIONS.items():
        expected = template_text(encoder, conversation)
        is_prompt = conversation[-1].role == "user"
        if expected is None:
            with pytest.raises(Exception, match="expected one user turn"):
                saved.apply_chat_template(as_dicts(conversation), tokenize=False)
            continue
        actual = saved.apply_chat_template(
            as_dicts(conversation), tokenize=False, add_generation_prompt=is_prompt
        )
        assert actual == expected, name
        rendered += 1
    return rendered


@pytest.mark.parametrize("name", [name for name in plugin_names(TEMPLATES) if name != "tokenizer"])
def test_the_saved_template_renders_the_training_text(
    name: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    # Another format than any of ours.
    tokenizer.chat_template = OWN.replace("im_start", "turn")
    encoder = Encoder(tokenizer, name)
    template, note = trained_chat_template(encoder)
    if name in NOT_EXPRESSIBLE:
        assert template is None and f"'{name}' cannot be written as a chat template: none is saved" in note
        return
    assert check_equal(encoder, saved_tokenizer(encoder, tmp_path)) >= 5


@pytest.mark.parametrize("name", ["alpaca", "vicuna", "qwen", "mistral", "tokenizer"])
def test_the_system_prompt_of_the_recipe_is_the_default(
    name: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    encoder = Encoder(tokenizer, name, system='Answer in "JSON": {}')
    saved = saved_tokenizer(encoder, tmp_path)
    prompt = [{"role": "user", "content": "Hi"}]
    text = saved.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    assert text == encoder.whole_text([Message("user", "Hi")]) and 'Answer in "JSON": {}' in text


def test_variables_of_the_base_s_template_are_defaults(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    encoder = Encoder(tokenizer, "tokenizer", template_options={"shout": True, "other": [1, "a"]})
    saved = saved_tokenizer(encoder, tmp_path)
    prompt = [{"role": "user", "content": "Hi"}]
    assert saved.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True).endswith("\n!")
    quiet = saved.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True, shout=False)
    assert not quiet.endswith("!")


def test_the_control_suffix_ends_prompts_only(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    encoder = Encoder(tokenizer, "alpaca", control_suffix="A good answer:")
    saved = saved_tokenizer(encoder, tmp_path)
    text = saved.apply_chat_template(as_dicts(CONVERSATIONS["prompt"]), tokenize=False)
    assert text.endswith("How are you?\n\nA good answer:\n\n### Response:")
    text = saved.apply_chat_template(as_dicts(CONVERSATIONS["reply"]), tokenize=False)
    assert "A good answer:" not in text


def test_the_base_s_own_template_is_kept_where_it_is_the_run_s(tokenizer: PreTrainedTokenizerBase) -> None:
    for name in ("tokenizer", "chatml"):
        assert trained_chat_template(Encoder(tokenizer, name)) == (OWN, "")
    template, note = trained_chat_template(Encoder(tokenizer, "alpaca"))
    assert template and "### Response:" in template and "im_start" not in template
    assert note == "the run's template 'alpaca' is saved in place of the base's"
    tokenizer.chat_template = None
    assert trained_chat_template(Encoder(tokenizer, "alpaca"))[1] == ""


def test_thoughts_are_rendered_as_trained(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    tokenizer.chat_template = None
    encoder = Encoder(tokenizer, "chatml")
    turns = [Message("user", "Hi"), Message("assistant", "Yes", reasoning="hm"), Message("user", "Why?")]
    saved = saved_tokenizer(encoder, tmp_path)
    assert "<think>\nhm\n</think>\n\nYes" in saved.apply_chat_template(as_dicts(turns), tokenize=False)


def test_tools_are_refused_by_a_template_without_them(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    saved = saved_tokenizer(Encoder(tokenizer, "alpaca"), tmp_path)
    tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}
    with pytest.raises(Exception, match="no tools"):
        saved.apply_chat_template(as_dicts(CONVERSATIONS["prompt"]), tools=[tool], tokenize=False)
