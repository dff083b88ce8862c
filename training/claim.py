"""The paper's claim in miniature: does the bridge keep the small generator's meaning and the large
one's finish?

    python -m training.claim --json training/claim.json --plot training/claim.png

Runs every row below on riddles of held-out triples of kinds (306 prompts, three seeds), prints the
table in Markdown and draws accuracy against fidelity and quality against cost. Each row is tested
against the old default on the same prompts (McNemar).
`--from training/claim.json` draws again without running.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from pathlib import Path

from nexus_rt.method.plan_options import has_clocks
from training.evaluate import Row, evaluate

OLD = "handoff=0.65,rewrite=off"  # the default before there were clocks and rewriting
NEW = "small:6/11 large:4@3/guidance-every=2,rewrite=auto"  # the mini pair's default
LARGE = (  # the guidance it draws captions best with, told the riddle
    "large,guidance=5,guidance_2=2,rewrite=off"
)
ROWS = (
    "small",
    LARGE,
    "large,guidance=5,guidance_2=2,rewrite=auto",
    "reference,rewrite=off",
    "handoff=0.5,rewrite=off",
    OLD,
    "handoff=0.65,rewrite=auto",
    NEW,
    NEW.replace("auto", "free"),
    NEW.replace("auto", "off"),
    "small:5/10 large:4@3/guidance-every=2,rewrite=auto",
    "small:4/10 large:4@2/guidance-every=2,rewrite=auto",
    "small:6/11 large:6@3/every=2/guidance-every=2,rewrite=auto",
    "small:6/11 large:6@3/adaptive=0.2/guidance-every=2,rewrite=auto",
    "small:8 renoise=0.75 large:4@2/guidance-every=2,rewrite=auto",
)
FAMILIES = {
    "small": "black",
    "large": "black",
    "reference": "tab:purple",
    "handoff": "tab:blue",
    "auto": "tab:green",
    "clocks": "tab:red",
    "segments": "tab:orange",
}


def paired(result: dict, name: str, base: str = OLD) -> tuple[int, int, float]:
    """Prompts that a row alone gets right, that the base alone does, and McNemar's exact two-sided
    p of the difference."""
    rows = result["rows"]
    pairs = list(zip(rows[name]["right"], rows[base]["right"], strict=True))
    won, lost = pairs.count(("1", "0")), pairs.count(("0", "1"))
    tail = sum(math.comb(won + lost, k) for k in range(min(won, lost) + 1)) / 2 ** (won + lost)
    return won, lost, min(1.0, 2 * tail)


def markdown(result: dict) -> str:
    """The table, chance and true renderings included."""
    low = result["chance"]
    lines = [
        (
            "| plan | shape | colour | motion | all three | against the old default, p | distance"
            " through the VAE | texture | steadiness | forwards small + large | units | ms a clip |"
        ),
        "|---" * 12 + "|",
        (
            f"| chance | {low['shape']:.1%} | {low['colour']:.1%} | {low['motion']:.1%} |"
            f" {low['all']:.2%}" + " |" * 8
        ),
    ]
    for name, r in result["rows"].items():
        a, b = r["interval"]
        runs = r.get("forwards")
        cost = (
            f"{runs['small']} + {runs['large']} | {r['units']} | {r['ms']:.0f}" if runs else " | | "
        )
        against = ""
        if runs and name != OLD:
            won, lost, p = paired(result, name)
            against = f"+{won} -{lost}, {p:.2g}"
        plan = f"`{name}`" if runs else name
        lines.append(
            f"| {plan} | {r['shape']:.1%} | {r['colour']:.1%} | {r['motion']:.1%} |"
            f" **{r['all']:.1%}** [{a:.1%}, {b:.1%}] | {against} | {r['spectrum_distance']:.3f} |"
            f" {r['texture']:.3f} | {r['consistency']:.3f} | {cost} |"
        )
    return "\n".join(lines)


def verdict(result: dict) -> list[str]:
    """What was wanted of a plan, measured for every row that both generators draw."""
    lines = []
    for name, r in result["rows"].items():
        if "forwards" not in r or min(r["forwards"].values()) == 0:
            continue
        checks = {
            "93% right": r["all"] >= 0.93,
            "distance through the VAE at most .06": r["spectrum_distance"] <= 0.06,
            "texture at least .78": r["texture"] >= 0.78,
            "at most 48 units": r["units"] <= 48,
        }
        lines.append(
            f"{name}: "
            + "; ".join(f"{'yes' if ok else 'NO'} {what}" for what, ok in checks.items())
        )
    return lines


def _family(plan: str) -> str:
    """The family of a plan, by its words."""
    if has_clocks(plan):
        return "clocks"
    return "segments" if ":" in plan else plan.split("=")[0]


def plot(result: dict, path: Path) -> None:
    """Two panels: accuracy against the distance through the VAE, and against cost."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = {k: v for k, v in result["rows"].items() if "forwards" in v}
    colour = lambda name: FAMILIES[_family(name.split(",")[0])]
    figure, (left, right) = plt.subplots(1, 2, figsize=(17, 5.6))
    for i, (name, r) in enumerate(rows.items(), 1):
        low, high = r["interval"]
        error = [[100 * (r["all"] - low)], [100 * (high - r["all"])]]
        left.errorbar(
            r["spectrum_distance"],
            100 * r["all"],
            yerr=error,
            fmt="o",
            color=colour(name),
            capsize=2,
            lw=0.8,
        )
        left.annotate(
            str(i),
            (r["spectrum_distance"], 100 * r["all"]),
            xytext=(5, 4),
            textcoords="offset points",
            fontsize=9,
        )
        left.plot([], [], " ", label=f"{i}  {name}")
        right.plot(r["units"], 100 * r["all"], "o", color=colour(name))
        right.annotate(
            str(i),
            (r["units"], 100 * r["all"]),
            xytext=(5, 4),
            textcoords="offset points",
            fontsize=9,
        )
        right.plot(r["units"], 100 * r["texture"], "^", color=colour(name), mfc="none")
    left.axhline(100 * result["chance"]["all"], color="grey", lw=0.7, ls=":")
    left.set(
        title="Meaning against finish",
        xlabel="distance of the spectrum to true clips through the VAE",
        ylim=(0, 100),
    )
    left.set(ylabel="riddles solved: shape, colour and motion right, %")
    right.set(
        title="Quality against cost (o: riddles solved, ^: texture)", ylabel="%", ylim=(0, 100)
    )
    right.set(xlabel="units of denoising a clip: small forward 1, large forward 6")
    for axis in (left, right):
        axis.grid(alpha=0.25)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="center right", handlelength=0, frameon=False)
    figure.tight_layout(rect=(0, 0, 0.7, 1))
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
