"""The mutants themselves: what is changed, that it still is Python, and that the list of equivalents is up to date."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mutants.mutations import mutations
from mutants.sample import ROOT, areas, draw, equivalent, of_file

SOURCE = '''
@cache(maxsize=1)
def f(a: int = 1, *b) -> "x < 2":
    """a < b"""
    if a < 3 and not b:  # é
        g(a, b)
        a += 1
    raise ValueError(1 + 1)
'''


def test_changes() -> None:
    found = {(m.old, m.new) for m in mutations("f.py", SOURCE)}
    assert found == {
        ("1", "2"), ("1", "0"), ("3", "4"), ("3", "2"), ("a < 3", "(a <= 3)"), ("not b", "(b)"),
        ("a < 3 and not b", "(a < 3 or not b)"), ("g(a, b)", "(g(b, a))"), ("g(a, b)", "pass"), ("a += 1", "pass"),
    }  # fmt: skip
    (flipped,) = (m for m in mutations("f.py", SOURCE) if m.old == "a < 3")
    assert flipped.key == "f.py: if a < 3 and not b:  # é: a < 3 -> (a <= 3)"
    assert flipped.applied(SOURCE) == SOURCE.replace("a < 3 and", "(a <= 3) and")


@pytest.mark.parametrize("area", areas())
def test_every_mutant_is_python_and_its_tests_are_there(area: str) -> None:
    for file, tests in areas()[area].files.items():
        source = (ROOT / "dilated_attention_pytorch" / file).read_text()
        for mutation in of_file(file)[::7]:
            compile(mutation.applied(source), file, "exec")
        files = [test.partition("::")[0] for test in tests if test.startswith("tests/")]
        assert files and all(Path(ROOT, name).exists() for name in files)


def test_the_draw_is_the_same_every_time_and_takes_every_area() -> None:
    drawn = draw(100, 0, [])
    assert drawn == draw(100, 0, []) != draw(100, 1, [])
    assert {area for area, _, _ in drawn} == set(areas()) and len({m.key for _, m, _ in drawn}) == 100


def test_the_limit_is_one_tests(tmp_path: Path) -> None:
    (tmp_path / "test_slow.py").write_text(
        "import time, pytest\n@pytest.mark.parametrize('i', range(4))\ndef test(i): time.sleep(1.5)\n"
    )
    (tmp_path / "test_hangs.py").write_text("import time\ndef test(): time.sleep(60)\n")
    script = (
        "import sys; from pathlib import Path; from mutants.judge import run_tests\n"
        "for name in ('test_slow.py', 'test_hangs.py'): print(run_tests(Path(sys.argv[1]), [name], 4.0)[0])"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    paths = {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))}
    done = subprocess.run(command, env=os.environ | paths, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["passed", "time"], done.stdout + done.stderr


def test_listed_mutants_exist_and_have_a_reason() -> None:
    for key, why in equivalent().items():
        assert key in {mutation.key for mutation in of_file(key.partition(":")[0])}, f"no longer there: {key}"
        assert len(why) > 20
