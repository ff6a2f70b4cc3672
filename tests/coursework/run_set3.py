"""Set 3, now run it: your network on a task of position, time and class, without diffusion."""
import argparse

import torch

from dit import LightningDiT

parser = argparse.ArgumentParser()
parser.add_argument("--no-rope", action="store_true")
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()
torch.manual_seed(args.seed)
net = LightningDiT(input_size=8, patch_size=1, in_channels=2, hidden_size=64, depth=3, num_heads=2,
                   num_classes=16, use_rope=not args.no_rope)
print(f"{sum(p.numel() for p in net.parameters()):,} weights, RoPE {'off' if args.no_rope else 'on'}")
opt = torch.optim.AdamW(net.parameters(), 2e-3, betas=(0.9, 0.95), weight_decay=0.0)
place = torch.arange(8.0)


def task(n):
    """Noise x, time t, class y -> the picture to draw, (n, 2, 8, 8)."""
    x, t, y = torch.randn(n, 2, 8, 8), torch.rand(n), torch.randint(16, (n,))
    row, column = (y // 4 * 2).view(-1, 1, 1), (y % 4 * 2).view(-1, 1, 1)
    near = torch.exp(-((place[:, None] - row) ** 2 + (place - column) ** 2) / 4)
    wave = torch.sin(place * (0.5 + 2 * t[:, None]))[:, None, :].expand(-1, 8, -1)
    return x, t, y, torch.stack([near, wave + 0.5 * x[:, 1].roll(1, 1)], 1)


mean = 0.0
for step in range(400):
    opt.param_groups[0]["lr"] = 2e-3 * min(1.0, (step + 1) / 50)
    x, t, y, want = task(32)
    loss = (net(x, t, y, torch.zeros(32, dtype=torch.bool)) - want).square().mean()
    opt.zero_grad()
    loss.backward()
    opt.step()
    mean = loss.item() if step == 0 else 0.95 * mean + 0.05 * loss.item()
    if (step + 1) % 50 == 0:
        print(f"step {step + 1}: loss {mean:.4f}", flush=True)
