import json
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
from torch import nn

from latentgnn import FrozenBatchNorm, LatentGNN, LatentGNNConfig


def test_saves_and_loads_every_field(tmp_path: Path) -> None:
    config = LatentGNNConfig(
        channels=48,
        num_latents=(7, 3),
        reduction=4,
        symmetric=True,
        graph_conv=True,
        residual=False,
        norm=FrozenBatchNorm,
        num_groups=3,
        gamma_init=0.5,
        node_scale="mean",
    )
    config.save(tmp_path / "layer.json")
    saved = json.loads((tmp_path / "layer.json").read_text())
    assert saved == {
        "channels": 48,
        "num_latents": [7, 3],
        "reduction": 4,
        "symmetric": True,
        "graph_conv": True,
        "residual": False,
        "norm": "frozen_batch_norm",
        "num_groups": 3,
        "gamma_init": 0.5,
        "node_scale": "mean",
    }
    loaded = LatentGNNConfig.load(tmp_path / "layer.json")
    assert loaded == config
    assert loaded.norm_factory is FrozenBatchNorm


def test_a_norm_by_its_name_and_as_a_callable_are_the_same() -> None:
    config = LatentGNNConfig(channels=32, num_latents=4)
    assert config == LatentGNNConfig(channels=32, num_latents=4, norm=nn.BatchNorm1d)
    assert config == LatentGNN(32, num_latents=4).config


def test_is_frozen_and_keyword_only() -> None:
    config = LatentGNNConfig(channels=32, num_latents=4)
    with pytest.raises(FrozenInstanceError):
        config.channels = 64  # type: ignore[misc]
    with pytest.raises(TypeError, match="positional"):
        LatentGNNConfig(32, 4)  # type: ignore[misc]


def test_a_norm_without_a_name_cannot_be_saved() -> None:
    with pytest.raises(ValueError, match=r"batch_norm, frozen_batch_norm.*InstanceNorm1d"):
        LatentGNNConfig(channels=32, num_latents=4, norm=nn.InstanceNorm1d).to_dict()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "no JSON"),
        ("[1]", "got list"),
        ('{"channels": 32}', r"num_latents.*got \['channels'\]"),
        ('{"channels": 32, "num_latents": 4, "latents": 5}', "latents"),
        ('{"channels": 30, "num_latents": 4}', "divisible by reduction"),
        ('{"channels": 32, "num_latents": 1000000000}', "num_latents must be at most 65,536, got 1,000,000,000"),
    ],
)
def test_a_faulty_file_is_told(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "layer.json").write_text(text)
    with pytest.raises(ValueError, match=words):
        LatentGNNConfig.load(tmp_path / "layer.json")
