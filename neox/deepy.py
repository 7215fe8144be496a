#!/usr/bin/env python
"""Start a script of GPT-NeoX on every rank: `./deepy.py train.py -d configs small.yml local_setup.yml`."""

from openchatkit.neox.deepy import main

if __name__ == "__main__":
    main()
