"""The two public data sets, from their official addresses: python data.py download DIR

Resumes what was cut off, checks SHA-256, unpacks nothing but the named files. Plumbing, and so not in data.py.
Beside the unpacked files stands SHA256SUMS, by which a later call (or `sha256sum -c`) checks them.
"""

import errno
import hashlib
import http.client
import os
import posixpath
import socket
import sys
import tarfile
import zlib
from pathlib import Path
from urllib.request import Request, urlopen

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import EPITOME_FILES, DataError, printable, sha256


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


# No server may fill the disk: the size of the archive is known, a file of EPITOME has less than 2 MB.
SIZES = {"empatheticdialogues.tar.gz": 28_022_709}
LARGEST = 50_000_000  # bytes, where the size is not known


def _fetch(url, path, progress):
    """Append to the file `path`.part what it still lacks; a server that ignores Range starts it over."""
    part, limit = f"{path}.part", SIZES.get(os.path.basename(path), LARGEST)
    have = os.path.getsize(part) if os.path.exists(part) else 0
    try:
        request = Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        with urlopen(request, timeout=30) as answer:
            have = have if answer.status == 206 else 0
            total = have + int(answer.headers.get("Content-Length") or 0)
            if not have:
                _write(part, b"", "w")
            while max(have, total) <= limit and (block := answer.read(1 << 20)):
                _write(part, block, "a")
                have += len(block)
                progress(
                    f"{posixpath.basename(url)} {100 * have // max(total, 1):3d} % of {total:,} bytes"
                )
        if have < total <= limit:
            raise ConnectionError(f"cut off at {have} of {total} bytes")
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, DataError):
            raise
        if getattr(error, "code", 0) == 416:  # the part is too long: it is of something else
            os.remove(part)
        raise DataError(f"{url}: {error}; {_remedy(error, path)}") from None
    if max(have, total) > limit:
        os.remove(part)
        raise DataError(
            f"{url}: more than the {limit:,} bytes that the file may have; {_by_hand(path)}"
        )


def _write(path, content, mode):
    """What a full disk or a folder that may not be written to says is no error of the network."""
    try:
        with open(path, mode + "b") as file:
            file.write(content)
    except OSError as error:
        remedy = "make room" if error.errno == errno.ENOSPC else "choose another folder"
        raise DataError(
            f"{path}: can not be written ({error.strerror}); {remedy}, then run the same command again"
        ) from None


def _by_hand(path):
    return f"fetch it with a browser, put it at {path}, then run the same command again"


def _remedy(error, path):
    """What passes is tried again. A proxy, a certificate or an address that has moved is there to stay."""
    code, cause = getattr(error, "code", 0), getattr(error, "reason", error)
    if isinstance(cause, (ConnectionRefusedError, socket.gaierror)):
        return f"run the same command again once the network lets you through, or {_by_hand(path)}"
    passing = (ConnectionError, TimeoutError, http.client.IncompleteRead)
    if code in (408, 416, 429) or code >= 500 or isinstance(cause, passing):
        return "run the same command again, it goes on from here"
    return _by_hand(path)


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
    sums = {}
    for name, content in found.items():
        path = os.path.join(folder, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        _write(f"{path}.tmp", content, "w")  # a crash leaves no half file under the name
        os.replace(f"{path}.tmp", path)
        line = f"{hashlib.sha256(content).hexdigest()}  {os.path.basename(name)}\n"
        sums[_record(path)] = sums.get(_record(path), "") + line
    for record, lines in sums.items():
        _write(f"{record}.tmp", lines.encode(), "w")
        os.replace(f"{record}.tmp", record)


def _record(path):
    """Where the SHA-256 of an unpacked file is written down: beside it."""
    return os.path.join(os.path.dirname(path), "SHA256SUMS")


def _is_unpacked(path):
    """Whether an unpacked file is there and is the one that came out of the archive."""
    try:
        with open(_record(path), encoding="utf-8", errors="replace") as file:
            lines = file.read(10_000).splitlines()
        return f"{sha256(path)}  {os.path.basename(path)}" in lines
    except (OSError, DataError):
        return False


def download(folder, sources=SOURCES, progress=print):
    """Fetch what is missing, resume what was cut off, check SHA-256, unpack. A second run fetches nothing.
    A file that someone has put in its place by hand is taken if it is the right one."""
    for url, name, digest, members in sources:
        path = os.path.join(folder, name)
        part = path + ".part"
        unpacked = [os.path.join(folder, member) for member in members]
        by_hand = os.path.isfile(path) and sha256(path) == digest
        if all(map(_is_unpacked, unpacked)) if members else by_hand:
            progress(f"{name}: already there, and as it was published")
            continue
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if os.path.exists(path) and not by_hand:
            progress(f"{path}: not the published file, its SHA-256 differs; fetched anew")
        if not by_hand:
            if not os.path.exists(part) or sha256(part) != digest:
                _fetch(url, path, progress)
            if sha256(part) != digest:
                os.remove(part)
                raise DataError(
                    f"{path}: SHA-256 differs from the published one, removed; download it again"
                )
        if members:
            _unpack(path if by_hand else part, folder, members)
        if members and not by_hand:
            os.remove(part)
        if not members:
            os.replace(part, path)
        progress(f"{name}: checked and in place")


def main(arguments):
    """The command line. Returns the exit code."""
    try:
        if arguments[:1] != ["download"] or len(arguments) != 2:
            raise DataError("usage: python data.py download DIR")
        download(arguments[1], progress=lambda line: print(printable(line)))
        return 0
    except (DataError, OSError) as error:
        remedy = "" if isinstance(error, DataError) else "; choose another folder"
        return print(f"data.py: {printable(error)}{remedy}", file=sys.stderr) or 2
    except KeyboardInterrupt:
        return (
            print(
                "\ndata.py: stopped; run the same command again, it goes on from here",
                file=sys.stderr,
            )
            or 130
        )
