"""Measure how long models take to load and to answer once, and how much memory they fill."""

from openchatkit.tools.load_benchmark import main

if __name__ == "__main__":
    main()
