"""The tokenizer of VA-VAE and the networks its loss needs.

Paper: arXiv 2501.01423, Sec. 3 and Fig. 3. "We utilize the VQGAN network structure, omitting
quantization and applying KL loss to regulate the continuous latent space" [Sec. 5.1]: this is LDM's
autoencoder. VF loss works "without altering the model architecture" [Sec. 3]: here it only explains why
conv_out is kept apart from the rest of the encoder.

Read it top to bottom:
    SPECS               the paper's tokenizers by name: f = downsampling rate, d = latent dimension
    AutoencoderKL       image (B, 3, H, W) in [-1, 1] -> q(z | x) over (B, d, H/f, W/f) -> image
    Encoder, Decoder    its two halves, then the blocks they are built of
    PatchDiscriminator  the adversary of the VQGAN loss
    LPIPS               the perceptual distance of the VQGAN loss, and a column of Table 2

The names and shapes of the weights are those of LDM and of the authors' code, so that released files load
with strict=True.
"""
import hashlib
import pickle
import zipfile
from collections import OrderedDict
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import VGG16_Weights, vgg16

# f sets how many tokens LightningDiT gets (f16: (256 / 16)^2 = 256), and d how much each of them can hold.
# As d grows, reconstruction improves but generation gets harder: the dilemma of Fig. 1, which VF loss
# addresses. ch_mult has one entry per resolution level, so f = 2^(levels - 1). A level has attention if its
# feature map is as wide as one of attn_resolutions, for an image of side `resolution`.
F16 = {"ch": 128, "ch_mult": (1, 1, 2, 2, 4), "num_res_blocks": 2, "attn_resolutions": (16,),
       "resolution": 256}
SPECS = {f"f16d{d}": F16 | {"embed_dim": d} for d in (16, 24, 28, 32, 64, 128)}  # LDM's kl-f16
# [Table A3] The paper gives no layers for f32; these are LDM's kl-f32 (our choice).
SPECS["f32d128"] = F16 | {"embed_dim": 128, "ch_mult": (1, 1, 2, 2, 4, 4), "attn_resolutions": (16, 8)}
# [Table 1] SD-VAE is LDM's kl-f8.
SPECS["f8d4"] = F16 | {"embed_dim": 4, "ch_mult": (1, 2, 4, 4), "attn_resolutions": ()}
# For preset mini (our choice): the same code, narrow and shallow enough for two CPU cores.
MINI = {"ch": 16, "num_res_blocks": 1, "attn_resolutions": (), "resolution": 32}
for d in (4, 8, 16, 32, 64):
    for f, ch_mult in ((2, (1, 2)), (4, (1, 2, 4)), (8, (1, 2, 4, 4))):
        SPECS[f"mini-f{f}d{d}"] = MINI | {"embed_dim": d, "ch_mult": ch_mult}

