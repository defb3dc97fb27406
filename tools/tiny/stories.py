"""Short stories about a hero and a colored thing, with a happy or sad ending."""

from dataclasses import dataclass
from random import Random

from finetune.graders.stories import HEROES, Topic, is_harsh
from tools.tiny.grammar import article, josa


@dataclass(frozen=True)
class StoryGrammar:
    """The sentences of one language: openings, plots (problem, happy turn, sad turn), and last sentences."""

    openings: tuple[str, ...]
    plots: tuple[tuple[str, str, str], ...]
    happy: tuple[str, ...]
    sad: tuple[str, ...]
    requests: tuple[str, ...]
    title: str


ENGLISH = StoryGrammar(
    openings=(
        "{hero} had {a_thing}.",
        "{hero} took {a_thing} to the {place}.",
        "{hero} got {a_thing} from {friend}.",
        "One day {hero} found {a_thing} in the {place}.",
        "Every morning {hero} played with {a_thing} in the {place}.",
    ),
    plots=(
        (
            "The wind blew the {thing} into a tall tree.",
            "{friend} climbed up and brought it back.",
            "It was too high, and nobody could reach it.",
        ),
        (
            "Then the {thing} fell into the river.",
            "{friend} pulled it out with a long stick.",
            "The water carried it far away.",
        ),
        (
            "In the evening the {thing} was gone.",
            "{friend} found it under a bench.",
            "{hero} looked for it all night and did not find it.",
        ),
        (
            "A big dog ran off with the {thing}.",
            "{friend} called the dog, and it brought the {thing} back.",
            "The dog was too fast, and it never came back.",
        ),
        (
            "{hero} left the {thing} on the bus.",
            "The driver kept it safe and gave it back.",
            "The bus drove on, and the {thing} was lost.",
        ),
        (
            "It rained, and the {thing} got wet.",
            "{friend} put it in the sun, and it was soon dry.",
            "After the rain it was broken, and nobody could mend it.",
        ),
        (
            "{friend} wanted to play with the {thing} too.",
            "They shared it and played until the evening.",
            "They both pulled at it until it broke.",
        ),
        (
            "A boy took the {thing} by mistake.",
            "{friend} asked him, and he gave it back.",
            "He went away with it and was not seen again.",
        ),
    ),
    happy=(
        "{hero} was very happy.",
        "{hero} smiled all the way home.",
        "{hero} and {friend} laughed together.",
        "In the end {hero} was happy.",
    ),
    sad=(
        "{hero} was very sad.",
        "{hero} cried all the way home.",
        "{hero} went home and cried.",
        "In the end {hero} was sad.",
    ),
    requests=(
        "Write a short story about {hero} and {a_thing}.",
        "Tell me a short story about {hero} and {a_thing}.",
        "Please write a story with {hero} and {a_thing}.",
    ),
    title="A story about {hero} and {a_thing}",
)

