"""Tables of the data layouts that are detected by their columns."""

from collections.abc import Sequence
from typing import Any

from align.preference.rows.layouts import LABELED, PAIRS, RANKINGS
from finetune.data.layouts import CONVERSATION_LAYOUTS, DOCUMENT, Layout
from tools.docs.markdown import code, table

KINDS: dict[str, Sequence[Layout[Any]]] = {
    "conversations": [*CONVERSATION_LAYOUTS, DOCUMENT],
    "pairs": PAIRS,
    "rankings": RANKINGS,
    "labels": LABELED,
    "preferences": [*RANKINGS, *LABELED],
}


def layouts(kind: str) -> str:
    """Return the layouts of a kind in the order in which they are tried: name and columns.

    Raises:
        KeyError: unknown kind.
    """
    rows = [(layout.name, ", ".join(map(code, layout.required))) for layout in KINDS[kind]]
    return table(("layout", "columns"), rows)
