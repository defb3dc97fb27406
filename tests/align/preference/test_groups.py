"""Shared-prompt batches: block mask and target indices by hand, and properties of every batch."""

import doctest

import pytest
import torch
from group_models import SHAPES, SOME, Shape, random_groups, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from align.preference import groups as layout
from align.preference.attention import forward_cost
from align.preference.groups import ForwardCost, Group, GroupBatch, GroupCollator, block_mask, pack_evenly
from finetune.data.collate import pack


def test_doctests() -> None:
    assert doctest.testmod(layout) == (0, 11)


def predicted_tokens(batch: GroupBatch) -> list[list[tuple[int, int]]]:
    """Return for each completion's tokens: the token id whose state predicts it, and its own id."""
    states = batch["input_ids"][batch["predict_mask"]][batch["state_index"]]
    tokens_by_completion = [[(0, 0)] * length for length in batch["lengths"].tolist()]
    indices = (states, batch["targets"], batch["completion_index"], batch["token_offset"])
    for state, target, owner, offset in zip(*(index.tolist() for index in indices), strict=True):
        tokens_by_completion[owner][offset] = (state, target)
    return tokens_by_completion


@given(shapes=SHAPES, budget=st.integers(0, 90), separate=st.booleans())
@settings(deadline=None, max_examples=60)
def test_every_token_is_predicted_by_its_predecessor(
    shapes: list[Shape], budget: int, separate: bool
) -> None:
    groups = random_groups(shapes)
    batch = GroupCollator(0, budget, separate)(groups)
    expected = []
    for group in groups:
        for completion in group.completions:
            before = torch.cat([group.prompt[-1:], completion[:-1]])
            expected.append(list(zip(before.tolist(), completion.tolist(), strict=True)))
    assert predicted_tokens(batch) == expected
    assert batch["sizes"].tolist() == [len(group.completions) for group in groups]
    last_tokens = batch["input_ids"][batch["last_token_index"][:, 0], batch["last_token_index"][:, 1]]
    assert last_tokens.tolist() == [
        int(completion_ids[-1]) for group in groups for completion_ids in group.completions
    ]


@given(shapes=SHAPES, budget=st.integers(0, 90))
@settings(deadline=None, max_examples=60)
def test_tokens_attend_to_their_own_past_only(shapes: list[Shape], budget: int) -> None:
    groups = random_groups(shapes)
    batch = GroupCollator(0, budget)(groups)
    mask = block_mask(batch["group_ids"], batch["segment_ids"])
    not_padding = batch["group_ids"] > 0
    # A token attends to as many positions as its position id counts, all of its own group.
    assert torch.equal(mask.sum(-1)[not_padding], batch["position_ids"][not_padding] + 1)
    row, query, key = mask.nonzero(as_tuple=True)
    assert torch.equal(batch["group_ids"][row, query], batch["group_ids"][row, key])
    assert bool((query >= key).all())
    assert bool((mask[~not_padding].sum(-1) == 1).all())
    assert int(not_padding.sum()) == sum(map(len, groups))


def test_a_prompt_s_last_state_is_computed_once() -> None:
    (group,) = random_groups([(5, [3, 4, 2])])
    batch = GroupCollator(0)([group])
    # 3 + 4 + 2 tokens; the first tokens share one state, all others have their own: 9 - 2.
    assert int(batch["predict_mask"].sum()) == 7
    assert batch["state_index"].tolist().count(0) == 3
    assert int(GroupCollator(0, one_per_row=True)([group])["predict_mask"].sum()) == 9


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=30), budget=st.integers(0, 120))
@settings(deadline=None, max_examples=100)
def test_rows_keep_the_budget_and_are_as_few_as_packed(lengths: list[int], budget: int) -> None:
    rows = pack_evenly(lengths, budget)
    sums = [sum(lengths[index] for index in row) for row in rows]
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert max(sums) <= max(budget, *lengths)
    assert len(rows) <= len(pack(lengths, max(budget, *lengths)))
    assert rows == pack_evenly(lengths, budget)


def test_rows_are_balanced() -> None:
    # Packed into 100 they would be 100 and 20.
    assert pack_evenly([40, 30, 30, 20], 100) == [[0, 3], [1, 2]]


def test_several_groups_share_a_row_within_the_budget() -> None:
    groups = random_groups(SOME)
    assert [len(group) for group in groups] == [12, 17, 5]
    assert GroupCollator(0, budget=34)(groups)["input_ids"].shape == (1, 34)
    assert GroupCollator(0, budget=20)(groups)["input_ids"].shape == (2, 17)
    assert GroupCollator(0)(groups)["group_ids"].max() == 2
    assert [group.max_positions for group in groups] == [9, 13, 5]


def test_collation_is_deterministic() -> None:
    first, second = (GroupCollator(0, budget=20)(random_groups(SOME)) for _ in range(2))
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)  # type: ignore[literal-required]


def test_empty_prompts_and_completions_are_refused() -> None:
    some, none = torch.tensor([1]), torch.tensor([], dtype=torch.long)
    for prompt, completions in ((none, (some,)), (some, ()), (some, (some, none))):
        with pytest.raises(AssertionError):
            Group(prompt, completions)


@pytest.mark.parametrize(
    ("prompt", "lengths", "one_per_row"),
    [
        (400, [100, 100], False),  # a long prompt is worth sharing
        (20, [400] * 8, True),  # one row of 3,220 tokens costs more than eight of 420
        (20, [400], False),  # one completion: both layouts are equal
    ],
)
def test_collator_takes_the_cheaper_layout(prompt: int, lengths: list[int], one_per_row: bool) -> None:
    group = Group(torch.ones(prompt).long(), tuple(torch.ones(length).long() for length in lengths))
    cost = ForwardCost(per_token=25e6, per_pair=8192.0)  # 8 layers of width 512
    assert ("attention_mask" in GroupCollator(0, cost=cost)([group])) == one_per_row
    assert "attention_mask" not in GroupCollator(0)([group])


def test_forward_cost_counts_the_layers() -> None:
    model = tiny("llama")
    config = model.config
    layer = sum(
        weight.numel()
        for name, weight in model.named_parameters()
        if ".layers.0." in name and weight.dim() == 2
    )
    cost = forward_cost(model)
    assert cost.per_token == layer * config.num_hidden_layers
    assert cost.per_pair == 2 * config.num_hidden_layers * config.hidden_size
