"""Draw README's picture: a riddle a row, small, large and bridged side by side, as one looping gif
made by the runtime.

python -m training.picture training/mini.gif
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from nexus_rt import NexusPipeline

PROMPTS = (
    (
        "the shape with three sides, in the colour of grapes, striped, moves the opposite way of"
        " left on a white background"
    ),
    (
        "of a star and a circle, the one that is not a circle, dotted, moves as smoke does. it is"
        " in what red and green light make together and on a black background"
    ),
)
PLANS = {"small alone": "small", "large alone": "large", "bridged, handoff=0.5": "handoff=0.5"}
ZOOM, GAP, LINE = 3, 10, 14
INK, PAPER = (235, 235, 235), (24, 24, 28)


def wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width` characters."""
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("--pair", type=Path, help="a pair folder (default: the mini pair)")
    parser.add_argument("--seed", type=int, default=3)
    args = parser.parse_args()
    pipe = NexusPipeline.from_pretrained(args.pair)
    columns = []
    for plan in PLANS.values():
        noise = [torch.Generator().manual_seed(args.seed + i) for i in range(len(PROMPTS))]
        columns.append(pipe(list(PROMPTS), plan=plan, rewrite="off", generator=noise).frames)
    clips = (np.stack(columns, 1) * 255).round().astype(np.uint8)  # [prompts, plans, F, H, W, 3]
    clips = clips.repeat(ZOOM, 3).repeat(ZOOM, 4)
    prompts, plans, frames, height, width, _ = clips.shape
    texts = [wrap(p, (plans * (width + GAP)) // 6) for p in PROMPTS]
    head = [LINE * (len(t) + 1) + GAP for t in texts]
    size = (plans * (width + GAP) + GAP, sum(head) + prompts * (height + GAP) + GAP)
    sheet = []
    for f in range(frames):
        image = Image.new("RGB", size, PAPER)
        draw, top = ImageDraw.Draw(image), GAP
        for p in range(prompts):
            for i, line in enumerate(texts[p]):
                draw.text((GAP, top + LINE * i), line, fill=INK)
            for k, label in enumerate(PLANS):
                left = GAP + k * (width + GAP)
                draw.text((left, top + head[p] - LINE - 2), label, fill=(150, 190, 255))
                image.paste(Image.fromarray(clips[p, k, f]), (left, top + head[p]))
            top += head[p] + height + GAP
        sheet.append(image.quantize(128, dither=Image.Dither.NONE))
    sheet[0].save(
        args.output,
        save_all=True,
        append_images=sheet[1:] + [sheet[-1]] * 8,
        duration=90,
        loop=0,
        optimize=True,
    )
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
