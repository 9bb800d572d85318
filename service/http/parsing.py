"""Parses bodies and queries into requests of the table of fields. Sizes are checked before anything is parsed."""

import json
from collections.abc import Collection, Sequence
from urllib.parse import unquote_to_bytes

from service.errors import Invalid, UnsupportedMedia
from service.http.base64_files import PHOTO, UPLOAD, from_base64
from service.http.forms import Part, read_form
from service.http.models import MAX_SHOWN, Request, RequestModel
from service.http.photos import is_photo
from service.http.pictures import Attached
from service.http.pieces import PIECE, Bytes, pieces
from service.http.uploads import is_image
from service.plan.fields import SampleRequest

JSON, FORM = "application/json", "multipart/form-data"
MAX_PLAIN_JSON = 2**19  # bytes of JSON besides images and lists of prompts, without blanks at the end
FILES = ("image", "mask_image")  # of /sample
_BLANKS = b" \t\r\n"
_MAX_VALUES = 2**14  # of JSON; `[],[],[],…` takes 25 times its length in memory, and blocks the server while parsed
_MAX_DIGITS = 400  # of an integer in JSON; no float has more
_MAX_QUERY = 2**13  # fields


def read_sample(
    content_type: str, body: Bytes, model: RequestModel[SampleRequest], max_json: int
) -> tuple[SampleRequest, Attached | None]:
    """Read the body of /sample: JSON or a form, with or without an image and a mask. An empty body is `{}`.

    Args:
        max_json: bytes of JSON beside images.
    """
    files: dict[str, Bytes] = {}
    if body and is_form(content_type):
        texts, sent = form_with_photos(content_type, body, FILES)
        for name, file in sent:
            if name in files:
                raise Invalid.field(name, "is given twice")
            files[name] = file
        fields = model.from_text(texts)
    else:
        values, encoded = json_with_files(body, max_json, FILES)
        fields = model.validated(values)
        files = {name: from_base64(text, name, PHOTO) for name, text in encoded.items()}
    return fields, Attached(fields, files.get("image"), files.get("mask_image")) if files else None


def read_upload(content_type: str, body: Bytes, model: RequestModel[Request], max_json: int) -> tuple[Request, Bytes]:
    """Read an image and the fields beside it: a form with a file part, or JSON with base64.

    Args:
        max_json: bytes.
    """
    if is_form(content_type):
        return _read_form(content_type, body, model)
    if body:
        check_type(content_type, FORM, JSON)
    values = json_object(body, max_json)
    if "image" not in values:
        raise Invalid.field("image", f"is required: {UPLOAD.what}, in base64")
    image_text = values.pop("image")
    return model.validated(values), from_base64(image_text, "image", UPLOAD)


def check_type(content_type: str, *read: str) -> None:
    """Raise UnsupportedMedia if a body of this type cannot be read. A body without a type is JSON."""
    media_type = _media_type(content_type) or JSON
    if media_type not in read:
        raise UnsupportedMedia(f"the body must be {' or '.join(read)}, and is {media_type[:MAX_SHOWN]}")


def is_form(content_type: str) -> bool:
    return _media_type(content_type) == FORM


def _read_form(content_type: str, body: Bytes, model: RequestModel[Request]) -> tuple[Request, Bytes]:
    parts = read_form(content_type, body)
    image = _file_part(parts)
    fields = [(part.name, part.text) for part in parts if part is not image and part.filename is None]
    return model.from_text(fields), image.data


def form_with_photos(
    content_type: str, body: Bytes, names: Collection[str], most: int | None = None
) -> tuple[list[tuple[str, str]], list[tuple[str, Bytes]]]:
    """The fields of a form, and its files: parts with these names. Such a part may also be text in base64.

    Args:
        most: files; None for one of each name.

    Raises:
        Invalid: another part is a file, or there are more files.
    """
    fields: list[tuple[str, str]] = []
    files: list[tuple[str, Bytes]] = []
    for part in read_form(content_type, body, names, most):
        if part.name not in names:
            if part.filename is not None:
                raise Invalid.field(part.name[:MAX_SHOWN], f"is a file, and only {' and '.join(names)} may be files")
            fields.append((part.name, part.text))
        elif part.filename == "" and not part.data:
            continue  # a browser's form in which no file was chosen
        else:
            is_file = part.filename is not None or is_photo(part.data)
            files.append((part.name, part.data if is_file else from_base64(part.text, part.name, PHOTO)))
    return fields, files


