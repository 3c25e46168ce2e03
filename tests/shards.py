"""What several tests of runs in shards need."""

import io
import json
import tarfile

SMALL = ("-W", 64, "-H", 64, "--steps", 1, "--sampler", "euler", "-q")


def prompts_file(path, number):
    path.write_text("".join(f"a {('cat', 'dog', 'hat')[i % 3]} {i}\n" for i in range(number)))
    return path


def samples_of(*tars):
    """The files of all samples, by their names; a name comes once."""
    found = {}
    for path in tars:
        with tarfile.open(path) as tar:
            for entry in tar:
                assert entry.name not in found
                found[entry.name] = tar.extractfile(entry).read()
    return found


def rows_of(*tables):
    return [json.loads(line) for path in tables for line in path.read_text().splitlines()]


def bytes_of(folder):
    """Every file of a run but the stats, which tell times."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if "_stats" not in path.name}


def picture_in(data):
    from PIL import Image

    return Image.open(io.BytesIO(data)).convert("RGB")
