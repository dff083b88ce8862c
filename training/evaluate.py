"""How good are a pair's clips under some plans? Generates prompts and measures the pixels.

    python -m training.evaluate --prompts captions --count 201 --rows small large handoff=0.5
    python -m training.evaluate --prompts riddles --rows small handoff=0.5,guidance=6

A row is a plan, with options after commas: `split=fft`, `guidance=6`, `guidance_2=2`,
`unguided=0.33` (no guidance after that share of the steps), `rewrite=auto` (the large generator
reads the language model's answer), `rewrite=off`, or `rewrite=free` (that answer in free wording:
another word order, other connecting words). Every row sees the same prompts and noises, taken from
three seeds; the rows take turns, batch by batch, so that a busy machine slows all of them alike.
Riddles are of triples of kinds held out of training; of the captions' scenes a tenth is held out,
and reported by itself.

Fidelity is the distance of a row's radial spectrum to that of the true renderings passed through
the pair's own VAE: what the VAE cannot draw is no generator's fault, and beyond it sharper is
worse.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec
import numpy as np
import torch

from nexus_rt import BlendConfig, NexusPipeline
from nexus_rt.bench.shapes import world
from nexus_rt.bench.shapes.checker import chance, look
from nexus_rt.bench.shapes.riddles import make_prompts
from nexus_rt.method.plan import Plan
from nexus_rt.pipeline.request import make_guidance
from nexus_rt.pipeline.settings import GUIDANCE_SETTINGS, CallSettings
from training.metrics import consistency, radial_power, texture_similarity, wilson

SEEDS = (61, 62, 63)  # of the reported figures; settings are chosen on others
OPTIONS = ("split", "guidance", "guidance_2", "unguided", "steps", "rewrite")
TRUE, THROUGH = "true renderings", "true through the VAE"
UNITS = {"small": 1, "large": 6}  # cost of a forward at true size


@dataclasses.dataclass(frozen=True)
class Row:
    """A plan and the options it runs under."""

    name: str
    plan: str
    split: str = "gaussian"
    guidance: float | None = None
    guidance_2: float | None = None
    unguided: float | None = None
    steps: int | None = None
    rewrite: str | None = None

    @classmethod
    def parse(cls, text: str) -> Row:
        plan, own = [], {}
        for part in text.split(","):
            key, _, value = part.partition("=")
            if key in OPTIONS:
                kinds = {"split": str, "rewrite": str, "steps": int}
                own[key] = kinds.get(key, float)(value)
            else:
                plan.append(part)
        return cls(text, ",".join(plan), **own)

    @property
    def scales(self) -> dict[str, float]:
        """Its guidance scales under the call's names."""
        scales = zip(GUIDANCE_SETTINGS.values(), (self.guidance, self.guidance_2), strict=True)
        return {name: scale for name, scale in scales if scale is not None}

    def make(self, pipe: NexusPipeline) -> Plan:
        plan = pipe.make_plan(self.plan, self.steps)
        if self.unguided is None:
            return plan
        first = round(len(plan) * self.unguided)
        cut = lambda s: (
            dataclasses.replace(s, guidance_small=1.0, guidance_large=1.0)
            if s.index >= first
            else s
        )
        return dataclasses.replace(plan, name=self.name, steps=tuple(map(cut, plan.steps)))


def measure(frames: np.ndarray, scene: world.Scene) -> dict:
    """Everything one clip is measured for."""
    shape, colour, motion = look(frames).matches(scene)
    return {
        "shape": shape,
        "colour": colour,
        "motion": motion,
        "power": radial_power(frames[::4]).tolist(),
        "texture": texture_similarity(frames, scene.texture),
        "consistency": consistency(frames),
    }


