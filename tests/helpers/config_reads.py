"""Which fields of a configuration the package reads, found in its syntax trees.

A field counts as read where an attribute, a subscript or `.get` names it on an expression that *is* its section. Which
expressions are sections is followed from the functions that get a configuration (`ENTRIES`) through assignments, calls,
returns and fields of NamedTuples, until nothing new turns up. `jnp.clip` is no read of `optim.clip`.
"""

from __future__ import annotations

import ast
import pathlib
import re
from collections.abc import Collection, Iterable, Mapping

Sections = frozenset[str]
"""Names of sections that an expression may be; "" is the whole configuration."""

NOTHING: Sections = frozenset()
SAME = {"to_dict", "copy", "copy_and_resolve_references", "deepcopy", "dict", "ConfigDict", "FrozenConfigDict"}
"""Calls whose result is the section they are made of."""

EVERY_FIELD = {"mesh"}
"""Sections whose reader goes through all fields by `.items()`: the axes of a mesh are named by the configuration."""


class _Scope:
    """Names of a module, class, function or comprehension, and what sections they are."""

    def __init__(self, module: str, name: str, parent: _Scope | None) -> None:
        self.module, self.name, self.parent = module, name, parent
        self.returned: Sections = NOTHING
        self.names: dict[str, Sections] = {}

    def look_up(self, name: str) -> Sections:
        if name in self.names:
            return self.names[name]
        return self.parent.look_up(name) if self.parent else NOTHING


