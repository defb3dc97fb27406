"""Load a recipe's preference data and log the data report."""

from align.preference.rows.dataset import PreparedPreferences
from align.preference.rows.prepare import Kind, prepare_preferences
from align.preference.settings import PreferenceSettings
from finetune.training.job import Job
from finetune.training.text import Text


def load_preferences(
    job: Job, settings: PreferenceSettings, text: Text, *, kind: Kind = "rankings"
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
    seed = job.recipe.settings.train.seed
    with job.timed("data"):
        data = prepare_preferences(settings, text.encoder, max_length=text.max_length, seed=seed, kind=kind)
    for line in data.report.lines():
        job.say(line)
    return data
