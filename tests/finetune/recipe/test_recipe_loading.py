"""A valid recipe: types, origins, overrides, notes on ignored values, digest, and the resolved file."""

import pytest

from finetune.data.files import data_fingerprint
from finetune.recipe.errors import UserError
from finetune.recipe.recipe import read_recipe

FULL = """
stage: sft
description: a recipe of a test
model:
  base: ./base
data:
  source: rows.jsonl
  template: plain
  split: test
  columns: {instruction: instruction}
  held_out: other.jsonl
adapter:
  rank: 8
  alpha: 16
train:
  evaluate_every: 5
  learning_rate: 2e-4
evaluate:
  exact_match: 5
"""


@pytest.fixture
def full(workspace):
    return lambda *overrides, **shortcuts: workspace.load(FULL, *overrides, **shortcuts)


def test_values_have_their_types(workspace):
    settings = workspace.load().settings
    assert settings.train.learning_rate == 2e-4 and isinstance(settings.train.learning_rate, float)
    assert settings.train.epochs == 3.0 and isinstance(settings.train.epochs, float)
    assert settings.adapter.rank == 8 and settings.adapter.alpha == 16.0
    assert settings.adapter.dropout == 0.05


@pytest.mark.parametrize("word", ["no", "on", "yes", "off", "none", "1e-4x", "2023-08-25"])
def test_yaml_1_1_booleans_are_strings(workspace, word):
    recipe = workspace.load(
        f"model: {{base: ./base, revision: {word}}}\ndata: {{source: rows.jsonl, system_prompt: {word}}}\n"
    )
    assert recipe.settings.model.revision == word
    assert recipe.settings.data.system_prompt == word
    assert workspace.load(FULL, f"data.system_prompt={word}").settings.data.system_prompt == word


@pytest.mark.parametrize("text", ["Answer: shortly", "in # colour", "- a", "*bold*", "say 'no'"])
def test_text_on_the_command_line_needs_no_quotes(full, text):
    assert full(f"data.system_prompt={text}").settings.data.system_prompt == text


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(workspace):
    (workspace.folder / "my.yaml").write_bytes(
        b"\xef\xbb\xbfmodel: {base: ./base}\r\ndata:\r\n  source: rows.jsonl\r\n"
    )
    assert read_recipe("sft", "my.yaml").settings.data.source == "rows.jsonl"


def test_merged_keys_of_yaml_work(workspace):
    text = "model: {base: ./base}\ndata: &d {source: rows.jsonl}\ntrain: &t {epochs: 2}\n"
    assert workspace.load(text).settings.train.epochs == 2.0


def test_origins_name_file_and_line_command_line_or_default(workspace):
    recipe = workspace.load(
        "model: {base: ./base}\ndata:\n  source: rows.jsonl\n  template: plain\n", "train.epochs=5"
    )
    assert recipe.origins["model.base"] == "my.yaml:1"
    assert recipe.origins["data.source"] == "my.yaml:3"
    assert recipe.origins["data.template"] == "my.yaml:4"
    assert recipe.origins["train.epochs"] == "command line"
    assert recipe.origins["train.seed"] == recipe.origins["adapter.rank"] == "default"
    assert set(recipe.origins) == {
        f"{section}.{key}" for section, keys in recipe.values().items() for key in keys
    }


def test_overrides_win_over_shortcuts_and_shortcuts_over_the_file(workspace):
    recipe = workspace.load(
        FULL, "adapter.rank=2", "train.epochs=7", adapter__rank=4, model__base=str(workspace.folder / "base")
    )
    assert (recipe.settings.adapter.rank, recipe.settings.train.epochs) == (2, 7.0)
    assert recipe.origins["model.base"] == recipe.origins["adapter.rank"] == "command line"


def test_rows_from_python_are_summarized(full):
    recipe = full(data__source=[{"instruction": "secret", "output": "x"}])
    assert list(recipe.settings.data.source) == [{"instruction": "secret", "output": "x"}]
    assert recipe.values()["data"]["source"].startswith("<1 rows given in Python, ")
    assert "secret" not in recipe.to_yaml()
    other = full(data__source=[{"instruction": "other", "output": "x"}])
    first, second = (data_fingerprint(made.settings.data) for made in (recipe, other))
    assert recipe.digest(first) != other.digest(second)


def test_another_adapter_drops_the_keys_it_does_not_have(full):
    recipe = full(adapter__method="prefix")
    assert recipe.settings.adapter.model_dump() == {
        "method": "prefix",
        "virtual_tokens": 20,
        "projection": False,
    }
    assert "adapter.rank=8 (my.yaml:12) is ignored: adapter 'prefix' has no rank" in recipe.notes
    assert "adapter.rank" not in recipe.origins


