"""Everyday prose besides facts and stories: shops, conversations and school, in both languages."""

from random import Random

from finetune.graders.stories import HEROES
from tools.tiny import words
from tools.tiny.grammar import article, comma_list, josa

_SHOPS = (
    "bakery",
    "book shop",
    "flower shop",
    "bank",
    "market",
    "library",
    "museum",
    "toy shop",
    "bicycle shop",
    "shoe shop",
    "company",
)
_SHOPS_KO = (
    "빵집",
    "서점",
    "꽃집",
    "은행",
    "시장",
    "도서관",
    "박물관",
    "장난감 가게",
    "자전거 가게",
    "신발 가게",
    "회사",
)
_STREETS = (
    "Maple Street",
    "River Road",
    "Station Street",
    "Garden Road",
    "Hill Street",
    "Park Avenue",
    "Bridge Street",
    "Lake Road",
)
_STREETS_KO = ("단풍로", "강변로", "역전길", "정원길", "언덕길", "공원로", "다리길", "호수로")
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_DAYS_KO = ("월요일", "화요일", "수요일", "목요일", "금요일", "토요일", "일요일")
_GOODS = (
    "city bicycle",
    "helmet",
    "lock",
    "bell",
    "road bicycle",
    "child bicycle",
    "electric bicycle",
    "basket",
    "book",
    "lamp",
)
_GOODS_KO = (
    "도시 자전거",
    "헬멧",
    "자물쇠",
    "벨",
    "산악 자전거",
    "어린이 자전거",
    "전기 자전거",
    "바구니",
    "책",
    "등불",
)
_PRICES = (
    "5,000",
    "9,000",
    "12,000",
    "15,000",
    "25,000",
    "30,000",
    "48,000",
    "80,000",
    "120,000",
    "350,000",
    "1,200,000",
)
_NAMES_KO = ("김미나", "이준호", "박소라", "최민수", "정하늘", "강지수")

_ENGLISH = (
    "The {shop} on {street} opens at {open} in the morning and closes at {close} in the evening.",
    "The {shop} is closed on {day}. On {day2} it opens at {open}.",
    "{hero} asked how much the {good} costs. It costs {price} won.",
    "The {good} costs {price} won at the {shop}.",
    "You can find the {shop} at {number} {street}.",
    "The telephone number of the {shop} is 02-{three}-{four}.",
    "The {shop} was founded in {year}, and {people} people work there.",
    "You can write an e-mail to the {shop} at hello@{lower}.example.",
    "The owner of the {shop} is {hero} Kim.",
    "You can return the {good} within {number} days. The guarantee is {small} years.",
    "To rent the {good} for one day costs {price} won.",
    "Delivery takes {small} days and is free above {price} won.",
    '"Hello, {hero}!" said {friend}. "How are you?" "I am fine, thank you."',
    '"Can you help me?" asked {hero}. "Of course," said {friend}. "What would you like to know?"',
    '"Thank you for your help," said {hero}. "You are welcome. Goodbye!" said {friend}.',
    "{hero} went to the {place} and saw {list}.",
    "{hero} likes {one}, but {friend} likes {two}.",
    "There was {a_one} in the {place}, and {a_two} beside it.",
    "On {day} {hero} walked from {street} to the {place}.",
    "A recipe describes a task in steps. "
    "Below the picture is an instruction, and it tells the cook what comes next.",
    "The teacher reads the request. {hero} writes a response that appropriately completes the task.",
    "A good answer is short and right. The word below, paired with the picture, provides further context.",
    "The text is below the line. It describes an input and an output, and {hero} completes it.",
    "An assistant is a person who helps. "
    "The user asks, the system works, and the assistant gives a good response.",
    "You are a helpful friend, {hero}. You answer questions in short and clear words.",
)
_KOREAN = (
    "{street}에 있는 {shop}{eun} 아침 {open}시에 열고 저녁 {close}시에 닫습니다.",
    "{shop}{eun} {day}에 쉽니다. {day2}에는 {open}시에 엽니다.",
    "{good}의 가격은 {price}원입니다.",
    "{hero}는 {good}이 얼마인지 물었습니다. {price}원입니다.",
    "{shop}의 주소는 {street} {number}번지입니다.",
    "{shop}의 전화번호는 02-{three}-{four}입니다.",
    "{shop}{eun} {year}년에 세워졌고 {people}명이 일합니다.",
    "{shop}의 사장은 {owner}입니다.",
    "{good}의 보증 기간은 {small}년입니다. {number}일 안에 돌려줄 수 있습니다.",
    "배송은 {small}일 걸리고 {price}원부터 무료입니다.",
    "하루 빌리는 값은 {price}원입니다.",
    '"안녕하세요?" {hero}가 말했습니다. "무엇을 도와드릴까요?"',
    '"고마워요." {hero}가 말했습니다. "천만에요. 안녕히 가세요."',
    "{hero}는 {place}에 가서 {list} 보았습니다.",
    "{hero}는 {one_을} 좋아하고 {friend}는 {two_을} 좋아합니다.",
    "{day}에 {hero}는 {street}에서 {place}까지 걸었습니다.",
    "선생님이 질문을 읽습니다. {hero}는 알맞은 대답을 짧게 씁니다. 다음 낱말을 차례로 읽습니다.",
    "당신은 친절한 친구입니다. 질문에 짧고 정확하게 대답합니다.",
    '"도와줄 수 있나요?" {hero}가 물었습니다. "물론이죠." {friend}가 대답했습니다.',
)


