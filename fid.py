"""Every measure in the paper's tables: FID, sFID, IS, precision, recall, PSNR, LPIPS, SSIM, uniformity.

Paper: arXiv 2501.01423, Tables 1 to 6, A1 to A3, which define no measure. "As in ADM" means as in
openai/guided-diffusion, evaluations/, whose numbers papers report. Tokenizers: as in the authors' code.

Read it top to bottom: distances between two sets of features, then between two images; uniformity; the
Inception behind every FID; score_tokenizer, which reconstructs the test images and compares.

    python fid.py                                    the mini run: its vae.pt and its samples.npz
    python fid.py --preset imagenet256 --out RUN --reference VIRTUAL_imagenet256_labeled.npz
    python fid.py --uniformity runs/mini/latents     Table 6, Fig. 6

mini-FID, mini-rFID ... are numbers in the features of ScoreNet, a small network trained on the run's own
images: comparable with each other over the same images, never with an FID.
"""
import os
import signal

if __name__ == "__main__":  # Ctrl-C while torch is loading: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)
# Before torch is loaded: a waiting CPU thread spins for a moment, then sleeps (see train_vae.py).
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import gaussian_kde
from torch import nn

from train_vae import opt, run_script, save_checkpoint, step_generator, to_float, to_uint8, write_json
from vae import LPIPS, reading, require


@dataclass
class Settings:
    # The defaults are preset imagenet256. Each is a flag; what stands beside or below it is its --help.
    preset: str = "imagenet256"  # named settings; every other flag overrides one of them
    out: str = ""  # folder of the run, and of scores.json; default runs/PRESET
    # --- what is scored
    vae: str = ""  # tokenizer whose reconstructions are scored; default OUT/vae.pt
    unfinished: bool = False  # take a tokenizer whose training has not ended
    samples: str = ""  # images to score: a folder, an .npz batch or a run; default OUT/samples.npz
    reference: str = ""  # what they are compared with: the same, or ADM's .npz; default: training images
    data: str = ""  # data set whose test images are reconstructed; default: the tokenizer's
    image_size: int = opt(0, "[0, 8192]")  # side of its images in pixels; 0: the tokenizer's
    # An FID falls as images are added: 50,000 in Table 3 and of validation images, 10,000 in Table 2
    num: int = opt(50_000, "[2, inf)")  # images of each kind at most; of more, a random subset
    # --- how. ADM's network ran in TensorFlow 1, whose resize shifts every feature a little.
    features: str = opt("inception", choices=("inception", "mini"))  # network behind the measures
    inception_input: str = opt("tf", choices=("tf", "pytorch-fid"))  # how samples are resized for it
    # The authors' code for tokenizers; the paper gives no reason for these three. The crop alone is worth up
    # to 1.9 dB of PSNR. A sample of the posterior is also what LightningDiT learns from.
    rfid_input: str = opt("pytorch-fid", choices=("tf", "pytorch-fid"))  # the same for rFID
    crop: str = opt("resize", choices=("resize", "adm"))  # of test images: the authors', or ADM's
    posterior: str = opt("sample", choices=("sample", "mode"))  # what is decoded
    lpips: bool = True  # LPIPS of reconstructions; VGG16's weights are downloaded once
    steps: int = 250  # training steps of ScoreNet, the network of --features mini
    cache: str = ""  # folder of ScoreNet, which runs may share; default OUT
    uniformity: str = ""  # instead: vectors (N, d) as .npy or .pt, or a folder of latents
    embedding: str = opt("tsne", choices=("tsne", "pca"))  # to points in a plane; tsne needs scikit-learn
    uniformity_seeds: int = opt(3, "[1, inf)")  # mean and std are over this many seeds
    seed: int = opt(1000, "[0, 9e18]")  # of ScoreNet (another than the stand-in's), posterior, t-SNE
    batch_size: int = opt(64, "[1, 1e5]")  # images at once
    workers: int = opt(8, "[0, 512]")  # loading processes of each process
    device: str = opt("auto", choices=("auto", "cuda", "cpu"))  # auto: CUDA if there is one

