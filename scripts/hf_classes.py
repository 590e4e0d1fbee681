"""Write ``src/milepost/interop/hf/classes.json``: which family each class of transformers' auto mappings belongs to.

``python scripts/hf_classes.py`` with the release of transformers that the table is to be of. Of a class that several
families share the one that it is named after is taken.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

from transformers.models.auto import modeling_auto

TABLE = Path(__file__).parent.parent / "src" / "milepost" / "interop" / "hf" / "classes.json"
_OTHERS = ("Config", "Tokenizer", "TokenizerFast", "Processor", "FeatureExtractor", "ImageProcessor")


def families() -> dict[str, list[str]]:
    """The families' ``model_type``, each with its classes."""
    found: dict[str, set[str]] = defaultdict(set)
    for name in dir(modeling_auto):
        if name.endswith("MAPPING_NAMES"):
            for family, classes in getattr(modeling_auto, name).items():
                for one in [classes] if isinstance(classes, str) else classes:
                    if one and not one.endswith(_OTHERS):
                        found[one].add(family)
    table: dict[str, list[str]] = defaultdict(list)
    for one in sorted(found):
        table[min(found[one], key=lambda family: _distance(family, one))].append(one)
    return dict(sorted(table.items()))


def _distance(family: str, name: str) -> tuple[bool, int, str]:
    plain = family.replace("_", "").replace("-", "")
    return not name.lower().startswith(plain), -len(plain) if name.lower().startswith(plain) else len(plain), family


if __name__ == "__main__":
    lines = ",\n".join(f"{json.dumps(family)}: {json.dumps(classes)}" for family, classes in families().items())
    TABLE.write_text("{\n" + lines + "\n}\n")
    print(f"{TABLE}: {sum(map(len, families().values()))} classes of {len(families())} families")
