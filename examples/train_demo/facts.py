"""Facts in a few sentences, the JSON Schema that asks for them, and the value it describes."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FIRST = _words(
    "Ada Alan Amira Anna Ben Bruno Carla Chen Clara David Diego Elena Emil Eva Felix Fatima "
    "Grace Hana Hugo Ines Ivan Jana John Julia Kenji Lars Laura Lena Leo Lina Lucas Maria Marco "
    "Mei Mia Nadia Nils Nora Omar Oscar Paula Peter Priya Rosa Ravi Sara Sofia Tariq Theo Tom "
    "Vera Yuki Zoe"
)
LAST = _words(
    "Adams Baker Bauer Becker Brown Carter Costa Davis Diaz Evans Fischer Garcia Green Haddad "
    "Hill Ito Jansen Jones Khan Kim Klein Kumar Lee Lopez Martin Meyer Moore Murphy Nguyen "
    "Novak Okafor Olsen Patel Perez Reed Rossi Sato Schmidt Silva Singh Smith Taylor Turner "
    "Wagner Walker Wilson Wong Young Zhang"
)
CITIES = _words(
    "Athens Berlin Bergen Boston Cairo Chicago Delhi Denver Dublin Geneva Hamburg Helsinki "
    "Istanbul Kyoto Lagos Lima Lisbon London Lyon Madrid Milan Montreal Nairobi Oslo Paris "
    "Porto Prague Quito Rome Seattle Seoul Sydney Tallinn Tokyo Toronto Tunis Vienna Warsaw "
    "Zurich"
)
THINGS = _words(
    "amber anchor apple atlas basket beacon blanket bottle bridge brush bucket butter camera "
    "candle canvas carbon cedar chair clock cloud copper cotton crystal desk drum engine falcon "
    "feather forest garden glass hammer harbor helmet honey island jacket kettle ladder lamp "
    "leather lemon linen maple marble mirror mountain ocean olive orange paper pearl pencil "
    "pepper piano planet pocket quartz rabbit radio river rocket saddle sail scarf shadow "
    "silver spoon stone summer table thunder tiger timber tunnel valley velvet violin wagon "
    "walnut water willow window winter"
)

Maker = Callable[[random.Random], Any]
Extraction = tuple[str, dict[str, Any], dict[str, Any]]  # facts, schema, value


@dataclass(frozen=True, slots=True)
class Field:
    """A property: its schema, how to draw a value, and phrases that state it.

    `phrases` hold `{}` for the value; for booleans they are the pair (true, false).
    """

    key: str
    schema: dict[str, Any]
    make: Maker
    phrases: tuple[str, ...] = ()

    @property
    def words(self) -> str:
        return self.key.replace("_", " ")


def _text(make: Maker) -> tuple[dict[str, Any], Maker]:
    return {"type": "string"}, make


def _integer(low: int, high: int) -> tuple[dict[str, Any], Maker]:
    return {"type": "integer"}, lambda rng: rng.randint(low, high)


def _number(low: int, high: int) -> tuple[dict[str, Any], Maker]:
    return {"type": "number"}, lambda rng: rng.randint(low * 100, high * 100 - 1) / 100


def _choice(*options: str) -> tuple[dict[str, Any], Maker]:
    return {"type": "string", "enum": list(options)}, lambda rng: rng.choice(options)


def _list(make: Maker) -> tuple[dict[str, Any], Maker]:
    schema = {"type": "array", "items": {"type": "string"}}
    return schema, lambda rng: _distinct(rng, make, rng.randint(2, 4))


def _distinct(rng: random.Random, make: Maker, count: int) -> list[Any]:
    values: list[Any] = []
    while len(values) < count:
        value = make(rng)
        if value not in values:
            values.append(value)
    return values


BOOLEAN: tuple[dict[str, Any], Maker] = ({"type": "boolean"}, lambda rng: rng.random() < 0.5)


def _person(rng: random.Random) -> str:
    return f"{rng.choice(FIRST)} {rng.choice(LAST)}"


def _city(rng: random.Random) -> str:
    return rng.choice(CITIES)


def _thing(rng: random.Random) -> str:
    return rng.choice(THINGS)


def _title(rng: random.Random) -> str:
    one, two = rng.choice(THINGS).capitalize(), rng.choice(THINGS).capitalize()
    return rng.choice((f"The {one} {two}", f"{one} and {two}", f"{one} {two}", f"The {one} of {two}"))


def _date(rng: random.Random) -> str:
    return f"{rng.randint(1990, 2030)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"


def _time(rng: random.Random) -> str:
    return f"{rng.randint(0, 23):02}:{rng.randint(0, 59):02}"


def _serial(rng: random.Random) -> str:
    letters = "".join(rng.choice("ABCDEFGHKLMNPRSTUVWX") for _ in range(2))
    return f"{letters}-{rng.randint(100, 9999)}"


def _email(rng: random.Random) -> str:
    first, last = rng.choice(FIRST).lower(), rng.choice(LAST).lower()
    return f"{first}.{last}@example.{rng.choice(('com', 'org'))}"


DOMAINS: dict[str, tuple[Field, ...]] = {
    "person": (
        Field("name", *_text(_person), ("the name is {}", "the person is called {}")),
        Field("age", *_integer(18, 90), ("{} years old", "the age is {}", "aged {}")),
        Field("city", *_text(_city), ("lives in {}", "the home city is {}")),
        Field("email", *_text(_email), ("the email is {}", "can be reached at {}")),
        Field(
            "job",
            *_choice("engineer", "teacher", "nurse", "chef"),
            ("works as {}", "the job is {}"),
        ),
        Field("married", *BOOLEAN, ("is married", "is not married")),
        Field("hobbies", *_list(_thing), ("the hobbies are {}", "likes {}")),
    ),
    "order": (
        Field("order_id", *_text(_serial), ("the order id is {}", "order {}")),
        Field("customer", *_text(_person), ("the customer is {}", "placed by {}")),
        Field("quantity", *_integer(1, 500), ("the quantity is {}", "{} pieces")),
        Field("total", *_number(5, 2000), ("the total is {}", "the total comes to {}")),
        Field("status", *_choice("open", "paid", "shipped"), ("the status is {}", "it is {}")),
        Field("express", *BOOLEAN, ("express delivery is wanted", "express delivery is not wanted")),
        Field("items", *_list(_thing), ("the items are {}", "it holds {}")),
    ),
    "weather": (
        Field("city", *_text(_city), ("the city is {}", "measured in {}")),
        Field("temperature", *_number(1, 40), ("the temperature is {} degrees", "it is {} degrees")),
        Field("humidity", *_integer(10, 99), ("the humidity is {} percent", "humidity is at {}")),
        Field("wind", *_integer(1, 120), ("the wind blows at {}", "wind of {} km per hour")),
        Field("sky", *_choice("clear", "cloudy", "rain", "snow"), ("the sky shows {}", "sky: {}")),
        Field("storm_warning", *BOOLEAN, ("a storm warning is out", "no storm warning is out")),
        Field("date", *_text(_date), ("the date is {}", "recorded on {}")),
    ),
    "flight": (
        Field("flight", *_text(_serial), ("the flight is {}", "flight {}")),
        Field("origin", *_text(_city), ("it leaves from {}", "the origin is {}")),
        Field("destination", *_text(_city), ("it goes to {}", "the destination is {}")),
        Field("gate", *_integer(1, 80), ("the gate is {}", "boarding at gate {}")),
        Field("departure", *_text(_time), ("departure is at {}", "the departure time is {}")),
        Field("seats", *_integer(20, 400), ("{} seats", "the number of seats is {}")),
        Field("delayed", *BOOLEAN, ("it is delayed", "it is not delayed")),
    ),
    "book": (
        Field("title", *_text(_title), ("the title is {}", "the book is called {}")),
        Field("author", *_text(_person), ("written by {}", "the author is {}")),
        Field("year", *_integer(1900, 2030), ("published in {}", "the year is {}")),
        Field("pages", *_integer(40, 1200), ("it has {} pages", "{} pages long")),
        Field("language", *_choice("English", "French", "German"), ("in {}", "the language is {}")),
        Field("available", *BOOLEAN, ("it is available", "it is not available")),
        Field("keywords", *_list(_thing), ("the keywords are {}", "about {}")),
    ),
    "product": (
        Field("name", *_text(_title), ("the product is called {}", "the name is {}")),
        Field("price", *_number(1, 900), ("it costs {}", "the price is {}")),
        Field("stock", *_integer(0, 900), ("{} in stock", "the stock is {}")),
        Field("color", *_choice("red", "green", "blue", "black"), ("the color is {}", "painted {}")),
        Field("weight", *_number(1, 60), ("the weight is {} kg", "it weighs {} kg")),
        Field("fragile", *BOOLEAN, ("it is fragile", "it is not fragile")),
        Field("tags", *_list(_thing), ("the tags are {}", "tagged {}")),
    ),
    "event": (
        Field("title", *_text(_title), ("the event is called {}", "the title is {}")),
        Field("city", *_text(_city), ("it takes place in {}", "the city is {}")),
        Field("date", *_text(_date), ("on {}", "the date is {}")),
        Field("start", *_text(_time), ("it starts at {}", "the start is {}")),
        Field("guests", *_integer(5, 900), ("{} guests", "the number of guests is {}")),
        Field("public", *BOOLEAN, ("it is public", "it is not public")),
        Field("speakers", *_list(_person), ("the speakers are {}", "talks by {}")),
    ),
    "server": (
        Field("host", *_text(_thing), ("the host is {}", "the host is called {}")),
        Field("port", *_integer(80, 65000), ("the port is {}", "it listens on port {}")),
        Field("region", *_choice("east", "west", "north"), ("the region is {}", "in region {}")),
        Field("memory", *_integer(1, 512), ("{} GB of memory", "the memory is {} GB")),
        Field("load", *_number(0, 32), ("the load is {}", "under a load of {}")),
        Field("healthy", *BOOLEAN, ("it is healthy", "it is not healthy")),
        Field("services", *_list(_thing), ("the services are {}", "it runs {}")),
    ),
}
OPENINGS = ("This is about a {}: ", "Here is a {}. ", "{}: ", "A new {}: ")
GENERIC = (
    "the {words} is {value}",
    "{words} is {value}",
    "{words}: {value}",
    "with {words} {value}",
    "{words} of {value}",
)


def extraction(rng: random.Random, names: Sequence[str]) -> Extraction:
    """Draw facts, schema and value; one in four has random keys taken from `names`."""
    if rng.random() < 0.25:
        noun, pool = rng.choice(names), _random_fields(rng, names)
    else:
        noun, pool = rng.choice(list(DOMAINS.items()))
    fields = rng.sample(pool, rng.randint(3, min(6, len(pool))))
    value = {field.key: field.make(rng) for field in fields}
    phrases = [_phrase(rng, field, value[field.key]) for field in fields]
    schemas = {field.key: field.schema for field in fields}
    if rng.random() < 0.2 and len(fields) >= 4:
        value, schemas = _nest(value, schemas, rng.choice(("details", "info", "data", "extra")))
    rng.shuffle(phrases)
    return _sentences(rng, noun, phrases), _object(schemas), value


def random_words() -> list[str]:
    """Return words that may serve as keys before there is a tokenizer to take names from."""
    return list(THINGS)


def _random_fields(rng: random.Random, names: Sequence[str]) -> list[Field]:
    makers = (
        *(_text(make) for make in (_person, _city, _thing, _title, _date, _serial)),
        _integer(0, 9999),
        _integer(0, 99),
        _number(0, 500),
        _list(_thing),
    )
    keys = rng.sample(names, 7)
    return [Field(key, *rng.choice(makers)) for key in keys]


def _phrase(rng: random.Random, field: Field, value: Any) -> str:
    if isinstance(value, bool):
        return field.phrases[0] if value else field.phrases[1]
    text = _listing(value) if isinstance(value, list) else str(value)
    if field.phrases and rng.random() < 0.7:
        return rng.choice(field.phrases).format(text)
    return rng.choice(GENERIC).format(words=field.words, value=text)


def _listing(values: Sequence[str]) -> str:
    return ", ".join(values[:-1]) + " and " + values[-1]


def _sentences(rng: random.Random, noun: str, phrases: list[str]) -> str:
    opening = rng.choice(OPENINGS).format(noun)
    cut = rng.randint(1, len(phrases))
    parts = ["; ".join(part) + "." for part in (phrases[:cut], phrases[cut:]) if part]
    return opening[0].upper() + opening[1:] + " ".join(part[0].upper() + part[1:] for part in parts)


def _nest(value: dict[str, Any], schemas: dict[str, Any], key: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Move the last two properties into an object of their own."""
    keys = list(value)
    inner = {name: value[name] for name in keys[-2:]}
    outer = {name: value[name] for name in keys[:-2]}
    inner_schema = _object({name: schemas[name] for name in inner})
    return {**outer, key: inner}, {**{name: schemas[name] for name in outer}, key: inner_schema}


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}
