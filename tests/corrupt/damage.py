"""Ways to damage a file, each a function of the content and a seed: any input can be made again by its number."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from google.protobuf.descriptor import FieldDescriptor as Field

KINDS = ("truncation", "bit", "bytes", "structure")
INTERESTING = [0, 1, -1, 2, 7, 31, 32, 33, 127, 128, 255, 2**15, 2**31 - 1, 2**31, -(2**31), 2**32, 2**62, 2**63 - 1]
TEXTS = ["", "x", "y", "B", "qbb", "BinaryBasisMatMul", "Relu", "Scan", "If", "ai.onnx.ml", "location", "\0", "é" * 40]


def damaged(kind: str, content: bytes, number: int, seed: int) -> bytes:
    """Input ``number`` of a kind; truncations and bits are numbered by place, the rest by seed."""
    if kind == "truncation":
        return content[:number]
    if kind == "bit":
        changed = bytearray(content)
        changed[number // 8] ^= 1 << number % 8
        return bytes(changed)
    rng = np.random.default_rng([seed, KINDS.index(kind), number])
    return several_bytes(content, rng) if kind == "bytes" else structure(content, rng)


def several_bytes(content: bytes, rng: np.random.Generator) -> bytes:
    """Overwrite, insert, delete, move or repeat runs of 1 to 64 bytes, up to 8 times."""
    changed = bytearray(content)
    for _ in range(rng.integers(1, 9)):
        at = int(rng.integers(len(changed)))
        if rng.random() < 0.5:  # the function body is most of the file and is refused at once: aim beside it as often
            at = int(rng.integers(min(len(changed), 700)))
        length = int(rng.choice([1, 1, 1, 2, 4, 8, 64]))
        piece = changed[at : at + length]
        other = int(rng.integers(len(changed) + 1))
        match rng.integers(6):
            case 0:
                changed[at : at + length] = rng.bytes(len(piece))
            case 1:
                changed[at:at] = rng.bytes(length)
            case 2:
                del changed[at : at + length]
            case 3:
                changed[other:other] = piece
            case 4:
                changed[at : at + length] = bytes([int(rng.choice([0, 1, 0x7F, 0x80, 0xFF]))]) * len(piece)
            case 5:
                changed[at : at + length] = changed[other : other + length]
        if not changed:
            return b""
    return bytes(changed)


def messages(message: Any) -> Iterator[Any]:
    """A message and all in it."""
    yield message
    for field, value in message.ListFields():
        if field.type == Field.TYPE_MESSAGE:
            for item in value if field.is_repeated else [value]:
                yield from messages(item)


def structure(content: bytes, rng: np.random.Generator) -> bytes:
    """Change fields of a file that stays a well-formed protocol buffer: up to 3 of them."""
    model = onnx.load_model_from_string(content)
    for _ in range(rng.integers(1, 4)):
        root = model.functions[0] if model.functions and rng.random() < 0.1 else model.graph
        root = model if rng.random() < 0.1 else root
        found = [m for m in messages(root) if m.ListFields()]
        change(found[rng.integers(len(found))], found, rng)
    return bytes(model.SerializeToString())


def change(message: Any, all_messages: list[Any], rng: np.random.Generator) -> None:
    fields = list(message.ListFields())
    field, value = fields[rng.integers(len(fields))]
    if rng.random() < 0.15:  # a field that is not there yet
        field = message.DESCRIPTOR.fields[rng.integers(len(message.DESCRIPTOR.fields))]
        value = getattr(message, field.name)
    if not field.is_repeated:
        if field.type == Field.TYPE_MESSAGE:
            same = [m for m in all_messages if m.DESCRIPTOR is field.message_type]
            if same and rng.random() < 0.7:
                copy = type(same[0])()
                copy.CopyFrom(same[rng.integers(len(same))])
                getattr(message, field.name).CopyFrom(copy)
            else:
                message.ClearField(field.name)
        elif rng.random() < 0.15:
            message.ClearField(field.name)
        else:
            setattr(message, field.name, scalar(field, value, rng))
        return
    match rng.integers(4):
        case 0 if value:
            del value[rng.integers(len(value))]
        case 1 if value:  # once more, or the first of them last
            item = value[rng.integers(len(value))]
            if field.type == Field.TYPE_MESSAGE:
                value.add().CopyFrom(item)
            else:
                value.append(item)
        case 2:
            same = [m for m in all_messages if m.DESCRIPTOR is field.message_type]
            if field.type == Field.TYPE_MESSAGE:
                if same:
                    copy = type(same[0])()
                    copy.CopyFrom(same[rng.integers(len(same))])
                    value.add().CopyFrom(copy)
            else:
                value.append(scalar(field, value[0] if value else None, rng))
        case _:
            if value and field.type != Field.TYPE_MESSAGE:
                value[rng.integers(len(value))] = scalar(field, value[0], rng)
            else:
                message.ClearField(field.name)


def scalar(field: Field, old: Any, rng: np.random.Generator) -> Any:
    """Another value of a field's type: at a limit, near the old one, or any."""
    if field.type == Field.TYPE_STRING:
        return str(rng.choice(TEXTS))
    if field.type == Field.TYPE_BYTES:
        old = old or b""
        return [old[:-1], old + b"\0", b"", bytes(rng.bytes(len(old))), b"Relu"][rng.integers(5)]
    if field.type in (Field.TYPE_FLOAT, Field.TYPE_DOUBLE):
        return float(rng.choice([0.0, -1.0, np.inf, np.nan, 1e38]))
    if field.type == Field.TYPE_BOOL:
        return bool(rng.integers(2))
    if field.type == Field.TYPE_ENUM:
        numbers = [v.number for v in field.enum_type.values]
        return int(rng.choice(numbers))
    near = [int(old or 0) + int(rng.choice([-32, -16, -1, 1, 16, 32])), int(old or 0) * 2]
    chosen = [*near, *INTERESTING][rng.integers(2 + len(INTERESTING))] if rng.random() < 0.6 else near[0]
    bits = 32 if field.type in (Field.TYPE_INT32, Field.TYPE_UINT32) else 64
    unsigned = field.type in (Field.TYPE_UINT32, Field.TYPE_UINT64)
    return chosen % 2**bits if unsigned else (chosen + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1)
