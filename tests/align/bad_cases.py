"""Mistakes and what their messages have to say: ``name: (arrange, fragments)``."""

import gzip
import json

from bad_input import (
    RECIPE,
    ROWS,
    a_parquet_file,
    all_rows_too_long,
    base_without,
    broken_config,
    chat_with,
    damaged_record,
    damaged_weights,
    data,
    held_out_rows_too_long,
    larger_tokenizer,
    line,
    no_eos,
    other_run,
    other_sizes,
    out_below_a_file,
    out_is_a_file,
    out_is_foreign,
    out_is_foreign_by_force,
    recipe,
    rows,
    weights_lack,
    weights_of_zero_length,
    words,
)

COMMAND_LINES = {
    "unknown verb": (line("sfd", "good.yaml"), ["'sfd'"]),
    "unknown option": (words("--bse", "tiny"), ["--bse", "--base"]),
    "option without value": (words("--base"), ["--base", "requires an argument"]),
    "unknown recipe": (line("sft", "alpca"), ["recipe 'alpca'", "did you mean 'alpaca'?"]),
    "data file as recipe": (line("sft", "my.jsonl"), ["my.jsonl: a data file", "repair:   --data my.jsonl"]),
    "missing recipe file": (line("sft", "god.yaml"), ["god.yaml: no such file", "did you mean 'good"]),
    "two recipes": (words("alpaca"), ["expected one RECIPE, found good.yaml, alpaca"]),
    "value without quotes": (
        words("data.columns={instruction:", "Q,", "output:", "A}"),
        ["expected one RECIPE, found good.yaml, Q,, output:, A}", "quotes around a value that has spaces"],
    ),
    "unknown section": (
        words("trian.epochs=2"),
        ["trian.epochs", "`epochs` is `train.epochs` here", "train.epochs=2"],
    ),
    "unknown key": (words("train.epoch=2"), ["train.epoch", "unknown key", "did you mean 'epochs'?"]),
    "no section": (words("epochs=2"), ["epochs (command line)", "`epochs` is `train.epochs` here"]),
    "number in words": (words("train.epochs=two"), ["train.epochs", "'two'", "a number above 0"]),
    "negative number": (
        words("train.max_steps=-1"),
        ["train.max_steps", "found -1", "an integer above 0"],
    ),
    "share above one": (words("adapter.dropout=1.5"), ["adapter.dropout", "found 1.5", "not including, 1"]),
    "no such choice": (
        words("train.lr_schedule=cosin"),
        ["train.lr_schedule", "'cosin'", "did you mean 'cosine'?"],
    ),
    "infinite rate": (words("train.learning_rate=.inf"), ["train.learning_rate", "inf"]),
    "unknown adapter": (words("--adapter", "loras"), ["adapter.method", "'loras'", "did you mean 'lora'?"]),
    "another adapter's key": (words("adapter.virtual_tokens=3"), ["adapter.virtual_tokens", "unknown key"]),
    "options of another template": (
        words("data.template_options={enable_thinking: true}"),
        ["data.template_options", "data.template=tokenizer has variables"],
    ),
    "unknown template": (words("data.template=alpacca"), ["data.template", "did you mean 'alpaca'?"]),
    "two mistakes at once": (
        words("train.epoch=2", "data.template=nothing"),
        ["2 problems", "train.epoch", "data.template"],
    ),
    "engine_args unknown": (
        words("train.engine_args={lerning_rate_scheduler: 1}"),
        ["train.engine_args.lerning_rate_scheduler", "unknown to the engine", "TrainingArguments"],
    ),
    "engine_args that the recipe decides": (
        words("train.engine_args={learning_rate: 1}"),
        ["train.engine_args.learning_rate", "set by the recipe"],
    ),
    "packing by TRL, which needs a length that the rows have already": (
        words("train.engine=trl", "train.engine_args={packing: true}"),
        ["train.engine_args.packing", "set by the recipe"],
    ),
    "engine_args of a wrong value": (
        words("train.engine_args={adam_epsilon: tiny}"),
        ["train.engine_args.adam_epsilon", "the string 'tiny'", "a number above 0 and below 1"],
    ),
    "engine_args that break a guarantee": (
        words("train.engine_args={save_only_model: true, dataloader_drop_last: true}"),
        ["save_only_model", "cannot be resumed", "dataloader_drop_last", "trains on all rows"],
    ),
    "engine_args for a GPU": (
        words("train.engine_args={tf32: true}"),
        ["train.engine_args.tf32", "with the CPU", "remove tf32"],
    ),
    "a seed of 33 bits": (
        words("train.seed=5000000000"),
        ["train.seed", "found 5000000000", "an integer, 0 or more, at most 4,294,967,295"],
    ),
    "float16 on a CPU, told before the data is read": (
        lambda place: [*place.data("bad.jsonl", b"no JSON"), "model.precision=float16"],
        ["1 problem\nmodel.precision (command line): float16, with the CPU"],
    ),
    "float16 on a CPU": (
        words("model.precision=float16"),
        ["model.precision (command line): float16, with the CPU", "no fast float16", "model.precision=auto"],
    ),
}

