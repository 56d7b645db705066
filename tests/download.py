"""Until `python emprl.py download DIR` exists: python tests/download.py download DIR"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import DataError, download, printable


def main(arguments):
    """The command line. Returns the exit code."""
    try:
        if len(arguments) != 2 or arguments[0] != "download":
            raise DataError("usage: python tests/download.py download DIR")
        download(arguments[1], progress=lambda line: print(printable(line)))
        return 0
    except (DataError, OSError) as error:
        print(f"download: {printable(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "\ndownload: stopped; run the same command again, it goes on from here",
            file=sys.stderr,
        )
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
