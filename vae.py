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
import hashlib
import re
import zipfile
from collections import OrderedDict
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import vgg16

# One entry of ch_mult a resolution level, so f = 2^(levels - 1). Attention stands where the feature
# map is as wide as attn_resolutions say, for an image of side `resolution`.
F16 = {"ch": 128, "ch_mult": (1, 1, 2, 2, 4), "num_res_blocks": 2, "attn_resolutions": (16,),
       "resolution": 256}
F32 = F16 | {"ch_mult": (1, 1, 2, 2, 4, 4), "attn_resolutions": (16, 8)}
F8 = F16 | {"ch_mult": (1, 2, 4, 4), "attn_resolutions": ()}
MINI = {"ch": 16, "num_res_blocks": 1, "attn_resolutions": (), "resolution": 32}
SPECS = {f"f16d{d}": {"embed_dim": d} | F16 for d in (16, 24, 28, 32, 64, 128)}  # LDM's kl-f16
SPECS["f32d128"] = {"embed_dim": 128} | F32  # [Table A3] names no layers: LDM's kl-f32
SPECS["f8d4"] = {"embed_dim": 4} | F8  # [Table 1] SD-VAE: LDM's kl-f8
# Ours, for preset mini: the same code, narrow and shallow enough for two CPU cores.
for d in (4, 8, 16, 32, 64):
    SPECS[f"mini-f2d{d}"] = MINI | {"embed_dim": d, "ch_mult": (1, 2)}
    SPECS[f"mini-f4d{d}"] = MINI | {"embed_dim": d, "ch_mult": (1, 2, 4)}
    SPECS[f"mini-f8d{d}"] = MINI | {"embed_dim": d, "ch_mult": (1, 2, 4, 4)}

class AutoencoderKL(nn.Module):
    """Image x (B, 3, H, W) in [-1, 1] -> Posterior of z (B, d, H/f, W/f) -> image [Sec. 3, Fig. 3].
    embed_dim: latent dimension d. ch, ch_mult, num_res_blocks: width and depth. The network is convolutional
    but for attention, so any H and W that f divides may be fed."""

    def __init__(self, embed_dim=32, ch=128, ch_mult=(1, 1, 2, 2, 4), num_res_blocks=2,
                 attn_resolutions=(16,), resolution=256):
        super().__init__()
        args = (embed_dim, ch, tuple(ch_mult), num_res_blocks, tuple(attn_resolutions), resolution)
        self.embed_dim = embed_dim
        self.f = 2 ** (len(ch_mult) - 1)
        self.encoder = Encoder(*args)
        self.decoder = Decoder(*args)
        self.quant_conv = nn.Conv2d(2 * embed_dim, 2 * embed_dim, 1)  # VQGAN's name: nothing is
        self.post_quant_conv = nn.Conv2d(embed_dim, embed_dim, 1)  # quantised here

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
        z = posterior.sample(noise)
        return self.decode(z), z, posterior

class Posterior:
    """moments (B, 2d, h, w), mean first -> q(z | x) = N(mean, exp(logvar)), diagonal."""

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
    `features` is all but the last convolution, `conv_out`: Eq. 4 takes its gradients there."""

    def __init__(self, z, ch, ch_mult, num_res_blocks, attn_resolutions, resolution):
        super().__init__()
        widths = [ch] + [ch * m for m in ch_mult]
        last = len(ch_mult) - 1
        self.conv_in = nn.Conv2d(3, ch, 3, padding=1)
        self.down = nn.ModuleList()
        for i, (c_in, c_out) in enumerate(pairwise(widths)):
            level = Level(c_in, c_out, num_res_blocks, resolution // 2 ** i in attn_resolutions)
            level.downsample = downsample(c_out) if i < last else nn.Identity()
            self.down.append(level)
        self.mid = middle(widths[-1])
        self.norm_out = norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * z, 3, padding=1)

    def features(self, x):
        h = self.conv_in(x)  # (B, ch, H, W)
        for level in self.down:
            h = level.downsample(level(h))  # halves H and W, except the last
        h = self.mid(h)  # (B, ch * ch_mult[-1], H/f, W/f)
        return F.silu(self.norm_out(h))

    def forward(self, x):
        return self.conv_out(self.features(x))  # (B, 2d, H/f, W/f)

class Decoder(nn.Module):
    """z (B, d, h, w) -> x_hat (B, 3, f h, f w). `conv_out` is the last layer of the GAN's weight."""

    def __init__(self, z, ch, ch_mult, num_res_blocks, attn_resolutions, resolution):
        super().__init__()
        widths = [ch * m for m in ch_mult] + [ch * ch_mult[-1]]
        self.conv_in = nn.Conv2d(z, widths[-1], 3, padding=1)
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
    """The lowest resolution's block, (B, c, h, w) -> the same; names as in LDM."""
    blocks = OrderedDict(block_1=ResnetBlock(c, c), attn_1=AttnBlock(c), block_2=ResnetBlock(c, c))
    return nn.Sequential(blocks)

