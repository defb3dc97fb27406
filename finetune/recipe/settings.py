"""The sections that every recipe has; adapters and stages declare theirs beside the code that uses them."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny

from finetune.recipe.errors import Problem

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]
Text = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    """A part of a recipe: unknown keys are mistakes, types are meant, nothing changes after loading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=()
    )
    NAMED: ClassVar[tuple[str, ...]] = ()
    """Settings that are a name, or a mapping of ``name`` and what belongs to it (``align.loss.beta=0.2``)."""
    PLACES: ClassVar[tuple[str, ...]] = ()
    """Settings that are no part of a run's name: where another run lies, on how many processes this runs."""

    def made_of(self) -> list[str]:
        """Return digests of what these settings name beside data and start: the user's programs, other runs.

        Raises:
            UserError: some of it is not there.
        """
        return []


class RopeSettings(Section):
    """How rotary positions are stretched to more of them than the base was trained with."""

    method: Literal["linear", "dynamic", "yarn"] = Field(
        description="linear: position interpolation; dynamic: NTK-aware, by the row's length; yarn"
    )
    factor: Annotated[float, Field(ge=1)] = Field(description="context of the result / context of the base")


class ModelSettings(Section):
    """The base model and how its weights are held."""

    PLACES: ClassVar[tuple[str, ...]] = ("start",)

    base: Text = Field("tiny", description="short name (`llm-align list bases`), hub id, or folder")
    revision: Text | None = Field(None, description="branch, tag or commit of a hub model")
    start: Text | None = Field(
        None,
        description="finished run to go on from: its folder, its name below ./runs or the beginning of it; "
        "or stage/recipe (sft/quickstart), which runs first if need be",
    )
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: bfloat16 where the hardware computes in it, else float32"
    )
    quantization: Literal["auto", "none", "nf4", "int8"] = Field(
        "auto", description="how the frozen base is stored; auto: what the adapter asks for"
    )
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flex_attention"] = Field(
        "auto", description="attention implementation; auto: the library's choice"
    )
    rope: RopeSettings | None = Field(
        None, description="a longer context: {method: yarn, factor: 4}; null: the base's own"
    )
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")


class SelectSettings(Section):
    """Which rows of a source are kept: a curated subset. What is left out is counted and told."""

    min_reply_characters: Count = Field(0, description="characters of a row's replies together at least")
    max_reply_characters: Positive | None = Field(
        None, description="characters of a row's replies together at most"
    )
    score: Text | None = Field(None, description="the source's column that rates each row")
    min_score: float | None = Field(None, description="keep rows rated at least this (AlpaGasus: 4.5)")
    distinct: Annotated[float, Field(ge=0.5, le=1)] | None = Field(
        None,
        description="leave out rows sharing this part of their word 5-grams with an earlier one (1: copies)",
    )
    rows: Positive | None = Field(None, description="keep this many of what is left (LIMA: 1000)")
    rows_by: Literal["random", "score", "length"] = Field(
        "random", description="which: drawn with the seed, the best rated, or the longest replies"
    )


@dataclass(frozen=True, slots=True)
class Texts:
    """Plain texts are welcome as rows; ``separator`` stands between the documents of a text file."""

    separator: str | None = None


class MixedSource(Section):
    """One source of a mixture."""

    source: Text = Field(description="hub id, file or folder")
    columns: dict[str, str] | None = Field(None, description="our column name: the source's column name")
    rows: Positive | None = Field(None, description="look at this many rows at most, drawn with the seed")
    select: SelectSettings | None = Field(None, description="which of these rows are kept")
    weight: Annotated[float, Field(gt=0)] | None = Field(
        None, description="rate beside the other weights; null: by the number of rows"
    )
    share: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None,
        description="fixed share of the mixture; its rows may be plain text. The others divide the rest",
    )
    split: Text | None = Field(None, description="split of a hub data set; null: data.split")
    revision: Text | None = Field(None, description="branch, tag or commit of a hub data set")


