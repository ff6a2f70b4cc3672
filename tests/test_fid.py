"""fid.py against scipy, torchmetrics, lpips, pytorch-fid, torch-fidelity, closed forms, loops."""
import hashlib
import json
import subprocess
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
import torchvision
from PIL import Image
from torchvision.models import inception_v3

import fid
from train_vae import World
from vae import SPECS, AutoencoderKL, UserError, fingerprint

ROOT = Path(__file__).resolve().parents[1]
WORLD = World("cpu")


def gaussian(rng, n, d, shift=0.0):
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) / d ** 0.5 + shift


def fit(x):
    return x.mean(0), np.cov(x, rowvar=False)


def by_sqrtm(mu1, sigma1, mu2, sigma2):
    root = scipy.linalg.sqrtm(sigma1 @ sigma2)
    return ((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * np.trace(root).real


# --- distances ------------------------------------------------------------------------------------

def test_frechet_distance_equals_scipy_sqrtm():
    rng = np.random.default_rng(0)
    a, b = fit(gaussian(rng, 500, 64)), fit(gaussian(rng, 400, 64, 0.3))
    assert fid.frechet_distance(*a, *b) == pytest.approx(by_sqrtm(*a, *b), rel=1e-6)
    assert fid.frechet_distance(*b, *a) == pytest.approx(fid.frechet_distance(*a, *b), rel=1e-9)


def test_frechet_distance_equals_pytorch_fid_and_torch_fidelity():
    rng = np.random.default_rng(1)
    a, b = fit(gaussian(rng, 500, 64)), fit(gaussian(rng, 400, 64, 0.3))
    ours = fid.frechet_distance(*a, *b)
    score = pytest.importorskip("pytorch_fid.fid_score")
    fidelity = pytest.importorskip("torch_fidelity.metric_fid")
    # both predate the scipy that removed sqrtm's `disp`; give them the pair that they unpack
    sqrtm, patch = scipy.linalg.sqrtm, pytest.MonkeyPatch()
    patch.setattr(scipy.linalg, "sqrtm", lambda m, disp=True: sqrtm(m) if disp else (sqrtm(m), 0.0))
    with patch.context():
        assert ours == pytest.approx(score.calculate_frechet_distance(*a, *b), rel=1e-6)
    patch.undo()
    stat = [{"mu": mu, "sigma": sigma} for mu, sigma in (a, b)]
    theirs = fidelity.fid_statistics_to_metric(*stat, False)["frechet_inception_distance"]
    assert ours == pytest.approx(theirs, rel=1e-6)


def test_frechet_distance_of_diagonal_covariances_has_a_closed_form():
    rng = np.random.default_rng(2)
    mu1, mu2, s1, s2 = rng.normal(size=20), rng.normal(size=20), rng.random(20), rng.random(20)
    expected = ((mu1 - mu2) ** 2).sum() + ((s1 ** 0.5 - s2 ** 0.5) ** 2).sum()
    assert fid.frechet_distance(mu1, np.diag(s1), mu2, np.diag(s2)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("images, dimensions", [(500, 64), (40, 128), (100, 600)])
def test_frechet_distance_to_itself_is_zero(images, dimensions):
    a = fit(10 * gaussian(np.random.default_rng(3), images, dimensions))
    assert abs(fid.frechet_distance(*a, *a)) < 1e-6       # a negative one is as wrong


def test_frechet_distance_with_fewer_images_than_dimensions():
    rng = np.random.default_rng(4)
    a, b = fit(gaussian(rng, 60, 128)), fit(gaussian(rng, 50, 128, 0.1))
    assert np.linalg.matrix_rank(a[1]) < 128
    assert fid.frechet_distance(*a, *b) == pytest.approx(by_sqrtm(*a, *b), rel=1e-3)


def test_inception_score_equals_loops_and_torch_fidelity():
    logits = torch.randn(230, 17, generator=torch.Generator().manual_seed(0)) * 2
    probs = logits.softmax(1)
    scores = []
    for start in range(0, 230, 100):   # splits of 100, 100 and 30: the last one is short and counts
        p = probs[start:start + 100].double().numpy()
        scores.append(np.exp(np.mean([sum(v * np.log(v / q) for v, q in zip(row, p.mean(0))) for row in p])))
    assert fid.inception_score(probs, split=100) == pytest.approx(np.mean(scores), rel=1e-9)
    assert fid.inception_score(torch.eye(8), split=100) == pytest.approx(8)   # sure, varied: 0 log 0
    many = torch.rand(10_001, 3, generator=torch.Generator().manual_seed(0))
    assert fid.inception_score(many) == fid.inception_score(many, split=5000)     # ADM's
    isc = pytest.importorskip("torch_fidelity.metric_isc")
    theirs = isc.isc_features_to_metric(logits[:200], splits=2, shuffle=False)["inception_score_mean"]
    assert fid.inception_score(probs[:200], split=100) == pytest.approx(theirs, rel=1e-6)


def test_precision_and_recall_equal_loops_and_torch_fidelity():
    g = torch.Generator().manual_seed(0)
    reference, samples = torch.randn(150, 8, generator=g), torch.randn(130, 8, generator=g) * 0.7 + 0.2
    a, b = reference.double().numpy(), samples.double().numpy()

    def inside(points, centres):         # loops over the definition
        radii = []
        for i, c in enumerate(centres):
            radii.append(sorted(np.linalg.norm(c - o) for j, o in enumerate(centres) if j != i)[2])
        return np.mean([any(np.linalg.norm(p - c) <= r for c, r in zip(centres, radii)) for p in points])

    ours = fid.precision_recall(reference, samples, block=37)
    assert ours == pytest.approx((inside(b, a), inside(a, b)), rel=1e-12)
    assert 0 < ours[0] < 1 and 0 < ours[1] < 1 and ours[0] != ours[1]
    assert fid.precision_recall(reference, reference) == (1.0, 1.0)
    prc = pytest.importorskip("torch_fidelity.metric_prc")
    theirs = prc.calculate_precision_recall_full(samples.double(), reference.double())
    assert ours == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("shape", [(3, 3, 32, 32), (2, 1, 11, 40)])
def test_psnr_and_ssim_equal_torchmetrics(shape):
    metrics = pytest.importorskip("torchmetrics.functional.image")
    g = torch.Generator().manual_seed(0)
    x = torch.rand(shape, generator=g)
    y = (x + 0.1 * torch.randn(shape, generator=g)).clamp(0, 1)
    for scale in (1.0, 255.0):
        ours = [measure(scale * x, scale * y, data_range=scale) for measure in (fid.psnr, fid.ssim)]
        for i in range(len(x)):
            pair = scale * x[i:i + 1], scale * y[i:i + 1]
            theirs = metrics.peak_signal_noise_ratio(*pair, data_range=scale).item()
            assert ours[0][i].item() == pytest.approx(theirs, abs=1e-4)
            theirs = metrics.structural_similarity_index_measure(*pair, data_range=scale).item()
            assert ours[1][i].item() == pytest.approx(theirs, abs=2e-5)
    assert fid.ssim(x, x).tolist() == pytest.approx([1.0] * len(x))
    assert torch.isinf(fid.psnr(x, x)).all()


def test_mean_and_covariance_are_those_of_numpy_and_batches_keep_their_order():
    rng = np.random.default_rng(5)
    pool, spatial = gaussian(rng, 230, 12, 3.0), gaussian(rng, 230, 7)
    parts = [[torch.from_numpy(v[start:start + 64]) for v in (pool, spatial)] for start in range(0, 230, 64)]
    for got, expected in zip(fid.gathered(parts, WORLD), (pool, spatial)):
        for ours, theirs in zip(fid.gaussian(got), fit(expected)):
            np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)


# --- Inception ------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def inception_cache(tmp_path_factory):
    """TORCH_HOME with a file of the right name and shapes and random values, and how its SHA-256 begins."""
    home = tmp_path_factory.mktemp("torch_home")
    path = home / "hub" / "checkpoints" / fid.INCEPTION_URL.rsplit("/", 1)[1]
    path.parent.mkdir(parents=True)
    torch.manual_seed(0)
    net = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)     # features neither vanish nor explode
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
    net.fc.bias.data.normal_()                               # large, so that using it would show
    torch.save(net.state_dict(), path)
    return home, path, hashlib.sha256(path.read_bytes()).hexdigest()[:8]


def settings(tmp_path, **change):
    return fid.Settings(**fid.MINI | {"out": str(tmp_path), "device": "cpu"} | change)


def load_inception(inception_cache, monkeypatch, tmp_path, input="tf"):
    home, _, sha = inception_cache
    monkeypatch.setenv("TORCH_HOME", str(home))
    monkeypatch.setattr(fid, "INCEPTION_HASH", f"sha256:{sha}")
    return fid.feature_network(settings(tmp_path, features="inception"), {}, WORLD, input)[0]


def photos(n, height, width):
    g = torch.Generator().manual_seed(7)
    coarse = torch.rand(n, 3, 6, 5, generator=g)
    x = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")
    x = x + 0.1 * torch.rand(n, 3, height, width, generator=g)
    return (x.clamp(0, 1) * 255).round().to(torch.uint8)


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 48), (320, 300)])
def test_inception_features_equal_torch_fidelity(inception_cache, monkeypatch, tmp_path, size):
    extractor = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    net = load_inception(inception_cache, monkeypatch, tmp_path)
    theirs = extractor.FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], str(inception_cache[1]))
    x = photos(2, *size)
    pool, spatial, probs = net(x)
    expected, logits = theirs(x)
    assert (pool - expected).abs().max() < 1e-4 * expected.abs().max() and expected.std() > 0.01
    assert (probs - logits.softmax(1)).abs().max() < 1e-4
    # the spatial features, read off the other implementation's own branch, in the order N, H, W, C
    caught = []
    theirs.Mixed_6d.branch1x1.register_forward_hook(lambda module, args, out: caught.append(out))
    theirs(x)
    expected = np.transpose(caught[0][:, :7].numpy(), (0, 2, 3, 1)).reshape(2, -1)
    assert spatial.shape == (2, 2023)
    assert np.abs(spatial.numpy() - expected).max() < 1e-4 * np.abs(expected).max()


