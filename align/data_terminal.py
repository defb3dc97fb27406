"""Terminal output of ``llm-align data``: rows with trained tokens in green, then the statistics."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from finetune.recipe.recipe import Recipe

LEARNT, GIVEN = "bold green", "dim"
MARKS = "⟦{}⟧"
"""Marks trained tokens if the terminal has no colors."""

HEAD, TAIL = 900, 300
"""Characters shown of a long span; the HTML page shows all."""

BAR = 40
NAME = 32


def print_head(recipe: Recipe, console: Console) -> None:
    """Print recipe, data and base, before the tokenizer is loaded."""
    data = recipe.settings.data
    mixed = [part.source for part in data.mix or []]
    rows = [f"{len(data.source)} rows"] if isinstance(data.source, list) else [data.source or ""]
    sources = " + ".join(mixed or rows)
    head = f"[bold]{recipe.stage} {recipe.name}[/]  {escape(recipe.description)}"
    console.print(head, highlight=False, soft_wrap=True)
    line = f"data {sources}, template {data.template}, base {recipe.settings.model.base}"
    console.print(escape(line), highlight=False, soft_wrap=True)
    for note in recipe.notes:
        console.print(escape(note), highlight=False, soft_wrap=True)


def print_facts(facts: dict[str, Any], console: Console, *, page: Path | None) -> None:
    """Print rows and statistics; ``page`` is the path of the HTML page, if written."""
    _print_rows(facts, console)
    _print_numbers(facts, console)
    if page is not None:
        console.print(f"page     {escape(str(page))}", highlight=False, soft_wrap=True)


def _print_rows(facts: dict[str, Any], console: Console) -> None:
    """Print the selected rows with their loss mask."""
    if not facts["shown"]:
        return
    colours = console.color_system is not None
    learnt = Text("trained tokens", LEARNT) if colours else Text(MARKS.format("trained tokens"))
    legend = () if facts["prompts"] else (", ", learnt)
    console.print(Text.assemble("rows as the model sees them", *legend, ":"))
    for row in facts["shown"]:
        share = f", {row['trained_tokens'] / row['tokens']:.0%} trained" * (not facts["prompts"])
        line = f"── {row['where']}  {row['tokens']} tokens{share}"
        console.print(Text(line, "cyan"), soft_wrap=True)
        text = Text()
        for piece in row["pieces"]:
            shown = _shortened(piece["text"])
            marked = MARKS.format(shown) if piece["trained"] and not colours else shown
            text.append(marked, LEARNT if piece["trained"] else GIVEN)
        console.print(text, soft_wrap=True)
    console.print("──", style="cyan")


def _print_numbers(facts: dict[str, Any], console: Console) -> None:
    """Print lengths, mixture, dropped and truncated rows, and the training budget."""
    _print_lengths(facts, console)
    if len(facts["sources"]) > 1:
        console.print(_sources(facts))
    for note in facts["notes"]:
        console.print(escape(note), highlight=False, soft_wrap=True)
    for count in facts["counts"]:
        line = f"rows {count['what']}: [bold]{count['rows']}[/] (first: {escape(count['first'])})"
        console.print(line, highlight=False, soft_wrap=True)
    what, loss = "rows", f", [bold]{facts['trained_share']:.0%}[/] have loss"
    if facts["prompts"]:
        what, loss = "prompts", "; the loss is on completions sampled during training"
    console.print(
        f"[bold]{facts['rows']:,}[/] {what} ({escape(facts['layout'])}), {facts['held_out']:,} held out; "
        f"{facts['tokens']:,} tokens{loss}",
        highlight=False,
        soft_wrap=True,
    )
    if facts["prompts"]:
        return
    console.print(
        f"{facts['epochs']:.3g} epochs in batches of {facts['batch_size']}: [bold]{facts['steps']:,}[/] "
        f"optimizer steps, [bold]{facts['token_budget']:,}[/] tokens, "
        f"{facts['trained_token_budget']:,} of them trained",
        highlight=False,
        soft_wrap=True,
    )


def _print_lengths(facts: dict[str, Any], console: Console) -> None:
    lengths = facts["lengths"]
    console.print(
        f"length in tokens: median {lengths['median']:g}, mean {lengths['mean']:.0f}, 95 % up to "
        f"{lengths['percentile_95']:.0f}, longest {facts['longest']}; "
        f"at most {facts['max_length']} ({facts['max_length_reason']})",
        highlight=False,
        soft_wrap=True,
    )
    most = max(bar["rows"] for bar in lengths["histogram"])
    for bar in lengths["histogram"]:
        border = f"{bar['from']:>6}-{bar['to']:<6}"
        blocks = "█" * round(BAR * bar["rows"] / most)
        console.print(f"{border} {blocks:<{BAR}} {bar['rows']:,}", highlight=False)


def _sources(facts: dict[str, Any]) -> Table:
    title = "mixture: requested and actual share of the rows; share of tokens; share of trained tokens"
    table = Table(title=title, title_justify="left", title_style="bold", box=None)
    table.add_column("source", no_wrap=True)
    learnt = () if facts["prompts"] else ("trained",)
    for column in ("usable", "rows", "requested", "actual", "tokens", *learnt):
        table.add_column(column, justify="right")
    for source in facts["sources"]:
        table.add_row(
            escape(_end_of(source["source"])),
            f"{source['usable']:,}",
            f"{source['rows']:,}",
            f"{source['asked']:.1%}",
            f"{source['rows'] / facts['rows']:.1%}",
            f"{source['tokens'] / facts['tokens']:.1%}",
            *(f"{source['trained_tokens'] / facts['trained_tokens']:.1%}" for _ in learnt),
        )
    return table


def _end_of(name: str) -> str:
    """Return the end of a long path: the part that distinguishes files."""
    return name if len(name) <= NAME else f"…{name[1 - NAME :]}"


def _shortened(text: str) -> str:
    left = len(text) - HEAD - TAIL
    return text if left <= 0 else f"{text[:HEAD]} [… {left:,} characters …] {text[-TAIL:]}"
