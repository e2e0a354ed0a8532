"""Checkpoints by name: `hf-hub:ORG/NAME` as files of this machine."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

from dilated_attention_pytorch.core.validation import quoted
from dilated_attention_pytorch.models.weights import CONFIG, WEIGHTS

PREFIX = "hf-hub:"
# Prov-GigaPath's repository has its slide encoder under this name, beside the tile encoder's config.json.
_OFFICIAL = "slide_encoder.pth"
_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")


def local(source: Any) -> Any:
    """A source of weights on this machine: what `hf-hub:ORG/NAME` or `hf-hub:ORG/NAME@REVISION` names is downloaded,
    or found in huggingface_hub's cache; anything else is returned as it is.

    Raises:
        ValueError: a name of another form.
        FileNotFoundError: a repository without a slide encoder, or one that cannot be reached.
        ImportError: huggingface_hub is not installed.
    """
    if not isinstance(source, str) or not source.startswith(PREFIX):
        return source
    match = _NAME.fullmatch(source.removeprefix(PREFIX))
    if match is None:
        raise ValueError(f"expected {PREFIX}ORG/NAME or {PREFIX}ORG/NAME@REVISION, got {quoted(source)}")
    try:
        hub: Any = importlib.import_module("huggingface_hub")
        errors: Any = importlib.import_module("huggingface_hub.errors")
    except ImportError as error:
        raise ImportError(
            f"expected huggingface_hub, which {PREFIX} needs, found none: pip install 'dilated-attention-pytorch[hf]'"
        ) from error

    def download(file: str) -> Path:
        return Path(hub.hf_hub_download(match[1], file, revision=match[2]))

    try:
        try:
            return download(_OFFICIAL)
        except errors.EntryNotFoundError:
            download(CONFIG)
            return download(WEIGHTS).parent
    except errors.GatedRepoError as error:
        why = "its owners give access on request; ask on its page, then log in with huggingface_hub"
        raise FileNotFoundError(f"expected access to {source}, got none: {why}") from error
    except (errors.EntryNotFoundError, errors.HfHubHTTPError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FileNotFoundError(
            f"expected {_OFFICIAL}, or {WEIGHTS} and {CONFIG}, in {source}, got: {reason}"
        ) from error
