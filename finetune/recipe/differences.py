"""Settings in which resolved recipes differ."""

from collections.abc import Mapping, Sequence
from typing import Any

Sections = Mapping[str, Any]


def flat_settings(content: Sections) -> dict[str, Any]:
    """Return the settings of a recipe by ``section.key``; keys outside of sections are left out.

    >>> flat_settings({"stage": "sft", "train": {"seed": 1}})
    {'train.seed': 1}
    """
    return {
        f"{section}.{key}": value
        for section, values in content.items()
        if isinstance(values, dict)
        for key, value in values.items()
    }


def differing_settings(recipes: Sequence[Sections]) -> dict[str, list[Any]]:
    """Return the values of each setting in which recipes differ, None where a recipe lacks it.

    >>> differing_settings([{"train": {"seed": 1, "epochs": 1}}, {"train": {"seed": 2, "epochs": 1}}])
    {'train.seed': [1, 2]}
    """
    flat = [flat_settings(content) for content in recipes]
    keys = dict.fromkeys(key for settings in flat for key in settings)
    values = {key: [settings.get(key) for settings in flat] for key in keys}
    return {key: own for key, own in values.items() if any(value != own[0] for value in own)}
