"""Make the emoji's data file from the npm package `emoji-datasource-google`, which has the images of Noto Emoji.

    python -m weights.emoji.prepare [TARGET.npz]

Needs npm, which downloads the package (71 MiB). The file has `x`, uint8 [3781, 32, 32, 3], on white, from the images of
64 pixels; `y`, int64 [3781], the category; and `names`. A skin variation has the name of its emoji. The images are
under the Apache License 2.0, the rest of the package under the MIT licence.
"""

import json
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from weights import npm

PACKAGE = "emoji-datasource-google@16.0.0"
SHA1 = "a80ac3e8106cbd4d8648ce758aa099e8827b6157"  # as the npm registry publishes it
TARGET = Path(__file__).parent / "work" / "emoji32.npz"

CATEGORIES = (
    "Smileys & Emotion",
    "People & Body",
    "Animals & Nature",
    "Food & Drink",
    "Travel & Places",
    "Activities",
    "Objects",
    "Symbols",
    "Flags",
)
SIDE = 32  # pixels
_LIST, _IMAGES = "package/emoji.json", "package/img/google/64/"


class Emoji(NamedTuple):
    """Images, uint8 [N, 32, 32, 3], their categories, int64 [N], and their names."""

    x: np.ndarray
    y: np.ndarray
    names: np.ndarray


def read(archive: Path) -> Emoji:
    """Read all emoji of the nine categories in the package's order, each followed by its skin variations."""
    listed: list[dict[str, Any]] = []
    images = {}
    with tarfile.open(archive) as tar:
        for member in tar:  # one pass, because the archive is compressed as a whole
            if member.name != _LIST and not member.name.startswith(_IMAGES):
                continue
            file = tar.extractfile(member)
            assert file is not None
            if member.name == _LIST:
                listed = json.load(file)
            else:
                images[member.name.removeprefix(_IMAGES)] = small(file)
    found = [
        (images[one["image"]], CATEGORIES.index(emoji["category"]), emoji["short_name"])
        for emoji in listed
        if emoji["category"] in CATEGORIES  # skin tones themselves have another category
        for one in (emoji, *emoji.get("skin_variations", {}).values())
    ]
    x, y, names = zip(*found, strict=True)
    return Emoji(np.stack(x), np.array(y, dtype=np.int64), np.array(names))


def small(file: Any) -> np.ndarray:
    """Read an image, put it on white, and shrink it to uint8 [32, 32, 3]."""
    with Image.open(file) as image:
        emoji = image.convert("RGBA")
    on_white = Image.alpha_composite(Image.new("RGBA", emoji.size, "white"), emoji).convert("RGB")
    return np.asarray(on_white.resize((SIDE, SIDE), Image.Resampling.LANCZOS))


def main(target: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        emoji = read(npm.download(PACKAGE, SHA1, Path(folder)))
    target.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(target, **emoji._asdict())
    print(f"{len(emoji.x):,} emoji in {target}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else TARGET)
