"""Short chats for a real student: to train on, to measure on, and with an answer to grade.

Each list of items is divided once: no item of the graded and the held-out chats is in the training,
but the templates of the graded ones are. So the graded chats show what the student lost and gets
back, not what it learns beyond its training.
"""

import json
import random
from itertools import product
from pathlib import Path

CAPITALS = """
France:Paris Germany:Berlin Italy:Rome Spain:Madrid Japan:Tokyo China:Beijing Russia:Moscow
Egypt:Cairo Greece:Athens Portugal:Lisbon Ireland:Dublin Norway:Oslo Sweden:Stockholm
Finland:Helsinki Denmark:Copenhagen Poland:Warsaw Austria:Vienna Hungary:Budapest Belgium:Brussels
Canada:Ottawa Cuba:Havana Peru:Lima Chile:Santiago Thailand:Bangkok Iran:Tehran Iraq:Baghdad
Kenya:Nairobi Australia:Canberra Ukraine:Kyiv Turkey:Ankara Vietnam:Hanoi Lebanon:Beirut
Syria:Damascus Switzerland:Bern Romania:Bucharest Bulgaria:Sofia Jamaica:Kingston Nepal:Kathmandu
Venezuela:Caracas Indonesia:Jakarta Croatia:Zagreb Serbia:Belgrade Colombia:Bogota Algeria:Algiers
Ghana:Accra Iceland:Reykjavik Malta:Valletta Morocco:Rabat
"""
OPPOSITES = """
hot-cold big-small up-down fast-slow day-night happy-sad open-closed light-dark young-old
rich-poor strong-weak good-bad left-right black-white hard-soft early-late full-empty high-low
in-out long-short wet-dry clean-dirty loud-quiet true-false love-hate win-lose buy-sell push-pull
start-end north-south east-west summer-winter
"""
WORDS = """
apple river candle window garden silver monkey pencil bottle purple winter dragon hammer island
jacket kitten lemon mirror orange planet rabbit sailor tomato violin yellow basket carpet dolphin
engine forest
"""
TOPICS = """
gravity photosynthesis democracy volcanoes friendship recycling inflation electricity evolution
vaccines rainbows magnets earthquakes jazz chess sleep exercise honey coffee computers bicycles
glaciers poetry dinosaurs satellites bread trains oceans whales deserts clouds memory batteries
robots museums bees tides fossils opera algebra maps lightning
"""
LISTS = """
fruits animals colors sports vegetables planets trees tools jobs birds languages desserts metals
rivers flowers insects
"""
CODE = """returns the larger of two numbers|counts the vowels of a text|reverses a list
|checks if a number is even|adds the numbers of a list|removes the spaces of a text
|returns the last item of a list|squares a number|joins two texts|finds the shortest word of a list
|converts hours to minutes|checks if a text is empty""".replace("\n", "").split("|")
QUESTIONS = (
    "Explain {} in one sentence.",
    "Why is the topic of {} important?",
    "Tell me a fact about {}.",
    "Write two short sentences about {}.",
    "What should a child know about {}?",
)
FACTS = {
    "Is the sky blue": "yes",
    "Is fire cold": "no",
    "Is ice cold": "yes",
    "Do fish live in water": "yes",
    "Is the sun a star": "yes",
    "Can dogs fly": "no",
    "Is snow black": "no",
    "Do birds have wings": "yes",
    "Is water dry": "no",
    "Is a cat a plant": "no",
    "Is an apple a fruit": "yes",
    "Is iron a metal": "yes",
}
HELD = {"capitals": 33, "opposites": 20, "words": 18, "topics": 12, "lists": 6, "code": 4}
"""Items that no training chat has."""
SUMS = 20
"""Sums of each kind."""


def write_chats(folder: Path) -> None:
    """Write train.jsonl, held_out.jsonl and graded.jsonl, always the same."""
    folder.mkdir(parents=True, exist_ok=True)
    train, held_out, graded = chats(random.Random(0))
    _write(folder / "train.jsonl", [(text, None, None) for text in train])
    _write(folder / "held_out.jsonl", [(text, None, None) for text in held_out])
    _write(folder / "graded.jsonl", graded)


def chats(rng: random.Random) -> tuple[list[str], list[str], list[tuple[str, str, str]]]:
    """Return the training chats, the held-out ones, and (text, kind, answer) of the graded ones."""
    capitals = _divide(rng, [each.split(":") for each in CAPITALS.split()], "capitals")
    opposites = _divide(rng, [each.split("-") for each in OPPOSITES.split()], "opposites")
    words, topics = _divide(rng, WORDS.split(), "words"), _divide(rng, TOPICS.split(), "topics")
    lists, code = _divide(rng, LISTS.split(), "lists"), _divide(rng, CODE, "code")
    sums = [*product(range(1, 10), range(1, 10))]
    rng.shuffle(sums)
    train = [
        *(question.format(topic) for topic in topics[0] for question in rng.sample(QUESTIONS, 4)),
        *(f"Name three {each}." for each in lists[0]),
        *(f"Write a Python function that {each}." for each in code[0]),
        *(_capital(country) for country, _ in capitals[0]),
        *(_opposite(word) for word, _ in opposites[0]),
        *(_copy(word) for word in words[0]),
        *(_sum(a, b) for a, b in sums[:SUMS]),
    ]
    rng.shuffle(train)
    held_out = [
        *(rng.choice(QUESTIONS).format(topic) for topic in topics[1]),
        *(f"Name three {each}." for each in lists[1]),
        *(f"Write a Python function that {each}." for each in code[1]),
        *(f"{question}?" for question in list(FACTS)[:4]),
        *(_copy(word) for word in words[1][:3]),
        *(_capital(country) for country, _ in capitals[1][:3]),
    ]
    graded = [
        *((_capital(country), "capital", city) for country, city in capitals[1]),
        *((_opposite(word), "opposite", other) for word, other in opposites[1]),
        *((_copy(word), "copy", word) for word in words[1]),
        *((_sum(a, b), "sum", str(a + b)) for a, b in sums[SUMS : 2 * SUMS]),
        *((f"{text}? Answer yes or no.", "fact", answer) for text, answer in FACTS.items()),
    ]
    return train, held_out, graded


def _divide(rng: random.Random, items: list, kind: str) -> tuple[list, list]:
    """Return (training items, others)."""
    mixed = rng.sample(items, len(items))
    return mixed[HELD[kind] :], mixed[: HELD[kind]]


def _capital(country: str) -> str:
    return f"What is the capital of {country}?"


def _opposite(word: str) -> str:
    return f"What is the opposite of the word '{word}'? Answer with one word."


def _copy(word: str) -> str:
    return f"Repeat this word: {word}"


def _sum(a: int, b: int) -> str:
    return f"What is {a} + {b}?"


def _write(file: Path, rows: list) -> None:
    lines = [
        {
            "id": f"{file.stem}-{i}",
            "messages": [{"role": "user", "content": text}],
            **({"answer": answer, "kind": kind} if answer else {}),
        }
        for i, (text, kind, answer) in enumerate(rows)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
