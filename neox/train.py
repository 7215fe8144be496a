#!/usr/bin/env python
"""One rank of a training run that GPT-NeoX's configuration files describe; deepy.py or torchrun starts each."""

from openchatkit.neox.training import main

if __name__ == "__main__":
    main()
