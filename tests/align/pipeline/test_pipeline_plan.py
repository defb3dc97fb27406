"""A pipeline before it runs: what each stage comes to, and every mistake at once with nothing written."""

from pathlib import Path

import pytest
from small_pipelines import PIPELINE, Call

from align import load_pipeline
from align.pipeline.file import pipeline_names
from align.pipeline.plan import Pipeline
from finetune.recipe.errors import UserError

SHIPPED = sorted(pipeline_names())


def given(here: Path, text: str, **changes: object) -> Pipeline:
    (here / "own.yaml").write_text(text)
    return load_pipeline("own.yaml", settings=changes)


def told(here: Path, text: str, **changes: object) -> str:
    with pytest.raises(UserError) as refused:
        given(here, text, **changes)
    return str(refused.value)


def test_a_stage_inherits_adapter_template_and_base(here: Path) -> None:
    pipeline = given(here, PIPELINE, **{"sft.adapter.rank": 3, "sft.data.system_prompt": "Be short."})
    assert list(pipeline.recipes) == ["sft", "taste", "dpo"]
    for name in ("taste", "dpo"):
        settings = pipeline.recipes[name].settings
        assert settings.model.init_from == "sft" and settings.adapter.rank == 3
        assert settings.data.system_prompt == "Be short."


def test_override_precedence(here: Path) -> None:
    pipeline = given(here, PIPELINE, **{"dpo.train.batch_size": 4})
    train = pipeline.recipes["dpo"].settings.train
    assert (train.max_steps, train.batch_size, train.learning_rate) == (3, 4, 1e-2)
    origins = pipeline.recipes["dpo"].origins
    assert origins["train.max_steps"] == "own.yaml:5" and origins["train.batch_size"] == "command line"
    assert origins["model.init_from"] == "own.yaml:5" and origins["train.learning_rate"] == "small.yaml:4"
    assert given(here, PIPELINE, **{"dpo.train.max_steps": 7}).recipes["dpo"].settings.train.max_steps == 7


def test_a_section_may_be_set_as_a_mapping(here: Path) -> None:
    text = PIPELINE.replace("{train.max_steps: 3}", "{train: {max_steps: 3, epochs: 2}, dpo.loss: ipo}")
    own = given(here, text).recipes["dpo"]
    assert (own.settings.train.max_steps, own.settings.train.epochs) == (3, 2)
    assert own.origins["train.epochs"] == own.origins["dpo.loss"] == "own.yaml:5"


def test_the_digest_covers_settings_and_data_of_all_stages(here: Path) -> None:
    first = given(here, PIPELINE)
    assert given(here, PIPELINE).digest == first.digest
    assert given(here, f"# a comment\n{PIPELINE}").digest == first.digest
    others = {given(here, PIPELINE, **{f"{name}.train.seed": 1}).digest for name in first.recipes}
    assert len(others | {first.digest}) == 4
    (here / "pairs.jsonl").write_text((here / "pairs.jsonl").read_text().replace("numbers", "digits"))
    assert given(here, PIPELINE).digest not in others | {first.digest}


def test_the_resolved_file_is_the_same_pipeline(here: Path) -> None:
    pipeline = given(
        here, PIPELINE, **{"sft.train.epochs": 2.5, "taste.reward.center_rewards_coefficient": 0.1}
    )
    (here / "again.yaml").write_text(pipeline.to_yaml())
    again = load_pipeline("again.yaml")
    assert again.digest == pipeline.digest and again.name == "again"


