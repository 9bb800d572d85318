"""stepwise verify: draws images again by their recipes, and compares the bytes."""

import asyncio
import hashlib
import importlib.util
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer

from service.plan import fields
from service.plan.entries import Field, deciding
from stepwise import DEFAULT_URL, AsyncClient, Info, Invalid, StepwiseError, Unreachable, read_recipe
from stepwise.cli import options, progress
from stepwise.cli.connect import Server, run
from stepwise.cli.exits import DIFFERENT, UNUSABLE, Unusable, code_of, printable, say
from stepwise.cli.extras import server_for
from stepwise.cli.images import range_of, read

AT_ONCE = 8  # files; a server draws them together

_DRAWN_BY = ("model", "fingerprint")


class _Source(NamedTuple):
    """A file from which an image was made: its hash in a recipe, and what is said if it is missing or another one."""

    hash: str
    missing: str
    differs: str


_SOURCES = {
    "image": _Source(
        "image_sha256",
        "it was drawn from an image: give the image with --image",
        "it was drawn from another image than this",
    ),
    "mask_image": _Source(
        "mask_sha256",
        "a part of an image was drawn anew: give the mask with --mask",
        "it was drawn with another mask than this",
    ),
}
_NOISY = _Source(
    "image_sha256",
    "it was denoised: give the noisy image with --image",
    "it was made of another noisy image than this, or of the same with another --value-range",
)
_PROMPT_OPTIONS = {"prompt": "--prompt", "negative_prompt": "--negative"}  # of this command


def verify(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="PNGs; - is standard input.")],
    image: Annotated[
        str | None,
        typer.Option(
            metavar="IMAGE",
            help="The image from which FILE was drawn, or the noisy one from which stepwise denoise made it.",
            show_default=False,
        ),
    ] = None,
    mask: Annotated[
        str | None,
        typer.Option(
            "--mask",
            "--mask-image",
            metavar="IMAGE",
            help="The mask beside --image with which FILE was drawn.",
            show_default=False,
        ),
    ] = None,
    value_range: options.ReadRange = None,
    prompt: Annotated[
        str | None,
        typer.Option(help="The prompt of FILE, where its recipe has only the prompt's SHA-256.", show_default=False),
    ] = None,
    negative: Annotated[
        str | None,
        typer.Option(help="The negative prompt of FILE, where its recipe has only the SHA-256.", show_default=False),
    ] = None,
    as_json: options.Json = False,
    url: options.Url = DEFAULT_URL,
    patience: options.Patience = options.PATIENCE_S,
    local: options.Local = False,
    weights: options.Weights = None,
) -> None:
    """Draw PNGs again by their recipes, and say whether the bytes are the same.

    Exit code 0: all are the same. 1: one differs. More: one could not be compared.
    """
    sources = {name: read(file) for name, file in (("image", image), ("mask_image", mask)) if file is not None}
    prompts = {name: text for name, text in (("prompt", prompt), ("negative_prompt", negative)) if text is not None}

    async def work(client: AsyncClient) -> list[Verdict | Failure]:
        info = await client.info()
        turns = asyncio.Semaphore(AT_ONCE)

        async def one(file: str) -> Verdict | Failure:
            try:
                async with turns:
                    again = Again(client, info, sources, value_range, prompts)
                    return await again.compare(file, read(file))
            except (Unusable, StepwiseError) as error:
                return Failure(file, str(error), code_of(error))
            except RecursionError:
                return Failure(file, "its recipe is nested too deeply", UNUSABLE)
            finally:
                count.one_more()

        with progress.counting("drawing again", len(files)) as count:
            return list(await asyncio.gather(*map(one, files)))

    found = run(Server(url, patience, local, weights), work)
    if as_json:
        print(json.dumps([one.document() for one in found]))
    for one in found:
        if isinstance(one, Failure):
            say(str(one))
        elif not as_json:
            print(printable(str(one)))
    failures = [one.code for one in found if isinstance(one, Failure)]
    differ = any(isinstance(one, Verdict) and not one.same for one in found)
    raise typer.Exit(max(failures) if failures else DIFFERENT if differ else 0)


