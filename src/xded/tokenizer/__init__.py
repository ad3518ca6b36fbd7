"""Text to token ids and back: one normalisation, one tokenizer, one self-test before anything is trained.

A token id is the row of the model's heads that stands for it: no offset is ever added or taken away.
"""

from xded.tokenizer.normaliser import NORMALISERS, normalise
from xded.tokenizer.tokenizer import KINDS, Tokenizer

__all__ = ["KINDS", "NORMALISERS", "Tokenizer", "normalise"]
