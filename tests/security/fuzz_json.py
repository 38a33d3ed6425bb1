"""JSON bodies that are almost right: mutation of what the HTTP endpoints take."""

import json
import random
from collections.abc import Callable
from typing import Any

from tests.security.fuzz_messages import damage, text

_NAMES = (
    "input", "model", "encoding_format", "dimensions", "user", "layers", "pooling", "l2_normalize", "sentences", "text",
    "tokens", "state", "return_state", "options", "mix", "weights", "gamma", "layer_norm", "data_type", "omit_tokens",
    "expected_model_version", "rows", "spans", "span_unit", "start", "end", "priority", "", "__proto__",
)  # fmt: skip
_WORDS = (
    "mean", "max", "none", "top", "all", "average", "mix", "float", "base64", "float16", "bfloat16", "random-tiny",
    "AAAA", "AA==", "A", "=", "tokens", "bytes", "batch", "interactive",
)  # fmt: skip
_NUMBERS = (0, 1, -1, 2, 3, 7, 128, 0.5, -0.0, 1e39, 1e308, 2**31, 2**63, 2**64, 10**400, 1e-46)
_ODD: tuple[Any, ...] = (None, True, False, [], {}, [[]], [None], [{}], [1, 2], [[1], [2]], [True], {"": 0})
_MAX_COPIES = 300

# Where the parser of JSON, or what comes before it, may stumble
_RAW = (
    b"NaN",
    b"-Infinity",
    b"1e999",
    b"0" * 400,
    b'"\\ud800"',
    b'"\xed\xa0\x80"',
    b'"\xff"',
    b'"\\u0000"',
    b"[" * 2000,
    b'{"a":' * 1500,
    b"//",
    b"\xef\xbb\xbf",
    b'"\\',
)


def embeddings_body() -> dict[str, Any]:
    return {
        "input": ["The cat sat.", "Straße, 日本 — and “text”."],
        "model": "random-tiny",
        "encoding_format": "base64",
    }


def embed_body() -> dict[str, Any]:
    return {
        "options": {"layers": "mix", "mix": {"weights": [1, 0.5, 2], "gamma": 2, "layer_norm": True}},
        "sentences": [{"text": "The cat sat.", "return_state": True}, {"tokens": ["The", "play"]}, {"text": ""}],
        "encoding_format": "float",
    }


def chosen_body() -> dict[str, Any]:
    return {
        "options": {"layers": "top", "pooling": "mean", "data_type": "float16"},
        "sentences": [
            {"text": "The cat sat.", "spans": [[0, 7], [8, 11]], "span_unit": "bytes"},
            {"tokens": ["The", "play"], "rows": [1, 0, 1]},
        ],
        "priority": "batch",
    }


def almost_json(rng: random.Random, new: Callable[[], dict[str, Any]]) -> bytes:
    """A good body with up to eight mutations, one time in four damaged as bytes, too."""
    body: Any = new()
    for _ in range(rng.choice((0, 1, 1, 2, 3, 8))):
        body = mutated_json(rng, body)
    return damaged_json(rng, to_json_bytes(rng, body))


def mutated_json(rng: random.Random, value: Any) -> Any:
    """A value with one change somewhere in it."""
    if rng.random() < 0.15 or not isinstance(value, dict | list) or not value:
        return _odd(rng)
    return _changed_object(rng, value) if isinstance(value, dict) else _changed_list(rng, value)


def to_json_bytes(rng: random.Random, value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=rng.random() < 0.5).encode()


def damaged_json(rng: random.Random, data: bytes) -> bytes:
    """The bytes, one time in four with a damage that protobuf's or JSON's parsers may stumble over."""
    if rng.random() >= 0.25:
        return data
    if rng.random() < 0.5:
        return damage(rng, data)
    place = rng.randrange(len(data) + 1)
    return data[:place] + rng.choice(_RAW) + data[place:]


def _odd(rng: random.Random) -> Any:
    return rng.choice((rng.choice(_ODD), rng.choice(_NUMBERS), rng.choice(_WORDS), text(rng)))


def _changed_object(rng: random.Random, value: dict[str, Any]) -> dict[str, Any]:
    changed, name = dict(value), rng.choice(list(value))
    match rng.randrange(5):
        case 0:
            del changed[name]
        case 1:
            changed[rng.choice(_NAMES)] = changed.pop(name)
        case 2:
            changed[rng.choice((*_NAMES, text(rng)))] = _odd(rng)
        case _:
            changed[name] = mutated_json(rng, value[name])
    return changed


def _changed_list(rng: random.Random, value: list[Any]) -> list[Any]:
    place = rng.randrange(len(value))
    match rng.randrange(4):
        case 0:
            return value[:place]
        case 1:
            return (value * rng.choice((2, 20, 1100)))[:_MAX_COPIES] if rng.random() < 0.9 else value * 400
        case _:
            return [*value[:place], mutated_json(rng, value[place]), *value[place + 1 :]]