def test_another_base_selects_the_public_stages(here: Path, base_folder: Path) -> None:
    text = PIPELINE + "public:\n  only: {recipe: sft/small}\n  then: {recipe: dpo/small, from: only}\n"
    (here / "own.yaml").write_text(text)
    assert list(load_pipeline("own.yaml").recipes) == ["sft", "taste", "dpo"]
    assert list(load_pipeline("own.yaml", base="tiny").recipes) == ["sft", "taste", "dpo"]
    public = load_pipeline("own.yaml", base=str(base_folder))
    assert list(public.recipes) == ["only", "then"]
    assert {recipe.settings.model.base for recipe in public.recipes.values()} == {str(base_folder)}
    assert "`public`" in public.notes[0]
    (here / "own.yaml").write_text(PIPELINE)
    bases = {recipe.settings.model.base for recipe in load_pipeline("own.yaml", base="tiny").recipes.values()}
    assert bases == {"tiny"}, "a file without `public` has one list of stages for every base"


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("base", [None, "llama-2-7b", "mistral-7b"])
def test_shipped_pipelines_are_valid(name: str, base: str | None) -> None:
    pipeline = load_pipeline(name, base=base)
    assert 20 < len(pipeline.description) <= 110
    assert all(recipe.settings.model.base == (base or "tiny") for recipe in pipeline.recipes.values())
    assert len(pipeline.entries) >= 2 and pipeline.entries[-1].init_from is not None


