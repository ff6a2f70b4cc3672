"""The tokenizer of VA-VAE and the networks its loss needs.

Paper: arXiv 2501.01423, Sec. 3 and Fig. 3. "We utilize the VQGAN network structure, omitting
quantization and applying KL loss to regulate the continuous latent space" [Sec. 5.1]: LDM's
autoencoder. VF loss changes nothing in this file; that is the point of the paper [Sec. 2.1].

Read it top to bottom:
    SPECS               the paper's tokenizers by name: f = downsampling rate, d = latent dimension
    AutoencoderKL       image (B, 3, H, W) in [-1, 1] -> q(z | x) over (B, d, H/f, W/f) -> image
    Encoder, Decoder    its two halves, then the blocks they are built of
    PatchDiscriminator  the adversary of the VQGAN loss
    LPIPS               the perceptual distance of the VQGAN loss, also a column of Table 2

Names and shapes of the weights are LDM's and the authors', so released files load with strict=True.
"""
import contextlib
import errno
import hashlib
import textwrap
import zipfile
from collections import OrderedDict
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import VGG16_Weights, vgg16

# f says how many tokens LightningDiT gets, (256 / 16)^2 = 256 of f16, and d how much each may hold: with d
# reconstruction improves and generation suffers, the dilemma [Fig. 1] that VF loss is to resolve.
# One entry of ch_mult a resolution level, so f = 2^(levels - 1). Attention stands where the feature
# map is as wide as attn_resolutions say, for an image of side `resolution`.
F16 = {"ch": 128, "ch_mult": (1, 1, 2, 2, 4), "num_res_blocks": 2, "attn_resolutions": (16,),
       "resolution": 256}
SPECS = {f"f16d{d}": F16 | {"embed_dim": d} for d in (16, 24, 28, 32, 64, 128)}  # LDM's kl-f16
# [Table A3] names no layers: LDM's kl-f32
SPECS["f32d128"] = F16 | {"embed_dim": 128, "ch_mult": (1, 1, 2, 2, 4, 4), "attn_resolutions": (16, 8)}
# [Table 1] SD-VAE: LDM's kl-f8
SPECS["f8d4"] = F16 | {"embed_dim": 4, "ch_mult": (1, 2, 4, 4), "attn_resolutions": ()}
# Ours, for preset mini: the same code, narrow and shallow enough for two CPU cores.
MINI = {"ch": 16, "num_res_blocks": 1, "attn_resolutions": (), "resolution": 32}
for d in (4, 8, 16, 32, 64):
    for f, ch_mult in ((2, (1, 2)), (4, (1, 2, 4)), (8, (1, 2, 4, 4))):
        SPECS[f"mini-f{f}d{d}"] = MINI | {"embed_dim": d, "ch_mult": ch_mult}

