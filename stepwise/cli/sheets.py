"""Contact sheets, byte for byte as the server makes them from the same images."""

import io
from collections.abc import Sequence

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from service.http.formats import contact_sheet
from service.http.png import encode_png
from stepwise import Unreachable, read_recipe

_TEXTS = ("prompt", "negative_prompt", "prompt_sha256", "negative_prompt_sha256")  # one for all, or one for each image


def sheet(pngs: Sequence[bytes]) -> bytes:
    """A PNG with all images of a request, as the server sent them, and one recipe for all.

    Raises:
        Unreachable: the PNGs are not those of one request to a Stepwise server.
    """
    if len(pngs) == 1:
        return pngs[0]
    try:
        return _sheet(pngs)
    except (KeyError, OSError, SyntaxError, TypeError, ValueError) as error:
        raise Unreachable(f"the server sends no images of Stepwise: {error}") from error


def _sheet(pngs: Sequence[bytes]) -> bytes:
    recipes = [read_recipe(png) for png in pngs]
    texts_of_all = {name: [recipe.get(name) for recipe in recipes] for name in _TEXTS}
    recipe = {
        **{
            name: value for recipe in reversed(recipes) for name, value in recipe.items()
        },  # all names; the first's values
        "num_images": len(pngs),
        "class_label": [recipe["class_label"] for recipe in recipes],
        "guidance_scale": max(recipe["guidance_scale"] for recipe in recipes),  # 1 for images without guidance
        **{name: texts for name, texts in texts_of_all.items() if len(set(texts)) > 1},
    }
    return encode_png(contact_sheet([_values(png) for png in pngs]), recipe)


def _values(png: bytes) -> NDArray[np.float32]:
    """The image as [C, H, W], −1 … 1. Encoding gives the same 8 bits again."""
    with PIL.Image.open(io.BytesIO(png), formats=["PNG"]) as image:
        pixels = np.asarray(image, np.float32)
    values = pixels[:, :, None] if pixels.ndim == 2 else pixels
    return values.transpose(2, 0, 1) / np.float32(127.5) - 1
