"""Mutants that change nothing which a user or another part could see, and why."""

# (file, line before, line after): reason
EQUIVALENT: dict[tuple[str, str, str], str] = {}
