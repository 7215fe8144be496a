#!/usr/bin/env python
"""The name of eval.py in 2021: evaluate the model that configuration files describe."""

from openchatkit.neox.evaluation import main

if __name__ == "__main__":
    main()
