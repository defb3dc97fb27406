"""Where a PPO run stands beside its weights: what a checkpoint must hold so that it goes on bit for bit."""

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
    """What changes from rollout to rollout.

    Attributes:
        controller: what a nat of distance costs now.
        running: statistics of all rewards so far.
        rollouts: how many there were.
        done: optimizer steps on the current one.
        step_kl: distance of the policy from the one that sampled, after the last step, nats a token.
        pending: measures of the rollout that no line of metrics has yet.
        first: measures of the first rollout, for the stop rules.
        episodes: the current rollout.
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
        """Write everything into a checkpoint."""
        assert self.episodes is not None, "no step comes before the first rollout"
        kept = {name: value for name, value in vars(self).items() if name != "episodes"}
        kept |= {"controller": asdict(self.controller), "running": asdict(self.running)}
        (folder / PROGRESS).write_text(json.dumps(kept, indent=1), encoding="utf-8")
        self.episodes.save(folder / EPISODES)

    def restore(self, folder: Path) -> None:
        """Take what ``save`` wrote; the kind of controller is the recipe's."""
        saved = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
        controller = replace(self.controller, **saved.pop("controller"))
        running, episodes = Running(**saved.pop("running")), Episodes.load(folder / EPISODES)
        vars(self).update(saved, controller=controller, running=running, episodes=episodes)


class KeepProgress(TrainerCallback):  # type: ignore[misc]
    """Writes progress and rollout into checkpoints and reads them; it must come before the one that seals."""

    def __init__(self, progress: Progress) -> None:
        """Bind the callback to a run's progress."""
        self.progress = progress

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take what the checkpoint holds."""
        if state.global_step:
            self.progress.restore(_checkpoint(args, state))

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write progress and rollout."""
        if state.is_world_process_zero:
            self.progress.save(_checkpoint(args, state))


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
