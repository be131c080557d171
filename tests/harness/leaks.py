"""The search for tokens where none may be: a log, the metrics, an answer, a file of the node.

Each part counts on its own, and so does the beginning or the end of one: a token that was cut short, or taken apart, has
leaked too. The second part is empty in every token of ours.
"""
import errno
import os
import re

SHORTEST = 16  # Characters; the IV has as many.
LETTERS = re.compile(rb"[A-Za-z0-9_-]{%d,}" % SHORTEST)


class Tokens:
    """Knows the tokens, and finds what is left of them."""

    def __init__(self, tokens):
        parts = {part.encode() for token in tokens for part in token.split(".") if len(part) >= SHORTEST}
        self.edges = {edge for part in parts for edge in (part[:SHORTEST], part[-SHORTEST:])}

    def found_in(self, data):
        """The places where a part of a token stands, as short texts."""
        runs = (run for run in LETTERS.finditer(data) if run[0][:SHORTEST] in self.edges or run[0][-SHORTEST:] in self.edges)
        return [f"at {run.start()}: …{data[max(run.start() - 60, 0):run.start() + 8].decode(errors='replace')}…" for run in runs]

    def found_under(self, directory, *, largest):
        """The same for every file below a directory that is no larger than `largest` bytes."""
        found = []
        for path in sorted(directory.rglob("*")):
            try:
                if path.is_file() and not path.is_symlink() and path.stat().st_size <= largest:
                    found += [f"{path} {place}" for place in self.found_in(data_of(path))]
            except FileNotFoundError:
                continue  # Gone since it was listed.
        return found


def data_of(path):
    """A file without its holes: disks and memories of guests are gigabytes of them."""
    with path.open("rb") as file:
        pieces, at, end = [], 0, os.fstat(file.fileno()).st_size
        while at < end:
            try:
                begin = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError as none_left:
                if none_left.errno != errno.ENXIO:
                    raise
                break
            at = os.lseek(file.fileno(), begin, os.SEEK_HOLE)
            pieces.append(os.pread(file.fileno(), at - begin, begin))
        return b"".join(pieces)
