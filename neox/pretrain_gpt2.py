#!/usr/bin/env python
"""The name of train.py in 2021: one rank of a training run that configuration files describe."""

from openchatkit.neox.training import main

if __name__ == "__main__":
    main()