@dataclass(frozen=True)
class Pixels:
    """The difference of two images: the values that differ, all values, and the largest difference, of 255."""

    differing: int
    values: int
    most: int


@dataclass(frozen=True)
class Verdict:
    """The result of a comparison: `differs` lists the differences. Empty for the same bytes."""

    file: str
    recipe: Mapping[str, Any]
    differs: list[str] = field(default_factory=list)
    pixels: Pixels | None = None

    @property
    def same(self) -> bool:
        return not self.differs

    def __str__(self) -> str:
        return f"{self.file}: {'the same bytes' if self.same else 'different: ' + '; '.join(self.differs)}"

    def document(self) -> dict[str, Any]:
        pixels = None if self.pixels is None else asdict(self.pixels)
        return {
            "file": self.file,
            "same": self.same,
            "recipe": self.recipe,
            "differs": self.differs,
            "pixels": pixels,
        }


@dataclass(frozen=True)
class Failure:
    """The reason why a file could not be compared, and the exit code."""

    file: str
    error: str
    code: int

    def __str__(self) -> str:
        return self.error if self.error.startswith(self.file) else f"{self.file}: {self.error}"

    def document(self) -> dict[str, Any]:
        return {"file": self.file, "error": self.error}


@dataclass(frozen=True)
class Again:
    """Draws images again.

    Attributes:
        info: of the server.
        sources: the given files from which an image was made: `image`, and for a part of one `mask_image`.
        value_range: of a noisy image; None for the default of its bit depth.
        prompts: for recipes that have only their hashes: `prompt` and `negative_prompt`.
    """

    client: AsyncClient
    info: Info
    sources: Mapping[str, bytes]
    value_range: float | None
    prompts: Mapping[str, str]

    async def compare(self, file: str, png: bytes) -> Verdict:
        """Draw a file again, and compare.

        Raises:
            Unusable: the file has no recipe, or its image or mask is not given.
            StepwiseError: the image could not be drawn.
        """
        try:
            recipe = read_recipe(png)
        except ValueError as error:
            raise Unusable(f"{file}: {error}") from None
        differs = self._drawn_by_others(recipe)
        if recipe.get("model") not in self._names:
            return Verdict(file, recipe, differs)
        for row in _settings(recipe):
            if row.name not in recipe and not row.entry.is_optional:
                raise Unusable(f"{file}: its recipe does not say {row.name}")
        try:
            drawn = await self._draw(recipe)
        except Invalid as error:
            if not differs:
                raise
            return Verdict(file, recipe, [*differs, f"which refuses the recipe: {error}"])
        if drawn == png:
            return Verdict(file, recipe)
        again = _recipe_of_answer(drawn)
        for name in sorted({*recipe, *again} - set(_DRAWN_BY)):
            if recipe.get(name) != again.get(name):
                differs.append(_difference(name, recipe, again))
        pixels, words = compare_pixels(file, png, drawn)
        return Verdict(file, recipe, [*differs, words], pixels)

    @property
    def _names(self) -> list[str]:
        """The model's names in recipes: the present one, and its name for people, which old recipes have."""
        name = self.info["model"]["name"]
        return [str(self.info["fingerprint_parts"].get("model", name)), name]

    def _drawn_by_others(self, recipe: Mapping[str, Any]) -> list[str]:
        here = {"model": self._names, "fingerprint": [self.info["fingerprint"]]}
        return [
            f"it is of {name} {recipe.get(name)}, and here is {here[name][0]}"
            for name in _DRAWN_BY
            if recipe.get(name) not in here[name]
        ]

    async def _draw(self, recipe: Mapping[str, Any]) -> bytes:
        settings = {row.name: recipe[row.name] for row in _settings(recipe) if row.name in recipe}
        settings |= self._secret_prompts(recipe)
        settings |= self._sources_of(recipe)
        if _was_denoised(recipe):
            settings["value_range"] = range_of(settings["image"], self.value_range)
            drawn = await self.client.denoise(**settings)
            return drawn.images[0].png
        if "num_images" in recipe:
            with server_for("to verify a contact sheet"):
                from stepwise.cli.sheets import sheet

            drawn = await self.client.sample(num_images=recipe["num_images"], **settings)
            return sheet([image.png for image in drawn.images])
        return (await self.client.sample(**settings)).images[0].png

    def _sources_of(self, recipe: Mapping[str, Any]) -> dict[str, bytes]:
        """The given files whose hashes the recipe has.

        Raises:
            Unusable: one is not given.
        """
        wanted = [name for name in _SOURCES if _SOURCES[name].hash in recipe]
        for name in wanted:
            if name not in self.sources:
                raise Unusable(_NOISY.missing if _was_denoised(recipe) else _SOURCES[name].missing)
        return {name: self.sources[name] for name in wanted}

    def _secret_prompts(self, recipe: Mapping[str, Any]) -> dict[str, str]:
        """The given prompts whose hashes the recipe has.

        Raises:
            Unusable: one is not given, or is another prompt.
        """
        found = {}
        for name, option in _PROMPT_OPTIONS.items():
            wanted = recipe.get(f"{name}_sha256")
            if wanted is None:
                continue
            if not isinstance(wanted, str):
                raise Unusable("its images have several prompts, and its recipe has only their SHA-256")
            if name not in self.prompts:
                raise Unusable(
                    f"its recipe has only the SHA-256 of the {name.replace('_', ' ')}: give it with {option}"
                )
            if hashlib.sha256(self.prompts[name].encode(errors="replace")).hexdigest() != wanted:
                raise Unusable(f"{option} is another prompt than that of its recipe")
            found[name] = self.prompts[name]
        return found