MISTAKES = {
    "no such key": (
        "stages:\n  sft: {recipe: sft/small, form: x}\n",
        ("stages.sft.form (own.yaml:2): unknown key", "did you mean 'from'?"),
    ),
    "no recipe": ("stages:\n  sft: {set: {}}\n", ("stages.sft.recipe (own.yaml:2): missing",)),
    "no stages": ("description: a\n", ("stages: missing",)),
    "not a mapping": (
        "stages: [sft/small]\n",
        ("stages (own.yaml:1): found ['sft/small']", "a mapping such as {name: value}"),
    ),
    "unknown stage": (
        "stages:\n  a: {recipe: stf/small}\n",
        ("stages.a.recipe (own.yaml:2): 'stf/small': unknown stage 'stf'", "did you mean 'sft'?"),
    ),
    "unknown recipe": (
        "stages:\n  a: {recipe: sft/smal}\n",
        ("'sft/smal': stage sft has no such recipe", "did you mean 'small'?"),
    ),
    "a stage alone": (
        "stages:\n  a: {recipe: sft}\n",
        ("stages.a.recipe (own.yaml:2): 'sft'", "repair:   sft/quickstart"),
    ),
    "a file that is not there": ("stages:\n  a: {recipe: b/c.yaml}\n", ("'b/c.yaml': no such file",)),
    "unknown reference": (
        "stages:\n  sft: {recipe: sft/small}\n  dpo: {recipe: dpo/small, from: stf}\n",
        ("stages.dpo.from (own.yaml:3): unknown stage 'stf'", "did you mean 'sft'?"),
    ),
    "a later stage": (
        "stages:\n  dpo: {recipe: dpo/small, from: sft}\n  sft: {recipe: sft/small}\n",
        ("stages.dpo.from (own.yaml:2): 'sft' comes later", "move it above this one"),
    ),
    "a cycle": (
        "stages:\n  a: {recipe: sft/small, from: b}\n  b: {recipe: sft/small, from: a}\n",
        ("stages.a.from (own.yaml:2): a cycle: a -> b -> a",),
    ),
    "itself": ("stages:\n  a: {recipe: sft/small, from: a}\n", ("a cycle: a -> a",)),
    "a scorer that should write": (
        "stages:\n  r: {recipe: reward/small}\n  dpo: {recipe: dpo/small, from: r}\n",
        (
            "stage dpo: model.init_from (own.yaml:3): 'r' is a run of stage reward",
            "a run with a generative model",
        ),
    ),
    "rewards where none are taken": (
        "stages:\n  r: {recipe: reward/small}\n  dpo: {recipe: dpo/small, reward: r}\n",
        ("stages.dpo.reward (own.yaml:3): set, but stage dpo does not use rewards",),
    ),
    "a setting that the stage has not": (
        "stages:\n  sft: {recipe: sft/small, set: {train.epoch: 2}}\n",
        ("stage sft: train.epoch (own.yaml:2): unknown key", "did you mean 'epochs'?"),
    ),
    "a setting of another kind": (
        "stages:\n  sft: {recipe: sft/small, set: {train.epochs: many}}\n",
        ("stage sft: train.epochs (own.yaml:2): found the string 'many'",),
    ),
    "a section that the stage has not": (
        "stages:\n  sft: {recipe: sft/small, set: {aling.loss: ipo}}\n",
        ("stage sft: aling.loss (own.yaml:2): unknown section",),
    ),
    "no setting": (
        "stages:\n  sft: {recipe: sft/small, set: {epochs: 2}}\n",
        ("stage sft: epochs (own.yaml:2): `epochs` is `train.epochs` here",),
    ),
    "start and from": (
        "stages:\n  sft: {recipe: sft/small}\n"
        "  b: {recipe: sft/small, from: sft, set: {model.init_from: x}}\n",
        ("stages.b.from (own.yaml:3): conflicts with model.init_from",),
    ),
    "another base than the start's": (
        "stages:\n  sft: {recipe: sft/small}\n  b: {recipe: sft/small, from: sft, set: {model.base: tiny}}\n",
        ("stages.b.from (own.yaml:3): conflicts with model.base", "the base of 'sft'"),
    ),
    "what only the start can say": (
        "stages:\n  sft: {recipe: sft/small}\n  b: {recipe: sft/small, from: sft, set: {adapter.rank: 9}}\n",
        ("stage b: adapter.rank (own.yaml:3): 9, but run sft has 2",),
    ),
    "data that are not there": (
        "stages:\n  sft: {recipe: sft/small, set: {data.source: gone.jsonl}}\n",
        ("stage sft: data.source (own.yaml:2): 'gone.jsonl' does not exist",),
    ),
    "an impossible name": ("stages:\n  a.b: {recipe: sft/small}\n", ("stages.a.b", "not a valid stage name")),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_problem_is_reported_before_anything_runs(here: Path, call: Call, name: str) -> None:
    text, fragments = MISTAKES[name]
    (here / "own.yaml").write_text(text)
    before = sorted(here.rglob("*"))
    status, out, err = call("run", "own.yaml")
    assert status == 2 and out == "", err
    for fragment in fragments:
        assert fragment in err
    assert "command line" not in err
    assert sorted(here.rglob("*")) == before


def test_all_problems_are_reported_at_once(here: Path) -> None:
    text = """\
stages:
  sft: {recipe: sft/small, set: {train.epoch: 2}}
  reward: {recipe: reward/small, from: stf, set: {adapter.ranks: 4}}
  dpo: {recipe: dpo/smal, from: sft}
"""
    error = told(here, text, **{"sft.train.seed": -1, "ppo.train.seed": 1, "sft.seed": 3})
    for fragment in (
        "stage sft: train.epoch (own.yaml:2): unknown key",
        "stage sft: train.seed (Python): found -1",
        "stages.reward.from (own.yaml:3): unknown stage 'stf'",
        "stage reward: adapter.ranks (own.yaml:3): unknown key",
        "stages.dpo.recipe (own.yaml:4): 'dpo/smal': stage dpo has no such recipe",
        "ppo.train.seed (Python): unknown stage 'ppo'",
        "'sft.seed' (Python): invalid override",
    ):
        assert fragment in error


def test_command_line_overrides(call: Call) -> None:
    status, _, err = call("run", "three", "fast")
    assert status == 2 and "'fast' (command line): invalid override" in err
    status, _, err = call("run", "there")
    assert status == 2 and "pipeline 'there': unknown pipeline" in err and "'three'?" in err
    status, out, _ = call("run", "three", "--dry-run", "dpo.train.epochs=2")
    assert status == 0 and "dpo/small" in out and "train.epochs=2" in out
    assert not Path("runs").exists()
    status, out, _ = call("list", "pipelines")
    assert status == 0 and "three small stages" in out and "zephyr" in out
