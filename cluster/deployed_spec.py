"""What was deployed: configuration, model and store, and one hash that tells one deployment from another.

Every detached actor is made of one and is replaced when another is deployed. Knows what a hash covers; knows no Ray.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from cluster.application import ApplicationId
from cluster.config.load import MoesaicConfig, from_tree, to_tree, without_keys, without_store
from cluster.errors import CheckpointError
from cluster.model.fingerprint import text_fingerprint
from cluster.model.info import ModelInfo, read_model_info

_DIGEST_DIGITS = 16


@dataclass(frozen=True, slots=True)
class DeployedSpec:
    """A deployment as its processes are told of it. `redis_url` None: each process has statistics of its own."""

    config_tree: Mapping[str, Any]
    fingerprint: str
    text_fingerprint: str
    redis_url: str | None = None

    @property
    def config(self) -> MoesaicConfig:
        """The configuration."""
        return from_tree(dict(self.config_tree))

    @property
    def application(self) -> ApplicationId:
        """Whose processes these are."""
        return self.config.ray.application_id

    def digest(self, *sections: str, texts: bool = False, store: bool = False, place: str = "") -> str:
        """Hash of the model's path and weights and `sections` of the configuration: the same for all that serve the
        same.

        Args:
            sections: all that the process reads; "model" and "ray" always count.
            texts: tokenizer and chat template count as well. store: so does the store.
            place: whatever else it was made for.
        """
        counted: list[object] = [
            {name: self.config_tree.get(name) for name in sorted({"model", "ray", *sections})},
            (self.fingerprint, self.text_fingerprint if texts else "", self.redis_url if store else "", place),
        ]
        return hashlib.sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest()[:_DIGEST_DIGITS]

    def without_keys(self) -> DeployedSpec:
        """For workers, scheduler and shelves: they check nobody."""
        return replace(self, config_tree=without_keys(self.config_tree))

    def without_store(self) -> DeployedSpec:
        """For front ends: the store's URL may have a password in it, and they count nothing."""
        return replace(self, config_tree=without_store(self.config_tree), redis_url=None)

    def without_secrets(self) -> DeployedSpec:
        """For hosts, which neither check nor count."""
        return self.without_keys().without_store()

    def read_model(self) -> ModelInfo:
        """The deployed model, as it is on this machine.

        Raises:
            CheckpointError: it isn't the one that was deployed: the files have changed since, or differ here.
        """
        info = read_model_info(self.config.model)
        if info.fingerprint != self.fingerprint:
            raise CheckpointError(
                f"{info.path}: not the weights that were deployed (fingerprint {self.fingerprint}, here "
                f"{info.fingerprint}); deploy again if they changed, or give every node the same files"
            )
        return info


def specify(config: MoesaicConfig, redis_url: str | None) -> DeployedSpec:
    """What deploying `config` now would deploy.

    Raises:
        ConfigError: there is no such model, or its files cannot be read.
    """
    info = read_model_info(config.model)
    return DeployedSpec(to_tree(config), info.fingerprint, text_fingerprint(info.path), redis_url)
