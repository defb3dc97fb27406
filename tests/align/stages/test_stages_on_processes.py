"""Every stage on two real processes of the CPU: what one process learns, draws, measures and saves."""

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import warm
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

from finetune.distributed.interrupts import Interrupted
from finetune.recipe.recipe import read_recipe
from finetune.training.launch import launch_stage
from finetune.training.recorder import Recorder
from finetune.training.result import Result

pytestmark = pytest.mark.filterwarnings("ignore")
QUIET = Console(quiet=True)
COMMON = """\
stage: {stage}
model: {{base: {base}, precision: float32}}
adapter: {{method: lora, rank: 4, dropout: 0.0}}
"""
TRAIN = "train: {{batch_size: 5, micro_batch_size: 2, learning_rate: 1e-2, checkpoint_every: 2, MORE}}\n"
UNEVEN = "max_steps: 10, evaluate_every: 4"
"""Batches of five rows in passes of two: of each step one process has a pass that only keeps step."""
MIXED = """\
data: {{mix: [{{source: {pairs}}}, {{source: {lists}}}], held_out: 7, max_length: 128, cache: false}}
"""
JUDGES = """
def letters(prompt, completion):
    return sum(letter in "aeiou" for letter in completion) - len(completion) / 10

def long(prompt, completion):
    return len(completion) > 6
"""
STAGES = {
    "reward": TRAIN.replace("MORE", UNEVEN)
    + MIXED
    + "reward: {{center_rewards_coefficient: 0.01, "
    + "rules: [{{name: letters, function: '{judges}:letters'}}]}}\n"
    + "evaluate: {{samples: 3}}\n",
    "dpo": TRAIN.replace("MORE", UNEVEN)
    + MIXED
    + "evaluate: {{samples: 3, max_new_tokens: 4, graders: {{long: '{judges}:long'}}}}\n",
    "ppo": TRAIN.replace("MORE", "max_steps: 7, evaluate_every: 3")
    + "data: {{source: {prompts}, held_out: 5, cache: false}}\n"
    + "evaluate: {{samples: 3, max_new_tokens: 4, graders: {{long: '{judges}:long'}}}}\n"
    + "rewards: {{sources: [{{function: '{judges}:letters'}}, {{run: '{reward}', weight: 0.5}}]}}\n"
    + "sampling: {{max_new_tokens: 6}}\n"
    + "ppo: {{rollout_size: 10, ppo_epochs: 2, missing_eos_reward: null, adaptive_kl_target: 0.5, "
    + "kl_horizon: 64, normalize_rewards: running, target_kl: 0.5, entropy_coef: 0.01}}\n"
    + "pretraining: {{source: {answers}, weight: 0.5, batch_size: 3}}\n",
    "rejection": TRAIN.replace("MORE", "epochs: 1")
    + "data: {{source: {prompts}, held_out: 5, cache: false}}\n"
    + "evaluate: {{samples: 3, max_new_tokens: 4, graders: {{long: '{judges}:long'}}}}\n"
    + "rewards: {{sources: [{{function: '{judges}:letters'}}, {{run: '{reward}', weight: 0.5}}]}}\n"
    + "sampling: {{max_new_tokens: 6}}\n"
    + "rejection: {{rounds: 2, prompts: 7, num_generations: 3, keep: best_of_n, truncated: train}}\n",
    "chain_of_hindsight": TRAIN.replace("MORE", "max_steps: 4")
    + "data: {{source: {pairs}, held_out: 7, max_length: 128, template: chatml, cache: false}}\n"
    + "evaluate: {{samples: 2, max_new_tokens: 4}}\n",
    "pretrain": TRAIN.replace("MORE", "max_steps: 4")
    + "data: {{source: {texts}, held_out: 0.2, max_length: 32, cache: false}}\n"
    + "evaluate: {{samples: 2, max_new_tokens: 4}}\n",
}
ON_TRL = "train: {{batch_size: 8, micro_batch_size: {size}, learning_rate: 1e-2, max_steps: 4}}\n"
STAGES["kto"] = (
    ON_TRL
    + "data: {{source: {pairs}, held_out: 7, max_length: 128, cache: false}}\n"
    + "evaluate: {{samples: 2, max_new_tokens: 4}}\n"
)
Share = Callable[..., Result]


