"""The tokenizer of prompts, held to transformers' CLIPTokenizer."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from model.checkpoints.errors import CheckpointError
from model.checkpoints.tokenizer import Tokenizer
from model.checkpoints.tokenizer_files import read_tokenizer
from model.nets.clip import CLIPTextConfig
from tests.checkpoints import VALUES, Json, check_line, edit, without_folder
from tests.pipelines import END, MERGES, START, write_tokenizer
from tests.properties import examples

VOCABULARY = 512 + len(MERGES) + 2
TEXT = CLIPTextConfig(vocab_size=VOCABULARY)
FORMS = [("files", END), ("files", "!"), ("json", END), ("json", "!")]
MOST = 8192  # bytes of a prompt


@cache
def transformers_class() -> Any:
    import transformers

    return transformers.CLIPTokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """A tokenizer in each form and with each padding."""
    return {(form, pad): write_tokenizer(tmp_path_factory.mktemp("tokenizer"), form, pad) for form, pad in FORMS}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tokenizer of vocab.json and merges.txt that the test may change."""
    return write_tokenizer(tmp_path / "tokenizer")


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A tokenizer of tokenizer.json that the test may change."""
    return write_tokenizer(tmp_path / "tokenizer", "json")


def read(folder: Path, text: CLIPTextConfig = TEXT) -> Tokenizer:
    return read_tokenizer(folder, folder, text)


def check(tokenizer: Tokenizer, theirs: Any, text: str) -> None:
    ids, cut, *_ = tokenizer(text)
    length = tokenizer.length
    assert list(ids) == theirs(text, padding="max_length", max_length=length, truncation=True).input_ids
    assert cut == max(0, len(theirs(text, truncation=False, verbose=False).input_ids) - length)


# What a prompt may have in it that a tokenizer may get wrong.
PIECES = [
    START, END, "<|EndOfText|>", "<|STARTOFTEXT|>", "<|endoftext|", "|>", "<|", "'s", "'S", "'LL", "''", "’s",
    "fox", "the", "dog!", "!", "!!", "#$%", "_", "-", "</w>", "Ġ", "Ā", " ", "  ", "\n", "\t", "\r\n",
    "\x00", "\x07", "\x1b", "\x1c", "\x1d", "\x1e", "\x1f", "\x7f", "\x85", "\xa0", "\u1680", "\u200b", "\u200d",
    "\u2028", "\u3000", "\ufeff", "\ue000", "e\u0301", "\u0323\u0301", "\u0301", "İ", "ẞ", "ſ", "\u212a", "Σ", "ΑΣ",
    "ﬁ", "ǅ", "\ufb2c", "\u0958", "漢字", "한글", "\u1112\u1161\u11ab", "ไทย", "עברית", "1", "23", "٣", "Ⅷ", "½", "๙",
    "😀", "👨‍👩‍👧", "🏳️‍🌈", "\U0001fae9", "\U000e0041", "\U0010ffff",
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(st.characters(codec="utf-8"), max_size=8), max_size=12).map("".join)


@pytest.mark.parametrize("form", FORMS, ids=" ".join)
@given(text=TEXTS)
@example("")
@example(" \n ")
@example("a fox in the snow")
@example("".join(PIECES))
@examples(200)
def test_ids_are_those_of_transformers(folders: dict[tuple[str, str], Path], form: tuple[str, str], text: str) -> None:
    ours, theirs = both(folders[form])
    check(ours, theirs, text)


@cache
def both(folder: Path) -> tuple[Tokenizer, Any]:
    return read(folder), transformers_class().from_pretrained(folder)


def filled(unit: str) -> str:
    """As many units as fit in a prompt."""
    return unit * (MOST // len(unit.encode()))


@pytest.mark.parametrize(
    "unit", ["x", "x ", "1", "!", "a1!", "İ", "😀", "\u0301\u0323", "'s", END, "<|ENDOFTEXT|>", " "]
)
def test_the_longest_prompts(folders: dict[tuple[str, str], Path], unit: str) -> None:
    for folder in folders.values():
        ours, theirs = both(folder)
        check(ours, theirs, filled(unit))


def test_a_prompt_is_framed_and_padded(folders: dict[tuple[str, str], Path]) -> None:
    start, end = VOCABULARY - 2, VOCABULARY - 1
    for (_, pad), folder in folders.items():
        ids, cut, *_ = read(folder)("the fox")
        padding = 0 if pad == "!" else end
        assert ids == (start, 515, 518, end, *[padding] * 73)
        assert cut == 0


def test_an_exclamation_mark_is_the_padding_where_that_is_its_token(folders: dict[tuple[str, str], Path]) -> None:
    at_the_end_of_a_word = 256
    assert read(folders["files", "!"])("fox!").ids[2] == 0
    assert read(folders["files", END])("fox!").ids[2] == at_the_end_of_a_word


@pytest.mark.parametrize(("words", "cut"), [(74, 0), (75, 0), (76, 1), (175, 100)])
def test_tokens_that_do_not_fit_are_counted(folder: Path, words: int, cut: int) -> None:
    tokens = read(folder)("fox " * words)
    assert len(tokens.ids) == 77
    assert tokens.cut == cut


def test_any_number_of_threads_may_call(folders: dict[tuple[str, str], Path]) -> None:
    tokenizer = read(folders["files", "!"])
    texts = [filled(piece) if n % 5 == 0 else f"{piece} fox! {n}" for n, piece in enumerate(PIECES)]
    expected = [tokenizer(text) for text in texts]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(tokenizer, texts * 8)) == expected * 8


ALONE = """
import os, sys
from pathlib import Path
from model.checkpoints.tokenizer_files import read_tokenizer
from model.nets.clip import CLIPTextConfig
folder = Path(sys.argv[1])
tokenizer = read_tokenizer(folder, folder, CLIPTextConfig(vocab_size=int(sys.argv[2])))
threads = len(os.listdir("/proc/self/task"))
tokenizer("a fox in the snow")
assert len(os.listdir("/proc/self/task")) == threads
if not os.fork():
    os._exit(tokenizer("a fox").cut)
