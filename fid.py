"""Every measure in the tables of arXiv 2501.01423: FID, sFID, IS, precision, recall, rFID, PSNR, LPIPS, SSIM, uniformity.

    python fid.py                                    # scores runs/mini: its tokenizer (vae.pt) and its samples.npz
    python fid.py --preset imagenet256 --samples samples.npz --reference VIRTUAL_imagenet256_labeled.npz
    python fid.py --uniformity runs/mini/latents     # [Table 6, Fig. 6]
    python fid.py --table runs/*                     # many scores.json in the shape of [Table 2] and [Table 3]

Read it top to bottom: distances between features (pure functions), the two networks that make features, where images come from, then the three
things the command line does. "As in ADM" means as in the evaluator that published numbers come from (openai/guided-diffusion, evaluations/),
rebuilt here in PyTorch.

Numbers in the features of the small ScoreNet of preset mini are called mini-FID, mini-rFID, ...: they can be compared with each other over the same
training images, and never with an FID.
"""
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")                            # before torch is loaded; see train_vae.py
import hashlib
import json
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from scipy.stats import gaussian_kde
from torchvision.models import inception_v3
from tqdm import tqdm

from train_vae import (PAPER_SCORES, ROWS, Images, atomic_write, center_crop, fingerprint, load_tokenizer, opt, run_script, step_generator,
                       to_float, to_uint8, torch_load)
from vae import LPIPS, SPECS, fail, hub_file
from vf_loss import train_classifier


@dataclass
class Settings:
    preset: str = opt("mini", "named settings below; any flag overrides it")
    out: str = opt("", "run directory to score; scores.json goes there (default runs/PRESET)")
    samples: str = opt("", "images to score: a folder, an .npz batch or a run directory (default OUT/samples.npz)")
    reference: str = opt("", "what they are compared with: a folder, an .npz batch, ADM's reference .npz or a run directory "
                             "(default: the training images of the run)")
    num: int = opt(10_000, "score at most this many images of each source (evenly spaced over it)")
    features: str = opt("mini", "network that makes the features", choices=("mini", "inception"))
    inception_input: str = opt("tf", "how Inception's input is resized and scaled: as in TensorFlow 1, which published numbers use, or as in "
                                     "pytorch-fid", choices=("tf", "pytorch-fid"))
    cache: str = opt("", "folder of ScoreNet and of the references' statistics, which runs may share (default OUT)")
    vae: str = opt("", "tokenizer checkpoint whose reconstructions are scored (default OUT/vae.pt)")
    lpips: bool = opt(False, "also LPIPS of the reconstructions (downloads VGG16 once)")
    posterior: str = opt("mode", "reconstruct from the posterior's mode or from a sample", choices=("mode", "sample"))
    data: str | None = opt(None, "data set: its test images are reconstructed, its training images are the reference (default: the run's own)")
    image_size: int | None = opt(None, "pixels; images are centre-cropped to it as in training (default: the run's own)")
    seed: int = opt(1000, "ScoreNet's seed (another one than the VF teacher's), posterior samples and positions")
    steps: int = opt(400, "training steps of ScoreNet, the network behind every mini- score")
    batch_size: int = opt(100, "images a batch when features are extracted")
    device: str = opt("auto", "where to compute", choices=("auto", "cpu", "cuda"))
    uniformity: str = opt("", "instead: latent vectors (N, d) as .npy or .pt, or a latents folder, for Table 6")
    embedding: str = opt("tsne", "how --uniformity goes to 2-D; tsne needs scikit-learn", choices=("tsne", "pca"))
    uniformity_seeds: int = opt(3, "mean and std of --uniformity are over this many seeds")
    table: str = opt("", "instead: run directories, as in --table runs/*, whose scores become one Markdown table")


PRESETS = {
    # The defaults: everything from the run's own data in minutes, nothing downloaded.
    "mini": {},
    # [Table 3] 50,000 samples against ADM's reference batch (name it with --reference) in Inception's features.
    "imagenet256": dict(features="inception", num=50_000, batch_size=64, lpips=True),
}

# ---------------------------------------------------------------------------------------------------------------------
# Distances between two sets of features. No network from here to the next rule.


def sqrt_factor(sigma):
    """L (d, r) with L L^T = sigma, a covariance (d, d) of rank r. Eigenvalues that are rounding noise are dropped: their square roots (1e-8 for a
    noise of 1e-16) would add up to a visible distance in 2048 dimensions."""
    values, vectors = np.linalg.eigh(sigma)
    kept = values > len(values) * np.finfo(np.float64).eps * max(values[-1], 0)
    return vectors[:, kept] * np.sqrt(values[kept])                                                    # (d, r)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Frechet distance of two Gaussians: FID when mu (d,) and sigma (d, d) come from Inception features. >= 0.

    d = |mu1 - mu2|^2 + tr sigma1 + tr sigma2 - 2 tr (sigma1^1/2 sigma2 sigma1^1/2)^1/2

    Not scipy's sqrtm, which has given wrong FIDs (20.65 for 5.14 with SciPy 1.11.2, in an issue of the authors' code). With sigma_i = L_i L_i^T the
    last trace is the sum of the singular values of L1^T L2. That is the symmetric form without its final square root of eigenvalues, which would lose
    half the digits of d(a, a) = 0 [ours].
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(v, dtype=np.float64) for v in (mu1, sigma1, mu2, sigma2))
    cross = sqrt_factor(sigma1).T @ sqrt_factor(sigma2)                                                # (r1, r2)
    root_trace = np.linalg.svd(cross, compute_uv=False).sum() if cross.size else 0.0
    distance = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * root_trace
    return max(float(distance), 0.0)