class AutoencoderKL(nn.Module):
    """Image x (B, 3, H, W) in [-1, 1] -> Posterior of z (B, d, H/f, W/f) -> image [Sec. 3, Fig. 3].
    spec: an entry of SPECS, or what differs from f16d32: embed_dim is the latent dimension d; ch, ch_mult and
    num_res_blocks are width and depth. The network is convolutional but for attention, so any H and W that f
    divides may be fed."""
    def __init__(self, **spec):
        super().__init__()
        spec = SPECS["f16d32"] | spec
        self.embed_dim = spec["embed_dim"]
        self.f = 2 ** (len(spec["ch_mult"]) - 1)
        self.encoder = Encoder(**spec)
        self.decoder = Decoder(**spec)
        # VQGAN's names, from both sides of its codebook: here nothing is quantised [Sec. 5.1]
        self.quant_conv = nn.Conv2d(2 * self.embed_dim, 2 * self.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(self.embed_dim, self.embed_dim, 1)

    def encode(self, x):
        """x (B, 3, H, W) in [-1, 1] -> Posterior. ValueError if f does not divide H and W."""
        H, W = x.shape[-2:]
        if H % self.f or W % self.f:
            raise ValueError(f"image size {H}x{W} is not divisible by the tokenizer's f = {self.f}")
        return Posterior(self.quant_conv(self.encoder(x)))

    def decode(self, z):
        """z (B, d, h, w) -> x_hat (B, 3, f h, f w), about [-1, 1], not clipped."""
        return self.decoder(self.post_quant_conv(z))

    def forward(self, x, noise=None):
        """A training pass: x_hat (B, 3, H, W), the latent z (B, d, H/f, W/f) and its Posterior."""
        posterior = self.encode(x)
        # one draw of z for the decoder and for VF loss, which aligns the sample, not the mean [authors' code]
        z = posterior.sample(noise)
        return self.decode(z), z, posterior

class Posterior:
    """moments (B, 2d, h, w), mean first -> q(z | x) = N(mean, exp(logvar)), diagonal.
    Its KL loss is to "regulate the continuous latent space" [Sec. 5.1], where VQGAN has a codebook."""
    def __init__(self, moments):
        if moments.dtype == torch.bfloat16:
            moments = moments.float()  # under autocast: KL and sampling stay in fp32
        self.mean, self.logvar = moments.chunk(2, dim=1)  # 2 x (B, d, h, w)
        # LDM's clamp: std in [3e-7, 22026], so that exp cannot overflow and KL stays finite
        self.logvar = self.logvar.clamp(-30.0, 20.0)

    def sample(self, noise=None):
        """z (B, d, h, w). noise: standard normal of that shape, drawn if not given."""
        if noise is None:
            noise = torch.randn_like(self.mean)
        # z = mean + std * noise, std = exp(logvar / 2): gradients reach mean and logvar
        return self.mean + torch.exp(0.5 * self.logvar) * noise

    def mode(self):
        """The most likely z (B, d, h, w): the mean."""
        return self.mean

    def kl(self):
        """KL(q || N(0, I)) in nats, (B,): a SUM over the latent, like L_rec over pixels [Sec. 3.3]."""
        # kl = 1/2 sum(mean^2 + exp(logvar) - 1 - logvar)
        return 0.5 * (self.mean ** 2 + self.logvar.exp() - 1.0 - self.logvar).sum(dim=(1, 2, 3))

class Encoder(nn.Module):
    """x (B, 3, H, W) -> moments (B, 2d, H/f, W/f).
    `features` is all but the last convolution, `conv_out`: Eq. 4 takes its gradients there, so that
    train_vae.py may compile `features` or compute it in parts, but never the whole."""
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
        self.norm_out = norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * embed_dim, 3, padding=1)

    def features(self, x):
        h = self.conv_in(x)  # (B, ch, H, W)
        for level in self.down:
            h = level.downsample(level(h))  # halves H and W, except the last
        h = self.mid(h)  # (B, ch * ch_mult[-1], H/f, W/f)
        return F.silu(self.norm_out(h))

    def forward(self, x):
        return self.conv_out(self.features(x))  # (B, 2d, H/f, W/f)

class Decoder(nn.Module):
    """z (B, d, h, w) -> x_hat (B, 3, f h, f w). VF loss ends at z and never trains it [Fig. 3].
    `conv_out` is where the GAN's adaptive weight takes its gradients, as in VQGAN."""
    def __init__(self, embed_dim, ch, ch_mult, num_res_blocks, attn_resolutions, resolution):
        super().__init__()
        widths = [ch * m for m in ch_mult] + [ch * ch_mult[-1]]
        self.conv_in = nn.Conv2d(embed_dim, widths[-1], 3, padding=1)
        self.mid = middle(widths[-1])
        self.up = nn.ModuleList()  # up[0] is the finest level and runs last
        for i, (c_out, c_in) in enumerate(pairwise(widths)):
            # one residual block a level more than the encoder, as in LDM
            level = Level(c_in, c_out, num_res_blocks + 1, resolution // 2 ** i in attn_resolutions)
            level.upsample = upsample(c_out) if i > 0 else nn.Identity()
            self.up.append(level)
        self.norm_out = norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def features(self, z):
        h = self.mid(self.conv_in(z))  # (B, ch * ch_mult[-1], h, w)
        for level in reversed(self.up):
            h = level.upsample(level(h))  # doubles h and w, except the last
        return F.silu(self.norm_out(h))  # (B, ch * ch_mult[0], f h, f w)

    def forward(self, z):
        return self.conv_out(self.features(z))  # (B, 3, f h, f w)

class Level(nn.Module):
    """h (B, c_in, H, W) -> (B, c_out, H, W): residual blocks, each followed by attention or nothing."""
    def __init__(self, c_in, c_out, blocks, attention):
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(c_out if i else c_in, c_out) for i in range(blocks))
        self.attn = nn.ModuleList(AttnBlock(c_out) if attention else nn.Identity() for _ in range(blocks))

    def forward(self, h):
        for block, attn in zip(self.block, self.attn):
            h = attn(block(h))
        return h

