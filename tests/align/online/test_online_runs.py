"""Complete runs of RLOO and GRPO in a temporary folder."""

import json
import os
import signal

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from finetune.distributed.interrupts import Interrupted, NotFiniteError
from finetune.recipe.errors import CheckFailedError, LibraryError, UserError
from finetune.recipe.recipe import read_recipe
from finetune.training.loaded_model import load_finished_run
from finetune.training.recorder import Recorder
from finetune.training.stage import run_stage

both = pytest.mark.parametrize("stage", ["rloo", "grpo"])


def checks_by_name(result):
    """Return the check results by name."""
    return {result_entry["name"]: result_entry for result_entry in result.record["preflight"]}


@pytest.mark.plots
@pytest.mark.parametrize("stage", [pytest.param("rloo", marks=pytest.mark.slow), "grpo"])
def test_reward_function_is_learned(tune, stage):
    result = tune(stage, train__max_steps=20, train__batch_size=16, train__evaluate_every=10)
    steps = [line for line in result.metrics if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 21))
    assert (
        steps[0]["objective/kl_per_completion"] == pytest.approx(0, abs=1e-5)
        and steps[-1]["objective/kl_per_completion"] > 0.01
    )
    assert {
        *("objective/reward", "objective/reward_std", "val/completion_length", "val/eos_rate"),
        *("policy/entropy", "objective/frac_reward_zero_std"),
    } <= steps[-1].keys()
    metrics = result.record["metrics"]
    assert metrics["eval/objective/reward_after"] > metrics["eval/objective/reward_before"] + 0.1
    assert (
        metrics["eval/objective/kl_per_completion_before"] == pytest.approx(0, abs=1e-5)
        and metrics["eval/objective/kl_per_completion_after"] > 0.1
    )
    assert [line["step"] for line in result.metrics if "eval/objective/reward" in line] == [10, 20]
    assert "held-out reward" in result.record["summary"]
    assert "policy equals reference before step 0" in checks_by_name(result)["start"]["detail"]
    assert (
        checks_by_name(result)["base"]["passed"]
        and "had a nonzero gradient" in checks_by_name(result)["first steps"]["detail"]
    )
    assert len(result.samples) == 2
    assert [sample for sample in result.samples if not {"before", "after"} <= sample.keys()] == []
    assert result.record["data"]["lines"][0].startswith("24 prompts (prompt), 6 held out; ")


@both
def test_saved_adapter_loads_with_peft_and_as_a_run(tune, stage, decided_base):
    result = tune(stage)
    assert not (result.adapter / "ref").exists()
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(decided_base), result.adapter)
    saved = load_file(result.adapter / "adapter_model.safetensors")
    assert any(value.any() for name, value in saved.items() if "lora_B" in name)
    assert list(model.peft_config) == ["default"]
    assert load_finished_run(result.directory).encoder.name == "plain"


ENGINE_ARGS = [
    ("rloo", {"mask_truncated_completions": True}),
    ("rloo", {"pad_to_multiple_of": 64}),
    ("grpo", {"mask_truncated_completions": True}),
    ("grpo", {"top_entropy_quantile": 0.2}),
    ("grpo", {"entropy_coef": 0.5}),
]
"""Arguments of TRL's trainers that `train.engine_args` passes on."""


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "arguments"), ENGINE_ARGS)
def test_an_engine_argument_changes_the_update(tune, stage, arguments):
    settings = {"train__max_steps": 2, "evaluate__samples": 0, "data__held_out": 0}
    with_argument = tune(stage, "with", train__engine_args=arguments, **settings)
    assert with_argument.record["files"] != tune(stage, "without", **settings).record["files"]


RESUMED = [
    pytest.param("rloo", {}, id="rloo"),
    pytest.param("grpo", {}, id="grpo"),
    *(
        pytest.param(*case, id=f"{case[0]}-{'-'.join(case[1])}", marks=pytest.mark.slow)
        for case in ENGINE_ARGS
    ),
]


@pytest.mark.parametrize(("stage", "arguments"), RESUMED)
def test_resumed_run_equals_uninterrupted_run(tune, stage, arguments, monkeypatch):
    settings = {"train__max_steps": 9, "train__checkpoint_every": 4, "train__evaluate_every": 3}
    settings["train__engine_args"] = arguments
    uninterrupted = tune(stage, "whole", **settings)
    log = Recorder.on_log

    def ask_at_step_5(self, args, state, control, logs=None, **kwargs):
        log(self, args, state, control, logs=logs, **kwargs)
        if state.global_step == 5 and not self.signal_flag.signal_name:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Recorder, "on_log", ask_at_step_5)
    with pytest.raises(Interrupted, match="stopped by SIGTERM at step 6; checkpoint saved"):
        tune(stage, **settings)
    monkeypatch.undo()
    resumed = tune(stage, **settings)
    assert resumed.record["files"] == uninterrupted.record["files"]
    assert resumed.metrics == uninterrupted.metrics
    assert (
        resumed.samples == uninterrupted.samples
        and resumed.record["metrics"] == uninterrupted.record["metrics"]
    )


