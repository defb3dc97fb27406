"""Error rate and power of a verdict, for both claims: a model, whose unit is the prompt, and a recipe.

    make bench-verdict ARGS=--save      or      python -m benchmarks.verdict

*This model against that one.* A short SFT run of the bundled model answers 400 prompts with 40 sampling
seeds. A comparison takes two answers of each prompt at random, so both models are the same. Known effects
replace a known fraction of the second model's replies by correct or wrong ones.

*This recipe against that one.* 40 short SFT runs differ in their seed. A comparison takes five against five
of them at random. 10 runs with another learning rate are the effect.

Runs and replies are kept in ``--work``: an interrupted benchmark continues.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from align import load_recipe, load_tuned, run
from benchmarks.common import environment_metadata, save_result
from benchmarks.verdict_plot import write_plot
from data_templates.segments import Message
from finetune.evaluation.comparison import compare, decide
from finetune.evaluation.items import SCORE, ItemResult
from finetune.evaluation.metrics import ACCURACY
from finetune.evaluation.seed_comparison import compare_recipes
from finetune.evaluation.sequential import SequentialComparison, cluster_differences, random_order
from finetune.evaluation.small_samples import Z_95
from finetune.generation.sampler import Decoding
from finetune.recipe.discovery import PROJECT
from finetune.training.generation import model_sampler

Scores = NDArray[np.float64]
Row = dict[str, str]
TINY = PROJECT / "recipes" / "tiny" / "data"
NUM_PROMPTS, NUM_SAMPLING_SEEDS, NUM_COMPARISONS = 400, 40, 400
NUM_TRAINING_ROWS, NUM_HELD_OUT = 1_000, 60
LOOK_EVERY = 20
"""Prompts between two looks of a sequential comparison."""
TASKS = ("add", "capital", "category", "color", "larger", "odd_one_out", "opposite", "past_tense", "plural")
"""Tasks with answers of a few tokens, so that replies are cheap."""
NUM_RUNS, NUM_OTHER_RUNS, RUNS_PER_SIDE = 40, 10, 5
MORE_DRAWS = 2_000
"""Further draws of equal recipes: 400 measure an error rate of 5 % to one point."""
LEARNING_RATE, OTHER_LEARNING_RATE = 2e-3, 1e-3
MAX_NEW_TOKENS = 4
Z_POWER = 0.8416212335729143
"""80 % quantile of the normal distribution."""


def split_rows(work: Path) -> list[Row]:
    """Write files of training rows and held-out rows, and return the prompts, which are in neither."""
    rows = [json.loads(line) for line in (TINY / "sft_train.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row["task"] in TASKS]
    Random(0).shuffle(rows)
    parts = {"train": rows[:NUM_TRAINING_ROWS], "held_out": rows[NUM_TRAINING_ROWS:][:NUM_HELD_OUT]}
    for name, part in parts.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in part]
        (work / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return rows[NUM_TRAINING_ROWS + NUM_HELD_OUT :][:NUM_PROMPTS]


def train(work: Path, name: str, *, steps: int, seed: int, learning_rate: float) -> Path:
    """Train a short run, or return at once if it is finished."""
    settings = {
        # The base's own template has a third of the tokens of Alpaca's.
        "data.template": "tokenizer",
        # The same rows for every seed.
        "data.held_out": str(work / "held_out.jsonl"),
        "train.max_steps": steps,
        "train.batch_size": 8,
        "train.learning_rate": learning_rate,
        "train.seed": seed,
        "evaluate.samples": 0,
        "evaluate.exact_match": 0,
    }
    recipe = load_recipe("sft/quickstart", data=work / "train.jsonl", out=work / name, settings=settings)
    return Path(run(recipe).directory)


def sample_scores(folder: Path, prompts: Sequence[Row], decodings: Sequence[Decoding]) -> Scores:
    """Return 1 for each reply that begins with the answer, else 0, (decodings, prompts)."""
    loaded = load_tuned(folder)
    sampler = model_sampler(loaded.model, loaded.encoder)
    turns = [Message("user", row["instruction"], context=row["input"]) for row in prompts]
    encoded = [loaded.encoder.encode_prompt([turn]) for turn in turns]
    scores = []
    for decoding in decodings:
        completions = sampler.sample(encoded, decoding)
        replies = [loaded.encoder.decode_reply(completion.ids).strip() for completion in completions]
        pairs = zip(replies, prompts, strict=True)
        scores.append([float(reply.startswith(row["output"])) for reply, row in pairs])
    return np.array(scores)


def stored(path: Path, compute: Callable[[], Scores]) -> Scores:
    """Return an array from a file, which is computed and written if there is none."""
    if not path.is_file():
        np.save(path, compute())
    scores: Scores = np.load(path)
    return scores


def proportion(count: int, total: int) -> dict[str, float]:
    """Return a proportion with its exact 95 % interval (Clopper and Pearson 1934)."""
    interval = binomtest(count, total).proportion_ci(0.95, method="exact")
    return {"rate": count / total, "low": float(interval.low), "high": float(interval.high)}


def verdict_rates(verdicts: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return the rates of better, of worse, and of either."""
    counts = {name: verdicts.count(name) for name in ("better", "worse")} | {
        "either": len(verdicts) - verdicts.count("not shown")
    }
    return {name: proportion(count, len(verdicts)) for name, count in counts.items()}


