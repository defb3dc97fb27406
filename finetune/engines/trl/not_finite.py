"""A NaN or infinite loss in TRL's trainers names its rows; TRL's collators drop our row ids."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from finetune.distributed.interrupts import NotFiniteError


class NotFiniteLossMixin(Trainer):  # type: ignore[misc]
    """Stops a run at a NaN or infinite loss; comes before TRL's class in the MRO."""

    def row_locations(self, inputs: Any) -> Sequence[str]:
        """Return the locations (``file:line``) of a micro-batch's rows, after its forward pass."""
        raise NotImplementedError

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run one forward and backward pass.

        Raises:
            NotFiniteError: the loss is NaN or infinite; the message names the rows.
        """
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            # A pair's two completions have the same location: it is named once.
            locations = ", ".join(dict.fromkeys(self.row_locations(inputs)))
            raise NotFiniteError(
                f"loss is {loss.item()} at step {self.state.global_step + 1}, on {locations}"
            )
        return loss


def unpadded_token_ids(inputs: Mapping[str, Tensor]) -> list[tuple[int, ...]]:
    """Return the token ids of each batch row without right padding, by which a dataset's row is found."""
    ids_BT, mask_BT = inputs["input_ids"], inputs.get("attention_mask")
    lengths = [ids_BT.shape[1]] * len(ids_BT) if mask_BT is None else mask_BT.sum(1).tolist()
    return [tuple(ids_T[:length].tolist()) for ids_T, length in zip(ids_BT, lengths, strict=True)]
