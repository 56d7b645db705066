"""The two public data sets, from their official addresses: python data.py download DIR

Resumes what was cut off, checks SHA-256, unpacks nothing but the named files. Plumbing, and so not in data.py.
"""

import http.client
import os
import posixpath
import sys
import tarfile
import zlib
from pathlib import Path
from urllib.request import Request, urlopen

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import EPITOME_FILES, DataError, sha256


EPITOME_URL = (
    "https://raw.githubusercontent.com/behavioral-data/Empathy-Mental-Health/master/dataset/"
)
SOURCES = [  # (url, path below the data folder, SHA-256, the files to unpack from a tar archive)
    (
        "https://dl.fbaipublicfiles.com/parlai/empatheticdialogues/empatheticdialogues.tar.gz",
        "empatheticdialogues.tar.gz",
        "56f234d77b7dd1f005fd365bb17769cfe346c3c84295b69bc069c8ccb83be03d",
        [f"empatheticdialogues/{part}.csv" for part in ("train", "valid", "test")],
    ),
    *(
        (EPITOME_URL + name, f"epitome/{name}", digest, [])
        for name, digest in zip(
            EPITOME_FILES,
            (
                "225b28ffdc257f8a997d557eb937e78b68235e6203c87c7e2203d00fef8545cc",
                "2cedbe4252c919d22a6f46685afa16d3192a91e3306c2d4a386be12a30ad3f29",
                "9efa1af8e0537c16894379598f2076cb380ae18aacd9a8d26ebd381f5b7f9645",
            ),
        )
    ),
]


def _fetch(url, part, progress):
    """Append to the file `part` what it still lacks; a server that ignores Range starts it over."""
    have = os.path.getsize(part) if os.path.exists(part) else 0
    try:
        request = Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        with (
            urlopen(request, timeout=30) as answer,
            open(part, "ab" if answer.status == 206 else "wb") as file,
        ):
            total = file.tell() + int(answer.headers.get("Content-Length") or 0)
            while block := answer.read(1 << 20):
                file.write(block)
                progress(
                    f"{posixpath.basename(url)} {100 * file.tell() // max(total, 1):3d} % of {total:,} bytes"
                )
            if file.tell() < total:
                raise OSError(f"cut off at {file.tell()} of {total} bytes")
    except (OSError, http.client.HTTPException, ValueError) as error:
        if (
            getattr(error, "code", 0) == 416
        ):  # the part is longer than the file: it is of something else
            os.remove(part)
        raise DataError(
            f"{url}: {error}; run the same command again, it goes on from here"
        ) from None


def _unpack(archive, folder, members):
    """Write the named regular files and nothing else; an archive that tries anything unsafe is refused."""
    found, total = {}, 0
    try:
        with tarfile.open(archive) as tar:
            for item in tar:
                name = posixpath.normpath(item.name)
                if (
                    name.startswith(("/", ".."))
                    or not (item.isfile() or item.isdir())
                    or (total := total + item.size) > 2e8
                ):
                    raise DataError(
                        f"{archive}: unsafe entry {item.name[:80]!r}; do not use this archive"
                    )
                if name in members and item.isfile():
                    found[name] = tar.extractfile(item).read()
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise DataError(
            f"{archive}: damaged archive ({error}); remove it and fetch it again"
        ) from None
    if missing := {*members} - {*found}:
        raise DataError(f"{archive}: no {', '.join(sorted(missing))} in it; fetch it again")
    for path, content in (
        (os.path.join(folder, name), content) for name, content in found.items()
    ):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(f"{path}.tmp", "wb") as file:  # a crash leaves no half file under the name
            file.write(content)
        os.replace(f"{path}.tmp", path)


def download(folder, sources=SOURCES, progress=print):
    """Fetch what is missing, resume what was cut off, check SHA-256, unpack. A second run fetches nothing."""
    for url, name, digest, members in sources:
        path = os.path.join(folder, name)
        part, wanted = (
            path + ".part",
            [os.path.join(folder, member) for member in members] or [path],
        )
        if all(map(os.path.isfile, wanted)) and (members or sha256(path) == digest):
            progress(f"{name}: already there")
            continue
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if not os.path.exists(part) or sha256(part) != digest:
            _fetch(url, part, progress)
        if sha256(part) != digest:
            os.remove(part)
            raise DataError(
                f"{path}: SHA-256 differs from the published one, removed; download it again"
            )
        if members:
            _unpack(part, folder, members)
            os.remove(part)
        else:
            os.replace(part, path)
        progress(f"{name}: checked and in place")


def main(arguments):
    """The command line. Returns the exit code."""
    try:
        if arguments[:1] != ["download"] or len(arguments) != 2:
            raise DataError("usage: python data.py download DIR")
        download(arguments[1])
        return 0
    except (DataError, OSError) as error:
        return print(f"data.py: {error}", file=sys.stderr) or 2
    except KeyboardInterrupt:
        return (
            print(
                "\ndata.py: stopped; run the same command again, it goes on from here",
                file=sys.stderr,
            )
            or 130
        )
