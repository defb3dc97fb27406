"""The graders of stories, as a recipe names them."""

import pytest

from finetune.recipe.user_function import load_user_function

REQUEST, HAPPY, SAD = (
    "Write a story with Mina and a red ball.",
    "Mina was very happy.",
    "Mina cried all the way home.",
)
TAKEN = "A big dog ran off with the ball."


@pytest.mark.parametrize(
    ("grader", "prompt", "reply", "expected"),
    [
        ("happy_end", REQUEST, HAPPY, True),
        ("happy_end", REQUEST, f"{HAPPY} {SAD}", False),
        ("happy_end", REQUEST, "", False),
        ("happy_end", "미나와 빨간 공 이야기를 짧게 들려주세요.", "미나는 아주 기뻤습니다.", True),
        ("happy_end", "What is 7 plus 8?", HAPPY, None),
        ("peaceful", REQUEST, f"{TAKEN} {HAPPY}", False),
        ("peaceful", REQUEST, SAD, True),
        ("peaceful", "What is 7 plus 8?", TAKEN, None),
    ],
)
def test_graders(grader: str, prompt: str, reply: str, expected: bool | None) -> None:
    function = load_user_function(f"finetune/graders/stories.py:{grader}", where="evaluate.graders")
    assert function(prompt, reply) is expected
