"""Rows and settings of the runs that tests of the Python API make, in seconds."""

ADDITIONS = [
    {"instruction": f"Add {number} and {number}.", "output": str(2 * number)} for number in range(12)
]
FAST = {
    "model.precision": "float32",
    "data.held_out": 2,
    "data.max_length": 128,
    "train.max_steps": 2,
    "train.batch_size": 4,
    "evaluate.samples": 1,
    "evaluate.exact_match": 0,
    "evaluate.max_new_tokens": 4,
}