def inception_score(probs, split=5000):
    """IS of class probabilities (N, C): mean over contiguous splits of exp(mean KL(p(c|x) || p(c))). The last split may be shorter, as in ADM; N
    below `split` is one split."""
    scores = []
    for part in torch.as_tensor(probs).double().split(split):                                          # (split, C)
        # KL(p || q) = sum p log p - p log q, q = mean p; xlogy makes 0 log 0 = 0
        kl = torch.xlogy(part, part) - torch.xlogy(part, part.mean(0, keepdim=True))
        scores.append(kl.sum(1).mean().exp().item())
    return sum(scores) / len(scores)


def precision_recall(reference, samples, k=3, block=2000):
    """Improved precision and recall of features (M, d) and (N, d), both in [0, 1], as in ADM.

    A feature's ball reaches to its k-th nearest neighbour in its own set, itself excluded.
    precision = share of samples inside any reference ball; recall = share of references inside any sample ball. Blocks of `block` rows bound the
    memory to block * max(M, N) float64. ADM computes the distances in half precision; ours are float64, so that the count does not depend on the
    block or the device.
    """
    reference, samples = torch.as_tensor(reference).double(), torch.as_tensor(samples).double()

    def squared(a, b):
        return ((a * a).sum(1)[:, None] + (b * b).sum(1) - 2 * a @ b.T).clamp_(min=0)                  # (A, B)

    def radii(x):
        # k + 1 smallest, since the nearest is the feature itself at distance 0
        return torch.cat([squared(rows, x).topk(k + 1, dim=1, largest=False).values[:, k] for rows in x.split(block)])

    radii_reference, radii_samples = radii(reference), radii(samples)                                  # (M,), (N,)
    recalled, precise = [], torch.zeros(len(samples), dtype=torch.bool, device=samples.device)
    for rows, radius in zip(reference.split(block), radii_reference.split(block)):
        distance = squared(rows, samples)                                                              # (block, N)
        precise |= (distance <= radius[:, None]).any(0)
        recalled.append((distance <= radii_samples).any(1))
    return precise.double().mean().item(), torch.cat(recalled).double().mean().item()


def psnr(x, y, data_range=1.0):
    """Peak signal-to-noise ratio in dB, (B,), of images (B, C, H, W) whose values span data_range."""
    # psnr = 10 log10(data_range^2 / mean((x - y)^2)); identical images give inf
    return 10 * torch.log10(data_range ** 2 / (x - y).square().mean((1, 2, 3)))


