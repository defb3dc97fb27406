"""Load a reward recipe's model: the base with adapter and score head."""

from transformers import PreTrainedTokenizerBase, set_seed

from align.reward.model import init_score_head, load_scorer
from align.reward.settings import Settings
from finetune.data.tokens import Encoder
from finetune.recipe.checks import adapter_traits
from finetune.training import auto_values
from finetune.training.context import RunContext
from finetune.training.loading import parent_adapter_run
from finetune.training.model import SCORE_HEAD, Policy, attach_adapter
from finetune.training.resume_adapter import load_adapter_weights


def load_reward_model_for_training(ctx: RunContext, encoder: Encoder) -> Policy:
    """Load the base with a score head and an adapter: new ones, or those of ``model.init_from``.

    With ``model.init_from`` the reward model is initialized from the SFT model (InstructGPT, arXiv
    2203.02155, section 3.5), or from an earlier reward model with its head. New weights depend on the seed.

    Raises:
        UserError: the base cannot be loaded or has no sequence classification model, or the adapter does not
            fit it.
    """
    settings = ctx.recipe.settings
    assert isinstance(settings, Settings)
    seed = settings.train.seed
    traits = adapter_traits(settings.adapter.method)
    ctx.init_distributed()
    precision = ctx.resolve_auto(
        "model.precision", auto_values.precision(settings.model.precision, ctx.hardware)
    )
    quantization = ctx.resolve_auto(
        "model.quantization", auto_values.quantization(settings.model.quantization, traits.quantization)
    )
    # Weights that are trained directly stay in float32; autocast computes in the chosen precision.
    dtype = "float32" if traits.full_finetuning else precision
    with ctx.timed("load"):
        set_seed(seed)
        ctx.shard_on_load(dtype)
        base = load_scorer(
            settings.model,
            settings.reward.heads,
            precision=dtype,
            quantization=quantization,
            hardware=ctx.hardware,
            pad_id=non_stop_pad_id(encoder.tokenizer, encoder.stop_ids),
            strategy=ctx.strategy,
        )
        init_score_head(base, seed=seed)
        model = attach_adapter(base, settings.adapter)
        if parent := parent_adapter_run(settings.model):
            load_adapter_weights(model, parent, new_modules=(SCORE_HEAD,))
    # Embeddings are frozen: without this, checkpointed blocks would get no input that requires a gradient.
    if settings.train.gradient_checkpointing:
        base.enable_input_require_grads()
    ctx.enable_sharded_inference(model, base)
    return Policy(model, precision, quantization)


def non_stop_pad_id(tokenizer: PreTrainedTokenizerBase, stop_ids: list[int]) -> int:
    """Return a padding token that never ends a text: not one of ``stop_ids``."""
    # transformers reads the score at the last token that is not padding. If the pad token is EOS, as in many
    # chat models, that would be one token too early.
    preferred = [tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id]
    fallbacks = [*sorted(tokenizer.get_added_vocab().values()), *range(len(tokenizer))]
    candidates = (int(token) for token in [*preferred, *fallbacks] if token is not None)
    return next(token for token in candidates if token not in stop_ids)
