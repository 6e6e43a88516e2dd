"""Reads pickles without running them.

A pickle is a program for a small stack machine, and Python's own machine calls whatever the program
names. This one knows the opcodes that make plain data. Where a program names something of a module,
it is looked up in a table of what the caller understands; everything else is refused by its name.
"""

from __future__ import annotations

import pickletools
import re
from collections.abc import Callable, Mapping
from typing import IO, Any

Known = Mapping[str, Callable[..., Any] | None]


class Refused(ValueError):
    """A pickle names something that is neither understood nor plain data."""


class Name:
    """Something of a module that a pickle names; never imported."""

    def __init__(self, name: str):
        self.name = name

    def __repr__(self) -> str:
        return self.name


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
# What pickles of plain data name.
PLAIN: Known = {
    "collections.OrderedDict": lambda items=(): dict(items),
    "builtins.set": set,
    "builtins.bytes": lambda: b"",  # the empty one, up to protocol 2
    "_codecs.encode": lambda text, coding: _latin(text, coding),  # bytes, up to protocol 2
}


def load(file: IO[bytes], known: Known, persistent: Callable[[Any], Any] | None = None) -> Any:
    """The value of the next pickle in a file.

    Args:
      known: dotted name -> what a call of it with positional arguments gives; None for a name
        that may stand for itself but cannot be called. `PLAIN` is understood in any case.
      persistent: what the id of an object that is stored elsewhere stands for.

    Returns:
      dict, list, tuple, set, str, bytes, int, float, bool, None, `Name` and what `known` gives.

    Raises:
      Refused: it names something else.
      ValueError: it is broken.
    """
    machine = _Machine({**PLAIN, **known}, persistent)
    try:
        for opcode, argument, _ in pickletools.genops(file):
            machine.run(opcode.name, argument)
        return machine.stack.pop()
    except Refused:
        raise
    except (ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a pickle of plain data: {error!r}") from error


def _latin(text: str, coding: str) -> bytes:
    if coding != "latin1":
        raise Refused(f"_codecs.encode to {coding!r}")
    return text.encode("latin1")


class _Machine:
    """The stack, the memo, and one method for each kind of opcode."""

    def __init__(self, known: Known, persistent):
        self.known, self.persistent = known, persistent
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, name: str, argument: Any) -> None:
        """One opcode."""
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
        self.stack.append(dict(zip(items[::2], items[1::2], strict=True)))

    def _append(self, _):
        item = self.stack.pop()
        list.append(self.stack[-1], item)

    def _appends(self, _):
        items = self._pop_mark()
        list.extend(self.stack[-1], items)

    def _additems(self, _):
        items = self._pop_mark()
        set.update(self.stack[-1], items)

    def _setitem(self, _):
        value, key = self.stack.pop(), self.stack.pop()
        dict.__setitem__(self.stack[-1], key, value)

    def _setitems(self, _):
        items = self._pop_mark()
        dict.update(self.stack[-1], zip(items[::2], items[1::2], strict=True))

    def _global(self, argument):
        module, name = argument.split(" ")
        self._named(module, name)

    def _stack_global(self, _):
        name, module = self.stack.pop(), self.stack.pop()
        self._named(str(module), str(name))

    def _named(self, module: str, name: str):
        full = re.sub(r"^__builtin__(?=\.)", "builtins", f"{module}.{name}")
        if full not in self.known:
            raise Refused(full)
        self.stack.append(Name(full))

    def _reduce(self, _):
        arguments, function = self.stack.pop(), self.stack.pop()
        call = self.known[function.name] if isinstance(function, Name) else None
        if call is None:
            raise Refused(f"a call of {function!r}")
        self.stack.append(call(*arguments))

    def _build(self, _):
        """State of an object. torch hangs a ``_metadata`` of versions on the dict of a model."""
        self.stack.pop()
        if not isinstance(self.stack[-1], dict):
            raise Refused(f"state for a {type(self.stack[-1]).__name__}")

    def _binpersid(self, _):
        if self.persistent is None:
            raise Refused("an object that is stored elsewhere")
        self.stack.append(self.persistent(self.stack.pop()))
