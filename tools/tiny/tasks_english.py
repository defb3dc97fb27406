"""Exact-answer tasks in English: instruction templates, and prose templates for pretraining."""

from collections.abc import Callable
from random import Random

from tools.tiny import universe
from tools.tiny.tasks import InstructionTemplate, Task, TaskExample


def _english_task(
    name: str,
    draw: Callable[[Random], list[TaskExample]],
    *,
    instructions: tuple[InstructionTemplate, ...],
    prose: tuple[str, ...],
    questions: tuple[str, ...],
    weight: float = 1.0,
) -> Task:
    """Return a one-directional task."""
    return Task(name, "en", draw, {"": instructions}, {"": prose}, {"": questions}, weight)


ENGLISH_TASKS = (
    _english_task(
        "opposite",
        universe.opposites,
        weight=1.6,
        instructions=(
            InstructionTemplate("What is the opposite of {word}?"),
            InstructionTemplate("Give the opposite of the word {word}."),
            InstructionTemplate("Write the opposite of this word.", "{word}"),
            InstructionTemplate("Which word means the opposite of {word}?"),
        ),
        prose=(
            "The opposite of {word} is {answer}.",
            'The opposite of "{word}" is "{answer}".',
            "{word} and {answer} are opposites.",
            "What is not {word} may be {answer}, its opposite.",
            'Say "{word}", and the opposite is "{answer}".',
        ),
        questions=("What is the opposite of {word}?", 'Which word is the opposite of "{word}"?'),
    ),
    _english_task(
        "plural",
        universe.plurals,
        weight=1.6,
        instructions=(
            InstructionTemplate("What is the plural of {word}?"),
            InstructionTemplate("Give the plural form of the word {word}."),
            InstructionTemplate("Write the plural of this noun.", "{word}"),
        ),
        prose=(
            "One {word}, two {answer}.",
            "The plural of {word} is {answer}.",
            'The plural of "{word}" is "{answer}".',
            "Mina saw {a_word}, and then many {answer}.",
            'When there is more than one {word}, we say "{answer}".',
        ),
        questions=("What is the plural of {word}?", "What do we say for more than one {word}?"),
    ),
    _english_task(
        "past_tense",
        universe.past_tenses,
        weight=1.4,
        instructions=(
            InstructionTemplate("What is the past tense of {word}?"),
            InstructionTemplate("Give the past form of the verb {word}."),
            InstructionTemplate("Put this verb into the past tense.", "{word}"),
        ),
        prose=(
            "Today they {word}; yesterday they {answer}.",
            "The past tense of {word} is {answer}.",
            'The past tense of "{word}" is "{answer}".',
            '"{answer}" is the past form of the verb "{word}".',
        ),
        questions=("What is the past tense of {word}?", "Today we {word}. What did we do yesterday?"),
    ),
    _english_task(
        "en_to_ko",
        universe.english_to_korean,
        weight=2.6,
        instructions=(
            InstructionTemplate("Translate {word} into Korean."),
            InstructionTemplate("What is the Korean word for {word}?"),
            InstructionTemplate("Translate this English word into Korean.", "{word}"),
        ),
        prose=(
            "The Korean word for {word} is {answer}.",
            "{word} means {answer} in Korean.",
            'In Korean, "{word}" is "{answer}".',
            "영어 {word}의 뜻은 {answer_이다}.",
            '"{word}" - "{answer}".',
        ),
        questions=(
            "What is {word} in Korean?",
            "What is the Korean word for {word}?",
            "영어 {word}의 뜻은 무엇인가요?",
        ),
    ),
    _english_task(
        "ko_to_en",
        universe.korean_to_english,
        weight=2.6,
        instructions=(
            InstructionTemplate("Translate {word} into English."),
            InstructionTemplate("What does the Korean word {word} mean?"),
            InstructionTemplate("Translate this Korean word into English.", "{word}"),
        ),
        prose=(
            "The Korean word {word} means {answer}.",
            "{word} is {answer} in English.",
            'In English, "{word}" is "{answer}".',
            "{word_은} 영어로 {answer}이다.",
            '"{word}" - "{answer}".',
        ),
        questions=("What is {word} in English?", "What does {word} mean?", "{word_은} 영어로 무엇인가요?"),
    ),
    _english_task(
        "add",
        universe.sums,
        weight=1.8,
        instructions=(
            InstructionTemplate("What is {a} plus {b}?"),
            InstructionTemplate("Add {a} and {b}."),
            InstructionTemplate("Add the two numbers.", "{a} and {b}"),
            InstructionTemplate("Calculate {a} + {b}."),
        ),
        prose=(
            "{a} plus {b} is {answer}.",
            "{a} + {b} = {answer}.",
            '{a} and {b} make "{answer}".',
            "Tom had {a} and found {b} more, so he had {answer}.",
            "The sum of {a} and {b} is {answer}.",
        ),
        questions=("What is {a} plus {b}?", "How much is {a} and {b}?", "What is the sum of {a} and {b}?"),
    ),
    _english_task(
        "larger",
        universe.larger,
        weight=1.0,
        instructions=(
            InstructionTemplate("Which number is larger, {a} or {b}?"),
            InstructionTemplate("Which is greater: {a} or {b}?"),
            InstructionTemplate("Write the larger of the two numbers.", "{a} and {b}"),
        ),
        prose=(
            "{high} is greater than {low}.",
            "{low} is less than {high}.",
            "Of {a} and {b}, {answer} is the larger number.",
            'Of {a} and {b}, the larger is "{answer}".',
        ),
        questions=("Which number is larger, {a} or {b}?", "Which is more, {a} or {b}?"),
    ),
    _english_task(
        "sort",
        universe.sorted_numbers,
        weight=1.8,
        instructions=(
            InstructionTemplate("Sort these numbers from small to large.", "{numbers}"),
            InstructionTemplate("Sort {numbers} from small to large."),
            InstructionTemplate("Put the numbers {numbers} in order, smallest first."),
        ),
        prose=(
            "Sorted from small to large, {numbers} becomes {answer}.",
            'Put {a}, {b} and {c} in order: "{answer}".',
            'The numbers {numbers} in order are "{answer}".',
            "From small to large, {a} {b} {c} is {answer}.",
        ),
        questions=("What is {numbers} from small to large?", "Can you put {numbers} in order?"),
    ),
    _english_task(
        "reverse",
        universe.reversals,
        weight=2.2,
        instructions=(
            InstructionTemplate("Reverse the order of these words.", "{words}"),
            InstructionTemplate("Write the words {words} in reverse order."),
            InstructionTemplate("Say these three words backwards: {words}"),
        ),
        prose=(
            'In reverse order, "{words}" is "{answer}".',
            "Backwards, {words} becomes {answer}.",
            'The words {words} in reverse order are "{answer}".',
            "Read {a}, {b}, {c} from the end: {answer}.",
        ),
        questions=("What is {words} in reverse order?", "Can you say {words} backwards?"),
    ),
    _english_task(
        "baby",
        universe.babies,
        weight=0.5,
        instructions=(
            InstructionTemplate("What is a baby {animal} called?"),
            InstructionTemplate("What do we call the young of {a_animal}?"),
            InstructionTemplate("Name the young of this animal.", "{animal}"),
            InstructionTemplate("Write the name of a baby {animal}."),
            InstructionTemplate("Which word names a young {animal}?"),
        ),
        prose=(
            "A baby {animal} is called {a_baby}.",
            'The young of {a_animal} is "{answer}".',
            "{a_baby} is a young {animal}.",
            'We call a young {animal} "{answer}".',
        ),
        questions=("What is a baby {animal} called?", "What is the name of a young {animal}?"),
    ),
    _english_task(
        "category",
        universe.categories,
        weight=1.6,
        instructions=(
            InstructionTemplate("What kind of thing is the word {word}?"),
            InstructionTemplate("Name the category of {word}."),
            InstructionTemplate("To which category does this word belong?", "{word}"),
        ),
        prose=(
            "{word} is the name of {a_kind}.",
            "{Word} is {a_kind}.",
            'The word {word} belongs to the category "{answer}".',
            "What is {word}? It is {a_kind}.",
            "The category of {word} is {answer}.",
        ),
        questions=("What kind of thing is {word}?", "What is the category of {word}?"),
    ),
    _english_task(
        "color",
        universe.colors,
        weight=0.7,
        instructions=(
            InstructionTemplate("What is the usual color of {thing}?"),
            InstructionTemplate("Which color does {thing} have?"),
            InstructionTemplate("Name the usual color of this thing.", "{thing}"),
            InstructionTemplate("Write the color of {thing}."),
        ),
        prose=(
            "The usual color of {thing} is {answer}.",
            "{Thing} is {answer}.",
            'The color of {thing} is "{answer}".',
            "She painted the {thing} {answer}, because that is its color.",
        ),
        questions=("What color is {thing}?", "What is the color of {thing}?"),
    ),
    _english_task(
        "odd_one_out",
        universe.odd_ones,
        weight=2.4,
        instructions=(
            InstructionTemplate("Which word does not belong with the others?", "{words}"),
            InstructionTemplate("Pick the odd one out: {words}"),
            InstructionTemplate("Find the word that does not fit: {words}"),
        ),
        prose=(
            'Of the words {words}, "{answer}" does not belong, because the others are {kinds}.',
            "Among {words} there are three {kinds} and {a_other}: {answer}.",
            'In {words}, the odd one out is "{answer}".',
            '{words}: "{answer}" is {a_other}, and the rest are {kinds}.',
        ),
        questions=("Which of {words} does not belong?", "What is the odd one out in {words}?"),
    ),
    _english_task(
        "first_letter",
        universe.first_letters,
        weight=1.4,
        instructions=(
            InstructionTemplate("What is the first letter of {word}?"),
            InstructionTemplate("With which letter does the word {word} begin?"),
            InstructionTemplate("Write the first letter of this word.", "{word}"),
        ),
        prose=(
            "The word {word} begins with {answer}.",
            'The first letter of {word} is "{answer}".',
            '"{word}" starts with the letter "{answer}".',
            '{answer} is the first letter of "{word}".',
        ),
        questions=("What is the first letter of {word}?", "Which letter does {word} begin with?"),
    ),
    Task(
        "sound",
        "en",
        universe.sounds,
        weight=0.6,
        instructions={
            "sound": (
                InstructionTemplate("What sound does {a_animal} make?"),
                InstructionTemplate("What does {a_animal} say?"),
                InstructionTemplate("Write the sound of this animal.", "{animal}"),
                InstructionTemplate("Write the sound that {a_animal} makes."),
                InstructionTemplate("How does {a_animal} sound?"),
            ),
            "animal": (
                InstructionTemplate("Which animal says {sound}?"),
                InstructionTemplate("Name the animal that says {sound}."),
                InstructionTemplate("Which animal makes this sound?", "{sound}"),
                InstructionTemplate("{sound} is the sound of which animal?"),
            ),
        },
        prose={
            "sound": (
                "The {animal} says {answer}.",
                '{a_animal} goes "{answer}".',
                '"{answer}" is the sound of the {animal}.',
            ),
            "animal": (
                "{sound} is what the {answer} says.",
                "The animal that says {sound} is the {answer}.",
                'Who says {sound}? "{answer}" is right.',
            ),
        },
        questions={
            "sound": ("What does the {animal} say?", "What sound does {a_animal} make?"),
            "animal": ("Which animal says {sound}?", "Who says {sound}?"),
        },
    ),
    Task(
        "capital",
        "en",
        universe.capitals,
        weight=0.9,
        instructions={
            "capital": (
                InstructionTemplate("What is the capital of {country}?"),
                InstructionTemplate("Name the capital city of {country}."),
                InstructionTemplate("Name the capital of this country.", "{country}"),
            ),
            "country": (
                InstructionTemplate("{capital} is the capital of which country?"),
                InstructionTemplate("Name the country whose capital is {capital}."),
            ),
        },
        prose={
            "capital": (
                "The capital of {country} is {answer}.",
                "{country} has the capital {answer}.",
                'The capital city of {country} is "{answer}".',
            ),
            "country": (
                "{capital} is the capital of {answer}.",
                "{capital} is a big city in {answer}.",
                'The country of {capital} is "{answer}".',
            ),
        },
        questions={
            "capital": ("What is the capital of {country}?", "Which city is the capital of {country}?"),
            "country": ("{capital} is the capital of which country?", "In which country is {capital}?"),
        },
    ),
)
