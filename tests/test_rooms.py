"""The interface of a room is its `__init__`: other rooms import the room, never one of its modules.

Which room may import which is held by import-linter (`pyproject.toml`); this rule it could only hold by naming every
module.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import dflash_jax

PACKAGE = Path(dflash_jax.__path__[0])


def _imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything imported; `from a import b` gives `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def _reaches_inside(room: str, name: str) -> bool:
    """Whether `name` is a module of another room than `room`."""
    parts = name.split(".")
    if parts[0] != "dflash_jax" or len(parts) < 3 or parts[1] == room:
        return False
    inside = PACKAGE.joinpath(*parts[1:3])
    # `from dflash_jax.train import train` names a function even where a module train.py exists.
    return len(parts) > 3 and (inside.with_suffix(".py").exists() or inside.is_dir())


def test_the_rule_tells_rooms_from_their_modules():
    assert _reaches_inside("cli", "dflash_jax.core.files.write_json")
    assert not _reaches_inside("core", "dflash_jax.core.files.write_json")
    assert not _reaches_inside("cli", "dflash_jax.core.write_json")
    assert not _reaches_inside("cli", "numpy.core.files.x")
    tree = ast.parse("def f():\n    import numpy\n    from dflash_jax.core.files import write_json\n")
    assert list(_imported(tree)) == [(2, "numpy"), (3, "dflash_jax.core.files.write_json")]


def test_rooms_import_rooms_and_not_their_modules():
    sources = sorted(PACKAGE.rglob("*.py"))
    assert len(sources) > 20
    wrong = [
        f"{source.relative_to(PACKAGE)}:{line} imports {name}"
        for source in sources
        for line, name in _imported(ast.parse(source.read_text(encoding="utf-8")))
        if _reaches_inside(source.relative_to(PACKAGE).parts[0], name)
    ]
    assert wrong == []
