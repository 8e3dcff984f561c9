"""Text to token ids and back: GPT-2's own BPE, bytes, characters, and a BPE trained on any text.

On disk a tokenizer is a `tokenizer.json` in the format of the `tokenizers` library, which other programs read too;
GPT-2's own is written with its original `vocab.json` and `merges.txt` beside it.
"""

from gptlab.text.tokenizers.base import END_OF_TEXT, Tokenizer, refuse_surrogates
from gptlab.text.tokenizers.files import FileTokenizer, UnsupportedTokenizer
from gptlab.text.tokenizers.gpt2 import GPT2_PATTERN, GPT2Tokenizer, byte_alphabet, gpt2_merges, gpt2_vocab
from gptlab.text.tokenizers.make import KINDS, byte_tokenizer, char_tokenizer, make_tokenizer, train_bpe
from gptlab.text.tokenizers.read import TOKENIZER_FILES, read_tokenizer

__all__ = [
    "END_OF_TEXT",
    "GPT2_PATTERN",
    "KINDS",
    "TOKENIZER_FILES",
    "FileTokenizer",
    "GPT2Tokenizer",
    "Tokenizer",
    "UnsupportedTokenizer",
    "byte_alphabet",
    "byte_tokenizer",
    "char_tokenizer",
    "gpt2_merges",
    "gpt2_vocab",
    "make_tokenizer",
    "read_tokenizer",
    "refuse_surrogates",
    "train_bpe",
]