class ConfigReads:
    """The reads of a configuration in some modules.

    Args:
        sources: dotted name of a module -> its text.
        fields: section -> names of its fields.
        entries: (module, function) -> section that its first parameter is.
        attributes: name of an attribute of any object -> section that it is.
        results: name of a function -> section that it returns.
        by_variable: sections that a variable may name, as `cfg[sensor]`.
    """

    def __init__(
        self,
        sources: Mapping[str, str],
        fields: Mapping[str, Collection[str]],
        entries: Mapping[tuple[str, str], str],
        attributes: Mapping[str, str],
        results: Mapping[str, str],
        by_variable: Collection[str],
    ) -> None:
        self.fields, self._by_variable = fields, by_variable
        self.sections = {".".join(name.split(".")[:end]) for name in fields for end in range(len(name.split(".")) + 1)}
        self.read: set[tuple[str, str]] = set()
        self._words: dict[int, set[str]] = {}
        self._sources = {*attributes, *results}  # names by which a function gets sections that it has no argument of
        self._changed = True
        self._attributes = {name: frozenset({section}) for name, section in attributes.items()}
        self._results = {name: frozenset({section}) for name, section in results.items()}
        self._scopes: dict[int, _Scope] = {}
        self._functions: dict[str, list[tuple[str, ast.FunctionDef]]] = {}
        self._classes: dict[str, list[tuple[str, ast.ClassDef]]] = {}
        self._imports: dict[str, dict[str, str]] = {}
        self._tables: dict[tuple[str, str], list[ast.expr]] = {}
        trees = {module: ast.parse(text) for module, text in sources.items()}
        for module, tree in trees.items():
            self._imports[module] = dict(_imported(tree))
            for node in ast.walk(tree):
                if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict):
                    target = node.targets[0] if isinstance(node, ast.Assign) else node.target
                    self._tables[module, ast.unparse(target)] = node.value.values
                if isinstance(node, ast.FunctionDef):
                    self._functions.setdefault(node.name, []).append((module, node))
                elif isinstance(node, ast.ClassDef):
                    self._classes.setdefault(node.name, []).append((module, node))
        for (module, name), section in entries.items():
            for where, function in self._functions[name]:
                if where == module:
                    self._bind(where, function, _parameters(function)[:1], [frozenset({section})])
        while self._changed:
            self._changed = False
            for module, tree in trees.items():
                self._block(tree.body, self._scope(tree, module, None))

    def unread(self) -> list[str]:
        """Dotted names of the fields that nothing reads; those that stand for every sensor apart."""
        every = [(section, name) for section, names in self.fields.items() for name in names if name != "<sensor>"]
        return sorted(f"{section}.{name}".lstrip(".") for section, name in every if (section, name) not in self.read)

    # What an expression is.

    def _value(self, node: ast.AST, scope: _Scope) -> Sections:
        if isinstance(node, ast.Name):
            return scope.look_up(node.id)
        if isinstance(node, ast.Attribute):
            base = self._value(node.value, scope)
            if base:
                return self._child(base, node.attr) if isinstance(node.ctx, ast.Load) else NOTHING
            return self._attributes.get(node.attr, NOTHING)
        if isinstance(node, ast.Subscript):
            base = self._value(node.value, scope)
            self._value(node.slice, scope)
            return self._named(base, node.slice) if isinstance(node.ctx, ast.Load) else NOTHING
        if isinstance(node, ast.Call):
            return self._call(node, scope)
        if isinstance(node, ast.NamedExpr):
            value = self._value(node.value, scope)
            self._assign(node.target, value, scope)
            return value
        if isinstance(node, ast.Lambda | ast.GeneratorExp | ast.ListComp | ast.SetComp | ast.DictComp):
            return self._inner(node, scope)
        if isinstance(node, ast.Dict):  # {**section, "name": value} has the fields of the section
            values = [self._value(value, scope) for value in node.values]
            return frozenset().union(*(value for key, value in zip(node.keys, values, strict=True) if key is None))
        values = [self._value(part, scope) for part in ast.iter_child_nodes(node)]
        union = isinstance(node, ast.IfExp | ast.BoolOp | ast.Tuple | ast.List | ast.Starred)
        return frozenset().union(*values) if union else NOTHING

    def _inner(self, node: ast.AST, scope: _Scope) -> Sections:
        inner = self._scope(node, scope.module, scope)
        if isinstance(node, ast.Lambda):
            inner.names |= {name: inner.names.get(name, NOTHING) for name in _parameters(node)}
            self._value(node.body, inner)
            return NOTHING
        for loop in node.generators:
            self._assign(loop.target, self._elements(loop.iter, inner), inner)
            for condition in loop.ifs:
                self._value(condition, inner)
        results = [node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]
        return frozenset().union(*(self._value(result, inner) for result in results))

    def _elements(self, node: ast.AST, scope: _Scope) -> Sections:
        """What a loop goes through: the members of a tuple of sections; the fields of a section are no sections."""
        value = self._value(node, scope)
        return value if isinstance(node, ast.Tuple | ast.List | ast.GeneratorExp | ast.ListComp) else NOTHING

    def _child(self, base: Sections, name: str) -> Sections:
        """What base.name is; a field is read."""
        children = set()
        for section in base:
            if name in self.fields.get(section, ()) and (section, name) not in self.read:
                self.read.add((section, name))
            if (full := f"{section}.{name}".lstrip(".")) in self.sections:
                children.add(full)
        return frozenset(children)

    def _named(self, base: Sections, key: ast.AST) -> Sections:
        """What base[key] is: key a text, a formatted text (every field that fits is read), or a name of a section."""
        if isinstance(key, ast.Constant):
            return self._child(base, key.value) if isinstance(key.value, str) else NOTHING
        if isinstance(key, ast.JoinedStr):
            pattern = "".join(re.escape(part.value) if isinstance(part, ast.Constant) else ".+" for part in key.values)
            names = {name for section in base for name in self.fields.get(section, ()) if re.fullmatch(pattern, name)}
            return frozenset().union(*(self._child(base, name) for name in names))
        return frozenset(name for name in self._by_variable if name.rpartition(".")[0] in base)

    def _call(self, node: ast.Call, scope: _Scope) -> Sections:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        base = NOTHING
        if isinstance(node.func, ast.Attribute):
            base = self._value(node.func.value, scope)
        elif not isinstance(node.func, ast.Name):
            self._value(node.func, scope)
        values = [self._value(argument, scope) for argument in node.args]
        named = {word.arg: self._value(word.value, scope) for word in node.keywords if word.arg}
        spread = [self._value(word.value, scope) for word in node.keywords if word.arg is None]
        if base and name == "get" and node.args:
            return self._named(base, node.args[0])
        if base and name in ("items", "values"):
            for section in base & EVERY_FIELD:
                for field in self.fields[section]:
                    self._child(frozenset({section}), field)
            return NOTHING
        if name in SAME:
            return base.union(*values)
        called: ast.AST = node.func
        if name == "partial" and node.args:
            called, values = node.args[0], values[1:]
        return self._bind_call(called, values, named, spread, scope) | self._results.get(name, NOTHING)

    def _bind_call(
        self,
        called: ast.AST,
        values: list[Sections],
        named: Mapping[str, Sections],
        spread: list[Sections],
        scope: _Scope,
    ) -> Sections:
        """Gives the arguments of a call to the functions and classes that it may mean; what they return."""
        result = NOTHING
        for module, target in self._targets(called, scope.module):
            names = _parameters(target)
            if names[:1] == ["self"]:
                names = names[1:]
            pairs = [*zip(names, values, strict=False), *((name, named[name]) for name in names if name in named)]
            for sections in spread:
                for parameter in names:
                    self._child(sections, parameter)
            if isinstance(target, ast.ClassDef):
                for field, sections in pairs:
                    if sections - self._attributes.get(field, NOTHING):
                        self._attributes[field] = self._attributes.get(field, NOTHING) | sections
                        self._sources.add(field)
                        self._changed = True
            else:
                self._bind(module, target, [name for name, _ in pairs], [sections for _, sections in pairs])
                result |= self._scope(target, module, None).returned
        return result

    def _targets(self, called: ast.AST, module: str) -> list[tuple[str, ast.FunctionDef | ast.ClassDef]]:
        """Functions and classes of the package that an expression may mean; a method's are all of that name."""
        if isinstance(called, ast.Subscript) and isinstance(called.value, ast.Name):  # a table of functions
            table = self._tables.get((module, called.value.id), [])
            return [target for function in table for target in self._targets(function, module)]
        imports, inside = self._imports[module], None
        if isinstance(called, ast.Name):
            inside, _, name = imports.get(called.id, f"{module}.{called.id}").rpartition(".")
        elif isinstance(called, ast.Attribute):
            name = called.attr
            if isinstance(called.value, ast.Name):
                inside = imports.get(called.value.id)
        else:
            return []
        every = [*self._functions.get(name, []), *self._classes.get(name, [])]
        return [(where, node) for where, node in every if inside is None or where == inside]

    # What names are.

    def _scope(self, node: ast.AST, module: str, parent: _Scope | None) -> _Scope:
        if id(node) not in self._scopes:
            self._scopes[id(node)] = _Scope(module, getattr(node, "name", ""), parent)
        return self._scopes[id(node)]

    def _bind(self, module: str, function: ast.FunctionDef, names: Iterable[str], values: Iterable[Sections]) -> None:
        scope = self._scope(function, module, None)
        for name, sections in zip(names, values, strict=True):
            self._add(scope, name, sections)

    def _add(self, scope: _Scope, name: str, sections: Sections) -> None:
        before = scope.names.get(name, NOTHING)
        scope.names[name] = before | sections
        self._changed |= scope.names[name] != before

    def _assign(self, target: ast.AST, sections: Sections, scope: _Scope) -> None:
        for node in ast.walk(target):
            if isinstance(node, ast.Name):
                self._add(scope, node.id, sections)

    # Statements.

    def _may_see_sections(self, function: ast.FunctionDef, scope: _Scope) -> bool:
        """Whether a function's body can have a section by now; most never do, and walking them takes the time."""
        if id(function) not in self._words:
            nodes = list(ast.walk(function))
            words = {node.id for node in nodes if isinstance(node, ast.Name)}
            self._words[id(function)] = words | {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        if not self._words[id(function)].isdisjoint(self._sources):
            return True
        chain: _Scope | None = scope
        while chain and not any(chain.names.values()):
            chain = chain.parent
        return chain is not None

    def _block(self, body: Iterable[ast.stmt], scope: _Scope) -> None:
        for statement in body:
            self._statement(statement, scope)

    def _statement(self, node: ast.stmt | ast.ExceptHandler | ast.match_case, scope: _Scope) -> None:
        if isinstance(node, ast.FunctionDef):
            inner = self._scope(node, scope.module, scope)
            inner.parent = scope
            inner.names |= {name: inner.names.get(name, NOTHING) for name in _parameters(node)}
            if self._may_see_sections(node, inner):
                self._block(node.body, inner)
        elif isinstance(node, ast.ClassDef):
            self._block(node.body, self._scope(node, scope.module, scope))
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                self._assign_value(target, node.value, scope)
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            self._assign_value(node.target, node.value, scope)
        elif isinstance(node, ast.For):
            self._assign(node.target, self._elements(node.iter, scope), scope)
            self._block([*node.body, *node.orelse], scope)
        elif isinstance(node, ast.Return):
            before = scope.returned
            scope.returned |= self._value(node.value, scope) if node.value else NOTHING
            if scope.returned != before:
                self._changed = True
                self._sources.add(scope.name)
        else:
            for part in ast.iter_child_nodes(node):
                if isinstance(part, ast.stmt | ast.ExceptHandler | ast.match_case):
                    self._statement(part, scope)
                else:
                    self._value(part, scope)

    def _assign_value(self, target: ast.AST, value: ast.AST, scope: _Scope) -> None:
        both = isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)
        if both and len(target.elts) == len(value.elts):
            for inner, part in zip(target.elts, value.elts, strict=True):
                self._assign_value(inner, part, scope)
            return
        sections = self._value(value, scope)
        if isinstance(target, ast.Name | ast.Tuple):
            self._assign(target, sections, scope)


def _parameters(node: ast.FunctionDef | ast.Lambda | ast.ClassDef) -> list[str]:
    """Names of the parameters of a function, or of the fields of a class, in order."""
    if isinstance(node, ast.ClassDef):
        return [part.target.id for part in node.body if isinstance(part, ast.AnnAssign)]
    arguments = node.args
    return [argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]


def _imported(tree: ast.Module) -> Iterable[tuple[str, str]]:
    """(name in a module, dotted name of what it means) of every import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield from ((alias.asname or alias.name, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.asname or alias.name, alias.name) for alias in node.names)


def package_sources(package: pathlib.Path) -> dict[str, str]:
    """The text of every module of a package by its dotted name."""
    files = sorted(package.rglob("*.py"))
    names = {file: ".".join((package.name, *file.relative_to(package).with_suffix("").parts)) for file in files}
    return {name.removesuffix(".__init__"): file.read_text() for file, name in names.items()}
