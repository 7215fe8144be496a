#!/usr/bin/env python
"""Chat with a model; see --help and README.md."""

from openchatkit.inference.bot import main

if __name__ == "__main__":
    main()
