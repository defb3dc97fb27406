"""The shipped SFT recipes: published numbers, other adapters, the user's rows."""

import pytest

from finetune.recipe.discovery import PROJECT, adapter_traits
from finetune.recipe.errors import UserError
from finetune.recipe.recipe import read_recipe

FILES = sorted((PROJECT / "recipes" / "sft").glob("*.yaml"))
SHIPPED = [
    "quickstart",
    "alpaca",
    "alpaca-qlora",
    "alpaca-prefix",
    "alpaca-prompt",
    "koalpaca",
    "vicuna",
    "guanaco",
    "toolcall",
    "cot",
    "flan",
    "flan-mixture",
    "lima",
    "alpagasus",
]


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """Stand in for the embedded model and data, which this test does not need."""
    for name in (
        "recipes/tiny/data/sft_train.jsonl",
        "recipes/tiny/data/sft_held_out.jsonl",
        "base/config.json",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    monkeypatch.chdir(tmp_path)
    return lambda name: read_recipe(
        "sft", name, shortcuts={"model.base": "./base"} if name == "quickstart" else None
    )


def test_the_recipes_are_there():
    assert {file.stem for file in FILES} >= set(SHIPPED)


@pytest.mark.parametrize("name", ["alpaca", "koalpaca", "vicuna", "guanaco"])
@pytest.mark.parametrize("method", ["full", "lora", "qlora", "prefix", "prompt"])
def test_any_adapter_and_the_users_own_rows_go_with_it(shipped, name, method):
    given = {
        "model.base": "./base",
        "adapter.method": method,
        "data.source": [{"instruction": "a", "output": "b"}],
    }
    given |= {"model.quantization": "auto"}
    if not adapter_traits(method).gradient_checkpointing:
        given |= {"train.gradient_checkpointing": False}  # not by default; the next test
    assert read_recipe("sft", name, shortcuts=given).settings.adapter.method == method


def test_a_prefix_rejects_gradient_checkpointing(shipped):
    with pytest.raises(UserError, match=r"train.gradient_checkpointing \(vicuna.yaml.* 'prefix'"):
        read_recipe("sft", "vicuna", shortcuts={"model.base": "./base", "adapter.method": "prefix"})


def test_the_quickstart_takes_the_users_own_file(shipped, tmp_path):
    (tmp_path / "my.jsonl").write_text("{}")
    recipe = read_recipe("sft", "quickstart", shortcuts={"model.base": "./base", "data.source": "my.jsonl"})
    assert recipe.settings.data.held_out == 0 and recipe.settings.evaluate.exact_match == 0


def test_published_numbers(shipped):
    """The numbers of papers and repositories; a typo would change the training."""
    alpaca, guanaco = shipped("alpaca").settings, shipped("guanaco").settings
    assert (alpaca.train.epochs, alpaca.train.batch_size, alpaca.data.max_length) == (3, 128, 512)
    assert (alpaca.train.learning_rate, alpaca.adapter.rank, alpaca.adapter.alpha) == (3e-4, 8, 16)
    assert (guanaco.train.max_steps, guanaco.train.batch_size, guanaco.train.max_grad_norm) == (1875, 16, 0.3)
    assert (guanaco.adapter.rank, guanaco.adapter.alpha, guanaco.adapter.dropout) == (64, 16, 0.1)
    assert shipped("koalpaca").settings.train.batch_size == 2 * 64
    assert shipped("vicuna").settings.data.max_length == 2048
    flan = shipped("flan-mixture").settings.data
    assert [part.weight for part in flan.mix] == [0.4, 0.32, 0.2, 0.05, 0.03, None]
    assert (flan.mix[-1].share, flan.epoch_rows) == (0.05, 100_000)
    assert all(part.rows > part.weight * flan.epoch_rows for part in flan.mix[:-1]), "no row comes twice"
    lima = shipped("lima").settings
    assert (lima.data.select.rows, lima.train.epochs, lima.train.betas) == (1000, 15, [0.9, 0.95])
    cot = shipped("cot").settings
    assert (cot.train.epochs, cot.train.batch_size, cot.train.learning_rate) == (6, 64, 3e-4)
    assert (cot.adapter.rank, cot.adapter.alpha, cot.train.weight_decay) == (64, 16, 0.1)
    assert shipped("toolcall").settings.train.batch_size == 1 * 8


@pytest.mark.parametrize("name", ["toolcall", "cot", "flan"])
def test_a_recipe_named_after_its_template_uses_it(shipped, name):
    assert shipped(name).settings.data.template == name
