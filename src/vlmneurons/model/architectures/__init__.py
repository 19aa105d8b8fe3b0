"""Where the MLP neurons are in a transformers model: found by structure, overridable by registration.

Nothing here is a list of models. Every block of a model is looked at once as a data flow (its ``forward`` is followed
symbolically, no weight is touched and nothing is computed, so models on the meta device, sharded, quantised or
adapted ones are the same to us), and an MLP is what computes like one:

    pre = gate(x)    gate = activation(pre)    post = gate * up(x)    output = down(post)

or, without an ``up`` branch, ``post = gate``. Names of modules name towers, and never decide what a module does. What
cannot be told for certain raises `ArchitectureError`, which shows what was seen and how to `register_architecture`.

In the order in which one reads them: `layout` (what an MLP is), `operations` and `modules` (what single steps do),
`symbols` (following a forward), `flow` (MLPs in what was followed), `probe` (trying out what cannot be), `search` (a
whole model), `towers` (names), `find` (what a user calls); `experts` and `hooks` read and write what was found.
"""

from vlmneurons.model.architectures.find import Architecture, register_architecture
from vlmneurons.model.architectures.layout import MLPLayout

__all__ = ["Architecture", "MLPLayout", "register_architecture"]
