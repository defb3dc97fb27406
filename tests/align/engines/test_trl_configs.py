"""TRL's config of a stage: the arguments that the stage sets."""

from pathlib import Path

from trl import KTOConfig

from align.engines.trl.configs import KTO_CONFIG
from finetune.recipe.settings import TrainSettings
from finetune.training.arguments import ExecutionConfig, training_arguments


def test_stage_arguments_are_set(tmp_path: Path) -> None:
    settings = TrainSettings(engine="trl", batch_size=4)
    trl_config = KTO_CONFIG.with_arguments({"beta": 0.25})
    sizes = {"micro_batch_size": 2, "checkpoint_every": 1}
    actual = training_arguments(
        settings, folder=tmp_path, execution=ExecutionConfig("cpu", "float32"), **sizes, trl_config=trl_config
    )
    assert isinstance(actual, KTOConfig) and actual.beta == 0.25 and actual.max_length is None
    assert actual.precompute_ref_log_probs and actual.train_sampling_strategy == "sequential"
