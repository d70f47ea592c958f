"""Published weights: out of the cache, or downloaded, and without a network an error within seconds."""

import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from threading import Thread
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import huggingface_hub.constants
import torch
from torch import Tensor
from torchvision.models import WeightsEnum

from latentgnn.errors import UserError

_CONNECT_SECONDS = 5.0


def torchvision_state(weights: WeightsEnum, what: str, *, setting: str, otherwise: str) -> Mapping[str, Tensor]:
    """The state dict of weights that torchvision has published.

    Torchvision's own loader knows no mode without a network and waits for one as long as the system does. So the cache
    is looked at first, and then whether the server answers. ``HF_HUB_OFFLINE``, which timm's weights obey, counts too.

    Args:
        weights: which.
        what: their name, for the error.
        setting: the setting's name, for the error.
        otherwise: for the error, what the user can do.

    Raises:
        UserError: the weights are not in the cache, and cannot be had.
    """
    cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlsplit(weights.url).path).name
    if not cached.is_file():
        place = f"{cached} is not there"
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            raise _failure(setting, what, f"{place}, and HF_HUB_OFFLINE forbids to download it", otherwise)
        if not _reachable(weights.url):
            raise _failure(setting, what, f"{place}, and {urlsplit(weights.url).netloc} does not answer", otherwise)
    with _impatient():
        try:
            state: Mapping[str, Tensor] = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
        except Exception as error:  # of the client, the file system, or the reader: they have no base class in common
            raise _failure(setting, what, f"{type(error).__name__}: {error}", otherwise) from error
    return state


@contextmanager
def timm_weights(what: str, *, setting: str, otherwise: str) -> Iterator[None]:
    """Around timm's fetching of weights: what its many clients raise is one error, and soon.

    Raises:
        UserError: as `torchvision_state`.
    """
    offline = huggingface_hub.constants.HF_HUB_OFFLINE
    try:
        if not offline and not _reachable(huggingface_hub.constants.ENDPOINT):
            # Offline, the hub's client takes what it has in its cache and does not try again and again.
            huggingface_hub.constants.HF_HUB_OFFLINE = True
        with _impatient():
            yield
    except Exception as error:  # each client has errors of its own, and no base class in common
        raise _failure(setting, what, f"{type(error).__name__}: {error}", otherwise) from error
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = offline


def _failure(setting: str, what: str, reason: str, otherwise: str) -> UserError:
    first = " ".join(reason.split())
    return UserError(f"{setting}: cannot get {what} ({first}). Without a network, {otherwise}")


@contextmanager
def _impatient() -> Iterator[None]:
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_CONNECT_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(timeout)


def _reachable(url: str) -> bool:
    """Whether a server answers in time. The system's look-up of its name knows no limit, so another thread waits."""
    answers: list[bool] = []

    def ask() -> None:
        try:
            urlopen(Request(url, method="HEAD"), timeout=_CONNECT_SECONDS).close()
            answers.append(True)
        except HTTPError:
            answers.append(True)
        except (OSError, HTTPException):
            pass

    thread = Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_CONNECT_SECONDS)
    return bool(answers)