@pytest.fixture(autouse=True)
def _warm_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess_handler, "Popen", warm.Popen)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, pairs_file: Path, lists_file: Path) -> dict[str, Path]:
    """Return what the recipes read."""
    folder = tmp_path_factory.mktemp("files")
    prompts = [{"prompt": f"Add the numbers.{' Please.' * (i % 4)} {i}"} for i in range(24)]
    answers = [{"instruction": f"Add {i} 1.", "input": "", "output": str(i + 1)} for i in range(11)]
    for name, rows in (("prompts", prompts), ("answers", answers)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "texts.txt").write_text("\n\n".join(f"Add the numbers. {i} {i * i}" for i in range(60)))
    (folder / "judges.py").write_text(JUDGES)
    found = {name: folder / f"{name}.jsonl" for name in ("prompts", "answers")}
    own = {"texts": folder / "texts.txt", "judges": folder / "judges.py", "folder": folder}
    return found | own | {"pairs": pairs_file, "lists": lists_file, "reward": folder / "reward"}


@pytest.fixture(scope="module")
def share(files: dict[str, Path], base_folder: Path) -> Share:
    """Return a function that runs a stage on so many processes, to its end."""

    def run(stage: str, name: str, count: int, *, size: int = 4, **settings: Any) -> Result:
        path = files["folder"] / f"{stage}-{size}.yaml"
        path.write_text((COMMON + STAGES[stage]).format(stage=stage, base=base_folder, size=size, **files))
        given = {key.replace("__", "."): value for key, value in settings.items()}
        given |= {"train.num_processes": count}
        recipe = read_recipe(stage, str(path), shortcuts=given, out=files["folder"] / name)
        return launch_stage(recipe, QUIET, command="a test")

    return run


@pytest.fixture(scope="module")
def scored(share: Share) -> Result:
    """Return a reward model, which others are judged by."""
    return share("reward", "reward", 1)


def close(one: Result, two: Result, *, saved: float = 2e-3) -> None:
    """Compare every number of every line of metrics, those of the record, samples and adapters.

    Adam divides by the size of a gradient: what is nearly nothing may go either way, which ``saved`` allows.
    """
    assert len(one.metrics) == len(two.metrics) > 3
    for first, second in zip(one.metrics, two.metrics, strict=True):
        _same(first, second, aside=("epoch", "time/"))
    _same(one.record["metrics"], two.record["metrics"], aside=("tokens_per_second",))
    assert two.record["processes"] == 2 and two.record["status"] == "finished"
    ticks = {tick["name"]: tick["detail"] for tick in two.record["preflight"]}
    assert "equal bit for bit" in ticks.get("processes", "equal bit for bit") and "saved" in ticks
    assert len(one.samples) == len(two.samples) > 0
    mine, theirs = (load_file(run.adapter / "adapter_model.safetensors") for run in (two, one))
    assert mine.keys() == theirs.keys() and all(weight.any() for weight in mine.values())
    assert max(float((mine[name] - theirs[name]).abs().max()) for name in mine) < saved


def _same(one: dict[str, float], two: dict[str, float], *, aside: tuple[str, ...]) -> None:
    # Times differ, and a PPO run that resumes between two rollouts has none of the updates before.
    keys, others = ({key for key in metrics if not key.startswith(aside)} for metrics in (one, two))
    assert keys == others
    for key in keys:
        assert math.isclose(one[key], two[key], rel_tol=1e-4, abs_tol=1e-5), (key, one[key], two[key])


@pytest.mark.slow
def test_a_reward_model_of_two_processes_is_that_of_one(share: Share, scored: Result) -> None:
    two = share("reward", "reward-two", 2)
    close(scored, two)
    mine, theirs = (
        two.record["reward_normalization"]["reward"],
        scored.record["reward_normalization"]["reward"],
    )
    assert mine == pytest.approx(theirs, rel=1e-4)
    assert (two.directory / "rules" / "0.py").read_text() == JUDGES
    assert [line["prompt"] for line in two.samples] == [line["prompt"] for line in scored.samples]


@pytest.mark.parametrize("loss", ["dpo", pytest.param("pro", marks=pytest.mark.slow)])
def test_preference_training_on_two_processes_equals_one(share: Share, loss: str) -> None:
    one, two = (share("dpo", f"{loss}-{count}", count, dpo__loss=loss) for count in (1, 2))
    close(one, two)
    assert two.samples == one.samples


def test_two_processes_draw_and_learn_what_one_does_in_ppo(share: Share, scored: Result) -> None:
    one, two = (share("ppo", f"ppo-{count}", count) for count in (1, 2))
    close(one, two)
    rollouts = [line for line in two.metrics if "objective/reward" in line]
    assert len(rollouts) > 1 and rollouts[0]["policy/ratio"] == 1.0
    assert two.samples == one.samples


