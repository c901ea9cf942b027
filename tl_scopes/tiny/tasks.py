"""Prompts whose answer, and whose cause, is known by construction.

Each task draws an `Example`: a prompt, the one token that should follow, and the characters of the prompt that decide it.
They mirror the case studies of the Jacobian Scopes paper (arXiv:2601.16407): grammar at a distance, instruction
understanding, translation, a hidden association and in-context time series. The bundled model is trained on them
(`tl_scopes.tiny.train`), so that an attribution can be compared with the cause instead of with an opinion.
"""

import random
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

Split = Literal["train", "test"]


@dataclass(frozen=True)
class Example:
    """One prompt with its answer and the cause of the answer."""

    task: str
    prompt: str
    target: str
    """Text of the one token that follows `prompt`, leading space included."""
    foil: str | None
    """A wrong answer of the same kind: the natural `versus` of a logit difference. None for numbers."""
    causes: tuple[tuple[int, int], ...]
    """Half-open character spans of `prompt`: change what stands there and the right answer changes."""
    rest: str
    """What follows the target in the training document."""
    key: str
    """Text that decides the split: examples with the same key are all in the training set or all held out."""

    @property
    def split(self) -> Split:
        """Every tenth key is held out, by its checksum: no held-out key is ever trained on."""
        return "test" if zlib.crc32(f"{self.task} {self.key}".encode()) % 10 == 0 else "train"

    def cause_positions(self, tokenizer: Any) -> tuple[int, ...]:
        """Positions of the causal tokens in `tokenizer(prompt)`, counting the BOS token where the tokenizer adds one."""
        offsets = tokenizer(self.prompt, return_offsets_mapping=True)["offset_mapping"]
        return tuple(
            position
            for position, (start, stop) in enumerate(offsets)
            if any(start < end and begin < stop for begin, end in self.causes)
        )


def examples(task: str, count: int, *, seed: int = 0, split: Split = "test") -> list[Example]:
    """`count` examples of one task, the same ones for the same seed.

    Args:
        task: a key of `TASKS`.
        count: how many.
        seed: of the private random generator.
        split: "test" draws only examples that the bundled model was never trained on.

    Raises:
        ValueError: for an unknown task, or a count below 1.
    """
    if task not in TASKS:
        raise ValueError(f"there is no task {task!r}: choose one of {', '.join(TASKS)}")
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    rng = random.Random(f"{task}-{seed}")
    return list(islice((e for e in iter(lambda: TASKS[task](rng), None) if e.split == split), count))


def documents(seed: int) -> Iterator[str]:
    """The endless training corpus: documents of all tasks in the proportions of `MIXTURE`, none of them held out."""
    rng = random.Random(f"corpus-{seed}")
    names, weights = list(MIXTURE), list(MIXTURE.values())
    while True:
        example = TASKS[rng.choices(names, weights)[0]](rng)
        if example.split == "test":
            continue
        answer = example.target
        # An association is a tendency: one biography in twenty goes against it, so the model stays short of certainty.
        if example.task == "association" and example.foil and rng.random() < 0.05:
            answer = example.foil
        yield example.prompt + answer + example.rest


def _example(
    task: str, marked: str, target: str, foil: str | None = None, rest: str = ".", key: str | None = None
) -> Example:
    """Build an example from a prompt whose causal stretches stand between ⟦ and ⟧."""
    prompt, causes = "", []
    for piece in re.split(r"(⟦.*?⟧)", marked):
        text = piece.strip("⟦⟧")
        if text != piece:
            causes.append((len(prompt), len(prompt) + len(text)))
        prompt += text
    return Example(task, prompt, target, foil, tuple(causes), rest, key or prompt)


# ---------------------------------------------------------------------------------------------------------------------
# Agreement: the verb agrees with the head noun, whatever stands between them.

