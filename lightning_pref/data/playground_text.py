"""The playground's world in words: two domains, what people ask there, and how an assistant may answer.

Everything is written from sentence templates. `{slot}` stands for a value, and a piece in square brackets is left out
when one of its slots has no value: "A table[ for {guests}] is set." without guests reads "A table is set."
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from random import Random
from typing import Literal

DomainName = Literal["kitchen", "travel"]
Style = Literal["brief", "warm"]
Mark = Literal["right", "wrong", "missing"]

# What is in each dish of the kitchen; the same in every menu.
DISHES: Mapping[str, frozenset[str]] = {
    "lasagne": frozenset({"wheat", "milk", "meat"}),
    "ramen": frozenset({"wheat", "eggs", "meat"}),
    "pancakes": frozenset({"wheat", "eggs", "milk"}),
    "quiche": frozenset({"wheat", "eggs", "milk"}),
    "chowder": frozenset({"fish", "milk"}),
    "kedgeree": frozenset({"fish", "eggs"}),
    "paella": frozenset({"fish", "meat"}),
    "noodles": frozenset({"nuts", "eggs", "fish"}),
    "korma": frozenset({"nuts", "milk", "meat"}),
    "satay": frozenset({"nuts", "meat"}),
    "macaroons": frozenset({"nuts", "eggs"}),
    "baklava": frozenset({"nuts", "wheat"}),
}
# The means of travel: what an answer calls it, and what somebody who dislikes them calls them.
PLURALS: Mapping[str, str] = {"bus": "buses", "coach": "coaches", "ferry": "ferries", "plane": "planes", "train": "trains"}
INGREDIENTS = ("eggs", "fish", "meat", "milk", "nuts", "wheat")
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight")
# Slots of an answer that no request states.
WORKED_OUT = ("dish", "gate")
MENU_SIZE = 8
TIMETABLE_SIZE = 9


@dataclass(frozen=True, kw_only=True)
class Domain:
    """One half of the world.

    Attributes:
        slots: The values each fact can take.
        stated: The facts of a request that its answer has to repeat.
        request: Sentence groups of a request in order, each a choice of templates.
        styles: Templates of the sentence that asks for a style of answer.
        rules: Sentences that open a long prompt.
        polite, curt: Openings of an answer.
        bodies: The sentence with the plain facts.
        offers: The sentence with what the assistant had to work out.
        kind, rude: Closings of an answer.
        chatter: Sentences that help nobody.
        max_words: An answer may be this long without loss.
    """

    slots: Mapping[str, tuple[str, ...]]
    stated: tuple[str, ...]
    request: tuple[tuple[str, ...], ...]
    styles: Mapping[Style, tuple[str, ...]]
    rules: tuple[str, ...]
    polite: tuple[str, ...]
    curt: tuple[str, ...]
    bodies: tuple[str, ...]
    offers: tuple[str, ...]
    kind: tuple[str, ...]
    rude: tuple[str, ...]
    chatter: tuple[str, ...]
    max_words: Mapping[Style, int]

    @property
    def answer_templates(self) -> tuple[str, ...]:
        """Every template an answer is made of."""
        return self.polite + self.curt + self.bodies + self.offers + self.kind + self.rude + self.chatter


KITCHEN = Domain(
    slots={
        "name": ("Anna", "Ben", "Clara", "David", "Elif", "Frank", "Grace", "Hugo", "Ida", "Jonas", "Kofi", "Lena"),
        "guests": NUMBERS,
        "time": ("5", "6", "7", "8", "9", "10"),
        "avoid": INGREDIENTS,
        "dish": tuple(DISHES),
    },
    stated=("name", "guests", "time"),
    request=(
        ("Hello, I am {name}.", "This is {name}.", "My name is {name}."),
        ("Please book a table for {guests} at {time} pm.", "We would like dinner for {guests} at {time} pm."),
        ("I cannot eat {avoid}.", "No {avoid} for me, please.", "One of us is allergic to {avoid}."),
    ),
    styles={
        "brief": ("Keep the answer short.", "A few words will do."),
        "warm": ("A kind word would be nice.", "Be warm with us."),
    },
    rules=(
        "You host guests at the Blue Door.",
        "The kitchen is small and everything is fresh.",
        "Guests sit by the window when it is free.",
        "Dogs are welcome in the garden.",
        "Call every guest by name.",
        "Bread and water cost nothing.",
        "Say clearly which dish suits the guest.",
        "Never offer what is not on the menu.",
    ),
    polite=("Gladly[, {name}].", "With pleasure[, {name}].", "Of course[, {name}]."),
    curt=("Fine[, {name}].", "What now[, {name}]?", "If you must[, {name}]."),
    bodies=(
        "A table[ for {guests}] is set[ at {time} pm].",
        "Your table[ for {guests}] will be ready[ at {time} pm].",
    ),
    offers=("[Try the {dish}.]", "[The {dish} will suit you.]", "[The chef suggests the {dish}.]"),
    kind=("Enjoy your meal!", "We look forward to it."),
    rude=("Do not be late.", "Do not complain."),
    chatter=("Our cook sings at night.", "The garden smells of rain.", "The old oven came from a farm."),
    max_words={"brief": 20, "warm": 25},
)

TRAVEL = Domain(
    slots={
        "name": ("Omar", "Petra", "Quinn", "Rosa", "Sven", "Tara", "Uma", "Viktor", "Wanda", "Xenia", "Yusuf", "Zoe"),
        "tickets": NUMBERS,
        "city": ("Athens", "Berlin", "Cairo", "Dublin", "Geneva", "Lisbon", "Madrid", "Oslo", "Prague", "Rome"),
        "day": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
        "means": tuple(PLURALS),
        "unwanted": tuple(PLURALS.values()),
        "gate": tuple("123456789"),
    },
    stated=("name", "tickets", "city", "day", "means"),
    request=(
        ("Good morning, {name} here.", "You speak with {name}.", "It is {name}."),
        ("I need {tickets} seats to {city} on {day}.", "On {day} I go to {city} and need {tickets} tickets."),
        ("I go by {means} and dislike {unwanted}.", "No {unwanted}, only by {means}."),
    ),
    styles={
        "brief": ("I am in a hurry.", "Only the facts."),
        "warm": ("I am a bit nervous.", "Wish me well."),
    },
    rules=(
        "This is the desk of Swan Travel.",
        "Small bags ride free of charge on the bus and the coach.",
        "Doors close early, so come to the gate in time.",
        "Children and bikes need their own seats on the train.",
        "Show passports and tickets before you board the plane or the ferry.",
        "Lost bags wait at the desk for a day.",
        "Tell each traveller which gate to use.",
        "Speak slowly and clearly when the line is noisy.",
    ),
    polite=("Happy to help[, {name}].", "Welcome aboard[, {name}].", "Right away[, {name}]."),
    curt=("Again[, {name}]?", "So what[, {name}].", "Hurry up[, {name}]."),
    bodies=(
        "I booked[ {tickets}] seats[ to {city}][ on {day}].",
        "You have[ {tickets}] tickets[ to {city}][ on {day}].",
    ),
    offers=("You leave[ by {means}][ from gate {gate}].", "You travel[ by {means}][ from gate {gate}]."),
    kind=("Have a safe journey!", "Many happy miles!"),
    rude=("Stop asking me.", "Others pay more."),
    chatter=("Engines were louder back then.", "My uncle collects old maps.", "Clouds hide those hills now."),
    max_words={"brief": 20, "warm": 25},
)

DOMAINS: Mapping[DomainName, Domain] = {"kitchen": KITCHEN, "travel": TRAVEL}


@dataclass(frozen=True)
class Request:
    """What one prompt asks for.

    Attributes:
        domain: "kitchen" or "travel".
        facts: What the person says, by slot.
        style: The style of answer the person wants.
        offered: The menu's dishes, or the gate of each city in the timetable; empty for a short prompt.
    """

    domain: DomainName
    facts: Mapping[str, str]
    style: Style
    offered: Mapping[str, str] = field(default_factory=dict)

    def accepted(self) -> dict[str, tuple[str, frozenset[str]]]:
        """For each checkable part of an answer, the slot it is read from and the values that are right."""
        parts = {slot: (slot, frozenset({self.facts[slot]})) for slot in DOMAINS[self.domain].stated}
        if self.domain == "kitchen":
            parts["safe"] = ("dish", frozenset(dish for dish, content in DISHES.items() if self.facts["avoid"] not in content))
            if self.offered:
                parts["offered"] = ("dish", frozenset(self.offered))
        elif self.offered:
            parts["gate"] = ("gate", frozenset({self.offered[self.facts["city"]]}))
        return parts


def fill(template: str, values: Mapping[str, str | None]) -> str:
    """Put values into a template and drop the bracketed pieces that have none.

    >>> fill("A table[ for {guests}] is set[ at {time} pm].", {"guests": "four", "time": None})
    'A table for four is set.'
    """

    def keep(piece: re.Match[str]) -> str:
        return piece[1] if all(values.get(slot) for slot in re.findall(r"{(\w+)}", piece[1])) else ""

    return re.sub(r"\[([^\]]*)\]", keep, template).format_map(values)


def draw_request(domain: DomainName, long: bool, rng: Random) -> Request:
    """A random request; a long one comes with a menu or a timetable that can serve it."""
    world = DOMAINS[domain]
    facts = {slot: rng.choice(world.slots[slot]) for slot in world.slots if slot not in WORKED_OUT}
    style: Style = rng.choice(("brief", "warm"))
    if domain == "travel":
        facts["unwanted"] = rng.choice([plural for means, plural in PLURALS.items() if means != facts["means"]])
    if not long:
        return Request(domain, facts, style)
    offered = _draw_menu(facts["avoid"], rng) if domain == "kitchen" else _draw_timetable(facts["city"], rng)
    return Request(domain, facts, style, offered)


def _draw_menu(avoid: str, rng: Random) -> dict[str, str]:
    """Dishes and what is in them; about half are safe, so that neither a guess nor one dish for everybody will do."""
    safe = [dish for dish, content in DISHES.items() if avoid not in content]
    unsafe = [dish for dish in DISHES if dish not in safe]
    num_safe = rng.randint(4, 5)
    dishes = rng.sample(safe, num_safe) + rng.sample(unsafe, MENU_SIZE - num_safe)
    rng.shuffle(dishes)
    return {dish: ", ".join(sorted(DISHES[dish])) for dish in dishes}


def _draw_timetable(city: str, rng: Random) -> dict[str, str]:
    """Cities and their gates, the given city among them."""
    others = [other for other in TRAVEL.slots["city"] if other != city]
    cities = [city, *rng.sample(others, TIMETABLE_SIZE - 1)]
    rng.shuffle(cities)
    return dict(zip(cities, rng.sample(TRAVEL.slots["gate"], TIMETABLE_SIZE), strict=True))


def write_context(request: Request, rng: Random) -> str:
    """The long text in front of a request: house rules, then the menu or the timetable. Empty for a short prompt."""
    if not request.offered:
        return ""
    world = DOMAINS[request.domain]
    rules = [world.rules[0], *rng.sample(world.rules[1:], rng.randint(5, 7))]
    if request.domain == "kitchen":
        last = "Menu today: " + "; ".join(f"{dish} ({content})" for dish, content in request.offered.items()) + "."
    else:
        last = "Gates today: " + ", ".join(f"{city} {gate}" for city, gate in request.offered.items()) + "."
    return " ".join([*rules, last])


def write_request(request: Request, rng: Random) -> str:
    """The request itself, as the person says it."""
    world = DOMAINS[request.domain]
    templates = [rng.choice(group) for group in (*world.request, world.styles[request.style])]
    return " ".join(fill(template, request.facts) for template in templates)


def draw_marks(request: Request, care: float, rng: Random) -> dict[str, Mark]:
    """How well an answer does each of its parts.

    Args:
        request: What is asked for.
        care: Probability, in [0, 1], that a part is done right.
        rng: Source of randomness.

    Returns:
        A mark for each slot of the answer and for "opening", "closing" and "length".
    """
    slots = sorted({slot for slot, _ in request.accepted().values()})
    marks: dict[str, Mark] = {}
    for part in [*slots, "opening", "closing", "length"]:
        # Repeating what was said is easier than choosing a dish or minding one's manners.
        chance = care**0.5 if part in request.facts else care
        marks[part] = "right" if rng.random() < chance else rng.choice(("wrong", "missing"))
    return marks


def write_answer(request: Request, marks: Mapping[str, Mark], rng: Random) -> str:
    """An answer whose parts are as good as `marks` says; the same state of `rng` gives the same wording."""
    world = DOMAINS[request.domain]
    right: dict[str, frozenset[str]] = {}
    for slot, values in request.accepted().values():
        right[slot] = right.get(slot, values) & values
    facts: dict[str, str | None] = {}
    for slot, values in right.items():
        good = rng.choice(sorted(values))
        bad = rng.choice([value for value in world.slots[slot] if value not in values])
        if slot == "means" and rng.random() < 0.5:
            bad = next(means for means, plural in PLURALS.items() if plural == request.facts["unwanted"])
        facts[slot] = {"right": good, "wrong": bad, "missing": None}[marks[slot]]
    openings = {"right": world.polite, "wrong": world.curt, "missing": ("",)}
    closings = {"right": world.kind if request.style == "warm" else ("",), "wrong": world.rude, "missing": ("",)}
    sentences = [
        _pick(openings[marks["opening"]], rng),
        _pick(world.bodies, rng),
        _pick(world.offers, rng),
        *_chatter(world, marks["length"], rng),
        _pick(closings[marks["closing"]], rng),
    ]
    return " ".join(text for text in (fill(sentence, facts) for sentence in sentences) if text)


def _chatter(world: Domain, mark: Mark, rng: Random) -> list[str]:
    """Needless sentences: none in a good answer, one or two else."""
    first, second = _pick(world.chatter, rng), _pick(world.chatter, rng)
    return {"right": [], "missing": [first], "wrong": [first, second]}[mark]


def _pick(choices: Sequence[str], rng: Random) -> str:
    # One draw whatever the number of choices (`rng.choice` may take several), so that one part leaves the others alone.
    return choices[int(rng.random() * len(choices))]


@cache
def request_patterns(domain: DomainName) -> tuple[tuple[re.Pattern[str], ...], ...]:
    """The templates of a request as patterns that read the facts back, one tuple for each sentence group."""
    world = DOMAINS[domain]

    def pattern(template: str) -> re.Pattern[str]:
        text = re.escape(template).replace(r"\{", "{").replace(r"\}", "}")
        choices = {slot: f"(?P<{slot}>{'|'.join(values)})" for slot, values in world.slots.items()}
        return re.compile(text.format_map(choices))

    return tuple(tuple(pattern(template) for template in group) for group in world.request)


def read_request(prompt: str) -> Request:
    """The request in a prompt's text, whatever chat markers stand around it; the last one if there are several.

    Raises:
        ValueError: If the text is not a prompt of the playground.
    """
    for domain, world in DOMAINS.items():
        style = max(world.styles, key=lambda style: max(prompt.rfind(sentence) for sentence in world.styles[style]))
        found = [[match for pattern in group for match in pattern.finditer(prompt)] for group in request_patterns(domain)]
        if all(found) and any(sentence in prompt for sentence in world.styles[style]):
            facts: dict[str, str] = {}
            for matches in found:
                facts |= max(matches, key=lambda match: match.start()).groupdict()
            return Request(domain, facts, style, _read_offered(prompt, domain))
    raise ValueError(
        f"This is no prompt of the playground: {prompt[:80]!r}. Its gold reward is only known for prompts that "
        "`playground_rows` wrote; score other prompts with a reward of your own."
    )


def _read_offered(prompt: str, domain: DomainName) -> dict[str, str]:
    listed = re.findall(r"(?:Menu|Gates) today: ([^.]*)\.", prompt)
    if not listed:
        return {}
    entry = r"(\w+) \(([^)]*)\)" if domain == "kitchen" else r"(\w+) (\d)"
    return dict(re.findall(entry, listed[-1]))
