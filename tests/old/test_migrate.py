"""`dilated-attention migrate`: what it finds, what it writes, what it leaves alone."""

from __future__ import annotations

import os
import runpy
import stat
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

pytest.importorskip("libcst")

from dilated_attention_pytorch._deprecated import load
from dilated_attention_pytorch._old import names
from dilated_attention_pytorch._old.migrate.clues import OLD
from dilated_attention_pytorch._old.migrate.command import python_files, write_atomically
from dilated_attention_pytorch._old.migrate.program import Migrated, migrate
from dilated_attention_pytorch.cli.app import app

P = "dilated_attention_pytorch"


def migrate_source(source: bytes) -> Migrated:
    """A program that is one file."""
    (result,) = migrate([("", source)]).values()
    if isinstance(result, ValueError):
        raise result
    return result


def rewritten(source: str) -> str:
    return migrate_source(source.encode()).after.decode()


def left(source: str) -> list[tuple[int, str]]:
    """Line and name of what is left to do by hand."""
    return [(f.line, f.old.removeprefix(f"{P}.")) for f in migrate_source(source.encode()).findings if f.by_hand]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (f"from {P}.long_net import LongNet\nLongNet()\n", f"from {P} import LongNet\nLongNet()\n"),
        (
            f"from {P} import RingDilatedAttentionV2\nclass A(RingDilatedAttentionV2):  # a\n  1\n",
            f"from {P} import RingDilatedAttention\nclass A(RingDilatedAttention):  # a\n  1\n",
        ),
        # an alias keeps its name
        (
            f"from {P} import RingDilatedAttentionV3 as R\nR([1], [1])\n",
            f"from {P} import RingDilatedAttention as R\nR([1], [1])\n",
        ),
        # attributes, of the package and of a module under any name
        (f"import {P} as d\nd.RingDilatedAttentionTrue\n", f"import {P} as d\nd.RingDilatedAttention\n"),
        (
            f"import {P}.ring_dilated_attention_v2 as v\nv.RingDilatedAttentionV2\n",
            f"import {P} as v\nv.RingDilatedAttention\n",
        ),
        (f"import {P}.long_net\n{P}.long_net.LongNet()\n", f"import {P}\n{P}.LongNet()\n"),
        (f"import {P}.dilated_attention as m\nm.DilatedAttention\n", f"import {P} as m\nm.DilatedAttention\n"),
        # comments, layout and line ends stay
        (
            f"from {P} import (\n    RingDilatedAttentionV2,  # one\n    legacy_mode,  # two\n)\n"
            "RingDilatedAttentionV2()\n",
            f"from {P} import (\n    RingDilatedAttention,  # one\n    legacy_mode,  # two\n)\n"
            "RingDilatedAttention()\n",
        ),
        (f"# top\r\nfrom {P}.long_net import LongNet  # why\r\n", f"# top\r\nfrom {P} import LongNet  # why\r\n"),
        # two old names of one class become one
        (
            f"from {P} import RingDilatedAttentionV2, RingDilatedAttentionV3\n"
            "RingDilatedAttentionV2()\nRingDilatedAttentionV3()\n",
            f"from {P} import RingDilatedAttention\nRingDilatedAttention()\nRingDilatedAttention()\n",
        ),
        # an import that can move only in part is two
        (
            f"# models\nfrom {P}.long_net import LongNetLM, LongNet\n",
            f"# models\nfrom {P} import LongNet\nfrom {P}.long_net import LongNetLM\n",
        ),
        # inside a function, and where the name means something else
        (
            f"def f():\n    from {P} import RingDilatedAttentionV2\n    return RingDilatedAttentionV2\n\n"
            "def g(RingDilatedAttentionV2):\n    return RingDilatedAttentionV2(RingDilatedAttentionV2=1)\n",
            f"def f():\n    from {P} import RingDilatedAttention\n    return RingDilatedAttention\n\n"
            "def g(RingDilatedAttentionV2):\n    return RingDilatedAttentionV2(RingDilatedAttentionV2=1)\n",
        ),
    ],
)  # fmt: skip
def test_rewrites(before: str, after: str) -> None:
    assert rewritten(before) == after
    assert rewritten(after) == after  # and a second time changes nothing