def middle(c):
    """The lowest resolution's block, (B, c, h, w) -> the same; names as in LDM.
    Its attention, which every tokenizer has, lets each position of z know of the whole image."""
    blocks = OrderedDict(block_1=ResnetBlock(c, c), attn_1=AttnBlock(c), block_2=ResnetBlock(c, c))
    return nn.Sequential(blocks)

def downsample(c):
    """(B, c, H, W) -> (B, c, H/2, W/2). LDM pads right and below only."""
    return nn.Sequential(OrderedDict(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(c, c, 3, stride=2)))

def upsample(c):
    """(B, c, H, W) -> (B, c, 2H, 2W): repeat every pixel, then convolve. A transposed convolution would put
    more terms into some pixels than into others, which shows as a checkerboard."""
    return nn.Sequential(OrderedDict(nearest=nn.Upsample(scale_factor=2), conv=nn.Conv2d(c, c, 3, padding=1)))

def norm(channels):
    """LDM's GroupNorm of 32 groups. Ours, for narrow networks: at least 4 channels a group, LDM's smallest.
    One channel a group takes every channel's mean away, and pictures lose their colours."""
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)

class ResnetBlock(nn.Module):
    """x (B, c_in, H, W) -> (B, c_out, H, W); a 1x1 convolution on the shortcut where the width changes."""
    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1 = norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = norm(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))  # (B, c_out, H, W)
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h

class AttnBlock(nn.Module):
    """x (B, C, H, W) -> the same shape: self-attention over all positions, one head of width C.
    Its cost grows with (H W)^2: it stands where the feature map is small."""
    def __init__(self, c):
        super().__init__()
        self.norm = norm(c)
        self.q, self.k, self.v = (nn.Conv2d(c, c, 1) for _ in range(3))
        self.proj_out = nn.Conv2d(c, c, 1)

    def forward(self, x):
        B, C, H, W = x.shape
        h = self.norm(x)
        # 3 x (B, 1, H*W, C): one head
        q, k, v = (layer(h).view(B, 1, C, H * W).mT for layer in (self.q, self.k, self.v))
        # h = softmax(q k^T / sqrt(C)) v
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(h.mT.reshape(B, C, H, W))

class PatchDiscriminator(nn.Module):
    """Image (B, 3, H, W) in [-1, 1] -> one logit a patch (B, 1, H/8 - 2, W/8 - 2): pix2pix's, as in VQGAN.
    A logit sees 70x70 pixels: it judges texture, which L1 blurs, and leaves layout to the other losses."""
    def __init__(self, ch=64):
        super().__init__()
        layers = [nn.Conv2d(3, ch, 4, 2, 1), nn.LeakyReLU(0.2)]  # (B, ch, H/2, W/2)
        for c, stride in ((ch, 2), (2 * ch, 2), (4 * ch, 1)):  # H/4, H/8, H/8 - 1
            conv = nn.Conv2d(c, 2 * c, 4, stride, 1, bias=False)  # BatchNorm would take the bias away
            layers += [conv, nn.BatchNorm2d(2 * c), nn.LeakyReLU(0.2)]
        self.main = nn.Sequential(*layers, nn.Conv2d(8 * ch, 1, 4, 1, 1))
        for module in self.main:  # pix2pix's initialisation
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, x):
        return self.main(x)

class LPIPS(nn.Module):
    """x, x_hat (B, 3, H, W) in [-1, 1] -> learned perceptual distance (B, 1, 1, 1): v0.1 on VGG16.
    Features of a classifier, weighted so that it is what people see, such as a blur that L1 forgives.
    Gradients reach x_hat only; the network is frozen. pretrained=False leaves random weights."""
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
        """x (B, 3, H, W) -> five maps (B, C_l, H_l, W_l), a vector of length 1 at each position: what VGG16
        has before each pooling, relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3."""
        h = (x - self.mean) / self.std
        maps = []
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                # the eps stands inside the root: a zero vector gives no NaN gradient
                maps.append(h / torch.sqrt((h * h).sum(1, keepdim=True) + 1e-10))
            # torchvision's in-place ReLU would overwrite what autograd needs
            h = F.relu(h) if isinstance(layer, nn.ReLU) else layer(h)
        return maps

    def forward(self, x, x_hat):
        with torch.no_grad():  # nothing trains through the real image: half of VGG's memory
            real = self.unit_features(x)
        layers = zip(self.lin, real, self.unit_features(x_hat))
        # distance = sum_l mean_hw( lin_l . (real_l - fake_l)^2 ), each (B, 1, 1, 1)
        return sum(lin((real_l - fake_l) ** 2).mean((2, 3), keepdim=True) for lin, real_l, fake_l in layers)

