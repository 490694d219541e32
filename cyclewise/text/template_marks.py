"""A parsed chat template, made safe to run: `text/chat.py` passes every template through here.

Literals get their special tokens marked (see `chat.py`), and loops, list literals, slices and `~`
are led through the sandbox's checks, for which jinja2 has no hook.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from jinja2 import nodes
from jinja2.visitor import NodeTransformer


class Marks(Protocol):
    """What `chat.py` knows of special tokens."""

    tokens: list[str]

    def mark(self, literal: str) -> str: ...


# Methods and filters that look for their arguments in a text: there, a literal stays a literal.
_SEARCHES_TEXT = (
    "split rsplit partition rpartition startswith endswith find rfind index rindex count replace "
    "strip lstrip rstrip removeprefix removesuffix trim select selectattr reject rejectattr map "
    "groupby sort attr"
)
_SEARCHES = frozenset(_SEARCHES_TEXT.split())


def mark_literals(
    template: nodes.Template, marks: Marks, roles: Iterable[str], tick: Callable[[], None]
) -> nodes.Template:
    """`template`, changed in place: literals marked, loops and lists guarded.

    `roles` are the words that may make a special token together with the literals around them;
    `tick` raises once the time is up.
    """
    _Marker(marks, tuple(roles), tick).visit(template)
    assert template.environment is not None
    template.set_environment(template.environment)  # for the nodes that are new
    return template


class _Marker(NodeTransformer):
    def __init__(self, marks: Marks, roles: tuple[str, ...], tick: Callable[[], None]) -> None:
        self._marks = marks
        self._tick = tick
        around = (token.partition(role) for token in marks.tokens for role in roles)
        # What stands before and after a role in a special token: the longest token's first.
        self._around = list(dict.fromkeys((o, c) for o, role, c in around if role and o and c))

    # Literals.

    def visit_Const(self, node: nodes.Const) -> nodes.Node:
        if isinstance(node.value, str):
            node.value = self._marks.mark(node.value)
        return node

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
        node.data = self._marks.mark(node.data)
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        node.expr = self._searched(node.expr)
        for operand in node.ops:
            operand.expr = self._searched(operand.expr)
        return node

    def visit_Test(self, node: nodes.Test) -> nodes.Node:
        return self._visit_call(node, searches=True)

    def visit_Filter(self, node: nodes.Filter) -> nodes.Node:
        return self._visit_call(node, searches=node.name in _SEARCHES)

    def visit_Call(self, node: nodes.Call) -> nodes.Node:
        callee = node.node
        searches = isinstance(callee, nodes.Getattr) and callee.attr in _SEARCHES
        return self._visit_call(node, searches=searches)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        node.node = self.visit(node.node)
        if isinstance(node.arg, nodes.Slice):
            node.arg = self.visit(node.arg)
            return _call("copied", [node], node)
        node.arg = self._searched(node.arg)
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        node.key = self._searched(node.key)
        node.value = self.visit(node.value)
        return node

    def _visit_call(
        self, node: nodes.Call | nodes.Filter | nodes.Test, *, searches: bool
    ) -> nodes.Node:
        if node.node is not None:
            node.node = self.visit(node.node)
        node.args = [self._searched(a) if searches else self.visit(a) for a in node.args]
        for pair in node.kwargs:
            pair.value = self._searched(pair.value) if searches else self.visit(pair.value)
        for name in ("dyn_args", "dyn_kwargs"):
            if getattr(node, name) is not None:
                setattr(node, name, self.visit(getattr(node, name)))
        return node

    def _searched(self, node: nodes.Expr) -> nodes.Expr:
        """A node whose value is only looked for: literals stay as they are."""
        if isinstance(node, nodes.Const):
            return node
        if isinstance(node, (nodes.List, nodes.Tuple)):
            node.items = [self._searched(item) for item in node.items]
            return node
        visited: nodes.Expr = self.visit(node)
        return visited

    # A role between two literals that make a special token of it.

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        node.nodes = self._fused(node.nodes)
        self.generic_visit(node)
        return node

    def visit_Add(self, node: nodes.Add) -> nodes.Node:
        terms = [node.right]
        left: nodes.Expr = node.left
        while isinstance(left, nodes.Add):
            terms.append(left.right)
            left = left.left
        terms = self._fused([left, *reversed(terms)])
        total = self.visit(terms[0])
        for term in terms[1:]:
            total = nodes.Add(total, self.visit(term), lineno=node.lineno)
        added: nodes.Node = total
        return added

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        terms = [self.visit(term) for term in self._fused(node.nodes)]
        return _call("concatenated", terms, node)

    def _fused(self, terms: list[nodes.Expr]) -> list[nodes.Expr]:
        """`terms` of a sum, with `'<|', role, '|>'` made one call that knows the tokens."""
        fused = list(terms)
        for index in range(1, len(fused) - 1):
            before, role, after = fused[index - 1 : index + 2]
            left, right = _literal(before), _literal(after)
            if left is None or right is None or not _is_role(role):
                continue
            borders = self._borders(left, right)
            if borders is None:
                continue
            opening, closing = borders
            _shorten(before, left[: len(left) - len(opening)])
            _shorten(after, right[len(closing) :])
            around = [nodes.Const(text, lineno=role.lineno) for text in borders]
            fused[index] = _call("special_role", [around[0], role, around[1]], role)
        return fused

    def _borders(self, left: str, right: str) -> tuple[str, str] | None:
        """The ends of `left` and `right` that make a special token of a role between them."""
        self._tick()
        for opening, closing in self._around:
            if left.endswith(opening) and right.startswith(closing):
                return opening, closing
        return None

    # Loops and lists.

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _call("guarded_loop", [node.iter], node)
        return node

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return _call("bounded", [node], node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return _call("bounded", [node], node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _call("bounded", [node], node) if node.ctx == "load" else node


def _call(name: str, args: Sequence[nodes.Node], at: nodes.Node) -> nodes.Call:
    """A call of the sandbox's method `name`."""
    method = nodes.EnvironmentAttribute(name, lineno=at.lineno)
    return nodes.Call(method, list(args), [], None, None, lineno=at.lineno)


def _literal(node: nodes.Expr) -> str | None:
    if isinstance(node, nodes.TemplateData):
        return node.data
    if isinstance(node, nodes.Const) and isinstance(node.value, str):
        return node.value
    return None


def _shorten(node: nodes.Expr, text: str) -> None:
    if isinstance(node, nodes.TemplateData):
        node.data = text
    elif isinstance(node, nodes.Const):
        node.value = text


def _is_role(node: nodes.Expr) -> bool:
    if isinstance(node, nodes.Getattr):
        return node.attr == "role"
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Const) and node.arg.value == "role"
    return isinstance(node, nodes.Name) and node.name == "role"
