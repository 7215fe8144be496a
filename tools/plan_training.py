"""Compute what training takes on a layout: memory of each rank, messages of a step and an estimate of its time."""

from openchatkit.tools.planning.command import main

if __name__ == "__main__":
    main()
