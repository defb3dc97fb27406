"""A decoder's layer shapes and parameter count from config.json alone, without weights or torch."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from finetune.recipe.errors import Problem, UserError, nearest

Values = Mapping[str, Any]

OFTEN = {"attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {**OFTEN, "vocab_size": 32000, "max_position_embeddings": 2048},
    "mistral": {**OFTEN, "vocab_size": 32000, "max_position_embeddings": 131072, "num_key_value_heads": 8},
    "qwen2": {**OFTEN, "vocab_size": 151936, "max_position_embeddings": 32768, "num_key_value_heads": 32},
    "qwen3": {
        **OFTEN,
        **{"vocab_size": 151936, "max_position_embeddings": 32768, "num_key_value_heads": 32},
        "head_dim": 128,
    },
    "gemma2": {
        **OFTEN,
        **{"vocab_size": 256000, "max_position_embeddings": 8192, "num_attention_heads": 8},
        **{"num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True, "hidden_size": 2304},
        **{"num_hidden_layers": 26, "intermediate_size": 9216, "final_logit_softcapping": 30.0},
    },
    "gemma3_text": {
        **OFTEN,
        **{"vocab_size": 262208, "max_position_embeddings": 131072, "num_attention_heads": 8},
        **{"num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True, "hidden_size": 2304},
        **{"num_hidden_layers": 26, "intermediate_size": 9216, "final_logit_softcapping": None},
    },
    "gpt_neox": {
        **OFTEN,
        **{"attention_bias": True, "mlp_bias": True, "vocab_size": 50432, "max_position_embeddings": 2048},
        "use_parallel_residual": True,
    },
}
"""Defaults of transformers' configuration classes for keys that a config.json may omit."""
VISION = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_channels": 3}
VISION |= {"image_size": 224, "patch_size": 16}
"""Defaults of the vision tower (SigLIP)."""


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear layer: its module name, its sizes, whether it has a bias, and how many the model has."""

    name: str
    inputs: int
    outputs: int
    bias: bool
    count: int

    @property
    def weights(self) -> int:
        """Return the weights of all layers of this name."""
        return self.count * self.inputs * self.outputs

    @property
    def parameters(self) -> int:
        """Return the weights and biases of all layers of this name."""
        return self.weights + (self.count * self.outputs if self.bias else 0)


@dataclass(frozen=True, slots=True)
class Norm:
    """A norm: its module name, its width, whether it has a bias, and how many the model has."""

    name: str
    width: int
    bias: bool
    count: int

    @property
    def parameters(self) -> int:
        """Return the parameters of all norms of this name."""
        return self.count * self.width * (2 if self.bias else 1)


@dataclass(frozen=True, slots=True)
class Vision:
    """The vision tower; text-only inputs do not run through it.

    Attributes:
        hidden_size: width of a hidden state.
        intermediate_size: width inside the feed-forward block.
        num_layers: encoder layers.
        patch_size: elements of a patch: channels times its area.
        num_patches: per image.
    """

    hidden: int
    intermediate: int
    layers: int
    patch: int
    patches: int


@dataclass(frozen=True, slots=True)
class Architecture:
    """The layers and sizes of a decoder.

    Attributes:
        family: ``model_type`` of the config.
        hidden_size: width of a hidden state.
        num_layers: decoder layers.
        num_heads: query heads per layer.
        num_kv_heads: key heads, and as many value heads.
        head_dim: width of a head.
        intermediate_size: width inside the feed-forward block.
        vocab_size: rows of the embeddings.
        max_positions: context length.
        tied_embeddings: whether the output head is the input embeddings.
        attention_bias: whether queries, keys and values have a bias.
        output_bias: whether the output projection of attention has one.
        mlp_bias: whether the feed-forward layers have one.
        gated: act(gate x) * (up x) in place of act(up x).
        fused_qkv: queries, keys and values in one layer.
        layer_norm: norms have a mean and a bias (LayerNorm), else neither (RMSNorm).
        post_norms: norms after attention and feed-forward block too.
        query_key_norm: queries and keys have a norm.
        parallel_residual: attention and feed-forward block read the same state.
        softcap: whether logits are capped by a tanh.
        eager: whether attention needs the eager implementation (softcapped attention scores).
        sliding_window: tokens in the window of a sliding layer; 0: there is none.
        sliding_layers: layers of that kind.
        vision: the vision tower, if any.
    """

    family: str
    hidden: int
    layers: int
    heads: int
    key_value_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    context: int
    tied: bool
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    gated: bool = True
    fused: bool = False
    layer_norm: bool = False
    sandwich: bool = False
    query_key_norm: bool = False
    parallel: bool = False
    softcap: bool = False
    eager: bool = False
    sliding_window: int = 0
    sliding_layers: int = 0
    vision: Vision | None = None

    @classmethod
    def of(cls, config: Values) -> "Architecture":
        """Return the architecture that a config.json describes.

        Raises:
            UserError: an unknown ``model_type``, or a config without its sizes.
        """
        family = config.get("model_type")
        # A multimodal config nests the decoder's under text_config.
        if family == "gemma3":
            return _with_vision(config)
        if family not in DEFAULTS:
            raise UserError(_unknown(str(family)))
        try:
            return _decoder(str(family), {**DEFAULTS[str(family)], **config})
        except KeyError as error:
            found = f"a config.json of type '{family}' without {error}"
            raise UserError(Problem("model.base", found, "a complete config.json")) from error

    @property
    def queries(self) -> int:
        """Return the width of all query heads."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Return the width of all key heads, which is that of the value heads."""
        return self.key_value_heads * self.head_dim

    @property
    def parameters(self) -> int:
        """Return the number of parameters; tied embeddings count once."""
        # Input embeddings, and the output head where it is a matrix of its own.
        tables = self.vocabulary * self.hidden * (1 if self.tied else 2)
        linear = sum(layer.parameters for layer in self.linear_layers())
        norms = sum(norm.parameters for norm in self.norms())
        return tables + linear + norms + _loose(self.vision, self.hidden)

    def linear_layers(self) -> tuple[Linear, ...]:
        """Return the decoder's linear layers except the head, in order, then the vision tower's."""
        attention, mlp, n = self.attention_bias, self.mlp_bias, self.layers
        if self.fused:
            found = [
                Linear("query_key_value", self.hidden, self.queries + 2 * self.keys, attention, n),
                Linear("dense", self.queries, self.hidden, self.output_bias, n),
                Linear("dense_h_to_4h", self.hidden, self.intermediate, mlp, n),
                Linear("dense_4h_to_h", self.intermediate, self.hidden, mlp, n),
            ]
        else:
            found = [
                Linear("q_proj", self.hidden, self.queries, attention, n),
                Linear("k_proj", self.hidden, self.keys, attention, n),
                Linear("v_proj", self.hidden, self.keys, attention, n),
                Linear("o_proj", self.queries, self.hidden, self.output_bias, n),
                Linear("gate_proj", self.hidden, self.intermediate, mlp, n),
                Linear("up_proj", self.hidden, self.intermediate, mlp, n),
                Linear("down_proj", self.intermediate, self.hidden, mlp, n),
            ]
        return (*found, *(_vision_layers(self.vision) if self.vision else ()))

    def norms(self) -> tuple[Norm, ...]:
        """Return the norms of the decoder, then those of the vision tower."""
        n, bias = self.layers, self.layer_norm
        names = ["input_layernorm", "post_attention_layernorm"]
        if self.sandwich:
            names += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        found = [Norm(name, self.hidden, bias, n) for name in names]
        if self.query_key_norm:
            found += [Norm(name, self.head_dim, bias, n) for name in ("q_norm", "k_norm")]
        found.append(Norm("final_layer_norm" if self.fused else "norm", self.hidden, bias, 1))
        return (*found, *(_vision_norms(self.vision) if self.vision else ()))


