"""The TRL engine: TRL's own preference trainers, fed the same tokens.

TRL's trainers for preferences tokenise strings themselves, and not every token sequence has a string that is
tokenised to it (text that is written apart, a prompt that was cut). So a trainer is made with a row of its
own words, and then given ours as ``train_dataset``, the Trainer's public attribute, in the columns of ids
that its collator documents.
"""

from datasets import Dataset

from align.preference.dataset import PreferenceGroups


def pair_columns(groups: PreferenceGroups) -> Dataset:
    """Return pairs as TRL's ``DataCollatorForPreference`` takes them: ids of prompt and completions."""
    rows = [groups[index] for index in range(len(groups))]
    assert all(len(row.completion_ids) == 2 for row in rows), "pairs"
    return Dataset.from_dict(
        {
            "prompt_ids": [row.prompt_ids.tolist() for row in rows],
            "chosen_ids": [row.completion_ids[0].tolist() for row in rows],
            "rejected_ids": [row.completion_ids[1].tolist() for row in rows],
        }
    )