def test_two_processes_draw_and_choose_what_one_does_in_rejection(share: Share, scored: Result) -> None:
    one, two = (share("rejection", f"rejection-{count}", count) for count in (1, 2))
    close(one, two)
    drawn = [(run.directory / "chosen.jsonl").read_text().splitlines() for run in (one, two)]
    assert len(drawn[0]) == 14
    assert [[json.loads(line)["reply"] for line in lines] for lines in drawn][0] == [
        json.loads(line)["reply"] for line in drawn[1]
    ]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["chain_of_hindsight", "pretrain"])
def test_stages_that_tune_on_rows_share_them(share: Share, stage: str) -> None:
    one, two = (share(stage, f"{stage}-{count}", count) for count in (1, 2))
    close(one, two)


@pytest.mark.slow
def test_kto_of_two_processes_is_that_of_one_with_passes_twice_as_large(share: Share) -> None:
    close(share("kto", "kto-1", 1, size=8), share("kto", "kto-2", 2, size=4))


ZERO = [
    (stage, strategy) for strategy in ("zero1", "zero2") for stage in ("reward", "dpo", "ppo", "rejection")
]


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "strategy"), [*ZERO, ("reward", "zero3"), ("dpo", "zero3")])
def test_zero_learns_what_one_process_does(share: Share, scored: Result, stage: str, strategy: str) -> None:
    one = share(stage, f"{stage}-alone", 1) if stage != "reward" else scored
    close(one, share(stage, f"{stage}-{strategy}", 2, train__strategy=strategy))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero3", "fsdp2"])
def test_the_reference_cache_is_keyed_by_the_sharded_weights(
    share: Share, base_folder: Path, tmp_path: Path, strategy: str
) -> None:
    cache = Path(os.environ["XDG_CACHE_HOME"]) / "llm-align" / "reference"

    def num_files(name: str, **settings: Any) -> int:
        settings |= {"data__cache": True, "train__strategy": strategy, "train__max_steps": 2}
        share("dpo", f"{strategy}-{name}", 2, train__evaluate_every=None, **settings)
        return len(list(cache.glob("*")))

    first = num_files("first")
    assert num_files("other-beta", dpo__loss__beta=0.3) == first
    other = shutil.copytree(base_folder, tmp_path / "base")
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] *= 1.5
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    assert num_files("other-base", model__base=str(other)) == first + 2, "held-out and training rows"


@pytest.mark.slow
def test_a_live_reference_is_the_precomputed_one_on_two_processes(share: Share) -> None:
    one = share("dpo", "live-1", 1)
    close(one, share("dpo", "live-2", 2, dpo__reference="live"))


@pytest.mark.slow
@pytest.mark.parametrize("then", [1, 2])
@pytest.mark.parametrize("stage", ["dpo", "ppo"])
def test_a_run_resumes_on_another_number_of_processes(
    share: Share, scored: Result, monkeypatch: pytest.MonkeyPatch, stage: str, then: int
) -> None:
    one = share(stage, f"{stage}-whole", 1)
    first, name = 3 - then, f"{stage}-{then}-last"
    if first == 1:
        _stop_after(monkeypatch, 3)
        with pytest.raises(Interrupted, match="SIGTERM at step 3"):
            share(stage, name, 1)
        monkeypatch.undo()
    else:
        share(stage, name, 2, train__keep_checkpoints=20)
        _forget_after(one.directory.parent / name, 4)
    again = share(stage, name, then, **({"train__keep_checkpoints": 20} if first == 2 else {}))
    assert again.record["processes"] == then
    again.record["processes"] = 2
    close(one, again)


def _stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let a signal come in a step."""
    before = Recorder.on_step_end

    def on_step_end(self: Recorder, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step == step:
            self.signal_flag.signal_name = "SIGTERM"
        before(self, args, state, control, **more)

    monkeypatch.setattr(Recorder, "on_step_end", on_step_end)


def _forget_after(run: Path, step: int) -> None:
    """Make a finished run one that was killed behind a step's checkpoint."""
    for checkpoint in (run / "checkpoints").iterdir():
        if int(checkpoint.name.rpartition("-")[2]) > step:
            (checkpoint / "checksums.json").unlink()
    record = json.loads((run / "run.json").read_text())
    record["metrics"] = {key: value for key, value in record["metrics"].items() if "_before" in key}
    (run / "run.json").write_text(json.dumps(record | {"status": "running"}))