def work(
    pair: Path | None,
    rows: list[Row],
    kind: str,
    seeds: list[int],
    count: int,
    batch: int,
    shard: tuple[int, int],
    out: Path,
    lora: str | None = None,
) -> None:
    """Measure this shard's batches of every row, a line of JSON a clip."""
    pipe = NexusPipeline.from_pretrained(pair, large_lora=lora or ())
    pipe.set_progress_bar_config(disable=True)
    d = pipe.defaults
    each = count // len(seeds)
    jobs = [(seed, first) for seed in seeds for first in range(0, each, batch)]
    with out.open("w") as file:
        for seed, first in jobs[shard[0] :: shard[1]]:
            part = make_prompts(kind, seed, each)[first : first + batch]
            rng = np.random.default_rng([seed, first])
            for k, prompt in enumerate(part):
                drawn = world.render(prompt.scene, rng, d.num_frames, d.height)  # [F, 3, H, W]
                video = torch.from_numpy(drawn).float().transpose(0, 1)[None]
                through = pipe.decode(pipe.vae.encode(video))[0]
                for name, clip in (
                    (TRUE, (drawn.transpose(0, 2, 3, 1) + 1) / 2),
                    (THROUGH, through),
                ):
                    about = {"row": name, "id": [seed, first + k], "ms": 0.0}
                    file.write(json.dumps({**about, **measure(clip, prompt.scene)}) + "\n")
            texts = [p.text for p in part]
            embeds = pipe.encode_prompt(texts)
            told = dict(prompt_embeds=embeds[0], negative_prompt_embeds=embeds[1])
            if pipe.context is not None:
                told["context_embeds"], told["negative_context_embeds"] = pipe.encode_context(
                    texts, *embeds
                )
            second: dict[str, torch.Tensor | None] = {}
            for row in rows:
                if row.rewrite not in second:
                    second[row.rewrite] = rewritten(pipe, texts, row.rewrite, [seed, first])
                noise = [
                    torch.Generator().manual_seed(seed * 100003 + first + k)
                    for k in range(len(part))
                ]
                start = time.perf_counter()
                latents = pipe(
                    **told,
                    prompt_embeds_2=second[row.rewrite],
                    plan=row.make(pipe),
                    generator=noise,
                    **row.scales,
                    blend=BlendConfig(split=row.split),
                    output_type="latent",
                ).frames
                ms = 1000 * (time.perf_counter() - start) / len(part)
                clips = pipe.decode(latents)
                for k, (clip, prompt) in enumerate(zip(clips, part, strict=True)):
                    seen = {"held_out": world.held_out(prompt.scene), **measure(clip, prompt.scene)}
                    about = {"row": row.name, "id": [seed, first + k], "ms": ms}
                    file.write(json.dumps({**about, **seen}) + "\n")
            file.flush()
            print(
                f"shard {shard[0]}: seed {seed}, prompts {first} to {first + len(part) - 1}",
                flush=True,
            )


def rewritten(
    pipe: NexusPipeline, texts: list[str], rewrite: str | None, seed: list[int]
) -> torch.Tensor | None:
    """Embeddings of what the large generator reads instead of the texts; None for the texts."""
    made = pipe.rewrite(texts, "auto" if rewrite == "free" else rewrite)
    if made is None:
        return None
    rng = np.random.default_rng([*seed, 5])
    answers = [free_wording(t, rng) if rewrite == "free" else t for t in made.texts]
    return pipe.encode_prompt(answers)[0]


def free_wording(answer: str, rng: np.random.Generator) -> str:
    """A caption in words that the language model was not trained to answer in."""
    words = answer.split()
    one = lambda names: next((w for w in words if w in names), "")
    look = f"{one(world.COLOURS)} {one(world.SHAPES)}"
    look = f"{look} , {one(set(world.TEXTURES) - {'plain'})}".rstrip(" ,")
    motion = one(set(world.MOTIONS) - {"still"})
    act = f"it moves {motion}" if motion else "it stays still"
    ground = f"the background is {one(world.BACKGROUNDS)}"
    forms = (
        f"{ground} ; {look} , {act}",
        f"{act} , the {look} , and {ground}",
        f"{look} ; {act} ; {ground}",
    )
    return forms[int(rng.integers(len(forms)))]


def interval(right: np.ndarray) -> list[float]:
    return [round(v, 4) for v in wilson(int(right.sum()), len(right))]


def summarise(records: list[dict], rows: list[Row], pipe: NexusPipeline) -> dict:
    """One entry a row: shares right with the interval of "all", fidelity, consistency, forwards and
    milliseconds."""
    table: dict[str, dict] = {}
    power = lambda own: np.log10(np.mean([r["power"] for r in own], 0) + 1e-9)
    true = power([r for r in records if r["row"] == THROUGH])
    plans = {row.name: row for row in rows}
    for name in [TRUE, THROUGH, *plans]:
        own = sorted((r for r in records if r["row"] == name), key=lambda r: r["id"])
        hits = np.array([[r[f] for f in ("shape", "colour", "motion")] for r in own])
        every = hits.all(1)
        fields = zip(("shape", "colour", "motion"), hits.mean(0), strict=True)
        entry = {
            "clips": len(own),
            **{f: round(float(h), 4) for f, h in fields},
            "all": round(float(every.mean()), 4),
            "interval": interval(every),
            "spectrum_distance": round(float(np.abs(power(own) - true).mean()), 4),
            "texture": round(float(np.mean([r["texture"] for r in own])), 4),
            "consistency": round(float(np.mean([r["consistency"] for r in own])), 4),
            "right": "".join("1" if e else "0" for e in every),
        }
        if name in plans:
            row = plans[name]
            scales = make_guidance(CallSettings(**row.scales), pipe.defaults)
            forwards = row.make(pipe).evaluations(scales.small, scales.large)
            held = every[[r["held_out"] for r in own]]
            entry |= {
                "held_out_scenes": {
                    "clips": len(held),
                    "all": round(float(held.mean()), 4) if len(held) else None,
                },
                "forwards": forwards,
                "units": sum(UNITS[g] * n for g, n in forwards.items()),
                "ms": round(float(np.median([r["ms"] for r in own])), 1),
            }
        table[name] = entry
    return table