class DataSettings(Section):
    """What is learnt, and how it is written down."""

    source: Text | list[dict[str, Any]] | None = Field(
        None,
        description="hub id (owner/name, owner/name:subset), file (.json, .jsonl, .csv, .parquet; .gz too), "
        "folder; in Python a list of rows",
    )
    mix: Annotated[list[MixedSource], Field(min_length=1)] | None = Field(
        None, description="several sources in place of `source`"
    )
    mix_limit: Positive | None = Field(
        None, description="a source counts as this many rows at most when rates are made of sizes"
    )
    mix_temperature: Annotated[float, Field(ge=1)] = Field(
        1.0, description="rates go as size^(1/temperature): 1 by size, more lifts small sources"
    )
    mix_rows: Positive | None = Field(
        None, description="rows of an epoch of the mixture; null: until the first source is used up"
    )
    split: Text = Field("train", description="split of a hub data set")
    revision: Text | None = Field(None, description="branch, tag or commit of a hub data set")
    columns: dict[str, str] | None = Field(None, description="our column name: the source's column name")
    select: SelectSettings | None = Field(None, description="which rows of `source` are kept")
    template: Text = Field("alpaca", description="file of data_templates/, or `model`: the tokenizer's own")
    system: str | None = Field(None, description="system text for conversations that have none")
    held_out: Count | Share | Text = Field(
        0, description="rows (a number), a share (below 1), or a file that is kept out of training"
    )
    max_length: Annotated[int, Field(ge=8)] | None = Field(
        None, description="tokens a row at most; null: what the model takes, 2048 at most"
    )
    loss_on: Literal["reply", "all", "last"] = Field(
        "reply", description="every reply, all tokens (prompts too), or a conversation's last reply alone"
    )
    too_long: Literal["cut", "drop"] = Field(
        "cut", description="cut the end off longer rows, or drop the rows"
    )
    packing: bool = Field(
        False, description="lay rows end to end in place of padding; same loss, same batches"
    )
    cache: bool = Field(True, description="keep tokenised rows for the next run")

    @property
    def texts(self) -> Texts | None:
        """Return how plain texts are read, None where a row must be a conversation."""
        return None


class TrainSettings(Section):
    """How long, how fast, on which engine and how many processes."""

    PLACES: ClassVar[tuple[str, ...]] = ("processes", "strategy", "offload")

    engine: Literal["native", "trl"] = Field("native", description="our trainer, or TRL's for the same stage")
    epochs: Annotated[float, Field(gt=0)] = Field(1.0, description="passes over the data")
    max_steps: Positive | None = Field(
        None, description="train exactly this many optimizer steps, whatever epochs says"
    )
    batch_size: Positive = Field(16, description="sequences per optimizer step, over all processes")
    micro_batch_size: Positive | Literal["auto"] = Field("auto", description="sequences per forward pass")
    learning_rate: Annotated[float, Field(gt=0)] = Field(2e-4, description="peak learning rate")
    schedule: Literal["linear", "cosine", "constant"] = Field(
        "cosine", description="learning rate after warm-up"
    )
    warmup: Count | Share = Field(0.03, description="steps (0, 1, 2, ...), or a share of all steps (below 1)")
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "adafactor"] = Field(
        "adamw", description="optimizer"
    )
    betas: Annotated[list[Share], Field(min_length=2, max_length=2)] = Field(
        [0.9, 0.999], description="AdamW's moment decays"
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="decoupled weight decay")
    label_smoothing: Share = Field(
        0.0, description="share of the target spread evenly over the vocabulary (0.1), in training alone"
    )
    neftune_alpha: Annotated[float, Field(gt=0)] | None = Field(
        None, description="NEFTune: size of the noise on embeddings (5 to 15), in training alone; null: none"
    )
    max_grad_norm: Annotated[float, Field(ge=0)] = Field(
        1.0, description="clip the gradient to this norm; 0: never"
    )
    seed: Count = Field(0, description="data order, initial adapter, dropout")
    checkpoint_every: Positive | None = Field(None, description="steps between checkpoints; null: ten a run")
    keep_checkpoints: Annotated[int, Field(ge=2)] = Field(2, description="checkpoints kept at a time")
    gradient_checkpointing: bool = Field(False, description="recompute activations: less memory, slower")
    group_by_length: bool = Field(True, description="batches of rows of similar length: less padding")
    processes: Positive | Literal["auto"] = Field(
        "auto",
        description="how many share the work; auto: one a GPU, one on the CPU; not part of a run's name",
    )
    strategy: Literal["auto", "single", "ddp", "zero1", "zero2", "zero3", "fsdp2"] = Field(
        "auto",
        description="what processes hold a part of: ddp nothing, zero1 optimizer, zero2 gradients too, "
        "zero3 and fsdp2 weights too",
    )
    offload: Literal["none", "cpu", "nvme"] = Field(
        "none", description="where zero keeps optimizer states (zero3: weights too) between uses"
    )
    log_every: Positive = Field(1, description="steps between lines of metrics.jsonl")
    evaluate_every: Positive | None = Field(
        None, description="steps between held-out losses; null: start and end"
    )
    engine_args: dict[str, Any] = Field(
        {}, description="further arguments of the engine, by the engine's names"
    )


