"""The JSON Schema of requests, without the values that the served model cannot take. Plans explain such refusals."""

from typing import Any

from model.description import ModelDescription
from model.samplers import SAMPLERS
from service.plan.fields import Denoise, Noise, Sample
from service.plan.guidance import is_guidable, why_one_prediction
from service.plan.limits import Limits
from service.plan.micro_conditions import NEGATIVE, OWN
from service.plan.served import Served
from service.plan.shared_fields import MAX_PROMPT

Schema = dict[str, Any]

_MAX_NAMES = 100  # the most classes that a schema lists; /info names all
_NULL: Schema = {"type": "null"}


def narrowed(schema: Schema, request: type, served: Served, limits: Limits) -> Schema:
    """A schema of pydantic without the values that this model cannot take."""
    model = served.model
    fields: dict[str, Schema] = schema["properties"]
    if issubclass(request, Noise):
        return schema
    samplers = [model.distilled.sampler] if model.distilled else list(SAMPLERS)
    fields["sampler"]["anyOf"] = [{"type": "string", "enum": samplers}, _NULL]
    if not any(SAMPLERS[sampler].takes_eta for sampler in samplers):
        fields["eta"]["maximum"] = 0
    if not is_guidable(model):
        fields["guidance_scale"]["anyOf"][0]["maximum"] = 1
    if why_one_prediction(model):
        fields["guidance_interval"]["anyOf"] = [_NULL]
        fields["guidance_rescale"]["maximum"] = 0
    if served.checks_images and "output" in fields:
        fields["output"]["enum"] = ["x0"]
    _narrow_texts(fields, model, limits)
    for name in (*OWN, *NEGATIVE):
        if not model.embeds_sizes or (name in NEGATIVE and model.embeds_guidance):
            fields[name]["anyOf"] = [_NULL]
    if issubclass(request, Sample):
        if model.distilled:
            fields["sigma_schedule"]["anyOf"] = [_NULL]
        if not served.draws_pictures:
            fields["strength"]["anyOf"] = [_NULL]
            fields["fit"]["enum"], fields["paste_original"]["enum"] = ["stretch"], [False]
        for name in ("height", "width"):
            sides = sorted({getattr(group, name) for group in served.groups})
            fields[name]["anyOf"] = [{"type": "integer", "enum": sides}, _NULL]
    if model.distilled:
        nothing = [None] if issubclass(request, Sample) else []
        fields["num_inference_steps"]["enum"] = [*model.distilled.num_inference_steps, *nothing]

    label = _label(model)
    if issubclass(request, Denoise):
        if model.needs_label:
            schema["required"] = ["class_label", *schema["required"]]
            del fields["class_label"]["default"]
        fields["class_label"]["anyOf"] = label if model.needs_label else [*label, _NULL]
    else:
        several = {"type": "array", "items": {"anyOf": [*label, _NULL]}, "minItems": 1}
        fields["class_label"]["anyOf"] = [*label, _NULL, {**several, "maxItems": limits["max_images"]}]
    return schema


def _narrow_texts(fields: dict[str, Schema], model: ModelDescription, limits: Limits) -> None:
    """Add the limits of prompts. JSON Schema counts characters, and the service counts bytes."""
    if model.text is None:
        fields["prompt"]["anyOf"] = fields["negative_prompt"]["anyOf"] = [_NULL]
        fields["clip_skip"]["maximum"] = 0
        if "emphasis" in fields:
            fields["emphasis"]["enum"] = ["none"]
        return
    for name in ("prompt", "negative_prompt"):
        for kind in fields[name]["anyOf"]:
            if kind["type"] == "array":
                kind |= {"minItems": 1, "maxItems": limits["max_images"]}
            text = kind.get("items", kind)
            for one in text.get("anyOf", [text]):
                if one["type"] == "string":
                    one["maxLength"] = MAX_PROMPT
    if model.embeds_guidance:
        fields["negative_prompt"]["anyOf"] = [_NULL]


def _label(model: ModelDescription) -> list[Schema]:
    """The schemas for a class: its index, or its name."""
    classes, names = model.num_classes, model.class_names
    if classes is None:
        return []
    text: Schema = {"type": "string", "minLength": 1}
    if classes <= _MAX_NAMES:
        text = {"type": "string", "enum": list(dict.fromkeys([*names, *map(str, range(classes))]))}
    return [{"type": "integer", "minimum": 0, "maximum": classes - 1}, text]


def without_null(schema: Schema) -> Schema | None:
    """The schema of the values that text can express. None if text can express none."""
    if "anyOf" in schema:
        kinds = [kind for one in schema["anyOf"] if (kind := without_null(one))]
        return {**_bare(schema), "anyOf": kinds} if kinds else None
    if schema.get("type") == "array":
        items = without_null(schema["items"])
        return {**schema, "items": items} if items else None
    return None if schema.get("type") == "null" else _bare(schema)


def _bare(schema: Schema) -> Schema:
    bare = {key: value for key, value in schema.items() if (key, value) != ("default", None)}
    return bare | {"enum": [value for value in schema["enum"] if value is not None]} if "enum" in schema else bare
