"""Names of the distributed strategies, and what each shards over the ranks; no imports."""

STRATEGIES = ("single", "ddp", "zero1", "zero2", "zero3", "fsdp2")
"""The order in which ``auto`` tries them: those that shard more communicate more."""
ZERO_STAGES = {"zero1": 1, "zero2": 2, "zero3": 3}
"""DeepSpeed's strategies and their ZeRO stages."""
SHARDED_WEIGHTS = ("zero3", "fsdp2")
SHARDED_GRADIENTS = ("zero2", *SHARDED_WEIGHTS)
SHARDED_OPTIMIZER = ("zero1", *SHARDED_GRADIENTS)
"""Strategies that shard the weights, the gradients and the optimizer states, respectively."""
REPLICATED = ("ddp", "zero1", "zero2")
"""Strategies under which each process holds all trained weights."""