def _file_part(parts: Sequence[Part]) -> Part:
    found = [part for part in parts if part.name == "image"]
    if len(found) > 1:
        raise Invalid.field("image", "is given twice")
    names = [part.name for part in parts if part.filename is not None]
    if found and (names == ["image"] or (not names and is_image(found[0].data))):
        return found[0]
    if found and not names:
        why = "the form has the field 'image' without a filename, and its content is neither a PNG nor an .npy file"
    elif names:
        why = f"the form has the file part {names[0][:MAX_SHOWN]!r}"
    else:
        why = "the form has no file part"
    raise Invalid.field("image", f"is required, as a file part; {why}")


def check_query(query: bytes) -> None:
    """Raise Invalid if a query has very many fields or is not in UTF-8, before the query is parsed."""
    if query.count(b"&") >= _MAX_QUERY:
        raise Invalid.field("query", f"has more than {_MAX_QUERY} fields")
    try:
        unquote_to_bytes(query).decode()
    except UnicodeDecodeError:
        raise Invalid.field("query", "must be text in UTF-8") from None


def json_object(body: Bytes, max_bytes: int = MAX_PLAIN_JSON) -> dict[str, object]:
    """The values of a JSON object. An empty body is `{}`.

    Raises:
        Invalid: the body is too large, no JSON, or no object, or has a key twice.
    """
    text = _without_blanks(body)
    if len(text) > max_bytes:
        raise Invalid.field("body", f"has {len(text)} bytes of JSON, and may have at most {max_bytes} here")
    if _count_values(text) > _MAX_VALUES:
        raise Invalid.field("body", f"has more than {_MAX_VALUES} values")
    try:
        values = _DECODER.decode(text.decode("utf-8-sig")) if text else {}
    except UnicodeDecodeError:
        raise Invalid.field("body", "is not valid JSON: it is not in UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise Invalid.field("body", f"is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise Invalid.field("body", "must be a JSON object")
    return values


def json_with_files(body: Bytes, max_json: int, names: Collection[str]) -> tuple[dict[str, object], dict[str, object]]:
    """The values of a JSON object, and apart from them those with these names that are not null.

    Args:
        max_json: bytes beside the files.

    Raises:
        Invalid: as `json_object`.
    """
    text = _without_blanks(body)
    has_files = any(f'"{name}"'.encode() in text for name in names)
    values = json_object(text, len(text) if has_files else max_json)
    sent = {name: values.pop(name) for name in names if name in values}
    files = {name: value for name, value in sent.items() if value is not None}
    # JSON may escape a character, such as / or a line break, with a second one.
    plain = len(text) - 2 * sum(map(_length, files.values()))
    if plain > max_json:
        raise Invalid.field("body", f"has {plain} bytes of JSON beside images, and may have at most {max_json} here")
    return values, files


def _length(value: object) -> int:
    """The characters of a text, or of all texts in a list or an object."""
    if isinstance(value, list | dict):
        return sum(map(_length, value.values() if isinstance(value, dict) else value))
    return len(value) if isinstance(value, str) else 0


def _without_blanks(text: Bytes) -> Bytes:
    """The JSON without blanks at its end. JSON allows any number of them."""
    end = len(text)
    for _ in pieces(len(text)):
        if text[max(0, end - PIECE) : end].translate(None, _BLANKS):
            break
        end = max(0, end - PIECE)
    return text if end == len(text) else text[:end]


def _count_values(text: Bytes) -> int:
    """An upper bound for the number of values in JSON. Counting stops beyond _MAX_VALUES."""
    count = 0
    for begin in pieces(len(text)):
        piece = text[begin : begin + PIECE]
        count += sum(map(piece.count, (b"[", b"{", b",")))
        if count > _MAX_VALUES:
            break
    return count


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Refuse a key that appears twice. Some parsers keep its first value, others its last."""
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise Invalid.field(key, "is given twice")
            seen.add(key)
    return values


def _integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"a number has {len(text)} digits")
    return int(text)


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer)


def _media_type(content_type: str) -> str:
    return content_type.split(";", 1)[0].strip().lower()
