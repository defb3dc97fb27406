"""Fine-tune and align language models: ``from align import load_recipe, plan, run, load_tuned``."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from align.api import (
        compare,
        data,
        evaluate,
        finish,
        generate,
        load_pipeline,
        load_recipe,
        load_reward,
        load_tuned,
        plan,
        run,
        run_pipeline,
    )

__all__ = [
    "compare",
    "data",
    "evaluate",
    "finish",
    "generate",
    "load_pipeline",
    "load_recipe",
    "load_reward",
    "load_tuned",
    "plan",
    "run",
    "run_pipeline",
]


def __getattr__(name: str) -> Any:
    """Import the Python API on first use, so that importing a loss of this package needs torch only."""
    if name not in __all__:
        raise AttributeError(f"module 'align' has no attribute '{name}'")
    from align import api

    return getattr(api, name)
