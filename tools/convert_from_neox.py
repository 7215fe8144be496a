"""Make layer shards of a checkpoint of GPT-NeoX, for training; see README.md."""

from openchatkit.convert.from_neox import main

if __name__ == "__main__":
    main()
