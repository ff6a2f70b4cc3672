"""VF loss: aligning the tokenizer's latent with a vision foundation model.

Paper: arXiv 2501.01423, Sec. 3.1 to 3.3, Eq. 1 to 5, and Sec. 6.2 for the choice of foundation model.

Read it top to bottom:
    marginal_cosine_loss            Eq. 2   each position of the latent points where the feature points
    marginal_distance_matrix_loss   Eq. 3   positions are as similar to each other as the features are
    adaptive_weight                 Eq. 4   the ratio of two gradient norms at the encoder's last layer
    vf_loss                                 the two terms in the bracket of Eq. 5, as a pair
    FoundationModel                         F, the frozen features: DINOv2, MAE, CLIP, SAM, a stand-in
Eq. 1, Z' = W Z, is a 1x1 convolution without bias, `linear_proj` in train_vae.py: it is trained with
the tokenizer and thrown away with the loss. Eq. 5 stands in train_vae.py's train_step.
"""
import os
from itertools import pairwise

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from vae import UserError, autocast, hub_file, reading


def marginal_cosine_loss(z, f, margin=0.5):
    """Projected latent z' and features f, both (B, C, h, w) -> L_mcos >= 0, a scalar [Sec. 3.1].
    margin: m1. A position whose cosine is above 1 - m1 is close enough and gives no loss and no gradient,
    which leaves the latent freedom to reconstruct (the paper's text says "below m1", its formula 1 - m1; at
    its "empirically" chosen 0.5 both are one). Here z is z'."""
    # cos_ij = z'_ij . f_ij / (|z'_ij| |f_ij|)
    cosine = F.cosine_similarity(z, f, dim=1)  # (B, h, w)
    # [Eq. 2] loss = mean_ij relu(1 - m1 - cos_ij), over positions and batch
    return F.relu(1.0 - margin - cosine).mean()

def marginal_distance_matrix_loss(z, f, margin=0.25):
    """Latent z (B, C_z, h, w), features f (B, C_f, h, w) -> L_mdms >= 0, a scalar [Sec. 3.2].
    margin: m2, how far the similarity of two positions may be off; "empirically" 0.25. Eq. 3 writes z where
    Eq. 2 writes z'; the authors' code puts the projected z' into both, so train_vae.py does: C_z = C_f."""
    z = F.normalize(z.flatten(2), dim=1)  # (B, C_z, N), N = h w, unit vectors
    f = F.normalize(f.flatten(2), dim=1)  # (B, C_f, N)
    z_similarity = z.mT @ z  # (B, N, N), [i, j] = z_i . z_j
    f_similarity = f.mT @ f
    # [Eq. 3] loss = mean_ij relu(|z_i . z_j - f_i . f_j| - m2). The diagonal is |1 - 1| = 0: it adds
    # nothing and is counted in N^2 all the same.
    return F.relu((z_similarity - f_similarity).abs() - margin).mean()

def vf_loss(z_proj, f, cos_margin, mdms_margin, use_mcos=True, use_mdms=True):
    """z' and f (B, C, h, w) -> the pair (L_mcos, L_mdms) whose sum is the bracket of Eq. 5.
    Computed in fp32, also under autocast. A term that is switched off [Sec. 6.3, Table 5] is 0."""
    mcos = mdms = z_proj.new_zeros((), dtype=torch.float32)
    with autocast(z_proj, False):
        if use_mcos:
            mcos = marginal_cosine_loss(z_proj.float(), f.float(), cos_margin)
        if use_mdms:
            mdms = marginal_distance_matrix_loss(z_proj.float(), f.float(), mdms_margin)
    return mcos, mdms

