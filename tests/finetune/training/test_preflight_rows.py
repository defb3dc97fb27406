"""Pre-flight checks of tokenized rows: each detects its fault."""

from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import token_rows
from tokenizers import processors
from transformers import AutoTokenizer

from finetune.data.dataset import TokenizedRows
from finetune.data.report import DataReport
from finetune.data.tokens import Encoder
from finetune.recipe.errors import UserError
from finetune.training.preflight import data_checks
from finetune.training.preflight.checks import CheckResult, failed, first_few, raise_if_failed
from finetune.training.preflight.data_checks import check_rows

BOS, EOS = 1, 2


def name_of(token: int) -> str:
    return {BOS: "<s>", EOS: "</s>"}.get(token, f"t{token}")


def make(*conversations: tuple[list[int], list[int]]) -> TokenizedRows:
    """Return rows from pairs of token ids and loss masks."""
    lengths = [len(ids) for ids, _ in conversations]
    arrays = {
        "input_ids": np.array([token for ids, _ in conversations for token in ids], dtype=np.int32),
        "loss_mask": np.array([flag for _, flags in conversations for flag in flags], dtype=bool),
        "offsets": np.array([0, *np.cumsum(lengths)], dtype=np.int64),
    }
    return TokenizedRows(arrays, [f"rows.jsonl:{index + 1}" for index in range(len(lengths))])


GOOD = ([BOS, 5, 6, 7, EOS], [0, 0, 0, 1, 1])
UNTRAINED_EOS = ([BOS, 5, 6, 7, EOS], [0, 0, 0, 1, 0])
NO_EOS = ([BOS, 5, 6, 7, 8], [0, 0, 0, 1, 1])
ALL_TRAINED = ([BOS, 5, EOS, 7, EOS, 9], [0, 1, 1, 1, 1, 1])
ONLY_FIRST_TURN = ([BOS, 7, EOS, 5, 6, 8, 9], [0, 1, 1, 0, 1, 1, 1])
BLANK_AFTER_EOS = ([BOS, 5, 7, EOS, 9], [0, 0, 1, 1, 0])
TWO_BOS = ([BOS, BOS, 6, 7, EOS], [0, 0, 0, 1, 1])
NO_BOS = ([5, 6, 7, EOS], [0, 0, 1, 1])


def check_eos(*conversations: tuple[list[int], list[int]], max_length: int = 100) -> CheckResult:
    return data_checks.check_eos_trained(make(*conversations), [EOS], max_length=max_length, name_of=name_of)


def test_pain_01_rows_that_end_with_a_trained_stop_token_pass() -> None:
    result = check_eos(GOOD, BLANK_AFTER_EOS, ALL_TRAINED)
    assert result.problem is None and result.detail == "100% of the untruncated rows end with a trained </s>"


@pytest.mark.parametrize(
    ("row", "cause"),
    [
        (UNTRAINED_EOS, "it is in the row, but carries no loss"),
        (NO_EOS, "the last trained token is 't8'"),
        (ONLY_FIRST_TURN, "the last trained token is 't9'"),
    ],
)
def test_pain_01_a_row_without_a_trained_eos_is_reported_with_its_cause(row, cause: str) -> None:
    result = check_eos(GOOD, row)
    assert result.problem is not None and result.problem.where == "data.template"
    assert f"50% of the rows do not end with a trained </s> (first: rows.jsonl:2: {cause})" in result.detail
    assert "reply_segments(message)" in result.problem.repair


@pytest.mark.parametrize(("bad", "passes"), [(1, True), (2, False)])
def test_pain_01_one_odd_row_in_a_hundred_is_allowed(bad: int, passes: bool) -> None:
    result = check_eos(*[GOOD] * (100 - bad), *[NO_EOS] * bad)
    assert (result.problem is None) is passes


def test_pain_01_truncated_rows_do_not_count_but_are_reported_if_alone() -> None:
    assert check_eos(GOOD, NO_EOS, max_length=5).problem is None
    result = check_eos(NO_EOS, max_length=5)
    assert result.problem is None and result.warned and result.detail.startswith("every row is truncated")


def test_pain_02_a_row_without_a_label_after_its_first_token_is_reported() -> None:
    result = data_checks.check_loss_mask(make(GOOD, ([BOS, 5, EOS], [1, 0, 0])))
    assert result.problem is not None
    assert result.detail == "1 of 2 rows have no trained token (first: rows.jsonl:2)"


def test_pain_02_the_trained_share_is_reported_and_a_small_one_warns() -> None:
    result = data_checks.check_loss_mask(make(GOOD, NO_EOS))
    assert result.detail == "40% of the tokens are trained, at least 2 per row" and not result.warned
    few = data_checks.check_loss_mask(make(([*range(3, 52)], [*[0] * 47, 1, 1])))
    assert few.problem is None and few.warned and few.detail.startswith("4% of the tokens")


