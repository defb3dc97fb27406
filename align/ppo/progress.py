"""PPO state in checkpoints (KL coefficient, reward statistics, current rollout), for bit-exact resuming."""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from align.ppo.episodes import Episodes
from align.rl.maths.kl import AdaptiveKl, FixedKl
from align.rl.maths.scores import Running

PROGRESS, EPISODES = "ppo.json", "episodes.safetensors"


@dataclass
class Progress:
    """The state of PPO beyond weights and optimizer.

    Attributes:
        kl_controller: fixed or adaptive KL controller, which holds the KL coefficient.
        reward_stats: running mean and variance of all rewards.
        num_rollouts: number of rollouts so far.
        minibatches_done: optimizer steps done on the current rollout.
        approx_kl: KL to the sampling policy in the last optimizer step, nats per token.
        pending_metrics: metrics of the rollout that are not logged yet.
        first_metrics: metrics of the first rollout, the baseline of the stop rules.
        rollout: the current rollout.
    """

    controller: FixedKl | AdaptiveKl
    running: Running = field(default_factory=Running)
    rollouts: int = 0
    done: int = 0
    step_kl: float = 0.0
    pending: dict[str, float] = field(default_factory=dict)
    first: dict[str, float] = field(default_factory=dict)
    episodes: Episodes | None = None

    def save(self, folder: Path) -> None:
        """Write the state into a checkpoint folder."""
        assert self.episodes is not None, "no step comes before the first rollout"
        kept = {name: value for name, value in vars(self).items() if name != "episodes"}
        kept |= {"controller": asdict(self.controller), "running": asdict(self.running)}
        (folder / PROGRESS).write_text(json.dumps(kept, indent=1), encoding="utf-8")
        self.episodes.save(folder / EPISODES)

    def restore(self, folder: Path) -> None:
        """Load the state that ``save`` wrote."""
        saved = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
        # The recipe decides between fixed and adaptive; the checkpoint has its numbers.
        controller = replace(self.controller, **saved.pop("controller"))
        running, episodes = Running(**saved.pop("running")), Episodes.load(folder / EPISODES)
        vars(self).update(saved, controller=controller, running=running, episodes=episodes)


class KeepProgress(TrainerCallback):  # type: ignore[misc]
    """Saves the PPO state in checkpoints and restores it; must run before the checksum callback."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore the state of the checkpoint that training resumes from."""
        if state.global_step:
            self.progress.restore(_checkpoint(args, state))

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save the state into the new checkpoint."""
        if state.is_world_process_zero:
            self.progress.save(_checkpoint(args, state))


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
