"""Limit the time and memory that a chat template may take.

A template comes with a model and is an untrusted program. jinja2's sandbox restricts its access to
files and objects, not its time and memory: `10**100000000` is one operation that no signal
interrupts, and three nested ranges run for a month. Therefore each operation that can grow a text,
a list or a number is checked before it runs, each loop iteration and each call is counted, and
other operations (comparisons, slices) are limited in number. The limits are thousands of times what
the templates of published models need; large rows raise them.
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

SECONDS = 2.0  # of processor time, so that a busy machine does not reject a template
TURNS = 2**21  # loop iterations and calls
LONGEST = 2**20  # characters of one text that a template makes; an item of a list counts as 8
MOST_TEXT = 2**24  # characters of all texts and lists together
LONGEST_SOURCE = 200_000  # the longest template that trl ships has 19,572 characters
OPERATIONS, IN_ONE_EXPRESSION = 1000, 64  # that template has 12 sums in one expression
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
# Methods of built-in types that the templates of models use. Those whose result can be larger than
# their input are checked in `_check_growth` and `_check_numbers`.
METHODS: dict[type, frozenset[str]] = {
    **{str: _TEXT, Markup: _TEXT, list: _LIST, tuple: _LIST, LoopContext: _LOOP},
    **dict.fromkeys((int, float, bool, bytes), frozenset()),
    dict: _words("items keys values get copy"),
}
# These return their input, or a part of it.
FREE = _words("default d length count first last items")
FILTERS = FREE | _words(
    "abs attr batch capitalize center dictsort e escape float forceescape groupby indent int join "
    "list lower map max min random reject rejectattr replace reverse round safe select selectattr "
    "slice sort string title tojson trim truncate unique upper urlencode wordcount"
)
BY_ITEM = _words("batch groupby list map reject rejectattr select selectattr slice unique")
_LONG_NUMBER = re.compile(r"\d{5}")


class LimitReached(Exception):
    """A template exceeded a limit; the message is a predicate that follows "it"."""


class _CountedItems:
    """An iterable that counts each item against the budget of the environment."""

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
    """Count characters of all texts in a value, 8 per item, `indent` per level, up to `limit`."""
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
    """Adds a counter to each loop and a size check around each value that an expression makes."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        if node.recursive:
            raise LimitReached("has a recursive loop")
        self.generic_visit(node)
        node.iter = _filtered(node.iter, "watched")
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Output:
        # A sum that is written directly is measured when it is written.
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
        """Visit the operands of a nested sum without measuring its partial sums."""
        rest, operands = [node], 0
        while rest:
            inner = rest.pop()
            for name, child in inner.iter_fields():
                children = child if isinstance(child, list) else [child]
                for i, operand in enumerate(children):
                    operands += 1
                    if isinstance(operand, nodes.Add | nodes.Concat):
                        rest.append(operand)
                    elif isinstance(operand, nodes.Node):
                        children[i] = self.visit(operand)
                if not isinstance(child, list):
                    setattr(inner, name, children[0])
        if operands > 2 * IN_ONE_EXPRESSION:
            raise LimitReached(f"adds more than {IN_ONE_EXPRESSION} parts in one expression")


def _filtered(node: Any, name: str) -> nodes.Filter:
    wrapped = nodes.Filter(node, name, [], [], None, None)
    wrapped.set_lineno(node.lineno)
    return wrapped


