"""What runs on the lab's machines where many requests and restarts matter, and not the model: a tiny one.

The machines share this one's cores, and most of the time would go into computing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from support.tiny_models import random_prompt, write_tiny_model

PROMPTS = [random_prompt(700 + 37 * i, seed=i) for i in range(10)]


def write_tiny_settings(home: Path, model: Path, **sections: dict[str, Any]) -> None:
    """`kvferry.yaml`, which is there already: the shipped one with a tiny model, and what `sections` say."""
    write_tiny_model("llama", model)
    settings = yaml.safe_load((home / "kvferry.yaml").read_text())
    settings |= {"model": str(model), "dtype": "float32", "preset": "kv16", "block_size": 32, "threads": 1}
    settings["store"]["memory"] = "64MiB"
    settings["prefill"] = {"count": 2, "fetch": "always"}
    settings["decode"] = {"count": 2, "kv_memory": "32MiB", "prefix_caching": False}
    settings["gateway"] = {"count": 2}
    for name, changes in sections.items():
        settings[name] |= changes
    (home / "kvferry.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