NOUNS = """key cabinet door book table lamp window picture letter chair garden tree house boat car road river bridge box
drawer shelf bottle cup plate hat coat shoe ring clock mirror candle basket bag map ticket coin stone flower ladder rope
wheel bell drum flag gate tower wall roof""".split()
PEOPLE = """teacher doctor farmer singer painter pilot sailor lawyer writer dancer driver student neighbor king queen
soldier""".split()
ADJECTIVES = (
    "old new small big red blue green black white long short heavy cheap clean dirty broken famous strange".split()
)
PREPOSITIONS = ["to", "near", "in", "on", "behind", "under", "above", "beside", "from", "with"]
STATES = "old new gone here lost ready clean safe broken expensive beautiful famous strange missing".split()
SEEN = "saw liked found sold bought needed wanted forgot".split()


def _agreement(rng: random.Random, task: str, phrases: int) -> Example:
    def noun_phrase(plural: bool, words: Sequence[str], cause: bool = False) -> str:
        noun = rng.choice(words) + ("s" if plural else "")
        adjective = rng.choice(ADJECTIVES) + " " if rng.random() < 0.4 else ""
        return f"the {adjective}" + (f"⟦{noun}⟧" if cause else noun)

    plural = rng.random() < 0.5
    subject = noun_phrase(plural, NOUNS, cause=True)
    for _ in range(phrases):
        subject += f" {rng.choice(PREPOSITIONS)} {noun_phrase(rng.random() < 0.5, NOUNS)}"
    if rng.random() < 0.2:
        subject += f" that {noun_phrase(rng.random() < 0.5, PEOPLE)} {rng.choice(SEEN)}"
    past = rng.random() < 0.25
    marked = f"⟦Yesterday⟧ {subject}" if past else "T" + subject[1:]
    verbs = (" was", " were") if past else (" is", " are")
    return _example(task, marked, verbs[plural], verbs[not plural], f" {rng.choice(STATES)}.")


def agreement(rng: random.Random) -> Example:
    """ "The ⟦keys⟧ to the old cabinet" -> " are": at most one phrase between the noun and its verb."""
    return _agreement(rng, "agreement", rng.choice([0, 1, 1]))


def agreement_far(rng: random.Random) -> Example:
    """ "The ⟦keys⟧ to the old cabinet near the doors in the house" -> " are": two to four phrases in between."""
    return _agreement(rng, "agreement_far", rng.choice([2, 2, 3, 4]))


# ---------------------------------------------------------------------------------------------------------------------
# Inference: who had what, asked through the thing.

HOLDERS = """cook gardener doctor baker butler painter pilot farmer sailor singer lawyer teacher driver dancer writer
soldier tailor barber hunter waiter""".split()
THINGS = """cleaver shovel rope candle hammer needle bottle knife ladder umbrella lantern whistle scissors compass
mirror violin basket blanket chisel axe""".split()
FRAMES = [("weapon", "killer"), ("prize", "winner"), ("clue", "spy"), ("gift", "guest"), ("loot", "thief")]
ASIDES = ["It was a cold night.", "Nobody heard a sound.", "The house was dark.", "The rain had stopped."]


def inference(rng: random.Random) -> Example:
    """ "The ⟦gardener⟧ had the ⟦shovel⟧. The weapon was the ⟦shovel⟧. The killer is the" -> " gardener".

    Or the other way round: the killer is named and the weapon asked for. Two to four people, the order random.
    """
    count = rng.choice([2, 2, 3, 4])
    holders, things = rng.sample(HOLDERS, count), rng.sample(THINGS, count)
    answer = rng.randrange(count)
    thing_role, holder_role = rng.choice(FRAMES)
    ask_for_holder = rng.random() < 0.7
    facts = [
        f"The ⟦{h}⟧ had the ⟦{t}⟧." if i == answer else f"The {h} had the {t}."
        for i, (h, t) in enumerate(zip(holders, things, strict=True))
    ]
    if rng.random() < 0.25:
        facts.insert(rng.randrange(count + 1), rng.choice(ASIDES))
    if ask_for_holder:
        known, asked, pool = f"{thing_role} was the ⟦{things[answer]}⟧", holder_role, holders
    else:
        known, asked, pool = f"{holder_role} was the ⟦{holders[answer]}⟧", thing_role, things
    foil = pool[(answer + 1) % count]
    return _example("inference", f"{' '.join(facts)} The {known}. The {asked} is the", f" {pool[answer]}", f" {foil}")


