"""Chat with a finished run in the terminal, with the encoder, template and stop tokens of training."""

from collections.abc import Iterator
from pathlib import Path

import click

from data_templates.segments import Message, TemplateError
from finetune.training.generation import generate_completions
from finetune.training.loaded_model import LoadedModel, load_finished_run


def generate_once(run: Path, prompt: str, *, max_new_tokens: int, temperature: float) -> str:
    """Generate a run's reply to one prompt.

    Raises:
        UserError: not the folder of a finished run.
    """
    return _generate_reply(load_finished_run(run), [Message("user", prompt)], max_new_tokens, temperature)


def chat_loop(run: Path, *, max_new_tokens: int, temperature: float) -> None:
    """Chat in the terminal until an empty line or the end of input.

    Raises:
        UserError: not the folder of a finished run.
    """
    loaded = load_finished_run(run)
    click.echo(f"Chatting with {run}; empty line to quit, /new to start a new conversation.")
    history: list[Message] = []
    for question in _read_questions():
        if question == "/new":
            history = []
            continue
        turns = [*history, Message("user", question)]
        try:
            reply = _generate_reply(loaded, turns, max_new_tokens, temperature)
        # Single-turn templates cannot render a history: each question starts a new conversation.
        except TemplateError:
            turns = turns[-1:]
            reply = _generate_reply(loaded, turns, max_new_tokens, temperature)
        click.echo(reply)
        history = [*turns, Message("assistant", reply)]


def _read_questions() -> Iterator[str]:
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            return
        if not question:
            return
        yield question


def _generate_reply(
    loaded: LoadedModel, turns: list[Message], max_new_tokens: int, temperature: float
) -> str:
    completions = generate_completions(
        loaded.model,
        loaded.encoder,
        [turns],
        # At least half of the context is left for the conversation.
        max_new_tokens=min(max_new_tokens, loaded.context // 2),
        context=loaded.context,
        temperature=temperature,
    )
    return completions[0].text
