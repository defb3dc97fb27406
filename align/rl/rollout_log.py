"""``rollouts.jsonl``: the sampled completions of training with their rewards, up to a size."""

from collections.abc import Iterable, Sequence
from typing import Any

from align.rl.prompts import Prompt
from align.rl.rewards.rewards import RewardScores
from data_templates.segments import Message
from finetune.recipe.user_arguments import prompt_text
from finetune.training.findings import Finding
from finetune.training.run_directory import ROLLOUTS, RunDirectory

MAX_BYTES = 32 * 2**20
"""Size of the file above which its older half is dropped."""

Entry = dict[str, Any]


def rollout_entries(
    step: int,
    prompts: Sequence[Prompt],
    texts: Sequence[str],
    scores: RewardScores,
    ended_with_eos: Iterable[bool],
) -> list[Entry]:
    """Return the entries of some completions.

    Args:
        step: the first optimizer step that is trained on them, or the round.
        prompts: prompt of each completion.
        texts: the completions.
        scores: their rewards.
        ended_with_eos: whether each one ended with EOS.
    """
    entries = []
    for index, (prompt, text, ended) in enumerate(zip(prompts, texts, ended_with_eos, strict=True)):
        by_source = {name: float(values[index]) for name, values in scores.by_source.items()}
        entries.append(
            {
                "step": step,
                "location": prompt.location,
                "prompt": prompt_text([*prompt.messages, Message("assistant", "")]),
                "completion": text,
                "ended_with_eos": bool(ended),
                "reward": float(scores.total[index]),
                # A single unweighted reward is the total.
                **({"rewards": by_source} if len(by_source) > 1 else {}),
            }
        )
    return entries


def append_rollouts(run: RunDirectory, entries: Iterable[Entry], *, max_bytes: int = MAX_BYTES) -> None:
    """Append entries; above ``max_bytes`` the older half of the file is dropped.

    A run that resumes drops the entries of steps after its checkpoint (``RunDirectory.truncate_after``).
    """
    if not run.is_writer:
        return
    run.append_jsonl(ROLLOUTS, entries)
    if (run.path / ROLLOUTS).stat().st_size > max_bytes:
        run.write_jsonl(ROLLOUTS, _newer_half(run.read_jsonl(ROLLOUTS)))


def replace_rollouts(run: RunDirectory, entries: Sequence[Entry], *, max_bytes: int = MAX_BYTES) -> None:
    """Write the entries of a step that may be sampled again, and keep those of the steps before it."""
    if not run.is_writer or not entries:
        return
    step = entries[0]["step"]
    earlier = [entry for entry in run.read_jsonl(ROLLOUTS) if entry["step"] < step]
    run.write_jsonl(ROLLOUTS, earlier)
    append_rollouts(run, entries, max_bytes=max_bytes)


def _newer_half(entries: list[Entry]) -> list[Entry]:
    """Return the newer half of the entries, with complete steps where there are several."""
    middle = entries[len(entries) // 2]["step"]
    newer = [entry for entry in entries if entry["step"] > middle]
    # One step may be larger than the limit.
    return newer or entries[len(entries) // 2 :]


def equal_rewards_finding(run: RunDirectory, names: Sequence[str]) -> Finding | None:
    """Return a finding if the rewards of all completions of training are equal; None if they differ.

    Args:
        run: the run directory.
        names: the names of the rewards.
    """
    rewards = [entry["reward"] for entry in run.read_jsonl(ROLLOUTS)]
    if len(rewards) < 2 or min(rewards) < max(rewards):
        return None
    reward = " and ".join(names)
    evidence = f"all {len(rewards)} sampled completions have reward {rewards[0]:g} ({reward})"
    meaning = "all rewards are equal: nothing can be learned"
    return Finding("rewards", evidence, meaning, f"check {reward} on the completions in {ROLLOUTS}")