def adaptive_weight(rec_loss, other_loss, weight, max_weight=1e8):
    """Two scalar losses with a graph to `weight` -> w_adaptive, a scalar without gradient [Sec. 3.3].
    It makes the other loss pull on `weight` as hard as L_rec does: "ensuring that L_vf and L_rec have similar
    impacts". The graph is kept. Used twice, at the last layer of the encoder and of the decoder:
      VF loss   encoder.conv_out ("the last convolutional layer of the encoder"). All that a loss tells the
                encoder passes through it, and its gradient needs no backward pass through the encoder.
                quant_conv, the 1x1 after it, belongs to the bottleneck: the paper gives no reason, the
                authors' code takes conv_out.
      GAN       decoder.conv_out, as in VQGAN, from which the paper takes the idea."""
    rec_grad, = torch.autograd.grad(rec_loss, weight, retain_graph=True)  # (*weight.shape)
    other_grad, = torch.autograd.grad(other_loss, weight, retain_graph=True)
    grads = torch.stack([rec_grad, other_grad]).float()  # (2, *weight.shape)
    # Ours: the gradients of the global batch, so that N processes equal one.
    if dist.is_initialized():
        dist.all_reduce(grads)
        grads /= dist.get_world_size()
    rec_norm, other_norm = grads.flatten(1).norm(dim=1)
    # [Eq. 4] w_adaptive = |grad L_rec| / |grad L_vf|. VQGAN adds the 1e-4 against a division by 0, as
    # when every pair lies within its margin; the clamp is its 1e4 (GAN) and the authors' 1e8 (VF).
    return (rec_norm / (other_norm + 1e-4)).clamp(0.0, max_weight).detach()

class FoundationModel(nn.Module):
    """Image x (B, 3, H, W) in [-1, 1], grid (h, w) -> features F (B, d_f, h, w), fp32, no gradient.
    tokens(net, x) -> (B, d_f, h, w). patch: its patch size in pixels; the image is resized so that the patch
    grid is the latent's grid: 256 -> 224 for patch 14 and 16x16. 0: convolutional, no resizing."""
    def __init__(self, net, tokens, width, patch, mean, std):
        super().__init__()
        self.net = net.eval().requires_grad_(False)  # frozen
        self.tokens = tokens
        self.width = width  # d_f
        self.patch = patch
        self.bf16 = True  # autocast on CUDA; not with --vf-input authors
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    @torch.no_grad()  # no gradient into or through F: a target, "a frozen vision foundation model" [Sec. 3.1]
    def forward(self, x, grid):
        # each model's own mean and std, of images in [0, 1]
        x = ((x + 1) / 2 - self.mean) / self.std
        if self.patch:
            size = (grid[0] * self.patch, grid[1] * self.patch)
            x = F.interpolate(x, size, mode="bilinear", align_corners=False)
        with autocast(x, self.bf16 and x.is_cuda):
            f = self.tokens(self.net, x)  # (B, d_f, h, w)
        if tuple(f.shape[-2:]) != tuple(grid):
            raise ValueError(f"the foundation model's patch grid {tuple(f.shape[-2:])} "
                             f"is not the latent's grid {tuple(grid)}")
        return f.float()

# === Plumbing: nothing of the paper below this line ===
DINOV2_COMMIT = "b8931f7bf91576930313be2c6d6af376033b35f0"  # code from the network runs here: pinned
HALF = (0.5, 0.5, 0.5)  # as mean and std: leaves x in [-1, 1]
# [Table 4] ViT-L of each. OpenAI trained CLIP with QuickGELU: timm's name without it has another GELU.
TIMM_MODELS = {"mae": "vit_large_patch16_224.mae", "sam": "samvit_large_patch16.sa1b",
               "clip": "vit_large_patch14_clip_quickgelu_224.openai",
               "dinov2": "vit_large_patch14_dinov2.lvd142m"}

