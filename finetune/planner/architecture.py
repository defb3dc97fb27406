"""A decoder's layer shapes and parameter count from config.json alone, without weights or torch."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from finetune.planner.config_values import ConfigValues
from finetune.recipe.errors import Problem, UserError, did_you_mean

COMMON_DEFAULTS = {"attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False}
FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {**COMMON_DEFAULTS, "vocab_size": 32000, "max_position_embeddings": 2048},
    "olmo2": {**COMMON_DEFAULTS, "vocab_size": 50304, "max_position_embeddings": 2048},
    "mistral": {
        **COMMON_DEFAULTS,
        **{"vocab_size": 32000, "max_position_embeddings": 131072, "num_key_value_heads": 8},
        "sliding_window": 4096,
    },
    "qwen2": {
        **COMMON_DEFAULTS,
        **{"vocab_size": 151936, "max_position_embeddings": 32768, "num_key_value_heads": 32},
        **{"sliding_window": 4096, "max_window_layers": 28},
    },
    "qwen3": {
        **COMMON_DEFAULTS,
        **{"vocab_size": 151936, "max_position_embeddings": 32768, "num_key_value_heads": 32},
        **{"head_dim": 128, "sliding_window": 4096, "max_window_layers": 28},
    },
    "gemma2": {
        **COMMON_DEFAULTS,
        **{"vocab_size": 256000, "max_position_embeddings": 8192, "num_attention_heads": 8},
        **{"num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True, "hidden_size": 2304},
        **{"num_hidden_layers": 26, "intermediate_size": 9216, "final_logit_softcapping": 30.0},
        "sliding_window": 4096,
    },
    "gemma3_text": {
        **COMMON_DEFAULTS,
        **{"vocab_size": 262208, "max_position_embeddings": 131072, "num_attention_heads": 8},
        **{"num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True, "hidden_size": 2304},
        **{"num_hidden_layers": 26, "intermediate_size": 9216, "final_logit_softcapping": None},
        "sliding_window": 4096,
    },
    "smollm3": {
        **COMMON_DEFAULTS,
        **{"vocab_size": 128256, "max_position_embeddings": 32768, "num_key_value_heads": 4},
        **{"tie_word_embeddings": True, "sliding_window": None, "max_window_layers": 28},
    },
    "exaone4": {
        **{**COMMON_DEFAULTS, "vocab_size": 102400, "max_position_embeddings": 2048},
        **{"num_key_value_heads": 32, "sliding_window": 4096},
    },
    "gpt_neox": {
        **COMMON_DEFAULTS,
        **{"attention_bias": True, "mlp_bias": True, "vocab_size": 50432, "max_position_embeddings": 2048},
        "use_parallel_residual": True,
    },
}
"""Defaults of transformers' configuration classes for keys that a config.json may omit."""
VISION_DEFAULTS = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
VISION_DEFAULTS |= {"num_channels": 3, "image_size": 224, "patch_size": 16}
"""Defaults of the vision tower (SigLIP)."""
SLIDING_ATTENTION = "sliding_attention"
"""The name of a layer with a sliding window, in ``layer_types`` of a config."""


@dataclass(frozen=True, slots=True)
class LinearShape:
    """A linear layer: its module name, its sizes, whether it has a bias, and how many the model has."""

    name: str
    in_features: int
    out_features: int
    bias: bool
    count: int

    @property
    def weights(self) -> int:
        """Return the weights of all layers of this name."""
        return self.count * self.in_features * self.out_features

    @property
    def parameters(self) -> int:
        """Return the weights and biases of all layers of this name."""
        return self.weights + (self.count * self.out_features if self.bias else 0)


