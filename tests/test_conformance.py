"""The published layer's outputs and gradients."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from sweep import relative_error

from latentgnn import LatentGNN, load_published, published_state_dict, reference
from latentgnn.paths import memory

CASES = [
    "asymmetric_eval",
    "asymmetric_graph_conv_eval",
    "asymmetric_graph_conv_train",
    "asymmetric_no_residual_train",
    "asymmetric_train",
    "asymmetric_two_kernels_eval",
    "asymmetric_two_kernels_train",
    "symmetric_eval",
    "symmetric_train",
    "symmetric_two_kernels_graph_conv_train",
]


@pytest.mark.small_inputs
@pytest.mark.parametrize("implementation", ["layer", "core", "reference"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-5)])
@pytest.mark.parametrize("case", CASES)
def test_published_vectors(
    shared: Callable[[str], Path], case: str, dtype: torch.dtype, tolerance: float, implementation: str
) -> None:
    with safe_open(shared("conformance") / f"{case}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        config = json.loads(file.metadata()["config"])
    layer = LatentGNN(
        config["in_channels"],
        num_latents=config["latent_dims"],
        reduction=config["channel_stride"],
        symmetric=config["mode"] == "symmetric",
        graph_conv=config.get("graph_conv_flag", False),
        residual=not config.get("without_residual", False),
        dtype=dtype,
    ).train(config["training"])

    def part(name: str) -> dict[str, torch.Tensor]:
        return {key.removeprefix(name): value for key, value in tensors.items() if key.startswith(name)}

    load_published(layer, part("state."))
    x = tensors["input"].detach().to(dtype, copy=True).requires_grad_()
    # Inputs as small as these take the plain path, unless it is chosen what to hold.
    with memory("hold" if implementation == "core" else "auto"):
        output = reference.forward(layer, x) if implementation == "reference" else layer(x)
    # The gradients of a layer are what its parameters would be called if they were its weights.
    output.backward(tensors["grad_output"].to(dtype))
    assert relative_error(output, tensors["output"]) < tolerance
    assert relative_error(x.grad, tensors["grad_input"]) < tolerance

    state_after = published_state_dict(layer)
    assert state_after.keys() == part("state.").keys()
    for key, expected in part("state_after.").items():
        assert relative_error(state_after[key], expected) < tolerance, key

    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(parameter.grad)
    gradients = published_state_dict(layer)
    for key, expected in part("grad.").items():
        assert relative_error(gradients[key], expected) < tolerance, key
