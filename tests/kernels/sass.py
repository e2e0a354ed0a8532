"""Reads machine code, as `cuobjdump -sass` prints it, for a fault of the assembler that no test on the CPU sees."""

import re
from bisect import bisect_left
from collections import defaultdict

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\d+ )?(\S+) ?(.*?) ;")
_PRODUCT = re.compile(r"R\d+, R(\d+), ")
_REGISTER = re.compile(r"R(\d+)\b")
_ADDRESS = re.compile(r"0x[0-9a-f]+$")
# Instructions whose first register is read.
_READS = "HGMMA", "ST", "SYNCS", "BRA", "R2UR"


def lost_operands(sass: str) -> list[str]:
    """Operands of products, loaded before a loop and used in it, whose registers the loop overwrites after their use.

    ptxas 12.8 does that where only one loop reads them and nothing reads them after it.
    """
    code = [(int(at, 16), name, operands) for at, name, operands in _LINE.findall(sass)]
    index = {at: i for i, (at, _, _) in enumerate(code)}
    # Of each register, in ascending order, the instructions that load an operand there, multiply it, or write.
    loads, uses, writes = defaultdict(list), defaultdict(list), defaultdict(list)
    for i, (_, name, operands) in enumerate(code):
        register = _REGISTER.match(operands)
        if name.startswith("HGMMA") and (product := _PRODUCT.match(operands)):
            uses[int(product[1])].append(i)
        elif register and name.startswith("LDSM"):
            loads[int(register[1])].append(i)
        elif register and not name.startswith(_READS):
            writes[int(register[1])].append(i)
    waits = [i for i, (_, name, _) in enumerate(code) if name.startswith("SYNCS.PHASECHK")]
    lost = []
    for i, (_, name, target) in enumerate(code):
        begin = index.get(int(target, 16), i) if name == "BRA" and _ADDRESS.match(target) else i
        # A jump back; but for those from the place where a warp waits for a barrier.
        if begin >= i or _first(waits, max(begin, i - 12), i) is not None:
            continue
        for operand in loads.keys() & uses.keys():
            used = _first(uses[operand], begin, i)
            if used is None or _first(loads[operand], begin, i) is not None:
                continue
            written = [at for k in range(4) if (at := _first(writes[operand + k], begin, i)) is not None]
            # Written before their use, they hold a copy.
            if written and used < min(written):
                lost.append(f"R{operand} in the loop at {code[begin][0]:#x}")
    return lost


def _first(places: list[int], begin: int, end: int) -> int | None:
    """The first of ascending numbers from `begin` to before `end`."""
    at = bisect_left(places, begin)
    return places[at] if at < len(places) and places[at] < end else None