def ssim(x, y, data_range=1.0):
    """Structural similarity in [-1, 1], (B,), of images (B, C, H, W), H and W >= 6, values spanning data_range.

    Gaussian window 11x11, sigma 1.5, K = (0.01, 0.03) [Wang et al. 2004]; mean over every pixel, edges reflected, as in torchmetrics (leaving the
    outer 5 pixels out instead changes the third digit at 32x32).
    """
    g = torch.exp(-torch.arange(-5, 6, device=x.device, dtype=x.dtype) ** 2 / (2 * 1.5 ** 2))
    g = (g / g.sum())[None, None]                                                                      # (1, 1, 11)

    def blur(v):
        B, C, H, W = v.shape
        v = F.pad(v.reshape(B * C, 1, H, W), (5, 5, 5, 5), mode="reflect")                             # (BC, 1, H+10, W+10)
        return F.conv2d(F.conv2d(v, g[..., None]), g[:, :, None]).reshape(B, C, H, W)

    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    # ssim = (2 mx my + c1)(2 cov + c2) / ((mx^2 + my^2 + c1)(vx + vy + c2))
    value = (2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return value.mean((1, 2, 3))


class Statistics:
    """What all the measures need of a set of images, gathered batch by batch; the images themselves are not held.

    Running sums in float64 give mean and covariance (ddof 1, as np.cov) of the pooled and the spatial features. Kept whole are the pooled features
    (for precision and recall) and the class probabilities (for IS), a few kB an image.
    """

    def __init__(self):
        self.count, self.sums, self.pool, self.probs = 0, None, [], []

    def add(self, pool, spatial, probs):
        """pool (B, d), spatial (B, s), probs (B, C)."""
        self.count += len(pool)
        parts = [(v.sum(0), v.T @ v) for v in (pool.double(), spatial.double())]                       # (d,), (d, d)
        if self.sums is None:
            self.sums = parts
        else:
            for (total, outer), (part, part_outer) in zip(self.sums, parts):
                total += part
                outer += part_outer
        self.pool.append(pool.cpu())
        self.probs.append(probs.cpu())

    def reference(self, keep=10_000):
        """The arrays of ADM's reference file, mu (d,), sigma (d, d), mu_s (s,), sigma_s (s, s), with at most `keep` evenly spaced pooled features
        (ADM's file has 10,000 images for precision and recall), and the count."""
        if self.count < 2:
            raise ValueError(f"{self.count} image(s) have no covariance: score at least 2, and thousands for a number worth comparing")
        out = {"count": np.int64(self.count)}
        for (total, outer), suffix in zip(self.sums, ("", "_s")):
            mu = total / self.count
            sigma = (outer - self.count * torch.outer(mu, mu)) / (self.count - 1)
            out |= {"mu" + suffix: mu.cpu().numpy(), "sigma" + suffix: sigma.cpu().numpy()}
        return out | {"pool": torch.cat(self.pool)[evenly(self.count, keep)].numpy()}


def evenly(count, num):
    """At most num evenly spaced indices into range(count): a folder sorted by class keeps all its classes."""
    return torch.arange(min(count, num)) * count // max(1, min(count, num))


def compare(ours, reference, names, device):
    """{name: value} of FID, sFID, IS, precision, recall (`names` in this order) of ours (Statistics) against a reference (the dict of
    Statistics.reference; what it lacks gives None)."""
    mine = ours.reference(keep=ours.count)
    fid, sfid = (frechet_distance(mine["mu" + s], mine["sigma" + s], reference["mu" + s], reference["sigma" + s])
                 if "mu" + s in reference else None for s in ("", "_s"))
    precision, recall = None, None
    if len(reference.get("pool", ())) > 3 and ours.count > 3:
        precision, recall = precision_recall(*(torch.from_numpy(p).to(device) for p in (reference["pool"], mine["pool"])))
    return dict(zip(names, (fid, sfid, inception_score(torch.cat(ours.probs)), precision, recall)))


# ---------------------------------------------------------------------------------------------------------------------
# The two networks that make features. Both: features(uint8 images (B, 3, H, W)) -> pool (B, d), spatial (B, s), probs (B, C).

INCEPTION_URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d"   # how that file's SHA-256 begins; by torch.hub's convention its name says so


def resize_tf1(x, size=299):
    """TensorFlow 1's bilinear resize of (B, C, H, W): source = destination * scale, without the half-pixel offset that F.interpolate has, and without
    antialiasing."""
    for dim in (3, 2):
        n = x.shape[dim]
        source = torch.arange(size, device=x.device, dtype=x.dtype) * (n / size)
        low = source.long()
        high = (low + 1).clamp(max=n - 1)
        weight = (source - low).reshape((1, 1, 1, size) if dim == 3 else (1, 1, size, 1))
        x = torch.lerp(x.index_select(dim, low), x.index_select(dim, high), weight)
    return x                                                                                           # (B, C, size, size)


class FIDInception(nn.Module):
    """The Inception of 2015 whose features FID, sFID and IS are defined on: torchvision's inception_v3 with 1008 classes, average pools that do not
    count their padding, and a MAX pool in the last block (a quirk of the original graph).

    spatial is the first 7 channels of TF's mixed_6/conv. A public weight map names it Mixed_6d.branch1x1, which comes first in Mixed_6d's output; we
    take it after its ReLU. Neither could be verified against the TF graph here.
    """

    def __init__(self, state_dict, input="tf"):
        super().__init__()
        net = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
        net.load_state_dict(state_dict)

        def uncount_padding(_, args):
            # mean over the pixels inside = mean with zeros counted / share of the window that is inside
            return args[0] / F.avg_pool2d(torch.ones_like(args[0][:1, :1]), 3, stride=1, padding=1)

        def max_pool_instead(block, args, out):
            branch = block.branch_pool(F.max_pool2d(args[0], 3, stride=1, padding=1))
            return torch.cat([out[:, :-branch.shape[1]], branch], 1)

        for name in ("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e", "Mixed_7b"):
            getattr(net, name).branch_pool.register_forward_pre_hook(uncount_padding)
        net.Mixed_7c.register_forward_hook(max_pool_instead)
        layers = [layer for name, layer in net.named_children() if name not in ("avgpool", "dropout", "fc")]
        cut = layers.index(net.Mixed_6d) + 1
        self.trunk, self.head = nn.Sequential(*layers[:cut]), nn.Sequential(*layers[cut:])
        self.fc, self.input = net.fc, input
        self.eval().requires_grad_(False)

    def features(self, images):
        x = images.float()
        if self.input == "tf":
            x = (resize_tf1(x) - 128) / 128
        else:
            x = 2 * F.interpolate(x / 255, (299, 299), mode="bilinear", align_corners=False) - 1
        x = self.trunk(x)                                                                              # (B, 768, 17, 17)
        spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)                                              # (B, 17*17*7 = 2023)
        pool = self.head(x).mean((2, 3))                                                               # (B, 2048)
        # IS as in ADM: the last layer without its bias
        return pool, spatial, (pool @ self.fc.weight.T).softmax(1)                                     # probs (B, 1008)


class ScoreNet(nn.Module):
    """Small plain convolutional classifier for mini-FID. Its architecture (no residuals), seed and purpose differ from the VF teacher's, so that a
    tokenizer aligned with the teacher is not scored by its own model. Any image size."""

    def __init__(self, num_classes, width=96):
        super().__init__()

        def conv(a, b, stride=1):
            return [nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]

        self.trunk = nn.Sequential(*conv(3, 32, 2), *conv(32, 64), nn.MaxPool2d(2), *conv(64, width))
        self.head = nn.Sequential(*conv(width, width), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x):
        """(B, 3, H, W) in [-1, 1] -> logits (B, C)."""
        return self.fc(self.head(self.trunk(x)))

    def features(self, images):
        x = self.trunk(to_float(images))                                                               # (B, 96, H/4, W/4)
        pool = self.head(x)                                                                            # (B, 96)
        return pool, x[:, :7].permute(0, 2, 3, 1).flatten(1), self.fc(pool).softmax(1)


