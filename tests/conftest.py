"""For every test: nothing is fetched from a model hub."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported; servers under test inherit it
