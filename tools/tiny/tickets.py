"""Support tickets with a label, for the recipe `classify`: short English texts, some with typos."""

from collections.abc import Iterator
from random import Random

NUM_TICKETS = 300
TYPO_FRACTION = 0.25
SHARES = {"billing": 0.36, "delivery": 0.3, "login": 0.2, "technical": 0.14}
"""Share of each label: real queues are not of equal size either."""

SENTENCES = {
    "billing": (
        "I was charged twice for order {number}.",
        "The invoice for {month} shows the wrong amount.",
        "Please refund {amount} euros to my card.",
        "Why did my card pay {amount} euros in {month}?",
        "I need a receipt for the payment of {amount} euros.",
        "My discount code was not applied to the bill.",
        "The price on the invoice is higher than on the page.",
        "Can I pay the bill for {month} later?",
    ),
    "delivery": (
        "My parcel {number} has not arrived yet.",
        "The {thing} came broken in the box.",
        "Where is the {thing} that I ordered in {month}?",
        "The driver left the parcel at the wrong house.",
        "You sent a {thing}, but I ordered another one.",
        "Can you send order {number} to a new address?",
        "The tracking page shows no news for {days} days.",
        "Half of the parts were missing in parcel {number}.",
    ),
    "login": (
        "I forgot my password and cannot log in.",
        "Please change the e-mail address of my account.",
        "How can I close my account?",
        "My account was locked after {days} wrong passwords.",
        "I want to change my user name.",
        "The code to confirm my login never comes.",
        "Somebody else uses my account since {month}.",
        "Please delete all my data.",
    ),
    "technical": (
        "The app closes when I open the {thing} page.",
        "The screen stays black after the update.",
        "I get error {number} when I press the button.",
        "The {thing} does not connect to my phone.",
        "The page loads for minutes and then stops.",
        "Since the update in {month} the app is very slow.",
        "The battery of the {thing} is empty after {days} hours.",
        "Sound works, but there is no picture.",
    ),
}
GREETINGS = ("", "", "", "Hello, ", "Hi there, ", "Dear team, ")
ENDINGS = ("", "", "", " Thanks.", " Please help.", " This is urgent!", " I wrote to you before.")
WORDS = {
    "month": ("January", "March", "May", "July", "October"),
    "thing": ("lamp", "camera", "radio", "clock", "printer", "bicycle"),
}
NUMBERS = {"number": (1000, 9999), "amount": (5, 300), "days": (2, 9)}


def tickets(rng: Random) -> list[dict[str, str]]:
    """Return distinct tickets in random order, with columns id, text and label."""
    rows = [
        {"text": text, "label": label}
        for label, share in SHARES.items()
        for text in _distinct_texts(label, round(share * NUM_TICKETS), rng)
    ]
    rng.shuffle(rows)
    return [{"id": str(number), **row} for number, row in enumerate(rows, 1)]


def _distinct_texts(label: str, count: int, rng: Random) -> Iterator[str]:
    seen: set[str] = set()
    while len(seen) < count:
        text = _ticket(label, rng)
        if text not in seen:
            seen.add(text)
            yield text


def _ticket(label: str, rng: Random) -> str:
    values = {name: rng.choice(words) for name, words in WORDS.items()}
    numbers = {name: rng.randint(*limits) for name, limits in NUMBERS.items()}
    sentence = rng.choice(SENTENCES[label]).format(**values, **numbers)
    text = f"{rng.choice(GREETINGS)}{sentence}{rng.choice(ENDINGS)}"
    return _with_typo(text, rng) if rng.random() < TYPO_FRACTION else text


def _with_typo(text: str, rng: Random) -> str:
    """Return a text with two neighboring letters exchanged."""
    places = [
        index for index in range(1, len(text) - 2) if text[index].isalpha() and text[index + 1].isalpha()
    ]
    index = rng.choice(places)
    return text[:index] + text[index + 1] + text[index] + text[index + 2 :]