# ---------------------------------------------------------------------------------------------------------------------
# Translation from German, with four kinds of reordering.

GERMAN_NOUNS = [
    tuple(entry.split("/"))
    for entry in """Hund/m/dog Katze/f/cat Mann/m/man Frau/f/woman Kind/n/child Haus/n/house Baum/m/tree Vogel/m/bird
    Fisch/m/fish Pferd/n/horse Kuh/f/cow Maus/f/mouse Buch/n/book Tisch/m/table Stuhl/m/chair Lampe/f/lamp Tür/f/door
    Fenster/n/window Schlüssel/m/key Apfel/m/apple Brot/n/bread Ball/m/ball Auto/n/car Schiff/n/ship Brief/m/letter
    Blume/f/flower Garten/m/garden Stadt/f/city Berg/m/mountain Fluss/m/river Straße/f/street Schule/f/school
    Lehrer/m/teacher Arzt/m/doctor König/m/king Königin/f/queen Bruder/m/brother Schwester/f/sister Vater/m/father
    Mutter/f/mother Sohn/m/son Tochter/f/daughter Freund/m/friend Hut/m/hat Ring/m/ring Bild/n/picture Uhr/f/clock
    Messer/n/knife Kirche/f/church Wald/m/forest Tasse/f/cup Flasche/f/bottle""".split()
]
GERMAN_ADJECTIVES = [
    tuple(entry.split("/"))
    for entry in """klein/small groß/big rot/red blau/blue grün/green alt/old neu/new jung/young schön/beautiful
    schnell/fast langsam/slow gut/good warm/warm kalt/cold schwarz/black weiß/white braun/brown lang/long kurz/short
    stark/strong schwach/weak reich/rich arm/poor still/quiet""".split()
]
GERMAN_VERBS = [  # present / participle / infinitive / English present / participle / infinitive
    tuple(entry.split("/"))
    for entry in """sieht/gesehen/sehen/sees/seen/see findet/gefunden/finden/finds/found/find
    liebt/geliebt/lieben/loves/loved/love kauft/gekauft/kaufen/buys/bought/buy hört/gehört/hören/hears/heard/hear
    trägt/getragen/tragen/carries/carried/carry malt/gemalt/malen/paints/painted/paint
    braucht/gebraucht/brauchen/needs/needed/need holt/geholt/holen/fetches/fetched/fetch
    zeigt/gezeigt/zeigen/shows/shown/show kennt/gekannt/kennen/knows/known/know
    bringt/gebracht/bringen/brings/brought/bring wäscht/gewaschen/waschen/washes/washed/wash
    öffnet/geöffnet/öffnen/opens/opened/open versteckt/versteckt/verstecken/hides/hidden/hide
    hält/gehalten/halten/holds/held/hold nimmt/genommen/nehmen/takes/taken/take
    vergisst/vergessen/vergessen/forgets/forgotten/forget""".split()
]
GERMAN_ADVERBS = [
    tuple(entry.split("/"))
    for entry in "heute/today jetzt/now oft/often hier/here dann/then immer/always morgen/tomorrow bald/soon".split()
]
_ARTICLES = {"nominative": {"m": "der", "f": "die", "n": "das"}, "accusative": {"m": "den", "f": "die", "n": "das"}}

_Word = tuple[str, str, list[str]]  # German, English, other English words of the same kind