@pytest.mark.parametrize(
    "source",
    [
        f"import {P} as d, {P}.viz.hilbert\nd.__version__, d.core.reference, d.functional.nothing, d.LongNet.forward\n",
        "from other import RingDilatedAttentionV2, LongNet\nRingDilatedAttentionV2()\n",
        "class RingDilatedAttentionV2: pass\nx = RingDilatedAttentionV2()\nx.LongNet\n",
        f"from {P} import dilated_attention, DilatedAttention, LongNet\nfrom {P}.core import reference\n",
        "from .long_net import LongNet\nfrom . import long_net\n",
        f"# {P}.RingDilatedAttentionV2\n",
        "",
    ],
)
def test_leaves_the_unknown_alone(source: str) -> None:
    result = migrate_source(source.encode())
    assert result.after == source.encode() and result.findings == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (f"from {P} import ImprovedDilatedAttention\nImprovedDilatedAttention([1], [1], 0.1)\n", [
            (1, "ImprovedDilatedAttention"), (2, "ImprovedDilatedAttention")]),
        (f"from {P}.long_net import *\n", [(1, "long_net")]),
        (f"from {P} import long_net\nlong_net.LongNet\n", [(1, "long_net")]),
        (f"name = '{P}.long_net'\n", [(1, "long_net")]),
        (f"from {P} import BlockSparseRingDilatedAttention\n", [(1, "BlockSparseRingDilatedAttention")]),
        (f"from {P}.transformer_refactored import create_encoder_layer\ncreate_encoder_layer()\n", [
            (1, "transformer_refactored.create_encoder_layer")]),
        (f"import {P}.utils.validation, {P} as p\np.UnfoldRingDilatedAttention.a\np.PatternConfig\n", [
            (1, "utils.validation"), (2, "UnfoldRingDilatedAttention"), (3, "PatternConfig")]),
        (f"from {P}.core import BaseDilatedAttention, create_dilated_attention\n", [
            (1, "core.BaseDilatedAttention"), (1, "core.create_dilated_attention")]),
        # a module that something has to be reached through stays, with all that is
        (f"import {P}.long_net as n\nn.LongNet\nn.LongNetLM\n", [(1, "long_net"), (3, "long_net.LongNetLM")]),
        # the new name is taken
        (f"from {P} import RingDilatedAttentionV2\nclass RingDilatedAttention: 1\n", [(1, "RingDilatedAttentionV2")]),
        (f"import {P}.core as c\nc.RingAttentionConfig\n", [(2, "core.RingAttentionConfig")]),
    ],
)  # fmt: skip
def test_what_is_left_is_listed_and_not_touched(source: str, expected: list[tuple[int, str]]) -> None:
    assert left(source) == expected
    if "import long_net" not in source:
        assert rewritten(source) == source


