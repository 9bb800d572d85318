"""The answer to a request to draw: images, the request, and `info`, a JSON string."""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

import service
from model.rows import Image
from service.engine.requests import Encoding
from service.http.a1111 import samplers
from service.http.a1111.fields import Txt2Img
from service.http.a1111.translation import Translated
from service.http.png import encode_png
from service.http.responses import JSON, PACKING, PNG, OneByOne, values_of
from service.plan.plan import Plan
from service.plan.served import Served

_SHORT = 10  # digits of a short hash


def short_hash(digest: str) -> str:
    """The beginning of a digest, as AUTOMATIC1111's texts have it."""
    return digest[:_SHORT]


def timestamp() -> str:
    """The local time, as AUTOMATIC1111's answers have it."""
    return datetime.now().strftime("%Y%m%d%H%M%S")


@dataclass(frozen=True)
class Answer:
    """The answer to a request, but for its images.

    Attributes:
        ignored: names of fields that were sent and have no effect.
        began: a timestamp.
    """

    asked: Txt2Img
    translated: Translated
    plan: Plan
    served: Served
    ignored: Sequence[str]
    began: str = field(default_factory=timestamp)

    @property
    def encoding(self) -> Encoding:
        """Each image becomes a PNG as soon as it is done, and all PNGs become the body."""
        size = values_of(self.plan, PNG, self.served)
        costs = size, len(self.plan.rows) * size // PACKING[JSON]
        return OneByOne(self._png, self._whole, costs)

    def interrupted(self, pngs: Mapping[int, bytes]) -> bytes:
        """The body, with the images that are done, by index."""
        why = f"interrupted: {len(pngs)} of {len(self.plan.rows)} images were done"
        return self._body(dict(sorted(pngs.items())), why)

    def _png(self, index: int, image: Image) -> bytes:
        return encode_png(image, self.plan.recipes[index])

    def _whole(self, pngs: Sequence[bytes]) -> bytes:
        return self._body(dict(enumerate(pngs)))

    def _body(self, pngs: Mapping[int, bytes], interruption: str = "") -> bytes:
        sent, warnings = list(pngs.values()), [*self.plan.warnings, *([interruption] if interruption else [])]
        if self.asked.send_images is False:
            sent = []
            warnings.append("send_images is false: the answer has no images, and this server keeps none")
        info = {**self._info(list(pngs)), "warnings": warnings, "interrupted": bool(interruption)}
        document = {
            "images": [base64.b64encode(png).decode() for png in sent],
            "parameters": self._parameters(),
            "info": json.dumps(info),
        }
        return json.dumps(document).encode()

    def _parameters(self) -> dict[str, object]:
        """The request with its defaults filled in; where this server has its own, with those."""
        own = {name: self._drawn[name] for name in ("sampler_name", "steps", "cfg_scale", "width", "height")}
        return {**self.asked.echo, **own}

    @property
    def _strength(self) -> float | None:
        """How far an image is drawn anew; None without one."""
        strength = self.plan.parameters.get("strength")
        assert isinstance(strength, float | None)
        return strength

    @property
    def _drawn(self) -> dict[str, object]:
        parameters, group = self.plan.parameters, self.plan.group
        steps, timesteps = parameters["num_inference_steps"], parameters.get("timesteps")
        clip_skip = parameters.get("clip_skip") or 0
        assert isinstance(clip_skip, int)
        return {
            "sampler_name": samplers.name_of(str(parameters["sampler"])),
            "steps": len(timesteps) if isinstance(timesteps, list) else steps,
            "cfg_scale": parameters["guidance_scale"],
            "width": group.width,
            "height": group.height,
            "clip_skip": clip_skip + 1,
        }

    def _info(self, indices: Sequence[int]) -> dict[str, object]:
        """What AUTOMATIC1111 says of images.

        Args:
            indices: of the images that the answer has.
        """
        prompt, negative = self.asked.prompt or "", self.asked.negative_prompt or ""
        count = len(indices)
        seeds = [self.plan.seeds[index] for index in indices]
        model = self.served.model
        return {
            "prompt": prompt,
            "all_prompts": [prompt] * count,
            "negative_prompt": negative,
            "all_negative_prompts": [negative] * count,
            "seed": self.plan.seeds[0],
            "all_seeds": seeds,
            "subseed": -1,
            "all_subseeds": [-1] * count,
            "subseed_strength": 0,
            **self._drawn,
            "batch_size": self.asked.batch_size or 1,
            "restore_faces": False,
            "face_restoration_model": None,
            "sd_model_name": model.name,
            "sd_model_hash": short_hash(model.digest),
            "sd_vae_name": None,
            "sd_vae_hash": None,
            "seed_resize_from_w": -1,
            "seed_resize_from_h": -1,
            "denoising_strength": self._strength,
            "extra_generation_params": {"Schedule type": self.translated.scheduler},
            "index_of_first_image": 0,
            "infotexts": [self._infotext(seed) for seed in seeds],
            "styles": [],
            "job_timestamp": self.began,
            "is_using_inpainting_conditioning": model.inpaints,
            "version": f"Stepwise {service.__version__}",
            "ignored": [*self.translated.ignored, *self.ignored],
        }

    def _infotext(self, seed: int) -> str:
        """What is said of an image in a form that its programs read."""
        drawn, model = self._drawn, self.served.model
        said = {
            "Steps": drawn["steps"],
            "Sampler": drawn["sampler_name"],
            "Schedule type": self.translated.scheduler,
            "CFG scale": f"{drawn['cfg_scale']:g}",
            "Seed": seed,
            "Size": f"{drawn['width']}x{drawn['height']}",
            "Model hash": short_hash(model.digest),
            "Model": model.name,
            **({} if self._strength is None else {"Denoising strength": f"{self._strength:g}"}),
            **({"Clip skip": drawn["clip_skip"]} if drawn["clip_skip"] != 1 else {}),
            "Version": f"Stepwise {service.__version__}",
        }
        negative = f"\nNegative prompt: {self.asked.negative_prompt}" if self.asked.negative_prompt else ""
        facts = ", ".join(f"{name}: {_quoted(str(value))}" for name, value in said.items())
        return f"{self.asked.prompt or ''}{negative}\n{facts}".strip()


def _quoted(value: str) -> str:
    """The value, in quotes if it has what separates values."""
    return json.dumps(value, ensure_ascii=False) if any(mark in value for mark in ",:\n") else value