# Ours: all from the run's own images, in seconds on two CPU cores, without a download.
MINI = {"features": "mini", "num": 10_000, "crop": "adm", "posterior": "mode", "lpips": False, "workers": 0}
PRESETS = {"mini": MINI, "imagenet256": {}}

# --- Distances between two sets of features --------------------------------------------------------
def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Mean (d,) and covariance (d, d) of two sets -> distance of the two Gaussians; 0 up to rounding.
    FID in Inception's pooled features, sFID in its spatial ones. Not scipy's sqrtm, which has given FIDs of
    20.65 for 5.14 (SciPy 1.11.2, in an issue of the authors' code)."""
    mu1, sigma1, mu2, sigma2 = [torch.as_tensor(v).cpu().double() for v in (mu1, sigma1, mu2, sigma2)]

    def factor(sigma):  # L (d, r), L L^T = sigma (d, d), of rank r
        values, vectors = torch.linalg.eigh(sigma)
        # the root of a rounding noise of 1e-16 is 1e-8; 2048 of them would be a visible distance
        kept = values > len(values) * torch.finfo(torch.float64).eps * values[-1].clamp(min=0)
        return vectors[:, kept] * values[kept].sqrt()

    # With sigma_i = L_i L_i^T, tr (sigma1 sigma2)^1/2 is the sum of the singular values of L1^T L2. Ours: the
    # usual roots of eigenvalues lose half the digits of d(a, a) = 0.
    root = torch.linalg.svdvals(factor(sigma1).T @ factor(sigma2))  # (min(r1, r2),)
    # d = |mu1 - mu2|^2 + tr sigma1 + tr sigma2 - 2 tr (sigma1 sigma2)^1/2
    return ((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * root.sum()).item()

def inception_score(probs, split=5000):
    """Class probabilities (N, C) -> IS in [1, C]: mean over contiguous splits; the last may be short.
    5,000, as in ADM, is a tenth of 50,000, as IS's authors split. It matters: IS grows with the split."""
    scores = []
    for p in torch.as_tensor(probs).double().split(split):  # (split, C)
        # KL_i = sum_c p_ic (log p_ic - log q_c), q = mean_i p_i; xlogy makes 0 log 0 = 0
        kl = (torch.xlogy(p, p) - torch.xlogy(p, p.mean(0, keepdim=True))).sum(1)  # (split,)
        # IS = exp(mean_i KL_i)
        scores.append(kl.mean().exp().item())
    return sum(scores) / len(scores)

def precision_recall(reference, samples, k=3, block=2000):
    """Features (M, d), (N, d) -> improved precision and recall in [0, 1] [Kynkaanniemi et al. 2019].
    Each feature has a ball that reaches to its k-th neighbour in its own set, itself left out; k = 3 is
    theirs, since larger balls take everything in. ADM measures in half precision; ours is float64, so that
    the count depends on no device. Blocks bound the memory to block * max(M, N) numbers."""
    reference, samples = torch.as_tensor(reference).double(), torch.as_tensor(samples).double()

    def share(points, centres):
        # of the k + 1 smallest distances in a set, the first is the feature's distance to itself
        nearest = [torch.cdist(c, centres).topk(k + 1, largest=False).values for c in centres.split(block)]
        radii = torch.cat(nearest)[:, k]  # (number of centres,)
        inside = [(torch.cdist(p, centres) <= radii).any(1) for p in points.split(block)]
        return torch.cat(inside).double().mean().item()

    # precision: share of samples in any ball of a reference; recall: the other way round
    return share(samples, reference), share(reference, samples)

# --- Distances between two images ------------------------------------------------------------------
def psnr(x, y, data_range=1.0):
    """Images (B, C, H, W), values spanning data_range -> peak signal-to-noise ratio in dB, (B,)."""
    # psnr = 10 log10(data_range^2 / mean (x - y)^2); inf for equal images
    return 10 * torch.log10(data_range ** 2 / (x - y).square().mean((1, 2, 3)))

def ssim(x, y, data_range=1.0):
    """Images (B, C, H, W), H and W >= 6, values spanning data_range -> structural similarity (B,), <= 1.
    Gaussian window of 11x11, sigma 1.5, K = (0.01, 0.03) [Wang et al. 2004]; mean over every pixel, edges
    reflected, as in torchmetrics, which the authors use."""
    def blur(v):
        return transform.gaussian_blur(v, 11, 1.5)

    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    # ssim = (2 mx my + c1)(2 cov + c2) / ((mx^2 + my^2 + c1)(vx + vy + c2))
    value = (2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return value.mean((1, 2, 3))

# --- Uniformity of the latents [Table 6] -----------------------------------------------------------
def density_measures(density):
    """Densities (N,) > 0 at N points -> {"density cv", "gini", "normalized entropy"}: 0, 0, 1 if equal."""
    N, p = len(density), np.sort(density / density.sum())
    # gini = sum_ij |d_i - d_j| / (2 N^2 mean d) = sum_i (2 i - N - 1) p_i / N, p sorted, i from 1
    gini = ((2 * np.arange(1, N + 1) - N - 1) * p).sum() / N
    # entropy = -sum_i p_i log p_i / log N; cv = std d / mean d
    entropy = -(p * np.log(p)).sum() / np.log(N)
    return {"density cv": density.std() / density.mean(), "gini": gini, "normalized entropy": entropy}

def uniformity(points):
    """Points (N, 2) -> these, of their Gaussian KDE. Scott's bandwidth, scipy's; the paper names none."""
    return density_measures(gaussian_kde(points.T)(points.T))

# --- The network behind every FID -------------------------------------------------------------------
class FIDInception(nn.Module):
    """Inception of 2015, in whose features FID, sFID and IS are defined, from pytorch-fid's file.
    uint8 images (B, 3, H, W) -> pool (B, 2048), spatial (B, 2023), probs (B, 1008). input: "tf", as published
    numbers were made, or "pytorch-fid"; for 256 -> 299 pixels every feature differs slightly."""

    def __init__(self, state_dict, input="tf", path="the file"):
        super().__init__()
        inception = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False).eval()
        load_weights(inception, state_dict, path)
        self.input, self.fc = input, inception.fc
        # torchvision's network but for two quirks of the graph of 2015, which the weights were trained with:
        # average pools count no padding, and the one in the last of nine blocks is a max pool
        self.net = create_feature_extractor(inception, ["Mixed_6d", "avgpool"])
        pools = [node for node in self.net.graph.nodes if node.target is F.avg_pool2d]
        for node in pools:
            node.kwargs = node.kwargs | {"count_include_pad": False}
        pools[-1].target, pools[-1].kwargs = F.max_pool2d, {"kernel_size": 3, "stride": 1, "padding": 1}
        self.net.recompile()
        self.eval().requires_grad_(False)

    def forward(self, images):
        x = images.float()
        if self.input == "tf":
            x = (resize_tf1(x) - 128) / 128
        else:
            x = 2 * F.interpolate(x / 255, (299, 299), mode="bilinear") - 1
        x = self.net(x)  # {"Mixed_6d": (B, 768, 17, 17), "avgpool": (B, 2048, 1, 1)}
        # sFID's features still know where things are. TF's mixed_6/conv is Mixed_6d.branch1x1 in a public map
        # of the weights, here after its ReLU: not verified. Of 7 channels: about as many numbers as pool has.
        spatial = x["Mixed_6d"][:, :7].permute(0, 2, 3, 1).flatten(1)  # (B, 17 * 17 * 7)
        pool = x["avgpool"].flatten(1)  # (B, 2048)
        # IS as in ADM, which multiplies by the last layer's weight and gives no reason to leave out its bias
        return pool, spatial, (pool @ self.fc.weight.T).softmax(1)

# --- A tokenizer and its test images [Table 2] -----------------------------------------------------
@torch.no_grad()
def score_tokenizer(model, images, net, s, world):
    """Images, uint8 or float in [0, 1] -> {"rFID", "PSNR", "LPIPS", "SSIM"}; the last three: means of all.
    rFID and PSNR see 8 bits, as picture files have, LPIPS and SSIM floats: the authors' code."""
    with world.first():
        lpips = LPIPS().to(world.device) if s.lpips else None
    parts = []
    for index, x in batches(images, s, world, "reconstructions"):
        x = to_float(x) if x.dtype == torch.uint8 else 2 * x - 1  # (B, 3, H, W) in [-1, 1]
        posterior = model.encode(x)
        z = posterior.mode()  # (B, d, h, w)
        if s.posterior == "sample":
            noise = [torch.randn(z.shape[1:], generator=step_generator("cpu", s.seed, i)) for i in index]
            z = posterior.sample(torch.stack(noise).to(z))
        y = model.decode(z)  # (B, 3, H, W), not clipped
        require(y.abs().max() < 1000, f"{s.vae} gives images that are not finite, or far from [-1, 1]: "
                "its weights are broken")
        # to_uint8 rounds; theirs, 127.5 x + 128 truncated, is the same
        x8, y8 = to_uint8(x), to_uint8(y)
        # of the features only the pool. SSIM's input is clipped, as torchmetrics does; LPIPS's is not
        part = [net(x8)[0], net(y8)[0], psnr(x8.float(), y8.float(), 255.0),
                ssim(x.clamp(-1, 1), y.clamp(-1, 1), data_range=2.0)]
        if lpips:
            part.append(lpips(x, y).flatten())
        parts.append(part)
    real, fake, *measures = gathered(parts, world)
    means = dict(zip(("PSNR", "SSIM", "LPIPS"), (values.double().mean().item() for values in measures)))
    return {"rFID": frechet_distance(*gaussian(fake), *gaussian(real)), "PSNR": means["PSNR"],
            "LPIPS": means.get("LPIPS"), "SSIM": means["SSIM"]}

# === Plumbing: nothing of the paper below this line ===
import json
from functools import partial
from itertools import count

import torch.distributed as dist
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.models import inception_v3
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.transforms import functional as transform
from tqdm import tqdm

from train_dit import read_latents
from train_vae import Images, atomic_write, center_crop, load_checkpoint, loader, open_image
from vae import SPECS, UserError, hub_file, load_tokenizer, load_weights, torch_load
from vf_loss import Classifier, train_classifier


# --- Images ----------------------------------------------------------------------------------------
def authors_crop(image, size, where=None):
    """RGB PIL image -> float (3, size, size) in [0, 1], as the authors evaluate: resized as floats, bilinear
    with antialias, then the centre. ADM's center_crop is bicubic on 8 bits: sharper."""
    return transform.center_crop(transform.resize(transform.to_tensor(image), size, antialias=True), size)

def dataset(s, run, split, crop=center_crop):
    """Images of the split "train" or "test" of --data, by default of the data that the tokenizer was trained
    on (`run` holds its settings), with what Pictures has."""
    data, size = s.data or run.get("data"), s.image_size or run.get("image_size", 0)
    require(data and size >= 8, f"--data {data} --image-size {size}: name images, 8 pixels or more, or --vae")
    images = Images(data, split, size, crop)
    images.name, images.statistics, images.meta = f"{data} {split} {size}x{size}", {}, {}
    return images

# of a reference's pool and spatial features, by ADM's names
STATISTICS = {"mu": (2048,), "sigma": (2048, 2048), "mu_s": (2023,), "sigma_s": (2023, 2023)}

class Pictures(Dataset):
    """The pictures below a folder, by path, or those of an .npz batch or run: [i] uint8 (3, H, W).
    size: ADM's centre crop of files to it; 0: they must be of one size. An .npz is checked and read whole.
    .labels: arr_1, the classes (N,) that were asked for, or None. .meta: how they were made, if it says so.
    .statistics: those of `wanted` {name: shape} that it holds; an .npz with some may lack images."""
    labels, meta, statistics = None, {}, {}

    def __init__(self, path, size=0, wanted=()):
        path = Path(path)
        if (path / "samples.npz").exists():
            path = path / "samples.npz"
        self.name, self.size = str(path), size
        if path.is_dir():
            self.items = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMG_EXTENSIONS)
            require(self.items, f"{path} holds no images and no samples.npz")
            self.size = size or open_image(self.items[0]).size
            return
        with reading(path, " than an .npz batch"), np.load(path) as archive:
            arrays = {name: np.asarray(value) for name, value in archive.items()}  # of what is no .npy: bytes
            self.meta = {} | json.loads(str(arrays.get("meta", "{}")))
            if "arr_1" in arrays:
                self.labels = torch.from_numpy(arrays["arr_1"].astype(np.int64, casting="same_kind"))
        self.items = x = arrays.get("arr_0", np.zeros((0, 0, 0, 3), np.uint8))
        whole = x.dtype == np.uint8 and x.shape[3:] == (3,)
        require(whole, f"{path}: arr_0 is {x.dtype} {x.shape}, not uint8 (N, H, W, 3)")
        whole = self.labels is None or self.labels.shape == x.shape[:1]
        require(whole, f"{path}: arr_1 does not hold a class for each image")
        self.statistics = {name: arrays[name] for name in wanted if name in arrays}
        for name, value in self.statistics.items():
            require(value.dtype.kind == "f" and value.shape == wanted[name] and np.isfinite(value).all(),
                    f"{path}: {name} is not finite, or not of shape {wanted[name]}")
        require(len(x) or self.statistics, f"{path} holds neither arr_0 nor statistics that fit --features")

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        image = self.items[i]
        if isinstance(image, Path):
            image = open_image(image)
            if isinstance(self.size, int):
                return center_crop(image, self.size)
            require(image.size == self.size, f"{self.items[i]} is not of {self.size}: name one --image-size")
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

# --- Features of many images -----------------------------------------------------------------------
def random_subset(n, num):
    """At most num indices below n, in order, always the same. Drawn by chance: a folder's files are sorted by
    class, balanced samples repeat their classes, and every tenth of those may be of one class."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))[:num].sort().values

def batches(images, s, world, title):
    """At most --num images, of which each process takes one contiguous part: pairs of indices, a list, and
    images (B, 3, H, W) on the device, of the images' own kind. UserError if there are too few."""
    chosen = random_subset(len(images), s.num)
    require(len(chosen) >= max(2, world.size), f"{title}: {len(chosen)} are too few; thousands make sense")
    mine = [part.tolist() for part in chosen.tensor_split(world.size)[world.rank].split(s.batch_size)]
    work = loader(images, s.workers, world.device, batch_sampler=mine)
    for index, x in zip(mine, tqdm(work, title, len(mine), unit="batch", disable=world.rank > 0)):
        yield index, x.to(world.device)

def gathered(parts, world):
    """For each batch a tuple of tensors -> one tuple for all images, of all processes, in the images' order.
    Held, not summed (Inception's of 50,000 images: 1 GB): what follows depends on no batch or process."""
    mine = [torch.cat(part).cpu() for part in zip(*parts)]
    shares = [mine] * world.size
    if world.size > 1:
        dist.all_gather_object(shares, mine, group=world.patient)
    return [torch.cat(part).to(world.device) for part in zip(*shares)]

def gaussian(x):
    """Features (N, d) -> mean (d,) and covariance (d, d) over N - 1, as numpy's; float64."""
    return x.double().mean(0), x.double().T.cov()

@torch.no_grad()
def features_of(images, net, s, world, title):
    """Images -> {"pool": (N, d), "probs": (N, C)} in the features of net, and STATISTICS; none, {}."""
    if not len(images):
        return {}
    pool, spatial, probs = gathered([net(x) for _, x in batches(images, s, world, title)], world)
    statistics = zip(STATISTICS, (*gaussian(pool), *gaussian(spatial)))
    return {"pool": pool, "probs": probs} | dict(statistics)

def compare(ours, reference, prefix=""):
    """The features_of samples and of a reference -> {prefix + name: value}: FID, sFID, IS, precision,
    recall; None where the reference lacks what it takes. The IS needs no reference: it asks whether each
    image is surely of some class, and all together of many."""
    values = dict.fromkeys(("FID", "sFID", "IS", "precision", "recall"))
    for name, mu, sigma in (("FID", "mu", "sigma"), ("sFID", "mu_s", "sigma_s")):
        if {mu, sigma} <= reference.keys():
            values[name] = frechet_distance(ours[mu], ours[sigma], reference[mu], reference[sigma])
    values["IS"] = inception_score(ours["probs"])
    pool = reference.get("pool", ())
    if min(len(pool), len(ours["pool"])) > 3:  # each has a third neighbour
        # M <= 10,000, as in ADM's file: all distances between references and samples are needed
        pool = pool[random_subset(len(pool), 10_000)]
        values["precision"], values["recall"] = precision_recall(pool, ours["pool"])
    return {prefix + name: value for name, value in values.items()}

# --- Networks --------------------------------------------------------------------------------------
def resize_tf1(x, size=299):
    """(B, C, H, W) -> (B, C, size, size), bilinear as in TensorFlow 1: no antialias, pixels at corners."""
    def weights(n):  # (size, n): how much of each of n pixels, which falls to 0 at the next one
        # source = destination * scale; everybody else has (destination + 1/2) * scale - 1/2
        source = (torch.arange(size, device=x.device) * (n / size)).clamp(max=n - 1)
        return F.relu(1 - (source[:, None] - torch.arange(n, device=x.device)).abs())
    return weights(x.shape[2]) @ x @ weights(x.shape[3]).T

def score_net(classifier, images):
    """ScoreNet, ours: the same features of a Classifier trained on the run's own images. Another shape
    and seed than those of VF loss's stand-in teacher: a pupil is not judged by its own teacher."""
    x = F.relu(classifier.features(to_float(images)))  # (B, 96, S/8, S/8)
    pool = x.mean((2, 3))  # (B, 96)
    return pool, x[:, :7].permute(0, 2, 3, 1).flatten(1), classifier.head(pool).softmax(1)

INCEPTION_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                 "pt_inception-2015-12-05-6726825d.pth")
INCEPTION_HASH = "sha256:6726825d"  # by torch.hub's custom the name says how it begins

