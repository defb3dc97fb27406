"""Rejection sampling as a training method: rounds of sampling, selection and fine-tuning; evaluation."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from finetune.training.supervised import SFT

from align.rejection.policies import RoundPolicies, round_folder, round_recipe
from align.rejection.sampling import CandidateSampler, round_prompt_indices
from align.rejection.selection import Candidate, best_per_prompt, eligible, mean_best_of_n, top_candidates
from align.rejection.settings import Settings
from align.rl.completions import check_rewards
from align.rl.prompts import PreparedPrompts, Prompts
from align.rl.rewards.loading import rewards_record
from align.rl.sampling import Sampling
from data_templates.segments import Message
from finetune.data.conversation import Conversation
from finetune.data.dataset import PreparedData, tokenize_conversations
from finetune.data.report import DataReport
from finetune.distributed import collectives
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.settings import DataSettings
from finetune.training import shared_steps
from finetune.training.context import RunContext
from finetune.training.generation import Completion
from finetune.training.generation_eval import GenerationEval, mean_grade
from finetune.training.metrics import EVAL_PREFIX, GOLD_PREFIX
from finetune.training.preflight.checks import CheckResult
from finetune.training.run_directory import CANDIDATES, SELECTED, RunDirectory
from finetune.training.samples import Samples, evenly_spaced, prompt_text
from finetune.training.save import file_sha256
from finetune.training.stage import run_stage
from finetune.training.text_encoding import TextEncoding

TRAIN_STREAM, EVAL_STREAM = 0, 1
"""Random streams of training and evaluation completions."""


@dataclass
class RejectionSampling:
    """Rounds of sampling, scoring, selecting and fine-tuning.

    Attributes:
        ctx: the run context.
        text: template and tokenizer.
        data: training and held-out prompts.
        policies: the policy of each round, and the rewards.
        selected: selected completions by round.
    """

    ctx: RunContext
    text: TextEncoding
    data: PreparedPrompts
    policies: RoundPolicies
    selected: dict[int, list[Candidate]] = field(default_factory=dict)

    @property
    def settings(self) -> Settings:
        """Return the recipe's settings."""
        settings = self.ctx.recipe.settings
        assert isinstance(settings, Settings)
        return settings

    @property
    def samples(self) -> Samples:
        """Return the sample prompts, answered before and after training."""
        return shared_steps.build_samples(self.ctx, self.text, self.data.prompts)

    @cached_property
    def generation_eval(self) -> GenerationEval:
        """Return the evaluation of greedy generations, before and after training."""
        return shared_steps.build_generation_eval(self.ctx, self.text, self.data.prompts)

    @property
    def rounds(self) -> range:
        """Return the round indices, from 1."""
        return range(1, self.settings.rejection.rounds + 1)

    def metadata(self) -> dict[str, Any]:
        """Return the metadata that run.json records before the first round, after all checks."""
        settings, policy = self.settings, self.policies.policy_for_round(1)
        num_prompts = len(self._round_prompts(1))
        max_length = max(self.data.train.lengths) + settings.sampling.max_new_tokens
        num_steps = shared_steps.num_optimizer_steps(self.ctx, num_prompts)
        # For its checks: invalid arguments of the rounds are reported before anything is sampled.
        shared_steps.engine_arguments(self.ctx, policy, longest=max_length, steps=num_steps)
        self.ctx.add_summary_metrics(self.generation_eval.summary)
        shared_steps.log_parameter_counts(self.ctx, policy)
        reward_check = check_rewards(self.policies.rewards, self.data)
        self.ctx.check(
            CheckResult("environment", self.ctx.describe_environment(policy.precision)), reward_check
        )
        amount = f"{num_prompts * settings.rejection.num_generations} completions of {num_prompts} prompts"
        self.ctx.log(f"{settings.rejection.rounds} round(s): sample {amount}, fine-tune on the best")
        metadata = shared_steps.policy_metadata(self.ctx, self.text, policy, self.data.report)
        return {**metadata, "rewards": rewards_record(settings.rewards)}

    def generate(self, prompts: Sequence[Sequence[Message]]) -> list[Completion]:
        """Generate greedily with the policy of the last finished round."""
        unfinished = (round_index for round_index in self.rounds if round_index not in self.selected)
        policy = self.policies.policy_for_round(next(unfinished, len(self.rounds) + 1))
        return shared_steps.generate_sharded(self.ctx, self.text, policy, prompts)

    def run_round(self, round_index: int) -> None:
        """Run a round: sample completions, select, fine-tune on the selected ones.

        Raises:
            UserError: a reward function failed on a completion, or no completion could be selected.
            Interrupted: a signal arrived; the same command resumes from there.
            NotFiniteError: loss, gradient or a reward is NaN or infinite.
        """
        sampler = self._build_sampler(self.data.train)
        with self.ctx.timed("drawing"):
            candidates = sampler.sample(
                self._round_prompts(round_index),
                lambda: self.policies.policy_for_round(round_index).model,
                seeds=[self.settings.train.seed, TRAIN_STREAM, round_index],
                store_prefix=self.ctx.run.path / CANDIDATES / str(round_index),
            )
        self.selected[round_index] = self._select(round_index, candidates)
        self._write_selected(round_index, candidates)
        rows = self._training_rows(round_index)
        entry = self._log_round(round_index, candidates) | {"rows": len(rows)}
        # `update` merges one level deep, and a resumed round has entries already.
        recorded = self.ctx.run.record.get("rounds", {}).get(str(round_index), {})
        self.ctx.run.update(rounds={str(round_index): {**recorded, **entry}})
        self.ctx.raise_if_interrupted(f"before training of round {round_index}")
        self._train_round(round_index, rows)

    def evaluate(self, round_index: int) -> None:
        """Evaluate on held-out prompts after a round (0: before training), unless recorded already."""
        held_out, run = self.data.held_out, self.ctx.run
        entry = run.record.get("rounds", {}).get(str(round_index), {})
        if held_out is not None and "eval/objective/reward" not in entry:
            entry = {**entry, **self._held_out_metrics(held_out, round_index)}
            run.update(rounds={str(round_index): entry})
        when = {0: "before", len(self.rounds): "after"}.get(round_index)
        if when is not None:
            # run.json has the held-out metrics twice: by round, and before and after training as for every
            # stage.
            metrics = {key: value for key, value in entry.items() if key.startswith(EVAL_PREFIX)}
            run.update(metrics={f"{key}_{when}": value for key, value in metrics.items()})
        self._write_metrics(round_index)

    def save(self) -> None:
        """Copy the weights of the last round into the run, and record their checksums.

        Raises:
            UserError: the files do not match the round's checksums.
        """
        # One process copies; all record the same checksums.
        files = collectives.broadcast_object(self._copy_last_round() if self.ctx.dist.is_main else {})
        self.ctx.run.update(files=files)
        self.ctx.check(CheckResult("saved", f"{', '.join(files)} from round {len(self.rounds)}"))

    def _copy_last_round(self) -> dict[str, str]:
        last = round_folder(self.ctx.run.path, len(self.rounds))
        name = "adapter" if (last / "adapter").is_dir() else "model"
        with self.ctx.run.atomic_folder(name) as folder:
            shutil.copytree(last / name, folder, dirs_exist_ok=True)
        files: dict[str, str] = RunDirectory(last, self.ctx.recipe, "").record["files"]
        mismatched = [
            file for file, checksum in files.items() if file_sha256(self.ctx.run.path / file) != checksum
        ]
        if mismatched:
            actual = f"checksum mismatch: {', '.join(mismatched)}"
            raise UserError(
                Problem(str(last), actual, "files as the round saved them", "start over with --force")
            )
        return files

    def _round_prompts(self, round_index: int) -> list[int]:
        settings = self.settings
        return round_prompt_indices(
            len(self.data.train), settings.rejection.prompts, round_index, seed=settings.train.seed
        )

    def _build_sampler(self, prompts: Prompts) -> CandidateSampler:
        sampling, ctx = self.settings.sampling, self.ctx
        parameters = Sampling.from_settings(
            ctx.hardware.device, sampling, stop_ids=self.text.encoder.stop_ids
        )
        return CandidateSampler(
            prompts,
            self.policies.rewards,
            self.text.encoder,
            parameters,
            self.settings.rejection.num_generations,
            ctx.log,
            ctx.raise_if_interrupted,
        )

    def _select(self, round_index: int, candidates: Sequence[Candidate]) -> list[Candidate]:
        rejection = self.settings.rejection
        keep_truncated = rejection.truncated == "train"
        eligible_candidates = eligible(
            candidates, min_reward=rejection.min_reward, keep_truncated=keep_truncated
        )
        if not eligible_candidates:
            num_ended = sum(candidate.ended_with_eos for candidate in candidates)
            # Both numbers tell which of the two conditions is too strict.
            best = max(candidate.reward for candidate in candidates)
            outcome = f"{num_ended} ended, best reward {best:.3g}"
            actual = f"round {round_index}: none of {len(candidates)} completions; {outcome}"
            repair = "raise sampling.max_new_tokens, or lower rejection.min_reward"
            raise UserError(Problem("rejection", actual, "completions to train on", repair))
        if rejection.keep == "best_of_n":
            return best_per_prompt(eligible_candidates)
        # A fraction of all completions of the round, not of the eligible ones.
        fraction = rejection.top_fraction or 1 / rejection.num_generations
        return top_candidates(eligible_candidates, max(1, round(fraction * len(candidates))))

    def _log_round(self, round_index: int, candidates: Sequence[Candidate]) -> dict[str, Any]:
        """Log what a round sampled and selected; return it for run.json."""
        selected = self.selected[round_index]
        entry = {
            "prompts": len(self._round_prompts(round_index)),
            "completions": len(candidates),
            "val/eos_rate": float(np.mean([candidate.ended_with_eos for candidate in candidates])),
            "objective/reward": float(np.mean([candidate.reward for candidate in candidates])),
            "chosen": len(selected),
            "objective/chosen_reward": float(np.mean([candidate.reward for candidate in selected])),
        }
        self.ctx.log(
            f"round {round_index}: mean reward {entry['objective/reward']:.3f} "
            f"over {entry['completions']} completions, {entry['objective/chosen_reward']:.3f} "
            f"over the {entry['chosen']} selected; EOS rate {entry['val/eos_rate']:.1%}"
        )
        return entry

    def _write_selected(self, round_index: int, candidates: Sequence[Candidate]) -> None:
        """Write ``selected.jsonl``: the entries of earlier rounds and of this one."""
        run = self.ctx.run
        # A round that runs again replaces its own entries.
        entries = [entry for entry in run.read_jsonl(SELECTED) if entry["round"] < round_index]
        rewards: dict[int, list[float]] = {}
        for candidate in candidates:
            rewards.setdefault(candidate.prompt_index, []).append(candidate.reward)
        for candidate in self.selected[round_index]:
            prompt, prompt_rewards = self.data.train[candidate.prompt_index], rewards[candidate.prompt_index]
            entry = {
                "prompt": prompt_text([*prompt.messages, Message("assistant", "")]),
                "reply": candidate.text,
                "reward": candidate.reward,
                "n": len(prompt_rewards),
                "mean": float(np.mean(prompt_rewards)),
                "round": round_index,
                "place": prompt.location,
            }
            has_several = len(candidate.by_source) > 1
            entries.append({**entry, "rewards": dict(candidate.by_source)} if has_several else entry)
        run.write_jsonl(SELECTED, entries)

    def _training_rows(self, round_index: int) -> list[Conversation]:
        """Return the training rows of a round, without duplicates across rounds."""
        first_round = 1 if self.settings.rejection.accumulate_rounds else round_index
        rows: dict[tuple[int, str], Conversation] = {}
        for past_round in range(first_round, round_index + 1):
            for candidate in self.selected[past_round]:
                prompt = self.data.train[candidate.prompt_index]
                messages = [*prompt.messages, Message("assistant", candidate.text)]
                location = f"{prompt.location}, sampled in round {past_round}"
                # A completion that several rounds sampled is trained on once, as that of the first round.
                rows.setdefault((candidate.prompt_index, candidate.text), Conversation(messages, location))
        return list(rows.values())

    def _train_round(self, round_index: int, rows: list[Conversation]) -> None:
        """Fine-tune on the rows of a round, or resume it."""
        ctx = self.ctx
        recipe = round_recipe(ctx.recipe, ctx.run.path, round_index)
        row_keys = [[list(map(str, row.text_key)), row.location] for row in rows]
        # The fingerprint includes the rows, so a round with other completions is another run.
        content = json.dumps([self.ctx.run.fingerprint, round_index, row_keys])
        fingerprint = hashlib.sha256(content.encode()).hexdigest()
        run = RunDirectory.open(recipe, fingerprint, force=False)
        if run.finished:
            return
        round_ctx = RunContext(recipe, run, ctx.console, ctx.command)
        round_ctx.init_distributed()
        with ctx.timed("train"):
            method = SFT(
                round_ctx,
                self.text,
                self._tokenize_rows(rows),
                policy=self.policies.policy_for_round(round_index),
            )
            run_stage(round_ctx, method)
        round_ctx.raise_if_interrupted(f"after training of round {round_index}")

    def _tokenize_rows(self, rows: list[Conversation]) -> PreparedData:
        # Earlier replies of a dialogue belong to the prompt: loss on the sampled one alone.
        data_settings = DataSettings(loss_on="last_assistant", overflow="drop", cache=False)
        report, held_out_report = DataReport(), DataReport()
        max_length = self.text.max_length
        return tokenize_conversations(
            rows,
            [],
            data_settings,
            self.text.encoder,
            max_length=max_length,
            reports=(report, held_out_report),
        )

    def _held_out_metrics(self, prompts: Prompts, round_index: int) -> dict[str, float]:
        num_generations = self.settings.rejection.num_generations
        with self.ctx.timed("held_out"):
            # The same seeds in every round: metrics differ because of the policy alone.
            candidates = self._build_sampler(prompts).sample(
                evenly_spaced(len(prompts), self.settings.evaluate.grader_rows),
                lambda: self.policies.policy_for_round(round_index + 1).model,
                seeds=[self.settings.train.seed, EVAL_STREAM],
                store_prefix=None,
            )
        rewards = np.array([candidate.reward for candidate in candidates])
        metrics = {
            "objective/reward": float(rewards.mean()),
            "objective/best_of_n_reward": mean_best_of_n(rewards.reshape(-1, num_generations)),
            "val/eos_rate": float(np.mean([candidate.ended_with_eos for candidate in candidates])),
        }
        if len(self.settings.rewards.sources) > 1:
            for name in self.policies.rewards.names:
                metrics[f"rewards/{name}"] = float(
                    np.mean([candidate.by_source[name] for candidate in candidates])
                )
        conversations = [
            [*prompts[candidate.prompt_index].messages, Message("assistant", candidate.text)]
            for candidate in candidates
        ]
        prompt_texts, texts = (
            [prompt_text(conversation) for conversation in conversations],
            [candidate.text for candidate in candidates],
        )
        for name, grader in self.generation_eval.graders.items():
            metrics[f"{GOLD_PREFIX}{name}"] = mean_grade(name, grader, prompt_texts, texts)
        return {f"{EVAL_PREFIX}{name}": value for name, value in metrics.items()}

    def _write_metrics(self, round_index: int) -> None:
        """Write ``metrics.jsonl`` up to a round: the steps of all rounds, concatenated."""
        run, rounds = self.ctx.run, self.ctx.run.record.get("rounds", {})
        curves = self.ctx.metric_spec.logged_keys
        entries = [{"step": 0, "epoch": 0.0, **_curve_values(rounds.get("0", {}), curves)}]
        for past_round in range(1, round_index + 1):
            round_run, step = (
                RunDirectory(round_folder(run.path, past_round), self.ctx.recipe, ""),
                entries[-1]["step"],
            )
            entries += [{**entry, "step": step + entry["step"]} for entry in round_run.metrics()]
            entries[-1] |= _curve_values(rounds[str(past_round)], curves)
        # Without held-out prompts nothing was measured at step 0.
        run.write_jsonl("metrics.jsonl", entries if len(entries[0]) > 2 else entries[1:])


def _curve_values(entry: dict[str, Any], curves: dict[str, str]) -> dict[str, Any]:
    """Return the values of a round's entry that are plotted as curves."""
    return {key: value for key, value in entry.items() if key in curves}
