"""What the tests share: the scripts on the import path, one thread per process, how a user's mistake ends,
and a torch.hub cache of their own with no network behind it."""
import sys
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
torch.set_num_threads(1)  # The tensors are small, and more threads would only wait for each other.


def user_error(work, *args, **kwargs):
    """The message of the UserError in which work(*args, **kwargs) must end: one line, not empty."""
    from vae import UserError
    with pytest.raises(UserError) as caught:
        work(*args, **kwargs)
    line = str(caught.value)
    assert line.strip() and "\n" not in line, line
    return line


@pytest.fixture
def torch_home(tmp_path, monkeypatch):
    """An empty TORCH_HOME with its folders .hub and .checkpoints. Every attempt to download ends at once in a
    URLError, and .attempts lists the URLs."""
    def refuse(url, *args, **kwargs):
        attempts.append(url)
        raise URLError("no network in this test")
    attempts = []
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return SimpleNamespace(checkpoints=folder, hub=folder.parent, attempts=attempts)