@torch.no_grad()
def test_inception_features_equal_pytorch_fid(inception_cache, monkeypatch, tmp_path):
    inception = pytest.importorskip("pytorch_fid.inception")
    state = torch.load(inception_cache[1], weights_only=True)
    monkeypatch.setattr(inception, "load_state_dict_from_url", lambda *a, **k: state)
    theirs = inception.InceptionV3().eval()
    x = photos(2, 64, 80)
    expected = theirs(x / 255)[0].flatten(1)
    pool = load_inception(inception_cache, monkeypatch, tmp_path, "pytorch-fid")(x)[0]
    assert (pool - expected).abs().max() < 1e-4 * expected.abs().max()
    tf = load_inception(inception_cache, monkeypatch, tmp_path)(x)[0]
    assert (tf - expected).abs().max() > 1e-3 * expected.abs().max()      # the switch does something


def test_inception_weights_that_are_missing_or_others_end_in_one_line(inception_cache, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(inception_cache[0]))
    with pytest.raises(UserError, match="6726825d"):      # the real hash: random weights must not pass for it
        fid.feature_network(settings(tmp_path, features="inception"), {}, WORLD)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    name = "pt_inception-2015-12-05-6726825d.pth"
    monkeypatch.setattr(fid, "INCEPTION_URL", f"http://127.0.0.1:9/{name}")     # nobody listens
    with pytest.raises(UserError, match=str(tmp_path / "hub/checkpoints" / name)):
        fid.feature_network(settings(tmp_path, features="inception"), {}, WORLD)


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    """The command line, in this process: what it printed, or the one line with which it failed."""
    def run(*flags, fails=False):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["fid.py", *flags, "--device", "cpu"])
        status = 0
        try:
            fid.run_script(fid.Settings, fid.PRESETS, "", fid.main)
        except SystemExit as end:
            status = end.code
        printed = capsys.readouterr()
        assert status == int(fails), printed.err
        return printed.err.strip().splitlines()[-1] if fails else printed.out
    return run