def test_pain_16_a_doubled_bos_is_named() -> None:
    result = data_checks.check_single_bos(make(GOOD, TWO_BOS), BOS, required=False, name_of=name_of)
    assert result.problem is not None
    assert result.detail == "1 rows begin with <s> twice (first: rows.jsonl:2)"


def test_pain_16_a_missing_bos_is_named_where_the_tokenizer_adds_one() -> None:
    result = data_checks.check_single_bos(make(GOOD, NO_BOS), BOS, required=True, name_of=name_of)
    assert result.problem is not None
    assert result.detail == "1 rows begin without <s> (first: rows.jsonl:2)"
    assert (
        data_checks.check_single_bos(make(GOOD, NO_BOS), BOS, required=False, name_of=name_of).problem is None
    )
    assert (
        data_checks.check_single_bos(make(GOOD), None, required=False, name_of=name_of).detail
        == "the tokenizer has none"
    )


@pytest.mark.parametrize(
    ("too_long", "lost", "warned", "message"),
    [
        (0, 0, False, "no row is longer than 64 tokens"),
        (1, 3, False, "1 rows were longer than 64 tokens; 3% of the trained tokens (3) are lost"),
        (1, 97, True, "50% of the trained tokens (97) are lost"),
        (9, 0, True, "9 rows were longer than 64 tokens; 0% of the trained tokens (0) are lost"),
    ],
)
def test_pain_17_tokens_lost_to_truncation_are_reported(
    too_long: int, lost: int, warned: bool, message: str
) -> None:
    result = data_checks.report_truncation(
        num_rows=50, num_too_long=too_long, trained_tokens=97, lost_tokens=lost, max_length=64
    )
    assert message in result.detail and result.warned is warned and result.problem is None


ADDED = {"<s>": BOS, "</s>": EOS, "<new>": 12}


def check_vocab(used: set[int], embedding: torch.Tensor, *, trained: bool = False) -> CheckResult:
    return data_checks.check_vocab_size(used, embedding, trained=trained, added=ADDED, num_tokens=13)


def test_pain_11_a_token_without_an_embedding_is_named() -> None:
    result = check_vocab({BOS, EOS, 12}, torch.ones(12, 4))
    assert result.problem is not None and result.problem.where == "model.base"
    assert result.detail == "12 embeddings for 13 tokens of the tokenizer; the data uses <new>"
    assert "resize_token_embeddings(13)" in result.problem.repair


def test_pain_11_an_unused_token_without_an_embedding_is_reported() -> None:
    result = check_vocab({BOS, EOS}, torch.ones(12, 4))
    assert result.problem is None and "1 unused tokens have none" in result.detail


def test_pain_11_an_untrained_token_warns() -> None:
    embedding = torch.ones(13, 4)
    embedding[12] = 0
    result = check_vocab({BOS, 12}, embedding)
    assert result.warned and "the base's embeddings of <new> are zero" in result.detail
    assert not check_vocab({BOS, 12}, embedding, trained=True).warned
    assert not check_vocab({BOS}, embedding).warned


def test_the_tokens_that_are_used() -> None:
    data = token_rows([4, 3])
    assert data_checks.used_tokens(data.arrays["input_ids"], [96]) == {*data.arrays["input_ids"].tolist(), 96}


def test_all_failures_are_raised_together() -> None:
    problem = check_eos(NO_EOS).problem
    with pytest.raises(UserError) as error:
        raise_if_failed([failed("a", problem), CheckResult("b", "fine"), failed("c", problem)])
    assert len(error.value.problems) == 2
    raise_if_failed([CheckResult("b", "fine", warned=True)])


def test_a_line_and_a_record_of_a_check() -> None:
    result = CheckResult("BOS", "one", warned=True)
    assert result.line() == "!!  BOS           one"
    assert result.record() == {"name": "BOS", "passed": True, "warned": True, "detail": "one"}
    assert failed("BOS", check_eos(NO_EOS).problem).line() == "NO  BOS           the run stops: see below"
    assert first_few(["a", "b"]) == "a, b" and first_few(["a", "b"], 1) == "a and 1 more"


def test_document_blocks_need_no_bos_and_eos(base_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    bos = ("<s>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[bos]
    )
    encoder, data = Encoder(tokenizer, "plain"), token_rows([40, 30])

    def failures(blocks: bool) -> dict[str, bool]:
        report = DataReport(rows=2, trained_tokens=data.num_trained)
        results = check_rows(data, report, encoder, max_length=40, blocks=blocks)
        return {result.name: result.problem is not None for result in results}

    assert failures(False) == {"stop token": True, "loss mask": False, "BOS": True, "truncation": False}
    assert failures(True) == {"loss mask": False, "BOS": False, "truncation": False}
