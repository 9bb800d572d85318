"""The bodies of requests in /openapi.json: fields, and the files beside them."""

import base64
from typing import Any

import numpy as np

from service.http.base64_files import PHOTO, UPLOAD, Kind
from service.http.formats import encode_npy
from service.http.models import RequestModel
from service.http.png import encode_png16
from service.http.schemas import Schema
from service.plan.fields import SampleRequest
from service.plan.served import Served

FILE = {"type": "string", "format": "binary"}
_PICTURES = {
    "image": "a PNG, JPEG or WebP file that is drawn anew",
    "mask_image": "a PNG, JPEG or WebP file beside `image`: what is white in it is drawn anew, and the rest is kept",
}
# Most validators ignore contentEncoding, so patterns describe base64 too.
_BLANKS = r"[ \t\r\n]*"


def base64_of(kind: Kind) -> Schema:
    """Base64 as clients send it: perhaps as a data: URL, and with line breaks."""
    return {
        "type": "string",
        "contentEncoding": "base64",
        "pattern": rf"^(data:({'|'.join(filter(None, kind.media))})?;base64,)?"
        rf"{_BLANKS}(([A-Za-z0-9+/]{_BLANKS}){{4}})*"
        rf"(([A-Za-z0-9+/]{_BLANKS}){{2}}(={_BLANKS}){{2}}|([A-Za-z0-9+/]{_BLANKS}){{3}}={_BLANKS})?$",
    }


def sample_body(request: RequestModel[SampleRequest], served: Served) -> Schema:
    """The body of POST /sample."""
    by_json, by_form = request.schema, request.text_schema
    if served.draws_pictures:
        texts = {
            name: {
                "anyOf": [base64_of(PHOTO), {"type": "null"}],
                "description": f"{what}, in base64, perhaps as a data: URL",
            }
            for name, what in _PICTURES.items()
        }
        files = {name: {**FILE, "description": what} for name, what in _PICTURES.items()}
        by_json = {**by_json, "properties": {**by_json["properties"], **texts}}
        by_form = {**by_form, "properties": {**by_form["properties"], **files}}
    example: Schema = {"num_images": 1, "seed": 7}
    if served.model.text is not None:
        example = {"prompt": "a fox in the snow", **example}
    return {
        "content": {
            "application/json": {"schema": by_json, "example": example},
            "multipart/form-data": {"schema": by_form},
        }
    }


def upload_body(request: RequestModel[Any], served: Served, steps: int) -> Schema:
    """The body of /denoise and /noise.

    Args:
        steps: of the example.
    """
    schema, text_schema = request.schema, request.text_schema
    files = "a PNG or .npy file of one of the sizes that GET /info lists"
    if not served.draws_pictures:
        files = "an .npy file of one of the sizes that GET /info lists"
    elif served.model.vae:
        files = "a PNG of one of the sizes that GET /info lists, which is encoded, or an .npy of latents of such a size"
    file = {**FILE, "description": files}
    text = {**base64_of(UPLOAD), "description": "the same file in base64, perhaps as a data: URL"}
    required = ["image", *schema["required"]]
    by_form = {**text_schema, "properties": {"image": file, **text_schema["properties"]}, "required": required}
    by_json = {**schema, "properties": {"image": text, **schema["properties"]}, "required": required}
    example = {
        "image": example_image(served),
        "timestep": served.model.schedule.num_train_timesteps // 2,
    }
    if "num_inference_steps" in schema["properties"]:
        example["num_inference_steps"] = steps
    if "class_label" in required:
        example["class_label"] = 0
    return {
        "required": True,
        "content": {
            "multipart/form-data": {"schema": by_form},
            "application/json": {"schema": by_json, "example": example},
        },
    }


def example_image(served: Served) -> str:
    """An image of the first size, in base64."""
    blank = np.zeros(served.model.image_shape_of(served.groups[0]), np.float32)
    image = encode_png16(blank, 1.0).png if served.draws_pictures else encode_npy(blank)
    return base64.b64encode(image).decode()