class DocumentSettings(DataSettings):
    """What a model reads in continued pretraining: documents, every token of them."""

    template: Text = Field(
        "plain", description="how rows that are conversations are written; plain texts stay as they are"
    )
    separator: Text | None = Field(
        None, description="text between the documents of a .txt or .md file (\\n\\n); null: a file is one"
    )
    packing: bool = Field(
        False,
        description="false: documents end to end, cut into blocks of max_length, attention over borders; "
        "true: whole documents in rows of max_length, none sees another",
    )
    loss_on: Literal["all"] = Field("all", description="every token is learnt")
    too_long: Literal["cut"] = Field("cut", description="long documents go on in the next row")

    @property
    def texts(self) -> Texts:
        """Return how plain texts are read; a line feed may be written as backslash and n, as in a shell."""
        separator = self.separator.replace("\\n", "\n") if self.separator else None
        return Texts(separator)


class EvaluateSettings(Section):
    """What is shown before and after training, on held-out rows."""

    samples: Count = Field(4, description="replies written to samples.jsonl")
    exact_match: Count = Field(0, description="held-out rows whose greedy reply must be equal")
    max_new_tokens: Positive = Field(128, description="length of a reply at most")
    judges: dict[str, Text] = Field(
        {},
        description="programs that judge replies to held-out prompts, before and after: {name: "
        "file.py:function}; function(prompt, reply) gives a truth or a number, None: not for this prompt",
    )
    judge_rows: Positive = Field(100, description="held-out prompts that judges look at")
    skill: Text | None = Field(
        None, description="instructions with their exact answers: a skill that this tuning must not cost"
    )
    skill_rows: Positive = Field(100, description="rows of `skill` that are asked, before and after")


class AdapterSettings(Section):
    """What every adapter has: its method, the name of a file of finetune/adapters/."""

    method: Text = Field("lora", description="file of finetune/adapters/")

    @property
    def positions(self) -> int:
        """Return the positions of the model that the adapter takes: none, unless it says otherwise."""
        return 0

    def problems(self) -> list[Problem]:
        """Return what contradicts itself in these settings, before anything is loaded."""
        return []


class VirtualTokenSettings(AdapterSettings):
    """What adapters have that put vectors of their own in front of every sequence."""

    virtual_tokens: Positive = Field(20, description="vectors in front of every sequence")

    @property
    def positions(self) -> int:
        """Return the positions of the model that the adapter takes."""
        return self.virtual_tokens


class StageSettings(Section):
    """The sections of a stage's recipe; a stage may add its own."""

    TRL_CONFIG: ClassVar[str] = "SFTConfig"
    """The class of the engine's arguments under ``train.engine: trl``."""

    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    adapter: SerializeAsAny[AdapterSettings] = AdapterSettings()
    train: TrainSettings = TrainSettings()
    evaluate: EvaluateSettings = EvaluateSettings()

    def problems(self, valid: Collection[str]) -> list[Problem]:
        """Return what contradicts itself for this stage, before anything is loaded.

        Args:
            valid: the sections that are in order; the others hold defaults in the mistaken ones' stead.
        """
        return []
