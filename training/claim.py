"""The paper's claim in miniature: does the bridge keep the small generator's meaning and the large
one's finish?

    python -m training.claim --json training/claim.json --plot training/claim.png

Runs every row below on riddles of held-out triples of kinds (306 prompts, three seeds), prints the
table in Markdown and draws accuracy against fidelity and quality against cost.
`--from training/claim.json` draws again without running.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from training.evaluate import Row, evaluate

LARGE = (  # the guidance it draws captions best with; bridged, it runs unguided
    "large,guidance=5,guidance_2=2"
)
ROWS = (
    "small",
    LARGE,
    "large",
    "reference",
    "reference,guidance=5,guidance_2=5",
    "reference,split=fft",
    "reference,split=dct",
    "reference,unguided=0.33",
    "handoff=0.3",
    "handoff=0.5",
    "handoff=0.5,split=fft",
    "handoff=0.5,split=dct",
    "handoff=0.6",
    "handoff=0.65",
    "handoff=0.6,unguided=0.33",
    "handoff=0.7",
    "auto=0.02",
    "auto=0.1",
    "auto=0.3",
    "small:50% bridge:2 large:20% bridge:1 small:*",
    "small:60% bridge:1 large:20% bridge:1 small:*",
)
FAMILIES = {
    "small": "black",
    "large": "black",
    "reference": "tab:purple",
    "handoff": "tab:blue",
    "auto": "tab:green",
}


def markdown(result: dict) -> str:
    """The table, chance and true renderings included."""
    low = result["chance"]
    lines = [
        (
            "| plan | shape | colour | motion | all three | spectrum distance | texture |"
            " steadiness | forwards small + large | ms a clip |"
        ),
        "|---|---|---|---|---|---|---|---|---|---|",
        (
            f"| chance | {low['shape']:.1%} | {low['colour']:.1%} | {low['motion']:.1%} |"
            f" {low['all']:.2%} | | | | | |"
        ),
    ]
    for name, r in result["rows"].items():
        a, b = r["interval"]
        runs = r.get("forwards")
        ms = "" if r.get("ms") is None else f"{r['ms']:.0f}"
        cost = f"{runs['small']} + {runs['large']} | {ms}" if runs else " | "
        plan = name if name == "true renderings" else f"`{name}`"
        lines.append(
            f"| {plan} | {r['shape']:.1%} | {r['colour']:.1%} | {r['motion']:.1%} |"
            f" **{r['all']:.1%}** [{a:.1%}, {b:.1%}] | {r['spectrum_distance']:.3f} |"
            f" {r['texture']:.3f} | {r['consistency']:.3f} | {cost} |"
        )
    return "\n".join(lines)


def verdict(result: dict) -> list[str]:
    """The claim's four sentences, each measured for every bridged plan, best first by what it keeps
    at least cost."""
    rows = result["rows"]
    small, large, full = rows["small"], rows[LARGE], rows["reference"]["forwards"]["large"]
    lines = [
        f"small alone {small['all']:.1%} right, large alone {large['all']:.1%}; "
        f"texture {small['texture']:.3f} and {large['texture']:.3f}"
    ]
    for name, r in rows.items():
        if name in ("small", "large", LARGE, "true renderings"):
            continue
        checks = {
            "meaning within 5 points of small": r["all"] >= small["all"] - 0.05,
            "25 points above large": r["all"] >= large["all"] + 0.25,
            "texture within 10% of large": r["texture"] >= 0.9 * large["texture"],
            "spectrum within 10% of large": (
                r["spectrum_distance"] <= 1.1 * large["spectrum_distance"]
            ),
            "at most half of reference's large forwards": r["forwards"]["large"] <= full / 2,
        }
        lines.append(
            f"{name}: "
            + "; ".join(f"{'yes' if ok else 'NO'} {what}" for what, ok in checks.items())
        )
    return lines


def plot(result: dict, path: Path) -> None:
    """Two panels: accuracy against texture similarity, and both against milliseconds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = {k: v for k, v in result["rows"].items() if k != "true renderings"}
    colour = lambda name: next(
        (c for f, c in FAMILIES.items() if name.split("=")[0].split(",")[0] == f), "tab:orange"
    )
    figure, (left, right) = plt.subplots(1, 2, figsize=(15, 5.6))
    for i, (name, r) in enumerate(rows.items(), 1):
        low, high = r["interval"]
        error = [[100 * (r["all"] - low)], [100 * (high - r["all"])]]
        left.errorbar(
            r["texture"], 100 * r["all"], yerr=error, fmt="o", color=colour(name), capsize=2, lw=0.8
        )
        left.annotate(
            str(i),
            (r["texture"], 100 * r["all"]),
            xytext=(5, 4),
            textcoords="offset points",
            fontsize=9,
        )
        left.plot([], [], " ", label=f"{i}  {name}")
        if r["ms"] is None:  # taken from another run
            continue
        right.plot(r["ms"], 100 * r["all"], "o", color=colour(name))
        right.annotate(
            str(i), (r["ms"], 100 * r["all"]), xytext=(5, 4), textcoords="offset points", fontsize=9
        )
        right.plot(r["ms"], 100 * r["texture"], "^", color=colour(name), mfc="none")
    left.axhline(100 * result["chance"]["all"], color="grey", lw=0.7, ls=":")
    left.set(
        title="Meaning against finish",
        xlabel="texture similarity to true renderings",
        ylim=(0, 100),
    )
    left.set(ylabel="riddles solved: shape, colour and motion right, %")
    right.set(
        title="Quality against cost (o: riddles solved, ^: texture)", ylabel="%", ylim=(0, 100)
    )
    right.set(xlabel="milliseconds of denoising a clip")
    for axis in (left, right):
        axis.grid(alpha=0.25)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="center right", handlelength=0, frameon=False)
    figure.tight_layout(rect=(0, 0, 0.77, 1))
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pair", type=Path, help="a pair folder (default: the mini pair)")
    parser.add_argument("--count", type=int, default=306)
    parser.add_argument("--batch", type=int, default=17)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--from", dest="source", type=Path, help="a result to draw again")
    args = parser.parse_args()
    if args.source:
        result = json.loads(args.source.read_text())
    else:
        result = evaluate(
            args.pair, [Row.parse(r) for r in ROWS], "riddles", args.count, args.batch, args.workers
        )
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(markdown(result))
    print("\n".join(["", *verdict(result)]))
    if args.plot:
        plot(result, args.plot)


if __name__ == "__main__":
    main()