# === Plumbing: nothing of the paper below this line ===
class UserError(Exception):
    """A mistake that the user can mend, in one line: which file, flag or value, and the way out."""
    status = 1  # of the script that ends with it

def require(condition, message):
    """UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)

@contextlib.contextmanager
def reading(path, more=""):
    """Whatever goes wrong inside is this file's fault: the OSError or UserError that comes out names it."""
    require(not Path(path).is_fifo(), f"{path} is a pipe, not a file")
    try:
        yield
    except (UserError, torch.cuda.OutOfMemoryError):
        raise
    except ImportError as error:
        raise UserError(f"{path} needs the package {error.name}: pip install {error.name}") from error
    except Exception as error:  # damaged files are met with anything
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # of a cut-off zip
            error.filename = error.filename or str(path)
            raise
        raise UserError(f"{path} cannot be read: it is damaged, or of another kind{more} "
                        f"({type(error).__name__})") from error

# what an entry of a checkpoint or of latents.json is, wherever it stands; all others are dicts
KINDS = {"step": int, "total_steps": int, "image_size": int, "seed": int, "objective": str, "data": str,
         "identity": str, "fingerprint": str, "classes": list, "shape": list, "mean": list, "std": list}

def check_entries(state, path, *names):
    """UserError unless a dict from a file has these entries, each of its kind, and makes sense."""
    kinds = {k: type(state.get(k)) for k in names}
    wrong = [k for k, kind in kinds.items() if not issubclass(kind, KINDS.get(k, dict)) or kind is bool]
    settings = {} if "settings" in wrong else state.get("settings", {})
    wrong += [k for k in settings.keys() & KINDS.keys() if not isinstance(settings[k], KINDS[k])]
    if not wrong and "step" in names and not 0 <= state["step"] <= state["total_steps"]:
        wrong = ["step"]
    require(not wrong, f"{path} is damaged: {', '.join(wrong)} missing or of the wrong kind")

def autocast(x, bf16):
    """Context of a network's forward pass on x's device: bf16 autocast or, also inside one, plain fp32."""
    return torch.autocast("cuda" if x.is_cuda else "cpu", dtype=torch.bfloat16, enabled=bf16)

def hub_file(url, digest="", name=None):
    """URL -> path of that file in torch.hub's cache (TORCH_HOME/hub/checkpoints), downloaded if missing.
    digest: how its file_hash begins, checked also if it was put there by hand. name: its name there, default
    the URL's last part. UserError says where to put it when there is no network."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / (name or url.rsplit("/", 1)[1])
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path))  # to a temporary name first, then renamed
        except OSError as error:  # URLError, HTTPError and time-outs
            raise UserError(f"cannot download {url} ({error}); without a network, put that file at {path}")
    found = file_hash(path) if digest else ""
    require(found.startswith(digest),
            f"{path} has {found}, expected {digest}: delete it to download {url} again")
    return path

def file_hash(path):
    """A file's hash, such as "sha256:397923af..."."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return f"sha256:{digest.hexdigest()}"

LPIPS_HEADS = ("https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/"
               "lpips/weights/v0.1/vgg.pth")

def load_lpips(net):
    """Fill an LPIPS network with torchvision's VGG16 and the heads of LPIPS's authors."""
    vgg = torch_load(hub_file(VGG16_Weights.IMAGENET1K_V1.url, "sha256:397923af"))
    heads = torch_load(hub_file(LPIPS_HEADS, "sha256:a78928a0", "lpips_v0.1_vgg.pth"))
    # VGG16's classifier is not needed
    net.features.load_state_dict({k[9:]: v for k, v in vgg.items() if k.startswith("features.")})
    net.lin.load_state_dict({f"{i}.weight": heads[f"lin{i}.model.1.weight"] for i in range(5)})

class Inert:
    """Stands for every class in a file that torch does not know, such as Lightning's: it does nothing."""
    def __init__(self, *args):
        pass
    __setstate__ = __setitem__ = __init__

def torch_load(path, hint=""):
    """What a torch.save or safetensors file holds, on the CPU: tensors, plain values. No code in it runs."""
    require(Path(path).exists(), f"{path} does not exist{hint}")
    with reading(path, ", or holds code"):
        if str(path).endswith(".safetensors"):
            from safetensors.torch import load_file
            return load_file(path)
        zipped = zipfile.is_zipfile(path)  # else torch's format of before 2020
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipped else ()
        with torch.serialization.safe_globals([(Inert, name) for name in unknown]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)

