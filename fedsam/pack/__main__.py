"""``python -m fedsam.pack KIND SOURCE OUT``: a data set in a few files, for --dataset OUT."""

import sys

from fedsam.base.system import end_at_once

if __name__ == "__main__":
    end_at_once()  # by a signal, while what follows is imported

from argparse import Namespace
from collections.abc import Sequence

from fedsam import cli
from fedsam.base.errors import UsageError, nearest, plain
from fedsam.base.system import raising, shown
from fedsam.cli import Parser

ENCODINGS = ("jpeg", "png", "raw")


def flags() -> Parser:
    """Return the parser of the command's flags."""
    parser = Parser(
        prog="python -m fedsam.pack",
        description="Decode, scale and pack a data set into a folder, which --dataset OUT reads "
        "as it trains: of any size, in little memory. docs/large-data.md",
        allow_abbrev=False,
    )
    parser.add_argument("kind", nargs="?", metavar="KIND", help="folder, ...: as in --dataset")
    parser.add_argument("source", nargs="?", metavar="SOURCE", help="its path")
    parser.add_argument("out", nargs="?", type=cli.path, metavar="OUT", help="a new folder")
    parser.add_argument(
        "--side",
        type=int,
        default=256,
        metavar="N",
        help="pixels of the shorter side, of which the middle square is kept, unless there are "
        "masks; 0: as they are, all of one size (default: %(default)s)",
    )
    parser.add_argument(
        "--format",
        default="jpeg",
        metavar="NAME",
        help=f"{', '.join(ENCODINGS)}: small, exact, or exact and without decoding; masks are "
        "always png (default: %(default)s)",
    )
    parser.add_argument(
        "--channels", type=int, default=3, metavar="N", help="3, or 1 for grey (default: 3)"
    )
    parser.add_argument(
        "--dataset-options",
        default="",
        metavar="YAML",
        help="of KIND, as in python -m fedsam.simulate",
    )
    parser.add_argument(
        "--verify",
        type=cli.path,
        metavar="OUT",
        help="check the SHA-256 of every file in a packed folder, and pack nothing",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0, 1 (disk full), 2 (wrong input) or 128 + signal."""

    def act() -> None:
        given = Namespace(**flags().read(arguments))
        if given.verify is not None:
            verify(given)
            return
        check(given)
        with raising():
            pack(given)

    return cli.run(act, stopped="stopped", interrupted="interrupted; nothing was written")


def check(given: Namespace) -> None:
    """Raise UsageError for what can be seen to be wrong without looking at SOURCE."""
    if given.out is None or not given.source:
        raise UsageError("needs KIND SOURCE OUT, such as: folder pictures packed")
    if given.format not in ENCODINGS:
        hint = nearest(given.format, ENCODINGS)
        raise UsageError(f"--format: no {given.format!r}{hint}; have {', '.join(ENCODINGS)}")
    if given.channels not in (1, 3):
        raise UsageError(f"--channels {given.channels}: must be 3, or 1 for grey")
    if given.side < 0:
        raise UsageError(f"--side {given.side}: must be a number of pixels, or 0")


def verify(given: Namespace) -> None:
    """Check all of a packed folder."""
    from fedsam.data.sources.packed_folder import verify

    if given.kind is not None:
        raise UsageError("--verify: stands alone")
    count = verify(given.verify)
    cli.console().print(plain(f"{given.verify}: {count} files are as they were written"))


def pack(given: Namespace) -> None:
    """Pack a data set; show how far it is, and what came of it."""
    from fedsam.config.schema import resolve
    from fedsam.data.sources.load import LISTINGS, listing
    from fedsam.pack.writer import write

    kinds = [kind.partition(":")[0] for kind in LISTINGS]
    if given.kind not in kinds:
        hint = nearest(given.kind, kinds)
        raise UsageError(f"KIND: no {given.kind!r}{hint}; have {', '.join(kinds)}")
    options = resolve({"dataset_options": given.dataset_options}).dataset_options
    images = listing(given.kind, given.source, options)
    console = cli.console(stderr=True)
    with cli.progress_bar(console) as bar:
        task = bar.add_task("images", total=len(images.train) + len(images.test))
        write(
            given.out,
            images,
            side=given.side,
            encoding=given.format,
            channels=given.channels,
            advance=lambda: bar.advance(task),
        )
    size = sum(file.stat().st_size for file in given.out.iterdir())
    console.print(
        plain(
            f"{len(images.train):,} + {len(images.test):,} images, {size / 2**20:,.1f} MiB: "
            f"--dataset {shown(given.out)}"
        )
    )


if __name__ == "__main__":
    sys.exit(main())
