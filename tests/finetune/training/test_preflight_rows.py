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
from finetune.training.preflight import rows, vocabulary
from finetune.training.preflight.ticks import Tick, failed, refuse, some
from finetune.training.preflight.whole import row_ticks

BOS, EOS = 1, 2


def name_of(token: int) -> str:
    return {BOS: "<s>", EOS: "</s>"}.get(token, f"t{token}")


def make(*conversations: tuple[list[int], list[int]]) -> TokenizedRows:
    """Return rows from pairs of token ids and loss masks."""
    lengths = [len(ids) for ids, _ in conversations]
    arrays = {
        "input_ids": np.array([token for ids, _ in conversations for token in ids], dtype=np.int32),
        "trained": np.array([flag for _, flags in conversations for flag in flags], dtype=bool),
        "starts": np.array([0, *np.cumsum(lengths)], dtype=np.int64),
    }
    return TokenizedRows(arrays, [f"rows.jsonl:{index + 1}" for index in range(len(lengths))])


GOOD = ([BOS, 5, 6, 7, EOS], [0, 0, 0, 1, 1])
UNLEARNT_END = ([BOS, 5, 6, 7, EOS], [0, 0, 0, 1, 0])
NO_END = ([BOS, 5, 6, 7, 8], [0, 0, 0, 1, 1])
ALL_LEARNT = ([BOS, 5, EOS, 7, EOS, 9], [0, 1, 1, 1, 1, 1])
FIRST_TURN_ALONE = ([BOS, 7, EOS, 5, 6, 8, 9], [0, 1, 1, 0, 1, 1, 1])
BLANK_BEHIND = ([BOS, 5, 7, EOS, 9], [0, 0, 1, 1, 0])
TWO_BOS = ([BOS, BOS, 6, 7, EOS], [0, 0, 0, 1, 1])
NO_BOS = ([5, 6, 7, EOS], [0, 0, 1, 1])


def ends(*conversations: tuple[list[int], list[int]], max_length: int = 100) -> Tick:
    return rows.ends_learnt(make(*conversations), [EOS], max_length=max_length, name_of=name_of)


def test_pain_01_rows_that_end_with_a_learnt_stop_token_pass() -> None:
    tick = ends(GOOD, BLANK_BEHIND, ALL_LEARNT)
    assert tick.problem is None and tick.detail == "100% of the untruncated rows end with a trained </s>"


@pytest.mark.parametrize(
    ("wrong", "how"),
    [
        (UNLEARNT_END, "it is in the row, but carries no loss"),
        (NO_END, "the last trained token is 't8'"),
        (FIRST_TURN_ALONE, "the last trained token is 't9'"),
    ],
)
def test_pain_01_a_row_without_a_learnt_end_is_named_with_the_cause(wrong, how: str) -> None:
    tick = ends(GOOD, wrong)
    assert tick.problem is not None and tick.problem.where == "data.template"
    assert f"50% of the rows do not end with a trained </s> (first: rows.jsonl:2: {how})" in tick.detail
    assert "reply(message)" in tick.problem.repair


@pytest.mark.parametrize(("bad", "passes"), [(1, True), (2, False)])
def test_pain_01_one_odd_row_in_a_hundred_is_allowed(bad: int, passes: bool) -> None:
    tick = ends(*[GOOD] * (100 - bad), *[NO_END] * bad)
    assert (tick.problem is None) is passes


def test_pain_01_cut_rows_do_not_count_but_are_told_where_there_is_no_other() -> None:
    assert ends(GOOD, NO_END, max_length=5).problem is None
    tick = ends(NO_END, max_length=5)
    assert tick.problem is None and tick.warned and tick.detail.startswith("every row is truncated")


def test_pain_02_a_row_without_a_label_behind_its_first_token_is_named() -> None:
    tick = rows.masks_hold_loss(make(GOOD, ([BOS, 5, EOS], [1, 0, 0])))
    assert tick.problem is not None
    assert tick.detail == "1 of 2 rows have no trained token (first: rows.jsonl:2)"


def test_pain_02_the_trained_share_is_told_and_a_small_one_warned_of() -> None:
    tick = rows.masks_hold_loss(make(GOOD, NO_END))
    assert tick.detail == "40% of the tokens are trained, at least 2 per row" and not tick.warned
    few = rows.masks_hold_loss(make(([*range(3, 52)], [*[0] * 47, 1, 1])))
    assert few.problem is None and few.warned and few.detail.startswith("4% of the tokens")


