"""Tiles are handed out: a program that is done draws the next from a counter, since tiles differ in cost. With fixed
shares one program can have a third more work than the mean, and all others wait for it (`test_hopper_walk.py`).

The warp that loads draws, a tile ahead, and tells the warpgroups through two places in shared memory. Which program
takes a tile changes no bit of it.
"""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from dilated_attention_pytorch.kernels.triton.hopper import stages


class Tickets(NamedTuple):
    """What a program draws from.

    Attributes:
        counter: int32 in global memory, 0 at the launch.
        places: `[2, 1]` int32 in shared memory.
        full, empty: per place.
    """

    counter: gl.tensor
    places: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor


@gluon.jit
def allocate(counter, GROUPS: gl.constexpr = 2):
    """A program's, which has so many warpgroups. Its first tile needs no ticket: it is the program's own number."""
    LAYOUT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    places = gl.allocate_shared_memory(gl.int32, [2, 1], LAYOUT)
    return Tickets(counter, places, stages.barriers(2, 1), stages.barriers(2, GROUPS * stages.GROUP))


@gluon.jit
def draw(turn, tickets):
    """For the warp that loads: what comes after the program's tile number `turn`, beyond the last tile if none does."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    place = turn & 1
    tile = gl.num_programs(0) + gl.atomic_add(tickets.counter, 1, sem="relaxed")
    mbarrier.wait(tickets.empty.index(place), (turn >> 1 & 1) ^ 1)
    tickets.places.index(place).store(gl.full([1], tile, gl.int32, LAYOUT))
    mbarrier.arrive(tickets.full.index(place), count=1)
    return tile


@gluon.jit
def take(turn, tickets):
    """The same for a warpgroup."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    place = turn & 1
    mbarrier.wait(tickets.full.index(place), turn >> 1 & 1)
    tile = gl.max(tickets.places.index(place).load(LAYOUT), 0)
    stages.arrive(tickets.empty.index(place))
    return tile
