"""Pydantic schema of the recipe sections shared by all stages; adapters and stages declare their own."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny, model_validator

from finetune.recipe.python_function import FunctionName
from finetune.recipe.python_rows import PythonRows, from_python, pick_split
from finetune.recipe.python_tables import has_splits
from finetune.recipe.user_calls import DEFAULT_LIMIT

MAX_INT = 2**31 - 1
"""Largest count in a recipe: torch and Arrow have 32-bit counters."""
MAX_FLOAT = 1e30
"""Largest number in a recipe: a product of a few settings still is a float32 (3.4e38)."""
PositiveInt = Annotated[int, Field(gt=0, le=MAX_INT)]
NonNegativeInt = Annotated[int, Field(ge=0, le=MAX_INT)]
AtLeastTwo = Annotated[int, Field(ge=2, le=MAX_INT)]
Dimension = Annotated[int, Field(gt=0, le=65_536)]
"""A dimension of trained weights: larger ones are larger than any model's hidden size."""
RowsInMemory = Annotated[int, Field(gt=0, le=10**8)]
"""A number of rows that are listed in memory, whatever the size of the data."""
FiniteFloat = Annotated[float, Field(ge=-MAX_FLOAT, le=MAX_FLOAT)]
PositiveFloat = Annotated[float, Field(gt=0, le=MAX_FLOAT)]
NonNegativeFloat = Annotated[float, Field(ge=0, le=MAX_FLOAT)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
NonEmptyStr = Annotated[str, Field(min_length=1)]
RowSource = Annotated[NonEmptyStr | PythonRows, BeforeValidator(from_python)]
"""Rows: a Hub id, a file or a folder; in Python also a table, of which a snapshot is taken."""


class Section(BaseModel):
    """Base class of a recipe section: unknown keys are errors, types are strict, instances are frozen."""

    # strict: "16" is not 16. allow_inf_nan: YAML's .inf would pass every lower bound.
    # protected_namespaces: keys may begin with model_.
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=()
    )
    NAMED_CHOICES: ClassVar[tuple[str, ...]] = ()
    """Keys whose value is a name, or a mapping of ``name`` and its own settings (``dpo.loss.beta=0.2``)."""
    NOT_IN_DIGEST: ClassVar[tuple[str, ...]] = ()
    """Keys that are not part of a run's name: the path of another run, the number of processes."""
    ROW_SOURCES: ClassVar[tuple[str, ...]] = ()
    """Keys that name rows (``RowSource``)."""

    def input_digests(self, function_digest: Callable[..., str]) -> list[str]:
        """Return digests of other inputs than data and parent run: user functions, other runs.

        Args:
            function_digest: (``file.py:function``, ``where=`` its key) -> digest of the file.

        Raises:
            UserError: one of them is missing.
        """
        return []


class RopeSettings(Section):
    """RoPE scaling: extends the context beyond that of the base model."""

    method: Literal["linear", "dynamic", "yarn"] = Field(
        description="linear: position interpolation; dynamic: NTK-aware, by row length; yarn: YaRN"
    )
    factor: Annotated[float, Field(ge=1, le=1024)] = Field(description="new context length / the base's")


class ModelSettings(Section):
    """The base model, and the precision and storage of its weights."""

    NOT_IN_DIGEST: ClassVar[tuple[str, ...]] = ("init_from",)

    base: NonEmptyStr = Field("tiny", description="short name (`llm-align list bases`), Hub id, or folder")
    revision: NonEmptyStr | None = Field(None, description="branch, tag or commit of a Hub model")
    init_from: NonEmptyStr | None = Field(
        None,
        description="parent run: a run directory, its name in ./runs, or a prefix of the name; or "
        "stage/recipe (sft/quickstart), which runs first if needed",
    )
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: bfloat16 if the hardware supports it, else float32"
    )
    quantization: Literal["auto", "none", "nf4", "int8"] = Field(
        "auto", description="quantization of the frozen base; auto: the adapter's default"
    )
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flex_attention"] = Field(
        "auto", description="attention implementation; auto: the library's choice"
    )
    rope: RopeSettings | None = Field(
        None, description="RoPE scaling for a longer context: {method: yarn, factor: 4}; null: none"
    )
    trust_remote_code: bool = Field(False, description="run Python code from the model repository")