def _measured(node: Any) -> Any:
    """Wrap a list, dict or tuple in a size check; other nodes are measured elsewhere."""
    container = isinstance(node, nodes.List | nodes.Dict | nodes.Tuple)
    constant = container and all(isinstance(n, nodes.Const) for n in node.iter_child_nodes())
    return _filtered(node, "measured") if container and not constant else node


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """jinja2's sandbox with a budget of time and memory, reset by `begin` for each rendering."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def __init__(self, like: Any) -> None:
        """Copy extensions, filters and globals from `like`, the environment of transformers."""
        extensions = [type(extension) for extension in like.extensions.values()]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        self.begin({})
        self.filters = {
            name: function if name in FREE else self._guarded(name, function)
            for name, function in like.filters.items()
            if name in FILTERS
        }
        self.filters["watched"] = lambda value: _CountedItems(value, self.spend)
        self.filters["measured"] = self.measured
        self.concat = self.joined  # type: ignore[method-assign]
        self.globals = {k: v for k, v in like.globals.items() if k != "lipsum"}
        self.globals["range"] = _short_range
        # The repr of a namespace omits its values: two that contain each other would not end.
        shown = {"__repr__": lambda _: "<namespace>"}
        self.globals["namespace"] = type("namespace", (like.globals["namespace"],), shown)

    def begin(self, values: Mapping[str, Any]) -> None:
        """Reset the budget for a rendering with these values."""
        self._values = values
        self._turns, self._left, self._longest = TURNS, MOST_TEXT, LONGEST
        self._widened = False
        self._ends = time.thread_time() + SECONDS

    def spend(self) -> None:
        """Count one loop iteration or one call.

        Raises:
            LimitReached: the budget of iterations or of processor time is spent.
        """
        self._turns -= 1
        if self._turns < 0:
            raise LimitReached(f"took more than {TURNS:,} turns of loops and calls")
        if time.thread_time() > self._ends:
            raise LimitReached(f"ran for more than {SECONDS:g} seconds")

    def measured(self, value: Any) -> Any:
        """Return `value` after taking its size from the budget."""
        size = len(value) if type(value) is str else size_of(value, self._longest)
        self.take(size)
        return value

    def take(self, size: int) -> None:
        """Take a text or list of `size` characters from the budget.

        Raises:
            LimitReached: it is too long, or the budget is spent.
        """
        if (size > self._longest or size > self._left) and not self._widen(size):
            noun = "a text or list" if size > self._longest else "texts and lists"
            limit = self._longest if size > self._longest else MOST_TEXT
            raise LimitReached(f"made {noun} of more than {limit:,} characters")
        self._left -= size

    def _widen(self, size: int) -> bool:
        """Raise the limits for a large row, whose size is computed only when they are exceeded."""
        if not self._widened:
            self._widened = True
            row_size = size_of(list(self._values.values()), 2**32)
            self._longest = max(LONGEST, 4 * row_size)
            self._left += max(0, 64 * row_size - MOST_TEXT)
        return size <= self._longest and size <= self._left

    def joined(self, pieces: Iterable[str]) -> str:
        """Join the pieces to one text, which is measured before it is made."""
        listed = pieces if isinstance(pieces, list) else list(pieces)
        self.take(sum(map(len, listed)))
        return "".join(listed)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        if len(source) > LONGEST_SOURCE:
            raise LimitReached(f"is longer than {LONGEST_SOURCE:,} characters")
        tree = super()._parse(source, name, filename)
        limited = (nodes.Compare, nodes.Slice, nodes.Add, nodes.Concat, nodes.Test)
        if sum(1 for _ in tree.find_all(limited)) > OPERATIONS:
            raise LimitReached(f"has more than {OPERATIONS:,} comparisons, sums and slices")
        _Watch().visit(tree)
        return tree

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Allow only the attributes of built-in types that are listed in METHODS."""
        allowed = METHODS.get(type(obj))
        return super().is_safe_attribute(obj, attr, value) if allowed is None else attr in allowed

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Refuse str.format, which takes widths of any size, also from the format string."""
        if getattr(value, "__name__", "") in ("format", "format_map") and isinstance(
            getattr(value, "__self__", None), str
        ):
            raise SecurityError("it calls str.format, which is not run in a chat template")
        return None

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a function, a macro or a method within the limits."""
        __self.spend()
        __self._check_numbers(args, kwargs)
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            __self._check_growth(getattr(__obj, "__name__", ""), owner, args)
        result = super().call(__context, __obj, *args, **kwargs)
        return __self._checked(result)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute products, powers and remainders (or % formats) whose size is within limits."""
        if operator == "%" and isinstance(left, str):
            inserted = left.count("%") * (10 * size_of(right, self._longest) + LARGEST_NUMBER)
            if "*" in left or _LONG_NUMBER.search(left):
                raise LimitReached("asks for a number of more than four digits in a format")
            self.take(len(left) + inserted if inserted > self._longest else 0)
        elif isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length(), right.bit_length()
            grown = bits[0] * abs(right) if operator == "**" else sum(bits)
            if grown > BITS:
                raise LimitReached(f"computes a number of more than {BITS:,} bits")
        elif operator == "*" and isinstance(left, int) != isinstance(right, int):
            times, repeated = (left, right) if isinstance(left, int) else (right, left)
            if not isinstance(repeated, float):
                self.take(max(0, times) * max(1, size_of(repeated, self._longest)))
        return super().call_binop(context, operator, left, right)

    def _guarded(self, name: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        at = 1 if hasattr(inner, "jinja_pass_arg") else 0  # the value comes after the context

        @functools.wraps(inner)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            self.spend()
            if name in BY_ITEM:
                args = (*args[:at], _CountedItems(args[at], self.spend), *args[at + 1 :])
            self._check_numbers(args[at + 1 :], kwargs)
            if name == "join":
                args = (*args[:at], list(_CountedItems(args[at], self.spend)), *args[at + 1 :])
                if len(args) > at + 2 or "attribute" in kwargs:
                    raise LimitReached("calls join with an attribute")
                glue = args[at + 1] if len(args) > at + 1 else kwargs.get("d", "")
                self._check_growth(name, str(glue), (args[at],))
            elif name == "replace":
                self._check_growth(name, str(args[at]), args[at + 1 :])
            elif name in ("tojson", "indent"):
                self._check_indent(name, args[at:], kwargs)
            return self._checked(inner(*args, **kwargs))

        return guarded

    def _checked(self, value: Any) -> Any:
        """Return a result after taking its size from the budget."""
        value_type = type(value)
        if value_type is str or value_type is Markup:
            self.take(len(value))
        elif value_type in (list, dict, tuple):
            self.take(size_of(value, self._longest))
        elif value_type is int and value.bit_length() > BITS:
            raise LimitReached(f"computes a number of more than {BITS:,} bits")
        return value

    def _check_numbers(self, args: Iterable[Any], kwargs: Mapping[str, Any]) -> None:
        for value in (*args, *kwargs.values()) if kwargs else args:
            if type(value) is int and not -LARGEST_NUMBER <= value <= LARGEST_NUMBER:
                raise LimitReached(f"gives {_short(value)} to a function")

    def _check_growth(self, name: str, text: str, args: tuple[Any, ...]) -> None:
        """Check single operations whose result may be larger than their arguments."""
        if name == "replace" and len(args) > 1:
            old, new = str(args[0]), str(args[1])
            self.take(text.count(old) * max(0, len(new) - len(old)))
        elif name == "join" and args:
            joined = args[0] if isinstance(args[0], list | tuple) else list(args[0])
            self.take(len(text) * len(joined) + size_of(joined, self._longest))

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
    numbers = range(*args)
    if len(numbers) > LARGEST_RANGE:
        raise LimitReached(f"counts to more than {LARGEST_RANGE:,}")
    return numbers


def _short(value: Any) -> str:
    if isinstance(value, int) and value.bit_length() > 64:
        return f"a number of {value.bit_length():,} bits"
    return repr(value)[:40]
