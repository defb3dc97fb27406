"""Rejection sampling as a training method: rounds of sampling, selection and fine-tuning; evaluation."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from align.rejection.choosing import Reply, best_of_each, best_of_n, eligible, top_share
from align.rejection.drawing import Drawing, prompts_of_round
from align.rejection.policies import Policies, round_folder, round_recipe
from align.rejection.settings import Settings
from align.rejection.watched import GOLD, HELD_OUT
from align.rl.prompts import PreparedPrompts, Prompts
from align.rl.replies import try_rewards
from align.rl.rewards.loading import rewards_record
from align.rl.rollout import Sampling
from data_templates._segments import Message
from finetune.data.conversation import Conversation
from finetune.data.dataset import Prepared, prepare_gathered
from finetune.data.report import DataReport
from finetune.recipe.errors import Problem, UserError
from finetune.recipe.settings import DataSettings
from finetune.training import processes, tuning
from finetune.training.behaviour import Behaviour, mean_judgement
from finetune.training.generate import Reply as Answered
from finetune.training.job import Job
from finetune.training.preflight.ticks import Tick
from finetune.training.run_directory import CHOSEN, DRAWN, RunDirectory
from finetune.training.samples import Samples, question_of, spread
from finetune.training.save import sha256
from finetune.training.supervised import Supervised
from finetune.training.text import Text
from finetune.training.tune import carry_out

TRAINING, MEASURING = 0, 1
"""Random streams of training and evaluation completions."""


@dataclass
class RejectionTuning:
    """Rounds of sampling, scoring, selecting and fine-tuning.

    Attributes:
        ctx: the run context.
        text: template and tokenizer.
        data: training and held-out prompts.
        policies: the policy of each round, and the rewards.
        selected: selected completions by round.
    """

    job: Job
    text: Text
    data: PreparedPrompts
    policies: Policies
    chosen: dict[int, list[Reply]] = field(default_factory=dict)

    @property
    def settings(self) -> Settings:
        """Return the recipe's settings."""
        settings = self.job.recipe.settings
        assert isinstance(settings, Settings)
        return settings

    @property
    def samples(self) -> Samples:
        """Return the sample prompts, answered before and after training."""
        return tuning.samples_of(self.job, self.text, self.data.conversations)

    @cached_property
    def behaviour(self) -> Behaviour:
        """Return the evaluation of greedy generations, before and after training."""
        return tuning.behaviour_of(self.job, self.text, self.data.conversations)

    @property
    def rounds(self) -> range:
        """Return the round indices, from 1."""
        return range(1, self.settings.rejection.rounds + 1)

    def facts(self) -> dict[str, Any]:
        """Return the metadata that run.json records before the first round, after all checks."""
        settings, policy = self.settings, self.policies.before(1)
        count = len(self._numbers(1))
        longest = max(self.data.train.lengths) + settings.sampling.max_new_tokens
        steps = tuning.optimizer_steps(self.job, count)
        # For its checks: invalid arguments of the rounds are reported before anything is sampled.
        tuning.engine_arguments(self.job, policy, longest=longest, steps=steps)
        self.job.watch(self.behaviour.numbers)
        tuning.say_parameters(self.job, policy)
        tried = try_rewards(self.policies.rewards, self.data)
        self.job.check(Tick("environment", self.job.environment(policy.precision)), tried)
        drawn = f"{count * settings.rejection.samples} completions of {count} prompts"
        self.job.say(f"{settings.rejection.rounds} round(s): sample {drawn}, fine-tune on the best")
        facts = tuning.policy_facts(self.job, self.text, policy, self.data.report)
        return {**facts, "rewards": rewards_record(settings.reward)}

    def answer(self, prompts: Sequence[Sequence[Message]]) -> list[Answered]:
        """Generate greedily with the policy of the last finished round."""
        finished = (number for number in self.rounds if number not in self.chosen)
        policy = self.policies.before(next(finished, len(self.rounds) + 1))
        return tuning.replies(self.job, self.text, policy, prompts)

    def round(self, number: int) -> None:
        """Run a round: sample completions, select, fine-tune on the selected ones.

        Raises:
            UserError: a reward function failed on a completion, or no completion could be selected.
            Interrupted: a signal arrived; the same command resumes from there.
            NotFiniteError: loss, gradient or a reward is NaN or infinite.
        """
        drawing = self._drawing(self.data.train)
        with self.job.timed("drawing"):
            replies = drawing.draw(
                self._numbers(number),
                lambda: self.policies.before(number).model,
                seeds=[self.settings.train.seed, TRAINING, number],
                keep=self.job.run.path / DRAWN / str(number),
            )
        self.chosen[number] = self._choose(number, replies)
        self._write_chosen(number, replies)
        rows = self._rows(number)
        entry = self._told(number, replies) | {"rows": len(rows)}
        before = self.job.run.record.get("rounds", {}).get(str(number), {})
        self.job.run.update(rounds={str(number): {**before, **entry}})
        self.job.stop_if_asked(f"before training of round {number}")
        self._learn(number, rows)

    def measure(self, number: int) -> None:
        """Evaluate on held-out prompts after a round (0: before training), unless recorded already."""
        held_out, run = self.data.held_out, self.job.run
        entry = run.record.get("rounds", {}).get(str(number), {})
        if held_out is not None and "held_out_reward" not in entry:
            entry = {**entry, **self._measured(held_out, number)}
            run.update(rounds={str(number): entry})
        when = {0: "before", len(self.rounds): "after"}.get(number)
        if when is not None:
            found = {key: value for key, value in entry.items() if key.startswith(HELD_OUT)}
            run.update(metrics={f"{key}_{when}": value for key, value in found.items()})
        self._write_metrics(number)

    def save(self) -> None:
        """Copy the weights of the last round into the run, and record their checksums.

        Raises:
            UserError: the files do not match the round's checksums.
        """
        files = processes.from_main(self._taken_over() if self.job.world.main else {})
        self.job.run.update(files=files)
        self.job.check(Tick("saved", f"{', '.join(files)} from round {len(self.rounds)}"))

    def _taken_over(self) -> dict[str, str]:
        last = round_folder(self.job.run.path, len(self.rounds))
        name = "adapter" if (last / "adapter").is_dir() else "model"
        with self.job.run.replacing(name) as folder:
            shutil.copytree(last / name, folder, dirs_exist_ok=True)
        files: dict[str, str] = RunDirectory(last, self.job.recipe, "").record["files"]
        wrong = [file for file, checksum in files.items() if sha256(self.job.run.path / file) != checksum]
        if wrong:
            found = f"checksum mismatch: {', '.join(wrong)}"
            raise UserError(
                Problem(str(last), found, "files as the round saved them", "start over with --force")
            )
        return files

    def _numbers(self, number: int) -> list[int]:
        settings = self.settings
        return prompts_of_round(
            len(self.data.train), settings.rejection.prompts, number, seed=settings.train.seed
        )

    def _drawing(self, prompts: Prompts) -> Drawing:
        sampling, job = self.settings.sampling, self.job
        how = Sampling.on(job.hardware.device, sampling, stop_ids=self.text.encoder.stop_ids)
        return Drawing(
            prompts,
            self.policies.rewards,
            self.text.encoder,
            how,
            self.settings.rejection.samples,
            job.say,
            job.stop_if_asked,
        )

    def _choose(self, number: int, replies: Sequence[Reply]) -> list[Reply]:
        rejection = self.settings.rejection
        learn = rejection.unfinished == "learn"
        fit = eligible(replies, above=rejection.above, unfinished=learn)
        if not fit:
            ended = sum(reply.ended for reply in replies)
            best = max(reply.reward for reply in replies)
            found = (
                f"round {number}: none of {len(replies)} completions; {ended} ended, best reward {best:.3g}"
            )
            repair = "raise sampling.max_new_tokens, or lower rejection.above"
            raise UserError(Problem("rejection", found, "completions to train on", repair))
        if rejection.keep == "best":
            return best_of_each(fit)
        # A fraction of all completions of the round, not of the eligible ones.
        share = rejection.share or 1 / rejection.samples
        return top_share(fit, max(1, round(share * len(replies))))

    def _told(self, number: int, replies: Sequence[Reply]) -> dict[str, Any]:
        """Log what a round sampled and selected; return it for run.json."""
        chosen = self.chosen[number]
        entry = {
            "prompts": len(self._numbers(number)),
            "replies": len(replies),
            "ends": float(np.mean([reply.ended for reply in replies])),
            "reward": float(np.mean([reply.reward for reply in replies])),
            "chosen": len(chosen),
            "chosen_reward": float(np.mean([reply.reward for reply in chosen])),
        }
        self.job.say(
            f"round {number}: mean reward {entry['reward']:.3f} over {entry['replies']} completions, "
            f"{entry['chosen_reward']:.3f} over the {entry['chosen']} selected; EOS rate {entry['ends']:.1%}"
        )
        return entry

    def _write_chosen(self, number: int, replies: Sequence[Reply]) -> None:
        """Write ``chosen.jsonl``: the entries of earlier rounds and of this one."""
        run = self.job.run
        # A round that runs again replaces its own entries.
        kept = [line for line in run.lines(CHOSEN) if line["round"] < number]
        rewards: dict[int, list[float]] = {}
        for reply in replies:
            rewards.setdefault(reply.prompt, []).append(reply.reward)
        for reply in self.chosen[number]:
            prompt, own = self.data.train[reply.prompt], rewards[reply.prompt]
            line = {
                "prompt": question_of([*prompt.talk, Message("assistant", "")]),
                "reply": reply.text,
                "reward": reply.reward,
                "n": len(own),
                "mean": float(np.mean(own)),
                "round": number,
                "place": prompt.place,
            }
            several = len(reply.parts) > 1
            kept.append({**line, "rewards": dict(reply.parts)} if several else line)
        run.write_lines(CHOSEN, kept)

    def _rows(self, number: int) -> list[Conversation]:
        """Return the training rows of a round, without duplicates across rounds."""
        first = 1 if self.settings.rejection.memory else number
        found: dict[tuple[int, str], Conversation] = {}
        for earlier in range(first, number + 1):
            for reply in self.chosen[earlier]:
                prompt = self.data.train[reply.prompt]
                talk = [*prompt.talk, Message("assistant", reply.text)]
                place = f"{prompt.place}, sampled in round {earlier}"
                found.setdefault((reply.prompt, reply.text), Conversation(talk, place))
        return list(found.values())

    def _learn(self, number: int, rows: list[Conversation]) -> None:
        """Fine-tune on the rows of a round, or resume it."""
        job = self.job
        recipe = round_recipe(job.recipe, job.run.path, number)
        words = [[list(map(str, row.words)), row.where] for row in rows]
        # The fingerprint includes the rows, so a round with other completions is another run.
        content = json.dumps([self.job.run.fingerprint, number, words])
        fingerprint = hashlib.sha256(content.encode()).hexdigest()
        run = RunDirectory.open(recipe, fingerprint, force=False)
        if run.finished:
            return
        own = Job(recipe, run, job.console, job.command)
        own.join()
        with job.timed("train"):
            learnt = Supervised(own, self.text, self._prepared(rows), policy=self.policies.before(number))
            carry_out(own, learnt)
        own.stop_if_asked(f"after training of round {number}")

    def _prepared(self, rows: list[Conversation]) -> Prepared:
        # Earlier replies of a dialogue belong to the prompt: loss on the sampled one alone.
        how = DataSettings(loss_on="last", too_long="drop", cache=False)
        report, aside = DataReport(), DataReport()
        length = self.text.max_length
        return prepare_gathered(rows, [], how, self.text.encoder, max_length=length, told=(report, aside))

    def _measured(self, prompts: Prompts, number: int) -> dict[str, float]:
        count = self.settings.rejection.samples
        with self.job.timed("held_out"):
            # The same seeds in every round: metrics differ because of the policy alone.
            replies = self._drawing(prompts).draw(
                spread(len(prompts), self.settings.evaluate.judge_rows),
                lambda: self.policies.before(number + 1).model,
                seeds=[self.settings.train.seed, MEASURING],
                keep=None,
            )
        rewards = np.array([reply.reward for reply in replies])
        found = {
            "reward": float(rewards.mean()),
            "best": best_of_n(rewards.reshape(-1, count)),
            "ends": float(np.mean([reply.ended for reply in replies])),
        }
        if len(self.settings.reward.sources) > 1:
            for name in self.policies.rewards.names:
                found[f"reward_{name}"] = float(np.mean([reply.parts[name] for reply in replies]))
        asked = [[*prompts[reply.prompt].talk, Message("assistant", reply.text)] for reply in replies]
        questions, texts = [question_of(talk) for talk in asked], [reply.text for reply in replies]
        for name, judge in self.behaviour.judges.items():
            found[f"{GOLD}{name}"] = mean_judgement(name, judge, questions, texts)
        return {f"{HELD_OUT}{name}": value for name, value in found.items()}

    def _write_metrics(self, number: int) -> None:
        """Write ``metrics.jsonl`` up to a round: the steps of all rounds, concatenated."""
        run, rounds = self.job.run, self.job.run.record.get("rounds", {})
        kinds = self.job.watched.logged
        lines = [{"step": 0, "epoch": 0.0, **_numbers_of(rounds.get("0", {}), kinds)}]
        for earlier in range(1, number + 1):
            own, step = RunDirectory(round_folder(run.path, earlier), self.job.recipe, ""), lines[-1]["step"]
            lines += [{**line, "step": step + line["step"]} for line in own.metrics()]
            lines[-1] |= _numbers_of(rounds[str(earlier)], kinds)
        run.write_lines("metrics.jsonl", lines if len(lines[0]) > 2 else lines[1:])


def _numbers_of(entry: dict[str, Any], kinds: dict[str, str]) -> dict[str, Any]:
    """Return the values of a round's entry that are plotted as curves."""
    return {key: value for key, value in entry.items() if key in kinds}
