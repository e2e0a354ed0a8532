"""Writes the tables of README and docs between their markers: `make tables`; or those named as arguments.

    <!-- table: NAME -->
    ...
    <!-- end -->

Speed comes from `benchmarks/results/` and `examples/results/`, the classes of transformers from `make hf-sweep`, the
support matrix from trying every cell. Tests fail when a page differs.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
EXAMPLES = ROOT / "examples" / "results"
# Cases of benchmarks/results are named by the first word, readers know the second.
MASKS = {"full": "bidirectional", "causal": "causal"}
MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def results(benchmark: str) -> list[dict[str, Any]]:
    """The committed results of a benchmark or an example, one a machine."""
    files = sorted(path for folder in (RESULTS, EXAMPLES) for path in folder.glob(f"{benchmark}_*.json"))
    found = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    return [result for result in found if result["benchmark"] == benchmark]


def said(result: dict[str, Any]) -> str:
    """Where the numbers come from."""
    machine, versions = result["machine"], result["versions"]
    where = (
        machine.get("gpu") or f"{machine['processor']}, {machine['threads']} thread{'s' * (machine['threads'] != 1)}"
    )
    if machine.get("gpus", 1) > 1:
        where = f"{machine['gpus']} x {where}"
    software = ", ".join(f"{name} {version}" for name, version in versions.items() if name in {"torch", "triton"})
    return f"{where} ({software}, {result['date']}), `{result['command']}`:"


def by_machine(benchmark: str, table: Callable[[dict[str, Any]], list[str]], *, gpu: bool = False) -> str:
    """A table of lines for each machine's results, under where they come from; with `gpu`, of GPUs alone."""
    found = [result for result in results(benchmark) if "gpu" in result["machine"] or not gpu]
    return "\n\n".join("\n".join([said(result), "", *table(result)]) for result in found)


def _row(result: dict[str, Any], case: str, who: str) -> dict[str, Any]:
    return next(row for row in result["rows"] if row["case"] == case and row["who"] == who)


def gpu_long() -> str:
    """A million tokens: time, TFLOP/s, and these in percent of dense cuDNN attention's."""

    def table(result: dict[str, Any]) -> list[str]:
        lines = ["| | D=64, H=12 | D=128, H=6 |", "|---|---|---|"]
        for passes, title in (("fwd", "forward"), ("fwd+bwd", "forward+backward")):
            for mask in ("full", "causal"):
                rows = [_row(result, f"{shape} {mask} {passes} N=1M", "auto") for shape in ("D=64", "D=128")]
                cells = [f"{r['ms']:.1f} ms, {r['tflops']:.0f} TFLOP/s, {r['ratio']:.0%}" for r in rows]
                lines.append(f"| {title}, {MASKS[mask]} | {cells[0]} | {cells[1]} |")
        return lines

    return by_machine("gpu", table)


def gpu_patterns() -> str:
    """Other patterns, this backend and sdpa."""

    def table(result: dict[str, Any]) -> list[str]:
        lines = ["| pattern | N | pass | `triton` ms | `sdpa` ms | quotient |", "|---|---|---|---|---|---|"]
        for row in result["rows"]:
            match = re.fullmatch(r"(paper rates|slide) full (fwd|fwd\+bwd) N=(\d+)", row["case"])
            if match and row["who"] == "auto":
                other = _row(result, row["case"], "sdpa")
                name, passes, n = match.groups()
                times = f"{row['ms']:.2f} | {other['ms']:.2f} | {other['ms'] / row['ms']:.1f}"
                lines.append(f"| {name} | {int(n):,} | {passes} | {times} |")
        return lines

    return by_machine("gpu", table)


def patterns() -> str:
    """What users take beside the benchmark's own pattern: rate beside dense cuDNN, and time beside sdpa."""

    def table(result: dict[str, Any]) -> list[str]:
        head = "| pattern, pass | ms | pattern rate | computed | of dense cuDNN | over `sdpa` | added memory |"
        lines = [head, "|---|---|---|---|---|---|---|"]
        for row in result["rows"]:
            if row["who"] == "auto" and "ms" in row:
                other = _row(result, row["case"], "sdpa")
                cells = [
                    row["case"],
                    f"{row['ms']:.2f}",
                    f"{row['tflops']:.0f} TFLOP/s",
                    f"{row['computed_tflops']:.0f}",
                ]
                cells += [f"{row['ratio']:.0%}", f"{other['ms'] / row['ms']:.1f}x", f"{row['peak_gib']:.1f} GiB"]
                lines.append(f"| {' | '.join(cells)} |")
        return lines

    return by_machine("patterns", table)


