"""Load a recipe's preference data and log the data report."""

from align.preference.rows.dataset import PreparedPreferences
from align.preference.rows.prepare import PreferenceKind, prepare_preferences
from align.preference.settings import PreferenceSettings
from finetune.training.context import RunContext
from finetune.training.text_encoding import TextEncoding


def load_preferences(
    ctx: RunContext, settings: PreferenceSettings, text: TextEncoding, *, kind: PreferenceKind = "rankings"
) -> PreparedPreferences:
    """Read and tokenize a recipe's preference data, and log the data report.

    Args:
        ctx: the run.
        settings: its data section.
        text: template and tokenizer.
        kind: comparisons, or labeled completions.

    Raises:
        UserError: mistakes in the data, with file, line and field.
    """
    seed = ctx.recipe.settings.train.seed
    with ctx.timed("data"):
        data = prepare_preferences(settings, text.encoder, max_length=text.max_length, seed=seed, kind=kind)
    for line in data.report.lines():
        ctx.log(line)
    return data