def test_pain_16_a_doubled_bos_is_named() -> None:
    tick = rows.begins_once(make(GOOD, TWO_BOS), BOS, wanted=False, name_of=name_of)
    assert tick.problem is not None
    assert tick.detail == "1 rows begin with <s> twice (first: rows.jsonl:2)"


def test_pain_16_a_missing_bos_is_named_where_the_tokenizer_adds_one() -> None:
    tick = rows.begins_once(make(GOOD, NO_BOS), BOS, wanted=True, name_of=name_of)
    assert tick.problem is not None
    assert tick.detail == "1 rows begin without <s> (first: rows.jsonl:2)"
    assert rows.begins_once(make(GOOD, NO_BOS), BOS, wanted=False, name_of=name_of).problem is None
    assert (
        rows.begins_once(make(GOOD), None, wanted=False, name_of=name_of).detail == "the tokenizer has none"
    )


@pytest.mark.parametrize(
    ("too_long", "lost", "warned", "told"),
    [
        (0, 0, False, "no row is longer than 64 tokens"),
        (1, 3, False, "1 rows were longer than 64 tokens; 3% of the trained tokens (3) are lost"),
        (1, 97, True, "50% of the trained tokens (97) are lost"),
        (9, 0, True, "9 rows were longer than 64 tokens; 0% of the trained tokens (0) are lost"),
    ],
)
def test_pain_17_what_truncation_took_is_told(too_long: int, lost: int, warned: bool, told: str) -> None:
    tick = rows.cut_is_told(rows=50, too_long=too_long, trained=97, lost=lost, max_length=64)
    assert told in tick.detail and tick.warned is warned and tick.problem is None


ADDED = {"<s>": BOS, "</s>": EOS, "<new>": 12}


def covered(used: set[int], embedding: torch.Tensor, *, trained: bool = False) -> Tick:
    return vocabulary.embeddings_exist(used, embedding, trained=trained, added=ADDED, num_tokens=13)


def test_pain_11_a_token_without_an_embedding_is_named() -> None:
    tick = covered({BOS, EOS, 12}, torch.ones(12, 4))
    assert tick.problem is not None and tick.problem.where == "model.base"
    assert tick.detail == "12 embeddings for 13 tokens of the tokenizer; the data use <new>"
    assert "resize_token_embeddings(13)" in tick.problem.repair


def test_pain_11_a_token_without_an_embedding_that_nobody_uses_is_told() -> None:
    tick = covered({BOS, EOS}, torch.ones(12, 4))
    assert tick.problem is None and "1 unused tokens have none" in tick.detail


def test_pain_11_a_token_that_nobody_ever_trained_is_warned_of() -> None:
    embedding = torch.ones(13, 4)
    embedding[12] = 0
    tick = covered({BOS, 12}, embedding)
    assert tick.warned and "the base's embeddings of <new> are zero" in tick.detail
    assert not covered({BOS, 12}, embedding, trained=True).warned
    assert not covered({BOS}, embedding).warned


def test_the_tokens_that_are_used() -> None:
    data = token_rows([4, 3])
    assert vocabulary.used_tokens(data.arrays["input_ids"], [96]) == {*data.arrays["input_ids"].tolist(), 96}


def test_all_failures_are_told_at_once() -> None:
    wrong = ends(NO_END).problem
    with pytest.raises(UserError) as error:
        refuse([failed("a", wrong), Tick("b", "fine"), failed("c", wrong)])
    assert len(error.value.problems) == 2
    refuse([Tick("b", "fine", warned=True)])


def test_a_line_and_a_record_of_a_check() -> None:
    tick = Tick("BOS", "one", warned=True)
    assert tick.line() == "!!  BOS           one"
    assert tick.record() == {"name": "BOS", "passed": True, "warned": True, "detail": "one"}
    assert failed("BOS", ends(NO_END).problem).line() == "NO  BOS           the run stops: see below"
    assert some(["a", "b"]) == "a, b" and some(["a", "b"], 1) == "a and 1 more"


def test_blocks_of_documents_may_begin_and_end_amid_a_text(base_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    bos = ("<s>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[bos]
    )
    encoder, data = Encoder(tokenizer, "plain"), token_rows([40, 30])

    def wrong(blocks: bool) -> dict[str, bool]:
        report = DataReport(rows=2, trained_tokens=data.num_trained)
        ticks = row_ticks(data, report, encoder, max_length=40, blocks=blocks)
        return {tick.name: tick.problem is not None for tick in ticks}

    assert wrong(False) == {"stop token": True, "loss mask": False, "BOS": True, "truncation": False}
    assert wrong(True) == {"loss mask": False, "BOS": False, "truncation": False}
