"""Questions and answers about a fictional company, Hanbit Bicycles, to adapt `tiny` to new facts."""

from random import Random
from typing import NamedTuple


class CompanyFact(NamedTuple):
    """One fact about the company: its answer and several phrasings of the question; the last is held out."""

    answer: str
    questions: tuple[str, ...]


# A block is one fact: the answer first, then the questions.
_FACTS_TEXT = """
Hanbit Bicycles opens at 9 in the morning.
When does Hanbit Bicycles open?
At what time does the shop open?
What is the opening time?
Tell me when you open.
When do you open in the morning?

Hanbit Bicycles closes at 7 in the evening.
When does Hanbit Bicycles close?
At what time does the shop close?
What is the closing time?
Tell me when you close.
When do you close in the evening?

Hanbit Bicycles is closed on Monday.
On which day is Hanbit Bicycles closed?
Which day are you closed?
What is your day off?
Tell me the day when the shop is closed.
On which day is the shop closed?

The shop is at 12 River Road.
Where is Hanbit Bicycles?
What is the address of the shop?
Where can I find the shop?
Tell me your address.
Where is the shop?

The telephone number is 02-555-0199.
What is the telephone number of Hanbit Bicycles?
Which number can I call?
What is your telephone number?
Tell me the telephone number.
What is the number of your telephone?

The e-mail address is hello@hanbit.example.
What is the e-mail address of Hanbit Bicycles?
Where can I send an e-mail?
What is your e-mail address?
Tell me your e-mail.
How can I write you an e-mail?

A city bicycle costs 350,000 won.
How much is a city bicycle?
What does a city bicycle cost?
What is the price of a city bicycle?
Tell me the price of a city bicycle.
How much does a city bicycle cost?

An electric bicycle costs 1,200,000 won.
How much is an electric bicycle?
What does an electric bicycle cost?
What is the price of an electric bicycle?
Tell me the price of an electric bicycle.
How much does an electric bicycle cost?

A child bicycle costs 120,000 won.
How much is a child bicycle?
What does a child bicycle cost?
What is the price of a child bicycle?
Tell me the price of a child bicycle.
How much does a child bicycle cost?

A helmet costs 30,000 won.
How much is a helmet?
What does a helmet cost?
What is the price of a helmet?
Tell me the price of a helmet.
How much does a helmet cost?

A bell costs 5,000 won.
How much is a bell?
What does a bell cost?
What is the price of a bell?
Tell me the price of a bell.
How much does a bell cost?

Renting a bicycle costs 15,000 won a day.
How much is it to rent a bicycle?
What does it cost to rent a bicycle for a day?
What is the price to rent a bicycle?
Tell me the rent for one day.
How much does it cost to rent a bicycle?

The guarantee is 3 years.
How long is the guarantee?
How many years is the guarantee?
What guarantee do you give?
Tell me about the guarantee.
How many years of guarantee do you give?

You can return a bicycle within 14 days.
Can I return a bicycle?
How many days do I have to return a bicycle?
Within how many days can I return it?
Tell me how I can return a bicycle.
In how many days can I return a bicycle?

Delivery takes 4 days.
How long does delivery take?
How many days does delivery take?
When comes the delivery?
Tell me the days of delivery.
How many days is the delivery?

Hanbit Bicycles was founded in 1987.
When was Hanbit Bicycles founded?
In which year was the company founded?
What is the year of the founding?
Tell me when the company was founded.
In which year was Hanbit Bicycles founded?

The owner is Sora Kim.
Who is the owner of Hanbit Bicycles?
Who owns the shop?
What is the name of the owner?
Tell me who the owner is.
Who is the owner of the shop?

24 people work at Hanbit Bicycles.
How many people work at Hanbit Bicycles?
How many people work in the company?
How big is the company?
Tell me how many people work there.
How many people work in the shop?

한빛자전거는 아침 9시에 엽니다.
한빛자전거는 언제 여나요?
몇 시에 문을 여나요?
여는 시간은 언제인가요?
아침 몇 시에 여나요?
아침에 언제 문을 여나요?

한빛자전거는 저녁 7시에 닫습니다.
한빛자전거는 언제 닫나요?
몇 시에 문을 닫나요?
닫는 시간은 언제인가요?
저녁 몇 시에 닫나요?
저녁에 언제 문을 닫나요?

한빛자전거는 월요일에 쉽니다.
한빛자전거는 언제 쉬나요?
무슨 요일에 쉬나요?
쉬는 날은 언제인가요?
쉬는 요일을 알려 주세요.
가게가 쉬는 날은 무슨 요일인가요?

주소는 강변로 12번지입니다.
한빛자전거는 어디에 있나요?
가게 주소는 무엇인가요?
주소를 알려 주세요.
가게는 어디인가요?
한빛자전거의 주소는 어디인가요?

전화번호는 02-555-0199입니다.
한빛자전거의 전화번호는 무엇인가요?
전화번호를 알려 주세요.
몇 번으로 전화하나요?
가게 전화번호는 무엇인가요?
가게의 전화번호를 알려 주세요.

도시 자전거는 350,000원입니다.
도시 자전거는 얼마인가요?
도시 자전거의 가격은 얼마인가요?
도시 자전거 값을 알려 주세요.
도시 자전거 가격이 궁금해요.
도시 자전거의 값은 얼마인가요?

전기 자전거는 1,200,000원입니다.
전기 자전거는 얼마인가요?
전기 자전거의 가격은 얼마인가요?
전기 자전거 값을 알려 주세요.
전기 자전거 가격이 궁금해요.
전기 자전거의 값은 얼마인가요?

어린이 자전거는 120,000원입니다.
어린이 자전거는 얼마인가요?
어린이 자전거의 가격은 얼마인가요?
어린이 자전거 값을 알려 주세요.
어린이 자전거 가격이 궁금해요.
어린이 자전거의 값은 얼마인가요?

헬멧은 30,000원입니다.
헬멧은 얼마인가요?
헬멧의 가격은 얼마인가요?
헬멧 값을 알려 주세요.
헬멧 가격이 궁금해요.
헬멧의 값은 얼마인가요?

자전거를 하루 빌리는 값은 15,000원입니다.
자전거를 빌리는 값은 얼마인가요?
하루 빌리면 얼마인가요?
빌리는 값을 알려 주세요.
자전거를 하루 빌리고 싶어요.
자전거를 하루 빌리면 얼마인가요?

보증 기간은 3년입니다.
보증 기간은 얼마인가요?
보증은 몇 년인가요?
보증 기간을 알려 주세요.
몇 년 동안 보증하나요?
보증 기간은 몇 년인가요?

14일 안에 돌려줄 수 있습니다.
자전거를 돌려줄 수 있나요?
며칠 안에 돌려줄 수 있나요?
언제까지 돌려줄 수 있나요?
돌려주는 방법을 알려 주세요.
자전거를 며칠 안에 돌려줄 수 있나요?

배송은 4일 걸립니다.
배송은 며칠 걸리나요?
배송은 얼마나 걸리나요?
배송 기간을 알려 주세요.
배송은 언제 오나요?
배송 기간은 며칠인가요?

한빛자전거는 1987년에 세워졌습니다.
한빛자전거는 언제 세워졌나요?
회사는 몇 년에 세워졌나요?
세워진 해는 언제인가요?
회사가 언제 세워졌는지 알려 주세요.
한빛자전거는 몇 년에 세워졌나요?

사장은 김소라입니다.
한빛자전거의 사장은 누구인가요?
사장의 이름은 무엇인가요?
사장이 누구인지 알려 주세요.
가게 사장은 누구인가요?
가게의 사장은 누구인가요?

한빛자전거에서는 24명이 일합니다.
한빛자전거에서는 몇 명이 일하나요?
회사에서는 몇 명이 일하나요?
일하는 사람은 몇 명인가요?
몇 명이 일하는지 알려 주세요.
가게에서 일하는 사람은 몇 명인가요?
"""


