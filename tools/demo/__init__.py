"""Makes the embedded demo: its pictures, questions and both models, and measures them. None of it is in the package.

`pictures` draws the sprites from the packages that they come from, `train` makes everything else from them. The facts
and things that are asked about are in `catalogue` and `facts`; the questions as they are stored in `ask`.
"""

from pathlib import Path

from vlmneurons import demo

DATA = Path(demo.__file__).parent
"""Where the package keeps the demo's files: the models, the questions with their pictures, and the credits."""
