"""The files of a CLIP tokenizer → Tokenizer, as transformers 5 reads them.

`tokenizer.json`, or else vocab.json and merges.txt, has the vocabulary. tokenizer_config.json, special_tokens_map.json
and added_tokens.json have the special tokens and the length.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from model.checkpoints.errors import CheckpointError, shown
from model.checkpoints.files import read_json, read_text
from model.checkpoints.tokenizer import Added, Tables, Tokenizer, TwoTokenizers
from model.nets.clip import CLIPTextConfig

TOKENIZER = "tokenizer.json"
VOCABULARY = "vocab.json"
MERGES = "merges.txt"
CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"

# The tokens that have a part in each prompt, with CLIPTokenizer's defaults.
_DEFAULTS = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
}
_ORDER = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
# What tokenizer.json says of a model or a pipeline that is CLIP's. None: it may be left out.
_MODEL: dict[str, tuple[object, ...]] = {
    "type": ("BPE", None),
    "end_of_word_suffix": ("</w>",),
    "continuing_subword_prefix": ("", None),
    "byte_fallback": (False, None),
    "ignore_merges": (False, None),
    "dropout": (None,),
}
_PIPELINE = {"normalizer": ["NFC", "Replace", "Lowercase"], "pre_tokenizer": ["Split", "ByteLevel"]}
# Fields of tokenizer_config.json whose other values would change ids.
_SETTINGS: dict[str, object] = {"padding_side": "right", "truncation_side": "right", "split_special_tokens": False}
_LONGEST_ID = 9  # digits
_SHORTEST = 3  # start, one token and end


def read_tokenizers(folders: Sequence[Path], root: Path, texts: Sequence[CLIPTextConfig]) -> Tokenizer | TwoTokenizers:
    """Read and check the tokenizers of one or two text encoders.

    Raises:
        CheckpointError: naming the file, the field and what was expected.
    """
    first, *others = (read_tokenizer(folder, root, text) for folder, text in zip(folders, texts, strict=True))
    for folder, other in zip(folders[1:], others, strict=True):
        if other.length != first.length:
            raise CheckpointError(
                folder,
                f"makes {other.length} tokens of a prompt, and {folders[0].name} makes {first.length}: both must make "
                "the same number, because the network takes the contexts of both encoders side by side",
            )
    return TwoTokenizers(first, *others) if others else first


def read_tokenizer(folder: Path, root: Path, text: CLIPTextConfig) -> Tokenizer:
    """Read and check the tokenizer of a text encoder.

    Raises:
        CheckpointError: naming the file, the field and what was expected.
    """
    whole = read_json(folder / TOKENIZER, root) if (folder / TOKENIZER).is_file() else None
    path = folder / (VOCABULARY if whole is None else TOKENIZER)
    if whole is None:
        for name in (VOCABULARY, MERGES):
            if not (folder / name).exists():
                raise CheckpointError(folder, f"holds neither {TOKENIZER} nor {name}")
        vocabulary = _vocabulary(path, read_json(path, root), text)
        merges = _merges(folder / MERGES, _lines(read_text(folder / MERGES, root)), vocabulary)
    else:
        model = _model(path, whole)
        vocabulary = _vocabulary(path, model.get("vocab"), text)
        merges = _merges(path, model.get("merges"), vocabulary)

    config_path = folder / CONFIG
    config = read_json(config_path, root) if config_path.is_file() else {}
    for field, wanted in _SETTINGS.items():
        if config.get(field, wanted) != wanted:
            raise CheckpointError(config_path, f"{field} is {shown(config[field])}, and must be {wanted}")
    ids, specials = _special_tokens(folder, root, config, whole)
    by_content = {token.content: token for token in ids}
    named = {field: by_content.get(token.content, token) for field, token in specials.items()}
    for field, token in named.items():
        if token.content not in vocabulary and (field == "unk_token" or token.content not in by_content):
            raise CheckpointError(folder, f"{field} is {shown(token.content)}, which the vocabulary lacks")
    tables = Tables(
        vocabulary=vocabulary,
        merges=merges,
        added=[*ids, *(token for token in named.values() if token.content not in by_content)],
        start=named["bos_token"].content,
        end=named["eos_token"].content,
        pad=named["pad_token"].content,
        unknown=named["unk_token"].content,
        length=_length(config_path, config, text),
    )
    return _checked(Tokenizer(tables), ids, folder, text)


def _checked(tokenizer: Tokenizer, ids: Mapping[Added, int], folder: Path, text: CLIPTextConfig) -> Tokenizer:
    """Refuse added tokens whose ids differ from what the library counts, or are beyond the text encoder."""
    for token, number in ids.items():
        if tokenizer.id_of(token.content) != number:
            raise CheckpointError(
                folder,
                f"the added token {shown(token.content)} is {number}, and must be {tokenizer.id_of(token.content)}",
            )
        _check_id(folder, token.content, number, text)
    return tokenizer


def _model(path: Path, whole: Mapping[str, Any]) -> dict[str, Any]:
    """The model in tokenizer.json, whose pipeline must be CLIP's."""
    model = whole.get("model")
    if not isinstance(model, dict):
        raise CheckpointError(path, f"model is {shown(model)}, and must be an object")
    for field, allowed in _MODEL.items():
        if model.get(field) not in allowed:
            wanted = "null" if allowed[0] is None else repr(allowed[0])
            raise CheckpointError(
                path, f"model.{field} is {shown(model.get(field))}, and must be {wanted}, as CLIP's is"
            )
    for field, steps in _PIPELINE.items():
        if whole.get(field) is not None and (found := list(_steps(whole[field]))) != steps:
            raise CheckpointError(path, f"{field} is {shown(found)}, and must be {steps}, as CLIP's is")
    for field in ("truncation", "padding"):
        values = whole.get(field)
        if isinstance(values, dict) and values.get("direction", "Right") != "Right":
            raise CheckpointError(path, f"{field}.direction is {shown(values['direction'])}, and must be Right")
    return model