def downsample(c):
    """(B, c, H, W) -> (B, c, H/2, W/2). LDM pads right and below only."""
    return nn.Sequential(OrderedDict(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(c, c, 3, stride=2)))

def upsample(c):
    """(B, c, H, W) -> (B, c, 2H, 2W): repeat every pixel, then convolve."""
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
    """x (B, C, H, W) -> the same shape: self-attention over all positions, one head of width C."""

    def __init__(self, c):
        super().__init__()
        self.norm = norm(c)
        self.q = nn.Conv2d(c, c, 1)
        self.k = nn.Conv2d(c, c, 1)
        self.v = nn.Conv2d(c, c, 1)
        self.proj_out = nn.Conv2d(c, c, 1)

    def forward(self, x):
        B, C, H, W = x.shape
        h = self.norm(x)
        q = self.q(h).view(B, 1, C, H * W).mT  # (B, 1, H*W, C): one head
        k = self.k(h).view(B, 1, C, H * W).mT
        v = self.v(h).view(B, 1, C, H * W).mT
        # h = softmax(q k^T / sqrt(C)) v
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(h.mT.reshape(B, C, H, W))

class PatchDiscriminator(nn.Module):
    """Image (B, 3, H, W) in [-1, 1] -> one logit a patch (B, 1, H/8 - 2, W/8 - 2): pix2pix's, as in VQGAN."""

    def __init__(self, ch=64):
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(3, ch, 4, 2, 1), nn.LeakyReLU(0.2),  # H/2
            nn.Conv2d(ch, 2 * ch, 4, 2, 1, bias=False), nn.BatchNorm2d(2 * ch), nn.LeakyReLU(0.2),  # H/4
            nn.Conv2d(2 * ch, 4 * ch, 4, 2, 1, bias=False), nn.BatchNorm2d(4 * ch), nn.LeakyReLU(0.2),  # H/8
            nn.Conv2d(4 * ch, 8 * ch, 4, 1, 1, bias=False), nn.BatchNorm2d(8 * ch), nn.LeakyReLU(0.2),
            nn.Conv2d(8 * ch, 1, 4, 1, 1))
        for module in self.main:  # pix2pix's initialisation
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, x):
        return self.main(x)

class LPIPS(nn.Module):
    """x, x_hat (B, 3, H, W) in [-1, 1] -> learned perceptual distance (B, 1, 1, 1): v0.1 on VGG16.
    Gradients reach x_hat only; the network is frozen. pretrained=False leaves random weights."""
    SLICES = (4, 9, 16, 23, 30)  # after relu1_2, relu2_2, relu3_3, relu4_3, relu5_3

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
        """x (B, 3, H, W) -> five maps (B, C_l, H_l, W_l), a vector of length 1 at each position."""
        h = (x - self.mean) / self.std
        maps = []
        for i, layer in enumerate(self.features):
            # torchvision's in-place ReLU would overwrite what autograd needs
            h = F.relu(h) if isinstance(layer, nn.ReLU) else layer(h)
            if i + 1 in self.SLICES:
                # the eps stands inside the root: a zero vector gives no NaN gradient
                maps.append(h / torch.sqrt((h * h).sum(1, keepdim=True) + 1e-10))
        return maps

    def forward(self, x, x_hat):
        with torch.no_grad():  # nothing trains through the real image: half of VGG's memory
            real = self.unit_features(x)
        distance = 0.0
        # distance = sum_l mean_hw( lin_l . (real_l - fake_l)^2 )
        for lin, real_l, fake_l in zip(self.lin, real, self.unit_features(x_hat)):
            distance = distance + lin((real_l - fake_l) ** 2).mean((2, 3), keepdim=True)  # (B, 1, 1, 1)
        return distance

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
    try:
        yield
    except (UserError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:  # damaged files are met with anything
        if isinstance(error, OSError) and error.errno:
            error.filename = error.filename or str(path)
            raise
        raise UserError(f"{path} cannot be read: it is damaged, or of another kind{more} "
                        f"({type(error).__name__})") from error

# what an entry of a checkpoint or of latents.json is, wherever it stands
KINDS = dict.fromkeys(("step", "total_steps", "image_size", "seed"), int)
KINDS |= dict.fromkeys(("objective", "data", "identity", "fingerprint"), str)
KINDS |= dict.fromkeys(("classes", "shape", "mean", "std"), list)

def check_entries(state, path, *names):
    """UserError unless a dict from a file has these entries (dicts if KINDS does not say) and makes sense."""
    wrong = [k for k in names if k not in state or not isinstance(state[k], KINDS.get(k, dict))]
    settings = {} if "settings" in wrong else state.get("settings", {})
    wrong += [k for k in settings.keys() & KINDS.keys() if not isinstance(settings[k], KINDS[k])]
    if not wrong and "step" in names and not 0 <= state["step"] <= state["total_steps"]:
        wrong = ["step"]
    require(not wrong, f"{path} is damaged: {', '.join(wrong)} missing or of the wrong kind")

def autocast(x, bf16):
    """Context of a network's forward pass on x's device: bf16 autocast or, also inside one, plain fp32."""
    if x.is_meta:  # counting FLOPs
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=bf16)

