"""Cross-field checks of a DPO recipe, before anything is loaded."""

from collections.abc import Collection, Iterator

from align.dpo.settings import DPOSettings
from align.dpo.trl_losses import NATIVE_ENGINE_REPAIR, trl_loss_arguments
from align.preference.losses.catalog import find_loss
from finetune.recipe.checks import adapter_traits
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.settings import StageSettings


def preference_problems(
    settings: StageSettings, dpo: DPOSettings, valid: Collection[str]
) -> Iterator[Problem]:
    """Yield the problems of a preference recipe; checks that read an invalid section are skipped.

    Args:
        settings: all sections.
        dpo: the stage's own section.
        valid: names of the sections that passed validation.
    """
    if "dpo" in valid:
        yield from dpo.problems()
    if "train" in valid:
        yield from _sft_only_problems(settings)
    if "data" in valid:
        yield from _packing_problems(settings)
    if {"dpo", "adapter"} <= set(valid):
        yield from _live_reference_problems(settings, dpo)
    if {"dpo", "train"} <= set(valid):
        yield from _stop_rule_problems(settings, dpo)
        if settings.train.engine == "trl":
            yield from _trl_problems(dpo)
    if {"adapter", "train"} <= set(valid) and settings.train.engine == "trl":
        yield from trl_copy_problems(settings)


def _sft_only_problems(settings: StageSettings) -> Iterator[Problem]:
    train = settings.train
    if train.neftune_alpha is not None:
        expected = "null: NEFTune noise would change the policy's log-probabilities but not the reference's"
        actual = f"{train.neftune_alpha:g}"
        yield Problem("train.neftune_alpha", actual, expected, "train.neftune_alpha=null")
    if train.label_smoothing:
        expected = "0: preference losses compare completions and have no token labels to smooth"
        repair = f"dpo.loss={{name: cdpo, label_smoothing: {train.label_smoothing:g}}} for noisy labels"
        yield Problem("train.label_smoothing", f"{train.label_smoothing:g}", expected, repair)


def _packing_problems(settings: StageSettings) -> Iterator[Problem]:
    if settings.data.packing:
        expected = "false: a prompt and its completions share a row already, and groups fill up the rows"
        yield Problem("data.packing", "true", expected, "data.packing=false")


def _live_reference_problems(settings: StageSettings, dpo: DPOSettings) -> Iterator[Problem]:
    method = settings.adapter.method
    if dpo.reference == "live" and adapter_traits(method).full_finetuning:
        expected = "precomputed: a live reference would keep a second copy of the model in memory"
        actual = f"'live' with adapter.method '{method}'"
        yield Problem("dpo.reference", actual, expected, "dpo.reference=precomputed")


def _stop_rule_problems(settings: StageSettings, dpo: DPOSettings) -> Iterator[Problem]:
    if dpo.max_chosen_logp_drop is not None and not settings.train.evaluate_every:
        actual = f"{dpo.max_chosen_logp_drop:g}, but train.evaluate_every is null"
        expected = "held-out evaluations during training"
        yield Problem("dpo.max_chosen_logp_drop", actual, expected, "train.evaluate_every=50")


def _trl_problems(dpo: DPOSettings) -> Iterator[Problem]:
    if dpo.reference == "live":
        expected = "with train.engine 'trl': precomputed"
        yield Problem(
            "dpo.reference", "'live'", expected, f"dpo.reference=precomputed, or {NATIVE_ENGINE_REPAIR}"
        )
    # An invalid loss is reported by `preference_problems` already.
    if not dpo.problems():
        loss = find_loss(dpo.loss_name, where="dpo.loss")
        try:
            trl_loss_arguments(loss.name, loss.settings(dpo.loss_settings, where="dpo.loss"))
        except UserError as error:
            yield from error.problems


def trl_copy_problems(settings: StageSettings) -> Iterator[Problem]:
    """Yield a problem if the adapter changes the base weights: TRL copies the adapter for its reference."""
    method = settings.adapter.method
    if adapter_traits(method).changes_base:
        actual = f"'{method}', which changes the base weights at initialization"
        expected = "with train.engine 'trl': an adapter that leaves the base unchanged; TRL copies it"
        yield Problem("adapter.method", actual, expected, "adapter.method=lora")