def as_results(scores: Scores, clusters: Sequence[int] | None = None) -> list[ItemResult]:
    """Return item results of scores; each item is a cluster of its own unless they are given."""
    names = range(len(scores)) if clusters is None else clusters
    return [
        ItemResult(str(number), str(cluster), "", {SCORE: float(score)}, {})
        for number, (score, cluster) in enumerate(zip(scores, names, strict=True))
    ]


def two_answers(scores_SN: Scores, generator: np.random.Generator, count: int = 2) -> Scores:
    """Return answers of each prompt under different sampling seeds, drawn for each prompt, (count, N)."""
    order_SN = generator.random(scores_SN.shape).argsort(axis=0)[:count]
    return np.take_along_axis(scores_SN, order_SN, axis=0)


def replace(scores: Scores, fraction: float, generator: np.random.Generator) -> Scores:
    """Return scores with a fraction of the replies made correct, or wrong if the fraction is negative."""
    is_replaced = generator.random(len(scores)) < abs(fraction)
    return np.where(is_replaced, float(fraction > 0), scores)


def sequential_verdict(before: list[ItemResult], after: list[ItemResult], seed: int) -> tuple[str, int]:
    """Return the verdict of looks at every 20 prompts, and the number of prompts at the last look."""
    differences = cluster_differences(before, after)
    order = random_order(list(differences), seed)
    comparison = SequentialComparison()
    for start in range(0, len(order), LOOK_EVERY):
        look = comparison.update([differences[name] for name in order[start : start + LOOK_EVERY]])
        if look.decided:
            return ("better" if look.low > 0 else "worse"), look.count
    return "not shown", len(order)


def effect_on_models(scores_SN: Scores, fraction: float, seed: int) -> dict[str, Any]:
    """Return verdicts of comparisons whose second model has a fraction of its replies replaced."""
    generator = np.random.default_rng(seed)
    accuracy = float(scores_SN.mean())
    fixed, sequential, used, covered = [], [], [], 0
    effect = fraction * (1 - accuracy) if fraction > 0 else fraction * accuracy
    for number in range(NUM_COMPARISONS):
        first, second = two_answers(scores_SN, generator)
        before, after = as_results(first), as_results(replace(second, fraction, generator))
        difference = compare(ACCURACY, before, after)
        assert difference is not None
        fixed.append(decide([difference])[0].verdict)
        covered += difference.low <= effect <= difference.high
        verdict, count = sequential_verdict(before, after, number)
        sequential.append(verdict)
        used.append(count)
    return {
        "replaced": fraction,
        "effect": effect,
        "fixed": verdict_rates(fixed),
        "sequential": verdict_rates(sequential),
        "replies_saved": 1 - float(np.mean(used)) / scores_SN.shape[1],
        "prompts_at_verdict": np.percentile(used, [10, 50, 90]).tolist(),
        "interval_covers_effect": proportion(covered, NUM_COMPARISONS),
    }


