"""OFT: blocks by size and by number, shared, exact and as a series, constrained. PEFT does linear layers only."""

from __future__ import annotations

import peft

from addenda.methods.oft import OFT

KINDS = ("llama",)
OURS = {
    "exact": lambda _: OFT(block_size=8),
    "series": lambda _: OFT(block_size=4, exact=False),
    "many-terms": lambda _: OFT(block_size=4, exact=False, terms=8),
    "blocks-shared": lambda _: OFT(blocks=4, shared=True),
    "constrained": lambda _: OFT(block_size=8, freedom=0.9),
    "constrained-series": lambda _: OFT(block_size=8, freedom=0.9, shared=True, exact=False),
}


def theirs(**settings):
    return lambda _, **targets: peft.OFTConfig(**settings, **targets)


THEIRS = {
    "exact": theirs(oft_block_size=8, use_cayley_neumann=False),
    "series": theirs(oft_block_size=4),
    **{f"terms-{terms}": theirs(oft_block_size=4, num_cayley_neumann_terms=terms) for terms in (3, 4, 6, 7)},
    "blocks-shared": theirs(r=4, oft_block_size=0, block_share=True, module_dropout=0.1),
    "constrained": theirs(oft_block_size=8, coft=True, eps=0.9, use_cayley_neumann=False),
    "constrained-shared": theirs(oft_block_size=8, coft=True, eps=0.9, block_share=True, init_weights=False),
}
