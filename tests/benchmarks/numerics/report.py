"""The report: tables for people, and answers to the questions that every fused QK norm meets."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

PATHS = ("unfused", "fused_norm", "fused")


def as_markdown(found: dict) -> str:
    """Write all sections as one Markdown text."""
    parts = [
        f"# Numerics of the QK-norm paths on {found['device']}",
        f"`{found['command']}`; Python {found['python']}, torch {found['torch']}, triton {found['triton']}; "
        + ", ".join(f"`{mode}` is {backend}" for mode, backend in found["backends"].items())
        + ".",
        _errors(found["errors"]),
        _exact_angles(found["exact_angles"]),
        _strange(found["strange"]),
        _invariance(found["invariance"]),
        _drift("the embedded model, held-out text", found["drift_demo"]),
        _drift("random weights of the given checkpoint, random tokens", found["drift_checkpoint"]),
        _perplexity(found["perplexity"]),
        _answers(found),
        _violations(found["violations"]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _errors(rows: list[dict]) -> str:
    groups: dict[tuple, list[dict]] = defaultdict(list)
    skipped = [row for row in rows if "skipped" in row]
    for row in rows:
        if "skipped" not in row:
            groups[row["dtype"], row["tokens"]].append(row)

    def line(key: tuple, group: list[dict]) -> list[str]:
        worst = [max(row[path]["rms_relative"] for row in group) for path in PATHS]
        ratio = max(row["fused"]["rms_relative"] / row["unfused"]["rms_relative"] for row in group)
        judged = sum(row["judged"] for row in group)
        held = sum(row["holds"] for row in group if row["judged"])
        return [
            key[0], str(key[1]), str(len(group)), *(f"{error:.2e}" for error in worst),
            f"{ratio:.3f}", f"{held} of {judged}",
        ]  # fmt: skip

    text = (
        "## Error against float64\n\nRMS relative error of q and k, the largest over heads and head widths; "
        "the ratio is the largest of `fused` to `unfused`. Judged (bf16, fp16: at most 1.02 times `unfused`, "
        "from 1024 heads on; fp32: at most 2e-6).\n\n"
    )
    heads = ("dtype", "tokens", "sizes", *PATHS, "largest ratio", "property holds")
    text += _table(heads, (line(key, group) for key, group in groups.items()))
    if skipped:
        text += "\n\nNot run, for want of memory: " + "; ".join(
            f"{row['heads']} x {row['head_dim']}, {row['tokens']} tokens, {row['dtype']}" for row in skipped
        )
    return text


def _exact_angles(rows: list[dict]) -> str:
    return (
        "## Error by position\n\nbf16, 16/8 heads of 128, against angles of float64: `unfused` rounds "
        "cos and sin to bf16, as the model file does, `fused` keeps them in fp32.\n\n"
        + _table(
            ("positions", *PATHS), ([row["positions"], *(f"{row[p]:.2e}" for p in PATHS)] for row in rows)
        )
    )


def _strange(rows: list[dict]) -> str:
    def cell(row: dict) -> str:
        if not row["others_keep_their_bits"]:
            return "CHANGES OTHER ROWS"
        if "own_is_zero" in row:
            return "zero" if row["own_is_zero"] else "NOT ZERO"
        return f"{row['own_rms_relative']:.1e}" if row["own_head_is_finite"] else "not finite, alone"

    cells = {(row["dtype"], row["row"], row["path"]): cell(row) for row in rows}
    keys = dict.fromkeys((row["dtype"], row["row"]) for row in rows)
    return (
        "## Strange rows\n\nOne token's qkv among 64 is replaced; all other rows must keep their bits. The "
        "figure is that row's own RMS relative error.\n\n"
        + _table(("dtype", "row", *PATHS), ([*key, *(cells[*key, path] for path in PATHS)] for key in keys))
    )


def _invariance(rows: list[dict]) -> str:
    def line(path: str) -> list[str]:
        mine = [row for row in rows if row["path"] == path]
        same = sum(not row["differ"] for row in mine)
        return [path, str(len(mine)), str(same)]

    return (
        "## One token's bits in any batch\n\nThe token alone, against the same token first, amid and last in "
        f"{rows[0]['batches']} batches of up to 4096 other tokens; shapes are heads x width x dtype.\n\n"
        + _table(("path", "shapes", "bitwise equal everywhere"), (line(path) for path in PATHS))
    )


def _drift(what: str, rows: list[dict]) -> str:
    if not rows:
        return ""
    return (
        f"## Drift of the logits: {what}\n\nOne prefill step, against fp32 on `unfused`, over every "
        "position.\n\n"
        + _table(
            (
                "dtype",
                "tokens",
                "path",
                "largest difference",
                "RMS relative",
                "mean KL",
                "largest KL",
                "same top 1",
            ),
            (
                [
                    row["dtype"],
                    row["tokens"],
                    row["path"],
                    f"{row['largest_logit_difference']:.4g}",
                    f"{row['rms_relative']:.3e}",
                    f"{row['mean_kl']:.2e}",
                    f"{row['largest_kl']:.2e}",
                    f"{100 * row['same_top_1']:.2f} %",
                ]
                for row in rows
            ),
        )
    )


def _perplexity(rows: list[dict]) -> str:
    ways = tuple(dict.fromkeys(row["scored"] for row in rows))
    values = {(row["dtype"], row["path"], row["scored"]): row["perplexity"] for row in rows}
    keys = dict.fromkeys((row["dtype"], row["path"]) for row in rows)
    lines = ([*key, *(f"{values[*key, way]:.4f}" for way in ways)] for key in keys)
    return (
        "## Perplexity\n\nThe embedded model on the last chapters of *Persuasion*, which it was not trained "
        "on. The first two columns score the same segments, in one prefill step and token by token.\n\n"
        + _table(("dtype", "path", *ways), lines)
    )


def _answers(found: dict) -> str:
    long = [row for row in found["errors"] if row["tokens"] >= 4096 and "skipped" not in row]
    narrow = [row for row in long if row["dtype"] != "float32"]
    lines = ["## The open questions"]
    if narrow:
        worst = {path: max(row[path]["rms_relative"] for row in narrow) for path in PATHS}
        most = max(row["tokens"] for row in narrow)
        lines.append(
            f"1. *Is it precise in a prefill of 4096 tokens and more?* From 4096 to {most} tokens the "
            f"largest RMS relative error is {worst['fused']:.2e} for `fused` and {worst['unfused']:.2e} for "
            "`unfused`; it does not grow with the number of tokens, for a row is computed alone."
        )
    drifting = [row for row in found["invariance"] if row["path"] == "fused" and row["differ"]]
    lines.append(
        "2. *Is there a numerical reason to fuse in decode only?* "
        + (
            "None was found: a token's bits under `fused` are the same alone and in every batch tried, so "
            "prefill and decode of a token agree bit by bit, given equal qkv."
            if not drifting
            else f"Under `fused` bits depend on the batch in {len(drifting)} shapes."
        )
    )
    lines.append(f"3. *What does it do to accuracy?* {_accuracy(found)}")
    lines.append(
        "4. *Is it faster in prefill?* See `fusewire bench kernels` and its `--claim kernel` and "
        "`--claim prefill`; their raw results lie beside this file."
    )
    lines.append(
        "5. *Is the path tested?* `tests/kernels` runs the kernel under an interpreter, compiles it for four "
        "architectures and, on a GPU, repeats the grid and watches it with compute-sanitizer."
    )
    return "\n\n".join([lines[0], "\n".join(lines[1:])])


def _accuracy(found: dict) -> str:
    rows = found["perplexity"]
    parts = []
    exact = {row["scored"]: row["perplexity"] for row in rows if row["dtype"] == "float32"}
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        spread = defaultdict(dict)
        for row in rows:
            if row["dtype"] == dtype:
                spread[row["scored"]][row["path"]] = row["perplexity"]
        most = max(abs(by["fused"] / by["unfused"] - 1) for by in spread.values())
        off = {path: max(abs(by[path] / exact[way] - 1) for way, by in spread.items()) for path in PATHS}
        parts.append(
            f"{100 * most:.4f} % in {dtype} (from fp32: `unfused` {100 * off['unfused']:.4f} %, "
            f"`fused` {100 * off['fused']:.4f} %)"
        )
    return (
        "Perplexity of held-out text on `fused` is within " + ", ".join(parts) + " of `unfused`, scored in "
        "prefill, in chunks and in decode; the drift of logits from fp32 is in the tables above."
    )


def _violations(wrong: list[str]) -> str:
    if not wrong:
        return "Nothing that was judged is violated."
    return "## VIOLATIONS\n\n" + "\n".join(f"- {line}" for line in wrong)