def feature_network(s, run, world, input="tf"):
    """(network, its description): FID's Inception, or ScoreNet, trained by the first process and kept in
    --cache. Its file names the images, their number, the seed and the steps; others make it anew."""
    if s.features == "inception":
        with world.first():
            path = hub_file(INCEPTION_URL, INCEPTION_HASH)
        net = FIDInception(torch_load(path), input, path)
        return net.to(world.device), f"Inception of 2015, {input} input"
    train, path = dataset(s, run, "train"), Path(s.cache or s.out) / "score_net.pt"
    key = {"images": train.identity, "size": train.size, "num": s.num, "seed": s.seed, "steps": s.steps}
    torch.manual_seed(s.seed)  # its weights are a function of images and settings
    net, hint = Classifier(len(train.classes), 8, width=32), "remove it, or name another folder with --cache"
    made = load_checkpoint(path, "score_net", hint) if path.exists() else {}
    if repr(made.get("key")) != repr(key) and world.rank == 0:
        index = random_subset(len(train), s.num)
        x, y = torch.stack([train[i] for i in index.tolist()]), train.labels[index]
        net = train_classifier(net, x, y, s.steps, s.seed, world.device, "score network")
        save_checkpoint({"stage": "score_net", "key": key, "state_dict": net.state_dict()}, path)
    world.barrier()  # the others find its file
    made = load_checkpoint(path, "score_net", hint)
    load_weights(net, made.get("state_dict"), path)
    net = net.to(world.device).eval().requires_grad_(False)
    return partial(score_net, net), f"ScoreNet, {s.steps} steps on {train.name}"

