"""The project uses the field's words: retired names and words are gone, searched terms exist."""

import ast
import re
from functools import cache

from test_house import SMALL, SOURCES, tree

RETIRED_NAMES = """
    everyones anyones from_main in_parts share_in_step tell_shares numbers_here World ALONE PATIENCE
    APART WEIGHTS_APART PARTED_WEIGHTS PARTED_GRADIENTS WHOLE_IN_EACH WholeCheckpoint refuse_other_parts
    train_again loading_words measuring_words engine_words Job job carry_out Tuning tune tuned
    Supervised KtoTuning PpoTuning PreferenceTuning RewardTuning OnlineTuning RejectionTuning behaviour
    Behaviour opinion_of Watched watched Panel going_on goes_on_as take_weights lay_over lay seal
    remove_after forget_after TrainedAlready listening Interrupt Counted rows_that_fit nearest
    contradictions Tick tick ticks refuse batch_is_its_parts whole_is_its_parts packed_is_alone
    ends_learnt masks_hold_loss begins_once cut_is_told embeddings_exist untouched parts_tick same_tick
    Place places places_of aside learnt any_unlearnt passed_over write_apart written_apart worded wish
    wishing MicroBatches StartingPolicy arithmetic picked_logps why_separate owners predicts reach
    InOurWords own_replies Room Cast load_cast Roles Collector Said lay_out policy_tables as_table
    Tables Episodes gained learnt_from cut_updates begins_at_one step_kl epoch_stop_kl shaped_scores
    missing_end clip_scores Running deviation of_replies of_distance from_sampler judged Judged
    judged_replies Learnt AnswerRule risky risky_below Contests leads talks score_talks DrawsOfAll drawn
    Drawing StopWhenSpoilt StopWhenChosenFalls moment learns holders played resident settled plan_of
    found said told talk drawn_seconds centring normalise tokenise colours maximises_rewards labelled
    recognise
""".split()
"""Identifiers of the project's first words; each has a standard term in their place."""

PENDING: set[str] = set()
"""Retired names that still exist, until the change that dissolves them."""

RETIRED_WORDS = (
    "learnt",
    "everyones",
    "goes on from",
    "go on from",
    "is told",
    "are told",
    "written apart",
    "in parts",
    "laid out",
    "behind its prompt",
    "of its own accord",
    "the start's",
    "beside\\b",
    "whose like",
    "judgement",
    "behaviour",
    "normalis",
    "tokenis",
    "recognis",
    "optimis",
    "colour",
    "centre",
    "labelled",
)
"""Words that messages and docstrings no longer use."""

SEARCHED = """
    all_gather_object broadcast_object barrier any_rank shard unshard init_distributed dist_info is_main
    world_size is_sharded gathered_params SHARDED_WEIGHTS ZERO_STAGES zero3_init strategy_arguments
    RunContext run_stage write_checksums resume_adapter lr_factors CheckResult check_eos_trained
    check_loss_mask check_single_bos check_vocab_size check_packing_isolation check_batch_invariance
    check_sharding check_gradient_flow preserve_state loss_mask location control_suffix apply_loss_scope
    MicroBatchSampler PackedCollator IGNORE_INDEX loss_positions completion_ids segment_ids group_ids
    block_mask gather_logps reference_logps ReferencePolicy logratios preference_metrics bradley_terry
    plackett_luce ActorCritic Rollout RolloutTensors TokenStats gae gae_lambda gamma token_rewards
    policy_loss value_loss clip_range AdaptiveKLController FixedKLController kl_coef approx_kl whiten
    RunningMeanStd with_entropy make_minibatches RewardScores FunctionReward sample_completions
    simulate_train_step static_memory Rule saved_for_backward requires_grad numel
""".split()
"""Names that a practitioner looks for: each is an identifier of the project."""


@cache
def identifiers() -> dict[str, str]:
    """Return each identifier and module of the sources with its first location."""
    places = {file.stem: str(file) for file in SOURCES}
    for file in SOURCES:
        for node in ast.walk(tree(file)):
            names = [getattr(node, field, None) for field in ("id", "attr", "arg", "name")]
            for name in names:
                if isinstance(name, str):
                    places.setdefault(name, f"{file}:{getattr(node, 'lineno', 0)}")
    return places


def test_retired_names_are_gone() -> None:
    known = identifiers()
    assert {name: known[name] for name in RETIRED_NAMES if name in known and name not in PENDING} == {}
    assert all(name in known for name in PENDING), "dissolved: no longer pending"


def test_retired_words_are_gone_from_messages_and_docstrings() -> None:
    pattern = re.compile("|".join(rf"\b{word}" for word in RETIRED_WORDS))
    wrong = [
        f"{file}:{node.lineno}: {match[0]}: {node.value[max(match.start() - 30, 0) : match.end() + 30]!r}"
        for file in SOURCES
        if "tiny" not in file.parts and file.stem != "renamed"  # texts that never change; old keys
        for node in ast.walk(tree(file))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        for match in pattern.finditer(node.value)
    ]
    assert wrong == []


def test_what_people_search_for_is_there() -> None:
    known = identifiers()
    assert [name for name in SEARCHED if name not in known] == []
    assert len(SEARCHED) >= 60


def test_names_of_tests_are_in_the_fields_words() -> None:
    retired = re.compile(r"_(learnt|told|behind|beside|judged|goes_on|unseen|everyones)(_|$)")
    files = [file for file in SMALL if file.stem.startswith("test_")]
    names = [
        node.name for file in files for node in ast.walk(tree(file)) if isinstance(node, ast.FunctionDef)
    ]
    assert [name for name in names if name.startswith("test_") and retired.search(name)] == []
    assert len(names) > 1000
