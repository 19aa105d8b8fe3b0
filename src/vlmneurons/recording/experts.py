"""Experts that choose from only some of a batch's tokens: nothing can be said of a token that they were not shown."""

import contextlib
from collections.abc import Callable, Iterable, Iterator

from vlmneurons.errors import MismatchError
from vlmneurons.files.stopping import hooked
from vlmneurons.model.architectures.hooks import see_number_of_tokens
from vlmneurons.model.vlm import VLM
from vlmneurons.neurons.sites import Site


@contextlib.contextmanager
def all_tokens(model: VLM, sites: Iterable[Site], number: Callable[[], int]) -> Iterator[None]:
    """Within, experts that are shown only some of a batch's tokens are refused: it is not known which.

    Args:
        model: the model.
        sites: of the language tower; those of experts are looked at.
        number: how many tokens the batch has, padding included; 0 where nothing is asked of tokens.
    """

    def checked(site: Site) -> Callable[[int], None]:
        def check(n_shown: int) -> None:
            n_tokens = number()
            if n_tokens and n_shown % n_tokens:  # some show every expert every token, one expert after the other
                raise MismatchError(
                    f"{site}: its experts choose from {n_shown} of the batch's {n_tokens} tokens, and it cannot be "
                    "told which; take neurons that see all of them, or questions without pictures"
                )

        return check

    # The experts of a layer share a router, which is shown what they choose from: one look for each is enough.
    routed = [(mlp, site) for site in sites if (mlp := model.mlp_of(site)).routed or mlp.expert is not None]
    routers = {mlp.path.rpartition(".")[0]: (mlp, site) for mlp, site in routed}
    with hooked(see_number_of_tokens(model.hf, mlp, checked(site)) for mlp, site in routers.values()):
        yield
