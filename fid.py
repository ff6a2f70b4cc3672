"""Every measure in the paper's tables: FID, sFID, IS, precision, recall, PSNR, LPIPS, SSIM, uniformity.

Paper: arXiv 2501.01423, Tables 1 to 6 and A1 to A3, which do not define the measures. Samples are measured as
in ADM (openai/guided-diffusion, evaluations/), by whose evaluator most papers' numbers are made, and
tokenizers as in the authors' code.

Read it top to bottom: distances between two sets of features, then between two images; uniformity; the
Inception network behind every FID; score_tokenizer, which reconstructs test images and compares.

    python fid.py                                    the mini run: its vae.pt and its samples.npz
    python fid.py --samples DIR_A --reference DIR_B  any two folders or .npz batches
    python fid.py --preset imagenet256 --out RUN --reference VIRTUAL_imagenet256_labeled.npz
    python fid.py --uniformity runs/mini/latents     Table 6, Fig. 6

mini-FID, mini-rFID and so on are taken in the features of ScoreNet, a small network trained on the run's own
images, instead of Inception's. They compare runs on the same images with each other and are no FIDs.
"""
import os
from dataclasses import dataclass
from pathlib import Path

# Set before torch is imported; see train_vae.py.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import gaussian_kde
from torch import nn
from torchvision.models import inception_v3
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.transforms import functional as transform

from train_vae import opt, step_generator, to_float, to_uint8
from vae import LPIPS, UserError, load_weights, require


@dataclass
class Settings:
    # The defaults are preset imagenet256. Each is a flag, and its comment is the flag's text in --help.
    preset: str = "imagenet256"  # named settings; every other flag overrides one of them
    out: str = ""  # folder of the run, and of scores.json; default runs/PRESET
    # --- what is scored
    vae: str = ""  # tokenizer whose reconstructions are scored; default OUT/vae.pt
    unfinished: bool = False  # accept a tokenizer whose training is not finished
    samples: str = ""
        # images to score: a folder, an .npz batch or a run; default OUT/samples.npz. If it is named,
        # scores.json is written only into an --out that is not the default
    reference: str = ""  # images to compare them with, a folder, .npz or run; default: training images
    data: str = ""  # data set whose test images are reconstructed; default: the tokenizer's
    image_size: int = 0  # side of its images in pixels; 0: the tokenizer's
    # An FID falls as the number of images grows. 50,000 is Table 3's number and that of ImageNet's validation
    # images; Table 2 takes 10,000.
    num: int = 50_000  # score at most this many images of each kind, chosen at random
    # --- how. ADM's network ran in TensorFlow 1, whose resizing shifts every feature a little. The gFIDs of
    # the authors' ablations take pytorch-fid's input against ADM's statistics; both can be chosen.
    features: str = opt("auto", choices=("auto", "inception", "mini"))
        # network behind the measures; auto: mini for a run of preset mini, inception for everything else
    inception_input: str = opt("tf", choices=("tf", "pytorch-fid"))  # how samples are resized for it
    # The next three choices are those of the authors' code for tokenizers. The crop alone changes PSNR by up
    # to 1.9 dB. LightningDiT learns from samples of the posterior, too.
    rfid_input: str = opt("pytorch-fid", choices=("tf", "pytorch-fid"))  # how images are resized for rFID
    crop: str = opt("resize", choices=("resize", "adm"))  # of test images; resize: the authors'
    posterior: str = opt("sample", choices=("sample", "mode"))  # what is decoded
    lpips: bool = True  # LPIPS of reconstructions; VGG16's weights are downloaded once
    score_net_steps: int = 250  # training steps of ScoreNet, the network of --features mini
    cache: str = ""  # folder of ScoreNet, which runs may share; default OUT
    uniformity: str = ""  # score these instead: vectors (N, d) as .npy or .pt, or a folder of latents
    embedding: str = opt("tsne", choices=("tsne", "pca"))
        # how vectors become points in a plane; tsne needs scikit-learn
    uniformity_seeds: int = 3  # mean and std are over this many seeds
    seed: int = 1000  # of ScoreNet (not the teacher's seed), posterior and t-SNE
    batch_size: int = 64  # images at once
    workers: int = 8  # loading processes per process
    device: str = opt("auto", choices=("auto", "cuda", "cpu"))  # auto: CUDA if there is a GPU

