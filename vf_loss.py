"""VF loss: aligning the tokenizer's latent with a vision foundation model.

Paper: arXiv 2501.01423, Sec. 3.1 to 3.3, Eq. 1 to 5, and Sec. 6.2 for the choice of foundation model.

How to read it:
    marginal_cosine_loss            Eq. 2   each position of the latent points where the foundation model's feature points
    marginal_distance_matrix_loss   Eq. 3   positions are as similar to each other as the foundation model finds them
    adaptive_weight                 Eq. 4   the ratio of two gradient norms on the encoder's last convolution
    vf_loss                         Eq. 5   their sum; train_vae.py multiplies it by w_hyper * w_adaptive
    FoundationModel                 F, the frozen features: dinov2, mae, clip, sam, or the miniature's stand-in
Eq. 1, Z' = W Z, is a 1x1 convolution without bias: `linear_proj` in train_vae.py, trained with the tokenizer and thrown away with the loss.
"""
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from vae import autocast, fail, hub_file

DINOV2_COMMIT = "b8931f7bf91576930313be2c6d6af376033b35f0"   # code from the network runs here: pinned
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# --- The loss -----------------------------------------------------------------------------------------------------------------------------------
def marginal_cosine_loss(z, f, margin=0.5):
    """L_mcos [Sec. 3.1]. z: projected latent Z', f: features F, both (B, C, h, w). margin: m1, paper 0.5. Returns a scalar >= 0."""
    # [Eq. 2] loss = mean_ij relu(1 - m1 - z'_ij . f_ij / (|z'_ij| |f_ij|))
    return F.relu(1.0 - margin - F.cosine_similarity(z, f, dim=1)).mean()      # cosine (B, h, w), averaged over positions and batch


def marginal_distance_matrix_loss(z, f, margin=0.25):
    """L_mdms [Sec. 3.2]. z, f: (B, C_z, h, w) and (B, C_f, h, w), widths may differ. margin: m2, paper 0.25. Returns a scalar >= 0.

    Eq. 3 writes z where Eq. 2 writes z'; the authors' code puts the projected z' into both, and so does train_vae.py.
    """
    z, f = (F.normalize(m.flatten(2), dim=1) for m in (z, f))                  # (B, C, N), N = h w, unit vectors
    # [Eq. 3] loss = mean_ij relu(| z_i . z_j - f_i . f_j | - m2), z and f of unit length
    gap = (z.transpose(1, 2) @ z - f.transpose(1, 2) @ f).abs()                # (B, N, N)
    return F.relu(gap - margin).mean()


def vf_loss(z_proj, f, cos_margin, mdms_margin, use_mcos=True, use_mdms=True):
    """(L_mcos, L_mdms), the bracket of Eq. 5, in fp32 whatever the autocast. A term that is switched off [Sec. 6.3, Table 5] is 0."""
    with autocast(z_proj, False):
        z_proj, f = z_proj.float(), f.float()
        zero = z_proj.new_zeros(())
        return (marginal_cosine_loss(z_proj, f, cos_margin) if use_mcos else zero,
                marginal_distance_matrix_loss(z_proj, f, mdms_margin) if use_mdms else zero)


def adaptive_weight(rec_loss, vf_loss, weight, max_weight=1e8):
    """w_adaptive [Sec. 3.3]: "ensuring that L_vf and L_rec have similar impacts on model optimization".

    rec_loss, vf_loss: scalars with a graph to `weight`, the last layer's parameter; the graph is kept. max_weight: upper clamp, the authors' 1e8
    for VF (VQGAN's adversarial weight is the same formula on the decoder's last layer, with 1e4). Returns a scalar without gradient.
    """
    # [Eq. 4] w_adaptive = |grad L_rec| / (|grad L_vf| + 1e-4), gradients with respect to `weight`. The 1e-4 and the clamp: the authors' code.
    grads = torch.stack([torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in (rec_loss, vf_loss)])   # (2, *weight.shape)
    if dist.is_initialized() and dist.get_world_size() > 1:                    # ours: gradients of the global batch, so N processes equal one
        dist.all_reduce(grads)
        grads /= dist.get_world_size()
    rec_norm, vf_norm = grads.float().flatten(1).norm(dim=1)
    return (rec_norm / (vf_norm + 1e-4)).clamp(0.0, max_weight).detach()


