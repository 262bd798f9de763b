"""Smaller Python with the same behaviour: what nobody reads or calls is left out, local names become short.

Three passes. :func:`strip` takes out what only readers, type checkers and tables of settings use. :func:`shake` drops
whatever no kept line of any module mentions by name. python-minifier then shortens names and blank space. What it
writes may use syntax of the Python that runs it, so equal sources give equal text on one minor version of Python only.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator, Mapping

Definition = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def minify(sources: Mapping[str, str], roots: Collection[str]) -> dict[str, str]:
    """Return the modules of ``sources`` (text by dotted name) that are needed for the names ``roots``, made small.

    Names are matched as they stand, wherever they are defined: what is kept may be too much, never too little, as long
    as no name is put together at run time. Two exceptions: a text such as ``"package.module.name"`` counts as a
    mention, and names that begin with an underscore belong to their module, so that they may become short.
    """
    import python_minifier  # slow to import, and needed only where nothing is cached

    trees = {name: strip(ast.parse(text)) for name, text in sources.items()}
    shake(trees, roots)
    return {
        name: python_minifier.minify(
            ast.unparse(tree),
            remove_literal_statements=True,
            remove_asserts=True,
            remove_annotations=False,  # strip() knows which ones are read at run time
            rename_globals=True,
            preserve_globals=[found for found in _identifiers(tree) if not found.startswith("_")],
            hoist_literals=False,  # a repeated text costs a compressor nothing
        )
        for name, tree in trees.items()
        if tree.body
    }


def strip(tree: ast.Module) -> ast.Module:
    """Take out docstrings, blocks for type checkers, descriptions of settings, and annotations that nothing reads.

    Those of classes stay: pydantic and dataclasses read them. So do those of modules that register operators with
    torch, which infers a schema from them.
    """
    return ast.fix_missing_locations(_Strip("custom_op" in _identifiers(tree)).visit(tree))


class _Strip(ast.NodeTransformer):
    def __init__(self, keep_annotations: bool) -> None:
        self.keep, self.in_class = keep_annotations, False

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        before, self.in_class = self.in_class, True
        self.generic_visit(node)
        self.in_class = before
        node.body = _without_docstring(node.body) or [ast.Pass()]
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        before, self.in_class = self.in_class, False
        self.generic_visit(node)
        self.in_class = before
        if not self.keep:
            node.returns = None
        node.body = _without_docstring(node.body) or [ast.Pass()]
        return node

    def visit_arg(self, node: ast.arg) -> ast.AST:
        if not self.keep:
            node.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
        self.generic_visit(node)
        if self.in_class:
            return node
        if node.value is None:
            return ast.Pass()
        return ast.copy_location(ast.Assign([node.target], node.value), node)

    def visit_If(self, node: ast.If) -> ast.AST | None:
        self.generic_visit(node)
        checking = isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        return None if checking or _is_main(node) else node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.func, ast.Name) and node.func.id == "Field":
            node.keywords = [keyword for keyword in node.keywords if keyword.arg != "description"]
        return node


def _is_main(node: ast.If) -> bool:
    return ast.unparse(node.test) == "__name__ == '__main__'"


def _without_docstring(body: list[ast.stmt]) -> list[ast.stmt]:
    return [node for node in body if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))]


def shake(trees: dict[str, ast.Module], roots: Collection[str]) -> None:
    """Drop top-level statements of all modules, and methods, whose names no kept line mentions; ``roots`` are kept.

    Kept without a mention: statements that define nothing, functions called ``_`` (they are registered where they
    stand), methods of classes with bases (a framework calls them), and methods with two underscores on each side.
    """
    used = set(roots)
    for tree in trees.values():
        tree.body = _without_docstring(tree.body)
    waiting: list[ast.AST] = []
    for tree in trees.values():
        for node in tree.body:
            waiting += _parts(node)
    kept: set[ast.AST] = set()
    while found := [node for node in waiting if node not in kept and _wanted(node, used)]:
        for node in found:
            kept.add(node)
            used |= _identifiers(_shallow(node))
    for tree in trees.values():
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.bases:
                node.body = [part for part in node.body if not isinstance(part, Definition) or part in kept]
                node.body = node.body or [ast.Pass()]
        tree.body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom) or node in kept]
    _drop_imports(trees)


def _parts(node: ast.stmt) -> Iterator[ast.AST]:
    """Yield what is kept or dropped as one: a statement, and each method of a class without bases."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        return
    yield node
    if isinstance(node, ast.ClassDef) and not node.bases:
        yield from (part for part in node.body if isinstance(part, Definition))


def _shallow(node: ast.AST) -> ast.AST:
    """Return a class without bases as it is without its methods, which are asked for one by one; else the node."""
    if isinstance(node, ast.ClassDef) and not node.bases:
        rest = [part for part in node.body if not isinstance(part, Definition)]
        return ast.Module([*rest, *map(ast.Expr, node.decorator_list)], [])
    return node


def _wanted(node: ast.AST, used: set[str]) -> bool:
    if isinstance(node, Definition):
        dunder = node.name.startswith("__") and node.name.endswith("__")
        return node.name in used or node.name == "_" or dunder
    if isinstance(node, ast.Assign) and all(isinstance(target, ast.Name | ast.Tuple) for target in node.targets):
        names = {part.id for target in node.targets for part in ast.walk(target) if isinstance(part, ast.Name)}
        return bool(names & used)
    return True


def _drop_imports(trees: dict[str, ast.Module]) -> None:
    """Drop imports of names that their module does not mention, and modules that then nobody imports."""
    for tree in trees.values():
        body = [node for node in tree.body if not isinstance(node, ast.Import | ast.ImportFrom)]
        used = set().union(*map(_identifiers, body))
        for node in ast.walk(tree):
            if node in tree.body and isinstance(node, ast.Import | ast.ImportFrom):
                node.names = [
                    alias for alias in node.names
                    if (alias.asname or alias.name.partition(".")[0]) in used
                    or (isinstance(node, ast.ImportFrom) and node.module == "__future__")
                ]  # fmt: skip
        tree.body = [node for node in tree.body if getattr(node, "names", True)]
        if all(isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in tree.body):
            tree.body = []


def _identifiers(tree: ast.AST) -> set[str]:
    """Return every name that a piece of code mentions, in whatever way; of a dotted text its last part."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.alias):
            found |= {node.name.rpartition(".")[2], node.asname or node.name}
        elif isinstance(node, Definition):
            found.add(node.name)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value.rpartition(".")[2])
    return found