def _decoder(family: str, config: Values) -> Architecture:
    heads = int(config["num_attention_heads"])
    gemma, neox = family.startswith("gemma"), family == "gpt_neox"
    bias = bool(config["attention_bias"])
    window, sliding = _sliding(family, config)
    return Architecture(
        family=family,
        hidden=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        key_value_heads=heads if neox else config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        intermediate=config["intermediate_size"],
        vocabulary=config["vocab_size"],
        context=config["max_position_embeddings"],
        tied=bool(config["tie_word_embeddings"]),
        # Qwen2 has biases on queries, keys and values, without a config key for it.
        attention_bias=family == "qwen2" or bias,
        output_bias=family != "qwen2" and bias,
        mlp_bias=bool(config["mlp_bias"]),
        gated=not neox,
        fused=neox,
        layer_norm=neox,
        sandwich=gemma,
        query_key_norm=family in ("qwen3", "gemma3_text"),
        parallel=neox and bool(config["use_parallel_residual"]),
        softcap=gemma and config["final_logit_softcapping"] is not None,
        # Gemma 2 caps the attention scores, which fused kernels do not support.
        eager=family == "gemma2",
        sliding_window=window,
        sliding_layers=sliding,
    )


def _sliding(family: str, config: Values) -> tuple[int, int]:
    """Return the window of the sliding layers, and their number."""
    layers = int(config["num_hidden_layers"])
    if family == "mistral":
        # null disables the window; a missing key means the class's default.
        window = config.get("sliding_window", 4096)
        return (window, layers) if window else (0, 0)
    if family in ("qwen2", "qwen3"):
        # The first max_window_layers attend to everything.
        used = config.get("use_sliding_window", False) and config.get("sliding_window")
        return (config["sliding_window"], layers - config.get("max_window_layers", 28)) if used else (0, 0)
    if family.startswith("gemma"):
        # Gemma 2 alternates; in Gemma 3 one layer of six attends to everything.
        every = 2 if family == "gemma2" else int(config.get("sliding_window_pattern") or 6)
        return config.get("sliding_window") or 4096, layers - layers // every
    return 0, 0