# --- The foundation models ----------------------------------------------------------------------------------------------------------------------
class FoundationModel(nn.Module):
    """A frozen vision foundation model. forward(x (B, 3, H, W) in [-1, 1], grid (h, w)) -> F (B, d_f, h, w).

    tokens: callable, images -> patch features (B, d_f, h, w). patch: its patch size in pixels (0: the network is fully convolutional and takes the
    image as it is). The image is resized so that the patch grid equals the latent grid: 256 -> 224 for patch 14 and a 16x16 grid.
    """

    def __init__(self, net, tokens, width, patch, mean, std):
        super().__init__()
        self.net, self.tokens, self.width, self.patch = net.eval().requires_grad_(False), tokens, width, patch
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def train(self, mode=True):
        return super().train(False)                                            # a teacher: never in training mode

    @torch.no_grad()
    def forward(self, x, grid):
        # Each model's own mean and std on [0, 1]. (`--vf-input authors` sets mean = std = 0.5, which leaves x in [-1, 1] as their code does.)
        x = ((x + 1) / 2 - self.mean) / self.std
        if self.patch:
            x = F.interpolate(x, (grid[0] * self.patch, grid[1] * self.patch), mode="bilinear", align_corners=False)
        with autocast(x, x.is_cuda):
            f = self.tokens(self.net, x)                                       # (B, d_f, h, w)
        if tuple(f.shape[-2:]) != tuple(grid):
            raise ValueError(f"the foundation model's patch grid {tuple(f.shape[-2:])} is not the latent's grid {tuple(grid)}")
        return f.float()


def to_map(tokens, x, patch):
    """(B, N, C) -> (B, C, h, w), row by row, as every ViT here orders its patches."""
    return tokens.transpose(1, 2).unflatten(2, (x.shape[-2] // patch, x.shape[-1] // patch))


def load_dinov2(size="l"):
    """DINOv2 ViT-s/b/l/g 14: last layer's normalised patch tokens, class token dropped [Sec. 5.1; the authors' choice is L]."""
    try:
        # skip_validation: torch.hub accepts only a branch's newest commit unless it is told not to ask GitHub
        net = torch.hub.load(f"facebookresearch/dinov2:{DINOV2_COMMIT}", f"dinov2_vit{size}14", trust_repo=True, skip_validation=True, verbose=False)
    except OSError as error:
        fail(f"cannot load DINOv2 ({error}); without a network, unpack github.com/facebookresearch/dinov2 at {DINOV2_COMMIT} as "
             f"{torch.hub.get_dir()}/facebookresearch_dinov2_{DINOV2_COMMIT}, put dl.fbaipublicfiles.com/dinov2/dinov2_vit{size}14/"
             f"dinov2_vit{size}14_pretrain.pth in {torch.hub.get_dir()}/checkpoints, or use --vf mini or none")
    return FoundationModel(net, lambda net, x: to_map(net.forward_features(x)["x_norm_patchtokens"], x, 14), net.embed_dim, 14,
                           IMAGENET_MEAN, IMAGENET_STD)


TIMM_MODELS = {"mae": "vit_large_patch16_224.mae", "clip": "vit_large_patch14_clip_224.openai", "sam": "samvit_large_patch16.sa1b"}   # [Table 4]


def load_timm(name, grid):
    """MAE, CLIP or SAM [Sec. 6.2] through timm (optional). CLIP's patch tokens are projected to the joint space, as the authors say they did."""
    try:
        import timm
    except ImportError:
        fail(f"--vf {name} needs the package timm: pip install timm")
    model = TIMM_MODELS[name]
    config = timm.models.get_pretrained_cfg(model)
    weights = hub_file(f"https://huggingface.co/timm/{model}/resolve/main/model.safetensors", name=f"{model}.safetensors")
    patch = 14 if "patch14" in model else 16
    size = {} if name == "sam" else dict(dynamic_img_size=True)               # any image size: SAM's ViT can always, the others when told so
    net = timm.create_model(model, pretrained=True, pretrained_cfg_overlay=dict(file=str(weights)), **size)

    def tokens(net, x):
        f = net.forward_features(x)                                            # SAM: (B, 256, h, w); MAE, CLIP: (B, 1 + N, C)
        if name == "sam":
            return f
        f = f[:, net.num_prefix_tokens:]                                       # (B, N, C) without the class token
        return to_map(net.head(f) if name == "clip" else f, x, patch)          # CLIP: (B, 768, h, w), the joint space
    width = tokens(net.eval(), torch.zeros(1, 3, grid[0] * patch, grid[1] * patch)).shape[1]
    return FoundationModel(net, tokens, width, patch, config.mean, config.std)


# --- The miniature's stand-in -------------------------------------------------------------------------------------------------------------------
class MiniTeacher(nn.Module):
    """Ours, preset mini: a small residual classifier, trained on the spot, whose last feature map stands in for DINOv2's patch tokens.

    stride: image size over latent grid size, a power of two. The map is standardised per channel by a BatchNorm without parameters: a raw
    (post-ReLU) map has a large common mean, so every cosine is high, Eq. 2 and 3 never exceed their margins, and VF loss does nothing (measured).
    """

    def __init__(self, classes, stride, ch=48, width=96):
        super().__init__()
        self.stem = nn.Conv2d(3, ch, 3, padding=1)
        self.blocks, c = nn.ModuleList(), ch
        for _ in range(stride.bit_length() - 1):                               # log2(stride) halvings
            self.blocks.append(nn.Sequential(nn.Conv2d(c, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width)))
            c = width
        self.residual = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c), nn.ReLU(),
                          nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c)) for _ in range(2))
        self.standardise = nn.BatchNorm2d(c, affine=False)
        self.head = nn.Linear(c, classes)
        self.width = c

    def features(self, x):
        h = F.relu(self.stem(x))                                               # (B, ch, S, S)
        for block in self.blocks:
            h = F.relu(block(h))                                               # (B, width, S/2, S/2), ...
        for block in self.residual:
            h = h + block(F.relu(h))
        return self.standardise(h)                                             # (B, width, S/stride, S/stride)

    def forward(self, x):
        return self.head(F.relu(self.features(x)).mean((2, 3)))                # (B, classes)


