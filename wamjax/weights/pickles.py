"""Reads pickles without running them.

A pickle is a program for a small stack machine, and Python's own machine calls whatever the program
names. This one supports only the opcodes that build plain data. If a program names something in a
module, it is looked up in a table from the caller; everything else is refused by its name. The size
of a file bounds what its program may do, see `Budget`, and what its value may hold: a list of ten
references to a list of ten references, and so on, takes a few bytes but is too large to traverse.
"""

from __future__ import annotations

import pickletools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import IO, Any

from wamjax.weights import bounds

Known = Mapping[str, Callable[..., Any] | None]


class Refused(ValueError):
    """A pickle names something that is neither known nor plain data."""


class Name:
    """Stands for something in a module that a pickle names; never imported."""

    def __init__(self, name: str):
        self.name = name

    def __repr__(self) -> str:
        return self.name[:200]


class _Mark:
    pass


MARK = _Mark()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_SET": set}
_LITERALS = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE",
    "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
}  # fmt: skip
_SIZED = (str, bytes, list, tuple, dict, set)
# The names in pickles of plain data.
PLAIN: Known = {
    "collections.OrderedDict": lambda items=(): _dict(items),
    "builtins.set": lambda items=(): {_key(x) for x in items},
    "builtins.bytes": lambda: b"",  # empty bytes, up to protocol 2
    "_codecs.encode": lambda text, coding: _latin(text, coding),  # bytes, up to protocol 2
}


class Budget:
    """Limits what reading a file may take, over all pickles in it.

    Attributes:
      opcodes: number of opcodes that may still run.
      items, characters: amount that calls may still receive; a short program can call often.
      nbytes: bytes of tensors that a file may still claim; views may show a part more than once.
    """

    def __init__(self, size: int):
        self.size = size
        self.opcodes, self.items = bounds.OPCODES, 2 * bounds.OPCODES
        self.characters, self.nbytes = 4 * size + 2**20, 16 * size + 2**20

    def take(self, what: str, count: int) -> None:
        """Takes from one of the limits; raises ValueError if too little is left."""
        left = getattr(self, what) - count
        setattr(self, what, left)
        if left < 0:
            raise ValueError(f"it needs more {what} than a file of {self.size} bytes may use")


class _File:
    """Provides the file interface of `pickletools`; requests no more bytes than exist."""

    def __init__(self, file: IO[bytes]):
        begin = file.tell()
        self.file, self.end, self.tell = file, file.seek(0, 2), file.tell
        file.seek(begin)
        self.readline = file.readline

    def read(self, count: int) -> bytes:
        if count > 4096 and count > self.end - self.file.tell():
            raise ValueError(f"it is cut off: {count} more bytes were expected")
        return self.file.read(count)


def load(
    file: IO[bytes],
    known: Known,
    persistent: Callable[[Any], Any] | None = None,
    budget: Budget | None = None,
) -> Any:
    """Returns the value of the next pickle in a file.

    Args:
      known: dotted name -> function for a call of it with positional arguments; None for a name
        that may stand for itself but cannot be called. `PLAIN` is always known.
      persistent: maps the id of an object stored elsewhere to the object.
      budget: limits of the file; by default those of its size.

    Returns:
      dict, list, tuple, set, str, bytes, int, float, bool, None, `Name` and the results of `known`.

    Raises:
      Refused: the pickle names something else.
      ValueError: the pickle is broken, or exceeds a limit.
    """
    source = _File(file)
    budget = budget or Budget(source.end)
    machine = _Machine({**PLAIN, **known}, persistent, budget)
    try:
        for opcode, argument, _ in pickletools.genops(source):
            budget.take("opcodes", 1)
            machine.run(opcode.name, argument)
        value = machine.stack.pop()
    except Refused:
        raise
    except Exception as error:  # a broken program can raise anything
        raise ValueError(f"it is not a pickle of plain data: {bounds.line(error)}") from error
    check(value)
    return value


def check(value: Any) -> None:
    """Checks that a value can be traversed, printed and compared: of bounded depth and size as a
    tree.

    Raises:
      ValueError: the value exceeds a limit.
    """
    count, nodes = 0, [(value, 0)]
    while nodes:
        node, depth = nodes.pop()
        if isinstance(node, dict):
            node = node.values()
        elif not isinstance(node, list | tuple):
            continue
        count += 1 + len(node)
        if depth > bounds.DEPTH:
            raise ValueError(f"it is nested deeper than {bounds.DEPTH} levels, or contains itself")
        if count > bounds.OPCODES:
            raise ValueError(f"it has more than {bounds.OPCODES} values, repeated ones counted")
        nodes += [(x, depth + 1) for x in node if isinstance(x, dict | list | tuple)]