@pytest.fixture
def tuned_run(decided_base, rows_file, tmp_path):
    """Return a run of sft whose adapter is far from zero."""
    text = (
        f"stage: sft\nmodel: {{base: {decided_base}, precision: float32}}\n"
        f"data: {{source: {rows_file}, template: plain, cache: false}}\n"
        "adapter: {method: lora, rank: 4, dropout: 0.0}\n"
        "train: {max_steps: 1, batch_size: 8, learning_rate: 2e-2}\nevaluate: {samples: 0}\n"
    )
    (tmp_path / "sft.yaml").write_text(text, encoding="utf-8")
    recipe = read_recipe("sft", str(tmp_path / "sft.yaml"), out=tmp_path / "tuned")
    return run_stage(recipe, Console(quiet=True), command="a test").directory


@both
def test_pain_14_reference_is_the_initial_policy_not_the_base(tune, stage, tuned_run):
    result = tune(stage, model__init_from=str(tuned_run), train__max_steps=2)
    first = next(line for line in result.metrics if "objective/kl_per_completion" in line)
    assert first["objective/kl_per_completion"] == pytest.approx(0, abs=1e-5), "as TRL computes it"
    assert checks_by_name(result)["start"]["detail"].startswith("policy equals reference before step 0")
    saved, start = (
        load_file(run / "adapter/adapter_model.safetensors") for run in (result.directory, tuned_run)
    )
    assert saved.keys() == start.keys()
    assert max(float(value.abs().max()) for name, value in start.items() if "lora_B" in name) > 0.01


@pytest.mark.parametrize("method", ["dora", "prefix", "prompt", "ia3", "vera", "oft", "layernorm"])
def test_policy_equals_reference_before_step_0_for_every_adapter(tune, method):
    result = tune("grpo", adapter__method=method, train__max_steps=2, evaluate__samples=0, data__held_out=0)
    passed = {name: check["passed"] for name, check in checks_by_name(result).items()}
    assert passed == dict.fromkeys(passed, True) and {"start", "base"} <= passed.keys()


def test_full_fine_tuning_without_reference(tune):
    result = tune("rloo", adapter__method="full", rloo__beta=0.0, train__learning_rate=1e-4)
    assert (result.directory / "model").is_dir() and "start" not in checks_by_name(result)


