"""Every code block of README and docs: Python runs, commands exist; tables are as their generator writes them."""

from __future__ import annotations

import importlib.util
import re
import shlex
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    p for p in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))] if p.is_file()
]
FENCE = re.compile(r"^(?:<!-- ?([^\n]*?) ?-->\n)?( *)```(\w+)[^\n]*\n(.*?)^\2```$", re.MULTILINE | re.DOTALL)
# Why a Python block may stay unrun, and how many there are: one more is added here on purpose.
REASONS = {"needs torchrun": 4, "needs a GPU": 1, "needs weights": 2, "takes minutes": 1}
SHELL = {"sh", "bash", "console", "shell"}


class Block(NamedTuple):
    """A fenced block, the comment on the line before it, and the line its first statement stands on."""

    comment: str
    language: str
    source: str
    line: int


def blocks(text: str) -> list[Block]:
    return [
        Block(m.group(1) or "", m.group(3), m.group(4), text.count("\n", 0, m.start(4)) + 1)
        for m in FENCE.finditer(text)
    ]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def is_left_out(block: Block) -> bool:
    return block.comment.startswith("not run:")


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, sharing their names, as a reader would type them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.language in {"python", "py"} and not is_left_out(block):
            # Blank lines in front make a traceback name the page's own line.
            exec(compile("\n" * (block.line - 1) + block.source, str(page), "exec"), names)


def test_the_blocks_left_out_are_known() -> None:
    counts = dict.fromkeys(REASONS, 0)
    for page in PAGES:
        for block in blocks(page.read_text(encoding="utf-8")):
            if is_left_out(block):
                reason = block.comment.removeprefix("not run:").strip()
                assert reason in REASONS, (
                    f"{name_of(page)} line {block.line}: {reason!r} is no reason, {list(REASONS)} are"
                )
                compile(block.source, str(page), "exec")
                counts[reason] += 1
    assert counts == REASONS


def commands(block: Block) -> list[tuple[int, list[str]]]:
    """The commands of a shell block as words, each with its line; of a session, what stands behind the prompt."""
    found = []
    source = block.source.replace("\\\n", "  ")
    for i, line in enumerate(source.splitlines()):
        if block.language == "console":
            if not line.startswith("$ "):
                continue
            line = line[2:]
        words = shlex.split(line, comments=True)
        while words and (re.fullmatch(r"[A-Z_]+=.*", words[0]) or words[0] == "time"):
            words = words[1:]
        if words:
            found.append((block.line + i, words))
    return found


def problem(words: list[str]) -> str | None:
    """What is wrong with a command, or None."""
    program, arguments = words[0].removeprefix(".venv/bin/"), words[1:]
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        return next(
            (f"no target {a!r}" for a in arguments if "=" not in a and not a.startswith("-") and a not in targets), None
        )
    if program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
            "optional-dependencies"
        ]
        asked = [e for a in arguments for e in re.findall(r"\[(.*?)\]", a) for e in e.split(",")]
        return next((f"no extra {e!r}" for e in asked if e not in extras), None)
    if program == "dilated-attention":
        return dilated_attention_problem(arguments)
    if program in {"python", "python3", "torchrun", "accelerate"}:
        return script_problem(arguments)
    return (
        None
        if program in {"cd", "git", "ls", "tensorboard", "pytest", "pre-commit"}
        else f"unknown command {program!r}"
    )


def dilated_attention_problem(arguments: list[str]) -> str | None:
    typer = pytest.importorskip("typer")
    from dilated_attention_pytorch.cli.app import app

    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands") and arguments and not arguments[0].startswith("-"):
        if arguments[0] not in command.commands:
            return f"no command {arguments[0]!r}, there are {sorted(command.commands)}"
        command, arguments = command.commands[arguments[0]], arguments[1:]
    known = {"--help", *(o for p in command.params for o in (*p.opts, *p.secondary_opts))}
    given = [a.partition("=")[0] for a in arguments if re.match(r"--?[a-z]", a)]
    return next((f"no option {o!r}" for o in given if o not in known), None)


def script_problem(arguments: list[str]) -> str | None:
    for i, argument in enumerate(arguments):
        if argument == "-m":
            module = arguments[i + 1]
            path = ROOT / (module.replace(".", "/") + ".py")
            mains = [path, ROOT / module.replace(".", "/") / "__main__.py"]
            if not any(p.is_file() for p in mains) and importlib.util.find_spec(module.split(".")[0]) is None:
                return f"no module {module!r}"
            if (
                module == "benchmarks"
                and len(arguments) > i + 2
                and not (ROOT / f"benchmarks/{arguments[i + 2]}.py").is_file()
            ):
                return f"no benchmark {arguments[i + 2]!r}"
            return None
        if argument.endswith(".py"):
            script = ROOT / argument
            if argument == "this_file.py":
                return None
            if not script.is_file():
                return f"no file {argument!r}"
            source = script.read_text(encoding="utf-8")
            options = [a.partition("=")[0] for a in arguments[i + 1 :] if a.startswith("--")]
            return next((f"{argument} has no option {o!r}" for o in options if f'"{o}"' not in source), None)
    return None


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_exist(page: Path) -> None:
    wrong = [
        f"line {line}: {shlex.join(words)}: {what}"
        for block in blocks(page.read_text(encoding="utf-8"))
        if block.language in SHELL
        for line, words in commands(block)
        if (what := problem(words)) is not None
    ]
    assert not wrong, f"{name_of(page)}: " + "; ".join(wrong)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_tables_are_as_the_generator_writes_them(page: Path) -> None:
    """Those made from committed files; the support matrix is tried cell by cell in test_support.py."""
    tables, text = load(ROOT / "docs" / "tables.py"), page.read_text(encoding="utf-8")
    held = tables.names(text)
    assert set(held) <= set(tables.QUICK | tables.TRIED), f"{name_of(page)} holds unknown tables: {held}"
    fresh = tables.rewritten(text, {name: tables.QUICK[name]() for name in held if name in tables.QUICK})
    assert fresh == text, f"{name_of(page)}: a table differs from its source; run `make tables`"


