"""``evaluate.suites``: suites before training, at each evaluation and after training, on all ranks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.distributed.collectives import all_gather_object, shard, unshard
from finetune.distributed.sharding import is_sharded
from finetune.evaluation.answers import ChoiceAnswer, CompletionAnswer, Sampling, TextAnswer, Turns
from finetune.evaluation.items import EvalItem
from finetune.evaluation.local_model import LocalModel
from finetune.evaluation.results import SuiteResult
from finetune.evaluation.rows import read_items
from finetune.evaluation.run_suite import run_suite
from finetune.evaluation.suites import NamedSuite, load_suite
from finetune.recipe.errors import Problem, UserError
from finetune.training.loaded_model import LoadedModel
from finetune.training.metric_specs import When
from finetune.training.metrics import EVAL_PREFIX
from finetune.training.run_directory import RunDirectory

KEY = "evaluate.suites"


@dataclass(frozen=True)
class SuiteEvals:
    """The recipe's suites with their items."""

    suites: Sequence[tuple[NamedSuite, Sequence[EvalItem]]]

    @classmethod
    def load(cls, names: Sequence[str]) -> "SuiteEvals":
        """Load suites and their items.

        Raises:
            UserError: the problems of all suites.
        """
        problems: list[Problem] = []
        suites = []
        for name in names:
            try:
                suite = load_suite(name)
                if suite.settings.task == "preference":
                    expected = "a suite of choices, completions or texts"
                    repair = "compare runs after training: `llm-align eval RUN --suite ...`"
                    problems.append(Problem(KEY, f"'{name}' needs another model", expected, repair))
                    continue
                suites.append((suite, read_items(suite)))
            except UserError as error:
                problems += error.problems
        if problems:
            raise UserError(problems)
        return cls(suites)

    @property
    def curves(self) -> dict[str, str]:
        """Return the metrics of metrics.jsonl with the titles of their curves."""
        return {metric_name(suite): f"{suite.name}: {suite.metrics[0].name}" for suite, _ in self.suites}

    @property
    def summary(self) -> dict[str, tuple[str, str]]:
        """Return the report's summary entries: metric -> (label, format)."""
        return {
            metric_name(suite): (
                f"{suite.name}: {suite.metrics[0].name}",
                ".1%" if suite.metrics[0].percent else ".3f",
            )
            for suite, _ in self.suites
        }

    def evaluate(self, loaded: LoadedModel) -> dict[str, SuiteResult]:
        """Return the results of the current model, the same on all ranks."""
        model = ShardedModel(LocalModel(lambda: loaded, "policy", {}))
        return {metric_name(suite): run_suite(suite, items, model, None) for suite, items in self.suites}

    def record(self, run: RunDirectory, load: Callable[[], LoadedModel], when: When) -> None:
        """Record each suite's headline in run.json, unless a resumed run has recorded it."""
        # Empty without suites: nothing is loaded.
        names = {f"{metric_name(suite)}_{when}" for suite, _ in self.suites}
        if names <= run.record.get("metrics", {}).keys():
            return
        results = self.evaluate(load())
        run.update(
            metrics={f"{name}_{when}": result.headline[1].value for name, result in results.items()},
            cases={name: result.headline[1].count for name, result in results.items()},
        )


def metric_name(suite: NamedSuite) -> str:
    """Return the metric of a suite's headline in metrics.jsonl and run.json."""
    return f"{EVAL_PREFIX}suites/{suite.name}"


@dataclass(frozen=True)
class ShardedModel:
    """A model whose questions are sharded over the ranks; each rank gets all answers.

    With sharded weights each forward pass is a collective: then all ranks answer all questions.
    """

    model: LocalModel

    @property
    def label(self) -> str:
        return self.model.label

    @property
    def identity(self) -> Mapping[str, Any]:
        return self.model.identity

    @property
    def _shards(self) -> bool:
        return not is_sharded(self.model.loaded.model)

    def complete(self, prompts: Sequence[Turns], sampling: Sampling) -> list[CompletionAnswer]:
        """Return a completion of each prompt."""
        if not self._shards:
            return self.model.complete(prompts, sampling)
        streams = shard(list(sampling.streams))
        own = Sampling(sampling.max_new_tokens, sampling.temperature, sampling.seed, streams)
        return unshard(all_gather_object(self.model.complete(shard(prompts), own)))

    def choose(self, questions: Sequence[tuple[Turns, Sequence[str]]], *, style: str) -> list[ChoiceAnswer]:
        """Return the log-probabilities of each question's choices."""
        if not self._shards:
            return self.model.choose(questions, style=style)
        return unshard(all_gather_object(self.model.choose(shard(questions), style=style)))

    def read(self, texts: Sequence[str]) -> list[TextAnswer]:
        """Return the log-probability of each text."""
        if not self._shards:
            return self.model.read(texts)
        return unshard(all_gather_object(self.model.read(shard(texts))))
