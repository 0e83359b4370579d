"""Transformers' environment of chat templates enters; one that ends at its limits leaves.

A template comes with a model, and is a program of somebody else. jinja2's sandbox keeps it from
files and objects, not from time and memory: `10**100000000` is one operation that no signal
interrupts, three nested ranges run for a month. So each place where a text, a list or a number can
grow asks here first, each turn of a loop and each call is counted, and what has no such place (a
comparison, a slice) is limited in number. The limits are thousands of times what the templates of
published models need; a row that is itself large widens them.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer
from markupsafe import Markup

SECONDS = 2.0  # of processor time: a busy machine makes no template an attack
TURNS = 2**21  # of loops, and calls
LONGEST = 2**20  # characters of one text that a template makes; an item of a list counts as 8
ROOM = 2**24  # characters of all of them
LONGEST_SOURCE = 200_000  # the longest template that trl ships has 19,572 characters
OPERATIONS, IN_ONE_EXPRESSION = 1000, 64  # it has 12 sums in one expression
LARGEST_NUMBER, LARGEST_RANGE = 10_000, 10_000
BITS = 4096
INDENT = 16


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_TEXT = _words(
    "strip lstrip rstrip split rsplit splitlines startswith endswith lower upper title capitalize "
    "casefold swapcase find rfind index rindex count replace join partition rpartition "
    "removeprefix removesuffix isdigit isdecimal isnumeric isalpha isalnum isspace isupper islower "
    "istitle isascii ljust rjust center zfill"
)
_LIST = _words("index count copy")
_LOOP = _words(
    "first last index index0 revindex revindex0 length depth depth0 previtem nextitem cycle changed"
)
# What the templates of models use of built-in types; none of it can outgrow what it is given
# without being asked below.
METHODS: dict[type, frozenset[str]] = {
    **{str: _TEXT, Markup: _TEXT, list: _LIST, tuple: _LIST, LoopContext: _LOOP},
    **dict.fromkeys((int, float, bool, bytes), frozenset()),
    dict: _words("items keys values get copy"),
}
# These give what they were given, or a part of it.
FREE = _words("default d length count first last items")
FILTERS = FREE | _words(
    "abs attr batch capitalize center dictsort e escape float forceescape groupby indent int join "
    "list lower map max min random reject rejectattr replace reverse round safe select selectattr "
    "slice sort string title tojson trim truncate unique upper urlencode wordcount"
)
BY_ITEM = _words("batch groupby list map reject rejectattr select selectattr slice unique")
_LONG_NUMBER = re.compile(r"\d{5}")


class LimitReached(Exception):
    """What the template did, in words that follow "it"."""


class _Turns:
    """What a loop goes over; each item is counted."""

    __slots__ = ("_items", "_spend")

    def __init__(self, items: Any, spend: Callable[[], None]) -> None:
        self._items, self._spend = items, spend

    def __len__(self) -> int:
        return len(self._items)

    def __bool__(self) -> bool:
        return bool(self._items)

    def __iter__(self) -> Iterator[Any]:
        spend = self._spend
        for item in self._items:
            spend()
            yield item


def size_of(value: Any, limit: int, indent: int = 0) -> int:
    """Characters of all texts inside, 8 an item, `indent` a level; counting ends past `limit`."""
    total, rest = 0, [(value, 1)]
    while rest and total <= limit:
        item, depth = rest.pop()
        if isinstance(item, str):
            total += len(item)
        elif isinstance(item, list | tuple | Mapping):
            total += len(item) * (8 + indent * depth)
            if total > limit:
                break
            rest += [(inner, depth + 1) for inner in item]
            if isinstance(item, Mapping):
                rest += [(inner, depth + 1) for inner in item.values()]
        else:
            total += 8
    return total


class _Watch(NodeTransformer):
    """Puts a count into each loop and a measure around each value that an expression makes."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        if node.recursive:
            raise LimitReached("has a recursive loop")
        self.generic_visit(node)
        node.iter = _filtered(node.iter, "watched")
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Output:
        # What is written at once is measured as it is written.
        for i, child in enumerate(node.nodes):
            if isinstance(child, nodes.Add | nodes.Concat):
                self._sum(child)
            else:
                node.nodes[i] = self.visit(child)
        return node

    def visit_Add(self, node: nodes.Add) -> nodes.Filter:
        self._sum(node)
        return _filtered(node, "measured")

    visit_Concat = visit_Add

    def visit_List(self, node: nodes.List) -> nodes.Expr:
        self.generic_visit(node)
        return _measured(node)

    visit_Dict = visit_List

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:
        self.generic_visit(node)
        return node if node.ctx == "store" else _measured(node)

    def _sum(self, node: nodes.Expr) -> None:
        """The parts of one sum, however they are nested, are not measured one by one."""
        rest, parts = [node], 0
        while rest:
            inner = rest.pop()
            for name, child in inner.iter_fields():
                children = child if isinstance(child, list) else [child]
                for i, part in enumerate(children):
                    parts += 1
                    if isinstance(part, nodes.Add | nodes.Concat):
                        rest.append(part)
                    elif isinstance(part, nodes.Node):
                        children[i] = self.visit(part)
                if not isinstance(child, list):
                    setattr(inner, name, children[0])
        if parts > 2 * IN_ONE_EXPRESSION:
            raise LimitReached(f"adds more than {IN_ONE_EXPRESSION} parts in one expression")