# --- Scores of a run -------------------------------------------------------------------------------
def open_run(s, world):
    """The tokenizer to score, its settings, {kind: images} to score, and their reference; None, {} for what
    is not there or not asked. All is checked here, before a network is trained for it."""
    alone = bool(s.samples and not s.vae)  # samples by name: OUT's tokenizer only says which images
    model, run, kinds, reference = None, {}, {}, None
    if s.vae or Path(s.out, "vae.pt").exists():
        s.vae = s.vae or f"{s.out}/vae.pt"
        model, state = load_tokenizer(s.vae, world.device, unfinished=s.unfinished or alone)
        # the spec is what the weights are, not what a flag said: a released file knows no settings
        spec = next((name for name, kwargs in SPECS.items() if kwargs == state["spec"]), "other")
        run = state["settings"] | {"spec": spec, "step": state["step"]}
        require(s.image_size % model.f == 0, f"--image-size {s.image_size}: {s.vae} divides by {model.f}")
    if s.samples or Path(s.out, "samples.npz").exists():
        kinds["samples"] = Pictures(s.samples or s.out, s.image_size)
        if s.features == "mini":  # images that nobody has trained on: what the samples may be held against
            kinds["real"] = dataset(s, run, "test")
        # ADM's statistics are of its own features and no others
        wanted = STATISTICS if (s.features, s.inception_input) == ("inception", "tf") else ()
        reference = Pictures(s.reference, s.image_size, wanted) if s.reference else dataset(s, run, "train")
        sizes = {x.name: tuple(x[0].shape[1:]) for x in [*kinds.values(), reference] if len(x)}
        require(len(set(sizes.values())) == 1, f"these images are of several sizes: {sizes}")
    require(model or kinds, f"nothing to score in {s.out}: run train_vae.py first, or name --samples")
    return None if alone else model, run, kinds, reference

