"""Files in base64, as JSON carries them."""

import binascii
import re
from typing import NamedTuple

from service.errors import Invalid
from service.http.models import shown
from service.http.pieces import PIECE, Bytes, pieces

_DATA_URL = re.compile(r"data:([^,;]{0,100})((?:;[^,;]{0,100}){0,8}),", re.IGNORECASE)
_ADDRESS = re.compile(r"https?:", re.IGNORECASE)
_BLANKS = b" \t\r\n"


class Kind(NamedTuple):
    """What a field takes.

    Attributes:
        what: in words.
        media: the media types that a data: URL may name.
    """

    what: str
    media: tuple[str, ...]


UPLOAD = Kind("a PNG or .npy file", ("", "image/png", "application/x-npy", "application/octet-stream"))
PHOTO = Kind(
    "a PNG, JPEG or WebP file",
    ("", "image/png", "image/jpeg", "image/jpg", "image/webp", "application/octet-stream"),
)


def from_base64(text: object, name: str, kind: Kind) -> Bytes:
    """The bytes of base64 text. The text may have line breaks (RFC 2045) and be a data URL (RFC 2397).

    Args:
        name: the field with the text.

    Raises:
        Invalid: the text is no base64, or a data: URL of another kind.
    """
    if not isinstance(text, str):
        raise Invalid.field(name, f"must be a string: {kind.what}, in base64")
    begin = _after_data_prefix(text, name, kind)
    data, rest, ended = bytearray(), b"", False
    try:
        for place in pieces(len(text)):
            piece = rest + text[max(place, begin) : place + PIECE].encode("ascii").translate(None, _BLANKS)
            whole = len(piece) // 4 * 4
            if ended and piece:
                raise _no_base64(name, "Excess data after padding")
            data += binascii.a2b_base64(piece[:whole], strict_mode=True)
            ended = piece[:whole].endswith(b"=")
            rest = piece[whole:]
        if rest:
            raise _no_base64(name, "Excess data after padding" if ended else "Incorrect padding")
    except (binascii.Error, UnicodeEncodeError) as error:
        raise _no_base64(name, str(error)) from None
    return data


def _no_base64(name: str, why: str) -> Invalid:
    return Invalid.field(name, f"is not valid base64: {why}")


def _after_data_prefix(text: str, name: str, kind: Kind) -> int:
    """Where the base64 of a data URL begins. 0 if the text is no data URL."""
    if _ADDRESS.match(text):
        raise Invalid.field(name, f"must be {kind.what} in base64: this server fetches no addresses")
    if text[:5].lower() != "data:":
        return 0
    prefix = _DATA_URL.match(text)
    if prefix is None or not prefix[2].lower().endswith(";base64"):
        raise Invalid.field(name, f"must be in base64, and begins with {shown(text[:40])}")
    if prefix[1].strip().lower() not in kind.media:
        raise Invalid.field(name, f"must be {kind.what}, and is {shown(prefix[1])} by its data: prefix")
    return prefix.end()
