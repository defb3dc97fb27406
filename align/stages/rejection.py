r"""Rejection sampling (best-of-n): samples completions, scores them, and fine-tunes on the best ones.

RAFT (Dong et al. 2023, arXiv 2304.06767) and Llama 2's rejection sampling (Touvron et al. 2023,
arXiv 2307.09288, section 3.2.3): y* = argmax_k r(x, y_k) of n completions y_k ~ pi(. | x), then supervised
fine-tuning on (x, y*); the next round samples from the fine-tuned policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from align.rejection.settings import RULES as RULES
from align.rejection.settings import Settings

if TYPE_CHECKING:
    from align.rejection.rounds import RoundPolicies
    from align.rejection.sampling import CandidateSampler
    from align.rejection.selection import Candidate
    from align.rl.prompts import PreparedPrompts, Prompts
    from data_templates.segments import Message
    from finetune.training.context import RunContext
    from finetune.training.generation import Completion
    from finetune.training.generation_eval import Graders
    from finetune.training.loaded_model import LoadedModel
    from finetune.training.metric_specs import MetricSpec, When
    from finetune.training.model import TextEncoding
    from finetune.training.samples import GenerateFn

PUBLIC = "llama2-chat"
"""Default recipe for a base other than the bundled one."""
TRAIN_STREAM, EVAL_STREAM = 0, 1
"""Random streams of training and evaluation completions."""


def run(ctx: RunContext[Settings]) -> None:
    """Sample, select and fine-tune, round after round; evaluate before the first round and after each.

    Raises:
        UserError: invalid input, before anything is written; or a reward function failed on a completion, or
            no completion could be selected.
        Interrupted: a signal arrived; completions are stored, a checkpoint is saved.
        NotFiniteError: loss, gradient or a reward is NaN or infinite.
    """
    from align.rejection.diagnostics import diagnose_rejection
    from align.rejection.rounds import last_round, load_round_policies, save_last_round
    from align.rl.prompts import load_prompts
    from align.rl.rollout_log import equal_rewards_finding
    from finetune.training.generation_eval import GenerationEvals
    from finetune.training.held_out_file import reward_change
    from finetune.training.loading import load_text_encoding
    from finetune.training.stage import report_findings
    from finetune.training.suite_evals import SuiteEvals

    settings = ctx.settings
    text = load_text_encoding(ctx)
    data = load_prompts(ctx, settings.data, text, max_new_tokens=settings.sampling.max_new_tokens)
    policies = load_round_policies(ctx, text, data.columns)
    evals = GenerationEvals.load(settings, text.encoder, data.prompts)
    suites = SuiteEvals.load(settings.evaluate.suites)
    num_rounds = last_round(ctx)
    method = RejectionSampling(ctx, text, data, policies, evals.graded.graders, num_rounds)
    metadata = method.prepare()
    for note in evals.notes:
        ctx.log(note)
    with ctx.recorded(metadata, method.metric_spec.with_summary({**evals.summary, **suites.summary})):
        evals.run(ctx.run, method.generate_with(1), "before")
        suites.record(ctx.run, lambda: method.loaded_model(1), "before")
        method.evaluate(0)
        for round_index in range(1, num_rounds + 1):
            method.run_round(round_index)
            method.evaluate(round_index)
        save_last_round(ctx, num_rounds)
        evals.run(ctx.run, method.generate_with(num_rounds + 1), "after")
        suites.record(ctx.run, lambda: method.loaded_model(num_rounds + 1), "after")
        equal = equal_rewards_finding(ctx.run, policies.rewards.names)
        # With equal rewards nothing else has a cause of its own.
        findings = diagnose_rejection(reward_change(ctx.run)) if equal is None else [equal]
        report_findings(ctx, method.metric_spec, findings)


@dataclass(frozen=True)
class RejectionSampling:
    """Rounds of sampling, scoring, selecting and fine-tuning.

    Attributes:
        ctx: the run context.
        text: template and tokenizer.
        data: training and held-out prompts.
        policies: the policy of each round, and the rewards.
        graders: grade the held-out completions.
        num_rounds: the rounds of this run; fewer than the recipe's if it ends early.
        selected: selected completions by round.
    """

    ctx: RunContext[Settings]
    text: TextEncoding
    data: PreparedPrompts
    policies: RoundPolicies
    graders: Graders
    num_rounds: int
    selected: dict[int, list[Candidate]] = field(default_factory=dict)

    @property
    def metric_spec(self) -> MetricSpec:
        from align.rejection.diagnostics import rejection_metric_spec

        return rejection_metric_spec(self.ctx.settings)

    def prepare(self) -> dict[str, Any]:
        """Check the rounds' arguments and the rewards; return the metadata of run.json.

        Raises:
            UserError: the engine refuses an argument, or a reward fails on an empty completion.
        """
        from align.rl.completions import check_rewards
        from align.rl.rewards.loading import rewards_record
        from finetune.training.arguments import num_optimizer_steps, resolve_arguments
        from finetune.training.held_out_file import compact_locations
        from finetune.training.stage import check_policy, policy_metadata

        ctx, settings, policy = self.ctx, self.ctx.settings, self.policies.policy_for_round(1)
        num_prompts = len(self._round_prompts(1))
        longest = max(self.data.train.lengths) + settings.sampling.max_new_tokens
        # For its checks: invalid arguments of the rounds are reported before anything is sampled.
        resolve_arguments(
            ctx, policy, longest=longest, steps=num_optimizer_steps(settings.train, num_prompts)
        )
        check_policy(ctx, policy)
        ctx.check(check_rewards(self.policies.rewards, self.data))
        amount = f"{num_prompts * settings.rejection.num_generations} completions of {num_prompts} prompts"
        ctx.log(f"{settings.rejection.rounds} round(s): sample {amount}, fine-tune on the best")
        metadata = policy_metadata(ctx, self.text, policy, self.data.report)
        if self.data.held_out is not None:
            metadata["data"]["held_out_rows"] = compact_locations(self.data.held_out.locations)
        return {**metadata, "rewards": rewards_record(settings.rewards)}

    def generate_with(self, round_index: int) -> GenerateFn:
        """Return a function that generates greedily with the policy at the start of a round."""
        from finetune.training.generation import generate_sharded

        def generate(prompts: Sequence[Sequence[Message]]) -> list[Completion]:
            policy = self.policies.policy_for_round(round_index)
            return generate_sharded(self.ctx, self.text, policy, prompts)

        return generate

    def loaded_model(self, round_index: int) -> LoadedModel:
        """Return the policy at the start of a round, for suites."""
        from finetune.training.loaded_model import LoadedModel

        policy = self.policies.policy_for_round(round_index)
        return LoadedModel(policy.model, self.text.encoder, self.text.context, policy.precision)

    def run_round(self, round_index: int) -> None:
        """Run a round: sample n completions per prompt, select the best, fine-tune on them.

        Raises:
            UserError: a reward function failed on a completion, or no completion could be selected.
            Interrupted: a signal arrived; the same command resumes from there.
            NotFiniteError: loss, gradient or a reward is NaN or infinite.
        """
        from align.rejection.diagnostics import write_rollouts, write_selected
        from align.rejection.rounds import train_round, training_rows
        from align.rejection.selection import select_candidates

        ctx, prompts, settings = self.ctx, self.data.train, self.ctx.settings.rejection
        candidates = self._sample_round(round_index)
        selected = select_candidates(candidates, settings, round_index=round_index)
        self.selected[round_index] = selected
        write_rollouts(ctx.run, prompts, candidates, round_index=round_index)
        write_selected(ctx.run, prompts, candidates, selected, round_index=round_index)
        # Llama 2: with the last round's completions alone, some abilities were forgotten.
        first_round = 1 if settings.accumulate_rounds else round_index
        rows = training_rows(prompts, self.selected, range(first_round, round_index + 1))
        self._record_round(round_index, candidates, num_rows=len(rows))
        ctx.raise_if_interrupted(f"before training of round {round_index}")
        train_round(ctx, self.text, self.policies, rows, round_index=round_index)

    def evaluate(self, round_index: int) -> None:
        """Evaluate on held-out prompts after a round (0: before training), unless recorded already."""
        from align.rejection.diagnostics import write_metrics
        from finetune.training.metrics import EVAL_PREFIX

        held_out, run = self.data.held_out, self.ctx.run
        entry = run.record.get("rounds", {}).get(str(round_index), {})
        last = self.num_rounds
        when: When | None = "before" if round_index == 0 else "after" if round_index == last else None
        if held_out is not None and "eval/objective/reward" not in entry:
            metrics = self._held_out_metrics(held_out, round_index, when)
            entry = {**entry, **{f"{EVAL_PREFIX}{name}": value for name, value in metrics.items()}}
            run.update(rounds={str(round_index): entry})
        if when is not None:
            # run.json has the held-out metrics twice: by round, and before and after training as for every
            # stage.
            metrics = {key: value for key, value in entry.items() if key.startswith(EVAL_PREFIX)}
            run.update(metrics={f"{key}_{when}": value for key, value in metrics.items()})
        write_metrics(run, self.metric_spec, round_index=round_index)

    def _round_prompts(self, round_index: int) -> list[int]:
        from align.rejection.sampling import round_prompt_indices

        per_round, seed = self.ctx.settings.rejection.prompts, self.ctx.settings.train.seed
        return round_prompt_indices(len(self.data.train), per_round, round_index, seed=seed)

    def _sample_round(self, round_index: int) -> list[Candidate]:
        """Sample completions of the round's prompts from its policy; stored ones are read."""
        from finetune.training.run_directory import CANDIDATES

        with self.ctx.timed("drawing"):
            return self._build_sampler(self.data.train).sample(
                self._round_prompts(round_index),
                lambda: self.policies.policy_for_round(round_index).model,
                seeds=[self.ctx.settings.train.seed, TRAIN_STREAM, round_index],
                store_prefix=self.ctx.run.path / CANDIDATES / str(round_index),
            )

    def _held_out_metrics(self, prompts: Prompts, round_index: int, when: When | None) -> dict[str, float]:
        from align.rejection.diagnostics import held_out_metrics
        from finetune.training.held_out_file import write_graded
        from finetune.training.samples import evenly_spaced

        settings, reward_names = self.ctx.settings, self.policies.rewards.names
        with self.ctx.timed("held_out"):
            # The same seeds in every round: metrics differ because of the policy alone.
            candidates = self._build_sampler(prompts).sample(
                evenly_spaced(len(prompts), settings.evaluate.grader_rows),
                lambda: self.policies.policy_for_round(round_index + 1).model,
                seeds=[settings.train.seed, EVAL_STREAM],
                store_prefix=None,
            )
        return held_out_metrics(
            candidates,
            prompts,
            num_generations=settings.rejection.num_generations,
            reward_names=reward_names if len(settings.rewards.sources) > 1 else [],
            graders=self.graders,
            keep=partial(write_graded, self.ctx.run, "rewards", when) if when is not None else None,
        )

    def _build_sampler(self, prompts: Prompts) -> CandidateSampler:
        from align.rejection.sampling import CandidateSampler
        from align.rl.sampling import Sampling

        ctx, settings, encoder = self.ctx, self.ctx.settings, self.text.encoder
        sampling = Sampling.from_settings(ctx.hardware.device, settings.sampling, stop_ids=encoder.stop_ids)
        return CandidateSampler(
            prompts,
            self.policies.rewards,
            encoder,
            sampling,
            settings.rejection.num_generations,
            ctx.log,
            ctx.raise_if_interrupted,
        )

    def _record_round(self, round_index: int, candidates: Sequence[Candidate], *, num_rows: int) -> None:
        """Log what a round sampled and selected, and add it to run.json."""
        from align.rejection.diagnostics import check_equal_rewards, round_metrics
        from align.rl.first_completions import check_endings

        entry = {
            "prompts": len(self._round_prompts(round_index)),
            **round_metrics(candidates, self.selected[round_index]),
            "rows": num_rows,
        }
        self.ctx.log(
            f"round {round_index}: mean reward {entry['objective/reward']:.3f} "
            f"over {entry['completions']} completions, {entry['objective/chosen_reward']:.3f} "
            f"over the {entry['chosen']} selected; EOS rate {entry['val/eos_rate']:.1%}"
        )
        self.ctx.check(
            *check_endings(
                [candidate.ended_with_eos for candidate in candidates],
                self.ctx.settings.sampling.max_new_tokens,
            ),
            *check_equal_rewards(entry["objective/frac_reward_zero_std"], self.policies.rewards.names),
        )
        # `update` merges one level deep, and a resumed round has entries already.
        recorded = self.ctx.run.record.get("rounds", {}).get(str(round_index), {})
        self.ctx.run.update(rounds={str(round_index): {**recorded, **entry}})