def main(s, world):
    """Score the run in OUT, or what flags name: a table, and OUT/scores.json, both from the first process."""
    if s.uniformity:
        return score_uniformity(s) if world.rank == 0 else None
    # TF32 rounds to 10 bits: a measure should not depend on the GPU
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    model, run, kinds, reference = open_run(s, world)
    net, description = feature_network(s, run, world, s.inception_input)
    prefix, scores = "mini-" if s.features == "mini" else "", {}
    if model:
        test = dataset(s, run, "test", authors_crop if s.crop == "resize" else center_crop)
        values = score_tokenizer(model, test, feature_network(s, run, world, s.rfid_input)[0], s, world)
        scores["tokenizer"] = {"values": {prefix + "rFID": values.pop("rFID"), **values}, "settings": run,
                               "images": min(s.num, len(test)), "source": s.vae, "against": test.name,
                               "crop": s.crop, "posterior": s.posterior, "rfid_input": s.rfid_input}
    if kinds:
        target = features_of(reference, net, s, world, reference.name) | reference.statistics
    for kind, images in kinds.items():
        ours = features_of(images, net, s, world, images.name)
        values = compare(ours, target, prefix)
        if prefix and images.labels is not None:  # Inception's 1,008 classes are no data set's
            right = ours["probs"].argmax(1).cpu() == images.labels[random_subset(len(images), s.num)]
            values["class accuracy"] = right.double().mean().item()
        scores[kind] = {"values": values, "images": len(ours["pool"]), "source": images.name, "against":
                        f"{reference.name} ({min(s.num, len(reference))} images)", "meta": images.meta}
    if world.rank == 0:
        head = {"run": s.out, "features": s.features, "network": description}
        save_scores(Path(s.out, "scores.json"), head | scores)
        print(f"{s.out} in the features of {description}\n")
        print("| measure | value | images | of | against |\n|---|---|---|---|---|")
        for part in scores.values():
            for name, value in part["values"].items():
                value = "-" if value is None else f"{value:.4g}"
                print(f"| {name} | {value} | {part['images']} | {part['source']} | {part['against']} |")
        made = [f"{name} {value}" for name, value in kinds["samples"].meta.items()] if kinds else ()
        print("\nsamples:", ", ".join(made) or "none, or they do not say how made")

