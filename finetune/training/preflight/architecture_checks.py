"""Checks of the loaded model before step 0: causal attention, and the share of adapted weights."""

from collections import defaultdict

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from finetune.adapters._targets import ALL_LINEAR
from finetune.distributed.sharding import full_numel
from finetune.library_internals import quant_state
from finetune.recipe.errors import Problem
from finetune.recipe.settings import AdapterSettings
from finetune.training.architectures import CAUSAL_LM_EXPECTED
from finetune.training.model import DTYPES, SCORE_HEAD, Policy, preserve_state, unwrap_model
from finetune.training.preflight.checks import CheckResult, failed, first_few
from finetune.training.preflight.gradient_checks import INDEX_PATTERN

CAUSALITY = "causality"
COVERAGE = "coverage"
PROBE_TOKENS, CHANGED_TOKENS = 16, 4
CAUSAL_TOLERANCE = 1e-4
"""Difference of hidden states, relative to their standard deviation: the arithmetic at earlier positions is
the same. An encoder with random weights has 1e-2 and more."""
INT8_TOLERANCE = 0.2
"""LLM.int8 (arXiv 2208.07339) selects its outlier columns from all tokens."""
MIN_COVERAGE = 0.95
"""Share of the layers' weights that ``all-linear`` reaches in a model of linear layers only."""


def check_causality(policy: Policy) -> CheckResult:
    """Check that a change of the last tokens leaves the states of the earlier ones unchanged.

    In an encoder such as BERT each position attends to the very tokens that it should predict: the loss
    falls, and the model generates nothing useful.
    """
    base = unwrap_model(policy.model)
    kind = f"'{base.config.model_type}' ({type(base).__name__})"
    # From the middle of the vocabulary: special tokens are at its ends, and some are hidden from attention.
    vocab_size = base.config.get_text_config().vocab_size
    ids_1T = (vocab_size // 2 + torch.arange(PROBE_TOKENS)[None]) % vocab_size
    changed_1T = ids_1T.clone()
    changed_1T[:, -CHANGED_TOKENS:] = (changed_1T[:, -CHANGED_TOKENS:] + PROBE_TOKENS) % vocab_size
    states = [_states_at_head(policy, ids) for ids in (ids_1T, changed_1T)]
    if any(state is None for state in states):
        actual = f"{kind} computes its logits without its output embeddings"
        return failed(CAUSALITY, Problem("model.base", actual, CAUSAL_LM_EXPECTED))
    before, after = (state[:, :-CHANGED_TOKENS] for state in states if state is not None)
    difference = float((before - after).abs().max() / before.std())
    detail = f"a change of the last tokens changes the states before them by {difference:.1e}"
    if difference <= (INT8_TOLERANCE if policy.quantization == "int8" else CAUSAL_TOLERANCE):
        return CheckResult(CAUSALITY, detail)
    return failed(CAUSALITY, Problem("model.base", f"{kind} sees later tokens: {detail}", CAUSAL_LM_EXPECTED))


@torch.no_grad()
def _states_at_head(policy: Policy, ids_BT: Tensor) -> Tensor | None:
    """Return the states (B, T, D) that the LM head or the score head gets; None if it is not called."""
    model, base = policy.model, unwrap_model(policy.model)
    head = base.get_output_embeddings() or base.get_submodule(SCORE_HEAD)
    captured: list[Tensor] = []

    def capture(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        captured.append(args[0].float())

    device = next(model.parameters()).device
    autocast = torch.autocast(
        device.type, dtype=DTYPES[policy.precision], enabled=policy.precision != "float32"
    )
    handle = head.register_forward_pre_hook(capture)
    try:
        with preserve_state(model), autocast:
            model(input_ids=ids_BT.to(device), use_cache=False)
    finally:
        handle.remove()
    return captured[0][:, -ids_BT.shape[1] :] if captured else None


def check_coverage(model: nn.Module, adapter: AdapterSettings) -> list[CheckResult]:
    """Report the matrices that an adapter of all linear layers does not reach, if there are any.

    They are no linear layers: the fused experts of a mixture, or attention with matrices of its own.
    """
    if adapter.model_dump().get("target") != ALL_LINEAR:
        return []
    base = unwrap_model(model)
    skipped = (nn.Embedding, BaseTunerLayer)
    reached = {id(p) for module in base.modules() if isinstance(module, skipped) for p in module.parameters()}
    reached |= {id(p) for p in (base.get_output_embeddings() or nn.Identity()).parameters()}
    sizes: dict[str, int] = defaultdict(int)
    adapted = 0
    # Of a model of images and text, only the text model is adapted.
    is_wrapper = base.config.get_text_config() is not base.config
    layers = base.get_decoder() if is_wrapper else base
    for module in layers.modules():
        if isinstance(module, BaseTunerLayer):
            adapted += sum(_numel(p) for p in module.get_base_layer().parameters(recurse=False))
    for name, parameter in layers.named_parameters():
        if parameter.ndim > 1 and id(parameter) not in reached and not parameter.requires_grad:
            sizes[INDEX_PATTERN.sub("*", name)] += _numel(parameter)
    share = adapted / max(adapted + sum(sizes.values()), 1)
    if share >= MIN_COVERAGE:
        return []
    total = adapted + sum(sizes.values())
    largest = sorted(sizes, key=lambda name: -sizes[name])
    names = first_few([f"{name} ({sizes[name] / total:.0%})" for name in largest])
    detail = f"the adapter reaches {share:.0%} of the layers' weights; not linear layers: {names}"
    return [CheckResult(COVERAGE, detail, warned=True)]


def _numel(parameter: nn.Parameter) -> int:
    state = quant_state(parameter)
    return full_numel(parameter) if state is None else int(state.shape.numel())
