"""Cross-field checks of a DPO recipe, before anything is loaded."""

from collections.abc import Collection, Iterator

from align.dpo.settings import AlignSettings
from align.dpo.trl_losses import NATIVE, trl_loss
from align.preference.losses.catalogue import find_loss
from finetune.recipe.checks import adapter_traits
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.settings import StageSettings


def contradictions(
    settings: StageSettings, align: AlignSettings, valid: Collection[str]
) -> Iterator[Problem]:
    """Yield the problems of a preference recipe; checks that read an invalid section are skipped.

    Args:
        settings: all sections.
        dpo: the stage's own section.
        valid: names of the sections that passed validation.
    """
    if "align" in valid:
        yield from align.problems()
    if "train" in valid:
        yield from _of_supervised_tuning(settings)
    if "data" in valid:
        yield from _packing(settings)
    if {"align", "adapter"} <= set(valid):
        yield from _live_reference(settings, align)
    if {"align", "train"} <= set(valid):
        yield from _stop_rule(settings, align)
        if settings.train.engine == "trl":
            yield from _of_trl(align)
    if {"adapter", "train"} <= set(valid) and settings.train.engine == "trl":
        yield from copied_by_trl(settings)


def _of_supervised_tuning(settings: StageSettings) -> Iterator[Problem]:
    train = settings.train
    if train.neftune_alpha is not None:
        expected = "null: NEFTune noise would change the policy's log-probabilities but not the reference's"
        found = f"{train.neftune_alpha:g}"
        yield Problem("train.neftune_alpha", found, expected, "train.neftune_alpha=null")
    if train.label_smoothing:
        expected = "0: preference losses compare completions and have no token labels to smooth"
        repair = f"align.loss={{name: cdpo, label_smoothing: {train.label_smoothing:g}}} for noisy labels"
        yield Problem("train.label_smoothing", f"{train.label_smoothing:g}", expected, repair)


def _packing(settings: StageSettings) -> Iterator[Problem]:
    if settings.data.packing:
        expected = "false: a prompt and its completions share a row already, and groups fill up the rows"
        yield Problem("data.packing", "true", expected, "data.packing=false")


def _live_reference(settings: StageSettings, align: AlignSettings) -> Iterator[Problem]:
    method = settings.adapter.method
    if align.reference == "live" and adapter_traits(method).whole_model:
        expected = "precomputed: a live reference would keep a second copy of the model in memory"
        found = f"'live' with adapter.method '{method}'"
        yield Problem("align.reference", found, expected, "align.reference=precomputed")


def _stop_rule(settings: StageSettings, align: AlignSettings) -> Iterator[Problem]:
    if align.stop_when_chosen_falls is not None and not settings.train.evaluate_every:
        found = f"{align.stop_when_chosen_falls:g}, but train.evaluate_every is null"
        expected = "held-out evaluations during training"
        yield Problem("align.stop_when_chosen_falls", found, expected, "train.evaluate_every=50")


def _of_trl(align: AlignSettings) -> Iterator[Problem]:
    if align.reference == "live":
        expected = "with train.engine 'trl': precomputed"
        yield Problem("align.reference", "'live'", expected, f"align.reference=precomputed, or {NATIVE}")
    if not align.problems():
        loss = find_loss(align.loss_name, where="align.loss")
        try:
            trl_loss(loss.name, loss.settings(align.loss_settings, where="align.loss"))
        except UserError as error:
            yield from error.problems


def copied_by_trl(settings: StageSettings) -> Iterator[Problem]:
    """Yield a problem if the adapter changes the base weights: TRL copies the adapter for its reference."""
    method = settings.adapter.method
    if adapter_traits(method).changes_base:
        found = f"'{method}', which changes the base weights at initialization"
        expected = "with train.engine 'trl': an adapter that leaves the base unchanged; TRL copies it"
        yield Problem("adapter.method", found, expected, "adapter.method=lora")
