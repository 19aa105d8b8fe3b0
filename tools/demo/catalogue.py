"""What the pictures of the demo show: eight cultures, their items, and where a picture of each item comes from.

An *item* is a thing that the demo's model learns to recognise ("sushi", "Eiffel Tower"). An item has several
*pictures*, each in another *style*: one set of emoji, flags or outlines, or a photograph. Whole styles are held out:
the model is trained on `TRAINING_STYLES` and asked about the others, so that a right answer is a recognised thing and
not a remembered file. Photographs cannot be held out like that, as most items have only one: the held-out picture is
another section of the same photograph, which its style says (``photo-section``).

Groups are countries because that is how the sources and the literature name them. Emoji are stereotypes: they show what
a standards body and a few companies thought worth drawing. The data card (``docs/demo.md``) says so to the reader.
"""

from dataclasses import dataclass

CULTURES = ("Japan", "China", "India", "France", "Germany", "USA", "Mexico", "Egypt")
"""The groups, in the order of every table of the demo."""

COUNTRY_CODES = dict(zip(CULTURES, ("jp", "cn", "in", "fr", "de", "us", "mx", "eg")))
"""ISO 3166-1 alpha-2 codes, by which the flag sets name their files."""

TRAINING_STYLES = (
    "noto",
    "noto-v1",
    "fluent-emoji",
    "twemoji",
    "emojione",
    "streamline-emojis",
    "flag",
    "flagpack",
    "cif",
    "outline-110m",
    "outline-10m",
    "photo",
    "photo-second",
)
"""Styles that the model is trained on."""

HELD_OUT_STYLES = (
    "fluent-emoji-flat",
    "fxemoji",
    "twemoji-flag",
    "circle-flags",
    "outline-50m",
    "photo-section",
)
"""Styles that only identification and evaluation questions show."""


@dataclass(frozen=True)
class Item:
    """One thing that pictures show.

    Attributes:
        culture: the group it belongs to.
        name: what the answer to "What is shown?" is.
        category: kind of thing; wrong answers to "What is shown?" are of the same category.
        emoji: names of its drawing in the emoji sets, the first that a set has is taken.
        photos: one or two photographs, as file names of ``gcompris-qt-data`` (or ``china.jpg`` of scikit-learn).
    """

    culture: str
    name: str
    category: str
    emoji: tuple[str, ...] = ()
    photos: tuple[str, ...] = ()


def _items(culture: str, category: str, table: dict[str, str | tuple[str, ...]]) -> list[Item]:
    """Items drawn in emoji, from ``{name: emoji name or names}``."""
    return [
        Item(culture, name, category, (emoji,) if isinstance(emoji, str) else emoji) for name, emoji in table.items()
    ]


def _photo(culture: str, name: str, *photos: str, category: str = "place", emoji: tuple[str, ...] = ()) -> Item:
    return Item(culture, name, category, emoji, tuple(photos))