CONTRADICTIONS = {
    "packing with a prefix": (
        words("--adapter", "prefix", "data.packing=true"),
        ["data.packing", "adapter.method 'prefix'", "data.packing=false"],
    ),
    "packing with TRL": (
        words("train.engine=trl", "data.packing=true"),
        ["data.packing", "train.engine 'trl'", "train.engine=native"],
    ),
    "micro batch above the batch": (
        words("train.micro_batch_size=5"),
        ["train.micro_batch_size", "5, more than train.batch_size (4)"],
    ),
    "full tuning of a 4-bit base": (
        words("--adapter", "full", "model.quantization=nf4"),
        ["model.quantization", "'nf4' with adapter.method 'full'", "auto"],
    ),
    "exact match without held-out rows": (
        words("data.held_out=0", "evaluate.exact_match=5"),
        ["evaluate.exact_match", "data.held_out is 0"],
    ),
    "evaluation without held-out rows": (
        words("data.held_out=0", "train.evaluate_every=1"),
        ["train.evaluate_every", "data.held_out is 0"],
    ),
    "held out what is learnt": (
        words("data.held_out=rows.jsonl"),
        ["data.held_out", "the same as data.source"],
    ),
    "held out all rows": (
        words("data.held_out=8"),
        ["data.held_out", "8 of 8 usable rows", "fewer rows, so that some remain"],
    ),
    "source and mix": (
        recipe("source: rows.jsonl", "source: rows.jsonl, mix: [{source: rows.jsonl}]"),
        ["data.mix", "set together with data.source"],
    ),
    "max_length above the context": (
        words("data.max_length=512"),
        ["data.max_length", "found 512", "at most 256: the model has 256 positions", "data.max_length=256"],
    ),
    "virtual tokens leave too little": (
        words("--adapter", "prefix", "adapter.virtual_tokens=150"),
        ["data.max_length", "found 128", "at most 106", "the adapter takes 150"],
    ),
    "virtual tokens leave nothing": (
        words("--adapter", "prefix", "adapter.virtual_tokens=256", "data.max_length=null"),
        ["adapter.virtual_tokens", "256", "256 positions"],
    ),
    "a tokenizer larger than the embeddings": (
        larger_tokenizer,
        ["model.base", "512 embeddings for 601 tokens", "the data uses Add", "resize_token_embeddings(601)"],
    ),
    "unknown target modules": (
        words("adapter.target=[q_prj]"),
        ["adapter.target", "'q_prj'", "q_proj", "did you mean 'q_proj'?"],
    ),
    "template model without a chat template": (
        words("data.template=tokenizer"),
        ["data.template", "has no chat template", "data.template=chatml"],
    ),
    "flash attention in float32": (
        words("model.attention=flash_attention_2"),
        ["model.attention", "model.precision is float32", "model.precision=bfloat16"],
    ),
}

