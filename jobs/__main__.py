"""`python -m jobs` is the same as `blocksight`."""

from jobs.cli import main

if __name__ == "__main__":
    main()
