"""Writes reference/config.md from the config's declarations: python docs/config_page.py"""

import dataclasses
import inspect
import itertools
import pathlib

from vop_jax.config import keys

PAGE = pathlib.Path(__file__).parent / "reference" / "config.md"
INTRODUCTION = """# Config

These are all keys of a run, with their defaults. A config file starts from
`vop_jax.config.base_config()` and changes some keys; `--config.KEY=VALUE` changes a key on the
command line. `vop_jax/config/keys.py` declares the keys, and `python docs/config_page.py` makes
this page.

A workdir belongs to one config. A key marked *resume* may have another value when the run
continues, is evaluated or exported; a key marked *eval* only when it is evaluated or exported.
"""


def render() -> str:
    """The page, in Markdown."""
    sections = {f.name: type(f.default) for f in dataclasses.fields(keys.RunConfig)}
    lines = [INTRODUCTION]
    for name, rows in itertools.groupby(keys.table(), lambda row: row.key.rpartition(".")[0]):
        if name:
            lines += [f"## {name}", "", inspect.cleandoc(sections[name].__doc__ or ""), ""]
        lines += ["| key | default | allowed | may change | meaning |", "|---|---|---|---|---|"]
        for row in rows:
            change = keys.KEYS[row.key].change.replace("never", "")
            cells = f"`{row.key}`", f"`{row.default}`", row.allowed, change, row.meaning
            lines.append(f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(render())
