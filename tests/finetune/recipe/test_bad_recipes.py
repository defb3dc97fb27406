"""Errors in a recipe: the message says where, what was found, what is expected, and the repair.

A row: a whole YAML text, or changes to a good one as ``section.key=value`` words, and the fragments that the
message must hold; after ``-`` a fragment that it must not hold.
"""

import pytest

from finetune.recipe.errors import UserError

HEAD = "model: {base: ./base}\n"
DATA = HEAD + "data: {source: rows.jsonl}\n"

BAD: dict[str, tuple[str | list[str], list[str]]] = {
    # The file itself.
    "empty file": ("", ["my.yaml", "the file is empty", "`model:`"]),
    "a list": ("- a\n- b\n", ["my.yaml", "['a', 'b'], not sections", "sections such as"]),
    "a word": ("hello\n", ["my.yaml", "found 'hello', not sections"]),
    "tab": ("model:\n\tbase: tiny\n", ["my.yaml:2", "a tab", "spaces"]),
    "open bracket": (
        "model: {base: tiny\ndata: 3\n",
        ["my.yaml:2", "but got ':'", "a flow mapping that starts on line 1", "expected: YAML"],
    ),
    "wrong indentation": (
        "model:\n  base: tiny\n   revision: x\n",
        ["my.yaml:3", "a colon where no key is allowed", "equally"],
    ),
    "colon in a text": ("description: mine: yours\n", ["my.yaml:1", "a colon where no key", "quote text"]),
    "at sign": (
        "description: @me\n",
        ["my.yaml:1", "a value cannot begin with '@'", "put the value in quotes"],
    ),
    "list and keys": ("- a\nb: 1\n", ["my.yaml:2", "expected <block end>", "indentation, colons and quotes"]),
    "open quote": (
        'model:\n  base: "tiny\n',
        ["my.yaml:2", "unterminated (while scanning a quoted scalar)"],
    ),
    "key twice": (
        "train:\n  epochs: 1\n  epochs: 2\n",
        ["my.yaml:3", "duplicate key 'epochs'", "unique keys"],
    ),
    "section twice": (
        "train: {}\ndata: {}\ntrain: {}\n",
        ["my.yaml:3", "duplicate key 'train'"],
    ),
    # Sections.
    "unknown section": (
        DATA + "trian: {}\n",
        ["trian (my.yaml:3)", "unknown section", "stage, description, model", "did you mean 'train'?"],
    ),
    "nothing below": (
        DATA + "train:\n",
        ["train (my.yaml:3)", "empty section", "indent the lines below"],
    ),
    "section is a word": (
        DATA + "train: fast\n",
        ["train (my.yaml:3)", "found 'fast'", "indented keys engine, epochs"],
    ),
    "other stage": (
        DATA + "stage: dpo\n",
        ["stage (my.yaml:3)", "is for stage 'dpo'", "expected: stage 'sft'"],
    ),
    "stage is a number": (DATA + "stage: 3\n", ["stage (my.yaml:3)", "is for stage 3", "write stage: sft"]),
    # Keys.
    "unknown key": (
        DATA + "train: {learning_rat: 1}\n",
        ["train.learning_rat (my.yaml:3)", "unknown key", "engine, epochs", "did you mean 'learning_rate'?"],
    ),
    "unknown adapter key": (
        ["adapter.rnk=4"],
        ["adapter.rnk (command line)", "unknown key", "method, rank, alpha", "'rank'"],
    ),
    "key of another adapter": (
        "adapter: {method: prefix, rank: 4}\n" + DATA,
        ["adapter.rank (my.yaml:1)", "unknown key", "virtual_tokens"],
    ),
    "unknown key of a mixture": (
        ["data.source=", "data.mix=[{source: a/b, row: 3}]"],
        ["data.mix[0].row (command line)", "unknown key", "source, columns, rows", "'rows'"],
    ),
    "source missing in a mixture": (
        ["data.source=", "data.mix=[{rows: 3}]"],
        ["data.mix[0].source (command line)", "missing", "a string (Hub id, file or folder)"],
    ),
    "wrong value in a mixture": (
        ["data.source=", "data.mix=[{source: a/b, rows: 0}]"],
        ["data.mix[0].rows", "found 0", "an integer above 0"],
    ),
    "word in a mixture": (
        ["data.source=", "data.mix=[a/b]"],
        ["data.mix[0]", "the string 'a/b'", "a mapping with the keys source, columns, rows"],
    ),
    "empty mixture": (
        ["data.source=", "data.mix=[]"],
        ["data.mix (command line)", "found []", "a list with each entry a mapping"],
    ),
    # Types.
    "text for a number": (
        ["train.epochs=many"],
        [
            "train.epochs (command line)",
            "the string 'many'",
            "a number above 0 (number of epochs)",
            "-integer",
        ],
    ),
    "quoted number": (
        DATA + 'train: {batch_size: "16"}\n',
        [
            "train.batch_size (my.yaml:3)",
            "the string '16'",
            "an integer above 0",
            "write it without quotes",
        ],
    ),
    "fraction for a count": (["train.batch_size=1.5"], ["found 1.5", "an integer above 0"]),
    "float for a count": (["train.batch_size=16.0"], ["found 16.0", "write 16"]),
    "null for a number": (
        ["train.learning_rate=null"],
        ["train.learning_rate (command line)", "found nothing (null)", "a number above 0"],
    ),
    "true for a number": (["train.seed=true"], ["found true", "an integer, 0 or more"]),
    "number for a text": (
        ["model.revision=2"],
        ["model.revision", "found 2", "a string, or null", 'put it in quotes: revision: "2"'],
    ),
    "empty text": (["data.template=''"], ["data.template", "an empty string", "expected: a string"]),
    "yes": (["data.packing=yes"], ["data.packing", "the string 'yes'", "true or false", "write true"]),
    "off": (["data.cache=off"], ["data.cache", "the string 'off'", "write false"]),
    "number for a switch": (["data.packing=1"], ["found 1", "true or false"]),
    "none for null": (["train.max_steps=none"], ["the string 'none'", "or null", "write max_steps: null"]),
    "list for a number": (
        ["train.learning_rate=[1e-4, 2e-4]"],
        ["found [0.0001, 0.0002]", "a number above 0"],
    ),
    "word for a list": (
        ["adapter.target=q_proj"],
        ["the string 'q_proj'", "all-linear, or a list", "target: [q_proj]"],
    ),
    "all_linear": (["adapter.target=all_linear"], ["did you mean 'all-linear'?"]),
    "number in a list": (
        ["adapter.target=[q_proj, 3]"],
        [
            "adapter.target (command line)",
            "found ['q_proj', 3]",
            "all-linear, or a list with each entry a string",
        ],
    ),
    "empty target": (["adapter.target=[]"], ["adapter.target", "found []", "all-linear, or a list"]),
    "list for a mapping": (
        ["data.columns=[question]"],
        ["data.columns", "found ['question']", "a mapping such as {name: value}"],
    ),
    "number in a mapping": (
        ["data.columns={instruction: 3}"],
        ["data.columns.instruction (command line)", "found 3", "a string"],
    ),
    "three betas": (["train.betas=[0.9, 0.99, 0.999]"], ["train.betas", "a list of 2 entries"]),
    "beta is a word": (
        ["train.betas=[0.9, x]"],
        ["train.betas[1]", "the string 'x'", "from 0 up to, but not including, 1"],
    ),
    "beta of 1": (["train.betas=[0.9, 1.0]"], ["train.betas[1]", "found 1.0", "but not including, 1"]),
    # Ranges and choices.
    "negative rate": (["train.learning_rate=-1e-4"], ["found -0.0001", "a number above 0"]),
    "infinite rate": (["train.learning_rate=.inf"], ["found inf", "a number above 0"]),
    "zero rank": (["adapter.rank=0"], ["adapter.rank", "found 0", "an integer above 0"]),
    "dropout of 1": (["adapter.dropout=1.0"], ["found 1.0", "but not including, 1"]),
    "held-out 150 %": (
        ["data.held_out=1.5"],
        ["data.held_out", "found 1.5", "0 or more", "but not including, 1", "a fraction (below 1)"],
    ),
    "short rows": (["data.max_length=4"], ["found 4", "an integer, 8 or more, or null"]),
    "one checkpoint": (["train.keep_checkpoints=1"], ["found 1", "2 or more"]),
    "unknown precision": (
        ["model.precision=bf16"],
        ["the string 'bf16'", "one of auto, float32, bfloat16, float16", "did you mean 'bfloat16'?"],
    ),
    "unknown quantization": (
        ["model.quantization=4bit"],
        ["the string '4bit'", "one of auto, none, nf4, int8"],
    ),
    "unknown schedule": (["train.lr_schedule=cosin"], ["did you mean 'cosine'?"]),
    "unknown engine": (["train.engine=deepspeed"], ["the string 'deepspeed'", "one of native, trl"]),
    # Names.
    "unknown adapter": (
        ["adapter.method=qlora4"],
        [
            "adapter.method (command line)",
            "'qlora4' is unknown",
            "full, ia3, layernorm",
            "finetune/adapters/",
            "did you mean 'qlora'?",
        ],
    ),
    "adapter is a list": (
        ["adapter.method=[lora]"],
        ["adapter.method (command line)", "found ['lora']", "one of adalora, adamix"],
    ),
    "unknown template": (
        ["data.template=alpacca"],
        [
            "data.template (command line)",
            "'alpacca' is unknown",
            "alpaca, chatml",
            "data_templates/",
            "did you mean 'alpaca'?",
        ],
    ),
    "unknown base": (
        ["model.base=lama-2-7b"],
        [
            "model.base (command line)",
            "neither a short name nor a folder",
            "a Hub id (owner/name)",
            "did you mean 'llama-2-7b'?",
        ],
    ),
    "no such base folder": (
        ["model.base=./nowhere"],
        ["model.base (command line)", "'./nowhere' is not a folder", "with config.json"],
    ),
    "base without config": (
        ["model.base=./empty"],
        ["model.base (command line)", "'empty' has no config.json", "save_pretrained"],
    ),
    "no such data file": (
        ["data.source=nowhere.jsonl"],
        [
            "data.source (command line)",
            "'nowhere.jsonl' does not exist",
            "Hub id (owner/name)",
            "relative paths are resolved from",
        ],
    ),
    "no such held-out file": (
        ["data.held_out=10%"],
        ["data.held_out (command line)", "'10%' does not exist", "rows (100), a fraction (0.1)"],
    ),
    # The command line.
    "no equals sign": (
        ["train.epochs"],
        ["'train.epochs' (command line)", "invalid override", "section.key=value"],
    ),
    "no section": (
        ["epochs=3"],
        ["epochs (command line)", "`epochs` is `train.epochs` here", "train.epochs=3"],
    ),
    "no key": (["epoch=3"], ["'epoch' (command line)", "invalid override", "as in train.epochs=3"]),
    "three parts": (["data.columns.output=answer"], ["invalid override", "'data.columns={output: answer}'"]),
    "unknown section there": (
        ["trian.epochs=3"],
        ["trian.epochs (command line)", "`epochs` is `train.epochs` here", "train.epochs=3"],
    ),
    "unknown section and key there": (
        ["trian.epoch=3"],
        ["trian.epoch (command line)", "unknown section", "did you mean 'train'?"],
    ),
    "text for a mapping": (
        ["data.system_prompt=[a]"],
        ["data.system_prompt", "found ['a']", "a string, or null"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_an_error_has_where_found_expected_and_repair(workspace, case):
    change, fragments = BAD[case]
    with pytest.raises(UserError) as caught:
        if isinstance(change, str):
            workspace.load(change)
        else:
            workspace.load(DATA, *change)
    message = str(caught.value)
    for fragment in fragments:
        if fragment.startswith("-"):
            assert fragment[1:] not in message
        else:
            assert fragment in message, f"{fragment!r} is not in:\n{message}"
    assert "expected: " in message
    for leak in ("pydantic", "Traceback", "Input should", "extra_forbidden", "NoneType", "CommentedMap"):
        assert leak not in message


def test_there_are_enough_cases():
    assert len(BAD) >= 45


def test_all_errors_are_reported_at_once(workspace):
    text = """
    model: {base: nobody, precision: half}
    data: {templat: alpaca, packing: maybe}
    adapter: {method: lora, rank: 0, foo: 1}
    train: {epochs: yes, micro_batch_size: big}
    trian: {}
    """
    with pytest.raises(UserError) as caught:
        workspace.load(text, "evaluate.samples=-1", "nonsense")
    places = [problem.where for problem in caught.value.problems]
    assert places == [
        "trian (my.yaml:5)",
        "model.precision (my.yaml:1)",
        "data.packing (my.yaml:2)",
        "data.templat (my.yaml:2)",
        "adapter.rank (my.yaml:3)",
        "adapter.foo (my.yaml:3)",
        "train.epochs (my.yaml:4)",
        "train.micro_batch_size (my.yaml:4)",
        "evaluate.samples (command line)",
        "'nonsense' (command line)",
    ]


def test_an_error_in_one_section_does_not_hide_cross_field_problems_of_others(workspace):
    with pytest.raises(UserError) as caught:
        workspace.load(DATA, "train.epochs=x", "model.base=nobody", "evaluate.exact_match=5")
    assert [problem.where.split()[0] for problem in caught.value.problems] == ["train.epochs", "model.base"]


def test_an_error_in_a_union_is_reported_once(workspace):
    with pytest.raises(UserError) as caught:
        workspace.load(DATA, "data.held_out=-3")
    assert len(caught.value.problems) == 1
    assert str(caught.value) == (
        "data.held_out (command line): found -3\n"
        "    expected: an integer, 0 or more, or a number from 0 up to, but not including, 1, "
        "or a string (rows held out of training: a number, a fraction (below 1), or a file)"
    )


@pytest.mark.parametrize(
    ("text", "suggestion"),
    [
        ("model: {base: ./outer}\ndata: {source: a/b}\n", "did you mean 'outer/checkpoint'?"),
        (
            "model: {base: ./adapted}\ndata: {source: a/b}\n",
            "it is an adapter: --from adapted trains",
        ),
    ],
)
def test_a_folder_without_config_gets_a_hint(workspace, text, suggestion):
    (workspace.folder / "outer" / "checkpoint").mkdir(parents=True)
    (workspace.folder / "outer" / "checkpoint" / "config.json").write_text("{}")
    (workspace.folder / "adapted").mkdir()
    (workspace.folder / "adapted" / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="has no config.json") as caught:
        workspace.load(text)
    assert suggestion in str(caught.value)
