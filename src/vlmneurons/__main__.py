"""``python -m vlmneurons``: the command line, see `vlmneurons.cli`."""

from vlmneurons.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