def families_of_equal_models(
    scores_SN: Scores, tasks: Sequence[str], seed: int
) -> dict[str, dict[str, float]]:
    """Return rates of wrong verdicts: five suites at once, and clusters of two replies to a prompt."""
    generator = np.random.default_rng(seed)
    suites = [[n for n, task in enumerate(tasks) if suite_of(task) == suite] for suite in range(5)]
    in_family = in_clusters = 0
    for number in range(NUM_COMPARISONS):
        first, second = two_answers(scores_SN, generator)
        family = [compare(ACCURACY, as_results(first[rows]), as_results(second[rows])) for rows in suites]
        decisions = decide([difference for difference in family if difference is not None])
        in_family += any(decision.verdict != "not shown" for decision in decisions)
        replies = two_answers(scores_SN, generator, 4)
        clusters = [*range(scores_SN.shape[1])] * 2
        before, after = (as_results(replies[rows].ravel(), clusters) for rows in ([0, 1], [2, 3]))
        difference = compare(ACCURACY, before, after, seed=number)
        assert difference is not None
        in_clusters += decide([difference])[0].verdict != "not shown"
    return {
        "five suites": proportion(in_family, NUM_COMPARISONS),
        "two replies a prompt": proportion(in_clusters, NUM_COMPARISONS),
    }


def suite_of(task: str) -> int:
    """Return the suite of a task, 0 to 4, the same in every process."""
    return sum(task.removesuffix("_ko").encode()) % 5


def draws(
    runs: Sequence[int], others: Sequence[int], seed: int, count: int = NUM_COMPARISONS
) -> Iterator[tuple[list[int], list[int]]]:
    """Yield five runs against five others, at random; from one list if both are the same."""
    generator = np.random.default_rng(seed)
    for _ in range(count):
        if runs is others:
            chosen = generator.permutation(runs)[: 2 * RUNS_PER_SIDE].tolist()
            yield chosen[:RUNS_PER_SIDE], chosen[RUNS_PER_SIDE:]
        else:
            yield (
                generator.permutation(runs)[:RUNS_PER_SIDE].tolist(),
                generator.permutation(others)[:RUNS_PER_SIDE].tolist(),
            )


def verdicts_on_recipes(first: Scores, second: Scores, pairs: Any, better: Any) -> dict[str, Any]:
    """Return the rate of each verdict over draws of five runs against five."""
    verdicts = [
        decide([compare_recipes(first[a], second[b], metric="", better=better)])[0].verdict for a, b in pairs
    ]
    return verdict_rates(verdicts)


def recipes_result(scores_RN: Scores, losses: Scores) -> dict[str, Any]:
    """Return verdicts on recipes from the runs' scores, (runs, prompts), and held-out losses."""
    runs, others = range(NUM_RUNS), range(NUM_RUNS, NUM_RUNS + NUM_OTHER_RUNS)
    result: dict[str, Any] = {}
    for name, values, better in (("accuracy", scores_RN.mean(1), "higher"), ("loss", losses, "lower")):
        result[name] = {
            "mean": float(values[:NUM_RUNS].mean()),
            "std": float(values[:NUM_RUNS].std(ddof=1)),
            "other_mean": float(values[NUM_RUNS:].mean()),
            "other_std": float(values[NUM_RUNS:].std(ddof=1)),
            "equal": verdicts_on_recipes(values, values, draws(runs, runs, 0), better),
            "equal, more draws": verdicts_on_recipes(
                values, values, draws(runs, runs, 3, MORE_DRAWS), better
            ),
            "other_learning_rate": verdicts_on_recipes(values, values, draws(runs, others, 1), better),
        }
    std = result["loss"]["std"]
    result["loss_shifted_by_std"] = {
        str(shift): verdicts_on_recipes(losses, losses - shift * std, draws(runs, runs, 4), "lower")
        for shift in (1.0, 2.0, 2.5, 3.0)
    }
    wrong = 0
    for a, b in draws(runs, runs, 2):
        difference = compare(ACCURACY, as_results(scores_RN[a[0]]), as_results(scores_RN[b[0]]))
        assert difference is not None
        wrong += decide([difference])[0].verdict != "not shown"
    result["prompts_as_units"] = proportion(wrong, NUM_COMPARISONS)
    return result


