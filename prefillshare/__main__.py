"""`python -m prefillshare`: the command line."""

from prefillshare.cli import main

if __name__ == "__main__":
    main()
