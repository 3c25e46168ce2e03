"""Write sd/text/data/clip_merges.bin, the merges of CLIP's tokenizer, from what OpenAI published.

    python scripts/checks/build_merges.py download the openai-clip sdist with pip, check it, write the file
    python scripts/checks/build_merges.py SOURCE SOURCE: openai-clip-1.0.1.tar.gz or bpe_simple_vocab_16e6.txt.gz
   python scripts/checks/build_merges.py [SOURCE] --check  write nothing; exit 1 unless the file is what it should be

The published list has 262,144 merges, of which CLIP uses the first 48,894. Each joins two entries of the vocabulary
that stand before it, so the file is a table of 48,894 rows of two ids, two bytes each, lower byte first: 195,576 bytes.
That is 37 % of the same lines as text, and less than gzip makes of them (208 kB), without a compressor: the output of
zlib and lzma may change with their versions, this table cannot. Nothing needs to be unpacked or parsed to load it.
"""

import argparse
import gzip
import hashlib
import io
import struct
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

SDIST_SHA256 = "cd40bf2f205c096c49524fcbff484339f793b52afd6e7ffad80a2fe108151721"
VOCABULARY_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
MERGES_SHA256 = "88d5677a60bb2d33e2c2b0e57fcd83b2b64fe832ff26e0395aff9a749db6f546"

MERGES_FILE = Path(__file__).parents[2] / "sd" / "text" / "data" / "clip_merges.bin"
MERGE_COUNT = 49408 - 2 * 256 - 2  # the vocabulary less single bytes, bytes that end a word, start and end of text
END_OF_WORD = "</w>"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", type=Path, help="the sdist or the vocabulary file; default: download")
    parser.add_argument("--check", action="store_true", help="only compare the file with a rebuild")
    parser.add_argument("--file", type=Path, default=MERGES_FILE, help="default: %(default)s")
    options = parser.parse_args(arguments)

    with tempfile.TemporaryDirectory() as folder:
        try:
            source = options.source or download_sdist(Path(folder))
            merges = encode_merges(read_vocabulary(source))
            check_sha256("the table made from it", merges, MERGES_SHA256)
            same = options.file.exists() and options.file.read_bytes() == merges
        except (OSError, ValueError, KeyError, tarfile.TarError, subprocess.CalledProcessError) as error:
            print(f"build_merges: {error}", file=sys.stderr)
            return 2
    if options.check:
        print(f"{options.file} {'equals' if same else 'differs from'} the rebuild", file=sys.stderr)
        return 0 if same else 1
    if not same:
        options.file.parent.mkdir(parents=True, exist_ok=True)
        options.file.write_bytes(merges)
    print(options.file)
    return 0


def download_sdist(folder: Path) -> Path:
    """Fetch the sdist from the package index. pip runs a package's setup.py to learn its name, so the sha256 goes
    along: pip compares it before it runs anything."""
    requirement = folder / "requirement.txt"
    requirement.write_text(f"openai-clip==1.0.1 --hash=sha256:{SDIST_SHA256}\n")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", "--require-hashes"]
    subprocess.run([*pip, "--dest", folder, "--requirement", requirement], check=True, stdout=sys.stderr)
    return folder / "openai-clip-1.0.1.tar.gz"


def read_vocabulary(source: Path) -> bytes:
    """The bytes of bpe_simple_vocab_16e6.txt.gz, given as it is or inside the sdist; raises ValueError on others."""
    data = source.read_bytes()
    if source.name.endswith((".tar.gz", ".tgz")):
        check_sha256(str(source), data, SDIST_SHA256)
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            data = archive.extractfile("openai-clip-1.0.1/clip/bpe_simple_vocab_16e6.txt.gz").read()
    check_sha256(str(source), data, VOCABULARY_SHA256)
    return data


def check_sha256(name: str, data: bytes, expected: str) -> None:
    found = hashlib.sha256(data).hexdigest()
    if found != expected:
        raise ValueError(f"{name} has sha256 {found}, expected {expected}")


def encode_merges(vocabulary: bytes) -> bytes:
    """The table of merges as bytes. Line 1 of the list is a header; a line is "left right", </w> ends a word."""
    lines = gzip.decompress(vocabulary).decode("utf-8").split("\n")[1 : 1 + MERGE_COUNT]
    letters = byte_letters()
    vocabulary_ids = {entry: i for i, entry in enumerate(letters + [letter + END_OF_WORD for letter in letters])}
    table = bytearray()
    for line in lines:
        left, right = line.split()
        table += struct.pack("<HH", vocabulary_ids[left], vocabulary_ids[right])
        vocabulary_ids[left + right] = len(vocabulary_ids)
    return bytes(table)


def byte_letters() -> list[str]:
    """The letter that stands for a byte in the list, in the order of the ids: printable Latin-1 stands for itself,
    the other bytes, in ascending order, are written as U+0100, U+0101, ..."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(code) for code in printable + list(range(0x100, 0x200 - len(printable)))]


if __name__ == "__main__":
    sys.exit(main())
