"""Write files atomically: a reader sees the old content or the new one, never a part."""

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path. If the block succeeds, move it to `path`, else delete it."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def file_name(name: str) -> str:
    """Return `name` if it can name a file in any folder, else its plain characters and a digest."""
    plain = re.sub(r"[^\w .=+,@-]", "_", name)[:60].strip(" .")
    if plain == name:
        return name
    return f"{plain}-{hashlib.sha256(name.encode(errors='surrogatepass')).hexdigest()[:8]}"