class TestTheReaderItself:
    """A check that finds nothing is green as well."""

    def test_blocks(self) -> None:
        text = "a\n\n<!-- not run: needs a GPU -->\n```python\nx = 1\n```\n\n```sh\nls\n```\n"
        found = blocks(text)
        assert found[0] == Block("not run: needs a GPU", "python", "x = 1\n", 5)
        assert is_left_out(found[0])
        assert found[1] == Block("", "sh", "ls\n", 9)
        assert sum(len(blocks(p.read_text(encoding="utf-8"))) for p in PAGES) > 40

    def test_commands(self) -> None:
        session = Block(
            "", "console", "$ make test  # all\noutput\n$ A=1 time dilated-attention plan \\\n    -n 5\n", 1
        )
        assert [words for _, words in commands(session)] == [["make", "test"], ["dilated-attention", "plan", "-n", "5"]]

    @pytest.mark.parametrize(
        "line",
        [
            "make no-such-target", "pip install 'dilated-attention-pytorch[nothing]'", "dilated-attention fly",
            "dilated-attention slide fly",
            "dilated-attention plan --no-such-option 3", "python benchmarks/nothing.py", "python -m benchmarks nothing",
            "torchrun --nproc-per-node 2 benchmarks/ring.py --no-such-option", "rm -rf x",
        ],
    )  # fmt: skip
    def test_wrong_commands_are_found(self, line: str) -> None:
        assert problem(shlex.split(line)) is not None

    def test_a_changed_table_is_found(self) -> None:
        tables, text = load(ROOT / "docs" / "tables.py"), (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
        assert "gpu-long" in tables.names(text)
        changed = text.replace("TFLOP/s, 9", "TFLOP/s, 8", 1)
        assert changed != text
        assert tables.rewritten(changed, {"gpu-long": tables.gpu_long()}) == text


def test_the_ranges_in_the_readme_are_the_results() -> None:
    """The sentences that say in words what the tables say."""
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    result = max(load(ROOT / "docs" / "tables.py").results("gpu"), key=lambda result: result["date"])
    (patterns,) = load(ROOT / "docs" / "tables.py").results("patterns")
    ours = {row["case"]: row for row in patterns["rows"] if row["who"] == "auto" and "ratio" in row}

    def both(case: str, kind: str, end: str = " N=1048576") -> tuple[str, str]:
        """Forward, and forward and backward."""
        rows = ours[f"{case}{end} fwd"], ours[f"{case}{end} fwd+bwd"]
        return tuple(f"{row['ms']:.1f}" if kind == "ms" else f"{row['ratio']:.0%}" for row in rows)  # type: ignore[return-value]

    reaching, five = "w=2048*4^i reaching all, D=64", "five branches, D="
    times = both(f"{reaching} bidirectional", "ms"), both(f"{reaching} causal", "ms")
    rates = both(f"{reaching} bidirectional", "rate"), both(f"{reaching} causal", "rate")
    said = "takes {} ms forward and {} with backward on an H200, causal {} and {}: {}, {}, {} and {} of dense cuDNN"
    assert said.format(*times[0], *times[1], *rates[0], *rates[1]) in readme, (times, rates)
    fixed = both(f"{five}64 bidirectional", "rate"), both(f"{five}128 bidirectional", "rate")
    assert "{} and {} of it, at heads of 128 {} and {}".format(*fixed[0], *fixed[1]) in readme, fixed
    (cpu,) = load(ROOT / "docs" / "tables.py").results("cpu")
    ratios = [row["ratio"] for row in cpu["rows"]]
    assert f"On a CPU the whole op takes {min(ratios):.2f} to {max(ratios):.2f} times" in readme, ratios
    (ring,) = load(ROOT / "docs" / "tables.py").results("ring")
    million = "two remote branches, 1048576 tokens, forward+backward"
    (gain,) = (row["ratio"] for row in ring["rows"] if row["case"] == million)
    assert ring["machine"]["gpus"] == 2 and f"two H100s do a million tokens {gain:.2f} times as fast as one" in readme
    short = {row["who"]: 1e3 * row["ms"] for row in result["rows"] if row["case"] == "D=64 full fwd N=1024"}
    for ours_, dense in (("auto", "dense flash"), ("auto *", "dense flash *")):
        assert f"{short[ours_]:.0f} us against {short[dense]:.0f} us" in readme, (ours_, short)


@pytest.mark.parametrize("path", [p for p in PAGES if p.name != "CONTRIBUTING.md"], ids=lambda p: p.name)
def test_no_code_line_is_wider_than_the_column(path: Path) -> None:
    """The site shows 88 characters; longer lines would be cut. Tables that the command line draws may be wider."""
    inside, wide = False, []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("```"):
            inside = not inside
        elif inside and len(line) > 88 and not line.startswith(tuple("│┃┏┡└╭╰")):
            wide.append(f"line {number}: {len(line)} characters")
    assert not wide, "\n".join(wide)


def test_no_example_of_a_docstring_is_wider_than_the_column() -> None:
    """They stand on the page of the API."""
    wide = [
        f"{name_of(path)}, line {number}: {len(line.strip())} characters"
        for path in sorted((ROOT / "dilated_attention_pytorch").rglob("*.py"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if line.lstrip().startswith((">>> ", "... ")) and len(line.strip()) > 88
    ]
    assert not wide, "\n".join(wide)