@click.command()
@click.option(
    "--work", type=click.Path(path_type=Path), default=Path("runs/bench-verdict"), show_default=True
)
@click.option("--steps", default=150, show_default=True, help="Steps of the sampled model.")
@click.option("--short-steps", default=25, show_default=True, help="Steps of each of the 50 runs.")
@click.option("--save", is_flag=True, help="Write results and plot to results/.")
def main(work: Path, steps: int, short_steps: int, save: bool) -> None:
    """Measure, and print the rates."""
    work.mkdir(parents=True, exist_ok=True)
    prompts = split_rows(work)
    samples = [Decoding(MAX_NEW_TOKENS, temperature=1.0, seed=seed) for seed in range(NUM_SAMPLING_SEEDS)]

    def sampled() -> Scores:
        folder = train(work, "sampled", steps=steps, seed=0, learning_rate=LEARNING_RATE)
        return sample_scores(folder, prompts, samples)

    scores_SN = stored(work / "sampled.npy", sampled)
    run_scores, losses = [], []
    for number in range(NUM_RUNS + NUM_OTHER_RUNS):
        rate = LEARNING_RATE if number < NUM_RUNS else OTHER_LEARNING_RATE
        folder = train(work, f"run-{number}", steps=short_steps, seed=number, learning_rate=rate)
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        losses.append(record["metrics"]["eval/loss_after"])
        greedy = partial(sample_scores, folder, prompts, [Decoding(MAX_NEW_TOKENS)])
        run_scores.append(stored(work / f"run-{number}.npy", greedy)[0])
    result = analyze(scores_SN, [row["task"] for row in prompts], np.array(run_scores), np.array(losses))
    click.echo(json.dumps(result, indent=1))
    if save:
        settings = {"steps": steps, "short_steps": short_steps, "prompts": NUM_PROMPTS}
        path = save_result("verdict", {**environment_metadata(bfloat16=False), **settings, **result})
        write_plot(json.loads(path.read_text(encoding="utf-8")), path.with_suffix(".png"))


def analyze(scores_SN: Scores, tasks: Sequence[str], scores_RN: Scores, losses: Scores) -> dict[str, Any]:
    """Return all rates from the stored scores."""
    accuracy = float(scores_SN.mean())
    solved_N = scores_SN.mean(axis=0)
    differing = float(np.mean(2 * solved_N * (1 - solved_N)))
    # An effect adds to the items that differ: effect = (1.96 + 0.84) sqrt((differing + effect) / prompts).
    scale = (Z_95 + Z_POWER) ** 2 / NUM_PROMPTS
    effect = scale / 2 + np.sqrt(scale**2 / 4 + scale * differing)
    smallest = np.ceil(100 * effect) / 100
    fractions = [effect / (1 - accuracy) for effect in (0.0, smallest / 2, smallest, 2 * smallest)]
    fractions.append(-smallest / accuracy)
    return {
        "accuracy": accuracy,
        "items_that_differ": differing,
        "smallest_effect": float(smallest),
        "models": [effect_on_models(scores_SN, value, seed) for seed, value in enumerate(fractions)],
        "equal_models": families_of_equal_models(scores_SN, tasks, 10),
        "recipes": recipes_result(scores_RN, losses),
        "correct_replies_per_prompt": scores_SN.sum(axis=0).astype(int).tolist(),
        "accuracy_of_runs": scores_RN.mean(axis=1).tolist(),
        "loss_of_runs": losses.tolist(),
    }


if __name__ == "__main__":
    main()
