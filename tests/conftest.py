"""What the tests share: the scripts on the import path, one thread a process, a torch.hub cache of their own
with no network behind it, and how a user's mistake ends."""
import sys
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
torch.set_num_threads(1)   # small tensors: more threads only wait for each other


def user_error(work, *args, **kwargs):
    """The one line that work(*args, **kwargs) must end in: a UserError, or an OSError, which run_script
    prints as it is and which so must name its file."""
    from vae import UserError
    with pytest.raises((UserError, OSError)) as caught:
        work(*args, **kwargs)
    line = str(caught.value)
    assert not isinstance(caught.value, OSError) or str(caught.value.filename) in line
    assert line.strip() and "\n" not in line, line
    return line


@pytest.fixture
def torch_home(tmp_path, monkeypatch):
    """An empty TORCH_HOME: .hub and .hub/checkpoints. Every attempt to download ends at once in URLError;
    .attempts lists the URLs."""
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
