"""Smaller Python with the same behaviour: what nothing needs is left out, local names become short.

Three passes. :func:`strip` takes out what only readers, type checkers and tables of settings use. :func:`shake` drops
the definitions that nothing kept refers to. python-minifier then shortens names and blank space. What it writes may use
syntax of the Python that runs it, so equal sources give equal text on one minor version of Python only.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator, Mapping

Definition = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
Import = (ast.Import, ast.ImportFrom)


def minify(sources: Mapping[str, str], root: str) -> dict[str, str]:
    """Return the modules of ``sources`` (text by full name) that the function ``root`` needs, made small.

    ``root`` is written ``"package.module.function"``. Modules that turn out to be empty are left out.
    """
    import python_minifier  # needed only where nothing is cached

    trees = {name: strip(ast.parse(text)) for name, text in sources.items()}
    shaken = Shaker(trees, root)
    return {
        name: python_minifier.minify(
            ast.unparse(tree),
            remove_literal_statements=True,
            remove_asserts=True,
            remove_annotations=False,  # strip() knows which ones are read at run time
            rename_globals=True,  # those that begin with an underscore and that no other module uses
            preserve_globals=sorted(
                {found for found in _names(tree) if not found.startswith("_")} | shaken.used_elsewhere(name)
            ),
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
    _Strip("custom_op" in _attributes(tree)).visit(tree)
    tree.body = [part for node in _without_docstring(tree.body) for part in _split(node)]
    return ast.fix_missing_locations(tree)


def _split(node: ast.stmt) -> list[ast.stmt]:
    """Split an import of several names into one for each."""
    if isinstance(node, ast.ImportFrom):
        return [ast.ImportFrom(node.module, [alias], node.level) for alias in node.names]
    return [ast.Import([alias]) for alias in node.names] if isinstance(node, ast.Import) else [node]


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


class Shaker:
    """Drops definitions, imports and methods of some modules (trees by full name) that nothing kept refers to.

    A definition is referred to by its name in its own module, by an import of it, as an attribute in a module that has
    imported its module, or by a text such as ``"package.module.name"``, with or without the first part. A method of a
    class without bases is, by an attribute or a text of its name anywhere. Kept without that, in a module that is
    imported at all: statements that define nothing, functions called ``_`` (they are registered where they stand),
    methods of classes with bases (a framework calls them), and methods with two underscores on each side.
    """

    def __init__(self, trees: dict[str, ast.Module], root: str) -> None:
        self.trees = trees
        self.names: dict[str, set[str]] = defaultdict(set)  # by module: those in its kept lines
        self.imported: dict[str, set[str]] = defaultdict(set)  # by module: what others import from it
        self.holders: dict[str, set[str]] = defaultdict(set)  # by module: those that have imported it as a whole
        self.attributes: dict[str, set[str]] = defaultdict(set)  # by module: those read in its kept lines
        module, _, function = root.rpartition(".")
        self.imported[module].add(function)
        waiting = [(name, *part) for name, tree in trees.items() for node in tree.body for part in _parts(node)]
        kept: set[ast.AST] = set()
        while found := [item for item in waiting if item[1] not in kept and self._wanted(*item)]:
            for name, node, _ in found:
                kept.add(node)
                self._refer(name, node)
        for tree in trees.values():
            tree.body = [node for node in tree.body if node in kept]
            for node in tree.body:
                if isinstance(node, ast.ClassDef) and not node.bases:
                    body = [part for part in node.body if not isinstance(part, Definition) or part in kept]
                    node.body = body or [ast.Pass()]
            if all(isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in tree.body):
                tree.body = []

    def used_elsewhere(self, name: str) -> set[str]:
        """Return what other modules use of the module of this name."""
        return self.imported[name].union(*(self.attributes[holder] for holder in self.holders[name]))

    def _wanted(self, name: str, node: ast.stmt, method: bool) -> bool:
        if method:
            assert isinstance(node, Definition)
            called = set().union(*self.attributes.values()) | self.names[name]
            return node.name in called or (node.name.startswith("__") and node.name.endswith("__"))
        if not (self.imported[name] or self.holders[name]):
            return False
        defined = _defined(node)
        return not defined or not defined.isdisjoint(self.names[name] | self.used_elsewhere(name))

    def _refer(self, name: str, node: ast.stmt) -> None:
        """Note what a kept statement refers to."""
        package = name.partition(".")[0]
        for part in _own_parts(node):
            self.names[name] |= _names(part)
            self.attributes[name] |= _attributes(part)
            for inner in ast.walk(part):
                if isinstance(inner, ast.ImportFrom):
                    for alias in inner.names:
                        self._import(name, str(inner.module), alias.name)
                elif isinstance(inner, ast.Constant) and isinstance(inner.value, str) and "." in inner.value:
                    module, _, last = inner.value.rpartition(".")
                    for full in (module, f"{package}.{module}"):
                        if full in self.trees:
                            self.imported[full].add(last)

    def _import(self, name: str, module: str, what: str) -> None:
        if f"{module}.{what}" in self.trees:
            self.holders[f"{module}.{what}"].add(name)
        elif module in self.trees:
            self.imported[module].add(what)


def _parts(node: ast.stmt) -> Iterator[tuple[ast.stmt, bool]]:
    """Yield what is kept or dropped as one, and whether it is a method: a statement, and methods asked for by name."""
    yield node, False
    if isinstance(node, ast.ClassDef) and not node.bases:
        yield from ((part, True) for part in node.body if isinstance(part, Definition))


def _own_parts(node: ast.stmt) -> list[ast.AST]:
    """Return a class without bases as it is without its methods, which are asked for one by one; else the statement."""
    if isinstance(node, ast.ClassDef) and not node.bases:
        return [*node.decorator_list, *(part for part in node.body if not isinstance(part, Definition))]
    return [node]


def _defined(node: ast.stmt) -> set[str]:
    """Return the names that a statement defines; none where it does something else, and is kept for that."""
    if isinstance(node, Definition):
        return {node.name} - {"_"}
    if isinstance(node, Import) and getattr(node, "module", "") != "__future__":
        return {alias.asname or alias.name.partition(".")[0] for alias in node.names}
    if isinstance(node, ast.Assign) and all(isinstance(target, ast.Name | ast.Tuple) for target in node.targets):
        return set().union(*map(_names, node.targets))
    return set()


def _names(tree: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def _attributes(tree: ast.AST) -> set[str]:
    """Return the attributes that are read or set, and all texts that getattr() might be given."""
    found = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return found | {text for text in texts if text.isidentifier()}
