"""VF loss: aligning the tokenizer's latent with a vision foundation model.

Paper: arXiv 2501.01423, Sec. 3.1 to 3.3, Eq. 1 to 5, and Sec. 6.2 for the choice of foundation model.

Read it top to bottom:
    marginal_cosine_loss            Eq. 2   the latent at each position points in the direction of the feature
    marginal_distance_matrix_loss   Eq. 3   the latents of two positions are as similar as their features
    vf_losses                               both, the two terms in the bracket of Eq. 5
    adaptive_weight                 Eq. 4   the ratio of two gradient norms at the encoder's last layer
    FoundationModel                         the frozen features F, then how each model is loaded
Eq. 1, Z' = W Z, is a 1x1 convolution without bias, `linear_proj` in train_vae.py: it is trained with the
tokenizer, and after training nothing uses it. Eq. 5 is in train_step of train_vae.py.
"""
import os
from itertools import pairwise

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from vae import UserError, autocast, hub_file


def marginal_cosine_loss(z, f, margin=0.5):
    """Projected latent z' and features f, both (B, C, h, w) -> L_mcos >= 0, a scalar [Sec. 3.1]. margin: m1.
    A position whose cosine is above 1 - m1 is close enough: it has no loss and no gradient, which leaves the
    latent free to reconstruct. (The paper's text says "below m1" where its formula has 1 - m1; for m1 = 0.5
    they are equal.)"""
    # cos_ij = z'_ij . f_ij / (|z'_ij| |f_ij|)
    cosine = F.cosine_similarity(z, f, dim=1)  # (B, h, w)
    # [Eq. 2] L_mcos = mean_ij relu(1 - m1 - cos_ij), over positions and batch
    return F.relu(1.0 - margin - cosine).mean()

def marginal_distance_matrix_loss(z, f, margin=0.25):
    """Latent z (B, C_z, h, w), features f (B, C_f, h, w) -> L_mdms >= 0, a scalar [Sec. 3.2].
    margin: m2, the largest difference of two similarities that costs nothing. Eq. 3 has z where Eq. 2 has z'.
    The authors' code puts the projected z' into both, and so does train_vae.py; then C_z = C_f."""
    z = F.normalize(z.flatten(2), dim=1)  # (B, C_z, N) with N = h w, unit vectors
    f = F.normalize(f.flatten(2), dim=1)  # (B, C_f, N)
    z_similarity = z.mT @ z  # (B, N, N), entry [i, j] is z_i . z_j
    f_similarity = f.mT @ f
    # [Eq. 3] L_mdms = mean_ij relu(|z_i . z_j - f_i . f_j| - m2). The diagonal is |1 - 1| = 0: it adds
    # nothing, but it counts in the N^2 pairs.
    return F.relu((z_similarity - f_similarity).abs() - margin).mean()

def vf_losses(z_proj, f, cos_margin, mdms_margin, use_mcos=True, use_mdms=True):
    """z' and f (B, C, h, w) -> (L_mcos, L_mdms), the two terms in the bracket of Eq. 5, as scalars.
    They are computed in fp32, even under autocast. A term that is switched off [Sec. 6.3, Table 5] is 0."""
    mcos = mdms = z_proj.new_zeros((), dtype=torch.float32)
    with autocast(z_proj, False):
        if use_mcos:
            mcos = marginal_cosine_loss(z_proj.float(), f.float(), cos_margin)
        if use_mdms:
            mdms = marginal_distance_matrix_loss(z_proj.float(), f.float(), mdms_margin)
    return mcos, mdms

def adaptive_weight(rec_loss, other_loss, weight, max_weight=1e8):
    """Two scalar losses whose graph reaches the parameter `weight` -> w_adaptive, a scalar without gradient.
    Multiplied by it, the other loss has a gradient at `weight` as long as that of L_rec, "ensuring that L_vf
    and L_rec have similar impacts on model optimization" [Sec. 3.3]; w_hyper then scales it. train_step uses
    it twice:
      VF loss      at encoder.conv_out, "the last convolutional layer of the encoder": every gradient that
                   reaches the encoder passes through it. (The 1x1 quant_conv after it belongs to the
                   bottleneck. The authors' code takes conv_out, too.)
      adversary    at decoder.conv_out, as in VQGAN, from which the paper takes the idea.

    Each use costs two partial backward passes, beside the backward pass of training on the same graph:
      VF loss      from L_rec through LPIPS, the whole decoder and both 1x1 convolutions to encoder.conv_out;
                   from L_vf through W and quant_conv only. Neither goes through the rest of the encoder.
      adversary    from L_rec through LPIPS to decoder.conv_out; from g through the discriminator."""
    rec_grad, = torch.autograd.grad(rec_loss, weight, retain_graph=True)  # (*weight.shape)
    other_grad, = torch.autograd.grad(other_loss, weight, retain_graph=True)
    grads = torch.stack([rec_grad, other_grad]).float()  # (2, *weight.shape)
    # These are the gradients of the global batch, so that N processes do what one does (our choice).
    if dist.is_initialized():
        dist.all_reduce(grads)
        grads /= dist.get_world_size()
    rec_norm, other_norm = grads.flatten(1).norm(dim=1)
    # [Eq. 4] w_adaptive = |grad L_rec| / |grad L_vf|. The 1e-4 is VQGAN's. It limits the ratio where |grad
    # L_vf| is tiny, because few positions or pairs are outside their margins. If none is, it keeps the ratio
    # finite, and 0 / 0 from being NaN, which no clamp would remove; the loss that the ratio multiplies is 0
    # then. The clamp is at 1e4 for the adversary (VQGAN) and at 1e8 for VF loss (authors' code).
    return (rec_norm / (other_norm + 1e-4)).clamp(0.0, max_weight).detach()