def save_scores(path, scores):
    """Write a JSON file; one that is there and says something else is kept under another name."""
    if path.exists() and path.read_bytes() != (json.dumps(scores, indent=1) + "\n").encode():
        names = (path.with_name(f"{path.stem}-{k}.json") for k in count(1))
        kept = path.rename(next(name for name in names if not name.exists()))
        print(f"{path} held other scores: they are now in {kept}")
    write_json(path, scores)

# --- Uniformity [Table 6, Fig. 6] ------------------------------------------------------------------
def latent_vectors(path, seed, num=10_000):
    """Vectors (N, d), or latents (N, d, h, w): a .npy or .pt, or a folder, ours or the authors' -> float64
    (n, d), n <= num. Of latents one random position of each of n random images, as the authors did; they give
    no reason for 10,000. Normalised per channel; if d = 2, no measure of uniformity depends on that."""
    path, rng = Path(path), np.random.default_rng(seed)
    with reading(path, " than numbers of shape (N, d) or (N, d, h, w), .npy or .pt"):
        if path.is_dir():
            latents = read_latents(path)
            index = torch.from_numpy(np.sort(rng.permutation(len(latents.labels))[:num]))
            z = latents.read(index, torch.zeros_like(index)).numpy()  # the plain ones, not the flipped
        else:
            z = torch_load(path).numpy() if path.suffix == ".pt" else np.load(path, mmap_mode="r")
            z = z[:, 0] if z.ndim == 5 else z  # likewise
            z = z[np.sort(rng.permutation(len(z))[:num])]
        if z.ndim == 4:
            n, _, h, w = z.shape
            z = z[np.arange(n), :, rng.integers(h, size=n), rng.integers(w, size=n)]
        z = z.astype(np.float64)
        # of rank 0 is a point, of rank 1 a line: no density in a plane
        plane = z @ rng.normal(size=(z.shape[1], 2))  # (n, 2)
        require(z.ndim == 2 and np.abs(z).max() < 1e30 and np.linalg.matrix_rank(np.cov(plane.T)) > 1,
                f"{path}: no finite vectors (N, d) that spread in two directions, but {z.shape}")
    return (z - z.mean(0)) / (z.std(0) + 1e-12)