assert os.wait()[1] == 0
assert not any("huggingface_hub" in name or "transformers" in name for name in sys.modules)
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads as Linux shows them")
def test_the_library_starts_no_thread_and_asks_no_hub(folder: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", ALONE, str(folder), str(VOCABULARY)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# Files.


def token(content: str, **flags: bool) -> Json:
    return {"content": content, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, **flags}


def without_map(folder: Path) -> None:
    (folder / "special_tokens_map.json").unlink()


def without_configs(folder: Path) -> None:
    without_map(folder)
    (folder / "tokenizer_config.json").unlink()


def map_against_config(folder: Path) -> None:
    """As Stable Diffusion 2.1-base."""
    edit(folder / "special_tokens_map.json", {"pad_token": "!"})


def ids_in_config(folder: Path) -> None:
    """As transformers since 4.34 writes it. Then special_tokens_map.json does not count."""
    special = {"normalized": True, "special": True}
    added = {"520": token(START, **special), "521": token(END, **special)}
    edit(folder / "tokenizer_config.json", {"added_tokens_decoder": added})
    map_against_config(folder)


def with_learned_tokens(folder: Path) -> None:
    """As a pipeline is saved that has textual inversions."""
    (folder / "added_tokens.json").write_text(json.dumps({"<cat-toy>": 522, "<cat-toy>_1": 523}))


def with_learned_tokens_in_config(folder: Path) -> None:
    added = {"520": token(START), "521": token(END), "522": token("<Cat Toy>", normalized=True, lstrip=True)}
    edit(folder / "tokenizer_config.json", {"added_tokens_decoder": added})


def with_other_specials(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", {"mask_token": "fox</w>", "image_token": "the</w>", "cls_token": None})


def with_specials_of_other_words(folder: Path) -> None:
    """<|startoftext|> is then a text like any other."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        edit(folder / name, {"bos_token": "the</w>"})


def in_other_lines(folder: Path) -> None:
    path = folder / "merges.txt"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))


VARIANTS: list[Callable[[Path], None]] = [
    without_map,
    without_configs,
    map_against_config,
    ids_in_config,
    with_learned_tokens,
    with_learned_tokens_in_config,
    with_other_specials,
    with_specials_of_other_words,
    in_other_lines,
]


@pytest.mark.parametrize("change", VARIANTS)
def test_files_as_transformers_reads_them(folder: Path, change: Callable[[Path], None]) -> None:
    change(folder)
    theirs = transformers_class().from_pretrained(folder, model_max_length=77)
    ours = read(folder, CLIPTextConfig(vocab_size=VOCABULARY + 2))
    for text in [*PIECES, "".join(PIECES), "a <cat-toy> and <cat-toy>_1, <CAT TOY>", f"!{START}{END}!!{END}fox the!"]:
        check(ours, theirs, text)


@pytest.mark.parametrize("form", ["strings", "pairs"])
def test_merges_of_a_tokenizer_json(whole: Path, form: str) -> None:
    path = whole / "tokenizer.json"
    values = json.loads(path.read_text())
    pairs = [merge.split(" ") for merge in MERGES]
    values["model"]["merges"] = list(MERGES) if form == "strings" else pairs
    path.write_text(json.dumps(values))
    check(read(whole), transformers_class().from_pretrained(whole), "the snowing fox")


def test_a_tokenizer_json_goes_before_other_files(whole: Path) -> None:
    expected = read(whole)("the fox")
    (whole / "vocab.json").write_text("{}")
    (whole / "merges.txt").write_text("nonsense")
    assert read(whole)("the fox") == expected


def test_nothing_that_a_file_describes_is_run(whole: Path) -> None:
    """A regular expression in the file could take for ever."""
    expected = read(whole)
    values = json.loads((whole / "tokenizer.json").read_text())
    values["normalizer"]["normalizers"][1]["pattern"] = {"Regex": "(a+)+$"}
    values["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": "(.*)*x"}
    (whole / "tokenizer.json").write_text(json.dumps(values))
    text = "a" * 60 + " the fox"
    assert read(whole)(text) == expected(text)


@pytest.mark.parametrize(
    ("given", "length"), [(77, 77), (32, 32), (3, 3), (1000, 77), (1e30, 77), (float("inf"), 77), (None, 77)]
)
def test_lengths(folder: Path, given: float | None, length: int) -> None:
    edit(folder / "tokenizer_config.json", {"model_max_length": given})
    tokenizer = read(folder)
    assert tokenizer.length == length == len(tokenizer("a fox").ids)


def test_a_length_that_is_left_out_is_the_encoders(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", {}, without="model_max_length")
    assert read(folder, CLIPTextConfig(vocab_size=VOCABULARY, max_position_embeddings=50)).length == 50


def test_digests_tell_tokenizers_apart(folders: dict[tuple[str, str], Path], folder: Path) -> None:
    digests = {form: read(path).digest for form, path in folders.items()}
    assert digests["files", END] != digests["files", "!"]
    assert read(folder).digest == digests["files", END]
    edit(folder / "tokenizer_config.json", {"model_max_length": 50})
    lengths = {read(folder).digest}
    edit(folder / "tokenizer_config.json", {"model_max_length": 77})
    vocabulary = json.loads((folder / "vocab.json").read_text())
    edit(folder / "vocab.json", {"a": vocabulary["b"], "b": vocabulary["a"]})
    assert len({*lengths, read(folder).digest, *digests.values()}) == len(digests) + 2


# Errors.

FIELDS = {
    "tokenizer_config.json": [
        "pad_token",
        "model_max_length",
        "added_tokens_decoder",
        "extra_special_tokens",
        "x_token",
    ],
    "special_tokens_map.json": ["pad_token", "bos_token", "unk_token", "x_token", "additional_special_tokens"],
    "added_tokens.json": ["<a>", "fox", ""],
    "vocab.json": ["fox", "!", ""],
    "tokenizer.json": ["model", "normalizer", "pre_tokenizer", "added_tokens", "padding", "truncation"],
}


@given(data=st.data())
@examples(300)
def test_whatever_a_file_says_is_read_or_refused_in_a_line(
    folders: dict[tuple[str, str], Path], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(sorted(FIELDS)))
    source = folders["json" if name == "tokenizer.json" else "files", END]
    folder = shutil.copytree(source, tmp_path_factory.mktemp("hostile") / "tokenizer")
    values = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    field, value = data.draw(st.sampled_from(FIELDS[name])), data.draw(VALUES)
    if field == "added_tokens_decoder":
        value = {"521": value}
    (folder / name).write_text(json.dumps({**values, field: value}))
    try:
        tokens = read(folder)(f"a fox {START} <a>!")
    except CheckpointError as error:
        check_line(error)
    else:
        assert max(tokens.ids) < VOCABULARY


def refused(folder: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        read(folder)
    check_line(error.value)
    return without_folder(error.value, folder)


RANGE = f"must be from 0 to {VOCABULARY - 1}: the text encoder's vocab_size is {VOCABULARY}"


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("vocab.json", {"fox": VOCABULARY}, f"vocab.json: the token fox is {VOCABULARY}, and {RANGE}"),
        ("vocab.json", {"fox": -1}, f"vocab.json: the token fox is -1, and {RANGE}"),
        ("vocab.json", {"fox": 1.5}, f"vocab.json: the token fox is 1.5, and {RANGE}"),
        ("vocab.json", {"fox": True}, f"vocab.json: the token fox is True, and {RANGE}"),
        ("vocab.json", {"fox": None}, f"vocab.json: the token fox is None, and {RANGE}"),
        (
            "tokenizer_config.json",
            {"padding_side": "left"},
            "tokenizer_config.json: padding_side is left, and must be right",
        ),
        (
            "tokenizer_config.json",
            {"split_special_tokens": True},
            "tokenizer_config.json: split_special_tokens is True, and must be False",
        ),
        (
            "tokenizer_config.json",
            {"model_max_length": 2},
            "tokenizer_config.json: model_max_length is 2, and must be at least 3, as the encoder's length must",
        ),
        (
            "tokenizer_config.json",
            {"model_max_length": float("nan")},
            "tokenizer_config.json: model_max_length is nan, and must be at least 3, as the encoder's length must",
        ),
        ("special_tokens_map.json", {"pad_token": "[PAD]"}, "pad_token is [PAD], which the vocabulary lacks"),
        ("special_tokens_map.json", {"pad_token": None}, "pad_token is null, and must be a token"),
        ("special_tokens_map.json", {"pad_token": 3}, "pad_token is 3, and must be an object"),
        (
            "special_tokens_map.json",
            {"bos_token": {"content": ""}},
            "bos_token has the content , and must be a token",
        ),
        (
            "special_tokens_map.json",
            {"bos_token": token(START) | {"lstrip": "yes"}},
            "bos_token.lstrip is yes, and must be true or false",
        ),
        (
            "special_tokens_map.json",
            {"additional_special_tokens": ["<a>"]},
            "has additional_special_tokens ['<a>'], and must have none",
        ),
        ("tokenizer_config.json", {"unk_token": "[UNK]", "added_tokens_decoder": {}}, "unk_token is [UNK], which the"),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"x": token(END)}},
            "tokenizer_config.json: added_tokens_decoder has x, and must have ids",
        ),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"9" * 5000: token(END)}},
            f"tokenizer_config.json: added_tokens_decoder has {'9' * 59}…, and must have ids",
        ),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"3": token(END)}},
            f"the added token {END} is 3, and must be {VOCABULARY - 1}",
        ),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {str(VOCABULARY): token("<a>")}},
            f"the token <a> is {VOCABULARY}, and {RANGE}",
        ),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": [1]},
            "tokenizer_config.json: added_tokens_decoder is [1], and must be an object",
        ),
    ],
    ids=str,
)
def test_files_refused(folder: Path, file: str, changes: Json, message: str) -> None:
    edit(folder / file, changes)
    assert refused(folder).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("#version: 0.2\na b c\n", "merge 0 is a b c, and must be two tokens"),
        ("t h\nthe\n", "merge 1 is the, and must be two tokens"),
        (" a\n", "merge 0 is  a, and must be two tokens"),
        ("q q\n", "merge 0 has the token qq, which the vocabulary lacks"),
        ("é q\n", "merge 0 has the token éq, which the vocabulary lacks"),
    ],
)
def test_merges_refused(folder: Path, text: str, message: str) -> None:
    (folder / "merges.txt").write_text(text)
    assert refused(folder) == f"merges.txt: {message}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "model is None, and must be an object"),
        ({"model": {"type": "Unigram"}}, "model.type is Unigram, and must be 'BPE', as CLIP's is"),
        (
            {"model": {"type": "BPE", "end_of_word_suffix": None}},
            "model.end_of_word_suffix is None, and must be '</w>', as CLIP's is",
        ),
        (
            {"model": {"dropout": 0.5, "end_of_word_suffix": "</w>"}},
            "model.dropout is 0.5, and must be null, as CLIP's",
        ),
        (
            {"model": {"end_of_word_suffix": "</w>", "vocab": [["a", 0]]}},
            "the vocabulary is [['a', 0]], and must be an object of tokens and their ids",
        ),
        (
            {"model": {"end_of_word_suffix": "</w>", "vocab": {"a": 0}, "merges": {"a": "b"}}},
            "the merges are {'a': 'b'}, and must be a list",
        ),
        ({"normalizer": {"type": "BertNormalizer"}}, "normalizer is ['BertNormalizer'], and must be ['NFC', 'Replace'"),
        (
            {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel"}]}},
            "pre_tokenizer is ['ByteLevel'], and must be ['Split', 'ByteLevel'], as CLIP's is",
        ),
        ({"padding": {"direction": "Left"}}, "padding.direction is Left, and must be Right"),
        ({"added_tokens": {"a": 1}}, "added_tokens is {'a': 1}, and must be a list"),
        ({"added_tokens": ["a"]}, "added_tokens is a, and must be an object"),
    ],
    ids=str,
)
def test_tokenizers_that_are_not_clips_are_refused(whole: Path, changes: Json, message: str) -> None:
    edit(whole / "tokenizer.json", changes)
    if "added_tokens" in changes:
        edit(whole / "tokenizer_config.json", {}, without="added_tokens_decoder")
    assert refused(whole).startswith(f"tokenizer.json: {message}")


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_missing_files_are_refused(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert refused(folder) == f"holds neither tokenizer.json nor {name}"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("merges.txt", b"\xff", "cannot be read: 'utf-8' codec can't decode"),
        ("merges.txt", b"a" * (16 * 2**20 + 1), "has 16777217 bytes, and must have at most 16777216"),
        ("vocab.json", b" " * (16 * 2**20 + 1), "has 16777217 bytes, and must have at most 16777216"),
        ("vocab.json", b"[]", "holds a list, and must hold a JSON object"),
        ("vocab.json", b"{}", "the vocabulary is {}, and must be an object of tokens and their ids"),
        ("special_tokens_map.json", b"{", "cannot be read: Expecting property name"),
        ("added_tokens.json", b'{"<a>": "x"}', "the added token <a> is x, and must be an id"),
        ("added_tokens.json", b'{"": 0}', "added_tokens.json: has an empty name, and must have tokens"),
    ],
)
def test_broken_files_are_refused(folder: Path, name: str, content: bytes, message: str) -> None:
    (folder / name).write_bytes(content)
    assert message in refused(folder)


def test_files_that_leave_the_folder_are_refused(folder: Path, tmp_path: Path) -> None:
    outside = (folder / "merges.txt").rename(tmp_path / "merges.txt")
    (folder / "merges.txt").symlink_to(outside)
    assert refused(folder) == "merges.txt: is a link that leaves the checkpoint's folder"
