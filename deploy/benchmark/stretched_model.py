"""A model with a longer window than it was trained for, to measure memory and time. Its answers mean nothing there."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import AutoConfig

from kvferry.deploy.models import ModelSource

CONFIG = "config.json"


def stretched_model(source: ModelSource, window: int, folder: Path) -> ModelSource:
    """`source` itself when its window is long enough; else the same files, linked into the empty `folder`, with
    YaRN scaling of the positions in its configuration. No weights are copied.

    Raises ValueError for a model that is not in a local folder or has no one table of positions to scale.
    """
    trained = AutoConfig.from_pretrained(source.path).max_position_embeddings
    if trained >= window:
        return source
    origin = Path(source.path)
    if not origin.is_dir():
        raise ValueError(
            f"{source.name} has a window of {trained}, and only a model in a local folder is stretched to {window}: "
            "download it and give its folder"
        )
    config = json.loads((origin / CONFIG).read_text())
    rope = config.get("rope_parameters") or {"rope_type": "default", "rope_theta": config.get("rope_theta", 10_000.0)}
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"{source.name} scales its positions already: its window of {trained} is not stretched")
    config["max_position_embeddings"] = window
    config["rope_parameters"] = {
        **rope,
        "rope_type": "yarn",
        "factor": window / trained,
        "original_max_position_embeddings": trained,
    }
    for file in origin.iterdir():
        if file.name != CONFIG:
            (folder / file.name).symlink_to(file.resolve())
    (folder / CONFIG).write_text(json.dumps(config))
    return ModelSource(source.name, str(folder))