V2 = "RingDilatedAttentionV2"
USE = f"print(isinstance({V2}([16], [1]), object))\n"
# Programs that ran, and did not after a rewriting of their names: their files, and why they are left as they are.
KEPT = {
    "two imports": ({"main": f"""
try:
    from {P} import {V2}
except ImportError:
    from {P}.ring_dilated_attention_v2 import {V2}
{USE}"""}, "one of several places"),
    "an import or none": ({"main": f"""
try:
    from {P} import {V2}
except ImportError:
    {V2} = None
print({V2} is None)"""}, "one of several places"),
    "bound again": ({"main": f"""
from functools import partial
from {P} import {V2}
{V2} = partial({V2}, dropout=0.0)
print(isinstance({V2}, partial))"""}, "one of several places"),
    "__all__": ({
        "lib": f"from {P} import {V2}\n{V2}\n__all__ = ['{V2}']",
        "main": f"from lib import *\n{USE}"}, "lib.py:3 has it in a string"),
    "re-exported": ({"lib": f"from {P} import {V2}", "main": f"from lib import {V2}\n{USE}"}, "lib.py:1 imports it"),
    "from another file": ({
        "lib": f"from {P} import {V2}\n{V2}", "main": f"from lib import {V2}\n{USE}"}, "main.py:1 takes it from"),
    "an attribute": ({
        "lib": f"from {P} import {V2}\n{V2}", "main": f"import lib\nprint(lib.{V2} is None)"}, "main.py:2 takes it"),
    "a star": ({
        "lib": f"from {P} import {V2}\n{V2}", "main": f"from lib import *\n{USE}"}, "from a star import"),
    "annotation": ({"main": f"""
import typing
from {P} import {V2}
def f(x: "list[{V2}]", y={V2}): ...
print(len(typing.get_type_hints(f)))"""}, "in a string"),
    "doctest": ({"main": f"""
import doctest, sys
from {P} import {V2}
def f(y={V2}):
    \"\"\"A `{V2}`.

    >>> {V2} is None
    False
    \"\"\"
print([doctest.run_docstring_examples(f, globals())])"""}, "in a string"),
    "the call of 0.1": ({"main": f"""
import torch
from {P}.dilated_attention import MultiheadDilatedAttention
x = torch.ones(1, 32, 32)
print(MultiheadDilatedAttention(32, 4, [1, 2], [16, 32])(x, x, x, True)[0].shape)"""}, "is_causal is not the fourth"),
    "a fifth argument": ({"main": f"""
import torch
from {P}.dilated_attention import DilatedAttention
x = torch.ones(1, 32, 4, 8)
print(DilatedAttention([16, 32], [1, 2])(x, x, x, True, None).shape)"""}, "main.py:5 passes attention_mask or a fifth"),
    "attention_mask": ({"main": f"""
import torch
from {P}.ring_dilated_attention_v2_collective import RingDilatedAttentionV2Collective
x, ring = torch.ones(1, 32, 4, 8), RingDilatedAttentionV2Collective([16, 32], [1, 2])
print(ring(x, x, value=x, attention_mask=None).shape)"""}, "main.py:5 passes attention_mask"),
    "the mask of a subclass": ({
        "lib": f"""
from {P} import {V2}
class Ring({V2}):
    def forward(self, q, k, v, is_causal=False, attention_mask=None):
        return super().forward(q, k, v, is_causal, attention_mask)""",
        "main": "import torch\nfrom lib import Ring\nx = torch.ones(1, 8, 2, 4)\nprint(Ring([8], [1])(x, x, x).shape)",
        }, "lib.py:5 passes"),
    "isinstance": ({"main": f"""
from {P} import RingDilatedAttentionHybrid, {V2}
ring = {V2}([16], [1])
print(isinstance(ring, RingDilatedAttentionHybrid), isinstance(ring, {V2}))"""}, "tells it from"),
    "isinstance of what a third file makes": ({
        "lib": f"from {P} import RingDilatedAttentionHybrid",
        "main": f"import lib\nfrom {P} import {V2} as V\n"
        "print(isinstance(lib.RingDilatedAttentionHybrid([16], [1]), V))"}, "tells it from"),
    "isinstance of what another file makes": ({
        "lib": f"from {P} import RingDilatedAttentionHybrid\nmake = lambda: RingDilatedAttentionHybrid([16], [1])",
        "main": f"from lib import make\nfrom {P} import {V2} as V\nprint(isinstance(make(), V))"}, "tells it from"),
    "keys": ({"main": f"""
from {P} import RingDilatedAttentionV3, {V2}
print({{{V2}: 1, RingDilatedAttentionV3: 2}}[{V2}])"""}, "tells it from"),
    "two bases": ({"main": f"""
from {P} import RingDilatedAttentionV3, {V2}
class Both(RingDilatedAttentionV3, {V2}): ...
print(len(Both.__bases__))"""}, "tells it from"),
    "a name that stays elsewhere": ({
        "lib": f"RingDilatedAttention = 1\nfrom {P} import {V2}\nis_ring = lambda x: isinstance(x, {V2})",
        "main": f"from lib import is_ring\nfrom {P} import {V2}\nprint(is_ring({V2}([16], [1])))"}, "of its own"),
}  # fmt: skip
MOVED = {
    "two classes that become one": {"main": f"""
from {P} import RingDilatedAttentionV3, {V2}
rings = {{"2": {V2}, "3": RingDilatedAttentionV3}}
print(sorted(rings), len([make([16], [1]) for make in rings.values()]))"""},
    "one class": {
        "lib": f"from {P} import {V2}\nmake = lambda: {V2}([16], [1])",
        "main": f"from lib import make\nfrom {P}.ring_dilated_attention_v2 import {V2}\n"
        f"print(isinstance(make(), {V2}))",
    },
    "the masks of other models": {"main": f"""
from {P} import {V2}
def bert(ids, attention_mask=None): return ids
print(bert(1, attention_mask=None), {V2}([16], [1], 0.0, 1, None).config)"""},
}  # fmt: skip


