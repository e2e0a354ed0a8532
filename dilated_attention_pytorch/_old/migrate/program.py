"""Finds the names of 0.1 and 0.2 in a code base and writes the new ones in their place, with libcst.

What is rewritten means the same under the new name: the new class takes the old call. Everything else is listed, with
the reason why it is left to its author. A name that one file keeps is kept by all of them: what one makes, another may
take by its name, call with a mask, or ask `isinstance`. What is kept works, through `names.TABLE`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

try:
    import libcst as cst
    from libcst.metadata import MetadataWrapper
except ImportError as error:
    raise ImportError(
        "expected libcst, which reads and writes the code, found none: pip install 'dilated-attention-pytorch[migrate]'"
    ) from error

from dilated_attention_pytorch._deprecated import PACKAGE
from dilated_attention_pytorch._old.migrate.clues import Clues
from dilated_attention_pytorch._old.migrate.rewrite import Rewrite
from dilated_attention_pytorch._old.migrate.survey import Finding, Survey, settle


class Migrated(NamedTuple):
    """One file: its old names, and the source before and after."""

    findings: list[Finding]
    before: bytes
    after: bytes


def migrate(sources: Iterable[tuple[str, bytes]]) -> dict[str, Migrated | ValueError]:
    """The old names in files by path, and the files with those rewritten that can be; the error of one that cannot.

    Give all of a program at once: a name that one file takes from another stays, and only together do they show it.
    """
    done: dict[str, Migrated | ValueError] = {}
    clues = Clues()
    read: dict[str, tuple[bytes, MetadataWrapper, Survey]] = {}
    for path, source in sources:
        done[path] = Migrated([], source, source)
        ours = PACKAGE.encode() in source
        try:
            clues.read(path, source)
            module = cst.parse_module(source if ours else b"")
        except (cst.ParserSyntaxError, SyntaxError, ValueError, LookupError) as error:
            reason = error.message if isinstance(error, cst.ParserSyntaxError) else str(error)
            if ours:
                done[path] = ValueError(f"expected Python source, got what does not parse: {reason}")
            continue
        if not ours:
            continue
        survey = Survey(path)
        read[path] = source, MetadataWrapper(module, unsafe_skip_copy=True), survey
        read[path][1].visit(survey)
    settle([survey for _, _, survey in read.values()], clues.stays())
    for path, (source, wrapper, survey) in read.items():
        rewrite = Rewrite(survey.stuck)
        after = wrapper.visit(rewrite)
        findings = sorted({*survey.by_hand(), *rewrite.done}, key=lambda finding: (finding.line, finding.old))
        done[path] = Migrated(findings, source, after.bytes if rewrite.done else source)
    return done
