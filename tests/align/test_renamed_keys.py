"""A recipe key, section, value or stage that was renamed is refused with its new name."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from align.pipeline.plan import resolve_pipeline
from finetune.recipe.discovery import (
    ADAPTERS,
    adapter_settings,
    plugin_names,
    stage_names,
    stage_of_verb,
    verb_of,
)
from finetune.recipe.errors import UserError
from finetune.recipe.recipe import read_recipe, stage_settings
from finetune.recipe.renamed import RENAMED, SECTIONS, STAGES, VALUES

KEYS = [(old, new) for old, new in RENAMED.items() if "[]" not in old and ".loss." not in old]


def keys() -> Iterator[str]:
    """Yield every key that a recipe of any stage may hold."""
    for stage in stage_names():
        for section, field in stage_settings(stage).model_fields.items():
            settings: Any = field.annotation
            yield from (f"{section}.{key}" for key in settings.model_fields)
    yield from (
        f"adapter.{key}" for name in plugin_names(ADAPTERS) for key in adapter_settings(name).model_fields
    )
    data: Any = stage_settings("sft").model_fields["data"].annotation
    yield from (
        f"data.select.{key}" for key in data.model_fields["select"].annotation.__args__[0].model_fields
    )


def refused(stage: str, *words: str, **values: Any) -> list[str]:
    """Return the problems of a quickstart with other settings, without their origins."""
    with pytest.raises(UserError) as caught:
        read_recipe(stage, "quickstart", overrides=words, shortcuts=values)
    return [str(problem) for problem in caught.value.problems]


def test_new_names_are_keys_and_old_ones_are_not() -> None:
    known = set(keys())
    assert {new for _, new in KEYS} <= known
    assert not {old for old, _ in KEYS} & known
    assert not set(SECTIONS) & {key.split(".")[0] for key in known} - {"reward"}
    assert set(STAGES.values()) <= set(stage_names()) and not set(STAGES) & set(stage_names())


@pytest.mark.parametrize(
    ("old", "new"), [case for case in KEYS if case[0].split(".")[0] in ("model", "data", "train", "evaluate")]
)
def test_a_renamed_key_of_a_shared_section_names_its_new_one(old: str, new: str) -> None:
    [problem] = refused("sft", f"{old}=1" if old != "data.select.distinct" else "data.select={distinct: 1}")
    assert problem.startswith(f"{old} (command line): `{old}` was renamed to `{new}`\n    expected: {new}")


@pytest.mark.parametrize(
    ("stage", "word", "message"),
    [
        ("sft", "data.too_long=cut", "`data.too_long` was renamed to `data.overflow`"),
        ("sft", "data.too_long=cut", "repair:   write overflow: truncate"),
        ("sft", "data.loss_on=reply", "repair:   `reply` was renamed to `assistant`"),
        ("sft", "data.template=model", "repair:   `model` was renamed to `tokenizer`"),
        ("dpo", "align.loss=ipo", "align.loss (command line): `align.loss` was renamed to `dpo.loss`"),
        ("dpo", "align.loss.beta=0.2", "`align.loss.beta` was renamed to `dpo.loss.beta`"),
        ("dpo", "align.stop_when_chosen_falls=1", "renamed to `dpo.max_chosen_logp_drop`"),
        ("dpo", "dpo.loss={name: ipo, over_tokens: mean}", "renamed to `dpo.loss.length_normalized`"),
        ("dpo", "dpo.loss={name: ipo, over_tokens: mean}", "repair:   write length_normalized: true"),
        ("kto", "align.beta=0.2", "`align.beta` was renamed to `kto.beta`"),
        ("grpo", "align.scale=none", "`align.scale` was renamed to `grpo.scale_rewards`"),
        ("rloo", "reward.sources=a.py:f", "`reward.sources` was renamed to `rewards.sources`"),
        ("ppo", "reward.risky=a.py:f", "`reward.risky` was renamed to `rewards.unsafe_prompt_fn`"),
        ("ppo", "ppo.kl_coefficient=0.1", "`ppo.kl_coefficient` was renamed to `ppo.kl_coef`"),
        ("ppo", "ppo.value_init=start", "`start` was renamed to `policy`"),
        ("rejection", "rejection.keep=best", "`best` was renamed to `best_of_n`"),
        ("chain_of_hindsight", "hindsight.good=Well.", "renamed to `chain_of_hindsight.good`"),
    ],
)
def test_a_renamed_name_on_the_command_line(stage: str, word: str, message: str) -> None:
    assert any(message in problem for problem in refused(stage, word))


def test_keys_of_a_renamed_section_are_reported_too(tmp_path: Path) -> None:
    file = tmp_path / "old.yaml"
    file.write_text(
        "stage: dpo\nmodel: {base: tiny}\ndata: {source: rows.jsonl}\nalign: {stop_when_chosen_falls: 1}\n"
    )
    with pytest.raises(UserError) as caught:
        read_recipe("dpo", str(file))
    told = str(caught.value)
    assert "align (old.yaml:4): `align` was renamed to `dpo`" in told
    assert "`dpo.stop_when_chosen_falls` was renamed to `dpo.max_chosen_logp_drop`" in told


def test_a_renamed_key_of_a_mixture_s_entry_and_of_an_adapter() -> None:
    [problem] = refused("sft", "data.source=null", "data.mix=[{source: a/b, select: {distinct: 1}}]")
    assert "`data.mix[0].select.distinct` was renamed to `data.mix[0].select.near_dedup`" in problem
    [problem] = refused("sft", "adapter.method=lora_plus", "adapter.ratio=4.0")
    assert "`adapter.ratio` was renamed to `adapter.lr_ratio`" in problem
    [problem] = refused("sft", "adapter.method=lora", "adapter.ratio=4.0")
    assert "unknown key" in problem, "lora has no such setting by any name"


def test_a_renamed_stage_is_reported_in_recipes_and_pipelines(tmp_path: Path) -> None:
    file = tmp_path / "old.yaml"
    file.write_text("stage: hindsight\nmodel: {base: tiny}\n")
    with pytest.raises(UserError, match="`hindsight` was renamed to `chain_of_hindsight`"):
        read_recipe("chain_of_hindsight", str(file))
    with pytest.raises(UserError, match="`hindsight` was renamed to `chain_of_hindsight`"):
        read_recipe("hindsight", "quickstart")
    own = tmp_path / "own.yaml"
    second = "  b: {recipe: dpo/quickstart, set: {align.loss: ipo}}\n"
    own.write_text(f"stages:\n  a: {{recipe: hindsight/quickstart}}\n{second}")
    with pytest.raises(UserError) as caught:
        resolve_pipeline(str(own))
    assert "`hindsight` was renamed to `chain_of_hindsight`" in str(caught.value)
    assert "stage b: align.loss (own.yaml:3): `align.loss` was renamed to `dpo.loss`" in str(caught.value)


def test_verbs_are_names_of_files_with_dashes() -> None:
    assert verb_of("chain_of_hindsight") == "chain-of-hindsight"
    assert {stage_of_verb(verb) for verb in ("coh", "chain-of-hindsight", "chain_of_hindsight")} == {
        "chain_of_hindsight"
    }
    assert [stage_of_verb(verb_of(stage)) for stage in stage_names()] == list(stage_names())


def test_a_retired_value_is_refused_with_its_new_value() -> None:
    known = set(keys())
    assert {key for key in VALUES if ".loss." not in key} <= known


def test_a_renamed_key_inside_a_mapping_names_its_new_one() -> None:
    [message] = refused("sft", "data.select.distinct=1")
    assert "`data.select.distinct` was renamed to `data.select.near_dedup`" in message
    assert "'data.select={near_dedup: 1}'" in message and "distinct: 1" not in message