# --- images ---------------------------------------------------------------------------------------

def all_images(source, s):
    return torch.cat([x for _, x in fid.batches(source, s, WORLD, "x")]).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_is_read_as_numpy_reads_it(tmp_path, save):
    rng = np.random.default_rng(0)
    x, meta = rng.integers(0, 256, (23, 6, 5, 3), dtype=np.uint8), np.array(json.dumps({"sampler": "euler"}))
    save(tmp_path / "a.npz", arr_0=x, arr_1=np.arange(23), meta=meta, other=np.asfortranarray(x))
    with np.load(tmp_path / "a.npz") as archive:
        for name in archive.files:
            mapped = fid.map_npz(tmp_path / "a.npz", archive, name)
            assert mapped.dtype == archive[name].dtype and np.array_equal(mapped, archive[name]), name
        assert isinstance(fid.map_npz(tmp_path / "a.npz", archive, "arr_0"), np.memmap) == (save is np.savez)
    source = fid.ImageBatch(tmp_path / "a.npz")
    assert (all_images(source, settings(tmp_path, batch_size=4)) == x).all()
    assert source.meta == {"sampler": "euler"} and source.labels.tolist() == list(range(23))
    few = all_images(source, settings(tmp_path, batch_size=4, num=5))
    assert (few == x[fid.random_subset(23, 5)]).all()


