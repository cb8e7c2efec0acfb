"""Published weights: are they on this machine, and if not, can they be had within seconds?

The libraries' own downloads retry for most of a minute before they give up. So we look into
their caches first, and knock at the host's door before we let them try.
"""

from __future__ import annotations

import contextlib
import io
import logging
import socket
import threading
import urllib.request
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import torch
from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from mecq_cli.errors import EnvironmentFailure, UsageError, first_line
from mecq_cli.settings import LOCAL

_PROBE_SECONDS = 1.5


@dataclass(frozen=True)
class PublishedWeights:
    """Where a library keeps the weights of a model.

    Attributes:
        location: a URL, or the id of a Hugging Face repository (``owner/name[@revision]``).
        on_hub: whether it is such an id.
        filename: in that repository, where it is not one of the usual two.
    """

    location: str
    on_hub: bool = False
    filename: str | None = None

    @property
    def url(self) -> str:
        """The place to ask for them."""
        return constants.ENDPOINT if self.on_hub else self.location

    def cached(self) -> Path | None:
        """The file in the library's cache on this machine, if it is there."""
        if not self.on_hub:
            name = Path(urlsplit(self.location).path).name
            file = Path(torch.hub.get_dir(), "checkpoints", name)
            return file if file.is_file() else None
        repository, _, revision = self.location.partition("@")
        for name in self._hub_names():
            found = try_to_load_from_cache(repository, name, revision=revision or None)
            if isinstance(found, str):
                return Path(found)
        return None

    def fetched(self, model: str) -> Path:
        """The file, of a repository on the hub: from the cache, or else from there.

        Raises:
            UsageError: there is no such repository, or it has no such file.
            EnvironmentFailure: it cannot be fetched.
        """
        try:
            return self.cached() or self._downloaded(model)
        except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
            raise UsageError(
                f"{model}: the Hugging Face Hub has no such model, or not for you"
            ) from error
        except (OSError, ValueError) as error:
            raise _not_fetched(model, f"{type(error).__name__}: {first_line(error)}") from error

    def _downloaded(self, model: str) -> Path:
        reason = self._why_unreachable()
        if reason is not None:
            raise _not_fetched(model, reason)
        repository, _, revision = self.location.partition("@")
        names = self._hub_names()
        for name in names:
            found = _download(repository, name, revision)
            if found is not None:
                return found
        raise UsageError(f"{model}: has none of {', '.join(names)}, so it is none of timm's")

    def require_reachable(self, model: str) -> None:
        """Fail now rather than after a minute of retries.

        Raises:
            EnvironmentFailure: nobody answers, or HF_HUB_OFFLINE forbids to ask.
        """
        reason = self._why_unreachable()
        if reason is not None:
            raise unavailable(model, reason)

    def _why_unreachable(self) -> str | None:
        if self.on_hub and constants.HF_HUB_OFFLINE:
            return "HF_HUB_OFFLINE is set, and nothing is in the cache"
        if not _answers(self.url):
            return f"no connection to {urlsplit(self.url).hostname}, and nothing is in the cache"
        return None

    def _hub_names(self) -> list[str]:
        """In the order in which timm asks for them."""
        name = self.filename or constants.PYTORCH_WEIGHTS_NAME
        if name == constants.PYTORCH_WEIGHTS_NAME:
            return [constants.SAFETENSORS_SINGLE_FILE, name]
        return [name.removesuffix(".bin") + ".safetensors", name] if ".bin" in name else [name]


def _download(repository: str, name: str, revision: str) -> Path | None:
    """A file of a repository; None if there is none of that name."""
    try:
        with quiet():
            return Path(hf_hub_download(repository, name, revision=revision or None))
    except LocalEntryNotFoundError:  # which is one of the next kind, but says that nobody answered
        raise
    except EntryNotFoundError:
        return None


def _not_fetched(model: str, reason: str) -> EnvironmentFailure:
    return EnvironmentFailure(
        f"{model} cannot be fetched: {reason}; fetch its files elsewhere, and give the folder "
        f"they are in as {LOCAL}FOLDER"
    )


def unavailable(model: str, reason: str) -> EnvironmentFailure:
    """The error for weights that cannot be fetched."""
    return EnvironmentFailure(
        f"the pretrained weights of {model} cannot be fetched: {reason}; give a weight file with "
        "--checkpoint FILE, or start from random weights with --no-pretrained"
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing of what the libraries print, log or warn inside reaches the terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _answers(url: str) -> bool:
    """Whether somebody accepts a connection for ``url``, at the proxy where there is one."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    proxy = urllib.request.getproxies().get(parts.scheme)
    if proxy and not urllib.request.proxy_bypass(host):
        parts = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    port = parts.port or (80 if parts.scheme == "http" else 443)
    answered = threading.Event()

    def knock() -> None:
        with (
            contextlib.suppress(OSError),
            socket.create_connection((parts.hostname or "", port), timeout=_PROBE_SECONDS),
        ):
            answered.set()

    # In a thread of its own: no timeout of a socket covers a name server that keeps silent.
    thread = threading.Thread(target=knock, daemon=True)
    thread.start()
    thread.join(_PROBE_SECONDS)
    return answered.is_set()
