"""``python -m hmmnet`` is the command line."""

from hmmnet.cli import main

if __name__ == "__main__":
    main()