def test_some_images_are_of_all_classes_whatever_their_order():
    index = fid.random_subset(50_000, 10_000).numpy()
    assert len(set(index)) == 10_000 and (np.diff(index) > 0).all()
    for labels in (np.arange(50_000) // 50, np.arange(50_000) % 1000):       # sorted, or in turn
        assert len(set(labels[index])) == 1000


def test_a_folder_of_images_is_read_whole_or_refused(tmp_path):
    rng, s = np.random.default_rng(0), settings(tmp_path)
    for name, size in (("b/1.png", 20), ("a/2.png", 20)):
        (tmp_path / name).parent.mkdir()
        Image.fromarray(rng.integers(0, 256, (size, size), dtype=np.uint8)).save(tmp_path / name)     # grey
    batch = all_images(fid.ImageBatch(tmp_path), s)
    assert batch.shape == (2, 20, 20, 3)
    assert (batch[0] == np.array(Image.open(tmp_path / "a/2.png").convert("RGB"))).all()
    Image.fromarray(rng.integers(0, 256, (30, 26, 3), dtype=np.uint8)).save(tmp_path / "c.png")
    with pytest.raises(UserError, match="c.png.*--image-size"):
        all_images(fid.ImageBatch(tmp_path), s)
    assert all_images(fid.ImageBatch(tmp_path, 20), s).shape == (3, 20, 20, 3)
    (tmp_path / "d.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="d.png"):
        all_images(fid.ImageBatch(tmp_path, 20), s)


@pytest.mark.parametrize("arrays, word", [
    ({"arr_0": np.zeros((3, 8, 8, 3))}, "arr_0 is float64"),
    ({"arr_0": np.zeros((3, 8, 8), np.uint8)}, "not uint8 .N, H, W, 3."),
    ({"arr_0": np.zeros((3, 8, 8, 3), np.uint8), "arr_1": np.zeros(3)}, "arr_1 holds float64, not integer"),
    ({"other": np.zeros(3)}, "neither images"),
])
def test_a_batch_is_checked_when_it_is_opened(tmp_path, arrays, word):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(UserError, match=f"bad.npz.*{word}"):
        fid.ImageBatch(tmp_path / "bad.npz")


class Toy(torch.nn.Module):
    """Features that are quick and known: 2x2 average-pooled pixels."""

    def forward(self, images):
        pool = torch.nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)
        return pool, pool[:, :5], pool.softmax(1)


def test_statistics_of_adm_are_used_for_both_inputs_of_inception_only(tmp_path, monkeypatch, cli):
    x = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    stored = {"mu": np.ones(12), "sigma": np.eye(12), "mu_s": np.zeros(5), "sigma_s": 2 * np.eye(5)}
    np.savez(tmp_path / "x.npz", arr_0=x)
    np.savez(tmp_path / "adm.npz", arr_0=x, **stored)
    np.savez(tmp_path / "bare.npz", **stored)
    np.savez(tmp_path / "large.npz", arr_0=x.repeat(2, 1))
    monkeypatch.setattr(fid, "feature_network", lambda *args: (Toy(), "Toy"))
    ours = fid.features_of(fid.ImageBatch(tmp_path / "x.npz"), Toy(), settings(tmp_path), WORLD)
    distances = [fid.frechet_distance(ours[m], ours[s], stored[m], stored[s])
                 for m, s in (("mu", "sigma"), ("mu_s", "sigma_s"))]

    def score(reference, *flags, fails=False):
        printed = cli("--out", "run", "--samples", "x.npz", "--reference", reference, *flags, fails=fails)
        if fails:
            return printed
        return json.loads((tmp_path / "run" / "scores.json").read_text())["samples"]["values"]

    for flags in ((), ("--inception-input", "pytorch-fid")):
        values = score("adm.npz", *flags)
        assert [values["FID"], values["sFID"]] == pytest.approx(distances, rel=1e-9) and values["FID"] > 1
        assert values["precision"] == values["recall"] == 1
    values = score("bare.npz")  # without images there is no precision
    assert [values["FID"], values["sFID"]] == pytest.approx(distances) and values["precision"] is None
    assert abs(score("adm.npz", "--features", "mini")["mini-FID"]) < 1e-6  # not of these features
    assert "bare.npz" in score("bare.npz", "--features", "mini", fails=True)
    line = score("large.npz", fails=True)
    assert "(16, 8)" in line and "(8, 8)" in line and "several sizes" in line


def test_scores_in_mini_features_need_two_classes(tmp_path):
    (tmp_path / "data" / "only").mkdir(parents=True)
    for i in range(12):
        Image.new("RGB", (32, 32), (20 * i, 0, 0)).save(tmp_path / "data" / "only" / f"{i}.png")
    s = settings(tmp_path, features="mini", data=str(tmp_path / "data"), image_size=32)
    with pytest.raises(UserError, match="only one: use --features inception"):
        fid.feature_network(s, {}, WORLD)


# --- tokenizers -----------------------------------------------------------------------------------

class Posterior:
    def __init__(self, x):
        self.mean = x

    def mode(self):
        return self.mean

    def sample(self, noise):
        return self.mean + 0.1 * noise


class Identity:
    def __init__(self, noise=0.0):
        self.noise, self.generator = noise, torch.Generator().manual_seed(0)

    def encode(self, x):
        return Posterior(x)

    def decode(self, z):
        return z + self.noise * torch.randn(z.shape, generator=self.generator)


def test_tokenizer_scores_and_noise_worsens_every_one(tmp_path):
    images, s = list(photos(60, 16, 16)), settings(tmp_path, batch_size=25)

    def score(noise, s=s):
        return fid.score_tokenizer(Identity(noise), images, Toy(), s, WORLD)

    perfect = score(0)
    assert abs(perfect["rFID"]) < 1e-6 and perfect["PSNR"] == float("inf")
    assert perfect["SSIM"] == pytest.approx(1) and perfect["LPIPS"] is None
    for a, b in pairwise([score(noise) for noise in (0.02, 0.1, 0.4, 1.0)]):
        assert a["rFID"] < b["rFID"] and a["PSNR"] > b["PSNR"] and a["SSIM"] > b["SSIM"]
    # noise 0.1 of a range of 2: 20 log10(2 / 0.1) = 26 dB; an image's noise is its own, whatever the batch
    sampled = score(0, settings(tmp_path, posterior="sample", batch_size=25))
    assert sampled["PSNR"] == pytest.approx(26, abs=1)
    again = score(0, settings(tmp_path, posterior="sample", batch_size=7))
    assert again["PSNR"] == pytest.approx(sampled["PSNR"], rel=1e-6)
    with pytest.raises(UserError, match=r"broken.pt.*not finite"):
        score(float("nan"), settings(tmp_path, vae="broken.pt"))


@torch.no_grad()
def test_tokenizer_scores_equal_the_authors_protocol(inception_cache, monkeypatch, tmp_path):
    """Their two scripts, rebuilt from torchvision, torchmetrics, lpips and pytorch-fid, on random weights."""
    inception, metrics, lpips = (pytest.importorskip(name) for name in
                                 ("pytorch_fid.inception", "torchmetrics.image", "lpips"))
    size, data, rng = 64, tmp_path / "data", np.random.default_rng(0)
    for i, x in enumerate(photos(30, 150, 200)):          # to be resized, sharp enough for the crop to matter
        (data / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        x = x.permute(1, 2, 0).numpy()[:, :rng.integers(150, 200)]
        Image.fromarray(x).save(data / "ab"[i % 2] / f"{i:02}.png")
    torch.manual_seed(0)
    vae = AutoencoderKL(**SPECS["mini-f4d4"]).eval()
    vae.decoder.conv_out.weight.mul_(20)                  # reconstructions that leave [-1, 1]
    ours = fid.LPIPS(pretrained=False)
    for head in ours.lin:
        head.weight.abs_()
    monkeypatch.setattr(fid, "LPIPS", lambda: ours)
    s = fid.Settings(out=str(tmp_path), data=str(data), image_size=size, num=100, batch_size=8, workers=0)
    test = fid.data_set(s, {}, "test", fid.authors_crop)
    net = load_inception(inception_cache, monkeypatch, tmp_path, s.rfid_input)
    got = fid.score_tokenizer(vae, test, net, s, WORLD)

    v1 = torchvision.transforms
    transform = v1.Compose([v1.ToTensor(), v1.Resize(size), v1.CenterCrop(size), v1.Normalize([0.5], [0.5])])
    files = [f for i, f in enumerate(sorted(data.rglob("*.png"))) if i % 10 == 9]
    x = torch.stack([transform(Image.open(f).convert("RGB")) for f in files])
    posterior = vae.encode(x)
    generators = [fid.step_generator("cpu", s.seed, i) for i in range(len(x))]
    noise = [torch.randn(posterior.mean[0].shape, generator=generator) for generator in generators]
    y = vae.decode(posterior.sample(torch.stack(noise)))
    assert y.abs().max() > 1.2
    x8, y8 = ((127.5 * v + 128).clamp(0, 255).to(torch.uint8) for v in (x, y))
    mse = (x8.double() - y8.double()).square().mean((1, 2, 3))
    theirs = {"PSNR": (20 * torch.log10(255 / mse.sqrt())).mean().item()}
    theirs["SSIM"] = metrics.StructuralSimilarityIndexMeasure(data_range=(-1.0, 1.0))(y, x).item()
    perceptual = lpips.LPIPS(net="vgg", pnet_rand=True, pretrained=False, verbose=False).eval()
    vgg = ours.features.state_dict()
    perceptual.net.load_state_dict({k: vgg[k.split(".", 1)[1]] for k in perceptual.net.state_dict()})
    for layer, head in zip(perceptual.lins, ours.lin):
        layer.model[-1].weight.copy_(head.weight)
    theirs["LPIPS"] = perceptual(x, y).mean().item()
    state = torch.load(inception_cache[1], weights_only=True)
    monkeypatch.setattr(inception, "load_state_dict_from_url", lambda *a, **k: state)
    features = [inception.InceptionV3().eval()(v / 255)[0].flatten(1).double().numpy() for v in (x8, y8)]
    # tr (sigma1 sigma2)^1/2 from 3 centred images each: the nuclear norm of a 3x3 matrix
    centred = [(v - v.mean(0)) / (len(v) - 1) ** 0.5 for v in features]
    root = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    means = ((features[0].mean(0) - features[1].mean(0)) ** 2).sum()
    theirs["rFID"] = means + sum((v ** 2).sum() for v in centred) - 2 * root
    assert got == pytest.approx(theirs, rel=1e-3)
    # both choices matter here (that Inception's input does: test_inception_features_equal_pytorch_fid)
    for crop, posterior in ((fid.center_crop, "sample"), (fid.authors_crop, "mode")):
        s.posterior, other = posterior, fid.data_set(s, {}, "test", crop)
        values = fid.score_tokenizer(vae, other, Toy(), s, WORLD)
        values["rFID"] = theirs["rFID"]   # Toy is another judge
        assert values != pytest.approx(theirs, rel=1e-3)


class Noisy(list):
    name = "noisy photos"


def test_noise_raises_every_distance_monotonically(tmp_path):
    torch.manual_seed(0)
    classifier = fid.Classifier(10, 8, width=96).eval().requires_grad_(False)
    x, s = photos(500, 32, 32), settings(tmp_path)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))

    def features(level):
        images = Noisy((x + level * noise).round().clamp(0, 255).to(torch.uint8))
        return fid.features_of(images, partial(fid.score_net, classifier), s, WORLD)

    reference = features(0)
    scores = [fid.compare(features(level), reference) for level in (0, 5, 15, 40, 100)]
    assert abs(scores[0]["FID"]) < 1e-6 and abs(scores[0]["sFID"]) < 1e-6
    assert scores[0]["precision"] == scores[0]["recall"] == 1
    for name in ("FID", "sFID"):
        assert all(a[name] < b[name] for a, b in pairwise(scores)), name