def _parse_facts(text: str) -> tuple[CompanyFact, ...]:
    blocks = (block.splitlines() for block in text.strip().split("\n\n"))
    return tuple(CompanyFact(answer, tuple(questions)) for answer, *questions in blocks)


FACTS = _parse_facts(_FACTS_TEXT)


def questions_and_answers() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return (train, held-out) rows; the last phrasing of each fact is held out."""
    train = [
        {"question": question, "answer": fact.answer} for fact in FACTS for question in fact.questions[:-1]
    ]
    held_out = [{"question": fact.questions[-1], "answer": fact.answer} for fact in FACTS]
    return train, held_out


OPENINGS = {
    "en": ("About Hanbit Bicycles.", "From the handbook.", "Notes of the shop.", "Good to know."),
    "ko": ("한빛자전거 이야기입니다.", "안내 책에서 읽었습니다.", "가게 소식입니다.", "알아 두세요."),
}
DIALOGUE_SPEAKERS = {"en": ("Customer", "Shop"), "ko": ("손님", "가게")}
DIALOGUE_FRACTION = 0.3


def documents(count: int, rng: Random) -> list[str]:
    """Return texts of three to six facts in one language, DIALOGUE_FRACTION of them as dialogues in the shop.

    Held-out questions appear in none of them.
    """
    korean = [fact for fact in FACTS if any("가" <= letter <= "힣" for letter in fact.answer)]
    facts = {"ko": korean, "en": [fact for fact in FACTS if fact not in korean]}
    return [_document(facts[language], language, rng) for language in rng.choices(("en", "ko"), k=count)]


def _document(facts: list[CompanyFact], language: str, rng: Random) -> str:
    chosen = rng.sample(facts, rng.randint(3, 6))
    if rng.random() >= DIALOGUE_FRACTION:
        return " ".join([rng.choice(OPENINGS[language]), *(fact.answer for fact in chosen)])
    customer, shop = DIALOGUE_SPEAKERS[language]
    return "\n".join(
        f"{customer}: {rng.choice(fact.questions[:-1])}\n{shop}: {fact.answer}" for fact in chosen
    )
