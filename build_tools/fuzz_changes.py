"""How an input of build_tools/fuzz.py becomes another one: bytes or values of JSON are changed."""

import copy
import json
import random

NUMBERS = (0, 1, 2, 7, 127, 128, 255, 256, 32767, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1)
VALUES = (None, True, False, 0, -1, 1, 3, 2**63, 2**70, 0.5, -0.0, 1e308, "", "a", "\0", "é" * 9)
VALUES += ([], {}, [None], [[]], {"a": 1}, [0] * 50, float("nan"), float("inf"), "a" * 3000)


def changed(pick: random.Random, content: bytes, pool: list[bytes], reader) -> bytes:
    """reader: a Reader, whose words are used."""
    for _ in range(pick.choice((1, 1, 2, 3, 6))):
        if reader.is_json and pick.random() < 0.8:
            content = _json_changed(pick, content)
        else:
            content = _bytes_changed(pick, content, pool, reader.words)
    return content


def _bytes_changed(pick, content: bytes, pool, words) -> bytes:
    at = pick.randrange(len(content) + 1)
    size = min(pick.choice((1, 1, 2, 4, 8, 32, 256)), len(content) - at)
    kind = pick.randrange(1, 9) if words else pick.randrange(1, 7)
    kind = kind if at < len(content) else 1
    before, there, after = content[:at], content[at : at + size], content[at + size :]
    if kind == 1 and after and pick.random() < 0.5:
        return before + bytes([content[at] ^ 1 << pick.randrange(8)]) + content[at + 1 :]
    if kind == 1:
        return before + pick.randbytes(max(size, 1)) + after
    if kind == 2:
        return before + after
    if kind == 3:
        return before + there * pick.choice((2, 3, 50)) + after
    if kind == 4:
        number, width = pick.choice(NUMBERS), pick.choice((1, 2, 4, 8))
        order = pick.choice(("little", "big"))
        return before + (number % 256**width).to_bytes(width, order) + content[at + width :]
    if kind == 5:
        return before if pick.random() < 0.3 else content[:at] + pick.choice(pool)[at:]
    if kind == 6:
        other = pick.choice(pool)
        start = pick.randrange(len(other) + 1)
        return before + other[start : start + 64] + after
    return before + pick.choice(words) + (after if kind == 7 else content[at:])


def _json_changed(pick, content: bytes) -> bytes:
    """A value, a name or an element changed, where it is JSON."""
    try:
        root = json.loads(content)
    except ValueError:
        return content
    places = list(_places(root))
    if not places:
        return json.dumps(pick.choice(VALUES)).encode()
    owner, name = pick.choice(places)
    kind = pick.randrange(6)
    if kind == 0:
        del owner[name]
    elif kind == 1 and isinstance(owner, dict):
        owner[pick.choice(("", "a", "kind", "é"))] = owner.pop(name)
    elif kind == 2:
        other, its = pick.choice(places)
        owner[name] = copy.deepcopy(other[its])
    elif kind == 3 and isinstance(owner[name], int | float):
        owner[name] = owner[name] * pick.choice((-1, 0, 2, 10**9)) + pick.choice((-1, 0, 1))
    elif kind == 4 and isinstance(owner[name], list) and owner[name]:
        owner[name] = owner[name] + [pick.choice(owner[name])]
    else:
        owner[name] = pick.choice(VALUES)
    return json.dumps(root).encode()


def _places(value):
    if isinstance(value, dict | list):
        for name in value if isinstance(value, dict) else range(len(value)):
            yield value, name
            yield from _places(value[name])