class SelectSettings(Section):
    """Filters that select a subset of a source's rows; dropped rows are counted in the data report."""

    min_reply_characters: NonNegativeInt = Field(0, description="minimum characters in a row's replies")
    max_reply_characters: PositiveInt | None = Field(
        None, description="maximum number of characters in a row's replies"
    )
    score: NonEmptyStr | None = Field(None, description="column with a rating of each row")
    min_score: FiniteFloat | None = Field(None, description="minimum rating (AlpaGasus: 4.5)")
    near_dedup: Annotated[float, Field(ge=0.5, le=1)] | None = Field(
        None,
        description="near-deduplication (MinHash): drop rows whose word 5-grams have at least this Jaccard "
        "similarity to those of an earlier row (1: exact copies)",
    )
    rows: PositiveInt | None = Field(
        None, description="number of rows to use, after the filters (LIMA: 1000)"
    )
    rows_by: Literal["random", "score", "length"] = Field(
        "random", description="rows to use: random (by the seed), score: best rated, length: longest replies"
    )


@dataclass(frozen=True, slots=True)
class TextFormat:
    """Plain texts are accepted as rows; ``separator`` is the text between the documents of a text file."""

    separator: str | None = None


class MixedSource(Section):
    """One source of a mixture."""

    ROW_SOURCES: ClassVar[tuple[str, ...]] = ("source",)

    source: RowSource = Field(description="Hub id, file or folder")
    columns: dict[str, str] | None = Field(None, description="{layout's column: your column}")
    rows: PositiveInt | None = Field(None, description="maximum number of rows, sampled with the seed")
    select: SelectSettings | None = Field(None, description="filters for these rows")
    weight: PositiveFloat | None = Field(
        None, description="sampling weight relative to the other sources; null: by number of rows"
    )
    share: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None,
        description="fixed fraction of the mixture; rows may be plain text. Other sources share the rest",
    )
    split: NonEmptyStr | None = Field(None, description="split of a Hub dataset; null: data.split")
    revision: NonEmptyStr | None = Field(None, description="branch, tag or commit of a Hub dataset")


class DataSettings(Section):
    """Training data: sources, template, held-out split, maximum length and loss mask."""

    ROW_SOURCES: ClassVar[tuple[str, ...]] = ("source", "held_out")

    source: RowSource | None = Field(
        None,
        description="Hub id (owner/name, owner/name:subset), file (.json, .jsonl, .csv, .parquet and others; "
        ".gz, .zst too) or folder; in Python also a list of rows, a data frame or a dataset",
    )
    mix: Annotated[list[MixedSource], Field(min_length=1)] | None = Field(
        None, description="several sources instead of `source`"
    )
    mix_size_cap: PositiveInt | None = Field(
        None, description="maximum size of a source (K), if rates are computed from sizes"
    )
    mix_temperature: Annotated[float, Field(ge=1, le=MAX_FLOAT)] = Field(
        1.0, description="rates are proportional to size^(1/temperature); above 1 upsamples small sources"
    )
    epoch_rows: RowsInMemory | None = Field(
        None, description="rows per epoch of the mixture; null: until the first source is exhausted"
    )
    split: NonEmptyStr = Field(
        "train", description="split of a Hub dataset, or of a folder whose file names say it"
    )
    revision: NonEmptyStr | None = Field(None, description="branch, tag or commit of a Hub dataset")
    columns: dict[str, str] | None = Field(None, description="{layout's column: your column}")
    ignore_columns: list[NonEmptyStr] = Field(
        [],
        description="columns that count as absent; one that changes what a row means (images; for sft also "
        "chosen, label, score) stops the run unless it is named here",
    )
    select: SelectSettings | None = Field(None, description="filters for the rows of `source`")
    template: NonEmptyStr = Field(
        "alpaca", description="name of a template, or `tokenizer`: the tokenizer's chat template"
    )
    template_options: dict[str, Any] = Field(
        {}, description="variables of the tokenizer's chat template, such as {enable_thinking: true}"
    )
    system_prompt: str | None = Field(None, description="system prompt for conversations without one")
    reasoning: Literal["keep", "strip", "mask"] = Field(
        "keep", description="thoughts of replies: train on them, remove them, or keep them without loss"
    )
    held_out: Annotated[
        NonNegativeInt | Fraction | NonEmptyStr | PythonRows, BeforeValidator(from_python)
    ] = Field(0, description="rows held out of training: a number, a fraction (below 1), or a file")
    max_length: Annotated[int, Field(ge=8, le=MAX_INT)] | None = Field(
        None, description="maximum tokens per row; null: the model's context, at most 2048"
    )
    loss_on: Literal["assistant", "all", "last_assistant"] = Field(
        "assistant",
        description="loss on every reply (TRL: assistant_only_loss), on all tokens (prompts too), or on the "
        "last reply only",
    )
    overflow: Literal["truncate", "drop"] = Field(
        "truncate", description="truncate rows longer than max_length, or drop them"
    )
    packing: bool = Field(
        False, description="concatenate rows instead of padding them; same loss, same batches"
    )
    cache: bool = Field(True, description="cache tokenized rows on disk")

    @model_validator(mode="before")
    @classmethod
    def _pick_splits(cls, values: Any) -> Any:
        """Replace a dataset with splits by the split that the recipe reads, as for a folder."""
        if not isinstance(values, Mapping):
            return values
        split = values.get("split", "train")
        mix = values.get("mix")
        picked = dict(values)
        if has_splits(values.get("source")):
            picked["source"] = pick_split(values["source"], split, key="data.split")
        if isinstance(mix, list):
            picked["mix"] = [_pick_mixed_split(entry, split, index) for index, entry in enumerate(mix)]
        return picked

    @property
    def text_format(self) -> TextFormat | None:
        """Format of plain-text rows; None if every row must be a conversation."""
        return None


