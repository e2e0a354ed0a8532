"""What may come of a call: the right value, or an error of ours that names the argument."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dilated_attention_pytorch
from fuzz.values import shown

PACKAGE = str(Path(dilated_attention_pytorch.__file__).parent)
REFUSALS = (ValueError, TypeError, NotImplementedError)
_LONGEST = 3000  # characters of a message; a repr of a whole tensor is none


class Failure(AssertionError):
    """A call that ended in neither."""


@dataclass
class Call:
    """One call, and how to judge it.

    Attributes:
        function: what is called.
        args: by position.
        kwargs: by name.
        names: the arguments that an error may name; the keywords by default.
        check: raises unless its argument, what the function returned, is right.
        right: no argument was spoiled, so that an error is none of the outcomes.
        setting: what else a report has to say.
        also: further errors that the function promises.
        keep: what has to live as long as the call.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    names: Collection[str] = ()
    check: Callable[[Any], None] | None = None
    right: bool = False
    setting: str = ""
    also: tuple[type[Exception], ...] = ()
    keep: object = None

    def __repr__(self) -> str:
        name = getattr(self.function, "__qualname__", type(self.function).__name__)
        given = [shown(x) for x in self.args] + [f"{key}={shown(x)}" for key, x in self.kwargs.items()]
        return f"{name}({', '.join(given)}) {self.setting}"


def judge(call: Call) -> str:
    """Makes the call; returns the outcome's name, or raises `Failure`."""
    try:
        result = call.function(*call.args, **call.kwargs)
    except REFUSALS as error:
        if why := _why_no_refusal(error, call):
            raise Failure(f"{why}: {_short(error)}\nin {call}") from error
        return type(error).__name__
    except Exception as error:
        if isinstance(error, call.also):
            return type(error).__name__
        raise Failure(f"a foreign error: {_short(error)}\nin {call}") from error
    if call.check is not None:
        try:
            call.check(result)
        except Exception as error:
            raise Failure(f"a wrong result: {_short(error)}\nin {call}") from error
    return "value"


def _why_no_refusal(error: Exception, call: Call) -> str:
    """What is wrong with an error; "" for a good one."""
    message = str(error)
    names = call.names or call.kwargs
    if call.right:
        return "right arguments are refused"
    if len(message) > _LONGEST:
        return f"a message of {len(message)} characters"
    if not _ours(error):
        return f"an error of {traceback.extract_tb(error.__traceback__)[-1].filename}"
    if not set(re.findall(r"\w+", message)) & set(names):
        return f"none of {sorted(names)} is named"
    return ""


def _ours(error: Exception) -> bool:
    """Raised by a line of the package, or by Python as the call's signature demands."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    own = last.filename.startswith(PACKAGE) and (last.line or "").lstrip().startswith(("raise", "check", ")"))
    signature = isinstance(error, TypeError) and "argument" in str(error) and "()" in str(error)
    return own or signature or str(error).startswith("expected ")


def _short(error: Exception) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(PACKAGE)]
    where = f"{frames[-1].filename.removeprefix(PACKAGE)}:{frames[-1].lineno} " if frames else "? "
    message = str(error).strip().replace("\n", " ")
    return f"{where}{type(error).__name__}: {message[:400]}"