def train_classifier(net, images, labels, steps, seed, device, title, batch_size=128, lr=2e-3):
    """Train a small classifier: AdamW, one-cycle rate, flips and shifts by up to 2 pixels. Deterministic in `seed`.

    images: uint8 (N, 3, S, S); labels: int64 (N,). Returns `net` in eval mode, frozen, on `device`. Used for MiniTeacher and for fid.py's score network.
    """
    net, generator = net.to(device).train(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps + 1)
    size = images.shape[-1]
    for _ in (bar := tqdm(range(steps), desc=title, unit="step")):
        index = torch.randint(len(images), (batch_size,), generator=generator)
        x = images[index].to(device).float() / 127.5 - 1                       # (B, 3, S, S) in [-1, 1]
        flip, (dy, dx) = torch.rand(batch_size, generator=generator) < 0.5, torch.randint(5, (2,), generator=generator).tolist()
        x = torch.where(flip.to(device)[:, None, None, None], x.flip(3), x)
        x = F.pad(x, (2, 2, 2, 2), mode="replicate")[:, :, dy:dy + size, dx:dx + size]
        loss = F.cross_entropy(net(x), labels[index].to(device), label_smoothing=0.1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    return net.eval().requires_grad_(False)


def load_foundation_model(name, grid=(16, 16), vf_input="model", mini=None):
    """The foundation model called `name`: dinov2 (ViT-L/14), dinov2-s/b/l/g, mae, clip, sam, or mini.

    grid: the latent's (h, w). vf_input: "model" normalises with the model's own mean and std, "authors" feeds [-1, 1] as it is. mini: for "mini", a
    trained MiniTeacher. Returns a FoundationModel with .width = d_f.
    """
    if name == "mini":
        model = FoundationModel(mini, lambda net, x: net.features(x), mini.width, 0, (0.5,) * 3, (0.5,) * 3)
    elif name in TIMM_MODELS:
        model = load_timm(name, grid)
    elif name in ("dinov2", "dinov2-s", "dinov2-b", "dinov2-l", "dinov2-g"):
        model = load_dinov2(name[7:] or "l")
    else:
        raise ValueError(f"unknown foundation model {name!r}: dinov2, dinov2-s, -b, -l, -g, mae, clip, sam or mini")
    if vf_input == "authors":
        model.mean.fill_(0.5)
        model.std.fill_(0.5)
    return model
