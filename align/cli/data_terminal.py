"""Terminal output of ``llm-align data``: rows with trained tokens in green, then the statistics."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from finetune.recipe.recipe import Recipe
from finetune.recipe.visible_text import visible

TRAINED_STYLE, UNTRAINED_STYLE = "bold green", "dim"
TRAINED_MARKS, ASCII_MARKS = "⟦{}⟧", "[[{}]]"
"""Mark trained tokens if the terminal has no colors; for an encoding without ⟦."""

HEAD_CHARACTERS, TAIL_CHARACTERS = 900, 300
"""Characters shown of a long span; the HTML page shows all."""

BAR_WIDTH = 40
SOURCE_NAME_WIDTH = 32


def print_header(recipe: Recipe, console: Console) -> None:
    """Print recipe, data and base, before the tokenizer is loaded."""
    data = recipe.settings.data
    names = [component.source for component in data.mix] if data.mix is not None else [data.source]
    sources = " + ".join(map(str, names))
    title = f"[bold]{recipe.stage} {escape(recipe.name)}[/]  {escape(recipe.description)}"
    console.print(title, highlight=False, soft_wrap=True)
    line = f"data {sources}, template {data.template}, base {recipe.settings.model.base}"
    console.print(escape(line), highlight=False, soft_wrap=True)
    for note in recipe.notes:
        console.print(escape(note), highlight=False, soft_wrap=True)


def print_preview(preview_data: dict[str, Any], console: Console, *, page: Path | None) -> None:
    """Print rows and statistics; ``page`` is the path of the HTML page, if written."""
    _print_rows(preview_data, console)
    _print_statistics(preview_data, console)
    if page is not None:
        console.print(f"page     {escape(str(page))}", highlight=False, soft_wrap=True)


def _print_rows(preview_data: dict[str, Any], console: Console) -> None:
    """Print the selected rows with their loss mask."""
    if not preview_data["shown"]:
        return
    has_colors = console.color_system is not None
    marks = ASCII_MARKS if console.options.ascii_only else TRAINED_MARKS
    trained_label = (
        Text("trained tokens", TRAINED_STYLE) if has_colors else Text(marks.format("trained tokens"))
    )
    legend = () if preview_data["prompts"] else (", ", trained_label)
    console.print(Text.assemble("rows as the model sees them", *legend, ":"))
    for row in preview_data["shown"]:
        share = f", {row['trained_tokens'] / row['tokens']:.0%} trained" * (not preview_data["prompts"])
        line = f"── {row['where']}  {row['tokens']} tokens{share}"
        console.print(Text(visible(line), "cyan"), soft_wrap=True)
        text = Text()
        for piece in row["pieces"]:
            shown_text = visible(_elided(piece["text"]))
            marked = marks.format(shown_text) if piece["trained"] and not has_colors else shown_text
            text.append(marked, TRAINED_STYLE if piece["trained"] else UNTRAINED_STYLE)
        console.print(text, soft_wrap=True)
    console.print("──", style="cyan")


def _print_statistics(preview_data: dict[str, Any], console: Console) -> None:
    """Print lengths, mixture, dropped and truncated rows, and the training budget."""
    _print_lengths(preview_data, console)
    if len(preview_data["sources"]) > 1:
        console.print(_sources_table(preview_data))
    for note in preview_data["notes"]:
        console.print(escape(note), highlight=False, soft_wrap=True)
    for count in preview_data["counts"]:
        line = f"rows {escape(count['what'])}: [bold]{count['rows']}[/] (first: {escape(count['first'])})"
        console.print(line, highlight=False, soft_wrap=True)
    what, loss = "rows", f", [bold]{preview_data['trained_share']:.0%}[/] have loss"
    if preview_data["prompts"]:
        what, loss = "prompts", "; the loss is on completions sampled during training"
    console.print(
        f"[bold]{preview_data['rows']:,}[/] {what} ({escape(preview_data['layout'])}), "
        f"{preview_data['held_out']:,} held out; "
        f"{preview_data['tokens']:,} tokens{loss}",
        highlight=False,
        soft_wrap=True,
    )
    if preview_data["prompts"]:
        return
    epochs = preview_data["epochs"]
    console.print(
        f"{epochs:.3g} epoch{'' if epochs == 1 else 's'} in batches of {preview_data['batch_size']}: "
        f"[bold]{preview_data['steps']:,}[/] optimizer step{'' if preview_data['steps'] == 1 else 's'}, "
        f"[bold]{preview_data['token_budget']:,}[/] tokens, "
        f"{preview_data['trained_token_budget']:,} of them trained",
        highlight=False,
        soft_wrap=True,
    )


def _print_lengths(preview_data: dict[str, Any], console: Console) -> None:
    lengths = preview_data["lengths"]
    console.print(
        f"length in tokens: median {lengths['median']:g}, mean {lengths['mean']:.0f}, 95 % up to "
        f"{lengths['percentile_95']:.0f}, longest {preview_data['longest']}; "
        f"at most {preview_data['max_length']} ({preview_data['max_length_reason']})",
        highlight=False,
        soft_wrap=True,
    )
    max_rows = max(bar["rows"] for bar in lengths["histogram"])
    for bar in lengths["histogram"]:
        bar_label = f"{bar['from']:>6}-{bar['to']:<6}"
        blocks = ("#" if console.options.ascii_only else "█") * round(BAR_WIDTH * bar["rows"] / max_rows)
        console.print(f"{bar_label} {blocks:<{BAR_WIDTH}} {bar['rows']:,}", highlight=False)


def _sources_table(preview_data: dict[str, Any]) -> Table:
    title = "mixture: requested and actual share of the rows; share of tokens; share of trained tokens"
    table = Table(title=title, title_justify="left", title_style="bold", box=None)
    table.add_column("source", no_wrap=True)
    trained_column = () if preview_data["prompts"] else ("trained",)
    for column in ("usable", "rows", "requested", "actual", "tokens", *trained_column):
        table.add_column(column, justify="right")
    for source in preview_data["sources"]:
        table.add_row(
            escape(_name_tail(source["source"])),
            f"{source['num_usable']:,}",
            f"{source['rows']:,}",
            f"{source['target_rate']:.1%}",
            f"{source['rows'] / preview_data['rows']:.1%}",
            f"{source['tokens'] / preview_data['tokens']:.1%}",
            *(f"{source['trained_tokens'] / preview_data['trained_tokens']:.1%}" for _ in trained_column),
        )
    return table


def _name_tail(name: str) -> str:
    """Return the end of a long path: the part that distinguishes files."""
    return name if len(name) <= SOURCE_NAME_WIDTH else f"…{name[1 - SOURCE_NAME_WIDTH :]}"


def _elided(text: str) -> str:
    num_elided = len(text) - HEAD_CHARACTERS - TAIL_CHARACTERS
    return (
        text
        if num_elided <= 0
        else f"{text[:HEAD_CHARACTERS]} [… {num_elided:,} characters …] {text[-TAIL_CHARACTERS:]}"
    )