def feature_network(s, run, device):
    """(network, description, identity): FID's Inception, or ScoreNet trained on the training images and kept in --cache."""
    if s.features == "inception":
        # torch.hub alone checks the hash of what it downloads only; hub_file also that of a file put there by hand
        path = hub_file(INCEPTION_URL, sha256=INCEPTION_SHA256)
        net = FIDInception(torch_load(path), s.inception_input)
        return net.to(device), f"Inception of 2015, {s.inception_input} input", f"{path.name} {s.inception_input}"
    train = dataset(s, run, "train")
    path, made_from = Path(s.cache or s.out) / "score_net.pt", [train.key, s.seed, s.steps]
    torch.manual_seed(s.seed)                                                  # its weights: the same for all runs on these images
    net = ScoreNet(len(train.images.classes)).to(device)
    saved = torch_load(path) if path.exists() else {}
    if saved.get("made_from") != made_from:
        x, y = torch.cat(list(train.batches(500, "training images"))), train.images.labels[train.chosen]
        net = train_classifier(net, x, y, s.steps, s.seed, device, "score network")
        test, right = dataset(s, run, "test"), 0
        for i, x in enumerate(test.batches(s.batch_size, "its test accuracy")):
            labels = test.images.labels[test.chosen][i * s.batch_size:][:len(x)]
            right += (net.features(x.to(device))[2].argmax(1).cpu() == labels).sum().item()
        saved = {"made_from": made_from, "accuracy": right / test.count, "state_dict": net.state_dict()}
        atomic_write(path, lambda file: torch.save(saved, file))
    net.load_state_dict(saved["state_dict"])
    name = f"ScoreNet, {s.steps} steps on {train.name}, test accuracy {100 * saved['accuracy']:.1f} %"
    return net.eval().requires_grad_(False), name, fingerprint(saved["state_dict"])


# ---------------------------------------------------------------------------------------------------------------------
# Where images come from. A Source has count, name, key (hash of the content) and batches() of uint8 (B, 3, H, W).


class Source:
    """Evenly spaced images, at most num, of a map-style data set that gives uint8 (3, H, W)."""

    def __init__(self, images, name, num, content):
        self.images, self.name, self.meta = images, name, {}
        self.chosen = evenly(len(images), num)
        self.count = len(self.chosen)
        self.key = hashlib.sha256(f"{content} {self.count}".encode()).hexdigest()

    def batches(self, batch_size, title):
        # Threads, since decoding releases Python's lock; the next batch is read while this one is being worked on.
        with ThreadPoolExecutor(os.cpu_count()) as threads, tqdm(total=self.count, desc=title, unit="image") as bar:
            pending = []
            for index in (*self.chosen.split(batch_size), []):
                ready, pending = pending, threads.map(self.images.__getitem__, list(map(int, index)))
                if ready:
                    batch = list(ready)
                    if len(sizes := {tuple(x.shape) for x in batch}) > 1:
                        fail(f"{self.name} holds images of several sizes, {sorted(sizes)}: name one with --image-size")
                    bar.update(len(batch))
                    yield torch.stack(batch)                                                           # (B, 3, H, W)


class NpzSource:
    """An ADM .npz: arr_0 uint8 (N, H, W, 3), read piece by piece and never held whole, "meta" (a JSON string of how the samples were made, written by
    sample.py) and, in reference files, the statistics mu, sigma, mu_s, sigma_s."""

    def __init__(self, path, num):
        self.path, self.name, self.statistics, self.count = path, str(path), {}, 0
        try:
            with np.load(path) as file:
                self.meta = json.loads(str(file["meta"])) if "meta" in file.files else {}
                self.statistics = {k: file[k] for k in ("mu", "sigma", "mu_s", "sigma_s") if k in file.files}
            with zipfile.ZipFile(path) as file:
                if "arr_0.npy" in file.namelist():
                    with file.open("arr_0.npy") as array:
                        self.shape, _, kind = self.header(array)
                        if kind != np.uint8 or len(self.shape) != 4 or self.shape[3] != 3:
                            fail(f"arr_0 of {path} is {kind} {self.shape}; a batch of samples is uint8 (N, H, W, 3)")
                    self.chosen = evenly(self.shape[0], num)
                    self.count = len(self.chosen)
        except (zipfile.BadZipFile, OSError, ValueError) as error:
            fail(f"cannot read {path}: {error}")
        with open(path, "rb") as file:
            digest = hashlib.sha256(str(num).encode())
            while piece := file.read(1 << 22):
                digest.update(piece)
        self.key = digest.hexdigest()

    @staticmethod
    def header(array):
        version = np.lib.format.read_magic(array)
        return getattr(np.lib.format, f"read_array_header_{version[0]}_{version[1]}")(array)

    def batches(self, batch_size, title):
        keep = np.zeros(self.shape[0], dtype=bool)
        keep[self.chosen] = True
        size = int(np.prod(self.shape[1:]))
        with zipfile.ZipFile(self.path) as file, file.open("arr_0.npy") as array, tqdm(total=self.count, desc=title, unit="image") as bar:
            self.header(array)
            for part in np.split(keep, range(batch_size, len(keep), batch_size)):
                x = np.frombuffer(bytearray(array.read(len(part) * size)), np.uint8)
                x = torch.from_numpy(x.reshape(-1, *self.shape[1:])[part]).permute(0, 3, 1, 2)         # (B, 3, H, W)
                bar.update(len(x))
                if len(x):
                    yield x.contiguous()


