"""``python -m vlmneurons``: the command line, see `vlmneurons.commands`."""

from vlmneurons.commands import main

if __name__ == "__main__":
    raise SystemExit(main())
