"""Cross-field checks of a recipe: one test per rule."""

import pytest

from finetune.recipe.errors import UserError

TEXT = "model: {base: ./base}\ndata: {source: rows.jsonl}\n"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["data.source="],
            "data.source (command line): neither data.source nor data.mix is set\n"
            "    expected: one of the two\n"
            "    repair:   set data.source (or --data) to a Hub id, a file or a folder",
        ),
        (
            ["data.source=rows.jsonl", "data.mix=[{source: a/b}]"],
            "data.mix (command line): set together with data.source\n"
            "    expected: one of the two\n"
            "    repair:   list the source in data.mix",
        ),
        (
            ["evaluate.exact_match=5"],
            "evaluate.exact_match (command line): 5, but data.held_out is 0\n"
            "    expected: held-out rows to evaluate on\n"
            "    repair:   set data.held_out to a number of rows (100), a fraction (0.1) or a file",
        ),
        (
            ["train.evaluate_every=10"],
            "train.evaluate_every (command line): 10, but data.held_out is 0\n"
            "    expected: held-out rows to evaluate on\n"
            "    repair:   set data.held_out to a number of rows (100), a fraction (0.1) or a file",
        ),
        (
            ["data.held_out=rows.jsonl"],
            "data.held_out (command line): the same as data.source\n"
            "    expected: rows that are not in the training data\n"
            "    repair:   data.held_out=0.1 holds out a tenth of the rows",
        ),
        (
            ["adapter.method=full", "model.quantization=nf4"],
            "model.quantization (command line): 'nf4' with adapter.method 'full'\n"
            "    expected: auto, or none\n"
            "    repair:   model.quantization=auto, or another adapter (qlora for a 4-bit base)",
        ),
        (
            ["adapter.method=qlora", "model.quantization=none"],
            "model.quantization (command line): 'none' with adapter.method 'qlora'\n"
            "    expected: auto, or one of nf4, int8\n"
            "    repair:   model.quantization=auto, or adapter.method=lora for an unquantized base",
        ),
        (
            ["adapter.method=prefix", "data.packing=true"],
            "data.packing (command line): true with adapter.method 'prefix'\n"
            "    expected: false: each row needs its own virtual tokens, "
            "but packed rows would share one set\n"
            "    repair:   data.packing=false; rows are batched by length anyway",
        ),
        (
            ["train.engine=trl", "data.packing=true"],
            "data.packing (command line): true with train.engine 'trl'\n"
            "    expected: false: llm-align's packing preserves the batches, TRL's changes them\n"
            "    repair:   train.engine=native, or train.engine_args={padding_free: true}",
        ),
        (
            ["train.batch_size=4", "train.micro_batch_size=8"],
            "train.micro_batch_size (command line): 8, more than train.batch_size (4)\n"
            "    expected: at most 4, or auto\n"
            "    repair:   batch_size is the number of sequences per optimizer step: raise it, or lower this",
        ),
        (
            ["model.attention=flash_attention_2", "model.precision=float32"],
            "model.attention (command line): 'flash_attention_2', but model.precision is float32\n"
            "    expected: sdpa for float32\n"
            "    repair:   model.attention=sdpa, or model.precision=bfloat16",
        ),
    ],
)
def test_incompatible_settings_are_reported(workspace, overrides, message):
    with pytest.raises(UserError) as caught:
        workspace.load(TEXT, *overrides)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "overrides",
    [
        ["evaluate.exact_match=5", "data.held_out=0.1"],
        ["train.evaluate_every=10", "data.held_out=other.jsonl"],
        ["adapter.method=lora", "model.quantization=nf4"],
        ["adapter.method=qlora", "model.quantization=int8"],
        ["adapter.method=prefix", "model.quantization=nf4"],
        ["data.packing=true"],
        ["train.batch_size=4", "train.micro_batch_size=4"],
        ["model.attention=flash_attention_2"],
        ["data.source=some/hub-set"],
        ["model.base=owner/name"],
    ],
)
def test_compatible_settings_pass(workspace, overrides):
    assert workspace.load(TEXT, *overrides).notes == []


def test_several_problems_are_reported_at_once(workspace):
    with pytest.raises(UserError) as caught:
        workspace.load(
            TEXT,
            "adapter.method=prefix",
            "data.packing=true",
            "train.engine=trl",
            "data.held_out=nowhere.csv",
        )
    wheres = [problem.where for problem in caught.value.problems]
    assert wheres == [
        "data.held_out (command line)",
        "data.packing (command line)",
        "data.packing (command line)",
    ]
