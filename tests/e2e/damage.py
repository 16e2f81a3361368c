"""Damage that keeps a file a protocol buffer: fields set, cleared, exchanged and repeated, wherever they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from google.protobuf.descriptor import FieldDescriptor

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    import onnx

_FLOATS = {FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE}
_NUMBERS = (
    *(-1, 0, 1, 2, 3, 7, 10, 11, 16, 17, 21, 255, 999),
    *(1 << 16, (1 << 31) - 1, -(1 << 31), 1 << 31, 1 << 40, (1 << 62) + 1, -(1 << 63)),
)
_REALS = (0.0, -0.0, 1e-45, 1e38, -1e38, float("inf"), float("nan"))
_TEXTS = (
    "",
    "x",
    "\x00",
    "../x",
    "/etc/passwd",
    "MatMul",
    "Constant",
    "com.microsoft",
    "é" * 40,
)
_LARGEST = 2000
"""Messages looked at: enough for small models, and a bound where repeating made large ones."""


def damage(model: onnx.ModelProto, rng: np.random.Generator, times: int) -> None:
    """Change ``model`` in so many random places."""
    for _ in range(times):
        messages = [found for found, _ in zip(_messages(model), range(_LARGEST), strict=False)]
        _change(messages, rng)


def _messages(root: Any) -> Iterator[Any]:
    """The message and everything in it."""
    pending = [root]
    while pending:
        message = pending.pop()
        yield message
        for descriptor, value in message.ListFields():
            if descriptor.message_type is not None:
                pending.extend(value if descriptor.is_repeated else [value])


def _change(messages: list[Any], rng: np.random.Generator) -> None:
    message = messages[int(rng.integers(len(messages)))]
    fields = message.DESCRIPTOR.fields
    present = [descriptor for descriptor, _ in message.ListFields()]
    known = present if present and rng.random() < 0.8 else fields
    field = known[int(rng.integers(len(known)))]
    if field.is_repeated:
        _change_list(message, field, messages, rng)
    elif field.message_type is not None:
        other = _another(messages, field.message_type, rng)
        if other is None or rng.random() < 0.4:
            message.ClearField(field.name)
        else:
            _copy(other, getattr(message, field.name))
    elif rng.random() < 0.1:
        message.ClearField(field.name)
    else:
        value = _scalar(field, getattr(message, field.name), messages, rng)
        if value is not None:
            setattr(message, field.name, value)


def _change_list(
    message: Any, field: FieldDescriptor, messages: list[Any], rng: np.random.Generator
) -> None:
    items = getattr(message, field.name)
    place = int(rng.integers(len(items))) if items else 0
    choice = int(rng.integers(4))
    if choice == 0 and items:
        del items[place]
    elif choice == 1 and rng.random() < 0.2:
        del items[:]
    elif field.message_type is not None:
        own = items[place] if items and rng.random() < 0.5 else None
        other = own if own is not None else _another(messages, field.message_type, rng)
        if other is not None:
            _copy(other, items.add())
    else:
        value = _scalar(field, items[place] if items else None, messages, rng)
        if value is None:
            return
        if items and choice != 3:
            items[place] = value
        else:
            items.append(value)


def _copy(source: Any, target: Any) -> None:
    """A copy that is whole even where ``target`` lies inside ``source``."""
    content = source.SerializeToString()
    target.Clear()
    target.MergeFromString(content)


def _another(messages: list[Any], kind: Any, rng: np.random.Generator) -> Any:
    alike = [message for message in messages if message.DESCRIPTOR is kind]
    return alike[int(rng.integers(len(alike)))] if alike else None


def _scalar(
    field: FieldDescriptor, value: Any, messages: list[Any], rng: np.random.Generator
) -> Any:
    """Another value for a field; None where the field would not take it."""
    kind = field.cpp_type
    if field.type == FieldDescriptor.TYPE_BYTES:
        return _bytes(value or b"", rng)
    if kind == FieldDescriptor.CPPTYPE_STRING:
        names = [
            text
            for message in messages
            for text in (getattr(message, "name", ""), *getattr(message, "output", ()))
            if isinstance(text, str)
        ]
        pool = [*names, *_TEXTS] if rng.random() < 0.8 else list(_TEXTS)
        return pool[int(rng.integers(len(pool)))]
    if kind in _FLOATS:
        return _REALS[int(rng.integers(len(_REALS)))]
    if kind == FieldDescriptor.CPPTYPE_ENUM:
        assert field.enum_type is not None
        return int(rng.choice([value.number for value in field.enum_type.values]))
    number = _NUMBERS[int(rng.integers(len(_NUMBERS)))]
    if rng.random() < 0.3:
        number = (value or 0) + int(rng.choice([-1, 1]))
    bits = 31 if kind in {FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_UINT32} else 63
    unsigned = kind in {FieldDescriptor.CPPTYPE_UINT32, FieldDescriptor.CPPTYPE_UINT64}
    low = 0 if unsigned else -(1 << bits)
    return number if low <= number < 1 << bits else None


def _bytes(value: bytes, rng: np.random.Generator) -> bytes:
    choice = int(rng.integers(4))
    if choice == 0:
        return value[: int(rng.integers(len(value) + 1))]
    if choice == 1:
        return value + rng.bytes(int(rng.integers(1, 9)))
    if choice == 2 and value:
        damaged = bytearray(value)
        damaged[int(rng.integers(len(damaged)))] ^= 1 << int(rng.integers(8))
        return bytes(damaged)
    return rng.bytes(len(value))
