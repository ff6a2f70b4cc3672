"""Set 6, the shift experiment: how far few steps end from the same noise's fine solution, for three shifts.

    python run_set6_shift.py                    without guidance; --cfg-scale 2 with it; reads runs/mini
"""
import sys

import torch

import sample
from train_vae import World

scale = float(sys.argv[sys.argv.index("--cfg-scale") + 1]) if "--cfg-scale" in sys.argv else 1.0
s = sample.Settings(
    **sample.PRESETS["mini"] | {"preset": "mini", "out": "runs/mini", "device": "cpu", "cfg_scale": scale}
)
system = sample.System(s, World("cpu"))


@torch.inference_mode()
def solve(seed, shift, points, integrator):
    s.seed, s.timestep_shift, s.sampling_steps, s.integrator = seed, shift, points, integrator
    x0, y = sample.draw(system, s, range(100))
    return sample.integrate(system, s, x0, y, sample.time_grid(s))


print("distance to 400 steps of Heun, as a share of its norm, after 5, 10, 25, 50 steps")
for seed in (0, 1, 2):
    fine = solve(seed, 1.0, 401, "heun")
    for integrator in ("euler", "heun"):
        for shift in (0.3, 1.0, 3.0):
            errors = [
                ((solve(seed, shift, n + 1, integrator) - fine).norm() / fine.norm()).item()
                for n in (5, 10, 25, 50)
            ]
            print(
                f"seed {seed} {integrator:5} shift {shift}: " + " ".join(f"{v:.4f}" for v in errors),
                flush=True,
            )
