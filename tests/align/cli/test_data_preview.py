"""``llm-align data``: statistics against the rows, loss mask, HTML page; no weights are loaded."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from align import cli
from align.cli import data_preview, data_terminal
from align.cli.data_terminal import print_preview

Call = Callable[..., tuple[int, str, str]]
RECIPE = """\
stage: sft
description: sums
model: {{base: {base}, precision: float32}}
data: {{{data}, held_out: 6, max_length: 128}}
train: {{epochs: 2, batch_size: 8}}
"""


@pytest.fixture(scope="module")
def base_without_weights(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("no_weights") / "base"
    shutil.copytree(base_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    assert not list(folder.glob("*.safetensors"))
    return folder


@pytest.fixture
def call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, rows_file: Path,
    base_without_weights: Path,
) -> Call:  # fmt: skip
    """Return a function: words in, exit status, output and errors out; in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    general = "".join(json.dumps({"prompt": f"<b>{i}</b>", "completion": "yes"}) + "\n" for i in range(40))
    Path("general.jsonl").write_text(general)
    source = f"source: {rows_file}"
    mix = f"mix: [{{source: {rows_file}}}, {{source: general.jsonl, share: 0.25}}]"
    for name, data in (("one", source), ("mixed", mix)):
        Path(f"{name}.yaml").write_text(RECIPE.format(base=base_without_weights, data=data))

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["llm-align", *arguments])
        status = 0
        try:
            cli.main()
        except SystemExit as end:
            status = int(end.code or 0)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def preview_data(call: Call, *arguments: str) -> dict[str, Any]:
    status, out, err = call("data", *arguments, "--json")
    assert (status, err) == (0, "")
    preview: dict[str, Any] = json.loads(out)
    return preview


def test_the_statistics_match_the_rows(call: Call) -> None:
    preview = preview_data(call, "one.yaml", "--rows", "42")
    rows = preview["shown"]
    assert (preview["rows"], preview["held_out"], len(rows)) == (42, 6, 42)
    assert preview["tokens"] == sum(row["tokens"] for row in rows)
    assert preview["trained_tokens"] == sum(row["trained_tokens"] for row in rows)
    assert preview["trained_share"] == pytest.approx(preview["trained_tokens"] / preview["tokens"])
    assert preview["steps"] == 2 * 6  # 42 rows in batches of 8, twice
    assert preview["token_budget"] == 2 * preview["tokens"]
    lengths = sorted(row["tokens"] for row in rows)
    assert preview["longest"] == lengths[-1]
    assert preview["lengths"]["median"] == pytest.approx((lengths[20] + lengths[21]) / 2)
    for bar in preview["lengths"]["histogram"]:
        assert bar["rows"] == sum(bar["from"] <= length <= bar["to"] for length in lengths)
    assert sum(bar["rows"] for bar in preview["lengths"]["histogram"]) == 42
    assert len({row["where"] for row in rows}) == 42


def test_rows_are_shown_as_the_model_sees_them(call: Call) -> None:
    for row in preview_data(call, "one.yaml")["shown"]:
        prompt_span, trained_span = row["pieces"]
        assert (prompt_span["trained"], trained_span["trained"]) == (False, True)
        assert (
            prompt_span["text"].startswith("Below is an instruction")
            and "### Response:" in prompt_span["text"]
        )
        number, end = trained_span["text"].split("</s>")
        assert number.strip().isdigit() and end == "", "the end of the reply is learnt"


def test_a_mixture_reports_requested_and_actual_shares(call: Call) -> None:
    preview = preview_data(call, "mixed.yaml", "--rows", "4")
    # A quarter of the rows held out is general too; the sums that are left are then three quarters.
    sums, general = preview["sources"]
    assert (sums["target_rate"], general["target_rate"]) == pytest.approx((0.75, 0.25))
    assert sums["rows"] + general["rows"] == preview["rows"]
    assert abs(general["rows"] - 0.25 * preview["rows"]) < 1
    assert sum(source["trained_tokens"] for source in preview["sources"]) == preview["trained_tokens"]
    assert [row["source"] for row in preview["shown"]] == [0, 1, 0, 1], "each source in turn"
    assert len(preview["notes"]) == 1 and "is exhausted" in preview["notes"][0]


def test_max_steps_decide_the_budget(call: Call) -> None:
    preview = preview_data(call, "one.yaml", "train.max_steps=3")
    assert preview["steps"] == 3 and preview["token_budget"] == round(preview["tokens"] / 42 * 24)


