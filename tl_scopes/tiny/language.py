"""The tasks in words: agreement, inference, translation, association. Causes stand between ⟦ and ⟧."""

import random
from collections.abc import Sequence

from tl_scopes.tiny.example import Example, marked_example

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


def sentence_with_verb(rng: random.Random, task: str, phrases: int) -> Example:
    """A sentence up to its verb: a noun, then so many phrases; the verb agrees with the noun."""
    plural = rng.random() < 0.5
    subject = _noun_phrase(rng, plural, NOUNS, cause=True)
    for _ in range(phrases):
        subject += f" {rng.choice(PREPOSITIONS)} {_noun_phrase(rng, rng.random() < 0.5, NOUNS)}"
    if rng.random() < 0.2:
        subject += f" that {_noun_phrase(rng, rng.random() < 0.5, PEOPLE)} {rng.choice(SEEN)}"
    past = rng.random() < 0.25
    marked = f"⟦Yesterday⟧ {subject}" if past else "T" + subject[1:]
    verbs = (" was", " were") if past else (" is", " are")
    return marked_example(task, marked, verbs[plural], verbs[not plural], f" {rng.choice(STATES)}.")


def _noun_phrase(rng: random.Random, plural: bool, words: Sequence[str], cause: bool = False) -> str:
    noun = rng.choice(words) + ("s" if plural else "")
    adjective = rng.choice(ADJECTIVES) + " " if rng.random() < 0.4 else ""
    return f"the {adjective}" + (f"⟦{noun}⟧" if cause else noun)


def agreement(rng: random.Random) -> Example:
    """ "The ⟦keys⟧ to the old cabinet" -> " are". One phrase stands between the noun and its verb."""
    return sentence_with_verb(rng, "agreement", 1)


def agreement_far(rng: random.Random) -> Example:
    """ "The ⟦keys⟧ to the old cabinet near the doors in the house" -> " are". Two to four phrases stand in between."""
    return sentence_with_verb(rng, "agreement_far", rng.choice([2, 2, 3, 4]))


# ---------------------------------------------------------------------------------------------------------------------
# Inference: who had what.

HOLDERS = """cook gardener doctor baker butler painter pilot farmer sailor singer lawyer teacher driver dancer writer
soldier tailor barber hunter waiter""".split()
THINGS = """cleaver shovel rope candle hammer needle bottle knife ladder umbrella lantern whistle scissors compass
mirror violin basket blanket chisel axe""".split()
FRAMES = [("weapon", "killer"), ("prize", "winner"), ("clue", "spy"), ("gift", "guest"), ("loot", "thief")]
ASIDES = ["It was a cold night.", "Nobody heard a sound.", "The house was dark.", "The rain had stopped."]


def inference(rng: random.Random) -> Example:
    """ "The ⟦gardener⟧ had the ⟦shovel⟧. The weapon was the ⟦shovel⟧. The killer is the" -> " gardener".

    In three of ten examples it is the other way round: the killer is named and the weapon asked for. There are two to
    four people, in random order. The document goes on with the same question about the others, and tells the facts once
    more.
    """
    count = rng.choice([2, 2, 3, 4])
    holders, things = rng.sample(HOLDERS, count), rng.sample(THINGS, count)
    asked, *others = rng.sample(range(count), count)
    facts = [
        f"The ⟦{holder}⟧ had the ⟦{thing}⟧." if i == asked else f"The {holder} had the {thing}."
        for i, (holder, thing) in enumerate(zip(holders, things, strict=True))
    ]
    if rng.random() < 0.25:
        facts.insert(rng.randrange(count + 1), rng.choice(ASIDES))

    questions, answers = [], []
    for person, (thing_role, holder_role) in zip([asked, *others], rng.sample(FRAMES, count), strict=True):
        if rng.random() < 0.7:
            questions.append(f"The {thing_role} was the ⟦{things[person]}⟧. The {holder_role} is the")
            answers.append(holders[person])
        else:
            questions.append(f"The {holder_role} was the ⟦{holders[person]}⟧. The {thing_role} is the")
            answers.append(things[person])
    foil = (holders if answers[0] in holders else things)[others[0]]
    rest = "".join(f" {q} {a}." for q, a in zip(questions[1:], answers[1:], strict=True))
    for person in rng.sample(range(count), count):
        holder, thing = holders[person], things[person]
        rest += (
            f" Indeed the {holder} had the {thing}." if rng.random() < 0.5 else f" The {thing} was with the {holder}."
        )
    rest = "." + rest.replace("⟦", "").replace("⟧", "")
    return marked_example("inference", f"{' '.join(facts)} {questions[0]}", f" {answers[0]}", f" {foil}", rest)