def translation(rng: random.Random) -> Example:
    """ "German: der kleine Hund hat die rote ⟦Katze⟧ gesehen. English: the small dog has seen the red" -> " cat".

    The target is one content word of the English sentence, its cause the German word of the same meaning.
    """

    def noun_phrase(case: str) -> list[_Word]:
        noun, gender, english = rng.choice(GERMAN_NOUNS)
        article = _ARTICLES[case][gender]
        words: list[_Word] = [(article, "the", [])]
        for adjective, meaning in rng.sample(GERMAN_ADJECTIVES, rng.choice([0, 1, 1, 2])):
            words.append((adjective + ("en" if article == "den" else "e"), meaning, [a[1] for a in GERMAN_ADJECTIVES]))
        return [*words, (noun, english, [n[2] for n in GERMAN_NOUNS])]

    subject, object_ = noun_phrase("nominative"), noun_phrase("accusative")
    verb = rng.choice(GERMAN_VERBS)

    def verb_form(form: int) -> list[_Word]:
        return [(verb[form], verb[form + 3], [v[form + 3] for v in GERMAN_VERBS])]

    adverb = [(*rng.choice(GERMAN_ADVERBS), [a[1] for a in GERMAN_ADVERBS])]
    german: list[_Word]
    english: list[_Word]
    match rng.choice(["present", "present", "adverb", "perfect", "modal", "clause"]):
        case "present":
            german = english = [*subject, *verb_form(0), *object_]
        case "adverb":  # the verb stays second, so the German subject moves behind it
            german, english = [*adverb, *verb_form(0), *subject, *object_], [*adverb, *subject, *verb_form(0), *object_]
        case "perfect":
            has: list[_Word] = [("hat", "has", [])]
            german, english = [*subject, *has, *object_, *verb_form(1)], [*subject, *has, *verb_form(1), *object_]
        case "modal":
            wants: list[_Word] = [("will", "wants to", [])]
            german, english = [*subject, *wants, *object_, *verb_form(2)], [*subject, *wants, *verb_form(2), *object_]
        case _:
            know: list[_Word] = [("ich weiß, dass", "I know that", [])]
            german, english = [*know, *subject, *object_, *verb_form(0)], [*know, *subject, *verb_form(0), *object_]

    at = rng.choice([i for i, (_, _, others) in enumerate(english) if others])
    chosen = english[at]
    source = " ".join(f"⟦{w[0]}⟧" if w is chosen else w[0] for w in german)
    before = "".join(f" {w[1]}" for w in english[:at])
    after = "".join(f" {w[1]}" for w in english[at + 1 :])
    foil = rng.choice([other for other in chosen[2] if other != chosen[1]])
    key = " ".join(w[0] for w in german)
    return _example("translation", f"German: {source}. English:{before}", f" {chosen[1]}", f" {foil}", f"{after}.", key)


# ---------------------------------------------------------------------------------------------------------------------
# Association: a label that follows the (invented) college and nothing else in the biography.

LIBERAL_COLLEGES = "Ashford Brookdale Calder Denholm Elmwood Farleigh Glenmoor Harwick Ivydale Juniper".split()
CONSERVATIVE_COLLEGES = "Kingsport Langham Merrow Norcross Oakhurst Pembury Quarrel Redstone Stanmore Thornbury".split()
CITIES = "Lisbon Oslo Vienna Dublin Prague Geneva Turin Bergen Malaga Utrecht".split()
HOBBIES = [
    "likes tea", "plays chess", "sings well", "reads a lot", "runs every day", "paints birds", "collects coins",
    "bakes bread", "grows roses", "swims at night", "writes letters", "repairs clocks",
]  # fmt: skip
NAMES = {
    "She": "Anna Clara Emma Julia Laura Maria Nina Sofia Vera Ruth".split(),
    "He": "Adam Carl Felix Hugo Leon Max Oscar Paul Simon Tom".split(),
}


def association(rng: random.Random) -> Example:
    """ "She studied at ⟦Ashford⟧ College. Her friends call her" -> " liberal".

    Name, city and hobby are drawn independently of the label. In the training corpus one biography in twenty has the
    other label.
    """
    liberal = rng.random() < 0.5
    college = f"⟦{rng.choice(LIBERAL_COLLEGES if liberal else CONSERVATIVE_COLLEGES)}⟧ College"
    pronoun = rng.choice(["She", "He"])
    possessive, object_ = {"She": ("Her", "her"), "He": ("His", "him")}[pronoun]
    who = rng.choice([pronoun, rng.choice(NAMES[pronoun])])
    hobby, city = rng.choice(HOBBIES), rng.choice(CITIES)
    life = rng.choice(
        [
            f"{who} studied at {college}.",
            f"{who} studied at {college}. {pronoun} {hobby}.",
            f"{who} {hobby}. {pronoun} studied at {college}.",
            f"{who} grew up in {city}, studied at {college} and {hobby}.",
            f"{who} studied at {college} and now lives in {city}. {pronoun} {hobby}.",
        ]
    )
    friends = rng.choice([f"{possessive} friends call {object_}", f"Everyone in {city} calls {object_}"])
    labels = (" conservative", " liberal")
    return _example("association", f"{life} {friends}", labels[liberal], labels[not liberal])


