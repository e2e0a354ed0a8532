"""The Triton backend: prepares a call, chooses the kernels, and replays calls that it has seen before.

A kernel family is one file of kernels and one that launches them, beside these: `aligned.py` with `launch_aligned.py`,
`attention.py` and `attention_backward.py` with `launch_branches.py`; those for Hopper have a folder, `hopper/`.
`choose` is the place that knows them all.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

from dilated_attention_pytorch.core.problem import Problem
from dilated_attention_pytorch.kernels.backend import Repeat
from dilated_attention_pytorch.kernels.triton import launch_aligned, launch_branches, replay
from dilated_attention_pytorch.kernels.triton.configs import Direction
from dilated_attention_pytorch.kernels.triton.hopper import support as hopper
from dilated_attention_pytorch.kernels.triton.support import why_not
from dilated_attention_pytorch.kernels.triton.work import Work, on_device, prepare, ready
from dilated_attention_pytorch.types import NO_MASKS, QKV, AttentionOutput, Masks, OutputGradient

__all__ = ["backward", "choose", "forward", "repeater", "why_not"]


class KernelChoice(NamedTuple):
    """The family of kernels that a call takes, their configurations, and why."""

    family: ModuleType
    configs: tuple[Any, ...]
    reason: str


def choose(work: Work, direction: Direction) -> KernelChoice:
    """The fastest family that can compute a call. New ones are asked here, before those that they outrun."""
    if not hopper.why_not(work):
        from dilated_attention_pytorch.kernels.triton.hopper import launch, launch_backward

        module = launch if direction == "forward" else launch_backward
        return KernelChoice(
            module, module.configs_for(work), "all branches in one launch, through Hopper's own pipeline"
        )
    # All branches in one launch read q once, and write out once.
    obstacle = launch_aligned.why_not(work, direction)
    if obstacle is None:
        return KernelChoice(launch_aligned, launch_aligned.configs_for(work, direction), "all branches in one launch")
    reason = f"one launch per branch: {obstacle}"
    return KernelChoice(launch_branches, launch_branches.configs_for(work, direction), reason)


def forward(x: QKV, problem: Problem, masks: Masks = NO_MASKS) -> AttentionOutput:
    """Out in q's dtype and lse in fp32."""
    with on_device(x.q):
        work = prepare(x, problem, masks)
        key = _key("forward", work)
        inputs = (*work.x, work.masks.seed)
        tape = replay.find(key, inputs)
        if tape is not None:
            # A kind seen before: allocate and launch, nothing else.
            out, lse = tape.play(inputs)
        else:
            # A new kind, or masks that are data: prepare, launch, and record it if that is of use again.
            tape = replay.Tape(key, inputs)
            choice = choose(work, "forward")
            out, lse = choice.family.forward(work, tape, *choice.configs)
            tape.keep((out, lse))
    return AttentionOutput(out.to(x.q.dtype), lse)


def backward(grad: OutputGradient, x: QKV, saved: AttentionOutput, problem: Problem, masks: Masks = NO_MASKS) -> QKV:
    """Gradients of q, k and v in their dtypes, given what the forward returned."""
    with on_device(x.q):
        work = prepare(x, problem, masks)
        # Kernels index lse and its gradient alike, as contiguous fp32.
        grad_lse = None if grad.lse is None else grad.lse.float().contiguous()
        grad = OutputGradient(ready(grad.out), grad_lse)
        saved = AttentionOutput(ready(saved.out), saved.lse.contiguous())
        key = _key("backward", work)
        inputs = (*grad, *work.x, *saved, work.masks.seed)
        tape = replay.find(key, inputs)
        if tape is not None:
            grads = tape.play(inputs)
        else:
            tape = replay.Tape(key, inputs)
            choice = choose(work, "backward")
            grads = choice.family.backward(work, grad, saved, tape, *choice.configs)
            tape.keep(grads)
    return QKV(*(y.to(x.q.dtype) for y in grads))


def repeater(x: QKV, problem: Problem) -> Repeat | None:
    """Launches a forward again that has no masks, on tensors of the same layout; None if it was not recorded."""
    problem = problem.rebased(x.q.shape[1], x.k.shape[1])
    tape = replay.find(("forward", problem), (*x, None))
    return None if tape is None else lambda x: AttentionOutput(*tape.play((*x, None)))


def _key(direction: Direction, work: Work) -> tuple[Direction, Problem] | None:
    """What decides the launches beside the layout of the tensors; None where that is not all."""
    if work.is_masked or 0 in (work.x.q.numel(), work.x.k.numel()):
        return None
    return direction, work.problem