def _pick_mixed_split(entry: Any, split: str, index: int) -> Any:
    if not isinstance(entry, Mapping) or not has_splits(entry.get("source")):
        return entry
    key = f"data.mix[{index}].split"
    return {**entry, "source": pick_split(entry["source"], entry.get("split") or split, key=key)}


class TrainSettings(Section):
    """Training loop: steps, optimizer, learning rate, engine, processes and sharding strategy."""

    NOT_IN_DIGEST: ClassVar[tuple[str, ...]] = ("num_processes", "strategy", "offload", "function_timeout")

    engine: Literal["native", "trl"] = Field(
        "native", description="llm-align's trainer, or TRL's for the same stage"
    )
    epochs: Annotated[float, Field(gt=0, le=10**6)] = Field(1.0, description="number of epochs")
    max_steps: PositiveInt | None = Field(None, description="number of optimizer steps; overrides epochs")
    batch_size: PositiveInt = Field(16, description="sequences per optimizer step, over all processes")
    micro_batch_size: PositiveInt | Literal["auto"] = Field("auto", description="sequences per forward pass")
    learning_rate: PositiveFloat = Field(2e-4, description="peak learning rate")
    lr_schedule: Literal["linear", "cosine", "constant"] = Field(
        "cosine", description="learning rate schedule after warmup; the last step's rate is above 0"
    )
    warmup: NonNegativeInt | Fraction = Field(
        0.03,
        description="warmup: steps (0, 1, 2, ...), or a fraction of all steps (below 1); step k of W has k/W "
        "of learning_rate; at most the steps of the run",
    )
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "adafactor"] = Field(
        "adamw", description="optimizer"
    )
    betas: Annotated[list[Fraction], Field(min_length=2, max_length=2)] = Field(
        [0.9, 0.999], description="AdamW betas"
    )
    weight_decay: NonNegativeFloat = Field(0.0, description="decoupled weight decay")
    label_smoothing: Fraction = Field(0.0, description="label smoothing (0.1), in training only")
    neftune_alpha: PositiveFloat | None = Field(
        None, description="NEFTune noise on embeddings (5 to 15), in training only; null: none"
    )
    max_grad_norm: NonNegativeFloat = Field(1.0, description="maximum gradient norm; 0: no clipping")
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = Field(
        0, description="seed of data order, adapter initialization and dropout"
    )
    checkpoint_every: PositiveInt | None = Field(
        None, description="steps between checkpoints; null: ten checkpoints per run"
    )
    keep_checkpoints: AtLeastTwo = Field(2, description="number of most recent checkpoints to keep")
    gradient_checkpointing: bool = Field(False, description="recompute activations: less memory, slower")
    group_by_length: bool = Field(True, description="batch rows of similar length: less padding")
    num_processes: PositiveInt | Literal["auto"] = Field(
        "auto",
        description="number of processes; auto: one per GPU, or one on a CPU; not part of the run name",
    )
    strategy: Literal["auto", "single", "ddp", "zero1", "zero2", "zero3", "fsdp2"] = Field(
        "auto",
        description="sharding over processes: ddp none, zero1 optimizer states, zero2 also "
        "gradients, zero3 and fsdp2 also weights",
    )
    offload: Literal["none", "cpu", "nvme"] = Field(
        "none", description="offload optimizer states (zero3: also weights) to CPU memory or NVMe"
    )
    log_every: PositiveInt = Field(1, description="steps between lines of metrics.jsonl")
    evaluate_every: PositiveInt | None = Field(
        None, description="steps between held-out evaluations; null: before and after training only"
    )
    function_timeout: PositiveFloat | None = Field(
        DEFAULT_LIMIT,
        description="seconds that one call of a reward function, rule or grader may take; null: no limit",
    )
    engine_args: dict[str, Any] = Field({}, description="further arguments of the engine, under its names")


