"""Parent run (``model.init_from``): finding it by name, inherited settings, and errors."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from finetune.recipe import yaml_file
from finetune.recipe.errors import UserError
from finetune.recipe.recipe import Recipe, read_recipe
from finetune.recipe.runs import RUNS_FOLDER, find_run
from finetune.recipe.schema import setting_rows
from finetune.recipe.settings import TrainSettings

MODEL = {
    "base": "./base",
    "revision": None,
    "precision": "float32",
    "quantization": "auto",
    "attention": "eager",
    "rope": {"method": "yarn", "factor": 2.0},
    "trust_remote_code": False,
}
LORA = {"method": "lora", "rank": 4, "alpha": 12.0, "dropout": 0.1, "target": ["q_proj"]}
PLAIN = "data: {source: rows.jsonl}\n"
OTHER = """
model: {base: ./base, precision: bfloat16}
data: {source: rows.jsonl, template: vicuna}
adapter: {method: prefix, virtual_tokens: 7}
train: {learning_rate: 3e-2}
"""


class RunWorkspace:
    """Creates runs and recipes in the current folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, name: str = "runs/sft-a-12345678", **changed: Any) -> Path:
        """Write a run's folder: ``adapter=...``, ``model=...`` and ``load=...``, and fields of run.json."""
        path = self.folder / name
        adapter = changed.pop("adapter", LORA)
        weights = (
            "model/model.safetensors" if adapter["method"] == "full" else "adapter/adapter_model.safetensors"
        )
        (path / weights).parent.mkdir(parents=True)
        (path / weights).write_bytes(b"weights")
        if adapter["method"] == "full":
            (path / "model" / "config.json").write_text("{}")
        reload = {"model": MODEL | changed.pop("model", {}), "precision": "float32", "quantization": "none"}
        reload |= {
            "template": "chatml",
            "system_prompt": "Be brief.",
            "virtual_tokens": 0,
            **changed.pop("reload", {}),
        }
        record = {
            "format": 2,
            "status": "finished",
            "stage": "sft",
            "recipe": "a",
            "digest": "12345678",
            "reload": reload,
        }
        record |= {"command": "llm-align sft a", "started": "2026-01-01", "finished": "2026-01-02"}
        record |= {"files": {weights: "0" * 64}, **changed}
        (path / "run.json").write_text(json.dumps(record))
        (path / "recipe.yaml").write_text(yaml_file.dump_yaml({"stage": "sft", "adapter": adapter}, {}))
        return path

    def recipe(self, text: str = PLAIN, *words: str, stage: str = "sft", out: Path | None = None) -> Recipe:
        (self.folder / "my.yaml").write_text(text)
        return read_recipe(stage, "my.yaml", overrides=words, out=out)

    def problem(self, text: str, *words: str, **more: Any) -> str:
        with pytest.raises(UserError) as caught:
            self.recipe(text, *words, **more)
        return str(caught.value)


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunWorkspace:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    (tmp_path / "rows.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    return RunWorkspace(tmp_path)


FROM = "model.init_from=sft-a"


def test_base_adapter_and_template_are_inherited_with_their_origin(workspace: RunWorkspace) -> None:
    workspace.run()
    recipe = workspace.recipe(PLAIN, FROM)
    model, data = recipe.settings.model, recipe.settings.data
    assert model.init_from == "runs/sft-a-12345678" and model.base == "./base"
    assert (model.precision, model.attention, model.quantization) == ("float32", "eager", "none")
    assert model.rope is not None and model.rope.factor == 2.0
    assert (data.template, data.system_prompt) == ("chatml", "Be brief.")
    assert recipe.settings.adapter.model_dump() == LORA
    shown = {key: origin for key, _, origin in setting_rows(recipe)}
    run = "run sft-a-12345678"
    assert shown["model.init_from"] == "command line"
    keys = [
        "model.base",
        "model.rope",
        "model.quantization",
        "adapter.rank",
        "data.template",
        "data.system_prompt",
    ]
    assert [shown[key] for key in keys] == [run] * len(keys)
    assert shown["train.epochs"] == "default"
    assert "init_from: runs/sft-a-12345678" in recipe.to_yaml() and f"# {run}" in recipe.to_yaml()
    assert recipe.notes == []


def test_inherited_values_replace_the_recipes_with_a_note(workspace: RunWorkspace) -> None:
    workspace.run()
    (workspace.folder / "other").mkdir()
    recipe = workspace.recipe(OTHER.replace("./base", "./other"), FROM)
    assert recipe.settings.adapter.model_dump() == LORA and recipe.settings.model.base == "./base"
    assert recipe.settings.model.precision == "bfloat16", "how it is computed is the recipe's choice"
    assert recipe.settings.data.template == "vicuna" and recipe.settings.data.system_prompt == "Be brief."
    assert recipe.notes == [
        "data.template=vicuna (my.yaml:3), but run sft-a-12345678 was trained with chatml",
        "run sft-a-12345678 replaces the recipe's model.base='./other' (my.yaml:2), "
        "adapter.method='prefix' (my.yaml:4), adapter.virtual_tokens=7 (my.yaml:4)",
        "train.learning_rate=0.03 (my.yaml:5) was chosen for adapter 'prefix'; 'lora' usually needs 0.0002: "
        "train.learning_rate=0.0002",
    ]


def test_the_user_may_repeat_inherited_values_and_set_training_settings(workspace: RunWorkspace) -> None:
    workspace.run()
    words = (
        "model.base=base",
        "adapter.rank=4",
        "adapter.dropout=0.3",
        "data.template=alpaca",
        "data.system_prompt=null",
    )
    settings = workspace.recipe(PLAIN, FROM, "model.precision=bfloat16", *words).settings
    assert settings.adapter.model_dump() == LORA | {"dropout": 0.3}
    assert (settings.model.precision, settings.data.template, settings.data.system_prompt) == (
        "bfloat16",
        "alpaca",
        None,
    )


def test_auto_quantization_is_the_adapters_default(workspace: RunWorkspace) -> None:
    workspace.run(adapter={"method": "qlora"})
    settings = workspace.recipe(PLAIN, FROM).settings
    assert (settings.adapter.method, settings.model.quantization) == ("qlora", "nf4")


def test_loftq_continues_as_lora_on_its_base(workspace: RunWorkspace) -> None:
    workspace.run(adapter={"method": "loftq", "rank": 4})
    recipe = workspace.recipe(PLAIN, FROM)
    adapter = recipe.settings.adapter
    assert (adapter.method, adapter.rank, recipe.settings.model.quantization) == ("lora", 4, "nf4")
    assert recipe.notes == ["adapter 'loftq' continues as 'lora', the form that was saved"]


def test_a_source_of_the_first_run_is_not_needed_again(workspace: RunWorkspace) -> None:
    workspace.run(adapter={"method": "multitask_prompt", "virtual_tokens": 5, "source": "runs/long-gone"})
    adapter = workspace.recipe(PLAIN, FROM).settings.adapter
    assert (adapter.virtual_tokens, adapter.source) == (5, None)


def test_a_run_of_full_tuning_is_a_base_for_a_new_adapter(workspace: RunWorkspace) -> None:
    workspace.run(adapter={"method": "full"})
    recipe = workspace.recipe(OTHER, FROM)
    model = recipe.settings.model
    assert (model.base, model.init_from, model.rope) == ("runs/sft-a-12345678", "runs/sft-a-12345678", None)
    assert recipe.settings.adapter.virtual_tokens == 7
    assert workspace.recipe(PLAIN, FROM, "adapter.method=qlora").settings.model.quantization == "auto"
    assert workspace.recipe(PLAIN, FROM).settings.data.template == "chatml"


@pytest.mark.parametrize(("template", "expected"), [("plain", "alpaca"), ("vicuna", "vicuna")])
def test_a_stage_on_plain_text_has_a_template_only_if_set(
    workspace: RunWorkspace, template: str, expected: str
) -> None:
    workspace.run(stage="pretrain", reload={"template": template, "system_prompt": None})
    assert workspace.recipe(PLAIN, FROM).settings.data.template == expected


NAMES = [
    "runs/sft-a-12345678",
    "runs/sft-a-12345678/",
    "sft-a-12345678",
    "sft-a",
    "runs/sft-a",
    "{here}/runs/sft-a-12345678",
]


@pytest.mark.parametrize("name", NAMES)
def test_all_names_of_a_run_give_the_same_recipe(workspace: RunWorkspace, name: str) -> None:
    workspace.run()
    recipe = workspace.recipe(PLAIN, f"model.init_from={name.format(here=workspace.folder)}")
    assert recipe.settings.model.init_from == "runs/sft-a-12345678"


def test_a_run_elsewhere_has_its_full_path(
    workspace: RunWorkspace, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = workspace.run(str(tmp_path_factory.mktemp("elsewhere") / "mine"))
    assert workspace.recipe(PLAIN, f"model.init_from={run}").settings.model.init_from == str(run)


def test_the_newest_finished_match_is_used_with_a_note(workspace: RunWorkspace) -> None:
    workspace.run("runs/sft-a-1", finished="2026-03-01")
    workspace.run("runs/sft-a-2", finished="2026-04-01")
    workspace.run("runs/sft-a-3", status="running", started="2026-05-01")
    note = "'sft-a' matches 2 finished runs; using the newest: runs/sft-a-2"
    assert find_run("sft-a") == (RUNS_FOLDER / "sft-a-2", note)
    assert workspace.recipe(PLAIN, FROM).notes == [note]


def test_a_continued_run_does_not_match_its_parents_prefix(workspace: RunWorkspace) -> None:
    workspace.run("runs/sft-a-1", finished="2026-03-01")
    workspace.run("runs/sft-a-2", finished="2026-04-01", init_from={"name": "sft-a-1"})
    assert find_run("sft-a")[0] == RUNS_FOLDER / "sft-a-1"
    assert find_run("sft-a-2") == (RUNS_FOLDER / "sft-a-2", "")


def test_the_digest_does_not_depend_on_the_parents_path(workspace: RunWorkspace) -> None:
    workspace.run()
    workspace.run("runs/copy")
    workspace.run("runs/full-1", adapter={"method": "full"})
    workspace.run("runs/full-2", adapter={"method": "full"})
    names = ("sft-a", "runs/copy", "full-1", "full-2")
    one, copy, full, same = (workspace.recipe(PLAIN, f"model.init_from={name}").digest("x") for name in names)
    assert one == copy and full == same and one != full


def test_without_a_parent_the_digest_is_unchanged(workspace: RunWorkspace) -> None:
    """Runs from before ``model.init_from`` was a setting have the same names."""
    recipe = workspace.recipe(PLAIN)
    content = recipe.values()
    assert content["model"].pop("init_from") is None
    for name in TrainSettings.NOT_IN_DIGEST:
        del content["train"][name]
    text = json.dumps(["sft", content, "x"], sort_keys=True, ensure_ascii=False)
    assert recipe.digest("x") == hashlib.sha256(text.encode()).hexdigest()[:8]


def test_a_recipes_parent_is_ignored_with_another_base(workspace: RunWorkspace) -> None:
    workspace.run()
    recipe = workspace.recipe(f"model: {{init_from: sft-a}}\n{PLAIN}", "model.base=./base")
    assert recipe.settings.model.init_from is None and recipe.settings.adapter.rank == 16
    assert recipe.notes == [
        "model.init_from='sft-a' (my.yaml:1) is ignored: it applies to the recipe's base model only"
    ]
    assert (
        workspace.recipe(
            f"model: {{init_from: sft-a}}\n{PLAIN}", "model.init_from=null"
        ).settings.model.init_from
        is None
    )


FIRST = (
    "model: {base: ./base}\ndata: {source: rows.jsonl, template: chatml}\nadapter: {method: qlora, rank: 4}\n"
)


def test_a_recipe_without_a_run_as_parent(workspace: RunWorkspace) -> None:
    (workspace.folder / "recipes" / "sft").mkdir(parents=True)
    (workspace.folder / "recipes" / "sft" / "first.yaml").write_text(FIRST)
    recipe = workspace.recipe(f"model: {{init_from: sft/first}}\n{PLAIN}")
    settings = recipe.settings
    assert settings.model.init_from == "sft/first" and recipe.origins["adapter.rank"] == "run sft/first"
    assert (settings.adapter.rank, settings.model.quantization, settings.data.template) == (
        4,
        "nf4",
        "chatml",
    )
    message = workspace.problem(f"model: {{init_from: sft/first}}\n{PLAIN}", "adapter.method=prefix")
    assert "'prefix', but run sft/first has 'qlora'" in message and "model.init_from=null" in message


BAD = [
    ("sft-a-12345679", "there is no run 'sft-a-12345679'", "did you mean 'sft-a-12345678'?"),
    ("runs/sft-a-1x345678", "there is no run 'runs/sft-a-1x345678'", "did you mean 'sft-a-12345678'?"),
    ("nothing/like-it", "there is no run 'nothing/like-it'", "`llm-align list runs`"),
    ("base", "folder 'base' is not a run (no run.json)", "it is a model: use --base base"),
    ("runs/sft-a-12345678/adapter", "is not a run", "did you mean 'runs/sft-a-12345678'?"),
    ("rows.jsonl", "there is no run 'rows.jsonl'", "`llm-align list runs`"),
    ("broken", "runs/broken/run.json: corrupt file", "delete the folder"),
    ("foreign", "runs/foreign/run.json: not written by llm-align", ""),
    ("cut", "a run with status 'interrupted'", "`llm-align sft cut` starts again: it has no checkpoint"),
    ("going", "a run with status 'stopped'", "`llm-align sft going` starts again"),
    ("nan", "a run with status 'failed'", "`llm-align list runs`"),
    ("judge", "'runs/judge' is a run of stage reward, whose model scores", "`llm-align list runs`"),
    ("emptied", "lacks adapter/adapter_model.safetensors", "`llm-align sft a --out runs/emptied-again`"),
    ("moved", "model.base (run moved): './gone' is not a folder", ""),
    ("sft/none", "recipe 'none': stage sft has no such recipe", "`llm-align list`"),
    ("sft/my.yaml", "circular: sft/my.yaml -> sft/my.yaml", ""),
    ("reward/my", "reward", ""),
    ("3", "model.init_from (command line): found 3", "put it in quotes"),
]


@pytest.mark.parametrize(("name", "actual", "repair"), BAD, ids=[case[0] for case in BAD])
def test_an_invalid_parent_is_an_error_with_a_repair(
    workspace: RunWorkspace, name: str, actual: str, repair: str
) -> None:
    workspace.run()
    workspace.run("runs/cut", status="interrupted", command="llm-align sft cut")
    workspace.run("runs/going", status="running", command="llm-align sft going")
    workspace.run("runs/nan", status="failed")
    workspace.run("runs/judge", stage="reward")
    (workspace.run("runs/emptied") / "adapter" / "adapter_model.safetensors").unlink()
    workspace.run("runs/moved", model={"base": "./gone"})
    (workspace.run("runs/broken") / "run.json").write_text("{")
    (workspace.run("runs/foreign") / "run.json").write_text("{}")
    message = workspace.problem(f"model: {{init_from: {name}}}\n{PLAIN}", f"model.init_from={name}")
    assert actual in message and repair in message and message.count("expected:") == 1


def test_the_parents_folder_is_not_overwritten(workspace: RunWorkspace) -> None:
    run = workspace.run()
    message = workspace.problem(PLAIN, FROM, out=run)
    assert "the folder of the parent run" in message


OTHERS = [
    ("model.base=./other", "model.base (command line): './other', but run sft-a-12345678 has './base'"),
    ("adapter.method=prefix", "adapter.method (command line): 'prefix', but run sft-a-12345678 has 'lora'"),
    ("adapter.method=full", "adapter.method (command line): 'full', but run sft-a-12345678 has 'lora'"),
    ("adapter.rank=8", "adapter.rank (command line): 8, but run sft-a-12345678 has 4"),
    ("model.quantization=nf4", "model.quantization (command line): 'nf4', but run sft-a-12345678 has 'none'"),
    (
        "model.rope=null",
        "model.rope (command line): nothing (null), but run sft-a-12345678 has {'method': 'yarn'",
    ),
    ("model.revision=v2", "model.revision (command line): 'v2', but run sft-a-12345678 has nothing (null)"),
]


@pytest.mark.parametrize(("word", "actual"), OTHERS, ids=[case[0] for case in OTHERS])
def test_a_conflict_with_the_parent_is_one_problem(workspace: RunWorkspace, word: str, actual: str) -> None:
    workspace.run()
    message = workspace.problem(OTHER, FROM, word)
    assert message.startswith(actual) and message.count("expected:") == 1
    assert (
        "`llm-align merge runs/sft-a-12345678`, then --base runs/sft-a-12345678 instead of --from" in message
    )


def test_a_base_and_a_fully_tuned_parent_conflict(workspace: RunWorkspace) -> None:
    workspace.run(adapter={"method": "full"})
    assert "omit one of the two" in workspace.problem(PLAIN, FROM, "model.base=./base")


def test_variables_of_the_chat_template_are_inherited(workspace: RunWorkspace) -> None:
    options = {"enable_thinking": True}
    workspace.run(reload={"template": "tokenizer", "system_prompt": None, "template_options": options})
    assert workspace.recipe(PLAIN, FROM).settings.data.template_options == options
