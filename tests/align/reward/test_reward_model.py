"""The score head: seeded initialization, float32, read at the last token; weights of another adapter."""

from math import sqrt
from pathlib import Path

import numpy as np
import pytest
import torch
from adapter_properties import build_adapter
from adapter_properties import train as train_writer
from group_models import SOME, random_groups
from reward_models import HEADS, adapted, scorer, transformers_scores
from test_continue_training import saved_run
from transformers import LlamaConfig, MambaConfig, PreTrainedTokenizerFast

from align.preference.groups import GroupCollator
from align.preference.rows.dataset import TokenizedGroup
from align.reward.batch import RewardCollator
from align.reward.model import (
    ScoreHead,
    check_scoring_architecture,
    completion_scores,
    find_score_head,
    init_score_head,
    non_stop_pad_id,
)
from align.reward.preflight import check_score_isolation
from finetune.recipe.errors import UserError
from finetune.recipe.settings import ModelSettings
from finetune.training.resume_adapter import load_adapter_weights

pytestmark = pytest.mark.filterwarnings("ignore")


def test_head_initialization_depends_on_the_seed() -> None:
    base, other = scorer("llama"), scorer("llama")
    assert torch.equal(base.score.weight, other.score.weight)
    init_score_head(other, seed=2)
    assert not torch.equal(base.score.weight, other.score.weight)
    wide = ScoreHead(4095, 8, bias=False)
    model = torch.nn.Module()
    model.add_module("score", wide)
    init_score_head(model, seed=0)
    assert float(wide.weight.detach().std()) == pytest.approx(1 / sqrt(4096), rel=0.02)


def test_the_head_names_its_scores_and_stays_in_float32() -> None:
    base = scorer("llama", "nf4")
    assert base.config.id2label == {0: "help", 1: "safety"} and base.config.num_labels == 2
    assert base.config.problem_type == "regression" and base.config.pad_token_id == 0
    assert isinstance(base.score, ScoreHead) and base.score.weight.dtype == torch.float32
    states = torch.randn(2, 3, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        exact = base.score(states)
    assert exact.dtype == torch.float32
    assert torch.equal(exact, states @ base.score.weight.T)


def test_the_active_head_is_the_trained_one() -> None:
    model = adapted("lora", "llama")
    trainable = [
        name for name, weight in model.named_parameters() if weight.requires_grad and "score" in name
    ]
    assert trainable == ["base_model.model.score.modules_to_save.default.weight"]
    assert find_score_head(model).weight is dict(model.named_parameters())[trainable[0]]


def test_eos_as_pad_token_does_not_shift_the_score_position() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(_tokenizer()))
    tokenizer.add_special_tokens({"eos_token": "</s>", "pad_token": "</s>", "bos_token": "<s>"})
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    assert tokenizer.pad_token_id == eos and non_stop_pad_id(tokenizer, [eos]) == bos
    assert non_stop_pad_id(tokenizer, [eos, bos]) not in (eos, bos)


def _tokenizer() -> Path:
    return Path(__file__).parents[3] / "recipes" / "tiny" / "model" / "tokenizer.json"


def test_an_architecture_without_sequence_classification_is_rejected(tmp_path: Path) -> None:
    MambaConfig(num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="'mamba', which has no sequence classification model"):
        check_scoring_architecture(ModelSettings(base=str(tmp_path)))
    LlamaConfig(num_hidden_layers=1).save_pretrained(tmp_path)
    check_scoring_architecture(ModelSettings(base=str(tmp_path)))


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "prompt", "prefix", "ptuning", "adaptive_prefix"])
def test_a_reward_model_is_initialized_from_an_sft_adapter(method: str, tmp_path: Path) -> None:
    writer = build_adapter(method, "llama")
    train_writer(writer)
    run = saved_run(writer, tmp_path)
    model, groups = adapted(method, "llama"), random_groups(SOME)
    head = find_score_head(model).weight.detach().clone()
    load_adapter_weights(model, run, new_modules=("score",))
    assert torch.equal(find_score_head(model).weight, head), "the head is this model's own"
    assert _states(model, groups) == pytest.approx(_states(writer, groups), abs=2e-5)
    assert [weight for weight in model.parameters() if weight.requires_grad]


def _states(model: torch.nn.Module, groups: list) -> list[float]:
    """Return the last state of the first text, which decides the scores and the next token alike."""
    row = torch.cat([groups[0].prompt, groups[0].completions[0]])
    model.eval()
    with torch.no_grad():
        return model(input_ids=row[None], output_hidden_states=True).hidden_states[-1][0, -1].tolist()


def test_full_tuning_scores_as_its_saved_model(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    base, groups = scorer("llama"), random_groups(SOME)
    base.requires_grad_(True)
    base.eval()
    expected = transformers_scores(base, groups)
    assert torch.allclose(completion_scores(base, GroupCollator(0)(groups)), expected, atol=1e-5)
    base.save_pretrained(tmp_path)
    opened = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert opened.config.id2label == dict(enumerate(HEADS))
    assert torch.allclose(transformers_scores(opened, groups), expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_score_that_depends_on_other_completions_stops_the_run(dtype: torch.dtype) -> None:
    model = scorer("llama").to(dtype)
    groups = [
        TokenizedGroup(
            prompt_ids=group.prompt.numpy(),
            completion_ids=tuple(ids.numpy() for ids in group.completions),
            ranks=np.arange(len(group.completions)),
            scores=np.zeros(len(group.completions)),
            margin=0.0,
            source=0,
            row=row,
            location="",
        )
        for row, group in enumerate(random_groups(SOME))
    ]
    assert list(check_score_isolation(model, groups, RewardCollator(0))) == []
    model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: output + 0.01 * torch.roll(output, 1, dims=1)
    )
    [result] = check_score_isolation(model, groups, RewardCollator(0))
    assert result.problem is not None and "other completions of the prompt change a score" in result.detail