RECIPES = {
    "tab": (
        recipe("train: {max_steps: 1, batch_size: 4}", "train:\n\tmax_steps: 1"),
        ["bad.yaml:6", "a tab"],
    ),
    "bracket": (recipe("rank: 2}", "rank: 2"), ["bad.yaml:5", "starts on line 4", "expected: YAML"]),
    "key twice": (recipe("rank: 2", "rank: 2, rank: 3"), ["bad.yaml:4", "duplicate key 'rank'"]),
    "empty file": (lambda place: place.recipe(RECIPE, ""), ["bad.yaml: the file is empty"]),
    "list": (lambda place: place.recipe(RECIPE, "- a\n"), ["bad.yaml", "not sections"]),
    "other stage": (recipe("stage: sft", "stage: dpo"), ["stage", "'dpo'", "stage 'sft'"]),
    "place of a key": (recipe("rank: 2", "rank: two"), ["adapter.rank (bad.yaml:4)", "'two'"]),
    "unknown key with its place": (
        recipe("batch_size: 4", "batchsize: 4"),
        ["train.batchsize (bad.yaml:5)", "did you mean 'batch_size'?"],
    ),
    "value for a section": (
        recipe("adapter: {method: lora, rank: 2}", "adapter: lora"),
        ["adapter", "`adapter` is `adapter.method` here", "adapter.method=lora"],
    ),
}

DATA = {
    "no such file": (words("--data", "rwos.jsonl"), ["data.source", "'rwos.jsonl' does not exist"]),
    "unknown kind": (data("rows.txt", b"a"), ["rows.txt", "unknown file type", ".jsonl"]),
    "empty file": (data("bad.jsonl", b""), ["bad.jsonl", "no rows"]),
    "empty list": (data("bad.json", b"[]"), ["bad.json", "no rows"]),
    "broken line": (
        data("bad.jsonl", b'{"instruction": "a", "output": "b"}\n{"instruction": "a"\n'),
        ["bad.jsonl:2", "one JSON object per line"],
    ),
    "lines named json": (
        data("bad.json", b'{"a": 1}\n{"a": 2}\n'),
        ["bad.json:2", "Extra data", "rename it to .jsonl"],
    ),
    "a number in a list": (data("bad.json", b"[1]"), ["bad.json:[0]", "found '1'", "a JSON object"]),
    "csv with another number of fields": (
        data("bad.csv", b"instruction,output\na,b\na,b,c\n"),
        ["bad.csv:3", "the number of fields differs from the header (2)", "quotes"],
    ),
    "csv with an open quote": (data("bad.csv", b'instruction,output\n"a,b\n'), ["bad.csv:2"]),
    "no parquet": (data("bad.parquet", b"PAR1 and no more"), ["bad.parquet", "a Parquet file"]),
    "parquet with other columns": (
        a_parquet_file,
        ["no known layout has columns a, b", "instruction+output"],
    ),
    "no gzip": (data("bad.jsonl.gz", b"plain"), ["bad.jsonl.gz", "a complete compressed file"]),
    "half a gzip": (
        data("bad.jsonl.gz", gzip.compress(json.dumps(ROWS[0]).encode() * 99)[:-12]),
        ["bad.jsonl.gz", "a complete compressed file"],
    ),
    "no UTF-8": (
        data("bad.csv", "instruction,output\ncaf\xe9,th\xe9\n".encode("latin-1")),
        ["bad.csv", "not UTF-8", "iconv -f ENCODING"],
    ),
    "wrong columns": (
        rows({"question": "a", "reply": "b"}),
        ["no known layout has columns question, reply", "instruction+output", "data.columns="],
    ),
    "wrong role": (
        rows({"messages": [{"role": "robot", "content": "a"}]}),
        ["bad.jsonl:1", "messages[0].role", "'robot'", "assistant"],
    ),
    "a number for a text": (
        rows({"instruction": "a", "output": 3}),
        ["bad.jsonl:1", "field 'output'", "found 3", "text"],
    ),
    "null for a text": (
        rows({"instruction": "a", "output": "b"}, {"instruction": "a", "output": None}),
        ["bad.jsonl:2", "field 'output'", "missing or null"],
    ),
    "many wrong rows": (
        rows(*[{"instruction": "a", "output": i} for i in range(9)]),
        ["bad.jsonl:5", "and 4 more rows", "9 of 9 rows do not fit"],
    ),
    "all rows empty": (
        rows(*[{"instruction": "", "output": ""}] * 4),
        ["no row to train on", "rows dropped: empty turn: 4", "bad.jsonl:1", "data.columns="],
    ),
    "all rows too long": (
        all_rows_too_long,
        ["no row to train on", "longer than 128 tokens", "bad.jsonl:1", "data.max_length"],
    ),
    "all rows too long and dropped": (
        lambda place: [*all_rows_too_long(place), "data.overflow=drop"],
        ["no row to train on", "longer than 128 tokens, dropped", "bad.jsonl:1"],
    ),
    "held-out rows too long": (
        held_out_rows_too_long,
        ["data.held_out", "longer than 128 tokens", "long.jsonl:1"],
    ),
    "held-out file of other columns": (
        lambda place: [*place.rows({"a": "b"})[:2], "data.held_out=bad.jsonl"],
        ["bad.jsonl", "no known layout has columns a"],
    ),
    "unknown column": (
        words("data.columns={instruction: qestion}"),
        ["data.columns", "'qestion'", "instruction, input, output"],
    ),
    "folder without data": (
        lambda place: (place.file("empty/readme.md"), ["sft", "good.yaml", "--data", "empty"])[1],
        ["empty", "a folder without data files"],
    ),
}

