"""Complete PPO runs: artifacts, learning, bit-exact resuming, rejected recipes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from align import cli
from align.ppo.actor_critic import load_ppo_models
from align.ppo.state import ROLLOUT_FILE, STATE_FILE
from data_templates.segments import Message
from finetune.distributed.interrupts import Interrupted
from finetune.recipe.errors import UserError
from finetune.recipe.recipe import Recipe, read_recipe
from finetune.training.context import RunContext
from finetune.training.loaded_model import load_finished_run
from finetune.training.loading import load_text_encoding
from finetune.training.recorder import Recorder
from finetune.training.result import Result
from finetune.training.run_directory import RunDirectory
from finetune.training.stage import run_stage

pytestmark = pytest.mark.filterwarnings("ignore")
Runs, Recipes = Callable[..., Result], Callable[..., Recipe]
REWARD_FUNCTIONS = """
def long(prompt, completion):
    return float(len(completion))

def alphabet(prompt, completion):
    return "hgfedcba".find(completion) / 7 if completion in set("abcdefgh") else 0

def broken(prompt, completion):
    return 1 / 0

def nothing(prompt, completion):
    return float("nan")
"""
RECIPE = """\
stage: ppo
model: {{base: {base}, precision: float32}}
data: {{source: {rows}, held_out: 4}}
adapter: {{method: lora, rank: 4, dropout: 0.1}}
train: {{max_steps: 6, batch_size: 4, micro_batch_size: 3, learning_rate: 1e-2, warmup: 0}}
evaluate: {{samples: 2, max_new_tokens: 4}}
rewards: {{sources: "{judges}:long"}}
sampling: {{max_new_tokens: 5}}
ppo: {{rollout_size: 8, ppo_epochs: 2, missing_eos_reward: null}}
"""
BY_STEP = {"loss", "loss/policy", "loss/value", "policy/ratio", "policy/clip_frac", "policy/approx_kl"}
BY_ROLLOUT = {
    *("objective/reward", "objective/kl_per_completion", "policy/entropy", "val/completion_length"),
    *("val/eos_rate", "objective/shaped_reward", "objective/kl_coef", "time/generation"),
}


@pytest.fixture(scope="session")
def judges(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("judges") / "judges.py"
    path.write_text(REWARD_FUNCTIONS)
    return path


@pytest.fixture(scope="session")
def ppo_file(tmp_path_factory: pytest.TempPathFactory, base_folder: Path, judges: Path) -> Path:
    folder = tmp_path_factory.mktemp("ppo")
    rows = [{"prompt": f"Add the numbers.{' Please.' * (i % 4)} {i}"} for i in range(16)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = RECIPE.format(base=base_folder, rows=folder / "prompts.jsonl", judges=judges)
    (folder / "good.yaml").write_text(text)
    return folder / "good.yaml"


@pytest.fixture
def recipe(ppo_file: Path, tmp_path: Path) -> Recipes:
    def make(name: str = "run", **settings: Any) -> Recipe:
        given = {key.replace("__", "."): value for key, value in settings.items()}
        return read_recipe("ppo", str(ppo_file), shortcuts=given, out=tmp_path / name)

    return make


@pytest.fixture
def reinforce(recipe: Recipes) -> Runs:
    def run(name: str = "run", **settings: Any) -> Result:
        return run_stage(recipe(name, **settings), Console(quiet=True), command="a test")

    return run


def test_a_grader_s_file_is_executed_once(reinforce: Runs, tmp_path: Path) -> None:
    log, file = tmp_path / "executed", tmp_path / "grader.py"
    file.write_text(
        f"open({str(log)!r}, 'a').write('executed\\n')\n\n\ndef judge(prompt, completion):\n    return 1.0\n"
    )
    result = reinforce(train__max_steps=1, evaluate__graders={"judge": f"{file}:judge"}, evaluate__samples=0)
    assert log.read_text() == "executed\n"
    assert result.record["metrics"]["eval/gold/judge_before"] == 1.0


@pytest.mark.plots
def test_ppo_run_writes_all_artifacts(reinforce: Runs) -> None:
    result = reinforce(train__evaluate_every=4)
    names = {path.name for path in result.directory.iterdir()}
    assert {"recipe.yaml", "run.json", "metrics.jsonl", "samples.jsonl", "report.html", "adapter"} <= names
    steps = [line for line in result.metrics if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert all(line.keys() >= BY_STEP for line in steps)
    rollouts = [line for line in steps if "objective/reward" in line]
    assert [line["step"] for line in rollouts] == [1, 5] and all(
        line.keys() >= BY_ROLLOUT for line in rollouts
    )
    assert (
        rollouts[0]["policy/ratio"] == 1.0
        and rollouts[0]["objective/kl_per_completion"] == 0.0
        and rollouts[0]["policy/clip_frac"] == 0.0
    )
    assert rollouts[1]["objective/kl_per_completion"] != 0.0
    assert [line["step"] for line in result.metrics if "eval/objective/reward" in line] == [4, 6]
    metrics = result.record["metrics"]
    assert (
        metrics["eval/objective/kl_per_completion_before"] == 0.0
        and metrics["eval/objective/reward_before"] > 0
    )
    assert {
        "eval/objective/reward_after",
        "objective/reward_after",
        "policy/clip_frac_after",
    } <= metrics.keys()
    [ratio] = [result_entry for result_entry in result.record["preflight"] if result_entry["name"] == "ratio"]
    assert "exactly 1" in ratio["detail"]
    assert result.record["rewards"][0]["name"] == "long" and result.record["diagnostics"]
    assert "KL to the reference" in (result.directory / "report.html").read_text(encoding="utf-8")
    assert load_finished_run(result.directory).model.training is False


STATEFUL_SETTINGS = {
    "ppo__adaptive_kl_target": 0.5,
    "ppo__kl_horizon": 64,
    "ppo__normalize_rewards": "running",
    "train__checkpoint_every": 1,
}


@pytest.fixture(scope="module")
def uninterrupted(ppo_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """Return an uninterrupted run."""
    given = {key.replace("__", "."): value for key, value in STATEFUL_SETTINGS.items()}
    out = tmp_path_factory.mktemp("whole") / "run"
    return run_stage(
        read_recipe("ppo", str(ppo_file), shortcuts=given, out=out), Console(quiet=True), command="a test"
    )


@pytest.mark.parametrize("stop", [1, 3, 4, 5])
def test_pain_06_ppo_resumes_bit_for_bit_from_any_step(
    uninterrupted: Result, reinforce: Runs, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted within a rollout and between two; KL controller and reward statistics resume too."""

    original = Recorder.on_step_end

    def signalled(self: Recorder, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == stop:
            self.signal_flag.signal_name = "SIGTERM"
        original(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "on_step_end", signalled)
        with pytest.raises(Interrupted):
            reinforce("cut", **STATEFUL_SETTINGS)
    resumed = reinforce("cut", **STATEFUL_SETTINGS)
    rollouts = [result.directory / "rollouts.jsonl" for result in (uninterrupted, resumed)]
    assert rollouts[0].read_text() == rollouts[1].read_text(), "each rollout once"
    assert resumed.record["files"] == uninterrupted.record["files"]
    compared = {"step", *BY_STEP, *BY_ROLLOUT} - {"time/generation"}
    for expected, actual in zip(uninterrupted.metrics, resumed.metrics, strict=True):
        assert {k: expected[k] for k in compared & expected.keys()} == {
            k: actual[k] for k in compared & expected.keys()
        }
    last = resumed.directory / "checkpoints" / "checkpoint-6"
    assert (last / STATE_FILE).is_file() and (last / ROLLOUT_FILE).is_file()


def test_micro_batch_size_does_not_change_the_loss(reinforce: Runs) -> None:
    one, four = (
        [
            line["loss"]
            for line in reinforce(f"cut-{size}", train__micro_batch_size=size, train__max_steps=4).metrics
            if "loss" in line
        ]
        for size in (4, 1)
    )
    assert one == pytest.approx(four, rel=1e-3, abs=1e-5)


def test_target_kl_ends_the_updates_of_a_rollout(reinforce: Runs) -> None:
    result = reinforce(ppo__target_kl=1e-9, data__held_out=0)
    rollouts = [line["step"] for line in result.metrics if "objective/reward" in line]
    assert rollouts == [1, 3, 5], "the first step of a rollout has approx_kl 0, the second has not"


WORDS = "hgfedcba"
"""Completions of the bandit, from worst to best."""


@pytest.fixture
def bandit(tmp_path: Path) -> Path:
    """Return a folder with a random model of eight words."""
    tokens = ["<s>", "</s>", "<pad>", "<unk>", *sorted(WORDS)]
    words = Tokenizer(WordLevel({word: index for index, word in enumerate(tokens)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"})
    tokenizer.save_pretrained(tmp_path / "bandit")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, vocab_size=len(tokens), max_position_embeddings=64, initializer_range=0.2)
    config.bos_token_id, config.eos_token_id = 0, 1
    LlamaForCausalLM(config).save_pretrained(tmp_path / "bandit")
    return tmp_path / "bandit"


def test_known_optimum_of_a_bandit_is_reached(reinforce: Runs, judges: Path, bandit: Path) -> None:
    """Completions of one word with rewards r: pi* = ref exp(r / beta) / Z (arXiv 1909.08593, equation 2)."""
    beta = 0.2
    result = reinforce(
        model__base=str(bandit),
        data__source=[{"prompt": "a b c"}],
        data__template="plain",
        data__held_out=0,
        rewards__sources=f"{judges}:alphabet",
        sampling__max_new_tokens=1,
        ppo__rollout_size=256,
        ppo__kl_coef=beta,
        ppo__value_coef=1.0,
        train__batch_size=64,
        train__micro_batch_size=64,
        train__max_steps=240,
        train__learning_rate=1e-3,
        train__lr_schedule="linear",
        train__checkpoint_every=240,
        evaluate__samples=0,
        adapter__dropout=0.0,
    )
    tuned = load_finished_run(result.directory)
    ids = torch.tensor([tuned.encoder.encode_prompt([Message("user", "a b c")])])
    completions = [tuned.encoder.decode_reply([token]) for token in range(tuned.model.config.vocab_size)]
    rewards = torch.tensor([WORDS.index(word) / 7 if word in set(WORDS) else 0.0 for word in completions])
    with torch.no_grad():
        policy = tuned.model(input_ids=ids).logits[0, -1].softmax(-1)
        with tuned.model.disable_adapter():
            reference = tuned.model(input_ids=ids).logits[0, -1].softmax(-1)
    optimum = (reference * (rewards / beta).exp()) / (reference * (rewards / beta).exp()).sum()
    variation = [0.5 * float((one - optimum).abs().sum()) for one in (reference, policy)]
    assert variation[0] > 0.3 and variation[1] < 0.08  # measured: 0.457 and 0.029
    assert float(policy @ rewards) == pytest.approx(float(optimum @ rewards), abs=0.05)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rewards__sources": []}, ["rewards.sources", "no reward is given"]),
        ({"ppo__rollout_size": 6}, ["ppo.rollout_size", "6", "ppo.rollout_size=4"]),
        (
            {"ppo__value_init": "reward"},
            ["ppo.value_init", "no source is a reward model", "value_init=policy"],
        ),
        ({"pretraining__weight": 1.0}, ["pretraining.source"]),
        ({"ppo__adaptive_kl_target": 1.0, "ppo__kl_horizon": 1}, ["ppo.kl_horizon", "a fifth"]),
        ({"ppo__adaptive_kl_target": 1.0, "ppo__kl_coef": 0.0}, ["ppo.kl_coef", "the controller multiplies"]),
        ({"train__engine": "trl"}, ["train.engine", "native"]),
        ({"train__evaluate_every": 2, "data__held_out": 0}, ["train.evaluate_every", "held-out"]),
        ({"train__neftune_alpha": 5.0}, ["train.neftune_alpha"]),
    ],
)
def test_invalid_settings_are_reported_before_loading(
    recipe: Recipes, settings: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    with pytest.raises(UserError) as error:
        recipe(**settings)
    assert len(error.value.problems) == 1
    assert all(word in str(error.value) for word in words), str(error.value)
    assert not (tmp_path / "run").exists()


def test_prompt_and_completion_must_fit_the_context(reinforce: Runs, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sampling\.max_new_tokens.*context length of 256"):
        reinforce(sampling__max_new_tokens=255)
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.parametrize(("name", "words"), [("broken", "ZeroDivisionError"), ("nothing", "nan")])
def test_failing_reward_function_is_named(reinforce: Runs, judges: Path, name: str, words: str) -> None:
    with pytest.raises(UserError) as error:
        reinforce(rewards__sources=f"{judges}:{name}")
    assert name in str(error.value) and words in str(error.value)


@pytest.mark.parametrize("method", ["pissa", "layernorm", "full"])
def test_value_model_has_the_base_weights_for_every_policy_adapter(
    recipe: Recipes, base_folder: Path, method: str
) -> None:
    method_recipe = (
        recipe(adapter__method=method, adapter__rank=4)
        if method == "pissa"
        else recipe(adapter__method=method)
    )
    ctx = RunContext(
        method_recipe, RunDirectory.of(method_recipe, force=False), Console(quiet=True), "a test"
    )
    models = load_ppo_models(ctx, load_text_encoding(ctx))
    with torch.no_grad():
        for weight in models.policy.model.parameters():
            if weight.requires_grad:
                weight.add_(1.0)
    saved = load_file(base_folder / "model.safetensors")
    value_params = dict(models.actor_critic.value.named_parameters())
    names = [name for name in value_params if "q_proj" in name and "lora" not in name]
    assert len(names) == 2
    for name in names:
        source = name.rpartition("model.")[2].replace("base_layer.", "")
        assert torch.equal(value_params[name], saved[f"model.{source}"]), name


def test_cli_reports_unknown_key(
    ppo_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["llm-align", "ppo", str(ppo_file), "ppo.clip_rang=0.1"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2 and "did you mean 'clip_range'?" in capsys.readouterr().err
