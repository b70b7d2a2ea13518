"""How well `--mode=group` finds the people of the demo's test photos, pair by pair.

make demo serve   # until the page is there
python launch.py --mode=group --checkpoint=runs/demo --gallery=runs/demo/people.lance
python -m tests.benchmark.groups runs/demo/groups.json data/synthetic
"""

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np

from alignps_jax.boxes import iou
from data_pipeline.sources.cuhk_sysu import CuhkSysuSource


def pairs(of):
    """The number of pairs with the same value."""
    return sum(count * (count - 1) // 2 for count in Counter(of).values())


def main(file: str, root: str) -> None:
    """Everybody counts; who has no identity, or is nobody, is somebody of his own."""
    test = CuhkSysuSource(root).test
    photo = {name: number for number, name in enumerate(test.names)}
    found = [
        (number, photo[Path(person["image"]).name], person["box"])
        for number, group in enumerate(json.loads(Path(file).read_text()))
        for person in group["people"]
    ]
    identity = []
    for number, (_, image, box) in enumerate(found):
        overlap = np.asarray(iou(np.asarray(test.boxes[image], float), np.array(box)))
        best = int(overlap.argmax()) if len(overlap) else 0
        known = len(overlap) and overlap[best] >= 0.5 and test.labeled[image][best]
        identity.append(int(test.identity[image][best]) if known else -1 - number)
    groups = [number for number, _, _ in found]
    together = pairs(zip(groups, identity, strict=True))
    there = pairs(np.concatenate(test.identity)[np.concatenate(test.labeled)].tolist())
    print(f"precision {together / pairs(groups):.3f}, recall {together / there:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
