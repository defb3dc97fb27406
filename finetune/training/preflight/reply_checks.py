"""Check of replies: what is trained, after the prompt of inference, is the rest of the rendering."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import islice
from os.path import commonprefix

from data_templates.segments import Message, TemplateError
from finetune.data.conversation import Conversation
from finetune.data.tokens import Encoder
from finetune.recipe.errors import Problem
from finetune.training.preflight.checks import CheckResult, failed

NAME = "replies"
CHECKED_ROWS = 5
SHOWN_CHARACTERS = 40
REPAIR = (
    "let the template's prompt end where its reply begins, and end the reply with reply_segments(message); "
    "or data.template=chatml"
)


class ReplyError(ValueError):
    """A row whose trained text is not what the model writes after its prompt."""


def check_replies(rows: Iterable[Conversation], encoder: Encoder) -> CheckResult:
    """Decode a few rows: prompt of inference, trained text and stop token are the whole rendering.

    Args:
        rows: conversations; the first few that the template renders are checked.
        encoder: template and tokenizer.
    """
    texts: list[str] = []
    num_differing = 0
    for row in islice((row for row in rows if not row.is_document), CHECKED_ROWS):
        try:
            for part in encoder.split_replies([replace(turn, trained=True) for turn in row.messages]):
                trained, is_whole = _check_row(part, encoder)
                texts.append(trained)
                num_differing += not is_whole
        except TemplateError:
            continue  # dropped, and counted in the data report
        except ReplyError as error:
            expected = "the prompt of inference, the trained reply and its stop token, and nothing else"
            return failed(NAME, Problem("data.template", f"{row.location}: {error}", expected, REPAIR))
    if not texts:
        return CheckResult(NAME, "no conversation to check")
    first = repr(texts[0] if len(texts[0]) <= SHOWN_CHARACTERS else f"…{texts[0][-SHOWN_CHARACTERS:]}")
    detail = f"{len(texts)} decoded: prompt as at inference, reply, stop token; the first: {first}"
    note = f"; {num_differing} have a prompt that the template renders differently once the reply is there"
    return CheckResult(NAME, detail + note * (num_differing > 0))


def _check_row(messages: Sequence[Message], encoder: Encoder) -> tuple[str, bool]:
    """Return the trained text of a row's last reply, and whether the row is the template's rendering.

    Raises:
        ReplyError: the reply does not follow its prompt, or does not end with a stop token.
        TemplateError: the template cannot render the row.
    """
    encoded = encoder.encode(messages)
    last = max(index for index, turn in enumerate(messages) if turn.role == "assistant")
    prompt = encoder.encode(messages[:last]).input_ids
    ids, turn = encoded.input_ids, last + 1
    if ids[: len(prompt)] != prompt:
        raise ReplyError(f"turn {turn} is trained after another prompt than at inference")
    mask = encoded.loss_mask[len(prompt) :]
    if True not in mask:
        raise ReplyError(f"turn {turn} has no trained token")
    start = len(prompt) + mask.index(True)
    end = next((i for i in range(start, len(ids)) if not encoded.loss_mask[i]), len(ids))
    if start > len(prompt) and encoder.reasoning != "mask":
        between = _decode(encoder, ids[len(prompt) : start])
        raise ReplyError(f"{between!r} precedes the trained text of turn {turn} without loss")
    if ids[end - 1] not in encoder.stop_ids:
        raise ReplyError(f"the trained text of turn {turn} does not end with a stop token")
    whole = encoder.tokenizer(encoder.whole_text(messages), add_special_tokens=False)["input_ids"]
    ours, theirs = (_squeeze(_decode(encoder, tokens)) for tokens in (ids, whole))
    # The template may leave out a thought, or the EOS that ends the row: then ours has more.
    rest = theirs[len(commonprefix([ours, theirs])) :]
    return _decode(encoder, ids[start:end]), ours.endswith(rest)


def _decode(encoder: Encoder, ids: Sequence[int]) -> str:
    return str(encoder.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def _squeeze(text: str) -> str:
    # Tokenizers with a space before every word decode pieces and wholes with other spaces.
    return "".join(text.split())
