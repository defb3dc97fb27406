"""A recipe's preferences, read and tokenised for a stage at work, and what was found, told."""

from align.preference.rows.dataset import PreparedPreferences
from align.preference.rows.prepare import Kind, prepare_preferences
from align.preference.settings import PreferenceSettings
from finetune.training.job import Job
from finetune.training.text import Text


def load_preferences(
    job: Job, settings: PreferenceSettings, text: Text, *, kind: Kind = "rankings"
) -> PreparedPreferences:
    """Read and tokenise a recipe's preferences, and tell what was found.

    Args:
        job: the stage at work.
        settings: its data section.
        text: template and tokenizer.
        kind: comparisons, or replies that bear a label.

    Raises:
        UserError: mistakes in the data, with file, line and field.
    """
    seed = job.recipe.settings.train.seed
    with job.timed("data"):
        data = prepare_preferences(settings, text.encoder, max_length=text.max_length, seed=seed, kind=kind)
    for line in data.report.lines():
        job.say(line)
    return data