class Folder:
    """All PNG and JPEG files below a folder, sorted by path, RGB; centre-cropped as in training if a size is named."""

    def __init__(self, folder, image_size):
        self.files = sorted(f for f in Path(folder).rglob("*") if f.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
        self.image_size = image_size
        if not self.files:
            fail(f"no .png, .jpg or .webp below {folder}")

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        try:
            with Image.open(self.files[i]) as file:
                image = file.convert("RGB")
        except OSError as error:
            fail(f"cannot read {self.files[i]}: {error}")
        if self.image_size:
            image = center_crop(image, self.image_size)                                                # (H, W, 3)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)                                      # (3, H, W)

    def content(self):
        digest = hashlib.sha256(str(self.image_size).encode())
        for path in tqdm(self.files, desc="hash", unit="file"):
            digest.update(path.read_bytes())
        return digest.hexdigest()


def open_source(path, s, run):
    """Source of a folder of images, an .npz, or a run directory (its samples.npz)."""
    path = Path(path)
    if path.is_dir() and (path / "samples.npz").exists():
        path = path / "samples.npz"
    if path.is_dir():
        images = Folder(path, s.image_size)
        return Source(images, str(path), s.num, images.content())
    if path.suffix == ".npz" and path.exists():
        return NpzSource(path, s.num)
    return fail(f"{path} is no folder of images, .npz batch or run directory with samples.npz")


drawn_once = lru_cache(Images)     # two uses of a split share its images in memory


def dataset(s, run, split):
    """Source of the training or test images of --data, by default of the run's own. Keyed by what the settings say and 64 images of it, since a data
    set that is drawn or has a million files is not hashed whole."""
    data, size = s.data or run.get("data"), s.image_size or run.get("image_size")
    if not data or not size:
        fail(f"which images? There is no tokenizer in {s.out} that says so: name --data and --image-size")
    images = drawn_once(data, split, size)
    pixels = b"".join(images[int(i)].numpy().tobytes() for i in evenly(len(images), 64))
    content = f"{data} {split} {size} {len(images)} {hashlib.sha256(pixels).hexdigest()}"
    return Source(images, f"{data} {split} {size}x{size}", s.num, content)


# ---------------------------------------------------------------------------------------------------------------------
# Scores of a run.


@torch.no_grad()
def gather(source, net, s, device, title):
    """Statistics of a source in the features of net."""
    statistics = Statistics()
    for images in source.batches(s.batch_size, title):
        statistics.add(*net.features(images.to(device)))
    return statistics


def reference_statistics(source, net, identity, s, device):
    """The dict of Statistics.reference for a source, computed once for each content and network and kept as .npz in ADM's layout: in OUT for preset
    mini, whose network is the run's own, else in torch.hub's folder for all runs."""
    stored = getattr(source, "statistics", {})
    if s.features != "inception" or s.inception_input != "tf":
        stored = {}      # ADM's file holds statistics of TF-style Inception features and no others
    key = hashlib.sha256(f"{source.key} {identity}".encode()).hexdigest()[:16]
    path = (Path(s.cache or s.out) if s.features == "mini" else Path(torch.hub.get_dir()) / "fid_references") / f"reference-{key}.npz"
    if not path.exists() and source.count:
        arrays = gather(source, net, s, device, "reference").reference()
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, lambda file: np.savez(file, **arrays))
    cached = dict(np.load(path)) if source.count else {}
    if not cached and not stored:
        fail(f"{source.name} has neither images (arr_0) nor statistics (mu, sigma) that fit --features {s.features}")
    # What the file states (over the whole training set) goes before what its 10,000 images give.
    return {**({"pool": cached["pool"]} if stored and cached else cached), **stored}


@torch.no_grad()
def score_tokenizer(model, source, net, s, device):
    """Reconstruct every image of a source, in one pass and without a file: ({name: value}, Statistics of the originals).

    [Table 2] rFID, PSNR (dB), LPIPS, SSIM; the last three are means over images. All are taken on reconstructions that were rounded to 8 bits, as
    they would be on disk [ours].
    """
    lpips = LPIPS().to(device) if s.lpips else None
    real, fake, sums = Statistics(), Statistics(), torch.zeros(3, dtype=torch.float64)
    for step, images in enumerate(source.batches(s.batch_size, "reconstructions")):
        x = to_float(images.to(device))                                                                # (B, 3, H, W)
        posterior = model.encode(x)
        if s.posterior == "sample":
            generator = step_generator(device, s.seed, step)
            z = posterior.sample(torch.randn(posterior.mean.shape, generator=generator, device=device))
        else:
            z = posterior.mode()                                                                       # (B, d, h, w)
        x, y = images.to(device), to_uint8(model.decode(z))                                            # (B, 3, H, W)
        real.add(*net.features(x))
        fake.add(*net.features(y))
        p, q = x / 255, y / 255
        perceptual = lpips(2 * p - 1, 2 * q - 1).sum() if lpips else 0.0
        sums += torch.tensor([psnr(p, q).sum(), perceptual, ssim(p, q).sum()], dtype=torch.float64)
    ours, theirs = fake.reference(0), real.reference(0)
    rfid = frechet_distance(ours["mu"], ours["sigma"], theirs["mu"], theirs["sigma"])
    means = (sums / source.count).tolist()
    return dict(zip(("rFID", "PSNR", "LPIPS", "SSIM"), (rfid, means[0], means[1] if lpips else None, means[2]))), real


