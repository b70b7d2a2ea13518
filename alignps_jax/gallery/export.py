"""A gallery as one file that other vector databases read: `--mode=export --gallery`."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from alignps_jax.errors import UserError
from alignps_jax.files import complete_file
from alignps_jax.gallery.people import SCENE_COLUMNS, People, schema

COLUMNS = ("id", *SCENE_COLUMNS, "box", "score", "embedding")


def export_people(people: People, target: Path) -> int:
    """Writes everybody to a .parquet file, a row per person; returns their number.

    Columns: `id`, `scene`, `path`, `height`, `width`, `taken`, `camera`, `second`, `hash`, `box`
    (x1, y1, x2, y2 in pixels of the scene), `score`, `embedding` (of length one). Needs memory for
    a few thousand people only.
    """
    if target.suffix.lower() != ".parquet":
        raise UserError(f"--target: found {target}, expected a file .parquet for a gallery")
    table = people.table.pinned()
    known = schema(people.info)
    columns, count = pa.schema([known.field(name).remove_metadata() for name in COLUMNS]), 0
    with complete_file(target) as temporary, pq.ParquetWriter(temporary, columns) as writer:
        for batch in table.batches(COLUMNS):
            writer.write_batch(pa.RecordBatch.from_arrays(batch.columns, schema=columns))
            count += len(batch)
    return count
