#!/usr/bin/env python
"""The name of generate.py in 2021: text from the model that configuration files describe."""

from openchatkit.neox.generation import main

if __name__ == "__main__":
    main()