def score(s, device):
    """Score the run in OUT, or two sources named by flags; prints a table and writes OUT/scores.json."""
    # Features in full float32: the scripts' TF32 rounds to 10 bits, and a measure should not depend on the GPU.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    vae, samples = s.vae or str(Path(s.out) / "vae.pt"), s.samples or str(Path(s.out) / "samples.npz")
    model, run = None, {}
    if s.vae or Path(vae).exists():
        model, checkpoint = load_tokenizer(vae, device)
        # what the weights are, not what a flag said: a released file knows no settings
        spec = next((name for name, kwargs in SPECS.items() if kwargs == checkpoint["spec"]), "other")
        run = {**checkpoint["settings"], "spec": spec, "step": checkpoint["step"]}
    if not s.samples and not Path(samples).exists():
        if model is None:
            fail(f"nothing to score in {s.out}: run python train_vae.py first, or name --samples and --reference")
        samples = None
    source = open_source(samples, s, run) if samples else None      # before the network: a mistyped path should not cost a training
    target = open_source(s.reference, s, run) if s.reference else None
    if source and not source.count:
        fail(f"{source.name} has no images (arr_0) to score")
    net, description, identity = feature_network(s, run, device)
    scores, prefix = {"run": s.out, "features": s.features, "network": description}, "mini-" * (s.features == "mini")
    real = None
    if model is not None and (s.vae or not s.samples):
        test = dataset(s, run, "test")
        values, real = score_tokenizer(model, test, net, s, device)
        scores["tokenizer"] = {"values": {prefix * (k == "rFID") + k: v for k, v in values.items()}, "images": test.count,
                               "reference": f"the same images, {test.name}", "posterior": s.posterior, "settings": run}
    if samples:
        target = target or dataset(s, run, "train")
        reference = reference_statistics(target, net, identity, s, device)
        names = [prefix + name for name in ("FID", "sFID", "IS", "precision", "recall")]
        values = compare(gather(source, net, s, device, "samples"), reference, names, device)
        scores["samples"] = {"values": values, "images": source.count, "source": source.name, "reference": target.name,
                             "reference_images": int(reference.get("count", 0)), "meta": source.meta}
        if real is not None:
            # What real images that nobody trained on get: the value that the samples' may be held against.
            scores["real"] = {"values": compare(real, reference, names, device), "images": real.count}
    atomic_write(Path(s.out) / "scores.json", lambda file: file.write((json.dumps(scores, indent=1) + "\n").encode()))
    print(report(scores))


def number(value):
    return "-" if value is None else f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"


# What of an .npz batch's metadata stands beside its scores; scores.json keeps all of it.
SHOWN = ("model", "dit_step", "weights", "integrator", "steps", "shift", "guidance", "cfg_interval_start", "cfg_channels", "labels", "seed")


def report(scores):
    """The scores of one run as a Markdown table: beside each number how many images, against what, from where."""
    rows = [f"{scores['run']} in the features of {scores['network']}", "",
            "| measure | value | images | against | made by |", "|---|---|---|---|---|"]
    about = {}
    if t := scores.get("tokenizer"):
        made = ", ".join(f"{k} {t['settings'][k]}" for k in ("preset", "spec", "vf", "step") if k in t["settings"])
        about["tokenizer"] = t["reference"], f"tokenizer ({made}), posterior {t['posterior']}"
    if t := scores.get("samples"):
        size = f", {t['reference_images']} images" if t["reference_images"] else ", statistics stored in it"
        made = ", ".join(f"{k} {t['meta'][k]}" for k in SHOWN if k in t["meta"])
        about["samples"] = t["reference"] + size, f"{t['source']} ({made or 'it says nothing about how'})"
        about["real"] = t["reference"] + size, "real test images, for comparison"
    for part in ("tokenizer", "samples", "real"):
        for name, value in scores.get(part, {"values": {}})["values"].items():
            rows.append(f"| {name} | {number(value)} | {scores[part]['images']} | {about[part][0]} | {about[part][1]} |")
    if "samples" not in scores:
        rows += ["", "No samples.npz: the tokenizer alone was scored. python train_dit.py and python sample.py make samples."]
    if any(v is None for v in scores.get("tokenizer", {"values": {}})["values"].values()):
        rows += ["", "LPIPS was skipped; --lpips computes it (VGG16's weights are downloaded once)."]
    return "\n".join(rows)


# ---------------------------------------------------------------------------------------------------------------------
# [Table 2, 3] Many runs in one table, the paper's numbers in brackets where the setting is the same.

