"""Log-probabilities and completions of the embedded base, compared with direct forward passes."""

import pytest
import torch

from data_templates.segments import Message
from finetune.evaluation.answers import Sampling
from finetune.evaluation.local_model import LocalModel, _windows
from finetune.training.loaded_model import LoadedModel, load_base_model

QUESTION = (Message("user", "What color is the kite?"),)
CHOICES = ("red", "a very long answer", "파란")


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    loaded = load_base_model("tiny", template="alpaca")
    loaded.model.float()
    return loaded


@pytest.fixture(scope="module")
def model(loaded: LoadedModel) -> LocalModel:
    return LocalModel(lambda: loaded, "tiny", {})


def sum_logps(loaded: LoadedModel, prompt: list[int], continuation: list[int]) -> float:
    with torch.no_grad():
        logits = loaded.model(input_ids=torch.tensor([prompt + continuation])).logits[0]
    logps = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return float(logps.gather(-1, torch.tensor(continuation)[:, None]).sum())


def test_chat_choices_are_replies_with_their_stop_token(model: LocalModel, loaded: LoadedModel) -> None:
    [answer] = model.choose([(QUESTION, CHOICES)], style="chat")
    prompt = loaded.encoder.encode_prompt(QUESTION)
    for choice, logp in zip(CHOICES, answer.logps, strict=True):
        encoded = loaded.encoder.encode([*QUESTION, Message("assistant", choice)])
        reply = [
            token for token, trained in zip(encoded.input_ids, encoded.loss_mask, strict=True) if trained
        ]
        assert reply[-1] in loaded.encoder.stop_ids
        assert logp == pytest.approx(sum_logps(loaded, prompt, reply), abs=1e-3)
    assert answer.num_bytes == (3, 18, 6)


def test_text_choices_continue_the_text(model: LocalModel, loaded: LoadedModel) -> None:
    context = (Message("user", "The kite is"),)
    choices = (" red", " blue and yellow")
    answers = model.choose([(context, choices), ((), ("The cat sat.", "The"))], style="text")
    tokenizer = loaded.encoder.tokenizer
    for turns, own, answer in zip((context, ()), (choices, ("The cat sat.", "The")), answers, strict=True):
        text = "".join(turn.content for turn in turns)
        for choice, logp in zip(own, answer.logps, strict=True):
            ids = tokenizer.encode(text + choice, add_special_tokens=False)
            start = len(tokenizer.encode(text, add_special_tokens=False))
            first = [tokenizer.bos_token_id or tokenizer.eos_token_id]
            head = ids[:start] if text and tokenizer.encode("a")[:1] != first else first + ids[:start]
            assert logp == pytest.approx(sum_logps(loaded, head, ids[start:]), abs=1e-3)


def test_a_text_is_read_token_by_token(model: LocalModel, loaded: LoadedModel) -> None:
    texts = ["Once upon a time there was a kite.", "옛날 옛날에 연이 있었습니다.", ""]
    for text, answer in zip(texts, model.read(texts), strict=True):
        tokenizer = loaded.encoder.tokenizer
        ids = tokenizer.encode(text, add_special_tokens=False)
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        assert (answer.num_tokens, answer.num_bytes) == (len(ids), len(text.encode()))
        expected = sum_logps(loaded, [first], ids) if ids else 0.0
        assert answer.logp == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 30])
def test_windows_predict_each_token_once(length: int) -> None:
    windows = _windows(list(range(length)), 8)
    assert [token for _, predicted in windows for token in predicted] == list(range(1, length))
    assert all(len(before) + len(predicted) <= 8 for before, predicted in windows)
    assert all(len(before) >= 4 for before, _ in windows[1:])


def test_samples_do_not_depend_on_the_other_prompts(model: LocalModel) -> None:
    prompts = [(Message("user", f"Tell me a story about {name}."),) for name in ("Mina", "Tom", "Leo")]
    together = model.complete(prompts, Sampling(12, 1.0, 3, [0, 1, 2]))
    alone = model.complete(prompts[1:2], Sampling(12, 1.0, 3, [1]))
    assert together[1] == alone[0]
    assert together[0].text != model.complete(prompts[:1], Sampling(12, 1.0, 4, [0]))[0].text
