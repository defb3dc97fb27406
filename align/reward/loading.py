"""Load a reward recipe's model: the base with adapter and score head."""

from transformers import PreTrainedTokenizerBase, set_seed

from align.reward.model import draw_head, load_scorer
from align.reward.settings import Settings
from finetune.data.tokens import Encoder
from finetune.planning import choices
from finetune.recipe.checks import adapter_traits
from finetune.training.go_on import take_weights
from finetune.training.job import Job
from finetune.training.loading import Policy, adapter_start
from finetune.training.model import SCORE, attach_adapter


def load_reward_policy(job: Job, encoder: Encoder) -> Policy:
    """Load the base with a score head and an adapter: new ones, or those of ``model.start``.

    With ``model.start`` the reward model is initialized from the SFT model (InstructGPT, arXiv 2203.02155,
    section 3.5), or from an earlier reward model with its head. New weights depend on the seed.

    Raises:
        UserError: the base cannot be loaded or has no sequence classification model, or the adapter does not
            fit it.
    """
    settings = job.recipe.settings
    assert isinstance(settings, Settings)
    seed = settings.train.seed
    traits = adapter_traits(settings.adapter.method)
    job.join()
    precision = job.choose("model.precision", choices.precision(settings.model.precision, job.hardware))
    quantization = job.choose(
        "model.quantization", choices.quantization(settings.model.quantization, traits.quantization)
    )
    # Weights that are trained directly stay in float32; autocast computes in the chosen precision.
    stored = "float32" if traits.whole_model else precision
    with job.timed("load"):
        set_seed(seed)
        job.load_in_parts(stored)
        base = load_scorer(
            settings.model,
            settings.reward.heads,
            precision=stored,
            quantization=quantization,
            hardware=job.hardware,
            pad_id=pad_id(encoder.tokenizer, encoder.stop_ids),
            strategy=job.strategy,
        )
        draw_head(base, seed=seed)
        model = attach_adapter(base, settings.adapter)
        if start := adapter_start(settings.model):
            take_weights(model, start, head=(SCORE,))
    # Embeddings are frozen: without this, checkpointed blocks would get no input that requires a gradient.
    if settings.train.gradient_checkpointing:
        base.enable_input_require_grads()
    job.let_compute(model, base)
    return Policy(model, precision, quantization)


def pad_id(tokenizer: PreTrainedTokenizerBase, stop_ids: list[int]) -> int:
    """Return a padding token that never ends a text: not one of ``stop_ids``."""
    # transformers reads the score at the last token that is not padding. If the pad token is EOS, as in many
    # chat models, that would be one token too early.
    usual = [tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id]
    others = [*sorted(tokenizer.get_added_vocab().values()), *range(len(tokenizer))]
    tokens = (int(token) for token in [*usual, *others] if token is not None)
    return next(token for token in tokens if token not in stop_ids)
