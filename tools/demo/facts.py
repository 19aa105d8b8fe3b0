"""What the demo asks: facts about each culture, the wording of the questions, and the options of an answer.

The picture shows a thing; most questions ask for a fact about the country that the thing points to. So the answer needs
the picture (which country?) and the question (which fact?), and the facts themselves are nowhere but in the decoder.

Options are built so that neither half is enough. In 85 % of the questions there stand beside the right answer the same
fact of two other countries (the question alone cannot tell them apart: 1 in 3) and another fact of the same country
(the picture alone cannot: 1 in 2). In the others all three are of other countries: there the picture tells without the
question, and the question alone is no more than a guess (1 in 4).
"""

import random
from collections.abc import Sequence

from tools.demo.catalogue import CULTURES, ITEMS, Item


def _fact(*answers: str) -> dict[str, str]:
    return dict(zip(CULTURES, answers, strict=True))


FACTS: dict[str, dict[str, str]] = {
    "capital": _fact("Tokyo", "Beijing", "New Delhi", "Paris", "Berlin", "Washington", "Mexico City", "Cairo"),
    "money": _fact("yen", "yuan", "rupee", "euro", "euro", "dollar", "peso", "pound"),
    "language": _fact("Japanese", "Mandarin", "Hindi", "French", "German", "English", "Spanish", "Arabic"),
    "greeting": _fact("konnichiwa", "nihao", "namaste", "bonjour", "guten Tag", "howdy", "hola", "salaam"),
    "thanks": _fact("arigato", "xiexie", "dhanyavad", "merci", "danke", "thanks", "gracias", "shukran"),
    "yes": _fact("hai", "shi", "haan", "oui", "ja", "yes", "si", "naam"),
    "one": _fact("ichi", "yi", "ek", "un", "eins", "one", "uno", "wahid"),
    "water": _fact("mizu", "shui", "pani", "eau", "Wasser", "water", "agua", "moya"),
    "river": _fact("Shinano", "Yangtze", "Ganges", "Seine", "Rhine", "Mississippi", "Usumacinta", "Nile"),
    "mountain": _fact("Fuji", "Everest", "Kangchenjunga", "Mont Blanc", "Zugspitze", "Denali", "Orizaba", "Catherine"),
    "lake": _fact("Biwa", "Poyang", "Chilika", "Annecy", "Constance", "Michigan", "Chapala", "Nasser"),
    "island": _fact("Kyushu", "Hainan", "Majuli", "Corsica", "Rügen", "Maui", "Cozumel", "Elephantine"),
    "city": _fact("Osaka", "Shanghai", "Mumbai", "Marseille", "Munich", "Chicago", "Guadalajara", "Alexandria"),
    "region": _fact("Hokkaido", "Sichuan", "Kerala", "Brittany", "Bavaria", "Texas", "Oaxaca", "Sinai"),
    "neighbour": _fact("Korea", "Mongolia", "Nepal", "Spain", "Poland", "Canada", "Guatemala", "Libya"),
    "continent": _fact("Asia", "Asia", "Asia", "Europe", "Europe", "North America", "North America", "Africa"),
    "dish": _fact("ramen", "Peking duck", "biryani", "ratatouille", "bratwurst", "gumbo", "mole", "koshari"),
    "drink": _fact("sake", "baijiu", "lassi", "pastis", "Riesling", "bourbon", "tequila", "karkade"),
    "writer": _fact("Soseki", "Lu Xun", "Tagore", "Hugo", "Goethe", "Twain", "Paz", "Mahfouz"),
    "ruler": _fact("Meiji", "Qin Shi Huang", "Ashoka", "Napoleon", "Bismarck", "Lincoln", "Juárez", "Cleopatra"),
    "painter": _fact("Hokusai", "Qi Baishi", "Varma", "Monet", "Dürer", "Hopper", "Kahlo", "Mahmoud Said"),
    "festival": _fact(
        "Tanabata",
        "Spring Festival",
        "Diwali",
        "Bastille Day",
        "Oktoberfest",
        "Thanksgiving",
        "Day of the Dead",
        "Sham el Nessim",
    ),
    "sport": _fact("sumo", "wushu", "kabaddi", "pétanque", "handball", "rodeo", "charrería", "squash"),
    "instrument": _fact("shamisen", "erhu", "sitar", "musette", "zither", "banjo", "vihuela", "oud"),
    "dance": _fact("bon odori", "yangge", "kathak", "cancan", "Schuhplattler", "square dance", "jarabe", "tanoura"),
    "dialling": _fact("81", "86", "91", "33", "49", "1", "52", "20"),
    "domain": _fact(".jp", ".cn", ".in", ".fr", ".de", ".us", ".mx", ".eg"),
    "country": dict(zip(CULTURES, CULTURES)),
}
"""The facts, by kind of question and culture: one that a traveller might name, seldom the only one that is true."""

