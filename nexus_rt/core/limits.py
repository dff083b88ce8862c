"""The bounds of settings, their published values, and the names to choose from: constants that
several rooms read, and no code."""

from __future__ import annotations

TRAIN_STEPS = 1000  # timesteps that the models were trained on
MAX_STEPS = 100_000  # steps of a plan
MIN_SHIFT, MAX_SHIFT = 1e-3, 1000.0  # of the time grid
MIN_GAMMA_W, MAX_GAMMA_W = 1e-3, 100.0  # exponent of the gate
MAX_GUIDANCE = 1000.0  # of a guidance scale, either sign
MAX_SIDE = 16_384  # pixels of a clip's side
MAX_FRAMES = 10_001  # of a clip
MAX_VIDEOS = 256  # of a prompt in one call
MAX_SEQUENCE_LENGTH = 512  # tokens of a text; Wan's transformers attend to the zero padding too
MAX_PROMPT = 100_000  # characters of a prompt
MAX_SEED = 2**64 - 1
MIN_TIMEOUT, MAX_TIMEOUT = 1e-3, 1e6  # seconds

PLAN = "handoff=0.3"  # of a call where neither it nor its pair has one
GAMMA_W = 0.3  # the paper's exponent of the gate
# The paper's code writes v_c + s (v_c - v_u) with s = 5.0; diffusers' scale is g = s + 1 = 6.0.
GUIDANCE_SCALE = 6.0
REWRITE_TIMEOUT = 60.0  # seconds for all prompts of a call

GENERATORS = ("small", "large")
ENERGIES = ("none", "reference", "progressive")  # the kernels know a rule by its place
SOLVERS = ("unipc", "euler", "lcm")
OUTPUT_TYPES = ("np", "pt", "pil", "latent")

Scale = float | tuple[float, float]  # a guidance scale, or one for each of two experts