def gpu_short() -> str:
    """Short sequences beside dense attention, the losses included."""
    who = {"auto": "as called", "auto *": "in a CUDA graph", "dense flash": "dense flash", "dense cuDNN": "dense cuDNN"}

    def table(result: dict[str, Any]) -> list[str]:
        lines = ["| N | mask | " + " | ".join(who.values()) + " |", "|---|---|" + "---|" * len(who)]
        for mask in ("full", "causal"):
            for n in (1024, 2048, 4096, 8192, 16384, 65536):
                times = [_row(result, f"D=64 {mask} fwd N={n}", name)["ms"] for name in who]
                lines.append(f"| {n:,} | {MASKS[mask]} | " + " | ".join(f"{t:.3f} ms" for t in times) + " |")
        return lines

    return by_machine("gpu", table)


def cpu() -> str:
    """The CPU path against attention calls alone."""

    def table(result: dict[str, Any]) -> list[str]:
        lines = ["| N | mask | op | calls alone | quotient | peak over inputs |", "|---|---|---|---|---|---|"]
        for row in result["rows"]:
            lines.append(
                f"| {row['n']:,} | {MASKS[row['mask']]} | {row['seconds']:.2f} s | {row['alone_seconds']:.2f} s | "
                f"{row['ratio']:.2f} | {row['peak_mib']:.0f} MiB |"
            )
        return lines

    return by_machine("cpu", table)


def ring() -> str:
    """One GPU and a ring of several on the same work; what each of four ranks computes."""

    def table(result: dict[str, Any]) -> list[str]:
        lines = ["| | one GPU | ring | |", "|---|---|---|---|"]
        for row in result["rows"]:
            if "ring_ms" in row:
                gain = f"{row['rate']:.2f}x the rate" if "rate" in row else f"{row['ratio']:.2f}x"
                lines.append(f"| {row['case']} | {row['one_ms']:.0f} ms | {row['ring_ms']:.0f} ms | {gain} |")
        alone = next(row for row in result["rows"] if row["case"] == "exchange alone")
        lines += ["", f"The exchange alone takes {alone['sparse_ms']:.1f} ms with packing, gathering dense K and V "
                  f"{alone['dense_ms']:.1f} ms."]  # fmt: skip
        return lines

    def shares(result: dict[str, Any]) -> list[str]:
        lines = ["| one GPU computes the shares of | ms of each | at most |", "|---|---|---|"]
        for row in result["rows"]:
            times = ", ".join(f"{x:.0f}" for x in row["rank_ms"])
            lines.append(f"| {row['case']} | {times} | {row['at_most']:.2f}x one GPU's {row['one_ms']:.0f} ms |")
        return lines

    return "\n\n".join((by_machine("ring", table), by_machine("ring_shares", shares)))


def slides() -> str:
    """The slide encoder on a GPU: inference and fine-tuning, beside sdpa and with checkpointing."""

    def table(result: dict[str, Any]) -> list[str]:
        rows = {row["case"]: row for row in result["rows"]}
        head = "| tiles | inference | with `sdpa` | fine-tuning step | with `sdpa` | step with checkpointing |"
        lines = [head, "|---|---|---|---|---|---|"]
        for n in sorted({row["tiles"] for row in result["rows"] if "tiles" in row}):
            cells = [f"{n:,}"]
            for job, who in (("inference", "triton"), ("inference", "sdpa"), ("fine-tuning", "triton"),
                             ("fine-tuning", "sdpa"), ("fine-tuning, checkpointing", "triton")):  # fmt: skip
                row = rows[f"{n:,} tiles, {job}, zero_keys, {who}"]
                cells.append(f"{row['ms']:.0f} ms, {row['peak_gib']:.1f} GiB")
            lines.append("| " + " | ".join(cells) + " |")
        return lines

    return by_machine("slides", table, gpu=True)


