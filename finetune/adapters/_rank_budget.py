"""AdaLoRA rank allocation during training: importance, budget schedule, masks, and their checkpoint state."""

import torch
from peft import PeftModel
from peft.tuners.adalora import RankAllocator
from torch import Tensor

MASK_PREFIX = "mask."
AVERAGES = ("exp_avg_ipt", "exp_avg_unc")


class RankBudget:
    """Prunes singular values step by step with PEFT's RankAllocator."""

    def __init__(self, model: PeftModel, *, warmup: int, cooldown: int, steps: int, penalty: float) -> None:
        """Set the schedule.

        Args:
            model: base with AdaLoRA.
            warmup: steps before the budget decreases.
            cooldown: final steps after the last allocation.
            steps: optimizer steps of the run.
            penalty: weight of the orthogonality penalty.
        """
        self.model = model.base_model.model
        self.penalty_weight = penalty
        self.last_allocation_step = max(1, steps - cooldown)
        config = model.peft_config["default"]
        # PEFT divides by the number of steps between warmup and cooldown, so one of them has to remain.
        config.total_step, config.tinit, config.tfinal = (
            steps,
            min(warmup, self.last_allocation_step - 1),
            steps - self.last_allocation_step,
        )
        self.allocator: RankAllocator = model.base_model.rankallocator
        self.rank_pattern: dict[str, list[bool]] = {}

    def after_step(self, step: int) -> None:
        """Update importance and masks; after the last allocation the masks are fixed."""
        if step < self.last_allocation_step:
            self.allocator.update_and_allocate(self.model, step)
        elif step == self.last_allocation_step or not self.rank_pattern:
            # From this step on PEFT no longer updates the importance by itself.
            self.allocator.update_ipt(self.model)
            self.rank_pattern = self.allocator.update_and_allocate(self.model, step, force_mask=True)[1]
        else:
            # The optimizer's step changes pruned singular values again.
            self.allocator.mask_using_rank_pattern(self.model, self.rank_pattern)

    def penalty(self) -> Tensor:
        """Return gamma times the sum over layers of ||P^T P - I||^2 + ||Q Q^T - I||^2.

        Equations 4 and 5 of arXiv 2303.10512. The authors' code and PEFT 0.21.2 take the norm without its
        square, and the mean over all matrices.
        """
        total = torch.zeros(())
        for name, weight in self.model.named_parameters():
            if ".lora_A." in name or ".lora_B." in name:
                # lora_A is Q (rank, in), lora_B is P (out, rank): both Gram matrices are (rank, rank).
                gram = weight @ weight.T if ".lora_A." in name else weight.T @ weight
                total = (
                    total.to(gram.device) + (gram - torch.eye(len(gram), device=gram.device)).square().sum()
                )
        return self.penalty_weight * total

    def state(self) -> dict[str, Tensor]:
        """Return the smoothed importance and the final masks, for a checkpoint."""
        averages = {
            f"{kind}.{name}": value for kind in AVERAGES for name, value in self._averages(kind).items()
        }
        return averages | {
            f"{MASK_PREFIX}{name}": torch.tensor(mask) for name, mask in self.rank_pattern.items()
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        """Restore what ``state`` returned."""
        self.rank_pattern = {
            name.removeprefix(MASK_PREFIX): value.tolist()
            for name, value in state.items()
            if name.startswith(MASK_PREFIX)
        }
        for kind in AVERAGES:
            restored = {
                name.removeprefix(f"{kind}."): value
                for name, value in state.items()
                if name.startswith(f"{kind}.")
            }
            self._averages(kind).update(restored)
        # PEFT resets the averages of a weight that has no entry in `ipt`; the values are not read.
        self.allocator.ipt.update(
            {name: torch.zeros_like(value) for name, value in self._averages(AVERAGES[0]).items()}
        )

    def _averages(self, kind: str) -> dict[str, Tensor]:
        averages: dict[str, dict[str, Tensor]] = {
            "exp_avg_ipt": self.allocator.exp_avg_ipt,
            "exp_avg_unc": self.allocator.exp_avg_unc,
        }
        return averages[kind]
