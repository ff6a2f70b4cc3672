"""What the tests share: the scripts on the import path, one thread a process, and a torch.hub cache of their own with no network behind it."""
import sys
from pathlib import Path
from urllib.error import URLError

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)                                   # small tensors: more threads only wait for each other


@pytest.fixture
def torch_home(tmp_path, monkeypatch):
    """An empty TORCH_HOME. Returns its hub/checkpoints folder. Every attempt to download ends at once in URLError; `.attempts` lists the URLs."""
    def refuse(url, *args, **kwargs):
        attempts.append(url)
        raise URLError("no network in this test")
    attempts = []
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return type("TorchHome", (), dict(checkpoints=folder, hub=folder.parent, attempts=attempts))
