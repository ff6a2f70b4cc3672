"""Set 1, now run it: the miniature tokenizer trained with your blocks, samples and losses, for 200 steps."""
import torch
import torch.nn.functional as F

from train_vae import Images, batch_indices, reconstruction_loss, save_grid, to_float
from vae import SPECS, AutoencoderKL

torch.manual_seed(0)
images, test = Images("shapes", "train", 32), Images("shapes", "test", 32)
vae = AutoencoderKL(**SPECS["mini-f4d8"])
opt = torch.optim.Adam(vae.parameters(), 1e-3, betas=(0.5, 0.9))
for step in range(200):
    opt.param_groups[0]["lr"] = 1e-3 * min(1.0, (step + 1) / 50)
    index = batch_indices(len(images), 16, step, 0).tolist()
    x = to_float(torch.stack([images[i] for i in index]))
    x_hat, z, posterior = vae(x)
    loss = reconstruction_loss(x, x_hat, None, 0.0) + 1e-6 * posterior.kl().mean()
    opt.zero_grad()
    loss.backward()
    opt.step()
    if (step + 1) % 25 == 0:
        print(f"step {step + 1}: loss {loss.item():.1f}", flush=True)

x = to_float(torch.stack([test[i] for i in range(64)]))
with torch.no_grad():
    x_hat = vae.eval().decode(vae.encode(x).mode()).clamp(-1, 1)
psnr = 10 * torch.log10(4 / F.mse_loss(x_hat, x, reduction="none").mean((1, 2, 3))).mean()
save_grid(torch.cat([x[:8], x_hat[:8]]), "set1.png", 8)
print(f"PSNR of 64 test images: {psnr:.2f} dB; pictures: set1.png")