class FoundationModel(nn.Module):
    """Image x (B, 3, H, W) in [-1, 1], grid (h, w) -> features F (B, d_f, h, w), fp32, no gradient.
    tokens(net, x): the features of an image as the network wants it. width: d_f. patch: the side of the
    network's patches in pixels. The image is resized so that the patches match the latent's positions: for a
    16x16 grid and patches of 14, from 256 to 224 pixels. patch 0: a convolutional network, for which nothing
    is resized."""
    def __init__(self, net, tokens, width, patch, mean, std):
        super().__init__()
        self.net = net.eval().requires_grad_(False)  # frozen
        self.tokens, self.width, self.patch = tokens, width, patch
        self.bf16 = True  # autocast on CUDA, unless --vf-input is authors
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    @torch.no_grad()  # F is a target: "a frozen vision foundation model" [Sec. 3.1]
    def forward(self, x, grid):
        # each model was trained with a mean and std of its own, for images in [0, 1]
        x = ((x + 1) / 2 - self.mean) / self.std
        if self.patch:
            size = (grid[0] * self.patch, grid[1] * self.patch)
            x = F.interpolate(x, size, mode="bilinear", align_corners=False)
        with autocast(x, self.bf16 and x.is_cuda):
            f = self.tokens(self.net, x)  # (B, d_f, h, w)
        return f.float()

HALF = (0.5, 0.5, 0.5)  # as mean and std: leaves x in [-1, 1]
DINOV2_COMMIT = "b8931f7bf91576930313be2c6d6af376033b35f0"  # code from the network runs here, so it is pinned
# [Table 4] The ViT-L of each family. OpenAI trained CLIP with QuickGELU, hence that variant of timm's.
TIMM_MODELS = {"mae": "vit_large_patch16_224.mae", "sam": "samvit_large_patch16.sa1b",
               "clip": "vit_large_patch14_clip_quickgelu_224.openai",
               "dinov2": "vit_large_patch14_dinov2.lvd142m"}

def load_foundation_model(name, grid=(16, 16), vf_input="model", teacher=None):
    """Name -> FoundationModel: dinov2 (ViT-L/14), dinov2-s, -b, -l, -g, mae, clip, sam, or mini.
    To add a model: a ViT of timm needs a line in TIMM_MODELS, any other a branch here that builds its
    FoundationModel; both need their name among the choices of --vf in train_vae.py.
    grid: the latent's (h, w). teacher: the trained Classifier behind the name mini. vf_input "authors"
    repeats their code: images in [-1, 1] without the model's own mean and std (a small bug, say their
    issues), fp32, and for the name dinov2 (not dinov2-s, -b, -l, -g) timm's port, which resizes the position
    table with antialiasing."""
    if name == "mini":
        return FoundationModel(teacher, lambda net, x: net.features(x), teacher.width, 0, HALF, HALF)
    family, _, size = name.partition("-")
    if family == "dinov2" and (size or vf_input != "authors"):
        model = load_dinov2(size or "l")
    else:
        model = load_timm(name, grid)
    if vf_input == "authors":
        model.mean.fill_(0.5)
        model.std.fill_(0.5)
        model.bf16 = False
    return model

