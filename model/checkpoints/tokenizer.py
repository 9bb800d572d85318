"""CLIP's tokenizer: a prompt → tokens. Byte-pair encoding, by the library `tokenizers`.

The pipeline is CLIP's own, and only its tables come from a checkpoint: nothing that a file describes is run. The ids
are those of transformers' CLIPTokenizer.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from model.rows import Fragment, Prompt, Tokens

# Of the library's ways to encode, the batches release the interpreter's lock. By default they would also start a pool
# of threads, even for a batch of one. The library reads this variable at each call.
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import tokenizers
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

# CLIP's words: contractions, letters, one digit, a special token, other characters without spaces.
_WORDS = r"'(?:[stmd]|re|ve|ll)|\p{L}+|\p{N}|<\|(?:start|end)oftext\|>|[^\s\p{L}\p{N}]+"
# A special token that is still there as a word, <|ENDOFTEXT|>, falls into three. In transformers ByteLevel splits so,
# with an expression that is tried on every word and would take half of the time. This one is for texts that may have
# such a word.
_INSIDE = r"\A<\|(?=(?:start|end)oftext\|>\z)|(?<=oftext)\|>\z"
_MAY_NEED_INSIDE = re.compile(r"<\|(?:start|end)oftext\|>", re.IGNORECASE)
# The words that are encoded most often where a text takes the most time: all of one letter. U+0307 is a part of İ.
_CACHED = [*(letter for letter in map(chr, range(33, 127)) if letter == letter.lower()), "\u0307"]


class Added(NamedTuple):
    """A token that is cut out of a text before it is split into words.

    Attributes:
        content: the text that it stands for.
        single_word: whether it is found only as a whole word.
        lstrip, rstrip: whether it takes the spaces to its left and right.
        normalized: whether it is found in the normalized text, instead of in the text as it came.
    """

    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False


@dataclass(frozen=True, slots=True)
class Tables:
    """What a checkpoint decides of a tokenizer.

    Attributes:
        vocabulary: the id of each token.
        merges: pairs of tokens that become one; the first pairs first.
        added: those that the vocabulary lacks get the next ids. The last of several with one content counts.
        start, end, pad, unknown: tokens.
        length: tokens of an encoded prompt, start and end included.
    """

    vocabulary: Mapping[str, int]
    merges: Sequence[tuple[str, str]]
    added: Sequence[Added]
    start: str
    end: str
    pad: str
    unknown: str
    length: int


class Tokenizer:
    """Maps prompts to tokens. Any number of threads may call it at once.

    Attributes:
        length: tokens of an encoded prompt.
        digest: a hash of everything in the checkpoint that decides ids, hexadecimal.
    """

    def __init__(self, tables: Tables) -> None:
        self.length = tables.length
        self.digest = _digest(tables)
        model = BPE(
            vocab=dict(tables.vocabulary),
            merges=list(tables.merges),
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            fuse_unk=False,
            unk_token=tables.unknown,
            cache_capacity=len(_CACHED),  # they fill the cache, so that no prompt stays in it
        )
        self._backend = _backend(model, tables.added)
        self._thorough_backend = _backend(model, tables.added, _INSIDE)
        self._backend.encode_batch_fast([" ".join(_CACHED)])
        self._start, self._end, self._pad = (self.id_of(token) for token in (tables.start, tables.end, tables.pad))

    def __call__(self, prompt: Prompt) -> Tokens:
        """Map a prompt to its tokens: start, at most length − 2 tokens of the text, end, padding.

        Args:
            prompt: without lone surrogates, which UTF-8 cannot encode.
        """
        fragments = (Fragment(prompt),) if isinstance(prompt, str) else prompt
        texts = [fragment.text for fragment in fragments]
        backend = self._thorough_backend if any(map(_MAY_NEED_INSIDE.search, texts)) else self._backend
        encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
        pairs = zip(fragments, encodings, strict=True)
        weighted = [(token, fragment.weight) for fragment, encoding in pairs for token in encoding.ids]
        kept = weighted[: self.length - 2]
        padding = [self._pad] * (self.length - 2 - len(kept))
        ids = (self._start, *(token for token, _ in kept), self._end, *padding)
        weights = (1.0, *(weight for _, weight in kept), *[1.0] * (1 + len(padding)))
        is_weighted = any(weight != 1 for weight in weights)
        return Tokens(ids, len(weighted) - len(kept), weights=weights if is_weighted else ())

    def id_of(self, token: str) -> int:
        """The id of a token of the vocabulary, or of an added one."""
        number: int | None = self._backend.token_to_id(token)
        if number is None:
            raise KeyError(token)
        return number

    @property
    def fingerprint(self) -> dict[str, str]:
        """Everything beside the checkpoint that can change an id, by name: the library knows its own Unicode."""
        return {"tokenizers": tokenizers.__version__}


class TwoTokenizers:
    """Maps prompts to the tokens of two text encoders, each with its own tokenizer. As a Tokenizer otherwise.

    Args:
        first, second: of one length.
    """

    def __init__(self, first: Tokenizer, second: Tokenizer) -> None:
        self.length = first.length
        self.digest = hashlib.sha256((first.digest + second.digest).encode()).hexdigest()
        self.fingerprint = first.fingerprint
        self._tokenizers = first, second

    def __call__(self, prompt: Prompt) -> Tokens:
        """Map a prompt to its tokens for both encoders."""
        first, second = (tokenize(prompt) for tokenize in self._tokenizers)
        return Tokens(first.ids, max(first.cut, second.cut), second.ids, first.weights, second.weights)


def _digest(tables: Tables) -> str:
    values = [
        sorted(tables.vocabulary.items()),
        tables.merges,
        tables.added,
        [tables.start, tables.end, tables.pad, tables.unknown],
        tables.length,
    ]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def _backend(model: BPE, added: Sequence[Added], *inside: str) -> Backend:
    """The library's tokenizer. It is never changed afterwards: that would be an error while another thread encodes.

    Args:
        inside: expressions that split words once more.
    """
    backend = Backend(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            *(pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in inside),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.add_tokens([AddedToken(**token._asdict(), special=True) for token in added])
    return backend