@dataclass(frozen=True, slots=True)
class NormShape:
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
class VisionTower:
    """The vision tower; text-only inputs do not run through it.

    Attributes:
        hidden_size: width of a hidden state.
        intermediate_size: width inside the feed-forward block.
        num_layers: encoder layers.
        patch_size: elements of a patch: channels times its area.
        num_patches: per image.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    patch_size: int
    num_patches: int


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
        pre_norms: norms before attention and feed-forward block.
        post_norms: norms after them.
        query_key_norm: queries and keys have a norm.
        wide_query_key_norm: it is over all heads, else over each.
        float32_gains: norms multiply by their gains in float32.
        parallel_residual: attention and feed-forward block read the same state.
        softcap: whether logits are capped by a tanh.
        eager: whether attention needs the eager implementation (softcapped attention scores).
        sliding_window: tokens in the window of a sliding layer; 0: there is none.
        sliding_layers: layers of that kind.
        vision: the vision tower, if any.
    """

    family: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_positions: int
    tied_embeddings: bool
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    gated: bool = True
    fused_qkv: bool = False
    layer_norm: bool = False
    pre_norms: bool = True
    post_norms: bool = False
    query_key_norm: bool = False
    wide_query_key_norm: bool = False
    float32_gains: bool = False
    parallel_residual: bool = False
    softcap: bool = False
    eager: bool = False
    sliding_window: int = 0
    sliding_layers: int = 0
    vision: VisionTower | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Architecture":
        """Return the architecture that a config.json describes.

        Raises:
            UserError: an unknown ``model_type``, or sizes that are missing, invalid or contradictory.
        """
        family = str(config.get("model_type"))
        # A multimodal config nests the decoder's under text_config.
        if family == "gemma3":
            return _multimodal_architecture(config)
        if family not in FAMILY_DEFAULTS:
            raise UserError(_unknown_family(family))
        values = ConfigValues(config, FAMILY_DEFAULTS[family])
        architecture = _decoder_architecture(family, values)
        values.check()
        return architecture

    @property
    def query_width(self) -> int:
        """Return the width of all query heads."""
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Return the width of all key heads, which is that of the value heads."""
        return self.num_kv_heads * self.head_dim

    @property
    def parameters(self) -> int:
        """Return the number of parameters; tied embeddings count once."""
        # Input embeddings, and the output head where it is a matrix of its own.
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        linear = sum(layer.parameters for layer in self.linear_layers())
        norms = sum(norm.parameters for norm in self.norms())
        return embeddings + linear + norms + _other_vision_parameters(self.vision, self.hidden_size)

    def linear_layers(self) -> tuple[LinearShape, ...]:
        """Return the decoder's linear layers except the head, in order, then the vision tower's."""
        attention, mlp, num_layers = self.attention_bias, self.mlp_bias, self.num_layers
        if self.fused_qkv:
            layers = [
                LinearShape(
                    "query_key_value",
                    self.hidden_size,
                    self.query_width + 2 * self.kv_width,
                    attention,
                    num_layers,
                ),
                LinearShape("dense", self.query_width, self.hidden_size, self.output_bias, num_layers),
                LinearShape("dense_h_to_4h", self.hidden_size, self.intermediate_size, mlp, num_layers),
                LinearShape("dense_4h_to_h", self.intermediate_size, self.hidden_size, mlp, num_layers),
            ]
        else:
            layers = [
                LinearShape("q_proj", self.hidden_size, self.query_width, attention, num_layers),
                LinearShape("k_proj", self.hidden_size, self.kv_width, attention, num_layers),
                LinearShape("v_proj", self.hidden_size, self.kv_width, attention, num_layers),
                LinearShape("o_proj", self.query_width, self.hidden_size, self.output_bias, num_layers),
                LinearShape("gate_proj", self.hidden_size, self.intermediate_size, mlp, num_layers),
                LinearShape("up_proj", self.hidden_size, self.intermediate_size, mlp, num_layers),
                LinearShape("down_proj", self.intermediate_size, self.hidden_size, mlp, num_layers),
            ]
        return (*layers, *(_vision_linears(self.vision) if self.vision else ()))

    def module_names(self, layer: LinearShape) -> list[str]:
        """Return the module names of a kind of linear layer in transformers' class, one per layer."""
        if self.fused_qkv:
            group = "attention" if layer.name in ("query_key_value", "dense") else "mlp"
            prefix = "gpt_neox.layers"
        elif self.vision is not None and layer in _vision_linears(self.vision):
            group = "mlp" if layer.name in ("fc1", "fc2") else "self_attn"
            prefix = "model.vision_tower.encoder.layers"
        else:
            group = "mlp" if layer.name in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            prefix = "model.layers" if self.vision is None else "model.language_model.layers"
        return [f"{prefix}.{index}.{group}.{layer.name}" for index in range(layer.count)]

    def norms(self) -> tuple[NormShape, ...]:
        """Return the norms of the decoder, then those of the vision tower."""
        num_layers, bias = self.num_layers, self.layer_norm
        names = ["input_layernorm"] if self.pre_norms else []
        names += ["post_attention_layernorm"]
        names += ["pre_feedforward_layernorm"] if self.pre_norms and self.post_norms else []
        names += ["post_feedforward_layernorm"] if self.post_norms else []
        norms = [NormShape(name, self.hidden_size, bias, num_layers) for name in names]
        if self.query_key_norm:
            wide = self.wide_query_key_norm
            widths = (self.query_width, self.kv_width) if wide else (self.head_dim, self.head_dim)
            named = zip(("q_norm", "k_norm"), widths, strict=True)
            norms += [NormShape(name, width, bias, num_layers) for name, width in named]
        norms.append(NormShape("final_layer_norm" if self.fused_qkv else "norm", self.hidden_size, bias, 1))
        return (*norms, *(_vision_norms(self.vision) if self.vision else ()))


