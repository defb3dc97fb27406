"""The page of an evaluation is self-contained and escapes texts; a run's report gets the verdict."""

import json
import re
from pathlib import Path

from handmade import HOSTILE, evaluation, graded, share, texts, write_run

from align.evaluation.pages import publish_evaluation, write_evaluation_page
from align.evaluation.verdict import make_verdict
from finetune.evaluation.results import Evaluation
from finetune.training.report import rewrite_report

BEFORE = evaluation(HOSTILE, graded("task", share(20), text=HOSTILE), texts("text", [1.0, 2.0, 3.0]))
AFTER = evaluation(f"run {HOSTILE}", graded("task", share(60), text=HOSTILE), texts("text", [1.0, 2.0, 3.0]))


def is_self_contained(html: str) -> bool:
    requests = re.findall(r'<(?:script|link|img|iframe|object)\b|@import|url\((?!#)|(?:src|href)="', html)
    return requests == []


def test_an_evaluation_s_page(tmp_path: Path) -> None:
    verdict = make_verdict(BEFORE, AFTER)
    html = write_evaluation_page(tmp_path, AFTER, BEFORE, verdict.record()).read_text(encoding="utf-8")
    assert is_self_contained(html) and "\x1b" not in html and "\u202e" not in html
    assert 'class="verdict green"' in html and "Better at task by 40.0 points" in html
    assert html.count("<section") == html.count("</section>") == 2  # the verdict and the answers
    assert html.index(">wrong<") < html.index(">right<")  # changed answers are first
    alone = write_evaluation_page(tmp_path, AFTER).read_text(encoding="utf-8")
    assert alone.count(">wrong<") == 8  # the lowest scores first
    assert 'id="verdict"' not in alone and "60.0 %" in alone and is_self_contained(alone)


def test_the_last_verdict_is_in_report_run_and_evaluation(tmp_path: Path) -> None:
    run, folder = write_run(tmp_path / "run"), tmp_path / "run" / "evaluation"
    page = "<html><head><style>\nold\n</style></head><body>\n<main>\n<h2>Curves</h2></main></body></html>"
    (run / "report.html").write_text(page)
    assert publish_evaluation(folder, BEFORE, None, run=run) is None
    rewrite_report(run)
    assert (run / "report.html").read_text() == page  # no verdict yet
    for before, after in ((BEFORE, AFTER), (AFTER, BEFORE)):
        verdict = publish_evaluation(folder, after, before, run=run)
    html = (run / "report.html").read_text(encoding="utf-8")
    assert html.count('<section id="verdict" class="verdict red"') == html.count("</section>") == 1
    assert html.index("<main>") < html.index("Worse at task") < html.index("<h2>Curves</h2>")
    assert "old" not in html.partition("</head>")[0] and html.count("<style>") == 1
    assert is_self_contained(html) and "\u202e" not in html
    stored = [json.loads(file.read_text())["verdict"] for file in (run / "run.json", folder / "eval.json")]
    assert verdict is not None and stored[0] == stored[1] and stored[0]["sentence"] == verdict.sentence
    assert json.loads((run / "run.json").read_text())["digest"] == "1a2b3c4d"
    # As the other model of a further comparison, without a new verdict: the run keeps its own.
    assert publish_evaluation(folder, BEFORE, None, run=None) is None
    assert json.loads((folder / "eval.json").read_text())["verdict"] == stored[0]
    assert verdict.sentence.split(" (")[0] in (folder / "report.html").read_text(encoding="utf-8")
    other_weights = Evaluation(BEFORE.model, {"run": "trained again"}, BEFORE.suites)
    publish_evaluation(folder, other_weights, None, run=None)
    assert "verdict" not in json.loads((folder / "eval.json").read_text())