def streaming() -> str:
    """Streaming beside copies and computing alone."""

    def table(result: dict[str, Any]) -> list[str]:
        head = "| tokens | | whole | copies | computing | ratio | moved | memory |"
        lines = [head, "|---|---|---|---|---|---|---|---|"]
        for row in result["rows"]:
            times = [f"{row[x]:.2f} s" if x in row else "" for x in ("seconds", "copies", "compute")]
            ratio = f"{row['ratio']:.2f}" if "ratio" in row else ""
            memory = f"{row['rss_gib']:.2f} GiB resident" if "rss_gib" in row else f"{row['device_gib']:.1f} GiB of GPU"
            cells = [f"{row['tokens']:,}", row["what"], *times, ratio, f"{row['gib']:.0f} GiB", memory]
            lines.append("| " + " | ".join(cells) + " |")
        return lines

    return by_machine("streaming", table)


def generation() -> str:
    """A token's time on a GPU, beside what its bytes take and beside a dense model of the same size."""

    def table(result: dict[str, Any]) -> list[str]:
        lines = ["| | ms a token | its bytes alone | kernels | device works | memory |", "|---|---|---|---|---|---|"]
        prompts = ["", "| prompt | first call | next | memory |", "|---|---|---|---|"]
        for row in result["rows"]:
            memory = f"{row['peak_gib']:.1f} GiB |"
            if row["case"].startswith("prefill"):
                times = f"{row['first_s']:.1f} s | {row['s']:.2f} s"
                prompts.append(f"| {row['case'].removeprefix('prefill ')} | {times} | {memory}")
            elif not row["case"].startswith("stream"):
                floor = f"{row['floor_ms']:.2f} ms" if "floor_ms" in row else ""
                kernels = f"{row['kernels']:.0f} | {row['share']:.0%}" if "kernels" in row else " | "
                lines.append(f"| {row['case']} | {row['ms']:.2f} | {floor} | {kernels} | {memory}")
        return lines + prompts

    return by_machine("generation", table, gpu=True)


def slide_folder() -> str:
    """`slide embed` on a folder of made slides, the program's start included."""

    def table(result: dict[str, Any]) -> list[str]:
        lines = ["| | tiles | seconds | slides a minute | GPU in use | GPU memory | host memory |"]
        lines.append("|---|---|---|---|---|---|---|")
        for row in result["rows"]:
            gpu = f"{row['gpu_use_percent']:.0f}% | {row['gpu_peak_gib']:.1f} GiB" if "gpu_peak_gib" in row else " | "
            times = f"{row['seconds']:.0f} | {row['slides_per_minute']:.0f}"
            lines.append(f"| {row['case']} | {row['tiles']:,} | {times} | {gpu} | {row['peak_gib']:.1f} GiB |")
        return lines

    return by_machine("slide_folder", table)


def quality() -> str:
    """Byte models trained from scratch, by context and attention: means of seeds."""

    def table(result: dict[str, Any]) -> list[str]:
        head = "| context | attention | bits per byte | last quarter | digits to 1,024 | beyond | bytes/s | memory |"
        lines = [head, "|---|---|---|---|---|---|---|---|"]
        shortest = min(row["context"] for row in result["rows"])
        base = {row["seed"]: row for row in result["rows"] if (row["attention"], row["context"]) == ("dense", shortest)}
        kinds = sorted({(row["context"], row["attention"]) for row in result["rows"]})
        for context, attention in kinds:
            rows = [r for r in result["rows"] if (r["context"], r["attention"]) == (context, attention)]
            quarter = f"{3 * context // 4}-{context}"
            late = [row["by_position"][str(context)][quarter] for row in rows]
            known = [row for row in rows if row["seed"] in base]  # the same bytes, read with the shortest context
            before = [base[row["seed"]]["by_position"][str(context)][quarter] for row in known]
            gain = f" ({fmean(late) - fmean(before):+.3f})" if before and len(known) == len(rows) else ""
            found = [(int(distance), share) for row in rows for distance, share in row["retrieved"].items()]
            near = [share for distance, share in found if distance <= 1024]
            far = [share for distance, share in found if distance > 1024]
            cells = [f"{context:,}", attention, f"{fmean(row['bits_per_byte'] for row in rows):.3f}"]
            cells.append(f"{fmean(late):.3f}{gain}")
            cells += [f"{fmean(shares):.0%}" if shares else "" for shares in (near, far)]
            cells.append(f"{fmean(row['bytes_per_second'] for row in rows):,.0f}")
            lines.append("| " + " | ".join([*cells, f"{max(row['peak_gib'] for row in rows):.1f} GiB"]) + " |")
        return lines

    return by_machine("quality", table)