def _steps(node: object) -> Iterator[object]:
    """The types of a pipeline's steps."""
    if not isinstance(node, dict):
        yield node
    elif node.get("type") == "Sequence":
        for field in ("normalizers", "pretokenizers"):
            children = node.get(field)
            for child in children if isinstance(children, list) else ():
                yield child.get("type") if isinstance(child, dict) else child
    else:
        yield node.get("type")


def _vocabulary(path: Path, values: object, text: CLIPTextConfig) -> dict[str, int]:
    if not isinstance(values, dict) or not values:
        raise CheckpointError(path, f"the vocabulary is {shown(values)}, and must be an object of tokens and their ids")
    for token, number in values.items():
        _check_id(path, token, number, text)
    return values


def _check_id(path: Path, token: str, number: object, text: CLIPTextConfig) -> None:
    if type(number) is not int or not 0 <= number < text.vocab_size:
        raise CheckpointError(
            path,
            f"the token {shown(token)} is {shown(number)}, and must be from 0 to {text.vocab_size - 1}: "
            f"the text encoder's vocab_size is {text.vocab_size}",
        )


def _lines(text: str) -> list[str]:
    """The merges in merges.txt, "a b" each. A token may have any character but \\n and space."""
    lines = (line.removesuffix("\r") for line in text.split("\n"))
    return [line for line in lines if line and not line.startswith("#version")]