def evaluate(
    pair: Path | None,
    rows: list[Row],
    kind: str,
    count: int,
    batch: int,
    workers: int,
    seeds: tuple[int, ...] = SEEDS,
    lora: str | None = None,
) -> dict:
    """Run shards in processes of one thread each, and summarise."""
    with tempfile.TemporaryDirectory() as folder:
        spec = json.dumps([dataclasses.asdict(r) for r in rows])
        command = [
            sys.executable,
            "-m",
            "training.evaluate",
            "--prompts",
            kind,
            "--count",
            str(count),
            "--batch",
            str(batch),
        ]
        command += [
            "--spec",
            spec,
            "--seeds",
            *map(str, seeds),
            *(["--pair", str(pair)] if pair else []),
            *(["--large-lora", lora] if lora else []),
        ]
        # keep freed memory: returning it to the system after every layer took half of a worker's
        # time
        malloc = {"MALLOC_MMAP_THRESHOLD_": "1073741824", "MALLOC_TRIM_THRESHOLD_": "8589934592"}
        env = {**os.environ, "OMP_NUM_THREADS": "1", **malloc}
        files = [Path(folder) / f"{i}.jsonl" for i in range(workers)]
        running = [
            subprocess.Popen([*command, "--shard", f"{i}/{workers}", "--out", str(f)], env=env)
            for i, f in enumerate(files)
        ]
        codes = [p.wait() for p in running]
        if any(codes):
            raise SystemExit(f"a worker failed (exit codes {codes}); its error is above")
        records = [json.loads(line) for f in files for line in f.read_text().splitlines()]
    pipe = NexusPipeline.from_pretrained(pair, large_lora=lora or ())
    head = {
        "prompts": kind,
        "count": len(records) // (len(rows) + 2),
        "seeds": list(seeds),
        "batch": batch,
        "workers": workers,
    }
    return {
        **head,
        "defaults": msgspec.to_builtins(pipe.defaults),
        "chance": {k: round(v, 4) for k, v in chance().items()},
        "rows": summarise(records, rows, pipe),
    }


def show(result: dict) -> str:
    """The table as text."""
    lines = [
        f"{'':56} shape colour motion    all  interval        spectrum texture steady  forwards "
        "units    ms"
    ]
    for name, r in result["rows"].items():
        low, high = r["interval"]
        runs = r.get("forwards", {})
        lines.append(
            f"{name:56} {r['shape']:5.1%} {r['colour']:6.1%} {r['motion']:6.1%} {r['all']:6.1%} "
            f" [{low:5.1%}, {high:5.1%}] {r['spectrum_distance']:8.3f} {r['texture']:7.3f}"
            f" {r['consistency']:6.3f}  {runs.get('small', 0):3d}+{runs.get('large', 0):3d}"
            f" {r.get('units', 0):5d} {r.get('ms', 0):6.0f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pair", type=Path, help="a pair folder (default: the mini pair)")
    parser.add_argument("--prompts", choices=("riddles", "captions"), default="captions")
    parser.add_argument("--rows", nargs="+", default=["small", "large", "reference", "handoff=0.5"])
    parser.add_argument("--count", type=int, default=201, help="prompts, over three seeds")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--batch", type=int, default=17)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--large-lora", help="merged into the large generator, such as few_step")
    parser.add_argument("--json", type=Path)
    for hidden in ("--spec", "--shard", "--out"):  # of the workers
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.shard:
        torch.set_num_threads(1)
        rows = [Row(**r) for r in json.loads(args.spec)]
        work(
            args.pair,
            rows,
            args.prompts,
            args.seeds,
            args.count,
            args.batch,
            tuple(map(int, args.shard.split("/"))),
            Path(args.out),
            args.large_lora,
        )
        return
    result = evaluate(
        args.pair,
        [Row.parse(r) for r in args.rows],
        args.prompts,
        args.count,
        args.batch,
        args.workers,
        tuple(args.seeds),
        args.large_lora,
    )
    print(show(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