def smollm() -> str:
    """A pretrained model by which of its layers are dilated, before and after tuning, beside the dense one's tuning."""

    def table(result: dict[str, Any]) -> list[str]:
        head = "| context, steps | dilated layers | before | after | less dense | training | forward | memory |"
        lines = [head, "|---|---|---|---|---|---|---|---|"]
        tuned = [row for row in result["rows"] if "after" in row]
        dense = {row["context"]: row["after"]["mean"] for row in tuned if not row["dilated"]}
        for row in tuned:
            after, base = row["after"]["mean"], dense.get(row["context"])
            cells = [f"{row['context']:,}, {row['steps']}", f"{row['recipe']} ({row['dilated']} of {row['layers']})"]
            cells += [f"{row['before']['mean']:.3f}", f"{after:.3f}", "" if base is None else f"{after - base:+.3f}"]
            cells += [f"{row[f'{x}_tokens_per_second']:,.0f} tokens/s" for x in ("training", "forward")]
            cells.append("" if row["peak_gib"] is None else f"{row['peak_gib']:.1f} GiB")
            lines.append(f"| {' | '.join(cells)} |")
        return lines

    return by_machine("smollm", table) or "Not measured yet."


def hf_classes() -> str:
    """Classes of transformers under one covering branch: equal, or refused and why."""
    record = json.loads((ROOT / "docs" / "huggingface_classes.json").read_text(encoding="utf-8"))
    groups: dict[str, list[str]] = {}
    for name, found in record["classes"].items():
        groups.setdefault(_hf_kind(found), []).append(name)
    order = sorted(groups, key=lambda kind: (kind.startswith("not run"), kind.startswith("refused"), kind))
    lines = [f"transformers {record['transformers']}, `make hf-sweep`:", "", "| | | classes |", "|---|---|---|"]
    for kind in order:
        # Those that did not run say nothing of this library, so their names would be noise.
        names = "" if kind.startswith("not run") else ", ".join(groups[kind])
        lines.append(f"| {kind} | {len(groups[kind])} | {names} |")
    return "\n".join(lines)


def _hf_kind(found: str) -> str:
    """What the classes of one row have in common."""
    verdict, _, why = found.partition(": ")
    if verdict == "unchanged":
        return "unchanged: every layer that ran has a mask of its own"
    if verdict == "not run":
        return f"not run: {why.partition(' (')[0].partition(': ')[0]}"
    if given := re.search(r"ask for plain attention .*?, got (.*), which", why):
        return "refused: " + ", ".join(f"`{x}`" for x in re.findall(r"(\w+)=", given.group(1)))
    shorter = {
        "adds the mask to its scores itself": "attention outside the interface reads the mask",
        "reads the last one": "padded only: the model reads the last token, hidden or not",
        "of shape (batch, keys)": "a mask of numbers that the model makes",
        "has none that can be replaced": "the interface is not all of its attention",
    }
    return next((f"refused: {kind}" for part, kind in shorter.items() if part in why), found)


def support() -> str:
    """What each backend computes."""
    sys.path.insert(0, str(Path(__file__).parent))
    import support as matrix

    return matrix.table()


# From committed files, in no time.
QUICK: dict[str, Callable[[], str]] = {
    "gpu-long": gpu_long, "gpu-patterns": gpu_patterns, "patterns": patterns, "gpu-short": gpu_short,
    "cpu": cpu, "ring": ring,
    "slides": slides, "slide-folder": slide_folder, "streaming": streaming, "generation": generation,
    "quality": quality, "hf-classes": hf_classes,


    "smollm": smollm,
}  # fmt: skip
# By computing something.
TRIED: dict[str, Callable[[], str]] = {"support": support}


def pages() -> list[Path]:
    """Every page that may hold a table."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def rewritten(text: str, tables: dict[str, str]) -> str:
    """The page with these tables as they are now; others stay."""

    def fill(match: re.Match[str]) -> str:
        start, name, _, end = match.groups()
        return f"{start}{tables[name]}\n{end}" if name in tables else match.group(0)

    return MARKED.sub(fill, text)


def names(text: str) -> list[str]:
    """The tables that a page holds."""
    return [match.group(2) for match in MARKED.finditer(text)]


def main() -> None:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported
    made: dict[str, str] = {}
    for path in pages():
        text = path.read_text(encoding="utf-8")
        for name in names(text):
            if name not in made and name in (sys.argv[1:] or [name]):
                made[name] = (QUICK | TRIED)[name]()
        new = rewritten(text, made)
        if new != text:
            path.write_text(new, encoding="utf-8")
            print(f"written: {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
