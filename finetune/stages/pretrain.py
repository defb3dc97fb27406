"""Continued pretraining: causal language modeling on your own text, with loss on every token.

The loss is the mean negative log-likelihood per token, L = -(1/N) sum_t log p(x_t | x_<t) (Gururangan et al.
2020, arXiv 2004.10964). Conversations are rendered with `data.template`: continued pretraining on a task's
text with its prompts (PCP: Shi & Lipani 2023, arXiv 2305.01711).
"""

from finetune.recipe.settings import DocumentSettings, StageSettings
from finetune.stages.sft import build as build

PUBLIC = "in-house"
"""Default recipe if a base other than the bundled one is given without a recipe."""


class Settings(StageSettings):
    """Settings of every stage; the data are documents."""

    data: DocumentSettings = DocumentSettings()
