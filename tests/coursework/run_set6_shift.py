"""Set 6, the shift experiment: how far few steps end from the same noise's fine solution, for three shifts.

    python run_set6_shift.py                    without guidance; --cfg-scale 2 with it; reads runs/mini
"""
import sys

import torch

import sample
from train_vae import World

scale = float(sys.argv[sys.argv.index("--cfg-scale") + 1]) if "--cfg-scale" in sys.argv else 1.0
changes = {"preset": "mini", "out": "runs/mini", "device": "cpu", "cfg_scale": scale}
s = sample.Settings(**sample.PRESETS["mini"] | changes)
system = sample.System(s, World("cpu"))

@torch.inference_mode()
def solve(seed, shift, steps, integrator):
    s.seed, s.timestep_shift, s.sampling_steps, s.integrator = seed, shift, steps + 1, integrator
    x0, y = sample.draw(system, s, range(100))
    return sample.integrate(system, s, x0, y, sample.time_grid(s))

print("distance to 400 steps of Heun, as a share of its norm, after 5, 10, 25, 50 steps")
for seed in (0, 1, 2):
    fine = solve(seed, 1.0, 400, "heun")
    for integrator in ("euler", "heun"):
        for shift in (0.3, 1.0, 3.0):
            gaps = [(solve(seed, shift, n, integrator) - fine).norm() / fine.norm() for n in (5, 10, 25, 50)]
            print(f"seed {seed} {integrator:5} shift {shift}:", *(f"{gap:.4f}" for gap in gaps), flush=True)