def _merges(path: Path, values: object, vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    """Pairs, from strings "a b" or lists [a, b]."""
    if not isinstance(values, list):
        raise CheckpointError(path, f"the merges are {shown(values)}, and must be a list")
    merges = []
    for n, value in enumerate(values):
        pair = value.split(" ") if isinstance(value, str) else value
        match pair:
            case [str(left), str(right)] if left and right:
                pass
            case _:
                raise CheckpointError(path, f"merge {n} is {shown(value)}, and must be two tokens")
        for token in (left, right, left + right):
            if token not in vocabulary:
                raise CheckpointError(path, f"merge {n} has the token {shown(token)}, which the vocabulary lacks")
        merges.append((left, right))
    return merges


def _special_tokens(
    folder: Path, root: Path, config: Mapping[str, Any], whole: Mapping[str, Any] | None
) -> tuple[dict[Added, int], dict[str, Added]]:
    """The added tokens that have ids, in the order of these; and the special tokens by name.

    If tokenizer_config.json has added_tokens_decoder, this alone counts. Otherwise special_tokens_map.json goes before
    tokenizer_config.json.
    """
    has_decoder = "added_tokens_decoder" in config
    overriding = (
        read_json(folder / SPECIAL_TOKENS, root) if not has_decoder and (folder / SPECIAL_TOKENS).is_file() else {}
    )
    for values in (config, overriding):
        for field in ("additional_special_tokens", "extra_special_tokens"):
            if values.get(field):
                raise CheckpointError(folder, f"has {field} {shown(values[field])}, and must have none")
    given = {
        field: value
        for field, value in {**config, **overriding}.items()
        if field.endswith("_token") and type(value) is not bool
    }
    for field in _DEFAULTS:
        if field in given and given[field] is None:
            raise CheckpointError(folder, f"{field} is null, and must be a token")
    named = {**dict.fromkeys(_ORDER), **_DEFAULTS, **given}
    specials = {
        field: _added(folder, field, value, special=True) for field, value in named.items() if value is not None
    }
    if has_decoder:
        added = _decoder(folder / CONFIG, config["added_tokens_decoder"])
    else:
        added = _added_tokens(folder, root, {token.content for token in specials.values()}, whole)
    for token, number in added.items():
        if type(number) is not int:
            raise CheckpointError(
                folder, f"the added token {shown(token.content)} is {shown(number)}, and must be an id"
            )
    return dict(sorted(added.items(), key=lambda item: item[1])), specials


def _decoder(path: Path, values: object) -> dict[Added, Any]:
    """The tokens of added_tokens_decoder and their ids."""
    field = "added_tokens_decoder"
    added = {}
    for number, token in _object(path, field, values).items():
        if not number.isdecimal() or len(number) > _LONGEST_ID:
            raise CheckpointError(path, f"{field} has {shown(number)}, and must have ids")
        added[_added(path, field, token)] = int(number)
    return added


def _added_tokens(
    folder: Path, root: Path, specials: Collection[str], whole: Mapping[str, Any] | None
) -> dict[Added, Any]:
    """The tokens of added_tokens.json and tokenizer.json, with what these files call their ids."""
    added = {}
    if (folder / ADDED_TOKENS).is_file():
        for content, number in read_json(folder / ADDED_TOKENS, root).items():
            added[Added(content, normalized=content not in specials)] = number
    tokens = (whole or {}).get("added_tokens", [])
    if not isinstance(tokens, list):
        raise CheckpointError(folder / TOKENIZER, f"added_tokens is {shown(tokens)}, and must be a list")
    for values in tokens:
        token = _added(folder / TOKENIZER, "added_tokens", values)
        added[token] = values.get("id")
    return added


def _added(path: Path, field: str, values: object, special: bool = False) -> Added:
    """An added token from its text, or from an object with its flags.

    A special token without the flag is found in the text as it came, any other in the normalized text.
    """
    if special and isinstance(values, str):
        return Added(values)
    fields = _object(path, field, values)
    content = fields.get("content")
    if not isinstance(content, str) or not content:
        raise CheckpointError(path, f"{field} has the content {shown(content)}, and must be a token")
    defaults = {"normalized": not (special or fields.get("special") is True)}
    flags = {name: fields.get(name, defaults.get(name, False)) for name in _FLAGS}
    for name, value in flags.items():
        if type(value) is not bool:
            raise CheckpointError(path, f"{field}.{name} is {shown(value)}, and must be true or false")
    return Added(content, **flags)


def _object(path: Path, field: str, values: object) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise CheckpointError(path, f"{field} is {shown(values)}, and must be an object")
    return values


def _length(path: Path, config: Mapping[str, Any], text: CLIPTextConfig) -> int:
    """The tokens of a prompt. Configs without model_max_length, or with a huge one, mean the text encoder's."""
    length = config.get("model_max_length")
    positions = text.max_position_embeddings
    if length is None:
        length = positions
    if type(length) not in (int, float) or not length >= _SHORTEST or positions < _SHORTEST:
        raise CheckpointError(
            path, f"model_max_length is {shown(length)}, and must be at least {_SHORTEST}, as the encoder's length must"
        )
    return int(min(length, positions))
