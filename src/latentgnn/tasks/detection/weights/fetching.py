"""Published weights from the cache or by download; without a network, an error within seconds."""

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
    """Return the state dict of weights that torchvision has published.

    Torchvision's own loader has no offline mode and waits for a network as long as the system does. So this first looks
    at the cache, and then checks whether the server answers. ``HF_HUB_OFFLINE``, which timm's weights obey, is
    respected too.

    Args:
        weights: the weights.
        what: their name, for the error.
        setting: name of the setting, for the error.
        otherwise: what the user can do instead, for the error.

    Raises:
        UserError: if the weights are not in the cache and cannot be downloaded.
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
        except Exception as error:  # from client, file system or reader, which have no common base class
            raise _failure(setting, what, f"{type(error).__name__}: {error}", otherwise) from error
    return state


@contextmanager
def timm_weights(what: str, *, setting: str, otherwise: str) -> Iterator[None]:
    """Wrap timm's download of weights: turn the errors of its clients into one error, and fail quickly.

    Raises:
        UserError: as in `torchvision_state`.
    """
    offline = huggingface_hub.constants.HF_HUB_OFFLINE
    try:
        if not offline and not _reachable(huggingface_hub.constants.ENDPOINT):
            # Offline, the hub's client uses its cache and does not retry.
            huggingface_hub.constants.HF_HUB_OFFLINE = True
        with _impatient():
            yield
    except Exception as error:  # each client has its own errors, without a common base class
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
    """Whether a server answers in time. Name resolution has no timeout, so another thread waits for it."""
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