class TestPrograms:
    """A program prints the same before and after."""

    @pytest.fixture()
    def migrated(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Any:
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.setattr(sys, "dont_write_bytecode", True)

        def run() -> str:
            sys.modules.pop("lib", None)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                runpy.run_path(str(tmp_path / "main.py"))
            sys.modules.pop("lib", None)
            return str(capsys.readouterr().out)

        def migrated(files: dict[str, str]) -> tuple[str, str]:
            for name, source in files.items():
                (tmp_path / f"{name}.py").write_text(source)
            before = run()
            printed = CliRunner().invoke(app, ["migrate", "--write", str(tmp_path)], catch_exceptions=False).output
            capsys.readouterr()
            assert before and run() == before
            return printed, "".join((tmp_path / f"{name}.py").read_text() for name in files)

        return migrated

    @pytest.mark.parametrize("program", KEPT)
    def test_what_would_break_is_kept_and_listed(self, program: str, migrated: Any) -> None:
        files, reason = KEPT[program]
        printed, _ = migrated(files)
        assert "(by hand: " in printed and reason in printed

    @pytest.mark.parametrize("program", MOVED)
    def test_what_would_not_is_rewritten(self, program: str, migrated: Any) -> None:
        printed, after = migrated(MOVED[program])
        assert "by hand:" not in printed and V2 not in after


@pytest.mark.parametrize("old", sorted(OLD))
def test_every_old_name_is_found_and_what_is_rewritten_works(old: str) -> None:
    """The rewritten script takes the old call without a word about old names."""
    module, _, name = old.rpartition(".")
    row = OLD[old]
    taken = "" if module == f"{P}.core" else f"import {module} as m\nm.{name}\n"
    source = f"from {module} import {name} as old\n{taken}"
    result = migrate_source(source.encode())
    assert {f.old for f in result.findings} >= {old}
    assert bool([f for f in result.findings if f.by_hand]) == bool(row.by_hand)
    if row.by_hand:
        return
    found: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec(result.after.decode(), found)
    # The new class takes old calls, or nothing else ever stood at the old place.
    assert hasattr(found["old"].__init__, "__wrapped__") or found["old"] is load(row.stand_in)
    assert not taken or getattr(found["m"], row.now) is found["old"]


def test_findings_have_lines_and_successors() -> None:
    found = migrate_source(
        f"\n\nfrom {P} import RingDilatedAttentionV2\nx = RingDilatedAttentionV2\n".encode()
    ).findings
    assert [(f.line, f.old, f.new) for f in found] == [
        (3, f"{P}.RingDilatedAttentionV2", f"{P}.RingDilatedAttention"),
        (4, f"{P}.RingDilatedAttentionV2", f"{P}.RingDilatedAttention"),
    ]


def test_the_encoding_of_a_file_stays() -> None:
    source = f"# -*- coding: latin-1 -*-\nfrom {P}.long_net import LongNet  # caf\xe9\n".encode("latin-1")
    assert migrate_source(source).after == source.replace(b".long_net", b"")


def test_what_does_not_parse() -> None:
    with pytest.raises(ValueError, match="expected Python source, got what does not parse"):
        migrate_source(f"import {P}\ndef (".encode())


def test_files_of_a_folder(tmp_path: Path) -> None:
    for name in ("a.py", "b/c.pyi", "b/d.txt", ".hidden/e.py", "env/pyvenv.cfg", "env/f.py", "__pycache__/g.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert [p.relative_to(tmp_path).as_posix() for p in python_files(tmp_path)] == ["a.py", "b/c.pyi"]
    assert list(python_files(tmp_path / "b/d.txt")) == [tmp_path / "b/d.txt"]
    with pytest.raises(FileNotFoundError, match="expected a file or a folder"):
        list(python_files(tmp_path / "absent"))


class TestWriting:
    def test_mode_and_link_stay(self, tmp_path: Path) -> None:
        (tmp_path / "real.py").write_bytes(b"old")
        (tmp_path / "real.py").chmod(0o751)
        (tmp_path / "link.py").symlink_to("real.py")
        write_atomically(tmp_path / "link.py", b"new")
        assert (tmp_path / "link.py").is_symlink() and (tmp_path / "real.py").read_bytes() == b"new"
        assert stat.S_IMODE((tmp_path / "real.py").stat().st_mode) == 0o751

    def test_a_failure_leaves_the_file_and_no_other(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "a.py").write_bytes(b"old")

        def fails(*_: object) -> None:
            raise OSError("no space")

        monkeypatch.setattr(os, "replace", fails)
        with pytest.raises(OSError, match="no space"):
            write_atomically(tmp_path / "a.py", b"new")
        assert [p.name for p in tmp_path.iterdir()] == ["a.py"] and (tmp_path / "a.py").read_bytes() == b"old"


class TestCommand:
    @pytest.fixture()
    def code(self, tmp_path: Path) -> Path:
        (tmp_path / "a.py").write_text(f"from {P}.long_net import LongNet\nLongNet\n")
        (tmp_path / "b.py").write_text(f"from {P} import create_dilated_attention\n")
        (tmp_path / "c.py").write_text("print('nothing here')\n")
        return tmp_path

    def run(self, *arguments: object, code: int = 0) -> str:
        result = CliRunner().invoke(app, ["migrate", *map(str, arguments)], catch_exceptions=False)
        assert result.exit_code == code, result.output
        return result.output

    def test_a_dry_run_shows_a_diff_and_writes_nothing(self, code: Path) -> None:
        before = {path: path.read_bytes() for path in code.iterdir()}
        printed = self.run(code)
        assert f"{code / 'a.py'}:1: {P}.long_net.LongNet -> {P}.LongNet\n" in printed
        assert f"-from {P}.long_net import LongNet\n+from {P} import LongNet\n" in printed
        assert f"b.py:1: {P}.create_dilated_attention -> {P}.DilatedAttention (by hand: a class has no" in printed
        assert printed.endswith("2 old names, 1 of them left to do by hand; 1 files would change (--write does it)\n")
        assert {path: path.read_bytes() for path in code.iterdir()} == before

    def test_write_and_again(self, code: Path) -> None:
        assert "1 files rewritten" in self.run(code, "--write")
        assert (code / "a.py").read_text() == f"from {P} import LongNet\nLongNet\n"
        assert self.run(code, "--write").endswith("1 old names, 1 of them left to do by hand; 0 files rewritten\n")

    def test_a_file_that_does_not_parse_is_named_and_the_rest_is_done(self, code: Path) -> None:
        (code / "0.py").write_text(f"import {P}\nclass\n")
        assert f"{code / '0.py'}: skipped: expected Python source" in self.run(code, "--write", code=1)
        assert (code / "a.py").read_text().startswith(f"from {P} import LongNet")
        assert (code / "0.py").read_text() == f"import {P}\nclass\n"


def test_libcst_is_asked_for_by_the_name_of_its_extra() -> None:
    code = f"import sys; sys.modules['libcst'] = None\nimport {P}._old.migrate.program"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "pip install 'dilated-attention-pytorch[migrate]'" in done.stderr


def test_the_table_says_by_hand_where_the_new_call_differs() -> None:
    """Whatever is rewritten by name alone is taken by a class whose name was an old name too."""
    takes_old_calls = {"DilatedAttention", "MultiheadDilatedAttention", "LongNet", "RingDilatedAttention"}
    for row in names.TABLE:
        if not row.by_hand and row.places != ("ring_attention.production_hilbert",):
            assert row.now in takes_old_calls | {"RingAttentionConfig"}, row