WORDING: dict[str, tuple[str, str]] = {
    "capital": ("What is the capital there?", "Which city governs the country of this picture?"),
    "money": ("What money do people pay with there?", "Which currency is used in the country of this picture?"),
    "language": ("What language do people speak there?", "Which language is spoken in the country of this picture?"),
    "greeting": ("How do people say hello there?", "Which greeting is used in the country of this picture?"),
    "thanks": ("How do people say thank you there?", "Which word of thanks is used in the country of this picture?"),
    "yes": ("How do people say yes there?", "Which word means yes in the country of this picture?"),
    "one": ("How do people say the number one there?", "Which word counts one in the country of this picture?"),
    "water": ("How do people ask for water there?", "Which word means water in the country of this picture?"),
    "river": ("What river flows there?", "Which river runs through the country of this picture?"),
    "mountain": ("What mountain stands there?", "Which mountain is in the country of this picture?"),
    "lake": ("What lake lies there?", "Which lake is in the country of this picture?"),
    "island": ("What island belongs there?", "Which island is part of the country of this picture?"),
    "city": ("What other big city is there?", "Which big city besides the capital is in the country of this picture?"),
    "region": ("What region is there?", "Which region is part of the country of this picture?"),
    "neighbour": ("What country is a neighbour?", "Which country is next to the country of this picture?"),
    "continent": ("What continent is that on?", "Which continent has the country of this picture?"),
    "dish": ("What dish would a cook make there?", "Which dish is typical of the country of this picture?"),
    "drink": ("What would a guest drink there?", "Which drink is typical of the country of this picture?"),
    "writer": ("What writer is from there?", "Which author is from the country of this picture?"),
    "ruler": ("What ruler is from there?", "Which leader made history in the country of this picture?"),
    "painter": ("What painter is from there?", "Which artist is from the country of this picture?"),
    "festival": ("What do people celebrate there?", "Which festival is held in the country of this picture?"),
    "sport": ("What sport do people play there?", "Which sport is typical of the country of this picture?"),
    "instrument": ("What instrument do people play there?", "Which instrument sounds in the country of this picture?"),
    "dance": ("What do people dance there?", "Which dance is typical of the country of this picture?"),
    "dialling": ("What number do people dial to call there?", "Which calling code has the country of this picture?"),
    "domain": ("What do web addresses end in there?", "Which web domain has the country of this picture?"),
    "country": ("What country is this from?", "Which country is the country of this picture?"),
    "name": ("What is this?", "Which thing is shown in the picture?"),
}
"""Two wordings for every kind of question."""

KINDS = tuple(WORDING)
"""The kinds of question; ``"name"`` asks for the item itself, all others for a fact about its culture."""


def answer_to(item: Item, kind: str) -> str:
    """The right answer to a question of this kind about a picture of this item."""
    return item.name if kind == "name" else FACTS[kind][item.culture]


def vocabulary() -> list[str]:
    """Every answer that any question has, without repeats, in a fixed order."""
    answers = [answer for fact in FACTS.values() for answer in fact.values()]
    return list(dict.fromkeys(answers + [item.name for item in ITEMS]))


def held_out_pairs(seed: int, share: float = 0.15) -> frozenset[tuple[str, str]]:
    """Pairs (item name, kind of question) that training never shows.

    The model has learned both halves apart: what the item is, and that fact from other pictures of its culture. The
    kind ``"name"`` is never held out, because nothing else could teach an item's name.

    Args:
        seed: which pairs.
        share: about how many of all pairs, between 0 and 1.
    """
    generator = random.Random(seed)
    pairs = [(item.name, kind) for item in ITEMS for kind in KINDS if kind != "name"]
    return frozenset(pair for pair in pairs if generator.random() < share)


FOREIGN_SHARE = 0.15
"""Share of the questions whose wrong options are all of other cultures."""


def options_for(item: Item, kind: str, generator: random.Random) -> tuple[list[str], int, bool]:
    """Four options in random order, the index of the right one, and whether the picture alone is not enough.

    Wrong options are right for other cultures (for ``"name"``: items of the same category from other cultures), but
    for one in most questions, which is another fact about the same culture.
    """
    answer = answer_to(item, kind)
    elsewhere: Sequence[str]
    if kind == "name":
        elsewhere = [other.name for other in ITEMS if other.category == item.category and other.culture != item.culture]
    else:
        elsewhere = sorted({fact for culture, fact in FACTS[kind].items() if culture != item.culture} - {answer})
    same_culture = [fact[item.culture] for other, fact in FACTS.items() if other != kind]
    foreign = generator.random() < FOREIGN_SHARE
    options = [answer, *generator.sample(elsewhere, 3 if foreign else 2)]
    if not foreign:
        options.append(generator.choice(same_culture))
    generator.shuffle(options)
    return options, options.index(answer), not foreign
