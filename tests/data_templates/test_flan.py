"""Flan's phrasings: ten of each kind, all in use, selected by the row's text and nothing else."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from data_templates import flan
from data_templates.segments import Message, render

ROOT = Path(__file__).parents[2]


def prompt(task, given=""):
    """Return the rendered prompt of a row."""
    segments, _ = render(flan.TEMPLATE, [Message("user", task, context=given)])
    return "".join(segment.text for segment in segments)


def test_each_phrasing_is_used_about_equally_often():
    counts = [0] * 10
    for number in range(2000):
        counts[flan.hash_index(f"Task {number}", 10)] += 1
    # 200 each; the standard deviation is 13.4, and the draw is the same every time.
    assert min(counts) > 200 - 4 * 13.4 and max(counts) < 200 + 4 * 13.4


@pytest.mark.parametrize("given", ["", "5 apples"])
def test_all_ten_are_used_and_contain_the_rows_text(given):
    texts = {prompt(f"Task {number}?", given).replace(f"Task {number}?", "{task}") for number in range(200)}
    assert len(texts) == 10
    assert all(text.count("{task}") == 1 and given in text and text.endswith("\n") for text in texts)


def test_published_phrasings():
    """Three of each of google-research/FLAN, flan/v2/templates.py: natinst_v2 and t0_question_answer."""
    with_input = {prompt(f"{number}", "I").replace(f"{number}", "D", 1) for number in range(200)}
    assert {
        "D\n\nI\n",
        "You will be given a definition of a task first, then some input of the task.\nD\n\nI\nOutput:\n",
        "Teacher:D\nTeacher: Now, understand the problem? Solve this instance: I\nStudent:\n",
    } <= with_input
    without = {prompt(f"{number}?").replace(f"{number}?", "D") for number in range(200)}
    assert {"D\n", "Q:D\nA:\n", "Given the question: D\nThe answer is:\n"} <= without


def test_the_line_feed_that_ends_t0s_prompts_is_not_doubled():
    prompts = {prompt(f"{number}?\n").replace(f"{number}?\n", "D|") for number in range(200)}
    assert {"D|", "D|Answer:\n", "Q:D|A:\n"} <= prompts and len(prompts) == 10
    given = {prompt("D", f"{number}\n").replace(f"{number}\n", "I|") for number in range(200)}
    assert {"D\n\nI|", "Definition: D\nInput: I|Output:\n"} <= given


def test_the_phrasing_depends_on_neither_seed_nor_process():
    texts = [prompt(f"Task {number}") for number in range(50)]
    random.seed(7)
    assert [prompt(f"Task {number}") for number in range(50)] == texts
    code = (
        "from data_templates import flan\nfrom data_templates.segments import Message, render\n"
        "for n in range(50): print(''.join(s.text for s in render(flan.TEMPLATE, "
        "[Message('user', f'Task {n}')])[0]), end='|')"
    )
    for seed in ("0", "1"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout == "|".join(texts) + "|"


def test_the_reply_does_not_change_the_question():
    requested = Message("user", "Name a fish.")
    texts = {
        "".join(
            segment.text for segment in render(flan.TEMPLATE, [requested, Message("assistant", reply)])[0]
        )
        for reply in ("Eel", "Carp", "Pike")
    }
    assert {text.rpartition("\n")[0] for text in texts} == {prompt("Name a fish.").rpartition("\n")[0]}