def load_foundation_model(name, grid=(16, 16), vf_input="model", mini=None):
    """Name -> FoundationModel: dinov2 (ViT-L/14), dinov2-s, -b, -l, -g, mae, clip, sam, or mini.
    grid: the latent's (h, w). vf_input "authors": images in [-1, 1] without the model's mean and std ("a
    small bug", they say) and fp32; for dinov2 timm's port, whose position table is resized with antialias.
    mini: the trained Classifier that stands in. .width is d_f. KeyError: there is no such model."""
    if name == "mini":
        return FoundationModel(mini, lambda net, x: net.features(x), mini.width, 0, HALF, HALF)
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
    """DINOv2 ViT-s/b/l/g 14 from torch.hub: the last layer's normalised patch tokens, no class token."""
    hub, name = torch.hub.get_dir(), f"dinov2_vit{size}14"
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # the hub's code would run what a file of weights holds
    try:
        # skip_validation: or torch.hub asks GitHub whether the commit is a branch's newest
        net = torch.hub.load(f"facebookresearch/dinov2:{DINOV2_COMMIT}", name, trust_repo=True,
                             skip_validation=True, verbose=False)
    except Exception as error:  # of the network; or of damaged files, where torch advises to load unsafely
        reason = error if isinstance(error, OSError) else f"damaged: {type(error).__name__}"
        raise UserError(
            f"cannot load DINOv2 ({reason}); without a network, unpack github.com/facebookresearch/dinov2 at "
            f"{DINOV2_COMMIT} as {hub}/facebookresearch_dinov2_{DINOV2_COMMIT}, put dl.fbaipublicfiles.com/"
            f"dinov2/{name}/{name}_pretrain.pth in {hub}/checkpoints, or use --vf none") from error

    def tokens(net, x):
        f = net.forward_features(x)["x_norm_patchtokens"]  # (B, N, d_f)
        return f.mT.unflatten(2, (x.shape[-2] // 14, x.shape[-1] // 14))  # (B, d_f, h, w)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
    return FoundationModel(net, tokens, net.embed_dim, 14, mean, std)

def load_timm(name, grid):
    """MAE, CLIP, SAM [Sec. 6.2] or DINOv2 from timm (optional). CLIP's patch tokens are projected to the
    joint space, as the authors say they did."""
    model = TIMM_MODELS[name]
    with reading(f"--vf {name}"):
        import timm
    weights = hub_file(f"https://huggingface.co/timm/{model}/resolve/main/model.safetensors",
                       name=f"{model}.safetensors")
    # any image size; SAM's ViT takes it anyway
    dynamic = {} if name == "sam" else {"dynamic_img_size": True}
    with reading(weights):
        net = timm.create_model(model, pretrained=True, pretrained_cfg_overlay={"file": str(weights)},
                                **dynamic)
    patch, config = net.patch_embed.patch_size[0], net.pretrained_cfg

    def tokens(net, x):
        f = net.forward_features(x)
        if name == "sam":
            return f  # (B, 256, h, w) already
        f = f[:, net.num_prefix_tokens:]  # (B, N, C) without the class token
        if name == "clip":
            f = net.head(f)  # (B, N, 768), the joint space
        # to (B, C, h, w): row by row, as every ViT orders its patches
        return f.mT.unflatten(2, (x.shape[-2] // patch, x.shape[-1] // patch))
    width = tokens(net, torch.zeros(1, 3, grid[0] * patch, grid[1] * patch)).shape[1]
    return FoundationModel(net, tokens, width, patch, config["mean"], config["std"])

class Classifier(nn.Module):
    """Ours: a small convolutional classifier, x (B, 3, S, S) in [-1, 1] -> logits (B, classes).
    In one shape it stands in for DINOv2 in preset mini, in another it is fid.py's score network. stride:
    image size over map size, a power of two. width: channels of the map. The map is standardised per
    channel, by a BatchNorm without weights: after a ReLU it would have a large common mean, every cosine
    would be high and no margin of Eq. 2, 3 exceeded."""
    def __init__(self, classes, stride, width=64):
        super().__init__()
        # log2(stride) convolutions that halve, the first narrower, since its map is the largest; one more
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
    """uint8 images (N, 3, S, S), int64 labels (N,) -> the Classifier, trained, frozen, on `device`.
    AdamW, one-cycle rate, every second batch mirrored. Deterministic in `seed` and the net's weights."""
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
