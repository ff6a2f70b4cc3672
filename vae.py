"""The tokenizer of VA-VAE and the networks its loss needs.

Paper: arXiv 2501.01423, Sec. 3 and Fig. 3. "We utilize the VQGAN network structure, omitting quantization and applying KL loss to regulate the
continuous latent space" [Sec. 5.1]: LDM's autoencoder. VF loss changes nothing in this file; that is the point of the paper [Sec. 2.1].

How to read it, top to bottom:
    SPECS               the paper's tokenizers by name: f = downsampling rate, d = latent dimension ("f16d32")
    AutoencoderKL       image x (B, 3, H, W) in [-1, 1]  ->  posterior over z (B, d, H/f, W/f)  ->  reconstruction (B, 3, H, W)
    PatchDiscriminator  the adversary of the VQGAN loss
    LPIPS               the perceptual distance of the VQGAN loss, also a column of Table 2
    hub_file            every downloaded file of the project comes through here, into torch.hub's cache

Names and shapes of the weights are those of LDM and of the authors' released VA-VAE, so released files load with strict=True.
"""
import contextlib
import hashlib
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
import torch.nn as nn
import torch.nn.functional as F

# --- The tokenizers of the paper ----------------------------------------------------------------------------------------------------------------
# ch_mult has one entry a resolution level, so f = 2^(levels - 1). Self-attention stands where the feature map is as wide as attn_resolutions say (f16: 16).
F16 = dict(ch=128, ch_mult=(1, 1, 2, 2, 4), num_res_blocks=2, attn_resolutions=(16,), resolution=256)        # LDM's kl-f16, the authors' code
F32 = dict(ch=128, ch_mult=(1, 1, 2, 2, 4, 4), num_res_blocks=2, attn_resolutions=(16, 8), resolution=256)   # LDM's kl-f32; Table A3 names no layers
SPECS = {
    **{f"f16d{d}": dict(embed_dim=d, **F16) for d in (16, 24, 28, 32, 64, 128)},                             # Tables 2, 4, 5, A1, A2, A3
    "f32d128": dict(embed_dim=128, **F32),                                                                   # Table A3
    "f8d4": dict(embed_dim=4, ch=128, ch_mult=(1, 2, 4, 4), num_res_blocks=2, attn_resolutions=(), resolution=256),   # Table 1: SD-VAE, LDM's kl-f8
    # ours, for preset mini: the same code, narrow and shallow enough for two CPU cores
    **{f"mini-f{f}d{d}": dict(embed_dim=d, ch=32, ch_mult=mult, num_res_blocks=1, attn_resolutions=(32 // f,), resolution=32)
       for f, mult in ((2, (1, 2)), (4, (1, 1, 2)), (8, (1, 1, 2, 2))) for d in (4, 8, 16, 32, 64)},
}


def fail(message):
    """End the program with one clear line on stderr and exit status 1: the only way in which a user's mistake is reported. `message` (str)."""
    sys.exit(f"{Path(sys.argv[0]).name}: error: {message}")


def autocast(x, bf16):
    """The one place of precision for networks: bf16 autocast on x's device, or plain fp32, inside an outer autocast too. (meta: FLOP counting only.)"""
    return contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=bf16)


def hub_file(url, name=None, sha256=None, md5=None):
    """Path of a downloaded file in torch.hub's cache (TORCH_HOME/hub/checkpoints); downloads it if it is not there yet.

    name: file name in the cache, default the URL's last part. sha256 (any prefix) or md5: what the file must hash to, checked every time, for a file
    that was put there by hand too. Fails with the place to put the file when there is no network, and when the hash does not match.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / (name or url.rsplit("/", 1)[1])
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path))   # writes to a temporary name first, then renames
        except OSError as error:                             # URLError, HTTPError and time-outs are OSErrors
            fail(f"cannot download {url} ({error}); without a network, put that file at {path}")
    for expected, algorithm in ((sha256, hashlib.sha256), (md5, hashlib.md5)):
        if expected:
            digest = algorithm()
            with open(path, "rb") as f:
                while block := f.read(1 << 22):
                    digest.update(block)
            if not digest.hexdigest().startswith(expected):
                fail(f"{path} has {algorithm().name} {digest.hexdigest()}, expected {expected}: delete it to download {url} again")
    return path


# --- Building blocks of the VQGAN networks ------------------------------------------------------------------------------------------------------
def norm(channels):
    """LDM's GroupNorm of 32 groups. Ours, for the miniature's narrow networks: never fewer than 4 channels a group, LDM's smallest (128 / 32). With one
    channel a group the norm takes every channel's mean away, and the reconstructions lose their colours (measured)."""
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """x + conv(swish(norm(conv(swish(norm(x)))))), with a 1x1 convolution on the shortcut where the width changes."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1, self.conv1 = norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = norm(c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))                                  # (B, c_out, H, W)
        h = self.conv2(F.silu(self.norm2(h)))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h


class AttnBlock(nn.Module):
    """Self-attention over all positions, one head as wide as the feature map."""

    def __init__(self, c):
        super().__init__()
        self.norm = norm(c)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x):
        B, C, H, W = x.shape
        h = self.norm(x)
        q, k, v = (f(h).flatten(2).transpose(1, 2).unsqueeze(1) for f in (self.q, self.k, self.v))   # (B, 1, H*W, C)
        h = F.scaled_dot_product_attention(q, k, v)                            # softmax(q k^T / sqrt(C)) v
        return x + self.proj_out(h.squeeze(1).transpose(1, 2).reshape(B, C, H, W))


class Downsample(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x):                                                      # LDM pads right and below only
        return self.conv(F.pad(x, (0, 1, 0, 1)))                               # (B, c, H/2, W/2)


class Upsample(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))   # (B, c, 2H, 2W)


class Level(nn.Module):
    """One resolution of the encoder or decoder: residual blocks, each followed by attention if this resolution has it, then one resampling."""

    def __init__(self, c_in, c_out, blocks, attention, **resample):
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(c_in if i == 0 else c_out, c_out) for i in range(blocks))
        self.attn = nn.ModuleList(AttnBlock(c_out) for _ in range(blocks if attention else 0))
        for name, module in resample.items():                                  # downsample=... or upsample=..., as LDM names them
            setattr(self, name, module)

    def forward(self, h):
        for i, block in enumerate(self.block):
            h = block(h)
            h = self.attn[i](h) if len(self.attn) else h
        resample = getattr(self, "downsample", None) or getattr(self, "upsample", None)
        return resample(h) if resample else h


class Middle(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.block_1, self.attn_1, self.block_2 = ResnetBlock(c, c), AttnBlock(c), ResnetBlock(c, c)

    def forward(self, h):
        return self.block_2(self.attn_1(self.block_1(h)))


class Encoder(nn.Module):
    """x (B, 3, H, W) -> moments (B, 2d, H/f, W/f). `features` is all but the last convolution: Eq. 4 takes its gradients at that one, `conv_out`."""

    def __init__(self, z, ch, ch_mult, num_res_blocks, attn_resolutions, resolution):
        super().__init__()
        widths, last = [ch] + [ch * m for m in ch_mult], len(ch_mult) - 1
        self.conv_in = nn.Conv2d(3, ch, 3, padding=1)
        self.down = nn.ModuleList(
            Level(widths[i], widths[i + 1], num_res_blocks, resolution // 2 ** i in attn_resolutions,
                  **({"downsample": Downsample(widths[i + 1])} if i < last else {}))
            for i in range(len(ch_mult)))
        self.mid = Middle(widths[-1])
        self.norm_out, self.conv_out = norm(widths[-1]), nn.Conv2d(widths[-1], 2 * z, 3, padding=1)

    def features(self, x):
        h = self.conv_in(x)                                                    # (B, ch, H, W)
        for level in self.down:
            h = level(h)                                                       # halves H and W, except the last
        return F.silu(self.norm_out(self.mid(h)))                              # (B, ch * ch_mult[-1], H/f, W/f)

    def forward(self, x):
        return self.conv_out(self.features(x))                                 # (B, 2d, H/f, W/f)


class Decoder(nn.Module):
    """z (B, d, h, w) -> image (B, 3, f h, f w). One residual block a level more than the encoder, as in LDM. `conv_out`: the GAN's last layer."""

    def __init__(self, z, ch, ch_mult, num_res_blocks, attn_resolutions, resolution):
        super().__init__()
        widths = [ch * m for m in ch_mult] + [ch * ch_mult[-1]]
        self.conv_in = nn.Conv2d(z, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList(                                               # up[0] is the finest level and runs last
            Level(widths[i + 1], widths[i], num_res_blocks + 1, resolution // 2 ** i in attn_resolutions,
                  **({"upsample": Upsample(widths[i])} if i > 0 else {}))
            for i in range(len(ch_mult)))
        self.norm_out, self.conv_out = norm(widths[0]), nn.Conv2d(widths[0], 3, 3, padding=1)

    def features(self, z):
        h = self.mid(self.conv_in(z))                                          # (B, ch * ch_mult[-1], h, w)
        for level in reversed(self.up):
            h = level(h)                                                       # doubles h and w, except the last
        return F.silu(self.norm_out(h))                                        # (B, ch * ch_mult[0], f h, f w)

    def forward(self, z):
        return self.conv_out(self.features(z))                                 # (B, 3, f h, f w)


class Posterior:
    """q(z | x) = N(mean, exp(logvar)), diagonal. moments (B, 2d, h, w): mean first, then log-variance, clamped to [-30, 20] as in LDM."""

    def __init__(self, moments):
        self.mean, self.logvar = moments.chunk(2, dim=1)                       # 2 x (B, d, h, w)
        self.logvar = self.logvar.clamp(-30.0, 20.0)

    def sample(self, noise=None):
        """mean + std * noise, (B, d, h, w). noise: standard normal, same shape; drawn from the global generator if not given."""
        return self.mean + torch.exp(0.5 * self.logvar) * (torch.randn_like(self.mean) if noise is None else noise)

    def mode(self):
        return self.mean

    def kl(self):
        """KL(q || N(0, I)) in nats, summed over the latent: (B,). The paper's KL is a sum, as its reconstruction loss [Sec. 3.3]."""
        return 0.5 * (self.mean ** 2 + self.logvar.exp() - 1.0 - self.logvar).sum(dim=(1, 2, 3))


class AutoencoderKL(nn.Module):
    """VQGAN with a KL-regularised continuous latent [Sec. 3, Fig. 3]. Fully convolutional but for attention: any H, W that f divides.

    embed_dim: latent dimension d. ch, ch_mult, num_res_blocks: width and depth. attn_resolutions: widths of the feature map, for an image of side
    `resolution`, that get self-attention (it decides where the layers stand, not what sizes may be fed).
    """

    def __init__(self, embed_dim=32, ch=128, ch_mult=(1, 1, 2, 2, 4), num_res_blocks=2, attn_resolutions=(16,), resolution=256):
        super().__init__()
        args = (embed_dim, ch, tuple(ch_mult), num_res_blocks, tuple(attn_resolutions), resolution)
        self.embed_dim, self.f = embed_dim, 2 ** (len(ch_mult) - 1)
        self.encoder, self.decoder = Encoder(*args), Decoder(*args)
        self.quant_conv = nn.Conv2d(2 * embed_dim, 2 * embed_dim, 1)           # names from VQGAN, though nothing is quantised
        self.post_quant_conv = nn.Conv2d(embed_dim, embed_dim, 1)

    def encode(self, x):
        """x (B, 3, H, W) in [-1, 1] -> Posterior over (B, d, H/f, W/f). ValueError if f does not divide H and W."""
        if x.shape[-2] % self.f or x.shape[-1] % self.f:
            raise ValueError(f"image size {x.shape[-2]}x{x.shape[-1]} is not divisible by the tokenizer's downsampling rate f = {self.f}")
        return Posterior(self.quant_conv(self.encoder(x)))

    def decode(self, z):
        """z (B, d, h, w) -> x (B, 3, f h, f w), about [-1, 1], not clipped."""
        return self.decoder(self.post_quant_conv(z))

    def forward(self, x, noise=None):
        """One training pass: reconstruction (B, 3, H, W), the sampled latent z (B, d, H/f, W/f) and its posterior."""
        posterior = self.encode(x)
        z = posterior.sample(noise)
        return self.decode(z), z, posterior


# --- The loss's networks ------------------------------------------------------------------------------------------------------------------------
class BatchNorm(nn.BatchNorm2d):
    """Batch normalisation over the batches of all processes together, so that N processes train the discriminator as one does.

    Ours: LDM normalises each process's share alone. torch.nn.SyncBatchNorm does the same on CUDA but has no CPU version.
    """

    def forward(self, x):
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(x)
        size, dims = dist.get_world_size(), (0, 2, 3)                          # all_reduce is differentiable: gradients flow back to every process
        mean = dist_nn.all_reduce(x.mean(dims) / size)                         # (C,)
        var = dist_nn.all_reduce((x - mean[:, None, None]).square().mean(dims) / size)   # not mean(x^2) - mean^2, which can be negative in fp32
        n = size * x.numel() / x.shape[1]
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / (n - 1), self.momentum)
        scale = self.weight * torch.rsqrt(var + self.eps)                      # (C,)
        return x * scale[:, None, None] + (self.bias - mean * scale)[:, None, None]


class PatchDiscriminator(nn.Module):
    """pix2pix's discriminator, as in VQGAN: 3 strided layers, 64 channels, BatchNorm. images (B, 3, H, W) in [-1, 1] -> one logit a patch (B, 1, h', w')."""

    def __init__(self, layers=3, ch=64):
        super().__init__()
        net, c = [nn.Conv2d(3, ch, 4, stride=2, padding=1), nn.LeakyReLU(0.2)], ch
        for i in range(1, layers + 1):                                         # the last of these keeps the resolution
            c_out = ch * min(2 ** i, 8)
            net += [nn.Conv2d(c, c_out, 4, stride=2 if i < layers else 1, padding=1, bias=False), BatchNorm(c_out), nn.LeakyReLU(0.2)]
            c = c_out
        self.main = nn.Sequential(*net, nn.Conv2d(c, 1, 4, padding=1))
        for m in self.main:                                                    # pix2pix's initialisation
            if isinstance(m, nn.Conv2d):
                nn.init.normal_(m.weight, 0.0, 0.02)
            elif isinstance(m, BatchNorm):
                nn.init.normal_(m.weight, 1.0, 0.02)

    def forward(self, x):
        return self.main(x)


VGG16 = ("https://download.pytorch.org/models/vgg16-397923af.pth", dict(sha256="397923af"))
LPIPS_HEADS = ("https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/vgg.pth",
               dict(name="lpips_v0.1_vgg.pth", md5="d507d7349b931f0638a25a48a722f98a"))


class LPIPS(nn.Module):
    """Learned perceptual distance, version 0.1 on VGG16. x, y (B, 3, H, W) in [-1, 1] -> (B, 1, 1, 1).

    pretrained=False leaves random weights. Frozen: no weight has a gradient, so the graph holds only what x needs.
    """
    SLICES = (4, 9, 16, 23, 30)                                                # after relu1_2, relu2_2, relu3_3, relu4_3, relu5_3

    def __init__(self, pretrained=True):
        super().__init__()
        from torchvision.models import vgg16
        self.features = vgg16(weights=None).features
        self.lin = nn.ModuleList(nn.Conv2d(c, 1, 1, bias=False) for c in (64, 128, 256, 512, 512))
        self.register_buffer("mean", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))
        if pretrained:
            vgg = torch.load(hub_file(VGG16[0], **VGG16[1]), map_location="cpu", weights_only=True)
            self.features.load_state_dict({k[len("features."):]: v for k, v in vgg.items() if k.startswith("features.")})
            heads = torch.load(hub_file(LPIPS_HEADS[0], **LPIPS_HEADS[1]), map_location="cpu", weights_only=True)   # it was saved on a GPU
            self.lin.load_state_dict({f"{i}.weight": heads[f"lin{i}.model.1.weight"] for i in range(5)})
        self.requires_grad_(False).eval()

    def forward(self, x, y):
        B = len(x)
        h = (torch.cat([x, y]) - self.mean) / self.std                         # (2B, 3, H, W): one pass for both
        distance = torch.zeros(B, 1, 1, 1, device=x.device)
        for i, layer in enumerate(self.features):
            h = layer(h) if not isinstance(layer, nn.ReLU) else F.relu(h)      # torchvision's in-place ReLU would overwrite what autograd needs
            if i + 1 in self.SLICES:
                # d_l = mean_hw( w_l . (hx / |hx| - hy / |hy|)^2 ). The eps stands inside the root: a zero vector gives no NaN gradient.
                unit = h / torch.sqrt((h * h).sum(1, keepdim=True) + 1e-10)    # (2B, C_l, H_l, W_l)
                head = self.lin[self.SLICES.index(i + 1)]
                distance = distance + head((unit[:B] - unit[B:]) ** 2).mean((2, 3), keepdim=True)   # (B, 1, 1, 1)
        return distance
