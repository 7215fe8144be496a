"""Train a byte-level BPE tokenizer on files of records."""

from openchatkit.tools.tokenizer_training import main

if __name__ == "__main__":
    main()