def hub_file(url, digest="", name=None):
    """URL -> path of that file in torch.hub's cache (TORCH_HOME/hub/checkpoints), downloaded if missing.
    digest: how its hash begins, such as "sha256:397923af", checked also if it was put there by hand. name:
    its name there, default the URL's last part. UserError says where to put it when there is no network."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / (name or url.rsplit("/", 1)[1])
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path))  # to a temporary name first, then renamed
        except OSError as error:  # URLError, HTTPError and time-outs
            raise UserError(f"cannot download {url} ({error}); without a network, put that file at {path}")
    if digest:
        found = file_hash(path, digest.split(":")[0])
        require(found.startswith(digest), f"{path} has {found}, expected {digest}: "
                f"delete it to download {url} again")
    return path

def file_hash(path, algorithm="sha256"):
    """A file's hash, such as "sha256:397923af..."."""
    digest = hashlib.new(algorithm)
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return f"{algorithm}:{digest.hexdigest()}"

VGG16 = "https://download.pytorch.org/models/vgg16-397923af.pth"
LPIPS_HEADS = ("https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/"
               "lpips/weights/v0.1/vgg.pth")

def load_lpips(net):
    """Fill an LPIPS network with torchvision's VGG16 and the heads of LPIPS's authors."""
    vgg = torch_load(hub_file(VGG16, "sha256:397923af"))
    weights = {k.removeprefix("features."): v for k, v in vgg.items() if k.startswith("features.")}
    net.features.load_state_dict(weights)
    heads = hub_file(LPIPS_HEADS, "md5:d507d7349b931f0638a25a48a722f98a", "lpips_v0.1_vgg.pth")
    heads = torch_load(heads)
    net.lin.load_state_dict({f"{i}.weight": heads[f"lin{i}.model.1.weight"] for i in range(5)})

class Inert:
    """Stands for every class in a file that torch does not know, such as Lightning's: it does nothing."""

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __setstate__(self, state):
        pass

    def __setitem__(self, key, value):
        pass

def torch_load(path):
    """What a file of torch.save holds, on the CPU: tensors and plain values; no code in it runs."""
    require(Path(path).exists(), f"{path} does not exist")
    with reading(path, ", or holds code"):
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

def shapes_of(weights):
    """{name: tensor} -> {name: shape}."""
    return {name: tuple(value.shape) for name, value in weights.items()}

def load_weights(module, weights, path):
    """load_state_dict, strict. UserError names the first weights that are missing, too many, misshapen, not
    finite or absurdly large: a norm would hide those, and pictures come out black."""
    named = isinstance(weights, dict) and all(isinstance(k, str) for k in weights)
    require(named and all(map(torch.is_tensor, weights.values())), f"{path} does not hold weights by name")
    own = shapes_of(module.state_dict())
    given = shapes_of(weights)
    wrong = [f"{k}: {given.get(k, 'missing')} in the file, {own.get(k, 'nowhere')} in the model"
             for k in sorted(own.keys() | given.keys()) if own.get(k) != given.get(k)]
    require(not wrong, f"{path} does not fit this {type(module).__name__} "
            f"({len(wrong)} differences: {'; '.join(wrong[:3])})")
    with reading(path):
        module.load_state_dict(weights)
    broken = [k for k, v in module.state_dict().items() if v.is_floating_point()
              and not (weights[k].is_floating_point() and v.abs().max() < 1e6)]
    require(not broken, f"{path} is damaged: {', '.join(broken[:3])} is not finite, or above a million")