# --- uniformity -----------------------------------------------------------------------------------

def test_uniformity_measures_equal_loops():
    d = np.random.default_rng(0).random(60)
    got = fid.density_measures(d)
    differences = sum(np.abs(a - d).sum() for a in d)
    assert got["gini"] == pytest.approx(differences / (2 * 60 ** 2 * d.mean()), rel=1e-9)
    assert got["density cv"] == pytest.approx(np.sqrt(((d - d.mean()) ** 2).mean()) / d.mean(), rel=1e-9)
    entropy = -sum(p * np.log2(p) for p in d / d.sum()) / np.log2(60)
    assert got["normalized entropy"] == pytest.approx(entropy, rel=1e-9)
    even = fid.density_measures(np.full(60, 3.0))
    assert list(even.values()) == pytest.approx([0, 0, 1], abs=1e-12)


def test_uniformity_of_a_gaussian_has_a_closed_form_and_orders_shapes():
    rng, n = np.random.default_rng(0), 3000
    normal, square = rng.normal(size=(n, 2)), rng.random((n, 2))
    # half the points in a wide cloud, half in a narrow one far off: two very different densities
    mixture = np.concatenate([6 * rng.normal(size=(n // 2, 2)), rng.normal(size=(n - n // 2, 2)) + 40])
    got = fid.uniformity(normal)
    # A KDE of bandwidth h sees N(0, 1 + h^2): at points of N(0, 1) it is c U^a, U uniform, a = 1 / (1 + h^2)
    a = 1 / (1 + n ** (-1 / 3))                               # Scott: h = n^(-1/6)
    assert got["density cv"] == pytest.approx(np.sqrt((1 + a) ** 2 / (1 + 2 * a) - 1), rel=0.05)
    assert got["gini"] == pytest.approx(a / (a + 2), rel=0.05)
    assert got["normalized entropy"] == pytest.approx(1 - (np.log(1 + a) - a / (1 + a)) / np.log(n), abs=2e-3)
    for x, y in pairwise([fid.uniformity(p) for p in (square, normal, mixture)]):
        assert x["density cv"] < y["density cv"] and x["gini"] < y["gini"]
        assert x["normalized entropy"] > y["normalized entropy"]


def test_latent_vectors_are_positions_of_images_and_embeddings_are_planes(tmp_path):
    rng = np.random.default_rng(0)
    z = (rng.normal(size=(300, 5, 3, 4)) * np.arange(1, 6)[:, None, None] + 7).astype(np.float16)
    np.save(tmp_path / "latents.npy", z)
    got = fid.latent_vectors(tmp_path / "latents.npy", seed=0)
    assert got.shape == (300, 5) and np.allclose(got.mean(0), 0, atol=1e-6) and np.allclose(got.std(0), 1)
    # every vector is a position of its own image, up to the normalisation
    flat = z.astype(float).transpose(0, 2, 3, 1).reshape(300, 12, 5)
    distance = np.abs(flat - (got * flat.std((0, 1)) + flat.mean((0, 1)))[:, None]).sum(2)
    place = distance.argmin(1)
    assert len(set(place)) > 6
    # the same in a folder as train_dit.py leaves it, each image plain and flipped, and in the authors' shards
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    np.save(ours / "latents-00000.npy", np.stack([z, z[..., ::-1]], 1))
    np.save(ours / "labels.npy", np.arange(300) % 2)
    stats = {"mean": [7.0] * 5, "std": [1.0] * 5}
    (ours / "latents.json").write_text(json.dumps({"classes": ["a", "b"]} | stats))
    assert (fid.latent_vectors(ours, seed=0) == got).all() and (fid.latent_vectors(ours, seed=1) != got).any()
    safetensors = pytest.importorskip("safetensors.torch")
    theirs.mkdir()
    for k, x in enumerate(torch.from_numpy(z).float().split(170)):
        shard = {"latents": x, "latents_flip": x.flip(3).contiguous(), "labels": torch.arange(len(x))}
        safetensors.save_file(shard, theirs / f"{k}.safetensors")
    torch.save({k: torch.tensor(v).view(1, 5, 1, 1) for k, v in stats.items()}, theirs / "latents_stats.pt")
    assert (fid.latent_vectors(theirs, seed=0) == got).all()
    torch.save(torch.from_numpy(z[:, :2, 0, 0]), tmp_path / "flat.pt")
    flat = fid.latent_vectors(tmp_path / "flat.pt", seed=0)
    given = np.sort(z[:, 0, 0, 0].astype(float))
    assert np.allclose(np.sort(flat[:, 0]), (given - given.mean()) / given.std())
    assert fid.embed(flat, "tsne", 0) is flat
    pca = fid.embed(got, "pca", 0)
    assert np.allclose(np.sort(np.linalg.eigvalsh(np.cov(got.T)))[-2:], np.sort(pca.var(0, ddof=1)))
    pytest.importorskip("sklearn")
    assert fid.embed(got[:100], "tsne", 0).shape == (100, 2)


# --- the command line -----------------------------------------------------------------------------

def write_images(tmp_path):
    """The same 24 images as samples.npz, as a folder photos, and as a data set with two classes."""
    x = photos(24, 32, 32).permute(0, 2, 3, 1).numpy()
    meta = {"integrator": "euler", "cfg_scale": 1.5, "labels": "balanced"}
    np.savez(tmp_path / "samples.npz", arr_0=x, arr_1=np.arange(24) % 2, meta=np.array(json.dumps(meta)))
    for i, image in enumerate(x):
        for folder in (tmp_path / "photos", tmp_path / "data" / "ab"[i % 2]):
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{i:02}.png")
    return x, meta


def test_two_sets_of_images_by_name_need_no_run(tmp_path, cli, inception_cache, monkeypatch):
    x, _ = write_images(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(inception_cache[0]))
    monkeypatch.setattr(fid, "INCEPTION_HASH", f"sha256:{inception_cache[2]}")
    (tmp_path / "runs" / "mini").mkdir(parents=True)
    scores = tmp_path / "runs" / "mini" / "scores.json"
    scores.write_text("those of a run")
    pair = ("--samples", "samples.npz", "--reference", "photos")
    for flags, name in (((*pair, "--features", "inception", "--num", "6"), "| FID"),
                        ((*pair, "--features", "mini", "--data", "shapes", "--image-size", "32",
                          "--score-net-steps", "2", "--num", "50"), "| mini-FID")):
        printed = cli(*flags)
        line = next(line for line in printed.splitlines() if line.startswith(name))
        assert abs(float(line.split("|")[2])) < 1e-3 and "cfg_scale 1.5" in printed
        assert "real" not in printed and "class accuracy" not in printed
        assert scores.read_text() == "those of a run"
    np.savez(tmp_path / "other.npz", arr_0=255 - x)
    printed = cli("--samples", "other.npz", "--reference", "samples.npz", "--num", "6", "--out", "run")
    assert "Inception" in printed  # it is the default for two sets by name
    values = json.loads((tmp_path / "run" / "scores.json").read_text())["samples"]["values"]
    assert values["FID"] > 0.1


def test_samples_of_a_run_are_scored_against_its_images(tmp_path, cli):
    x, meta = write_images(tmp_path)
    run, flags = tmp_path / "run", ("--out", "run", "--score-net-steps", "60")
    run.mkdir()
    meta["tokenizer_fingerprint"] = fingerprint(save_tokenizer(run / "vae.pt", 1, 1))
    np.savez(run / "samples.npz", arr_0=x, arr_1=np.arange(24) % 2, meta=np.array(json.dumps(meta)))
    printed = cli(*flags)
    scores = json.loads((run / "scores.json").read_text())
    values = scores["samples"]["values"]
    assert scores["samples"]["against"] == "data train 32x32 (22 images)" and scores["real"]["images"] == 2
    assert values["class accuracy"] > 0.9  # the network has trained on nearly all of these images
    assert values["mini-recall"] == 1 and values["mini-FID"] < scores["tokenizer"]["values"]["mini-rFID"]
    assert scores["samples"]["meta"] == meta and scores["samples"]["images"] == 24
    assert "mini-FID" in printed and "| FID" not in printed and "cfg_scale 1.5" in printed
    (network,) = run.glob("score_net-*.pt")
    trained = network.stat().st_mtime_ns
    assert cli(*flags) == printed
    # with other samples, the network is not trained again, and nothing of the run's scores changes
    np.savez(tmp_path / "other.npz", arr_0=x[::-1], arr_1=np.arange(24) % 2)
    before = (run / "scores.json").read_bytes()
    printed = cli("--samples", "other.npz", "--cache", "run", "--data", "data", "--image-size", "32",
                 "--score-net-steps", "60")
    accuracy = next(line for line in printed.splitlines() if line.startswith("| class accuracy"))
    assert float(accuracy.split("|")[2]) < 0.1
    assert network.stat().st_mtime_ns == trained and (run / "scores.json").read_bytes() == before
    # samples of another tokenizer are refused
    made = {"tokenizer_fingerprint": "0123456789abcdef"}
    np.savez(run / "samples.npz", arr_0=x, arr_1=np.arange(24) % 2, meta=np.array(json.dumps(made)))
    line = cli(*flags, fails=True)
    assert "decoded by another tokenizer than run/vae.pt" in line and "train_dit.py" in line


def test_two_processes_score_as_one(tmp_path):
    """50,000 images on several GPUs: each process takes a part, and the files are written once."""
    x = photos(50, 32, 32).permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "samples.npz", arr_0=x, arr_1=np.arange(50) % 10)
    save_tokenizer(tmp_path / "vae.pt", 1, 1)
    found = []
    for processes in (1, 2):
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--"] if processes > 1 else []
        flags = f"--out run{processes} --samples samples.npz --vae vae.pt --data shapes --num 50"
        flags = [*flags.split(), "--device", "cpu", "--batch-size", "16", "--score-net-steps", "5"]
        subprocess.run([sys.executable, *launcher, str(ROOT / "fid.py"), *flags], cwd=tmp_path, check=True)
        names = sorted(path.name for path in (tmp_path / f"run{processes}").iterdir())
        assert len(names) == 2 and names[0].startswith("score_net-") and names[1] == "scores.json"
        found.append(json.loads((tmp_path / f"run{processes}" / "scores.json").read_text()))
    for kind in ("tokenizer", "samples", "real"):
        one, two = (scores[kind] for scores in found)
        assert one["images"] == two["images"] == 50 and one["values"].keys() == two["values"].keys()
        for name, value in one["values"].items():
            assert value is None or two["values"][name] == pytest.approx(value, rel=1e-4, abs=1e-7), name


def test_uniformity_is_printed_and_drawn(tmp_path, cli):
    np.save(tmp_path / "z.npy", np.random.default_rng(0).normal(size=(400, 2)))
    printed = cli("--uniformity", "z.npy", "--out", "run", "--uniformity-seeds", "2")
    assert "2-D" in printed and "density cv" in printed
    assert Image.open(tmp_path / "run" / "uniformity.png").size == (800, 800)


def save_tokenizer(path, step, total, scale=1.0):
    torch.manual_seed(0)
    state = {k: scale * v for k, v in AutoencoderKL(**SPECS["mini-f4d4"]).state_dict().items()}
    settings = {"data": "data", "image_size": 32}
    torch.save({"stage": "vae", "step": step, "total_steps": total, "spec": SPECS["mini-f4d4"],
                "model": state, "settings": settings}, path)
    return state


@pytest.mark.parametrize("flags, word", [
    ((), "train_vae.py"),
    (("--samples", "."), "--data"),
    (("--samples", ".", "--reference", "nowhere"), "nowhere"),
    (("--samples", "one.npz", "--data", "shapes", "--image-size", "32"), "arr_0"),
    (("--samples", "nothing.npz", "--data", "shapes", "--image-size", "32"), "nothing.npz"),
    (("--samples", "image.png", "--data", "shapes", "--image-size", "32"), "image.png cannot be read as an"),
    (("--vae", "young.pt"), "young.pt is unfinished"),
    (("--uniformity", "nothing.npy"), "nothing.npy"),
    (("--uniformity", "one.npy"), "one.npy holds (50,), not vectors"),
])
def test_mistakes_end_in_one_line(tmp_path, cli, flags, word):
    Image.new("RGB", (32, 32)).save(tmp_path / "image.png")
    np.savez(tmp_path / "one.npz", other=np.zeros(3))
    np.save(tmp_path / "one.npy", np.arange(50.0))
    save_tokenizer(tmp_path / "young.pt", 3, 9)
    assert word in cli(*flags, "--out", "run", fails=True)