@both
def test_adapter_on_4bit_base_stays_float32(tune, stage):
    result = tune(stage, adapter__method="qlora", train__max_steps=2, data__held_out=0)
    saved = load_file(result.adapter / "adapter_model.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.float32}
    rounded = [torch.equal(value, value.bfloat16().float()) for value in saved.values()]
    assert not all(rounded) and checks_by_name(result)["start"]["passed"]


def test_several_rewards_are_logged_separately(tune, rule_file):
    sources = [{"function": f"{rule_file}:the"}, {"function": f"{rule_file}:short", "weight": 2.0}]
    result = tune("rloo", rewards__sources=sources, rewards__length_penalty=0.1, train__max_steps=1)
    [line] = [line for line in result.metrics if "loss" in line]
    parts = line["rewards/the"] + 2 * line["rewards/short"] + line["rewards/length_penalty"]
    assert line["objective/reward"] == pytest.approx(parts, abs=1e-5) and line["rewards/length_penalty"] < 0
    assert [entry["name"] for entry in result.record["rewards"]] == ["the", "short"]
    assert {"eval/rewards/the_before", "eval/rewards/short_after"} <= result.record["metrics"].keys()


@both
def test_equal_rewards_in_every_group_are_a_run_that_learned_nothing(tune, stage, tmp_path):
    (tmp_path / "same.py").write_text("def same(prompt, completion):\n    return 1.0\n", encoding="utf-8")
    source = [{"function": f"{tmp_path / 'same.py'}:same"}]
    settings = {f"{stage}__beta": 0.0, "data__held_out": 0, "evaluate__samples": 0}
    with pytest.raises(CheckFailedError, match="nothing was learned: none of the") as error:
        tune(stage, rewards__sources=source, **settings)
    assert "every gradient was 0" in str(error.value) and "rewards that differ" in str(error.value)
    entries = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert [entry["objective/frac_reward_zero_std"] for entry in entries] == [1.0, 1.0, 1.0]
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    [check] = [check for check in record["preflight"] if check["name"] == "equal rewards"]
    assert check["warned"] and "have reward 1 (same)" in check["detail"]
    assert "(same)" in next(
        found["evidence"] for found in record["diagnostics"] if found["name"] == "rewards"
    )
    rollouts = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    assert {entry["step"] for entry in rollouts} == {1, 2, 3} and {entry["reward"] for entry in rollouts} == {
        1
    }


@both
def test_failing_reward_function_names_the_prompt(tune, stage, rule_file, tmp_path):
    with pytest.raises(
        UserError, match=r"reward 'raises' on \S+prompts.jsonl:\d+: RuntimeError: out of order"
    ):
        tune(stage, rewards__sources=[{"function": f"{rule_file}:raises"}], data__held_out=0)
    assert not (tmp_path / "run").exists()


def test_reward_function_failing_later_ends_the_run(tune, tmp_path):
    rule = "def words(prompt, completion):\n    return 1 / (not completion)\n"
    (tmp_path / "late.py").write_text(rule, encoding="utf-8")
    with pytest.raises(UserError, match=r"reward 'words' on \S+prompts.jsonl:\d+: ZeroDivisionError"):
        tune("rloo", rewards__sources=[{"function": f"{tmp_path / 'late.py'}:words"}], data__held_out=0)
    assert '"status": "failed"' in (tmp_path / "run/run.json").read_text(encoding="utf-8")


def test_reference_answer_reward_requires_reference_answers(tune, tmp_path):
    source = ["number"]
    with pytest.raises(UserError, match="24 of 24 rows have no reference answer"):
        tune("grpo", rewards__sources=source)
    sums = [{"question": f"{i} + 1", "answer": f"#### {i + 1}"} for i in range(8)]
    with pytest.raises(CheckFailedError, match="nothing was learned"):  # no reply of the toy is right
        tune("grpo", rewards__sources=source, data__source=sums, data__held_out=2, train__max_steps=1)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["metrics"]["eval/objective/reward_before"] == 0.0


def test_nan_reward_is_reported(tune, rule_file):
    with pytest.raises(UserError, match="it returned nan"):
        tune("grpo", rewards__sources=[{"function": f"{rule_file}:no_number"}])


def test_nan_loss_names_step_and_rows(tune):
    with pytest.raises((NotFiniteError, LibraryError), match=r"at step \d|nan|inf"):
        tune("rloo", train__learning_rate=1e30, evaluate__samples=0, data__held_out=0)


@both
@pytest.mark.parametrize(
    ("settings", "where", "repair"),
    [
        ({"train__engine": "native"}, "train.engine", ""),
        ({"train__neftune_alpha": 5.0}, "train.neftune_alpha", "train.neftune_alpha=null"),
        ({"train__label_smoothing": 0.1}, "train.label_smoothing", "train.label_smoothing=0"),
        ({"train__batch_size": 10}, "train.batch_size", "train.batch_size=8"),
        ({"sampling__num_generations": 1}, "sampling.num_generations", ""),
        ({"sampling__temperature": 0.0}, "sampling.temperature", ""),
        ({"sampling__top_p": 0.9}, "sampling.top_p", ""),
        ({"sampling__max_new_tokens": 256}, "sampling.max_new_tokens", ""),
        ({"data__max_prompt_length": 254}, "data.max_prompt_length", "data.max_prompt_length=250"),
        ({"data__max_length": 64}, "data.max_length", ""),
        ({"data__packing": True}, "data.packing", ""),
        ({"adapter__method": "pissa"}, "adapter.method", "adapter.method=lora"),
        ({"adapter__method": "full"}, "STAGE.beta", "STAGE.beta=0"),
        ({"STAGE__beta": -1.0}, "STAGE.beta", ""),
        ({"evaluate__exact_match": 3}, "evaluate.exact_match", ""),
        ({"rewards__sources": []}, "rewards.sources", "rewards.sources"),
        ({"rewards__sources": [{"function": "nowhere.py:f"}]}, "rewards.sources[0].function", ""),
        ({"train__engine_args": {"num_iterations": 2}}, "train.engine_args.num_iterations", ""),
        ({"train__engine_args": {"top_p": 0.9}}, "train.engine_args.top_p", ""),
        ({"train__engine_args": {"beta": 1.0}}, "train.engine_args.beta", ""),
    ],
)
def test_invalid_settings_are_rejected_before_writing(tune, tmp_path, stage, settings, where, repair):
    settings = {key.replace("STAGE", stage): value for key, value in settings.items()}
    where, repair = where.replace("STAGE", stage), repair.replace("STAGE", stage)
    with pytest.raises(UserError) as error:
        tune(stage, **settings)
    [problem] = [candidate for candidate in error.value.problems if candidate.where.split(" ")[0] == where]
    assert repair in problem.repair
    assert not (tmp_path / "run").exists()


def test_empty_prompt_file_is_reported(tune, tmp_path):
    (tmp_path / "none.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="no rows"):
        tune("rloo", data__source=str(tmp_path / "none.jsonl"))