def _key(key: Any) -> Any:
    """Checks a key: its hash must be fast, and it must not be made to equal other keys."""
    if type(key) is int and abs(key) >= 2**60:
        raise ValueError("an integer key has more than 60 bits")
    if key is not None and not isinstance(key, str | bytes | int | float | Name):
        raise Refused(f"a {type(key).__name__} as the key of a dict")
    return key


def _dict(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    return {_key(key): value for key, value in pairs}


def _latin(text: str, coding: str) -> bytes:
    if coding != "latin1":
        raise Refused(f"_codecs.encode to {bounds.short(coding)}")
    return text.encode("latin1")


class _Machine:
    """Holds the stack, the memo, and one method for each kind of opcode."""

    def __init__(self, known: Known, persistent, budget: Budget):
        self.known, self.persistent, self.budget = known, persistent, budget
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, name: str, argument: Any) -> None:
        """Runs one opcode."""
        if name in _LITERALS:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            self.stack.append(_EMPTY[name]())
        else:
            method = getattr(self, f"_{name.lower()}", None)
            if method is None:
                raise Refused(f"opcode {name}")
            method(argument)

    def _pop_mark(self, _=None) -> list[Any]:
        items = []
        while (item := self.stack.pop()) is not MARK:
            items.append(item)
        return items[::-1]

    def _proto(self, _):
        pass

    _frame = _stop = _proto

    def _mark(self, _):
        self.stack.append(MARK)

    def _pop(self, _):
        self.stack.pop()

    def _dup(self, _):
        self.stack.append(self.stack[-1])

    def _put(self, index):
        if index >= 2**32:
            raise ValueError("the index of a memo entry has more than 32 bits")
        self.memo[index] = self.stack[-1]

    _binput = _long_binput = _put

    def _memoize(self, _):
        self.memo[len(self.memo)] = self.stack[-1]

    def _get(self, index):
        self.stack.append(self.memo[index])

    _binget = _long_binget = _get

    def _tuple(self, _):
        self.stack.append(tuple(self._pop_mark()))

    def _tuple1(self, _):
        self.stack[-1:] = [tuple(self.stack[-1:])]

    def _tuple2(self, _):
        self.stack[-2:] = [tuple(self.stack[-2:])]

    def _tuple3(self, _):
        self.stack[-3:] = [tuple(self.stack[-3:])]

    def _list(self, _):
        self.stack.append(self._pop_mark())

    def _dict(self, _):
        items = self._pop_mark()
        self.stack.append(_dict(zip(items[::2], items[1::2], strict=True)))

    def _append(self, _):
        item = self.stack.pop()
        list.append(self.stack[-1], item)

    def _appends(self, _):
        items = self._pop_mark()
        list.extend(self.stack[-1], items)

    def _additems(self, _):
        items = self._pop_mark()
        set.update(self.stack[-1], map(_key, items))

    def _setitem(self, _):
        value, key = self.stack.pop(), self.stack.pop()
        dict.__setitem__(self.stack[-1], _key(key), value)

    def _setitems(self, _):
        items = self._pop_mark()
        dict.update(self.stack[-1], _dict(zip(items[::2], items[1::2], strict=True)))

    def _global(self, argument):
        module, name = argument.split(" ")
        self._named(module, name)

    def _stack_global(self, _):
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("the name of a function is not a text")
        self._named(module, name)

    def _named(self, module: str, name: str):
        full = re.sub(r"^__builtin__(?=\.)", "builtins", f"{module}.{name}")
        if full not in self.known:
            raise Refused(full[:200])
        self.stack.append(Name(full))

    def _reduce(self, _):
        arguments, function = self.stack.pop(), self.stack.pop()
        call = self.known[function.name] if isinstance(function, Name) else None
        if call is None:
            raise Refused(f"a call of {bounds.short(function)}")
        for x in arguments:
            if isinstance(x, _SIZED):
                self.budget.take("characters" if isinstance(x, str | bytes) else "items", len(x))
        self.stack.append(call(*arguments))

    def _build(self, _):
        """Sets the state of an object. torch attaches a ``_metadata`` of versions to the dict of a
        model."""
        self.stack.pop()
        if not isinstance(self.stack[-1], dict):
            raise Refused(f"state for a {type(self.stack[-1]).__name__}")

    def _binpersid(self, _):
        if self.persistent is None:
            raise Refused("an object that is stored elsewhere")
        self.stack.append(self.persistent(self.stack.pop()))