def load_dinov2(size="l"):
    """DINOv2 ViT-S, -B, -L or -G with patches of 14, from torch.hub. Features: the last layer's normalised
    patch tokens, without the class token."""
    hub, name = torch.hub.get_dir(), f"dinov2_vit{size}14"
    # the hub's own code calls torch.load: only tensors, so that no code in a file of weights runs
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        # without skip_validation torch.hub would ask GitHub about the pinned commit
        net = torch.hub.load(f"facebookresearch/dinov2:{DINOV2_COMMIT}", name, trust_repo=True,
                             skip_validation=True, verbose=False)
    except OSError as error:  # includes URLError, HTTPError and time-outs
        raise UserError(
            f"cannot download DINOv2 ({error}). Without a network, unpack github.com/facebookresearch/dinov2 "
            f"at {DINOV2_COMMIT} as {hub}/facebookresearch_dinov2_{DINOV2_COMMIT} and put "
            f"dl.fbaipublicfiles.com/dinov2/{name}/{name}_pretrain.pth into {hub}/checkpoints; or use "
            "--vf none") from error

    def tokens(net, x):
        f = net.forward_features(x)["x_norm_patchtokens"]  # (B, N, d_f), row by row
        return f.mT.unflatten(2, (x.shape[-2] // 14, x.shape[-1] // 14))  # (B, d_f, h, w)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
    return FoundationModel(net, tokens, net.embed_dim, 14, mean, std)

def load_timm(name, grid):
    """MAE, CLIP, SAM [Sec. 6.2] or DINOv2 from the optional package timm. CLIP's patch tokens are projected
    to its joint space (authors' issues)."""
    try:
        import timm
    except ImportError:
        raise UserError(f"--vf {name} needs a package: pip install timm")
    model = TIMM_MODELS[name]
    weights = hub_file(f"https://huggingface.co/timm/{model}/resolve/main/model.safetensors",
                       name=f"{model}.safetensors")
    # images of any size, for which SAM's ViT needs no option
    dynamic = {} if name == "sam" else {"dynamic_img_size": True}
    net = timm.create_model(model, pretrained=True, pretrained_cfg_overlay={"file": str(weights)}, **dynamic)
    patch, config = net.patch_embed.patch_size[0], net.pretrained_cfg

    def tokens(net, x):
        f = net.forward_features(x)
        if name == "sam":
            return f  # SAM's neck: (B, 256, h, w) already
        f = f[:, net.num_prefix_tokens:]  # (B, N, C), without the class token
        if name == "clip":
            f = net.head(f)  # (B, N, 768), the joint space
        return f.mT.unflatten(2, (x.shape[-2] // patch, x.shape[-1] // patch))  # (B, C, h, w)
    width = tokens(net, torch.zeros(1, 3, grid[0] * patch, grid[1] * patch)).shape[1]
    return FoundationModel(net, tokens, width, patch, config["mean"], config["std"])

# === Plumbing: files, flags, processes ===
class Classifier(nn.Module):
    """A small convolutional classifier, x (B, 3, S, S) in [-1, 1] -> logits (B, classes) (our choice).
    Trained on the run's own images it is the miniature's teacher (--vf mini, in place of DINOv2) and, with
    another shape and seed, the score network of fid.py. stride: side of the image over side of the feature
    map, a power of two. width: channels of the map. A BatchNorm without weights standardises each channel of
    the map. Otherwise, after a ReLU, all positions would share a large mean, every cosine would be near 1,
    and Eq. 2 and 3 would have little left to align."""
    def __init__(self, classes, stride, width=64):
        super().__init__()
        # log2(stride) convolutions that halve the side, the first one narrower since its map is the largest,
        # and one more that does not
        halvings, layers = stride.bit_length() - 1, []
        for i, (c_in, c) in enumerate(pairwise([3, width // 2] + [width] * halvings)):
            step = 2 if i < halvings else 1
            layers += [nn.Conv2d(c_in, c, 3, step, 1, bias=False), nn.BatchNorm2d(c), nn.ReLU()]
        self.net = nn.Sequential(*layers[:-2], nn.BatchNorm2d(width, affine=False))
        self.head = nn.Linear(width, classes)
        self.width = width

    def features(self, x):
        return self.net(x)  # (B, width, S/stride, S/stride)

    def forward(self, x):
        return self.head(F.relu(self.features(x)).mean((2, 3)))

def train_classifier(net, images, labels, steps, seed, device, title, batch_size=64, lr=4e-3):
    """uint8 images (N, 3, S, S), int64 labels (N,) -> the Classifier, trained and frozen, on `device`.
    AdamW with a one-cycle rate; every second batch is mirrored. The result is a function of `seed` and of
    the initial weights."""
    net = net.to(device).train()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps + 1)
    for step in tqdm(range(steps), desc=title, unit="step"):
        index = torch.randint(len(images), (batch_size,), generator=generator)
        x = images[index].to(device).float() / 127.5 - 1  # (B, 3, S, S)
        if step % 2:
            x = x.flip(3)
        loss = F.cross_entropy(net(x), labels[index].to(device), label_smoothing=0.1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval().requires_grad_(False)
