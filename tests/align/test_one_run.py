"""One run at a time in a process; child processes have their own."""

import os
import threading
from pathlib import Path

import pytest

from align.api import run, run_pipeline
from align.pipeline import runner
from finetune.recipe.errors import UserError
from finetune.recipe.one_run import no_run_inside, one_run
from finetune.recipe.user_function import call_for_number, load_user_function


def test_a_second_run_is_refused_from_any_thread_until_the_first_has_ended() -> None:
    messages: list[str] = []

    def second() -> None:
        try:
            with one_run("dpo hh"):
                messages.append("ran")
        except UserError as error:
            messages.append(str(error))

    def in_a_thread() -> None:
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()

    with one_run("sft alpaca"):
        in_a_thread()
        second()
    in_a_thread()
    assert len(messages) == 3 and messages[2] == "ran"
    assert all("another run is in progress in this process: sft alpaca" in text for text in messages[:2])
    assert "in a process of its own" in messages[0]


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt, UserError])
def test_a_run_that_ends_with_any_error_is_over(error: type[BaseException]) -> None:
    with pytest.raises(error), one_run("first"):
        raise error([]) if error is UserError else error
    with one_run("second"):
        pass


def test_a_forked_child_is_another_process() -> None:
    with one_run("first"):
        child = os.fork()
        if child == 0:
            try:
                with one_run("child"):
                    os._exit(0)
            finally:
                os._exit(1)
        assert os.waitpid(child, 0)[1] == 0


def test_a_function_that_starts_a_run_is_refused(tmp_path: Path) -> None:
    text = "from finetune.recipe.one_run import one_run\n\n"
    text += "def rule(p, c):\n    with one_run('x'):\n        pass\n"
    (tmp_path / "rules.py").write_text(text)
    function = load_user_function(f"{tmp_path}/rules.py:rule", where="here")
    with pytest.raises(UserError, match=r"called by .*rules.py:rule while llm-align executes it"):
        call_for_number(function, "p", "c", where="here")
    with one_run("afterwards"):
        pass


def test_a_thread_does_not_inherit_the_user_s_code() -> None:
    messages: list[str] = []

    def other() -> None:
        with one_run("other"):
            messages.append("ran")

    with no_run_inside("rules.py"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert messages == ["ran"]


def test_runs_and_pipelines_take_the_same_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    from align.api import load_pipeline, load_recipe

    monkeypatch.setattr(runner, "run_all_stages", lambda *args, **kwargs: pytest.fail("it was started"))
    recipe, pipeline = load_recipe("sft/quickstart"), load_pipeline("zephyr")
    with one_run("first"):
        with pytest.raises(UserError, match="in progress in this process: first"):
            run(recipe)
        with pytest.raises(UserError, match="in progress in this process: first"):
            run_pipeline(pipeline)