# [Table 2] FID-10K of LightningDiT-L and -XL (80 epochs); those of B (160) and the tokenizers' own scores are train_vae.py's ROWS.
PAPER_LARGE = {
    "table2-f16d16-none": (9.49, 8.28), "table2-f16d16-mae": (10.93, 9.19), "table2-f16d16-dinov2": (10.02, 8.71),
    "table2-f16d32-none": (12.86, 10.92), "table2-f16d32-mae": (11.51, 9.92), "table2-f16d32-dinov2": (9.82, 8.22),
    "table2-f16d64-none": (20.73, 17.24), "table2-f16d64-mae": (14.40, 11.69), "table2-f16d64-dinov2": (14.95, 11.98)}
# [Table 3] LightningDiT-XL/1 on VA-VAE (training epochs, guided): gFID, sFID, IS, Pre., Rec. of 50,000 samples
PAPER_SYSTEMS = {
    (64, False): (5.14, 4.22, 130.2, 0.76, 0.62), (64, True): (2.11, 4.16, 252.3, 0.81, 0.58),
    (800, False): (2.17, 4.36, 205.6, 0.77, 0.65), (800, True): (1.35, 4.15, 295.3, 0.79, 0.65)}


def beside(values, paper):
    """Cells with our number and, in brackets, the paper's."""
    return [number(v) + (f" ({p:g})" if p is not None else "") for v, p in zip(values, paper)]


def paper_tokenizer(scores):
    """(rFID, PSNR, LPIPS, SSIM, gFID) that the paper has for the setting of these scores; None for what it lacks."""
    nothing, setting = (None,) * 5, scores.get("tokenizer", {}).get("settings", {})
    row = {"imagenet256": "table2-f16d32-dinov2"}.get(setting.get("preset"), setting.get("preset"))
    # Same: a preset of the paper with none of the row's settings overridden, 256x256 images, Inception's features.
    if (scores["features"], setting.get("image_size")) != ("inception", 256) or row not in PAPER_SCORES or \
            any(setting.get(k) != v for k, v in ROWS[row][0].items()):
        return nothing
    *reconstruction, base = PAPER_SCORES[row]
    samples = scores.get("samples", {"images": 0, "meta": {}})
    if samples["images"] != 10_000 or float(samples["meta"].get("guidance", 1)) != 1:
        return *reconstruction, None       # the tables' gFID is of 10,000 samples without guidance
    large, xl = PAPER_LARGE.get(row, (None, None))
    return *reconstruction, {"B": base, "L": large, "XL": xl}.get(samples["meta"].get("model", "").split("/")[0])


def table(runs):
    """Markdown of the scores.json of many runs: tokenizers as in [Table 2], samples as in [Table 3]."""
    found = [json.loads(p.read_text()) for p in (Path(r) / "scores.json" for r in runs) if p.exists()]
    if not found:
        fail(f"no scores.json in {', '.join(runs) or 'no directory at all'}: run python fid.py --out DIR for each first")
    tokenizers = ["| run | Spec. | VF loss | rFID | PSNR | LPIPS | SSIM | model | gFID | images |", "|" + "---|" * 10]
    systems = ["| run | model | guidance | gFID | sFID | IS | Pre. | Rec. | images |", "|" + "---|" * 9]
    for scores in found:
        name = scores["run"] + " (mini-)" * (scores["features"] == "mini")
        t, samples = scores.get("tokenizer"), scores.get("samples", {"values": {}, "images": "-", "meta": {}})
        generated, meta = list(samples["values"].values()), samples["meta"]
        model, guidance = meta.get("model", "-"), meta.get("guidance", "-")
        if t:
            cells = beside([*t["values"].values(), *(generated[:1] or [None])], paper_tokenizer(scores))
            cells = [name, t["settings"].get("spec", "-"), t["settings"].get("vf", "-"), *cells[:4], model, cells[4]]
            tokenizers.append(f"| {' | '.join(cells)} | {t['images']} / {samples['images']} |")
        if generated:
            epochs = {"official-64ep": 64, "official-800ep": 800}.get(meta.get("preset"))
            published = scores["features"] == "inception" and samples["images"] == 50_000
            paper = PAPER_SYSTEMS.get((epochs, guidance != 1)) if published else None
            cells = beside(generated, paper or [None] * 5)
            systems.append(f"| {name} | {model} | {guidance} | {' | '.join(cells)} | {samples['images']} |")
    note = "In brackets: the paper's number for the same setting. (mini-): FID, IS, Pre., Rec. in ScoreNet's features, not Inception's: no FID."
    return "\n".join([*tokenizers, "", *systems, "", note])


# ---------------------------------------------------------------------------------------------------------------------
# [Table 6, Fig. 6] Uniformity of the latent distribution.


def uniformity(points, density=None):
    """How evenly points (N, 2) lie: {"density cv", "gini", "normalized entropy"} of a Gaussian KDE at the points.

    Even: cv and Gini 0, entropy 1. density (N,) is computed if not given (Scott's bandwidth, scipy's default).
    """
    density = gaussian_kde(points.T)(points.T) if density is None else density                         # (N,)
    N, p = len(density), density / density.sum()
    # gini = sum_ij |d_i - d_j| / (2 N^2 mean d) = sum_i (2 i - N - 1) d_i / (N sum d), d sorted upwards, i from 1
    gini = ((2 * np.arange(1, N + 1) - N - 1) * np.sort(p)).sum() / N
    return {"density cv": density.std() / density.mean(), "gini": gini, "normalized entropy": -(p * np.log(p)).sum() / np.log(N)}