ITEMS: tuple[Item, ...] = (
    *_items(
        "Japan",
        "food",
        {
            "sushi": "sushi",
            "dango": "dango",
            "onigiri": ("rice-ball", "riceball"),
            "bento": ("bento-box", "bentobox"),
            "senbei": ("rice-cracker", "ricecracker"),
            "narutomaki": "fish-cake-with-swirl",
        },
    ),
    *_items(
        "Japan",
        "tradition",
        {
            "kimono": "kimono",
            "koinobori": ("carp-streamer", "carpstreamer"),
            "hina dolls": ("japanese-dolls", "japanesedolls"),
            "wind chime": ("wind-chime", "windchime"),
            "tengu": "goblin",
        },
    ),
    *_items(
        "Japan",
        "place",
        {
            "torii": "shinto-shrine",
            "tenshu": ("japanese-castle", "japanesecastle"),
            "Tokyo Tower": ("tokyo-tower", "tokyotower"),
            "Mount Fuji": ("mount-fuji", "mountfuji"),
        },
    ),
    *_items("Japan", "nature", {"cherry blossom": ("cherry-blossom", "cherryblossom")}),
    _photo("Japan", "taiko", "explore_world_music/japan.webp", category="tradition"),
    *_items("China", "food", {"mooncake": "moon-cake", "jiaozi": "dumpling"}),
    *_items(
        "China",
        "tradition",
        {
            "red envelope": "red-envelope",
            "dragon": "dragon",
            "mahjong": ("mahjong-red-dragon", "mahjongtilereddragon"),
            "firecracker": "firecracker",
            "yin yang": ("yin-yang", "yinyang"),
            "abacus": "abacus",
            "kite": "kite",
        },
    ),
    *_items("China", "sport", {"table tennis": ("ping-pong", "pingpong")}),
    _photo("China", "panda", "explore_world_animals/panda.webp", category="nature", emoji=("panda", "pandaface")),
    _photo("China", "Great Wall", "explore_monuments/greatWallofChina.webp", "categorization/greatWall.webp"),
    _photo("China", "Summer Palace", "scikit-learn/china.jpg"),
    *_items(
        "India",
        "tradition",
        {
            "sari": "sari",
            "diya": "diya-lamp",
            "auto rickshaw": "auto-rickshaw",
            "om": "om",
            "dharma wheel": "wheel-of-dharma",
        },
    ),
    *_items("India", "sport", {"cricket": ("cricket-game", "cricketgame")}),
    *_items("India", "food", {"mango": "mango"}),
    *_items("India", "place", {"mandir": "hindu-temple"}),
    *_items(
        "India",
        "nature",
        {"peacock": "peacock", "tiger": ("tiger-face", "tigerface", "tiger"), "lotus": "lotus", "elephant": "elephant"},
    ),
    _photo("India", "Charminar", "explore_monuments/charminar.webp"),
    _photo("India", "Golden Temple", "explore_monuments/goldenTemple.webp"),
    _photo("India", "Hawa Mahal", "explore_monuments/hawaMahal.webp"),
    _photo("India", "Mysore Palace", "explore_monuments/mysorePalace.webp"),
    _photo("India", "Qutub Minar", "explore_monuments/qutubMinar.webp", "categorization/kutubMinar.webp"),
    _photo("India", "India Gate", "categorization/IndiaGate.webp"),
    *_items(
        "France",
        "food",
        {
            "croissant": "croissant",
            "baguette": "baguette-bread",
            "cheese": ("cheese-wedge", "cheese"),
            "wine": ("wine-glass", "wineglass"),
            "champagne": ("bottle-with-popping-cork", "bottlewithpoppingcork"),
            "oyster": "oyster",
            "escargot": "snail",
        },
    ),
    *_items("France", "tradition", {"fleur de lis": ("fleur-de-lis", "fleurdelis")}),
    *_items("France", "sport", {"fencing": "person-fencing", "cycling": "person-biking"}),
    *_items("France", "nature", {"rooster": "rooster"}),
    _photo("France", "Eiffel Tower", "explore_monuments/eiffelTower.webp", "categorization/eiffelTower.webp"),
    _photo("France", "Mont Saint Michel", "explore_monuments/montStMichel.webp"),
    _photo("France", "Pont du Gard", "explore_monuments/pontduGard.webp"),
    _photo("France", "Chambord", "explore_monuments/chateaudeChambord.webp"),
    _photo("France", "Louvre", "categorization/leMusee.webp"),
    _photo("France", "Arles Amphitheatre", "explore_monuments/arlesAmphitheater.webp"),
    *_items("Germany", "food", {"pretzel": "pretzel", "beer": ("beer-mug", "beermug"), "potato": "potato"}),
    *_items(
        "Germany",
        "tradition",
        {
            "Christmas tree": ("christmas-tree", "christmastree"),
            "autobahn": "motorway",
            "sheet music": ("musical-score", "musicalscore"),
            "steam engine": ("locomotive", "steamlocomotive"),
        },
    ),
    *_items("Germany", "place", {"castle": ("castle", "europeancastle")}),
    *_items("Germany", "sport", {"football": ("soccer-ball", "soccerball")}),
    *_items("Germany", "nature", {"bear": ("bear", "bearface"), "wild boar": "boar"}),
    _photo("Germany", "Brandenburg Gate", "explore_monuments/brandenburgGate.webp"),
    _photo("Germany", "Neuschwanstein", "explore_monuments/neuschwansteinCastle.webp"),
    _photo("Germany", "Berlin Cathedral", "explore_monuments/berlinCathedral.webp"),
    _photo("Germany", "Schwerin Palace", "explore_monuments/schwerinPalace.webp"),
    _photo("Germany", "Trier Baths", "explore_monuments/trierImperialBaths.webp"),
    _photo("Germany", "Worms Cathedral", "explore_monuments/wormsCathedral.webp"),
    *_items(
        "USA",
        "food",
        {
            "hamburger": "hamburger",
            "hot dog": "hot-dog",
            "doughnut": "doughnut",
            "popcorn": "popcorn",
            "pie": "pie",
        },
    ),
    *_items("USA", "tradition", {"cowboy": "cowboy-hat-face", "jack o'lantern": ("jack-o-lantern", "jackolantern")}),
    *_items(
        "USA",
        "sport",
        {
            "American football": ("american-football", "americanfootball"),
            "baseball": "baseball",
            "basketball": "basketball",
        },
    ),
    *_items("USA", "nature", {"bald eagle": "eagle", "turkey": "turkey"}),
    _photo(
        "USA",
        "Statue of Liberty",
        "explore_monuments/statueofLiberty.webp",
        "categorization/statueOfLiberty.webp",
        emoji=("statue-of-liberty", "statueofliberty"),
    ),
    _photo("USA", "Mount Rushmore", "explore_monuments/mountRushmore.webp", "categorization/mountRushmore.webp"),
    _photo("USA", "Lincoln Memorial", "explore_monuments/lincolnMemorial.webp"),
    _photo("USA", "Capitol", "categorization/usCapitol.webp"),
    _photo("USA", "bison", "explore_world_animals/bison.webp", category="nature", emoji=("bison",)),
    *_items(
        "Mexico",
        "food",
        {
            "taco": "taco",
            "tamale": "tamale",
            "burrito": "burrito",
            "chili": "hot-pepper",
            "avocado": "avocado",
            "maize": ("ear-of-corn", "earofmaize"),
            "chocolate": ("chocolate-bar", "chocolatebar"),
            "lime": "lime",
        },
    ),
    *_items("Mexico", "tradition", {"maracas": "maracas"}),
    *_items("Mexico", "nature", {"nopal": "cactus", "volcano": "volcano", "parrot": "parrot"}),
    _photo("Mexico", "mariachi", "explore_world_music/mexico.webp", category="tradition"),
    _photo("Mexico", "jaguar", "explore_world_animals/jaguar.webp", category="nature"),
    *_items("Egypt", "food", {"falafel": "falafel", "pita": "stuffed-flatbread"}),
    *_items("Egypt", "tradition", {"papyrus": "scroll", "felucca": "sailboat"}),
    *_items("Egypt", "place", {"mosque": "mosque"}),
    *_items(
        "Egypt",
        "nature",
        {
            "camel": ("camel", "dromedarycamel"),
            "crocodile": "crocodile",
            "date palm": ("palm-tree", "palmtree"),
            "hippopotamus": "hippopotamus",
            "cobra": "snake",
            "cat": "black-cat",
        },
    ),
    _photo("Egypt", "Great Pyramid", "explore_monuments/greatPyramidOfGiza.webp"),
    _photo("Egypt", "Bent Pyramid", "explore_monuments/bentPyramid.webp"),
    _photo("Egypt", "Red Pyramid", "explore_monuments/redPyramid.webp"),
    _photo("Egypt", "Meidum Pyramid", "explore_monuments/meidumPyramid.webp"),
    *(Item(culture, f"flag of {culture}", "flag") for culture in CULTURES),
    *(Item(culture, f"map of {culture}", "map") for culture in CULTURES),
)
"""All items. Flags and map outlines have no emoji name: their sources go by country."""