def fingerprint(state_dict):
    """Weights -> 16 hex digits of their SHA-256: names the latents that belong to a tokenizer."""
    digest = hashlib.sha256()
    for name in sorted(state_dict):
        digest.update(name.encode())
        digest.update(state_dict[name].detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]

def load_weights(module, weights, path):
    """load_state_dict, strict. UserError names weights that are missing, too many, misshapen, not finite or
    absurdly large: a norm would hide those, and pictures come out black."""
    try:
        module.load_state_dict(weights)
    except Exception as error:  # torch's text, a line for each weight: the first of them in one line
        raise UserError(f"{path} does not fit: {textwrap.shorten(str(error), 300)}") from error
    broken = [k for k, v in module.state_dict().items() if v.is_floating_point()
              and not (weights[k].is_floating_point() and v.abs().max() < 1e6
                       and (v.min() >= 0 or "running_var" not in k))]
    require(not broken, f"{path} is damaged: {', '.join(broken[:3])} is not finite, or above a million")

TRAINING_ONLY = ("loss.", "foundation_model.", "linear_proj.", "model_ema.")  # LDM's and the authors'
DIFFUSERS = {  # parts of names in diffusers' AutoencoderKL, old and new -> LDM's, which have none of them
    "mid_block.attentions.0": "mid.attn_1", "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2", "down_blocks": "down", "up_blocks.0": "up.3", "up_blocks.1": "up.2",
    "up_blocks.2": "up.1", "up_blocks.3": "up.0", "resnets": "block", "samplers.0": "sample",
    "conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut", "group_norm": "norm", "to_q": "q",
    "to_k": "k", "to_v": "v", "to_out.0": "proj_out", "query": "q", "key": "k", "value": "v",
    "proj_attn": "proj_out"}

def read_released_tokenizer(path):
    """File of the authors' VA-VAE, CompVis' kl-f8, diffusers (such as DiT's sd-vae-ft-ema) or ours -> (entry
    of SPECS, state_dict). Training-only weights are left out by name; UserError if the rest fits no entry."""
    state, weights = torch_load(path), {}
    with reading(path):
        state = state.get("state_dict", state)
        for name, value in state.items():
            if name.startswith(TRAINING_ONLY) or not torch.is_tensor(value):
                continue
            for theirs, ours in DIFFUSERS.items():
                name = name.replace(theirs, ours)
            # diffusers' attention has linear layers, LDM's the same as 1x1 convolutions
            weights[name] = value[:, :, None, None] if "attn_1" in name and value.dim() == 2 else value
    shapes = {k: v.shape for k, v in weights.items()}
    for spec in SPECS.values():
        with torch.device("meta"):
            own = AutoencoderKL(**spec).state_dict()
        if shapes == {k: v.shape for k, v in own.items()}:
            extra = sorted({k.split(".")[0] for k in state if k.startswith(TRAINING_ONLY)})
            if extra:
                print(f"{path}: beside the autoencoder there are training-only weights: {', '.join(extra)}")
            return spec, weights
    load_weights(AutoencoderKL(), weights, path)  # names the differences to f16d32

def load_tokenizer(path, device, unfinished=False):
    """Our vae.pt or a released file -> (AutoencoderKL in eval mode without gradients, its checkpoint).
    A released file knows no settings or classes. unfinished: take one that is still being trained."""
    hint = ": run python train_vae.py first, or name one with --vae"
    state = torch_load(path, hint)
    if not isinstance(state, dict) or "stage" not in state:
        spec, weights = read_released_tokenizer(path)
        state = {"stage": "vae", "step": 0, "total_steps": 0, "settings": {}}
        state |= {"spec": spec, "state_dict": weights}
    require(state["stage"] == "vae", f"{path} is another kind of checkpoint ({state['stage']}){hint}")
    check_entries(state, path, "spec", "settings", "state_dict", "step", "total_steps")
    step, total = state["step"], state["total_steps"]
    require(unfinished or step == total, f"{path} is unfinished (step {step} of {total}): run train_vae.py "
            "again to finish it, or take it as it is with --unfinished")
    with reading(path):
        vae = AutoencoderKL(**state["spec"])
    load_weights(vae, state["state_dict"], path)
    return vae.to(device).eval().requires_grad_(False), state