def embed(z, how, seed):
    """(N, d) -> (N, 2): t-SNE as in Fig. 6, at scikit-learn's usual perplexity of 30 (the paper names none);
    or the two principal components. Vectors with d = 2 are an embedding already."""
    if z.shape[1] == 2:
        return z
    if how == "pca":
        return z @ np.linalg.svd(z - z.mean(0), full_matrices=False)[2][:2].T
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        raise UserError("t-SNE needs scikit-learn: pip install scikit-learn, or use --embedding pca")
    tsne = TSNE(perplexity=min(30, (len(z) - 1) / 3), random_state=seed % 2 ** 32, n_jobs=-1)
    return tsne.fit_transform(z).astype(np.float64)

def scatter(points, path, size=800):
    """PNG of points (N, 2), 3x3 pixels each, blue where they are sparse, orange where dense [Fig. 6]."""
    canvas, density = np.full((size, size, 3), 255, np.uint8), gaussian_kde(points.T)(points.T)
    places = (points - points.min(0)) / np.ptp(points, axis=0) * (size - 3)
    level = (density / density.max())[:, None]
    for (x, y), colour in zip(places.astype(int), level * (255, 160, 0) + (1 - level) * (40, 40, 160)):
        canvas[size - 3 - y:size - y, x:x + 3] = colour
    atomic_write(path, lambda file: Image.fromarray(canvas).save(file, "PNG"))

