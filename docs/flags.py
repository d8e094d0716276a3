"""Prints docs/flags.md from the fields of fedsam.config.schema.Config: ``python docs/flags.py``."""

import re

from fedsam.base.errors import flag
from fedsam.config.schema import Config, groups

HEAD = """# Every flag

Made by `python docs/flags.py` from the fields of `Config`; a test compares. A flag
is also a key of a run's YAML file and of `fedsam.run(...)` from Python, with underscores
(`clients_per_round`), and of Flower's run config (`clients-per-round`). A boolean flag has a
counterpart: `--no-swa`. In paths, `~` and `$VAR` are read as a shell reads them.

Flags override the `--config` file, the file overrides the `--algorithm`'s preset, and the preset
the defaults; `--print-config` prints what comes of it. Options (`--minimizer-options` and the
like) are merged key by key; those of
a plug-in go with it where one of these names another in its place. `python -m fedsam.sweep` takes
the same flags, for every cell.
"""
TABLE = """
## {}

| flag | default | meaning |
| --- | --- | --- |
{}
"""


def row(name: str) -> str:
    """Return a field's row of the table."""
    field = Config.model_fields[name]
    default = "none" if field.default in ("", {}, None) else str(field.default)
    meaning = " ".join((field.description or "").split()).replace("|", r"\|")
    meaning = re.sub(r"'(\{.+?\})'|(--[a-z-]+)", lambda m: f"`{m[1] or m[2]}`", meaning)
    return f"| `{flag(name)}` | {default} | {meaning} |"


def page() -> str:
    """Return docs/flags.md."""
    tables = (TABLE.format(title, "\n".join(map(row, names))) for title, names in groups().items())
    return HEAD + "".join(tables)


if __name__ == "__main__":
    print(page(), end="")
