"""Make a checkpoint that GPT-NeoX reads, of a model of any folder; see README.md."""

from openchatkit.convert.to_neox import main

if __name__ == "__main__":
    main()
