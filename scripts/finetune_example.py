"""A folder of 50 captioned pictures to fine-tune on: python scripts/finetune_example.py OUT [NPM_TARBALLS]

They are emoji in a style the bundled model has never seen, Twemoji's (CC-BY-4.0, © Twitter and contributors), captioned
"…, twemoji". What came of it is in docs/recipes/finetune.md.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from hartist.data.concepts import read_concepts, stable_hash
from hartist.data.emoji import icon_art
from hartist.data.render import WHITE
from hartist.data.sources import EMOJIBASE, Package, obtain, unpack
from hartist.files import read_json, write_bytes, write_text
from hartist.pixels import png_bytes

TWEMOJI = Package(
    name="@iconify-json/twemoji",
    version="1.2.5",
    sha256="19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
    licence="CC-BY-4.0",
    copyright="Copyright Twitter, Inc and other contributors",
    describes="Twemoji",
    wanted=("package/icons.json", "package/chars.json"),
)
COUNT, SIZE = 50, 256


def main(out: Path, source: Path | None) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folders = {p: unpack(p, obtain(p, source), Path(scratch) / p.tarball) for p in (TWEMOJI, EMOJIBASE)}
        art = icon_art(folders[TWEMOJI])
        data, groups = (read_json(folders[EMOJIBASE] / name) for name in ("en/data.json", "meta/groups.json"))
        found = [c for c in read_concepts(data, groups, skin_tones=False, flags=False) if c.id in art]
        chosen = sorted(found, key=lambda concept: stable_hash(f"example|{concept.id}"))[:COUNT]
        rows = []
        for concept in chosen:
            write_bytes(out / f"{concept.id}.png", png_bytes(art[concept.id](SIZE, WHITE)))
            rows.append({"file_name": f"{concept.id}.png", "text": f"{concept.label}, twemoji"})
    write_text(out / "metadata.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"{out}: {len(rows)} pictures")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)