# For two CPU cores (our choice): everything from the run's own images, in seconds, without a download.
MINI = {"num": 10_000, "crop": "adm", "posterior": "mode", "lpips": False, "workers": 0}
PRESETS = {"mini": MINI, "imagenet256": {}}

# --- Distances between two sets of features --------------------------------------------------------
def gaussian(x):
    """Features (N, d) -> mean (d,) and covariance (d, d) over N - 1, as numpy's; float64."""
    return x.double().mean(0), x.double().T.cov()

def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Mean (d,) and covariance (d, d) of two sets -> the Frechet distance of the two Gaussians.
    It is the FID in Inception's pooled features and the sFID in its spatial ones. SciPy 1.11.2's sqrtm gave
    an FID of 20.65 instead of 5.14 (the authors' issues), so it is not used."""
    mu1, sigma1, mu2, sigma2 = [torch.as_tensor(v).cpu().double() for v in (mu1, sigma1, mu2, sigma2)]

    def factor(sigma):  # L (d, r), L L^T = sigma (d, d), of rank r
        values, vectors = torch.linalg.eigh(sigma)
        # an eigenvalue that should be 0 is about 1e-16 and its root 1e-8; 2048 such roots would be visible
        kept = values > len(values) * torch.finfo(torch.float64).eps * values[-1].clamp(min=0)
        return vectors[:, kept] * values[kept].sqrt()

    # With sigma_i = L_i L_i^T, tr (sigma1 sigma2)^1/2 is the sum of the singular values of L1^T L2 (our
    # choice: the usual roots of eigenvalues lose half of the digits of d(a, a) = 0).
    root = torch.linalg.svdvals(factor(sigma1).T @ factor(sigma2))  # (min(r1, r2),)
    # d = |mu1 - mu2|^2 + tr sigma1 + tr sigma2 - 2 tr (sigma1 sigma2)^1/2
    return ((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * root.sum()).item()

def inception_score(probs, split=5000):
    """Class probabilities (N, C) -> inception score in [1, C]: the mean over contiguous splits, of which the
    last may be short. It needs no reference: it is high if each image clearly belongs to one class and all
    images together to many. The size of a split matters, since the score grows with it; 5,000 is ADM's."""
    scores = []
    for p in torch.as_tensor(probs).double().split(split):  # (split, C)
        # KL_i = sum_c p_ic (log p_ic - log q_c), q = mean_i p_i; xlogy makes 0 log 0 = 0
        kl = (torch.xlogy(p, p) - torch.xlogy(p, p.mean(0, keepdim=True))).sum(1)  # (split,)
        # IS = exp(mean_i KL_i)
        scores.append(kl.mean().exp().item())
    return sum(scores) / len(scores)

def precision_recall(reference, samples, k=3, block=2000):
    """Features (M, d), (N, d) -> improved precision and recall in [0, 1] [Kynkaanniemi et al. 2019].
    Each feature has a ball that reaches to its k-th neighbour in its own set, not counting itself. k = 3 is
    that paper's choice; larger balls would take everything in. ADM measures distances in half precision, this
    code in float64, so that the result does not depend on the device (our choice). Blocks bound the memory to
    block * max(M, N) numbers."""
    reference, samples = torch.as_tensor(reference).double(), torch.as_tensor(samples).double()

    def fraction_inside(points, centres):
        # of the k + 1 smallest distances within a set, the first is the feature's distance to itself
        nearest = [torch.cdist(c, centres).topk(k + 1, largest=False).values for c in centres.split(block)]
        radii = torch.cat(nearest)[:, k]  # (number of centres,)
        inside = [(torch.cdist(p, centres) <= radii).any(1) for p in points.split(block)]
        return torch.cat(inside).double().mean().item()

    # precision: share of samples in any ball of a reference; recall: the other way round
    return fraction_inside(samples, reference), fraction_inside(reference, samples)

def compare(ours, reference, prefix=""):
    """The features_of some samples and of a reference -> {prefix + name: value}: FID, sFID, IS, precision and
    recall; all but IS None where the reference lacks what they need, the last two below four images, too."""
    values = dict.fromkeys(("FID", "sFID", "IS", "precision", "recall"))
    for name, mu, sigma in (("FID", "mu", "sigma"), ("sFID", "mu_s", "sigma_s")):
        if {mu, sigma} <= reference.keys():
            values[name] = frechet_distance(ours[mu], ours[sigma], reference[mu], reference[sigma])
    values["IS"] = inception_score(ours["probs"])
    pool = reference.get("pool", ())
    if min(len(pool), len(ours["pool"])) > 3:  # each has a third neighbour
        # at most 10,000 references, as in ADM's file, since all distances to the samples are needed
        pool = pool[random_subset(len(pool), 10_000)]
        values["precision"], values["recall"] = precision_recall(pool, ours["pool"])
    return {prefix + name: value for name, value in values.items()}

def random_subset(n, num):
    """At most num indices below n, in order, always the same ones. They are random because a folder's files
    are sorted by class, and in balanced samples every tenth image may be of one class."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))[:num].sort().values

# --- Distances between two images ------------------------------------------------------------------
def psnr(x, y, data_range=1.0):
    """Images (B, C, H, W), values spanning data_range -> peak signal-to-noise ratio in dB, (B,)."""
    # psnr = 10 log10(data_range^2 / mean (x - y)^2); inf for equal images
    return 10 * torch.log10(data_range ** 2 / (x - y).square().mean((1, 2, 3)))

def ssim(x, y, data_range=1.0):
    """Images (B, C, H, W), H and W >= 6, values spanning data_range -> structural similarity (B,), at most 1.
    A Gaussian window of 11x11 with sigma 1.5, K = (0.01, 0.03) [Wang et al. 2004], and the mean over every
    pixel with reflected edges, as in torchmetrics, which the authors use."""
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
    """Densities (N,) > 0 at N points -> {"density cv", "gini", "normalized entropy"}, which are 0, 0 and 1 if
    all densities are equal."""
    N, p = len(density), np.sort(density / density.sum())
    # gini = sum_ij |d_i - d_j| / (2 N^2 mean d) = sum_i (2 i - N - 1) p_i / N, p sorted, i from 1
    gini = ((2 * np.arange(1, N + 1) - N - 1) * p).sum() / N
    # entropy = -sum_i p_i log p_i / log N; cv = std d / mean d
    entropy = -(p * np.log(p)).sum() / np.log(N)
    return {"density cv": density.std() / density.mean(), "gini": gini, "normalized entropy": entropy}

def uniformity(points):
    """Points (N, 2) -> these measures of their Gaussian kernel density estimate. The paper names no
    bandwidth; scipy's default is Scott's."""
    return density_measures(gaussian_kde(points.T)(points.T))

def embed(z, how, seed):
    """Vectors (N, d) -> points (N, 2): by t-SNE, as in Fig. 6, with scikit-learn's default perplexity of 30
    (the paper names none), or the two principal components. Vectors with d = 2 stay as they are."""
    if z.shape[1] == 2:
        return z
    if how == "pca":
        return z @ np.linalg.svd(z - z.mean(0), full_matrices=False)[2][:2].T
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        raise UserError("t-SNE needs a package: pip install scikit-learn, or use --embedding pca")
    tsne = TSNE(perplexity=min(30, (len(z) - 1) / 3), random_state=seed % 2 ** 32, n_jobs=-1)
    return tsne.fit_transform(z).astype(np.float64)

# --- The network behind every FID -------------------------------------------------------------------
def resize_tf1(x, size=299):
    """(B, C, H, W) -> (B, C, size, size), bilinear as in TensorFlow 1: without antialiasing or half-pixel
    offset, so that only the top left pixels coincide."""
    def weights(n):  # (size, n): the weight of each of n pixels, which falls to 0 at the next one
        # source = destination * scale, where everybody else has (destination + 1/2) * scale - 1/2
        source = (torch.arange(size, device=x.device) * (n / size)).clamp(max=n - 1)
        return F.relu(1 - (source[:, None] - torch.arange(n, device=x.device)).abs())
    return weights(x.shape[2]) @ x @ weights(x.shape[3]).T

class FIDInception(nn.Module):
    """The Inception network of 2015, in whose features FID, sFID and IS are defined, with pytorch-fid's
    weights. uint8 images (B, 3, H, W) -> pool (B, 2048), spatial (B, 2023), probs (B, 1008). input: how
    images are resized to 299 pixels, "tf" as for published numbers or "pytorch-fid"; every feature differs
    slightly."""
    def __init__(self, state_dict, input="tf", path="the file"):
        super().__init__()
        inception = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False).eval()
        load_weights(inception, state_dict, path)
        self.input, self.fc = input, inception.fc
        # It is torchvision's network except for two quirks of the graph of 2015, with which the weights were
        # trained: nine blocks pool without counting the padding, and the last of them takes the maximum, not
        # the mean.
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
        # The features of sFID keep their positions. TensorFlow's mixed_6/conv is Mixed_6d.branch1x1 in
        # a public map of the weights, taken here after its ReLU (not verified in TensorFlow). Seven channels
        # of it have about as many values as pool has.
        spatial = x["Mixed_6d"][:, :7].permute(0, 2, 3, 1).flatten(1)  # (B, 17 * 17 * 7)
        pool = x["avgpool"].flatten(1)  # (B, 2048)
        # for the IS, ADM multiplies by the weight of the last layer and leaves out its bias
        return pool, spatial, (pool @ self.fc.weight.T).softmax(1)

# --- A tokenizer and its test images [Table 2] -----------------------------------------------------
def authors_crop(image, size, where=None):
    """RGB PIL image -> float (3, size, size) in [0, 1], as the authors evaluate: resized as floats, bilinear
    with antialias, then cut in the centre. ADM's center_crop is sharper: bicubic, on 8 bits."""
    return transform.center_crop(transform.resize(transform.to_tensor(image), size, antialias=True), size)

@torch.no_grad()
def score_tokenizer(model, images, net, s, world):
    """Images, uint8 or float in [0, 1] -> {"rFID", "PSNR", "LPIPS", "SSIM"}, the last three as means over
    images. rFID and PSNR see 8 bits, as in picture files; LPIPS and SSIM see floats (authors' code)."""
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
        require(y.isfinite().all(), f"{s.vae} gives images that are not finite: its weights are broken")
        # The authors round by truncating 127.5 x + 128, which differs from to_uint8 only at exact halves.
        x8, y8 = to_uint8(x), to_uint8(y)
        # Of the features only pool is needed. SSIM's input is clipped, as in torchmetrics; that of LPIPS is
        # not.
        part = [net(x8)[0], net(y8)[0], psnr(x8.float(), y8.float(), 255.0),
                ssim(x.clamp(-1, 1), y.clamp(-1, 1), data_range=2.0)]
        if lpips:
            part.append(lpips(x, y).flatten())
        parts.append(part)
    real, fake, *measures = gathered(parts, world)
    means = dict(zip(("PSNR", "SSIM", "LPIPS"), (values.double().mean().item() for values in measures)))
    return {"rFID": frechet_distance(*gaussian(fake), *gaussian(real)), "PSNR": means["PSNR"],
            "LPIPS": means.get("LPIPS"), "SSIM": means["SSIM"]}

# === Plumbing: files, flags, processes ===
import json
import struct
from functools import partial

import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

from train_dit import Latents
from train_vae import Images, atomic_write, center_crop, loader, open_image, open_npz, picture_files
from train_vae import run_script, to_device, write_checkpoint, write_json
from vae import SPECS, fingerprint, hub_file, load_checkpoint, load_tokenizer, torch_load
from vf_loss import Classifier, train_classifier


# --- Images ----------------------------------------------------------------------------------------
def data_set(s, run, split, crop=center_crop):
    """Images of the split "train" or "test" of --data, by default of the data on which the tokenizer was
    trained (`run` holds its settings), with the attributes of an ImageBatch."""
    data, size = s.data or run.get("data"), s.image_size or run.get("image_size", 0)
    require(data and size, "which images? Name them with --data and --image-size, a tokenizer with --vae, or "
            "what to compare with --samples and --reference")
    images = Images(data, split, size, crop)
    images.name, images.statistics, images.meta = f"{data} {split} {size}x{size}", {}, {}
    return images

STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")  # of pool and of spatial features, by ADM's names

class ImageBatch:
    """The pictures below a folder, or those of an .npz batch or of a run: [i] is uint8 (3, H, W).
    size: ADM's centre crop of files to it; 0: they must be of one size. .labels: arr_1, the classes (N,) that
    were asked for, or None. .meta: how they were made, if the file says so. .statistics: those of STATISTICS
    that an .npz holds; one with some may lack images."""
    labels, meta, statistics = None, {}, {}

    def __init__(self, path, size=0):
        path = Path(path)
        if (path / "samples.npz").exists():
            path = path / "samples.npz"
        self.name, self.size = str(path), size
        if path.is_dir():
            self.items = picture_files(path)
            require(self.items, f"{path} holds no images and no samples.npz")
            self.size = size or open_image(self.items[0]).size
            return
        require(path.exists(), f"there is neither a folder nor an .npz batch {path}")
        archive = open_npz(path)
        none = np.zeros((0, 1, 1, 3), np.uint8)
        self.items = map_npz(path, archive, "arr_0") if "arr_0" in archive else none
        require(self.items.dtype == np.uint8 and self.items.shape[3:] == (3,),
                f"{path}: arr_0 is {self.items.dtype} {self.items.shape}, not uint8 (N, H, W, 3)")
        self.meta = json.loads(str(archive["meta"])) if "meta" in archive else {}
        self.statistics = {name: archive[name] for name in STATISTICS if name in archive}
        require(len(self.items) or self.statistics, f"{path} holds neither images (arr_0) nor statistics")
        if "arr_1" in archive:
            labels = archive["arr_1"]
            require(labels.dtype.kind in "iu", f"{path}: arr_1 holds {labels.dtype}, not integer classes")
            self.labels = torch.from_numpy(labels.astype(np.int64))

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        image = self.items[i]
        if isinstance(image, Path):
            image = open_image(image)
            if isinstance(self.size, int):
                return center_crop(image, self.size)
            require(image.size == self.size, f"{self.items[i]} is of {image.size} pixels, another file of "
                    f"{self.size}: name one --image-size")
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

def map_npz(path, archive, name):
    """An array of an .npz, memory-mapped, so that several processes need not hold it each; or read, if it is
    compressed."""
    entry = archive.zip.getinfo(f"{name}.npy")
    if entry.compress_type:  # not 0, which is "stored"
        return archive[name]
    with open(path, "rb") as file:
        file.seek(entry.header_offset + 26)  # the lengths of the entry's name and of its extra field
        file.seek(sum(struct.unpack("<HH", file.read(4))), os.SEEK_CUR)
        np.lib.format.read_magic(file)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        return np.memmap(path, dtype, "r", file.tell(), shape, "F" if fortran else "C")

# --- Features of many images -----------------------------------------------------------------------
def batches(images, s, world, title):
    """Yield (list of indices, images (B, 3, H, W) on the device) for this process's share of at most --num
    images."""
    chosen = random_subset(len(images), s.num)
    require(len(chosen) >= max(2, world.size), f"{title}: {len(chosen)} images are too few")
    mine = [part.tolist() for part in chosen.tensor_split(world.size)[world.rank].split(s.batch_size)]
    work = loader(lambda index: torch.stack([images[i] for i in index]), mine, s.workers)
    for index, x in zip(mine, tqdm(work, title, len(mine), unit="batch", disable=world.rank > 0)):
        yield index, to_device(x, world.device)

def gathered(parts, world):
    """For each batch a tuple of tensors -> one tuple for all images of all processes, in the order of the
    images. They are kept, not summed (Inception's of 50,000 images take 1 GB), so the result depends on no
    batch size."""
    mine = [torch.cat(part).cpu() for part in zip(*parts)]
    shares = [mine] * world.size
    if world.size > 1:
        dist.all_gather_object(shares, mine, group=world.patient)
    return [torch.cat(part).to(world.device) for part in zip(*shares)]

@torch.no_grad()
def features_of(images, net, s, world):
    """Images -> {"pool": (N, d), "probs": (N, C)} in the features of net, and STATISTICS; {} if there are
    none."""
    if not len(images):
        return {}
    pool, spatial, probs = gathered([net(x) for _, x in batches(images, s, world, images.name)], world)
    return {"pool": pool, "probs": probs} | dict(zip(STATISTICS, (*gaussian(pool), *gaussian(spatial))))

def score_net(classifier, images):
    """ScoreNet (our choice): the same kinds of features, of a Classifier trained on the run's own images. It
    has another shape and seed than VF loss's teacher, since a tokenizer should not be judged by its own
    teacher."""
    x = F.relu(classifier.features(to_float(images)))  # (B, 32, S/8, S/8)
    pool = x.mean((2, 3))  # (B, 32)
    return pool, x[:, :7].permute(0, 2, 3, 1).flatten(1), classifier.head(pool).softmax(1)

INCEPTION_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                 "pt_inception-2015-12-05-6726825d.pth")
INCEPTION_HASH = "sha256:6726825d"  # torch.hub puts the first digits of a file's hash into its name

def feature_network(s, run, world, input="tf"):
    """(network, its description): FID's Inception, or ScoreNet, which the first process trains and keeps in
    --cache. Its file names the images, their number, the seed and the steps; for others it is trained
    anew."""
    if s.features == "inception":
        with world.first():
            path = hub_file(INCEPTION_URL, INCEPTION_HASH)
        net = FIDInception(torch_load(path), input, path)
        return net.to(world.device), f"Inception of 2015, {input} input"
    train = data_set(s, run, "train")
    require(len(train.classes) > 1, "ScoreNet learns to tell classes apart, and there is only one: use "
            "--features inception")
    path = Path(s.cache or s.out) / f"score_net-{train.identity}.pt"
    key = {"size": train.size, "num": s.num, "seed": s.seed, "steps": s.score_net_steps}
    torch.manual_seed(s.seed)  # its weights are a function of images and settings
    net = Classifier(len(train.classes), 8, width=32)
    made = load_checkpoint(path, "score_net", ": remove it") if path.exists() else {}
    if made.get("key") != key and world.rank == 0:
        index = random_subset(len(train), s.num)
        x, y = torch.stack([train[i] for i in index.tolist()]), train.labels[index]
        net = train_classifier(net, x, y, s.score_net_steps, s.seed, world.device, "score network")
        write_checkpoint({"stage": "score_net", "key": key, "model": net.state_dict()}, path)
    world.barrier()  # the others now find its file
    net.load_state_dict(load_checkpoint(path, "score_net")["model"])
    net = net.to(world.device).eval().requires_grad_(False)
    return partial(score_net, net), f"ScoreNet, {s.score_net_steps} steps on {train.name}"

# --- Scores of a run -------------------------------------------------------------------------------
def main(s, world):
    """Score the run in OUT, or what the flags name: a table, and OUT/scores.json, both from the first
    process."""
    if s.uniformity:
        return score_uniformity(s) if world.rank == 0 else None
    # TF32 rounds to 10 bits, and a measure should not depend on the GPU.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    pair = bool(s.samples and s.reference and not s.vae)  # two sets of images by name, which need no run
    if s.features == "auto":
        s.features = "mini" if s.preset == "mini" and not pair else "inception"
    model, run = (None, {}) if pair else open_tokenizer(s, world)
    kinds, reference = open_images(s, run, pair)
    if s.samples and not s.vae:
        model = None  # the tokenizer in OUT only says which images are the reference
    require(model or kinds, f"nothing to score in {s.out}: run train_vae.py first, or name --samples")
    net, description = feature_network(s, run, world, s.inception_input)
    prefix, scores = "mini-" if s.features == "mini" else "", {}
    if model:
        test = data_set(s, run, "test", authors_crop if s.crop == "resize" else center_crop)
        values = score_tokenizer(model, test, feature_network(s, run, world, s.rfid_input)[0], s, world)
        scores["tokenizer"] = {"values": {prefix + "rFID": values.pop("rFID"), **values}, "settings": run,
                               "images": min(s.num, len(test)), "source": s.vae, "against": test.name,
                               "crop": s.crop, "posterior": s.posterior, "rfid_input": s.rfid_input}
    target = features_of(reference, net, s, world) if kinds else {}
    if kinds and s.features == "inception":  # the statistics in a file are of Inception's features
        target |= reference.statistics
    for kind, images in kinds.items():
        ours = features_of(images, net, s, world)
        values = compare(ours, target, prefix)
        if prefix and not pair and images.labels is not None:  # Inception's 1,008 classes are no data set's
            right = ours["probs"].argmax(1).cpu() == images.labels[random_subset(len(images), s.num)]
            values["class accuracy"] = right.double().mean().item()
        against = f"{reference.name} ({min(s.num, len(reference))} images)"
        scores[kind] = {"values": values, "images": len(ours["pool"]), "source": images.name,
                        "against": against, "meta": images.meta}
    if world.rank == 0:
        if not s.samples or s.out != f"runs/{s.preset}":
            head = {"run": s.out, "features": s.features, "network": description}
            write_json(Path(s.out, "scores.json"), head | scores)
        print_scores(scores, f"In the features of {description}")

def open_tokenizer(s, world):
    """-> the tokenizer to score, and the settings of its run with its spec, step and fingerprint; None and {}
    if there is none."""
    path = s.vae or f"{s.out}/vae.pt"
    if not s.vae and not Path(path).exists():
        return None, {}
    s.vae, by_name = path if not s.samples else s.vae, bool(s.samples and not s.vae)
    model, state = load_tokenizer(path, world.device, unfinished=s.unfinished or by_name)
    require(s.image_size % model.f == 0,
            f"--image-size {s.image_size}: the tokenizer {path} needs a multiple of {model.f}")
    # the spec is what the weights are: a released file knows no settings
    spec = next((name for name, values in SPECS.items() if values == state["spec"]), "other")
    return model, state["settings"] | {"spec": spec, "step": state.get("step", 0),
                                       "fingerprint": fingerprint(state["model"])}

def open_images(s, run, pair):
    """-> {kind: images to score}, and what they are compared with; {} and None if there are no samples."""
    if not s.samples and not Path(s.out, "samples.npz").exists():
        return {}, None
    kinds = {"samples": ImageBatch(s.samples or s.out, s.image_size)}
    made = kinds["samples"].meta  # the images of LightningDiT need not be the tokenizer's
    s.data, s.image_size = s.data or made.get("data", ""), s.image_size or made.get("image_size", 0)
    made_by = made.get("tokenizer_fingerprint")
    require(s.samples or made_by in (None, run.get("fingerprint", made_by)),
            f"{kinds['samples'].name} was decoded by another tokenizer than {s.vae}: run train_dit.py and "
            "sample.py again, or name the samples with --samples")
    if s.features == "mini" and not pair:  # what the samples' scores can be held against
        kinds["real"] = data_set(s, run, "test")
    reference = ImageBatch(s.reference, s.image_size) if s.reference else data_set(s, run, "train")
    require(len(reference) or s.features == "inception", f"{reference.name} holds no images, only statistics "
            "of Inception's features: use --features inception")
    sizes = {x.name: tuple(x[0].shape[1:]) for x in [*kinds.values(), reference] if len(x)}
    require(len(set(sizes.values())) == 1, f"these images are of several sizes: {sizes}. --image-size crops "
            "files to one")
    return kinds, reference

def print_scores(scores, title):
    """A Markdown table of all values."""
    print(f"{title}\n\n| measure | value | images | of | against |\n|---|---|---|---|---|")
    for part in scores.values():
        for name, value in part["values"].items():
            value = "-" if value is None else f"{value:.4g}"
            print(f"| {name} | {value} | {part['images']} | {part['source']} | {part['against']} |")
    made = scores.get("samples", {}).get("meta", {})
    if made:
        print("\nsamples:", ", ".join(f"{name} {value}" for name, value in made.items()))

# --- Uniformity [Table 6, Fig. 6] ------------------------------------------------------------------
def latent_vectors(path, seed, num=10_000):
    """Vectors (N, d) or latents (N, d, h, w), as .npy or .pt, or a folder of latents -> float64 (n, d), n <=
    num. Of latents, one random position of each of n random images is taken (authors' code). Each channel is
    normalised; if d = 2, no measure of uniformity depends on that."""
    path, rng = Path(path), np.random.default_rng(seed)
    if path.is_dir():
        require((path / "latents.json").exists() or any(path.glob("*.safetensors")), f"{path} is no folder "
                f"of latents: name one that train_dit.py made, such as {path / 'latents'}")
        latents = Latents(path)
        index = torch.from_numpy(np.sort(rng.permutation(len(latents.labels))[:num]))
        z = latents.read(index, torch.zeros_like(index)).numpy()  # the plain ones, not the flipped
    else:
        require(path.exists() and path.suffix in (".npy", ".pt"), f"{path} is no .npy or .pt file of vectors "
                "and no folder of latents")
        z = torch_load(path).numpy() if path.suffix == ".pt" else np.load(path, mmap_mode="r")
        z = z[np.sort(rng.permutation(len(z))[:num])]
    require(z.ndim in (2, 4), f"{path} holds {z.shape}, not vectors (N, d) or latents (N, d, h, w)")
    if z.ndim == 4:
        n, _, h, w = z.shape
        z = z[np.arange(n), :, rng.integers(h, size=n), rng.integers(w, size=n)]
    z = z.astype(np.float64)
    return (z - z.mean(0)) / (z.std(0) + 1e-12)

def scatter(points, path, size=800):
    """PNG of points (N, 2), 3x3 pixels each, blue where they are sparse, orange where they are dense [Fig.
    6]."""
    canvas, density = np.full((size, size, 3), 255, np.uint8), gaussian_kde(points.T)(points.T)
    places = (points - points.min(0)) / np.ptp(points, axis=0) * (size - 3)
    level = (density / density.max())[:, None]
    for (x, y), colour in zip(places.astype(int), level * (255, 160, 0) + (1 - level) * (40, 40, 160)):
        canvas[size - 3 - y:size - y, x:x + 3] = colour
    atomic_write(path, lambda file: Image.fromarray(canvas).save(file, "PNG"))

def score_uniformity(s):
    """Mean and std over seeds of Table 6's measures, printed and in OUT/uniformity.json, and a picture of the
    last seed's points. A seed chooses images, positions and t-SNE's start."""
    results = []
    for seed in tqdm(range(s.seed, s.seed + s.uniformity_seeds), "embedding and density", unit="seed"):
        z = latent_vectors(s.uniformity, seed)
        points = embed(z, s.embedding, seed)
        results.append(uniformity(points))
    how = "as they are (2-D)" if z.shape[1] == 2 else s.embedding
    scores = {"file": s.uniformity, "vectors": list(z.shape), "embedding": how, "seeds": s.uniformity_seeds}
    print(f"{s.uniformity}: {len(z)} vectors of {z.shape[1]} channels, {how}, {s.uniformity_seeds} seeds; "
          f"scatter: {s.out}/uniformity.png\n\n| measure | mean | std |\n|---|---|---|")
    for name in results[0]:
        values = [result[name] for result in results]
        scores[name] = [np.mean(values), np.std(values)]
        print(f"| {name} | {np.mean(values):.4f} | {np.std(values):.4f} |")
    write_json(Path(s.out, "uniformity.json"), scores)
    scatter(points, Path(s.out, "uniformity.png"))

if __name__ == "__main__":
    run_script(Settings, PRESETS, __doc__, main)
