"""For vLLM's entry-point tests against Moesaic: names of `vllm` that are imported, and the server's end.

The tests import vLLM's own classes beside what they ask the server; those that use them are left out, so here such a
name only has to exist. `get_tokenizer` and the vocabulary's size are real.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


class _Absent:
    """A class of vLLM that is not here; attributes of it are such classes too."""

    def __init__(self, *_: object, **__: object) -> None:
        raise NotImplementedError("a class of vLLM itself")


class _ModelConfig:
    """Stands in for vLLM's ModelConfig where tests ask how many tokens the vocabulary has."""

    def __init__(self, **_: object) -> None:
        self._config = json.loads(Path(os.environ["MOESAIC_MODEL"], "config.json").read_text())

    def get_vocab_size(self) -> int:
        return int(self._config["vocab_size"])


class _NoHub:
    """Stands in for the hub: adapters, whose tests are left out, are not downloaded."""

    def snapshot_download(self, repo_id: str) -> str:
        return repo_id


def _get_tokenizer(tokenizer_name: str, **_: object) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(os.environ["MOESAIC_MODEL"])


class _StandIn(ModuleType):
    """Any module of vLLM: every name in it is a class that cannot be made."""

    __path__: list[str]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "get_tokenizer":
            return _get_tokenizer
        if name == "ModelConfig":
            return _ModelConfig
        if name == "hf_api":
            return _NoHub
        if name == "download_weights_from_hf":
            return lambda model, **_: model
        if name == "is_rocm":
            return lambda: False
        if name in ("current_platform", "envs"):
            return _StandIn(name)
        if name == "VLLM_USE_RUST_FRONTEND":
            return False
        if name == "__version__":
            return os.environ["MOESAIC_VERSION"]
        return type(name, (_Absent,), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds every module below `vllm`."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> Any:
        if name != "vllm" and not name.startswith("vllm."):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = _StandIn(spec.name)
        module.__path__ = []
        if spec.name == "vllm.version":
            module.__dict__["__version__"] = os.environ["MOESAIC_VERSION"]
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run."""


sys.meta_path.insert(0, _Finder())


@pytest.fixture(scope="session", autouse=True)
def _servers_end() -> Iterator[None]:
    yield
    from tests.utils import stop_servers

    stop_servers()


@pytest.fixture(scope="session")
def qwen3_lora_files() -> str:
    """No adapter: tests that use one are left out."""
    return "no-adapter"
