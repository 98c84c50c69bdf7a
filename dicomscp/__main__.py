"""The command `dicomscp`, which is `python -m dicomscp` as well."""

import gc
import sys

_START_CHILDREN = {"serve", "import", "rebuild", "verify"}


def main() -> None:
    """Run the command line."""
    gc.disable()  # what is imported stays: to look through it meanwhile takes an eighth of the time
    from dicomscp import children, cli  # noqa: PLC0415 - while nothing is collected

    gc.freeze()
    gc.enable()
    if _START_CHILDREN.intersection(sys.argv[1:2]):
        children.prepare()
    cli.main()


if __name__ == "__main__":
    main()