class DocumentSettings(DataSettings):
    """Training data of continued pretraining: documents, with loss on every token."""

    template: NonEmptyStr = Field(
        "plain", description="template for rows that are conversations; plain text is unchanged"
    )
    separator: NonEmptyStr | None = Field(
        None, description="text between documents of a .txt or .md file (\\n\\n); null: one document per file"
    )
    packing: bool = Field(
        False,
        description="false: documents concatenated and chunked into blocks of max_length, attention not "
        "masked between them; true: complete documents packed into rows of max_length, attention masked",
    )
    loss_on: Literal["all"] = Field("all", description="loss on every token")
    overflow: Literal["truncate"] = Field("truncate", description="long documents continue in the next row")

    @property
    def text_format(self) -> TextFormat:
        """Format of plain-text rows."""
        # A shell passes \n as backslash and n.
        separator = self.separator.replace("\\n", "\n") if self.separator else None
        return TextFormat(separator)


class EvaluateSettings(Section):
    """Generation evals before and after training, on held-out rows."""

    ROW_SOURCES: ClassVar[tuple[str, ...]] = ("retention",)

    samples: NonNegativeInt = Field(4, description="prompts in samples.jsonl, with replies before and after")
    exact_match: NonNegativeInt = Field(
        0, description="number of held-out rows for exact match of greedy replies; 0: off"
    )
    max_new_tokens: PositiveInt | None = Field(
        None, description="maximum length of a reply; null: sampling.max_new_tokens in RL, else 128"
    )
    graders: dict[str, FunctionName] = Field(
        {},
        description="functions that grade completions of held-out prompts: {name: file.py:function}, "
        "or {name: GRADER}; parameters are filled by name (prompt, completion, expected, columns); "
        "bool, number, None (skip)",
    )
    grader_rows: PositiveInt = Field(100, description="number of held-out prompts for the graders")
    suites: list[NonEmptyStr] = Field([], description="suites (names, YAML files), evaluated like graders")
    retention: RowSource | None = Field(
        None,
        description="retention set: instructions with exact answers, a skill that training must not degrade",
    )
    retention_rows: PositiveInt = Field(100, description="number of rows of the retention set to use")

    def input_digests(self, function_digest: Callable[..., str]) -> list[str]:
        """Return the digests of the graders' files, part of the run's fingerprint."""
        return [
            function_digest(text, where=f"evaluate.graders.{name}")
            for name, text in sorted(self.graders.items())
        ]


class AdapterSettings(Section):
    """Settings of every adapter: its method, the name of a file of finetune/adapters/."""

    method: NonEmptyStr = Field("lora", description="file of finetune/adapters/")

    @property
    def positions(self) -> int:
        """Number of the model's positions that the adapter uses (virtual tokens)."""
        return 0


class VirtualTokenSettings(AdapterSettings):
    """Settings of adapters with virtual tokens (prompt tuning, prefix tuning)."""

    virtual_tokens: PositiveInt = Field(
        20, description="number of trained virtual tokens before every sequence"
    )

    @property
    def positions(self) -> int:
        """Number of the model's positions that the adapter uses."""
        return self.virtual_tokens


class StageSettings(Section):
    """The sections of a stage's recipe; a stage may add its own."""

    TRL_CONFIG: ClassVar[str] = "SFTConfig"
    """TRL's config class, for ``train.engine: trl``."""

    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    adapter: SerializeAsAny[AdapterSettings] = AdapterSettings()
    train: TrainSettings = TrainSettings()
    evaluate: EvaluateSettings = EvaluateSettings()

    @property
    def max_reply_tokens(self) -> int:
        """Return the maximum length of replies to held-out prompts."""
        return self.evaluate.max_new_tokens or 128
