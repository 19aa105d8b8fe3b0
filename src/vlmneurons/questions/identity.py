"""What identifies questions: a digest of all that is asked."""

import hashlib
import json
from typing import TYPE_CHECKING

from vlmneurons.questions.sets import QuestionSet

if TYPE_CHECKING:
    pass


def digest_of_questions(questions: QuestionSet) -> str:
    """A digest of what is asked: ids, prompts with their options as shown, answers and groups, in order.

    Pictures enter by their number only: they are not read.
    """
    digest = hashlib.sha256()
    for item in questions:
        order = questions.order(item)
        text = questions.prompt(item, [item.options[index] for index in order])
        digest.update(json.dumps([item.id, text, item.options, order, item.answer, item.group, item.n_images]).encode())
    return digest.hexdigest()[:16]
