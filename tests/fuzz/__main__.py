"""The command: see :mod:`fuzz.survey`."""

from fuzz.survey import main

if __name__ == "__main__":
    main()