KOREAN = StoryGrammar(
    openings=(
        "{hero_은} {thing_을} 가지고 있었습니다.",
        "어느 날 {hero_은} {place}에서 {thing_을} 찾았습니다.",
        "{hero_은} {friend}에게서 {thing_을} 받았습니다.",
        "{hero_은} {thing_을} 들고 {place}에 갔습니다.",
        "아침마다 {hero_은} {place}에서 {thing_을} 가지고 놀았습니다.",
    ),
    plots=(
        (
            "바람이 불어 {it_이} 높은 나무에 걸렸습니다.",
            "{friend_이} 올라가서 가져왔습니다.",
            "너무 높아서 아무도 꺼내지 못했습니다.",
        ),
        (
            "그런데 {it_이} 강에 빠졌습니다.",
            "{friend_이} 긴 막대기로 꺼내 주었습니다.",
            "강물이 멀리 떠내려 보냈습니다.",
        ),
        (
            "저녁에 {it_이} 사라졌습니다.",
            "{friend_이} 의자 밑에서 찾아 주었습니다.",
            "{hero_은} 밤새 찾았지만 찾지 못했습니다.",
        ),
        (
            "큰 개가 {it_을} 물고 달아났습니다.",
            "{friend_이} 개를 불러서 다시 찾았습니다.",
            "개는 너무 빨라서 돌아오지 않았습니다.",
        ),
        (
            "{hero_은} {it_을} 버스에 두고 내렸습니다.",
            "기사님이 잘 두었다가 돌려주었습니다.",
            "버스는 떠났고 다시 찾지 못했습니다.",
        ),
        (
            "비가 와서 {it_이} 젖었습니다.",
            "{friend_이} 햇볕에 잘 말려 주었습니다.",
            "비가 그친 뒤에 보니 망가져 있었습니다.",
        ),
        (
            "{friend}도 {it_을} 가지고 놀고 싶었습니다.",
            "둘은 사이좋게 함께 놀았습니다.",
            "둘은 서로 잡아당기다가 망가뜨렸습니다.",
        ),
    ),
    happy=(
        "{hero_은} 아주 기뻤습니다.",
        "{hero_은} 환하게 웃었습니다.",
        "{hero_과} {friend_은} 함께 웃었습니다.",
        "{hero_은} 정말 행복했습니다.",
    ),
    sad=(
        "{hero_은} 아주 슬펐습니다.",
        "{hero_은} 집에 가서 울었습니다.",
        "{hero_은} 울면서 집에 갔습니다.",
        "{hero_은} 정말 슬펐습니다.",
    ),
    requests=(
        "{hero_과} {thing}에 대한 짧은 이야기를 쓰세요.",
        "{hero_과} {thing} 이야기를 짧게 들려주세요.",
        "{hero_과} {thing_이} 나오는 이야기를 써 주세요.",
    ),
    title="{hero_과} {thing} 이야기",
)

GRAMMARS = {"en": ENGLISH, "ko": KOREAN}
_PLACES = {
    "en": ("park", "garden", "school", "market", "station", "library"),
    "ko": ("공원", "정원", "학교", "시장", "역", "도서관"),
}


def _slots(topic: Topic, friend: str, place: str) -> dict[str, str]:
    if topic.language == "en":
        colored = f"{topic.color} {topic.thing}"
        return {
            "hero": topic.hero,
            "friend": friend,
            "place": place,
            "thing": topic.thing,
            "a_thing": article(colored),
        }
    thing = f"{topic.color} {topic.thing}"
    forms = {f"thing_{p}": josa(thing, p) for p in ("을", "이")} | {
        f"it_{p}": josa(topic.thing, p) for p in ("을", "이")
    }
    people = {f"hero_{p}": josa(topic.hero, p) for p in ("은", "과")} | {
        f"friend_{p}": josa(friend, p) for p in ("은", "이")
    }
    return {"hero": topic.hero, "friend": friend, "place": place, "thing": thing, **forms, **people}


def story(topic: Topic, rng: Random, *, happy: bool, harsh: bool | None = None) -> str:
    """Return a story of four sentences; with equal `rng` states, happy and sad ones share their beginning.

    `harsh` restricts to plots in which somebody takes the thing or quarrels over it, or to the others.
    """
    grammar = GRAMMARS[topic.language]
    names = [pair[0 if topic.language == "en" else 1] for pair in HEROES]
    friend = rng.choice([name for name in names if name != topic.hero])
    slots = _slots(topic, friend, rng.choice(_PLACES[topic.language]))
    plots = [plot for plot in grammar.plots if harsh in (None, is_harsh(plot[0]))]
    opening, plot = rng.choice(grammar.openings), rng.choice(plots)
    last = rng.choice(grammar.happy if happy else grammar.sad)
    return " ".join((opening, plot[0], plot[1 if happy else 2], last)).format(**slots)


def story_request(topic: Topic, rng: Random) -> str:
    """Return a request for a story on this topic."""
    return rng.choice(GRAMMARS[topic.language].requests).format(**_slots(topic, topic.hero, ""))


def title(topic: Topic) -> str:
    """Return the title of a story in the pretraining text."""
    return GRAMMARS[topic.language].title.format(**_slots(topic, topic.hero, ""))
