"""Generated parts of pages: their names, and their place in a page."""

import re
from collections.abc import Callable
from pathlib import Path

from tools.docs import (
    catalog,
    command_line,
    compatibility,
    endpoints,
    engine_args,
    families,
    foreign_names,
    graders,
    keys,
    layouts,
    memory,
    preflight,
)

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^<!-- generated: (?P<call>[\w. -]+) -->\n(?P<content>.*?)^<!-- end -->$", re.M | re.S)
ELSEWHERE = ("adapter-matrix",)
"""Parts that a program of the tests writes, because it runs them."""

BLOCKS: dict[str, Callable[..., str]] = {
    "adapters": catalog.adapters,
    "adapter-keys": keys.adapter_keys,
    "all-keys": keys.all_keys,
    "bases": catalog.bases,
    "checks": preflight.checks,
    "cli-all": command_line.all_commands,
    "compatibility-all": compatibility.all_tables,
    "endpoint-keys": endpoints.endpoint_keys,
    "engine-args": engine_args.passed_on,
    "engine-args-refused": engine_args.not_passed_on,
    "exit-status": command_line.exit_status,
    "families": families.families,
    "foreign-names": foreign_names.names,
    "foreign-values": foreign_names.values,
    "gpus": catalog.gpus,
    "grader-options": graders.options,
    "graders": graders.graders,
    "judge-keys": endpoints.judge_keys,
    "keys": keys.section_keys,
    "layouts": layouts.layouts,
    "losses": catalog.losses,
    "memory": memory.memory_table,
    "metrics": catalog.metrics,
    "pipelines": catalog.pipelines,
    "recipes": catalog.recipes,
    "suite-layouts": graders.layouts,
    "suites": graders.suites,
    "stages": catalog.stages,
    "templates": catalog.templates,
}


def pages() -> list[Path]:
    """Return the pages that may have generated parts."""
    return [*sorted(ROOT.glob("README*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def render_page(text: str) -> str:
    """Return a page with its generated parts written from the code.

    Raises:
        KeyError: a page asks for a part that does not exist.
    """
    return BLOCK.sub(_part, text)


def replace_block(text: str, call: str, content: str) -> str:
    """Return a page with one generated part replaced.

    Raises:
        ValueError: the page has no such part.
    """
    opening = f"<!-- generated: {call} -->\n"
    before, found, rest = text.partition(opening)
    if not found:
        raise ValueError(f"no part {opening.strip()}")
    _, end, after = rest.partition("<!-- end -->")
    return f"{before}{opening}{content}{end}{after}"


def _part(match: re.Match[str]) -> str:
    name, *arguments = match["call"].split()
    content = match["content"] if name in ELSEWHERE else BLOCKS[name](*arguments).rstrip("\n") + "\n"
    return f"<!-- generated: {match['call']} -->\n{content}<!-- end -->"
