"""Chat with a finished run in the terminal, with the encoder, template and stop tokens of training."""

from collections.abc import Iterator
from pathlib import Path

import click

from data_templates._segments import Message, TemplateError
from finetune.training.generate import reply_to
from finetune.training.tuned import Tuned, load_tuned


def answer_once(run: Path, prompt: str, *, max_new_tokens: int, temperature: float) -> str:
    """Generate a run's reply to one prompt.

    Raises:
        UserError: not the folder of a finished run.
    """
    return _reply(load_tuned(run), [Message("user", prompt)], max_new_tokens, temperature)


def converse(run: Path, *, max_new_tokens: int, temperature: float) -> None:
    """Chat in the terminal until an empty line or the end of input.

    Raises:
        UserError: not the folder of a finished run.
    """
    tuned = load_tuned(run)
    click.echo(f"Chatting with {run}; empty line to quit, /new to start a new conversation.")
    history: list[Message] = []
    for question in _questions():
        if question == "/new":
            history = []
            continue
        turns = [*history, Message("user", question)]
        try:
            reply = _reply(tuned, turns, max_new_tokens, temperature)
        # Single-turn templates cannot render a history: each question starts a new conversation.
        except TemplateError:
            turns = turns[-1:]
            reply = _reply(tuned, turns, max_new_tokens, temperature)
        click.echo(reply)
        history = [*turns, Message("assistant", reply)]


def _questions() -> Iterator[str]:
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            return
        if not question:
            return
        yield question


def _reply(tuned: Tuned, turns: list[Message], max_new_tokens: int, temperature: float) -> str:
    replies = reply_to(
        tuned.model,
        tuned.encoder,
        [turns],
        max_new_tokens=min(max_new_tokens, tuned.context // 2),
        context=tuned.context,
        temperature=temperature,
    )
    return replies[0].text
