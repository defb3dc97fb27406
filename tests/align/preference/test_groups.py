"""Shared-prompt batches: block mask and target indices by hand, and properties of every batch."""

import doctest

import pytest
import torch
from group_models import SHAPES, SOME, Shape, random_groups, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from align.preference import groups as layout
from align.preference.attention import cost_of
from align.preference.groups import Cost, Group, GroupBatch, GroupCollator, even_lines, visible
from finetune.data.packing import pack


def test_the_docstrings_tell_the_truth() -> None:
    assert doctest.testmod(layout) == (0, 11)


def predicted(batch: GroupBatch) -> list[list[tuple[int, int]]]:
    """Return for each completion's tokens: the token id whose state predicts it, and its own id."""
    states = batch["input_ids"][batch["predicts"]][batch["sources"]]
    rows = [[(0, 0)] * length for length in batch["lengths"].tolist()]
    columns = (states, batch["targets"], batch["owners"], batch["offsets"])
    for state, target, owner, offset in zip(*(column.tolist() for column in columns), strict=True):
        rows[owner][offset] = (state, target)
    return rows


@given(shapes=SHAPES, budget=st.integers(0, 90), separate=st.booleans())
@settings(deadline=None, max_examples=60)
def test_every_token_is_predicted_by_the_one_before(shapes: list[Shape], budget: int, separate: bool) -> None:
    groups = random_groups(shapes)
    batch = GroupCollator(0, budget, separate)(groups)
    expected = []
    for group in groups:
        for completion in group.completions:
            before = torch.cat([group.prompt[-1:], completion[:-1]])
            expected.append(list(zip(before.tolist(), completion.tolist(), strict=True)))
    assert predicted(batch) == expected
    assert batch["sizes"].tolist() == [len(group.completions) for group in groups]
    ends = batch["input_ids"][batch["ends"][:, 0], batch["ends"][:, 1]]
    assert ends.tolist() == [int(one[-1]) for group in groups for one in group.completions]


@given(shapes=SHAPES, budget=st.integers(0, 90))
@settings(deadline=None, max_examples=60)
def test_a_token_sees_its_own_past_and_no_more(shapes: list[Shape], budget: int) -> None:
    groups = random_groups(shapes)
    batch = GroupCollator(0, budget)(groups)
    seen = visible(batch["groups"], batch["parts"])
    real = batch["groups"] > 0
    # A token attends to as many positions as its position id counts, all of its own group.
    assert torch.equal(seen.sum(-1)[real], batch["position_ids"][real] + 1)
    line, token, other = seen.nonzero(as_tuple=True)
    assert torch.equal(batch["groups"][line, token], batch["groups"][line, other])
    assert bool((token >= other).all())
    assert bool((seen[~real].sum(-1) == 1).all())
    assert int(real.sum()) == sum(map(len, groups))


def test_a_prompt_s_last_state_is_computed_once() -> None:
    (group,) = random_groups([(5, [3, 4, 2])])
    batch = GroupCollator(0)([group])
    # 3 + 4 + 2 tokens; the first tokens share one state, all others have their own: 9 - 2.
    assert int(batch["predicts"].sum()) == 7
    assert batch["sources"].tolist().count(0) == 3
    assert int(GroupCollator(0, separate=True)([group])["predicts"].sum()) == 9


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=30), budget=st.integers(0, 120))
@settings(deadline=None, max_examples=100)
def test_lines_keep_the_budget_and_are_no_more_than_packed(lengths: list[int], budget: int) -> None:
    lines = even_lines(lengths, budget)
    sums = [sum(lengths[index] for index in line) for line in lines]
    assert sorted(index for line in lines for index in line) == list(range(len(lengths)))
    assert max(sums) <= max(budget, *lengths)
    assert len(lines) <= len(pack(lengths, max(budget, *lengths)))
    assert lines == even_lines(lengths, budget)


def test_lines_are_alike() -> None:
    # Packed into 100 they would be 100 and 20.
    assert even_lines([40, 30, 30, 20], 100) == [[0, 3], [1, 2]]


def test_several_groups_share_a_line_within_the_budget() -> None:
    groups = random_groups(SOME)
    assert [len(group) for group in groups] == [12, 17, 5]
    assert GroupCollator(0, budget=34)(groups)["input_ids"].shape == (1, 34)
    assert GroupCollator(0, budget=20)(groups)["input_ids"].shape == (2, 17)
    assert GroupCollator(0)(groups)["groups"].max() == 2
    assert [group.reach for group in groups] == [9, 13, 5]


def test_a_batch_is_the_same_twice() -> None:
    first, second = (GroupCollator(0, budget=20)(random_groups(SOME)) for _ in range(2))
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)  # type: ignore[literal-required]


def test_nothing_may_be_empty() -> None:
    some, none = torch.tensor([1]), torch.tensor([], dtype=torch.long)
    for prompt, completions in ((none, (some,)), (some, ()), (some, (some, none))):
        with pytest.raises(AssertionError):
            Group(prompt, completions)


@pytest.mark.parametrize(
    ("prompt", "lengths", "apart"),
    [
        (400, [100, 100], False),  # a long prompt is worth sharing
        (20, [400] * 8, True),  # one row of 3,220 tokens costs more than eight of 420
        (20, [400], False),  # one completion: both layouts are equal
    ],
)
def test_a_pass_takes_the_cheaper_layout(prompt: int, lengths: list[int], apart: bool) -> None:
    group = Group(torch.ones(prompt).long(), tuple(torch.ones(length).long() for length in lengths))
    cost = Cost(token=25e6, pair=8192.0)  # 8 layers of width 512
    assert ("attention_mask" in GroupCollator(0, cost=cost)([group])) == apart
    assert "attention_mask" not in GroupCollator(0)([group])


def test_what_a_model_costs_is_counted_in_its_layers() -> None:
    model = tiny("llama")
    config = model.config
    layer = sum(
        weight.numel()
        for name, weight in model.named_parameters()
        if ".layers.0." in name and weight.dim() == 2
    )
    found = cost_of(model)
    assert found.token == layer * config.num_hidden_layers
    assert found.pair == 2 * config.num_hidden_layers * config.hidden_size