def test_truncation_is_reported(call: Call) -> None:
    rows = [{"instruction": "a", "output": "b"}] * 3 + [
        {"instruction": "", "output": "x"},
        {"instruction": "long", "output": "word " * 300},
    ]
    Path("bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    preview = preview_data(call, "one.yaml", "--data", "bad.jsonl", "data.held_out=0")
    counts = {count["what"]: count["rows"] for count in preview["counts"]}
    assert counts == {
        "dropped: empty turn": 1,
        "identical to an earlier row (not dropped)": 2,
        "longer than 128 tokens, truncated": 1,
    }
    status, out, _ = call("data", "one.yaml", "--data", "bad.jsonl", "data.held_out=0")
    assert (
        status == 0
        and "rows identical to an earlier row (not dropped): 2 (first: bad.jsonl:2 repeats bad.jsonl:1)"
        in out
    )


def test_the_terminal_marks_trained_tokens(call: Call) -> None:
    status, out, _ = call("data", "mixed.yaml", "--rows", "2")
    assert status == 0 and out.startswith("sft mixed  sums\n")
    assert out.count("</s>⟧") == 2 and "rows as the model sees them, ⟦trained tokens⟧:" in out
    assert "general.jsonl" in out and "25.0%" in out and "optimizer steps" in out
    assert "█" in out


def test_a_color_terminal_shows_trained_tokens_in_green(call: Call) -> None:
    terminal = Console(file=StringIO(), force_terminal=True, color_system="standard", width=200)
    print_preview(preview_data(call, "one.yaml", "--rows", "1"), terminal, page=None)
    assert isinstance(terminal.file, StringIO)
    out = terminal.file.getvalue()
    green = re.findall(r"\x1b\[1;32m(.*?)\x1b\[0m", out)
    assert green[0] == "trained tokens" and green[1].endswith("</s>") and "⟦" not in out


def test_long_spans_are_shortened_in_the_terminal() -> None:
    assert data_terminal._elided("a" * 1200) == "a" * 1200
    assert data_terminal._elided("a" * 2000) == "a" * 900 + " [… 800 characters …] " + "a" * 300


def test_no_rows_are_shown_if_none_are_requested(call: Call) -> None:
    status, out, _ = call("data", "one.yaml", "--rows", "0")
    assert status == 0 and "⟦" not in out and "12 optimizer steps" in out


class Page(HTMLParser):
    """Collects the elements of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.marked: list[str] = []
        self.cells: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [str(value) for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "br", "link"):
            self.open.append(tag)
        if tag == "mark":
            self.marked.append("")
        if tag == "td":
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["mark"]:
            self.marked[-1] += data
        if self.open[-1:] == ["td"]:
            self.cells[-1] += data


def test_the_page_is_self_contained_and_equal(call: Call) -> None:
    status, out, _ = call("data", "mixed.yaml", "--rows", "4", "--html", "page.html")
    assert status == 0 and out.rstrip().endswith("page     page.html")
    preview = preview_data(call, "mixed.yaml", "--rows", "4")
    text = Path("page.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    assert page.open == [] and page.links == [] and "script" not in page.tags and "b" in page.tags
    assert "&lt;b&gt;" in text, "what the data holds is text, no markup"
    trained_texts = [piece["text"] for row in preview["shown"] for piece in row["pieces"] if piece["trained"]]
    assert page.marked == ["trained tokens", *trained_texts]
    numbers = [f"{source['rows']:,}" for source in preview["sources"]]
    assert all(number in page.cells for number in numbers) and "25.0%" in page.cells
    assert f"<b>{preview['steps']:,}</b>" in text and f"<b>{preview['token_budget']:,}</b>" in text


def test_a_page_that_cannot_be_written(call: Call) -> None:
    status, _, err = call("data", "one.yaml", "--html", "nowhere/page.html")
    assert status == 2 and "--html nowhere/page.html: cannot be written" in err


def test_data_errors_exit_with_2(call: Call) -> None:
    Path("wrong.jsonl").write_text('{"q": "a"}\n')
    status, _, err = call("data", "one.yaml", "--data", "wrong.jsonl")
    assert status == 2 and "no known layout has columns q" in err


@pytest.mark.parametrize(
    ("longest", "width"), [(1, 1), (12, 1), (13, 2), (60, 5), (61, 8), (512, 50), (2048, 200)]
)
def test_bars_have_round_edges(longest: int, width: int) -> None:
    assert data_preview._bar_width(longest) == width


def test_the_header_is_printed_before_heavy_imports(
    tmp_path: Path, rows_file: Path, base_without_weights: Path
) -> None:
    recipe = tmp_path / "one.yaml"
    recipe.write_text(RECIPE.format(base=base_without_weights, data=f"source: {rows_file}"))
    program = f"""
import sys
from align.cli import data_terminal
from finetune.recipe.recipe import read_recipe
from rich.console import Console
data_terminal.print_header(read_recipe("sft", {str(recipe)!r}), Console())
print(sorted({{"torch", "transformers", "datasets"}} & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.startswith("sft one  sums\n") and result.stdout.endswith("[]\n")
