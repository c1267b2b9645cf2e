"""A digest of the ops' schemas: the build writes it down, and native.py compares it with its own.

Imports nothing of the package and no torch: setup.py runs this file. A library that was built for
other schemas would be called with arguments that it does not take.
"""

import ast
import hashlib
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
_FILES = ("ops.py", "train/engines/native_op.py")  # each holds the schemas of its ops as texts


def digest(package: Path = _PACKAGE) -> str:
    """Of every text that these files assign to a name: comments and docstrings do not count."""
    texts = []
    for file in _FILES:
        for statement in ast.parse((package / file).read_text(encoding="utf-8")).body:
            if isinstance(statement, ast.Assign):
                nodes = (n for n in ast.walk(statement) if isinstance(n, ast.Constant))
                texts += [n.value for n in nodes if isinstance(n.value, str)]
    return hashlib.sha256("".join(texts).encode()).hexdigest()[:16]
