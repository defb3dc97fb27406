"""The planner's door: what a run takes in memory, parameters, disk bytes and seconds, from shapes alone.

Everything outside this folder imports this module alone: ``recipe_workload`` (or a ``Workload``) goes in, an
``Estimate`` comes out.
"""

from dataclasses import dataclass

from finetune.distributed.hardware import Device
from finetune.planner import speed
from finetune.planner.attention import kv_cache_bytes
from finetune.planner.from_recipe import recipe_workload
from finetune.planner.memory import MERGE_PHASE, ROW_INDEPENDENT_PHASES, Phase, peak_phase, plan_memory
from finetune.planner.parameter_count import count_trainable_parameters
from finetune.planner.speed import TimeEstimate
from finetune.planner.static_memory import optimizer_bytes
from finetune.planner.workload import ITEMSIZES, GenerationBatch, ObjectiveKind, TotalWork, Workload

__all__ = [
    "Estimate",
    "GenerationBatch",
    "ObjectiveKind",
    "Phase",
    "TimeEstimate",
    "TotalWork",
    "Workload",
    "estimate",
    "recipe_workload",
]

FLOAT32_BYTES = 4


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a run takes.

    Attributes:
        workload: one optimizer step of one process.
        phases: the memory of a process, phase by phase, in order.
        trainable: number of trainable parameters; PPO's value model has as many as the policy.
    """

    workload: Workload
    phases: tuple[Phase, ...]
    trainable: int

    @property
    def run_phases(self) -> list[Phase]:
        """Return the phases of the run itself, without the merge, which is a command of its own."""
        return [phase for phase in self.phases if phase.name != MERGE_PHASE]

    @property
    def merge(self) -> Phase | None:
        """Return the merge's memory; None where there is no adapter to merge."""
        return next((phase for phase in self.phases if phase.name == MERGE_PHASE), None)

    @property
    def peak(self) -> Phase:
        """Return the run's phase with the highest peak."""
        return peak_phase(self.run_phases)

    @property
    def micro_batch_peak(self) -> Phase:
        """Return the highest peak among the phases whose memory depends on the micro-batch size."""
        return peak_phase(phase for phase in self.phases if phase.name not in ROW_INDEPENDENT_PHASES)

    @property
    def total(self) -> int:
        """Return the number of parameters of base and adapter."""
        base = self.workload.architecture.parameters
        return base if self.workload.adapter.full_finetuning else base + self.trainable

    @property
    def kv_cache_bytes(self) -> int:
        """Return the bytes of the key-value cache of a generation batch."""
        return kv_cache_bytes(self.workload)

    @property
    def base_bytes(self) -> int:
        """Return the bytes of the base's weights once they are loaded."""
        return self.phases[0].categories["base"]

    def time(self, device: Device, work: TotalWork) -> TimeEstimate | None:
        """Return the time of a full run, without loading and evaluation; None: unknown device."""
        return speed.estimate_time(
            self.workload, device, work, trainable=self.trainable, base_bytes=self.base_bytes
        )

    def seconds_per_token(self, device: Device, work: TotalWork | None) -> float:
        """Return the seconds per trained token, up to a factor that all settings of a recipe share."""
        return speed.seconds_per_token(
            self.workload, device, work, trainable=self.trainable, base_bytes=self.base_bytes
        )

    def disk_bytes(self, num_checkpoints: int) -> dict[str, int]:
        """Return the bytes that a run writes, by kind of file.

        A checkpoint holds the trained weights in float32 and the optimizer states; `llm-align merge` writes
        the full model in the precision of the forward pass.

        Args:
            num_checkpoints: checkpoints that are retained.
        """
        model, weights = self.workload.architecture, FLOAT32_BYTES * self.trainable
        # The oldest is deleted after the next is written.
        checkpoints = (num_checkpoints + 1) * (weights + optimizer_bytes(self.workload, self.trainable))
        if self.workload.adapter.full_finetuning:
            return {"model": FLOAT32_BYTES * model.parameters, "checkpoints": checkpoints}
        return {
            "adapter": weights,
            "checkpoints": checkpoints,
            "merged model, if requested": model.parameters * ITEMSIZES[self.workload.precision],
        }


def estimate(workload: Workload) -> Estimate:
    """Return what a run takes whose optimizer steps are like this one.

    The CUDA context is not included; on a GPU the allocator's share is.

    Raises:
        UserError: the adapter's size is unknown.
    """
    trainable = count_trainable_parameters(workload.architecture, workload.adapter, heads=workload.heads)
    # PPO trains an adapter for the policy and one for the value model.
    roles = 2 if workload.objective == "ppo" else 1
    return Estimate(workload, plan_memory(workload), roles * trainable)