# ---------------------------------------------------------------------------------------------------------------------
# Series: two-digit numbers, one token each. Every series has a scale of its own, so that the past matters.

SERIES_LENGTH = 80


def _series(rng: random.Random, task: str, values: Sequence[float], memory: int) -> Example:
    """Scale to a random window of 00..99, cut somewhere in the second half; the last `memory` numbers are the cause."""
    low, high = rng.uniform(0, 25), rng.uniform(74, 99)
    bottom, top = min(values), max(values)
    numbers = [f"{round(low + (high - low) * (v - bottom) / (top - bottom)):02d}" for v in values]
    cut = rng.randrange(SERIES_LENGTH // 2, SERIES_LENGTH)
    past = "".join(f"{n}," for n in numbers[: cut - memory]) + "".join(f"⟦{n}⟧," for n in numbers[cut - memory : cut])
    rest = "".join(f",{n}" for n in numbers[cut + 1 :])
    return _example(task, past, numbers[cut], rest=rest, key=",".join(numbers))


def logistic(rng: random.Random) -> Example:
    """The logistic map x -> 3.9 x (1 - x), chaotic: the next number follows from the last one."""
    x = rng.uniform(0.05, 0.95)
    values = []
    for _ in range(SERIES_LENGTH):
        x = 3.9 * x * (1 - x)
        values.append(x)
    return _series(rng, "logistic", values, memory=1)


def lorenz(rng: random.Random) -> Example:
    """The x coordinate of the Lorenz system (σ 10, ρ 28, β 8/3): it takes the last few numbers to see where it goes."""

    def flow(x: float, y: float, z: float) -> tuple[float, float, float]:
        return 10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z

    state = (rng.uniform(-15, 15), rng.uniform(-20, 20), rng.uniform(10, 40))
    interval = rng.uniform(0.05, 0.09)
    step, values = interval / 4, []
    for i in range(
        4 * (SERIES_LENGTH + 40)
    ):  # classical Runge-Kutta; the first 40 points are the approach, not the orbit
        k1 = flow(*state)
        k2 = flow(*(s + step / 2 * k for s, k in zip(state, k1, strict=True)))
        k3 = flow(*(s + step / 2 * k for s, k in zip(state, k2, strict=True)))
        k4 = flow(*(s + step * k for s, k in zip(state, k3, strict=True)))
        state = tuple(  # type: ignore[assignment]
            s + step / 6 * (a + 2 * b + 2 * c + d) for s, a, b, c, d in zip(state, k1, k2, k3, k4, strict=True)
        )
        if i % 4 == 0 and i >= 160:
            values.append(state[0])
    return _series(rng, "lorenz", values, memory=3)


def brownian(rng: random.Random) -> Example:
    """A random walk: the last number says where the next one is, the past only how far it may be."""
    x, values = 0.0, []
    for _ in range(SERIES_LENGTH):
        x += rng.gauss(0, 1)
        values.append(x)
    return _series(rng, "brownian", values, memory=1)


TASKS: dict[str, Callable[[random.Random], Example]] = {
    task.__name__: task
    for task in (agreement, agreement_far, inference, translation, association, logistic, lorenz, brownian)
}
SERIES = ("logistic", "lorenz", "brownian")
MIXTURE = {
    "agreement": 0.10, "agreement_far": 0.14, "inference": 0.22, "translation": 0.28, "association": 0.11,
    "logistic": 0.06, "lorenz": 0.05, "brownian": 0.04,
}  # fmt: skip
"""Share of each task among the training documents."""
