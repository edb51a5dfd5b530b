"""Names for the leaves of a tree, and strict rules over the names.

The name of a leaf is its path joined with "/": ``encoder/s2/blocks/attn/kernel``. A rule is ``(pattern, value)``; the
pattern must match the *whole* name (``re.fullmatch``). Strict means: every leaf is matched by exactly one rule and
every rule matches something, so that a renamed parameter or a forgotten rule is an error with the name in it, never a
silent default.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np


class Shaped(Protocol):
    """An array, or what stands for one: anything with a shape and a dtype."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Lengths of the axes."""
        ...

    @property
    def dtype(self) -> np.dtype:
        """Type of the numbers."""
        ...


Tree = Any
"""A nested dict (or NamedTuple) of arrays, shapes or shardings: jax's pytree, for which the type system has no type."""

Rules = Sequence[tuple[str, Any]]
"""Strict rules: (pattern over the whole name, value)."""


def _part(key: Any) -> str:
    """One step of a path as text: the dictionary key, the field of a NamedTuple, or the index in a sequence."""
    for field in ("key", "name", "idx"):
        if hasattr(key, field):
            return str(getattr(key, field))
    raise ValueError(f"a tree node of kind {type(key).__name__} has no name")


def path_name(path: jax.tree_util.KeyPath) -> str:
    """The "/" name of a jax key path."""
    return "/".join(_part(key) for key in path)


def flatten(tree: Tree) -> dict[str, Any]:
    """Leaves of a tree by name, in jax's leaf order.

    Raises:
        ValueError: two leaves share a name (a key of the tree contains "/").
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = {path_name(path): leaf for path, leaf in leaves}
    if len(named) != len(leaves):
        raise ValueError("two leaves of the tree have the same name; a key of the tree contains '/'")
    return named


def nest(named: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dictionaries from "/" names: the inverse of :func:`flatten` for trees made of dictionaries."""
    tree: dict[str, Any] = {}
    for name, leaf in named.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def map_named(function: Callable[..., Any], tree: Tree, *others: Tree) -> Tree:
    """`jax.tree.map` whose function gets the leaf's name first.

    Args:
        function: called as function(name, leaf, *leaves of the other trees).
        tree: the tree whose names count.
        *others: trees of the same structure.

    Returns:
        A tree like `tree` of the function's results.
    """
    return jax.tree_util.tree_map_with_path(lambda path, *leaves: function(path_name(path), *leaves), tree, *others)


def match(names: Sequence[str], rules: Rules, what: str, unused_ok: bool = False) -> dict[str, Any]:
    """The value of the single rule that matches each name.

    Args:
        names: of the leaves.
        rules: (pattern, value); a pattern must match the whole name.
        what: what the rules decide, for the errors ("sharding", "weight decay").
        unused_ok: whether a rule may match nothing; rules written once for several models leave some without a leaf.

    Returns:
        Name of a leaf -> the value of its rule.

    Raises:
        ValueError: names the leaves without a rule, the leaves with two rules, and the rules without a leaf.
    """
    compiled = [(re.compile(pattern), value) for pattern, value in rules]
    used = [0] * len(compiled)
    values: dict[str, Any] = {}
    unmatched, ambiguous = [], []
    for name in names:
        hits = [i for i, (pattern, _) in enumerate(compiled) if pattern.fullmatch(name)]
        for i in hits:
            used[i] += 1
        if not hits:
            unmatched.append(name)
        elif len(hits) > 1:
            ambiguous.append(f"{name} ({', '.join(repr(rules[i][0]) for i in hits)})")
        else:
            values[name] = compiled[hits[0]][1]
    problems = []
    if unmatched:
        problems.append(f"no rule matches: {', '.join(unmatched)}")
    if ambiguous:
        problems.append(f"more than one rule matches: {'; '.join(ambiguous)}")
    if not unused_ok and not all(used):
        idle = [repr(pattern) for (pattern, _), n in zip(rules, used, strict=True) if not n]
        problems.append(f"rules that match nothing: {', '.join(idle)}")
    if problems:
        raise ValueError(f"{what} rules: " + " | ".join(problems))
    return values


def match_tree(tree: Tree, rules: Rules, what: str, unused_ok: bool = False) -> Tree:
    """Strict rules applied to every leaf of a tree.

    Args:
        tree: the tree whose leaves are named.
        rules: as in :func:`match`.
        what: as in :func:`match`.
        unused_ok: as in :func:`match`.

    Returns:
        A tree like `tree` whose leaves are the values of the rules that match them.

    Raises:
        ValueError: as :func:`match`.
    """
    values = match(list(flatten(tree)), rules, what, unused_ok)
    return map_named(lambda name, _: values[name], tree)


def size_bytes(leaf: Shaped) -> int:
    """Bytes of one array or shape-and-dtype."""
    size = leaf.dtype.itemsize
    for n in leaf.shape:
        size *= int(n)
    return size