def _decoder_architecture(family: str, values: ConfigValues) -> Architecture:
    """Return the architecture of a decoder; the caller raises what ``values`` reports."""
    gemma, neox = family.startswith("gemma"), family == "gpt_neox"
    hidden_size, heads = values.size("hidden_size"), values.size("num_attention_heads")
    kv_heads = heads if neox else values.optional_size("num_key_value_heads") or heads
    head_dim = values.optional_size("head_dim")
    values.require(
        head_dim is not None or hidden_size % heads == 0, "hidden_size", f"a multiple of {heads} heads"
    )
    values.require(heads % kv_heads == 0, "num_key_value_heads", f"a divisor of {heads} heads")
    bias = values.flag("attention_bias")
    window, sliding = _sliding_window(family, values)
    return Architecture(
        family=family,
        hidden_size=hidden_size,
        num_layers=values.size("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim or hidden_size // heads,
        intermediate_size=values.size("intermediate_size"),
        vocab_size=values.size("vocab_size"),
        max_positions=values.size("max_position_embeddings"),
        tied_embeddings=values.flag("tie_word_embeddings"),
        # Qwen2 has biases on queries, keys and values, without a config key for it.
        attention_bias=family == "qwen2" or bias,
        output_bias=family != "qwen2" and bias,
        mlp_bias=values.flag("mlp_bias"),
        gated=not neox,
        fused_qkv=neox,
        layer_norm=neox,
        pre_norms=family not in ("olmo2", "exaone4"),
        post_norms=gemma or family in ("olmo2", "exaone4"),
        query_key_norm=family in ("qwen3", "gemma3_text", "olmo2", "exaone4"),
        wide_query_key_norm=family == "olmo2",
        float32_gains=gemma or family == "olmo2",
        parallel_residual=neox and values.flag("use_parallel_residual"),
        softcap=gemma and values.optional_number("final_logit_softcapping") is not None,
        # Gemma 2 caps the attention scores, which fused kernels do not support.
        eager=family == "gemma2",
        sliding_window=window,
        sliding_layers=sliding,
    )


def _sliding_window(family: str, values: ConfigValues) -> tuple[int, int]:
    """Return the window of the sliding layers, and their number."""
    layers = values.size("num_hidden_layers")
    # Read in any case, so that an invalid value is reported. Mistral's null disables the window.
    window = values.optional_size("sliding_window")
    layer_types = values.layer_types(layers)
    optional = family in ("qwen2", "qwen3", "smollm3")
    if optional and not values.flag("use_sliding_window"):
        return 0, 0
    if not window or family in ("llama", "gpt_neox", "olmo2"):
        return 0, 0
    if layer_types is not None:
        return window, layer_types.count(SLIDING_ATTENTION)
    if optional:
        # The first max_window_layers attend to everything.
        return window, max(0, layers - values.size("max_window_layers", minimum=0))
    if family.startswith("gemma"):
        # Gemma 2 alternates; in Gemma 3 one layer of six attends to everything.
        period = 2 if family == "gemma2" else values.optional_size("sliding_window_pattern") or 6
        return window, layers - layers // period
    # In EXAONE 4 one layer of four attends to everything.
    return window, layers - layers // 4 if family == "exaone4" else layers


def _multimodal_architecture(config: Mapping[str, Any]) -> Architecture:
    text = ConfigValues.nested(config, "text_config", FAMILY_DEFAULTS["gemma3_text"])
    tower = ConfigValues.nested(config, "vision_config", VISION_DEFAULTS)
    decoder = _decoder_architecture("gemma3_text", text)
    vision = VisionTower(
        hidden_size=tower.size("hidden_size"),
        intermediate_size=tower.size("intermediate_size"),
        num_layers=tower.size("num_hidden_layers"),
        patch_size=tower.size("num_channels") * tower.size("patch_size") ** 2,
        num_patches=(tower.size("image_size") // tower.size("patch_size")) ** 2,
    )
    text.problems += tower.problems
    text.check()
    return replace(decoder, vision=vision)


def _vision_linears(vision: VisionTower) -> tuple[LinearShape, ...]:
    mlp_width, num_layers = vision.intermediate_size, vision.num_layers
    attention = (
        LinearShape(f"{projection}_proj", vision.hidden_size, vision.hidden_size, True, num_layers)
        for projection in "kvq"
    )
    return (
        *attention,
        LinearShape("out_proj", vision.hidden_size, vision.hidden_size, True, num_layers),
        LinearShape("fc1", vision.hidden_size, mlp_width, True, num_layers),
        LinearShape("fc2", mlp_width, vision.hidden_size, True, num_layers),
    )


def _vision_norms(vision: VisionTower) -> tuple[NormShape, ...]:
    layers = (
        NormShape(name, vision.hidden_size, True, vision.num_layers)
        for name in ("layer_norm1", "layer_norm2")
    )
    last = NormShape("post_layernorm", vision.hidden_size, True, 1)
    return (*layers, last, NormShape("mm_soft_emb_norm", vision.hidden_size, False, 1))


def _other_vision_parameters(vision: VisionTower | None, hidden_size: int) -> int:
    """Return the vision tower's other parameters: patch embedding, positions, projection."""
    if vision is None:
        return 0
    patches = vision.patch_size * vision.hidden_size + vision.hidden_size
    return patches + vision.num_patches * vision.hidden_size + vision.hidden_size * hidden_size


def _unknown_family(family: str) -> Problem:
    known = ", ".join([*FAMILY_DEFAULTS, "gemma3"])
    repair = did_you_mean(family, FAMILY_DEFAULTS) or (
        "training may work anyway: train.max_steps=3 trains three steps; run.json then has the peak memory"
    )
    return Problem(
        "model.base", f"a model of type '{family}', which the planner does not know", known, repair
    )