class AutoencoderKL(nn.Module):
    """Image x (B, 3, H, W) in [-1, 1] -> Posterior of z (B, d, H/f, W/f) -> image [Sec. 3, Fig. 3].
    spec: an entry of SPECS, or only what differs from f16d32. embed_dim is the latent dimension d; ch,
    ch_mult and num_res_blocks set width and depth. Convolutions and attention fit any size, so images may
    have any height and width that are multiples of f."""
    def __init__(self, **spec):
        super().__init__()
        spec = SPECS["f16d32"] | spec
        self.embed_dim = spec["embed_dim"]
        self.f = 2 ** (len(spec["ch_mult"]) - 1)
        self.encoder = Encoder(**spec)
        self.decoder = Decoder(**spec)
        # The names come from VQGAN, where these layers sit on both sides of the codebook. Here nothing is
        # quantised [Sec. 5.1].
        self.quant_conv = nn.Conv2d(2 * self.embed_dim, 2 * self.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(self.embed_dim, self.embed_dim, 1)

    def encode(self, x):
        """x (B, 3, H, W) in [-1, 1], H and W multiples of f -> Posterior over z (B, d, H/f, W/f)."""
        return Posterior(self.quant_conv(self.encoder(x)))

    def decode(self, z):
        """z (B, d, h, w) -> x_hat (B, 3, f h, f w), roughly in [-1, 1] but not clipped."""
        return self.decoder(self.post_quant_conv(z))

    def forward(self, x, noise=None):
        """One training pass -> x_hat (B, 3, H, W), the latent z (B, d, H/f, W/f) and its Posterior."""
        posterior = self.encode(x)
        # The decoder and VF loss get the same sample of the posterior; VF loss does not align the mean
        # (authors' code).
        z = posterior.sample(noise)
        return self.decode(z), z, posterior

class Posterior:
    """The diagonal Gaussian q(z | x) = N(mean, exp(logvar)), from moments (B, 2d, h, w), the mean first.
    Its KL loss serves to "regulate the continuous latent space" [Sec. 5.1], where VQGAN has a codebook."""
    def __init__(self, moments):
        if moments.dtype == torch.bfloat16:
            moments = moments.float()  # under autocast, the KL loss and sampling stay in fp32
        self.mean, self.logvar = moments.chunk(2, dim=1)  # 2 x (B, d, h, w)
        # LDM's clamp keeps the standard deviation in [3e-7, 22026], so that exp cannot overflow.
        self.logvar = self.logvar.clamp(-30.0, 20.0)

    def sample(self, noise=None):
        """A sample z (B, d, h, w). noise: standard normal, of that shape; None draws it."""
        if noise is None:
            noise = torch.randn_like(self.mean)
        # z = mean + std * noise with std = exp(logvar / 2), so gradients reach both mean and logvar
        return self.mean + torch.exp(0.5 * self.logvar) * noise

    def mode(self):
        """The most likely z (B, d, h, w), which is the mean."""
        return self.mean

    def kl(self):
        """KL(q || N(0, I)) in nats, (B,): a SUM over the latent, as L_rec is a sum over pixels [Sec. 3.3]."""
        # kl = 1/2 sum(mean^2 + exp(logvar) - 1 - logvar)
        return 0.5 * (self.mean ** 2 + self.logvar.exp() - 1.0 - self.logvar).sum(dim=(1, 2, 3))

class Encoder(nn.Module):
    """x (B, 3, H, W) -> moments (B, 2d, H/f, W/f).
    `features` is everything before the last convolution, `conv_out`. They are kept apart because Eq. 4 takes
    a gradient at the weight of conv_out, and a chunk of train_vae.py would be computed again for that."""
    def __init__(self, embed_dim, ch, ch_mult, num_res_blocks, attn_resolutions, resolution):
        super().__init__()
        widths = [ch] + [ch * m for m in ch_mult]
        self.conv_in = nn.Conv2d(3, ch, 3, padding=1)
        self.down = nn.ModuleList()
        for i, (c_in, c_out) in enumerate(pairwise(widths)):
            level = Level(c_in, c_out, num_res_blocks, resolution // 2 ** i in attn_resolutions)
            level.downsample = downsample(c_out) if i + 1 < len(ch_mult) else nn.Identity()
            self.down.append(level)
        self.mid = middle(widths[-1])
        self.norm_out = norm_silu(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * embed_dim, 3, padding=1)

    def features(self, x):
        h = self.conv_in(x)  # (B, ch, H, W)
        for level in self.down:
            h = level.downsample(level(h))  # every level but the last halves H and W
        h = self.mid(h)  # (B, ch * ch_mult[-1], H/f, W/f)
        return self.norm_out(h)

    def forward(self, x):
        return self.conv_out(self.features(x))  # (B, 2d, H/f, W/f)

class Decoder(nn.Module):
    """z (B, d, h, w) -> x_hat (B, 3, f h, f w). VF loss acts on z and never reaches the decoder [Fig. 3].
    The adaptive weight of the adversarial loss takes its gradients at `conv_out`, as in VQGAN."""
    def __init__(self, embed_dim, ch, ch_mult, num_res_blocks, attn_resolutions, resolution):
        super().__init__()
        widths = [ch * m for m in ch_mult] + [ch * ch_mult[-1]]
        self.conv_in = nn.Conv2d(embed_dim, widths[-1], 3, padding=1)
        self.mid = middle(widths[-1])
        self.up = nn.ModuleList()  # up[0] is the finest level and runs last
        for i, (c_out, c_in) in enumerate(pairwise(widths)):
            # each level has one residual block more than in the encoder, as in LDM
            level = Level(c_in, c_out, num_res_blocks + 1, resolution // 2 ** i in attn_resolutions)
            level.upsample = upsample(c_out) if i > 0 else nn.Identity()
            self.up.append(level)
        self.norm_out = norm_silu(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def features(self, z):
        h = self.mid(self.conv_in(z))  # (B, ch * ch_mult[-1], h, w)
        for level in reversed(self.up):
            h = level.upsample(level(h))  # every level but the last doubles h and w
        return self.norm_out(h)  # (B, ch * ch_mult[0], f h, f w)

    def forward(self, z):
        return self.conv_out(self.features(z))  # (B, 3, f h, f w)

class Level(nn.Module):
    """h (B, c_in, H, W) -> (B, c_out, H, W): residual blocks, in some levels each followed by attention."""
    def __init__(self, c_in, c_out, blocks, attention):
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(c_out if i else c_in, c_out) for i in range(blocks))
        self.attn = nn.ModuleList(AttnBlock(c_out) if attention else nn.Identity() for _ in range(blocks))

    def forward(self, h):
        for block, attn in zip(self.block, self.attn):
            h = attn(block(h))
        return h

def middle(c):
    """The blocks at the lowest resolution, (B, c, h, w) -> the same shape; names as in LDM.
    Every tokenizer has attention here, so that each position of z can depend on the whole image."""
    blocks = OrderedDict(block_1=ResnetBlock(c, c), attn_1=AttnBlock(c), block_2=ResnetBlock(c, c))
    return nn.Sequential(blocks)

def downsample(c):
    """(B, c, H, W) -> (B, c, H/2, W/2). LDM pads only on the right and at the bottom."""
    return nn.Sequential(OrderedDict(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(c, c, 3, stride=2)))

def upsample(c):
    """(B, c, H, W) -> (B, c, 2H, 2W): repeat every pixel, then convolve. A transposed convolution would add
    more terms in some pixels than in others, which shows as a checkerboard."""
    return nn.Sequential(OrderedDict(nearest=nn.Upsample(scale_factor=2), conv=nn.Conv2d(c, c, 3, padding=1)))

def groups(channels):
    """The number of groups of a GroupNorm: LDM's 32, but no group of fewer than 4 channels, LDM's smallest
    (our choice, which matters in narrow networks only). With one channel per group, each norm would subtract
    that channel's mean, which carries the overall colour."""
    return min(32, channels // 4)

class NormSiLU(nn.GroupNorm):
    """x (B, c, H, W) -> silu(norm(x)), the same shape; one module, so that torch.compile can fuse the two."""
    def forward(self, x):
        return F.silu(super().forward(x))

def norm_silu(channels):
    return NormSiLU(groups(channels), channels, eps=1e-6)

class ResnetBlock(nn.Module):
    """x (B, c_in, H, W) -> (B, c_out, H, W). Where the width changes, the shortcut is a 1x1 convolution."""
    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1 = norm_silu(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = norm_silu(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):
        h = self.conv1(self.norm1(x))  # (B, c_out, H, W)
        h = self.conv2(self.norm2(h))
        return self.nin_shortcut(x) + h

class AttnBlock(nn.Module):
    """x (B, C, H, W) -> the same shape: self-attention over all positions, with one head of width C.
    Its cost grows with (H W)^2, so only small feature maps have it."""
    def __init__(self, c):
        super().__init__()
        self.norm = nn.GroupNorm(groups(c), c, eps=1e-6)
        self.q, self.k, self.v = (nn.Conv2d(c, c, 1) for _ in range(3))
        self.proj_out = nn.Conv2d(c, c, 1)

    def forward(self, x):
        B, C, H, W = x.shape
        h = self.norm(x)
        # 3 x (B, 1, H*W, C), the 1 being the head
        q, k, v = (layer(h).view(B, 1, C, H * W).mT for layer in (self.q, self.k, self.v))
        # h = softmax(q k^T / sqrt(C)) v
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(h.mT.reshape(B, C, H, W))

class PatchDiscriminator(nn.Module):
    """Image (B, 3, H, W) in [-1, 1] -> one logit per patch (B, 1, H/8 - 2, W/8 - 2): pix2pix's, as in VQGAN.
    A logit sees 70x70 pixels, so it judges texture, which L1 blurs, and leaves layout to the other losses."""
    def __init__(self, ch=64):
        super().__init__()
        layers = [nn.Conv2d(3, ch, 4, 2, 1), nn.LeakyReLU(0.2)]  # (B, ch, H/2, W/2)
        for c, stride in ((ch, 2), (2 * ch, 2), (4 * ch, 1)):  # H/4, H/8, H/8 - 1
            conv = nn.Conv2d(c, 2 * c, 4, stride, 1, bias=False)  # BatchNorm would cancel a bias
            layers += [conv, nn.BatchNorm2d(2 * c), nn.LeakyReLU(0.2)]
        self.main = nn.Sequential(*layers, nn.Conv2d(8 * ch, 1, 4, 1, 1))
        for module in self.main:  # the initialisation of pix2pix
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, x):
        return self.main(x)

class LPIPS(nn.Module):
    """x, x_hat (B, 3, H, W) in [-1, 1] -> learned perceptual distance (B, 1, 1, 1): v0.1 on VGG16.
    It weights differences between a classifier's features by how much people notice them: a blur, which L1
    forgives, counts.
    Gradients reach x_hat only, and the network is frozen. pretrained=False leaves its weights random."""
    def __init__(self, pretrained=True):
        super().__init__()
        self.features = vgg16(weights=None).features
        self.lin = nn.ModuleList(nn.Conv2d(c, 1, 1, bias=False) for c in (64, 128, 256, 512, 512))
        self.register_buffer("mean", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))
        if pretrained:
            load_lpips(self)
        self.requires_grad_(False).eval()

    def unit_features(self, x):
        """x (B, 3, H, W) -> five maps (B, C_l, H_l, W_l) with a vector of length 1 at each position: VGG16's
        features before each pooling, which are relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3."""
        h = (x - self.mean) / self.std
        maps = []
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                # with the eps inside the root, a zero vector has no NaN gradient
                maps.append(h / torch.sqrt((h * h).sum(1, keepdim=True) + 1e-10))
            h = layer(h)
        return maps

    def forward(self, x, x_hat):
        with torch.no_grad():  # nothing trains through the real image; this halves VGG's memory
            real = self.unit_features(x)
        layers = zip(self.lin, real, self.unit_features(x_hat))
        # distance = sum_l mean_hw( lin_l . (real_l - fake_l)^2 ), each (B, 1, 1, 1)
        return sum(lin((real_l - fake_l) ** 2).mean((2, 3), keepdim=True) for lin, real_l, fake_l in layers)

# === Plumbing: files, flags, processes ===
class UserError(Exception):
    """A mistake that people make, in one line: what is wrong, with which file or flag, and the way out."""
    status = 1  # exit status of the script that ends with this error

def require(condition, message):
    """UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)

def autocast(x, bf16):
    """Context of a network's forward pass on x's device: bf16 autocast or, even inside one, plain fp32."""
    return torch.autocast("cuda" if x.is_cuda else "cpu", dtype=torch.bfloat16, enabled=bf16)

def hub_file(url, digest="", name=None):
    """URL -> path of that file in torch.hub's cache (TORCH_HOME/hub/checkpoints), downloaded if missing.
    digest: how its file_hash begins, which is checked even if the file was put there by hand. name: its name
    in the cache, by default the last part of the URL."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / (name or url.rsplit("/", 1)[1])
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path))  # to a temporary name, which it then renames
        except OSError as error:  # includes URLError, HTTPError and time-outs
            raise UserError(f"cannot download {url} ({error}); without a network, put that file at {path}")
    found = file_hash(path) if digest else ""
    require(found.startswith(digest),
            f"{path} has the hash {found} instead of {digest}...: delete it to download {url} again")
    return path

def file_hash(path):
    """A file's hash, such as "sha256:397923af..."."""
    return f"sha256:{hashlib.sha256(np.memmap(path)).hexdigest()}"

def fingerprint(state_dict):
    """Weights -> 16 hex digits of their SHA-256, which tie latents and samples to their tokenizer."""
    digest = hashlib.sha256()
    for name in sorted(state_dict):
        digest.update(name.encode())
        digest.update(state_dict[name].detach().float().cpu().contiguous().numpy())
    return digest.hexdigest()[:16]

LPIPS_HEADS = ("https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/"
               "lpips/weights/v0.1/vgg.pth")

def load_lpips(net):
    """Fill an LPIPS network: torchvision's VGG16 without its classifier, the heads of LPIPS's authors."""
    vgg = torch_load(hub_file(VGG16_Weights.IMAGENET1K_V1.url, "sha256:397923af"))
    heads = torch_load(hub_file(LPIPS_HEADS, "sha256:a78928a0", "lpips_v0.1_vgg.pth"))
    net.features.load_state_dict({k[9:]: v for k, v in vgg.items() if k.startswith("features.")})
    net.lin.load_state_dict({f"{i}.weight": heads[f"lin{i}.model.1.weight"] for i in range(5)})

class Inert:
    """A harmless substitute for each class in a file that torch does not know, such as Lightning's."""
    def __init__(self, *args):
        pass
    __setstate__ = __setitem__ = __init__

def torch_load(path, hint=""):
    """What a torch.save or safetensors file holds: tensors on the CPU, plain values. No code in it runs."""
    require(Path(path).is_file(), f"there is no file {path}{hint}")
    if str(path).endswith(".safetensors"):
        try:
            from safetensors import SafetensorError
            from safetensors.torch import load_file
        except ImportError:
            raise UserError(f"{path} needs a package: pip install safetensors")
        try:
            return load_file(path)
        except SafetensorError as error:
            raise UserError(f"{path} is no checkpoint, or is damaged ({error}){hint}") from error
    zipped = zipfile.is_zipfile(path)  # torch's format since 2020, which can be memory-mapped
    try:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipped else ()
        with torch.serialization.safe_globals([(Inert, name) for name in unknown]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    # torch raises an OSError for some files that are cut short, and a LookupError for text
    except (RuntimeError, OSError, ValueError, EOFError, LookupError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} is no checkpoint, or is damaged ({type(error).__name__}){hint}") from error

def load_checkpoint(path, stage, hint=""):
    """A checkpoint of ours, stage "vae", "dit" or "score_net" -> the dict that it holds:

        vae.pt and dit.pt  stage, step and total_steps, settings, model (weights), optimizer, classes (names),
                          identity (hash of the list of training images), image_size, data
        vae.pt only       spec (entry of SPECS), linear_proj (W of Eq. 1), teacher (of --vf mini),
                          discriminator, optimizer_disc; the last four only if the run has them
        dit.pt only       ema (weights), arch (arguments of LightningDiT), objective, latents (mean and std of
                          each channel, shape), tokenizer (fingerprint, path), bins (loss by time)
    """
    state = torch_load(path, hint)
    require(isinstance(state, dict) and state.get("stage") == stage, f"{path} is no {stage} checkpoint{hint}")
    return state

def require_finished(state, path, script, unfinished):
    """UserError if a checkpoint's training has not reached its last step, unless --unfinished was given."""
    step, total = state["step"], state["total_steps"]
    require(unfinished or step >= total, f"{path} is unfinished (step {step} of {total}): run {script} "
            "again, or take it as it is with --unfinished")

def load_weights(module, weights, path):
    """load_state_dict, strict. UserError names a weight that is missing, unknown or of another shape."""
    own = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    wrong = sorted(name for name in own.keys() | found.keys() if own.get(name) != found.get(name))
    for name in wrong[:1]:
        raise UserError(f"{path} does not fit this {type(module).__name__}: {len(wrong)} weights differ, "
                        f"such as {name} (file: {found.get(name)}, network: {own.get(name)})")
    module.load_state_dict(weights)

TRAINING_ONLY = ("loss.", "foundation_model.", "linear_proj.", "model_ema.")  # LDM's and the authors'
DIFFUSERS = {  # parts of the names in diffusers' AutoencoderKL, old and new -> LDM's
    "mid_block.attentions.0": "mid.attn_1", "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2", "down_blocks": "down", "up_blocks.0": "up.3", "up_blocks.1": "up.2",
    "up_blocks.2": "up.1", "up_blocks.3": "up.0", "resnets": "block", "samplers.0": "sample",
    "conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut", "group_norm": "norm", "to_q": "q",
    "to_k": "k", "to_v": "v", "to_out.0": "proj_out", "query": "q", "key": "k", "value": "v",
    "proj_attn": "proj_out"}

def read_released_tokenizer(path):
    """A released file (the authors' VA-VAE, CompVis' kl-f8, or one of diffusers, such as sd-vae-ft-ema) ->
    (entry of SPECS, weights). Weights that only training needs are left out by name."""
    state, weights = torch_load(path), {}
    state = state.get("state_dict", state)
    for name, value in state.items():
        if name.startswith(TRAINING_ONLY) or not torch.is_tensor(value):
            continue
        for theirs, ours in DIFFUSERS.items():
            name = name.replace(theirs, ours)
        # diffusers' attention has linear layers where LDM has 1x1 convolutions
        weights[name] = value[:, :, None, None] if "attn_1" in name and value.dim() == 2 else value
    for spec in SPECS.values():
        with torch.device("meta"):
            own = AutoencoderKL(**spec).state_dict()
        if {k: v.shape for k, v in weights.items()} == {k: v.shape for k, v in own.items()}:
            return spec, weights
    load_weights(AutoencoderKL(), weights, path)  # raises a UserError that names a difference to f16d32

def load_tokenizer(path, device, unfinished=False):
    """Our vae.pt or a released file -> (AutoencoderKL in eval mode without gradients, its checkpoint).
    A released file's checkpoint knows no settings or classes. unfinished: accept one still in training."""
    hint = ": run python train_vae.py first, or name a tokenizer with --vae"
    state = torch_load(path, hint)
    if "stage" in state:
        state = load_checkpoint(path, "vae", hint)
        require_finished(state, path, "train_vae.py", unfinished)
    else:
        spec, weights = read_released_tokenizer(path)
        state = {"stage": "vae", "step": 0, "settings": {}, "spec": spec, "model": weights}
    vae = AutoencoderKL(**state["spec"])
    load_weights(vae, state["model"], path)
    return vae.to(device).eval().requires_grad_(False), state
