"""A reader of pickles that imports nothing, calls nothing and builds no object of any class.

It knows the opcodes that Python writes for dataclasses of numbers and text in protocol 4 and 5. A
class is its name, a call is the note that it is asked for, and a dictionary is a list of pairs, so
that no key is ever hashed. Any other opcode is refused: those that name a place in the memo could
ask for any amount of memory, and the rest is not needed to describe tensors.

Memory and time are bounded by the number of opcodes: each makes at most one small value.
"""

from __future__ import annotations

import pickle
import pickletools
from collections.abc import Callable
from typing import Any

MOST_OPCODES = 2**25
"""gpt-oss-120b on 256 ranks takes about 30 million."""
MOST_WAITING = 2**12
"""Values on the stack. Python hands over lists and dictionaries in batches of 1,000."""
_LARGEST_TEXT_BYTES = 2**16
_LARGEST_LONG_BYTES = 9
"""Bytes of a whole number of 64 bits, and one for its sign."""


class Pairs(list[tuple[Any, Any]]):
    """The items of a dictionary, in the order in which they were written."""

    __slots__ = ()


class Name:
    """The name of a class or a constant, as `module.name`."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text


class Call:
    """A call that a pickle asks for, and that nobody makes."""

    __slots__ = ("arguments", "name", "state")

    def __init__(self, name: str, arguments: tuple[Any, ...]) -> None:
        self.name = name
        self.arguments = arguments
        self.state: Any = None


class _Machine:
    """The state of one reading."""

    def __init__(self, content: bytes, most_opcodes: int) -> None:
        self._content = content
        self._most_opcodes = most_opcodes
        self._at = 0
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: list[Any] = []

    def run(self) -> Any:
        """Return the value that the pickle describes."""
        operations = _operations(self)
        content = self._content
        stack = self._stack
        for count in range(self._most_opcodes):
            code = content[self._at]
            self._at += 1
            operation = operations[code]
            if operation is None:
                if code == pickle.STOP[0]:
                    return self._last()
                raise ValueError(f"it has the opcode {_opcode_name(code)}; it was not run")
            operation()
            if count % 256 == 0 and max(len(stack), len(self._marks)) > MOST_WAITING:
                raise ValueError(f"more than {MOST_WAITING:,} values wait on its stack")
        raise ValueError(f"more than {self._most_opcodes:,} opcodes")

    def _last(self) -> Any:
        if len(self._stack) != 1 or self._marks or self._at != len(self._content):
            raise ValueError("it does not end with one value")
        return self._stack[0]

    def _byte(self) -> int:
        number = self._content[self._at]
        self._at += 1
        return number

    def _take(self, size: int) -> bytes:
        taken = self._content[self._at : self._at + size]
        if len(taken) != size:
            raise ValueError("it ends too early")
        self._at += size
        return taken

    def _unsigned(self, size: int) -> int:
        return int.from_bytes(self._take(size), "little")

    def _since_mark(self) -> list[Any]:
        """Take what lies above the newest mark."""
        mark = self._marks.pop()
        taken = self._stack[mark:]
        if len(self._stack) < mark:
            raise ValueError("it takes more than it has put down")
        del self._stack[mark:]
        return taken

    def _top(self, kind: type) -> Any:
        """Return the value on top of the stack, which must be of this very type."""
        top = self._stack[-1]
        if type(top) is not kind:
            raise ValueError(f"it changes a {type(top).__name__} as if it were a {kind.__name__}")
        return top

    # what an opcode does

    def protocol(self) -> None:
        number = self._byte()
        if number not in (4, 5):
            raise ValueError(f"it is of protocol {number}; 4 and 5 are read")

    def frame(self) -> None:
        self._take(8)  # the size of a part; the parts follow each other anyway

    def mark(self) -> None:
        self._marks.append(len(self._stack))

    def short_text(self) -> None:
        self._stack.append(self._take(self._byte()).decode("utf-8"))

    def text(self) -> None:
        size = self._unsigned(4)
        if size > _LARGEST_TEXT_BYTES:
            raise ValueError(f"it has a text of {size:,} bytes")
        self._stack.append(self._take(size).decode("utf-8"))

    def byte(self) -> None:
        self._stack.append(self._byte())

    def two_bytes(self) -> None:
        self._stack.append(self._unsigned(2))

    def four_bytes(self) -> None:
        self._stack.append(int.from_bytes(self._take(4), "little", signed=True))

    def long(self) -> None:
        size = self._byte()
        if size > _LARGEST_LONG_BYTES:
            raise ValueError(f"it has a whole number of {size} bytes")
        self._stack.append(int.from_bytes(self._take(size), "little", signed=True))

    def none(self) -> None:
        self._stack.append(None)

    def true(self) -> None:
        self._stack.append(True)

    def false(self) -> None:
        self._stack.append(False)

    def empty_tuple(self) -> None:
        self._stack.append(())

    def tuple_of_one(self) -> None:
        self._stack[-1] = (self._stack[-1],)

    def tuple_of(self, size: int) -> None:
        taken = tuple(self._stack[-size:])
        if len(taken) != size:
            raise ValueError("it takes more than it has put down")
        self._stack[-size:] = [taken]

    def marked_tuple(self) -> None:
        self._stack.append(tuple(self._since_mark()))

    def empty_list(self) -> None:
        self._stack.append([])

    def append(self) -> None:
        value = self._stack.pop()
        self._top(list).append(value)

    def appends(self) -> None:
        values = self._since_mark()
        self._top(list).extend(values)

    def empty_dictionary(self) -> None:
        self._stack.append(Pairs())

    def set_item(self) -> None:
        value = self._stack.pop()
        key = self._stack.pop()
        self._top(Pairs).append((key, value))

    def set_items(self) -> None:
        values = self._since_mark()
        self._top(Pairs).extend(zip(values[::2], values[1::2], strict=True))

    def memoize(self) -> None:
        self._memo.append(self._stack[-1])

    def recall(self) -> None:
        self._stack.append(self._memo[self._byte()])

    def recall_far(self) -> None:
        self._stack.append(self._memo[self._unsigned(4)])

    def name(self) -> None:
        name = self._stack.pop()
        module = self._stack.pop()
        if type(name) is not str or type(module) is not str:
            raise ValueError("it names a class by something else than text")
        self._stack.append(Name(f"{module}.{name}"))

    def call(self) -> None:
        arguments = self._stack.pop()
        target = self._top(Name)
        if type(arguments) is not tuple:
            raise ValueError("it calls with something else than a tuple")
        self._stack[-1] = Call(target.text, arguments)

    def build(self) -> None:
        state = self._stack.pop()
        self._top(Call).state = state


def _operations(machine: _Machine) -> list[Callable[[], None] | None]:
    """Return what each opcode does, by its number; None for those that are refused."""
    known: dict[bytes, Callable[[], None]] = {
        pickle.PROTO: machine.protocol,
        pickle.FRAME: machine.frame,
        pickle.MARK: machine.mark,
        pickle.SHORT_BINUNICODE: machine.short_text,
        pickle.BINUNICODE: machine.text,
        pickle.BININT1: machine.byte,
        pickle.BININT2: machine.two_bytes,
        pickle.BININT: machine.four_bytes,
        pickle.LONG1: machine.long,
        pickle.NONE: machine.none,
        pickle.NEWTRUE: machine.true,
        pickle.NEWFALSE: machine.false,
        pickle.EMPTY_TUPLE: machine.empty_tuple,
        pickle.TUPLE1: machine.tuple_of_one,
        pickle.TUPLE2: lambda: machine.tuple_of(2),
        pickle.TUPLE3: lambda: machine.tuple_of(3),
        pickle.TUPLE: machine.marked_tuple,
        pickle.EMPTY_LIST: machine.empty_list,
        pickle.APPEND: machine.append,
        pickle.APPENDS: machine.appends,
        pickle.EMPTY_DICT: machine.empty_dictionary,
        pickle.SETITEM: machine.set_item,
        pickle.SETITEMS: machine.set_items,
        pickle.MEMOIZE: machine.memoize,
        pickle.BINGET: machine.recall,
        pickle.LONG_BINGET: machine.recall_far,
        pickle.STACK_GLOBAL: machine.name,
        pickle.REDUCE: machine.call,
        pickle.NEWOBJ: machine.call,
        pickle.BUILD: machine.build,
    }
    operations: list[Callable[[], None] | None] = [None] * 256
    for code, operation in known.items():
        operations[code[0]] = operation
    return operations


def _opcode_name(code: int) -> str:
    names = {opcode.code: opcode.name for opcode in pickletools.opcodes}
    return names.get(chr(code), f"0x{code:02x}")


def read_pickle(content: bytes, most_opcodes: int = MOST_OPCODES) -> Any:
    """Return what a pickle describes, in the types of this module, text, numbers, lists and tuples.

    Args:
        content: The pickle.
        most_opcodes: How many opcodes are read, if that is less than `MOST_OPCODES`.

    Raises:
        ValueError: it has an opcode, a size or a structure that descriptions of tensors do not
            have, or too many opcodes.
    """
    try:
        return _Machine(content, min(most_opcodes, MOST_OPCODES)).run()
    except (IndexError, UnicodeDecodeError) as error:
        raise ValueError(f"it is damaged ({error})") from error
