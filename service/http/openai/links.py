"""Addresses that draw images again: GET /sample with all that decides an image, its seed among it."""

from collections.abc import Mapping
from urllib.parse import quote, urlencode

from model.description import ModelDescription
from model.rows import Group
from service.plan.entries import deciding
from service.plan.fields import SampleRequest
from service.plan.labels import label_of
from service.plan.pictures import HASHES as IMAGE_HASHES
from service.plan.served import Served
from service.plan.texts import HASHES as TEXT_HASHES

_LONGEST = 4000  # characters; programs and proxies cut or refuse longer addresses, the strictest at 8000


def link(base_url: str, recipe: Mapping[str, object], group: Group, served: Served) -> str | None:
    """The address of one image as a PNG; None if no address draws its bytes again.

    The address names the fingerprint, so a server that would draw other bytes refuses it.

    Args:
        base_url: of this server, as the client knows it, with a slash at its end.
        recipe: of the image.
        group: the size of the image.
    """
    if not served.reproducible or any(name in recipe for name in (*TEXT_HASHES, *IMAGE_HASHES)):
        return None
    values = {**recipe, "height": group.height, "width": group.width}
    label = values.get("class_label")
    if isinstance(label, int):
        values["class_label"] = _in_a_query(label, served.model)
    rows = deciding(SampleRequest, "image")
    given = {row.name: _text(values[row.name]) for row in rows if values.get(row.name) is not None}
    query = urlencode({**given, "model": served.fingerprint}, quote_via=quote)
    address = f"{base_url}sample?{query}"
    return address if len(address) <= _LONGEST else None


def _text(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _in_a_query(label: int, model: ModelDescription) -> str:
    """The text of a class. Its index may be the name of another class."""
    texts = str(label), *model.class_names[label : label + 1]
    return next(text for text in texts if label_of(text, model) == label)
