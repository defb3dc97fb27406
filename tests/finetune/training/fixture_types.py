"""The types of this folder's fixtures; not in conftest.py, a name that several folders have."""

from collections.abc import Callable

from finetune.recipe.recipe import Recipe
from finetune.training.result import Result

MakeRecipe = Callable[..., Recipe]
Tune = Callable[..., Result]