def _was_denoised(recipe: Mapping[str, Any]) -> bool:
    """Whether the recipe is one of POST /denoise."""
    return "timestep" in recipe


def _settings(recipe: Mapping[str, Any]) -> Sequence[Field]:
    """The fields of the table that a recipe contains."""
    return deciding(fields.Denoise if _was_denoised(recipe) else fields.Sample, "image")


def _recipe_of_answer(png: bytes) -> dict[str, Any]:
    try:
        return read_recipe(png)
    except ValueError as error:
        raise Unreachable(f"the server sends no images of Stepwise: {error}") from None


def compare_pixels(file: str, png: bytes, drawn: bytes) -> tuple[Pixels | None, str]:
    """The difference of two PNGs' pixels, in numbers if their sizes are equal, and in words.

    This needs Pillow, which comes with the extra `server`.
    """
    if importlib.util.find_spec("PIL") is None:
        return None, "its pixels are not compared, for Pillow is not installed"
    one, other = _pixels(file, png), _pixels(file, drawn)
    if one.shape != other.shape:
        return None, f"it has the shape {list(one.shape)}, and drawn again {list(other.shape)}"
    difference = np.abs(one - other)
    pixels = Pixels(int(np.count_nonzero(difference)), difference.size, int(difference.max()))
    if pixels.differing == 0:
        return pixels, "the pixels are the same"
    share = f"{pixels.differing} of {pixels.values} values of its pixels differ"
    return pixels, f"{share}, by at most {pixels.most} of 255"


def _pixels(file: str, png: bytes) -> np.ndarray[Any, np.dtype[np.int64]]:
    import PIL.Image

    try:
        with PIL.Image.open(io.BytesIO(png), formats=["PNG"]) as image:
            return np.asarray(image, np.int64)
    except Exception:  # Pillow raises many kinds of errors for broken or huge images
        raise Unusable(f"{file}: its pixels cannot be read") from None


def _difference(name: str, recipe: Mapping[str, Any], again: Mapping[str, Any]) -> str:
    one, other = recipe.get(name), again.get(name)
    for source in (_NOISY,) if _was_denoised(recipe) else _SOURCES.values():
        if name == source.hash and one is not None and other is not None:
            return source.differs
    return f"its {name} is {json.dumps(one)}, and drawn again {json.dumps(other)}"