def _filtered(node: Any, name: str) -> nodes.Filter:
    made = nodes.Filter(node, name, [], [], None, None)
    made.set_lineno(node.lineno)
    return made


def _measured(node: Any) -> Any:
    """A list or the like; all other nodes make nothing that is not measured elsewhere."""
    made = isinstance(node, nodes.List | nodes.Dict | nodes.Tuple)
    constant = made and all(isinstance(n, nodes.Const) for n in node.iter_child_nodes())
    return _filtered(node, "measured") if made and not constant else node


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """jinja2's sandbox with a budget, which `begin` renews for each rendering."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def __init__(self, like: Any) -> None:
        """Extensions, filters and names are those of `like`, transformers' environment."""
        kinds = [type(extension) for extension in like.extensions.values()]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=kinds)
        self.begin({})
        self.filters = {
            name: found if name in FREE else self._guarded(name, found)
            for name, found in like.filters.items()
            if name in FILTERS
        }
        self.filters["watched"] = lambda value: _Turns(value, self.spend)
        self.filters["measured"] = self.measured
        self.concat = self.joined  # type: ignore[method-assign]
        self.globals = {k: v for k, v in like.globals.items() if k != "lipsum"}
        self.globals["range"] = _short_range
        # A namespace shows no values: of two that hold each other, the text would be endless.
        shown = {"__repr__": lambda _: "<namespace>"}
        self.globals["namespace"] = type("namespace", (like.globals["namespace"],), shown)

    def begin(self, values: Mapping[str, Any]) -> None:
        """A new rendering with these values."""
        self._values = values
        self._turns, self._room, self._longest = TURNS, ROOM, LONGEST
        self._widened = False
        self._ends = time.thread_time() + SECONDS

    def spend(self) -> None:
        """One turn of a loop, or one call."""
        self._turns -= 1
        if self._turns < 0:
            raise LimitReached(f"took more than {TURNS:,} turns of loops and calls")
        if time.thread_time() > self._ends:
            raise LimitReached(f"ran for more than {SECONDS:g} seconds")

    def measured(self, value: Any) -> Any:
        """`value`, if it is no larger than may be."""
        size = len(value) if type(value) is str else size_of(value, self._longest)
        self.take(size)
        return value

    def take(self, size: int) -> None:
        """Ask for a text or list of `size` characters."""
        if (size > self._longest or size > self._room) and not self._widen(size):
            what = "a text or list" if size > self._longest else "texts and lists"
            limit = self._longest if size > self._longest else ROOM
            raise LimitReached(f"made {what} of more than {limit:,} characters")
        self._room -= size

    def _widen(self, size: int) -> bool:
        """A large row may become a large text: only now is its size asked for."""
        if not self._widened:
            self._widened = True
            given = size_of(list(self._values.values()), 2**32)
            self._longest = max(LONGEST, 4 * given)
            self._room += max(0, 64 * given - ROOM)
        return size <= self._longest and size <= self._room

    def joined(self, pieces: Iterable[str]) -> str:
        """The pieces as one text, measured before it is made."""
        known = pieces if isinstance(pieces, list) else list(pieces)
        self.take(sum(map(len, known)))
        return "".join(known)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        if len(source) > LONGEST_SOURCE:
            raise LimitReached(f"is longer than {LONGEST_SOURCE:,} characters")
        tree = super()._parse(source, name, filename)
        kinds = (nodes.Compare, nodes.Slice, nodes.Add, nodes.Concat, nodes.Test)
        if sum(1 for _ in tree.find_all(kinds)) > OPERATIONS:
            raise LimitReached(f"has more than {OPERATIONS:,} comparisons, sums and slices")
        _Watch().visit(tree)
        return tree

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Of built-in types, what the templates of models use and cannot outgrow anything."""
        known = METHODS.get(type(obj))
        return super().is_safe_attribute(obj, attr, value) if known is None else attr in known

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """str.format takes widths of any size, from within the text too."""
        if getattr(value, "__name__", "") in ("format", "format_map") and isinstance(
            getattr(value, "__self__", None), str
        ):
            raise SecurityError("it calls str.format, which is not run in a chat template")
        return None

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """A call of a function, a macro or a method."""
        __self.spend()
        __self._check_numbers(args, kwargs)
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            __self._check_growth(getattr(__obj, "__name__", ""), owner, args)
        made = super().call(__context, __obj, *args, **kwargs)
        return __self._made(made)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Products, powers and remainders (or texts with % in them) of a bounded size."""
        if operator == "%" and isinstance(left, str):
            parts = left.count("%") * (10 * size_of(right, self._longest) + LARGEST_NUMBER)
            if "*" in left or _LONG_NUMBER.search(left):
                raise LimitReached("asks for a number of more than four digits in a format")
            self.take(len(left) + parts if parts > self._longest else 0)
        elif isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length(), right.bit_length()
            grown = bits[0] * abs(right) if operator == "**" else sum(bits)
            if grown > BITS:
                raise LimitReached(f"computes a number of more than {BITS:,} bits")
        elif operator == "*" and isinstance(left, int) != isinstance(right, int):
            times, many = (left, right) if isinstance(left, int) else (right, left)
            if not isinstance(many, float):
                self.take(max(0, times) * max(1, size_of(many, self._longest)))
        return super().call_binop(context, operator, left, right)

    def _guarded(self, name: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        at = 1 if hasattr(inner, "jinja_pass_arg") else 0  # the value comes after the context

        @functools.wraps(inner)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            self.spend()
            if name in BY_ITEM:
                args = (*args[:at], _Turns(args[at], self.spend), *args[at + 1 :])
            self._check_numbers(args[at + 1 :], kwargs)
            if name == "join":
                args = (*args[:at], list(_Turns(args[at], self.spend)), *args[at + 1 :])
                if len(args) > at + 2 or "attribute" in kwargs:
                    raise LimitReached("calls join with an attribute")
                glue = args[at + 1] if len(args) > at + 1 else kwargs.get("d", "")
                self._check_growth(name, str(glue), (args[at],))
            elif name == "replace":
                self._check_growth(name, str(args[at]), args[at + 1 :])
            elif name in ("tojson", "indent"):
                self._check_indent(name, args[at:], kwargs)
            return self._made(inner(*args, **kwargs))

        return guarded

    def _made(self, value: Any) -> Any:
        kind = type(value)
        if kind is str or kind is Markup:
            self.take(len(value))
        elif kind in (list, dict, tuple):
            self.take(size_of(value, self._longest))
        elif kind is int and value.bit_length() > BITS:
            raise LimitReached(f"computes a number of more than {BITS:,} bits")
        return value

    def _check_numbers(self, args: Iterable[Any], kwargs: Mapping[str, Any]) -> None:
        for value in (*args, *kwargs.values()) if kwargs else args:
            if type(value) is int and not -LARGEST_NUMBER <= value <= LARGEST_NUMBER:
                raise LimitReached(f"gives {_short(value)} to a function")

    def _check_growth(self, name: str, text: str, args: tuple[Any, ...]) -> None:
        """What takes one step and may write more than it was given."""
        if name == "replace" and len(args) > 1:
            old, new = str(args[0]), str(args[1])
            self.take(text.count(old) * max(0, len(new) - len(old)))
        elif name == "join" and args:
            parts = args[0] if isinstance(args[0], list | tuple) else list(args[0])
            self.take(len(text) * len(parts) + size_of(parts, self._longest))

    def _check_indent(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        for value in (*args[1:], *kwargs.values()):
            width = value if isinstance(value, int) else size_of(value, INDENT) - INDENT
            if width > INDENT:
                raise LimitReached(f"calls {name} with {_short(value)}")
        if name == "tojson":
            self.take(size_of(args[0], self._longest, indent=INDENT))
        else:
            self.take(str(args[0]).count("\n") * INDENT)


def _short_range(*args: int) -> range:
    found = range(*args)
    if len(found) > LARGEST_RANGE:
        raise LimitReached(f"counts to more than {LARGEST_RANGE:,}")
    return found


def _short(value: Any) -> str:
    if isinstance(value, int) and value.bit_length() > 64:
        return f"a number of {value.bit_length():,} bits"
    return repr(value)[:40]
