"""Tags that are there already: of earlier taggings of the dataset, for what would be asked in the same way again."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from shared.names import Name, content_id
from shared.schema import UNKNOWN, Attribute, Tagger
from shared.store.artifacts import Artifacts

_SHOWN = ("instance_id", "image_uri", "label", "left_px", "top_px", "width_px", "height_px")


@dataclass(frozen=True)
class Known:
    """`codes` (N, A) uint16, and where they are known: `mask` (N, A)."""

    codes: npt.NDArray[np.uint16]
    mask: npt.NDArray[np.bool_]

    def spread(self, columns: Sequence[int], count: int) -> Known:
        """The same with `count` columns, its own at `columns`; of the others nothing is known."""
        shape = (len(self.codes), count)
        wide = Known(np.full(shape, UNKNOWN, dtype=np.uint16), np.zeros(shape, dtype=np.bool_))
        wide.codes[:, columns], wide.mask[:, columns] = self.codes, self.mask
        return wide


def attribute_key(attribute: Attribute, prompt_digest: str, model: str, clip: str) -> str:
    """Equal for attributes that are tagged alike: name, tags, description, tagger and what the tagger works by.

    That is the prompt and the model for a language model, and for CLIP what `clip.clip_id` tells.
    """
    by = {Tagger.VLM: (prompt_digest, model), Tagger.CLIP: (clip,)}.get(attribute.tagger, ())
    measure = attribute.measure and (attribute.measure.name, attribute.measure.edges)
    return content_id(
        name=attribute.name,
        tags=attribute.tags,
        tagger=attribute.tagger.value,
        description=attribute.description,
        measure=measure,
        by=by,
    )


def identities(instances: pa.Table) -> npt.NDArray[np.uint64]:
    """(N,) uint64, equal where id, image, box and class are: what a tagger is shown of an instance."""
    columns = [instances.column(name).to_pylist() for name in _SHOWN]
    digests = [hashlib.blake2b(repr(row).encode(), digest_size=8).digest() for row in zip(*columns, strict=True)]
    return np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)


def known_codes(
    artifacts: Artifacts, dataset: str, instances: pa.Table, attributes: Sequence[Attribute], keys: Sequence[str]
) -> Known:
    """What complete taggings of `dataset` say of `instances` and `attributes`; `keys` are those of the attributes.

    Instances that could not be tagged then are not known: their image may be mended.
    """
    shape = (instances.num_rows, len(attributes))
    known = Known(np.full(shape, UNKNOWN, dtype=np.uint16), np.zeros(shape, dtype=np.bool_))
    own = identities(instances)
    ids = instances.column("instance_id").combine_chunks()
    for id_ in artifacts.store.names(artifacts.path(Name(dataset, "taggings", ""))):
        name = Name(dataset, "taggings", id_)
        if not artifacts.is_complete(name):
            continue
        told = artifacts.manifest(name).summary.get("attribute_keys", {})
        found = [
            j
            for j, (attribute, key) in enumerate(zip(attributes, keys, strict=True))
            if told.get(attribute.name) == key and not known.mask[:, j].all()
        ]
        if not found:
            continue
        rows = artifacts.read_part(name, "rows")
        names = [attributes[j].name for j in found]
        tags = artifacts.store.read_table(artifacts.path(name, "tags.parquet"), ["instance_id", *names])
        position = pc.index_in(ids, value_set=tags.column("instance_id").combine_chunks())
        at = np.asarray(pc.fill_null(position, -1).to_numpy(zero_copy_only=False), dtype=np.int64)
        theirs = rows.column("identity").to_numpy()
        alive = ~np.asarray(rows.column("dead").to_numpy())
        same = (at >= 0) & (theirs[at] == own) & alive[at]
        for j, attribute_name in zip(found, names, strict=True):
            take = same & ~known.mask[:, j]
            known.codes[take, j] = tags.column(attribute_name).to_numpy()[at[take]]
            known.mask[take, j] = True
    return known