def _numbers(rng: Random) -> dict[str, str]:
    return {
        "open": f"{rng.randint(7, 11)}",
        "close": f"{rng.randint(5, 9)}",
        "number": f"{rng.randint(1, 60)}",
        "three": f"{rng.randint(100, 999)}",
        "four": f"{rng.randint(1000, 9999)}",
        "year": f"{rng.randint(1950, 2024)}",
        "people": f"{rng.randint(2, 60)}",
        "small": f"{rng.randint(2, 9)}",
        "price": rng.choice(_PRICES),
    }


def english_scene(rng: Random) -> str:
    """Write one everyday sentence or exchange in English."""
    hero, friend = rng.sample([name for name, _ in HEROES], 2)
    nouns = rng.sample([n.word for n in words.NOUNS if n.category in ("animal", "person", "furniture")], 4)
    shop = rng.choice(_SHOPS)
    day, day2 = rng.sample(_DAYS, 2)
    return rng.choice(_ENGLISH).format(
        **_numbers(rng),
        hero=hero,
        friend=friend,
        shop=shop,
        lower=shop.split()[0],
        street=rng.choice(_STREETS),
        day=day,
        day2=day2,
        good=rng.choice(_GOODS),
        place=rng.choice([n.word for n in words.NOUNS if n.category == "place"]),
        list=comma_list([article(noun) for noun in nouns[:3]]),
        one=f"the {nouns[0]}",
        two=f"the {nouns[1]}",
        a_one=article(nouns[2]),
        a_two=article(nouns[3]),
    )


def korean_scene(rng: Random) -> str:
    """Write one everyday sentence or exchange in Korean."""
    hero, friend = rng.sample([name for _, name in HEROES if name[-1] in "나라오리호마수라"], 2)
    nouns = rng.sample([n.korean for n in words.NOUNS if n.category in ("animal", "furniture", "fruit")], 3)
    shop = rng.choice(_SHOPS_KO)
    day, day2 = rng.sample(_DAYS_KO, 2)
    return rng.choice(_KOREAN).format(
        **_numbers(rng),
        hero=hero,
        friend=friend,
        shop=shop,
        eun=josa(shop, "은")[len(shop) :],
        street=rng.choice(_STREETS_KO),
        day=day,
        day2=day2,
        good=rng.choice(_GOODS_KO),
        place=rng.choice([n.korean for n in words.NOUNS if n.category == "place"]),
        list=f"{', '.join(nouns[:2])}, {josa(nouns[2], '을')}",
        one_을=josa(nouns[0], "을"),
        two_을=josa(nouns[1], "을"),
        owner=rng.choice(_NAMES_KO),
    )
