"""Every error that OPTIMA raises on purpose, collected from the code: what it says, and the remedy that it names."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src" / "optima"
# Words of the code that tell a reader nothing.
NOT_SHOWN = {"self", "len", "str", "join", "sorted", "type", "map", "f", "x", "name"}
HEAD = """# Errors

Every message that OPTIMA ends with on purpose, collected from the code. ‹Angle brackets› stand for a value of the run.
Each names the input at fault and what to do about it. Search this page for the words that you see.

All are children of `optima.OptimaError`. The command line prints them and ends with [code 2](exit-codes.md).
What is not here is a bug, or an error of a library: please report it with the traceback.
"""


def errors(source: Path = SOURCE) -> dict[str, str]:
    """The classes of errors and what they are for, the base first, in the order of the code."""
    found = {"OptimaError": ""}
    for _ in range(3):  # children of children
        for tree in _trees(source):
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef) and (
                    node.name in found or any(isinstance(base, ast.Name) and base.id in found for base in node.bases)
                ):
                    found[node.name] = (ast.get_docstring(node) or "").partition("\n\n")[0].replace("\n", " ")
    return found


def messages(source: Path = SOURCE) -> dict[str, set[str]]:
    """What each class of error says, with ‹values› where the code fills them in."""
    found: dict[str, set[str]] = defaultdict(set)
    names = errors(source)
    for tree in _trees(source):
        for call in _raised(tree):
            name = call.func.id if isinstance(call.func, ast.Name) else ""
            text = _text(call.args[0]) if name in names and call.args else ""
            if len(re.findall(r"[a-z]{2,}", re.sub("‹.*?›", "", text))) > 2:  # else nothing but values
                found[name].add(text)
    return found


@cache
def _trees(source: Path) -> tuple[ast.Module, ...]:
    return tuple(ast.parse(file.read_text(encoding="utf-8")) for file in sorted(source.rglob("*.py")))


def _raised(tree: ast.AST) -> Iterator[ast.Call]:
    """Calls behind ``raise``, and those that a helper returns to be raised."""
    for node in ast.walk(tree):
        value = node.exc if isinstance(node, ast.Raise) else node.value if isinstance(node, ast.Return) else None
        if isinstance(value, ast.Call):
            yield value


def _text(node: ast.expr) -> str:
    """The message, as far as the code has it in one place."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_text, node.values))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    if isinstance(node, ast.IfExp):
        return f"{_text(node.body)} / {_text(node.orelse)}"
    inner = node.value if isinstance(node, ast.FormattedValue) else node
    words = re.findall(r"[a-z_]\w*", ast.unparse(inner))
    shown = [word for word in words if word not in NOT_SHOWN]
    return f"‹{(shown or words or ['value'])[-1].strip('_').replace('_', ' ')}›"


def page() -> str:
    """The page, as Markdown."""
    found = messages()
    parts = [HEAD]
    for name, about in errors().items():
        own = sorted(found.get(name, ()), key=lambda text: re.sub(r"^\W+", "", text).lower())
        if not own:
            continue
        parts.append(f"## {name}\n\n{about}\n")
        parts.extend(f"- {_markdown(text)}" for text in own)
        parts.append("")
    return "\n".join(parts)


def _markdown(text: str) -> str:
    """The message on one line of a list, nothing of it read as Markdown."""
    return re.sub(r"([\\`*_\[\]<>|$~^])", r"\\\1", " ".join(text.split()))


if __name__ == "__main__":
    print(page())
