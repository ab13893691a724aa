"""The house: every arrow of the import graph points down, and the floors can be counted on two hands."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import optima

ROOT = Path(optima.__file__).parent
DOCS = Path(__file__).parents[2] / "docs"
TESTS = Path(__file__).parents[1]
MOST_FLOORS = 10
MOST_LINES = 400
MOST_FUNCTION_LINES, MOST_ARGUMENTS = 40, 7
# What a user starts with choices of their own, and what goes over a whole model.
MANY_ARGUMENTS = {
    "run.prune",
    "ordering.order.order",
    "qp.solve",
    "calibration.loss_weights.loss_weights",
    "calibration.own_text.own_text",
}


def modules() -> dict[str, Path]:
    return {
        ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted(ROOT.rglob("*.py"))
    }


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """Modules of the package that a file imports, wherever in the file, for the sake of types too."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
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


def rooms() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for name, others in graph().items():
        found.setdefault(room(name), set()).update(room(other) for other in others)
    return {name: others - {name} for name, others in found.items()}


def test_rooms_stand_on_at_most_ten_floors() -> None:
    heights = floors(rooms())
    assert max(heights.values()) <= MOST_FLOORS, heights


def test_the_map_of_the_house_is_true() -> None:
    """Every room is in the table of docs/architecture.md, and uses all that it names there, and none below itself."""
    page = (DOCS / "architecture.md").read_text(encoding="utf-8")
    table = page[page.index("## The floors") : page.index("## Dive into the code")]
    cells = [line.split("|")[1::2] for line in table.splitlines() if line.startswith("| `")]
    rows = [re.findall(r"`([\w/.]+)`", names) for names, _ in cells]
    place = {
        f"optima.{name.removesuffix('/').removesuffix('.py')}": row for row, names in enumerate(rows) for name in names
    }
    arrows = rooms()
    assert not arrows.keys() - place.keys()
    for row, (_, uses) in enumerate(cells[:-1]):  # the last uses all of it
        named = {f"optima.{name.strip()}" for name in uses.split(",")} - {"optima.nothing"}
        assert not named - {other for name in place if place[name] == row for other in arrows.get(name, ())}, rows[row]
    assert not [(name, other) for name, others in arrows.items() for other in others if place[other] > place[name]]


def test_files_are_short() -> None:
    assert not [name for name, path in modules().items() if len(path.read_text().splitlines()) > MOST_LINES]


def test_no_test_replaces_a_private_name() -> None:
    """They pin behaviour: what is private may change without them."""
    named = re.compile(r"setattr\(\s*(?:\"optima[\w.]*\._\w+\"|[a-z]\w*, \"_[a-z]\w*\")")
    found = [path.name for path in TESTS.rglob("*.py") if named.search(path.read_text(encoding="utf-8"))]
    assert not found


def functions() -> list[tuple[str, ast.FunctionDef]]:
    return [
        (f"{name.removeprefix('optima.')}.{node.name}", node)
        for name, path in modules().items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    ]


def lines(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def test_functions_are_short() -> None:
    found = functions()
    sizes = [(name, lines(node) - (lines(node.body[0]) if ast.get_docstring(node) else 0)) for name, node in found]
    long = [name for name, size in sizes if size > MOST_FUNCTION_LINES]
    assert len(long) <= len(found) / 100, long


def test_functions_have_few_arguments() -> None:
    counts = [
        (name, len([each for each in (*node.args.args, *node.args.kwonlyargs) if each.arg not in ("self", "cls")]))
        for name, node in functions()
    ]
    assert {name for name, count in counts if count > MOST_ARGUMENTS} == MANY_ARGUMENTS
