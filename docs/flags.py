"""Prints docs/flags.md from the fields of fedsam.config.schema.Config: ``python docs/flags.py``."""

import inspect
import re
from collections.abc import Iterator

from fedsam.base.errors import flag
from fedsam.config.schema import Config

HEAD = """# Every flag

Made by `python docs/flags.py` from the fields of `Config`; a test compares. A flag
is also a key of a run's YAML file and of `fedsam.run(...)` from Python, with underscores
(`clients_per_round`), and of Flower's run config (`clients-per-round`). A boolean flag has a
counterpart: `--no-swa`.

Flags stand before the `--config` file, the file before the `--algorithm`'s preset, and that
before the defaults. `python -m fedsam.sweep` takes the same flags, for every cell.
"""
TABLE = """
## {}

| flag | default | meaning |
| --- | --- | --- |
{}
"""


def groups() -> Iterator[tuple[str, list[str]]]:
    """Yield the comments that part Config's fields, each with its fields."""
    comment, names = "", []
    for found in re.finditer(r"^    (?:# (.+)|(\w+): .+)$", inspect.getsource(Config), re.M):
        if found[1]:
            if names:
                yield comment, names
            comment, names = found[1], []
        elif found[2] in Config.model_fields:
            names.append(found[2])
    yield comment, names


def row(name: str) -> str:
    """Return a field's row of the table."""
    field = Config.model_fields[name]
    default = "none" if field.default in ("", {}) else str(field.default)
    meaning = " ".join((field.description or "").split()).replace("|", r"\|")
    meaning = re.sub(r"'(\{.+?\})'|(--[a-z-]+)", lambda m: f"`{m[1] or m[2]}`", meaning)
    return f"| `{flag(name)}` | {default} | {meaning} |"


def page() -> str:
    """Return docs/flags.md."""
    tables = (TABLE.format(c.capitalize(), "\n".join(map(row, names))) for c, names in groups())
    return HEAD + "".join(tables)


if __name__ == "__main__":
    print(page(), end="")
