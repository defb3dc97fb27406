"""``llm-align data`` on prompts: no trained tokens and no step count."""

from io import StringIO

from rich.console import Console

from align.cli.data_preview import preview, write_page
from align.cli.data_terminal import print_preview
from finetune.recipe.recipe import read_recipe


def test_prompts_are_previewed_without_trained_tokens(online_recipes, tmp_path):
    facts = preview(read_recipe("rloo", str(online_recipes["rloo"])), rows=2)
    assert facts["prompts"] and (facts["rows"], facts["held_out"], facts["trained_tokens"]) == (24, 6, 0)
    assert (facts["max_length"], facts["max_length_reason"]) == (
        250,
        "6 tokens are reserved for the completion",
    )
    pieces = [piece for row in facts["shown"] for piece in row["pieces"]]
    assert len(pieces) == 2 and [piece for piece in pieces if piece["trained"]] == []
    assert facts["shown"][0]["pieces"][0]["text"].startswith("Add ")
    assert facts["steps"] is None and facts["token_budget"] is None
    printed = StringIO()
    print_preview(facts, Console(file=printed, width=200), page=None)
    output = printed.getvalue()
    assert "24 prompts (prompt), 6 held out; " in output and "the loss is on completions sampled" in output
    assert "optimizer steps" not in output and "have loss" not in output
    write_page(facts, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<div>prompts<b>24</b></div>" in page and "optimizer steps" not in page


def test_mixture_of_prompts_has_no_trained_tokens_column(online_recipes, tmp_path):
    for name in "ab":
        rows = "".join(f'{{"prompt": "{name} {number}"}}\n' for number in range(8))
        (tmp_path / f"{name}.jsonl").write_text(rows, encoding="utf-8")
    mixed = {"data.source": None, "data.mix": [{"source": str(tmp_path / f"{name}.jsonl")} for name in "ab"]}
    facts = preview(read_recipe("grpo", str(online_recipes["grpo"]), shortcuts=mixed), rows=1)
    printed = StringIO()
    print_preview(facts, Console(file=printed, width=200), page=tmp_path / "page.html")
    write_page(facts, tmp_path / "page.html")
    assert "requested" in printed.getvalue() and " trained\n" not in printed.getvalue()
    assert "of trained tokens" not in (tmp_path / "page.html").read_text(encoding="utf-8")
