"""Learning rates of a block's own, as factors of the network's."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from latentgnn.errors import UserError

# What a variant has beside its block and the block's options.
FACTORS = ("block_factor", "gamma_factor")


def parameter_groups(
    network: nn.Module, places: str | Sequence[str], variant: Mapping[str, Any], rate: float
) -> list[dict[str, Any]]:
    """A network's parameters by their rate, for an optimizer of torch.

    Args:
        network: as `benchmarks.study.build` makes it.
        places: that blocks follow.
        variant: ``block_factor`` multiplies the rate of its blocks, ``gamma_factor`` that of their ``gamma`` alone.
        rate: of all other parameters.

    Raises:
        UserError: a factor for a gamma that is not there.
    """
    of_block = variant.get("block_factor", 1.0)
    of_gamma = variant.get("gamma_factor", of_block)
    places = [places] if isinstance(places, str) else places
    blocks = [f"{place}.1." for place in places] if "block" in variant else []
    gammas = [f"{block}gamma" for block in blocks]
    named = dict(network.named_parameters())
    if "gamma_factor" in variant and not all(gamma in named for gamma in gammas):
        raise UserError(f"gamma_factor: {variant['block']} has no parameter gamma; leave it out, or take block_factor")

    def settings(name: str) -> dict[str, float]:
        factor = of_gamma if name in gammas else of_block if name.startswith(tuple(blocks)) else 1.0
        return {"lr": rate * factor}

    return grouped(network, settings)


def grouped(network: nn.Module, settings: Callable[[str], Mapping[str, float]]) -> list[dict[str, Any]]:
    """A network's parameters by their settings, for an optimizer of torch.

    Args:
        network: the network.
        settings: the optimizer's settings for the parameter of a name.
    """
    groups: dict[tuple[tuple[str, float], ...], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        groups.setdefault(tuple(settings(name).items()), []).append(parameter)
    return [{"params": members, **dict(chosen)} for chosen, members in groups.items()]