TRAINING_ONLY = ("loss.", "foundation_model.", "linear_proj.", "model_ema.")  # LDM's and the authors'
DIFFUSERS = {  # pattern of their AutoencoderKL's names -> LDM's; up_blocks are counted the other way round
    r"down_blocks\.(\d)\.resnets": r"down.\1.block", r"up_blocks\.(\d)\.resnets": r"up.\1.block",
    r"down_blocks\.(\d)\.downsamplers\.0": r"down.\1.downsample",
    r"up_blocks\.(\d)\.upsamplers\.0": r"up.\1.upsample", r"mid_block\.attentions\.0": "mid.attn_1",
    r"mid_block\.resnets\.0": "mid.block_1", r"mid_block\.resnets\.1": "mid.block_2",
    "conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut", "group_norm": "norm",
    "to_q|query": "q", "to_k|key": "k", "to_v|value": "v", r"to_out\.0|proj_attn": "proj_out"}

def from_diffusers(weights):
    """Weights of diffusers' AutoencoderKL, such as DiT's sd-vae-ft-ema -> LDM's names and shapes."""
    levels = len({k.split(".")[2] for k in weights if k.startswith("decoder.up_blocks.")})
    renamed = {}
    for name, value in weights.items():
        for theirs, ours in DIFFUSERS.items():
            name = re.sub(theirs, ours, name)
        name = re.sub(r"\.up\.(\d)", lambda match: f".up.{levels - 1 - int(match[1])}", name)
        if "attn_1" in name and value.dim() == 2:
            value = value[:, :, None, None]  # their linear layers are LDM's 1x1 convolutions
        renamed[name] = value
    return renamed

def read_released_tokenizer(path):
    """File of the authors' VA-VAE, CompVis' kl-f8, diffusers (.bin, .safetensors) or ours -> (entry of SPECS,
    state_dict). Training-only weights are left out by name; UserError if the rest fits no entry exactly."""
    if str(path).endswith(".safetensors"):
        try:
            from safetensors.torch import load_file
        except ImportError:
            raise UserError(f"{path} needs the package safetensors: pip install safetensors")
        with reading(path):
            state = load_file(path)
    else:
        state = torch_load(path)
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    named = isinstance(state, dict) and all(isinstance(k, str) for k in state)
    require(named, f"{path} does not hold weights by name")
    weights = {k: v for k, v in state.items() if torch.is_tensor(v) and not k.startswith(TRAINING_ONLY)}
    if "encoder.conv_norm_out.weight" in weights:
        with reading(path):
            weights = from_diffusers(weights)
    for spec in SPECS.values():
        with torch.device("meta"):
            vae = AutoencoderKL(**spec)
        if shapes_of(weights) == shapes_of(vae.state_dict()):
            dropped = sorted({k.split(".")[0] for k in state if k.startswith(TRAINING_ONLY)})
            if dropped:
                print(f"{path}: left out the training-only weights {', '.join(dropped)}")
            return spec, weights
    with torch.device("meta"):
        load_weights(AutoencoderKL(**SPECS["f16d32"]), weights, path)  # names the differences to f16d32

def load_tokenizer(path, device, hint="run python train_vae.py first, or name one with --vae",
                   unfinished=False):
    """Our vae.pt or a released file -> (AutoencoderKL in eval mode without gradients, its checkpoint).
    A released file knows no settings or classes. unfinished: take one that is still being trained."""
    require(Path(path).exists(), f"{path} does not exist: {hint}")
    state = torch_load(path)
    if not isinstance(state, dict) or "stage" not in state:
        spec, weights = read_released_tokenizer(path)
        state = {"stage": "vae", "step": 0, "total_steps": 0, "settings": {}, "spec": spec,
                 "state_dict": weights}
    require(state["stage"] == "vae", f"{path} is another kind of checkpoint ({state['stage']}): {hint}")
    check_entries(state, path, "spec", "settings", "state_dict", "step", "total_steps")
    require(unfinished or state["step"] == state["total_steps"],
            f"{path} is unfinished (step {state['step']} of {state['total_steps']}): "
            "run train_vae.py again to finish it, or take it as it is with --unfinished")
    with reading(path):
        vae = AutoencoderKL(**state["spec"])
    load_weights(vae, state["state_dict"], path)
    return vae.to(device).eval().requires_grad_(False), state