def _with_vision(config: Values) -> Architecture:
    text = {**DEFAULTS["gemma3_text"], **config.get("text_config", {})}
    tower = {**VISION, **config.get("vision_config", {})}
    vision = Vision(
        hidden=tower["hidden_size"],
        intermediate=tower["intermediate_size"],
        layers=tower["num_hidden_layers"],
        patch=tower["num_channels"] * tower["patch_size"] ** 2,
        patches=(tower["image_size"] // tower["patch_size"]) ** 2,
    )
    return replace(_decoder("gemma3_text", text), vision=vision)


def _vision_layers(vision: Vision) -> tuple[Linear, ...]:
    wide, n = vision.intermediate, vision.layers
    attention = (Linear(f"{part}_proj", vision.hidden, vision.hidden, True, n) for part in "kvq")
    return (
        *attention,
        Linear("out_proj", vision.hidden, vision.hidden, True, n),
        Linear("fc1", vision.hidden, wide, True, n),
        Linear("fc2", wide, vision.hidden, True, n),
    )


def _vision_norms(vision: Vision) -> tuple[Norm, ...]:
    layers = (Norm(name, vision.hidden, True, vision.layers) for name in ("layer_norm1", "layer_norm2"))
    last = Norm("post_layernorm", vision.hidden, True, 1)
    return (*layers, last, Norm("mm_soft_emb_norm", vision.hidden, False, 1))


def _loose(vision: Vision | None, hidden: int) -> int:
    """Return the vision tower's other parameters: patch embedding, positions, projection."""
    if vision is None:
        return 0
    patches = vision.patch * vision.hidden + vision.hidden
    return patches + vision.patches * vision.hidden + vision.hidden * hidden


def _unknown(family: str) -> Problem:
    known = ", ".join([*DEFAULTS, "gemma3"])
    repair = nearest(family, DEFAULTS) or (
        "training may work anyway: train.max_steps=3 trains three steps; run.json then has the peak memory"
    )
    return Problem(
        "model.base", f"a model of type '{family}', which the planner does not know", known, repair
    )