BASES = {
    "unknown short name": (words("--base", "lama-2-7b"), ["model.base", "did you mean 'llama-2-7b'?"]),
    "no such folder": (words("--base", "./nowhere"), ["model.base", "'./nowhere' is not a folder"]),
    "Hub id that is not cached": (
        words("--base", "nobody/nothing"),
        ["model.base 'nobody/nothing'", "HF_HUB_OFFLINE is set", "hf download nobody/nothing"],
    ),
    "no config": (base_without("config.json"), ["model.base", "has no config.json", "save_pretrained"]),
    "no weights": (base_without("*.safetensors"), ["model.base 'broken'", "safetensors"]),
    "no tokenizer": (base_without("tokenizer*"), ["model.base 'broken'", "tokenizer"]),
    "damaged weights": (damaged_weights, ["model.base 'broken'", "safetensors"]),
    "empty weights": (weights_of_zero_length, ["model.base 'broken'", "safetensors"]),
    "damaged config": (broken_config("{"), ["model.base: broken/config.json", "line 1 column 2", "again"]),
    "config of another kind": (
        broken_config('{"model_type": "bert"}'),
        ["model.base 'broken'", "lack"],
    ),
    "config of other sizes": (other_sizes, ["model.base 'broken'", "lack", "embed_tokens.weight", "512"]),
    "weights that lack a layer": (weights_lack, ["model.base 'broken'", "lack 9 of the weights", "layers.1"]),
    "config of no known model": (
        broken_config('{"model_type": "llama9"}'),
        ["model.base 'broken'", "llama9"],
    ),
    "no EOS": (no_eos, ["model.base", "no EOS token"]),
}

FOLDERS = {
    "out is a file": (out_is_a_file, ["--out taken", "a file", "a folder, or an unused name"]),
    "out is below a file": (out_below_a_file, ["taken/run", "not writable", "use --out"]),
    "out is foreign": (out_is_foreign, ["--out thesis", "a folder with other files, not a run"]),
    "out is foreign, by force": (
        out_is_foreign_by_force,
        ["--out thesis", "a folder with other files, not a run"],
    ),
    "out is another run": (other_run, ["--out theirs", "dolly, 0123abcd", "--force"]),
    "out is a damaged run": (damaged_record, ["theirs/run.json", "corrupt", "choose another --out"]),
    "chat without a run": (
        line("chat", "nowhere", "--prompt", "a"),
        [
            "RUN: there is no run 'nowhere'",
            "its name in ./runs or a prefix of it\n",
        ],
    ),
    "chat with rows": (line("chat", "rows.jsonl", "--prompt", "a"), ["RUN: there is no run 'rows.jsonl'"]),
    "chat with a running run": (
        chat_with("running"),
        [
            "theirs: a run with status 'running'",
            "a finished run",
            "wait until it finishes",
        ],
    ),
    "chat with an interrupted run": (
        chat_with("interrupted"),
        [
            "theirs: a run with status 'interrupted'",
            "`llm-align sft good.yaml --out theirs` starts again",
        ],
    ),
    "chat with a failed run": (chat_with("failed"), ["theirs: a run with status 'failed'"]),
    "chat without a folder": (line("chat"), ["RUN"]),
}

CASES = COMMAND_LINES | CONTRADICTIONS
for _kind, _cases in {"recipe": RECIPES, "data": DATA, "base": BASES, "folder": FOLDERS}.items():
    CASES |= {f"{_kind}: {name}": case for name, case in _cases.items()}
