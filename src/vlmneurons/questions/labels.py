"""Options that say where they stand: they mean something else in another order, so they are not shuffled."""

import re
from collections.abc import Sequence

_OWN = re.compile(r"\(?([A-Za-z]|\d{1,2}(?=[.):]\s))[.):]\s*\S")
_OTHERS = re.compile(
    r"\b(?:both|either|neither|all|none|any|only)\b.*\b(?:above|below|previous|preceding)\b|\babove\b.*\b(?:all|none)\b"
    r"|(?i:\b(?:both|either|neither|options?|choices?|answers?)\s+)\(?[A-H]\)?(?!\w)"
    r"|^\W*[A-H]\W*(?i:and|or|&|y|et|e|und|\+)\W*[A-H]\W*$"
    r"|anterior|ci-dessus|acima|précédent|di atas|vorherig|precedenti|以上|上記|上述|उपरोक्त|위의|السابق|выше|trên"
)


def names_places(options: Sequence[str]) -> bool:
    """Whether options have letters or numbers of their own ("A. Oslo"), or speak of others' ("Both A and B").

    Args:
        options: the options of one question.
    """
    labels = {match[1].upper() for match in map(_OWN.match, options) if match}
    places = range(len(options))
    own = labels in ({chr(ord("A") + place) for place in places}, {str(place + 1) for place in places})
    return own or any(_OTHERS.search(option) or _OTHERS.search(option.lower()) for option in options)