def score_uniformity(s):
    """Mean and std over seeds of Table 6's measures, printed and in OUT/uniformity.json; a picture of the
    last seed's points. A seed chooses images, positions and t-SNE's start; the paper names none."""
    results = []
    for seed in tqdm(range(s.seed, s.seed + s.uniformity_seeds), "embedding and density", unit="seed"):
        z = latent_vectors(s.uniformity, seed)
        points = embed(z, s.embedding, seed)
        results.append(uniformity(points))
    how = "points taken as they are (2-D)" if z.shape[1] == 2 else s.embedding
    scores = {"file": s.uniformity, "vectors": list(z.shape), "embedding": how, "seeds": s.uniformity_seeds}
    print(f"{s.uniformity}: {len(z)} vectors of {z.shape[1]} channels, {how}, {s.uniformity_seeds} seeds; "
          f"scatter: {s.out}/uniformity.png\n\n| measure | mean | std |\n|---|---|---|")
    for name in results[0]:
        values = [result[name] for result in results]
        scores[name] = [np.mean(values), np.std(values)]
        print(f"| {name} | {np.mean(values):.4f} | {np.std(values):.4f} |")
    save_scores(Path(s.out, "uniformity.json"), scores)
    scatter(points, Path(s.out, "uniformity.png"))

if __name__ == "__main__":
    run_script(Settings, PRESETS, __doc__, main)
