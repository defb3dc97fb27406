"""The loss catalog: parsed declarations agree with the functions and their behavior."""

import inspect
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from preference_batches import random_batch, random_lists

from align.preference.losses import inputs
from align.preference.losses.catalog import Loss, all_losses, find_loss
from align.preference.losses.inputs import Interval, Lists, Pairs
from finetune.recipe.errors import UserError

LOSSES = all_losses()
FOLDER = Path(inputs.__file__).parent
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def test_what_there_is() -> None:
    names = "dpo cdpo robust ipo hinge slic simpo cpo orpo apo_zero apo_down exo rpo plackett_luce rrhf pro"
    assert [name for name in LOSSES if name in names.split()] == names.split(), "all of them, in this order"
    assert LOSSES["ipo"].defaults == {"beta": 0.1, "length_normalized": False}
    assert LOSSES["ipo"].allowed == {"beta": Interval(0), "length_normalized": (False, True)}


@each_loss
def test_parsed_declaration_matches_the_function(loss: Loss) -> None:
    """Python's own view of the function: its settings, their annotations, what it takes, its needs."""
    function = loss.function()
    parameters = list(inspect.signature(function).parameters.values())
    hints = get_type_hints(function, include_extras=True)
    takes, needs = get_args(hints[parameters[0].name])
    assert (takes, needs) == ({"Pairs": Pairs, "Lists": Lists}[loss.takes], loss.needs)
    assert {setting.name: setting.default for setting in parameters[1:]} == loss.defaults
    for setting in parameters[1:]:
        assert setting.kind is setting.KEYWORD_ONLY
        allowed = loss.allowed[setting.name]
        assert allowed == get_args(hints[setting.name]) or allowed == get_args(hints[setting.name])[1]
        assert setting.default in allowed
    assert function.__doc__ is not None and function.__doc__.startswith(loss.summary)
    assert loss.summary.endswith(".") and ("arXiv" in function.__doc__ or "Mitchell" in function.__doc__)


@each_loss
def test_a_reference_is_needed_exactly_where_it_is_declared(loss: Loss) -> None:
    with_one = random_batch(loss, reference=True)
    without = random_batch(loss, reference=False)
    if loss.needs.reference:
        with pytest.raises(ValueError, match="needs reference log-probabilities; none were given"):
            loss.function()(without)
    else:
        torch.testing.assert_close(loss.function()(with_one), loss.function()(without), rtol=0, atol=0)


def scaled_lengths(batch: Pairs | Lists, factor: int, *, lengths_only: bool) -> Pairs | Lists:
    """Return the batch with all lengths times a factor, and its log-probabilities too unless told not to."""
    fields = {name: getattr(batch, name) for name in type(batch).__slots__ if name != "scores"}
    return replace(
        batch,
        **{
            name: value * factor
            for name, value in fields.items()
            if value is not None and ("length" in name or not lengths_only)
        },
    )


@each_loss
@pytest.mark.parametrize("over_tokens", ["sum", "mean"])
def test_sums_and_means_are_as_declared(loss: Loss, over_tokens: str) -> None:
    """A sum does not see lengths; a mean does not see that tokens and log-probabilities are doubled."""
    batch, settings = random_batch(loss), {"nll_weight": 0.0} if loss.needs.nll else {}
    if loss.needs.over_tokens == "setting":
        settings["length_normalized"] = over_tokens == "mean"
    declared = over_tokens if loss.needs.over_tokens == "setting" else loss.needs.over_tokens
    value = loss.function()(batch, **settings).losses
    longer = loss.function()(scaled_lengths(batch, 2, lengths_only=True), **settings).losses
    doubled = loss.function()(scaled_lengths(batch, 2, lengths_only=False), **settings).losses
    assert torch.equal(longer, value) == (declared == "sum")
    assert torch.allclose(doubled, value, atol=1e-12) == (declared == "mean")


@each_loss
def test_a_likelihood_term_is_the_best_completion_s_alone(loss: Loss) -> None:
    """One more of its weight adds something that falls as the best completion rises, and sees no other."""
    assert ("nll_weight" in loss.defaults) == loss.needs.nll
    if not loss.needs.nll:
        return
    lists = random_lists(3, 2 if loss.takes == "Pairs" else 4)
    lists.logps.requires_grad_()
    batch = lists.pairs() if loss.takes == "Pairs" else lists
    light, heavy = (loss.function()(batch, nll_weight=weight).losses for weight in (1.0, 2.0))
    (slope,) = torch.autograd.grad((heavy - light).sum(), lists.logps)
    assert (slope[lists.best] < -0.05).all() and not slope[~lists.best].any()


