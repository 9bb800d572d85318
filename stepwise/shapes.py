"""Checks that JSON has the shape in docs/api.md. The client checks each answer before it uses the answer."""

import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict


def checked(value: object, shape: Any, name: str = "the answer") -> Any:
    """Check the value, and return it unchanged. An object may have more keys than its TypedDict.

    Keys that are NotRequired may be missing: servers of earlier versions do not send them.

    Args:
        shape: a TypedDict, list[…], dict[str, …], a union, a Literal, or a type of JSON. An int passes as a float.
        name: of the value, in errors.

    Raises:
        KeyError: a key is missing.
        TypeError: a value is of another type.
    """
    if shape is Any:
        return value
    if is_typeddict(shape):
        found = _is(value, dict, name)
        for key, inner in get_type_hints(shape).items():
            if key in found or key in shape.__required_keys__:
                checked(found[key], inner, key)
        return value
    origin, inner = get_origin(shape), get_args(shape)
    if origin in (types.UnionType, Union):
        if not any(_fits(value, kind, name) for kind in inner):
            raise TypeError(f"{name} is {value!r:.80}")
    elif origin is list:
        for one in _is(value, list, name):
            checked(one, inner[0], name)
    elif origin is dict:
        for one in _is(value, dict, name).values():
            checked(one, inner[1], name)
    elif origin is Literal:
        _is(value, str, name)  # a newer server may have more literals
    else:
        _is(value, shape, name)
    return value


def _fits(value: object, shape: Any, name: str) -> bool:
    try:
        checked(value, shape, name)
    except (KeyError, TypeError):
        return False
    return True


def _is(value: Any, kind: type, name: str) -> Any:
    kinds: tuple[type, ...] = (int, float) if kind is float else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"{name} is {value!r:.80}, and no {kind.__name__}")
    return value
