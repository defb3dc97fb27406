"""Exact-answer tasks in Korean: instruction templates, and prose templates for pretraining."""

from collections.abc import Callable
from random import Random

from tools.tiny import universe
from tools.tiny.tasks import InstructionTemplate, Task, TaskExample


def _korean_task(
    name: str,
    draw: Callable[[Random], list[TaskExample]],
    *,
    instructions: tuple[InstructionTemplate, ...],
    prose: tuple[str, ...],
    questions: tuple[str, ...],
    weight: float = 1.0,
) -> Task:
    """Return a one-directional task."""
    return Task(name, "ko", draw, {"": instructions}, {"": prose}, {"": questions}, weight)


KOREAN_TASKS = (
    _korean_task(
        "opposite_ko",
        universe.opposites_korean,
        weight=1.4,
        instructions=(
            InstructionTemplate("'{word}'의 반대말은 무엇인가요?"),
            InstructionTemplate("'{word}'의 반대말을 쓰세요."),
            InstructionTemplate("다음 낱말의 반대말을 쓰세요.", "{word}"),
        ),
        prose=(
            "{word}의 반대말은 {answer}입니다.",
            "'{word}'의 반대말은 '{answer}'입니다.",
            "'{word}' 하면 반대로 '{answer}'.",
            "반대말: {word}, {answer}.",
        ),
        questions=("'{word}'의 반대말은 무엇인가요?", "{word}의 반대말이 뭐야?"),
    ),
    _korean_task(
        "add_ko",
        universe.sums,
        weight=1.2,
        instructions=(
            InstructionTemplate("{a} 더하기 {b_은} 얼마인가요?"),
            InstructionTemplate("{a_과} {b_을} 더하세요."),
            InstructionTemplate("두 수를 더하세요.", "{a}, {b}"),
        ),
        prose=(
            "{a} 더하기 {b_은} {answer}입니다.",
            "{a_과} {b_을} 더하면 {sum_이다}.",
            '{a_과} {b}의 합은 "{answer}"입니다.',
            "사과 {a}개와 {b}개를 모으면 {answer}개입니다.",
        ),
        questions=("{a} 더하기 {b_은} 얼마인가요?", "{a_과} {b_을} 더하면 얼마야?"),
    ),
    _korean_task(
        "larger_ko",
        universe.larger,
        weight=0.8,
        instructions=(
            InstructionTemplate("{a_과} {b} 중에서 더 큰 수는 무엇인가요?"),
            InstructionTemplate("{a_과} {b} 가운데 큰 수를 쓰세요."),
            InstructionTemplate("두 수 중에서 더 큰 수를 쓰세요.", "{a}, {b}"),
        ),
        prose=(
            "{high_은} {low}보다 큽니다.",
            '{a_과} {b} 중에서 더 큰 수는 "{answer}"입니다.',
            "{a_과} {b} 가운데 {high_이} 더 큽니다.",
        ),
        questions=("{a_과} {b} 중에서 더 큰 수는 무엇인가요?", "{a_과} {b} 중에 뭐가 더 커?"),
    ),
    _korean_task(
        "sort_ko",
        universe.sorted_numbers,
        weight=1.2,
        instructions=(
            InstructionTemplate("다음 수를 작은 것부터 차례로 쓰세요.", "{numbers}"),
            InstructionTemplate("{numbers}, 이 세 수를 작은 것부터 차례로 쓰세요."),
        ),
        prose=(
            "{a}, {b_과} {c_을} 작은 것부터 쓰면 {answer}입니다.",
            '{numbers} 작은 것부터 차례로 "{answer}"입니다.',
            '세 수 {numbers}의 차례는 "{answer}"입니다.',
        ),
        questions=("{numbers}, 이 수를 작은 것부터 쓰면?", "{numbers}의 차례는 무엇인가요?"),
    ),
    _korean_task(
        "reverse_ko",
        universe.reversals_korean,
        weight=1.6,
        instructions=(
            InstructionTemplate("다음 세 낱말을 거꾸로 된 순서로 쓰세요.", "{words}"),
            InstructionTemplate("{words}, 이 낱말들을 끝에서부터 차례로 쓰세요."),
        ),
        prose=(
            '"{words}"의 순서를 거꾸로 하면 "{answer}"입니다.',
            "{a}, {b}, {c_을} 끝에서부터 쓰면 {answer}입니다.",
            '낱말 {words}의 거꾸로 된 순서는 "{answer}"입니다.',
        ),
        questions=("{words}, 이 낱말을 거꾸로 하면?", "{words}의 거꾸로 된 순서는 무엇인가요?"),
    ),
    _korean_task(
        "category_ko",
        universe.categories_korean,
        weight=1.4,
        instructions=(
            InstructionTemplate("{word_은} 어떤 종류인가요?"),
            InstructionTemplate("'{word}'의 종류를 쓰세요."),
            InstructionTemplate("다음 낱말의 종류를 쓰세요.", "{word}"),
        ),
        prose=(
            "{word_은} {kind_이다}.",
            "{word}의 종류는 {answer}입니다.",
            "'{word}'의 종류는 '{answer}'입니다.",
        ),
        questions=("{word_은} 어떤 종류인가요?", "{word_은} 뭐야?"),
    ),
    _korean_task(
        "color_ko",
        universe.colors_korean,
        weight=0.6,
        instructions=(
            InstructionTemplate("{thing_은} 무슨 색인가요?"),
            InstructionTemplate("'{thing}'의 색을 쓰세요."),
            InstructionTemplate("다음 물건의 색을 쓰세요.", "{thing}"),
            InstructionTemplate("{thing}의 색은 무엇인가요?"),
        ),
        prose=(
            "{thing_은} {color_이다}.",
            "{thing}의 색은 {answer}입니다.",
            "'{thing}'의 색은 '{answer}'입니다.",
        ),
        questions=("{thing_은} 무슨 색인가요?", "{thing}의 색은 뭐야?"),
    ),
    Task(
        "sound_ko",
        "ko",
        universe.sounds_korean,
        weight=0.6,
        instructions={
            "sound": (
                InstructionTemplate("{animal_은} 어떻게 우나요?"),
                InstructionTemplate("'{animal}'의 울음소리를 쓰세요."),
                InstructionTemplate("다음 동물의 울음소리를 쓰세요.", "{animal}"),
                InstructionTemplate("{animal_은} 어떤 소리를 내나요?"),
                InstructionTemplate("{animal}의 소리를 흉내 내 보세요."),
            ),
            "animal": (
                InstructionTemplate("'{sound}' 하고 우는 동물은 무엇인가요?"),
                InstructionTemplate("'{sound}' 하고 우는 동물의 이름을 쓰세요."),
                InstructionTemplate("다음 소리로 우는 동물을 쓰세요.", "{sound}"),
                InstructionTemplate("누가 '{sound}' 하고 우나요?"),
            ),
        },
        prose={
            "sound": (
                "{animal_은} {answer} 하고 웁니다.",
                "{animal}의 울음소리는 '{answer}'입니다.",
                '"{answer}" {animal}의 소리입니다.',
            ),
            "animal": (
                "'{sound}' 하고 우는 동물은 {answer}입니다.",
                "'{sound}' 하고 우는 동물은 '{answer}'입니다.",
            ),
        },
        questions={
            "sound": ("{animal_은} 어떻게 우나요?", "{animal_은} 어떤 소리를 내?"),
            "animal": ("'{sound}' 하고 우는 동물은 무엇인가요?", "누가 '{sound}' 하고 울어?"),
        },
    ),
    Task(
        "capital_ko",
        "ko",
        universe.capitals_korean,
        weight=0.9,
        instructions={
            "capital": (
                InstructionTemplate("{country}의 수도는 어디인가요?"),
                InstructionTemplate("{country}의 수도를 쓰세요."),
                InstructionTemplate("다음 나라의 수도를 쓰세요.", "{country}"),
            ),
            "country": (
                InstructionTemplate("{capital_은} 어느 나라의 수도인가요?"),
                InstructionTemplate("{capital_이} 수도인 나라를 쓰세요."),
            ),
        },
        prose={
            "capital": (
                "{country}의 수도는 {answer}입니다.",
                "{country}의 수도는 '{answer}'입니다.",
                "{country}의 수도는 {capital_이다}.",
            ),
            "country": (
                "{capital_은} {answer}의 수도입니다.",
                "{capital_이} 수도인 나라는 '{answer}'입니다.",
            ),
        },
        questions={
            "capital": ("{country}의 수도는 어디인가요?", "{country}의 수도가 어디야?"),
            "country": ("{capital_은} 어느 나라의 수도인가요?", "{capital_이} 수도인 나라는 어디야?"),
        },
    ),
)
