"""`python -m dicomscp` is the command `dicomscp`."""

from dicomscp.cli import main

if __name__ == "__main__":
    main()
