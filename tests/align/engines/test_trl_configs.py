"""TRL's config of a stage: the arguments that the stage sets, and that a recipe cannot."""

from pathlib import Path

import pytest
from trl import KTOConfig

from align.engines.trl.configs import KTO_CONFIG
from finetune.recipe.errors import UserError
from finetune.recipe.settings import TrainSettings
from finetune.training.arguments import ExecutionConfig, check_engine_args, training_arguments


def test_stage_arguments_are_set_and_reserved(tmp_path: Path) -> None:
    settings = TrainSettings(engine="trl", batch_size=4)
    trl_config = KTO_CONFIG.with_arguments({"beta": 0.25})
    sizes = {"micro_batch_size": 2, "checkpoint_every": 1}
    actual = training_arguments(
        settings, folder=tmp_path, execution=ExecutionConfig("cpu", "float32"), **sizes, trl_config=trl_config
    )
    assert isinstance(actual, KTOConfig) and actual.beta == 0.25 and actual.max_length is None
    assert actual.precompute_ref_log_probs and actual.train_sampling_strategy == "sequential"
    for name in ("beta", "precompute_ref_log_probs", "disable_dropout"):
        reserved = TrainSettings(engine="trl", engine_args={name: 1})
        with pytest.raises(UserError, match=f"engine_args.{name}: set by the recipe"):
            check_engine_args(reserved, trl_config)
    with pytest.raises(UserError, match="packing: unknown to the engine"):
        check_engine_args(TrainSettings(engine="trl", engine_args={"packing": True}), trl_config)
