"""TRL's side of `benchmarks.ppo`: TRL 1.10's experimental PPOTrainer, in an environment of its own.

`benchmarks.ppo` describes how to create it, prepares a folder, runs this with that interpreter from the
repository's root, and reads the last line of its output. The project is not installed there, only importable.
"""

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import torch
from datasets import Dataset
from peft import LoraConfig, inject_adapter_in_model
from transformers import (
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    PrinterCallback,
)

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # silences TRL's notice that the trainer will be removed

from trl.experimental.ppo import PPOConfig, PPOTrainer  # noqa: E402

from benchmarks.common import peak_memory_gib, reset_peak_memory  # noqa: E402

CONTENDERS = ("trl", "trl-policy-lora", "trl-best")
"""Full models; a `peft_config` for the policy, whose base then is the reference; LoRA on the value too."""


def lora_config(task: str | None) -> LoraConfig:
    """Return the LoRA config of all contenders that have one."""
    return LoraConfig(task_type=task, r=16, lora_alpha=32, target_modules="all-linear")


def load_scalar_model(folder: Path, dtype: torch.dtype) -> LlamaForSequenceClassification:
    """Return a separate model with a scalar head on the same base."""
    return LlamaForSequenceClassification.from_pretrained(folder / "model", num_labels=1, dtype=dtype)


def load_value_model(folder: Path, dtype: torch.dtype, *, adapted: bool) -> LlamaForSequenceClassification:
    """Return the value model: fully trained, or an adapter and the head."""
    model = load_scalar_model(folder, dtype)
    if adapted:
        model.model = inject_adapter_in_model(lora_config(None), model.model)
        assert model.score.weight.requires_grad
    return model


def build_trainer(folder: Path, work: dict[str, Any], contender: str, output: str) -> PPOTrainer:
    """Return TRL's trainer for the folder's work.json."""
    dtype = torch.bfloat16 if work["bfloat16"] else torch.float32
    policy = LlamaForCausalLM.from_pretrained(folder / "model", dtype=dtype)
    file = str(folder / "model" / "tokenizer.json")
    # Left padding: generation continues at the end of a row.
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=file, padding_side="left", **work["special_tokens"])
    prompts = Dataset.from_dict({"input_ids": work["prompts"]})
    return PPOTrainer(
        args=ppo_config(work, output),
        processing_class=tokenizer,
        model=policy,
        ref_model=None,
        reward_model=load_scalar_model(folder, dtype),
        value_model=load_value_model(folder, dtype, adapted=contender == "trl-best"),
        train_dataset=prompts,
        eval_dataset=prompts,
        peft_config=None if contender == "trl" else lora_config("CAUSAL_LM"),
    )


def ppo_config(work: dict[str, Any], output: str) -> PPOConfig:
    """Return TRL's config; everything else is its default, which is arXiv 2403.17031's.

    Without a stop token every episode has full length, and the rollout is one batch.
    """
    return PPOConfig(
        output_dir=output,
        total_episodes=work["episodes"],
        per_device_train_batch_size=work["rollout"],
        gradient_accumulation_steps=1,
        num_mini_batches=1,
        num_ppo_epochs=work["epochs"],
        response_length=work["new_tokens"],
        local_rollout_forward_batch_size=work["rollout"],
        learning_rate=work["learning_rate"],
        temperature=1.0,
        stop_token=None,
        num_sample_generations=0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        bf16=work["bfloat16"],
        use_cpu=not torch.cuda.is_available(),
        seed=0,
    )


def prompt_logps(trainer: PPOTrainer, prompts: list[list[int]]) -> list[float]:
    """Return log p(prompt) under the policy, for comparison with ours."""
    ids = torch.tensor(prompts, device=trainer.accelerator.device)
    with torch.no_grad():
        logps = trainer.policy_model(input_ids=ids).logits[:, :-1].float().log_softmax(-1)
    prompt_sums: list[float] = logps.gather(-1, ids[:, 1:, None]).sum((1, 2)).tolist()
    return prompt_sums


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@click.option("--contender", type=click.Choice(CONTENDERS), required=True)
def main(folder: Path, contender: str) -> None:
    """Train as FOLDER/work.json says, and print the measurements as one line of JSON."""
    work = json.loads((folder / "work.json").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as output:
        trainer = build_trainer(folder, work, contender, output)
        trainer.remove_callback(PrinterCallback)
        logps = prompt_logps(trainer, work["prompts"])
        reset_peak_memory()
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    measured = {
        "seconds": seconds,
        "peak_memory_gib": round(peak_memory_gib(), 3),
        "episodes": trainer.state.episode,
        "rollouts": trainer.state.global_step,
        "trainable": sum(weight.numel() for weight in trainer.model.parameters() if weight.requires_grad),
        "prompt_logps": logps,
    }
    click.echo(json.dumps(measured))


if __name__ == "__main__":
    main()
