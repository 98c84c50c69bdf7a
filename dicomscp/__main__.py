"""The command `dicomscp`, which is `python -m dicomscp` as well."""

import sys

from dicomscp import children


def main() -> None:
    """Run the command line."""
    if sys.argv[1:2] == ["serve"]:
        children.prepare()
    from dicomscp import cli  # noqa: PLC0415 - takes a second, in which what children are forked off imports it too

    cli.main()


if __name__ == "__main__":
    main()
