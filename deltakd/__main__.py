"""``python -m deltakd <command> ...``: the console script, even if it is not installed."""

from deltakd.cli import main

if __name__ == "__main__":
    main()
