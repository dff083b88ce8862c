"""Draw README's picture: rows of prompts, columns of plans, as one looping gif made by the runtime.

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
    "a striped red circle moves left on a black background",
    "a dotted blue star moves up on a sand background",
    "a striped green cross moves right on a white background",
    "a purple triangle moves down on a grey background",
)
PLANS = ("small", "large", "handoff=0.7")
ZOOM, GAP, LABEL = 2, 6, 84


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--pair", type=Path, help="a pair folder (default: the mini pair)")
    parser.add_argument("--plans", nargs="+", default=PLANS)
    parser.add_argument("--seed", type=int, default=3)
    args = parser.parse_args()
    pipe = NexusPipeline.from_pretrained(args.pair)
    columns = []
    for plan in args.plans:
        noise = [torch.Generator().manual_seed(args.seed + i) for i in range(len(PROMPTS))]
        columns.append(pipe(list(PROMPTS), plan=plan, generator=noise).frames)
    clips = (np.stack(columns) * 255).round().astype(np.uint8)  # [plans, prompts, F, H, W, 3]
    clips = clips.repeat(ZOOM, 3).repeat(ZOOM, 4)
    plans, prompts, frames, height, width, _ = clips.shape
    size = (prompts * (width + GAP) + GAP + LABEL, plans * (height + GAP) + GAP)
    sheet = []
    for f in range(frames):
        image = Image.new("RGB", size, (24, 24, 28))
        draw = ImageDraw.Draw(image)
        for p in range(plans):
            top = GAP + p * (height + GAP)
            draw.text((GAP, top + height // 2 - 6), args.plans[p], fill=(235, 235, 235))
            for k in range(prompts):
                image.paste(Image.fromarray(clips[p, k, f]), (LABEL + GAP + k * (width + GAP), top))
        sheet.append(image.quantize(128, dither=Image.Dither.NONE))
    sheet[0].save(args.output, save_all=True, append_images=sheet[1:] + [sheet[-1]] * 8, duration=90, loop=0, optimize=True)
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