def toy_step(loss: Loss, rate: float = 0.05) -> tuple[float, float]:
    """Return the log-ratio of best to worst completion before and after a step of a tabular policy.

    Three completions of three tokens each, from a vocabulary of five, with one table of logits.
    """
    tokens, lengths = torch.tensor([[[0, 1, 1], [2, 3, 0], [4, 4, 2]]]), torch.full((1, 3), 3)
    scores = torch.tensor([[3.0, 2.0, 1.0]])
    generator = torch.Generator().manual_seed(11)
    table = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    reference = table.log_softmax(-1)[torch.arange(3), tokens].sum(-1)
    table.requires_grad_()

    def logps() -> torch.Tensor:
        return table.log_softmax(-1)[torch.arange(3), tokens].sum(-1)

    def log_ratio() -> float:
        return (logps()[0, 0] - logps()[0, 2]).item()

    before = log_ratio()
    lists = Lists(logps(), lengths, scores, reference)
    loss.function()(lists if loss.takes == "Lists" else lists.pairs()).losses.mean().backward()
    assert table.grad is not None
    with torch.no_grad():
        table -= rate * table.grad
    return before, log_ratio()


@each_loss
def test_a_step_down_raises_the_best_over_the_worst(loss: Loss) -> None:
    before, after = toy_step(loss)
    assert after > before + 1e-4


def test_an_unknown_loss_names_the_nearest() -> None:
    with pytest.raises(UserError) as caught:
        find_loss("sinpo", where="dpo.loss.name")
    assert str(caught.value).startswith(
        "dpo.loss.name: the loss 'sinpo' is unknown\n    expected: one of dpo, "
    )
    assert "did you mean 'simpo'?" in str(caught.value)


def test_settings_are_checked_all_at_once() -> None:
    loss = find_loss("cdpo", where="dpo.loss.name")
    assert loss.settings({"beta": 1}, where="dpo.loss") == {"beta": 1, "label_smoothing": 0.1}
    with pytest.raises(UserError) as caught:
        loss.settings({"beta": 0, "label_smoothing": 0.5, "betta": 1.0}, where="dpo.loss")
    assert str(caught.value).splitlines() == [
        "dpo.loss.beta: found 0",
        "    expected: a number above 0",
        "dpo.loss.label_smoothing: found 0.5",
        "    expected: a number 0 or more and below 0.5",
        "dpo.loss.betta: unknown setting",
        "    expected: for the loss 'cdpo': one of beta, label_smoothing",
        "    repair:   did you mean 'beta'?",
    ]


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("ipo", {"length_normalized": "median"}, "true or false"),
        ("dpo", {"beta": "much"}, "a number above 0"),
        ("dpo", {"beta": True}, "a number above 0"),
        ("dpo", {"beta": float("nan")}, "a number above 0"),
        ("dpo", {"beta": 10**400}, "a number above 0"),
        ("exo", {"label_smoothing": 0}, "a number above 0 and below 0.5"),
        ("simpo", {"margin": -0.1}, "a number 0 or more"),
    ],
)
def test_each_setting_has_its_range(name: str, settings: dict[str, float | str], expected: str) -> None:
    with pytest.raises(UserError, match=rf"expected: {expected}$"):
        find_loss(name, where="dpo.loss.name").settings(settings, where="dpo.loss")


ALONE = """
import importlib.abc, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {refused!r}:
            raise ImportError("refused: " + name)

sys.meta_path.insert(0, Refuse())
"""


def run_alone(refused: set[str], code: str) -> str:
    """Run code where some libraries are missing."""
    start = ALONE.format(refused=refused)
    answer = subprocess.run(
        [sys.executable, "-c", start + code],
        capture_output=True,
        text=True,
        check=True,
        cwd=FOLDER.parents[2],
    )
    return answer.stdout.strip()


def test_losses_import_only_torch() -> None:
    others = {"transformers", "peft", "trl", "accelerate", "datasets", "pydantic", "ruamel", "finetune"}
    names = "listwise, metrics, pairwise, reward, unpaired"
    code = f"from align.preference.losses import {names}\nprint(pairwise.dpo.__name__)"
    assert run_alone(others, code) == "dpo"


def test_catalog_needs_no_torch() -> None:
    load = "from align.preference.losses.catalog import find_loss"
    code = f"{load}\nprint(find_loss('ipo', where='').needs.reference)"
    assert run_alone({"torch", "transformers", "pydantic"}, code) == "True"
