"""The house: every arrow of the import graph points down, and the floors can be counted on two hands."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import optima

ROOT = Path(optima.__file__).parent
MOST_FLOORS = 10
MOST_LINES = 400


def modules() -> dict[str, Path]:
    return {
        ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted(ROOT.rglob("*.py"))
    }


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """Modules of the package that a file imports, wherever in the file, but for the sake of types alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, f"{path}: imports are absolute"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in known else node.module)
    return {name for name in found if name in known}


def room(module: str) -> str:
    """A folder is a room, and so is a file beside the folders."""
    return ".".join(module.split(".")[:2])


def floors(arrows: dict[str, set[str]]) -> dict[str, int]:
    """The floor of each node: one above the highest that it imports. Fails on a circle."""
    path: list[str] = []

    @cache
    def floor(node: str) -> int:
        assert node not in path, f"a circle: {' -> '.join([*path[path.index(node) :], node])}"
        path.append(node)
        result = 1 + max((floor(other) for other in sorted(arrows[node])), default=0)
        path.pop()
        return result

    return {node: floor(node) for node in arrows}


def graph() -> dict[str, set[str]]:
    known = modules()
    # The two front doors, of the package and of ``python -m``, only name what is inside.
    doors = {"optima", "optima.__main__"}
    return {name: imports(path, known) - {*doors, name} for name, path in known.items() if name not in doors}


def test_no_file_imports_in_a_circle() -> None:
    floors(graph())


def test_rooms_stand_on_at_most_ten_floors() -> None:
    rooms: dict[str, set[str]] = {}
    for name, others in graph().items():
        rooms.setdefault(room(name), set()).update(room(other) for other in others)
    heights = floors({name: others - {name} for name, others in rooms.items()})
    assert max(heights.values()) <= MOST_FLOORS, heights


def test_files_are_short() -> None:
    assert not [name for name, path in modules().items() if len(path.read_text().splitlines()) > MOST_LINES]