def inference_who(rng: random.Random) -> Example:
    """ "The ⟦gardener⟧ had the ⟦shovel⟧. The weapon was the ⟦shovel⟧. The killer is the" -> " gardener"."""
    while True:
        example = inference(rng)
        if example.target.strip() in HOLDERS:
            return example


def inference_what(rng: random.Random) -> Example:
    """ "The ⟦gardener⟧ had the ⟦shovel⟧. The killer was the ⟦gardener⟧. The weapon is the" -> " shovel"."""
    while True:
        example = inference(rng)
        if example.target.strip() in THINGS:
            return example


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

    The target is one content word of the English sentence, and its cause is the German word of the same meaning.
    """

    subject, object_ = _german_noun_phrase(rng, "nominative"), _german_noun_phrase(rng, "accusative")
    verb = rng.choice(GERMAN_VERBS)
    when, meaning = rng.choice(GERMAN_ADVERBS)
    adverb: list[_Word] = [(when, meaning, [a[1] for a in GERMAN_ADVERBS])]
    german: list[_Word]
    english: list[_Word]
    match rng.choice(["present", "present", "adverb", "perfect", "modal", "clause"]):
        case "present":
            german = english = [*subject, *_verb_form(verb, 0), *object_]
        case "adverb":  # the verb stays second, so the German subject moves behind it
            word = _verb_form(verb, 0)
            german, english = [*adverb, *word, *subject, *object_], [*adverb, *subject, *word, *object_]
        case "perfect":
            word, has = _verb_form(verb, 1), ("hat", "has", list[str]())
            german, english = [*subject, has, *object_, *word], [*subject, has, *word, *object_]
        case "modal":
            word, wants = _verb_form(verb, 2), ("will", "wants to", list[str]())
            german, english = [*subject, wants, *object_, *word], [*subject, wants, *word, *object_]
        case _:
            word, know = _verb_form(verb, 0), ("ich weiß, dass", "I know that", list[str]())
            german, english = [know, *subject, *object_, *word], [know, *subject, *word, *object_]

    at = rng.choice([i for i, (_, _, others) in enumerate(english) if others])
    chosen = english[at]
    source = " ".join(f"⟦{w[0]}⟧" if w is chosen else w[0] for w in german)
    before = "".join(f" {w[1]}" for w in english[:at])
    after = "".join(f" {w[1]}" for w in english[at + 1 :])
    foil = rng.choice([other for other in chosen[2] if other != chosen[1]])
    key = " ".join(w[0] for w in german)
    return marked_example(
        "translation", f"German: {source}. English:{before}", f" {chosen[1]}", f" {foil}", f"{after}.", key
    )


def _german_noun_phrase(rng: random.Random, case: str) -> list[_Word]:
    noun, gender, english = rng.choice(GERMAN_NOUNS)
    article = _ARTICLES[case][gender]
    words: list[_Word] = [(article, "the", [])]
    for adjective, meaning in rng.sample(GERMAN_ADJECTIVES, rng.choice([0, 1, 1, 2])):
        words.append((adjective + ("en" if article == "den" else "e"), meaning, [a[1] for a in GERMAN_ADJECTIVES]))
    return [*words, (noun, english, [n[2] for n in GERMAN_NOUNS])]


def _verb_form(verb: Sequence[str], form: int) -> list[_Word]:
    return [(verb[form], verb[form + 3], [v[form + 3] for v in GERMAN_VERBS])]


# ---------------------------------------------------------------------------------------------------------------------
# Association: a label that depends on the (invented) college and on nothing else in the biography.

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
    return marked_example("association", f"{life} {friends}", labels[liberal], labels[not liberal])