def latent_vectors(path, seed, num=10_000):
    """Float64 (N, d), N <= num: rows of an array (N, d), or one random position of each of N random images of a latents folder. Normalised per
    channel, unless d = 2: such points are already an embedding."""
    rng, path = np.random.default_rng(seed), Path(path)
    if path.is_dir():
        path = path / "latents.npy"
    if path.suffix not in (".npy", ".pt") or not path.exists():
        fail(f"--uniformity takes a .npy or .pt file of vectors (N, d), or a folder with latents.npy; got {path}")
    z = np.load(path, mmap_mode="r") if path.suffix == ".npy" else torch_load(path).numpy()
    z = z[:, 0] if z.ndim == 5 else z                          # train_dit.py stores each image plain and flipped: the plain one
    if z.ndim not in (2, 4) or len(z) < 3:
        fail(f"{path} has shape {z.shape}; vectors are (N, d), latents (N, d, h, w) or (N, 2, d, h, w)")
    chosen = np.sort(rng.permutation(len(z))[:num])
    if z.ndim == 4:
        rows, columns = rng.integers(z.shape[2], size=len(chosen)), rng.integers(z.shape[3], size=len(chosen))
        z = np.stack([z[i, :, r, c] for i, r, c in zip(chosen, rows, columns)])                        # (N, d)
    else:
        z = z[chosen]
    z = np.asarray(z, dtype=np.float64)
    return z if z.shape[1] == 2 else (z - z.mean(0)) / (z.std(0) + 1e-12)


def embed(z, how, seed):
    """(N, d) -> (N, 2). t-SNE with perplexity 30, as the paper's figure; or the two principal components."""
    if z.shape[1] == 2:
        return z
    if how == "pca":
        return z @ np.linalg.svd(z - z.mean(0), full_matrices=False)[2][:2].T                          # (N, 2)
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        fail("t-SNE needs scikit-learn: pip install scikit-learn, or use --embedding pca")
    return TSNE(perplexity=min(30, (len(z) - 1) / 3), random_state=seed, n_jobs=-1).fit_transform(z).astype(np.float64)


def scatter(points, density, path, size=800):
    """PNG of points (N, 2), 3x3 pixels each, from dark blue (sparse) to yellow (dense) [Fig. 6]."""
    anchors = np.array([[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]])    # viridis
    level = (density - density.min()) / (np.ptp(density) + 1e-12) * 4
    colour = np.stack([np.interp(level, range(5), anchors[:, c]) for c in range(3)], 1)                # (N, 3)
    unit = (points - points.min(0)) / (np.ptp(points, axis=0) + 1e-12)
    canvas = np.full((size, size, 3), 255, np.uint8)
    for x, y, c in zip(*(unit * (size - 4)).astype(int).T, colour):
        canvas[size - 4 - y:size - 1 - y, x:x + 3] = c
    atomic_write(path, lambda file: Image.fromarray(canvas).save(file, "PNG"))


def score_uniformity(s):
    """Print and save (OUT/uniformity.json, .png) mean and std over seeds of the three measures of [Table 6]."""
    results = []
    for seed in tqdm(range(s.seed, s.seed + s.uniformity_seeds), desc="embedding and density", unit="seed"):
        z = latent_vectors(s.uniformity, seed)
        points = embed(z, s.embedding, seed)
        density = gaussian_kde(points.T)(points.T)
        results.append(uniformity(points, density))
    how = "points taken as they are (2-D)" if z.shape[1] == 2 else s.embedding
    scatter(points, density, Path(s.out) / "uniformity.png")
    summary = {k: [float(np.mean([r[k] for r in results])), float(np.std([r[k] for r in results]))] for k in results[0]}
    record = {"file": s.uniformity, "vectors": list(z.shape), "embedding": how, "seeds": s.uniformity_seeds, **summary}
    atomic_write(Path(s.out) / "uniformity.json", lambda file: file.write((json.dumps(record, indent=1) + "\n").encode()))
    print(f"{s.uniformity}: {len(z)} vectors of {z.shape[1]} channels, {how}, {s.uniformity_seeds} seeds\n")
    print("| measure | mean | std |\n|---|---|---|")
    for name, (mean, std) in summary.items():
        print(f"| {name} | {mean:.4f} | {std:.4f} |")
    print(f"\nscatter: {Path(s.out) / 'uniformity.png'}")


def main(s, world):
    if s.table:
        print(table(s.table.split(os.pathsep)))
    elif s.uniformity:
        score_uniformity(s)
    else:
        score(s, world.device)


if __name__ == "__main__":
    if "--table" in sys.argv:       # takes all that follows up to the next flag, since a shell expands runs/*
        start = sys.argv.index("--table") + 1
        end = next((i for i in range(start, len(sys.argv)) if sys.argv[i].startswith("--")), len(sys.argv))
        sys.argv[start:end] = [os.pathsep.join(sys.argv[start:end])]
    run_script(Settings, PRESETS, __doc__, main)