def test_another_adapter_retains_shared_keys_and_overrides(full):
    recipe = full("adapter.method=qlora", "adapter.dropout=0.2")
    assert (recipe.settings.adapter.rank, recipe.settings.adapter.dropout) == (8, 0.2)
    assert not [note for note in recipe.notes if note.startswith("adapter.")]


def test_an_override_that_the_new_adapter_lacks_is_an_error(full):
    with pytest.raises(UserError, match=r"adapter\.rank \(command line\): unknown key"):
        full("adapter.method=prefix", "adapter.rank=4")


def test_another_adapter_gets_a_learning_rate_note(full):
    (note,) = [note for note in full(adapter__method="full").notes if note.startswith("train.")]
    assert "train.learning_rate=0.0002 (my.yaml:16) was chosen for adapter 'lora'" in note
    assert note.endswith("'full' usually needs 2e-05: train.learning_rate=2e-05")
    assert not [
        n for n in full("train.learning_rate=1e-5", adapter__method="full").notes if n.startswith("train.")
    ]
    assert not full(adapter__method="lora").notes


def test_other_data_drops_keys_of_the_old_data(full):
    recipe = full(data__source="other.jsonl")
    data = recipe.settings.data
    assert (data.source, data.columns, data.split, data.held_out) == ("other.jsonl", None, "train", 0)
    assert recipe.settings.evaluate.exact_match == 0 and recipe.settings.train.evaluate_every is None
    left_out = [note.split("=")[0] for note in recipe.notes]
    assert left_out == [
        "data.split",
        "data.columns",
        "data.held_out",
        "evaluate.exact_match",
        "train.evaluate_every",
    ]
    assert "data.split='test' (my.yaml:8) is ignored: it applies to the recipe's data only" in recipe.notes
    assert data.template == "plain"


def test_own_pairs_in_the_dpo_quickstart_leave_out_its_graders():
    # They grade stories, on held-out prompts that the recipe's file has and the user's pairs do not.
    recipe = read_recipe("dpo", "quickstart", shortcuts={"data.source": "owner/pairs"})
    assert recipe.settings.evaluate.graders == {} and recipe.settings.data.held_out == 0
    assert any(note.startswith("evaluate.graders=") for note in recipe.notes)


def test_other_data_with_held_out_rows_retains_the_evals(full):
    recipe = full("data.held_out=0.5", data__source="other.jsonl")
    assert recipe.settings.evaluate.exact_match == 5 and recipe.settings.data.held_out == 0.5


def test_other_data_replaces_a_mixture_and_a_mixture_replaces_the_source(workspace, full):
    mixed = "model: {base: ./base}\ndata: {mix: [{source: rows.jsonl}, {source: other.jsonl, rows: 1}]}\n"
    assert workspace.load(mixed).settings.data.mix[1].rows == 1
    assert workspace.load(mixed, data__source="rows.jsonl").settings.data.mix is None
    assert full("data.mix=[{source: other.jsonl}]").settings.data.source is None


def test_another_base_is_not_trusted_because_the_recipes_base_was(workspace):
    text = "model: {base: a/b, revision: v2, trust_remote_code: true}\ndata: {source: rows.jsonl}\n"
    recipe = workspace.load(text, model__base="./base")
    assert recipe.settings.model.trust_remote_code is False and recipe.settings.model.revision is None
    assert len(recipe.notes) == 2
    assert workspace.load(text).settings.model.trust_remote_code is True


def test_the_digest_is_stable_and_sensitive(workspace, full):
    digest = full().digest("data")
    assert digest == full().digest("data") and len(digest) == 8
    assert digest == workspace.load("# a remark\n" + FULL).digest("data")
    others = [
        full("adapter.rank=9").digest("data"),
        full("train.seed=1").digest("data"),
        full("data.template=alpaca").digest("data"),
        full().digest("other data"),
    ]
    assert len({digest, *others}) == 5


def test_the_written_recipe_round_trips(workspace, full):
    recipe = full(
        "train.betas=[0.9, 0.95]", "train.learning_rate=2e-5", "train.engine_args={adam_epsilon: 1e-7}"
    )
    workspace.write(recipe.to_yaml(), "again.yaml")
    again = read_recipe("sft", "again.yaml")
    assert again.settings == recipe.settings
    assert again.digest("x") == recipe.digest("x")
    assert (again.description, again.stage) == (recipe.description, "sft")


def test_the_written_recipe_has_origins_and_auto_reasons(full):
    written = full("train.epochs=2").to_yaml({"train.micro_batch_size": "4 (fits in memory)"})
    assert _comment(written, "  epochs: ") == "command line"
    assert _comment(written, "  rank: ") == "my.yaml:12"
    assert _comment(written, "  micro_batch_size: ") == "default; planner: 4 (fits in memory)"


def _comment(text, start):
    (line,) = [line for line in text.splitlines() if line.startswith(start)]
    return line.split("# ")[1]
