#!/usr/bin/env python
"""Generate text with the model that GPT-NeoX's configuration files describe."""

from openchatkit.neox.generation import main

if __name__ == "__main__":
    main()
