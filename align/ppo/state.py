"""PPO state in checkpoints (KL coefficient, reward statistics, current rollout), for bit-exact resuming."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from align.ppo.experience import Rollout, RolloutTensors, TokenIdTuple
from align.ppo.settings import PPOSettings
from align.rl.maths.advantages import RunningMeanStd
from align.rl.maths.kl import AdaptiveKLController, FixedKLController

STATE_FILE, ROLLOUT_FILE = "ppo_state.json", "rollout.safetensors"


@dataclass
class PPOState:
    """The state of PPO beyond weights and optimizer.

    Attributes:
        kl_controller: fixed or adaptive KL controller, which holds the KL coefficient.
        reward_stats: running mean and variance of all rewards.
        num_rollouts: number of rollouts so far.
        minibatches_done: optimizer steps begun on the current rollout; in a checkpoint, steps done.
        approx_kl: KL to the sampling policy in the last optimizer step, nats per token.
        pending_metrics: metrics of the rollout that are not logged yet.
        first_metrics: metrics of the first rollout, the baseline of the stop rules.
        rollout: the current rollout.
    """

    kl_controller: FixedKLController | AdaptiveKLController
    reward_stats: RunningMeanStd = field(default_factory=RunningMeanStd)
    num_rollouts: int = 0
    minibatches_done: int = 0
    approx_kl: float = 0.0
    pending_metrics: dict[str, float] = field(default_factory=dict)
    first_metrics: dict[str, float] = field(default_factory=dict)
    rollout: Rollout | None = None

    @classmethod
    def initial(cls, ppo: PPOSettings) -> "PPOState":
        """Return the state before the first rollout; a checkpoint replaces it when training resumes."""
        if ppo.adaptive_kl_target is None:
            return cls(FixedKLController(ppo.kl_coef))
        return cls(AdaptiveKLController(ppo.kl_coef, ppo.adaptive_kl_target, ppo.kl_horizon))

    def begin_updates(self, rollout: Rollout, metrics: Mapping[str, float]) -> None:
        """Make a new rollout the current one, with the metrics to log; no minibatch of it is done."""
        # After the advantages: this rollout uses the old coefficient.
        self.kl_controller = self.kl_controller.updated(metrics["objective/kl_per_completion"], len(rollout))
        self.rollout, self.pending_metrics = rollout, dict(metrics)
        # The first rollout stays the baseline of the stop rules.
        self.first_metrics = self.first_metrics or dict(metrics)
        self.num_rollouts, self.minibatches_done, self.approx_kl = self.num_rollouts + 1, 0, 0.0

    def save(self, folder: Path) -> None:
        """Write the state into a checkpoint folder."""
        assert self.rollout is not None, "no step comes before the first rollout"
        # The rollout is in a file of its own: JSON would store its floats as text.
        stored = {name: value for name, value in vars(self).items() if name != "rollout"}
        stored |= {"kl_controller": asdict(self.kl_controller), "reward_stats": asdict(self.reward_stats)}
        (folder / STATE_FILE).write_text(json.dumps(stored, indent=1), encoding="utf-8")
        save_rollout(self.rollout, folder / ROLLOUT_FILE)

    def restore(self, folder: Path) -> None:
        """Load the state that ``save`` wrote."""
        saved = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        # The recipe decides between fixed and adaptive; the checkpoint has its numbers.
        kl_controller = replace(self.kl_controller, **saved.pop("kl_controller"))
        reward_stats, rollout = (
            RunningMeanStd(**saved.pop("reward_stats")),
            load_rollout(folder / ROLLOUT_FILE),
        )
        vars(self).update(saved, kl_controller=kl_controller, reward_stats=reward_stats, rollout=rollout)


class PPOStateCallback(TrainerCallback):  # type: ignore[misc]
    """Saves the PPO state in checkpoints and restores it; must run before the checksum callback."""

    def __init__(self, ppo_state: PPOState) -> None:
        self.ppo_state = ppo_state

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore the state of the checkpoint that training resumes from."""
        # Trainer has read the checkpoint's step by now; 0 is a new run.
        if state.global_step:
            self.ppo_state.restore(_checkpoint_folder(args, state))

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save the state into the new checkpoint."""
        # One writer: ranks gather rewards and token statistics, so the state that training needs is the same.
        if state.is_world_process_zero:
            self.ppo_state.save(_checkpoint_folder(args, state))


def _checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def save_rollout(rollout: Rollout, file: Path) -> None:
    """Write the rollout to a safetensors file, so that PPO resumes within a rollout."""
    # safetensors refuses tensors that are not contiguous.
    tensors = {name: tensor.contiguous() for name, tensor in vars(rollout.tensors).items()}
    # safetensors holds no ragged arrays: token ids are stored flat, with their lengths.
    ids = {"prompts": rollout.prompts, "completions": rollout.completions}
    flat_ids = {
        name: torch.tensor([token for sequence in sequences for token in sequence])
        for name, sequences in ids.items()
    }
    lengths = {f"{name}_lengths": torch.tensor(list(map(len, sequences))) for name, sequences in ids.items()}
    save_file({**tensors, **flat_ids, **lengths, "rows": torch.tensor(rollout.prompt_indices)}, file)


def load_rollout(file: Path) -> Rollout:
    """Read a rollout written by ``save_rollout``."""
    stored = load_file(file)
    tensors = RolloutTensors(**{field.name: stored[field.name] for field in fields(RolloutTensors)})
    prompts, completions = (
        _split_by_length(stored[name].tolist(), stored[f"{name}_lengths"].tolist())
        for name in ("prompts", "completions")
    )
    return Rollout(tuple(stored["rows"].tolist()), prompts, completions, tensors)


def _split_by_length(flat_ids: list[int], lengths: list[int]) -> tuple[TokenIdTuple, ...]:
    stops = accumulate(lengths)
    return tuple(tuple(flat_ids[stop - length : stop]) for stop, length in zip(stops, lengths, strict=True))
